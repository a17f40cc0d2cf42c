//! What this router sent where: the index of workers that report no events, and of prompts still on their way.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::prefix::BlockHash;
use tokio::time::Instant;

use super::feed::HolderCell;
use super::{Depth, Found, Namespace, PrefixIndex, Tier};

/// The prompts lately sent to one worker. Knowledge comes in two generations, the younger for what was sent in the last
/// half of its life: each block is believed for between half of `believed` and all of it after it was last sent.
#[derive(Debug)]
pub struct Recent {
    believed: Duration,
    /// Blocks of a generation: what the worker can hold, so that more would be wrong.
    blocks_max: u64,
    young: HolderCell,
    old: HolderCell,
    /// Blocks that the worker should hold, of both generations.
    held: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// When the young generation began.
    since: Option<Instant>,
    noted: u64,
    /// Blocks that were sent in each generation and that the worker was not known to hold before.
    new: u64,
    new_before: u64,
}

impl Recent {
    /// Nothing was sent yet.
    pub fn new(believed: Duration, blocks_max: u64) -> Self {
        Self {
            believed,
            blocks_max,
            young: HolderCell::default(),
            old: HolderCell::default(),
            held: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    /// A prompt was sent: the worker will hold its blocks, of which so many are `new` to it.
    ///
    /// The chain may hold fewer hashes than these, always the same ones of a prompt.
    pub fn note(
        &self,
        index: &PrefixIndex,
        now: Instant,
        namespace: Namespace,
        (chain, blocks, new): (&[BlockHash], u64, u64),
    ) {
        if chain.is_empty() {
            return;
        }
        let mut state = self.state();
        self.turn(&mut state, index, now);
        if state.noted >= self.blocks_max {
            self.next_generation(&mut state, index);
        }
        if self.young.get().is_none() {
            self.young.swap(index.join());
            state.since.get_or_insert(now);
        }
        state.noted += blocks;
        state.new += new;
        self.held.store(state.new + state.new_before, Ordering::Relaxed);
        if let Some(young) = self.young.get() {
            index.store(namespace, young, Tier::Device, chain);
        }
    }

    /// Lets old knowledge go when it is time.
    pub fn fade(&self, index: &PrefixIndex, now: Instant) {
        self.turn(&mut self.state(), index, now);
    }

    /// Forgets everything.
    pub fn forget(&self, index: &PrefixIndex) {
        let mut state = self.state();
        for _ in 0..2 {
            self.next_generation(&mut state, index);
        }
    }

    /// Blocks that the worker should hold, as far as they are believed.
    pub fn held_blocks(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// What the worker should hold of the chain that was looked up.
    pub fn depth(&self, found: &Found) -> Depth {
        let depth = |cell: &HolderCell| cell.get().map_or(Depth::default(), |holder| found.depth(holder));
        depth(&self.young).max(depth(&self.old))
    }

    fn turn(&self, state: &mut State, index: &PrefixIndex, now: Instant) {
        let Some(since) = state.since else { return };
        let half = self.believed / 2;
        let age = now.saturating_duration_since(since);
        if age < half {
            return;
        }
        self.next_generation(state, index);
        if age >= self.believed {
            self.next_generation(state, index);
        }
        if self.old.get().is_some() {
            state.since = Some(now);
        }
    }

    fn next_generation(&self, state: &mut State, index: &PrefixIndex) {
        let young = self.young.swap(None);
        if let Some(old) = self.old.swap(young) {
            index.leave(old);
        }
        *state = State { since: None, noted: 0, new: 0, new_before: state.new };
        self.held.store(state.new_before, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
