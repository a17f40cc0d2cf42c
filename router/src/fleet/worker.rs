//! One worker: what the conductor says of it, what it last said of itself, what this router has on it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::WorkerId;
use baton_config::protocol::{PathStatus, PeerRef, WorkerStatus};
use http::uri::Authority;
use tokio::time::Instant;

use super::Member;

/// How long a worker that refused a connection is avoided, unless it answers its state before.
const DOWN_FOR: Duration = Duration::from_secs(2);

/// A handle of one life of a worker, as the last roster had it.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) member: Member,
    health: Arc<Health>,
}

/// What outlives a change of the worker's record, as long as its life is the same.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) authority: Authority,
    pub(crate) name: WorkerId,
    requests: AtomicU32,
    prefill_tokens: AtomicU64,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    report: Option<Report>,
    /// Set when a connection was refused.
    down_until: Option<Instant>,
    /// First of the polls in a row that failed.
    silent_since: Option<Instant>,
    /// It says itself that it should get no requests: the conductor may not have heard, or be away.
    unwilling: bool,
}

/// A worker's own account, and what this router had on it at that moment.
#[derive(Debug)]
struct Report {
    requests: u32,
    prefill_tokens: u64,
    own_requests: u32,
    own_prefill_tokens: u64,
    prefill_tokens_per_s: Option<f64>,
    itl_ms: Option<f64>,
    kv_used: f64,
    paths: Vec<PathStatus>,
}

/// The load of a worker as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct WorkerLoad {
    /// Requests running and waiting.
    pub(crate) requests: u32,
    /// Prompt tokens queued or being computed.
    pub(crate) prefill_tokens: u64,
    /// Measured prefill speed.
    pub(crate) prefill_tokens_per_s: Option<f64>,
    /// Measured time between tokens.
    pub(crate) itl_ms: Option<f64>,
    /// Share of KV blocks that hold live requests, 0 to 1.
    pub(crate) kv_used: f64,
}

impl Worker {
    /// A worker just seen for the first time in this life.
    pub(crate) fn new(member: Member) -> Result<Self, http::uri::InvalidUri> {
        let authority = member.address.parse()?;
        let health = Health {
            authority,
            name: member.worker.clone(),
            requests: AtomicU32::new(0),
            prefill_tokens: AtomicU64::new(0),
            seen: Mutex::default(),
        };
        Ok(Self { member, health: Arc::new(health) })
    }

    /// The same life with a changed record.
    pub(super) fn updated(&self, member: Member) -> Self {
        Self { member, health: Arc::clone(&self.health) }
    }

    /// Whether `member` is the life of the worker that this handle is for.
    pub(super) fn same_life(&self, member: &Member) -> bool {
        self.member.worker == member.worker
            && self.member.epoch == member.epoch
            && self.member.address == member.address
    }

    /// What outlives changes of the record.
    pub(crate) fn health(&self) -> Arc<Health> {
        Arc::clone(&self.health)
    }

    /// The worker as messages name it.
    pub(crate) fn peer(&self) -> PeerRef {
        PeerRef {
            worker: self.member.worker.clone(),
            epoch: self.member.epoch,
            address: self.member.address.clone(),
        }
    }

    /// Where to call it.
    pub(crate) fn authority(&self) -> &Authority {
        &self.health.authority
    }

    /// Whether new requests should keep away from it for now.
    pub(crate) fn is_down(&self, now: Instant) -> bool {
        let seen = self.health.seen();
        seen.down_until.is_some_and(|until| now < until)
    }

    /// Whether it says that it drains or makes no progress, whatever the view says.
    pub(crate) fn is_unwilling(&self) -> bool {
        self.health.seen().unwilling
    }

