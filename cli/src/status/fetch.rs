//! Asks the conductor, and every worker it knows.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_conductor::api::{ListedWorker, Listing, PoolList, PoolStatus, StoreStatus};
use baton_config::WorkerId;
use baton_config::protocol::{PathStatus, WorkerStatus};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream;
use reqwest::{Client, Method};

use super::{ConductorRow, FleetStatus, OtherConductor, PoolRow, WorkerRow};
use crate::failure::Failure;
use crate::remote::{Conductor, last_cause};

/// A worker that does not answer in this time is shown as the conductor knows it.
const WORKER_TIMEOUT: Duration = Duration::from_secs(1);
/// Workers asked at a time.
const ASKED_AT_ONCE: usize = 64;

/// Everything but the problems.
pub(super) async fn fetch(conductor: &Conductor) -> Result<FleetStatus, Failure> {
    let listing: Listing = conductor.ask(conductor.request(Method::GET, "/v1/workers?metadata=no")).await?;
    let pools: PoolList = conductor.ask(conductor.request(Method::GET, "/v1/pools")).await?;
    let others = join_all(listing.conductors.iter().map(|other| async {
        OtherConductor { known: other.clone(), answers: conductor.answers(&other.url).await }
    }));
    let asked = listing.workers.iter().map(|worker| ask_worker(conductor.http(), &worker.record.address));
    let answers = stream::iter(asked).buffered(ASKED_AT_ONCE).collect::<Vec<_>>();
    let (others, answers) = tokio::join!(others, answers);
    let mut paths = BTreeMap::new();
    let mut workers = Vec::with_capacity(answers.len());
    for (listed, answer) in listing.workers.iter().zip(answers) {
        let draining = listing.drain.contains(&listed.record.worker);
        let mut row = as_listed(listed, draining);
        match answer {
            Ok(mut told) => {
                for path in std::mem::take(&mut told.paths) {
                    merge(&mut paths, path);
                }
                row.take(told);
            }
            Err(reason) => row.unreachable = Some(reason),
        }
        workers.push(row);
    }
    Ok(FleetStatus {
        conductor: conductor_row(conductor, &listing, others),
        problems: Vec::new(),
        pools: pools.pools.into_iter().map(pool_row).collect(),
        workers,
        paths: paths.into_values().collect(),
    })
}

fn conductor_row(conductor: &Conductor, listing: &Listing, conductors: Vec<OtherConductor>) -> ConductorRow {
    // A conductor of an earlier build does not tell.
    let unknown = StoreStatus {
        kind: listing.store.clone(),
        endpoint: None,
        up: true,
        last_ok_ms: None,
        problem: None,
    };
    ConductorRow {
        url: conductor.url.clone(),
        store: listing.store.clone(),
        leader: listing.leader,
        view_age_ms: listing.view_age_ms,
        warming: listing.warming,
        ttl_ms: listing.ttl_ms,
        store_health: listing.store_health.clone().unwrap_or(unknown),
        conductors,
    }
}

fn pool_row(status: PoolStatus) -> PoolRow {
    let decided = status.autoscale.as_ref().is_some_and(|decided| !decided.dry_run);
    let set_by = match status.operator_set {
        true => "operator",
        false if decided => "autoscaler",
        false => "document",
    };
    PoolRow { status, set_by }
}

/// A worker as the conductor knows it.
fn as_listed(listed: &ListedWorker, draining: bool) -> WorkerRow {
    let record = &listed.record;
    let load = listed.load.clone().unwrap_or_default();
    let blocks = load.kv_blocks;
    let state = if draining { "draining".to_owned() } else { record.state.to_string() };
    WorkerRow {
        name: record.worker.clone(),
        pool: record.pool.clone(),
        role: record.role,
        epoch: record.epoch,
        draining: state == "draining",
        state,
        address: record.address.clone(),
        pid: record.pid,
        requests_running: load.requests_running,
        requests_waiting: load.requests_waiting,
        kv_blocks: blocks,
        last_error: load.last_error,
        last_error_ago_ms: None,
        age_ms: listed.known_ms,
        seen_ms: listed.seen_ms,
        state_ms: listed.state_ms,
        kv_percent: percent(blocks.held(), blocks.total()),
        drain: None,
        unreachable: None,
        own_epoch: None,
    }
}

impl WorkerRow {
    /// What the worker itself says counts more.
    fn take(&mut self, told: WorkerStatus) {
        self.state = told.state;
        self.requests_running = told.requests_running;
        self.requests_waiting = told.requests_waiting;
        self.kv_blocks = told.kv_blocks;
        self.kv_percent = percent(told.kv_blocks.held(), told.kv_blocks.total());
        self.last_error = told.last_error;
        self.last_error_ago_ms = told.last_error_ago_ms;
        self.age_ms = told.age_ms.or(self.age_ms);
        self.drain = told.drain;
        self.own_epoch = told.epoch;
    }
}

fn percent(part: u32, whole: u32) -> u32 {
    u32::try_from(u64::from(part) * 100 / u64::from(whole.max(1))).unwrap_or(100)
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

/// What a worker says of itself.
pub(crate) async fn ask_worker(http: &Client, address: &str) -> Result<WorkerStatus, String> {
    let call = async {
        let answer = http.get(format!("http://{address}/v1/state")).timeout(WORKER_TIMEOUT).send().await?;
        answer.error_for_status()?.json::<WorkerStatus>().await
    };
    call.await.map_err(|error: reqwest::Error| last_cause(&error))
}
