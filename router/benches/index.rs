//! What the prefix index costs: `cargo bench -p baton-router --bench index`.
//!
//! Sequences of 64 blocks, of which 32 are shared by 16 sequences and held by eight workers; the rest by one. CPU time.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::time::Instant;

use baton_config::prefix::{BlockHash, HashScheme};
use baton_router::index::{Found, Holder, Namespace, PrefixIndex, Tier};
use baton_router::measure::{self, Decisions};

const NAMESPACE: Namespace = Namespace { scheme: HashScheme::Baton, block_tokens: 16 };
const HALF: usize = 32;
const SEQUENCES: usize = 16;

struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }
}

fn chain(parent: u64, blocks: usize) -> Vec<BlockHash> {
    let mut hash = BlockHash(parent);
    (0..blocks)
        .map(|at| {
            hash = hash.child(&[u32::try_from(at).unwrap_or(0)]);
            hash
        })
        .collect()
}

struct Event {
    worker: usize,
    blocks: Vec<BlockHash>,
}

/// Events that come to about `memberships`, in a random order that keeps chains in order, and prompts to look up.
fn workload(
    workers: usize,
    replicas: usize,
    memberships: usize,
    dice: &mut Dice,
) -> (Vec<Event>, Vec<Vec<BlockHash>>) {
    let (mut shared, mut own, mut prompts) = (Vec::new(), Vec::new(), Vec::new());
    let mut count = 0;
    while count < memberships {
        let prefix = chain(dice.next(), HALF);
        let first = dice.below(workers);
        for replica in 0..replicas {
            shared.push(Event { worker: (first + replica) % workers, blocks: prefix.clone() });
        }
        count += replicas * HALF;
        for _ in 0..SEQUENCES {
            let tail = chain(dice.next(), HALF);
            let whole: Vec<BlockHash> = prefix.iter().chain(&tail).copied().collect();
            if replicas < workers || workers <= 8 {
                let worker = (first + dice.below(replicas)) % workers;
                own.push(Event { worker, blocks: tail });
                count += HALF;
            }
            prompts.push(whole);
            // Half of the lookups know the prefix only.
            prompts.push(prefix.iter().copied().chain(chain(dice.next(), HALF)).collect());
        }
    }
    for i in (1..shared.len()).rev() {
        shared.swap(i, dice.below(i + 1));
    }
    for i in (1..own.len()).rev() {
        own.swap(i, dice.below(i + 1));
    }
    shared.append(&mut own);
    (shared, prompts)
}

/// CPU time of this thread in nanoseconds, from the scheduler's account.
fn cpu_ns() -> u64 {
    std::fs::read_to_string("/proc/thread-self/schedstat")
        .ok()
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .unwrap_or_default()
}

fn run(workers: usize, replicas: usize, memberships: usize) {
    let mut dice = Dice(7);
    let (events, prompts) = workload(workers, replicas, memberships, &mut dice);
    let index = PrefixIndex::with_capacity(64 << 20);
    let holders: Vec<Holder> = (0..workers).filter_map(|_| index.join()).collect();
    let begun = cpu_ns();
    for event in &events {
        index.store(NAMESPACE, holders[event.worker], Tier::Device, &event.blocks);
    }
    let apply = (cpu_ns() - begun) / events.len() as u64;
    let stats = index.stats();

    let mut found = Found::default();
    let mut times = Vec::with_capacity(200_000);
    let begun = cpu_ns();
    let lookups = 200_000;
    let mut sum = 0u64;
    for _ in 0..lookups {
        let prompt = &prompts[dice.below(prompts.len())];
        let from = Instant::now();
        index.find(NAMESPACE, prompt, &mut found);
        times.push(u64::try_from(from.elapsed().as_nanos()).unwrap_or(u64::MAX));
        sum += u64::from(found.depth(holders[0]).device);
    }
    let find = (cpu_ns() - begun) / lookups;
    times.sort_unstable();

    let begun = cpu_ns();
    for event in &events {
        index.remove(NAMESPACE, holders[event.worker], Tier::Device, &event.blocks);
    }
    let remove = (cpu_ns() - begun) / events.len() as u64;
    println!(
        "{workers:>4} workers, {replicas:>3} replicas, {:>9} memberships ({:>7} blocks): {:>5.1} B/membership, event of \
         {HALF} blocks {apply:>5} ns stored {remove:>5} ns removed, lookup {find:>5} ns CPU, p50/p99 {}/{} ns ({})",
        stats.memberships,
        stats.blocks,
        stats.bytes as f64 / stats.memberships as f64,
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        sum % 10,
    );
}

fn decisions(workers: usize) {
    let what = Decisions { workers, prompt_tokens: 8192, block_tokens: 16, rounds: 20_000 };
    match measure::decisions(what) {
        Ok(times) => println!(
            "{workers:>4} workers, prompt of 8,192 tokens: decision p50/p99/p99.9 {:.1}/{:.1}/{:.1} us",
            times[times.len() / 2].as_secs_f64() * 1e6,
            times[times.len() * 99 / 100].as_secs_f64() * 1e6,
            times[times.len() * 999 / 1000].as_secs_f64() * 1e6,
        ),
        Err(error) => println!("decisions: {error}"),
    }
}

fn main() {
    for workers in [8, 64, 512] {
        run(workers, 8, 1_000_000);
    }
    run(512, 512, 1_000_000);
    run(64, 8, 100_000);
    for workers in [8, 64, 512] {
        decisions(workers);
    }
}
