//! What a sequence emits depends on its tokens, sampling and model alone.

use std::path::Path;
use std::time::Instant;

use baton_config::protocol::Sampling;
use baton_config::{Dtype, KvLayout};

use super::harness::*;
use crate::engine::*;
use crate::executor::Executor;
use crate::mix::Rng;
use crate::reference::Reference;
use crate::sim::Sim;

/// Prompts with common starts, of lengths around block edges, with every kind of sampling.
fn specs(vocab: u32) -> Vec<SequenceSpec> {
    let mut rng = Rng(11);
    let mut tokens = |len: usize| -> Vec<u32> {
        let fresh = len.min(len / 2 + 3);
        let common = (0..len as u32 - fresh as u32).map(|i| i * 7 % vocab);
        common.chain((0..fresh).map(|_| rng.below(u64::from(vocab)) as u32)).collect()
    };
    let samplings = [
        greedy(),
        Sampling { temperature: 30.0, seed: 3, ..Sampling::default() },
        Sampling { temperature: 1.3, top_p: 0.9, min_p: 0.01, seed: 4, ..Sampling::default() },
        Sampling {
            temperature: 0.8,
            top_k: 30,
            // Enough to matter beside the peak of a simulated row.
            frequency_penalty: 90.0,
            presence_penalty: 0.3,
            repetition_penalty: 1.2,
            logit_bias: vec![(3, 2.0), (4, -50.0)],
            logprobs: Some(3),
            ..Sampling::default()
        },
    ];
    let lengths = [1, 2, 15, 16, 17, 31, 32, 33, 40, 64];
    (0..)
        .zip(lengths)
        .map(|(i, len)| SequenceSpec {
            sampling: Sampling { ignore_eos: i % 3 == 0, ..samplings[i % samplings.len()].clone() },
            generated: if i % 4 == 1 { len as u32 / 2 } else { 0 },
            ..spec(tokens(len), 14)
        })
        .collect()
}

fn shapes(dtype: Dtype) -> Vec<Shape> {
    let shape = |block_tokens, layout, blocks, (chunk, batch), prefix_cache| Shape {
        block_tokens,
        layout,
        dtype,
        blocks,
        limits: EngineLimits {
            prefill_chunk_tokens: chunk,
            max_batch_sequences: batch,
            max_waiting_sequences: 64,
            prefix_cache,
            mixed: false,
        },
    };
    vec![
        shape(16, KvLayout::Hnd, 200, (512, 64), true),
        shape(16, KvLayout::Nhd, 200, (1, 3), false),
        shape(1, KvLayout::Nhd, 110, (7, 4), true),
        shape(5, KvLayout::Hnd, 18, (33, 64), true),
        shape(32, KvLayout::Nhd, 4, (100, 64), true),
        shape(4, KvLayout::Hnd, 24, (13, 9), false),
    ]
}

/// All of `specs` at once on each of `shapes`, twice in a row on the same engine, against each alone.
fn outputs_do_not_depend_on_the_shape(make: impl Fn() -> Box<dyn Executor>, dtype: Dtype) {
    let vocab = make().model().vocab;
    let alone = |spec: &SequenceSpec| {
        let mut engine = Shape { dtype, ..WIDE }.over(make());
        engine.submit(SeqId(0), spec.clone(), Instant::now()).unwrap();
        run(&mut engine).remove(&SeqId(0)).unwrap()
    };
    let specs = specs(vocab);
    let expected: Vec<Output> = specs.iter().map(alone).collect();
    assert!(expected.iter().all(|output| output.finished.is_some() && output.digests[0].is_some()));
    let mut preemptions = 0;
    for shape in shapes(dtype) {
        let mut engine = shape.over(make());
        for round in 0..2 {
            for (id, spec) in (0..).zip(&specs) {
                engine.submit(SeqId(id), spec.clone(), Instant::now()).unwrap();
            }
            let outputs = run(&mut engine);
            for (id, expected) in (0..).zip(&expected) {
                assert_eq!(outputs[&SeqId(id)], *expected, "sequence {id}, round {round}, {shape:?}");
            }
        }
        preemptions += engine.preemptions();
    }
    assert!(preemptions > 0, "the small pools preempt");
}