    /// How long its state has not been answered.
    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        self.health.seen().silent_since.map_or(Duration::ZERO, |since| now.duration_since(since))
    }

    /// Whether it has not answered its state for so long that a stream without progress for `frozen` is lost.
    ///
    /// Half of it suffices: the last answer may be as old as a poll when the worker freezes.
    pub(crate) fn is_suspect(&self, now: Instant, frozen: Duration) -> bool {
        self.silent_for(now) >= frozen / 2
    }

    /// Notes that a connection to it failed.
    pub(crate) fn mark_down(&self, now: Instant) {
        self.health.seen().down_until = Some(now + DOWN_FOR);
    }

    /// Its load: the last report, corrected by what this router began and ended since.
    pub(crate) fn load(&self) -> WorkerLoad {
        let own_requests = self.health.requests.load(Ordering::Relaxed);
        let own_tokens = self.health.prefill_tokens.load(Ordering::Relaxed);
        let seen = self.health.seen();
        let Some(report) = &seen.report else {
            return WorkerLoad {
                requests: own_requests,
                prefill_tokens: own_tokens,
                ..WorkerLoad::default()
            };
        };
        let others = report.requests.saturating_sub(report.own_requests);
        let other_tokens = report.prefill_tokens.saturating_sub(report.own_prefill_tokens);
        WorkerLoad {
            requests: own_requests + others,
            prefill_tokens: own_tokens + other_tokens,
            prefill_tokens_per_s: report.prefill_tokens_per_s,
            itl_ms: report.itl_ms,
            kv_used: report.kv_used,
        }
    }

    /// The measured bandwidth from a prefill worker to this one, in bytes per second.
    pub(crate) fn bandwidth_from(&self, prefill: &WorkerId) -> Option<f64> {
        let seen = self.health.seen();
        let paths = &seen.report.as_ref()?.paths;
        let path = paths.iter().find(|path| path.prefill == *prefill && path.decode == self.member.worker)?;
        path.gb_per_s.map(|gb| gb * 1e9).filter(|bytes| bytes.is_finite() && *bytes > 0.0)
    }

    /// Books a request on this worker until the guard is dropped.
    pub(crate) fn occupy(&self, prefill_tokens: u32) -> Occupied {
        self.health.requests.fetch_add(1, Ordering::Relaxed);
        self.health.prefill_tokens.fetch_add(u64::from(prefill_tokens), Ordering::Relaxed);
        Occupied { health: Arc::clone(&self.health), prefill_tokens }
    }
}

/// A request of this router on a worker.
#[derive(Debug)]
pub(crate) struct Occupied {
    health: Arc<Health>,
    prefill_tokens: u32,
}

impl Occupied {
    /// Notes that the prompt has been computed.
    pub(crate) fn prefilled(&mut self) {
        let tokens = std::mem::take(&mut self.prefill_tokens);
        self.health.prefill_tokens.fetch_sub(u64::from(tokens), Ordering::Relaxed);
    }
}

impl Drop for Occupied {
    fn drop(&mut self) {
        self.prefilled();
        self.health.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Health {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in an answer to a poll.
    pub(super) fn reported(&self, status: WorkerStatus) {
        let blocks = &status.kv_blocks;
        let live = blocks.total().saturating_sub(blocks.free + blocks.shared);
        let positive = |value: Option<f64>| value.filter(|v| v.is_finite() && *v > 0.0);
        let report = Report {
            requests: status.requests_running + status.requests_waiting,
            prefill_tokens: status.prefill_tokens_pending,
            own_requests: self.requests.load(Ordering::Relaxed),
            own_prefill_tokens: self.prefill_tokens.load(Ordering::Relaxed),
            prefill_tokens_per_s: positive(status.prefill_tokens_per_s),
            itl_ms: positive(status.itl_ms),
            kv_used: f64::from(live) / f64::from(blocks.total().max(1)),
            paths: status.paths,
        };
        let unwilling = matches!(status.state.as_str(), "draining" | "unhealthy");
        let mut seen = self.seen();
        *seen = Seen { report: Some(report), down_until: None, silent_since: None, unwilling };
    }

    /// Notes that a poll failed.
    pub(super) fn silent(&self, now: Instant) {
        self.seen().silent_since.get_or_insert(now);
    }
}
