use std::future::{self, Future};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::task::{Context, Poll, Waker};
use std::thread;

use baton_config::{Dtype, KvLayout, Scales, Shard};
use proptest::prelude::*;

use super::*;
use crate::device::{BlockKernels, Device, EmulatedDevice, Move, Submitted};
use crate::digest::block_digest;
use crate::error::{LinkError, Refusal};
use crate::memory::{HostMemory, MemorySpan};
use crate::plan::reference;

const HANDOFF: HandoffId = HandoffId(7);
const EPOCH: Epoch = Epoch(3);

/// A peer whose blocks are at hand, with the faults a test asks for.
struct FakePeer {
    worker: WorkerId,
    blocks: Vec<Vec<u8>>,
    /// Positions (in the sequence) of blocks whose bytes are not those of the ticket.
    corrupt: BTreeSet<u32>,
    /// The link fails after so many blocks.
    fails_after: Option<usize>,
    /// Whether it reaches the memory of a device, and after how many reads it does no more.
    reaches: bool,
    /// Whether it never says so.
    ponders: bool,
    loses_reach_after: Option<usize>,
    device_reads: AtomicUsize,
    found_corrupt: AtomicUsize,
    /// Whether it sends digests.
    verified: bool,
    block_bytes: u64,
    reads: Mutex<Vec<u32>>,
    /// Bytes of the longest read to a sink.
    longest: AtomicUsize,
}

impl FakePeer {
    fn new(source: &KvGeometry, tokens: u32, seed: u64) -> Self {
        Self {
            worker: "peer".parse().unwrap(),
            blocks: reference::blocks(source, source.blocks_for(tokens), seed),
            corrupt: BTreeSet::new(),
            fails_after: None,
            reaches: true,
            ponders: false,
            loses_reach_after: None,
            device_reads: AtomicUsize::new(0),
            found_corrupt: AtomicUsize::new(0),
            verified: true,
            block_bytes: source.block_bytes() as u64,
            reads: Mutex::default(),
            longest: AtomicUsize::new(0),
        }
    }

    fn tickets(&self) -> Vec<TicketBlock> {
        let ticket = |(index, block): (u32, &Vec<u8>)| {
            let seed = DigestSeed { handoff: HANDOFF, epoch: EPOCH, index };
            let offset = u64::from(index) * block.len() as u64;
            TicketBlock { index, region: 1, offset, digest: block_digest(seed, block) }
        };
        (0..).zip(&self.blocks).map(ticket).collect()
    }
}

impl Peer for FakePeer {
    fn worker(&self) -> &WorkerId {
        &self.worker
    }

    fn epoch(&self) -> Epoch {
        EPOCH
    }

    fn verifies(&self) -> bool {
        self.verified
    }

    fn count_corrupt(&self, blocks: usize) {
        self.found_corrupt.fetch_add(blocks, Ordering::SeqCst);
    }

    async fn reaches(&self, _memory: &DeviceMemory) -> Result<(), String> {
        if self.ponders {
            future::pending::<()>().await;
        }
        if self.reaches { Ok(()) } else { Err("it copies to host memory".to_owned()) }
    }

    async fn read(
        &self,
        handoff: HandoffId,
        blocks: &[BlockRead],
        into: Destination<'_>,
        _deadline: Instant,
    ) -> Result<ReadReport, TransferError> {
        assert_eq!(handoff, HANDOFF);
        let mut bad = Vec::new();
        if let Destination::Sink(_) = into {
            let bytes: u64 = blocks.iter().map(|read| u64::from(read.source.len)).sum();
            self.longest.fetch_max(bytes as usize, Ordering::SeqCst);
        }
        if let Destination::Device(_) = into {
            let before = self.device_reads.fetch_add(1, Ordering::SeqCst);
            if self.loses_reach_after.is_some_and(|reads| reads <= before) {
                let source = LinkError::Device("it fell back".to_owned());
                return Err(TransferError::Link { worker: self.worker.clone(), moved: Bytes(0), source });
            }
        }
        for (position, read) in blocks.iter().enumerate() {
            tokio::task::yield_now().await;
            let worker = self.worker.clone();
            if self.fails_after == Some(position) {
                return Err(TransferError::Link { worker, moved: Bytes(0), source: LinkError::Closed });
            }
            if read.source.offset / self.block_bytes >= self.blocks.len() as u64 {
                return Err(TransferError::Refused { worker, refusal: Refusal::OutsideRegion });
            }
            let index = (read.source.offset / self.block_bytes) as u32;
            let from = (read.source.offset % self.block_bytes) as usize;
            self.reads.lock().unwrap().push(index);
            let mut bytes = self.blocks[index as usize][from..][..read.source.len as usize].to_vec();
            if self.corrupt.contains(&index) {
                bytes[0] ^= 1;
            }
            if let Destination::Device(memory) = into {
                memory.device().write(read.to, &bytes);
                continue;
            }
            assert!(read.expected.is_some() || !self.verified, "a read without a digest");
            let digest = |expected: Expected| block_digest(expected.seed, &bytes) == expected.digest;
            let good = !self.verified || read.expected.is_some_and(digest);
            match into {
                Destination::Memory(memory) => memory.write(read.to, &bytes),
                Destination::Sink(sink) if good => sink.block(position, &bytes),
                Destination::Sink(_) => {}
                Destination::Device(_) => unreachable!("written above"),
            }
            if !good {
                bad.push(position);
            }
        }
        match bad.first() {
            Some(first) => {
                Err(TransferError::Integrity { worker: self.worker.clone(), index: *first, corrupt: bad })
            }
            None => Ok(ReadReport { bytes: Bytes(0), elapsed: Duration::ZERO }),
        }
    }
}

