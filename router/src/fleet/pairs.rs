//! The ways from prefill workers to one decode worker: what was measured on them, which of them are avoided.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use baton_config::protocol::PathStatus;
use baton_config::{Epoch, WorkerId};
use tokio::time::Instant;

use super::Member;

/// How long a pair is avoided whose handoffs failed.
const AVOIDED_FOR: Duration = Duration::from_secs(30);
/// Handoffs that fail in a row before a pair is avoided: one may have met a worker that was just restarted.
const FAILURES: u32 = 2;
/// Pairs with failures that are remembered.
const PAIRS_MAX: usize = 1024;

/// What was measured between two workers.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Link {
    /// Bandwidth in bytes per second.
    pub(crate) bytes_per_s: Option<f64>,
    /// Latency of a small read in seconds.
    pub(crate) latency_s: Option<f64>,
}

/// The pairs of one decode worker. Every decision reads many: without a lock while none of them fails.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    measured: ArcSwap<HashMap<WorkerId, Link>>,
    failing: Mutex<HashMap<(WorkerId, Epoch), Failing>>,
    /// Whether any are in `failing`.
    fails: AtomicBool,
}

#[derive(Debug, Default)]
struct Failing {
    failures: u32,
    until: Option<Instant>,
}

impl Pairs {
    /// Takes in what the decode worker `own` measured.
    pub(super) fn reported(&self, own: &WorkerId, paths: &[PathStatus]) {
        let positive = |value: Option<f64>| value.filter(|value| value.is_finite() && *value > 0.0);
        let link = |path: &PathStatus| Link {
            bytes_per_s: positive(path.gb_per_s).map(|gb| gb * 1e9),
            latency_s: positive(path.latency_us).map(|us| us / 1e6),
        };
        let ours = paths.iter().filter(|path| path.decode == *own);
        let measured = ours.map(|path| (path.prefill.clone(), link(path))).collect();
        self.measured.store(Arc::new(measured));
    }

    /// The way from `prefill`; `None` while it is avoided.
    pub(super) fn link(&self, prefill: &Member, now: Instant) -> Option<Link> {
        if self.fails.load(Ordering::Relaxed) {
            let all = self.failing();
            let failing = all.get(&(prefill.worker.clone(), prefill.epoch));
            if failing.and_then(|failing| failing.until).is_some_and(|until| now < until) {
                return None;
            }
        }
        Some(self.measured.load().get(&prefill.worker).copied().unwrap_or_default())
    }

    /// A handoff ended well or was given up; `true` when the pair is avoided from now on.
    pub(super) fn ended(&self, prefill: &Member, well: bool, now: Instant) -> bool {
        if well && !self.fails.load(Ordering::Relaxed) {
            return false;
        }
        let mut all = self.failing();
        let pair = (prefill.worker.clone(), prefill.epoch);
        if well {
            all.remove(&pair);
            self.fails.store(!all.is_empty(), Ordering::Relaxed);
            return false;
        }
        if all.len() >= PAIRS_MAX {
            all.retain(|_, failing| failing.until.is_some_and(|until| now < until));
        }
        self.fails.store(true, Ordering::Relaxed);
        let failing = all.entry(pair).or_default();
        failing.failures += 1;
        let already = failing.until.is_some_and(|until| now < until);
        if failing.failures < FAILURES || already {
            return false;
        }
        failing.until = Some(now + AVOIDED_FOR);
        true
    }

    fn failing(&self) -> MutexGuard<'_, HashMap<(WorkerId, Epoch), Failing>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
