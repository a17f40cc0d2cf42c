//! What a worker is told at start.

use std::path::PathBuf;
use std::time::Duration;

use baton_config::fleet::{self, ConductorAccess, EngineSpec, Fleet, ModelDirectory, SimSpec, TransferPath};
use baton_config::{Accelerator, Bytes, Dtype, KvGeometry, KvLayout, PoolName, Role, WorkerId};
use baton_engine::sim::SimConfig;
use baton_engine::{EngineLimits, ModelInfo};

use crate::handoff;

mod transfer;

pub use self::transfer::{TokenFault, TransferOptions};

/// The default of [`WorkerOptions::stalled`].
pub const STALLED: Duration = Duration::from_secs(60);

/// Everything a worker needs to know.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Its name.
    pub worker: WorkerId,
    /// Its pool.
    pub pool: PoolName,
    /// What it does.
    pub role: Role,
    /// Model id it serves.
    pub model: String,
    /// What computes.
    pub engine: EngineChoice,
    /// Batching.
    pub limits: EngineLimits,
    /// Where its KV cache lies.
    pub arena: ArenaOptions,
    /// How blocks move.
    pub transfer: TransferOptions,
    /// Host that peers and routers are told; that of the listening address without.
    pub advertise: Option<String>,
    /// `http://host:port` of each conductor.
    pub conductors: Vec<String>,
    /// What is shown to the conductors, and whom to believe.
    pub conductor_access: ConductorAccess,
    /// Requests and handoffs at once.
    pub in_flight_max: u32,
    /// Bytes of a request body.
    pub body_max: Bytes,
    /// A client that takes no token for so long has left without saying so.
    pub stalled: Duration,
    /// How long work in flight may take to end once the worker drains.
    pub drain_grace: Duration,
    /// Whether a prompt of which little is missing is prefilled here though another worker was to do it.
    pub local_prefill: bool,
    /// How long joining the fleet may take.
    pub join_timeout: Duration,
    /// Bounds of the handoff.
    pub handoff: handoff::Limits,
}

/// What computes.
#[derive(Debug, Clone, PartialEq)]
pub enum EngineChoice {
    /// The embedded transformer.
    Reference {
        /// Model directory.
        model_dir: PathBuf,
        /// Threads.
        threads: usize,
    },
    /// The timing model.
    Sim {
        /// How it behaves.
        config: SimConfig,
        /// The model it stands for.
        model: ModelInfo,
    },
}

impl EngineChoice {
    /// The word of the fleet document.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Reference { .. } => "reference",
            Self::Sim { .. } => "sim",
        }
    }
}

/// Where the KV cache lies.
#[derive(Debug, Clone, PartialEq)]
pub struct ArenaOptions {
    /// On a device instead of host memory.
    pub device: Option<DeviceOptions>,
    /// Shape of a block.
    pub geometry: KvGeometry,
    /// Blocks.
    pub blocks: u32,
    /// Host memory that blocks pass through, for each direction, where peers do not read them in their place.
    pub staging: Bytes,
}

impl ArenaOptions {
    /// Whether blocks pass through staging on their way out: from a device, or to become one run of memory.
    pub fn is_staged(&self) -> bool {
        self.device.is_some() || !self.geometry.layout.is_block_first()
    }
}

/// A device whose memory holds the KV cache.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceOptions {
    /// Which one.
    pub kind: DeviceKind,
    /// Whether blocks go straight between its memory and the wire, by paths that reach it.
    pub direct: bool,
}

/// What kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// An emulated one.
    Simulated {
        /// Copy speed; as fast as the machine without.
        bytes_per_s: Option<u64>,
        /// Whether networks reach its memory, as they do that of a GPU.
        reachable: bool,
    },
    /// An NVIDIA GPU.
    Cuda {
        /// As the driver numbers it.
        ordinal: u32,
    },
    /// An AWS Neuron device.
    Neuron {
        /// The logical NeuronCore whose memory it is.
        core: u32,
    },
}

/// Why a pool of the fleet document cannot be run by this worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// No such pool.
    #[error("the fleet has no pool {pool} (it has {})", .known.join(", "))]
    NoPool {
        /// As asked.
        pool: PoolName,
        /// Names there are.
        known: Vec<String>,
    },
    /// An engine this worker can't run.
    #[error(
        "pool {pool} asks for engine {kind}, which is not one that computes in a worker: those are reference and sim"
    )]
    Engine {
        /// The pool.
        pool: PoolName,
        /// As asked.
        kind: fleet::EngineKind,
    },
    /// None of the pool's backends is in this build.
    #[error("pool {pool} has no backend this build can use: it lacks file and object")]
    Backend {
        /// The pool.
        pool: PoolName,
    },
}

