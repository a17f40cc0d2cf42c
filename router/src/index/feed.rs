//! What one life of a worker says about its cache: numbered events, checked and taken into the index.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use baton_config::Epoch;
use baton_config::protocol::{KvEvent, KvEventBatch};

use super::{Holder, Namespace, PrefixIndex, Tier};

/// Nobody yet.
const NOBODY: u32 = u32::MAX;

/// What became of a batch of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It is in the index.
    Applied,
    /// Events before it are missing: ask again from [`Feed::since`], which brings them or a snapshot.
    Gap,
    /// It is of another life of the worker: what was known is forgotten, and the next thing to take is a snapshot or the
    /// first event.
    OtherLife,
}

/// The present holder of a worker, for those who look it up.
#[derive(Debug, Clone)]
pub struct HolderCell(Arc<AtomicU32>);

impl Default for HolderCell {
    fn default() -> Self {
        Self(Arc::new(AtomicU32::new(NOBODY)))
    }
}

impl HolderCell {
    /// The holder to look for, if there is one.
    pub fn get(&self) -> Option<Holder> {
        Holder::of(self.0.load(Ordering::Relaxed))
    }

    /// Puts a new holder in place of the one before, which is left.
    pub(crate) fn begin(&self, index: &PrefixIndex) -> Option<Holder> {
        let holder = index.join();
        if let Some(before) = self.swap(holder) {
            index.leave(before);
        }
        holder
    }

    /// Puts another holder in place and returns the one before.
    pub(super) fn swap(&self, holder: Option<Holder>) -> Option<Holder> {
        Holder::of(self.0.swap(holder.map_or(NOBODY, |holder| u32::from(holder.0)), Ordering::Relaxed))
    }
}

/// The mirror of one life of a worker. Dropping it forgets what it knew.
#[derive(Debug)]
pub struct Feed {
    index: Arc<PrefixIndex>,
    epoch: Epoch,
    cell: HolderCell,
    /// Number of the last event taken.
    last: u64,
}

impl Feed {
    /// A mirror of the life `epoch`, which knows nothing yet; `cell` always names its present holder.
    pub fn new(index: Arc<PrefixIndex>, epoch: Epoch, cell: HolderCell) -> Self {
        let feed = Self { index, epoch, cell, last: 0 };
        feed.start_over();
        feed
    }

    /// The life it is of.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The event after which to go on.
    pub fn since(&self) -> u64 {
        self.last
    }

    /// Takes in a batch.
    pub fn take(&mut self, batch: &KvEventBatch) -> Taken {
        if batch.epoch != self.epoch {
            self.last = 0;
            self.start_over();
            return Taken::OtherLife;
        }
        let follows = batch.seq.checked_sub(batch.events.len() as u64) == Some(self.last);
        if batch.snapshot {
            self.start_over();
        } else if !follows {
            return Taken::Gap;
        }
        let namespace = Namespace { scheme: batch.scheme, block_tokens: batch.block_tokens };
        let tier = Tier::from(batch.tier);
        for event in &batch.events {
            match event {
                KvEvent::Stored { blocks, .. } => self.with_holder(|index, holder| {
                    index.store(namespace, holder, tier, blocks);
                }),
                KvEvent::Removed { blocks } => self.with_holder(|index, holder| {
                    index.remove(namespace, holder, tier, blocks);
                }),
                KvEvent::Cleared => self.start_over(),
            }
        }
        self.last = batch.seq;
        Taken::Applied
    }

    fn with_holder(&self, act: impl FnOnce(&PrefixIndex, Holder)) {
        if let Some(holder) = self.cell.get() {
            act(&self.index, holder);
        }
    }

    /// Everything known is void.
    fn start_over(&self) {
        self.cell.begin(&self.index);
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if let Some(holder) = self.cell.swap(None) {
            self.index.leave(holder);
        }
    }
}
