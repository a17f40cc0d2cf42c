//! Continuous batching: which sequence computes what in which step, and who owns which block.
//!
//! ```text
//!   submit --> waiting --admit--> running: prefill, decode --> finished, failed
//!                 ^  |               |  ^  |
//!                 |  |               |  |  +-- export, first token --> held --release--> (gone)
//!                 |  |               |  |  +-- export that fails ---> failed --release--> (gone)
//!                 |  +--> importing -|--+ start_decode, prefill_locally
//!                 +---- preempted ---+
//!                 +- resume - paused +
//! ```
//!
//! - Who waits is served in order of submission, but for what waits for a peer: see `admission`; who is preempted keeps its place in that order.
//! - A sequence has blocks for its whole prompt from its admission on, and gets one more when its output needs it. When
//!   there is none, the youngest running sequence gives its blocks back and is computed again later, with the same
//!   tokens: nothing is emitted twice, and nothing differs. Exports and imports keep theirs.
//! - A step computes one token of each decoding sequence, and chunks of prompts within a budget, oldest first.

mod admission;
mod audit;
mod ending;
mod event;
mod pause;
mod schedule;
mod sequence;
mod spec;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_config::protocol::{BlockCounts, FirstToken, KvEvent};

pub use self::audit::AuditError;
pub use self::event::{EngineEvent, SeqId, SequenceError};
use self::sequence::{BlockTokens, Phase, Sequence};
pub use self::spec::{EngineError, EngineLimits, Purpose, SequenceSpec, SubmitError, Writers};
use crate::arena::{Arena, BlockId};
use crate::block_pool::BlockPool;
use crate::executor::{Executor, Forward, ModelInfo};
use crate::sampler::Sampler;

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing: nothing can go on before the owner calls something else.
    Idle,
    /// Something; step again.
    Worked {
        /// How long the modelled hardware would have taken (zero for an executor that really computes).
        modelled: Duration,
    },
}

/// How busy an engine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineLoad {
    /// Sequences being computed or imported, or set aside until their reader has caught up.
    pub running: u32,
    /// Sequences waiting for room.
    pub waiting: u32,
    /// Exports that are done, or have failed, and wait for their release.
    pub held: u32,
    /// Prompt tokens waiting or being computed.
    pub prefill_tokens_pending: u64,
}

/// An engine: an executor, an arena, and the sequences they work on. Single owner, no thread, no clock.
pub struct Engine {
    executor: Box<dyn Executor>,
    arena: Arc<Arena>,
    limits: EngineLimits,
    pool: BlockPool,
    sequences: HashMap<SeqId, Sequence>,
    /// Those without blocks, by age.
    waiting: BTreeMap<u64, SeqId>,
    /// Those that compute, by age.
    running: BTreeMap<u64, SeqId>,
    /// Blocks of cancelled sequences that somebody may still write.
    quarantine: HashMap<SeqId, Vec<BlockId>>,
    next_order: u64,
    preemptions: u64,
    /// What happened outside a step.
    pending: Vec<EngineEvent>,
    sampler: Sampler,
    forward: Forward,
}

impl Engine {
    /// An idle engine with all blocks free.
    ///
    /// # Errors
    /// When the arena's blocks do not have the model's shape, or a limit is zero.
    pub fn new(
        executor: Box<dyn Executor>,
        arena: Arc<Arena>,
        limits: EngineLimits,
    ) -> Result<Self, EngineError> {
        let model = executor.model();
        let nonzero = [
            ("prefill_chunk_tokens", limits.prefill_chunk_tokens),
            ("max_batch_sequences", limits.max_batch_sequences),
            ("max_waiting_sequences", limits.max_waiting_sequences),
            ("number of KV blocks", arena.blocks()),
            ("vocabulary", model.vocab),
        ];
        if let Some((limit, _)) = nonzero.into_iter().find(|(_, value)| *value == 0) {
            return Err(EngineError::Zero { limit });
        }
        if !model.fits(arena.geometry()) {
            return Err(EngineError::Geometry {
                model: model.name.clone(),
                layers: model.layers,
                kv_heads: model.kv_heads,
                head_dim: model.head_dim,
                geometry: *arena.geometry(),
            });
        }
        Ok(Self {
            pool: BlockPool::new(arena.blocks()),
            executor,
            arena,
            limits,
            sequences: HashMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            quarantine: HashMap::new(),
            next_order: 0,
            preemptions: 0,
            pending: Vec::new(),
            sampler: Sampler::default(),
            forward: Forward::default(),
        })
    }

    /// The model served.
    pub fn model(&self) -> &ModelInfo {
        self.executor.model()
    }

    /// The memory the blocks lie in.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Admits what has room, computes one batch, appends what happened to `events`.
    pub fn step(&mut self, now: Instant, events: &mut Vec<EngineEvent>) -> Step {
        let before = events.len();
        events.append(&mut self.pending);
        self.admit(now, events);
        match self.compute(events) {
            Some(modelled) => Step::Worked { modelled },
            None if events.len() > before => Step::Worked { modelled: Duration::ZERO },
            None => Step::Idle,
        }
    }

