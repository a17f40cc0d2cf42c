//! How a conductor bears a large fleet: registrations, watch fan-out, memory, look-ups, and everybody coming back.
//!
//! ```text
//! etcd --data-dir /tmp/etcd-bench &
//! cargo run --release -p baton-conductor --example fleet_scale -- --etcd http://127.0.0.1:2379
//! ```
//! Prints one table: the embedded store beside etcd, and what etcd does by itself. Without `--etcd`, the embedded store
//! alone. `--workers N` and `--watchers N` (1000 each) need `ulimit -n` of their sum and some more. The conductor is a
//! process of its own; all workers and watchers are in this one, so times include their own work.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "printing is what this program is for")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};

mod clients;
mod conductor;
mod raw;

use clients::{fan_out, look_up, register_all, rejoin, succeed};
use conductor::{Backing, Conductor};

/// Metadata of each worker.
const METADATA_BYTES: usize = 4096;

/// What is measured of each store.
#[derive(Debug, Default)]
struct Figures(BTreeMap<&'static str, String>);

/// Rows of the table and their goals.
const ROWS: [(&str, &str); 9] = [
    ("register", "< 2 s"),
    ("fan-out p50", ""),
    ("fan-out p99", "< 100 ms"),
    ("fan-out worst", ""),
    ("memory", "< 60 MB"),
    ("look-up", "< 1 us"),
    ("rejoin", "< 5 s"),
    ("another leads", "< 3 s"),
    ("raw registrations", "(limit)"),
];

#[derive(Debug)]
struct Arguments {
    workers: usize,
    watchers: usize,
    etcd: Option<String>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.peek().is_some_and(|word| word == "serve") {
        return conductor::serve_here(arguments.skip(1)).await;
    }
    let mut given = Arguments { workers: 1000, watchers: 1000, etcd: None };
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--workers" => given.workers = value.parse()?,
            "--watchers" => given.watchers = value.parse()?,
            "--etcd" => given.etcd = Some(value),
            _ => bail!("unknown argument {name}"),
        }
    }
    let embedded = measure(&given, Backing::Embedded).await?;
    let etcd = match &given.etcd {
        Some(url) => Some(measure(&given, of_etcd(url)).await?),
        None => None,
    };
    let Arguments { workers, watchers, .. } = given;
    println!("| {workers} workers of {METADATA_BYTES} B, {watchers} watchers | goal | embedded | etcd |");
    println!("|---|---|---|---|");
    for (row, goal) in ROWS {
        let cell = |figures: Option<&Figures>| {
            figures.and_then(|figures| figures.0.get(row)).map_or("-", String::as_str).to_owned()
        };
        println!("| {row} | {goal} | {} | {} |", cell(Some(&embedded)), cell(etcd.as_ref()));
    }
    Ok(())
}

/// Registrations of an earlier run, or of another step, are of no interest.
fn of_etcd(url: &str) -> Backing {
    static STEP: AtomicU64 = AtomicU64::new(0);
    let prefix = format!("/bench-{}-{}", std::process::id(), STEP.fetch_add(1, Ordering::Relaxed));
    Backing::Etcd { url: url.to_owned(), prefix }
}

async fn measure(given: &Arguments, backing: Backing) -> Result<Figures> {
    let mut figures = Figures::default();
    if let Backing::Etcd { url, .. } = &backing {
        let took = raw::registrations(url, given.workers).await?;
        let rate = given.workers as f64 / took.as_secs_f64();
        figures.0.insert("raw registrations", format!("{took:.2?} ({rate:.0}/s)"));
    }
    // Leases longer than the bench: those who register here keep nothing alive.
    let mut conductor = Conductor::start(&backing, Duration::from_secs(600), 0).await?;
    let idle = conductor.resident_mb().await?;
    let took = register_all(&conductor.url, given.workers).await?;
    figures.0.insert("register", format!("{took:.2?}"));
    let full = conductor.resident_mb().await?;
    let delays = fan_out(&conductor.url, given.workers, given.watchers).await?;
    for (name, share) in [("fan-out p50", 50), ("fan-out p99", 99), ("fan-out worst", 100)] {
        figures.0.insert(name, format!("{:.2?}", delays[(delays.len() - 1) * share / 100]));
    }
    let watched = conductor.resident_mb().await?;
    let memory = format!("{full:.0} MB (idle {idle:.0}, after {} watchers {watched:.0})", given.watchers);
    figures.0.insert("memory", memory);
    figures.0.insert("look-up", format!("{:.0?}", look_up(&conductor.url, given.workers).await?));
    conductor.stop().await?;
    let backing = match &backing {
        Backing::Embedded => Backing::Embedded,
        Backing::Etcd { url, .. } => of_etcd(url),
    };
    figures.0.insert("rejoin", rejoin(&backing, given.workers).await?);
    // Of the embedded store there is one conductor.
    if let Backing::Etcd { url, .. } = &backing {
        figures.0.insert("another leads", succeed(&of_etcd(url)).await?);
    }
    eprintln!("{backing:?}: {figures:#?}");
    Ok(figures)
}
