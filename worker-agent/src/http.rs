//! The HTTP API of a worker.
//!
//! | method and path | who calls | answer |
//! |---|---|---|
//! | `POST /v1/generate` | router | NDJSON of `GenerateEvent` |
//! | `POST /v1/prefill` | router | `PrefillReply` at the end of the handoff |
//! | `POST /v1/handoffs/{id}/ticket` | prefill worker | `TicketAck` when the blocks were read |
//! | `POST /v1/handoffs/{id}/want` | decode worker | 204 |
//! | `GET /v1/handoffs/{id}` | decode worker | `HandoffStatus` |
//! | `DELETE /v1/handoffs/{id}` | either, router | 204 |
//! | `POST /v1/drain` | operator, launcher | 202 |
//! | `GET /v1/state` | anybody | `WorkerStatus` |
//! | `GET /v1/kv/events?since=SEQ` | router | NDJSON of `KvEventBatch` |
//! | `GET /livez`, `/readyz`, `/metrics` | probes, Prometheus | text |
//!
//! Errors are a `WorkerError`: 400 refused, 404 unknown handoff, 409 another epoch, 410 ended handoff, 413 too large,
//! 429 overloaded, 503 unavailable.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use baton_config::{Epoch, PoolName, Role, WorkerId};
use baton_engine::ModelInfo;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::driver::Handoffs;
use crate::engine_thread::EngineHandle;
use crate::kv_log::KvLog;
use crate::metrics::Metrics;
use crate::path::Paths;

pub(crate) mod fault;
mod generate;
mod handoffs;
mod kv_events;
mod lines;
mod prefill;
mod state;

/// A step of the engine that takes this long means that requests make no progress.
pub(crate) const UNREADY_AFTER: Duration = Duration::from_secs(10);
/// And this long, that the process is beyond help.
pub(crate) const DEAD_AFTER: Duration = Duration::from_secs(60);
/// Longest `last_error`, in characters.
const LAST_ERROR_MAX_CHARS: usize = 512;

/// Where a worker is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Joining,
    Ready,
    Draining,
}

/// What the handlers share.
pub(crate) struct Shared {
    pub(crate) worker: WorkerId,
    pub(crate) pool: PoolName,
    pub(crate) role: Role,
    pub(crate) model: ModelInfo,
    pub(crate) engine: EngineHandle,
    pub(crate) handoffs: Handoffs,
    pub(crate) kv_log: Arc<KvLog>,
    pub(crate) metrics: Metrics,
    pub(crate) paths: Paths,
    pub(crate) tasks: TaskTracker,
    pub(crate) phase: watch::Receiver<Phase>,
    pub(crate) epoch: watch::Receiver<Option<Epoch>>,
    /// One permit per request in flight.
    pub(crate) in_flight: Arc<Semaphore>,
    /// Asks this worker to drain.
    pub(crate) drain: CancellationToken,
    /// The grace is over: requests end now.
    pub(crate) abort: CancellationToken,
    /// The server stops: endless answers end.
    pub(crate) stop: CancellationToken,
    pub(crate) last_error: Mutex<Option<String>>,
}

impl Shared {
    /// Remembers what went wrong last, for people.
    pub(crate) fn note_error(&self, error: &str) {
        let mut last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some(error.chars().take(LAST_ERROR_MAX_CHARS).collect());
    }

    pub(crate) fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The routes of a worker.
pub(crate) fn routes(shared: Arc<Shared>, body_max_bytes: usize) -> Router {
    Router::new()
        .route("/v1/generate", post(generate::generate))
        .route("/v1/prefill", post(prefill::prefill))
        .route("/v1/handoffs/{id}/ticket", post(handoffs::ticket))
        .route("/v1/handoffs/{id}/want", post(handoffs::want))
        .route("/v1/handoffs/{id}", get(handoffs::status).delete(handoffs::delete))
        .route("/v1/drain", post(state::drain))
        .route("/v1/state", get(state::state))
        .route("/v1/kv/events", get(kv_events::events))
        .route("/livez", get(state::livez))
        .route("/readyz", get(state::readyz))
        .route("/metrics", get(state::metrics))
        .fallback(fault::no_route)
        .method_not_allowed_fallback(fault::no_method)
        .layer(DefaultBodyLimit::max(body_max_bytes))
        .with_state(shared)
}
