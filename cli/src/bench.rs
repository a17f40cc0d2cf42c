//! `baton bench`.

mod index;
pub(crate) mod router;

use std::ffi::OsString;
use std::time::Duration;

use baton_config::Bytes;
use baton_transfer::BackendKind;
use baton_transfer::bench::{self, BenchOptions, Row, Shape};

use crate::args::{Bench, BenchArgs, BenchTransferArgs};
use crate::failure::Failure;
use crate::logging::Logging;
use crate::output;
use crate::part::runtime;
use crate::table::columns;

/// Threads of each of the two processes.
const THREADS: usize = 2;

pub(crate) fn run(args: &BenchArgs, logging: &Logging) -> Result<(), Failure> {
    match &args.what {
        Bench::Transfer(args) => transfer(args, logging),
        Bench::Router(args) => router::run(args),
        Bench::Index(args) => index::run(args),
        Bench::TransferPeer => runtime(THREADS)?
            .block_on(bench::serve_peer())
            .map_err(|error| Failure::because("the other process of the bench", &error)),
    }
}

fn transfer(args: &BenchTransferArgs, logging: &Logging) -> Result<(), Failure> {
    let report = runtime(THREADS)?
        .block_on(bench::run(options(args, logging)))
        .map_err(|error| Failure::because("nothing was measured", &error))?;
    let skipped = report.skipped.iter().map(|skipped| format!("{}: {}", skipped.backend, skipped.reason));
    if args.json {
        let lines: Result<Vec<String>, _> = report.rows.iter().map(serde_json::to_string).collect();
        let lines = lines.map_err(|error| Failure::because("the rows cannot be written as JSON", &error))?;
        skipped.for_each(|line| output::tell(&line));
        output::print(&lines.iter().map(|line| format!("{line}\n")).collect::<String>())?;
    } else {
        let skipped: String = skipped.map(|line| format!("{line}\n")).collect();
        let table = if report.rows.is_empty() { String::new() } else { describe(&report.rows) };
        output::print(&format!("{table}{skipped}"))?;
    }
    match (report.failure, report.rows.is_empty()) {
        (None, false) => Ok(()),
        (None, true) => Err(Failure::failed("nothing was measured")),
        (Some(error), _) => Err(Failure::because("not all was measured", &error)),
    }
}

fn options(args: &BenchTransferArgs, logging: &Logging) -> BenchOptions {
    let mut peer = ["bench", "transfer-peer"].map(OsString::from).to_vec();
    peer.extend(logging.flags("warn").into_iter().map(OsString::from));
    let mut options = BenchOptions::new(peer);
    options.time_per_shape = Duration::from_secs_f64(args.seconds);
    if !args.backend.is_empty() {
        options.backends.clone_from(&args.backend);
    } else if args.plugin.is_some() {
        options.backends = vec![BackendKind::Plugin];
    }
    options.plugin.clone_from(&args.plugin);
    if args.full {
        options.shapes = Shape::full();
    } else if !args.shape.is_empty() {
        options.shapes.clone_from(&args.shape);
    }
    options.ops.retain(|op| args.op.is_none_or(|only| only == *op));
    options
}

fn describe(rows: &[Row]) -> String {
    let head = [
        "BACKEND",
        "OP",
        "BLOCKS",
        "INTEGRITY",
        "P50",
        "P99",
        "BANDWIDTH",
        "CPU",
        "RAW LIMIT",
        "RAW P50",
        "RAW CPU",
        "P50 / RAW",
        "CPU / RAW",
        "LIBRARY",
        "LIBRARY P50",
        "LIBRARY CPU",
    ];
    let mut table = vec![Vec::from(head.map(str::to_owned))];
    table.extend(rows.iter().map(|row| {
        vec![
            row.backend.clone(),
            row.op.clone(),
            format!("{} x {}", row.blocks, Bytes(u64::from(row.block_bytes))),
            row.integrity.clone(),
            micros(row.p50_us),
            micros(row.p99_us),
            format!("{:.2} GB/s", row.gb_per_s),
            format!("{:.3} s/GB", row.cpu_s_per_gb),
            row.raw_probe.clone(),
            micros(row.raw_p50_us),
            format!("{:.3} s/GB", row.raw_cpu_s_per_gb),
            format!("{:.2}", row.ratio),
            format!("{:.2}", row.cpu_s_per_gb / row.raw_cpu_s_per_gb),
            row.bare_probe.clone().unwrap_or_default(),
            row.bare_p50_us.map(micros).unwrap_or_default(),
            row.bare_cpu_s_per_gb.map(|cpu| format!("{cpu:.3} s/GB")).unwrap_or_default(),
        ]
    }));
    columns(&table)
}

fn micros(time: f64) -> String {
    if time < 10.0 { format!("{time:.3} us") } else { format!("{time:.1} us") }
}
