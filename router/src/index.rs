//! The prefix index: which workers hold the KV cache of which prefix of a prompt.
//!
//! ```text
//!  KV events of a worker --> Feed --store/remove--> Writer (one at a time) --> tables of atomic words, sets of holders
//!  own routing history --> Recent ----------------^                                  ^
//!  request --> find(chain of block hashes) ------------------------------------------' (no lock)
//! ```
//!
//! An entry is eight bytes: 41 bits of the block's hash (47 with the shard it is in), the number of an interned *set of
//! holders*, and an age. Blocks that the same workers hold share one set, so that a block costs the same whether one
//! worker has it or 512 do. Tables are between 53 and 80 % full: 10 to 15 bytes a block, whatever the number of holders;
//! a set costs about 60 bytes and four for each row of holders. Two blocks that agree in 47 bits are taken for one: among 10^6
//! blocks that happens once in 280 routers, and then costs one wrong prediction.
//!
//! Lookups use that a worker which holds block `i` of a chain holds the blocks before it: sets only shrink along a
//! prompt. Where two blocks have the same set, so has everything between, and a search that looks at eight blocks at a
//! time finds the few places where sets change without walking the prompt.
//!
//! Readers take no lock and never wait: tables and sets are reached through [`arc_swap`], an entry is one atomic word. A
//! reader may see a moved entry nowhere for an instant. The index is a hint: whoever uses an answer must be right
//! without it.
//!
//! A *holder* is one gathering of knowledge about one worker. When a worker is gone, restarts, clears its cache or sends
//! a snapshot, the old holder is left behind at once, since nobody asks for it any more, and [`PrefixIndex::maintain`]
//! sweeps its entries out later.

mod feed;
mod recent;
mod search;
mod sets;
mod table;
mod writer;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use baton_config::Bytes;
use baton_config::prefix::{BlockHash, HashScheme};

pub use feed::{Feed, HolderCell, Taken};
pub use recent::Recent;
use sets::Directory;
use table::{Key, SHARDS, Slots};
use writer::Writer;

/// Bytes a block may take in the index at most, with room for the sets: what the memory limit is divided by.
pub const BLOCK_MAX_BYTES: u64 = 20;
/// Blocks stored or removed under one hold of the writer's lock.
const HOLD_MAX_BLOCKS: usize = 512;

/// Chains of different kinds do not mix. Tenants and LoRA adapters are salts of the chain's root, and need no place here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Namespace {
    /// How blocks are hashed.
    pub scheme: HashScheme,
    /// Tokens in a block.
    pub block_tokens: u32,
}

impl Namespace {
    /// Separates the hashes of this namespace from those of others.
    fn seed(self) -> u64 {
        let number = (self.scheme as u64) << 32 | u64::from(self.block_tokens);
        number.wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }
}

/// Where a worker keeps a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// In the memory of its accelerator.
    Device = 1,
    /// In the memory of its host.
    Host = 2,
    /// In storage it shares with others.
    Remote = 4,
}

impl From<baton_config::protocol::KvTier> for Tier {
    fn from(tier: baton_config::protocol::KvTier) -> Self {
        match tier {
            baton_config::protocol::KvTier::Device => Self::Device,
            baton_config::protocol::KvTier::Host => Self::Host,
            baton_config::protocol::KvTier::Remote => Self::Remote,
        }
    }
}

/// One gathering of knowledge about one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Holder(u16);

impl Holder {
    /// A small number, unique among the holders of one time.
    pub fn number(self) -> usize {
        usize::from(self.0)
    }

    /// The holder of a number.
    pub(crate) fn of(number: u32) -> Option<Self> {
        u16::try_from(number).ok().map(Self)
    }
}

/// How much of a chain a worker holds, in blocks from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Depth {
    /// On its device.
    pub device: u32,
    /// Anywhere.
    pub any: u32,
}

impl Depth {
    /// The better of two accounts of the same worker.
    pub fn max(self, other: Self) -> Self {
        Self { device: self.device.max(other.device), any: self.any.max(other.any) }
    }
}

/// The answer to a lookup, reusable for the next.
#[derive(Debug, Clone, Default)]
pub struct Found {
    depths: Vec<Depth>,
}

impl Found {
    /// What `holder` holds.
    pub fn depth(&self, holder: Holder) -> Depth {
        self.depths.get(holder.number()).copied().unwrap_or_default()
    }
}

/// What the index holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Blocks.
    pub blocks: u64,
    /// Pairs of a block and a holder.
    pub memberships: u64,
    /// Bytes of tables and sets.
    pub bytes: u64,
    /// Blocks given up since the start because the index was full.
    pub evicted: u64,
}

/// The tables as readers see them.
#[derive(Debug)]
struct Top {
    shards: Vec<Slots>,
}

/// The index. See the module for what it costs and promises.
#[derive(Debug)]
pub struct PrefixIndex {
    top: ArcSwap<Top>,
    sets: Directory,
    writer: Mutex<Writer>,
    blocks: AtomicU64,
    memberships: AtomicU64,
    bytes: AtomicU64,
    evicted: AtomicU64,
}

