//! Continuous batching: which sequence computes what in which step, and who owns which block.

mod audit;
mod event;
mod spec;

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_config::protocol::{BlockCounts, FirstToken, KvEvent};

pub use self::audit::AuditError;
pub use self::event::{EngineEvent, SeqId, SequenceError};
pub use self::spec::{EngineError, EngineLimits, Purpose, SequenceSpec, SubmitError, Writers};
use crate::arena::Arena;
use crate::executor::{Executor, Forward, ModelInfo};

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
    /// Sequences being computed or imported.
    pub running: u32,
    /// Sequences waiting for room.
    pub waiting: u32,
    /// Exports that are done and wait for their release.
    pub held: u32,
    /// Prompt tokens waiting or being computed.
    pub prefill_tokens_pending: u64,
}

/// An engine: an executor, an arena, and the sequences they work on. Single owner, no thread, no clock.
pub struct Engine {
    executor: Box<dyn Executor>,
    arena: Arc<Arena>,
    limits: EngineLimits,
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
        Ok(Self { executor, arena, limits, forward: Forward::default() })
    }

    /// The model served.
    pub fn model(&self) -> &ModelInfo {
        self.executor.model()
    }

    /// The memory the blocks lie in.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Takes a sequence; it waits until a step has room for it.
    ///
    /// # Errors
    /// When it can never be served, or too many wait.
    pub fn submit(&mut self, id: SeqId, spec: SequenceSpec, now: Instant) -> Result<(), SubmitError> {
        let _ = (id, spec, now, &self.limits, &self.forward);
        Err(SubmitError::QueueFull { waiting: 0 })
    }

    /// Admits what has room, computes one batch, appends what happened to `events`.
    pub fn step(&mut self, now: Instant, events: &mut Vec<EngineEvent>) -> Step {
        let _ = (now, events);
        Step::Idle
    }

    /// Import: KV of the prompt's tokens `[0, upto)` is in place and verified, and nobody writes there any more.
    pub fn imported(&mut self, id: SeqId, upto: u32) {
        let _ = (id, upto);
    }

    /// Import: the whole prompt is in place and its first token known. The token is emitted by the next step.
    pub fn start_decode(&mut self, id: SeqId, first: FirstToken) {
        let _ = (id, first);
    }

    /// Import given up: computes what is missing of the prompt here. The owner has ended its own writes before.
    pub fn prefill_locally(&mut self, id: SeqId) {
        let _ = id;
    }

    /// Ends a sequence in any phase, without an event. Unknown ids are ignored: it may just have ended by itself.
    pub fn cancel(&mut self, id: SeqId, writers: Writers) {
        let _ = (id, writers);
    }

    /// The writers of a sequence cancelled with [`Writers::MayWrite`] are gone: its blocks are free.
    pub fn fence(&mut self, id: SeqId) {
        let _ = id;
    }

    /// Export: the peer is done with the blocks.
    pub fn release(&mut self, id: SeqId) {
        let _ = id;
    }

    /// Blocks by state.
    pub fn counts(&self) -> BlockCounts {
        BlockCounts { free: self.arena.blocks(), ..BlockCounts::default() }
    }

    /// Checks that states, owners and counts agree; walks everything, so call it now and then, not per token.
    ///
    /// # Errors
    /// The first discrepancy found.
    pub fn audit(&self) -> Result<(), AuditError> {
        Ok(())
    }

    /// How busy the engine is.
    pub fn load(&self) -> EngineLoad {
        EngineLoad::default()
    }

    /// Changes of the prefix cache since the last call, oldest first.
    pub fn take_kv_events(&mut self) -> Vec<KvEvent> {
        Vec::new()
    }

    /// The whole prefix cache as events, parents before children: what a listener that missed some needs.
    pub fn kv_snapshot(&self) -> Vec<KvEvent> {
        Vec::new()
    }
}
