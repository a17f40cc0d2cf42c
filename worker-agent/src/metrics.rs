//! What this worker exports to Prometheus. Every series exists from the start, with 0.

use std::sync::{Arc, Mutex, PoisonError};

use baton_config::protocol::BlockCounts;
use baton_transfer::{BackendKind, ErrorKind, Refusal, Stats};
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

use crate::handoff::GiveUp;
use crate::metadata_cache::CacheCounters;

/// Upper bounds of `baton_transfer_seconds`: a block over shared memory to a long prompt over a slow link.
const TRANSFER_BUCKETS_S: [f64; 12] =
    [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

/// The metrics of one worker.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    blocks: IntGaugeVec,
    /// Handoffs that hold blocks on the prefill side.
    pub leases: IntGauge,
    /// Handoffs whose blocks are being fetched.
    pub imports: IntGauge,
    /// Messages waiting for their request.
    pub parked: IntGauge,
    /// Requests the engine works on.
    pub running: IntGauge,
    /// Requests waiting for room.
    pub waiting: IntGauge,
    /// Measured prefill speed.
    pub prefill_speed: Gauge,
    /// Duration of reads that succeeded.
    pub transfer_seconds: Histogram,
    transfer_bytes: IntCounterVec,
    transfer_errors: IntCounterVec,
    served: TransferCounters,
    /// Blocks that failed their digest.
    pub checksum_mismatch: IntCounter,
    /// Messages for or from another life.
    pub stale_epoch: IntCounter,
    /// Lookups of peers' metadata.
    pub metadata_cache: CacheCounters,
    fallbacks: IntCounterVec,
    requests: IntCounterVec,
    tokens: IntCounterVec,
    /// Audits that found a discrepancy.
    pub audit_failures: IntCounter,
}

/// What the transfer agent counts of its peers, as far as it was taken over.
#[derive(Debug, Clone)]
struct TransferCounters {
    served_bytes: IntCounter,
    refused: IntCounterVec,
    malformed: IntCounter,
    unauthenticated: IntCounter,
    failovers: IntCounter,
    /// What it had counted when that was done last.
    taken: Arc<Mutex<Stats>>,
}

/// How a request ended, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestEnd {
    /// It finished.
    Ok,
    /// The client left or somebody cancelled it.
    Cancelled,
    /// It was refused before it started.
    Refused,
    /// It broke here.
    Failed,
}

impl RequestEnd {
    const ALL: [Self; 4] = [Self::Ok, Self::Cancelled, Self::Refused, Self::Failed];

    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// The kinds of request, as metric labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// `POST /v1/generate`.
    Generate,
    /// `POST /v1/prefill`.
    Prefill,
    /// `POST /v1/chat/completions` and `/v1/completions`, of simulated engines.
    Openai,
}

impl RequestKind {
    fn name(self) -> &'static str {
        match self {
            Self::Generate => "generate",
            Self::Prefill => "prefill",
            Self::Openai => "openai",
        }
    }
}

/// Whose tokens, as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Prompt tokens computed here.
    Computed,
    /// Prompt tokens found in the prefix cache.
    Cached,
    /// Prompt tokens whose KV came from a peer.
    Imported,
    /// Tokens generated.
    Generated,
}

impl TokenKind {
    const ALL: [Self; 4] = [Self::Computed, Self::Cached, Self::Imported, Self::Generated];

    fn name(self) -> &'static str {
        match self {
            Self::Computed => "computed",
            Self::Cached => "cached",
            Self::Imported => "imported",
            Self::Generated => "generated",
        }
    }
}

