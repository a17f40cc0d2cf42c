//! Moves KV blocks from the worker that computed them to the worker that decodes with them.
//!
//! An [`Agent`] registers memory, grants handoffs the right to read parts of it, and reads from peers through a
//! [`Session`] over the best path both sides have: `shm` (the peer's memory mapped read-only) on one host, `tcp`
//! (own framing, several streams, vectored) everywhere.
//!
//! ```text
//! prefill: arena ─► Exporter ─► Agent: regions, grants ◄── tcp streams, or mapped memory ── Session ◄─ Importer ─► arena: decode
//! ```
//!
//! Invariants:
//! - Nobody writes into another worker's memory: the reader reads, and what it maps is sealed against writing.
//! - A block is delivered only with the digest its owner computed for (handoff, epoch, index), of the very bytes copied.
//! - Every frame and every look into control memory names the owner's epoch; any other is refused as stale.
//! - The destination of a read is written only while its future is polled: returned or dropped, it is fenced.
//! - Every wait has a deadline, every frame a bound that is checked before anything is allocated.
//! - An idle session costs no CPU, and nothing of it stays on disk however its process ends.
#![deny(unsafe_code)]

pub mod agent;
pub mod arena_memory;
pub mod auth;
mod backend;
pub mod bench;
pub mod device;
pub mod digest;
pub mod error;
pub mod export;
pub mod import;
mod jobs;
pub mod layout;
#[expect(unsafe_code, reason = "maps memory and hands it to the kernel")]
pub mod memory;
pub mod plan;
pub mod probe;
pub mod session;
pub mod slab;
pub mod stats;
pub mod wire;

pub use agent::{
    Agent, AgentOptions, BackendKind, Choose, ConnectError, DeviceMemory, Integrity, Notification,
    Notifications, RegionId, RegisterError, Revoked, StartError, TransferLimits,
};
pub use arena_memory::ArenaMemory;
pub use auth::{Token, TokenError};
pub use backend::libfabric::LibfabricOptions;
pub use backend::plugin::PluginOptions;
pub use backend::shm::probe_cma;
pub use backend::ucx::UcxOptions;
pub use device::{
    BlockKernels, Device, DeviceError, EmulatedDevice, Move, MoveLoop, Pinned, Submitted, Unavailable,
};
pub use digest::{BlockDigest, DigestSeed, block_digest};
pub use error::{ErrorKind, LinkError, Refusal, TransferError};
pub use export::{ExportBlock, ExportError, ExportOptions, Exporter, ExporterError};
pub use import::{ImportOptions, Importer, Pull, PullCause, PullError, PullReport};
pub use memory::{HostMemory, MemoryError, MemorySpan, Place};
pub use plan::{
    Choice, DIRECT_RUN_MIN_BYTES, Mismatch, PlanCache, PlanCacheCounts, PlanError, RelayoutPlan, TpSource,
    tp_sources,
};
pub use session::{
    BlockRead, BlockSink, BlockWrite, Descriptor, Destination, Expected, PathInfo, Posted, Prepared,
    ReadReport, Session, SessionStats, Target,
};
pub use slab::{Slab, SlabCounts, SlabError};
pub use stats::Stats;
