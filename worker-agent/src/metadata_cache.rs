//! Peers' transfer metadata, decoded once for each of their lives.
//!
//! The view brings every peer's metadata along with its registration; a lookup never leaves the process. An entry is of
//! one life: another epoch, or a peer that left, invalidates it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use baton_conductor::WorkerRecord;
use baton_config::{Epoch, WorkerId};
use prometheus::IntCounter;

/// Counts of one cache.
#[derive(Debug, Clone)]
pub struct CacheCounters {
    /// Lookups answered from the cache.
    pub hits: IntCounter,
    /// Lookups for which metadata was decoded.
    pub misses: IntCounter,
    /// Entries dropped because their peer left or began another life.
    pub invalidations: IntCounter,
}

/// The decoded metadata of the peers that were talked to.
#[derive(Debug)]
pub struct MetadataCache {
    entries: Mutex<HashMap<WorkerId, Entry>>,
    counters: CacheCounters,
}

#[derive(Debug, Clone)]
struct Entry {
    epoch: Epoch,
    metadata: Arc<[u8]>,
}

impl MetadataCache {
    /// An empty cache.
    pub fn new(counters: CacheCounters) -> Self {
        Self { entries: Mutex::default(), counters }
    }

    /// What the peer of this record published. What is no base64 is nothing, which nobody can connect with either: who
    /// tries is told, and counts it.
    pub fn get(&self, record: &WorkerRecord) -> Arc<[u8]> {
        let mut entries = self.lock();
        let known = entries.get(&record.worker);
        if let Some(entry) = known.filter(|entry| entry.epoch == record.epoch) {
            self.counters.hits.inc();
            return Arc::clone(&entry.metadata);
        }
        let outdated = known.map(|entry| entry.epoch < record.epoch);
        self.counters.misses.inc();
        let metadata: Arc<[u8]> = STANDARD.decode(&*record.transfer).unwrap_or_default().into();
        // An older life than the one known may still be asked for by a late request; it takes nobody's place.
        if outdated != Some(false) {
            let entry = Entry { epoch: record.epoch, metadata: Arc::clone(&metadata) };
            entries.insert(record.worker.clone(), entry);
            self.counters.invalidations.inc_by(u64::from(outdated.is_some()));
        }
        metadata
    }

    /// Drops what is of a life that has ended.
    pub fn retain(&self, live: impl Fn(&WorkerId, Epoch) -> bool) {
        let mut entries = self.lock();
        let before = entries.len();
        entries.retain(|worker, entry| live(worker, entry.epoch));
        self.counters.invalidations.inc_by((before - entries.len()) as u64);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<WorkerId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use baton_conductor::WorkerState;
    use baton_config::Role;

    use super::*;

    fn cache() -> MetadataCache {
        let counter = |name: &str| IntCounter::new(name, name).unwrap();
        let (hits, misses, invalidations) = (counter("hits"), counter("misses"), counter("invalidations"));
        MetadataCache::new(CacheCounters { hits, misses, invalidations })
    }

    fn record(name: &str, epoch: u64, transfer: &str) -> WorkerRecord {
        WorkerRecord {
            worker: name.parse().unwrap(),
            epoch: Epoch(epoch),
            pool: "p".parse().unwrap(),
            role: Role::Prefill,
            model: "m".to_owned(),
            engine: "sim".to_owned(),
            kv: None,
            server: None,
            address: "127.0.0.1:1".to_owned(),
            transfer: transfer.into(),
            state: WorkerState::Ready,
            pid: 1,
        }
    }

    fn counts(cache: &MetadataCache) -> (u64, u64, u64) {
        let CacheCounters { hits, misses, invalidations } = &cache.counters;
        (hits.get(), misses.get(), invalidations.get())
    }

    #[test]
    fn metadata_is_decoded_once_a_life() {
        let cache = cache();
        assert_eq!(&*cache.get(&record("a", 1, "AAEC")), [0, 1, 2]);
        let draining = WorkerRecord { state: WorkerState::Draining, ..record("a", 1, "AAEC") };
        assert_eq!(&*cache.get(&draining), [0, 1, 2]);
        assert_eq!(counts(&cache), (1, 1, 0));
        assert_eq!(&*cache.get(&record("a", 2, "AwQF")), [3, 4, 5]);
        assert_eq!(counts(&cache), (1, 2, 1));
        assert_eq!(&*cache.get(&record("a", 1, "AAEC")), [0, 1, 2], "a late request of the old life");
        assert_eq!(&*cache.get(&record("a", 2, "AwQF")), [3, 4, 5]);
        assert_eq!(counts(&cache), (2, 3, 1), "and the new life's is still there");
    }

    #[test]
    fn what_left_is_dropped_and_nonsense_is_nothing() {
        let cache = cache();
        cache.get(&record("a", 1, "AAEC"));
        cache.get(&record("b", 2, "AAEC"));
        assert!(cache.get(&record("c", 3, "?")).is_empty());
        assert_eq!(counts(&cache), (0, 3, 0));
        cache.retain(|worker, epoch| worker.as_str() == "a" && epoch == Epoch(1));
        assert_eq!(counts(&cache), (0, 3, 2));
        cache.get(&record("a", 1, "AAEC"));
        assert_eq!(counts(&cache), (1, 3, 2));
    }
}
