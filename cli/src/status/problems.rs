//! What is wrong with a fleet, in words, each with what to do about it. No I/O: the status in, problems out.

use std::time::Duration;

use baton_config::protocol::PathStatus;
use serde::Serialize;

use super::text::{ago, lasting};
use super::{FleetStatus, PoolRow, WorkerRow};

/// A pool may be short for so long: workers take a while to start.
const SHORT_AFTER: Duration = Duration::from_secs(10);
/// A worker may take so long from its registration to being ready.
const JOIN_AFTER: Duration = Duration::from_secs(60);
/// And so long to begin a drain that it was asked for.
const DRAIN_AFTER: Duration = Duration::from_secs(15);
/// The view may be so old: a store that changes its leader is back by then.
const VIEW_AFTER: Duration = Duration::from_secs(4);
/// Requests that wait while so much of the KV cache is held wait for the cache.
const KV_FULL_PERCENT: u32 = 95;

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Problem {
    pub(super) severity: Severity,
    /// What.
    pub(super) what: String,
    /// What to do about it.
    pub(super) remedy: String,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Severity {
    /// Requests fail, or will.
    Down,
    /// Requests are served, with less than there should be.
    Degraded,
    /// Worth knowing.
    Note,
}

/// All that is wrong, the worst first.
pub(super) fn problems(status: &FleetStatus) -> Vec<Problem> {
    let mut found = Vec::new();
    store(status, &mut found);
    conductors(status, &mut found);
    for pool in &status.pools {
        pool_problems(status, pool, &mut found);
        scaler_problems(pool, &mut found);
    }
    for worker in &status.workers {
        worker_problems(status, worker, &mut found);
    }
    for path in &status.paths {
        path_problems(path, &mut found);
    }
    found.sort_by_key(|problem| problem.severity);
    found
}

fn add(found: &mut Vec<Problem>, severity: Severity, what: String, remedy: &str) {
    found.push(Problem { severity, what, remedy: remedy.to_owned() });
}

fn store(status: &FleetStatus, found: &mut Vec<Problem>) {
    let conductor = &status.conductor;
    let health = &conductor.store_health;
    let name = match &health.endpoint {
        Some(endpoint) => format!("the {} store at {endpoint}", conductor.store),
        None => format!("the {} store", conductor.store),
    };
    if !health.up {
        let since = health.last_ok_ms.map_or(String::new(), |ms| format!(" for {}", lasting(ms)));
        let why = health.problem.as_ref().map_or(String::new(), |why| format!(": {why}"));
        add(
            found,
            Severity::Degraded,
            format!("{name} has not answered{since}{why}"),
            "bring it back; until then requests are served by the last view, and nobody joins, scales or is drained",
        );
    } else if let Some(problem) = &health.problem {
        add(found, Severity::Degraded, format!("{name}: {problem}"), "see above; what runs goes on");
    } else if conductor.view_age_ms >= millis(VIEW_AFTER) {
        let age = ago(conductor.view_age_ms);
        add(
            found,
            Severity::Degraded,
            format!("what the conductor shows was true {age}: it cannot follow {name}"),
            "look at the conductor's log and at the network between it and the store",
        );
    }
    if conductor.warming {
        add(
            found,
            Severity::Note,
            format!("the conductor started less than {} ago", lasting(conductor.ttl_ms)),
            "wait: workers that run are finding back, and are served to meanwhile",
        );
    }
}

fn conductors(status: &FleetStatus, found: &mut Vec<Problem>) {
    let all = &status.conductor.conductors;
    if !all.is_empty() && !all.iter().any(|one| one.known.leader) {
        add(
            found,
            Severity::Degraded,
            "no conductor leads: nothing is scaled".to_owned(),
            "wait some seconds for an election; if it lasts, look at the store",
        );
    }
    for silent in all.iter().filter(|one| !one.answers) {
        let (name, url) = (&silent.known.name, &silent.known.url);
        add(
            found,
            Severity::Note,
            format!("conductor {name} does not answer at {url}"),
            "the others do its work; look at its process, or reach it from within its network",
        );
    }
}

fn pool_problems(status: &FleetStatus, row: &PoolRow, found: &mut Vec<Problem>) {
    let pool = &row.status;
    let (name, role) = (&pool.name, pool.role);
    if pool.ready == 0 && pool.desired > 0 {
        let since = pool.empty_ms.map_or(String::new(), |ms| format!(" since {}", lasting(ms)));
        let other = |other: &&PoolRow| other.status.ready > 0 && other.status.name != pool.name;
        let served = |does: fn(baton_config::Role) -> bool| {
            status.pools.iter().filter(other).any(|other| does(other.status.role))
        };
        let (severity, effect) = if role.decodes() && !served(baton_config::Role::decodes) {
            (Severity::Down, "requests are refused with 503")
        } else if role.decodes() {
            (Severity::Degraded, "other pools serve its requests")
        } else if served(baton_config::Role::prefills) {
            (Severity::Degraded, "other pools prefill for it")
        } else {
            (Severity::Degraded, "decode workers prefill by themselves, which takes longer")
        };
        let what = format!(
            "no ready {role} worker in pool {name}{since} ({} wanted, {} joining): {effect}",
            pool.desired, pool.joining
        );
        add(found, severity, what, missing_remedy(pool.joining));
    } else if let Some(ms) = pool.short_ms.filter(|ms| *ms >= millis(SHORT_AFTER)) {
        let what = format!(
            "pool {name} wanted {} and has {} ready for {} ({} joining, {} draining)",
            pool.desired,
            pool.ready,
            lasting(ms),
            pool.joining,
            pool.draining
        );
        add(found, Severity::Degraded, what, missing_remedy(pool.joining));
    }
}

fn scaler_problems(row: &PoolRow, found: &mut Vec<Problem>) {
    let Some(scale) = &row.status.autoscale else { return };
    if let Some(problem) = &scale.problem {
        let (name, scaler) = (&row.status.name, &scale.scaler);
        let what = format!(
            "pool {name} shall have {} workers, and the scaler {scaler} fails: {problem}",
            scale.desired
        );
        add(
            found,
            Severity::Degraded,
            what,
            "mend it, or change the number where the scaler would; what runs goes on",
        );
    }
}

fn missing_remedy(joining: u32) -> &'static str {
    if joining > 0 {
        "they are starting; if it lasts, read their logs"
    } else {
        "nobody has registered: see whether its workers are started (pods pending, `baton up` restarting) and read their logs"
    }
}

