use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::backend::control::{Control, Handler};
use crate::backend::handshake::Route;
use crate::session::BlockWrite;
use crate::wire::Metadata;
use crate::wire::control::{Attach, MAX_WINDOWS, Window, WindowIs, Write};

/// A writer whose memory holds the pattern, and where it may write to.
struct Written {
    pair: Pair,
    target: HostMemory,
    region: RegionId,
    source: HostMemory,
}

async fn written_with(seed: u64, faults: Faults, integrity: Integrity) -> Written {
    let pair = pair_with(seed, faults, FabricLimits::default(), integrity).await;
    let target = memory(LEN);
    let region = pair.owner.agent.register(target.clone()).unwrap();
    let source = pair.source.clone();
    Written { pair, target, region, source }
}

impl Written {
    /// Blocks of `lens` bytes, backwards in the peer's memory, granted to be written.
    fn blocks(&self, lens: &[u32]) -> Vec<BlockWrite> {
        let (mut from, mut end) = (0, LEN);
        let mut blocks = Vec::new();
        for len in lens {
            end -= *len as usize + 3;
            let to = Descriptor { region: self.region, offset: end as u64, len: *len };
            blocks.push(BlockWrite { from, to });
            from += *len as usize + 1;
        }
        let granted: Vec<Descriptor> = blocks.iter().map(|block| block.to).collect();
        self.pair.owner.agent.grant_write(HANDOFF, &granted);
        blocks
    }

    fn is_written(&self, block: &BlockWrite) -> bool {
        let mut bytes = vec![0; block.to.len as usize];
        self.target.read(block.to.offset as usize, &mut bytes);
        bytes == pattern(block.from, block.to.len as usize)
    }

    async fn write(&self, blocks: &[BlockWrite]) -> Result<(), TransferError> {
        self.pair.session().await.write(HANDOFF, blocks, &self.source, soon()).await.map(|_| ())
    }

