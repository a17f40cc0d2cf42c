//! The ways from prefill workers to one decode worker: what was measured on them, which of them are avoided.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use baton_config::protocol::PathStatus;
use baton_config::{Epoch, WorkerId};
use tokio::time::Instant;

use super::Member;
use super::worker::{Worker, identity};

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
    /// By the number of the prefill worker, in order.
    measured: ArcSwap<Vec<(u64, Link)>>,
    failing: Mutex<HashMap<(WorkerId, Epoch), Failing>>,
    /// Whether any are in `failing`.
    fails: AtomicBool,
}

/// The ways to one decode worker, as they are at one moment.
pub(crate) struct Ways<'a> {
    pairs: &'a Pairs,
    measured: Guard<Arc<Vec<(u64, Link)>>>,
    now: Instant,
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
        let mut measured: Vec<_> = ours.map(|path| (identity(&path.prefill), link(path))).collect();
        measured.sort_unstable_by_key(|(prefill, _)| *prefill);
        self.measured.store(Arc::new(measured));
    }

    /// All of them.
    pub(super) fn ways(&self, now: Instant) -> Ways<'_> {
        Ways { pairs: self, measured: self.measured.load(), now }
    }

    fn is_avoided(&self, prefill: &Member, now: Instant) -> bool {
        if !self.fails.load(Ordering::Relaxed) {
            return false;
        }
        let all = self.failing();
        let failing = all.get(&(prefill.worker.clone(), prefill.epoch));
        failing.and_then(|failing| failing.until).is_some_and(|until| now < until)
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

impl Ways<'_> {
    /// The way from `prefill`; `None` while it is avoided.
    pub(crate) fn link(&self, prefill: &Worker) -> Option<Link> {
        if self.pairs.is_avoided(&prefill.member, self.now) {
            return None;
        }
        let at = self.measured.binary_search_by_key(&prefill.identity(), |(known, _)| *known);
        Some(at.map_or_else(|_| Link::default(), |at| self.measured[at].1))
    }
}
