//! A shard: a table of atomic words that one writer changes while readers look.
//!
//! Open addressing, linear probing, kept sorted: a run of neighbours is in the order of their hashes, none lies before
//! its own place. A search for what is not there ends at the first larger hash. The place of a hash is its share of the
//! table (no power of two needed, and growing keeps the order); the last places overflow into a tail, so nothing wraps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use baton_config::prefix::BlockHash;

/// Shards of the index.
pub(super) const SHARDS: usize = 64;
const SHARD_BITS: u32 = 6;
const HASH_BITS: u32 = 41;
/// Bits of an entry that name its set of holders.
pub(super) const SET_BITS: u32 = 20;
const AGE_BITS: u32 = 3;
/// Ages an entry can have.
pub(super) const AGES: u8 = 1 << AGE_BITS;

/// Blocks for which a place can be computed in 64 bits, in the emptiest tables.
pub(super) const BLOCKS_MAX: u64 = 1 << 28;

/// Places of the smallest table.
const CAPACITY_MIN: usize = 64;
/// Places behind the last one that is anybody's own.
const TAIL: usize = 64;

/// The words of a shard; 0 is a free place.
pub(super) type Slots = Arc<[AtomicU64]>;

/// Where a block is to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Key {
    shard: u32,
    hash: u64,
}

impl Key {
    /// The key of a block in the namespace of `seed`. Hashes of other schemes may not be spread well: all are mixed.
    pub(super) fn new(seed: u64, block: BlockHash) -> Self {
        let product = u128::from(block.0 ^ seed) * 0xA076_1D64_78BD_642F;
        let mixed = (product >> 64) as u64 ^ product as u64;
        Self {
            shard: (mixed >> (64 - SHARD_BITS)) as u32,
            hash: mixed >> (64 - SHARD_BITS - HASH_BITS) & ((1 << HASH_BITS) - 1),
        }
    }

    pub(super) fn shard(self) -> usize {
        self.shard as usize
    }

    pub(super) fn hash(self) -> u64 {
        self.hash
    }
}

/// One block: its hash, its age, the set of its holders (never the empty one).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    pub(super) fn new(hash: u64, age: u8, set: u32) -> Self {
        Self(hash << (SET_BITS + AGE_BITS) | u64::from(age) << SET_BITS | u64::from(set))
    }

    pub(super) fn hash(self) -> u64 {
        self.0 >> (SET_BITS + AGE_BITS)
    }

    pub(super) fn age(self) -> u8 {
        (self.0 >> SET_BITS) as u8 & (AGES - 1)
    }

    pub(super) fn set(self) -> u32 {
        self.0 as u32 & ((1 << SET_BITS) - 1)
    }
}

fn home(hash: u64, capacity: usize) -> usize {
    ((hash * capacity as u64) >> HASH_BITS) as usize
}

fn load(slots: &[AtomicU64], at: usize) -> Option<Entry> {
    match slots.get(at)?.load(Ordering::Relaxed) {
        0 => None,
        word => Some(Entry(word)),
    }
}

/// Looks for a hash; while the writer is at work, what it moves may not be found.
#[inline]
pub(super) fn find(slots: &[AtomicU64], hash: u64) -> Option<Entry> {
    let mut at = home(hash, slots.len() - TAIL);
    loop {
        let entry = load(slots, at)?;
        if entry.hash() >= hash {
            return (entry.hash() == hash).then_some(entry);
        }
        at += 1;
    }
}

/// A shard as its writer has it.
#[derive(Debug)]
pub(super) struct Shard {
    slots: Slots,
    used: usize,
}

impl Shard {
    pub(super) fn new() -> Self {
        Self { slots: free(CAPACITY_MIN), used: 0 }
    }

    pub(super) fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Brings the place of a hash nearer; the answer only keeps the load from being dropped.
    #[inline]
    pub(super) fn touch(&self, hash: u64) -> u64 {
        self.slots[home(hash, self.capacity())].load(Ordering::Relaxed)
    }

    /// Where the hash is, or else where it would be put.
    #[inline]
    pub(super) fn locate(&self, hash: u64) -> Result<(usize, Entry), usize> {
        let mut at = home(hash, self.capacity());
        while let Some(entry) = load(&self.slots, at) {
            if entry.hash() >= hash {
                return if entry.hash() == hash { Ok((at, entry)) } else { Err(at) };
            }
            at += 1;
        }
        Err(at)
    }

    /// Puts a hash that is not there at the place [`Self::locate`] told; `true` when the slots are new ones.
    pub(super) fn insert(&mut self, at: usize, entry: Entry) -> bool {
        // At most 80 % full: a search for what is not there takes three looks on average.
        let full = (self.used + 1) * 5 > self.capacity() * 4;
        let end = (at..self.slots.len()).find(|end| load(&self.slots, *end).is_none());
        let Some(end) = end.filter(|_| !full) else {
            self.rebuild(self.capacity() * 3 / 2, Some(entry));
            return true;
        };
        for to in (at + 1..=end).rev() {
            let moved = self.slots[to - 1].load(Ordering::Relaxed);
            self.slots[to].store(moved, Ordering::Release);
        }
        self.put(at, entry);
        self.used += 1;
        false
    }

    /// Changes the entry at a place; its hash stays.
    #[inline]
    pub(super) fn put(&self, at: usize, entry: Entry) {
        // Whoever finds the entry finds the set it names.
        self.slots[at].store(entry.0, Ordering::Release);
    }

    /// The entry at a place.
    pub(super) fn at(&self, at: usize) -> Option<Entry> {
        load(&self.slots, at)
    }

    /// Takes the entry at a place out and moves its followers up.
    pub(super) fn remove(&mut self, mut at: usize) {
        let capacity = self.capacity();
        while let Some(next) = load(&self.slots, at + 1).filter(|next| home(next.hash(), capacity) <= at) {
            self.put(at, next);
            at += 1;
        }
        self.slots[at].store(0, Ordering::Release);
        self.used -= 1;
    }

    /// Gives room back that is no longer used; `true` when the slots are new ones.
    pub(super) fn shrink(&mut self) -> bool {
        let wanted = (self.used * 3 / 2).max(CAPACITY_MIN);
        let worth_it = self.used * 4 < self.capacity() && wanted < self.capacity();
        if worth_it {
            self.rebuild(wanted, None);
        }
        worth_it
    }

    fn capacity(&self) -> usize {
        self.slots.len() - TAIL
    }

    /// Moves everything, and a new entry, into a table of at least `capacity` places.
    fn rebuild(&mut self, mut capacity: usize, new: Option<Entry>) {
        let mut entries: Vec<Entry> = (0..self.slots.len()).filter_map(|at| load(&self.slots, at)).collect();
        if let Some(new) = new {
            let at = entries.partition_point(|entry| entry.hash() < new.hash());
            entries.insert(at, new);
        }
        self.used = entries.len();
        loop {
            self.slots = free(capacity);
            if self.lay_out(&entries) {
                return;
            }
            capacity = capacity * 5 / 4;
        }
    }

    /// Writes sorted entries to their places; `false` when the tail is too short for the last ones.
    fn lay_out(&self, entries: &[Entry]) -> bool {
        let mut next = 0;
        for entry in entries {
            next = next.max(home(entry.hash(), self.capacity()));
            let Some(slot) = self.slots.get(next) else { return false };
            slot.store(entry.0, Ordering::Relaxed);
            next += 1;
        }
        true
    }
}

fn free(capacity: usize) -> Slots {
    (0..capacity + TAIL).map(|_| AtomicU64::new(0)).collect()
}
