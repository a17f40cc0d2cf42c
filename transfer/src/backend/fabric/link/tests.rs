use std::collections::BTreeSet;
use std::sync::Mutex;

use baton_config::{Epoch, HandoffId, WorkerId};
use tokio_util::sync::CancellationToken;

mod asks;
mod writes;

use super::*;
use crate::agent::{Agent, AgentOptions, BackendKind, Choose, Integrity};
use crate::backend::fabric::FabricLimits;
use crate::backend::fabric::fabrics::{Fabrics, Open};
use crate::backend::fabric::testing::{Faults, Rng, World};
use crate::digest::{DigestSeed, block_digest};
use crate::error::TransferError;
use crate::memory::HostMemory;
use crate::session::{BlockRead, Expected, ReadReport, Session};
use crate::slab::Slab;
use crate::wire::{Metadata, Offer};

const EPOCH: Epoch = Epoch(5);
const HANDOFF: HandoffId = HandoffId(0x1111_2222_3333_4444_5555_6666_7777_8888);
const LEN: usize = 24 << 20;
const OWNER: usize = 0;
const READER: usize = 1;

fn byte(at: usize) -> u8 {
    ((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn pattern(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len).map(byte).collect()
}

fn memory(len: usize) -> HostMemory {
    HostMemory::allocate(len, "test").unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

struct Side {
    agent: Agent,
    fabrics: Fabrics,
}

async fn side(
    name: &str,
    world: &World,
    seed: u64,
    faults: Faults,
    limits: FabricLimits,
    integrity: Integrity,
) -> Side {
    let worker: WorkerId = name.parse().unwrap();
    let backends = vec![BackendKind::Plugin];
    let options = AgentOptions { backends, integrity, ..AgentOptions::new(worker) };
    let world = world.clone();
    let open: Open = Arc::new(move || Ok(world.open(seed, faults)));
    let fabrics = Fabrics::open_with(vec![(BackendKind::Plugin, open)], limits).await;
    let agent = Agent::start_with(options, fabrics.clone()).await.unwrap();
    agent.set_epoch(EPOCH);
    Side { agent, fabrics }
}

impl Side {
    fn slabs(&self) -> [Slab; 2] {
        let fabric = self.fabrics.get(BackendKind::Plugin).unwrap();
        [fabric.landing().clone(), fabric.sending().clone()]
    }

    /// Waits until every buffer is free again.
    async fn settle(&self) {
        let free = async {
            for slab in self.slabs() {
                while slab.counts().free < slab.slots() {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                slab.audit().unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(20), free).await.expect("no buffer is lost");
    }
}

struct Pair {
    world: World,
    owner: Side,
    source: HostMemory,
    region: RegionId,
    reader: Side,
}

async fn pair_with(seed: u64, faults: Faults, limits: FabricLimits, integrity: Integrity) -> Pair {
    let world = World::default();
    let owner = side("prefill-0", &world, seed, faults, FabricLimits::default(), integrity).await;
    let reader = side("decode-0", &world, seed + 1, faults, limits, integrity).await;
    let source = memory(LEN);
    source.write(0, &pattern(0, LEN));
    let region = owner.agent.register(source.clone()).unwrap();
    Pair { world, owner, source, region, reader }
}

async fn pair(faults: Faults, integrity: Integrity) -> Pair {
    pair_with(1, faults, FabricLimits::default(), integrity).await
}

impl Pair {
    async fn session(&self) -> Session {
        let owner = &self.owner.agent;
        let session = self.reader.agent.connect(owner.worker(), EPOCH, &owner.metadata()).await.unwrap();
        assert_eq!(session.path().backend, BackendKind::Plugin, "{}", session.path().reason);
        session
    }

    /// Granted blocks of `lens` bytes, one after the other in the destination, backwards in the source.
    fn blocks(&self, lens: &[u32]) -> Vec<BlockRead> {
        let (mut to, mut end) = (0, LEN);
        let mut blocks = Vec::new();
        for (index, len) in lens.iter().enumerate() {
            end -= *len as usize + 3;
            let seed = DigestSeed { handoff: HANDOFF, epoch: EPOCH, index: index as u32 };
            let digest = block_digest(seed, &pattern(end, *len as usize));
            let source = Descriptor { region: self.region, offset: end as u64, len: *len };
            blocks.push(BlockRead { source, to, expected: Some(Expected { seed, digest }) });
            to += *len as usize + 1;
        }
        self.owner.agent.grant(HANDOFF, blocks.iter().map(|block| block.source).collect());
        blocks
    }
}

fn in_place(into: &HostMemory, block: &BlockRead) -> bool {
    let mut bytes = vec![0; block.source.len as usize];
    into.read(block.to, &mut bytes);
    bytes == pattern(block.source.offset as usize, block.source.len as usize)
}

async fn read(session: &Session, blocks: &[BlockRead]) -> Result<ReadReport, TransferError> {
    let into = memory(LEN);
    let report = session.read(HANDOFF, blocks, Destination::Memory(&into), soon()).await?;
    for (index, block) in blocks.iter().enumerate() {
        assert!(in_place(&into, block), "block {index} of {} is not in place", blocks.len());
    }
    Ok(report)
}

async fn read_to_sink(session: &Session, blocks: &[BlockRead]) -> Result<ReadReport, TransferError> {
    let seen = Mutex::new(BTreeSet::new());
    let sink = |index: usize, bytes: &[u8]| {
        let source = blocks[index].source;
        assert!(bytes == pattern(source.offset as usize, source.len as usize), "block {index}");
        assert!(seen.lock().unwrap().insert(index), "block {index} came twice");
    };
    let report = session.read(HANDOFF, blocks, Destination::Sink(&sink), soon()).await?;
    assert_eq!(seen.into_inner().unwrap().len(), blocks.len());
    Ok(report)
}

const SHAPES: [&[u32]; 8] = [
    &[1],
    &[4096; 64],
    &[100; 2500],
    &[65_537; 33],
    &[3 << 20; 5],
    &[32_767, 32_768, 32_769, 1, 262_144, 262_145, 5],
    &[1000, 1 << 20, 1000, 1 << 20, 300_000, 20],
    &[400_000, 30_000, 200_000, 100_000, 50_000],
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_of_all_sizes_arrive_in_memory_and_in_sinks() {
    for integrity in [Integrity::Digest, Integrity::Off] {
        for (message_max, requests, descriptor) in
            [(1 << 20, true, false), (1 << 20, false, true), (8192, true, true), (0, true, false)]
        {
            let faults = Faults { message_max, requests, descriptor, ..Faults::default() };
            let pair = pair(faults, integrity).await;
            let session = pair.session().await;
            for lens in SHAPES {
                let blocks = pair.blocks(lens);
                let total: u64 = lens.iter().map(|len| u64::from(*len)).sum();
                assert_eq!(read(&session, &blocks).await.unwrap().bytes.0, total);
                assert_eq!(read_to_sink(&session, &blocks).await.unwrap().bytes.0, total);
                pair.owner.agent.revoke(HANDOFF).settled().await;
            }
            pair.owner.settle().await;
            pair.reader.settle().await;
            let (ops, bytes) = pair.world.peak(READER);
            assert!(ops <= 64 && bytes <= 16 << 20, "{ops} operations of {bytes} bytes at once");
        }
    }
}

fn refusal(outcome: Result<ReadReport, TransferError>) -> Refusal {
    match outcome {
        Err(TransferError::Refused { refusal, .. }) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_granted_any_more_is_refused_however_it_was_read() {
    let pair = pair(Faults::default(), Integrity::Off).await;
    let session = pair.session().await;
    for lens in [[4096; 3], [300_000; 3]] {
        let blocks = pair.blocks(&lens);
        read(&session, &blocks).await.unwrap();
        pair.owner.agent.ungrant(HANDOFF, &[blocks[1].source]);
        assert_eq!(refusal(read(&session, &blocks).await), Refusal::OutsideGrant);
        assert_eq!(refusal(read_to_sink(&session, &blocks[1..]).await), Refusal::OutsideGrant);
        read(&session, &blocks[..1]).await.unwrap();
        pair.owner.agent.revoke(HANDOFF).settled().await;
        assert_eq!(refusal(read(&session, &blocks).await), Refusal::NotGranted);
        let mut past = blocks.clone();
        past[2].source.offset = LEN as u64 - 5;
        assert!(matches!(refusal(read(&session, &past).await), Refusal::OutsideRegion | Refusal::NotGranted));
        past[2].source.region = RegionId(77);
        assert!(matches!(refusal(read(&session, &past).await), Refusal::OutsideRegion | Refusal::NotGranted));
    }
    assert!(session.is_usable());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reused_memory_is_refused_once_its_grant_is_gone_and_corrupt_before() {
    let pair = pair(Faults::default(), Integrity::Digest).await;
    let session = pair.session().await;
    let blocks = pair.blocks(&[300_000, 2000, 400_000, 3000]);
    pair.source.write(blocks[2].source.offset as usize + 7, &[0x55, 0x56]);
    pair.source.write(blocks[3].source.offset as usize + 7, &[0x55, 0x56]);
    match read(&session, &blocks).await {
        Err(TransferError::Integrity { index: 2, corrupt, .. }) => assert_eq!(corrupt, [2, 3]),
        other => panic!("{other:?}"),
    }
    pair.owner.agent.revoke(HANDOFF).settled().await;
    assert_eq!(refusal(read(&session, &blocks).await), Refusal::NotGranted);
    assert_eq!(refusal(read(&session, &blocks[2..3]).await), Refusal::NotGranted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_life_of_the_owner_is_stale_and_the_next_session_works() {
    let pair = pair(Faults::default(), Integrity::Digest).await;
    let session = pair.session().await;
    read(&session, &pair.blocks(&[300_000, 2000])).await.unwrap();
    pair.owner.agent.set_epoch(Epoch(9));
    let gone = read(&session, &pair.blocks(&[300_000, 2000])).await;
    let told = matches!(gone, Err(TransferError::Stale { .. } | TransferError::Link { .. }));
    assert!(told, "{gone:?}");
    let owner = &pair.owner.agent;
    let session = pair.reader.agent.connect(owner.worker(), Epoch(9), &owner.metadata()).await.unwrap();
    read(&session, &pair.blocks(&[300_000, 2000])).await.unwrap();
}

/// A fabric is closed and opened again where its library could not revoke a window: pairs may meet just then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_that_met_while_its_fabric_was_being_opened_uses_it_later() {
    let pair = pair(Faults::default(), Integrity::Digest).await;
    let fabrics = &pair.reader.fabrics;
    let options = AgentOptions::new("decode-1".parse().unwrap());
    let (backends, retry) = (vec![BackendKind::Plugin, BackendKind::Tcp], Duration::from_millis(50));
    let options = AgentOptions { backends, retry, choose: Choose::Listed, ..options };
    let reader = Agent::start_with(options, fabrics.clone()).await.unwrap();
    reader.set_epoch(EPOCH);
    let owner = &pair.owner.agent;
    let mut metadata = Metadata::decode(&owner.metadata()).unwrap();
    metadata.offers.push(Offer::of(BackendKind::Tcp));
    let closed = fabrics.get(BackendKind::Plugin).unwrap();
    closed.shut().await;
    let session = reader.connect(owner.worker(), EPOCH, &metadata.encode()).await.unwrap();
    let blocks = pair.blocks(&[1000]);
    read(&session, &blocks).await.unwrap();
    let path = session.path();
    assert_eq!(path.backend, BackendKind::Tcp);
    assert!(
        path.reason.contains("plugin: the fabric failed: it is being opened again here"),
        "{}",
        path.reason
    );
    fabrics.restart(&closed, &TaskTracker::new(), &CancellationToken::new()).await;
    let used_again = async {
        while session.path().backend != BackendKind::Plugin {
            read(&session, &blocks).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), used_again).await.expect("it is tried again");
    read(&session, &blocks).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_owner_costs_the_deadline_and_a_new_session_works() {
    let pair = pair(Faults::default(), Integrity::Digest).await;
    for lens in [&[300_000][..], &[2000]] {
        let session = pair.session().await;
        let blocks = pair.blocks(lens);
        for endpoint in [OWNER, READER] {
            pair.world.freeze(endpoint, true);
        }
        let into = memory(LEN);
        let until = Instant::now() + Duration::from_millis(100);
        let late = session.read(HANDOFF, &blocks, Destination::Memory(&into), until).await;
        assert!(matches!(late, Err(TransferError::Deadline { .. })), "{late:?}");
        for endpoint in [OWNER, READER] {
            pair.world.freeze(endpoint, false);
        }
        assert_eq!(session.is_usable(), lens == [2000], "cut to fence what would write the destination");
        read(&pair.session().await, &blocks).await.unwrap();
    }
    pair.owner.settle().await;
    pair.reader.settle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_an_owner_ends_its_reads() {
    let pair = pair(Faults::default(), Integrity::Digest).await;
    let session = pair.session().await;
    let blocks = pair.blocks(&[300_000, 2000]);
    read(&session, &blocks).await.unwrap();
    for endpoint in [OWNER, READER] {
        pair.world.freeze(endpoint, true);
    }
    let reading = read(&session, &blocks);
    tokio::pin!(reading);
    assert!(futures_util::poll!(reading.as_mut()).is_pending());
    pair.owner.agent.clone().close().await;
    let ended = reading.await;
    assert!(matches!(ended, Err(TransferError::Link { .. })), "{ended:?}");
    assert!(!session.is_usable());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_may_not_be_registered_is_reached_through_buffers() {
    let limits = FabricLimits { registered_bytes: 20 << 20, ..FabricLimits::default() };
    let pair = pair_with(1, Faults::default(), limits, Integrity::Digest).await;
    let session = pair.session().await;
    for lens in SHAPES {
        read(&session, &pair.blocks(lens)).await.unwrap();
        pair.owner.agent.revoke(HANDOFF).settled().await;
    }
    let fabric = pair.reader.fabrics.get(BackendKind::Plugin).unwrap();
    let refused = fabric.registered(&memory(LEN).span(), Access::Local).await.err().unwrap();
    assert!(refused.what.contains("the limit is 20971520"), "{refused}");
    assert_eq!(refused.remedy, "raise transfer.limits.registered");
    let limits = FabricLimits { regions: 2, ..FabricLimits::default() };
    let world = World::default();
    let few = side("w", &world, 1, Faults::default(), limits, Integrity::Digest).await;
    let fabric = few.fabrics.get(BackendKind::Plugin).unwrap();
    let kept = [memory(1), memory(2), memory(3)];
    let first = fabric.registered(&kept[0].span(), Access::Local).await.unwrap();
    let second = fabric.registered(&kept[1].span(), Access::Local).await.unwrap();
    let refused = fabric.registered(&kept[2].span(), Access::Local).await.err().unwrap();
    assert_eq!(refused.remedy, "raise transfer.limits.regions");
    drop(first);
    fabric.registered(&kept[2].span(), Access::Local).await.unwrap();
    drop(second);
    drop(kept);
    // What nobody has any more makes room without being asked.
    fabric.registered(&memory(4).span(), Access::Local).await.unwrap();
    assert_eq!(world.registered(0), 1);
    // What is registered for one write counts for as long as it is.
    let limits = FabricLimits { registered_bytes: 10_000, regions: 2, ..FabricLimits::default() };
    let few = side("v", &world, 2, Faults::default(), limits, Integrity::Digest).await;
    let fabric = few.fabrics.get(BackendKind::Plugin).unwrap();
    let places = [memory(1), memory(2), memory(6000), memory(5000)];
    let [first, second, long, other] = places.each_ref().map(HostMemory::span);
    for (once, then, remedy) in [
        (vec![first, second], &other, "raise transfer.limits.regions"),
        (vec![long], &other, "raise transfer.limits.registered"),
    ] {
        let windows = fabric.registered_once(&once, Access::RemoteWrite).await.unwrap();
        assert_eq!(fabric.registered(then, Access::Local).await.err().unwrap().remedy, remedy);
        drop(windows);
        drop(fabric.registered(then, Access::Local).await.unwrap());
    }
}

/// A read with a deadline or a sudden end at a random moment; what it says and what it did must agree.
async fn one_read(pair: &Pair, seed: u64, blocks: &[BlockRead]) -> Option<Result<(), TransferError>> {
    let mut rng = Rng::new(seed);
    let owner = &pair.owner.agent;
    let session = pair.reader.agent.connect(owner.worker(), EPOCH, &owner.metadata()).await.ok()?;
    let from = rng.below(blocks.len() as u64) as usize;
    let blocks = &blocks[from..(from + 1 + rng.below(30) as usize).min(blocks.len())];
    let until = Instant::now() + Duration::from_micros(200 + rng.below(300_000));
    let dropped = Duration::from_micros(if rng.below(3) == 0 { rng.below(4000) } else { 60_000_000 });
    let into = memory(LEN);
    let start = Instant::now();
    let outcome = if rng.below(2) == 0 {
        let reading = session.read(HANDOFF, blocks, Destination::Memory(&into), until);
        tokio::time::timeout(dropped, reading).await
    } else {
        let seen = Mutex::new(BTreeSet::new());
        let sink = |index: usize, bytes: &[u8]| {
            let source = blocks[index].source;
            assert!(bytes == pattern(source.offset as usize, source.len as usize), "block {index}");
            assert!(seen.lock().unwrap().insert(index), "block {index} came twice");
        };
        let reading = session.read(HANDOFF, blocks, Destination::Sink(&sink), until);
        let outcome = tokio::time::timeout(dropped, reading).await;
        if let Ok(Ok(_)) = &outcome {
            assert_eq!(seen.lock().unwrap().len(), blocks.len());
        }
        // For the check below: what a sink saw was right.
        for index in seen.into_inner().unwrap() {
            let source = blocks[index].source;
            into.write(blocks[index].to, &pattern(source.offset as usize, source.len as usize));
        }
        outcome
    };
    let took = start.elapsed();
    assert!(took < Duration::from_secs(20), "it took {took:?}");
    match &outcome {
        Ok(Ok(_)) => assert!(blocks.iter().all(|block| in_place(&into, block))),
        Ok(Err(TransferError::Integrity { corrupt, .. })) => {
            let good = blocks.iter().enumerate().filter(|(index, _)| !corrupt.contains(index));
            good.for_each(|(index, block)| assert!(in_place(&into, block), "block {index}"));
        }
        Ok(Err(_)) | Err(_) => {}
    }
    into.write(0, &vec![0xee; LEN]);
    tokio::time::sleep(Duration::from_millis(3)).await;
    let mut bytes = vec![0; LEN];
    into.read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0xee), "written after the end of the read");
    outcome.ok().map(|outcome| outcome.map(|_| ()))
}

async fn play(seed: u64) -> [usize; 2] {
    let mut rng = Rng::new(seed);
    let rarely = |rng: &mut Rng, chance: u32| if rng.below(3) == 0 { chance } else { 0 };
    let faults = Faults {
        delay: Duration::from_micros(1 + rng.below(3000)),
        again: rarely(&mut rng, 300),
        lost: rarely(&mut rng, 4),
        failed: rarely(&mut rng, 4),
        flipped: rarely(&mut rng, 30),
        late_writes: false,
        depth: 2 + rng.below(100) as usize,
        message_max: [0, 5000, 1 << 20][rng.below(3) as usize],
        requests: rng.below(3) > 0,
        descriptor: rng.below(2) == 0,
    };
    let limits = FabricLimits {
        ops_per_peer: 1 + rng.below(80) as usize,
        bytes_per_peer: 100_000 + rng.below(1 << 20) as usize,
        ..FabricLimits::default()
    };
    let pair = pair_with(seed, faults, limits, Integrity::Digest).await;
    let lens: Vec<u32> = (0..60)
        .map(|_| {
            let longest = [500, 20_000, 400_000][rng.below(3) as usize];
            1 + rng.below(longest) as u32
        })
        .collect();
    let blocks = pair.blocks(&lens);
    let (pair, blocks) = (&pair, &blocks[..]);
    let reads = (0..6).map(|task| async move {
        let mut counts = [0, 0];
        for round in 0..4 {
            match one_read(pair, seed * 1_000_000 + task * 1000 + round, blocks).await {
                Some(Ok(())) => counts[0] += 1,
                _ => counts[1] += 1,
            }
        }
        counts
    });
    let counts = futures_util::future::join_all(reads).await;
    let (ops, bytes) = pair.world.peak(READER);
    assert!(ops <= limits.ops_per_peer, "{ops} operations at once");
    assert!(bytes <= limits.bytes_per_peer, "{bytes} bytes at once");
    pair.reader.agent.disconnect(pair.owner.agent.worker());
    // Sends that were lost are cut off with their connection.
    pair.reader.settle().await;
    pair.owner.settle().await;
    counts.into_iter().fold([0, 0], |sum, counts| [sum[0] + counts[0], sum[1] + counts[1]])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_fabric_does_nothing_wrong_is_delivered_and_nothing_lands_late() {
    let mut counts = [0, 0];
    for seed in 0..16 {
        eprintln!("seed {seed}");
        let played = play(seed).await;
        counts = [counts[0] + played[0], counts[1] + played[1]];
    }
    assert!(counts[0] > 50 && counts[1] > 50, "{counts:?}: both ends of the story are told");
}
