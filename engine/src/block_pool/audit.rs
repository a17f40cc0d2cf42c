//! Checks that the pool's books agree with each other.

use baton_config::prefix::BlockHash;
use baton_config::protocol::BlockCounts;

use super::{BlockPool, Stage, State};
use crate::arena::BlockId;
use crate::engine::SeqId;

/// A discrepancy in the books of a pool: a bug.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolAuditError {
    /// The counts kept are not the counts of the blocks (which add up to the pool by construction).
    #[error("counts say {kept:?}, the blocks {counted:?}")]
    Counts {
        /// As kept.
        kept: BlockCounts,
        /// As counted.
        counted: BlockCounts,
    },
    /// A block is on the free list and not free, or twice on it.
    #[error("{0} is on the free list but not free, or is there twice")]
    FreeList(BlockId),
    /// A block is on the eviction list and not an unreferenced cached one, or the other way round.
    #[error("{0} is evictable without being listed so, or listed so without being evictable")]
    Evictable(BlockId),
    /// The index and a block disagree.
    #[error("index and {block} disagree about {hash:?}")]
    Index {
        /// The block.
        block: BlockId,
        /// The hash.
        hash: BlockHash,
    },
}

/// Who has a hold of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    Nobody,
    Owner { owner: SeqId, quarantined: bool, valid: bool },
    Shared { references: u32 },
}

impl BlockPool {
    /// Checks states, counts, free list, eviction list and index against each other; walks all blocks.
    ///
    /// # Errors
    /// The first discrepancy found.
    pub fn audit(&self) -> Result<(), PoolAuditError> {
        let counted = self.count_states();
        if counted != self.counts {
            return Err(PoolAuditError::Counts { kept: self.counts, counted });
        }
        self.audit_free()?;
        self.audit_evictable()?;
        self.audit_index()
    }

    /// Who has a hold of a block, for the audit of the owners.
    pub(crate) fn hold(&self, block: BlockId) -> Hold {
        match self.states[block.0 as usize] {
            State::Free => Hold::Nobody,
            State::Owned { owner, stage } => {
                Hold::Owner { owner, quarantined: stage == Stage::Quarantined, valid: stage == Stage::Valid }
            }
            State::Shared { references, .. } => Hold::Shared { references },
        }
    }

    fn blocks(&self) -> impl Iterator<Item = (BlockId, &State)> {
        (0..).map(BlockId).zip(&self.states)
    }

    fn count_states(&self) -> BlockCounts {
        let mut counts = BlockCounts::default();
        for state in &self.states {
            *match state {
                State::Free => &mut counts.free,
                State::Owned { stage: Stage::Reserved, .. } => &mut counts.reserved,
                State::Owned { stage: Stage::Filling, .. } => &mut counts.filling,
                State::Owned { stage: Stage::Valid, .. } => &mut counts.valid,
                State::Owned { stage: Stage::Quarantined, .. } => &mut counts.quarantined,
                State::Shared { .. } => &mut counts.shared,
            } += 1;
        }
        counts
    }

    fn audit_free(&self) -> Result<(), PoolAuditError> {
        let mut listed = vec![false; self.states.len()];
        for block in &self.free {
            let twice = std::mem::replace(&mut listed[block.0 as usize], true);
            if twice || self.states[block.0 as usize] != State::Free {
                return Err(PoolAuditError::FreeList(*block));
            }
        }
        match self.blocks().find(|(block, state)| **state == State::Free && !listed[block.0 as usize]) {
            Some((block, _)) => Err(PoolAuditError::FreeList(block)),
            None => Ok(()),
        }
    }

    fn audit_evictable(&self) -> Result<(), PoolAuditError> {
        let mut listed = vec![false; self.states.len()];
        let mut len = 0;
        // A damaged list may be a ring: never walk further than there are blocks.
        for block in self.evictable.iter().take(self.states.len() + 1) {
            if std::mem::replace(&mut listed[block.0 as usize], true) {
                return Err(PoolAuditError::Evictable(block));
            }
            len += 1;
        }
        for (block, state) in self.blocks() {
            let evictable = matches!(state, State::Shared { references: 0, .. });
            let in_list = listed[block.0 as usize];
            if evictable != in_list || in_list != self.evictable.contains(block) {
                return Err(PoolAuditError::Evictable(block));
            }
        }
        match self.evictable.oldest() {
            Some(block) if len != self.evictable.len() => Err(PoolAuditError::Evictable(block)),
            _ => Ok(()),
        }
    }

    fn audit_index(&self) -> Result<(), PoolAuditError> {
        for (block, state) in self.blocks() {
            if let State::Shared { link: Some(link), .. } = state
                && self.index.get(&link.hash) != Some(&block)
            {
                return Err(PoolAuditError::Index { block, hash: link.hash });
            }
        }
        for (hash, block) in &self.index {
            match self.states[block.0 as usize] {
                State::Shared { link: Some(link), .. } if link.hash == *hash => {}
                _ => return Err(PoolAuditError::Index { block: *block, hash: *hash }),
            }
        }
        Ok(())
    }
}