impl WorkerOptions {
    /// Options of replica number `replica` (counted from 0) of a pool of the fleet document.
    ///
    /// # Errors
    /// When the pool is not there, or asks for what this build does not have.
    pub fn from_fleet(
        fleet: &Fleet,
        pool: &PoolName,
        worker: WorkerId,
        replica: u16,
    ) -> Result<Self, OptionsError> {
        let known = || fleet.pools.iter().map(|p| p.name.to_string()).collect();
        let pool =
            fleet.pool(pool).ok_or_else(|| OptionsError::NoPool { pool: pool.clone(), known: known() })?;
        let other = || OptionsError::Engine { pool: pool.name.clone(), kind: pool.engine.kind() };
        // Every fleet has one whose pools compute by themselves.
        let directory = fleet.model.directory.as_ref().ok_or_else(other)?;
        let model_info = model_info(fleet, directory);
        let engine = match &pool.engine {
            EngineSpec::Reference(spec) => {
                EngineChoice::Reference { model_dir: directory.path.clone(), threads: spec.threads }
            }
            EngineSpec::Sim(spec) => {
                EngineChoice::Sim { config: sim_config(spec), model: model_info.clone() }
            }
            _ => return Err(other()),
        };
        let mixed = pool.role == Role::Both;
        let limits = match pool.engine.limits() {
            None => EngineLimits { mixed, ..EngineLimits::default() },
            Some(limits) => EngineLimits {
                prefill_chunk_tokens: limits.prefill_chunk,
                max_batch_sequences: limits.max_batch,
                max_waiting_sequences: limits.max_waiting,
                prefix_cache: limits.prefix_cache,
                mixed,
            },
        };
        let geometry = geometry(&model_info, pool.kv.block_tokens, pool.kv.layout, pool.kv.dtype);
        let device = device_of(pool, replica);
        Ok(Self {
            worker,
            pool: pool.name.clone(),
            role: pool.role,
            model: fleet.model.id.clone(),
            engine,
            limits,
            arena: ArenaOptions {
                device,
                geometry,
                blocks: pool.kv.capacity.blocks(geometry.block_bytes()),
                staging: pool.transfer.staging,
            },
            transfer: TransferOptions::from_pool(pool, replica)?,
            advertise: pool.advertise.clone(),
            conductors: fleet.conductor.endpoints.clone(),
            conductor_access: fleet.conductor.access.clone(),
            in_flight_max: pool.limits.in_flight,
            body_max: pool.limits.body,
            stalled: STALLED,
            drain_grace: pool.limits.drain_grace,
            local_prefill: fleet.router.disaggregation == fleet::Disaggregation::Auto,
            join_timeout: Duration::from_secs(30),
            handoff: handoff::Limits::default(),
        })
    }
}

/// The model of a fleet as an engine without weights knows it.
fn model_info(fleet: &Fleet, model: &ModelDirectory) -> ModelInfo {
    let shape = &model.shape;
    ModelInfo {
        name: fleet.model.id.clone(),
        vocab: shape.vocab,
        max_context: shape.max_context,
        eos: Vec::new(),
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
    }
}

/// Blocks of a model.
pub fn geometry(model: &ModelInfo, block_tokens: u32, layout: KvLayout, dtype: Dtype) -> KvGeometry {
    let ModelInfo { layers, kv_heads, head_dim, .. } = *model;
    KvGeometry { layers, kv_heads, head_dim, block_tokens, layout, dtype, ..KvGeometry::PLAIN }
}

/// Replica N of a pool takes device N of its host: as many as there are share nothing.
fn device_of(pool: &fleet::Pool, replica: u16) -> Option<DeviceOptions> {
    let number = u32::from(replica);
    let path = pool.transfer.path;
    let (kind, direct) = match pool.accelerator {
        Accelerator::Cpu => return None,
        Accelerator::Simulated => {
            let bytes_per_s = pool.transfer.device_bandwidth.map(|rate| rate.0);
            (DeviceKind::Simulated { bytes_per_s, reachable: false }, false)
        }
        Accelerator::Cuda => (DeviceKind::Cuda { ordinal: number }, path != TransferPath::HostBuffered),
        Accelerator::Trainium => (DeviceKind::Neuron { core: number }, path == TransferPath::Direct),
    };
    Some(DeviceOptions { kind, direct })
}

fn sim_config(spec: &SimSpec) -> SimConfig {
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    SimConfig {
        prefill_base_us: us(spec.prefill_base),
        prefill_per_token_us: us(spec.prefill_per_token),
        prefill_per_pair_ns: us(spec.prefill_per_token2) * 1e3,
        decode_base_us: us(spec.decode_base),
        decode_per_sequence_us: us(spec.decode_per_seq),
        decode_per_context_token_ns: us(spec.decode_per_context_token) * 1e3,
        seed: spec.seed,
        check_kv: spec.check_kv,
        ..SimConfig::default()
    }
}

#[cfg(test)]
mod tests;
