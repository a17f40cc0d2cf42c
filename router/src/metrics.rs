//! The router's metrics: names are a contract with dashboards, all exported from the start.

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

use crate::admit::Reason;
use crate::reply::Outcome;
use crate::routes::Route;
use crate::tenant::Denied;

/// Upper bounds of the latency histograms, in seconds.
const LATENCY_BOUNDS_S: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Handles of every metric of one router.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    ended: IntCounterVec,
    pub(crate) started: IntCounter,
    pub(crate) in_flight: IntGauge,
    pub(crate) queue_depth: IntGauge,
    pub(crate) connections: IntGauge,
    rejected: IntCounterVec,
    denied: IntCounterVec,
    /// 1 while a file of keys that changed cannot be used.
    pub(crate) keys_stale: IntGauge,
    jwks_fetches: IntCounterVec,
    pub(crate) jwks_keys: IntGauge,
    pub(crate) jwks_age: Gauge,
    tenant_ended: IntCounterVec,
    tenant_tokens: IntCounterVec,
    pub(crate) ttft: Histogram,
    pub(crate) itl: Histogram,
    migrations: IntCounterVec,
    pub(crate) view_age: Gauge,
    pub(crate) index_blocks: IntGauge,
    pub(crate) index_bytes: IntGauge,
    pub(crate) index_gaps: IntCounter,
    pub(crate) predicted_cached: IntCounter,
    pub(crate) pair_trips: IntCounter,
    pub(crate) barred: IntCounter,
    disagg: IntCounterVec,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) completion_tokens: IntCounter,
    pub(crate) prefill_failures: IntCounter,
    pub(crate) fallbacks: IntCounter,
}

/// Why a stream moved to another worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MoveReason {
    /// The connection broke.
    Connection,
    /// No token for too long.
    Timeout,
    /// The worker said it cannot go on.
    Worker,
    /// The worker sent something that is not the protocol.
    Protocol,
}

impl MoveReason {
    const ALL: [Self; 4] = [Self::Connection, Self::Timeout, Self::Worker, Self::Protocol];

    /// The label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Timeout => "timeout",
            Self::Worker => "worker",
            Self::Protocol => "protocol",
        }
    }
}

/// Collects constructors so that a metric that cannot be registered is one error at start.
struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn add<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> prometheus::Result<C> {
        let collector = made?;
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::new(name, help))
    }

    fn latency(&self, name: &str, help: &str) -> prometheus::Result<Histogram> {
        let opts = HistogramOpts::new(name, help).buckets(LATENCY_BOUNDS_S.to_vec());
        self.add(Histogram::with_opts(opts))
    }
}