fn worker_problems(status: &FleetStatus, worker: &WorkerRow, found: &mut Vec<Problem>) {
    let name = &worker.name;
    let ttl_ms = status.conductor.ttl_ms;
    let silent = worker.seen_ms.filter(|ms| *ms > ttl_ms / 3 * 2);
    match (silent, &worker.unreachable) {
        (Some(ms), why) => {
            let left = lasting(ttl_ms.saturating_sub(ms));
            let asked = why.as_ref().map_or(String::new(), |why| format!(" and does not answer ({why})"));
            let what =
                format!("worker {name} is silent for {}{asked}; its lease ends in {left}", lasting(ms));
            add(
                found,
                Severity::Degraded,
                what,
                "frozen, dead, or cut off: look at its host; routers go around it",
            );
        }
        (None, Some(why)) => {
            let what = format!("worker {name} does not tell its state at {}: {why}", worker.address);
            add(
                found,
                Severity::Degraded,
                what,
                "its lease stands, so this may be the network from here to it",
            );
        }
        (None, None) => {}
    }
    if worker.state == "unhealthy" {
        let why = worker.last_error.as_deref().unwrap_or("its engine makes no progress");
        add(
            found,
            Severity::Degraded,
            format!("worker {name} is unhealthy: {why}"),
            "restart it (its liveness probe does after a minute); routers go around it",
        );
    }
    let state_ms = worker.state_ms.unwrap_or(0);
    if worker.state == "joining" && state_ms >= millis(JOIN_AFTER) {
        let what = format!("worker {name} is joining for {}", lasting(state_ms));
        add(found, Severity::Degraded, what, "read its log: loading a model, or waiting for its engine");
    }
    if worker.draining && worker.state == "ready" && state_ms >= millis(DRAIN_AFTER) {
        let what = format!("worker {name} was asked to drain {} and has not begun", ago(state_ms));
        add(
            found,
            Severity::Degraded,
            what,
            "it has not heard: see whether it reaches the conductor, or send it SIGTERM",
        );
    }
    if worker.drain.is_some_and(|drain| drain.grace_left_ms == 0) {
        let what = format!("worker {name} is past its time to drain and has not ended");
        add(found, Severity::Degraded, what, "send it SIGTERM twice");
    }
    if worker.kv_percent >= KV_FULL_PERCENT && worker.requests_waiting > 0 {
        let what = format!(
            "the KV cache of worker {name} is full: {} requests wait for room",
            worker.requests_waiting
        );
        add(found, Severity::Degraded, what, "add decode workers (`baton scale`), or give it more kv.memory");
    }
    if worker.own_epoch.is_some_and(|own| own != worker.epoch) {
        let own = worker.own_epoch.map_or(String::new(), |own| own.to_string());
        let what = format!("worker {name} is in epoch {own}, the conductor has it in {}", worker.epoch);
        add(
            found,
            Severity::Note,
            what,
            "it registered anew a moment ago; if it lasts, two processes use the name",
        );
    }
}

fn path_problems(path: &PathStatus, found: &mut Vec<Problem>) {
    let PathStatus { prefill, decode, backend, reason, fell_back, .. } = path;
    let remedy = "run `baton doctor` on both hosts";
    if backend == "none" {
        let what = format!("no path from {prefill} to {decode}: {reason}");
        add(found, Severity::Degraded, what, remedy);
    } else if let Some(why) = fell_back {
        let what = format!("blocks from {prefill} to {decode} fell back to {backend}: {why}");
        add(found, Severity::Degraded, what, remedy);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
