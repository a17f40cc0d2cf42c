//! The embedded store's state. No I/O, no clock: the owner passes `now` in and asks when to come back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{
    Batch, Compare, Event, KeyValue, Lease, LeaseId, Op, PAGE_MAX_KEYS, Page, Revision, StoreError, Txn,
    TxnReply, WatchError, check_txn,
};

/// Revisions kept for watches.
pub(crate) const HISTORY_MAX_REVISIONS: usize = 10_000;
/// Bytes of keys and values kept for watches.
const HISTORY_MAX_BYTES: usize = 32 << 20;
/// Shortest lease.
const LEASE_MIN: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct LeaseState {
    ttl: Duration,
    ends: Instant,
    keys: BTreeSet<String>,
}

/// Keys, leases and the history of one store.
#[derive(Debug)]
pub(crate) struct Memory {
    revision: Revision,
    /// Watches can begin at this revision or later.
    compacted: Revision,
    keys: BTreeMap<String, KeyValue>,
    leases: BTreeMap<LeaseId, LeaseState>,
    ends: BTreeSet<(Instant, LeaseId)>,
    next_lease: u64,
    history: VecDeque<Batch>,
    history_max: usize,
    history_bytes: usize,
}

impl Memory {
    /// A store whose revisions begin after `base`, with `keys` as if written at `base`.
    pub(crate) fn new(base: Revision, keys: impl IntoIterator<Item = (String, Arc<[u8]>)>) -> Self {
        let keys = keys.into_iter().map(|(key, value)| {
            let kv =
                KeyValue { key: key.clone(), value, create_revision: base, mod_revision: base, lease: None };
            (key, kv)
        });
        Self {
            revision: base,
            compacted: base,
            keys: keys.collect(),
            leases: BTreeMap::new(),
            ends: BTreeSet::new(),
            next_lease: base,
            history: VecDeque::new(),
            history_max: HISTORY_MAX_REVISIONS,
            history_bytes: 0,
        }
    }

    #[cfg(test)]
    pub(crate) fn with_history(mut self, revisions: usize) -> Self {
        self.history_max = revisions;
        self
    }

    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    pub(crate) fn get(&self, key: &str) -> Option<&KeyValue> {
        self.keys.get(key)
    }

    pub(crate) fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Page {
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let mut rest = self
            .keys
            .range::<str, _>((from, Bound::Unbounded))
            .map(|(_, kv)| kv)
            .take_while(|kv| kv.key.starts_with(prefix));
        let items: Vec<KeyValue> = rest.by_ref().take(limit.clamp(1, PAGE_MAX_KEYS)).cloned().collect();
        Page { revision: self.revision, more: rest.next().is_some(), items }
    }

    /// Checks a transaction against limits and leases, and says whether its conditions hold. Changes nothing.
    pub(crate) fn plan(&self, txn: &Txn) -> Result<bool, StoreError> {
        check_txn(txn)?;
        for op in &txn.ops {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases.contains_key(lease)
            {
                return Err(StoreError::LeaseNotFound(*lease));
            }
        }
        Ok(txn.compares.iter().all(|compare| {
            let (key, expected) = match compare {
                Compare::Created { key, revision } | Compare::Modified { key, revision } => (key, *revision),
            };
            let actual = self.keys.get(key).map_or(0, |kv| match compare {
                Compare::Created { .. } => kv.create_revision,
                Compare::Modified { .. } => kv.mod_revision,
            });
            actual == expected
        }))
    }

    pub(crate) fn txn(&mut self, txn: Txn) -> Result<TxnReply, StoreError> {
        let succeeded = self.plan(&txn)?;
        if succeeded {
            let mut events: Vec<Event> = Vec::with_capacity(txn.ops.len());
            let next = self.revision + 1;
            for op in txn.ops {
                match op {
                    Op::Put { key, value, lease } => events.push(self.put(next, key, value, lease)),
                    Op::Delete { key } => events.extend(self.delete(&key)),
                }
            }
            self.commit(events);
        }
        Ok(TxnReply { succeeded, revision: self.revision })
    }

    pub(crate) fn grant(&mut self, now: Instant, ttl: Duration) -> Lease {
        let ttl = ttl.max(LEASE_MIN);
        self.next_lease += 1;
        let id = LeaseId(self.next_lease);
        let ends = now + ttl;
        self.leases.insert(id, LeaseState { ttl, ends, keys: BTreeSet::new() });
        self.ends.insert((ends, id));
        Lease { id, ttl }
    }

