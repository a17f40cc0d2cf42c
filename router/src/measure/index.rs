//! What the prefix index costs: time on a processor of this thread, bytes, and the time of a lookup.
//!
//! Sequences of 64 blocks, of which 32 are shared by 16 sequences and held by some workers; the rest by one. Half of the
//! lookups know a whole sequence, half only its prefix.

mod workload;

use std::time::Instant;

use baton_config::prefix::{BlockHash, HashScheme};
use serde::Serialize;

use self::workload::{Dice, Event, HALF, workload};
use super::cpu_ns;
use crate::index::{Found, Holder, Namespace, PrefixIndex, Tier};

const NAMESPACE: Namespace = Namespace { scheme: HashScheme::Baton, block_tokens: 16 };
/// More than any load here has.
const CAPACITY_BLOCKS: u64 = 64 << 20;

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct IndexLoad {
    /// Workers.
    pub workers: usize,
    /// How many of them hold a shared prefix.
    pub replicas: usize,
    /// Blocks held, counted once for each worker that holds them.
    pub memberships: usize,
    /// Lookups.
    pub lookups: u32,
}

/// What it costs. Times of events and `find_ns` are on the processor, `find_p50_ns` and `find_p99_ns` by the clock.
#[derive(Debug, Clone, Serialize)]
pub struct IndexFigures {
    /// As asked.
    pub workers: usize,
    /// As asked.
    pub replicas: usize,
    /// As they came to be.
    pub memberships: u64,
    /// Distinct blocks.
    pub blocks: u64,
    /// Bytes of the index by membership.
    pub bytes_per_membership: f64,
    /// An event that 32 blocks are stored.
    pub stored_ns: u64,
    /// An event that they are removed.
    pub removed_ns: u64,
    /// A lookup of 64 blocks.
    pub find_ns: u64,
    /// Median lookup, with two readings of the clock.
    pub find_p50_ns: u64,
    /// One of a hundred takes longer.
    pub find_p99_ns: u64,
    /// The raw limit: hashing the tokens of one such prompt, which every lookup needs before it.
    pub hash_ns: u64,
    /// Sum of all depths found: the same for every index that answers right.
    pub depths: u64,
}

/// CPU nanoseconds that each of `count` parts of some work takes.
fn each_ns(count: usize, work: impl FnOnce()) -> u64 {
    let begun = cpu_ns();
    work();
    cpu_ns().saturating_sub(begun) / count.max(1) as u64
}

/// Fills an index, looks up, and empties it again.
pub fn prefix_index(load: IndexLoad) -> IndexFigures {
    let mut dice = Dice(7);
    let IndexLoad { workers, replicas, memberships, .. } = load;
    let (events, prompts) = workload(workers, replicas, memberships, &mut dice);
    let hashes = |chain: Vec<u64>| chain.into_iter().map(BlockHash).collect::<Vec<_>>();
    let stored = |event: Event| (event.worker, hashes(event.blocks));
    let events: Vec<(usize, Vec<BlockHash>)> = events.into_iter().map(stored).collect();
    let prompts: Vec<Vec<BlockHash>> = prompts.into_iter().map(hashes).collect();
    let index = PrefixIndex::with_capacity(CAPACITY_BLOCKS);
    let holders: Vec<Holder> = (0..load.workers).filter_map(|_| index.join()).collect();
    let stored_ns = each_ns(events.len(), || {
        for (worker, blocks) in &events {
            index.store(NAMESPACE, holders[*worker], Tier::Device, blocks);
        }
    });
    let stats = index.stats();

    let mut found = Found::default();
    let mut times = Vec::with_capacity(load.lookups as usize);
    let mut depths = 0;
    let find_ns = each_ns(load.lookups as usize, || {
        for _ in 0..load.lookups {
            let prompt = &prompts[dice.below(prompts.len())];
            let from = Instant::now();
            index.find(NAMESPACE, prompt, &mut found);
            times.push(u64::try_from(from.elapsed().as_nanos()).unwrap_or(u64::MAX));
            depths += holders.first().map_or(0, |holder| u64::from(found.depth(*holder).device));
        }
    });
    times.sort_unstable();
    let part = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or(0);

    let removed_ns = each_ns(events.len(), || {
        for (worker, blocks) in &events {
            index.remove(NAMESPACE, holders[*worker], Tier::Device, blocks);
        }
    });
    let tokens: Vec<u32> = (0..2 * HALF as u32 * NAMESPACE.block_tokens).collect();
    const HASHED: usize = 50_000;
    let hash_ns = each_ns(HASHED, || {
        for salt in 0..HASHED as u64 {
            // Looked at, so that the work is done.
            std::hint::black_box(NAMESPACE.scheme.chain(salt, NAMESPACE.block_tokens, &tokens).last());
        }
    });
    IndexFigures {
        workers: load.workers,
        replicas: load.replicas,
        memberships: stats.memberships,
        blocks: stats.blocks,
        bytes_per_membership: stats.bytes as f64 / stats.memberships.max(1) as f64,
        stored_ns,
        removed_ns,
        find_ns,
        find_p50_ns: part(50),
        find_p99_ns: part(99),
        hash_ns,
        depths,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_that_is_measured_holds_what_was_stored() {
        let load = IndexLoad { workers: 16, replicas: 8, memberships: 20_000, lookups: 500 };
        let figures = prefix_index(load);
        assert!(figures.memberships >= 20_000 && figures.blocks < figures.memberships, "{figures:?}");
        assert!(figures.depths > 0 && figures.bytes_per_membership > 0.0, "{figures:?}");
        assert_eq!(prefix_index(load).depths, figures.depths, "the same every time");
    }
}
