//! Re-layout throughput beside memcpy: `cargo bench -p baton-transfer --bench relayout`.
//!
//! Every row lays 128 MiB of source blocks out into blocks of another geometry. `read + written` counts both sides, as
//! memory sees them; a memcpy reads and writes one byte per byte. Median of several passes, caches cold.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use baton_config::{Dtype, KvGeometry, KvLayout};
use baton_transfer::{HostMemory, RelayoutPlan};

/// Bytes of source blocks per pass: several times the last-level cache.
const PASS_BYTES: usize = 128 << 20;

/// Passes per row.
const PASSES: usize = 9;

fn main() -> anyhow::Result<()> {
    let base = |block_tokens, layout, dtype| KvGeometry {
        layers: 32,
        kv_heads: 8,
        head_dim: 128,
        block_tokens,
        layout,
        dtype,
        ..KvGeometry::PLAIN
    };
    let (nhd, hnd) = (KvLayout::Nhd, KvLayout::Hnd);
    let (bf16, f32) = (Dtype::Bf16, Dtype::F32);
    println!(
        "32 layers x 8 kv heads x 128 dims; {} MiB of source a pass, median of {PASSES}",
        PASS_BYTES >> 20
    );
    println!("{:<34}{:>12}{:>10}{:>14}{:>12}", "pair", "ms", "GB/s", "read+written", "of memcpy");
    let memcpy = copy_rate()?;
    for (source, dest) in [
        (base(32, nhd, bf16), base(32, nhd, bf16)),
        (base(32, nhd, bf16), base(16, nhd, bf16)),
        (base(32, hnd, bf16), base(16, hnd, bf16)),
        (base(32, nhd, bf16), base(16, hnd, bf16)),
        (base(16, hnd, bf16), base(32, nhd, bf16)),
        (base(32, nhd, bf16), base(24, hnd, bf16)),
        (base(32, nhd, f32), base(16, hnd, bf16)),
        (base(32, nhd, bf16), base(16, hnd, f32)),
    ] {
        relayout_rate(source, dest, memcpy)?;
    }
    let small = KvGeometry { kv_heads: 2, head_dim: 64, ..base(32, nhd, bf16) };
    let other = KvGeometry { block_tokens: 16, layout: hnd, ..small };
    println!("2 kv heads x 64 dims:");
    relayout_rate(small, other, memcpy)?;
    plan_time(base(32, nhd, bf16), base(16, hnd, bf16))
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
    let took = median(|| {
        for index in 0..count {
            let block = &blocks[index as usize * bytes..][..bytes];
            plan.scatter(index, block, tokens.clone(), &arena, |b| {
                dest.packed_at(b as usize * stride % slots * dest.block_bytes())
            });
        }
    });
    let moved = blocks.len() + (tokens.end as u64 * dest.token_bytes().0) as usize;
    let rate = moved as f64 / took.as_secs_f64();
    let name = |g: &KvGeometry| format!("{} {} x{}", g.layout, g.dtype, g.block_tokens);
    let label = format!("{} -> {}", name(&source), name(&dest));
    row(&label, took, blocks.len() as f64 / took.as_secs_f64(), rate, memcpy);
    Ok(())
}

/// Prints what a plan and the nests of one block cost.
fn plan_time(source: KvGeometry, dest: KvGeometry) -> anyhow::Result<()> {
    const ROUNDS: u32 = 100_000;
    let start = Instant::now();
    for _ in 0..ROUNDS {
        let plan = RelayoutPlan::new(black_box(source), black_box(dest))?;
        black_box(plan.pieces(black_box(3), 0..4096).count());
    }
    println!("plan and nests of one block: {:?}", start.elapsed() / ROUNDS);
    Ok(())
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn median(mut pass: impl FnMut()) -> Duration {
    pass();
    let mut times: Vec<Duration> = (0..PASSES)
        .map(|_| {
            let start = Instant::now();
            pass();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[PASSES / 2]
}

fn row(label: &str, took: Duration, source_rate: f64, rate: f64, memcpy: f64) {
    println!(
        "{label:<34}{:>12.2}{:>10.2}{:>14.2}{:>11.0}%",
        took.as_secs_f64() * 1e3,
        source_rate / 1e9,
        rate / 1e9,
        100.0 * rate / memcpy
    );
}
