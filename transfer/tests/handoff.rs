//! Blocks from one arena to another over real sessions: device and host memory, every backend, unequal geometries.
#![cfg(test)]

use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use baton_config::protocol::TicketBlock;
use baton_config::{Bytes, Dtype, Epoch, HandoffId, KvGeometry, KvLayout, Shard, WorkerId};
use baton_transfer::wire::Metadata;
use baton_transfer::{
    Agent, AgentOptions, ArenaMemory, BackendKind, Choice, EmulatedDevice, ExportBlock, ExportOptions,
    Exporter, HostMemory, ImportOptions, Importer, Integrity, Pull, PullCause, Session, TpSource,
    TransferError, tp_sources,
};
use half::{bf16, f16};
use tokio::time::Instant;

const HANDOFF: HandoffId = HandoffId(0x1234_5678_9abc_def0_0fed_cba9_8765_4321);
const EPOCH: Epoch = Epoch(5);

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn geometry(block_tokens: u32, layout: KvLayout, dtype: Dtype) -> KvGeometry {
    KvGeometry { layers: 4, kv_heads: 2, head_dim: 32, block_tokens, layout, dtype, ..KvGeometry::PLAIN }
}

/// The backends that work here, those that need a library among them.
async fn backends() -> Vec<BackendKind> {
    let fabrics = [BackendKind::Libfabric, BackendKind::Ucx];
    let worker: WorkerId = "probe".parse().unwrap();
    let probe = AgentOptions { backends: fabrics.to_vec(), ..AgentOptions::new(worker) };
    let metadata = Metadata::decode(&Agent::start(probe).await.unwrap().metadata()).unwrap();
    let here = fabrics.into_iter().filter(|kind| metadata.offer(*kind).is_some());
    BackendKind::ALWAYS.into_iter().chain(here).collect()
}

/// A worker's transfer half: an arena of `tokens` tokens and an agent.
struct Side {
    agent: Agent,
    memory: ArenaMemory,
    geometry: KvGeometry,
    blocks: u32,
}

impl Side {
    async fn start(
        name: &str,
        geometry: KvGeometry,
        tokens: u32,
        device: bool,
        backend: BackendKind,
    ) -> Self {
        Self::with(name, geometry, tokens, device, (backend, Integrity::Digest)).await
    }

    async fn with(
        name: &str,
        geometry: KvGeometry,
        tokens: u32,
        device: bool,
        (backend, integrity): (BackendKind, Integrity),
    ) -> Self {
        let worker: WorkerId = name.parse().unwrap();
        let options = AgentOptions { backends: vec![backend], integrity, ..AgentOptions::new(worker) };
        let agent = Agent::start(options).await.unwrap();
        agent.set_epoch(EPOCH);
        let blocks = geometry.blocks_for(tokens) + 3;
        let len = blocks as usize * geometry.block_bytes();
        let memory = if device {
            // Reachable for those who are told to go direct; all others stage.
            let device = EmulatedDevice::new(len, Some(4 << 30)).unwrap().reachable();
            ArenaMemory::Device(Arc::new(device))
        } else {
            ArenaMemory::Host(HostMemory::allocate(len, name).unwrap())
        };
        Self { agent, memory, geometry, blocks }
    }

    /// Block `index` of the sequence in the arena: scattered, but each its own.
    fn block(&self, index: u32) -> u32 {
        self.blocks - 1 - index
    }

    fn row(&self, token: u32, layer: u32, kv: u32, head: u32) -> usize {
        let (g, strides) = (&self.geometry, self.geometry.arena_strides(self.blocks));
        let numbers = layer as usize * strides.layer
            + kv as usize * strides.kv
            + (token % g.block_tokens) as usize * strides.token
            + head as usize * strides.head;
        g.arena_at(self.blocks, self.block(token / g.block_tokens)).numbers + numbers * g.dtype.size()
    }

    fn write(&self, token: u32, (layer, kv, head): (u32, u32, u32), numbers: &[f32]) {
        let bytes: Vec<u8> = match self.geometry.dtype {
            Dtype::F32 => numbers.iter().flat_map(|n| n.to_le_bytes()).collect(),
            Dtype::Bf16 => numbers.iter().flat_map(|n| bf16::from_f32(*n).to_le_bytes()).collect(),
            Dtype::F16 => numbers.iter().flat_map(|n| f16::from_f32(*n).to_le_bytes()).collect(),
            Dtype::Fp8E4m3 => unreachable!("not among the pairs here"),
        };
        self.memory.write(self.row(token, layer, kv, head), &bytes);
    }

