//! Writes into granted memory, what is refused of them, their end, and the messages that follow them.

use std::time::Duration;

use baton_config::Epoch;
use baton_transfer::wire::{HEADER_BYTES, MAX_NOTIFICATION_BYTES};
use baton_transfer::{
    Agent, AgentOptions, BackendKind, BlockRead, BlockWrite, Descriptor, Destination, Refusal, RegionId,
    Session, Target, Token, TransferError,
};
use tokio::time::{Instant, timeout};

use crate::proxy::{Mode, Proxy};
use crate::support::{
    EPOCH, HANDOFF, OWNER, Owner, assert_in_place, bytes_at, deadline, each, ends_first, memory, name,
    pattern, reader,
};

const LONG: Duration = Duration::from_secs(10);

/// `count` blocks of `len` bytes, from odd places to every second place from the end of the region.
fn writes(region: RegionId, count: usize, len: u32) -> Vec<BlockWrite> {
    let block = |index: usize| {
        let offset = ((count - 1 - index) * 2 * len as usize + 3) as u64;
        BlockWrite { from: index * (len as usize + 5), to: Descriptor { region, offset, len } }
    };
    (0..count).map(block).collect()
}

fn over_tcp(worker: &str) -> AgentOptions {
    AgentOptions { backends: vec![BackendKind::Tcp], ..AgentOptions::new(name(worker)) }
}

struct Pair {
    owner: Owner,
    writer: Agent,
    session: Session,
    source: baton_transfer::HostMemory,
    /// The owner's region.
    target: baton_transfer::HostMemory,
    region: RegionId,
}

async fn pair_with(owner: AgentOptions, writer: AgentOptions, proxy: Option<&Proxy>, bytes: usize) -> Pair {
    let owner = Owner::start_with(owner, 4096).await;
    if let Some(proxy) = proxy {
        proxy.lead_to(owner.agent.local_address());
    }
    let target = memory(bytes);
    let region = owner.agent.register(target.clone()).unwrap();
    let source = memory(bytes);
    source.write(0, &pattern(77, bytes as u32));
    let writer = Agent::start(writer).await.unwrap();
    writer.set_epoch(Epoch(6));
    let session = owner.session(&writer).await.unwrap();
    Pair { owner, writer, session, source, target, region }
}

async fn pair(bytes: usize) -> Pair {
    pair_with(over_tcp(OWNER), over_tcp("prefill-3"), None, bytes).await
}

impl Pair {
    fn granted(&self, count: usize, len: u32) -> Vec<BlockWrite> {
        let blocks = writes(self.region, count, len);
        self.owner.agent.grant_write(HANDOFF, &blocks.iter().map(|block| block.to).collect::<Vec<_>>());
        blocks
    }

    async fn write(&self, blocks: &[BlockWrite]) -> Result<(), TransferError> {
        self.session.write(HANDOFF, blocks, &self.source, deadline()).await.map(|_| ())
    }

    fn assert_written(&self, blocks: &[BlockWrite]) {
        for block in blocks {
            let wanted = pattern(77 + block.from, block.to.len);
            assert!(bytes_at(&self.target, block.to.offset as usize, block.to.len) == wanted, "{block:?}");
        }
    }
}

