//! `baton bench index`.

use std::time::Duration;

use baton_router::measure::{Decisions, EVENTS_PER_S, IndexFigures, IndexLoad, decisions, prefix_index};
use serde::Serialize;

use crate::args::BenchIndexArgs;
use crate::failure::Failure;
use crate::output;
use crate::table::columns;

/// Lookups of each row.
const LOOKUPS: u32 = 200_000;
/// Decisions of each thread, and their prompts.
const DECISIONS: usize = 20_000;
const PROMPT_TOKENS: u32 = 8192;

pub(crate) fn run(args: &BenchIndexArgs) -> Result<(), Failure> {
    let mut rows = Vec::new();
    for (workers, replicas) in shapes(args) {
        let memberships = args.blocks as usize;
        let row = prefix_index(IndexLoad { workers, replicas, memberships, lookups: LOOKUPS });
        if args.json {
            let line = serde_json::to_string(&row).map_err(|error| Failure::of(&error))?;
            output::print(&format!("{line}\n"))?;
        }
        rows.push(row);
    }
    let mut decided = Vec::new();
    for workers in &args.workers {
        for (threads, events) in [(1, false), (deciders(), true)] {
            let row = Decided::measure(*workers as usize, threads, events)?;
            if args.json {
                let line = serde_json::to_string(&row).map_err(|error| Failure::of(&error))?;
                output::print(&format!("{line}\n"))?;
            }
            decided.push(row);
        }
    }
    if args.json { Ok(()) } else { output::print(&(describe(&rows) + "\n" + &describe_decided(&decided))) }
}

/// Threads that decide under load: all but the one that takes in events.
fn deciders() -> usize {
    std::thread::available_parallelism().map_or(1, |all| (all.get() - 1).clamp(1, 8))
}

/// What one scheduling decision takes, by the clock: hashing the prompt, looking it up, weighing every worker.
#[derive(Debug, Serialize)]
struct Decided {
    workers: usize,
    prompt_tokens: u32,
    /// Threads that decide at the same time.
    threads: usize,
    /// Events of workers that arrive meanwhile.
    events_per_s: u32,
    decision_p50_ns: u64,
    decision_p99_ns: u64,
    decision_p999_ns: u64,
}

impl Decided {
    fn measure(workers: usize, threads: usize, events: bool) -> Result<Self, Failure> {
        let what = Decisions {
            workers,
            prompt_tokens: PROMPT_TOKENS,
            block_tokens: 16,
            rounds: DECISIONS,
            threads,
            events,
        };
        let times = decisions(what).map_err(|error| Failure::of(&error))?;
        let part = |part: f64| {
            let at = (times.len() as f64 * part) as usize;
            let time = times.get(at).copied().unwrap_or(Duration::ZERO);
            u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
        };
        Ok(Self {
            workers,
            prompt_tokens: PROMPT_TOKENS,
            threads,
            events_per_s: if events { EVENTS_PER_S } else { 0 },
            decision_p50_ns: part(0.5),
            decision_p99_ns: part(0.99),
            decision_p999_ns: part(0.999),
        })
    }
}

fn describe_decided(rows: &[Decided]) -> String {
    let head = ["WORKERS", "PROMPT", "THREADS", "EVENTS/S", "DECISION P50", "P99", "P99.9"];
    let mut table = vec![Vec::from(head.map(str::to_owned))];
    let us = |ns: u64| format!("{:.1} us", ns as f64 / 1e3);
    table.extend(rows.iter().map(|row| {
        vec![
            row.workers.to_string(),
            row.prompt_tokens.to_string(),
            row.threads.to_string(),
            row.events_per_s.to_string(),
            us(row.decision_p50_ns),
            us(row.decision_p99_ns),
            us(row.decision_p999_ns),
        ]
    }));
    columns(&table)
}

/// Workers, and how many of them hold each shared prefix: eight, and once all.
fn shapes(args: &BenchIndexArgs) -> Vec<(usize, usize)> {
    let mut shapes: Vec<(usize, usize)> = args
        .workers
        .iter()
        .map(|workers| (*workers as usize, (*workers as usize).min(args.replicas as usize)))
        .collect();
    let most = shapes.iter().map(|(workers, _)| *workers).max().unwrap_or(0);
    if most > args.replicas as usize {
        shapes.push((most, most));
    }
    shapes
}

fn describe(rows: &[IndexFigures]) -> String {
    let head = [
        "WORKERS",
        "REPLICAS",
        "MEMBERSHIPS",
        "BLOCKS",
        "BYTES",
        "STORED",
        "REMOVED",
        "LOOKUP",
        "P50",
        "P99",
        "RAW: HASHING",
    ];
    let mut table = vec![Vec::from(head.map(str::to_owned))];
    table.extend(rows.iter().map(|row| {
        vec![
            row.workers.to_string(),
            row.replicas.to_string(),
            row.memberships.to_string(),
            row.blocks.to_string(),
            format!("{:.1}", row.bytes_per_membership),
            format!("{} ns", row.stored_ns),
            format!("{} ns", row.removed_ns),
            format!("{} ns", row.find_ns),
            format!("{} ns", row.find_p50_ns),
            format!("{} ns", row.find_p99_ns),
            format!("{} ns", row.hash_ns),
        ]
    }));
    columns(&table)
}
