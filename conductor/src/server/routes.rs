//! The HTTP API: from a request to the registry or the mirror, and back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, RawQuery, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use baton_config::{Epoch, PoolName, WorkerId};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, StatusCode, header};
use prometheus::IntGauge;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::HttpLimits;
use super::answer::Refusal;
use super::auth::Guard;
use super::history::History;
use super::metrics::Metrics;
use crate::api::{
    AutoscaleStatus, BODY_MAX_BYTES, ConductorStatus, HEARTBEAT_INTERVAL_MS, Keepalive, ListedWorker,
    Listing, PoolList, PoolStatus, Register, Replicas, StoreStatus, WatchLine,
};
use crate::autoscale::{Board, Scaled};
use crate::leader::{ConductorRecord, Leadership};
use crate::mirror::{Fleet, Mirror, ScaledSeen, encode_line};
use crate::reconcile::Tally;
use crate::record::WorkerState;
use crate::registry::Registry;
use crate::store::{LeaseId, Revision, StoreHealth};

/// The query of those who have no use for transfer metadata.
const NO_METADATA: &str = "metadata=no";
/// Least time between two looks at how long things have been as they are.
const REMEMBER_GAP: Duration = Duration::from_millis(100);
/// Lines a watch takes from the mirror at once.
const WATCH_CHUNK: usize = 256;
/// How long a watch from a revision that is yet to come waits for it.
const AHEAD_PATIENCE: Duration = Duration::from_millis(300);

/// What the handlers show, kept up to date by other tasks.
pub(super) struct Shared {
    pub(super) mirror: Arc<Mirror>,
    pub(super) leadership: Leadership,
    pub(super) tally: Arc<Tally>,
    pub(super) board: Arc<Board>,
}

/// Who gets in, and within which bounds.
pub(super) struct Entrance {
    pub(super) guard: Arc<Guard>,
    pub(super) limits: HttpLimits,
}

/// What all handlers share.
pub(super) struct App {
    pub(super) registry: Registry,
    mirror: Arc<Mirror>,
    leadership: Leadership,
    tally: Arc<Tally>,
    board: Arc<Board>,
    metrics: Metrics,
    guard: Arc<Guard>,
    limits: HttpLimits,
    store_kind: &'static str,
    started: Instant,
    history: Mutex<History>,
    stop: CancellationToken,
}