    fn read(&self, token: u32, (layer, kv, head): (u32, u32, u32)) -> Vec<f32> {
        let mut bytes = vec![0; self.geometry.row_bytes()];
        self.memory.read(self.row(token, layer, kv, head), &mut bytes);
        match self.geometry.dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::Fp8E4m3 => unreachable!("not among the pairs here"),
            Dtype::Bf16 => {
                bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
            }
        }
    }

    fn rows(&self) -> Vec<(u32, u32, u32)> {
        let g = &self.geometry;
        let heads = |layer, kv| (0..g.kv_heads).map(move |head| (layer, kv, head));
        (0..g.layers).flat_map(|layer| (0..2).flat_map(move |kv| heads(layer, kv))).collect()
    }
}

/// What token `token` holds in a row: different for every number of the sequence.
fn numbers(g: &KvGeometry, token: u32, (layer, kv, head): (u32, u32, u32)) -> Vec<f32> {
    let head = g.shard.heads(g.kv_heads).start + head;
    let row = ((token * g.layers + layer) * 2 + kv) * g.model_heads() + head;
    (0..g.head_dim).map(|i| ((row * g.head_dim + i) as f32).mul_add(0.618_034, -7000.0).sin()).collect()
}

/// Fills the arena of `side` as prefill would.
fn compute(side: &Side, tokens: Range<u32>) {
    for token in tokens {
        for row in side.rows() {
            side.write(token, row, &numbers(&side.geometry, token, row));
        }
    }
}

/// Whether `side` holds what was computed, rounded to the format of either side.
fn holds(side: &Side, from: &KvGeometry, tokens: Range<u32>) -> bool {
    let rounded = |n: f32, dtype| match dtype {
        Dtype::F32 => n,
        Dtype::Bf16 => bf16::from_f32(n).to_f32(),
        Dtype::F16 => f16::from_f32(n).to_f32(),
        Dtype::Fp8E4m3 => unreachable!("not among the pairs here"),
    };
    let rounded = |n| rounded(rounded(n, from.dtype), side.geometry.dtype);
    tokens.into_iter().all(|token| {
        side.rows().into_iter().all(|row| {
            let want: Vec<f32> = numbers(&side.geometry, token, row).into_iter().map(rounded).collect();
            side.read(token, row) == want
        })
    })
}

async fn connect(from: &Side, to: &Side) -> Session {
    from.agent.connect(to.agent.worker(), EPOCH, &to.agent.metadata()).await.unwrap()
}

fn exporter(side: &Side, slots: usize) -> Exporter {
    let options = ExportOptions { slots, ..ExportOptions::default() };
    Exporter::new(side.agent.clone(), side.memory.clone(), side.geometry, options).unwrap()
}

fn importer(side: &Side) -> Importer {
    Importer::new(side.memory.clone(), side.geometry, &ImportOptions::default()).unwrap()
}

fn pull(source: &Side, dest: &Side, blocks: Vec<TicketBlock>, tokens: Range<u32>) -> Pull {
    let dest_blocks = (0..dest.geometry.blocks_for(tokens.end)).map(|index| dest.block(index)).collect();
    Pull { handoff: HANDOFF, epoch: EPOCH, source: source.geometry, blocks, tokens, dest_blocks }
}

fn exported(side: &Side, indices: Range<u32>) -> Vec<ExportBlock> {
    indices.map(|index| ExportBlock { index, block: side.block(index) }).collect()
}

/// Hands `tokens` over as a worker does: in tickets as large as the slab allows, each pulled, then acknowledged.
async fn hand_over(source: &Side, dest: &Side, tokens: Range<u32>, slots: usize) {
    let ends = (exporter(source, slots), importer(dest));
    hand_over_between(source, dest, tokens, &ends).await;
}

