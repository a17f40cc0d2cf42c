//! A session: reads from one peer in one epoch, over the path chosen for the pair.

use std::time::Duration;

use baton_config::{Bytes, Epoch, HandoffId, WorkerId};
use tokio::time::Instant;

use crate::agent::{BackendKind, RegionId};
use crate::digest::DigestSeed;
use crate::error::TransferError;
use crate::memory::HostMemory;

/// Bytes of a peer's region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Descriptor {
    /// The region, as its owner numbers it.
    pub region: RegionId,
    /// Offset in the region, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// The digest a block must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// What it is bound to.
    pub seed: DigestSeed,
    /// Its value.
    pub digest: u64,
}

/// One block to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRead {
    /// Where it is.
    pub source: Descriptor,
    /// Offset in the destination memory; without meaning for a sink.
    pub to: usize,
    /// Verified unless absent or the agent runs with integrity off.
    pub expected: Option<Expected>,
}

/// Takes blocks whose bytes are verified.
pub trait BlockSink: Send + Sync {
    /// Gets the `index`-th block of the read, each once, in any order. `bytes` are in cache and gone after the call.
    ///
    /// It runs on the task that reads: it should take about as long as a copy.
    fn block(&self, index: usize, bytes: &[u8]);
}

impl<F: Fn(usize, &[u8]) + Send + Sync> BlockSink for F {
    fn block(&self, index: usize, bytes: &[u8]) {
        self(index, bytes);
    }
}

/// Where the blocks of a read go.
#[derive(Clone, Copy)]
pub enum Destination<'a> {
    /// Straight into memory, block by block at [`BlockRead::to`]. A block that fails verification leaves garbage.
    Memory(&'a HostMemory),
    /// Through a staging buffer to a sink, which sees verified bytes only.
    Sink(&'a dyn BlockSink),
}

/// What a read did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadReport {
    /// Bytes of blocks in place.
    pub bytes: Bytes,
    /// From the call to the last byte verified.
    pub elapsed: Duration,
}

/// The path of a session and how it came to be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// Chosen backend.
    pub backend: BackendKind,
    /// Why this one, and why not those preferred to it, for people.
    pub reason: String,
}

/// What a session has measured.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SessionStats {
    /// Bytes read in all.
    pub bytes: Bytes,
    /// Decaying mean over reads of at least 64 KiB, in bytes per second.
    pub bytes_per_second: Option<f64>,
    /// Decaying mean time to the first byte.
    pub latency: Option<Duration>,
}

/// Reads blocks of one peer in one epoch. Clones share everything.
#[derive(Clone)]
pub struct Session {
    pub(crate) worker: WorkerId,
    pub(crate) epoch: Epoch,
    pub(crate) path: std::sync::Arc<PathInfo>,
}

impl Session {
    /// The peer.
    pub fn peer(&self) -> &WorkerId {
        &self.worker
    }

    /// The life of the peer this session belongs to.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How blocks travel, and why so.
    pub fn path(&self) -> &PathInfo {
        &self.path
    }

    /// What was measured so far.
    pub fn stats(&self) -> SessionStats {
        SessionStats::default()
    }

    /// Reads blocks granted under `handoff`; done when every byte is in place and verified.
    ///
    /// Fencing: the destination is written only while this future is being polled. Once it has returned, with
    /// whatever result, or was dropped, nothing of this read writes the destination any more.
    ///
    /// # Errors
    /// Each variant of [`TransferError`] but `Geometry` says what to do next.
    pub async fn read(
        &self,
        handoff: HandoffId,
        blocks: &[BlockRead],
        into: Destination<'_>,
        deadline: Instant,
    ) -> Result<ReadReport, TransferError> {
        let _ = (handoff, blocks, into, deadline);
        Err(TransferError::Refused {
            worker: self.worker.clone(),
            refusal: crate::error::Refusal::Unavailable,
        })
    }
}
