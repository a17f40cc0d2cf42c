//! Since when things are as they are: what an operator asks first, and no single look at the fleet can tell.
//!
//! Known to this conductor alone and from its start on: durations are "at least". Nothing is decided by them.

use std::collections::BTreeMap;
use std::time::Duration;

use baton_config::{Epoch, PoolName, WorkerId};
use tokio::time::Instant;

use crate::api::PoolStatus;
use crate::mirror::Fleet;
use crate::record::WorkerState;

/// The memory of one conductor.
#[derive(Debug, Default)]
pub(super) struct History {
    pools: BTreeMap<PoolName, PoolPast>,
    workers: BTreeMap<WorkerId, WorkerPast>,
}

#[derive(Debug, Default)]
struct PoolPast {
    short: Option<Instant>,
    empty: Option<Instant>,
}

#[derive(Debug)]
struct WorkerPast {
    epoch: Epoch,
    known: Instant,
    state: WorkerState,
    changed: Instant,
}

impl History {
    /// Takes in the fleet as it is at `now`.
    pub(super) fn observe(&mut self, now: Instant, fleet: &Fleet, pools: &[PoolStatus]) {
        for pool in pools {
            let past = self.pools.entry(pool.name.clone()).or_default();
            past.short = (pool.ready < pool.desired).then(|| past.short.unwrap_or(now));
            past.empty = (pool.ready == 0 && pool.desired > 0).then(|| past.empty.unwrap_or(now));
        }
        self.workers.retain(|worker, _| fleet.workers.contains_key(worker));
        for (name, record) in &fleet.workers {
            let state = if fleet.drain.contains(name) { WorkerState::Draining } else { record.state };
            let past = self.workers.entry(name.clone()).or_insert(WorkerPast {
                epoch: record.epoch,
                known: now,
                state,
                changed: now,
            });
            if past.epoch != record.epoch {
                *past = WorkerPast { epoch: record.epoch, known: now, state, changed: now };
            } else if past.state != state {
                (past.state, past.changed) = (state, now);
            }
        }
    }

    /// How long a pool has had fewer ready workers than wanted, and none at all.
    pub(super) fn pool(&self, now: Instant, pool: &PoolName) -> (Option<Duration>, Option<Duration>) {
        let since = |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at));
        self.pools.get(pool).map_or((None, None), |past| (since(past.short), since(past.empty)))
    }

    /// How long this life of a worker has been known, and its state.
    pub(super) fn worker(
        &self,
        now: Instant,
        worker: &WorkerId,
        epoch: Epoch,
    ) -> Option<(Duration, Duration)> {
        let past = self.workers.get(worker).filter(|past| past.epoch == epoch)?;
        let since = |at: Instant| now.saturating_duration_since(at);
        Some((since(past.known), since(past.changed)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use baton_config::Role;

    use super::*;
    use crate::record::WorkerRecord;

    fn pool(desired: u32, ready: u32) -> PoolStatus {
        PoolStatus {
            name: "decode".parse().unwrap(),
            role: Role::Decode,
            desired,
            operator_set: false,
            min: 0,
            max: 8,
            joining: 0,
            ready,
            draining: 0,
            short_ms: None,
            empty_ms: None,
            autoscale: None,
        }
    }

    fn worker(epoch: u64, state: WorkerState) -> Arc<WorkerRecord> {
        Arc::new(WorkerRecord {
            worker: "d-0".parse().unwrap(),
            epoch: Epoch(epoch),
            pool: "decode".parse().unwrap(),
            role: Role::Decode,
            model: "tiny".to_owned(),
            engine: "sim".to_owned(),
            kv: None,
            server: None,
            address: "127.0.0.1:1".to_owned(),
            transfer: "".into(),
            state,
            pid: 1,
        })
    }

    fn fleet(record: Arc<WorkerRecord>) -> Fleet {
        Fleet { workers: BTreeMap::from([(record.worker.clone(), record)]), ..Fleet::default() }
    }

    #[test]
    fn a_shortage_lasts_from_its_first_sight_to_its_end() {
        let (start, name) = (Instant::now(), "decode".parse().unwrap());
        let at = |s: u64| start + Duration::from_secs(s);
        let secs = |s: u64| Some(Duration::from_secs(s));
        let mut history = History::default();
        assert_eq!(history.pool(start, &name), (None, None));
        history.observe(at(1), &Fleet::default(), &[pool(2, 1)]);
        history.observe(at(4), &Fleet::default(), &[pool(2, 0)]);
        assert_eq!(history.pool(at(9), &name), (secs(8), secs(5)));
        history.observe(at(10), &Fleet::default(), &[pool(2, 1)]);
        assert_eq!(history.pool(at(11), &name), (secs(10), None));
        history.observe(at(12), &Fleet::default(), &[pool(2, 2)]);
        assert_eq!(history.pool(at(13), &name), (None, None));
        history.observe(at(14), &Fleet::default(), &[pool(0, 0)]);
        assert_eq!(history.pool(at(15), &name), (None, None), "a pool of none lacks nobody");
    }

    #[test]
    fn a_worker_ages_with_its_life_and_not_with_its_state() {
        let (start, name) = (Instant::now(), "d-0".parse().unwrap());
        let at = |s: u64| start + Duration::from_secs(s);
        let secs = Duration::from_secs;
        let mut history = History::default();
        history.observe(at(0), &fleet(worker(3, WorkerState::Joining)), &[]);
        history.observe(at(5), &fleet(worker(3, WorkerState::Ready)), &[]);
        assert_eq!(history.worker(at(7), &name, Epoch(3)), Some((secs(7), secs(2))));
        let mut asked = fleet(worker(3, WorkerState::Ready));
        asked.drain.insert(name.clone());
        history.observe(at(8), &asked, &[]);
        assert_eq!(history.worker(at(9), &name, Epoch(3)), Some((secs(9), secs(1))), "asked to drain");
        history.observe(at(10), &fleet(worker(4, WorkerState::Ready)), &[]);
        assert_eq!(history.worker(at(11), &name, Epoch(4)), Some((secs(1), secs(1))));
        assert_eq!(history.worker(at(11), &name, Epoch(3)), None, "that life is over");
        history.observe(at(12), &Fleet::default(), &[]);
        assert_eq!(history.worker(at(12), &name, Epoch(4)), None);
    }
}
