//! What a worker says about itself.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use baton_config::protocol::{DrainStatus, WorkerStatus};
use http::StatusCode;
use tokio::time::Instant;

use super::{DEAD_AFTER, PROMETHEUS, Phase, Shared, UNREADY_AFTER, millis};
use crate::member::this_process;

/// Why the worker should get no requests, if so.
fn unready(shared: &Shared) -> Option<String> {
    if let Some(why) = shared.engine.view().ended {
        return Some(format!("the engine has ended: {why}"));
    }
    let stuck = shared.engine.stuck_for();
    if stuck >= UNREADY_AFTER {
        return Some(format!("the engine made no progress for {stuck:?}"));
    }
    match *shared.phase.borrow() {
        Phase::Joining => Some("joining".to_owned()),
        Phase::Leaving(_) | Phase::Draining(_) => Some("draining".to_owned()),
        Phase::Ready => None,
    }
}

fn state_name(shared: &Shared) -> &'static str {
    let healthy = shared.engine.view().ended.is_none() && shared.engine.stuck_for() < UNREADY_AFTER;
    match *shared.phase.borrow() {
        _ if !healthy => "unhealthy",
        Phase::Joining => "joining",
        Phase::Ready => "ready",
        Phase::Leaving(_) | Phase::Draining(_) => "draining",
    }
}

pub(super) async fn state(State(shared): State<Arc<Shared>>) -> Json<WorkerStatus> {
    let view = shared.engine.view();
    let life = *shared.life.borrow();
    let (last_error, last_error_at) = shared.last_error().map(|mishap| (mishap.what, mishap.at)).unzip();
    Json(WorkerStatus {
        worker: shared.worker.clone(),
        epoch: life.map(|life| life.epoch),
        pool: shared.pool.clone(),
        role: shared.role,
        state: state_name(&shared).to_owned(),
        pid: std::process::id(),
        process: Some(this_process()),
        requests_running: view.load.running,
        requests_waiting: view.load.waiting,
        prefill_tokens_pending: view.load.prefill_tokens_pending,
        kv_blocks: view.counts,
        kv_evictable: view.evictable,
        prefilled_tokens: view.prefilled_tokens,
        prompt_tokens: view.prompt_tokens,
        prefill_tokens_per_s: view.prefill_tokens_per_s,
        itl_ms: view.itl_ms,
        paths: shared.paths.status(&shared.worker),
        last_error,
        last_error_ago_ms: last_error_at.map(|at| millis(at.elapsed())),
        age_ms: life.map(|life| millis(life.since.elapsed())),
        server_gone_ms: None,
        drain: drain_status(&shared),
    })
}

/// What a drain still waits for, while there is one.
pub(crate) fn drain_status(shared: &Shared) -> Option<DrainStatus> {
    let drain = shared.phase.borrow().drain()?;
    let view = shared.engine.view();
    let open = *shared.handoffs.open().borrow();
    let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
    Some(DrainStatus {
        since_ms: millis(drain.since.elapsed()),
        grace_left_ms: millis(drain.until.saturating_duration_since(Instant::now())),
        requests: shared.in_flight.count(),
        requests_running: view.load.running,
        requests_waiting: view.load.waiting,
        handoffs: count(open.prefills + open.decodes),
        leases: count(open.prefills),
        blocks_held: view.counts.held(),
    })
}

pub(super) async fn drain(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.drain.cancel();
    StatusCode::ACCEPTED
}

pub(super) async fn livez(State(shared): State<Arc<Shared>>) -> Response {
    let dead = shared.engine.view().ended.is_some() || shared.engine.stuck_for() >= DEAD_AFTER;
    if dead {
        return (StatusCode::SERVICE_UNAVAILABLE, "the engine is gone or stuck\n").into_response();
    }
    "ok\n".into_response()
}

pub(super) async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    match unready(&shared) {
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
        None => "ok\n".into_response(),
    }
}

pub(super) async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let view = shared.engine.view();
    let metrics = &shared.metrics;
    metrics.set_blocks(&view.counts);
    metrics.running.set(i64::from(view.load.running));
    metrics.waiting.set(i64::from(view.load.waiting));
    metrics.take_transfer(&shared.transfer.stats());
    metrics.prefill_speed.set(view.prefill_tokens_per_s.unwrap_or(0.0));
    ([(http::header::CONTENT_TYPE, PROMETHEUS)], metrics.text()).into_response()
}
