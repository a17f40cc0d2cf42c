//! A session: reads from one peer in one epoch, over the path chosen for the pair.

use std::sync::Arc;
use std::time::Duration;

use baton_config::{Bytes, Epoch, HandoffId, WorkerId};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::agent::{BackendKind, DeviceMemory, Integrity, RegionId};
use crate::backend::{Fault, Link, Pair, Progress, ReadJob};
use crate::digest::DigestSeed;
use crate::error::{LinkError, Refusal, TransferError};
use crate::memory::HostMemory;
use crate::stats::{Counters, PathMeter};
use crate::wire::MAX_READ_BYTES;

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
    /// Straight into memory of a device, block by block at [`BlockRead::to`], where the path reaches it (see
    /// [`Session::reaches`]). Digests are not verified: only the device can look at the bytes, the caller asks it.
    Device(&'a DeviceMemory),
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
pub struct Session(Arc<Inner>);

struct Inner {
    pair: Pair,
    path: PathInfo,
    link: Link,
    verify: bool,
    counters: Arc<Counters>,
    meter: PathMeter,
    closed: CancellationToken,
}

impl Session {
    pub(crate) fn new(
        pair: Pair,
        path: PathInfo,
        link: Link,
        integrity: Integrity,
        counters: Arc<Counters>,
        closed: CancellationToken,
    ) -> Self {
        let verify = integrity == Integrity::Digest;
        Self(Arc::new(Inner { pair, path, link, verify, counters, meter: PathMeter::default(), closed }))
    }

    /// The peer.
    pub fn peer(&self) -> &WorkerId {
        &self.0.pair.to
    }

    /// The life of the peer this session belongs to.
    pub fn epoch(&self) -> Epoch {
        self.0.pair.epoch
    }

    /// How blocks travel, and why so.
    pub fn path(&self) -> &PathInfo {
        &self.0.path
    }

    /// What was measured so far.
    pub fn stats(&self) -> SessionStats {
        self.0.meter.snapshot()
    }

    /// Whether a read may work. A `tcp` session opens new streams by itself; a `shm` session ends with its peer.
    pub fn is_usable(&self) -> bool {
        !self.0.closed.is_cancelled() && self.0.link.is_usable()
    }

    /// Whether reads can go straight into the memory of a device, which is registered for that if need be.
    ///
    /// # Errors
    /// Why not, for people: take the blocks through host memory then.
    pub async fn reaches(&self, memory: &DeviceMemory) -> Result<(), String> {
        self.0.link.reaches(memory).await
    }

    /// Reads blocks granted under `handoff`; done when every byte is in place and verified.
    ///
    /// Fencing: the destination is written only while this future is being polled. Once it has returned, with
    /// whatever result, or was dropped, nothing of this read writes the destination any more, and its blocks may be
    /// reused at once. A stream with bytes still under way is closed, so that they land nowhere.
    ///
    /// Reads of one session run side by side up to its number of streams, and then in order of arrival.
    ///
    /// # Errors
    /// Each variant of [`TransferError`] but `Geometry` says what to do next.
    ///
    /// # Panics
    /// When a block's place is not within the destination memory, or a block has no bytes.
    pub async fn read(
        &self,
        handoff: HandoffId,
        blocks: &[BlockRead],
        into: Destination<'_>,
        deadline: Instant,
    ) -> Result<ReadReport, TransferError> {
        for block in blocks {
            assert!(block.source.len > 0, "a block has bytes");
            let fits = match into {
                Destination::Memory(memory) => memory.fits(block.to, block.source.len as usize),
                Destination::Device(memory) => memory.fits(block.to, block.source.len as usize),
                Destination::Sink(_) => true,
            };
            assert!(fits, "{block:?} is outside its destination");
        }
        let progress = Progress::new();
        let job = ReadJob { handoff, blocks, into, verify: self.0.verify, progress: &progress };
        let outcome = self.run(&job, deadline).await;
        self.0.account(&outcome, &progress);
        outcome
    }

    async fn run(&self, job: &ReadJob<'_>, deadline: Instant) -> Result<ReadReport, TransferError> {
        let Inner { pair, link, closed, .. } = &*self.0;
        let moved = || Bytes(job.progress.moved());
        let worker = || pair.to.clone();
        if job.blocks.is_empty() {
            return Ok(ReadReport { bytes: Bytes(0), elapsed: job.progress.elapsed() });
        }
        if job.blocks.iter().any(|block| u64::from(block.source.len) > MAX_READ_BYTES) {
            return Err(TransferError::Refused { worker: worker(), refusal: Refusal::TooLarge });
        }
        let read = async {
            if let Destination::Device(memory) = job.into {
                link.reaches(memory).await.map_err(LinkError::Device)?;
            }
            link.read(job).await
        };
        let outcome = tokio::select! {
            biased;
            () = closed.cancelled() => Err(LinkError::Closed.into()),
            outcome = timeout_at(deadline, read) => match outcome {
                Ok(outcome) => outcome,
                Err(_) => return Err(TransferError::Deadline { worker: worker(), moved: moved() }),
            },
        };
        match outcome {
            Ok(mut corrupt) if !corrupt.is_empty() => {
                corrupt.sort_unstable();
                Err(TransferError::Integrity { worker: worker(), index: corrupt[0], corrupt })
            }
            Ok(_) => Ok(ReadReport { bytes: moved(), elapsed: job.progress.elapsed() }),
            Err(Fault::Stale(current)) => {
                Err(TransferError::Stale { worker: worker(), ticket: pair.epoch, current })
            }
            Err(Fault::Refused(refusal)) => Err(TransferError::Refused { worker: worker(), refusal }),
            Err(Fault::Link(source)) => Err(TransferError::Link { worker: worker(), moved: moved(), source }),
        }
    }
}

impl Inner {
    fn account(&self, outcome: &Result<ReadReport, TransferError>, progress: &Progress) {
        self.counters.read(self.path.backend, progress.moved());
        match outcome {
            Ok(report) => self.meter.record(report.bytes.0, report.elapsed, progress.first_byte()),
            Err(error) => {
                self.counters.error(error.kind());
                if let TransferError::Integrity { corrupt, .. } = error {
                    self.counters.checksum_mismatches(corrupt.len() as u64);
                }
            }
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({} in epoch {} over {})", self.peer(), self.epoch(), self.path().backend)
    }
}
