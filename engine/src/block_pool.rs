//! Who owns which KV block: states, prefix cache, eviction.
//!
//! ```text
//!            reserve           fill            complete          publish
//!   free ------------> reserved ----> filling ----------> valid ----------> shared --+ share: one reference more
//!    ^  ^                 |              |                  |                 |  ^---+ release: one less
//!    |  +-- release ------+--------------+------------------+                 |
//!    |                    |              |                  |                 | evicted, oldest first, once unreferenced
//!    |                    +--------------+-- quarantine ----+                 | (or withdrawn)
//!    +-- fence --- quarantined <---------+                                    |
//!    +------------------------------------------------------------------------+
//! ```
//!
//! Every block is in one state. `reserved`, `filling`, `valid` and `quarantined` blocks have one owner; `shared` blocks
//! have any number of references, and are evicted only with none. A shared block is never filled again.
//! Each operation takes constant time; [`BlockPool::audit`], [`BlockPool::clear`] and [`BlockPool::snapshot`] walk all.
//! An operation on a block in the wrong state, or by another than its owner, is a bug of the caller and panics.

mod audit;
mod content;
mod events;
mod lru;

use std::collections::HashMap;

use baton_config::prefix::BlockHash;
use baton_config::protocol::{BlockCounts, KvEvent};

pub(crate) use self::audit::Hold;
pub use self::audit::PoolAuditError;
pub use self::content::{Content, Sealer};
use self::events::EventLog;
use self::lru::Lru;
use crate::arena::BlockId;
use crate::engine::SeqId;

/// The stages of a block with one owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Reserved,
    Filling,
    Valid,
    Quarantined,
}

/// Where a cached block stands in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Link {
    parent: BlockHash,
    hash: BlockHash,
    seal: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Owned {
        owner: SeqId,
        stage: Stage,
    },
    /// `link` is gone once the block was withdrawn from the cache while referenced.
    Shared {
        link: Option<Link>,
        references: u32,
    },
}

/// How much of a chain of contents is cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CachedPrefix {
    /// Leading blocks that are cached.
    pub blocks: u32,
    /// How many of them nobody references now: sharing them takes that many from [`BlockPool::available`].
    pub evictable: u32,
}

/// The blocks of one arena.
#[derive(Debug)]
pub struct BlockPool {
    states: Vec<State>,
    free: Vec<BlockId>,
    index: HashMap<BlockHash, BlockId>,
    /// Shared blocks without references, the longest unused first.
    evictable: Lru,
    counts: BlockCounts,
    log: EventLog,
    sealer: Sealer,
}

impl BlockPool {
    /// `blocks` free blocks.
    pub fn new(blocks: u32) -> Self {
        Self {
            states: vec![State::Free; blocks as usize],
            free: (0..blocks).rev().map(BlockId).collect(),
            index: HashMap::new(),
            evictable: Lru::new(blocks),
            counts: BlockCounts { free: blocks, ..BlockCounts::default() },
            log: EventLog::default(),
            sealer: Sealer::default(),
        }
    }

    /// Blocks by state.
    pub fn counts(&self) -> BlockCounts {
        self.counts
    }

    /// Blocks that [`Self::reserve`] can give: free ones, and cached ones that nobody references.
    pub fn available(&self) -> u32 {
        self.counts.free + self.evictable.len()
    }

    /// What makes the contents that this pool knows.
    pub fn sealer(&self) -> &Sealer {
        &self.sealer
    }

    /// How much of the chain `contents` is cached.
    pub fn cached_prefix(&self, contents: &[Content]) -> CachedPrefix {
        let mut cached = CachedPrefix::default();
        for block in contents.iter().map_while(|content| self.find(*content)) {
            cached.blocks += 1;
            cached.evictable += u32::from(self.evictable.contains(block));
        }
        cached
    }

    /// The block of this very content: equal hashes alone may be of another.
    fn find(&self, content: Content) -> Option<BlockId> {
        let block = *self.index.get(&content.hash)?;
        match self.states[block.0 as usize] {
            State::Shared { link: Some(link), .. } if link.seal == content.seal => Some(block),
            _ => None,
        }
    }

    /// Takes a reference to a cached block; `None` when the content is not cached.
    pub fn share(&mut self, content: Content) -> Option<BlockId> {
        let block = self.find(content)?;
        if self.evictable.contains(block) {
            self.evictable.remove(block);
        }
        match &mut self.states[block.0 as usize] {
            State::Shared { references, .. } => *references += 1,
            other => unreachable!("{block} is in the cache and {other:?}"),
        }
        Some(block)
    }

    /// Gives a block to `owner`, evicting the longest unused cached one if none is free; `None` when there is neither.
    pub fn reserve(&mut self, owner: SeqId) -> Option<BlockId> {
        if self.free.is_empty() {
            let oldest = self.evictable.oldest()?;
            self.withdraw(oldest);
        }
        let block = self.free.pop()?;
        self.counts.free -= 1;
        self.counts.reserved += 1;
        self.states[block.0 as usize] = State::Owned { owner, stage: Stage::Reserved };
        Some(block)
    }

    /// Reserved (or filling already) to filling: somebody may write from now on.
    ///
    /// # Panics
    /// When the block is not in one of these states of this owner.
    pub fn fill(&mut self, block: BlockId, owner: SeqId) {
        self.advance(block, owner, &[Stage::Reserved, Stage::Filling], Stage::Filling);
    }

    /// Filling to valid: all its tokens are in place, nobody writes any more.
    ///
    /// # Panics
    /// When the block is not in this state of this owner.
    pub fn complete(&mut self, block: BlockId, owner: SeqId) {
        self.advance(block, owner, &[Stage::Filling], Stage::Valid);
    }

