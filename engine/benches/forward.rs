//! Speed of the reference executor on one model: prefill and decode, beside what the machine could do at
//! most.
//!
//! ```text
//! cargo bench -p baton-engine --bench forward -- --model DIR [--threads 1] [--prompt 512] [--context 256] [--seconds 2] [--kv f32] [--only decode_b8]
//! ```
//!
//! One line per measurement, `name tokens_per_second`, then for people the share of the machine's limits: the
//! arithmetic rate of the kernels on operands in the first-level cache, and the rate at which all threads
//! together read memory. Times are the shortest of many, since other processes only ever make one longer.

#![expect(clippy::print_stdout, reason = "a benchmark prints")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use baton_config::{Dtype, KvGeometry, KvLayout};
use baton_engine::executor::{BatchItem, Executor, Forward};
use baton_engine::reference::{Limits, Reference};
use baton_engine::{Arena, BlockId, HeapMemory};

struct Options {
    model: PathBuf,
    threads: usize,
    prompt: u32,
    context: u32,
    time: Duration,
    kv: Dtype,
    /// The one measurement wanted; all when empty.
    only: String,
}

const BLOCK_TOKENS: u32 = 16;
const BATCHES: [u32; 3] = [1, 8, 32];

fn main() -> Result<()> {
    let Some(options) = parse()? else {
        println!("forward: give --model DIR (scripts/make_random_checkpoint.py makes one)");
        return Ok(());
    };
    let started = Instant::now();
    let mut model = Reference::load(&options.model, options.threads)?;
    let cost = model.cost();
    println!(
        "{}: {:.1} M weights in {:.0} MB, loaded in {:.2} s, {} threads, kv {}",
        model.model().name,
        cost.decode_operations as f64 / 1e6,
        cost.step_bytes as f64 / 1e6,
        started.elapsed().as_secs_f64(),
        options.threads,
        options.kv,
    );
    let limits = Limits::measure(options.threads);
    println!(
        "limits: {:.0} Gflop/s, {:.1} GB/s",
        limits.flops_per_second / 1e9,
        limits.bytes_per_second / 1e9
    );
    let share = |tokens: f64, operations: usize, steps: f64| {
        format!(
            "{:5.1} % of arithmetic, {:5.1} % of bandwidth",
            100.0 * tokens * 2.0 * operations as f64 / limits.flops_per_second,
            100.0 * steps * cost.step_bytes as f64 / limits.bytes_per_second
        )
    };
    let wanted = |name: &str| options.only.is_empty() || options.only == name;
    let name = format!("prefill_{}", options.prompt);
    if wanted(&name) {
        let time = prefill(&mut model, &options)?.as_secs_f64();
        let rate = f64::from(options.prompt) / time;
        println!("{name} {rate:.1}  ({})", share(rate, cost.prefill_operations, 1.0 / time));
    }
    for batch in BATCHES {
        let name = format!("decode_b{batch}");
        if wanted(&name) {
            let time = decode(&mut model, &options, batch)?.as_secs_f64();
            let rate = f64::from(batch) / time;
            println!("{name} {rate:.1}  ({})", share(rate, cost.decode_operations, 1.0 / time));
        }
    }
    Ok(())
}

fn parse() -> Result<Option<Options>> {
    let mut options = Options {
        model: PathBuf::new(),
        threads: 1,
        prompt: 512,
        context: 256,
        time: Duration::from_secs(2),
        kv: Dtype::F32,
        only: String::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if name == "--bench" {
            continue;
        }
        let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--model" => options.model = value.into(),
            "--threads" => options.threads = value.parse()?,
            "--prompt" => options.prompt = value.parse()?,
            "--context" => options.context = value.parse()?,
            "--seconds" => options.time = Duration::from_secs_f64(value.parse()?),
            "--only" => options.only = value,
            "--kv" if value == "bf16" => options.kv = Dtype::Bf16,
            "--kv" if value == "f32" => options.kv = Dtype::F32,
            _ => bail!("unknown argument {name} {value}"),
        }
    }
    Ok(if options.model.as_os_str().is_empty() { None } else { Some(options) })
}

/// The shortest time of `run`, repeated for about `time`, three times at least.
fn shortest(time: Duration, mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let started = Instant::now();
    let mut best = Duration::MAX;
    let mut repeats = 0;
    while repeats < 3 || started.elapsed() < time {
        let now = Instant::now();
        run()?;
        best = best.min(now.elapsed());
        repeats += 1;
    }
    Ok(best)
}

fn arena(model: &Reference, options: &Options, tokens: u32, sequences: u32) -> Result<Arena> {
    let info = model.model();
    let geometry = KvGeometry {
        layers: info.layers,
        kv_heads: info.kv_heads,
        head_dim: info.head_dim,
        block_tokens: BLOCK_TOKENS,
        layout: KvLayout::Hnd,
        dtype: options.kv,
        ..KvGeometry::PLAIN
    };
    let blocks = geometry.blocks_for(tokens) * sequences;
    Ok(Arena::new(Arc::new(HeapMemory::new(geometry.block_bytes() * blocks as usize)), geometry, blocks)?)
}

fn tokens(model: &Reference, count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * 7919 + 13) % model.model().vocab).collect()
}

fn prefill(model: &mut Reference, options: &Options) -> Result<Duration> {
    let arena = arena(model, options, options.prompt, 1)?;
    let blocks: Vec<BlockId> = (0..arena.blocks()).map(BlockId).collect();
    let tokens = tokens(model, options.prompt);
    let item = BatchItem { context: &[], tokens: &tokens, start: 0, blocks: &blocks, logits: true };
    let mut out = Forward::default();
    shortest(options.time, || Ok(model.forward(&arena, &[item], &mut out)?))
}

/// The time of one step of `batch` sequences after a context.
fn decode(model: &mut Reference, options: &Options, batch: u32) -> Result<Duration> {
    let arena = arena(model, options, options.context + 1, batch)?;
    let per_sequence = arena.blocks() / batch;
    let tables: Vec<Vec<BlockId>> =
        (0..batch).map(|i| (0..per_sequence).map(|block| BlockId(block * batch + i)).collect()).collect();
    let tokens = tokens(model, options.context + 1);
    let (context, last) = tokens.split_at(options.context as usize);
    let mut out = Forward::default();
    for blocks in &tables {
        let item = BatchItem { context: &[], tokens: context, start: 0, blocks, logits: false };
        model.forward(&arena, &[item], &mut out)?;
    }
    let items: Vec<BatchItem<'_>> = tables
        .iter()
        .map(|blocks| BatchItem { context, tokens: last, start: options.context, blocks, logits: true })
        .collect();
    shortest(options.time, || Ok(model.forward(&arena, &items, &mut out)?))
}