    pub(crate) fn keep_alive(&mut self, now: Instant, id: LeaseId) -> Option<Duration> {
        let lease = self.leases.get_mut(&id)?;
        self.ends.remove(&(lease.ends, id));
        lease.ends = now + lease.ttl;
        self.ends.insert((lease.ends, id));
        Some(lease.ttl)
    }

    pub(crate) fn revoke(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.remove(&id) else { return };
        self.ends.remove(&(lease.ends, id));
        let events =
            lease.keys.iter().filter_map(|key| self.keys.remove(key).map(|kv| Event::Delete { key: kv.key }));
        let events = events.collect();
        self.commit(events);
    }

    /// Ends the leases whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) {
        while let Some((ends, id)) = self.ends.first().copied()
            && ends <= now
        {
            self.revoke(id);
        }
    }

    /// When [`Memory::expire`] has something to do.
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.ends.first().map(|(ends, _)| *ends)
    }

    /// This process stood still for `stall`: keepalives could not be taken, so nobody loses time for it.
    pub(crate) fn forgive(&mut self, stall: Duration) {
        self.ends.clear();
        for (id, lease) in &mut self.leases {
            lease.ends += stall;
            self.ends.insert((lease.ends, *id));
        }
    }

    /// At most `max` batches after `since` under `prefix`, and the revision up to which the history was read.
    pub(crate) fn changes(
        &self,
        prefix: &str,
        since: Revision,
        max: usize,
    ) -> Result<(Vec<Batch>, Revision), WatchError> {
        if since > self.revision {
            return Err(WatchError::Future { asked: since, current: self.revision });
        }
        if since < self.compacted {
            return Err(WatchError::Compacted { oldest: self.compacted });
        }
        // Every revision after `compacted` is one entry of the history.
        let skip = usize::try_from(since - self.compacted).unwrap_or(usize::MAX);
        let mut batches = Vec::new();
        let mut upto = since;
        for batch in self.history.iter().skip(skip) {
            if batches.len() == max {
                break;
            }
            upto = batch.revision;
            let wanted = |event: &&Event| match event {
                Event::Put(kv) => kv.key.starts_with(prefix),
                Event::Delete { key } => key.starts_with(prefix),
            };
            let events: Vec<Event> = batch.events.iter().filter(wanted).cloned().collect();
            if !events.is_empty() {
                batches.push(Batch { revision: batch.revision, events });
            }
        }
        Ok((batches, upto))
    }

    fn put(&mut self, revision: Revision, key: String, value: Arc<[u8]>, lease: Option<LeaseId>) -> Event {
        let old = self.keys.get(&key);
        let create_revision = old.map_or(revision, |kv| kv.create_revision);
        if let Some(id) = old.and_then(|kv| kv.lease)
            && let Some(state) = self.leases.get_mut(&id)
        {
            state.keys.remove(&key);
        }
        if let Some(state) = lease.and_then(|id| self.leases.get_mut(&id)) {
            state.keys.insert(key.clone());
        }
        let kv = KeyValue { key: key.clone(), value, create_revision, mod_revision: revision, lease };
        self.keys.insert(key, kv.clone());
        Event::Put(kv)
    }

    fn delete(&mut self, key: &str) -> Option<Event> {
        let kv = self.keys.remove(key)?;
        if let Some(state) = kv.lease.and_then(|id| self.leases.get_mut(&id)) {
            state.keys.remove(key);
        }
        Some(Event::Delete { key: kv.key })
    }

    fn commit(&mut self, mut events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        self.revision += 1;
        events.sort_by(|a, b| event_key(a).cmp(event_key(b)));
        let batch = Batch { revision: self.revision, events };
        self.history_bytes += batch_bytes(&batch);
        self.history.push_back(batch);
        while self.history.len() > self.history_max || self.history_bytes > HISTORY_MAX_BYTES {
            let Some(oldest) = self.history.pop_front() else { break };
            self.history_bytes -= batch_bytes(&oldest);
            self.compacted = oldest.revision;
        }
    }
}

fn batch_bytes(batch: &Batch) -> usize {
    let size = |event: &Event| match event {
        Event::Put(kv) => kv.key.len() + kv.value.len(),
        Event::Delete { key } => key.len(),
    };
    batch.events.iter().map(size).sum()
}

fn event_key(event: &Event) -> &str {
    match event {
        Event::Put(kv) => &kv.key,
        Event::Delete { key } => key,
    }
}

#[cfg(test)]
mod tests;