fn geometry(block_tokens: u32, layout: KvLayout, dtype: Dtype) -> KvGeometry {
    KvGeometry { layers: 2, kv_heads: 2, head_dim: 8, block_tokens, layout, dtype, ..KvGeometry::PLAIN }
}

fn staged(slots: usize) -> ImportOptions {
    ImportOptions { slots, direct: false }
}

const NHD: KvLayout = KvLayout::Nhd;
const HND: KvLayout = KvLayout::Hnd;

/// An arena of `count` blocks of noise; that of a device can be reached by who asks for it.
fn arena(g: &KvGeometry, count: u32, device: bool) -> (ArenaMemory, Vec<Vec<u8>>) {
    let noise = reference::blocks(g, count, 99);
    let len = count as usize * g.block_bytes();
    let memory = if device {
        ArenaMemory::Device(Arc::new(EmulatedDevice::new(len, None).unwrap().reachable()))
    } else {
        ArenaMemory::Host(HostMemory::allocate(len, "arena").unwrap())
    };
    memory.write(0, &noise.concat());
    (memory, noise)
}

fn contents(memory: &ArenaMemory) -> Vec<u8> {
    let mut bytes = vec![0; memory.len()];
    memory.read(0, &mut bytes);
    bytes
}

/// A block table that visits every block of an arena of `count`, in a scattered order.
fn table(count: u32, seed: u64) -> Vec<u32> {
    let mut table: Vec<u32> = (0..count).collect();
    let mut state = seed;
    for i in (1..table.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        table.swap(i, (state >> 33) as usize % (i + 1));
    }
    table
}

