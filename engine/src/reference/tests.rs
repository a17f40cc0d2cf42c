use std::path::PathBuf;
use std::sync::Arc;

use baton_config::{Dtype, KvGeometry, KvLayout};

use super::*;
use crate::arena::BlockId;
use crate::memory::HeapMemory;

mod broken;

fn golden_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

const GOLDENS: [&str; 6] = [
    "llama-f32",
    "llama-bf16-sharded",
    "llama-f16-attention-bias-tied",
    "qwen2-bf16-tied",
    "qwen3-bf16",
    "qwen3-f32-tied",
];

/// xorshift64*: a seed printed with a failure replays it.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn tokens(&mut self, count: usize, vocab: u32) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab as usize) as u32).collect()
    }
}

fn arena(info: &ModelInfo, block_tokens: u32, layout: KvLayout, dtype: Dtype, blocks: u32) -> Arena {
    let ModelInfo { layers, kv_heads, head_dim, .. } = *info;
    let geometry =
        KvGeometry { layers, kv_heads, head_dim, block_tokens, layout, dtype, ..KvGeometry::PLAIN };
    let memory = HeapMemory::new(geometry.block_bytes() * blocks as usize);
    Arena::new(Arc::new(memory), geometry, blocks).unwrap()
}

/// One pass over one sequence; the logits after its last token.
fn pass(model: &mut Reference, arena: &Arena, blocks: &[BlockId], tokens: &[u32], start: usize) -> Vec<f32> {
    let mut out = Forward::default();
    let item = BatchItem {
        context: &tokens[..start],
        tokens: &tokens[start..],
        start: start as u32,
        blocks,
        logits: true,
    };
    model.forward(arena, &[item], &mut out).unwrap();
    out.logits
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Logits of every position, one token at a time, in the plainest setting.
fn plain(model: &mut Reference, dtype: Dtype, tokens: &[u32]) -> Vec<Vec<f32>> {
    let arena = arena(model.model(), 16, KvLayout::Hnd, dtype, 16);
    let blocks: Vec<BlockId> = (0..16).map(BlockId).collect();
    (0..tokens.len()).map(|at| pass(model, &arena, &blocks, &tokens[..=at], at)).collect()
}

#[test]
fn logits_agree_with_transformers() {
    for name in GOLDENS {
        let bytes = std::fs::read(golden_dir(name).join("golden.safetensors")).unwrap();
        let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut model = Reference::load(&golden_dir(name), 1).unwrap();
        let vocab = model.model().vocab as usize;
        for prompt in 0..3 {
            let tokens: Vec<u32> = golden
                .tensor(&format!("tokens.{prompt}"))
                .unwrap()
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|bytes| u32::from_le_bytes(*bytes))
                .collect();
            let expected = golden.tensor(&format!("logits.{prompt}")).unwrap();
            let expected: Vec<f32> =
                expected.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            assert_eq!(expected.len(), tokens.len() * vocab);
            let largest = expected.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let ours = plain(&mut model, Dtype::F32, &tokens);
            for (position, (ours, expected)) in ours.iter().zip(expected.chunks(vocab)).enumerate() {
                let error =
                    ours.iter().zip(expected).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs())) / largest;
                assert!(
                    error <= 2e-5,
                    "{name} prompt {prompt} position {position}: relative error {error:e}"
                );
                let best = |row: &[f32]| (0..vocab).max_by(|a, b| row[*a].total_cmp(&row[*b]));
                assert_eq!(best(ours), best(expected), "{name} prompt {prompt} position {position}");
            }
        }
    }
}

/// One sequence of a randomly composed run.
struct Run {
    tokens: Vec<u32>,
    blocks: Vec<BlockId>,
    done: usize,
    /// The logits of each position in the plainest setting.
    expected: Vec<Vec<u32>>,
}