impl PrefixIndex {
    /// An empty index that will not take more than about `memory`.
    pub fn new(memory: Bytes) -> Self {
        Self::with_capacity((memory.0 / BLOCK_MAX_BYTES).max(1))
    }

    /// An empty index of at most `blocks` blocks, and of 268 million.
    pub fn with_capacity(blocks: u64) -> Self {
        let writer = Writer::new(blocks.min(table::BLOCKS_MAX));
        let top = ArcSwap::from_pointee(Top { shards: writer.slots() });
        let index = Self {
            top,
            sets: Directory::default(),
            writer: Mutex::new(writer),
            blocks: AtomicU64::new(0),
            memberships: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        };
        index.publish(&index.writer());
        index
    }

    /// A holder that holds nothing yet; `None` when there are 65,535 already.
    pub fn join(&self) -> Option<Holder> {
        self.writer().join()
    }

    /// Forgets a holder. Who still asks for it gets what was known, until [`Self::maintain`] has swept it out.
    pub fn leave(&self, holder: Holder) {
        self.writer().leave(holder);
    }

    /// `holder` now has `blocks` in `tier`.
    pub fn store(&self, namespace: Namespace, holder: Holder, tier: Tier, blocks: &[BlockHash]) {
        self.change(namespace, blocks, |writer, sets, keys| writer.store(sets, holder, tier, keys));
    }

    /// `holder` no longer has `blocks` in `tier`.
    pub fn remove(&self, namespace: Namespace, holder: Holder, tier: Tier, blocks: &[BlockHash]) {
        self.change(namespace, blocks, |writer, sets, keys| writer.remove(sets, holder, tier, keys));
    }

    fn change(
        &self,
        namespace: Namespace,
        blocks: &[BlockHash],
        change: impl Fn(&mut Writer, &Directory, &[Key]),
    ) {
        let seed = namespace.seed();
        let mut keys = [Key::default(); writer::BATCH];
        for held in blocks.chunks(HOLD_MAX_BLOCKS) {
            let mut writer = self.writer();
            for batch in held.chunks(writer::BATCH) {
                for (key, block) in keys.iter_mut().zip(batch) {
                    *key = Key::new(seed, *block);
                }
                change(&mut writer, &self.sets, &keys[..batch.len()]);
            }
            self.publish(&writer);
        }
    }

    /// Sweeps out a part of what was left behind; `true` while there is more.
    pub fn maintain(&self) -> bool {
        let mut writer = self.writer();
        let more = writer.sweep(&self.sets);
        self.publish(&writer);
        more
    }

    /// Finds how much of `chain` each holder holds.
    pub fn find(&self, namespace: Namespace, chain: &[BlockHash], found: &mut Found) {
        let seed = namespace.seed();
        let top = self.top.load();
        let probe = |at: usize| {
            let key = Key::new(seed, chain[at]);
            table::find(&top.shards[key.shard()], key.hash()).map_or(sets::EMPTY, |entry| entry.set())
        };
        found.depths.fill(Depth::default());
        let mut from = 0;
        search::segments(chain.len(), &probe, &mut |to, set| {
            self.sets.with(set, |runs| extend(&mut found.depths, runs, from, to));
            from = to;
        });
    }

    /// What the index holds.
    pub fn stats(&self) -> Stats {
        let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Stats {
            blocks: get(&self.blocks),
            memberships: get(&self.memberships),
            bytes: get(&self.bytes),
            evicted: get(&self.evicted),
        }
    }

    /// Shows readers and statistics what the writer did.
    fn publish(&self, writer: &Writer) {
        if writer.has_new_slots() {
            self.top.store(Arc::new(Top { shards: writer.slots() }));
            writer.slots_published();
        }
        let stats = writer.stats();
        self.blocks.store(stats.blocks, Ordering::Relaxed);
        self.memberships.store(stats.memberships, Ordering::Relaxed);
        self.bytes.store(stats.bytes + (SHARDS * size_of::<Slots>()) as u64, Ordering::Relaxed);
        self.evicted.store(stats.evicted, Ordering::Relaxed);
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocks `from..to` are held by the holders of `runs`: counts for those that hold all before, too.
fn extend(depths: &mut Vec<Depth>, runs: &[sets::Run], from: u32, to: u32) {
    let Some(last) = runs.last() else { return };
    let numbers = last.numbers().end;
    if depths.len() < numbers {
        depths.resize(numbers, Depth::default());
    }
    for run in runs {
        let depths = &mut depths[run.numbers()];
        let on_device = run.has(Tier::Device);
        if from == 0 {
            depths.fill(Depth { device: if on_device { to } else { 0 }, any: to });
            continue;
        }
        for depth in depths {
            depth.any = if depth.any == from { to } else { depth.any };
            depth.device = if on_device && depth.device == from { to } else { depth.device };
        }
    }
}

#[cfg(test)]
mod tests;