    /// Valid to shared, with one reference: that of the owner. When a block of that hash is cached already, of the same
    /// content or of another, the block stays valid and the answer is `false`.
    ///
    /// # Panics
    /// When the block is not valid and of this owner.
    pub fn publish(&mut self, block: BlockId, owner: SeqId, parent: BlockHash, content: Content) -> bool {
        let Content { hash, seal } = content;
        let state = &mut self.states[block.0 as usize];
        assert_eq!(*state, State::Owned { owner, stage: Stage::Valid }, "{block} cannot be published");
        if self.index.contains_key(&hash) {
            return false;
        }
        *state = State::Shared { link: Some(Link { parent, hash, seal }), references: 1 };
        self.index.insert(hash, block);
        self.counts.valid -= 1;
        self.counts.shared += 1;
        self.log.stored(parent, hash);
        self.bound_log();
        true
    }

    /// Gives up `owner`'s hold of a block. Release the last block of a sequence first: of equally old cached blocks
    /// the one released first is evicted first, and a prefix without its start is of no use.
    ///
    /// # Panics
    /// When `owner` has no hold of the block, or it is in quarantine.
    pub fn release(&mut self, block: BlockId, owner: SeqId) {
        match self.states[block.0 as usize] {
            State::Owned { owner: of, stage } if of == owner && stage != Stage::Quarantined => {
                *self.count(stage) -= 1;
                self.put_free(block);
            }
            State::Shared { link, references } if references > 0 => {
                self.states[block.0 as usize] = State::Shared { link, references: references - 1 };
                match (references, link) {
                    (1, Some(_)) => self.evictable.push_newest(block),
                    (1, None) => {
                        self.counts.shared -= 1;
                        self.put_free(block);
                    }
                    _ => {}
                }
            }
            other => unreachable!("{owner} cannot release {block}, which is {other:?}"),
        }
    }

    /// Gives up `owner`'s hold of a block that somebody may still be writing: it is not reused before
    /// [`Self::fence`]. Nobody writes shared blocks: one is released instead, and the answer is `false`.
    ///
    /// # Panics
    /// When `owner` has no hold of the block, or it is in quarantine.
    pub fn quarantine(&mut self, block: BlockId, owner: SeqId) -> bool {
        if let State::Shared { .. } = self.states[block.0 as usize] {
            self.release(block, owner);
            return false;
        }
        let writable = [Stage::Reserved, Stage::Filling, Stage::Valid];
        self.advance(block, owner, &writable, Stage::Quarantined);
        true
    }

    /// Quarantined to free: the writer is gone.
    ///
    /// # Panics
    /// When the block is not in quarantine for this owner.
    pub fn fence(&mut self, block: BlockId, owner: SeqId) {
        let state = self.states[block.0 as usize];
        assert_eq!(state, State::Owned { owner, stage: Stage::Quarantined }, "{block} cannot be fenced");
        self.counts.quarantined -= 1;
        self.put_free(block);
    }

    /// Drops a shared block from the cache: nobody finds it any more, those who reference it keep it. Does nothing
    /// to any other block.
    pub fn withdraw(&mut self, block: BlockId) {
        let State::Shared { link: Some(link), references } = self.states[block.0 as usize] else { return };
        self.index.remove(&link.hash);
        self.log.removed(link.hash);
        if references == 0 {
            self.evictable.remove(block);
            self.counts.shared -= 1;
            self.put_free(block);
        } else {
            self.states[block.0 as usize] = State::Shared { link: None, references };
        }
        self.bound_log();
    }

    /// Drops the whole cache.
    pub fn clear(&mut self) {
        for block in 0..self.states.len() as u32 {
            self.withdraw(BlockId(block));
        }
        self.log.cleared();
    }

    /// Changes of the cache since the last call, oldest first.
    pub fn take_events(&mut self) -> Vec<KvEvent> {
        self.log.take()
    }

    /// The whole cache as events, parents before children.
    pub fn snapshot(&self) -> Vec<KvEvent> {
        events::snapshot(self.states.iter().filter_map(|state| match state {
            State::Shared { link: Some(link), .. } => Some(*link),
            _ => None,
        }))
    }

    fn advance(&mut self, block: BlockId, owner: SeqId, from: &[Stage], to: Stage) {
        match &mut self.states[block.0 as usize] {
            State::Owned { owner: of, stage } if *of == owner && from.contains(stage) => {
                let before = std::mem::replace(stage, to);
                *self.count(before) -= 1;
                *self.count(to) += 1;
            }
            other => unreachable!("{owner} cannot bring {block} to {to:?}: it is {other:?}"),
        }
    }

    fn count(&mut self, stage: Stage) -> &mut u32 {
        match stage {
            Stage::Reserved => &mut self.counts.reserved,
            Stage::Filling => &mut self.counts.filling,
            Stage::Valid => &mut self.counts.valid,
            Stage::Quarantined => &mut self.counts.quarantined,
        }
    }

    fn put_free(&mut self, block: BlockId) {
        self.states[block.0 as usize] = State::Free;
        self.counts.free += 1;
        self.free.push(block);
    }

    /// An owner that never takes the events must not cost memory: past the bound the log becomes a snapshot.
    fn bound_log(&mut self) {
        const EVENT_LOG_BLOCKS_PER_POOL_BLOCK: usize = 4;
        const EVENT_LOG_MIN_BLOCKS: usize = 1024;
        let bound = EVENT_LOG_MIN_BLOCKS + EVENT_LOG_BLOCKS_PER_POOL_BLOCK * self.states.len();
        if self.log.blocks() > bound {
            let snapshot = self.snapshot();
            self.log.replace(snapshot);
        }
    }
}

#[cfg(test)]
mod tests;
