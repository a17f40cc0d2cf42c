//! What a sidecar exports to Prometheus. Every series exists from the start, with 0.

use prometheus::{Encoder, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

use super::gauges::Gauges;

/// The metrics of one sidecar.
#[derive(Debug, Clone)]
pub(super) struct Metrics {
    registry: Registry,
    up: IntGauge,
    running: IntGauge,
    waiting: IntGauge,
    looks: IntCounterVec,
    canaries: IntCounterVec,
}

impl Metrics {
    pub(super) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let counters = |name: &str, help: &str| {
            let counters = IntCounterVec::new(Opts::new(name, help), &["result"])?;
            registry.register(Box::new(counters.clone()))?;
            for result in ["ok", "failed"] {
                counters.with_label_values(&[result]);
            }
            Ok::<_, prometheus::Error>(counters)
        };
        Ok(Self {
            up: gauge("baton_agent_server_up", "1 while the server beside this worker is well")?,
            running: gauge("baton_agent_requests_running", "requests the server says it works on")?,
            waiting: gauge("baton_agent_requests_waiting", "requests the server says are waiting for room")?,
            looks: counters("baton_agent_server_looks_total", "looks at the health of the server")?,
            canaries: counters(
                "baton_agent_server_canaries_total",
                "requests for one token sent because the server's requests made no progress",
            )?,
            registry: registry.clone(),
        })
    }

    pub(super) fn looked(&self, well: bool) {
        self.looks.with_label_values(&[result(well)]).inc();
    }

    pub(super) fn canary(&self, well: bool) {
        self.canaries.with_label_values(&[result(well)]).inc();
    }

    pub(super) fn set(&self, up: bool, gauges: Option<Gauges>) {
        let Gauges { running, waiting, .. } = gauges.unwrap_or_default();
        self.up.set(i64::from(up));
        self.running.set(i64::from(running));
        self.waiting.set(i64::from(waiting));
    }

    pub(super) fn text(&self) -> String {
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

fn result(well: bool) -> &'static str {
    if well { "ok" } else { "failed" }
}
