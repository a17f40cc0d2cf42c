//! List, then watch, for ever: the state machine that keeps a view of the fleet. No I/O, no clock.
//!
//! ```text
//! Listing ──listed──► Opening ──opened──► Watching ──line──► Watching
//!    ▲                  │  ▲                 │ silence of 3 s, end, error: next endpoint, back off, resume
//!    │ other instance,  │  └─────────────────┘
//!    └─ compacted ──────┴──(any failure: next endpoint, back off, then the same again)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use baton_config::{PoolName, WorkerId};
use tokio::time::Instant;

use super::view::{Contact, View};
use crate::api::{Change, Listing, PoolTarget, WatchLine};
use crate::dice::{Backoff, Dice};
use crate::record::WorkerRecord;

/// What the driver does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Fetch the whole fleet.
    List { endpoint: usize },
    /// Open a watch.
    Watch { endpoint: usize, since: u64 },
    /// Take the next line of the open watch, or call `tick` at `until`.
    Read { until: Instant },
    /// Call `step` again at `until`.
    Wait { until: Instant },
}

/// Why a listing or a watch did not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// No answer, a broken stream, or an answer that makes no sense: try elsewhere, resume.
    Away,
    /// The conductor can't serve that revision: list again.
    Revision,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    List,
    Watch,
}

#[derive(Debug)]
enum Phase {
    Calling(Goal),
    Watching { progress_deadline: Instant },
    Backoff { until: Instant, then: Goal },
}

/// Times of the follower.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    /// A watch silent for so long is dead.
    pub(crate) progress_timeout: Duration,
    pub(crate) backoff: Backoff,
}

/// The state machine; the driver does what [`Follower::step`] says and reports back.
#[derive(Debug)]
pub(crate) struct Follower {
    endpoints: usize,
    endpoint: usize,
    failures: u32,
    timing: Timing,
    dice: Dice,
    phase: Phase,
    instance: String,
    revision: u64,
    workers: BTreeMap<WorkerId, Arc<WorkerRecord>>,
    drain: BTreeSet<WorkerId>,
    pools: BTreeMap<PoolName, PoolTarget>,
    /// Workers known only from another instance of the store, or from before it was away, until they register anew or
    /// this moment.
    carried: BTreeMap<WorkerId, Instant>,
    ttl: Duration,
    /// Until then, a lease that ended says nothing about its worker: the store was away for too long.
    doubt_until: Option<Instant>,
    /// For how long the conductor has not been sure of its store.
    store_away: Duration,
    stale: bool,
    changed: bool,
    contact: Arc<Contact>,
}

impl Follower {
    pub(crate) fn new(endpoints: usize, timing: Timing, dice: Dice, contact: Arc<Contact>) -> Self {
        assert!(endpoints > 0, "a follower needs an endpoint");
        Self {
            endpoints,
            endpoint: 0,
            failures: 0,
            timing,
            dice,
            phase: Phase::Calling(Goal::List),
            instance: String::new(),
            revision: 0,
            workers: BTreeMap::new(),
            drain: BTreeSet::new(),
            pools: BTreeMap::new(),
            carried: BTreeMap::new(),
            ttl: Duration::ZERO,
            doubt_until: None,
            store_away: Duration::ZERO,
            stale: true,
            changed: false,
            contact,
        }
    }

    pub(crate) fn step(&mut self, now: Instant) -> Step {
        if let Phase::Backoff { until, then } = self.phase {
            if now < until {
                return Step::Wait { until };
            }
            self.phase = Phase::Calling(then);
        }
        match self.phase {
            Phase::Calling(Goal::List) => Step::List { endpoint: self.endpoint },
            Phase::Calling(Goal::Watch) => Step::Watch { endpoint: self.endpoint, since: self.revision },
            Phase::Watching { progress_deadline } => {
                let carry = self.carried.values().min().copied();
                Step::Read { until: carry.map_or(progress_deadline, |at| at.min(progress_deadline)) }
            }
            Phase::Backoff { until, .. } => Step::Wait { until },
        }
    }

    /// The answer to [`Step::List`].
    pub(crate) fn listed(&mut self, now: Instant, listing: Listing) {
        self.ttl = Duration::from_millis(listing.ttl_ms);
        self.store_says(now, listing.view_age_ms, listing.settling);
        let same = listing.instance == self.instance && listing.revision >= self.revision;
        let believed = same && !self.doubts(now);
        let mut old = std::mem::take(&mut self.workers);
        let carried = std::mem::take(&mut self.carried);
        for listed in listing.workers {
            let record = match old.remove(&listed.record.worker) {
                Some(known) if *known == *listed.record => known,
                _ => listed.record,
            };
            self.workers.insert(record.worker.clone(), record);
        }
        // The rest is gone, unless this is a store that cannot know: there they have one ttl to register anew.
        for (name, record) in old {
            let deadline = if believed { carried.get(&name).copied() } else { Some(now + self.ttl) };
            if let Some(deadline) = deadline {
                self.carried.insert(name.clone(), deadline);
                self.workers.insert(name, record);
            }
        }
        self.drain = listing.drain.into_iter().collect();
        self.pools = listing.pools.into_iter().map(|p| (p.name.clone(), p)).collect();
        self.instance = listing.instance;
        self.revision = listing.revision;
        self.changed = true;
        self.phase = Phase::Calling(Goal::Watch);
        self.heard(now);
    }