/// Runs some sequences to their ends in random chunks and batches; every row of logits must have the expected
/// bits. Gives the number of rows compared.
fn run_randomly(
    model: &mut Reference,
    arena: &Arena,
    runs: &mut [Run],
    random: &mut Random,
    case: &str,
) -> usize {
    let vocab = model.model().vocab as usize;
    let mut rows = 0;
    let mut out = Forward::default();
    while runs.iter().any(|run| run.done < run.tokens.len()) {
        let longest = random.pick(&[1, 1, 1, 7, 16, 64, 100, 300]);
        let mut members = Vec::new();
        for (index, run) in runs.iter().enumerate() {
            let remaining = run.tokens.len() - run.done;
            if remaining > 0 && random.below(4) > 0 {
                members.push((index, 1 + random.below(longest.min(remaining)), random.below(8) > 0));
            }
        }
        if random.below(2) == 0 {
            members.reverse();
        }
        let batch: Vec<BatchItem<'_>> = members
            .iter()
            .map(|&(index, count, logits)| {
                let run = &runs[index];
                let (context, rest) = run.tokens.split_at(run.done);
                BatchItem {
                    context,
                    tokens: &rest[..count],
                    start: run.done as u32,
                    blocks: &run.blocks,
                    logits,
                }
            })
            .collect();
        model.forward(arena, &batch, &mut out).unwrap();
        let mut logits = out.logits.chunks(vocab);
        for (index, count, wanted) in members {
            let run = &mut runs[index];
            run.done += count;
            if wanted {
                rows += 1;
                let same = bits(logits.next().unwrap()) == run.expected[run.done - 1];
                assert!(same, "{case}: sequence {index}, chunk of {count} up to {}", run.done);
            }
        }
        assert!(logits.next().is_none(), "{case}: more rows than asked for");
    }
    rows
}

#[test]
fn logits_do_not_depend_on_anything_but_the_tokens() {
    const CASES: u64 = 24;
    for (name, dtype) in [
        ("llama-f32", Dtype::Bf16),
        ("llama-bf16-sharded", Dtype::F32),
        ("qwen2-bf16-tied", Dtype::Bf16),
        ("qwen3-bf16", Dtype::Bf16),
    ] {
        let dir = golden_dir(name);
        let mut first = Reference::load_with(&dir, 1, Isa::best()).unwrap();
        let info = first.model().clone();
        let mut random = Random(9);
        let sequences: Vec<(Vec<u32>, Vec<Vec<u32>>)> = [150, 131, 70, 5, 1, 140, 128]
            .map(|count| {
                let tokens = random.tokens(count, info.vocab);
                let expected = plain(&mut first, dtype, &tokens).iter().map(|row| bits(row)).collect();
                (tokens, expected)
            })
            .into();
        for seed in 1..=CASES {
            let mut random = Random(seed);
            let threads = 1 + random.below(3);
            let isa = random.pick(&Isa::all());
            let block_tokens = random.pick(&[1, 3, 8, 16, 32, 64, 100]);
            let layout = random.pick(&[KvLayout::Nhd, KvLayout::Hnd]);
            let case = format!(
                "{name}, seed {seed}: {threads} threads, {}, blocks of {block_tokens} {layout}",
                isa.name()
            );
            let mut model = Reference::load_with(&dir, threads, isa).unwrap();
            let needed = |tokens: &[u32]| (tokens.len() as u32).div_ceil(block_tokens);
            let total = sequences.iter().map(|(tokens, _)| needed(tokens)).sum();
            // Blocks in no order, as an arena in use has them.
            let mut free: Vec<BlockId> = (0..total).map(BlockId).collect();
            let mut runs: Vec<Run> = sequences
                .iter()
                .map(|(tokens, expected)| Run {
                    tokens: tokens.clone(),
                    blocks: (0..needed(tokens)).map(|_| free.swap_remove(random.below(free.len()))).collect(),
                    done: 0,
                    expected: expected.clone(),
                })
                .collect();
            let arena = arena(&info, block_tokens, layout, dtype, total);
            let rows = run_randomly(&mut model, &arena, &mut runs, &mut random, &case);
            assert!(rows > 10, "{case}: only {rows} rows compared");
        }
    }
}

