//! Re-layout throughput beside memcpy: `cargo bench -p baton-transfer --bench relayout`.
//!
//! Every row lays 128 MiB of source blocks out into blocks of another geometry. `read + written` counts both sides, as
//! memory sees them; a memcpy reads and writes one byte per byte. Median of several passes, caches cold.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use baton_config::Dtype::{self, Bf16, F16, F32, Fp8E4m3};
use baton_config::KvLayout::{self, Hnd, L2bHnd, Lbhnc, Lbnhc, Nhd};
use baton_config::{KvGeometry, Scales, Shard};
use baton_transfer::{HostMemory, PlanCache, RelayoutPlan};

/// Bytes of source blocks per pass: several times the last-level cache.
const PASS_BYTES: usize = 128 << 20;

/// Passes per row.
const PASSES: u32 = 9;

fn main() -> anyhow::Result<()> {
    println!(
        "32 layers x 8 kv heads x 128 dims; {} MiB of source a pass, median of {PASSES}",
        PASS_BYTES >> 20
    );
    println!("{:<44}{:>10}{:>9}{:>14}{:>11}", "pair", "ms", "GB/s", "read+written", "of memcpy");
    let memcpy = copy_rate()?;
    for (source, dest) in orders().into_iter().chain(shards()).chain(formats()) {
        relayout_rate(source, dest, memcpy)?;
    }
    let small = KvGeometry { kv_heads: 2, head_dim: 64, ..base(32, Nhd, Bf16) };
    let other = KvGeometry { block_tokens: 16, layout: Hnd, ..small };
    println!("2 kv heads x 64 dims:");
    relayout_rate(small, other, memcpy)?;
    plan_time(base(32, Nhd, Bf16), base(16, Hnd, Bf16))?;
    choices(memcpy)
}

fn base(block_tokens: u32, layout: KvLayout, dtype: Dtype) -> KvGeometry {
    KvGeometry { layers: 32, kv_heads: 8, head_dim: 128, block_tokens, layout, dtype, ..KvGeometry::PLAIN }
}

/// Rank 0 of `degree`.
fn rank(geometry: KvGeometry, degree: u16) -> KvGeometry {
    let shard = Shard::Tensor { rank: 0, degree, heads: 8 };
    KvGeometry { shard, kv_heads: 8 / u32::from(degree), ..geometry }
}

fn orders() -> Vec<(KvGeometry, KvGeometry)> {
    let pairs = [
        ((32, Nhd), (32, Nhd)),
        ((32, Nhd), (16, Nhd)),
        ((32, Hnd), (16, Hnd)),
        ((32, Nhd), (16, Hnd)),
        ((16, Hnd), (32, Nhd)),
        ((32, Nhd), (24, Hnd)),
        ((16, Hnd), (16, L2bHnd)),
        ((16, Lbhnc), (16, Lbhnc)),
        ((32, Nhd), (16, Lbnhc)),
    ];
    pairs.map(|((a, from), (b, to))| (base(a, from, Bf16), base(b, to, Bf16))).into()
}

fn shards() -> Vec<(KvGeometry, KvGeometry)> {
    let (nhd, hnd) = (base(16, Nhd, Bf16), base(16, Hnd, Bf16));
    vec![(rank(nhd, 2), rank(nhd, 4)), (rank(hnd, 2), rank(hnd, 4)), (rank(nhd, 2), rank(hnd, 4))]
}

fn formats() -> Vec<(KvGeometry, KvGeometry)> {
    let fp8 = |g, scales| KvGeometry { dtype: Fp8E4m3, scales, ..g };
    let (nhd, hnd) = (base(32, Nhd, Bf16), base(16, Hnd, Bf16));
    let head = fp8(hnd, Scales::Head);
    vec![
        (base(32, Nhd, F32), hnd),
        (nhd, base(16, Hnd, F32)),
        (base(32, Nhd, F16), hnd),
        (nhd, base(16, Hnd, F16)),
        (head, KvGeometry { block_tokens: 32, ..nhd }),
        (fp8(nhd, Scales::Block), base(16, Hnd, F32)),
        (fp8(nhd, Scales::Head), head),
        (nhd, head),
        (base(32, Nhd, F32), head),
        (nhd, fp8(hnd, Scales::Block)),
        (base(16, Nhd, Bf16), fp8(base(32, Hnd, Bf16), Scales::Head)),
    ]
}

/// Bytes read and written per second by a plain copy into the same kind of memory.
fn copy_rate() -> anyhow::Result<f64> {
    let source = vec![7u8; PASS_BYTES];
    let dest = HostMemory::allocate(PASS_BYTES, "bench")?;
    let took = median(|| {
        for at in (0..PASS_BYTES).step_by(4 << 20) {
            dest.write(at, &source[at..][..4 << 20]);
        }
    });
    let rate = 2.0 * PASS_BYTES as f64 / took.as_secs_f64();
    row("memcpy, 4 MiB at a time", took, rate / 2.0, rate, rate);
    Ok(rate)
}