impl App {
    pub(super) fn new(
        registry: Registry,
        shared: Shared,
        entrance: Entrance,
        store_kind: &'static str,
        stop: CancellationToken,
    ) -> Self {
        let (metrics, started) = (Metrics::new(), Instant::now());
        let Shared { mirror, leadership, tally, board } = shared;
        let Entrance { guard, limits } = entrance;
        let history = Mutex::default();
        Self {
            registry,
            mirror,
            leadership,
            tally,
            board,
            metrics,
            guard,
            limits,
            store_kind,
            started,
            history,
            stop,
        }
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Remembers since when things are as they are.
    pub(super) async fn remember(self: Arc<Self>) {
        let mut head = self.mirror.head();
        loop {
            head.borrow_and_update();
            let fleet = self.mirror.fleet();
            let pools = self.pools(&fleet);
            self.history().observe(Instant::now(), &fleet, &pools);
            // Many changes at once are one look.
            tokio::time::sleep(REMEMBER_GAP).await;
            if head.changed().await.is_err() {
                return;
            }
        }
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A store that was never read shows no fleet, which is not the same as an empty one.
    fn known(&self) -> Result<(), Refusal> {
        if self.mirror.known() { Ok(()) } else { Err(self.away()) }
    }

    /// The store is not followed: why.
    fn away(&self) -> Refusal {
        let problem = self.registry.store_health().problem;
        let why = problem.map_or_else(String::new, |problem| format!(": {problem}"));
        let message = format!("the {} store does not answer{why}", self.store_kind);
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", message)
    }

    fn pools(&self, fleet: &Fleet) -> Vec<PoolStatus> {
        let now = Instant::now();
        let targets: BTreeMap<PoolName, u32> =
            self.mirror.targets(fleet).into_iter().map(|target| (target.name, target.desired)).collect();
        let status = |pool: &crate::PoolOptions| {
            let count = |wanted: WorkerState| {
                let seen = fleet.workers.values().filter(|w| w.pool == pool.name);
                let states = seen
                    .map(|w| if fleet.drain.contains(&w.worker) { WorkerState::Draining } else { w.state });
                u32::try_from(states.filter(|state| *state == wanted).count()).unwrap_or(u32::MAX)
            };
            let (short, empty) = self.history().pool(now, &pool.name);
            PoolStatus {
                name: pool.name.clone(),
                role: pool.role,
                desired: targets.get(&pool.name).copied().unwrap_or(pool.replicas),
                operator_set: fleet.replicas.contains_key(&pool.name),
                min: pool.min,
                max: pool.max,
                joining: count(WorkerState::Joining),
                ready: count(WorkerState::Ready),
                draining: count(WorkerState::Draining),
                short_ms: short.map(millis),
                empty_ms: empty.map(millis),
                autoscale: fleet.scale.get(&pool.name).map(autoscale_status),
            }
        };
        self.registry.pools().values().map(status).collect()
    }
}

fn autoscale_status(seen: &ScaledSeen) -> AutoscaleStatus {
    let Scaled { desired, kind, reason, dry_run, scaler, problem, .. } = seen.scaled.clone();
    AutoscaleStatus {
        desired,
        decision: kind,
        reason,
        dry_run,
        scaler: scaler.to_string(),
        decided_ms_ago: millis(seen.since.elapsed()),
        problem,
    }
}

type AppState = State<Arc<App>>;
/// A name in the path, or the reason why it is not even text.
type PathText = Result<Path<String>, axum::extract::rejection::PathRejection>;

/// All routes.
pub(super) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/workers", get(list).post(register))
        .route("/v1/workers/{id}", axum::routing::delete(deregister))
        .route("/v1/workers/{id}/keepalive", post(keep_alive))
        .route("/v1/workers/{id}/drain", post(drain))
        .route("/v1/watch", get(watch))
        .route("/v1/pools", get(pools))
        .route("/v1/pools/{name}/replicas", put(set_replicas).delete(release_replicas))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(axum::middleware::from_fn_with_state(app.clone(), admit))
        // Outermost, so that no refusal goes uncounted.
        .layer(axum::middleware::from_fn_with_state(app.clone(), count_refusals))
        .with_state(app)
}

/// All that is said in plain HTTP where TLS is spoken.
pub(super) fn plain_router(app: Arc<App>) -> Router {
    let refuse = || async {
        let message = "this port speaks TLS: use https://";
        Answer::<()>(Err(Refusal::invalid("tls_required", message))).into_response()
    };
    Router::new()
        .fallback(refuse)
        .layer(axum::middleware::from_fn_with_state(app.clone(), count_refusals))
        .with_state(app)
}

/// Nothing below `/v1` is done for strangers.
async fn admit(State(app): AppState, request: Request, next: axum::middleware::Next) -> Response {
    let path = request.uri().path();
    if path == "/v1" || path.starts_with("/v1/") {
        let admitted = app.guard.admit(request.extensions().get(), request.headers());
        if let Err(refusal) = admitted {
            return Answer::<()>(Err(refusal)).into_response();
        }
    }
    next.run(request).await
}

/// Carried by the answers that [`count_refusals`] counts.
#[derive(Clone, Copy)]
struct RefusalCode(&'static str);

async fn count_refusals(State(app): AppState, request: Request, next: axum::middleware::Next) -> Response {
    let response = next.run(request).await;
    if let Some(RefusalCode(code)) = response.extensions().get() {
        app.metrics.refused(code);
    }
    response
}

/// A handler's outcome; refusals tell their code to the counting layer.
struct Answer<T>(Result<T, Refusal>);

impl<T: IntoResponse> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        match self.0 {
            Ok(answer) => answer.into_response(),
            Err(refusal) => {
                let code = RefusalCode(refusal.code());
                let mut response = refusal.into_response();
                response.extensions_mut().insert(code);
                response
            }
        }
    }
}

