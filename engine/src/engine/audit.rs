//! Checks that every block has one state and one owner.

use super::sequence::{Phase, Sequence};
use super::{Engine, SeqId};
use crate::arena::BlockId;
use crate::block_pool::{Hold, PoolAuditError};

/// A discrepancy between what the engine, its pool and its sequences say: a bug.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuditError {
    /// The books of the pool disagree with each other.
    #[error("the block pool is inconsistent")]
    Pool(#[from] PoolAuditError),
    /// A sequence lists a block that the pool gave to somebody else, or in another state.
    #[error("{id} lists {block} at {index}, the pool says {hold}")]
    Holder {
        /// The sequence.
        id: SeqId,
        /// Index in its table (or in its quarantine).
        index: usize,
        /// The block.
        block: BlockId,
        /// What the pool says.
        hold: String,
    },
    /// The references of a shared block are not those of the sequences that list it.
    #[error("{block} has {kept} references, {counted} sequences list it")]
    References {
        /// The block.
        block: BlockId,
        /// In the pool.
        kept: u32,
        /// Found.
        counted: u32,
    },
    /// A block has an owner that does not list it: it would never come back.
    #[error("{block} belongs to {owner}, which does not list it")]
    Lost {
        /// The block.
        block: BlockId,
        /// In the pool.
        owner: SeqId,
    },
    /// A sequence is not listed as its phase demands.
    #[error("{id} is listed in the wrong queue, or its table does not fit its tokens")]
    Phase {
        /// The sequence.
        id: SeqId,
    },
}

impl Engine {
    /// Checks that states, owners and counts agree; walks everything, so call it now and then, not per token.
    ///
    /// # Errors
    /// The first discrepancy found.
    pub fn audit(&self) -> Result<(), AuditError> {
        self.pool.audit()?;
        let mut listed = vec![0u32; self.arena.blocks() as usize];
        for (id, sequence) in &self.sequences {
            self.audit_phase(*id, sequence)?;
            for (index, block) in sequence.blocks.iter().enumerate() {
                let settled = index < sequence.settled as usize || sequence.phase == Phase::Held;
                let settled = (sequence.phase != Phase::Failed || settled).then_some(settled);
                self.audit_block(*id, index, *block, settled)?;
                listed[block.0 as usize] += 1;
            }
        }
        for (id, blocks) in &self.quarantine {
            for (index, block) in blocks.iter().enumerate() {
                match self.pool.hold(*block) {
                    Hold::Owner { owner, quarantined: true, .. } if owner == *id => {}
                    hold => return Err(holder(*id, index, *block, hold)),
                }
                listed[block.0 as usize] += 1;
            }
        }
        self.audit_owners(&listed)
    }

    fn audit_phase(&self, id: SeqId, sequence: &Sequence) -> Result<(), AuditError> {
        let waiting = self.waiting.get(&sequence.order) == Some(&id);
        let running = self.running.get(&sequence.order) == Some(&id);
        let listed =
            (waiting, running) == (sequence.phase == Phase::Waiting, sequence.phase == Phase::Running);
        let held = sequence.blocks.len() as u32 * self.block_tokens();
        let without = matches!(sequence.phase, Phase::Waiting | Phase::Paused);
        let fits = sequence.computed <= held && (!without || held == 0);
        if listed && fits { Ok(()) } else { Err(AuditError::Phase { id }) }
    }

    /// `settled` is unknown of the blocks that a failed export had not completed.
    fn audit_block(
        &self,
        id: SeqId,
        index: usize,
        block: BlockId,
        settled: Option<bool>,
    ) -> Result<(), AuditError> {
        match self.pool.hold(block) {
            Hold::Shared { .. } if settled == Some(true) => Ok(()),
            Hold::Owner { owner, quarantined: false, valid }
                if owner == id && settled.is_none_or(|settled| valid == settled) =>
            {
                Ok(())
            }
            hold => Err(holder(id, index, block, hold)),
        }
    }

    fn audit_owners(&self, listed: &[u32]) -> Result<(), AuditError> {
        for (block, counted) in (0..).map(BlockId).zip(listed.iter().copied()) {
            match self.pool.hold(block) {
                Hold::Shared { references } if references != counted => {
                    return Err(AuditError::References { block, kept: references, counted });
                }
                Hold::Owner { owner, .. } if counted != 1 => return Err(AuditError::Lost { block, owner }),
                _ => {}
            }
        }
        let lists = self.waiting.len() + self.running.len();
        let expected = self
            .sequences
            .values()
            .filter(|sequence| matches!(sequence.phase, Phase::Waiting | Phase::Running));
        match self.waiting.values().chain(self.running.values()).next() {
            Some(id) if lists != expected.count() => Err(AuditError::Phase { id: *id }),
            _ => Ok(()),
        }
    }
}

fn holder(id: SeqId, index: usize, block: BlockId, hold: Hold) -> AuditError {
    AuditError::Holder { id, index, block, hold: format!("{hold:?}") }
}
