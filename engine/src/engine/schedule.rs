//! One step: who computes what, and what comes of it.

use std::ops::Range;
use std::time::Duration;

use baton_config::protocol::{FinishReason, FirstToken};

use super::sequence::{Digest, Phase, Sequence};
use super::{Engine, EngineEvent, Purpose, SeqId, SequenceError};
use crate::executor::{BatchItem, ExecuteError};
use crate::logits_digest::running_digest;
use crate::sampler::{Row, Sampled};

/// The share of one sequence in a step.
#[derive(Debug, Clone)]
struct Share {
    id: SeqId,
    positions: Range<u32>,
    /// Whether this reaches the last token, so that the next one can be chosen.
    last: bool,
}

impl Engine {
    /// Computes one batch; `None` when nobody can compute anything.
    pub(super) fn compute(&mut self, events: &mut Vec<EngineEvent>) -> Option<Duration> {
        loop {
            let shares = self.plan();
            if shares.is_empty() {
                return None;
            }
            match self.forward(&shares) {
                Ok(()) => {
                    self.advance(&shares, events);
                    return Some(self.forward.modelled);
                }
                // Without the one at fault the others can go on: whatever they wrote, they write again.
                Err(error) => match error.item().and_then(|item| shares.get(item)) {
                    Some(share) => self.fail(share.id, error.into(), events),
                    None => {
                        for share in &shares {
                            self.fail(share.id, error.clone().into(), events);
                        }
                    }
                },
            }
        }
    }

    /// Oldest first: one token of each sequence that decodes, and chunks of prompts up to the budget. May preempt.
    fn plan(&mut self) -> Vec<Share> {
        let mut prompt_budget = self.limits.prefill_chunk_tokens;
        let mut shares = Vec::new();
        let ids: Vec<SeqId> = self.running.values().copied().collect();
        for id in ids {
            if shares.len() >= self.limits.max_batch_sequences as usize {
                break;
            }
            let Some(sequence) = self.sequences.get(&id) else { continue };
            // Preempted by an older one within this loop.
            if sequence.phase != Phase::Running {
                continue;
            }
            let due = sequence.due();
            let count = if due == 1 { 1 } else { due.min(prompt_budget) };
            let positions = sequence.computed..sequence.computed + count;
            let last = count == due;
            if count == 0 || !self.extend_table(id, positions.end) {
                continue;
            }
            if due > 1 {
                prompt_budget -= count;
            }
            self.mark_filling(id, &positions);
            shares.push(Share { id, positions, last });
        }
        shares
    }

    /// Brings the block table of a running sequence to `upto` tokens; `false` when there is no block for it now.
    fn extend_table(&mut self, id: SeqId, upto: u32) -> bool {
        loop {
            let block_tokens = self.block_tokens();
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            if sequence.blocks.len() as u32 * block_tokens >= upto {
                return true;
            }
            let order = sequence.order;
            match self.pool.reserve(id) {
                Some(block) => sequence.blocks.push(block),
                None if self.preempt_younger(order) => {}
                None => return false,
            }
        }
    }

    /// Puts back the youngest sequence that can be recomputed and is younger than `order`; `false` if there is none.
    ///
    /// Exports and imports are spared: others know their blocks.
    fn preempt_younger(&mut self, order: u64) -> bool {
        let younger = (std::ops::Bound::Excluded(order), std::ops::Bound::Unbounded);
        let recomputable =
            |id: &SeqId| self.sequences.get(id).is_some_and(|sequence| sequence.purpose == Purpose::Generate);
        let victim = self.running.range(younger).rev().find(|(_, id)| recomputable(id));
        let Some(id) = victim.map(|(_, id)| *id) else { return false };
        self.set_back(id, Phase::Waiting);
        self.preemptions += 1;
        true
    }

    fn mark_filling(&mut self, id: SeqId, positions: &Range<u32>) {
        let block_tokens = self.block_tokens();
        let Some(sequence) = self.sequences.get(&id) else { return };
        let touched = positions.start / block_tokens..positions.end.div_ceil(block_tokens);
        assert!(touched.start >= sequence.settled, "{id} would write a block that is complete");
        for index in touched {
            self.pool.fill(sequence.blocks[index as usize], id);
        }
    }

