//! `pools[]` of the fleet document.

use std::time::Duration;

use super::{EngineSpec, Listen, TransferSpec};
use crate::choice::choice;
use crate::geometry::{Dtype, KvLayout};
use crate::names::{Accelerator, PoolName, Role};
use crate::units::Bytes;

/// Workers of one kind.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Pool {
    /// Unique name.
    pub name: PoolName,
    /// What its workers do.
    pub role: Role,
    /// What holds their KV cache.
    pub accelerator: Accelerator,
    /// What computes.
    pub engine: EngineSpec,
    /// The KV cache of one worker.
    pub kv: KvSpec,
    /// How KV blocks leave and reach it.
    pub transfer: TransferSpec,
    /// Where the first replica listens; the next ones take the following ports.
    pub listen: Listen,
    /// Host or address peers and routers use to reach its workers; the listening one without.
    pub advertise: Option<String>,
    /// Workers wanted, until an operator or the autoscaler wants otherwise.
    pub replicas: u32,
    /// How `replicas` may change by itself.
    pub autoscale: Option<Autoscale>,
    /// What one worker accepts at most.
    pub limits: WorkerLimits,
}

/// The KV cache of one worker. Layers, heads and head size come from the model.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvSpec {
    /// Tokens per block.
    pub block_tokens: u32,
    /// Order within a block.
    pub layout: KvLayout,
    /// Number format.
    pub dtype: Dtype,
    /// How much of it.
    pub capacity: KvCapacity,
}

/// How large a KV cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvCapacity {
    /// As many blocks as fit in so many bytes (`memory:`).
    Memory(Bytes),
    /// So many blocks (`blocks:`).
    Blocks(u32),
}

impl KvCapacity {
    /// The number of blocks of `block_bytes` each.
    pub fn blocks(self, block_bytes: usize) -> u32 {
        match self {
            Self::Memory(bytes) => u32::try_from(bytes.0 / block_bytes.max(1) as u64).unwrap_or(u32::MAX),
            Self::Blocks(blocks) => blocks,
        }
    }
}

choice! {
    /// Who starts and stops workers.
    ScalerKind {
        /// Nobody; the desired number is only exported.
        None => "none",
        /// `baton up`, as child processes.
        Process => "process",
        /// The scale subresource of a Kubernetes object.
        Kubernetes => "kubernetes",
        /// A web hook.
        Webhook => "webhook",
    }
}

/// How the number of replicas may change by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Autoscale {
    /// Never fewer.
    pub min: u32,
    /// Never more.
    pub max: u32,
    /// Who starts and stops workers.
    pub scaler: ScalerKind,
    /// Time requests may wait before the pool grows.
    pub queue_wait: Duration,
}

/// What one worker accepts at most.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerLimits {
    /// Requests and handoffs at once.
    pub in_flight: u32,
    /// Bytes of a request body.
    pub body: Bytes,
    /// How long work in flight may take to end once the worker drains.
    pub drain_grace: Duration,
}