impl Metrics {
    /// All series, with 0.
    ///
    /// # Errors
    /// When two metrics have one name: a bug.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let make = Maker(&registry);
        let metrics = Self {
            blocks: make.gauges("agent_blocks", "KV blocks by state", "state")?,
            leases: make.gauge("agent_leases", "handoffs holding blocks for a decode worker")?,
            imports: make.gauge("agent_imports", "handoffs whose blocks are being fetched")?,
            parked: make.gauge("agent_parked_messages", "handoff messages waiting for their request")?,
            running: make.gauge("agent_requests_running", "requests the engine works on")?,
            waiting: make.gauge("agent_requests_waiting", "requests waiting for room")?,
            prefill_speed: make.real("agent_prefill_tokens_per_second", "decaying mean, 0 before any")?,
            transfer_seconds: make.histogram("transfer_seconds", "duration of reads of KV blocks")?,
            transfer_bytes: make.counters("transfer_bytes_total", "bytes of KV read", &["backend"])?,
            transfer_errors: make.counters("transfer_errors_total", "reads that failed", &["kind"])?,
            served: TransferCounters {
                served_bytes: make.counter(
                    "transfer_served_bytes_total",
                    "bytes of KV sent to peers, but those they take over shm or cma",
                )?,
                refused: make.counters(
                    "transfer_refused_total",
                    "sessions and requests of peers that were refused",
                    &["reason"],
                )?,
                malformed: make.counter(
                    "transfer_malformed_total",
                    "connections that broke the protocol, and metadata and requests that made no sense",
                )?,
                unauthenticated: make.counter(
                    "transfer_unauthenticated_total",
                    "connections, frames and requests without the shared token",
                )?,
                failovers: make
                    .counter("transfer_failovers_total", "reads and writes that went on over another path")?,
                taken: Arc::default(),
            },
            checksum_mismatch: make
                .counter("transfer_checksum_mismatch_total", "blocks whose bytes failed their digest")?,
            stale_epoch: make.counter("stale_epoch_refused_total", "messages of another life refused")?,
            metadata_cache: CacheCounters {
                hits: make
                    .counter("metadata_cache_hits_total", "lookups of a peer's metadata it was kept for")?,
                misses: make.counter("metadata_cache_misses_total", "lookups for which it was decoded")?,
                invalidations: make.counter(
                    "metadata_cache_invalidations_total",
                    "entries dropped because the peer left or began another life",
                )?,
            },
            fallbacks: make.counters(
                "agent_local_prefill_total",
                "prompts prefilled here that another worker was to prefill",
                &["reason"],
            )?,
            requests: make.counters("agent_requests_total", "requests that ended", &["kind", "end"])?,
            tokens: make.counters("agent_tokens_total", "tokens by what was done with them", &["kind"])?,
            audit_failures: make.counter("agent_audit_failures_total", "audits that found a discrepancy")?,
            registry: registry.clone(),
        };
        metrics.set_blocks(&BlockCounts::default());
        for backend in BackendKind::ALL {
            metrics.transfer_bytes(backend, 0);
        }
        for kind in ErrorKind::ALL {
            metrics.transfer_errors.with_label_values(&[kind.as_str()]);
        }
        for reason in Refusal::ALL {
            metrics.served.refused.with_label_values(&[reason.as_str()]);
        }
        for why in GiveUp::ALL {
            metrics.fallbacks.with_label_values(&[why.name()]);
        }
        for end in RequestEnd::ALL {
            for kind in [RequestKind::Generate, RequestKind::Prefill, RequestKind::Openai] {
                metrics.requests.with_label_values(&[kind.name(), end.name()]);
            }
        }
        for kind in TokenKind::ALL {
            metrics.tokens(kind, 0);
        }
        Ok(metrics)
    }

    /// Sets the gauges of the block states.
    pub fn set_blocks(&self, counts: &BlockCounts) {
        let BlockCounts { free, reserved, filling, valid, shared, quarantined } = *counts;
        for (state, count) in [
            ("free", free),
            ("reserved", reserved),
            ("filling", filling),
            ("valid", valid),
            ("shared", shared),
            ("quarantined", quarantined),
        ] {
            self.blocks.with_label_values(&[state]).set(i64::from(count));
        }
    }

    /// Counts bytes read.
    pub fn transfer_bytes(&self, backend: BackendKind, bytes: u64) {
        self.transfer_bytes.with_label_values(&[backend.as_str()]).inc_by(bytes);
    }

    /// Bytes counted so far.
    pub fn transferred(&self, backend: BackendKind) -> u64 {
        self.transfer_bytes.with_label_values(&[backend.as_str()]).get()
    }

    /// Counts a read that failed.
    pub fn transfer_error(&self, kind: ErrorKind) {
        self.transfer_errors.with_label_values(&[kind.as_str()]).inc();
    }

    /// Takes over what the transfer agent has counted by now.
    pub fn take_transfer(&self, now: &Stats) {
        let TransferCounters { served_bytes, refused, malformed, unauthenticated, failovers, taken } =
            &self.served;
        // Held until all of it is taken over: two that ask at once count nothing twice.
        let mut before = taken.lock().unwrap_or_else(PoisonError::into_inner);
        let add = |counter: &IntCounter, of: &dyn Fn(&Stats) -> u64| {
            counter.inc_by(of(now).saturating_sub(of(&before)));
        };
        add(served_bytes, &|stats| stats.served_bytes().0);
        add(malformed, &|stats| stats.malformed);
        add(unauthenticated, &|stats| stats.auth_refused);
        add(failovers, &|stats| stats.path_failovers);
        add(&self.stale_epoch, &|stats| stats.stale_refused);
        for reason in Refusal::ALL {
            let counter = refused.with_label_values(&[reason.as_str()]);
            add(&counter, &|stats| stats.refused(reason));
        }
        *before = *now;
    }

    /// Counts a handoff given up.
    pub fn fallback(&self, why: GiveUp) {
        self.fallbacks.with_label_values(&[why.name()]).inc();
    }

    /// Counts a request that ended.
    pub fn request(&self, kind: RequestKind, end: RequestEnd) {
        self.requests.with_label_values(&[kind.name(), end.name()]).inc();
    }

    /// Counts tokens.
    pub fn tokens(&self, kind: TokenKind, count: u64) {
        self.tokens.with_label_values(&[kind.name()]).inc_by(count);
    }

    /// The text Prometheus scrapes.
    pub fn text(&self) -> String {
        let mut out = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut out) {
            Ok(()) => String::from_utf8_lossy(&out).into_owned(),
            Err(error) => {
                tracing::error!(%error, "metrics could not be written");
                String::new()
            }
        }
    }
}

struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn opts(name: &str, help: &str) -> Opts {
        Opts::new(format!("baton_{name}"), help)
    }

    fn register<M: prometheus::core::Collector + Clone + 'static>(&self, metric: M) -> prometheus::Result<M> {
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.register(IntGauge::with_opts(Self::opts(name, help))?)
    }

    fn real(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        self.register(Gauge::with_opts(Self::opts(name, help))?)
    }

    fn gauges(&self, name: &str, help: &str, label: &str) -> prometheus::Result<IntGaugeVec> {
        self.register(IntGaugeVec::new(Self::opts(name, help), &[label])?)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.register(IntCounter::with_opts(Self::opts(name, help))?)
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.register(IntCounterVec::new(Self::opts(name, help), labels)?)
    }

    fn histogram(&self, name: &str, help: &str) -> prometheus::Result<Histogram> {
        let opts =
            HistogramOpts { common_opts: Self::opts(name, help), buckets: TRANSFER_BUCKETS_S.to_vec() };
        self.register(Histogram::with_opts(opts)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stranger at the transfer agent's door shows, once each.
    #[tokio::test]
    async fn what_the_transfer_agent_refuses_is_exported_once() {
        use tokio::io::AsyncWriteExt;

        let mut options = baton_transfer::AgentOptions::new("p-0".parse().unwrap());
        options.backends = vec![BackendKind::Tcp];
        let agent = baton_transfer::Agent::start(options).await.unwrap();
        let metrics = Metrics::new().unwrap();
        let shows = |line: &str| metrics.text().lines().any(|found| found == line);
        for strangers in 1..=2 {
            let mut stranger = tokio::net::TcpStream::connect(agent.local_address()).await.unwrap();
            stranger.write_all(&[b'x'; 64]).await.unwrap();
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while agent.stats().malformed < strangers {
                assert!(std::time::Instant::now() < deadline, "nobody noticed it");
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            for _ in 0..2 {
                metrics.take_transfer(&agent.stats());
            }
            assert!(shows(&format!("baton_transfer_malformed_total {strangers}")), "{}", metrics.text());
        }
        metrics.stale_epoch.inc();
        metrics.take_transfer(&agent.stats());
        assert!(shows("baton_stale_epoch_refused_total 1"), "what is counted elsewhere stays");
    }

    #[test]
    fn every_series_is_there_before_anything_happened() {
        let text = Metrics::new().unwrap().text();
        for line in [
            "baton_agent_blocks{state=\"quarantined\"} 0",
            "baton_agent_leases 0",
            "baton_transfer_seconds_count 0",
            "baton_transfer_bytes_total{backend=\"shm\"} 0",
            "baton_transfer_errors_total{kind=\"integrity\"} 0",
            "baton_transfer_refused_total{reason=\"outside_grant\"} 0",
            "baton_transfer_malformed_total 0",
            "baton_transfer_unauthenticated_total 0",
            "baton_transfer_failovers_total 0",
            "baton_transfer_served_bytes_total 0",
            "baton_transfer_checksum_mismatch_total 0",
            "baton_stale_epoch_refused_total 0",
            "baton_agent_local_prefill_total{reason=\"stalled\"} 0",
            "baton_agent_requests_total{end=\"ok\",kind=\"prefill\"} 0",
            "baton_agent_requests_total{end=\"cancelled\",kind=\"openai\"} 0",
            "baton_agent_tokens_total{kind=\"imported\"} 0",
            "baton_agent_audit_failures_total 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}
