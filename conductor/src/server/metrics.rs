//! What Prometheus is told. Every series is there from the start, with 0.

use baton_config::Role;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use super::tls::HandshakeFault;
use crate::autoscale::Board;
use crate::leader::Leadership;
use crate::mirror::Mirror;
use crate::reconcile::Tally;
use crate::record::WorkerState;

const ROLES: [Role; 3] = [Role::Prefill, Role::Decode, Role::Both];
/// Codes of refusals; one not listed is counted as `other`.
const CODES: [&str; 21] = [
    "unauthenticated",
    "wrong_token",
    "certificate_required",
    "tls_required",
    "address_not_allowed",
    "invalid_field",
    "invalid_body",
    "unsupported_media_type",
    "invalid_name",
    "invalid_query",
    "body_too_large",
    "body_too_slow",
    "name_taken",
    "stale_epoch",
    "replayed",
    "lease_gone",
    "future_revision",
    "no_worker",
    "no_pool",
    "store_unavailable",
    "other",
];

/// The conductor's metrics; clones share them.
#[derive(Debug, Clone)]
pub(super) struct Metrics {
    registry: Registry,
    workers: IntGaugeVec,
    lease_expired: IntCounterVec,
    store_up: IntGauge,
    desired: IntGaugeVec,
    stale_refused: IntCounterVec,
    refused: IntCounterVec,
    handshakes_failed: IntCounterVec,
    watches: IntGauge,
    revision: IntGauge,
    leader: IntGauge,
    leader_changes: IntCounterVec,
    turns: IntCounterVec,
    turns_failed: IntCounterVec,
    scale_decisions: IntCounterVec,
    scale_errors: IntCounterVec,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| {
            let gauge = IntGauge::new(name, help);
            register(&registry, gauge)
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntGaugeVec::new(Opts::new(name, help), labels))
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let metrics = Self {
            workers: gauges("baton_conductor_workers", "Live workers by role and state.", &["role", "state"]),
            lease_expired: counters(
                "baton_conductor_lease_expired_total",
                "Workers removed because their lease ended without a goodbye.",
                &[],
            ),
            store_up: gauge("baton_conductor_store_up", "1 while the store answers and is followed, else 0."),
            desired: gauges("baton_scale_desired", "Wanted number of workers by pool.", &["pool"]),
            stale_refused: counters(
                "baton_stale_epoch_refused_total",
                "Requests refused because they came from a former life of a worker.",
                &[],
            ),
            refused: counters("baton_conductor_refused_total", "Requests refused, by code.", &["code"]),
            handshakes_failed: counters(
                "baton_conductor_handshakes_failed_total",
                "TLS handshakes that did not come about, by reason.",
                &["reason"],
            ),
            watches: gauge("baton_conductor_watches", "Open watches."),
            leader: gauge("baton_conductor_leader", "1 while this conductor leads the reconcilers, else 0."),
            leader_changes: counters(
                "baton_conductor_leader_changes_total",
                "Changes of the leading conductor that this one saw.",
                &[],
            ),
            turns: counters("baton_conductor_reconciles_total", "Turns of a reconciler.", &["reconciler"]),
            turns_failed: counters(
                "baton_conductor_reconcile_failures_total",
                "Turns of a reconciler that failed or did not end in time.",
                &["reconciler"],
            ),
            scale_decisions: counters(
                "baton_scale_decisions_total",
                "Decisions of the autoscaler made by this conductor, by pool and what they were about.",
                &["pool", "direction"],
            ),
            scale_errors: counters(
                "baton_scale_errors_total",
                "Failed attempts of a scaler to carry a decision out.",
                &["pool"],
            ),
            revision: gauge("baton_conductor_revision", "Latest revision of the store that is served."),
            registry,
        };
        for code in CODES {
            metrics.refused.with_label_values(&[code]).inc_by(0);
        }
        for reason in HandshakeFault::REASONS {
            metrics.handshakes_failed.with_label_values(&[reason]).inc_by(0);
        }
        let none: [&str; 0] = [];
        metrics.lease_expired.with_label_values(&none).inc_by(0);
        metrics.stale_refused.with_label_values(&none).inc_by(0);
        metrics.leader_changes.with_label_values(&none).inc_by(0);
        metrics
    }

    /// Counts a refusal.
    pub(super) fn refused(&self, code: &'static str) {
        let label = if CODES.contains(&code) { code } else { "other" };
        self.refused.with_label_values(&[label]).inc();
        if code == "stale_epoch" {
            let none: [&str; 0] = [];
            self.stale_refused.with_label_values(&none).inc();
        }
    }

    /// Counts a handshake that did not come about; `reason` is one of [`HandshakeFault::REASONS`].
    pub(super) fn handshake_failed(&self, reason: &'static str) {
        self.handshakes_failed.with_label_values(&[reason]).inc();
    }

    /// The gauge of open watches.
    pub(super) fn watches(&self) -> IntGauge {
        self.watches.clone()
    }

    /// The text format, with everything that follows from the mirror brought up to date.
    pub(super) fn render(
        &self,
        mirror: &Mirror,
        leadership: &Leadership,
        tally: &Tally,
        board: &Board,
    ) -> String {
        let fleet = mirror.fleet();
        for (role, state) in ROLES.iter().flat_map(|r| WorkerState::ALL.iter().map(move |s| (r, s))) {
            let count = fleet.workers.values().filter(|w| w.role == *role && w.state == *state).count();
            let gauge = self.workers.with_label_values(&[&role.to_string(), state.as_str()]);
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        for pool in mirror.targets(&fleet) {
            // Decisions of a dry run are there to be looked at, too.
            let told = fleet.scale.get(&pool.name).filter(|seen| seen.scaled.dry_run);
            let desired = told.map_or(pool.desired, |seen| seen.scaled.desired);
            self.desired.with_label_values(&[pool.name.as_str()]).set(i64::from(desired));
        }
        for (pool, entry) in board.entries() {
            for (direction, count) in entry.decisions {
                catch_up(&self.scale_decisions.with_label_values(&[pool.as_str(), direction]), count);
            }
            catch_up(&self.scale_errors.with_label_values(&[pool.as_str()]), entry.errors);
        }
        self.store_up.set(i64::from(mirror.following()));
        self.revision.set(i64::try_from(fleet.revision).unwrap_or(i64::MAX));
        let none: [&str; 0] = [];
        catch_up(&self.lease_expired.with_label_values(&none), mirror.expired());
        self.leader.set(i64::from(leadership.leads()));
        catch_up(&self.leader_changes.with_label_values(&none), leadership.changes());
        for (name, counts) in tally.counts() {
            catch_up(&self.turns.with_label_values(&[name]), counts.turns);
            catch_up(&self.turns_failed.with_label_values(&[name]), counts.failed);
        }
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

/// Brings a counter up to a count that is kept elsewhere.
fn catch_up(counter: &IntCounter, count: u64) {
    counter.inc_by(count.saturating_sub(counter.get()));
}

/// Names and labels are constants of this file, so neither step can fail once a test has seen it pass.
fn register<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    made: prometheus::Result<C>,
) -> C {
    let registered = made.and_then(|metric| registry.register(Box::new(metric.clone())).map(|()| metric));
    match registered {
        Ok(metric) => metric,
        Err(error) => unreachable!("a metric that cannot be: {error}"),
    }
}
