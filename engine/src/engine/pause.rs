//! Sequences whose reader does not keep up: they compute nothing, and hold no blocks, until it does.

use super::sequence::Phase;
use super::{Engine, Purpose, SeqId};

impl Engine {
    /// Sets a sequence aside until [`Self::resume`]: nothing of it is computed, and its blocks go back, of which the full
    /// ones stay in the prefix cache for as long as nobody needs the room.
    ///
    /// Ignored unless it generates: others know the blocks of exports and imports.
    pub fn pause(&mut self, id: SeqId) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        let generates = sequence.purpose == Purpose::Generate;
        if generates && matches!(sequence.phase, Phase::Waiting | Phase::Running) {
            self.set_back(id, Phase::Paused);
        }
    }

    /// A sequence that was set aside goes on, in its former place in the order, with the same tokens as if it never had
    /// been.
    pub fn resume(&mut self, id: SeqId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.phase == Phase::Paused {
            sequence.phase = Phase::Waiting;
            self.waiting.insert(sequence.order, id);
        }
    }

    /// Takes a sequence that can be recomputed off its queue and gives its blocks back.
    pub(super) fn set_back(&mut self, id: SeqId, phase: Phase) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.running.remove(&sequence.order);
        self.waiting.remove(&sequence.order);
        if phase == Phase::Waiting {
            self.waiting.insert(sequence.order, id);
        }
        sequence.drop_blocks(id, &mut self.pool);
        sequence.phase = phase;
    }
}
