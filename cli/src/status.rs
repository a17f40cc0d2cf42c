//! `baton status`.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_conductor::api::{Listing, PoolList};
use baton_conductor::record::WorkerRecord;
use baton_config::environment::Environment;
use baton_config::protocol::{BlockCounts, PathStatus, WorkerStatus};
use baton_config::{Epoch, PoolName, Role, WorkerId};
use futures_util::future::join_all;
use reqwest::{Client, Method};
use serde::Serialize;

use crate::args::StatusArgs;
use crate::failure::Failure;
use crate::output;
use crate::remote::{Conductor, block_on, last_cause};
use crate::table::columns;

/// A worker that does not answer in this time is shown as the conductor knows it.
const WORKER_TIMEOUT: Duration = Duration::from_secs(1);

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct FleetStatus {
    conductor: ConductorStatus,
    pools: Vec<PoolRow>,
    workers: Vec<WorkerRow>,
    paths: Vec<PathStatus>,
}

#[derive(Debug, Serialize)]
struct ConductorStatus {
    url: String,
    store: String,
    /// Whether the conductor asked runs the reconcilers; the only one of an embedded store always does.
    leader: bool,
    /// Age of what is shown: nothing is cached between the conductor and this process.
    view_age_ms: u64,
}

#[derive(Debug, Serialize)]
struct PoolRow {
    name: PoolName,
    role: Role,
    desired: u32,
    ready: u32,
    draining: u32,
}

#[derive(Debug, Serialize)]
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
}

pub(crate) fn run(args: &StatusArgs, environment: &Environment) -> Result<(), Failure> {
    let conductor = Conductor::find(&args.conductor, environment)?;
    let status = block_on(fetch(&conductor))?;
    if args.json {
        let json = serde_json::to_string(&status)
            .map_err(|error| Failure::because("the status cannot be written as JSON", &error))?;
        return output::print(&format!("{json}\n"));
    }
    output::print(&describe(&status))
}

async fn fetch(conductor: &Conductor) -> Result<FleetStatus, Failure> {
    let listing: Listing = conductor.ask(conductor.request(Method::GET, "/v1/workers?metadata=no")).await?;
    let pools: PoolList = conductor.ask(conductor.request(Method::GET, "/v1/pools")).await?;
    let answers = join_all(listing.workers.iter().map(|w| fetch_worker(conductor.http(), &w.record))).await;
    let mut paths = BTreeMap::new();
    let mut workers = Vec::with_capacity(answers.len());
    for (listed, answer) in listing.workers.iter().zip(answers) {
        let known = listed.load.clone().unwrap_or_default();
        let record = &listed.record;
        let row = |state, running, waiting, kv_blocks, last_error| WorkerRow {
            name: record.worker.clone(),
            pool: record.pool.clone(),
            role: record.role,
            epoch: record.epoch,
            state,
            address: record.address.clone(),
            pid: record.pid,
            requests_running: running,
            requests_waiting: waiting,
            kv_blocks,
            last_error,
        };
        workers.push(match answer {
            Ok(told) => {
                let WorkerStatus { state, requests_running, requests_waiting, kv_blocks, last_error, .. } =
                    told;
                for path in told.paths {
                    merge(&mut paths, path);
                }
                row(state, requests_running, requests_waiting, kv_blocks, last_error)
            }
            Err(reason) => row(
                record.state.to_string(),
                known.requests_running,
                known.requests_waiting,
                known.kv_blocks,
                Some(reason),
            ),
        });
    }
    let pools = pools.pools.into_iter().map(|pool| PoolRow {
        name: pool.name,
        role: pool.role,
        desired: pool.desired,
        ready: pool.ready,
        draining: pool.draining,
    });
    Ok(FleetStatus {
        conductor: ConductorStatus {
            url: conductor.url.clone(),
            store: listing.store,
            leader: true,
            view_age_ms: 0,
        },
        pools: pools.collect(),
        workers,
        paths: paths.into_values().collect(),
    })
}

/// Keeps one entry a pair: the one that has measured something, from whichever side.
fn merge(paths: &mut BTreeMap<(WorkerId, WorkerId), PathStatus>, path: PathStatus) {
    let key = (path.prefill.clone(), path.decode.clone());
    match paths.get(&key) {
        Some(known) if known.gb_per_s.is_some() || path.gb_per_s.is_none() => {}
        _ => {
            paths.insert(key, path);
        }
    }
}

async fn fetch_worker(http: &Client, record: &WorkerRecord) -> Result<WorkerStatus, String> {
    let call = async {
        let answer =
            http.get(format!("http://{}/v1/state", record.address)).timeout(WORKER_TIMEOUT).send().await?;
        answer.error_for_status()?.json::<WorkerStatus>().await
    };
    call.await.map_err(|error: reqwest::Error| format!("does not tell its state: {}", last_cause(&error)))
}

fn describe(status: &FleetStatus) -> String {
    let row = |cells: &[&str]| cells.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut pools = vec![row(&["POOL", "ROLE", "WANTED", "READY", "DRAINING"])];
    for pool in &status.pools {
        let PoolRow { name, role, desired, ready, draining } = pool;
        pools.push(vec![
            name.to_string(),
            role.to_string(),
            desired.to_string(),
            ready.to_string(),
            draining.to_string(),
        ]);
    }
    let head =
        ["WORKER", "STATE", "EPOCH", "ADDRESS", "PID", "RUNNING", "WAITING", "KV BLOCKS IN USE", "CACHED"];
    let mut workers = vec![row(&head)];
    for worker in &status.workers {
        let kv = &worker.kv_blocks;
        let used = kv.reserved + kv.filling + kv.valid + kv.quarantined;
        workers.push(vec![
            worker.name.to_string(),
            worker.state.clone(),
            worker.epoch.to_string(),
            worker.address.clone(),
            worker.pid.to_string(),
            worker.requests_running.to_string(),
            worker.requests_waiting.to_string(),
            format!("{used} of {}", kv.total()),
            kv.shared.to_string(),
        ]);
    }
    let ConductorStatus { url, store, .. } = &status.conductor;
    let mut out = format!("conductor {url}, store {store}\n\n{}\n{}", columns(&pools), columns(&workers));
    if !status.paths.is_empty() {
        let mut paths = vec![row(&["PREFILL", "DECODE", "BACKEND", "BANDWIDTH", "LATENCY", "WHY"])];
        for path in &status.paths {
            let figure =
                |value: Option<f64>, unit: &str| value.map_or("-".to_owned(), |v| format!("{v:.2} {unit}"));
            paths.push(vec![
                path.prefill.to_string(),
                path.decode.to_string(),
                path.backend.clone(),
                figure(path.gb_per_s, "GB/s"),
                figure(path.latency_us, "us"),
                path.reason.clone(),
            ]);
        }
        out.push('\n');
        out.push_str(&columns(&paths));
    }
    for worker in status.workers.iter().filter(|worker| worker.last_error.is_some()) {
        let error = worker.last_error.as_deref().unwrap_or_default();
        out.push_str(&format!("\n{}: {error}", worker.name));
    }
    if !out.ends_with('\n') {
        out.push('\n');
    }
    out
}
