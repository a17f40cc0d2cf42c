//! Between the store's words and etcd's: keys below the prefix, transactions, the changes of a watch.

use std::collections::BTreeSet;

use etcd_client::{CompareOp, PutOptions, Txn as EtcdTxn, TxnOp};

use crate::store::{Batch, Compare, Event, KeyValue, LeaseId, Op, Revision, Txn};

/// Below which keys everything is kept: ends in a slash, so that `/a` does not see `/ab`.
#[derive(Debug, Clone)]
pub(super) struct Prefix(String);

impl Prefix {
    pub(super) fn new(prefix: &str) -> Self {
        Self(format!("{}/", prefix.trim_end_matches('/')))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The full key.
    pub(super) fn add(&self, key: &str) -> String {
        format!("{}{key}", self.0)
    }

    /// The key below the prefix; `None` for what no conductor wrote.
    pub(super) fn strip(&self, key: &[u8]) -> Option<String> {
        std::str::from_utf8(key).ok()?.strip_prefix(&self.0).map(str::to_owned)
    }

    pub(super) fn key_value(&self, kv: &etcd_client::KeyValue) -> Option<KeyValue> {
        Some(KeyValue {
            key: self.strip(kv.key())?,
            value: kv.value().into(),
            create_revision: revision(kv.create_revision()),
            mod_revision: revision(kv.mod_revision()),
            lease: (kv.lease() != 0).then(|| LeaseId(kv.lease().cast_unsigned())),
        })
    }

    /// The transaction in etcd's words. With `look`, one that does not hold answers with that key.
    pub(super) fn txn(&self, txn: &Txn, look: Option<&str>) -> EtcdTxn {
        let compares = txn.compares.iter().map(|compare| match compare {
            Compare::Created { key, revision } => {
                etcd_client::Compare::create_revision(self.add(key), CompareOp::Equal, signed(*revision))
            }
            Compare::Modified { key, revision } => {
                etcd_client::Compare::mod_revision(self.add(key), CompareOp::Equal, signed(*revision))
            }
        });
        let ops = txn.ops.iter().map(|op| match op {
            Op::Put { key, value, lease } => {
                let options = lease.map(|id| PutOptions::new().with_lease(id.0.cast_signed()));
                TxnOp::put(self.add(key), value.to_vec(), options)
            }
            Op::Delete { key } => TxnOp::delete(self.add(key), None),
        });
        let otherwise: Vec<TxnOp> = look.map(|key| TxnOp::get(self.add(key), None)).into_iter().collect();
        EtcdTxn::new().when(compares.collect::<Vec<_>>()).and_then(ops.collect::<Vec<_>>()).or_else(otherwise)
    }
}

/// A write of a transaction that makes the same transaction fail when it comes a second time.
///
/// The transaction may then be repeated after an unknown outcome: it is done at most once, and if it was, the key
/// shows it. A transaction without such a write is never repeated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Guard<'a> {
    pub(super) key: &'a str,
    value: &'a [u8],
    lease: Option<LeaseId>,
}

impl<'a> Guard<'a> {
    pub(super) fn of(txn: &'a Txn) -> Option<Self> {
        txn.ops.iter().find_map(|op| {
            let Op::Put { key, value, lease } = op else { return None };
            let guarded = txn.compares.iter().any(|compare| match compare {
                Compare::Created { key: compared, revision: 0 } => compared == key,
                Compare::Created { .. } => false,
                Compare::Modified { key: compared, .. } => compared == key,
            });
            guarded.then_some(Self { key, value, lease: *lease })
        })
    }

    /// Whether the key holds what the transaction wrote: the revision of that write.
    pub(super) fn done(&self, found: Option<&KeyValue>) -> Option<Revision> {
        let found = found?;
        (*found.value == *self.value && found.lease == self.lease).then_some(found.mod_revision)
    }
}

/// One change as etcd told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) revision: Revision,
    pub(super) event: Event,
}

impl Told {
    /// `None` for a key that no conductor wrote.
    pub(super) fn new(prefix: &Prefix, event: &etcd_client::Event) -> Option<Self> {
        let kv = event.kv()?;
        let told = prefix.key_value(kv)?;
        // A deletion resets the version; the number of the event's kind may be one this client does not know.
        let event =
            if kv.version() == 0 { Event::Delete { key: told.key.clone() } } else { Event::Put(told) };
        Some(Self { revision: revision(kv.mod_revision()), event })
    }
}

/// A revision came in parts that no longer fit together: list anew.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Torn {
    pub(super) revision: Revision,
}

/// Makes one batch of all changes of a revision, whatever the messages they come in.
///
/// etcd promises whole revisions in each message, in order, none twice. Where it breaks that promise (servers before
/// 3.4.22 and 3.5.5 could go back in time after a partition), repeated changes are left out, and a revision that goes
/// on in another message ends the watch.
#[derive(Debug)]
pub(super) struct Grouper {
    last: Revision,
    keys: BTreeSet<String>,
}

impl Grouper {
    /// Everything up to `since` is known.
    pub(super) fn new(since: Revision) -> Self {
        Self { last: since, keys: BTreeSet::new() }
    }

    /// The batches of one message.
    pub(super) fn group(&mut self, told: Vec<Told>) -> Result<Vec<Batch>, Torn> {
        let (before, known) = (self.last, std::mem::take(&mut self.keys));
        let mut batches: Vec<Batch> = Vec::new();
        for Told { revision, event } in told {
            let key = event_key(&event).to_owned();
            if revision < self.last || (revision == before && known.contains(&key)) {
                continue;
            }
            if revision == before {
                return Err(Torn { revision });
            }
            match batches.last_mut() {
                Some(batch) if batch.revision == revision => batch.events.push(event),
                _ => batches.push(Batch { revision, events: vec![event] }),
            }
            self.last = revision;
        }
        for batch in &mut batches {
            batch.events.sort_by(|a, b| event_key(a).cmp(event_key(b)));
        }
        self.keys = match batches.last() {
            Some(batch) => batch.events.iter().map(|event| event_key(event).to_owned()).collect(),
            None => known,
        };
        Ok(batches)
    }
}

fn event_key(event: &Event) -> &str {
    match event {
        Event::Put(kv) => &kv.key,
        Event::Delete { key } => key,
    }
}

/// etcd's revisions are never negative.
pub(super) fn revision(number: i64) -> Revision {
    u64::try_from(number).unwrap_or(0)
}

fn signed(revision: Revision) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
