//! The messages of the conductor's HTTP API.
//!
//! | method and path | request | answer |
//! |---|---|---|
//! | `GET /v1/workers` | - | [`Listing`]; with `?metadata=no` every `transfer` is empty |
//! | `GET /v1/watch?since=REV` | - | one [`WatchLine`] a line, without end; with `&metadata=no` every `transfer` is empty |
//! | `POST /v1/workers` | [`Register`] | 201 [`Registered`]; 409 `name_taken` with [`Holder`] |
//! | `POST /v1/workers/{id}/keepalive` | [`Keepalive`] | [`Kept`]; 410 `lease_gone`, 409 `stale_epoch`, `replayed` |
//! | `DELETE /v1/workers/{id}?epoch=N` | - | 204 |
//! | `POST /v1/workers/{id}/drain` | - | [`Drained`] |
//! | `GET /v1/pools` | - | [`PoolList`] |
//! | `PUT /v1/pools/{name}/replicas` | [`Replicas`] | [`PoolStatus`] |
//! | `DELETE /v1/pools/{name}/replicas` | - | [`PoolStatus`]: an operator's number is taken back |
//!
//! Where the conductor asks for a token, it is `authorization: Bearer TOKEN`; without it the answer is 401. Bodies are
//! `content-type: application/json`. Every error is an [`ErrorBody`]. Requests refuse unknown fields; answers may gain fields, so readers ignore those
//! that they don't know.

use std::sync::Arc;

use baton_config::{Epoch, KvGeometry, PoolName, Role, WorkerId};
use serde::{Deserialize, Serialize};

use crate::record::{Load, WorkerRecord, WorkerState};

/// Largest body of a request. Metadata of 64 KiB plus the rest of a registration fit.
pub const BODY_MAX_BYTES: usize = 96 * 1024;
/// Largest transfer metadata of a registration, as sent (base64).
pub const TRANSFER_MAX_BYTES: usize = 64 * 1024;
/// Milliseconds between heartbeat lines of a watch.
pub const HEARTBEAT_INTERVAL_MS: u64 = 1_000;

/// `POST /v1/workers`: a worker asks for a lease on its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Register {
    /// Name.
    pub worker: WorkerId,
    /// Random for each process, the same over all its registrations: 32 hex digits.
    pub incarnation: String,
    /// Pool; must be one of the fleet document.
    pub pool: PoolName,
    /// Role; must be the pool's.
    pub role: Role,
    /// Model id.
    pub model: String,
    /// Kind of engine.
    pub engine: String,
    /// KV geometry.
    #[serde(default)]
    pub kv: Option<KvGeometry>,
    /// `host:port` on which the worker already listens.
    pub address: String,
    /// As in [`WorkerRecord::server`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// Transfer metadata, base64.
    #[serde(default)]
    pub transfer: String,
    /// State to start in.
    pub state: WorkerState,
    /// Process id.
    #[serde(default)]
    pub pid: u32,
}

/// The lease was granted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// The new life's number.
    pub epoch: Epoch,
    /// Revision of the fleet at which the worker is visible.
    pub revision: u64,
    /// The lease ends so long after the last keepalive.
    pub ttl_ms: u64,
    /// Keep alive this often.
    pub keepalive_ms: u64,
    /// Whether an operator asked this process to drain (before a lost lease or a restart of the conductor).
    pub drain: bool,
}

/// `POST /v1/workers/{id}/keepalive`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Keepalive {
    /// The life that is kept alive.
    pub epoch: Epoch,
    /// Grows with every keepalive of a life: an equal or older one is refused, as it is a copy or has been overtaken.
    pub seq: u64,
    /// State now; written to the store only when it changed.
    pub state: WorkerState,
    /// How busy it is.
    #[serde(default)]
    pub load: Option<Load>,
}

/// The lease goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The lease ends so long after this keepalive was sent.
    pub ttl_ms: u64,
    /// Whether an operator asked this worker to drain.
    pub drain: bool,
}

