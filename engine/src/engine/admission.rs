//! From a submission to having blocks.

use std::time::Instant;

use super::sequence::{Phase, Sequence};
use super::{Engine, EngineEvent, Purpose, SeqId, SequenceSpec, SubmitError};
use crate::sampler;

impl Engine {
    /// Takes a sequence; it waits until a step has room for it, oldest first.
    ///
    /// # Errors
    /// When it can never be served, or too many wait.
    pub fn submit(&mut self, id: SeqId, spec: SequenceSpec, now: Instant) -> Result<(), SubmitError> {
        self.check(id, &spec)?;
        let sequence = Sequence::new(self.next_order, spec, now);
        self.next_order += 1;
        self.waiting.insert(sequence.order, id);
        self.sequences.insert(id, sequence);
        Ok(())
    }

    fn check(&self, id: SeqId, spec: &SequenceSpec) -> Result<(), SubmitError> {
        if self.sequences.contains_key(&id) || self.quarantine.contains_key(&id) {
            return Err(SubmitError::Duplicate(id));
        }
        if spec.generated as usize >= spec.tokens.len() {
            return Err(SubmitError::Empty("prompt"));
        }
        if spec.max_tokens == 0 && spec.purpose != Purpose::Export {
            return Err(SubmitError::Empty("max_tokens"));
        }
        let limit = self.sequence_limit_tokens();
        if spec.tokens.len() >= limit as usize {
            return Err(SubmitError::TooLong { tokens: spec.tokens.len(), limit });
        }
        let vocab = self.executor.model().vocab;
        if let Some(token) = spec.tokens.iter().copied().find(|token| *token >= vocab) {
            return Err(SubmitError::BadToken { token, vocab });
        }
        sampler::check(&spec.sampling, vocab)?;
        if !self.executor.has_logits() {
            if spec.sampling.logprobs.is_some() {
                return Err(SubmitError::NoLogits("log-probabilities"));
            }
            if spec.logits_digest {
                return Err(SubmitError::NoLogits("digest of them"));
            }
        }
        if self.waiting.len() >= self.limits.max_waiting_sequences as usize {
            return Err(SubmitError::QueueFull { waiting: self.waiting.len() as u32 });
        }
        Ok(())
    }

    /// Prompt and output of one sequence at most: what the model takes and the blocks hold. A sequence that reaches it
    /// ends with [`FinishReason::Length`](baton_config::protocol::FinishReason::Length).
    pub fn sequence_limit_tokens(&self) -> u32 {
        let held = u64::from(self.arena.blocks()) * u64::from(self.block_tokens());
        u64::from(self.executor.model().max_context).min(held) as u32
    }

    /// Gives blocks to those who wait, in order, until one finds no room.
    ///
    /// An export that its peer has room for passes those that wait for a peer themselves, and all others while nothing is
    /// computed: the peer's blocks are reserved for it, and come free only after it.
    pub(super) fn admit(&mut self, now: Instant, events: &mut Vec<EngineEvent>) {
        let mut share = None;
        let (mut after, mut only_wanted) = (0, false);
        while let Some((order, id)) = self.waiting.range(after..).next().map(|(order, id)| (*order, *id)) {
            after = order + 1;
            let block_tokens = self.block_tokens();
            let Some(sequence) = self.sequences.get(&id) else { return };
            let is_export = sequence.purpose == Purpose::Export;
            let (wanted, unwanted) = (is_export && sequence.met, is_export && !sequence.met);
            if only_wanted && !wanted || self.limits.mixed && unwanted {
                continue;
            }
            let (waits, blocks) = (self.waits_for_peer(sequence), sequence.len().div_ceil(block_tokens));
            if waits && !share.get_or_insert_with(|| Share::of(self)).has_room(blocks, is_export) {
                continue;
            }
            let Some(cached_blocks) = self.room_for(id) else {
                if self.running.is_empty() {
                    only_wanted = true;
                    continue;
                }
                return;
            };
            if let Some(share) = share.as_mut().filter(|_| waits) {
                share.held += blocks;
            }
            self.waiting.remove(&order);
            self.place(id, cached_blocks);
            let Some(sequence) = self.sequences.get_mut(&id) else { return };
            if !sequence.announced {
                sequence.announced = true;
                sequence.reported = sequence.computed;
                events.push(EngineEvent::Admitted {
                    id,
                    cached_tokens: cached_blocks * block_tokens,
                    blocks: sequence.blocks.clone(),
                    queued: now.saturating_duration_since(sequence.submitted),
                });
            }
        }
    }