/// What the arena must hold after `tokens` were pulled.
fn expected(
    peer: &FakePeer,
    (source, dest): (&KvGeometry, &KvGeometry),
    tokens: Range<u32>,
    noise: &[Vec<u8>],
    table: &[u32],
) -> Vec<u8> {
    let mut arena = noise.concat();
    let blocks = noise.len() as u32;
    reference::naive(source, dest, &peer.blocks, tokens, (&mut arena, blocks, table));
    arena
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn pull_of(peer: &FakePeer, source: KvGeometry, tokens: Range<u32>, dest_blocks: Vec<u32>) -> Pull {
    Pull { handoff: HANDOFF, epoch: EPOCH, source, blocks: peer.tickets(), tokens, dest_blocks }
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

fn any_geometry() -> impl Strategy<Value = KvGeometry> {
    use Dtype::{Bf16, F16, F32, Fp8E4m3};
    use KvLayout::{B2lHnd, Bhlnc, L2bNhd, Lbhnc, Lhbnc};
    let layouts = vec![NHD, HND, NHD, HND, B2lHnd, L2bNhd, Lbhnc, Lhbnc, Bhlnc];
    let formats = vec![
        (Bf16, Scales::None),
        (F32, Scales::None),
        (F16, Scales::None),
        (Fp8E4m3, Scales::None),
        (Fp8E4m3, Scales::Block),
        (Fp8E4m3, Scales::Head),
    ];
    let shards = vec![Shard::Whole, Shard::Whole, Shard::Tensor { rank: 1, degree: 2, heads: 2 }];
    let (layouts, formats) = (prop::sample::select(layouts), prop::sample::select(formats));
    (1u32..=20, layouts, formats, prop::sample::select(shards)).prop_map(
        |(tokens, layout, (dtype, scales), shard)| {
            let kv_heads = if shard == Shard::Whole { 2 } else { 1 };
            KvGeometry { scales, shard, kv_heads, ..geometry(tokens, layout, dtype) }
        },
    )
}

/// Where a pull into `dest` may start, at or before `token`.
fn start_for(dest: &KvGeometry, token: u32) -> u32 {
    if dest.scales == Scales::None { token } else { token - token % dest.block_tokens }
}

/// Whether the pair can be pulled into such an arena.
fn is_planned(importer: &Importer, source: KvGeometry, device: bool) -> bool {
    match importer.plan(source) {
        Ok(_) => true,
        Err(PlanError::Geometry { reason: Mismatch::Scales, .. }) => false,
        Err(PlanError::Geometry { reason: Mismatch::DeviceScales, .. }) if device => false,
        Err(error) => panic!("{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_pull_places_exactly_the_wanted_tokens(
        source in any_geometry(),
        other in any_geometry(),
        same in any::<bool>(),
        (device, direct, reaches, verified) in any::<(bool, bool, bool, bool)>(),
        // The widest block has tokens of 20.
        slots in 20usize..60,
        (a, b) in (0u32..90, 0u32..90),
        seed in any::<u64>(),
    ) {
        let dest = if same { source } else { other };
        let tokens = start_for(&dest, a.min(b))..a.max(b);
        let peer = FakePeer { reaches, verified, ..FakePeer::new(&source, 90, seed) };
        let (memory, noise) = arena(&dest, dest.blocks_for(90), device);
        let table = table(dest.blocks_for(90), seed);
        let importer = Importer::new(memory.clone(), dest, &ImportOptions { slots, direct }).unwrap();
        if !is_planned(&importer, source, device) {
            return Ok(());
        }
        let pull = pull_of(&peer, source, tokens.clone(), table.clone());
        let report = block_on(importer.pull_from(&peer, pull, soon())).unwrap();

        prop_assert_eq!(report.upto, tokens.end);
        let want = expected(&peer, (&source, &dest), tokens.clone(), &noise, &table);
        prop_assert!(contents(&memory) == want, "{source} -> {dest}, {tokens:?}, device {device}");
        let mut reads = peer.reads.lock().unwrap().clone();
        reads.sort_unstable();
        let wanted: Vec<u32> = importer.plan(source).unwrap().source_blocks(&tokens).collect();
        prop_assert_eq!(report.bytes.0, (wanted.len() * source.block_bytes()) as u64);
        let whole = wanted.iter().any(|index| {
            importer.plan(source).unwrap().tokens_of(*index, &tokens).len() == source.block_tokens as usize
        });
        let straight = device && direct && reaches && importer.plan(source).unwrap().is_direct() && whole;
        let straight = straight && dest.layout.is_block_first();
        prop_assert_eq!(peer.device_reads.load(Ordering::SeqCst) > 0, straight);
        prop_assert_eq!(reads, wanted, "every block with a wanted token is read once, no other is");
        if importer.plan(source).unwrap().needs_whole_blocks() {
            let most = lay_out::WAITING_MAX_BYTES.max(source.block_bytes());
            prop_assert!(peer.longest.load(Ordering::SeqCst) <= most, "what waits is bounded");
        }
        let counts = importer.audit().unwrap();
        prop_assert_eq!(counts.free, counts.total());
    }

    #[test]
    fn a_pull_that_stops_has_what_it_says_and_a_further_one_goes_on(
        source in any_geometry(),
        other in any_geometry(),
        same in any::<bool>(),
        (device, direct) in any::<(bool, bool)>(),
        corrupt in proptest::collection::btree_set(0u32..30, 0..3),
        fails_after in proptest::option::of(0usize..8),
        (start, len) in (0u32..40, 1u32..50),
        seed in any::<u64>(),
    ) {
        let dest = if same { source } else { other };
        let tokens = start_for(&dest, start)..start + len;
        let mut peer = FakePeer { corrupt, fails_after, ..FakePeer::new(&source, 90, seed) };
        let (memory, noise) = arena(&dest, dest.blocks_for(90), device);
        let table = table(dest.blocks_for(90), seed);
        let importer = Importer::new(memory.clone(), dest, &ImportOptions { slots: 24, direct }).unwrap();
        if !is_planned(&importer, source, device) {
            return Ok(());
        }
        let pull = pull_of(&peer, source, tokens.clone(), table.clone());
        let done = block_on(importer.pull_from(&peer, pull, soon()));
        let upto = match &done {
            Ok(report) => report.upto,
            Err(error) => error.upto,
        };
        prop_assert!(tokens.start <= upto && upto <= tokens.end);
        prop_assert_eq!(done.is_ok(), upto == tokens.end);
        let mut read = importer.plan(source).unwrap().source_blocks(&tokens);
        if let Some(first) = read.find(|index| peer.corrupt.contains(index)) {
            let good = (first * source.block_tokens).max(tokens.start);
            prop_assert!(upto <= good, "a corrupt block was counted");
        }
        if let Err(PullError { cause: PullCause::Transfer(TransferError::Integrity { index, corrupt, .. }), .. }) = &done {
            prop_assert_eq!(*index, corrupt[0]);
            prop_assert!(corrupt.iter().all(|i| peer.corrupt.contains(&(*i as u32))), "blocks are named by sequence");
        }
        // What was counted is there.
        let holds = |memory: &ArenaMemory, upto: u32, peer: &FakePeer| {
            let got = contents(memory);
            let mut clean = got.chunks(dest.block_bytes()).map(<[u8]>::to_vec).collect::<Vec<_>>();
            clean = expected(peer, (&source, &dest), tokens.start..upto, &clean, &table)
                .chunks(dest.block_bytes())
                .map(<[u8]>::to_vec)
                .collect();
            clean.concat() == got
        };
        prop_assert!(holds(&memory, upto, &peer));

        peer.corrupt.clear();
        peer.fails_after = None;
        let rest = pull_of(&peer, source, upto..tokens.end, table.clone());
        let report = block_on(importer.pull_from(&peer, rest, soon())).unwrap();
        prop_assert_eq!(report.upto, tokens.end);
        let want = expected(&peer, (&source, &dest), tokens.clone(), &noise, &table);
        prop_assert!(contents(&memory) == want, "nothing but wanted tokens was written");
        prop_assert!(holds(&memory, tokens.end, &peer));
        prop_assert!(importer.audit().is_ok_and(|counts| counts.free == counts.total()));
    }
}

#[test]
fn blocks_behind_one_that_was_not_named_are_not_read() {
    let (source, dest) = (geometry(8, NHD, Dtype::Bf16), geometry(4, HND, Dtype::Bf16));
    for device in [false, true] {
        let peer = FakePeer::new(&source, 64, 1);
        let (memory, noise) = arena(&dest, 16, device);
        let importer = Importer::new(memory.clone(), dest, &ImportOptions::default()).unwrap();
        let mut pull = pull_of(&peer, source, 3..64, (0..16).collect());
        pull.blocks.retain(|block| block.index != 4);
        pull.blocks.reverse();
        pull.blocks.extend(pull.blocks.clone());
        let report = block_on(importer.pull_from(&peer, pull, soon())).unwrap();
        assert_eq!(report.upto, 32);
        assert_eq!(*peer.reads.lock().unwrap(), [0, 1, 2, 3]);
        let table: Vec<u32> = (0..16).collect();
        assert!(contents(&memory) == expected(&peer, (&source, &dest), 3..32, &noise, &table));
    }
}

#[test]
fn geometries_and_lives_that_do_not_match_are_refused_before_anything_is_read() {
    let source = geometry(8, NHD, Dtype::Bf16);
    let peer = FakePeer::new(&source, 16, 1);
    let (memory, _) = arena(&source, 2, false);
    let importer = Importer::new(memory, source, &ImportOptions::default()).unwrap();
    let good = pull_of(&peer, source, 0..16, vec![0, 1]);

    let other = KvGeometry { kv_heads: 4, ..source };
    let pull = Pull { source: other, ..good.clone() };
    let error = block_on(importer.pull_from(&peer, pull, soon())).unwrap_err();
    let PullCause::Transfer(TransferError::Geometry(why)) = error.cause else { panic!("{error:?}") };
    let differ = PlanError::Geometry { source_geometry: other, dest: source, reason: Mismatch::Heads };
    assert_eq!((why, error.upto), (differ, 0));
    let shown = why.to_string();
    assert!(shown.contains(&other.to_string()) && shown.contains(&source.to_string()), "{shown}");

    // Blocks of one rank are good for some heads, and no whole blocks.
    let rank = KvGeometry {
        kv_heads: source.kv_heads / 2,
        shard: Shard::Tensor { rank: 0, degree: 2, heads: source.kv_heads },
        ..source
    };
    assert!(importer.plan(rank).is_ok() && importer.whole_plan(source).is_ok());
    let some = PlanError::Geometry { source_geometry: rank, dest: source, reason: Mismatch::SomeHeads };
    assert_eq!(importer.whole_plan(rank).unwrap_err(), some);

    let pull = Pull { epoch: Epoch(2), ..good };
    let error = block_on(importer.pull_from(&peer, pull, soon())).unwrap_err();
    let PullCause::Transfer(TransferError::Stale { ticket, current, .. }) = error.cause else {
        panic!("{error:?}")
    };
    assert_eq!((ticket, current), (Epoch(2), Some(EPOCH)));

    // One scale covers the tokens before, too, which nobody reads.
    let scaled = KvGeometry { dtype: Dtype::Fp8E4m3, scales: Scales::Head, ..source };
    for device in [false, true] {
        let (memory, _) = arena(&scaled, 2, device);
        let importer = Importer::new(memory, scaled, &ImportOptions::default()).unwrap();
        let pull = pull_of(&peer, source, 3..16, vec![0, 1]);
        let error = block_on(importer.pull_from(&peer, pull, soon())).unwrap_err();
        assert!(matches!(error.cause, PullCause::Unaligned { start: 3, block_tokens: 8 }), "{error:?}");
    }
    assert!(peer.reads.lock().unwrap().is_empty());
}

#[test]
fn groups_behind_one_with_a_corrupt_block_are_not_read() {
    let source = geometry(8, NHD, Dtype::F32);
    assert!(2 * source.block_bytes() > lay_out::WAITING_MAX_BYTES, "each block is a group");
    let dest = KvGeometry { dtype: Dtype::Fp8E4m3, scales: Scales::Head, ..source };
    let peer = FakePeer { corrupt: BTreeSet::from([1]), ..FakePeer::new(&source, 32, 1) };
    let (memory, _) = arena(&dest, 4, false);
    let importer = Importer::new(memory, dest, &ImportOptions::default()).unwrap();
    let error = block_on(importer.pull_from(&peer, pull_of(&peer, source, 0..32, (0..4).collect()), soon()));
    assert_eq!(error.unwrap_err().upto, 8);
    assert_eq!(*peer.reads.lock().unwrap(), [0, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_pull_waits_for_staging_until_its_deadline() {
    let (source, dest) = (geometry(8, NHD, Dtype::Bf16), geometry(8, HND, Dtype::Bf16));
    let peer = FakePeer::new(&source, 64, 1);
    let (memory, _) = arena(&dest, 8, true);
    let importer = Importer::new(memory, dest, &staged(4)).unwrap();
    let pull = || pull_of(&peer, source, 0..64, (0..8).collect());
    let acquire = |slots| importer.slab.as_ref().unwrap().acquire(slots, soon());
    let other = acquire(2).await.unwrap();
    assert_eq!(importer.pull_from(&peer, pull(), soon()).await.unwrap().upto, 64, "half of it is enough");
    drop(other);
    let held = acquire(4).await.unwrap();
    let error = importer.pull_from(&peer, pull(), soon()).await.unwrap_err();
    assert!(matches!(error.cause, PullCause::Staging(SlabError::Exhausted { .. })), "{error:?}");
    drop(held);
    assert_eq!(importer.pull_from(&peer, pull(), soon()).await.unwrap().upto, 64);

    let narrow = geometry(1, HND, Dtype::Bf16);
    let (memory, _) = arena(&narrow, 64, true);
    let importer = Importer::new(memory, narrow, &staged(4)).unwrap();
    let pull = pull_of(&peer, source, 0..64, (0..64).collect());
    let error = importer.pull_from(&peer, pull, soon()).await.unwrap_err();
    assert!(matches!(error.cause, PullCause::Staging(SlabError::TooMany { .. })), "{error:?}");
}

/// Tickets come from peers: what they name is asked for, and is theirs to refuse.
#[test]
fn places_past_the_end_of_all_memory_are_refused_and_nothing_else_happens() {
    // Long runs, which nobody verifies, in other places of either block.
    let (source, dest) = (
        KvGeometry { head_dim: 1 << 12, ..geometry(4, NHD, Dtype::F32) },
        KvGeometry { head_dim: 1 << 12, ..geometry(8, NHD, Dtype::F32) },
    );
    for (verified, offset) in [(false, u64::MAX), (false, u64::MAX - 9), (true, u64::MAX)] {
        let peer = FakePeer { verified, ..FakePeer::new(&source, 16, 3) };
        let (memory, noise) = arena(&dest, 4, false);
        let importer = Importer::new(memory.clone(), dest, &staged(0)).unwrap();
        let direct = importer.plan(source).unwrap().choice(verified) == crate::plan::Choice::Direct;
        assert_eq!(direct, !verified, "runs are read to their places");
        let mut pull = pull_of(&peer, source, 0..16, table(4, 5));
        pull.blocks.iter_mut().for_each(|block| block.offset = offset);
        let error = block_on(importer.pull_from(&peer, pull, soon())).unwrap_err();
        let refused = PullCause::Transfer(TransferError::Refused {
            worker: peer.worker.clone(),
            refusal: Refusal::OutsideRegion,
        });
        assert_eq!(error.cause.to_string(), refused.to_string());
        assert_eq!((error.upto, contents(&memory)), (0, noise.concat()));
    }
}

#[test]
fn whole_blocks_go_straight_into_a_device_and_are_verified_there() {
    // Six groups of 32 MiB.
    let g = KvGeometry { layers: 32, kv_heads: 16, head_dim: 64, ..geometry(32, NHD, Dtype::F32) };
    let per_group = (32 << 20) / g.block_bytes() as u32;
    let count = per_group * 2 + 1;
    let tokens = 3..count * g.block_tokens - 5;
    let pull_all = |peer: &FakePeer, table: &[u32]| {
        let (memory, noise) = arena(&g, count, true);
        let importer = Importer::new(memory.clone(), g, &ImportOptions { slots: 8, direct: true }).unwrap();
        assert_eq!(importer.why_staged(), None);
        let done =
            block_on(importer.pull_from(peer, pull_of(peer, g, tokens.clone(), table.to_vec()), soon()));
        (contents(&memory), noise, done)
    };
    let table = table(count, 4);
    let mut peer = FakePeer::new(&g, count * g.block_tokens, 1);
    let (got, noise, done) = pull_all(&peer, &table);
    assert_eq!(done.unwrap().upto, tokens.end);
    assert_eq!(peer.device_reads.load(Ordering::SeqCst), 2, "all but the first and the last block");
    assert!(got == expected(&peer, (&g, &g), tokens.clone(), &noise, &table));

    // The path falls back between two groups: the rest is staged.
    peer.device_reads = AtomicUsize::new(0);
    peer.loses_reach_after = Some(1);
    let (got, noise, done) = pull_all(&peer, &table);
    assert_eq!(done.unwrap().upto, tokens.end);
    assert!(got == expected(&peer, (&g, &g), tokens.clone(), &noise, &table));

    // Corrupt blocks are named, counted, and nothing behind the first of them is.
    peer.loses_reach_after = None;
    peer.corrupt = BTreeSet::from([2, 3]);
    let error = pull_all(&peer, &table).2.unwrap_err();
    let PullCause::Transfer(TransferError::Integrity { index, corrupt, .. }) = error.cause else {
        panic!("{error:?}")
    };
    assert_eq!((index, corrupt), (2, vec![2, 3]));
    assert_eq!(peer.found_corrupt.load(Ordering::SeqCst), 2);
    assert_eq!(error.upto, 3, "the first block is staged after those read directly");
}

#[tokio::test(start_paused = true)]
async fn a_path_that_never_says_what_it_reaches_costs_the_deadline() {
    let g = geometry(8, NHD, Dtype::Bf16);
    let peer = FakePeer { ponders: true, ..FakePeer::new(&g, 64, 1) };
    let (memory, noise) = arena(&g, 8, true);
    let importer = Importer::new(memory.clone(), g, &ImportOptions { slots: 8, direct: true }).unwrap();
    let pull = importer.pull_from(&peer, pull_of(&peer, g, 0..64, (0..8).collect()), soon());
    let error = tokio::time::timeout(Duration::from_secs(60), pull).await.unwrap().unwrap_err();
    assert!(matches!(error.cause, PullCause::Transfer(TransferError::Deadline { .. })), "{error:?}");
    assert_eq!((error.upto, contents(&memory)), (0, noise.concat()));
}

/// A device some of whose work waits at a gate, or whose copies from the host fail.
#[derive(Debug)]
struct GatedDevice {
    inner: EmulatedDevice,
    state: Mutex<Gate>,
    changed: Condvar,
    gated: Gated,
    fails: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gated {
    FromHost,
    ToHost,
    Digests,
}

#[derive(Debug, Default)]
struct Gate {
    open: bool,
    /// How many may pass although it is closed.
    passes: usize,
    /// Who has come to it.
    waiting: usize,
    copied: usize,
}

impl GatedDevice {
    fn new(len: usize, fails: bool) -> Self {
        let inner = EmulatedDevice::new(len, None).unwrap();
        Self { inner, state: Mutex::default(), changed: Condvar::new(), gated: Gated::FromHost, fails }
    }

    /// Waits at the gate, if that is there.
    fn pass(&self, gated: Gated) {
        if gated == self.gated {
            self.state.lock().unwrap().waiting += 1;
            self.changed.notify_all();
            self.wait_for(|gate| {
                let passes = gate.open || gate.passes > 0;
                gate.passes = gate.passes.saturating_sub(1);
                passes
            });
        }
    }

    fn let_one_pass(&self) {
        self.state.lock().unwrap().passes = 1;
        self.changed.notify_all();
    }

    fn wait_for(&self, mut met: impl FnMut(&mut Gate) -> bool) {
        let state = self.state.lock().unwrap();
        let limit = Duration::from_secs(20);
        let (_state, timeout) = self.changed.wait_timeout_while(state, limit, |gate| !met(gate)).unwrap();
        assert!(!timeout.timed_out(), "the gate did not move");
    }

    /// How many copies have come to the gate, and how many have ended.
    fn came(&self) -> (usize, usize) {
        let state = self.state.lock().unwrap();
        (state.waiting, state.copied)
    }

    fn open(&self) {
        self.state.lock().unwrap().open = true;
        self.changed.notify_all();
    }
}

impl Device for GatedDevice {
    fn kind(&self) -> &'static str {
        "gated"
    }

    fn len(&self) -> usize {
        self.inner.len()
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.inner.read(offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.inner.write(offset, from);
    }

    fn span(&self) -> Result<MemorySpan, String> {
        self.inner.span()
    }

    fn kernels(&self) -> Result<&dyn BlockKernels, String> {
        if self.gated == Gated::Digests { Ok(self) } else { Err("it has none".to_owned()) }
    }

    fn submit_to_host(
        &self,
        at: usize,
        host: &HostMemory,
        to: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        self.pass(Gated::ToHost);
        self.inner.submit_to_host(at, host, to, len)
    }

    fn submit_from_host(
        &self,
        offset: usize,
        host: &HostMemory,
        from: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        if self.fails && offset >= 2 * len {
            let source = "the copy engine is on fire".into();
            return Err(DeviceError::Copy { kind: "gated", direction: "to", offset, len, source });
        }
        self.pass(Gated::FromHost);
        self.inner.copy_from_host(offset, host, from, len)?;
        self.state.lock().unwrap().copied += 1;
        self.changed.notify_all();
        Ok(Submitted::ended())
    }
}

impl BlockKernels for GatedDevice {
    fn digest_blocks(&self, blocks: &[(usize, DigestSeed)], len: usize) -> Result<Vec<u64>, DeviceError> {
        self.pass(Gated::Digests);
        self.inner.kernels().expect("it is reachable").digest_blocks(blocks, len)
    }

    fn relayout(&self, _moves: &[Move]) -> Result<(), DeviceError> {
        unreachable!("imports move nothing within a device")
    }
}

/// The pull ends with its deadline, and what it says is in place is; the work that is late may end later.
#[tokio::test]
async fn work_of_a_device_that_takes_too_long_costs_the_deadline() {
    let g = geometry(8, NHD, Dtype::Bf16);
    for gated in [Gated::FromHost, Gated::ToHost, Gated::Digests] {
        let peer = FakePeer::new(&g, 64, 1);
        let device = GatedDevice::new(8 * g.block_bytes(), false);
        let device = Arc::new(GatedDevice { inner: device.inner.reachable(), gated, ..device });
        let memory = ArenaMemory::Device(device.clone());
        let importer = Importer::new(memory, g, &ImportOptions { slots: 16, direct: true }).unwrap();
        let returned = Arc::new(AtomicBool::new(false));
        let seen = returned.clone();
        let opener = thread::spawn(move || {
            device.wait_for(|gate| gate.waiting > 0);
            // What writes the arena is waited for; what does not must not be.
            let looks = if gated == Gated::FromHost { 6 } else { 100 };
            let pause = || thread::park_timeout(Duration::from_millis(100));
            (0..looks).take_while(|_| !seen.load(Ordering::SeqCst)).for_each(|_| pause());
            let before = seen.load(Ordering::SeqCst);
            device.open();
            before
        });
        // Beside whole blocks one of which other tokens must be kept.
        let tokens = if gated == Gated::ToHost { 3..64 } else { 0..64 };
        let deadline = Instant::now() + Duration::from_millis(200);
        let pull = pull_of(&peer, g, tokens.clone(), (0..8).collect());
        let error = importer.pull_from(&peer, pull, deadline).await.unwrap_err();
        assert!(
            matches!(error.cause, PullCause::Transfer(TransferError::Deadline { .. })),
            "{gated:?}: {error:?}"
        );
        assert_eq!(error.upto, tokens.start, "{gated:?}");
        returned.store(true, Ordering::SeqCst);
        assert_eq!(opener.join().unwrap(), gated != Gated::FromHost, "{gated:?}");
        importer.close().await;
        assert!(importer.audit().is_ok_and(|counts| counts.free == counts.total()));
    }
}

/// It computes no digests, though networks reach it: its blocks are looked at in host memory.
#[tokio::test]
async fn a_device_that_cannot_verify_gets_its_blocks_through_host_memory() {
    let g = geometry(8, NHD, Dtype::Bf16);
    for verified in [true, false] {
        let peer = FakePeer { verified, ..FakePeer::new(&g, 64, 1) };
        let device = GatedDevice::new(8 * g.block_bytes(), false);
        let device = Arc::new(GatedDevice { inner: device.inner.reachable(), ..device });
        device.open();
        let memory = ArenaMemory::Device(device);
        let importer = Importer::new(memory.clone(), g, &ImportOptions { slots: 8, direct: true }).unwrap();
        assert_eq!(importer.why_staged(), None);
        let pull = pull_of(&peer, g, 0..64, (0..8).collect());
        assert_eq!(importer.pull_from(&peer, pull, soon()).await.unwrap().upto, 64);
        assert_eq!(peer.device_reads.load(Ordering::SeqCst), usize::from(!verified));
        assert!(contents(&memory) == peer.blocks.concat());
    }
}

#[test]
fn dropping_a_pull_returns_only_when_nothing_writes_the_arena_any_more() {
    // One copy at a time: the others have not begun when the pull is dropped, and never do.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(1).max_blocking_threads(1).enable_time().build().unwrap();
    runtime.block_on(drop_a_pull());
}

async fn drop_a_pull() {
    let g = geometry(8, NHD, Dtype::Bf16);
    let peer = FakePeer::new(&g, 64, 1);
    let device = Arc::new(GatedDevice::new(8 * g.block_bytes(), false));
    let memory = ArenaMemory::Device(device.clone());
    let importer = Importer::new(memory, g, &staged(16)).unwrap();
    let dropped = Arc::new(AtomicBool::new(false));
    {
        let mut pull =
            Box::pin(importer.pull_from(&peer, pull_of(&peer, g, 0..64, (0..8).collect()), soon()));
        // Poll until the first copy stands at the gate.
        let stuck = future::poll_fn(|context| {
            assert!(pull.as_mut().poll(context).is_pending());
            if device.state.lock().unwrap().waiting > 0 { Poll::Ready(()) } else { poll_again(context) }
        });
        stuck.await;
        let (opener, seen) = (device.clone(), dropped.clone());
        let opener = thread::spawn(move || {
            // Nothing can prove that a drop blocks for ever; it must not have returned before a copy passes.
            thread::park_timeout(Duration::from_millis(50));
            let early = seen.load(Ordering::SeqCst);
            while !seen.load(Ordering::SeqCst) {
                opener.let_one_pass();
                thread::park_timeout(Duration::from_millis(20));
            }
            early
        });
        drop(pull);
        dropped.store(true, Ordering::SeqCst);
        let (came, copied) = device.came();
        assert!(copied >= 1, "the copy at the gate was let through");
        assert!(!opener.join().unwrap(), "the drop returned while a copy was writing the arena");
        device.open();
        importer.close().await;
        assert_eq!(device.came().0, came, "a copy began after the drop");
    }
    assert!(importer.audit().is_ok_and(|counts| counts.free == counts.total()));
}

fn poll_again(context: &mut Context<'_>) -> Poll<()> {
    context.waker().wake_by_ref();
    Poll::Pending
}

#[tokio::test]
async fn a_device_that_fails_stops_the_pull_at_what_is_in_place() {
    let g = geometry(8, NHD, Dtype::Bf16);
    let peer = FakePeer::new(&g, 64, 1);
    let device = Arc::new(GatedDevice::new(8 * g.block_bytes(), true));
    device.open();
    let memory = ArenaMemory::Device(device);
    let importer = Importer::new(memory, g, &staged(16)).unwrap();
    let pull = pull_of(&peer, g, 0..64, (0..8).collect());
    let error = importer.pull_from(&peer, pull, soon()).await.unwrap_err();
    assert!(matches!(error.cause, PullCause::Device(_)), "{error:?}");
    assert_eq!(error.upto, 16);
    assert!(importer.audit().is_ok_and(|counts| counts.free == counts.total()));
}

#[test]
fn a_closed_fence_lets_nobody_in_and_waits_for_who_is() {
    let fence = fence::Fence::default();
    let inside = fence.enter().unwrap();
    let closing = thread::spawn({
        let close = fence.close_on_drop();
        move || drop(close)
    });
    while fence.enter().is_some() {
        thread::yield_now();
    }
    assert!(!closing.is_finished());
    drop(inside);
    closing.join().unwrap();
    assert!(fence.enter().is_none());
}

#[test]
#[should_panic(expected = "the table has 1")]
fn a_block_table_that_ends_before_the_range_is_a_bug() {
    let g = geometry(8, NHD, Dtype::Bf16);
    let peer = FakePeer::new(&g, 16, 1);
    let (memory, _) = arena(&g, 2, false);
    let importer = Importer::new(memory, g, &ImportOptions::default()).unwrap();
    let mut pull = pin!(importer.pull_from(&peer, pull_of(&peer, g, 0..16, vec![0]), soon()));
    let _ = Pin::as_mut(&mut pull).poll(&mut Context::from_waker(Waker::noop()));
}