    fn forward(&mut self, shares: &[Share]) -> Result<(), ExecuteError> {
        let item = |share: &Share| {
            let sequence = self.sequences.get(&share.id)?;
            let (context, rest) = sequence.tokens.split_at(share.positions.start as usize);
            Some(BatchItem {
                context,
                tokens: &rest[..share.positions.len()],
                start: share.positions.start,
                blocks: &sequence.blocks,
                logits: share.last,
            })
        };
        let batch: Vec<BatchItem<'_>> = shares.iter().filter_map(item).collect();
        assert_eq!(batch.len(), shares.len(), "planned sequences exist");
        self.executor.forward(&self.arena, &batch, &mut self.forward)?;
        let rows = shares.iter().filter(|share| share.last).count();
        let wanted = match self.executor.has_logits() {
            true => (rows * self.executor.model().vocab as usize, 0),
            false => (0, rows),
        };
        let numbers = (self.forward.logits.len(), self.forward.tokens.len());
        if numbers == wanted {
            return Ok(());
        }
        let (logits, tokens) = numbers;
        Err(ExecuteError::Broken { reason: format!("{logits} logits and {tokens} tokens for {rows} rows") })
    }

    /// Books what a forward pass computed, and chooses tokens.
    fn advance(&mut self, shares: &[Share], events: &mut Vec<EngineEvent>) {
        let logits = std::mem::take(&mut self.forward.logits);
        let tokens = std::mem::take(&mut self.forward.tokens);
        let mut rows = logits.chunks_exact(self.executor.model().vocab as usize);
        let mut named = tokens.iter();
        for share in shares {
            self.book(share, events);
            if !share.last {
                continue;
            }
            if let Some(token) = named.next() {
                let next = FirstToken { token: *token, logprob: None, logits_digest: None };
                self.emit(share.id, next, events);
            } else if let Some(row) = rows.next() {
                match self.choose(share.id, row) {
                    Ok(first) => self.emit(share.id, first, events),
                    Err(error) => self.fail(share.id, error, events),
                }
            }
        }
        self.forward.logits = logits;
        self.forward.tokens = tokens;
    }

    fn book(&mut self, share: &Share, events: &mut Vec<EngineEvent>) {
        let (block_tokens, publish) = (self.block_tokens(), self.publish());
        let Some(sequence) = self.sequences.get_mut(&share.id) else { return };
        sequence.computed = share.positions.end;
        sequence.settle(share.id, &mut self.pool, publish, share.positions.end / block_tokens);
        let upto = share.positions.end;
        // Recomputing after a preemption is no news.
        if sequence.emitted() == 0 && upto > sequence.reported {
            sequence.reported = upto;
            events.push(EngineEvent::Prefilled { id: share.id, upto });
        }
    }

    /// The next token of a sequence.
    fn choose(&mut self, id: SeqId, logits: &[f32]) -> Result<FirstToken, SequenceError> {
        let Some(sequence) = self.sequences.get_mut(&id) else { unreachable!("{id} was computed just now") };
        let row = Row {
            logits,
            position: sequence.len(),
            sampling: &sequence.sampling,
            history: &sequence.history,
        };
        let Sampled { token, logprob } = self.sampler.sample(row)?;
        let logits_digest = match sequence.digest {
            Digest::Off => None,
            Digest::On(before) => Some(running_digest(before, logits)),
        };
        Ok(FirstToken { token, logprob, logits_digest })
    }

    /// Appends a token to a sequence, and ends it if that was the last.
    pub(super) fn emit(&mut self, id: SeqId, next: FirstToken, events: &mut Vec<EngineEvent>) {
        let limit = self.sequence_limit_tokens();
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let FirstToken { token, logprob, logits_digest } = next;
        sequence.tokens.push(token);
        sequence.history.push(token);
        if sequence.digest != Digest::Off {
            sequence.digest = Digest::On(logits_digest);
        }
        events.push(EngineEvent::Token { id, token, logprob, logits_digest });
        if sequence.purpose == Purpose::Export {
            self.hold(id);
        } else if let Some(reason) = finish_reason(sequence, token, &self.executor.model().eos, limit) {
            self.finish(id, reason, events);
        }
    }
}

fn finish_reason(sequence: &Sequence, token: u32, eos: &[u32], limit: u32) -> Option<FinishReason> {
    let end_token = !sequence.sampling.ignore_eos && eos.contains(&token);
    if end_token || sequence.sampling.stop_tokens.contains(&token) {
        return Some(FinishReason::Stop);
    }
    let full = sequence.emitted() >= sequence.max_tokens || sequence.len() >= limit;
    full.then_some(FinishReason::Length)
}
