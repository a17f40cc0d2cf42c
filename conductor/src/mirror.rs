//! The fleet as the store has it, followed by one watch, and served to any number of clients.
//!
//! Each change is written as a line once, whoever reads it. Readers pull from a bounded history at their own pace: a
//! slow one holds up nobody and costs no memory; one that falls out of the history is told to list again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::{Epoch, PoolName, WorkerId};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::api::{Change, PoolTarget, TargetSource, WatchLine};
use crate::autoscale::{SCALE_PREFIX, Scaled};
use crate::dice::{Backoff, Dice};
use crate::leader::{CONDUCTORS_PREFIX, ConductorRecord, LEADER_KEY, Leader, leader};
use crate::record::WorkerRecord;
use crate::registry::{DRAIN_PREFIX, GOODBYE_KEY, REPLICAS_PREFIX, StoredWorker, WORKERS_PREFIX};
use crate::server::PoolOptions;
use crate::store::{
    Batch, Event, KeyValue, LeaseId, PAGE_MAX_KEYS, Revision, Store, StoreError, StoreHealth, WatchError,
};

/// Lines kept for watches.
const LINES_MAX: usize = 10_000;
/// Bytes of lines kept for watches.
const LINES_MAX_BYTES: usize = 16 << 20;
/// A watch that lasted so long was a good one: the pauses between attempts begin anew.
const WATCH_GOOD: Duration = Duration::from_secs(5);
/// Lease time of workers where nothing else is said.
const LEASE_TTL: Duration = Duration::from_secs(10);

/// The fleet at one revision.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fleet {
    pub(crate) instance: String,
    pub(crate) revision: Revision,
    pub(crate) workers: BTreeMap<WorkerId, Arc<WorkerRecord>>,
    pub(crate) drain: BTreeSet<WorkerId>,
    /// Numbers set by operators.
    pub(crate) replicas: BTreeMap<PoolName, u32>,
    /// Decisions of the autoscaler.
    pub(crate) scale: BTreeMap<PoolName, ScaledSeen>,
    /// Conductors by name, each with the lease that holds it.
    pub(crate) conductors: BTreeMap<String, (ConductorRecord, Option<LeaseId>)>,
    /// The conductor that leads.
    pub(crate) leader: Option<Leader>,
}

/// A decision of the autoscaler, and since when this conductor knows of it.
#[derive(Debug, Clone)]
pub(crate) struct ScaledSeen {
    pub(crate) scaled: Scaled,
    pub(crate) since: Instant,
}

/// The history does not reach back so far, or is another one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Forgotten {
    pub(crate) revision: Revision,
}

/// Everything that changed at one revision, as it is sent.
#[derive(Debug)]
struct Line {
    revision: Revision,
    full: Bytes,
    /// The same without transfer metadata; shares `full` where there is none in it.
    slim: Bytes,
}

impl Line {
    fn len(&self) -> usize {
        let shared = self.full.as_ptr() == self.slim.as_ptr();
        self.full.len() + if shared { 0 } else { self.slim.len() }
    }
}

#[derive(Debug, Default)]
struct State {
    fleet: Fleet,
    /// The stored form of each worker, for comparing and writing.
    stored: BTreeMap<WorkerId, KeyValue>,
    lines: VecDeque<Line>,
    lines_bytes: usize,
    /// Watches can begin here.
    oldest: Revision,
    /// Workers that said goodbye; their removal comes in the same batch.
    leaving: BTreeSet<WorkerId>,
    expired: u64,
    /// The store has not been followed since then.
    away_since: Option<Instant>,
    /// Until then, leases may end for want of a store rather than of a worker.
    settling_until: Option<Instant>,
}

/// The shared copy.
#[derive(Debug)]
pub(crate) struct Mirror {
    pools: BTreeMap<PoolName, PoolOptions>,
    lease_ttl: Duration,
    state: Mutex<State>,
    head: watch::Sender<Revision>,
}

