//! Plans of the pairs seen lately.

use std::sync::{Mutex, PoisonError};

use baton_config::KvGeometry;

use super::{PlanError, RelayoutPlan};

/// Plans kept: more kinds of peers than a fleet has pools.
const PLANS_MAX: usize = 16;

/// Plans into one kind of block, by the kind they come from; the one used longest ago makes room.
#[derive(Debug)]
pub struct PlanCache {
    dest: KvGeometry,
    /// Blocks of the destination arena; 0 where destination blocks are one run each.
    arena_blocks: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Used last comes last.
    plans: Vec<RelayoutPlan>,
    counts: PlanCacheCounts,
}

/// What a [`PlanCache`] was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlanCacheCounts {
    /// Plans that were there.
    pub hits: u64,
    /// Plans that were made, and pairs that were refused.
    pub misses: u64,
}

impl PlanCache {
    /// Plans into blocks of `dest`, each one run of memory.
    pub fn packed(dest: KvGeometry) -> Self {
        Self { dest, arena_blocks: 0, state: Mutex::default() }
    }

    /// Plans into an arena of `blocks` blocks of `dest`.
    pub fn of_arena(dest: KvGeometry, blocks: u32) -> Self {
        Self { arena_blocks: blocks, ..Self::packed(dest) }
    }

    /// The plan for blocks of `source`.
    ///
    /// # Errors
    /// [`PlanError`] when the two cannot be reconciled; refusals are not kept.
    pub fn plan(&self, source: KvGeometry) -> Result<RelayoutPlan, PlanError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = state.plans.iter().rposition(|plan| *plan.source() == source) {
            state.counts.hits += 1;
            state.plans[at..].rotate_left(1);
            return Ok(state.plans[state.plans.len() - 1]);
        }
        state.counts.misses += 1;
        let plan = RelayoutPlan::new(source, self.dest)?;
        let plan = if self.arena_blocks == 0 { plan } else { plan.into_arena(self.arena_blocks) };
        if state.plans.len() == PLANS_MAX {
            state.plans.remove(0);
        }
        state.plans.push(plan);
        Ok(plan)
    }

    /// What it was asked until now.
    pub fn counts(&self) -> PlanCacheCounts {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).counts
    }
}
