//! One worker: what the conductor says of it, what it last said of itself, what this router has on it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::prefix::BlockHash;
use baton_config::protocol::{PeerRef, WorkerStatus};
use baton_config::{Epoch, WorkerId};
use http::uri::Authority;
use tokio::time::Instant;

use super::Member;
use super::known::Known;
use super::pairs::{Pairs, Ways};
use super::seen::{Report, Seen};
use crate::dispatch::Lane;

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
    epoch: Epoch,
    identity: u64,
    requests: AtomicU32,
    answered: Mutex<Option<Instant>>,
    prefill_tokens: AtomicU64,
    known: Known,
    pairs: Pairs,
    lane: Lane,
    /// By how much its prefills take longer than predicted, in thousandths.
    slowness: AtomicU32,
    seen: Seen,
}

/// What a decision needs to know of a worker, taken at one moment.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Standing {
    pub(crate) load: WorkerLoad,
    /// Whether it answers and takes requests, as far as is known.
    pub(crate) well: bool,
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
    /// By which factor its prefills take longer than its speed says.
    pub(crate) slowness: f64,
}

/// The same number for the same name, in every life and every router.
pub(super) fn identity(name: &WorkerId) -> u64 {
    BlockHash::root(0).child(&name.as_str().bytes().map(u32::from).collect::<Vec<_>>()).0
}

impl Worker {
    /// A worker just seen for the first time in this life.
    pub(crate) fn new(member: Member) -> Result<Self, http::uri::InvalidUri> {
        let authority = member.address.parse()?;
        let health = Health {
            authority,
            name: member.worker.clone(),
            epoch: member.epoch,
            identity: identity(&member.worker),
            requests: AtomicU32::new(0),
            answered: Mutex::default(),
            prefill_tokens: AtomicU64::new(0),
            known: Known::new(member.kv.as_ref().map(|kv| kv.block_tokens)),
            pairs: Pairs::default(),
            lane: Lane::default(),
            slowness: AtomicU32::new(1000),
            seen: Seen::nothing(),
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

    /// How it is called in this life.
    pub(crate) fn lane(&self) -> &Lane {
        &self.health.lane
    }

    /// Whether new requests should keep away from it for now.
    #[cfg(test)]
    pub(crate) fn is_down(&self, now: Instant) -> bool {
        self.health.seen.is_down(now)
    }

    /// How long its state has not been answered.
    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        self.health.seen.silent_for(now)
    }

    /// Whether it has not answered its state for so long that a stream without progress for `frozen` is lost.
    ///
    /// Half of it suffices: the last answer may be as old as a poll when the worker freezes.
    pub(crate) fn is_suspect(&self, now: Instant, frozen: Duration) -> bool {
        self.silent_for(now) >= frozen / 2
    }

    /// Whether it last said that it is not well. One that says nothing any more says nothing about the server beside it.
    pub(crate) fn is_unhealthy(&self) -> bool {
        self.health.seen.is_unhealthy()
    }

    /// Requests of this router on it.
    pub(crate) fn own_requests(&self) -> u32 {
        self.health.requests.load(Ordering::Relaxed)
    }

    /// Notes that the server beside it began a good answer.
    pub(crate) fn answers(&self, now: Instant) {
        *self.answered() = Some(now);
    }

    /// When the server beside it began a good answer last.
    pub(crate) fn answered(&self) -> MutexGuard<'_, Option<Instant>> {
        self.health.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a connection to it failed.
    pub(crate) fn mark_down(&self, now: Instant) {
        self.health.seen.down(now + DOWN_FOR);
    }

    /// Its load: the last report, corrected by what this router began and ended since.
    #[cfg(test)]
    pub(crate) fn load(&self) -> WorkerLoad {
        self.health.load()
    }

    /// Its load, and whether it is well.
    pub(crate) fn standing(&self, now: Instant, frozen: Duration) -> Standing {
        Standing { load: self.health.load(), well: self.health.seen.is_well(now, frozen / 2) }
    }

    /// Where the prefix index knows it.
    pub(crate) fn known(&self) -> &Known {
        &self.health.known
    }

    /// The ways from prefill workers to this one.
    pub(crate) fn ways(&self, now: Instant) -> Ways<'_> {
        self.health.pairs.ways(now)
    }

