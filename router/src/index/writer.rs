//! The one that changes the index.

use std::cell::Cell;
use std::collections::HashMap;

use super::sets::{Directory, EMPTY, Sets};
use super::table::{AGES, Entry, Key, SHARDS, Shard, Slots};
use super::{Holder, Stats, Tier};

/// Blocks whose places are fetched together.
pub(super) const BATCH: usize = 32;
/// Ages that pass while as many blocks are stored as the index holds.
const AGES_PER_FILL: u64 = AGES as u64 - 2;
/// Holders there can be at once.
const HOLDERS_MAX: u16 = u16::MAX;

/// Shards, sets and what is to be swept out.
#[derive(Debug)]
pub(super) struct Writer {
    shards: Vec<Shard>,
    sets: Sets,
    capacity: u64,
    blocks: u64,
    memberships: u64,
    evicted: u64,
    bytes: u64,
    clock: Clock,
    holders: Holders,
    new_slots: Cell<bool>,
}

/// The age of what is stored now, and the hand that follows to make room for the next one.
#[derive(Debug, Default)]
struct Clock {
    age: u8,
    /// Blocks stored at this age.
    stored: u64,
    /// Shards in which no entry has the oldest age any more.
    hand: usize,
    /// Whether they were given up, the index being full, or count with the next oldest.
    evicts: bool,
}

impl Clock {
    fn next(&self) -> u8 {
        (self.age + 1) % AGES
    }
}

#[derive(Debug, Default)]
struct Holders {
    next: u16,
    free: Vec<Holder>,
    /// Left and not swept out.
    left: Vec<Holder>,
    sweep: Option<Sweep>,
}

#[derive(Debug)]
struct Sweep {
    /// By number.
    gone: Vec<bool>,
    all: Vec<Holder>,
    shard: usize,
}

impl Writer {
    pub(super) fn new(capacity: u64) -> Self {
        let shards: Vec<Shard> = (0..SHARDS).map(|_| Shard::new()).collect();
        let bytes = shards.iter().map(bytes).sum();
        Self {
            shards,
            sets: Sets::new(),
            capacity: capacity.max(1),
            blocks: 0,
            memberships: 0,
            evicted: 0,
            bytes,
            clock: Clock::default(),
            holders: Holders::default(),
            new_slots: Cell::new(false),
        }
    }

    pub(super) fn slots(&self) -> Vec<Slots> {
        self.shards.iter().map(|shard| shard.slots().clone()).collect()
    }

    /// Whether [`Self::slots`] differ from what was published.
    pub(super) fn has_new_slots(&self) -> bool {
        self.new_slots.get()
    }

    pub(super) fn slots_published(&self) {
        self.new_slots.set(false);
    }

    pub(super) fn stats(&self) -> Stats {
        Stats {
            blocks: self.blocks,
            memberships: self.memberships,
            bytes: self.bytes + self.sets.bytes(),
            evicted: self.evicted,
        }
    }

    pub(super) fn join(&mut self) -> Option<Holder> {
        if let Some(holder) = self.holders.free.pop() {
            return Some(holder);
        }
        let number = self.holders.next;
        self.holders.next = number.checked_add(1).filter(|next| *next < HOLDERS_MAX)?;
        Some(Holder(number))
    }

    pub(super) fn leave(&mut self, holder: Holder) {
        self.holders.left.push(holder);
    }

    pub(super) fn store(&mut self, sets: &Directory, holder: Holder, tier: Tier, keys: &[Key]) {
        self.touch(keys);
        for key in keys {
            self.store_one(sets, (holder, tier), *key);
        }
        self.follow();
    }

    fn store_one(&mut self, sets: &Directory, change: (Holder, Tier), key: Key) {
        let located = self.shards[key.shard()].locate(key.hash());
        let from = located.map_or(EMPTY, |(_, entry)| entry.set());
        let Some(step) = self.sets.step(sets, from, change, true) else {
            // Too many different sets: whatever is oldest has to go.
            self.evict_oldest();
            return;
        };
        let entry = Entry::new(key.hash(), self.clock.age, step.to);
        self.memberships = self.memberships.wrapping_add_signed(step.gained);
        match located {
            Ok((at, before)) => {
                if before != entry {
                    self.clock.stored += u64::from(before.age() != entry.age());
                    self.shards[key.shard()].put(at, entry);
                }
                if step.to != from {
                    self.sets.moved(from, step.to);
                }
            }
            Err(at) => {
                self.sets.moved(EMPTY, step.to);
                self.blocks += 1;
                self.clock.stored += 1;
                self.resize(key.shard(), |shard| shard.insert(at, entry));
            }
        }
    }

    pub(super) fn remove(&mut self, sets: &Directory, holder: Holder, tier: Tier, keys: &[Key]) {
        self.touch(keys);
        for key in keys {
            let Ok((at, entry)) = self.shards[key.shard()].locate(key.hash()) else { continue };
            let Some(step) = self.sets.step(sets, entry.set(), (holder, tier), false) else { continue };
            self.memberships = self.memberships.wrapping_add_signed(step.gained);
            self.rename(key.shard(), at, entry, step.to);
        }
    }