fn relayout_rate(source: KvGeometry, dest: KvGeometry, memcpy: f64) -> anyhow::Result<()> {
    let plan = RelayoutPlan::new(source, dest)?;
    let bytes = source.block_bytes();
    let count = u32::try_from(PASS_BYTES / bytes)?;
    let tokens = 0..count * source.block_tokens;
    let blocks = vec![7u8; count as usize * bytes];
    let arena = HostMemory::allocate(dest.blocks_for(tokens.end) as usize * dest.block_bytes(), "bench")?;
    // Blocks of a sequence are scattered over an arena: walk it with a stride coprime to its size.
    let slots = dest.blocks_for(tokens.end) as usize;
    let stride = (slots / 3..).find(|s| gcd(*s, slots) == 1).unwrap_or(1);
    let plan = if dest.layout.is_block_first() { plan } else { plan.into_arena(slots as u32) };
    let at = |b: u32| dest.arena_at(slots as u32, (b as usize * stride % slots) as u32);
    let block = |index: u32| &blocks[index as usize * bytes..][..bytes];
    let took = median(|| {
        if plan.needs_whole_blocks() {
            (0..slots as u32).for_each(|b| plan.assemble(b, &tokens, block, &arena, at(b)));
            return;
        }
        for index in 0..count {
            plan.scatter(index, block(index), tokens.clone(), &arena, at);
        }
    });
    // Of the source only the common heads are read.
    let common = u64::from(source.kv_heads.min(dest.kv_heads));
    let read = u64::from(tokens.end) * source.token_bytes().0 * common / u64::from(source.kv_heads);
    let written = u64::from(tokens.end) * dest.token_bytes().0 * common / u64::from(dest.kv_heads);
    let moved = read + written;
    let rate = moved as f64 / took.as_secs_f64();
    let label = format!("{} -> {}", name(&source), name(&dest));
    row(&label, took, read as f64 / took.as_secs_f64(), rate, memcpy);
    Ok(())
}

fn name(g: &KvGeometry) -> String {
    let scales = if g.scales == Scales::None { String::new() } else { format!("/{}", g.scales) };
    let part =
        if let Shard::Tensor { degree, .. } = g.shard { format!(" tp{degree}") } else { String::new() };
    format!("{} {}{scales} x{}{part}", g.layout, g.dtype, g.block_tokens)
}

/// Prints what a plan costs with the runs of all of 4096 blocks, and what it costs to find one that is there.
fn plan_time(source: KvGeometry, dest: KvGeometry) -> anyhow::Result<()> {
    const ROUNDS: u32 = 200;
    const BLOCKS: u32 = 4096;
    let tokens = 0..BLOCKS * source.block_tokens;
    let cold = median_of(ROUNDS, || {
        let plan = RelayoutPlan::new(black_box(source), black_box(dest));
        let runs = |plan: RelayoutPlan| {
            let pieces = (0..BLOCKS).flat_map(|index| plan.pieces(index, tokens.clone()));
            pieces.map(|piece| piece.nest.runs()).sum::<usize>()
        };
        black_box(plan.map(runs).ok());
    });
    let cache = PlanCache::packed(dest);
    cache.plan(source)?;
    let cached = median_of(ROUNDS, || {
        for _ in 0..1000 {
            black_box(cache.plan(black_box(source)).ok());
        }
    }) / 1000;
    println!("plan of {BLOCKS} blocks of 32 layers: {cold:?} cold with all its runs, {cached:?} cached");
    Ok(())
}

/// Prints where the thresholds of `RelayoutPlan::choice` come from: a copy of one run more, by the length of runs.
fn choices(memcpy: f64) -> anyhow::Result<()> {
    println!("one copy more of a run, by its length (to be weighed against a read of its own):");
    let source = vec![7u8; PASS_BYTES];
    let dest = HostMemory::allocate(PASS_BYTES, "bench")?;
    for shift in [8, 10, 12, 14, 16, 18] {
        let run = 1usize << shift;
        let count = PASS_BYTES / run;
        let stride = (count / 3..).find(|s| gcd(*s, count) == 1).unwrap_or(1);
        let took = median(|| {
            for i in 0..count {
                dest.write(i * stride % count * run, &source[i * run..][..run]);
            }
        });
        let each = took / u32::try_from(count)?;
        let rate = 2.0 * PASS_BYTES as f64 / took.as_secs_f64();
        println!("{:>10} bytes{:>12.2?} a run{:>11.0}% of memcpy", run, each, 100.0 * rate / memcpy);
    }
    Ok(())
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn median(pass: impl FnMut()) -> Duration {
    median_of(PASSES, pass)
}

fn median_of(passes: u32, mut pass: impl FnMut()) -> Duration {
    pass();
    let mut times: Vec<Duration> = (0..passes)
        .map(|_| {
            let start = Instant::now();
            pass();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[passes as usize / 2]
}

fn row(label: &str, took: Duration, source_rate: f64, rate: f64, memcpy: f64) {
    println!(
        "{label:<44}{:>10.2}{:>9.2}{:>14.2}{:>10.0}%",
        took.as_secs_f64() * 1e3,
        source_rate / 1e9,
        rate / 1e9,
        100.0 * rate / memcpy
    );
}
