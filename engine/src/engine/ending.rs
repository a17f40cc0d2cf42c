//! How sequences end, and what becomes of their blocks.

use baton_config::protocol::FinishReason;

use super::sequence::{Phase, Sequence};
use super::{Engine, EngineEvent, Purpose, SeqId, SequenceError, Writers};

impl Engine {
    /// Ends a sequence in any phase: no further event of it follows. An unknown id is ignored: the sequence may just have
    /// ended by itself. [`Writers::Gone`] also ends a quarantine.
    pub fn cancel(&mut self, id: SeqId, writers: Writers) {
        self.pending.retain(|event| event.id() != id);
        match self.remove(id) {
            Some(sequence) => self.give_back(id, sequence, writers),
            None if writers == Writers::Gone => self.fence(id),
            None => {}
        }
    }

    /// The writers of a sequence cancelled with [`Writers::MayWrite`] are gone: its blocks are free, and so is its id.
    pub fn fence(&mut self, id: SeqId) {
        for block in self.quarantine.remove(&id).unwrap_or_default() {
            self.pool.fence(block, id);
        }
    }

    /// Export: the peer is done with the blocks, or no longer wants them, or the export has failed and nobody looks at them
    /// any more.
    pub fn release(&mut self, id: SeqId) {
        if self.sequences.get(&id).is_some_and(|sequence| sequence.purpose == Purpose::Export) {
            self.cancel(id, Writers::Gone);
        }
    }

    pub(super) fn finish(&mut self, id: SeqId, reason: FinishReason, events: &mut Vec<EngineEvent>) {
        let Some(sequence) = self.remove(id) else { return };
        self.give_back(id, sequence, Writers::Gone);
        events.push(EngineEvent::Finished { id, reason });
    }

    pub(super) fn fail(&mut self, id: SeqId, error: SequenceError, events: &mut Vec<EngineEvent>) {
        let Some(mut sequence) = self.remove(id) else { return };
        if matches!(error, SequenceError::Execute(_) | SequenceError::Sample(_)) {
            // Its KV is suspect: nobody else shall start from it.
            sequence.blocks.iter().for_each(|block| self.pool.withdraw(*block));
        }
        if sequence.purpose == Purpose::Export {
            // Digests of its blocks may be in the making: they must not be of what somebody else writes there.
            sequence.phase = Phase::Failed;
            self.sequences.insert(id, sequence);
            events.push(EngineEvent::Failed { id, error });
            return;
        }
        let writers = match error {
            SequenceError::NotImported { .. } => Writers::MayWrite,
            _ => Writers::Gone,
        };
        self.give_back(id, sequence, writers);
        events.push(EngineEvent::Failed { id, error });
    }

    /// An export has its first token: its blocks stay as they are.
    pub(super) fn hold(&mut self, id: SeqId) {
        let block_tokens = self.block_tokens();
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.running.remove(&sequence.order);
        sequence.phase = Phase::Held;
        let partial = !sequence.computed.is_multiple_of(block_tokens);
        if let (true, Some(block)) = (partial, sequence.blocks.last()) {
            self.pool.complete(*block, id);
        }
    }

    fn remove(&mut self, id: SeqId) -> Option<Sequence> {
        let sequence = self.sequences.remove(&id)?;
        self.waiting.remove(&sequence.order);
        self.running.remove(&sequence.order);
        Some(sequence)
    }

    fn give_back(&mut self, id: SeqId, mut sequence: Sequence, writers: Writers) {
        match writers {
            Writers::Gone => sequence.drop_blocks(id, &mut self.pool),
            Writers::MayWrite => {
                let kept = sequence.blocks.drain(..).rev().filter(|block| self.pool.quarantine(*block, id));
                let kept: Vec<_> = kept.collect();
                if !kept.is_empty() {
                    self.quarantine.insert(id, kept);
                }
            }
        }
    }
}
