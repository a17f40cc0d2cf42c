//! `baton status`: what a fleet does, and first of all what is wrong with it.
//!
//! The conductor tells who is there, each worker how it is. What is wrong is concluded here, from both.

mod fetch;
mod problems;
mod text;
pub(crate) mod top;

use std::io::IsTerminal;
use std::time::Duration;

use baton_conductor::api::{ConductorStatus as OneConductor, PoolStatus, StoreStatus};
use baton_config::environment::Environment;
use baton_config::protocol::{BlockCounts, DrainStatus, PathStatus};
use baton_config::{Epoch, PoolName, Role, WorkerId};
use serde::Serialize;

use crate::args::StatusArgs;
use crate::failure::Failure;
use crate::output;
use crate::remote::{Conductors, block_on};
use problems::{Problem, problems};

pub(crate) use fetch::ask_worker;
pub(crate) use text::drain_line;

/// What `--json` prints.
#[derive(Debug, Clone, Serialize)]
struct FleetStatus {
    conductor: ConductorRow,
    /// What is wrong, the worst first.
    problems: Vec<Problem>,
    pools: Vec<PoolRow>,
    workers: Vec<WorkerRow>,
    paths: Vec<PathStatus>,
}

/// The conductor that answered, and what it knows of the others.
#[derive(Debug, Clone, Serialize)]
struct ConductorRow {
    url: String,
    store: String,
    /// Whether it leads the reconcilers.
    leader: bool,
    /// How long it has not been sure of its store; 0 while it follows.
    view_age_ms: u64,
    /// Whether it has not been there for a lease's time, so that workers may not have found back yet.
    warming: bool,
    /// The lease's time of workers.
    ttl_ms: u64,
    store_health: StoreStatus,
    conductors: Vec<OtherConductor>,
}

/// One of all conductors on the store.
#[derive(Debug, Clone, Serialize)]
struct OtherConductor {
    #[serde(flatten)]
    known: OneConductor,
    /// Whether it answered this command.
    answers: bool,
}

/// A pool, and why it has the size it has.
#[derive(Debug, Clone, Serialize)]
struct PoolRow {
    #[serde(flatten)]
    status: PoolStatus,
    /// Who set the wanted size: `document`, `operator` or `autoscaler`.
    set_by: &'static str,
}

#[derive(Debug, Clone, Serialize)]
struct WorkerRow {
    name: WorkerId,
    pool: PoolName,
    role: Role,
    epoch: Epoch,
    state: String,
    address: String,
    pid: u32,
    requests_running: u32,
    requests_waiting: u32,
    kv_blocks: BlockCounts,
    last_error: Option<String>,
    /// How long ago that was.
    last_error_ago_ms: Option<u64>,
    /// Since its registration.
    age_ms: Option<u64>,
    /// Since its last keepalive at the conductor asked.
    seen_ms: Option<u64>,
    /// Since it is in the state that the conductor knows.
    state_ms: Option<u64>,
    /// Whether the conductor was told, by it or by an operator, that it drains.
    draining: bool,
    /// Percent of its KV blocks that requests hold.
    kv_percent: u32,
    /// What it waits for while it drains.
    drain: Option<DrainStatus>,
    /// Why it did not answer this command, if it did not.
    unreachable: Option<String>,
    /// The life it says that it is in.
    own_epoch: Option<Epoch>,
}

pub(crate) fn run(args: &StatusArgs, environment: &Environment) -> Result<(), Failure> {
    let conductors = Conductors::named(&args.conductor, environment)?;
    match args.watch {
        None => output::print(&block_on(look(&conductors, args.json, false))?),
        Some(seconds) => block_on(watch(&conductors, Duration::from_secs(seconds.into()), args.json)),
    }
}

/// Looks again and again, until nobody reads what it prints.
async fn watch(conductors: &Conductors, every: Duration, json: bool) -> Result<(), Failure> {
    loop {
        match look(conductors, json, true).await {
            Ok(text) if !output::print_on(&text)? => return Ok(()),
            Ok(_) => {}
            Err(failure) => output::report(&failure.to_string()),
        }
        tokio::time::sleep(every).await;
    }
}

/// How the fleet is, as the first conductor that answers sees it.
async fn ask(conductors: &Conductors) -> Result<FleetStatus, Failure> {
    let mut status = fetch::fetch(&conductors.first().await).await?;
    status.problems = problems(&status);
    Ok(status)
}

/// What there is to show, also `again` where it was shown before.
async fn look(conductors: &Conductors, json: bool, again: bool) -> Result<String, Failure> {
    let status = ask(conductors).await?;
    if json {
        let json = serde_json::to_string(&status)
            .map_err(|error| Failure::because("the status cannot be written as JSON", &error))?;
        return Ok(format!("{json}\n"));
    }
    let terminal = std::io::stdout().is_terminal();
    let text = text::describe(&status, terminal);
    Ok(match (again, terminal) {
        // Clears what the look before left.
        (true, true) => format!("\x1b[H\x1b[2J{text}"),
        (true, false) => format!("{text}\n"),
        (false, _) => text,
    })
}

#[cfg(test)]
mod tests;