    /// Export: the peer has room for the blocks, which it reserves until it has them. Ignored for anything else.
    ///
    /// Until then it gets blocks of half of them at most, and none where imports come to the same engine.
    pub fn wanted(&mut self, id: SeqId) {
        if let Some(sequence) =
            self.sequences.get_mut(&id).filter(|sequence| sequence.purpose == Purpose::Export)
        {
            sequence.met = true;
        }
    }

    /// Import: KV of the prompt's tokens `[0, upto)` is in place and verified, and nobody writes there any more.
    ///
    /// Their full blocks enter the prefix cache. Ignored unless the sequence is being imported.
    pub fn imported(&mut self, id: SeqId, upto: u32) {
        let (block_tokens, publish) = (self.block_tokens(), self.publish());
        let Some(sequence) = self.importing(id) else { return };
        sequence.met = true;
        sequence.computed = sequence.computed.max(upto.min(sequence.prompt));
        // The block of the last token stays private: if the first token is lost, that one is computed again.
        let settled = sequence.computed.min(sequence.prompt - 1) / block_tokens;
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.settle(id, &mut self.pool, publish, settled);
        }
    }

    /// Import: the whole prompt is in place and its first token known. The next step emits that token.
    ///
    /// Ignored unless the sequence is being imported. With prompt tokens missing the sequence fails, and its blocks stay
    /// in quarantine until [`Self::fence`].
    pub fn start_decode(&mut self, id: SeqId, first: FirstToken) {
        let (block_tokens, publish) = (self.block_tokens(), self.publish());
        let vocab = self.executor.model().vocab;
        let Some(sequence) = self.importing(id) else { return };
        let (imported, prompt, order) = (sequence.computed, sequence.prompt, sequence.order);
        let mut events = std::mem::take(&mut self.pending);
        if imported < prompt {
            self.fail(id, SequenceError::NotImported { imported, prompt }, &mut events);
        } else if first.token >= vocab {
            self.fail(id, SequenceError::BadFirstToken { token: first.token, vocab }, &mut events);
        } else if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.settle(id, &mut self.pool, publish, prompt / block_tokens);
            sequence.purpose = Purpose::Generate;
            sequence.phase = Phase::Running;
            self.running.insert(order, id);
            self.emit(id, first, &mut events);
        }
        self.pending = events;
    }

    /// Import given up: computes what is missing of the prompt here. The owner has ended its own writes before.
    ///
    /// Also for an import that still waits; ignored for anything else.
    pub fn prefill_locally(&mut self, id: SeqId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.purpose != Purpose::Import {
            return;
        }
        sequence.purpose = Purpose::Generate;
        if sequence.phase == Phase::Importing {
            sequence.phase = Phase::Running;
            sequence.computed = sequence.computed.min(sequence.prompt - 1);
            sequence.reported = sequence.computed;
            self.running.insert(sequence.order, id);
        }
    }

    /// Blocks by state.
    pub fn counts(&self) -> BlockCounts {
        self.pool.counts()
    }

    /// Cached blocks that nobody references: as good as free.
    pub fn evictable(&self) -> u32 {
        self.pool.available() - self.pool.counts().free
    }

    /// How busy the engine is.
    pub fn load(&self) -> EngineLoad {
        let mut load = EngineLoad::default();
        for sequence in self.sequences.values() {
            match sequence.phase {
                Phase::Waiting => load.waiting += 1,
                Phase::Importing | Phase::Running | Phase::Paused => load.running += 1,
                Phase::Held | Phase::Failed => load.held += 1,
            }
            let computes = match sequence.phase {
                Phase::Waiting => sequence.purpose != Purpose::Import,
                Phase::Running => sequence.due() > 1,
                Phase::Importing | Phase::Held | Phase::Failed | Phase::Paused => false,
            };
            if computes {
                load.prefill_tokens_pending += u64::from(sequence.due());
            }
        }
        load
    }

    /// How often a sequence was put back for want of blocks, since the start.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Changes of the prefix cache since the last call, oldest first.
    pub fn take_kv_events(&mut self) -> Vec<KvEvent> {
        self.pool.take_events()
    }

    /// The whole prefix cache as events, parents before children: what a listener that missed some needs.
    pub fn kv_snapshot(&self) -> Vec<KvEvent> {
        self.pool.snapshot()
    }

    /// Drops the prefix cache; what is referenced stays with those who reference it.
    pub fn clear_prefix_cache(&mut self) {
        self.pool.clear();
    }

    fn block_tokens(&self) -> u32 {
        self.arena.geometry().block_tokens
    }

    fn publish(&self) -> Option<BlockTokens> {
        self.limits.prefix_cache.then(|| BlockTokens(self.block_tokens()))
    }

    fn importing(&mut self, id: SeqId) -> Option<&mut Sequence> {
        self.sequences.get_mut(&id).filter(|sequence| sequence.phase == Phase::Importing)
    }
}

#[cfg(test)]
mod tests;