/// Each of `specs` prefilled by one shape and decoded by another, against each on one engine.
fn outputs_do_not_depend_on_the_handoff(make: impl Fn() -> Box<dyn Executor>, dtype: Dtype) {
    let vocab = make().model().vocab;
    let shapes: Vec<Shape> = shapes(dtype).into_iter().map(|shape| Shape { blocks: 200, ..shape }).collect();
    for (i, spec) in (0..).zip(specs(vocab)) {
        let (p_shape, d_shape) = (shapes[i % shapes.len()], shapes[(i * 5 + 1) % shapes.len()]);
        let (mut p, mut d, id) = (p_shape.over(make()), d_shape.over(make()), SeqId(1));
        let purposed = |purpose| SequenceSpec { purpose, ..spec.clone() };
        p.submit(id, purposed(Purpose::Export), Instant::now()).unwrap();
        d.submit(id, purposed(Purpose::Import), Instant::now()).unwrap();
        let (p_events, d_events) = (run_events(&mut p), run_events(&mut d));
        let (from, to) = (admitted(&p_events, id).unwrap().1, admitted(&d_events, id).unwrap().1);
        let tokens = spec.tokens.len() as u32;
        copy_kv((p.arena(), &from), (d.arena(), &to), 0..tokens);
        d.imported(id, tokens);
        d.start_decode(id, first_token(&p_events, id).unwrap());
        let mut single = Shape { dtype, ..WIDE }.over(make());
        single.submit(id, purposed(Purpose::Generate), Instant::now()).unwrap();
        assert_eq!(run(&mut d)[&id], run(&mut single)[&id], "prompt {i}, {p_shape:?} to {d_shape:?}");
    }
}

/// A stream that goes on elsewhere, from any of its tokens, against the undisturbed one.
fn a_replay_continues_the_stream(make: impl Fn() -> Box<dyn Executor>, dtype: Dtype) {
    let vocab = make().model().vocab;
    let tokens_of = |spec: &SequenceSpec| {
        let mut engine = Shape { dtype, ..WIDE }.over(make());
        engine.submit(SeqId(0), spec.clone(), Instant::now()).unwrap();
        run(&mut engine).remove(&SeqId(0)).unwrap().tokens
    };
    for spec in specs(vocab) {
        let whole = tokens_of(&spec);
        for sent in 1..whole.len() {
            let tokens = [&spec.tokens[..], &whole[..sent]].concat();
            let (generated, max_tokens) = (spec.generated + sent as u32, spec.max_tokens - sent as u32);
            let replay = SequenceSpec { tokens, generated, max_tokens, ..spec.clone() };
            assert_eq!(tokens_of(&replay), whole[sent..], "after {sent} tokens of {spec:?}");
        }
    }
}

fn sim() -> Box<dyn Executor> {
    Box::new(Sim::new(config(), model()))
}

#[test]
fn simulated_outputs_do_not_depend_on_the_shape() {
    outputs_do_not_depend_on_the_shape(sim, Dtype::F32);
    outputs_do_not_depend_on_the_shape(sim, Dtype::Bf16);
}

#[test]
fn simulated_outputs_do_not_depend_on_the_handoff() {
    outputs_do_not_depend_on_the_handoff(sim, Dtype::F32);
    outputs_do_not_depend_on_the_handoff(sim, Dtype::Bf16);
}

#[test]
fn a_simulated_replay_continues_the_stream() {
    a_replay_continues_the_stream(sim, Dtype::F32);
}

/// Small random checkpoints, one of each kind of attention.
fn reference(name: &'static str) -> impl Fn() -> Box<dyn Executor> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    move || Box::new(Reference::load(&dir, 2).unwrap())
}

#[test]
fn transformer_outputs_do_not_depend_on_the_shape() {
    outputs_do_not_depend_on_the_shape(reference("llama-f32"), Dtype::F32);
    outputs_do_not_depend_on_the_shape(reference("qwen3-bf16"), Dtype::Bf16);
}

#[test]
fn transformer_outputs_do_not_depend_on_the_handoff() {
    outputs_do_not_depend_on_the_handoff(reference("qwen2-bf16-tied"), Dtype::Bf16);
    outputs_do_not_depend_on_the_handoff(reference("qwen3-bf16"), Dtype::F32);
}

#[test]
fn a_transformers_replay_continues_the_stream() {
    a_replay_continues_the_stream(reference("llama-f32"), Dtype::Bf16);
}
