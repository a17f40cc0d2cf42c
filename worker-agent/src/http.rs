//! The HTTP API of a worker.
//!
//! | method and path | who calls | answer |
//! |---|---|---|
//! | `POST /v1/generate` | anybody | NDJSON of `GenerateEvent` |
//! | `GET /v1/stream?epoch=N`, an upgrade | router | frames: any number of generations, see `baton_config::frames` |
//! | `POST /v1/prefill` | router | `PrefillReply` at the end of the handoff |
//! | `POST /v1/handoffs/{id}/ticket` | prefill worker | `TicketAck` when the blocks were read |
//! | `POST /v1/handoffs/{id}/want` | decode worker | 204 |
//! | `GET /v1/handoffs/{id}` | decode worker | `HandoffStatus` |
//! | `DELETE /v1/handoffs/{id}` | either, router | 204 |
//! | `POST /v1/drain` | operator, launcher | 202 |
//! | `GET /v1/state` | anybody | `WorkerStatus` |
//! | `GET /v1/kv/events?since=SEQ` | router | NDJSON of `KvEventBatch` |
//! | `GET /livez`, `/readyz`, `/metrics` | probes, Prometheus | text |
//! | OpenAI's paths, see [`openai`] | benches, other gateways | of simulated engines only |
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
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::driver::Handoffs;
use crate::engine_thread::EngineHandle;
use crate::in_flight::{InFlight, NoPlace, Permit};
use crate::kv_log::KvLog;
use crate::metrics::Metrics;
use crate::path::Paths;

pub(crate) mod fault;
mod generate;
mod handoffs;
mod kv_events;
mod lines;
mod openai;
mod prefill;
mod prompt_cost;
pub(crate) mod state;
mod stream;

/// A step of the engine that takes this long means that requests make no progress.
pub(crate) const UNREADY_AFTER: Duration = Duration::from_secs(10);
/// And this long, that the process is beyond help.
pub(crate) const DEAD_AFTER: Duration = Duration::from_secs(60);
/// The media type Prometheus expects.
pub(crate) const PROMETHEUS: &str = "text/plain; version=0.0.4";
/// Longest `last_error`, in characters.
const LAST_ERROR_MAX_CHARS: usize = 512;

/// Where a worker is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Joining,
    Ready,
    /// Says that it leaves, and still takes the requests of those who have not heard.
    Leaving(Drain),
    /// Finishes what it has.
    Draining(Drain),
}

/// When a drain began and when it ends whatever is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Drain {
    pub(crate) since: Instant,
    pub(crate) until: Instant,
}

impl Phase {
    /// Whether new requests are taken.
    pub(crate) fn accepts(self) -> bool {
        matches!(self, Self::Ready | Self::Leaving(_))
    }

    /// The drain that is under way.
    pub(crate) fn drain(self) -> Option<Drain> {
        match self {
            Self::Leaving(drain) | Self::Draining(drain) => Some(drain),
            Self::Joining | Self::Ready => None,
        }
    }
}

/// A life of this worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Life {
    pub(crate) epoch: Epoch,
    pub(crate) since: Instant,
}

/// Something that went wrong.
#[derive(Debug, Clone)]
pub(crate) struct Mishap {
    pub(crate) what: String,
    pub(crate) at: Instant,
}

/// What the handlers share.
pub(crate) struct Shared {
    pub(crate) worker: WorkerId,
    pub(crate) pool: PoolName,
    pub(crate) role: Role,
    pub(crate) model: ModelInfo,
    /// Whether the engine is simulated: it then serves OpenAI's paths too.
    pub(crate) simulated: bool,
    pub(crate) engine: EngineHandle,
    pub(crate) handoffs: Handoffs,
    pub(crate) kv_log: Arc<KvLog>,
    pub(crate) metrics: Metrics,
    pub(crate) transfer: baton_transfer::Agent,
    pub(crate) paths: Paths,
    pub(crate) tasks: TaskTracker,
    pub(crate) phase: watch::Receiver<Phase>,
    pub(crate) life: watch::Receiver<Option<Life>>,
    pub(crate) in_flight: InFlight,
    /// Asks this worker to drain.
    pub(crate) drain: CancellationToken,
    /// The grace is over: requests end now.
    pub(crate) abort: CancellationToken,
    /// The server stops: endless answers end.
    pub(crate) stop: CancellationToken,
    pub(crate) last_error: Mutex<Option<Mishap>>,
    /// Longest request, in bytes.
    pub(crate) body_max: usize,
    /// A client that takes no token for so long has left without saying so.
    pub(crate) stalled: Duration,
}

impl Shared {
    /// A place for a request. It is taken before it is asked whether any are given: whoever drains this worker then either
    /// waits for it, or has refused it.
    pub(crate) fn admit(&self) -> Result<Permit, NoPlace> {
        let permit = self.in_flight.enter();
        if !self.phase.borrow().accepts() {
            return Err(NoPlace::Closed);
        }
        permit.ok_or(NoPlace::Full)
    }

    /// Remembers what went wrong last, for people.
    pub(crate) fn note_error(&self, error: &str) {
        let mut last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        let what = error.chars().take(LAST_ERROR_MAX_CHARS).collect();
        *last = Some(Mishap { what, at: Instant::now() });
    }

    pub(crate) fn last_error(&self) -> Option<Mishap> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A duration as messages have it.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The routes of a worker.
pub(crate) fn routes(shared: Arc<Shared>) -> Router {
    let body_max_bytes = shared.body_max;
    let openai = if shared.simulated { openai::routes() } else { Router::new() };
    openai
        .route("/v1/generate", post(generate::generate))
        .route(baton_config::frames::PATH, get(stream::stream))
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
