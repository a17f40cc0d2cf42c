//! `baton bench`.

use std::ffi::OsString;
use std::time::Duration;

use baton_transfer::bench::{self, BenchOptions, Row};

use crate::args::{Bench, BenchArgs, BenchTransferArgs};
use crate::failure::Failure;
use crate::output;
use crate::part::runtime;
use crate::table::columns;

/// Threads of each of the two processes.
const THREADS: usize = 2;

pub(crate) fn run(args: &BenchArgs) -> Result<(), Failure> {
    match &args.what {
        Bench::Transfer(args) => transfer(args),
        Bench::TransferPeer => runtime(THREADS)?
            .block_on(bench::serve_peer())
            .map_err(|error| Failure::because("the other process of the bench", &error)),
    }
}

fn transfer(args: &BenchTransferArgs) -> Result<(), Failure> {
    let mut options = BenchOptions::new(["bench", "transfer-peer"].map(OsString::from).into());
    options.time_per_shape = Duration::from_secs(u64::from(args.seconds));
    let rows = runtime(THREADS)?
        .block_on(bench::run(options))
        .map_err(|error| Failure::because("nothing was measured", &error))?;
    if args.json {
        let lines: Result<Vec<String>, _> = rows.iter().map(serde_json::to_string).collect();
        let lines = lines.map_err(|error| Failure::because("the rows cannot be written as JSON", &error))?;
        return output::print(&format!("{}\n", lines.join("\n")));
    }
    output::print(&describe(&rows))
}

fn describe(rows: &[Row]) -> String {
    let head = [
        "BACKEND",
        "BLOCKS",
        "INTEGRITY",
        "P50",
        "P99",
        "BANDWIDTH",
        "CPU",
        "RAW LIMIT",
        "RAW P50",
        "P50 / RAW",
    ];
    let mut table = vec![Vec::from(head.map(str::to_owned))];
    table.extend(rows.iter().map(|row| {
        vec![
            row.backend.clone(),
            format!("{} x {} KiB", row.blocks, row.block_bytes >> 10),
            row.integrity.clone(),
            micros(row.p50_us),
            micros(row.p99_us),
            format!("{:.2} GB/s", row.gb_per_s),
            format!("{:.2} s", row.cpu_s),
            row.raw_probe.clone(),
            micros(row.raw_p50_us),
            format!("{:.2}", row.ratio),
        ]
    }));
    columns(&table)
}

fn micros(time: f64) -> String {
    if time < 10.0 { format!("{time:.3} us") } else { format!("{time:.1} us") }
}
