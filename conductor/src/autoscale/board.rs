//! What the parts of the autoscaler tell each other, the metrics and operators; in memory only.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_config::PoolName;

use super::decide::Kind;

/// Directions that are counted from the start, so that their series begin with 0.
const DIRECTIONS: [Kind; 2] = [Kind::Up, Kind::Down];

/// Shared by the autoscaler, its scalers and the metrics.
#[derive(Debug, Default)]
pub(crate) struct Board(Mutex<BTreeMap<PoolName, Entry>>);

/// What there is to say about one pool.
#[derive(Debug, Clone, Default)]
pub(crate) struct Entry {
    /// Decisions by what they were about.
    pub(crate) decisions: BTreeMap<&'static str, u64>,
    /// Attempts of the scaler that failed.
    pub(crate) errors: u64,
    problem: Option<String>,
    found: Option<u32>,
}

impl Board {
    /// For these pools.
    pub(crate) fn new<'a>(pools: impl Iterator<Item = &'a PoolName>) -> Self {
        let entry =
            || Entry { decisions: DIRECTIONS.map(|kind| (kind.word(), 0)).into(), ..Entry::default() };
        Self(Mutex::new(pools.map(|pool| (pool.clone(), entry())).collect()))
    }

    /// A copy of everything.
    pub(crate) fn entries(&self) -> BTreeMap<PoolName, Entry> {
        self.lock().clone()
    }

    pub(super) fn decided(&self, pool: &PoolName, kind: Kind) {
        *self.lock().entry(pool.clone()).or_default().decisions.entry(kind.word()).or_default() += 1;
    }

    /// What keeps the scaler from doing what was decided.
    pub(super) fn problem(&self, pool: &PoolName) -> Option<String> {
        self.lock().get(pool)?.problem.clone()
    }

    /// An attempt failed; `true` if this problem is a new one.
    pub(super) fn failed(&self, pool: &PoolName, problem: String) -> bool {
        let mut entries = self.lock();
        let entry = entries.entry(pool.clone()).or_default();
        entry.errors += 1;
        entry.problem.replace(problem.clone()).is_none_or(|before| before != problem)
    }

    /// An attempt went well; `true` if there was a problem before.
    pub(super) fn went_well(&self, pool: &PoolName) -> bool {
        self.lock().entry(pool.clone()).or_default().problem.take().is_some()
    }

    /// What the scaler has been asked for by now.
    pub(super) fn found(&self, pool: &PoolName) -> Option<u32> {
        self.lock().get(pool)?.found
    }

    pub(super) fn finds(&self, pool: &PoolName, replicas: u32) {
        self.lock().entry(pool.clone()).or_default().found = Some(replicas);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PoolName, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
