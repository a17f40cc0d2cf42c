//! Where the fleet's state lives: one trait with etcd's semantics, so that a conductor does not care which store it has.
//!
//! One revision order over all keys; a transaction that changes something takes one revision, whatever it touches.
//! Keys may hang on a lease and vanish with it, all of a lease's keys at one revision. A watch tells every change
//! from a revision on, in order, none left out, or says that the history no longer reaches back so far.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;

pub mod embedded;
pub mod etcd;
pub(crate) mod memory;
#[cfg(test)]
pub(crate) mod overtaken;
mod state_file;
#[cfg(test)]
pub(crate) mod suite;

/// Largest key, in bytes.
pub const KEY_MAX_BYTES: usize = 256;
/// Largest value, in bytes: the largest registration with room to spare, far below etcd's 1.5 MiB.
pub const VALUE_MAX_BYTES: usize = 128 * 1024;
/// Most comparisons or operations of a transaction.
pub const TXN_MAX_OPS: usize = 64;
/// Most keys of a page.
pub const PAGE_MAX_KEYS: usize = 500;

/// A point in the order of all changes.
pub type Revision = u64;

/// A lease, unique over the life of the store's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// A key with its value and history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// Key.
    pub key: String,
    /// Value.
    pub value: Arc<[u8]>,
    /// When the key came into being.
    pub create_revision: Revision,
    /// When it was last written.
    pub mod_revision: Revision,
    /// What it hangs on.
    pub lease: Option<LeaseId>,
}

/// Some keys in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The revision at which this page was read. Pages of one listing are read at their own revisions: watch from the
    /// *first* page's and ignore what is older than what a page showed.
    pub revision: Revision,
    /// Keys in ascending order.
    pub items: Vec<KeyValue>,
    /// Whether more keys follow the last one.
    pub more: bool,
}

/// A condition of a transaction. 0 stands for "no such key".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key came into being at that revision.
    Created {
        /// Key.
        key: String,
        /// Expected, 0 for absent.
        revision: Revision,
    },
    /// The key was last written at that revision.
    Modified {
        /// Key.
        key: String,
        /// Expected, 0 for absent.
        revision: Revision,
    },
}

/// A write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Creates or replaces a key; an earlier lease is left behind.
    Put {
        /// Key.
        key: String,
        /// Value.
        value: Arc<[u8]>,
        /// What the key hangs on.
        lease: Option<LeaseId>,
    },
    /// Removes a key, if it is there.
    Delete {
        /// Key.
        key: String,
    },
}

impl Op {
    fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// All of `ops` if all of `compares` hold, else nothing. No key may be written twice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// Conditions.
    pub compares: Vec<Compare>,
    /// Writes.
    pub ops: Vec<Op>,
}

/// What a transaction did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxnReply {
    /// Whether the conditions held.
    pub succeeded: bool,
    /// The store's revision now; with `succeeded` and a change, the revision of that change.
    pub revision: Revision,
}

/// A granted lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: LeaseId,
    /// Granted time, maybe more than was asked for.
    pub ttl: Duration,
}

/// One change of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Created or replaced.
    Put(KeyValue),
    /// Removed, by hand or with its lease.
    Delete {
        /// Key.
        key: String,
    },
}

/// All changes of one revision under the watched prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The revision.
    pub revision: Revision,
    /// Its changes, by key.
    pub events: Vec<Event>,
}

/// Why a watch ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// List again and watch from there.
    #[error("the history begins after revision {oldest}")]
    Compacted {
        /// The earliest revision that can be watched from.
        oldest: Revision,
    },
    /// The revision is from another store, or a restored one.
    #[error("revision {asked} has not happened yet, the store is at {current}")]
    Future {
        /// Asked for.
        asked: Revision,
        /// Latest.
        current: Revision,
    },
    /// The store went away: watch again from the last revision seen.
    #[error("the store does not answer")]
    Lost,
}

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Ask for a new lease.
    #[error("there is no lease {0:?}")]
    LeaseNotFound(LeaseId),
    /// The request is beyond a limit or contradicts itself.
    #[error("{0}")]
    Invalid(String),
    /// Try again later; reads and keepalives may still work.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
}

/// How a store is, as far as this process knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreHealth {
    /// Kind, for people: `embedded`, `etcd`.
    pub kind: &'static str,
    /// The member that is asked, where there are several.
    pub endpoint: Option<String>,
    /// Whether the last call was answered.
    pub up: bool,
    /// Time since it last answered anything; `None` before the first answer.
    pub last_ok: Option<Duration>,
    /// What an operator should look at.
    pub problem: Option<String>,
}

/// What a store can do. All calls are bounded in time by the store itself.
pub trait Store: Send + Sync + 'static {
    /// Kind, for people: `embedded` or `etcd`.
    fn kind(&self) -> &'static str;

    /// How the store is. Costs no call: the last ones tell.
    fn health(&self) -> StoreHealth;

    /// Identity of the data: revisions of different instances can't be compared.
    fn instance(&self) -> BoxFuture<'_, Result<String, StoreError>>;

    /// Up to `limit` keys (at most [`PAGE_MAX_KEYS`]) with `prefix`, those after `after`.
    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page, StoreError>>;

    /// Reads one key.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>>;

    /// Compares and writes.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnReply, StoreError>>;

    /// A new lease.
    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<Lease, StoreError>>;

    /// Starts the lease's time anew and tells it; `None` if there is no such lease (any more).
    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<Option<Duration>, StoreError>>;

    /// Ends a lease and its keys; no error if it has already ended.
    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>>;

    /// All changes after revision `since` of keys with `prefix`. The stream ends after an error.
    fn watch(&self, prefix: &str, since: Revision) -> BoxStream<'static, Result<Batch, WatchError>>;
}

/// Refuses keys and values beyond the limits, and transactions that write a key twice.
pub(crate) fn check_txn(txn: &Txn) -> Result<(), StoreError> {
    let invalid = |what: String| Err(StoreError::Invalid(what));
    if txn.compares.len() > TXN_MAX_OPS || txn.ops.len() > TXN_MAX_OPS {
        return invalid(format!("a transaction has at most {TXN_MAX_OPS} comparisons and as many writes"));
    }
    let mut keys = std::collections::BTreeSet::new();
    for op in &txn.ops {
        check_key(op.key())?;
        if !keys.insert(op.key()) {
            return invalid(format!("key {:?} is written twice", op.key()));
        }
        if let Op::Put { key, value, .. } = op
            && value.len() > VALUE_MAX_BYTES
        {
            return invalid(format!(
                "the value of {key:?} has {} bytes, limit {VALUE_MAX_BYTES}",
                value.len()
            ));
        }
    }
    txn.compares.iter().try_for_each(|compare| match compare {
        Compare::Created { key, .. } | Compare::Modified { key, .. } => check_key(key),
    })
}

fn check_key(key: &str) -> Result<(), StoreError> {
    if key.is_empty() || key.len() > KEY_MAX_BYTES {
        return Err(StoreError::Invalid(format!("a key has 1 to {KEY_MAX_BYTES} bytes, not {}", key.len())));
    }
    Ok(())
}