    /// A handoff from a prefill worker came to its end, or had to be given up; `true` when the pair is avoided from now.
    pub(crate) fn handed_off(&self, prefill: &Self, well: bool, now: Instant) -> bool {
        self.health.pairs.ended(&prefill.member, well, now)
    }

    /// A prefill that was predicted to take this long took that long, in seconds.
    pub(crate) fn calibrate(&self, predicted_s: f64, actual_s: f64) {
        self.health.calibrate(predicted_s, actual_s);
    }

    /// The same number for the same worker, in every life and every router.
    pub(crate) fn identity(&self) -> u64 {
        self.health.identity
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

/// Weight of a new sample of how wrong predictions are.
const SLOWNESS_WEIGHT: f64 = 0.1;
/// Predictions are corrected by a factor between 1 and this. Below 1, a worker that was tried would be preferred to equal
/// ones that were not.
const SLOWNESS_MAX: f64 = 4.0;
/// Shorter predictions are noise.
const CALIBRATED_FROM_S: f64 = 0.005;

impl Health {
    /// Where the prefix index knows the worker.
    pub(super) fn known(&self) -> &Known {
        &self.known
    }

    fn calibrate(&self, predicted_s: f64, actual_s: f64) {
        if predicted_s < CALIBRATED_FROM_S || !actual_s.is_finite() {
            return;
        }
        let before = f64::from(self.slowness.load(Ordering::Relaxed)) / 1000.0;
        let sample = (actual_s / predicted_s).clamp(1.0, SLOWNESS_MAX);
        // In proportions: half as long and twice as long cancel out.
        let after = before * (sample / before).powf(SLOWNESS_WEIGHT);
        self.slowness.store((after * 1000.0).round() as u32, Ordering::Relaxed);
    }

    fn load(&self) -> WorkerLoad {
        let own_requests = self.requests.load(Ordering::Relaxed);
        let own_tokens = self.prefill_tokens.load(Ordering::Relaxed);
        let slowness = f64::from(self.slowness.load(Ordering::Relaxed)) / 1000.0;
        let Some(report) = self.seen.report() else {
            return WorkerLoad {
                requests: own_requests,
                prefill_tokens: own_tokens,
                slowness,
                ..WorkerLoad::default()
            };
        };
        WorkerLoad {
            requests: own_requests + report.requests,
            prefill_tokens: own_tokens + report.prefill_tokens,
            prefill_tokens_per_s: report.prefill_tokens_per_s,
            itl_ms: report.itl_ms,
            kv_used: report.kv_used,
            slowness,
        }
    }

    /// Takes in an answer to a poll; whether it is of the life that the view tells of.
    pub(super) fn reported(&self, status: WorkerStatus) -> bool {
        let blocks = &status.kv_blocks;
        let live = blocks.total().saturating_sub(blocks.free + blocks.shared);
        let positive = |value: Option<f64>| value.filter(|v| v.is_finite() && *v > 0.0);
        let requests = status.requests_running + status.requests_waiting;
        let tokens = status.prefill_tokens_pending;
        let report = Report {
            requests: requests.saturating_sub(self.requests.load(Ordering::Relaxed)),
            prefill_tokens: tokens.saturating_sub(self.prefill_tokens.load(Ordering::Relaxed)),
            prefill_tokens_per_s: positive(status.prefill_tokens_per_s),
            itl_ms: positive(status.itl_ms),
            kv_used: f64::from(live) / f64::from(blocks.total().max(1)),
        };
        self.pairs.reported(&self.name, &status.paths);
        // One in another life than the view says, or in none yet, refuses what is for this one. It is idle, too, and would be
        // preferred: until the view has caught up, which without a conductor it does not, that is nobody to ask. The first time
        // it may be that it is about to hear of its life.
        let here = status.epoch == Some(self.epoch);
        let elsewhere = !here && self.seen.has_reported();
        let unwilling = elsewhere || matches!(status.state.as_str(), "draining" | "unhealthy");
        let unhealthy = status.state == "unhealthy";
        self.seen.answered(report, unwilling, unhealthy);
        here
    }

    /// Notes that a poll failed.
    pub(super) fn silent(&self, now: Instant) {
        self.seen.silent(now);
    }
}