async fn list(State(app): AppState, RawQuery(query): RawQuery) -> Response {
    let done = app.known().and_then(|()| match query.as_deref() {
        None => Ok(Json(listing(&app, true))),
        Some(NO_METADATA) => Ok(Json(listing(&app, false))),
        Some(_) => {
            let message = format!("the query must be ?{NO_METADATA}, or none");
            Err(Refusal::invalid("invalid_query", message))
        }
    });
    Answer(done).into_response()
}

fn listing(app: &App, metadata: bool) -> Listing {
    let now = Instant::now();
    let fleet = app.mirror.fleet();
    let told = app.registry.told();
    let ttl = app.registry.lease_ttl();
    let pools = app.mirror.targets(&fleet);
    let conductors = conductors(&fleet);
    let workers = fleet.workers.into_values().map(|record| {
        let told = told.get(&record.worker).filter(|told| told.epoch == record.epoch);
        let load = told.and_then(|told| told.load.clone());
        let record = if metadata { record } else { record.without_metadata() };
        let past = app.history().worker(now, &record.worker, record.epoch);
        let (known, state) = past.unzip();
        ListedWorker {
            load,
            seen_ms: told.map(|told| millis(told.at.elapsed())),
            known_ms: known.map(millis),
            state_ms: state.map(millis),
            record,
        }
    });
    Listing {
        workers: workers.collect(),
        instance: fleet.instance,
        store: app.store_kind.to_owned(),
        revision: fleet.revision,
        ttl_ms: millis(ttl),
        warming: app.started.elapsed() < ttl,
        drain: fleet.drain.into_iter().collect(),
        pools,
        leader: app.leadership.leads(),
        conductors,
        store_health: Some(store_status(app.registry.store_health())),
        view_age_ms: app.mirror.away().map_or(0, millis),
        settling: app.mirror.settling(),
    }
}

fn store_status(health: StoreHealth) -> StoreStatus {
    let StoreHealth { kind, endpoint, up, last_ok, problem } = health;
    StoreStatus { kind: kind.to_owned(), endpoint, up, last_ok_ms: last_ok.map(millis), problem }
}

/// The conductors on this store. Names may be given twice by mistake, leases are not.
fn conductors(fleet: &Fleet) -> Vec<ConductorStatus> {
    let leading = fleet.leader.as_ref().and_then(|leader| leader.lease);
    let status = |(record, lease): &(ConductorRecord, Option<LeaseId>)| ConductorStatus {
        name: record.name.clone(),
        url: record.url.clone(),
        leader: lease.is_some() && *lease == leading,
    };
    fleet.conductors.values().map(status).collect()
}

async fn register(State(app): AppState, request: Request) -> Response {
    let done = async {
        let request: Register = body(&app, request).await?;
        Ok((StatusCode::CREATED, Json(app.registry.register(request).await?)))
    };
    Answer(done.await).into_response()
}

async fn keep_alive(State(app): AppState, id: PathText, request: Request) -> Response {
    let done = async {
        let worker = name::<WorkerId>(id)?;
        let request: Keepalive = body(&app, request).await?;
        Ok(Json(app.registry.keep_alive(&worker, request).await?))
    };
    Answer(done.await).into_response()
}

async fn deregister(State(app): AppState, id: PathText, RawQuery(query): RawQuery) -> Response {
    let done = async {
        let worker = name::<WorkerId>(id)?;
        let epoch = Epoch(number(query.as_deref(), "epoch")?);
        app.registry.deregister(&worker, epoch).await?;
        Ok(StatusCode::NO_CONTENT)
    };
    Answer(done.await).into_response()
}

