//! What the prefix index and a decision cost: `cargo bench -p baton-router --bench index`. `baton bench index` gives the figures of
//! the index too.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use baton_router::measure::{self, Decisions, IndexLoad};

fn run(workers: usize, replicas: usize, memberships: usize) {
    let figures = measure::prefix_index(IndexLoad { workers, replicas, memberships, lookups: 200_000 });
    println!(
        "{workers:>4} workers, {replicas:>3} replicas, {:>9} memberships ({:>7} blocks): {:>5.1} B/membership, event of \
         32 blocks {:>5} ns stored {:>5} ns removed, lookup {:>5} ns CPU, p50/p99 {}/{} ns",
        figures.memberships,
        figures.blocks,
        figures.bytes_per_membership,
        figures.stored_ns,
        figures.removed_ns,
        figures.find_ns,
        figures.find_p50_ns,
        figures.find_p99_ns,
    );
}

fn decisions(workers: usize, threads: usize, events: bool) {
    let what = Decisions { workers, prompt_tokens: 8192, block_tokens: 16, rounds: 20_000, threads, events };
    match measure::decisions(what) {
        Ok(times) => println!(
            "{workers:>4} workers, prompt of 8,192 tokens, {threads} threads{}: decision p50/p99/p99.9 {:.1}/{:.1}/{:.1} us",
            if events { ", 20,000 events/s" } else { "" },
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
        decisions(workers, 1, false);
        decisions(workers, 1, true);
    }
}
