//! `baton bench index`.

use baton_router::measure::{IndexFigures, IndexLoad, prefix_index};

use crate::args::BenchIndexArgs;
use crate::failure::Failure;
use crate::output;
use crate::table::columns;

/// Lookups of each row.
const LOOKUPS: u32 = 200_000;

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
    if args.json { Ok(()) } else { output::print(&describe(&rows)) }
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