async fn drain(State(app): AppState, id: PathText) -> Response {
    let done = async {
        let worker = name::<WorkerId>(id)?;
        Ok(Json(app.registry.drain(&worker).await?))
    };
    Answer(done.await).into_response()
}

async fn pools(State(app): AppState) -> Response {
    let list = || {
        let fleet = app.mirror.fleet();
        Json(PoolList { revision: fleet.revision, pools: app.pools(&fleet) })
    };
    Answer(app.known().map(|()| list())).into_response()
}

async fn set_replicas(State(app): AppState, pool: PathText, request: Request) -> Response {
    let done = async {
        let pool = name::<PoolName>(pool)?;
        let Replicas { replicas } = body(&app, request).await?;
        app.registry.set_replicas(&pool, replicas).await?;
        pool_status(&app, &pool)
    };
    Answer(done.await).into_response()
}

async fn release_replicas(State(app): AppState, pool: PathText) -> Response {
    let done = async {
        let pool = name::<PoolName>(pool)?;
        app.registry.release_replicas(&pool).await?;
        pool_status(&app, &pool)
    };
    Answer(done.await).into_response()
}

fn pool_status(app: &App, pool: &PoolName) -> Result<Json<PoolStatus>, Refusal> {
    let gone = || Refusal::new(StatusCode::NOT_FOUND, "no_pool", format!("there is no pool {pool}"));
    let mut statuses = app.pools(&app.mirror.fleet()).into_iter();
    statuses.find(|status| status.name == *pool).map(Json).ok_or_else(gone)
}

async fn ready(State(app): AppState) -> Response {
    let done = if app.stop.is_cancelled() {
        Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "the conductor is stopping"))
    } else if !app.mirror.following() {
        Err(app.away())
    } else {
        Ok("ok\n")
    };
    Answer(done).into_response()
}

async fn metrics(State(app): AppState) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], app.metrics.render(&app.mirror, &app.leadership, &app.tally, &app.board))
        .into_response()
}

async fn no_route(request: Request) -> Response {
    let message = format!("there is no {}", request.uri().path().chars().take(200).collect::<String>());
    Answer::<()>(Err(Refusal::new(StatusCode::NOT_FOUND, "no_route", message))).into_response()
}

async fn no_method(request: Request) -> Response {
    let message =
        format!("{} is not for this path", request.method().as_str().chars().take(20).collect::<String>());
    Answer::<()>(Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "no_method", message))).into_response()
}

async fn watch(State(app): AppState, RawQuery(query): RawQuery) -> Response {
    let query = query.as_deref().unwrap_or_default();
    let (since, metadata) = match query.strip_suffix(NO_METADATA).and_then(|rest| rest.strip_suffix('&')) {
        Some(rest) => (rest, false),
        None => (query, true),
    };
    let since = number(Some(since), "since");
    // A client that comes from another conductor may have seen more than this one has.
    if let Ok(since) = since {
        app.mirror.shows(since, AHEAD_PATIENCE).await;
    }
    let done = since.and_then(|since| {
        app.known()?;
        let (instance, current) = app.mirror.position();
        if since > current {
            let message =
                format!("revision {since} has not happened here, this store is at {current}: list again");
            return Err(Refusal::invalid("future_revision", message));
        }
        let kind = HeaderValue::from_static("application/x-ndjson");
        let watcher = Watcher::new(&app, instance, since, metadata);
        let lines = stream::unfold(watcher, |mut watcher| async move {
            watcher.next().await.map(|line| (Ok::<Bytes, std::convert::Infallible>(line), watcher))
        });
        Ok(([(header::CONTENT_TYPE, kind)], Body::from_stream(lines)))
    });
    Answer(done).into_response()
}

/// One client's place in the history.
struct Watcher {
    mirror: Arc<Mirror>,
    head: watch::Receiver<Revision>,
    stop: CancellationToken,
    instance: String,
    since: Revision,
    metadata: bool,
    beat_at: Instant,
    ended: bool,
    open: IntGauge,
}