async fn hand_over_between(
    source: &Side,
    dest: &Side,
    tokens: Range<u32>,
    (exporter, importer): &(Exporter, Importer),
) {
    let session = connect(dest, source).await;
    let wanted = importer.plan(source.geometry).unwrap().source_blocks(&tokens);
    let (mut upto, mut moved) = (tokens.start, 0);
    for batch in exported(source, wanted.clone()).chunks(exporter.max_blocks().min(5)) {
        let tickets = exporter.publish(HANDOFF, EPOCH, batch, soon()).await.unwrap();
        let end = (batch.last().unwrap().index + 1) * source.geometry.block_tokens;
        let pull = pull(source, dest, tickets, upto..end.min(tokens.end));
        let report = importer.pull(&session, pull, soon()).await.unwrap();
        exporter.acked(HANDOFF, batch.iter().map(|block| block.index));
        upto = report.upto;
        moved += report.bytes.0;
    }
    assert_eq!(upto, tokens.end);
    assert_eq!(moved, (wanted.len() * source.geometry.block_bytes()) as u64);
    exporter.release(HANDOFF).await;
    exporter.close().await;
    let counts = exporter.audit().unwrap();
    assert_eq!(counts.free, counts.total());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_arrive_in_any_geometry_over_every_backend() {
    use Dtype::{Bf16, F16, F32};
    use KvLayout::{B2lNhd, Hnd, L2bNhd, Lbhnc, Lbnhc, Nhd};
    let pairs = [
        (geometry(32, Nhd, Bf16), geometry(16, Hnd, Bf16)),
        (geometry(16, Hnd, Bf16), geometry(32, Nhd, F32)),
        (geometry(32, Nhd, F32), geometry(24, Hnd, Bf16)),
        (geometry(16, Hnd, F32), geometry(16, Hnd, F32)),
        (geometry(16, Lbhnc, F16), geometry(24, L2bNhd, F32)),
        (geometry(32, B2lNhd, Bf16), geometry(16, Lbnhc, Bf16)),
    ];
    for backend in backends().await {
        for (from, to) in pairs {
            for (device_source, device_dest) in [(true, false), (false, false), (true, true)] {
                let source = Side::start("prefill", from, 400, device_source, backend).await;
                let dest = Side::start("decode", to, 400, device_dest, backend).await;
                compute(&source, 0..400);
                hand_over(&source, &dest, 35..397, 6).await;
                let what = format!("{backend}: {from} -> {to}, devices {device_source} {device_dest}");
                assert!(holds(&dest, &from, 35..397), "{what}");
                let zero = vec![0.0; to.head_dim as usize];
                for token in [34, 397] {
                    assert!(dest.rows().into_iter().all(|row| dest.read(token, row) == zero), "{what}");
                }
                source.agent.close().await;
                dest.agent.close().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_of_a_tensor_parallel_source_fill_one_worker_together() {
    let to = KvGeometry { kv_heads: 4, ..geometry(24, KvLayout::Hnd, Dtype::Bf16) };
    for device in [false, true] {
        for degree in [2, 4, 8] {
            let dest = Side::start("decode", to, 200, device, BackendKind::Tcp).await;
            for TpSource { rank, .. } in tp_sources(Shard::Whole, 4, degree) {
                let shard = Shard::Tensor { rank, degree, heads: 4 };
                let kv_heads = (4 / u32::from(degree)).max(1);
                let from = KvGeometry { kv_heads, shard, ..geometry(16, KvLayout::Lbnhc, Dtype::Bf16) };
                let name = format!("prefill-{rank}");
                let source = Side::start(&name, from, 200, false, BackendKind::Tcp).await;
                compute(&source, 0..200);
                hand_over(&source, &dest, 3..199, 6).await;
                source.agent.close().await;
            }
            assert!(holds(&dest, &to, 3..199), "degree {degree}, device {device}");
            dest.agent.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_go_straight_between_devices_over_paths_that_reach_them() {
    let from = geometry(16, KvLayout::Nhd, Dtype::Bf16);
    let other = geometry(24, KvLayout::Hnd, Dtype::Bf16);
    for backend in backends().await.into_iter().filter(|kind| !kind.copies_in_host_memory()) {
        for (to, direct_out, direct_in) in
            [(from, true, true), (from, true, false), (from, false, true), (other, true, true)]
        {
            let source = Side::start("prefill", from, 400, true, backend).await;
            let dest = Side::start("decode", to, 400, true, backend).await;
            compute(&source, 0..400);
            let exports = ExportOptions { slots: 6, direct: direct_out, ..ExportOptions::default() };
            let exporter = Exporter::new(source.agent.clone(), source.memory.clone(), from, exports).unwrap();
            let imports = ImportOptions { direct: direct_in, ..ImportOptions::default() };
            let importer = Importer::new(dest.memory.clone(), to, &imports).unwrap();
            assert_eq!(exporter.why_staged().is_none(), direct_out);
            assert_eq!(importer.why_staged().is_none(), direct_in);
            hand_over_between(&source, &dest, 35..397, &(exporter, importer)).await;
            let what = format!("{backend}: {from} -> {to}, direct {direct_out} {direct_in}");
            assert!(holds(&dest, &from, 35..397), "{what}");
            let zero = vec![0.0; to.head_dim as usize];
            for token in [34, 397] {
                assert!(dest.rows().into_iter().all(|row| dest.read(token, row) == zero), "{what}");
            }
            source.agent.close().await;
            dest.agent.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_needs_little_gets_blocks_packed_for_it() {
    for layout in [KvLayout::Nhd, KvLayout::L2bHnd] {
        let from = KvGeometry { kv_heads: 4, ..geometry(16, layout, Dtype::F32) };
        let source = Side::start("prefill", from, 200, false, BackendKind::Tcp).await;
        compute(&source, 0..200);
        let exporter = exporter(&source, 26);
        for rank in 0..2 {
            let shard = Shard::Tensor { rank, degree: 2, heads: 4 };
            let to = KvGeometry { kv_heads: 2, shard, ..geometry(24, KvLayout::Hnd, Dtype::Bf16) };
            let name = format!("decode-{rank}");
            let dest = Side::start(&name, to, 200, false, BackendKind::Tcp).await;
            let handoff = HandoffId(u128::from(rank) + 1);
            let all = exported(&source, 0..13);
            let (wire, blocks) = exporter.publish_for(to, handoff, EPOCH, &all, soon()).await.unwrap();
            assert_eq!(wire, KvGeometry { block_tokens: 16, ..to });
            let session = connect(&dest, &source).await;
            let pull = Pull { handoff, source: wire, ..pull(&source, &dest, blocks, 3..199) };
            let report = importer(&dest).pull(&session, pull, soon()).await.unwrap();
            assert_eq!(report.upto, 199);
            assert_eq!(report.bytes.0, 13 * from.block_bytes() as u64 / 4, "half the heads at half the size");
            assert!(holds(&dest, &from, 3..199), "{layout}");
            exporter.release(handoff).await;
            dest.agent.close().await;
        }
        // Who needs all of it gets the blocks as they are.
        let some = exported(&source, 0..3);
        let (wire, _) = exporter.publish_for(from, HANDOFF, EPOCH, &some, soon()).await.unwrap();
        assert_eq!(wire, from);
        exporter.close().await;
        let counts = exporter.audit().unwrap();
        assert_eq!((counts.free, counts.total()), (26, 26));
        source.agent.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_runs_that_nobody_verifies_go_straight_to_their_place() {
    let from = KvGeometry { kv_heads: 8, head_dim: 64, ..geometry(24, KvLayout::Nhd, Dtype::Bf16) };
    let to = KvGeometry { block_tokens: 32, layout: KvLayout::L2bNhd, ..from };
    for backend in backends().await {
        let both = (backend, Integrity::Off);
        let source = Side::with("prefill", from, 240, false, both).await;
        let dest = Side::with("decode", to, 240, false, both).await;
        compute(&source, 0..240);
        let options = ExportOptions { integrity: Integrity::Off, ..ExportOptions::default() };
        let exporter = Exporter::new(source.agent.clone(), source.memory.clone(), from, options).unwrap();
        let importer = importer(&dest);
        assert_eq!(importer.plan(from).unwrap().choice(false), Choice::Direct);
        let blocks = exporter.publish(HANDOFF, EPOCH, &exported(&source, 0..10), soon()).await.unwrap();
        let session = connect(&dest, &source).await;
        let report = importer.pull(&session, pull(&source, &dest, blocks, 5..231), soon()).await.unwrap();
        assert_eq!(report.upto, 231);
        assert_eq!(report.bytes, Bytes(226 * from.token_bytes().0), "{backend}: only what is wanted");
        assert!(holds(&dest, &from, 5..231), "{backend}");
        exporter.close().await;
        source.agent.close().await;
        dest.agent.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_changed_after_they_were_digested_are_caught_and_named() {
    for backend in backends().await {
        for layout in [KvLayout::Hnd, KvLayout::Nhd] {
            let from = geometry(16, KvLayout::Nhd, Dtype::Bf16);
            let source = Side::start("prefill", from, 160, false, backend).await;
            let dest = Side::start("decode", KvGeometry { layout, ..from }, 160, false, backend).await;
            compute(&source, 0..160);
            let exporter = exporter(&source, 0);
            let tickets = exporter.publish(HANDOFF, EPOCH, &exported(&source, 0..10), soon()).await.unwrap();
            let (row, saved) = (source.row(70, 3, 1, 1), source.read(70, (3, 1, 1)));
            source.memory.write(row, &[0x55]);
            let session = connect(&dest, &source).await;
            let importer = importer(&dest);
            let error = importer
                .pull(&session, pull(&source, &dest, tickets.clone(), 0..160), soon())
                .await
                .unwrap_err();
            let PullCause::Transfer(TransferError::Integrity { index, corrupt, .. }) = &error.cause else {
                panic!("{backend}: {error:?}")
            };
            assert_eq!((*index, corrupt.as_slice(), error.upto), (4, [4].as_slice(), 64));
            assert!(holds(&dest, &from, 0..64));
            if layout == KvLayout::Hnd {
                let zero = vec![0.0; from.head_dim as usize];
                let untouched =
                    (64..80).all(|t| dest.rows().into_iter().all(|row| dest.read(t, row) == zero));
                assert!(untouched, "{backend}: nothing of a block that fails is laid out");
            }

            source.write(70, (3, 1, 1), &saved);
            let rest = pull(&source, &dest, tickets, error.upto..160);
            assert_eq!(importer.pull(&session, rest, soon()).await.unwrap().upto, 160);
            assert!(holds(&dest, &from, 0..160));

            // A perfectly good block in the place of another is as wrong as a broken one.
            let mut swapped =
                exporter.publish(HANDOFF, EPOCH, &exported(&source, 0..10), soon()).await.unwrap();
            let (a, b) = (swapped[2].offset, swapped[3].offset);
            (swapped[2].offset, swapped[3].offset) = (b, a);
            let error =
                importer.pull(&session, pull(&source, &dest, swapped, 0..160), soon()).await.unwrap_err();
            assert!(
                matches!(&error.cause, PullCause::Transfer(TransferError::Integrity { corrupt, .. }) if *corrupt == [2, 3]),
                "{backend}: {error:?}"
            );
            source.agent.close().await;
            dest.agent.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_in_the_middle_of_a_read_ends_it_and_leaves_nothing_wrong() {
    for backend in backends().await {
        let from = KvGeometry { kv_heads: 8, head_dim: 128, ..geometry(32, KvLayout::Nhd, Dtype::Bf16) };
        let to = KvGeometry { block_tokens: 16, layout: KvLayout::Hnd, ..from };
        // 64 MiB: far more than sockets hold.
        let tokens = 4096;
        let source = Side::start("prefill", from, tokens, false, backend).await;
        let dest = Side::start("decode", to, tokens, false, backend).await;
        compute(&source, 0..256);
        let exporter = exporter(&source, 0);
        let blocks = exported(&source, 0..from.blocks_for(tokens));
        let tickets = exporter.publish(HANDOFF, EPOCH, &blocks, soon()).await.unwrap();
        let session = connect(&dest, &source).await;
        let importer = importer(&dest);
        let mut pulling = pin!(importer.pull(&session, pull(&source, &dest, tickets, 0..tokens), soon()));
        let zero = vec![0.0; from.head_dim as usize];
        poll_fn(|context| {
            if dest.read(0, (0, 0, 0)) != zero {
                return Poll::Ready(());
            }
            assert!(pulling.as_mut().poll(context).is_pending(), "{backend}: 64 MiB in one go");
            Poll::Pending
        })
        .await;
        // The reader stands still now; the owner must not have to wait for it.
        tokio::time::timeout(Duration::from_secs(10), exporter.release(HANDOFF)).await.unwrap();
        let junk = vec![0x77; from.block_bytes()];
        for block in &blocks {
            source.memory.write(block.block as usize * from.block_bytes(), &junk);
        }
        let error = pulling.await.unwrap_err();
        let ended = matches!(
            error.cause,
            PullCause::Transfer(TransferError::Refused { .. } | TransferError::Link { .. })
        );
        assert!(ended, "{backend}: {error:?}");
        assert!(0 < error.upto && error.upto < tokens, "{backend}: upto {}", error.upto);
        assert!(holds(&dest, &from, 0..error.upto.min(256)), "{backend}: what was counted is right");
        source.agent.close().await;
        dest.agent.close().await;
    }
}
