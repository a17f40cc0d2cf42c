//! Small engines over the simulated executor, and ways to run them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use baton_config::protocol::{FinishReason, FirstToken, Sampling};
use baton_config::{Dtype, KvGeometry, KvLayout};

use crate::arena::{Arena, Kv, Plane};
use crate::engine::*;
use crate::executor::{Executor, ModelInfo};
use crate::memory::HeapMemory;
use crate::sim::{Sim, SimConfig};

pub(super) const VOCAB: u32 = 61;

pub(super) fn model() -> ModelInfo {
    ModelInfo {
        name: "sim".into(),
        vocab: VOCAB,
        max_context: 200,
        eos: vec![7],
        layers: 2,
        kv_heads: 2,
        head_dim: 8,
    }
}

pub(super) fn config() -> SimConfig {
    SimConfig { verify_rows: u32::MAX, mean_output_tokens: Some(25), ..SimConfig::default() }
}

/// The shape of an engine, besides the model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) block_tokens: u32,
    pub(super) layout: KvLayout,
    pub(super) dtype: Dtype,
    pub(super) blocks: u32,
    pub(super) limits: EngineLimits,
}

pub(super) const WIDE: Shape = Shape {
    block_tokens: 4,
    layout: KvLayout::Hnd,
    dtype: Dtype::F32,
    blocks: 256,
    limits: EngineLimits {
        prefill_chunk_tokens: 512,
        max_batch_sequences: 64,
        max_waiting_sequences: 64,
        prefix_cache: true,
        mixed: false,
    },
};

impl Shape {
    pub(super) fn engine(self) -> Engine {
        self.over(Box::new(Sim::new(config(), model())))
    }

    pub(super) fn over(self, executor: Box<dyn Executor>) -> Engine {
        let ModelInfo { layers, kv_heads, head_dim, .. } = *executor.model();
        let Self { block_tokens, layout, dtype, blocks, limits } = self;
        let geometry =
            KvGeometry { layers, kv_heads, head_dim, block_tokens, layout, dtype, ..KvGeometry::PLAIN };
        let memory = Arc::new(HeapMemory::new(geometry.block_bytes() * blocks as usize));
        let arena = Arena::new(memory, geometry, blocks).unwrap();
        Engine::new(executor, Arc::new(arena), limits).unwrap()
    }
}

pub(super) fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

pub(super) fn spec(tokens: Vec<u32>, max_tokens: u32) -> SequenceSpec {
    SequenceSpec {
        tokens,
        generated: 0,
        max_tokens,
        sampling: greedy(),
        cache_salt: 0,
        logits_digest: true,
        purpose: Purpose::Generate,
    }
}

/// What a sequence has emitted.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Output {
    pub(super) tokens: Vec<u32>,
    pub(super) digests: Vec<Option<u64>>,
    pub(super) finished: Option<FinishReason>,
    pub(super) failed: Option<SequenceError>,
    /// Only while it goes on: how a prompt was cut is no part of the output.
    prefilled: u32,
}

impl Output {
    pub(super) fn apply(&mut self, event: EngineEvent) {
        assert!(self.finished.is_none() && self.failed.is_none(), "nothing follows the end: {event:?}");
        match event {
            EngineEvent::Token { token, logits_digest, .. } => {
                self.tokens.push(token);
                self.digests.push(logits_digest);
            }
            EngineEvent::Finished { reason, .. } => {
                self.finished = Some(reason);
                self.prefilled = 0;
            }
            EngineEvent::Failed { error, .. } => self.failed = Some(error),
            EngineEvent::Prefilled { upto, .. } => {
                assert!(upto > self.prefilled && self.tokens.is_empty(), "{upto} is no progress");
                self.prefilled = upto;
            }
            EngineEvent::Admitted { .. } => {}
        }
    }
}

/// Steps until nothing moves; the outputs by sequence.
pub(super) fn run(engine: &mut Engine) -> HashMap<SeqId, Output> {
    let mut outputs: HashMap<SeqId, Output> = HashMap::new();
    for event in run_events(engine) {
        outputs.entry(event.id()).or_default().apply(event);
    }
    outputs
}

/// Steps until nothing moves; all events.
pub(super) fn run_events(engine: &mut Engine) -> Vec<EngineEvent> {
    const STEPS_MAX: usize = 100_000;
    let mut events = Vec::new();
    for _ in 0..STEPS_MAX {
        let step = engine.step(Instant::now(), &mut events);
        engine.audit().unwrap();
        if step == Step::Idle {
            return events;
        }
    }
    panic!("no end after {STEPS_MAX} steps");
}

/// The undisturbed output: alone, in one piece, with room for all.
pub(super) fn solo(spec: &SequenceSpec) -> Output {
    let mut engine = WIDE.engine();
    let spec = SequenceSpec { purpose: Purpose::Generate, ..spec.clone() };
    engine.submit(SeqId(0), spec, Instant::now()).unwrap();
    run(&mut engine).remove(&SeqId(0)).unwrap()
}

pub(super) fn first_token(events: &[EngineEvent], of: SeqId) -> Option<FirstToken> {
    events.iter().find_map(|event| match event {
        EngineEvent::Token { id, token, logprob, logits_digest } if *id == of => {
            Some(FirstToken { token: *token, logprob: logprob.clone(), logits_digest: *logits_digest })
        }
        _ => None,
    })
}

pub(super) fn admitted(events: &[EngineEvent], of: SeqId) -> Option<(u32, Vec<crate::BlockId>)> {
    events.iter().find_map(|event| match event {
        EngineEvent::Admitted { id, cached_tokens, blocks, .. } if *id == of => {
            Some((*cached_tokens, blocks.clone()))
        }
        _ => None,
    })
}

/// Copies the KV of `tokens` between arenas of any geometry of one model.
pub(super) fn copy_kv(
    (from, from_blocks): (&Arena, &[crate::BlockId]),
    (to, to_blocks): (&Arena, &[crate::BlockId]),
    tokens: std::ops::Range<u32>,
) {
    let mut row = vec![0.0; from.token_numbers()];
    for layer in 0..from.geometry().layers {
        for kv in Kv::BOTH {
            for token in tokens.clone() {
                let plane = Plane { layer, kv };
                from.gather_token(plane, from_blocks, token, &mut row);
                to.scatter_token(plane, to_blocks, token, &row);
            }
        }
    }
}