impl Mirror {
    pub(crate) fn new(pools: &[PoolOptions]) -> Self {
        let pools = pools.iter().map(|pool| (pool.name.clone(), pool.clone())).collect();
        let state = State { away_since: Some(Instant::now()), ..State::default() };
        Self { pools, lease_ttl: LEASE_TTL, state: Mutex::new(state), head: watch::channel(0).0 }
    }

    /// With another lease time of workers.
    pub(crate) fn with_lease_ttl(self, lease_ttl: Duration) -> Self {
        Self { lease_ttl, ..self }
    }

    /// Follows the store for ever, listing anew where the history was lost. While the store is away, everything stays
    /// as it was last seen.
    pub(crate) async fn follow(self: Arc<Self>, store: Arc<dyn Store>) {
        let (mut dice, mut failures) = (Dice::from_entropy(), 0);
        let mut goal = WatchError::Compacted { oldest: 0 };
        loop {
            let read = match goal {
                // A watch without changes says nothing about the store; a read does.
                WatchError::Lost => store.list(WORKERS_PREFIX, None, 1).await.map(drop),
                WatchError::Compacted { .. } | WatchError::Future { .. } => self.list(&*store).await,
            };
            match read {
                Ok(()) => {
                    self.lock().regain(self.lease_ttl);
                    let opened = Instant::now();
                    goal = self.follow_watch(&*store).await;
                    tracing::warn!(error = &goal as &dyn std::error::Error, "the watch of the store ended");
                    if opened.elapsed() >= WATCH_GOOD {
                        failures = 0;
                    }
                }
                Err(error) if failures == 0 => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the store can't be read");
                }
                Err(error) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "the store still can't be read"
                    );
                }
            }
            self.lock().lose(&store.health());
            tokio::time::sleep(Backoff::CONDUCTOR.delay(failures, &mut dice)).await;
            failures = failures.saturating_add(1);
        }
    }

    async fn follow_watch(&self, store: &dyn Store) -> WatchError {
        let since = self.lock().fleet.revision;
        let mut watch = store.watch("", since);
        loop {
            match watch.next().await {
                Some(Ok(batch)) => self.apply(batch),
                Some(Err(error)) => return error,
                None => return WatchError::Lost,
            }
        }
    }

    /// Replaces everything by what the store has. Watchers of the past are told to list again.
    pub(crate) async fn list(&self, store: &dyn Store) -> Result<(), StoreError> {
        let instance = store.instance().await?;
        let mut items: Vec<KeyValue> = Vec::new();
        let mut revision = None;
        loop {
            let after = items.last().map(|kv| kv.key.clone());
            let page = store.list("", after.as_deref(), PAGE_MAX_KEYS).await?;
            revision = revision.or(Some(page.revision));
            items.extend(page.items);
            if !page.more {
                break;
            }
        }
        let revision = revision.unwrap_or(0);
        let mut state = self.lock();
        let mut fresh = State {
            fleet: Fleet { instance, revision, ..Fleet::default() },
            oldest: revision,
            expired: state.expired,
            ..State::default()
        };
        for kv in items {
            self.change(&mut fresh, Event::Put(kv));
        }
        state.regain(self.lease_ttl);
        (fresh.away_since, fresh.settling_until) = (state.away_since, state.settling_until);
        *state = fresh;
        drop(state);
        self.head.send_replace(revision);
        Ok(())
    }

    fn apply(&self, batch: Batch) {
        let mut state = self.lock();
        let changes: Vec<Change> = batch
            .events
            .into_iter()
            .filter_map(|event| {
                if state.overtook(&event, batch.revision) { None } else { self.change(&mut state, event) }
            })
            .collect();
        state.fleet.revision = batch.revision;
        if !changes.is_empty() {
            state.push(changes);
        }
        drop(state);
        self.head.send_replace(batch.revision);
    }

    fn change(&self, state: &mut State, event: Event) -> Option<Change> {
        let key = match &event {
            Event::Put(kv) => kv.key.clone(),
            Event::Delete { key } => key.clone(),
        };
        if key == LEADER_KEY || key.starts_with(CONDUCTORS_PREFIX) {
            conductor_change(&mut state.fleet, &key, event);
            return None;
        }
        if key == GOODBYE_KEY {
            if let Event::Put(kv) = event {
                state.leaving.extend(std::str::from_utf8(&kv.value).ok().and_then(|name| name.parse().ok()));
            }
            return None;
        }
        let change = if let Some(name) = key.strip_prefix(WORKERS_PREFIX) {
            worker_change(state, name.parse().ok()?, event)
        } else if let Some(name) = key.strip_prefix(DRAIN_PREFIX) {
            let worker: WorkerId = name.parse().ok()?;
            let drain = matches!(event, Event::Put(_));
            if drain {
                state.fleet.drain.insert(worker.clone());
            } else {
                state.fleet.drain.remove(&worker);
            }
            Some(Change::Drain { worker, drain })
        } else if let Some(name) = key.strip_prefix(REPLICAS_PREFIX) {
            let pool: PoolName = name.parse().ok()?;
            match event {
                Event::Put(kv) => {
                    state.fleet.replicas.insert(pool.clone(), serde_json::from_slice(&kv.value).ok()?);
                }
                Event::Delete { .. } => drop(state.fleet.replicas.remove(&pool)),
            }
            self.target(&state.fleet, &pool).map(|pool| Change::Desired { pool })
        } else if let Some(name) = key.strip_prefix(SCALE_PREFIX) {
            let pool: PoolName = name.parse().ok()?;
            scale_change(&mut state.fleet, &pool, event);
            self.target(&state.fleet, &pool).map(|pool| Change::Desired { pool })
        } else {
            None
        };
        if change.is_none() {
            tracing::debug!(key, "a stored key that says nothing to this conductor");
        }
        change
    }

    fn target(&self, fleet: &Fleet, pool: &PoolName) -> Option<PoolTarget> {
        let options = self.pools.get(pool)?;
        let decided = fleet.scale.get(pool).map(|seen| &seen.scaled).filter(|scaled| !scaled.dry_run);
        let (desired, source, reason) = match (fleet.replicas.get(pool), decided) {
            (Some(desired), _) => (*desired, TargetSource::Operator, None),
            (None, Some(scaled)) => (scaled.desired, TargetSource::Autoscaler, Some(scaled.reason.clone())),
            (None, None) => (options.replicas, TargetSource::Document, None),
        };
        Some(PoolTarget { name: pool.clone(), role: options.role, desired, source, reason })
    }

    /// The pools of the fleet document with their wanted sizes.
    pub(crate) fn targets(&self, fleet: &Fleet) -> Vec<PoolTarget> {
        self.pools.keys().filter_map(|pool| self.target(fleet, pool)).collect()
    }

    /// The fleet now.
    pub(crate) fn fleet(&self) -> Fleet {
        self.lock().fleet.clone()
    }

    /// Whose history this is, and how far it goes.
    pub(crate) fn position(&self) -> (String, Revision) {
        let state = self.lock();
        (state.fleet.instance.clone(), state.fleet.revision)
    }

    /// A worker as it is stored, and its epoch.
    pub(crate) fn worker(&self, worker: &WorkerId) -> Option<(KeyValue, Epoch)> {
        let state = self.lock();
        let epoch = state.fleet.workers.get(worker)?.epoch;
        state.stored.get(worker).map(|kv| (kv.clone(), epoch))
    }

    /// Whether a worker was asked to drain.
    pub(crate) fn drains(&self, worker: &WorkerId) -> bool {
        self.lock().fleet.drain.contains(worker)
    }

    /// The revision shown, and the conductor that leads at it.
    pub(crate) fn leader(&self) -> (Revision, Option<Leader>) {
        let state = self.lock();
        (state.fleet.revision, state.fleet.leader.clone())
    }

    /// Workers that no lease holds, with when they were last written.
    pub(crate) fn unleased(&self) -> Vec<(WorkerId, Revision)> {
        let state = self.lock();
        let unleased = state.stored.iter().filter(|(_, kv)| kv.lease.is_none());
        unleased.map(|(worker, kv)| (worker.clone(), kv.mod_revision)).collect()
    }

    /// Leases that ended without a goodbye, since the start.
    pub(crate) fn expired(&self) -> u64 {
        self.lock().expired
    }

    /// Whether the store was ever read: before that there is nothing to show.
    pub(crate) fn known(&self) -> bool {
        !self.lock().fleet.instance.is_empty()
    }

    /// Whether the store is being followed.
    pub(crate) fn following(&self) -> bool {
        self.away().is_none()
    }

    /// For how long the store has been away; `None` while it is followed.
    pub(crate) fn away(&self) -> Option<Duration> {
        self.lock().away_since.map(|since| since.elapsed())
    }

    /// Whether leases may end for want of a store rather than of a worker: it is, or was, away for longer than half a
    /// ttl, and has not been back for a whole one.
    pub(crate) fn settling(&self) -> bool {
        let state = self.lock();
        let long = |since: Instant| since.elapsed() >= self.lease_ttl / 2;
        state.away_since.is_some_and(long) || state.settling_until.is_some_and(|until| Instant::now() < until)
    }

    /// Waits until the mirror shows `revision`, or for `patience`: a writer then sees its own write.
    /// A mirror that does not follow the store won't, and the write stands all the same.
    pub(crate) async fn reached(&self, revision: Revision, patience: Duration) {
        if self.following() && !self.shows(revision, patience).await {
            tracing::warn!(revision, "the mirror of the store lags");
        }
    }

    /// Whether the mirror shows `revision`, maybe only after some of `patience`.
    pub(crate) async fn shows(&self, revision: Revision, patience: Duration) -> bool {
        let mut head = self.head.subscribe();
        tokio::time::timeout(patience, head.wait_for(|head| *head >= revision)).await.is_ok()
    }

    /// Told of each new revision.
    pub(crate) fn head(&self) -> watch::Receiver<Revision> {
        self.head.subscribe()
    }

    /// At most `max` lines after `since`, and the revision they lead to.
    pub(crate) fn lines(
        &self,
        since: Revision,
        max: usize,
        metadata: bool,
    ) -> Result<(Vec<Bytes>, Revision), Forgotten> {
        let state = self.lock();
        // A store that was restored from a backup goes back: what it does from there on is another history.
        if since < state.oldest || since > state.fleet.revision {
            return Err(Forgotten { revision: state.fleet.revision });
        }
        let start = state.lines.partition_point(|line| line.revision <= since);
        let chosen: Vec<&Line> = state.lines.range(start..).take(max).collect();
        let upto = match chosen.last() {
            Some(line) if chosen.len() == max => line.revision,
            _ => state.fleet.revision,
        };
        let bytes = |line: &Line| if metadata { line.full.clone() } else { line.slim.clone() };
        Ok((chosen.into_iter().map(bytes).collect(), upto))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The store is followed again.
    fn regain(&mut self, lease_ttl: Duration) {
        let Some(since) = self.away_since.take() else { return };
        // Before the first listing there was nobody to wait for.
        if !self.fleet.instance.is_empty() && since.elapsed() >= lease_ttl / 2 {
            self.settling_until = Some(Instant::now() + lease_ttl);
        }
    }

    /// The store is away, since its last answer.
    fn lose(&mut self, health: &StoreHealth) {
        let now = Instant::now();
        let since = health.last_ok.and_then(|silent| now.checked_sub(silent)).unwrap_or(now);
        self.away_since.get_or_insert(since);
    }

    /// Pages of a listing are newer than its revision: what they showed is not undone by what happened before.
    fn overtook(&self, event: &Event, at: Revision) -> bool {
        let (key, revision) = match event {
            Event::Put(kv) => (&kv.key, kv.mod_revision),
            Event::Delete { key } => (key, at),
        };
        let worker = key.strip_prefix(WORKERS_PREFIX).and_then(|name| name.parse().ok());
        let known = worker.and_then(|worker: WorkerId| self.stored.get(&worker));
        known.is_some_and(|kv| kv.mod_revision > revision)
    }

    fn push(&mut self, changes: Vec<Change>) {
        let revision = self.fleet.revision;
        let slim: Option<Vec<Change>> = changes
            .iter()
            .any(Change::has_metadata)
            .then(|| changes.iter().map(Change::without_metadata).collect());
        let full = encode_line(&WatchLine::Changes { revision, changes });
        let slim = match slim {
            Some(changes) => encode_line(&WatchLine::Changes { revision, changes }),
            None => full.clone(),
        };
        let line = Line { revision, full, slim };
        self.lines_bytes += line.len();
        self.lines.push_back(line);
        while self.lines.len() > LINES_MAX || self.lines_bytes > LINES_MAX_BYTES {
            let Some(line) = self.lines.pop_front() else { break };
            self.lines_bytes -= line.len();
            self.oldest = line.revision;
        }
    }
}

