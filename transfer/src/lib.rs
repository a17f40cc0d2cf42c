//! Moves blocks of memory between processes: KV blocks from the worker that computed them to the worker that decodes
//! with them, over the best path that both have.
//!
//! ```text
//! prefill: arena ─► Exporter ─► Agent: regions, grants ◄── shm cma libfabric ucx plugin tcp ── Session ◄─ Importer ─► arena: decode
//! ```
//!
//! # Guide
//!
//! - An [`Agent`] is a process's end of all transfers. It *registers* memory ([`HostMemory`], or that of a [`Device`]) in
//!   few large regions and *grants* parts of them, to be read or written, under a [`HandoffId`].
//! - [`Agent::metadata`] is all that a peer needs to find it: small, opaque, without keys. Publish it as you like.
//! - A [`Session`] is with one peer in one [`Epoch`] (a life of that peer). [`Session::path`] says which backend carries
//!   it and why not the others; a path that breaks gives way to the next.
//! - *Prepare* a read or write once ([`Session::prepare_read`], [`Session::prepare_write`]): it is checked there. *Post* it
//!   as often as you like ([`Prepared::post`]); await it, look at it ([`Posted::is_done`]) or give it up ([`Posted::cancel`]).
//!   [`Session::read`] and [`Session::write`] do all of that in one call.
//! - A *notification* ([`Session::notify`], [`Agent::notifications`]) is a short message that comes after the writes before it.
//! - [`Exporter`], [`Importer`] and [`RelayoutPlan`] sit on top: blocks of an arena as tickets name them, from one
//!   geometry to another, through pinned host memory where the device needs that.
//!
//! Two agents in one process; `examples/two_processes.rs` has two processes and every backend:
//!
//! ```
//! use std::time::Duration;
//!
//! use baton_transfer::*;
//! use tokio::time::Instant;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const EPOCH: Epoch = Epoch(1);
//! const HANDOFF: HandoffId = HandoffId(0x5eed_0001);
//! let soon = || Instant::now() + Duration::from_secs(10);
//! let over_tcp = |name: &str| {
//!     let options = AgentOptions::new(name.parse().expect("a name"));
//!     AgentOptions { backends: vec![BackendKind::Tcp], ..options }
//! };
//!
//! // The owner has two blocks and lets them be read.
//! let owner = Agent::start(over_tcp("prefill-0")).await?;
//! owner.set_epoch(EPOCH);
//! let memory = HostMemory::allocate(8192, "blocks")?;
//! memory.write(4096, &[7; 4096]);
//! let region = owner.register(memory)?;
//! let block = |index: u64| Descriptor { region, offset: index * 4096, len: 4096 };
//! owner.grant(HANDOFF, vec![block(0), block(1)]);
//!
//! // The reader takes them the other way round. The digest of the second one it got with the ticket, say.
//! let reader = Agent::start(over_tcp("decode-0")).await?;
//! reader.set_epoch(EPOCH);
//! let session = reader.connect(&"prefill-0".parse()?, EPOCH, &owner.metadata()).await?;
//! let copies = HostMemory::allocate(8192, "copies")?;
//! let seed = DigestSeed { handoff: HANDOFF, epoch: EPOCH, index: 1 };
//! let expected = Some(Expected { seed, digest: block_digest(seed, &[7; 4096]) });
//! let blocks = vec![
//!     BlockRead { source: block(0), to: 4096, expected: None },
//!     BlockRead { source: block(1), to: 0, expected },
//! ];
//! let read = session.prepare_read(HANDOFF, blocks, Target::Memory(copies.clone()))?;
//! let report = read.post(soon()).await?;
//! assert_eq!(report.bytes, Bytes(8192));
//! let mut bytes = [0; 8192];
//! copies.read(0, &mut bytes);
//! assert!(bytes[..4096] == [7; 4096] && bytes[4096..] == [0; 4096]);
//!
//! // The other direction: a place to write to, and a word when it is done.
//! let mailbox = HostMemory::allocate(4096, "mailbox")?;
//! let place = Descriptor { region: owner.register(mailbox.clone())?, offset: 0, len: 4096 };
//! owner.grant_write(HANDOFF, &[place]);
//! session.write(HANDOFF, &[BlockWrite { from: 0, to: place }], &copies, soon()).await?;
//! session.notify(HANDOFF, b"written", soon()).await?;
//! assert_eq!(owner.notifications().next().await.payload, b"written");
//! mailbox.read(0, &mut bytes[..4096]);
//! assert_eq!(bytes[..4096], [7; 4096]);
//!
//! // The end: no new requests, and once settled nothing is written under this handoff any more. A read that no owner is
//! // asked for (one-sided, over a fabric) may come late: its digests say whether the bytes were still the right ones.
//! owner.revoke(HANDOFF).settled().await;
//! let refused = read.post(soon()).await;
//! assert!(matches!(refused, Err(TransferError::Refused { refusal: Refusal::NotGranted, .. })));
//! # Ok(())
//! # }
//! ```
//!
//! Everything runs on a tokio runtime with time and I/O enabled. What each backend needs, the limits, and how to write a
//! backend of your own in C: `docs/transfer.md`.
//!
//! # Invariants
//!
//! - What is written to a worker's memory was granted by it, in this life, and is fenced before the place is used again.
//! - A block is delivered only with the digest its owner computed for (handoff, epoch, index), of the very bytes copied.
//! - Every frame and every look into control memory names the owner's epoch; any other is refused as stale.
//! - The destination of a read is written only until its future has returned or was dropped: then it is fenced.
//! - Every wait has a deadline, every frame a bound that is checked before anything is allocated.
//! - An idle session costs no CPU, and nothing of it stays on disk however its process ends, but what libfabric's provider
//!   `shm` leaves (`docs/libfabric.md`).
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
mod random;
pub mod session;
pub mod slab;
mod spin;
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
pub use baton_config::{Bytes, Epoch, HandoffId, WorkerId};
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