#[test]
fn one_machine_continues_what_another_began() {
    let dir = golden_dir("qwen3-bf16");
    let isas = Isa::all();
    let mut one = Reference::load_with(&dir, 1, isas[0]).unwrap();
    let mut other = Reference::load_with(&dir, 2, isas[isas.len() - 1]).unwrap();
    let tokens = Random(4).tokens(140, one.model().vocab);
    let expected = plain(&mut one, Dtype::Bf16, &tokens);
    let arena = arena(one.model(), 32, KvLayout::Nhd, Dtype::Bf16, 5);
    let blocks: Vec<BlockId> = (0..5).rev().map(BlockId).collect();
    pass(&mut one, &arena, &blocks, &tokens[..77], 0);
    let logits = pass(&mut other, &arena, &blocks, &tokens, 77);
    assert_eq!(bits(&logits), bits(&expected[139]));
    // A prefix-cache hit recomputes the last token over rows that are there already.
    let logits = pass(&mut one, &arena, &blocks, &tokens, 139);
    assert_eq!(bits(&logits), bits(&expected[139]));
}

#[test]
fn a_flipped_bit_in_a_stored_key_changes_the_logits() {
    let mut model = Reference::load(&golden_dir("llama-f32"), 1).unwrap();
    let arena = arena(model.model(), 16, KvLayout::Hnd, Dtype::Bf16, 2);
    let blocks = [BlockId(1), BlockId(0)];
    let tokens = Random(3).tokens(20, model.model().vocab);
    pass(&mut model, &arena, &blocks, &tokens[..19], 0);
    let before = pass(&mut model, &arena, &blocks, &tokens, 19);
    let mut byte = [0];
    let at = arena.block_offset(BlockId(1)) + 1;
    arena.memory().read(at, &mut byte);
    arena.memory().write(at, &[byte[0] ^ 0x01]);
    assert_ne!(bits(&pass(&mut model, &arena, &blocks, &tokens, 19)), bits(&before));
}

#[test]
fn a_batch_beyond_one_slab_is_cut() {
    let mut model = Reference::load(&golden_dir("llama-f32"), 2).unwrap();
    let info = model.model().clone();
    let tokens = Random(8).tokens(250, info.vocab);
    let expected = bits(plain_last(&mut model, &tokens).as_slice());
    let arena = arena(&info, 10, KvLayout::Nhd, Dtype::F32, 75);
    let tables: Vec<Vec<BlockId>> = (0..3).map(|i| (i * 25..(i + 1) * 25).map(BlockId).collect()).collect();
    let batch: Vec<BatchItem<'_>> = tables
        .iter()
        .map(|blocks| BatchItem { context: &[], tokens: &tokens, start: 0, blocks, logits: true })
        .collect();
    let mut out = Forward::default();
    model.forward(&arena, &batch, &mut out).unwrap();
    assert_eq!(out.logits.len(), 3 * info.vocab as usize);
    for logits in out.logits.chunks(info.vocab as usize) {
        assert_eq!(bits(logits), expected);
    }
}

fn plain_last(model: &mut Reference, tokens: &[u32]) -> Vec<f32> {
    plain(model, Dtype::F32, tokens).pop().unwrap()
}

#[test]
fn facts_of_a_model_directory() {
    let model = Reference::load(&golden_dir("llama-bf16-sharded"), 1).unwrap();
    let info = model.model();
    assert_eq!((info.name.as_str(), info.max_context, &*info.eos), ("llama-bf16-sharded", 256, &[2][..]));
    assert_eq!((info.layers, info.kv_heads, info.head_dim), (2, 2, 32));
    assert!(model.cost().step_bytes > 0 && model.cost().decode_operations > model.cost().prefill_operations);
}

#[test]
fn an_arena_of_another_shape_is_refused() {
    let mut model = Reference::load(&golden_dir("llama-f32"), 1).unwrap();
    let other = ModelInfo { head_dim: 8, ..model.model().clone() };
    let arena = arena(&other, 16, KvLayout::Hnd, Dtype::F32, 1);
    let item = BatchItem { context: &[], tokens: &[1], start: 0, blocks: &[BlockId(0)], logits: true };
    let refused = model.forward(&arena, &[item], &mut Forward::default());
    assert!(matches!(refused, Err(ExecuteError::Broken { .. })), "{refused:?}");
}