    /// Starts all cache misses of a batch at once.
    fn touch(&self, keys: &[Key]) {
        let all = keys.iter().fold(0, |all, key| all ^ self.shards[key.shard()].touch(key.hash()));
        std::hint::black_box(all);
    }

    /// Gives the entry at a place another set, or takes it out where that is empty; `true` when it was.
    fn rename(&mut self, shard: usize, at: usize, entry: Entry, to: u32) -> bool {
        if to != entry.set() {
            self.sets.moved(entry.set(), to);
        }
        if to == EMPTY {
            self.shards[shard].remove(at);
            self.blocks -= 1;
            return true;
        }
        self.shards[shard].put(at, Entry::new(entry.hash(), entry.age(), to));
        false
    }

    fn resize(&mut self, shard: usize, change: impl FnOnce(&mut Shard) -> bool) {
        let shard = &mut self.shards[shard];
        let before = bytes(shard);
        if change(shard) {
            self.bytes = self.bytes + bytes(shard) - before;
            self.new_slots.set(true);
        }
    }

    /// Moves the hand so that it is through all shards when as much was stored as one age takes, and faster while the
    /// index is too full.
    fn follow(&mut self) {
        let period = (self.capacity / AGES_PER_FILL).max(1);
        let due = |stored: u64| stored.saturating_mul(SHARDS as u64) / period;
        while (self.clock.hand as u64) < due(self.clock.stored) || self.blocks > self.capacity {
            self.turn();
        }
    }

    /// Makes room when there are too many sets.
    fn evict_oldest(&mut self) {
        let wanted = self.blocks - self.blocks / 64;
        let capacity = std::mem::replace(&mut self.capacity, wanted);
        while self.blocks > self.capacity {
            self.turn();
        }
        self.capacity = capacity;
    }

    /// One shard: its oldest entries go while the index is full, else they count with the next oldest. After the last
    /// shard the oldest age is free and becomes the present one.
    fn turn(&mut self) {
        let shard = self.clock.hand;
        let oldest = self.clock.next();
        let younger = (oldest + 1) % AGES;
        // Decided for all shards alike and a bit below the limit, or else what is oldest would stay in some shards.
        if shard == 0 {
            self.clock.evicts = self.blocks > self.capacity - self.capacity / 8;
        }
        self.clock.evicts |= self.blocks > self.capacity;
        let mut at = 0;
        while at < self.shards[shard].slots().len() {
            match self.shards[shard].at(at) {
                Some(entry) if entry.age() == oldest && self.clock.evicts => {
                    self.memberships -= u64::from(self.sets.members(entry.set()));
                    self.evicted += 1;
                    self.rename(shard, at, entry, EMPTY);
                }
                Some(entry) => {
                    if entry.age() == oldest {
                        self.shards[shard].put(at, Entry::new(entry.hash(), younger, entry.set()));
                    }
                    at += 1;
                }
                None => at += 1,
            }
        }
        self.clock.hand += 1;
        if self.clock.hand == SHARDS {
            self.clock = Clock { age: oldest, ..Clock::default() };
        }
    }

    /// One shard: entries of holders that left are given up. `true` while there is more to do.
    pub(super) fn sweep(&mut self, sets: &Directory) -> bool {
        let Some(mut sweep) = self.holders.sweep.take().or_else(|| self.holders.begin()) else {
            return false;
        };
        // What a set becomes, for the sets of this shard.
        let mut becomes: HashMap<u32, u32> = HashMap::new();
        let mut at = 0;
        while at < self.shards[sweep.shard].slots().len() {
            let Some(entry) = self.shards[sweep.shard].at(at) else {
                at += 1;
                continue;
            };
            let from = entry.set();
            let to = match becomes.get(&from) {
                Some(to) => *to,
                None => {
                    let gone = |holder: Holder| sweep.gone.get(holder.number()).is_some_and(|gone| *gone);
                    let to = self.sets.without(sets, from, gone).unwrap_or(EMPTY);
                    // The number may have meant something else before.
                    becomes.insert(to, to);
                    becomes.insert(from, to);
                    to
                }
            };
            if to == from {
                at += 1;
                continue;
            }
            self.memberships -= u64::from(self.sets.members(from) - self.sets.members(to));
            if !self.rename(sweep.shard, at, entry, to) {
                at += 1;
            }
        }
        self.resize(sweep.shard, Shard::shrink);
        sweep.shard += 1;
        if sweep.shard < SHARDS {
            self.holders.sweep = Some(sweep);
            return true;
        }
        self.holders.free.extend(sweep.all);
        !self.holders.left.is_empty()
    }
}

impl Holders {
    fn begin(&mut self) -> Option<Sweep> {
        if self.left.is_empty() {
            return None;
        }
        let all = std::mem::take(&mut self.left);
        let mut gone = vec![false; usize::from(self.next)];
        for holder in &all {
            gone[holder.number()] = true;
        }
        Some(Sweep { gone, all, shard: 0 })
    }
}

fn bytes(shard: &Shard) -> u64 {
    (shard.slots().len() * size_of::<u64>()) as u64
}