    /// Whether its blocks come free only after a peer has found room: one of [`Share`].
    fn waits_for_peer(&self, sequence: &Sequence) -> bool {
        let kind = if self.limits.mixed { Purpose::Import } else { Purpose::Export };
        sequence.purpose == kind && !sequence.met
    }

    /// Whether a waiting sequence can start now: the number of its leading blocks that are cached, `None` without room.
    fn room_for(&mut self, id: SeqId) -> Option<u32> {
        let block_tokens = self.block_tokens();
        let sequence = self.sequences.get_mut(&id)?;
        let batch_full = self.running.len() >= self.limits.max_batch_sequences as usize;
        if batch_full && sequence.purpose != Purpose::Import {
            return None;
        }
        let cached = if self.limits.prefix_cache {
            // At least the last token is computed: its logits give the next one.
            let full = (sequence.len() - 1) / block_tokens;
            self.pool.cached_prefix(sequence.contents(&self.pool, block_tokens, full))
        } else {
            Default::default()
        };
        let needed = sequence.len().div_ceil(block_tokens) - cached.blocks;
        // Some blocks are left to those who run already: a newcomer must not be preempted by their very next tokens.
        const POOL_BLOCKS_PER_SPARE: u32 = 64;
        let spare = (self.running.len() as u32).min(self.arena.blocks() / POOL_BLOCKS_PER_SPARE + 1);
        (needed + spare <= self.pool.available() - cached.evictable).then_some(cached.blocks)
    }

    /// Gives a sequence its blocks, of which the first `cached_blocks` are in the prefix cache.
    fn place(&mut self, id: SeqId, cached_blocks: u32) {
        let block_tokens = self.block_tokens();
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let cached = sequence.contents(&self.pool, block_tokens, cached_blocks);
        let shared: Vec<_> = cached.iter().map_while(|content| self.pool.share(*content)).collect();
        assert_eq!(shared.len(), cached_blocks as usize, "{id}: the cached prefix was counted just now");
        sequence.blocks = shared;
        while (sequence.blocks.len() as u32) < sequence.len().div_ceil(block_tokens) {
            let reserved = self.pool.reserve(id);
            let Some(block) = reserved else { unreachable!("{id}: the room was counted just now") };
            sequence.blocks.push(block);
        }
        sequence.settled = cached_blocks;
        sequence.computed = cached_blocks * block_tokens;
        if sequence.purpose == Purpose::Import {
            // From now on the owner may write at any moment.
            for block in &sequence.blocks[cached_blocks as usize..] {
                self.pool.fill(*block, id);
            }
            sequence.phase = Phase::Importing;
        } else {
            sequence.phase = Phase::Running;
            self.running.insert(sequence.order, id);
        }
    }
}

/// The blocks of those who wait for a peer: no more than half of all.
///
/// An export keeps its blocks until its peer has room for them, and an import keeps blocks until its peer has computed it.
/// Engines full of the ones whose peers are full of the others would wait for each other for ever. So the rest of the blocks
/// is for exports that the peer has room for: they are over soon, and the imports with them. Where imports come to the
/// same engine, the share is theirs, and exports wait until the peer has room.
struct Share {
    most: u32,
    held: u32,
    /// The next of them does not fit: nor is another one to pass it.
    is_full: bool,
}

impl Share {
    fn of(engine: &Engine) -> Self {
        // Those that wait for room have no blocks. A shared one counts for each that has it: rather too many than too few.
        let waiting = engine.sequences.values().filter(|sequence| engine.waits_for_peer(sequence));
        let held = waiting.map(|sequence| sequence.blocks.len() as u32).sum();
        Self { most: engine.arena.blocks() / 2, held, is_full: false }
    }

    /// An import that is the only one may have more than half. Such an export comes when its peer has room.
    fn has_room(&mut self, blocks: u32, is_export: bool) -> bool {
        let alone = self.held == 0 && !is_export;
        self.is_full |= self.held + blocks > self.most && !alone;
        !self.is_full
    }
}
