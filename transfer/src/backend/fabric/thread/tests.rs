use std::time::{Duration, Instant};

use super::*;
use crate::backend::fabric::batch::{Transfer, Verb};
use crate::backend::fabric::driver::{Done, LocalId, LocalRange, PostError};
use crate::backend::fabric::testing::{Faults, Rng, World};
use crate::memory::HostMemory;

const LEN: usize = 1 << 20;

fn memory() -> HostMemory {
    HostMemory::allocate(LEN, "test").unwrap()
}

fn byte(at: usize) -> u8 {
    ((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

async fn fabric(world: &World, seed: u64, faults: Faults, limits: FabricLimits) -> Fabric {
    let world = world.clone();
    let open = move || Ok(world.open(seed, faults));
    Fabric::start(BackendKind::Plugin, open, limits).await.unwrap()
}

/// A reader, endpoint 0, connected to an owner of [`LEN`] bytes, endpoint 1.
struct Pair {
    world: World,
    reader: Fabric,
    owner: Fabric,
    peer: Peer,
    remote: RemoteId,
}

async fn pair(seed: u64, faults: Faults, limits: FabricLimits) -> Pair {
    let world = World::default();
    let reader = fabric(&world, seed, faults, limits).await;
    let owner = fabric(&world, seed, Faults::default(), limits).await;
    let source = memory();
    source.write(0, &(0..LEN).map(byte).collect::<Vec<u8>>());
    let shown = owner.registered(&source.span(), Access::RemoteRead).await.unwrap();
    let peer = reader.connect(owner.address().to_vec()).await.unwrap();
    let remote = reader.import(&peer, shown.key.clone()).await.unwrap();
    Pair { world, reader, owner, peer, remote }
}

impl Pair {
    /// A read of blocks that lie in the destination where they lie in the source.
    async fn read(&self, into: &HostMemory, blocks: &[(usize, usize)]) -> Result<Running, Arc<str>> {
        let local = self.reader.registered(&into.span(), Access::Local).await.unwrap();
        let transfer = |(offset, len): &(usize, usize)| Transfer {
            verb: Verb::Read { remote: self.remote, offset: *offset as u64 },
            local: LocalRange { id: local.id, offset: *offset, len: *len },
        };
        let transfers = blocks.iter().map(transfer).collect();
        let batch = Batch::new(self.peer.clone(), transfers, Box::new(local));
        Ok(self.reader.submit(batch).await?.fenced())
    }
}

fn random_blocks(rng: &mut Rng) -> Vec<(usize, usize)> {
    let mut at = 0;
    let mut blocks = Vec::new();
    while at + 70_000 < LEN && blocks.len() < 100 {
        at += rng.below(5000) as usize;
        let longest = if rng.below(4) == 0 { 60_000 } else { 500 };
        let len = 1 + rng.below(longest) as usize;
        blocks.push((at, len));
        at += len;
    }
    blocks
}

fn holds(memory: &HostMemory, (offset, len): (usize, usize)) -> bool {
    let mut bytes = vec![0; len];
    memory.read(offset, &mut bytes);
    bytes.iter().enumerate().all(|(i, found)| *found == byte(offset + i))
}

/// Reads random blocks, and gives every fourth read up at a random moment.
async fn read_or_give_up(pair: &Pair, seed: u64) {
    let mut rng = Rng::new(seed);
    let into = memory();
    let blocks = random_blocks(&mut rng);
    let Ok(mut running) = pair.read(&into, &blocks).await else { return };
    let gives_up = rng.below(4) == 0;
    let patience = Duration::from_micros(rng.below(3000));
    let mut seen = vec![false; blocks.len()];
    let reading = async {
        loop {
            let mut done = Vec::new();
            let more = running.next(&mut done).await?;
            for at in done {
                assert!(!std::mem::replace(&mut seen[at as usize], true), "block {at} came twice");
                assert!(holds(&into, blocks[at as usize]), "block {at} holds other bytes");
            }
            if !more {
                return Ok::<(), Arc<str>>(());
            }
        }
    };
    let outcome = match gives_up {
        true => tokio::time::timeout(patience, reading).await,
        false => Ok(tokio::time::timeout(Duration::from_secs(20), reading).await.expect("it ends")),
    };
    if let Ok(Ok(())) = &outcome {
        assert!(seen.iter().all(|seen| *seen), "a read that ended has every block");
    }
    drop(running);
    // From here on the memory is somebody else's.
    into.write(0, &vec![0xee; LEN]);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let mut bytes = vec![0; LEN];
    into.read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0xee), "written after the fence");
}

async fn play(seed: u64) {
    let mut rng = Rng::new(seed);
    let faults = Faults {
        delay: Duration::from_micros(rng.below(2000)),
        again: rng.below(600) as u32,
        lost: if rng.below(4) == 0 { 2 } else { 0 },
        failed: if rng.below(4) == 0 { 2 } else { 0 },
        depth: 1 + rng.below(40) as usize,
        descriptor: rng.below(2) == 0,
        ..Faults::default()
    };
    let limits = FabricLimits {
        ops_per_peer: 1 + rng.below(20) as usize,
        bytes_per_peer: 1 + rng.below(200_000) as usize,
        ..FabricLimits::default()
    };
    let pair = pair(seed, faults, limits).await;
    let reads = (0..12).map(|read| {
        let pair = &pair;
        async move {
            let reading = read_or_give_up(pair, seed * 1000 + read);
            // What a lost completion leaves behind is cut off by its reader's deadline.
            let _ = tokio::time::timeout(Duration::from_millis(300), reading).await;
        }
    });
    futures_util::future::join_all(reads).await;
    let (ops, bytes) = pair.world.peak(0);
    assert!(ops <= limits.ops_per_peer, "{ops} operations at once");
    assert!(bytes <= limits.bytes_per_peer, "{bytes} bytes at once");
    drop(pair.peer);
    drop((pair.reader, pair.owner));
    for endpoint in 0..2 {
        assert!(!pair.world.is_alive(endpoint), "the last handle closes the driver");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_wrong_byte_no_write_after_the_fence_no_bound_exceeded() {
    for seed in 0..40 {
        eprintln!("seed {seed}");
        play(seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_peer_fails_everything_once_and_for_all() {
    let faults = Faults { delay: Duration::from_millis(5), ..Faults::default() };
    let pair = pair(1, faults, FabricLimits::default()).await;
    let into = memory();
    let mut reads = Vec::new();
    for at in 0..4 {
        reads.push(pair.read(&into, &[(at * 1000, 1000)]).await.unwrap());
    }
    pair.world.kill(1);
    for mut read in reads {
        let ended = tokio::time::timeout(Duration::from_secs(20), read.end()).await.unwrap();
        assert!(ended.is_err());
    }
    assert!(pair.peer.failure().is_some());
    let mut late = pair.read(&into, &[(0, 10)]).await.unwrap();
    assert_eq!(&*late.end().await.unwrap_err(), &**pair.peer.failure().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_peer_holds_up_a_drop_for_moments_only_and_no_other_peer() {
    let pair = pair(2, Faults::default(), FabricLimits::default()).await;
    let other = fabric(&pair.world, 3, Faults::default(), FabricLimits::default()).await;
    let source = memory();
    let shown = other.registered(&source.span(), Access::RemoteRead).await.unwrap();
    let second = pair.reader.connect(other.address().to_vec()).await.unwrap();
    let remote = pair.reader.import(&second, shown.key.clone()).await.unwrap();
    let into = memory();
    pair.world.freeze(1, true);
    let mut stuck = pair.read(&into, &[(0, 5000)]).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(20), stuck.end()).await.is_err());
    drop(stuck);
    assert!(pair.peer.failure().is_some(), "it had to be disconnected");
    pair.world.freeze(1, false);
    let healthy = Pair { peer: second, remote, ..pair };
    healthy.read(&into, &[(7, 5000)]).await.unwrap().end().await.unwrap();
}

/// What is posted of a long read takes its time to come; that somebody gave it up costs no other read the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_read_that_is_given_up_ends_by_itself() {
    let blocks = vec![(0, LEN); 32];
    // A machine that is busy may wake this test too late.
    for seed in 20..25 {
        let pair = pair(seed, Faults::default(), FabricLimits::default()).await;
        pair.world.freeze(1, true);
        let read = pair.read(&memory(), &blocks).await.unwrap();
        while pair.world.peak(0).0 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let dropped = tokio::task::spawn_blocking(move || drop(read));
        tokio::time::sleep(Duration::from_millis(10)).await;
        pair.world.freeze(1, false);
        dropped.await.unwrap();
        if pair.peer.failure().is_none() {
            return;
        }
    }
    panic!("it cost the connection");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_does_not_close_keeps_its_memory_until_it_does() {
    let pair = pair(6, Faults::default(), FabricLimits::default()).await;
    let into = memory();
    pair.world.freeze(1, true);
    pair.world.cling(0, true);
    let stuck = pair.read(&into, &[(0, 5000)]).await.unwrap();
    // What was not posted yet is withdrawn, and needs no fence.
    while pair.world.peak(0).0 == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let dropped = tokio::task::spawn_blocking(move || drop(stuck));
    let polls = |since: usize| {
        let world = &pair.world;
        async move {
            while world.polls(0) < since + 100 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    };
    let severed = async {
        while pair.peer.failure().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        polls(pair.world.polls(0)).await;
    };
    tokio::time::timeout(Duration::from_secs(20), severed).await.unwrap();
    assert!(!dropped.is_finished(), "the peer may still write");
    pair.world.cling(0, false);
    tokio::time::timeout(Duration::from_secs(20), dropped).await.unwrap().unwrap();
    into.write(0, &[0xee; 5000]);
    pair.world.freeze(1, false);
    tokio::time::timeout(Duration::from_secs(20), polls(pair.world.polls(0))).await.unwrap();
    let mut bytes = [0; 5000];
    into.read(0, &mut bytes);
    assert_eq!(bytes, [0xee; 5000]);
}

/// A library takes its time to close, and until it has, what was posted may land.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_is_given_up_while_its_fabric_closes_waits_for_that() {
    for seed in [1, 2] {
        let pair = pair(seed, Faults::default(), FabricLimits::default()).await;
        let into = memory();
        pair.world.freeze(1, true);
        let read = pair.read(&into, &[(0, 5000)]).await.unwrap();
        until("it is posted", || pair.world.peak(0).0 > 0).await;
        pair.world.close_slowly(0, Duration::from_millis(300));
        let mut shut = Box::pin(pair.reader.shut());
        assert!(futures_util::poll!(shut.as_mut()).is_pending());
        tokio::task::spawn_blocking(move || drop(read)).await.unwrap();
        into.write(0, &[0xee; 5000]);
        shut.await;
        let mut bytes = [0; 5000];
        into.read(0, &mut bytes);
        assert_eq!(bytes, [0xee; 5000], "written after the fence");
    }
}

/// Their numbers in the table of a fabric may be the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_goes_to_a_peer_of_another_fabric() {
    let pair = pair(1, Faults::default(), FabricLimits::default()).await;
    let other = fabric(&pair.world, 3, Faults::default(), FabricLimits::default()).await;
    let own = other.connect(pair.owner.address().to_vec()).await.unwrap();
    let from = memory();
    let registered = other.registered(&from.span(), Access::Local).await.unwrap();
    let message = |peer: &Peer| {
        let local = LocalRange { id: registered.id, offset: 0, len: 100 };
        let transfers = vec![Transfer { verb: Verb::Send { tag: 7 }, local }];
        Batch::new(peer.clone(), transfers, Box::new(Arc::clone(&registered)))
    };
    let sent = other.submit(message(&pair.peer)).await.unwrap().end().await;
    assert!(sent.is_err() && pair.world.peak(2).0 == 0, "{sent:?}");
    other.submit(message(&own)).await.unwrap().end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_reach_who_awaits_them_and_a_cancelled_one_gives_its_buffer_back() {
    let pair = pair(4, Faults::default(), FabricLimits::default()).await;
    let (from, to) = (memory(), memory());
    from.write(0, &[7; 100]);
    let back = pair.owner.connect(pair.reader.address().to_vec()).await.unwrap();
    let sending = pair.owner.registered(&from.span(), Access::Local).await.unwrap();
    let landing = pair.reader.registered(&to.span(), Access::Local).await.unwrap();
    let kept = Arc::new(());
    let receive = |tag, len| {
        let local = LocalRange { id: landing.id, offset: 50, len };
        let transfer = Transfer { verb: Verb::Receive { tag }, local };
        pair.reader.submit(Batch::new(pair.peer.clone(), vec![transfer], Box::new(Arc::clone(&kept))))
    };
    let send = |tag| {
        let local = LocalRange { id: sending.id, offset: 0, len: 100 };
        pair.owner.submit(Batch::new(
            back.clone(),
            vec![Transfer { verb: Verb::Send { tag }, local }],
            Box::new(()),
        ))
    };
    let mut awaited = receive(1, 100).await.unwrap();
    awaited.awaits().await;
    send(1).await.unwrap().end().await.unwrap();
    awaited.end().await.unwrap();
    let mut bytes = [0; 100];
    to.read(50, &mut bytes);
    assert_eq!(bytes, [7; 100]);
    drop(awaited);

    drop(receive(2, 100).await.unwrap());
    let cancelled = receive(4, 100).await.unwrap();
    cancelled.awaits().await;
    drop(cancelled);
    let mut longer = receive(3, 101).await.unwrap();
    longer.awaits().await;
    send(3).await.unwrap().end().await.unwrap();
    longer.end().await.unwrap();
    assert_eq!(longer.arrived(), 100, "a message may be shorter, and says so");
    drop(longer);
    let released = async {
        while Arc::strong_count(&kept) > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), released).await.expect("what a batch keeps is let go");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_thread_sleeps_and_wakes_for_work() {
    let faults = Faults { descriptor: true, ..Faults::default() };
    let pair = pair(5, faults, FabricLimits::default()).await;
    let into = memory();
    for _ in 0..3 {
        pair.read(&into, &[(1, 9999)]).await.unwrap().end().await.unwrap();
        // It stays attentive for a while.
        tokio::time::sleep(Duration::from_millis(150)).await;
        let before = pair.world.polls(0);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let polls = pair.world.polls(0) - before;
        assert!(polls <= 5, "polled {polls} times with nothing to do");
    }
    assert!(holds(&into, (1, 9999)));
}

#[tokio::test]
async fn a_driver_that_does_not_open_says_why() {
    let fault = DriverError { what: "no library".into(), remedy: "install it".into() };
    let expected = fault.clone();
    let opened = Fabric::start(BackendKind::Ucx, move || Err(fault), FabricLimits::default()).await;
    assert_eq!(opened.err(), Some(expected));
    let opened = Fabric::start(BackendKind::Ucx, || panic!("broken driver"), FabricLimits::default()).await;
    assert_eq!(opened.err().unwrap().what, "the progress thread of ucx has ended");
}

/// Works until it is told to break.
struct Breaking(crate::backend::fabric::testing::MemoryDriver);

impl Driver for Breaking {
    fn info(&self) -> &DriverInfo {
        self.0.info()
    }
    fn address(&self) -> Vec<u8> {
        self.0.address()
    }
    fn register(&mut self, span: &MemorySpan, access: Access) -> Result<(LocalId, Vec<u8>), DriverError> {
        self.0.register(span, access)
    }
    fn deregister(&mut self, id: LocalId) {
        self.0.deregister(id);
    }
    fn connect(&mut self, address: &[u8]) -> Result<PeerId, DriverError> {
        self.0.connect(address)
    }
    fn disconnect(&mut self, peer: PeerId) {
        self.0.disconnect(peer);
    }
    fn import(&mut self, peer: PeerId, key: &[u8]) -> Result<RemoteId, DriverError> {
        self.0.import(peer, key)
    }
    fn forget(&mut self, peer: PeerId, remote: RemoteId) {
        self.0.forget(peer, remote);
    }
    fn read(&mut self, _: PeerId, _: RemoteId, _: u64, _: LocalRange, _: u64) -> Result<(), PostError> {
        panic!("broken driver")
    }
    fn write(&mut self, _: PeerId, _: RemoteId, _: u64, _: LocalRange, _: u64) -> Result<(), PostError> {
        panic!("broken driver")
    }
    fn send(&mut self, _: PeerId, _: u64, _: LocalRange, _: u64) -> Result<(), PostError> {
        panic!("broken driver")
    }
    fn receive(&mut self, tag: u64, to: LocalRange, op: u64) -> Result<(), PostError> {
        self.0.receive(tag, to, op)
    }
    fn cancel_receive(&mut self, op: u64) {
        self.0.cancel_receive(op);
    }
    fn poll(&mut self, done: &mut Vec<Done>) -> bool {
        self.0.poll(done)
    }
    fn arm(&mut self) -> bool {
        self.0.arm()
    }
    fn wait_fd(&self) -> Option<std::os::fd::RawFd> {
        self.0.wait_fd()
    }
}

async fn break_driver(descriptor: bool, open: impl FnOnce(Breaking) -> driver::Opened + Send + 'static) {
    let world = World::default();
    let owner = fabric(&world, 1, Faults::default(), FabricLimits::default()).await;
    let shared = world.clone();
    let faults = Faults { descriptor, ..Faults::default() };
    let open = move || Ok(open(Breaking(shared.driver(1, faults))));
    let reader = Fabric::start(BackendKind::Plugin, open, FabricLimits::default()).await.unwrap();
    let peer = reader.connect(owner.address().to_vec()).await.unwrap();
    let shown = owner.registered(&memory().span(), Access::RemoteRead).await.unwrap();
    let remote = reader.import(&peer, shown.key.clone()).await.unwrap();
    let (pair, into) = (Pair { world, reader, owner, peer, remote }, memory());
    if let Ok(mut running) = pair.read(&into, &[(0, 10)]).await {
        let ended = tokio::time::timeout(Duration::from_secs(20), running.end()).await.unwrap();
        assert_eq!(&*ended.unwrap_err(), "the fabric is closed");
    }
    let submitted = async {
        while pair.peer.failure().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), submitted).await.unwrap();
    assert!(pair.reader.connect(Vec::new()).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_panics_takes_nobody_with_it() {
    break_driver(false, |driver| driver::Opened::Bound(Box::new(driver))).await;
    break_driver(true, |driver| driver::Opened::Movable(Box::new(driver))).await;
}

/// A fabric whose driver any thread may call, and another like it.
async fn turning(faults: Faults) -> Pair {
    let pair = pair(2, Faults { descriptor: true, ..faults }, FabricLimits::default()).await;
    assert!(pair.reader.takes_turns());
    pair
}

#[tokio::test]
async fn what_a_runtime_does_not_get_to_is_done_by_the_thread() {
    let pair = turning(Faults { delay: Duration::from_millis(2), ..Faults::default() }).await;
    let into = memory();
    let mut reading = pair.read(&into, &[(3, 40_000)]).await.unwrap();
    // Nobody but the thread is there to take a turn.
    let done = Instant::now() + Duration::from_secs(20);
    while !holds(&into, (3, 40_000)) {
        assert!(Instant::now() < done, "the runtime is held up, and so is the read");
        std::thread::yield_now();
    }
    reading.end().await.unwrap();
    // The same of a fence: it holds up the only thread of the runtime.
    let given_up = pair.read(&into, &[(3, 40_000)]).await.unwrap();
    drop(given_up);
    into.write(0, &[0xee; 50_000]);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!holds(&into, (3, 40_000)));
}

/// A task looks the longer the more bytes it waits for, up to a bound, and lets others run now and then.
#[tokio::test]
async fn a_look_ends_and_is_made_in_turns() {
    let reader = turning(Faults::default()).await.reader;
    let turns = |bytes| {
        let mut patience = Patience::with(bytes);
        std::iter::from_fn(|| (!patience.is_over()).then(|| reader.spin(&mut patience, || false))).count()
    };
    assert_eq!(turns(6 << 20), 4);
    // All of it was one try in vain: the next is left out.
    assert_eq!(turns(6 << 20), 1);
    assert_eq!(turns(1 << 40), 1, "that is too much to be looked for");
    // One at a time looks long.
    let pays_again = || (0..8).for_each(|_| reader.spin(&mut Patience::with(1), || true));
    pays_again();
    let mut first = Patience::with(6 << 20);
    reader.spin(&mut first, || false);
    let mut second = Patience::with(6 << 20);
    reader.spin(&mut second, || false);
    assert!(!first.is_over() && second.is_over());
    drop(first);
    pays_again();
    assert_eq!(turns(6 << 20), 4);
}

/// Who only looks at what is under way has the driver for a moment: who comes in that moment, and leaves again, is served.
#[tokio::test]
async fn who_comes_in_vain_while_somebody_looks_is_not_left_behind() {
    let pair = turning(Faults::default()).await;
    let turns = Arc::clone(pair.reader.0.turns.as_ref().unwrap());
    let queue = Arc::clone(&pair.reader.0.queue);
    // The thread sleeps: nothing has happened for a while.
    tokio::time::sleep(Duration::from_millis(250)).await;
    for _ in 0..20 {
        let into = memory();
        let local = pair.reader.registered(&into.span(), Access::Local).await.unwrap();
        tokio::time::sleep(Duration::from_millis(150)).await;
        let verb = Verb::Read { remote: pair.remote, offset: 7 };
        let transfer = Transfer { verb, local: LocalRange { id: local.id, offset: 7, len: 5000 } };
        let batch = Batch::new(pair.peer.clone(), vec![transfer], Box::new(local));
        let left = Arc::clone(&batch);
        turns.look(|_| {
            assert!(queue.leave(Command::Submit(left), None).is_ok());
            assert_eq!(turns.take(true), turns::Turned::Taken, "somebody has the driver");
        });
        assert!(queue.state().commands.is_empty(), "it is taken, before anybody else comes");
        let mut running = Running::new(pair.reader.clone(), batch).fenced();
        tokio::time::timeout(Duration::from_secs(20), running.end()).await.unwrap().unwrap();
        assert!(holds(&into, (7, 5000)));
    }
}

/// Who took note of what the descriptor told may find somebody at the driver, and leave: it is prepared all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_descriptor_that_told_somebody_who_left_tells_again() {
    let pair = turning(Faults { delay: Duration::from_secs(60), ..Faults::default() }).await;
    let turns = Arc::clone(pair.reader.0.turns.as_ref().unwrap());
    let into = memory();
    let _reading = pair.read(&into, &[(3, 40_000)]).await.unwrap();
    for _ in 0..5 {
        until("it is prepared", || turns.is_gate_open()).await;
        turns.shut_gate();
    }
    until("it is prepared", || turns.is_gate_open()).await;
}

#[test]
fn a_fabric_outlives_the_runtime_it_was_started_on() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let pair = first.block_on(turning(Faults::default()));
    first.block_on(async { pair.read(&memory(), &[(5, 500)]).await.unwrap().end().await.unwrap() });
    drop(first);
    runtime().block_on(async {
        for _ in 0..20 {
            let into = memory();
            let mut read = pair.read(&into, &[(5, 5000)]).await.unwrap();
            tokio::time::timeout(Duration::from_secs(20), read.end()).await.unwrap().unwrap();
            assert!(holds(&into, (5, 5000)));
        }
        drop(pair);
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_handle_may_go_in_a_turn() {
    let Pair { world, reader, owner, peer, remote } = turning(Faults::default()).await;
    let into = memory();
    let local = reader.registered(&into.span(), Access::Local).await.unwrap();
    let verb = Verb::Read { remote, offset: 0 };
    let transfer = Transfer { verb, local: LocalRange { id: local.id, offset: 0, len: 100 } };
    let batch = Batch::new(peer, vec![transfer], Box::new((local, reader.clone())));
    let running = reader.submit(batch).await.unwrap();
    drop(reader);
    running.detach();
    let closed = async {
        while world.is_alive(0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), closed)
        .await
        .expect("it closes without waiting for itself");
    drop(owner);
}

/// Waits until a number is as wanted.
async fn until(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < Duration::from_secs(5), "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_made_for_who_gave_up_is_ended_again() {
    for seed in [1, 2] {
        let faults = Faults { descriptor: true, ..Faults::default() };
        let pair = pair(seed, faults, FabricLimits::default()).await;
        let (registered, imported) = (pair.world.registered(0), pair.world.imported(0));
        let key = pair.owner.registered(&memory().span(), Access::RemoteRead).await.unwrap().key.clone();
        for _ in 0..2 {
            {
                // The thread is busy, so that both have to wait.
                pair.world.connect_slowly(0, Duration::from_millis(250));
                let mut connecting = Box::pin(pair.reader.connect(pair.owner.address().to_vec()));
                assert!(futures_util::poll!(connecting.as_mut()).is_pending());
                tokio::time::sleep(Duration::from_millis(5)).await;
                let mut registering = Box::pin(pair.reader.register(memory().span(), Access::RemoteWrite));
                let mut importing = Box::pin(pair.reader.import(&pair.peer, key.clone()));
                let made = futures_util::poll!(registering.as_mut()).is_ready();
                if let Poll::Ready(taken) = futures_util::poll!(importing.as_mut()) {
                    // On a very busy machine the thread is done before this: nothing is given up here.
                    pair.reader.forget(&pair.peer, taken.unwrap());
                    continue;
                }
                if made {
                    continue;
                }
                until("both are made", || {
                    pair.world.registered(0) > registered && pair.world.imported(0) > imported
                })
                .await;
                // Their answers are on the way; nobody takes them.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            until("the registration ends", || pair.world.registered(0) == registered).await;
            until("the key is forgotten", || pair.world.imported(0) == imported).await;
        }
    }
}