impl Metrics {
    /// Registers everything and sets the known label values to zero.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let make = Maker(&registry);
        let metrics = Self {
            requests: make.counters(
                "baton_router_requests_total",
                "Requests ended, by route and status code (499: the client left).",
                &["route", "code"],
            )?,
            ended: make.counters(
                "baton_router_requests_ended_total",
                "Requests ended, by who is to blame: ok, client_error, refused, failed.",
                &["outcome"],
            )?,
            started: make.counter("baton_router_requests_started_total", "Requests begun.")?,
            in_flight: make.gauge("baton_router_inflight", "Requests begun and not ended.")?,
            queue_depth: make.gauge("baton_router_queue_depth", "Requests waiting for a place.")?,
            connections: make.gauge("baton_router_connections", "Client connections open.")?,
            rejected: make.counters(
                "baton_router_rejected_total",
                "Requests turned away, by reason.",
                &["reason"],
            )?,
            denied: make.counters(
                "baton_router_auth_denied_total",
                "Requests without a good key or token, by reason.",
                &["reason"],
            )?,
            keys_stale: make.gauge(
                "baton_router_keys_stale",
                "1 while the file of keys cannot be used and the old keys are kept.",
            )?,
            jwks_fetches: make.counters(
                "baton_router_jwks_fetches_total",
                "Fetches of the keys of the identity provider, by result: ok, failed.",
                &["result"],
            )?,
            jwks_keys: make.gauge(
                "baton_router_jwks_keys",
                "Keys of the identity provider that tokens may be signed with.",
            )?,
            jwks_age: make.add(Gauge::new(
                "baton_router_jwks_age_seconds",
                "Time since the keys of the identity provider were fetched, where they are.",
            ))?,
            tenant_ended: make.counters(
                "baton_router_tenant_requests_total",
                "Requests ended, by tenant of the file of keys and by who is to blame.",
                &["tenant", "outcome"],
            )?,
            tenant_tokens: make.counters(
                "baton_router_tenant_tokens_total",
                "Tokens of prompts and answers, by tenant of the file of keys.",
                &["tenant"],
            )?,
            ttft: make.latency(
                "baton_router_ttft_seconds",
                "From the request's head to the first token, per choice.",
            )?,
            itl: make.latency("baton_router_itl_seconds", "Between two tokens of a stream.")?,
            migrations: make.counters(
                "baton_router_migrations_total",
                "Streams whose worker was lost, by reason and result.",
                &["reason", "result"],
            )?,
            view_age: make
                .add(Gauge::new("baton_router_view_age_seconds", "Age of the cached view of the fleet."))?,
            disagg: make.counters(
                "baton_router_disagg_total",
                "Dispatches, by where the prompt is prefilled: disaggregated or local.",
                &["decision"],
            )?,
            prompt_tokens: make.counter("baton_router_prompt_tokens_total", "Prompt tokens dispatched.")?,
            completion_tokens: make.counter("baton_router_completion_tokens_total", "Tokens generated.")?,
            prefill_failures: make.counter(
                "baton_router_prefill_call_failures_total",
                "Calls to prefill workers that failed; the decode worker then prefills.",
            )?,
            fallbacks: make.counter(
                "baton_router_handoff_fallbacks_total",
                "Handoffs given up by the decode worker, which then prefilled itself.",
            )?,
            index_blocks: make.gauge("baton_router_index_blocks", "Blocks in the prefix index.")?,
            index_bytes: make.gauge("baton_router_index_bytes", "Bytes of the prefix index.")?,
            index_gaps: make.counter("baton_router_index_gaps_total", "Gaps seen in KV event streams.")?,
            predicted_cached: make.counter(
                "baton_router_predicted_cached_tokens_total",
                "Prompt tokens dispatched to workers that were taken to have them cached.",
            )?,
            pair_trips: make.counter(
                "baton_router_pair_breaks_total",
                "Pairs of workers between which handoffs failed and that are avoided for a while.",
            )?,
            barred: make.counter(
                "baton_router_barred_total",
                "Requests refused because two workers had died with them.",
            )?,
            registry: registry.clone(),
        };
        metrics.set_labels();
        Ok(metrics)
    }

    fn set_labels(&self) {
        for route in Route::all() {
            self.requests.with_label_values(&[route.label(), "200"]);
        }
        for outcome in [Outcome::Ok, Outcome::ClientError, Outcome::Refused, Outcome::Failed] {
            self.ended.with_label_values(&[outcome_label(outcome)]);
        }
        for reason in Reason::ALL.map(Reason::label).into_iter().chain(["workers_busy", "no_worker"]) {
            self.rejected.with_label_values(&[reason]);
        }
        for denied in Denied::ALL {
            self.denied.with_label_values(&[denied.label()]);
        }
        for result in ["ok", "failed"] {
            self.jwks_fetches.with_label_values(&[result]);
        }
        for reason in MoveReason::ALL {
            for result in ["moved", "lost"] {
                self.migrations.with_label_values(&[reason.label(), result]);
            }
        }
        for decision in ["disaggregated", "local"] {
            self.disagg.with_label_values(&[decision]);
        }
    }

    /// Books the end of a request.
    pub(crate) fn request_ended(&self, route: Route, code: u16, outcome: Outcome) {
        self.requests.with_label_values(&[route.label(), code_label(code)]).inc();
        self.ended.with_label_values(&[outcome_label(outcome)]).inc();
    }

    /// Books a request that was turned away.
    pub(crate) fn rejected(&self, reason: &'static str) {
        self.rejected.with_label_values(&[reason]).inc();
    }

    /// Books a request without a good key.
    pub(crate) fn denied(&self, denied: Denied) {
        self.denied.with_label_values(&[denied.label()]).inc();
    }

    /// Books a fetch of the keys of the identity provider.
    pub(crate) fn jwks_fetched(&self, well: bool) {
        self.jwks_fetches.with_label_values(&[if well { "ok" } else { "failed" }]).inc();
    }

    /// Books the end of a request of a tenant; `label` comes from the file of keys.
    pub(crate) fn tenant_ended(&self, label: &str, outcome: Outcome) {
        self.tenant_ended.with_label_values(&[label, outcome_label(outcome)]).inc();
    }

    /// Books tokens of a tenant; `label` comes from the file of keys.
    pub(crate) fn tenant_tokens(&self, label: &str, tokens: u64) {
        self.tenant_tokens.with_label_values(&[label]).inc_by(tokens);
    }

    /// Books a stream whose worker was lost.
    pub(crate) fn migrated(&self, reason: MoveReason, moved: bool) {
        let result = if moved { "moved" } else { "lost" };
        self.migrations.with_label_values(&[reason.label(), result]).inc();
    }

    /// Books one dispatch.
    pub(crate) fn dispatched(&self, decision: &'static str) {
        self.disagg.with_label_values(&[decision]).inc();
    }

    /// The text exposition format.
    pub(crate) fn render(&self) -> String {
        let mut out = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut out) {
            Ok(()) => String::from_utf8_lossy(&out).into_owned(),
            Err(error) => {
                tracing::error!(%error, "metrics could not be rendered");
                String::new()
            }
        }
    }
}

fn outcome_label(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Ok => "ok",
        Outcome::ClientError => "client_error",
        Outcome::Refused => "refused",
        Outcome::Failed => "failed",
    }
}

/// Codes this router answers with; anything else would be a label without bound.
fn code_label(code: u16) -> &'static str {
    match code {
        200 => "200",
        400 => "400",
        401 => "401",
        403 => "403",
        404 => "404",
        405 => "405",
        408 => "408",
        413 => "413",
        414 => "414",
        415 => "415",
        429 => "429",
        431 => "431",
        499 => "499",
        500 => "500",
        501 => "501",
        502 => "502",
        503 => "503",
        504 => "504",
        _ => "other",
    }
}
