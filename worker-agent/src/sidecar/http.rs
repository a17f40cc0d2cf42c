//! The HTTP API of a sidecar: `GET /v1/state`, `POST /v1/drain`, `GET /livez`, `/readyz`, `/metrics`, as of any worker.
//! Whatever has to do with tokens and KV blocks is not there: routers learn by the 404 that it has no KV events.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use baton_config::protocol::{BlockCounts, DrainStatus, WorkerStatus};
use http::StatusCode;
use tokio::time::Instant;

use super::Shared;
use super::health::Verdict;
use crate::http::fault::{no_method, no_route};
use crate::http::{PROMETHEUS, Phase, millis};
use crate::member::this_process;

pub(super) fn routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/drain", post(drain))
        .route("/v1/state", get(state))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(shared)
}

/// `joining`, `ready`, `draining` or `unhealthy`, and why it should get no requests, if so.
fn standing(shared: &Shared) -> (&'static str, Option<String>) {
    let verdict = shared.seen.borrow().verdict.clone();
    match (*shared.phase.borrow(), verdict) {
        (Phase::Joining, Verdict::Unwell(why)) => ("joining", Some(why)),
        (Phase::Joining, _) => ("joining", Some("joining".to_owned())),
        (_, Verdict::Unwell(why)) => ("unhealthy", Some(why)),
        (Phase::Leaving(_) | Phase::Draining(_), _) => ("draining", Some("draining".to_owned())),
        (Phase::Ready, _) => ("ready", None),
    }
}

async fn state(State(shared): State<Arc<Shared>>) -> Json<WorkerStatus> {
    let seen = shared.seen.borrow().clone();
    let life = *shared.life.borrow();
    let gauges = seen.gauges.unwrap_or_default();
    let (last_error, last_error_at) = seen.last_error.map(|mishap| (mishap.what, mishap.at)).unzip();
    let options = &shared.options;
    Json(WorkerStatus {
        worker: options.worker.clone(),
        epoch: life.map(|life| life.epoch),
        pool: options.pool.clone(),
        role: options.role,
        state: standing(&shared).0.to_owned(),
        pid: std::process::id(),
        process: Some(this_process()),
        requests_running: gauges.running,
        requests_waiting: gauges.waiting,
        prefill_tokens_pending: 0,
        kv_blocks: BlockCounts::default(),
        kv_evictable: 0,
        prefilled_tokens: 0,
        prompt_tokens: None,
        prefill_tokens_per_s: None,
        itl_ms: None,
        paths: Vec::new(),
        last_error,
        last_error_ago_ms: last_error_at.map(|at| millis(at.elapsed())),
        age_ms: life.map(|life| millis(life.since.elapsed())),
        server_gone_ms: seen.gone_at.map(|at| millis(at.elapsed())),
        drain: drain_status(&shared),
    })
}

fn drain_status(shared: &Shared) -> Option<DrainStatus> {
    let drain = shared.phase.borrow().drain()?;
    let gauges = shared.seen.borrow().gauges.unwrap_or_default();
    Some(DrainStatus {
        since_ms: millis(drain.since.elapsed()),
        grace_left_ms: millis(drain.until.saturating_duration_since(Instant::now())),
        requests: gauges.requests(),
        requests_running: gauges.running,
        requests_waiting: gauges.waiting,
        handoffs: 0,
        leases: 0,
        blocks_held: 0,
    })
}

async fn drain(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.drain.cancel();
    StatusCode::ACCEPTED
}

async fn livez() -> &'static str {
    // A sidecar that is started anew brings no server back.
    "ok\n"
}

async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    match standing(&shared).1 {
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
        None => "ok\n".into_response(),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    ([(http::header::CONTENT_TYPE, PROMETHEUS)], shared.metrics.text()).into_response()
}