fn refusal(outcome: Result<(), TransferError>) -> Refusal {
    match outcome {
        Err(TransferError::Refused { refusal, .. }) => refusal,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn blocks_are_written_to_their_places_and_nowhere_else() {
    let token = Some(Token::from_file_bytes(b"k7Jw0pQx9ZfLr2TnVb5Ys8HdMc3Ge6Ua").unwrap());
    for auth in [None, token] {
        let with = |worker: &str| AgentOptions { auth: auth.clone(), ..over_tcp(worker) };
        let pair = pair_with(with(OWNER), with("prefill-3"), None, 64 << 20).await;
        let mut bytes = 0;
        for (count, len) in [(1, 1), (64, 4096), (3000, 700), (28, 1 << 20)] {
            let blocks = pair.granted(count, len);
            pair.write(&blocks).await.unwrap();
            pair.assert_written(&blocks);
            // Every other place stays as it was.
            assert!(bytes_at(&pair.target, len as usize + 3, len.min(700)).iter().all(|byte| *byte == 0));
            bytes += count as u64 * u64::from(len);
            pair.target.write(0, &vec![0; 64 << 20]);
        }
        assert_eq!(pair.owner.agent.stats().taken_bytes().0, bytes);
        assert_eq!(pair.writer.stats().written_bytes(BackendKind::Tcp).0, bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_are_written_over_everything_that_opens_here() {
    for backend in each().await {
        let with = |worker: &str| AgentOptions { backends: vec![backend], ..AgentOptions::new(name(worker)) };
        let pair = pair_with(with(OWNER), with("prefill-3"), None, 64 << 20).await;
        assert_eq!(pair.session.path().backend, backend);
        for (count, len) in [(1, 1), (64, 4096), (1500, 700), (28, 1 << 20)] {
            let blocks = pair.granted(count, len);
            pair.write(&blocks).await.unwrap();
            pair.assert_written(&blocks);
            assert!(bytes_at(&pair.target, len as usize + 3, len.min(700)).iter().all(|byte| *byte == 0));
            timeout(LONG, pair.owner.agent.revoke(HANDOFF).settled()).await.unwrap();
            assert_eq!(refusal(pair.write(&blocks).await), Refusal::NotGranted, "{backend}");
            pair.target.write(0, &vec![0; 64 << 20]);
        }
    }
}

/// One that has no other owner left makes room with the next write, on both sides.
#[tokio::test]
async fn memory_that_was_lent_is_not_kept() {
    let with =
        |worker: &str| AgentOptions { backends: vec![BackendKind::Shm], ..AgentOptions::new(name(worker)) };
    let pair = pair_with(with(OWNER), with("prefill-3"), None, 1 << 20).await;
    let blocks = pair.granted(8, 4096);
    let is_mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().contains("baton-lent once");
    let lent = baton_transfer::HostMemory::allocate(1 << 20, "lent once").unwrap();
    pair.session.write(HANDOFF, &blocks, &lent, deadline()).await.unwrap();
    assert!(is_mapped());
    drop(lent);
    pair.write(&blocks).await.unwrap();
    assert!(!is_mapped());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_write_does_not_wait_behind_a_long_one() {
    const LONG_LEN: u32 = 2 << 20;
    for backend in each().await {
        let with = |worker: &str| AgentOptions { backends: vec![backend], ..AgentOptions::new(name(worker)) };
        let pair = pair_with(with(OWNER), with("prefill-3"), None, 192 << 20).await;
        let to =
            |at: usize, len| Descriptor { region: pair.region, offset: (at * LONG_LEN as usize) as u64, len };
        let long: Vec<_> = (0..64).map(|at| BlockWrite { from: 0, to: to(at, LONG_LEN) }).collect();
        let short = [BlockWrite { from: 7, to: to(80, 4096) }];
        let granted = long.iter().chain(&short).map(|block| block.to);
        pair.owner.agent.grant_write(HANDOFF, &granted.collect::<Vec<_>>());
        let was_first = ends_first(|| pair.write(&short), || pair.write(&long)).await;
        assert!(was_first, "over {backend} it waited");
        pair.assert_written(&short);
        pair.assert_written(&long[63..]);
    }
}

/// Over mapped memory and over memory that the kernel copies: what is lent is taken as it is now, also when other memory
/// lies where it was, and more of it than one connection remembers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_of_this_host_is_lent_and_copied_by_the_owner() {
    for backend in [BackendKind::Shm, BackendKind::Cma] {
        let with = |worker: &str| AgentOptions { backends: vec![backend], ..AgentOptions::new(name(worker)) };
        let pair = pair_with(with(OWNER), with("prefill-3"), None, 1 << 20).await;
        if pair.session.path().backend != backend {
            eprintln!("skipped: no {backend} here");
            continue;
        }
        let blocks = pair.granted(8, 4096);
        let mut kept = Vec::new();
        for round in 0..20 {
            let source = memory(1 << 20);
            source.write(0, &pattern(round, 1 << 20));
            pair.session.write(HANDOFF, &blocks, &source, deadline()).await.unwrap();
            for block in &blocks {
                let wanted = pattern(round + block.from, block.to.len);
                assert!(bytes_at(&pair.target, block.to.offset as usize, block.to.len) == wanted);
            }
            if round % 3 == 0 {
                kept.push(source);
            }
        }
        // Reads over the same connection go on beside writes.
        let read = pair.owner.granted(4, 100);
        let into = memory(4096);
        pair.session.read(HANDOFF, &read, Destination::Memory(&into), deadline()).await.unwrap();
        assert_in_place(&into, &read);
        // The end of a grant waits for nobody, and nothing comes after it.
        let (long, short) = (pair.granted(1, 400_000), pair.granted(100, 4096));
        for blocks in [long, short] {
            pair.owner.agent.grant_write(HANDOFF, &blocks.iter().map(|block| block.to).collect::<Vec<_>>());
            let revoke = async {
                tokio::time::sleep(Duration::from_micros(50)).await;
                timeout(LONG, pair.owner.agent.revoke(HANDOFF).settled()).await.unwrap();
                pair.target.write(0, &vec![0xee; 1 << 20]);
            };
            let (_, ()) = tokio::join!(pair.write(&blocks), revoke);
            assert!(bytes_at(&pair.target, 0, 1 << 20).iter().all(|byte| *byte == 0xee), "{backend}");
            let again = pair.write(&blocks).await;
            let again =
                if let Err(TransferError::Link { .. }) = again { pair.write(&blocks).await } else { again };
            assert!(again.is_err(), "{backend}: written without a grant");
            pair.granted(100, 4096);
            pair.granted(1, 400_000);
        }
    }
}

#[tokio::test]
async fn writes_to_several_regions_go_in_one_call() {
    let pair = pair(1 << 20).await;
    let other = memory(1 << 20);
    let second = pair.owner.agent.register(other.clone()).unwrap();
    let mut blocks = writes(pair.region, 10, 1000);
    for block in blocks.iter_mut().skip(3).step_by(2) {
        block.to.region = second;
    }
    pair.owner.agent.grant_write(HANDOFF, &blocks.iter().map(|block| block.to).collect::<Vec<_>>());
    pair.write(&blocks).await.unwrap();
    for block in blocks {
        let memory = if block.to.region == second { &other } else { &pair.target };
        assert!(bytes_at(memory, block.to.offset as usize, 1000) == pattern(77 + block.from, 1000));
    }
}

/// Each change of the region is a request of its own. Answers that nobody takes would fill the sockets, and then the
/// owner would take nothing more.
#[tokio::test]
async fn a_write_of_many_requests_waits_for_their_answers() {
    let proxy = Proxy::start().await;
    let owner = AgentOptions { advertise: Some(proxy.address), ..over_tcp(OWNER) };
    let pair = pair_with(owner, over_tcp("prefill-3"), Some(&proxy), 1 << 20).await;
    let other = memory(1 << 20);
    let regions = [pair.region, pair.owner.agent.register(other.clone()).unwrap()];
    let to = |index: usize| Descriptor { region: regions[index % 2], offset: index as u64 * 16, len: 16 };
    let blocks: Vec<BlockWrite> = (0..3000).map(|at| BlockWrite { from: at * 16, to: to(at) }).collect();
    pair.owner.agent.grant_write(HANDOFF, &blocks.iter().map(|block| block.to).collect::<Vec<_>>());
    proxy.set(Mode::Hold(0));
    let write = pair.write(&blocks);
    tokio::pin!(write);
    let taken = || pair.owner.agent.stats().taken_bytes().0;
    let some_are_taken = async {
        while taken() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // What was sent is taken by then.
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    tokio::select! {
        biased;
        outcome = &mut write => panic!("nothing was answered: {outcome:?}"),
        () = some_are_taken => {}
    }
    assert!(taken() < 3000 * 16, "everything was sent");
    proxy.set(Mode::Relay);
    write.await.unwrap();
    for (at, block) in blocks.iter().enumerate() {
        let memory = if at % 2 == 0 { &pair.target } else { &other };
        assert!(bytes_at(memory, at * 16, 16) == pattern(77 + block.from, 16), "block {at}");
    }
    assert_eq!(taken(), 3000 * 16);
}

/// The owner copies a write from this host itself: it stops when the grant ends.
#[tokio::test]
async fn a_write_that_is_revoked_while_it_is_copied_goes_no_further() {
    for backend in [BackendKind::Shm, BackendKind::Cma] {
        let with = |worker: &str| AgentOptions { backends: vec![backend], ..AgentOptions::new(name(worker)) };
        let pair = pair_with(with(OWNER), with("prefill-3"), None, 32 << 20).await;
        let blocks = pair.granted(12, 1 << 20);
        let write = pair.session.write(HANDOFF, &blocks, &pair.source, deadline());
        tokio::pin!(write);
        let first = blocks[0].to.offset as usize;
        while bytes_at(&pair.target, first, 1) != pattern(77, 1) {
            assert!(futures_util::poll!(write.as_mut()).is_pending(), "{backend}: it is done already");
            tokio::task::yield_now().await;
        }
        timeout(LONG, pair.owner.agent.revoke(HANDOFF).settled()).await.unwrap();
        pair.target.write(0, &vec![0xee; 32 << 20]);
        let outcome = write.await;
        assert_eq!(refusal(outcome.map(|_| ())), Refusal::NotGranted, "{backend}");
        assert!(bytes_at(&pair.target, 0, 32 << 20).iter().all(|byte| *byte == 0xee), "{backend}");
        // It is no fault of the path, which others use as well.
        assert!(pair.session.is_usable(), "{backend}");
    }
}

#[tokio::test]
async fn what_is_not_granted_for_writing_is_not_written() {
    let pair = pair(1 << 20).await;
    let blocks = writes(pair.region, 4, 4096);
    assert_eq!(refusal(pair.write(&blocks).await), Refusal::NotGranted);
    // A grant for reading is none for writing, nor the other way round.
    let places: Vec<Descriptor> = blocks.iter().map(|block| block.to).collect();
    pair.owner.agent.grant(HANDOFF, places.clone());
    assert_eq!(refusal(pair.write(&blocks).await), Refusal::NotGranted);
    pair.owner.agent.revoke(HANDOFF);
    pair.owner.agent.grant_write(HANDOFF, &places[1..]);
    assert_eq!(refusal(pair.write(&blocks).await), Refusal::OutsideGrant);
    let read = [BlockRead { source: places[1], to: 0, expected: None }];
    let read = pair.session.read(HANDOFF, &read, Destination::Memory(&memory(4096)), deadline()).await;
    assert_eq!(refusal(read.map(|_| ())), Refusal::NotGranted);
    let outside = [BlockWrite { from: 0, to: Descriptor { region: RegionId(9), offset: 0, len: 8 } }];
    pair.owner.agent.grant_write(HANDOFF, &[outside[0].to]);
    assert_eq!(refusal(pair.write(&outside).await), Refusal::OutsideRegion);
    let probe = [BlockWrite { from: 0, to: Descriptor { region: RegionId(0), offset: 0, len: 8 } }];
    assert_eq!(refusal(pair.write(&probe).await), Refusal::OutsideGrant);
    assert!(bytes_at(&pair.target, 0, 1 << 20).iter().all(|byte| *byte == 0));
    // The connection goes on after refusals.
    pair.write(&blocks[1..]).await.unwrap();
    pair.assert_written(&blocks[1..]);
}

#[tokio::test]
async fn blocks_that_make_no_sense_are_refused_before_a_byte_moves() {
    let pair = pair(1 << 20).await;
    let good = pair.granted(2, 4096);
    for (bad, why) in [
        (BlockWrite { to: Descriptor { len: 0, ..good[1].to }, ..good[1] }, Refusal::EmptyBlock),
        (BlockWrite { from: (1 << 20) - 1, ..good[1] }, Refusal::OutsideMemory),
        (
            BlockWrite { to: Descriptor { offset: good[0].to.offset + 1, ..good[0].to }, ..good[1] },
            Refusal::Overlap,
        ),
        (BlockWrite { to: Descriptor { len: u32::MAX, ..good[1].to }, ..good[1] }, Refusal::TooLarge),
    ] {
        assert_eq!(refusal(pair.write(&[good[0], bad]).await), why);
    }
    let reads = |second: BlockRead| {
        let first = BlockRead { source: good[0].to, to: 0, expected: None };
        let (session, into) = (pair.session.clone(), memory(8192));
        async move {
            let read = session.read(HANDOFF, &[first, second], Destination::Memory(&into), deadline()).await;
            refusal(read.map(|_| ()))
        }
    };
    let source = good[1].to;
    assert_eq!(reads(BlockRead { source, to: 4095, expected: None }).await, Refusal::Overlap);
    assert_eq!(reads(BlockRead { source, to: 4097, expected: None }).await, Refusal::OutsideMemory);
    let empty = Descriptor { len: 0, ..source };
    assert_eq!(reads(BlockRead { source: empty, to: 4096, expected: None }).await, Refusal::EmptyBlock);
    assert_eq!(pair.owner.agent.stats().taken_bytes().0, 0);
}

#[tokio::test]
async fn bytes_changed_on_the_way_do_not_count() {
    let proxy = Proxy::start().await;
    let mut owner = AgentOptions::new(name(OWNER));
    owner.advertise = Some(proxy.address);
    let writer = over_tcp("prefill-3");
    let pair = pair_with(owner, writer, Some(&proxy), 1 << 20).await;
    let blocks = pair.granted(10, 20_000);
    proxy.set(Mode::FlipUpstreamOnce(HEADER_BYTES * 6 + 100_000));
    assert_eq!(refusal(pair.write(&blocks).await), Refusal::Corrupt);
    assert_eq!((proxy.flips(), pair.owner.agent.stats().checksum_mismatches), (1, 1));
    pair.write(&blocks).await.unwrap();
    pair.assert_written(&blocks);
}

/// The owner ends the grant in the middle of a write: from then on nothing more of it lands, and it waits for that. A short
/// write is refused by name; a long one is cut off.
#[tokio::test]
async fn a_revoked_write_lands_nowhere_once_that_is_settled() {
    for (count, len, held) in [(100, 64 << 10, 1 << 20), (8, 16 << 10, 50_000)] {
        let proxy = Proxy::start().await;
        let mut owner = AgentOptions::new(name(OWNER));
        owner.advertise = Some(proxy.address);
        let writer = over_tcp("prefill-3");
        let pair = pair_with(owner, writer, Some(&proxy), 16 << 20).await;
        let blocks = pair.granted(count, len);
        proxy.set(Mode::HoldUpstream(held));
        let write = pair.session.write(HANDOFF, &blocks, &pair.source, deadline());
        tokio::pin!(write);
        let first = blocks[0].to.offset as usize;
        let arrives = async {
            while bytes_at(&pair.target, first, len) != pattern(77, len) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            biased;
            outcome = &mut write => panic!("it was held back: {outcome:?}"),
            () = arrives => {}
        }
        timeout(LONG, pair.owner.agent.revoke(HANDOFF).settled()).await.unwrap();
        pair.target.write(0, &vec![0xee; 16 << 20]);
        proxy.set(Mode::Relay);
        let outcome = write.await.map(|_| ());
        match count {
            100 => assert!(matches!(outcome, Err(TransferError::Link { .. })), "{outcome:?}"),
            _ => assert_eq!(refusal(outcome), Refusal::NotGranted),
        }
        assert!(bytes_at(&pair.target, 0, 16 << 20).iter().all(|byte| *byte == 0xee));
        let again = pair.granted(count, len);
        pair.write(&again).await.unwrap();
        pair.assert_written(&again);
        pair.owner.agent.revoke(HANDOFF);
        assert_eq!(refusal(pair.write(&blocks).await), Refusal::NotGranted);
    }
}

#[tokio::test]
async fn notifications_come_after_the_writes_before_them_and_have_limits() {
    let mut owner = AgentOptions::new(name(OWNER));
    owner.limits.notifications = 32;
    let pair = pair_with(owner, over_tcp("prefill-3"), None, 16 << 20).await;
    let notifications = pair.owner.agent.notifications();
    let blocks = pair.granted(100, 64 << 10);
    let posted = pair.session.prepare_write(HANDOFF, blocks.clone(), pair.source.clone()).unwrap();
    let posted = posted.post(deadline());
    // The write is at work before the notification is asked for: its task has been polled.
    while pair.owner.agent.stats().taken_bytes().0 == 0
        && bytes_at(&pair.target, blocks[0].to.offset as usize, 1) != pattern(77, 1)
    {
        tokio::time::sleep(Duration::from_micros(100)).await;
    }
    pair.session.notify(HANDOFF, b"written", deadline()).await.unwrap();
    let notification = timeout(LONG, notifications.next()).await.unwrap();
    pair.assert_written(&blocks);
    assert_eq!(notification.payload, b"written");
    assert_eq!((notification.from, notification.handoff), (name("prefill-3"), HANDOFF));
    assert_eq!(notification.from_epoch, Epoch(6));
    posted.await.unwrap();

    let long = vec![1; MAX_NOTIFICATION_BYTES];
    pair.session.notify(HANDOFF, &long, deadline()).await.unwrap();
    let longer = vec![1; MAX_NOTIFICATION_BYTES + 1];
    assert_eq!(refusal(pair.session.notify(HANDOFF, &longer, deadline()).await), Refusal::TooLarge);
    for _ in 0..3 {
        pair.session.notify(HANDOFF, b"", deadline()).await.unwrap();
    }
    assert_eq!(refusal(pair.session.notify(HANDOFF, b"", deadline()).await), Refusal::Overloaded);
    assert_eq!(timeout(LONG, notifications.next()).await.unwrap().payload, long);
    pair.session.notify(HANDOFF, b"room again", deadline()).await.unwrap();
}

/// A write that stands still, a notification that waits for it, and a write that has less time than both.
#[tokio::test]
async fn the_deadline_of_a_write_holds_behind_a_notification_that_waits() {
    let proxy = Proxy::start().await;
    let mut owner = AgentOptions::new(name(OWNER));
    owner.advertise = Some(proxy.address);
    let pair = pair_with(owner, over_tcp("prefill-3"), Some(&proxy), 16 << 20).await;
    let blocks = pair.granted(100, 64 << 10);
    proxy.set(Mode::HoldUpstream(1 << 20));
    let standing = pair.session.write(HANDOFF, &blocks, &pair.source, deadline());
    let waiting = pair.session.notify(HANDOFF, b"later", deadline());
    let late = async {
        let soon = Instant::now() + Duration::from_millis(200);
        timeout(Duration::from_secs(5), pair.session.write(HANDOFF, &blocks, &pair.source, soon)).await
    };
    tokio::select! {
        biased;
        outcome = standing => panic!("it was held back: {outcome:?}"),
        outcome = waiting => panic!("it goes before the write: {outcome:?}"),
        outcome = late => {
            let outcome = outcome.expect("its deadline has passed long ago");
            assert!(matches!(outcome, Err(TransferError::Deadline { .. })), "{outcome:?}");
        }
    }
}

#[tokio::test]
async fn a_prepared_read_is_posted_many_times_polled_and_awaited() {
    let owner = Owner::start(4 << 20).await;
    for backend in BackendKind::ALWAYS {
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        let blocks = owner.granted(64, 4096);
        let into = memory(1 << 20);
        let prepared = session.prepare_read(HANDOFF, blocks.clone(), Target::Memory(into.clone())).unwrap();
        for _ in 0..20 {
            into.write(0, &vec![0; 1 << 20]);
            let report = prepared.post(deadline()).await.unwrap();
            assert_eq!(report.bytes.0, 64 * 4096);
            assert_in_place(&into, &blocks);
        }
        let mut polled = prepared.post(deadline());
        let start = Instant::now();
        while !polled.is_done() {
            assert!(start.elapsed() < LONG);
            tokio::task::yield_now().await;
        }
        assert!(polled.is_done());
        polled.await.unwrap();
        prepared.run(deadline()).await.unwrap();
        let mut twice = blocks.clone();
        twice[1].to = twice[0].to;
        let refused = session.prepare_read(HANDOFF, twice, Target::Memory(into)).map(|_| ());
        assert_eq!(refusal(refused), Refusal::Overlap);
        owner.agent.revoke(HANDOFF);
        assert!(matches!(prepared.post(deadline()).await, Err(TransferError::Refused { .. })));
    }
}

/// Nothing of a write is sent twice: a stream that has ended meanwhile must not get any of it.
#[tokio::test]
async fn a_write_does_not_use_a_stream_that_has_ended() {
    let proxy = Proxy::start().await;
    let owner = AgentOptions { advertise: Some(proxy.address), ..over_tcp(OWNER) };
    let pair = pair_with(owner, over_tcp("prefill-3"), Some(&proxy), 1 << 20).await;
    let blocks = pair.granted(8, 4096);
    for _ in 0..5 {
        pair.write(&blocks).await.unwrap();
        proxy.end_open().await;
    }
    pair.assert_written(&blocks);
}

/// In the middle of a read, whatever carries it: what is under way lands nowhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_post_that_is_cancelled_writes_nothing_afterwards_over_any_path() {
    const LEN: u32 = 1 << 20;
    let into = memory(16 * LEN as usize);
    let other = vec![0xee; into.len()];
    for backend in each().await {
        let owner = Owner::start(4 << 20).await;
        let reader = reader(backend).await;
        let session = owner.session(&reader).await.unwrap();
        let source = owner.granted(1, LEN)[0];
        let blocks: Vec<_> = (0..16).map(|at| BlockRead { to: at * LEN as usize, ..source }).collect();
        let prepared = session.prepare_read(HANDOFF, blocks.clone(), Target::Memory(into.clone())).unwrap();
        for round in 0..24u32 {
            into.write(0, &other);
            let mut posted = prepared.post(deadline());
            // At different places: before the first byte, and behind some blocks. Giving a read up may have cost the
            // connection, which the next one then finds out.
            let place = round as usize % 8 * LEN as usize;
            while round > 2 && bytes_at(&into, place, 1) == [0xee] && !posted.is_done() {
                tokio::task::yield_now().await;
            }
            timeout(LONG, posted.cancel()).await.unwrap();
            into.write(0, &other);
            tokio::time::sleep(Duration::from_millis(5)).await;
            assert!(bytes_at(&into, 0, into.len() as u32) == other, "over {backend}, round {round}");
        }
        if prepared.run(deadline()).await.is_err() {
            prepared.run(deadline()).await.unwrap();
        }
        assert_in_place(&into, &blocks);
    }
}

#[tokio::test]
async fn a_cancelled_post_is_fenced() {
    let proxy = Proxy::start().await;
    let mut options = AgentOptions::new(name(OWNER));
    options.advertise = Some(proxy.address);
    let owner = Owner::start_with(options, 16 << 20).await;
    proxy.lead_to(owner.agent.local_address());
    let reader = reader(BackendKind::Tcp).await;
    let session = owner.session(&reader).await.unwrap();
    let blocks = owner.granted(40, 64 << 10);
    proxy.set(Mode::Hold(HEADER_BYTES * 2 + (2 * (64 << 10))));
    let into = memory(16 << 20);
    let prepared = session.prepare_read(HANDOFF, blocks.clone(), Target::Memory(into.clone())).unwrap();
    let mut posted = prepared.post(deadline());
    while bytes_at(&into, blocks[1].to + 65_535, 1) != pattern(blocks[1].source.offset as usize + 65_535, 1) {
        assert!(!posted.is_done());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    timeout(LONG, posted.cancel()).await.unwrap();
    into.write(0, &vec![0xee; 16 << 20]);
    proxy.set(Mode::Relay);
    proxy.until_open(|open| *open == 0).await;
    assert!(bytes_at(&into, 0, 16 << 20).iter().all(|byte| *byte == 0xee));
    prepared.post(deadline()).await.unwrap();
    assert_in_place(&into, &blocks);
}

#[tokio::test]
async fn a_write_to_a_later_life_is_stale() {
    let pair = pair(1 << 20).await;
    let blocks = pair.granted(2, 4096);
    pair.write(&blocks).await.unwrap();
    pair.owner.agent.set_epoch(Epoch(EPOCH.0 + 1));
    let stale = match pair.write(&blocks).await {
        // The stream of the former life was still open.
        Err(TransferError::Link { .. }) => pair.write(&blocks).await,
        other => other,
    };
    assert!(matches!(stale, Err(TransferError::Stale { .. })), "{stale:?}");
    let stale = pair.session.notify(HANDOFF, b"", deadline()).await;
    assert!(matches!(stale, Err(TransferError::Stale { .. })), "{stale:?}");
    pair.writer.disconnect(&name(OWNER));
    let later = Epoch(EPOCH.0 + 1);
    let session = pair.writer.connect(&name(OWNER), later, &pair.owner.metadata).await.unwrap();
    let outcome = session.write(HANDOFF, &blocks, &pair.source, deadline()).await;
    assert_eq!(refusal(outcome.map(|_| ())), Refusal::NotGranted, "grants end with their life");
    // Where the life can be seen, nothing has to be asked.
    for backend in [BackendKind::Shm, BackendKind::Cma] {
        let with = |worker: &str| AgentOptions { backends: vec![backend], ..AgentOptions::new(name(worker)) };
        let pair = pair_with(with(OWNER), with("prefill-3"), None, 1 << 20).await;
        let blocks = pair.granted(2, 4096);
        pair.write(&blocks).await.unwrap();
        pair.owner.agent.set_epoch(later);
        let stale = pair.write(&blocks).await;
        let current = match &stale {
            Err(TransferError::Stale { current, .. }) => *current,
            _ => None,
        };
        assert_eq!(current, Some(later), "{backend}: {stale:?}");
    }
}