    /// Ends the grant, reuses the memory, and sees that nothing lands there.
    async fn assert_settled(&self) {
        let settled = self.pair.owner.agent.revoke(HANDOFF).settled();
        tokio::time::timeout(Duration::from_secs(15), settled).await.expect("the grant ends");
        self.target.write(0, &vec![0xee; LEN]);
        tokio::time::sleep(Duration::from_millis(5)).await;
        let mut bytes = vec![0; LEN];
        self.target.read(0, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0xee), "written after the end of the grant");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_are_written_verified_and_their_windows_closed() {
    for integrity in [Integrity::Digest, Integrity::Off] {
        let written = written_with(1, Faults::default(), integrity).await;
        let mut total = 0;
        for lens in SHAPES {
            let blocks = written.blocks(lens);
            written.write(&blocks).await.unwrap();
            assert!(blocks.iter().all(|block| written.is_written(block)));
            let outside: u64 = lens.iter().map(|len| u64::from(*len)).sum();
            total += outside;
            let mut gap = [1; 3];
            written.target.read(blocks[0].to.offset as usize + lens[0] as usize, &mut gap);
            assert_eq!(gap, [0; 3], "nothing beside the blocks is written");
            written.assert_settled().await;
            written.target.write(0, &vec![0; LEN]);
        }
        assert_eq!(written.pair.owner.agent.stats().taken_bytes().0, total);
        assert_eq!(written.pair.reader.agent.stats().written_bytes(BackendKind::Plugin).0, total);
        // Windows were for one use: what is registered are the buffers of messages and those of short answers.
        assert_eq!(written.pair.world.registered(OWNER), 2);
        assert!(written.pair.world.is_alive(OWNER), "nothing had to be ended by force");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_is_granted_can_be_written() {
    let written = written_with(1, Faults::default(), Integrity::Digest).await;
    let blocks = written.blocks(&[5000, 100_000, 300]);
    let refused = |outcome: Result<(), TransferError>| match outcome {
        Err(TransferError::Refused { refusal, .. }) => refusal,
        other => panic!("not refused: {other:?}"),
    };
    let with = |to: Descriptor| [blocks[0], BlockWrite { to, ..blocks[1] }];
    let beside = Descriptor { offset: blocks[1].to.offset - 1, ..blocks[1].to };
    assert_eq!(refused(written.write(&with(beside)).await), Refusal::OutsideGrant);
    let past = Descriptor { offset: LEN as u64 - 5, ..blocks[1].to };
    let past = [BlockWrite { to: past, ..blocks[1] }];
    assert_eq!(refused(written.write(&past).await), Refusal::OutsideRegion);
    let session = written.pair.session().await;
    let other = session.write(HandoffId(7), &blocks, &written.source, soon()).await.map(|_| ());
    assert_eq!(refused(other), Refusal::NotGranted);
    // To be read is not to be written.
    let readable = written.pair.blocks(&[5000]);
    let to = readable[0].source;
    assert_eq!(refused(written.write(&[BlockWrite { from: 0, to }]).await), Refusal::OutsideGrant);
    written.write(&blocks).await.unwrap();
    written.assert_settled().await;
    assert_eq!(refused(written.write(&blocks).await), Refusal::NotGranted);
}

/// A peer that says what it likes.
struct Liar(Control);

impl Liar {
    async fn attach(written: &Written) -> Self {
        let owner = &written.pair.owner.agent;
        let peer = Metadata::decode(&owner.metadata()).unwrap();
        let pair = crate::backend::Pair {
            from: "liar".parse().unwrap(),
            from_epoch: Epoch(9),
            to: owner.worker().clone(),
            epoch: EPOCH,
            incarnation: peer.incarnation,
        };
        let (tasks, ended) = (TaskTracker::new(), CancellationToken::new());
        let route = Route { address: peer.address, auth: None, counters: Arc::default(), tasks, ended };
        let nothing: Handler = Arc::new(|_, _| Box::pin(async { Err(Denial::Refused(Refusal::Malformed)) }));
        let control = Control::open(pair, &route, nothing).await.unwrap();
        let fabric = written.pair.reader.fabrics.get(BackendKind::Plugin).unwrap();
        let (backend, wire) = (BackendKind::Plugin, fabric.info().wire.clone());
        let attach = Attach { backend, wire, address: fabric.address().to_vec() };
        control.ask(Kind::Attach, &attach.encode()).await.unwrap();
        Self(control)
    }

    async fn ask(&self, kind: Kind, payload: Vec<u8>) -> Result<Bytes, Refusal> {
        match self.0.ask(kind, &payload).await {
            Ok((_, payload)) => Ok(payload),
            Err(Fault::Refused(refusal)) => Err(refusal),
            Err(fault) => panic!("{fault:?}"),
        }
    }

    /// The windows that it gets.
    async fn open(&self, blocks: &[Descriptor]) -> Result<Vec<u64>, Refusal> {
        let asked = Window::encode(BackendKind::Plugin, HANDOFF, blocks.iter().copied());
        let windows = WindowIs::decode(&self.ask(Kind::Window, asked).await?).unwrap().windows;
        Ok(windows.iter().map(|window| window.window).collect())
    }
}

/// What a writer says of its windows is not believed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_lies_about_its_windows_is_refused() {
    let written = written_with(1, Faults::default(), Integrity::Digest).await;
    let liar = Liar::attach(&written).await;
    let [one, other]: [Descriptor; 2] =
        written.blocks(&[5000, 300]).iter().map(|block| block.to).collect::<Vec<_>>().try_into().unwrap();
    let open = async |blocks: &[Descriptor]| liar.open(blocks).await;
    let done = async |handoff, blocks: &[Descriptor], windows: Vec<u64>| {
        let (blocks, digests) = (blocks.to_vec(), Vec::new());
        let said = Write { handoff, first: 0, blocks, digests, windows };
        liar.ask(Kind::Write, said.encode()).await.map(|_| ())
    };
    assert_eq!(open(&[one, one]).await, Err(Refusal::Overlap));
    let beyond = Descriptor { offset: LEN as u64, ..one };
    let longer = Descriptor { offset: one.offset - 1, ..one };
    for beside in [other, beyond, longer] {
        let windows = open(&[one]).await.unwrap();
        assert_eq!(done(HANDOFF, &[beside], windows).await, Err(Refusal::NotGranted), "{beside:?}");
    }
    let windows = open(&[one]).await.unwrap();
    assert_eq!(done(HandoffId(7), &[one], windows.clone()).await, Err(Refusal::NotGranted));
    assert_eq!(done(HANDOFF, &[one, one], windows.clone()).await, Err(Refusal::Overlap));
    assert_eq!(done(HANDOFF, &[one], windows).await, Err(Refusal::NotGranted), "they are closed by then");
    let windows = open(&[one]).await.unwrap();
    done(HANDOFF, &[one], windows).await.unwrap();
    written.assert_settled().await;
}

/// A writer that closes no window has its share of them, and one that needs many waits for its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn windows_have_shares_that_writers_keep_to() {
    let written = written_with(1, Faults::default(), Integrity::Digest).await;
    let liar = Liar::attach(&written).await;
    // A window each.
    let blocks = written.blocks(&[9000; 40 * MAX_WINDOWS]);
    let granted: Vec<Descriptor> = blocks.iter().map(|block| block.to).collect();
    let mut asked = granted.chunks(MAX_WINDOWS);
    for _ in 0..FabricLimits::default().regions / SHARES / MAX_WINDOWS {
        assert_eq!(liar.open(asked.next().unwrap()).await.unwrap().len(), MAX_WINDOWS);
    }
    assert_eq!(liar.open(asked.next().unwrap()).await, Err(Refusal::Overloaded));
    let parts = blocks.chunks(blocks.len() / 40).map(|part| written.write(part));
    for outcome in futures_util::future::join_all(parts).await {
        outcome.unwrap();
    }
    assert!(blocks.iter().all(|block| written.is_written(block)));
    drop(liar);
    written.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_change_on_the_way_are_refused() {
    let faults = Faults { flipped: 1000, ..Faults::default() };
    let written = written_with(1, faults, Integrity::Digest).await;
    let blocks = written.blocks(&[5000, 100_000, 300]);
    match written.write(&blocks).await {
        Err(TransferError::Refused { refusal: Refusal::Corrupt, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(written.pair.owner.agent.stats().checksum_mismatches > 0);
    assert_eq!(written.pair.owner.agent.stats().taken_bytes().0, 0);
    written.assert_settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_grant_ends_the_writes_under_way() {
    let faults = Faults { delay: Duration::from_millis(20), late_writes: true, ..Faults::default() };
    let written = written_with(1, faults, Integrity::Digest).await;
    let blocks = written.blocks(&[100_000; 100]);
    let writing = written.write(&blocks);
    tokio::pin!(writing);
    let started = async {
        while !blocks.iter().any(|block| written.is_written(block)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        biased;
        outcome = &mut writing => panic!("it is slow: {outcome:?}"),
        () = started => {}
    }
    let (outcome, ()) = tokio::join!(writing, written.assert_settled());
    assert!(outcome.is_err(), "{outcome:?}");
    assert!(written.pair.world.is_alive(OWNER), "the writer's word was enough");
    let blocks = written.blocks(&[1000]);
    written.write(&blocks).await.unwrap();
}

/// What ends a write by its owner's word is the end of the grant, however soon the operations end after it: as a fault of
/// the fabric it would cost everybody this path.
#[tokio::test]
async fn a_write_whose_grant_ends_is_refused_and_its_fabric_is_still_good() {
    let written = written_with(1, Faults { depth: 0, ..Faults::default() }, Integrity::Digest).await;
    let session = written.pair.session().await;
    let blocks = written.blocks(&[100_000; 4]);
    let revoked = async {
        while written.pair.world.registered(OWNER) < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        // The thread is done with what it is told before the write is looked at again.
        let busy = TaskTracker::new().spawn(async {
            loop {
                tokio::task::yield_now().await;
                #[expect(clippy::disallowed_methods, reason = "keeps the runtime from the write")]
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        written.pair.owner.agent.revoke(HANDOFF).settled().await;
        busy.abort();
    };
    let writing = session.write(HANDOFF, &blocks, &written.source, soon());
    let (outcome, ()) = tokio::join!(writing, revoked);
    let is_refused = matches!(outcome, Err(TransferError::Refused { refusal: Refusal::NotGranted, .. }));
    assert!(is_refused && session.is_usable(), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_cannot_stop_is_cut_off_and_can_come_back() {
    // Before its fabric has given its operations up, and after.
    for waits in [false, true] {
        cut_off_and_come_back(waits).await;
    }
}

async fn cut_off_and_come_back(waits: bool) {
    let faults = Faults { late_writes: true, ..Faults::default() };
    let written = written_with(1, faults, Integrity::Digest).await;
    let blocks = written.blocks(&[100_000; 3]);
    let session = written.pair.session().await;
    // Its operations neither end nor fail.
    written.pair.world.freeze(OWNER, true);
    {
        let writing = session.write(HANDOFF, &blocks, &written.source, soon());
        assert!(tokio::time::timeout(Duration::from_millis(100), writing).await.is_err());
    }
    while waits && session.is_usable() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    written.assert_settled().await;
    assert!(!written.pair.world.is_alive(OWNER), "the owner's driver was closed");
    written.pair.world.freeze(OWNER, false);
    tokio::time::sleep(Duration::from_millis(10)).await;
    let mut bytes = vec![0; LEN];
    written.target.read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0xee), "written after the end of the grant");

    written.pair.reader.agent.disconnect(written.pair.owner.agent.worker());
    let blocks = written.blocks(&[100_000; 3]);
    let again = async {
        let owner = &written.pair.owner.agent;
        loop {
            // The driver is being opened again.
            let session = written.pair.reader.agent.connect(owner.worker(), EPOCH, &owner.metadata()).await;
            match session {
                Ok(session) => break session,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    let session = tokio::time::timeout(Duration::from_secs(10), again).await.unwrap();
    session.write(HANDOFF, &blocks, &written.source, soon()).await.unwrap();
    assert!(blocks.iter().all(|block| written.is_written(block)));
}

/// An operation that ended in an error may land yet: only the end of the fabric is its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_windows_of_a_write_that_failed_are_closed_by_force() {
    let written = written_with(1, Faults { failed: 1000, ..Faults::default() }, Integrity::Digest).await;
    let blocks = written.blocks(&[5000]);
    let outcome = written.write(&blocks).await;
    assert!(matches!(outcome, Err(TransferError::Link { .. })), "{outcome:?}");
    written.assert_settled().await;
    assert!(!written.pair.world.is_alive(OWNER), "the owner's driver was closed");
}

/// What of a write was under way when it was given up is known as long as it is, whatever is written after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_was_given_up_is_fenced_while_others_go_on() {
    let faults = Faults { delay: Duration::from_millis(150), late_writes: true, ..Faults::default() };
    let written = written_with(1, faults, Integrity::Digest).await;
    let session = written.pair.session().await;
    let blocks = written.blocks(&[3000; 50]);
    {
        let writing = session.write(HANDOFF, &blocks, &written.source, soon());
        tokio::pin!(writing);
        while written.pair.world.posted(READER) < blocks.len() {
            assert!(futures_util::poll!(writing.as_mut()).is_pending());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let other = HandoffId(7);
    let region = written.pair.owner.agent.register(memory(100)).unwrap();
    let to = Descriptor { region, offset: 0, len: 100 };
    written.pair.owner.agent.grant_write(other, &[to]);
    let another = [BlockWrite { from: 0, to }];
    let writing = session.write(other, &another, &written.source, soon());
    let (outcome, ()) = tokio::join!(writing, written.assert_settled());
    outcome.unwrap();
    // What was posted has had its time by now.
    tokio::time::sleep(faults.delay).await;
    for Descriptor { offset, len, .. } in blocks.iter().map(|block| block.to) {
        let mut bytes = vec![0; len as usize];
        written.target.read(offset as usize, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 0xee), "written after the end of the grant");
    }
}

/// Windows may come when their grant has ended already: then nothing is posted. It is tried more than once, as what
/// is posted and given up at once may be neither.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_posted_after_the_end_of_a_grant() {
    for _ in 0..5 {
        end_a_grant_before_its_windows_come().await;
    }
}

async fn end_a_grant_before_its_windows_come() {
    let written = written_with(1, Faults { late_writes: true, ..Faults::default() }, Integrity::Digest).await;
    let session = written.pair.session().await;
    let blocks = written.blocks(&[3 << 20; 3]);
    session.write(HANDOFF, &blocks, &written.source, soon()).await.unwrap();
    let posted = written.pair.world.posted(READER);
    let fabric = written.pair.reader.fabrics.get(BackendKind::Plugin).unwrap();
    written.pair.world.connect_slowly(READER, Duration::from_millis(300));
    // The writer's thread is busy: it takes no keys.
    let busy = fabric.connect(0u64.to_le_bytes().to_vec());
    let writing = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        session.write(HANDOFF, &blocks, &written.source, soon()).await
    };
    let revoked = async {
        while written.pair.world.registered(OWNER) < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        written.pair.owner.agent.revoke(HANDOFF).settled().await;
    };
    let (_peer, outcome, ()) = tokio::join!(busy, writing, revoked);
    let is_refused = matches!(outcome, Err(TransferError::Refused { refusal: Refusal::NotGranted, .. }));
    assert!(is_refused && session.is_usable(), "{outcome:?}");
    assert_eq!(written.pair.world.posted(READER), posted);
}

async fn play_writes(seed: u64) -> [usize; 2] {
    let mut rng = Rng::new(seed);
    let faults = Faults {
        delay: Duration::from_micros(1 + rng.below(3000)),
        again: if rng.below(3) == 0 { 300 } else { 0 },
        lost: if rng.below(4) == 0 { 3 } else { 0 },
        failed: if rng.below(4) == 0 { 3 } else { 0 },
        flipped: if rng.below(4) == 0 { 20 } else { 0 },
        late_writes: true,
        depth: 2 + rng.below(60) as usize,
        descriptor: rng.below(2) == 0,
        ..Faults::default()
    };
    let written = written_with(seed, faults, Integrity::Digest).await;
    let lens: Vec<u32> = (0..40).map(|_| 1 + rng.below(200_000) as u32).collect();
    let mut counts = [0, 0];
    for _ in 0..3 {
        let blocks = written.blocks(&lens);
        let writes = (0..4).map(|part| {
            let (mut rng, written) = (Rng::new(seed * 100 + part), &written);
            let mine = &blocks[part as usize * 10..][..1 + rng.below(10) as usize];
            async move {
                let owner = &written.pair.owner.agent;
                let session =
                    written.pair.reader.agent.connect(owner.worker(), EPOCH, &owner.metadata()).await;
                let Ok(session) = session else { return false };
                let until = Instant::now() + Duration::from_micros(500 + rng.below(200_000));
                let patience =
                    Duration::from_micros(if rng.below(3) == 0 { rng.below(5000) } else { 60_000_000 });
                let writing = session.write(HANDOFF, mine, &written.source, until);
                match tokio::time::timeout(patience, writing).await {
                    Ok(Ok(_)) => {
                        assert!(
                            mine.iter().all(|block| written.is_written(block)),
                            "acknowledged, not written"
                        );
                        true
                    }
                    Ok(Err(_)) | Err(_) => false,
                }
            }
        });
        for done in futures_util::future::join_all(writes).await {
            counts[usize::from(!done)] += 1;
        }
        written.assert_settled().await;
    }
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_fabric_does_nothing_is_written_once_a_grant_is_settled() {
    let mut counts = [0, 0];
    for seed in 0..12 {
        eprintln!("seed {seed}");
        let played = play_writes(seed).await;
        counts = [counts[0] + played[0], counts[1] + played[1]];
    }
    assert!(counts[0] > 20 && counts[1] > 10, "{counts:?}: both ends of the story are told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_keeps_nothing_of_writes_that_are_over() {
    let limits = FabricLimits { regions: 4, ..FabricLimits::default() };
    let pair = pair_with(1, Faults::default(), limits, Integrity::Digest).await;
    let (target, len) = (memory(LEN), 5000);
    let region = pair.owner.agent.register(target.clone()).unwrap();
    let session = pair.session().await;
    for round in 0..12u32 {
        let handoff = HandoffId(100 + u128::from(round));
        let to = Descriptor { region, offset: u64::from(round) * 8192, len };
        pair.owner.agent.grant_write(handoff, &[to]);
        // Of this write alone: its registration ends with it.
        let source = memory(len as usize);
        source.write(0, &pattern(round as usize, len as usize));
        let written = session.write(handoff, &[BlockWrite { from: 0, to }], &source, soon()).await;
        written.unwrap_or_else(|error| panic!("write {round}: {error:?}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn windows_of_writes_that_were_given_up_are_closed() {
    let written = written_with(1, Faults::default(), Integrity::Digest).await;
    // Each in a grant of its own, and so with a window of its own.
    let blocks = written.blocks(&[1000; 16]);
    written.write(&blocks).await.unwrap();
    let (owner, session) =
        (written.pair.owner.fabrics.get(BackendKind::Plugin).unwrap(), written.pair.session().await);
    let world = &written.pair.world;
    for _ in 0..3 {
        let registrations = world.registrations(OWNER);
        world.connect_slowly(OWNER, Duration::from_millis(500));
        let busy = owner.connect(1u64.to_le_bytes().to_vec());
        let giving_up = async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            // The owner's thread is busy: the windows come when nobody waits for them any more.
            tokio::select! {
                biased;
                () = tokio::time::sleep(Duration::from_millis(20)) => {}
                _ = session.write(HANDOFF, &blocks, &written.source, soon()) => panic!("the thread is not busy"),
            }
        };
        let (connected, ()) = tokio::join!(busy, giving_up);
        world.connect_slowly(OWNER, Duration::ZERO);
        drop(connected);
        let begun = Instant::now();
        loop {
            let opened = world.registrations(OWNER) - registrations;
            let left = (world.registered(OWNER) - 2, world.imported(READER));
            if opened == blocks.len() && left == (0, 0) {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(5),
                "of {opened} windows {} are open, and the writer has the keys of {}",
                left.0,
                left.1
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    written.write(&blocks).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_is_settled_when_its_windows_are_gone_and_not_before() {
    let faults = Faults { delay: Duration::from_millis(60), ..Faults::default() };
    let written = written_with(1, faults, Integrity::Digest).await;
    let owner = written.pair.owner.fabrics.get(BackendKind::Plugin).unwrap();
    let session = written.pair.session().await;
    let blocks = written.blocks(&[50_000; 8]);
    written.pair.world.connect_slowly(OWNER, Duration::from_millis(400));
    let busy = async {
        while written.pair.world.registered(OWNER) < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // From here on the owner's thread ends no registration.
        owner.connect(1u64.to_le_bytes().to_vec()).await
    };
    let writing = async {
        session.write(HANDOFF, &blocks, &written.source, soon()).await.unwrap();
        written.pair.owner.agent.revoke(HANDOFF).settled().await;
        assert_eq!(written.pair.world.registered(OWNER), 2, "its memory is used for something else now");
    };
    let (connected, ()) = tokio::join!(busy, writing);
    drop(connected);
}