/// `POST /v1/workers/{id}/drain` was noted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// The worker.
    pub worker: WorkerId,
    /// Its current life.
    pub epoch: Epoch,
}

/// `PUT /v1/pools/{name}/replicas`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replicas {
    /// Wanted number of workers.
    pub replicas: u32,
}

/// A worker with its last reported load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedWorker {
    /// The record.
    #[serde(flatten)]
    pub record: Arc<WorkerRecord>,
    /// Last reported load, once one was reported to this conductor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<Load>,
    /// Milliseconds since the last keepalive that this conductor saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_ms: Option<u64>,
    /// Milliseconds since this conductor first saw this life of it: at most its age.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known_ms: Option<u64>,
    /// Milliseconds since this conductor first saw it in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_ms: Option<u64>,
}

/// `GET /v1/workers`: the whole fleet at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    /// Identity of the store's data: another value means that revisions can't be compared and entries may be missing.
    pub instance: String,
    /// Kind of store: `embedded`.
    pub store: String,
    /// Watch from here.
    pub revision: u64,
    /// Lease time of workers.
    pub ttl_ms: u64,
    /// Whether the store started less than one ttl ago, so that workers may not have found back yet.
    pub warming: bool,
    /// Live workers by name.
    pub workers: Vec<ListedWorker>,
    /// Workers asked to drain.
    pub drain: Vec<WorkerId>,
    /// Pools and their wanted sizes.
    pub pools: Vec<PoolTarget>,
    /// Whether the conductor that answers leads the reconcilers.
    #[serde(default)]
    pub leader: bool,
    /// All conductors on this store, by name.
    #[serde(default)]
    pub conductors: Vec<ConductorStatus>,
    /// How the store is, as far as the conductor that answers knows.
    #[serde(default)]
    pub store_health: Option<StoreStatus>,
    /// How long that conductor has not been sure to show what is stored: 0 while it follows the store.
    #[serde(default)]
    pub view_age_ms: u64,
    /// Whether the store was away for so long that workers may have lost their leases without being gone, and has not
    /// been back for a whole ttl: workers that are missing now may return.
    #[serde(default)]
    pub settling: bool,
}

/// How the store is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Kind: `embedded`, `etcd`.
    pub kind: String,
    /// The member that is asked, where there are several.
    pub endpoint: Option<String>,
    /// Whether the last call was answered.
    pub up: bool,
    /// Milliseconds since it last answered anything.
    pub last_ok_ms: Option<u64>,
    /// What an operator should look at.
    pub problem: Option<String>,
}

/// One of the conductors on a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConductorStatus {
    /// Name, unique among them.
    pub name: String,
    /// Where it says that it is reached.
    pub url: String,
    /// Whether it leads the reconcilers.
    pub leader: bool,
}

/// A pool of the fleet document and how many workers it should have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolTarget {
    /// Name.
    pub name: PoolName,
    /// What its workers do.
    pub role: Role,
    /// Wanted number of workers: an operator's, or else the autoscaler's, or else the fleet document's.
    pub desired: u32,
    /// Whose number it is.
    #[serde(default)]
    pub source: TargetSource,
    /// With the autoscaler's number: why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Who says how many workers a pool should have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetSource {
    /// The fleet document.
    #[default]
    Document,
    /// The autoscaler.
    Autoscaler,
    /// An operator.
    Operator,
}

/// `GET /v1/pools`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolList {
    /// Revision shown.
    pub revision: u64,
    /// Pools by name.
    pub pools: Vec<PoolStatus>,
}

