//! What the fleet knows about a worker.

use std::fmt;
use std::sync::Arc;

use baton_config::protocol::BlockCounts;
use baton_config::{Epoch, KvGeometry, PoolName, Role, WorkerId};
use serde::{Deserialize, Serialize};

/// Where a worker is in its life. Draining is final: only a new registration leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Registered, not yet able to take requests (loading, warming up).
    Joining,
    /// Takes requests.
    Ready,
    /// Finishes what it has and then leaves.
    Draining,
}

impl WorkerState {
    /// All states, in the order of a life.
    pub const ALL: [Self; 3] = [Self::Joining, Self::Ready, Self::Draining];

    /// The name used in JSON and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Ready => "ready",
            Self::Draining => "draining",
        }
    }
}

impl fmt::Display for WorkerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One registered worker, as every view shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// Name; unique among live workers.
    pub worker: WorkerId,
    /// This life of it: grows with every registration, fleet-wide.
    pub epoch: Epoch,
    /// The pool it belongs to.
    pub pool: PoolName,
    /// What it does.
    pub role: Role,
    /// Model id it serves.
    pub model: String,
    /// Kind of engine: `reference`, `sim`...
    pub engine: String,
    /// Geometry of its KV blocks; `None` where the engine exports no KV.
    pub kv: Option<KvGeometry>,
    /// `host:port` of its HTTP API.
    pub address: String,
    /// `http://HOST:PORT` of the OpenAI-compatible server that it stands beside, where requests go to that instead of to
    /// the worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// Metadata of its transfer agent, base64; opaque here, without remote keys. Shared by all records of one life;
    /// empty where it was not asked for.
    pub transfer: Arc<str>,
    /// Where it is in its life.
    pub state: WorkerState,
    /// Operating-system process id, for people.
    pub pid: u32,
}

impl WorkerRecord {
    /// The same for those who have no use for transfer metadata.
    pub(crate) fn without_metadata(self: &Arc<Self>) -> Arc<Self> {
        if self.transfer.is_empty() {
            return Arc::clone(self);
        }
        Arc::new(Self { transfer: Arc::default(), ..Self::clone(self) })
    }
}

/// How busy a worker is, told with its keepalives. Kept in the conductor's memory only, never in the store.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Load {
    /// Requests the engine is working on.
    pub requests_running: u32,
    /// Requests waiting for room.
    pub requests_waiting: u32,
    /// Prompt tokens queued or being computed.
    pub prefill_tokens_pending: u64,
    /// KV blocks by state.
    pub kv_blocks: BlockCounts,
    /// The last thing that went wrong, for people; cut to [`LAST_ERROR_MAX_BYTES`] by the sender.
    pub last_error: Option<String>,
}

/// Longest `last_error` the conductor takes.
pub const LAST_ERROR_MAX_BYTES: usize = 1024;