fn scale_change(fleet: &mut Fleet, pool: &PoolName, event: Event) {
    let decided = match event {
        Event::Put(kv) => serde_json::from_slice::<Scaled>(&kv.value).ok(),
        Event::Delete { .. } => None,
    };
    let Some(scaled) = decided else {
        fleet.scale.remove(pool);
        return;
    };
    // The same decision with another problem is not a new one.
    let known = fleet.scale.get(pool).filter(|seen| seen.scaled.id == scaled.id).map(|seen| seen.since);
    fleet.scale.insert(pool.clone(), ScaledSeen { scaled, since: known.unwrap_or_else(Instant::now) });
}

fn worker_change(state: &mut State, worker: WorkerId, event: Event) -> Option<Change> {
    match event {
        Event::Put(kv) => {
            let mut record = match StoredWorker::decode(&kv) {
                Ok(stored) if stored.record.worker == worker => stored.record,
                _ => {
                    tracing::error!(key = kv.key, "a stored worker is not understood and left out");
                    return None;
                }
            };
            state.leaving.remove(&worker);
            // Within a life nothing but the state changes.
            let before = state.fleet.workers.get(&worker).filter(|before| before.epoch == record.epoch);
            let change = before.map(|before| {
                record.transfer = before.transfer.clone();
                Change::State { worker: worker.clone(), epoch: record.epoch, state: record.state }
            });
            let record = Arc::new(record);
            state.fleet.workers.insert(worker.clone(), record.clone());
            state.stored.insert(worker, kv);
            Some(change.unwrap_or(Change::Put { worker: record }))
        }
        Event::Delete { .. } => {
            let record = state.fleet.workers.remove(&worker)?;
            state.stored.remove(&worker);
            let expired = !state.leaving.remove(&worker);
            if expired {
                state.expired += 1;
                tracing::warn!(%worker, epoch = %record.epoch, "lease expired, worker removed");
            }
            Some(Change::Delete { worker, expired })
        }
    }
}

fn conductor_change(fleet: &mut Fleet, key: &str, event: Event) {
    match (key.strip_prefix(CONDUCTORS_PREFIX), event) {
        (None, Event::Put(kv)) => fleet.leader = Some(leader(&kv)),
        (None, Event::Delete { .. }) => fleet.leader = None,
        (Some(name), Event::Put(kv)) => match serde_json::from_slice(&kv.value) {
            Ok(record) => drop(fleet.conductors.insert(name.to_owned(), (record, kv.lease))),
            Err(_) => tracing::error!(key, "a stored conductor is not understood and left out"),
        },
        (Some(name), Event::Delete { .. }) => drop(fleet.conductors.remove(name)),
    }
}

/// One line of NDJSON.
pub(crate) fn encode_line(line: &WatchLine) -> Bytes {
    match serde_json::to_vec(line) {
        Ok(mut bytes) => {
            bytes.push(b'\n');
            bytes.into()
        }
        // Maps with text keys and plain structs always have a JSON form.
        Err(error) => unreachable!("a watch line without a JSON form: {error}"),
    }
}

#[cfg(test)]
mod tests;