/// A pool: what is wanted and what is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Name.
    pub name: PoolName,
    /// What its workers do.
    pub role: Role,
    /// Wanted number of workers.
    pub desired: u32,
    /// Whether `desired` was set by an operator and overrides the fleet document.
    pub operator_set: bool,
    /// Least number that can be asked for.
    pub min: u32,
    /// Largest number that can be asked for.
    pub max: u32,
    /// Workers by state.
    pub joining: u32,
    /// Workers by state.
    pub ready: u32,
    /// Workers by state, and workers asked to drain that have not confirmed it.
    pub draining: u32,
    /// Milliseconds for which fewer workers than wanted are ready, as far as this conductor has seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_ms: Option<u64>,
    /// Milliseconds for which none is ready although some are wanted, as far as this conductor has seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_ms: Option<u64>,
    /// What the autoscaler last decided, if the pool has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<AutoscaleStatus>,
}

/// The autoscaler's last decision about a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoscaleStatus {
    /// Number of workers it wants.
    pub desired: u32,
    /// What it was about: `up`, `down`, `adopted`, `steady`, `at_max`, `decode_full`, `futile`, `silent`, `pinned`.
    pub decision: String,
    /// Why, with the figures it follows from.
    pub reason: String,
    /// Whether it is only told.
    pub dry_run: bool,
    /// Who carries it out: `none`, `process`, `kubernetes`, `webhook`.
    pub scaler: String,
    /// Milliseconds since this conductor learned of it.
    pub decided_ms_ago: u64,
    /// Why the scaler can't carry it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// One line of `GET /v1/watch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WatchLine {
    /// Everything that changed at one revision.
    Changes {
        /// The revision; lines come in its order, and a later watch may resume after it.
        revision: u64,
        /// What changed.
        changes: Vec<Change>,
    },
    /// Sent at once when a watch opens and each second: the conductor is alive and `revision` is the latest.
    Heartbeat {
        /// Identity of the store's data.
        instance: String,
        /// All changes up to here were sent.
        revision: u64,
        /// As [`Listing::view_age_ms`].
        #[serde(default)]
        view_age_ms: u64,
        /// As [`Listing::settling`].
        #[serde(default)]
        settling: bool,
    },
    /// The history does not reach back to `since`: list again. The last line.
    Compacted {
        /// The latest revision.
        revision: u64,
    },
}

/// One change of the fleet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    /// A worker registered.
    Put {
        /// The whole new record.
        worker: Arc<WorkerRecord>,
    },
    /// A worker changed its state, and nothing else: that is all that can change within a life.
    State {
        /// Its name.
        worker: WorkerId,
        /// Its life.
        epoch: Epoch,
        /// Its state now.
        state: WorkerState,
    },
    /// A worker left or lost its lease.
    Delete {
        /// Its name.
        worker: WorkerId,
        /// Whether its lease ended without a goodbye.
        #[serde(default)]
        expired: bool,
    },
    /// An operator asked a worker to drain, or that wish ended with the worker.
    Drain {
        /// Its name.
        worker: WorkerId,
        /// Whether it should drain.
        drain: bool,
    },
    /// Another number of workers is wanted.
    Desired {
        /// The pool, as it is now.
        pool: PoolTarget,
    },
}

impl Change {
    /// Whether it carries transfer metadata.
    pub(crate) fn has_metadata(&self) -> bool {
        matches!(self, Self::Put { worker } if !worker.transfer.is_empty())
    }

    /// The same for those who have no use for transfer metadata.
    pub(crate) fn without_metadata(&self) -> Self {
        match self {
            Self::Put { worker } => Self::Put { worker: worker.without_metadata() },
            other => other.clone(),
        }
    }
}

/// The body of every error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// For people.
    pub message: String,
    /// `invalid_request_error`, `authentication_error`, `conflict_error`, `not_found_error` or `unavailable_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// For machines.
    pub code: String,
    /// With `name_taken`: who has the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
}

/// The live worker that has a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The name.
    pub worker: WorkerId,
    /// Its life.
    pub epoch: Epoch,
    /// Where it listens.
    pub address: String,
    /// Its process id.
    pub pid: u32,
}