    /// The watch of [`Step::Watch`] is open; its lines are still to come.
    pub(crate) fn opened(&mut self, now: Instant) {
        self.phase = Phase::Watching { progress_deadline: now + self.timing.progress_timeout };
    }

    /// A line of the open watch.
    pub(crate) fn line(&mut self, now: Instant, line: WatchLine) {
        match line {
            WatchLine::Heartbeat { instance, .. } if instance != self.instance => {
                self.phase = Phase::Calling(Goal::List);
            }
            WatchLine::Compacted { .. } => self.phase = Phase::Calling(Goal::List),
            WatchLine::Heartbeat { revision, view_age_ms, settling, .. } => {
                self.revision = self.revision.max(revision);
                self.store_says(now, view_age_ms, settling);
                if self.endpoints > 1 && self.store_away >= self.timing.progress_timeout {
                    // Another conductor may reach the store.
                    self.failed(now, Failure::Away);
                    return;
                }
                self.progress(now);
            }
            WatchLine::Changes { revision, changes } => {
                if revision > self.revision {
                    let mut all = true;
                    for change in changes {
                        all &= self.apply(now, change);
                    }
                    self.revision = revision;
                    self.changed = true;
                    if !all {
                        self.phase = Phase::Calling(Goal::List);
                    }
                }
                self.progress(now);
            }
        }
    }

    /// The listing or the watch failed.
    pub(crate) fn failed(&mut self, now: Instant, failure: Failure) {
        let then = match (failure, &self.phase) {
            (Failure::Revision, _) | (_, Phase::Calling(Goal::List)) => Goal::List,
            _ => Goal::Watch,
        };
        if failure == Failure::Away {
            self.endpoint = (self.endpoint + 1) % self.endpoints;
            self.changed |= !self.stale;
            self.stale = true;
        }
        let delay = self.timing.backoff.delay(self.failures, &mut self.dice);
        self.failures = self.failures.saturating_add(1);
        self.phase = Phase::Backoff { until: now + delay, then };
    }

    /// Time passed while reading: notices silence, forgets workers that did not come back.
    pub(crate) fn tick(&mut self, now: Instant) {
        let Phase::Watching { progress_deadline } = self.phase else { return };
        if now >= progress_deadline {
            self.failed(now, Failure::Away);
            return;
        }
        let gone: Vec<WorkerId> =
            self.carried.iter().filter(|(_, at)| **at <= now).map(|(name, _)| name.clone()).collect();
        for name in gone {
            self.carried.remove(&name);
            self.workers.remove(&name);
            self.changed = true;
        }
    }

    /// The new view, if it differs from the last one taken.
    pub(crate) fn take_view(&mut self) -> Option<View> {
        std::mem::take(&mut self.changed).then(|| View {
            revision: self.revision,
            instance: self.instance.clone(),
            workers: Arc::new(self.workers.clone()),
            drain: Arc::new(self.drain.clone()),
            pools: Arc::new(self.pools.clone()),
            stale: self.stale,
            contact: self.contact.clone(),
        })
    }

    /// Takes over one change; false if it is about something never heard of, so that something was missed.
    fn apply(&mut self, now: Instant, change: Change) -> bool {
        match change {
            Change::Put { worker } => {
                self.carried.remove(&worker.worker);
                self.workers.insert(worker.worker.clone(), worker);
            }
            Change::State { worker, epoch, state } => match self.workers.get_mut(&worker) {
                // Older views share the record: it is copied, unless there is no change after all.
                Some(record) if record.epoch == epoch && record.state == state => {}
                Some(record) if record.epoch == epoch => Arc::make_mut(record).state = state,
                Some(_) | None => return false,
            },
            Change::Delete { worker, expired: true } if self.doubts(now) => {
                if self.workers.contains_key(&worker) {
                    self.carried.insert(worker, now + self.ttl);
                }
            }
            Change::Delete { worker, .. } => {
                self.carried.remove(&worker);
                self.workers.remove(&worker);
            }
            Change::Drain { worker, drain: true } => {
                self.drain.insert(worker);
            }
            Change::Drain { worker, drain: false } => {
                self.drain.remove(&worker);
            }
            Change::Desired { pool } => {
                self.pools.insert(pool.name.clone(), pool);
            }
        }
        true
    }

    fn progress(&mut self, now: Instant) {
        self.failures = 0;
        self.heard(now);
        if let Phase::Watching { progress_deadline } = &mut self.phase {
            *progress_deadline = now + self.timing.progress_timeout;
        }
    }

    /// The view is as old as the conductor's own.
    fn heard(&mut self, now: Instant) {
        self.contact.heard(now.checked_sub(self.store_away).unwrap_or(now));
        let stale = !self.store_away.is_zero();
        self.changed |= self.stale != stale;
        self.stale = stale;
    }

    fn store_says(&mut self, now: Instant, away_ms: u64, settling: bool) {
        self.store_away = Duration::from_millis(away_ms);
        if settling {
            self.doubt_until = Some(now + self.ttl);
        }
    }

    fn doubts(&self, now: Instant) -> bool {
        self.doubt_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests;