impl Watcher {
    fn new(app: &App, instance: String, since: Revision, metadata: bool) -> Self {
        let open = app.metrics.watches();
        open.inc();
        let mirror = app.mirror.clone();
        Self {
            head: mirror.head(),
            instance,
            mirror,
            stop: app.stop.clone(),
            since,
            metadata,
            beat_at: Instant::now(),
            ended: false,
            open,
        }
    }

    /// The next bytes to send: the lines there are, or a heartbeat when it is time; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.ended || self.stop.is_cancelled() {
                return None;
            }
            self.head.borrow_and_update();
            // The first line is a heartbeat: the client learns at once whose history this is.
            if Instant::now() >= self.beat_at {
                return Some(self.beat());
            }
            match self.mirror.lines(self.since, WATCH_CHUNK, self.metadata) {
                Err(forgotten) => {
                    self.ended = true;
                    return Some(encode_line(&WatchLine::Compacted { revision: forgotten.revision }));
                }
                Ok((lines, upto)) => {
                    self.since = upto;
                    match <[Bytes; 1]>::try_from(lines) {
                        Ok([line]) => return Some(line),
                        Err(lines) if !lines.is_empty() => return Some(lines.concat().into()),
                        Err(_) => {}
                    }
                }
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return None,
                changed = self.head.changed() => changed.ok()?,
                () = tokio::time::sleep_until(self.beat_at) => {}
            }
        }
    }

    fn beat(&mut self) -> Bytes {
        self.beat_at = Instant::now() + Duration::from_millis(HEARTBEAT_INTERVAL_MS);
        encode_line(&WatchLine::Heartbeat {
            instance: self.instance.clone(),
            revision: self.since,
            view_age_ms: self.mirror.away().map_or(0, millis),
            settling: self.mirror.settling(),
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.open.dec();
    }
}

/// Reads a whole body as JSON, within the limits of size and time.
async fn body<T: DeserializeOwned>(app: &App, request: Request) -> Result<T, Refusal> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let essence = kind.map(|kind| kind.split(';').next().unwrap_or(kind).trim());
    if !essence.is_some_and(|kind| kind.eq_ignore_ascii_case("application/json")) {
        let message = format!(
            "the body must come with content-type: application/json, not {}",
            match essence {
                Some(kind) => kind.chars().take(100).collect::<String>(),
                None => "without one".to_owned(),
            }
        );
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    let limit = app.limits.body_timeout;
    let too_large = || {
        let message = format!("the body has more than {BODY_MAX_BYTES} bytes");
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let declared =
        request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > BODY_MAX_BYTES as u64) {
        return Err(too_large());
    }
    let read = axum::body::to_bytes(request.into_body(), BODY_MAX_BYTES);
    let bytes = match tokio::time::timeout(limit, read).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) if is_limit(&error) => return Err(too_large()),
        Ok(Err(error)) => {
            return Err(Refusal::invalid("invalid_body", format!("the body broke off: {error}")));
        }
        Err(_) => {
            let message = format!("the body did not come within {limit:?}");
            return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message));
        }
    };
    serde_json::from_slice(&bytes).map_err(|error| {
        Refusal::invalid("invalid_body", format!("the body is not the JSON asked for: {error}"))
    })
}

fn is_limit(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<http_body_util::LengthLimitError>())
}

fn name<T: TryFrom<String, Error = baton_config::NameError>>(text: PathText) -> Result<T, Refusal> {
    let Path(text) = text.map_err(|error| Refusal::invalid("invalid_name", error.body_text()))?;
    T::try_from(text).map_err(|error| Refusal::invalid("invalid_name", error.to_string()))
}

/// The one number a query must hold, under `key`.
fn number(query: Option<&str>, key: &str) -> Result<u64, Refusal> {
    let wrong = || Refusal::invalid("invalid_query", format!("the query must be ?{key}=NUMBER"));
    let value = query.and_then(|q| q.strip_prefix(key)?.strip_prefix('=')).ok_or_else(wrong)?;
    if !value.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    value.parse().map_err(|_| wrong())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
