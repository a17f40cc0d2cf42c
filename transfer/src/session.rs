//! A session: reads from one peer in one epoch, over the path chosen for the pair.

mod check;
mod failover;
mod prepared;
mod timers;
mod write;

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use baton_config::{Bytes, Epoch, HandoffId, WorkerId};
use futures_util::poll;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use self::prepared::{Posted, Prepared, Target};

pub(crate) use self::check::{collide, overlaps};

use self::failover::Stop;
use self::timers::Timers;
use crate::agent::paths::{Paths, Tried};
use crate::agent::{AgentOptions, BackendKind, DeviceMemory, Integrity, RegionId};
use crate::backend::{Progress, ReadJob};
use crate::digest::DigestSeed;
use crate::error::{ErrorKind, LinkError, TransferError};
use crate::memory::HostMemory;
use crate::stats::{Counters, PathMeter};

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

/// One block to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockWrite {
    /// Offset in the memory it is taken from.
    pub from: usize,
    /// Where it goes, in a region of the peer.
    pub to: Descriptor,
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

/// What a read or a write did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadReport {
    /// Bytes of blocks in place.
    pub bytes: Bytes,
    /// From the call to the last byte verified.
    pub elapsed: Duration,
}

/// The path of a session and how it came to be chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct PathInfo {
    /// Chosen backend.
    pub backend: BackendKind,
    /// Why this one, and why not those preferred to it, for people.
    pub reason: String,
    /// Why not each of the others that this agent uses.
    pub rejected: Vec<(BackendKind, String)>,
    /// Those preferred to the chosen one that do not work now, and why: a network library of the list that is not there
    /// on both sides, or a path that broke.
    pub fallen_from: Vec<(BackendKind, String)>,
    /// Time of a small read when the path was measured.
    pub latency: Option<Duration>,
    /// Of a large read when the path was measured.
    pub bytes_per_second: Option<f64>,
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
    paths: Arc<Paths>,
    avoid: Option<BackendKind>,
    verify: bool,
    stall: Duration,
    /// Held for reading by writes under way.
    writing: tokio::sync::RwLock<()>,
    counters: Arc<Counters>,
    meter: PathMeter,
    timers: Timers,
    closed: CancellationToken,
}

impl Session {
    pub(crate) fn new(
        paths: Arc<Paths>,
        avoid: Option<BackendKind>,
        options: &AgentOptions,
        counters: Arc<Counters>,
        closed: CancellationToken,
    ) -> Self {
        let verify = options.integrity == Integrity::Digest;
        let meter = PathMeter::default();
        Self(Arc::new(Inner {
            paths,
            avoid,
            verify,
            stall: options.stall,
            writing: tokio::sync::RwLock::default(),
            counters,
            meter,
            timers: Timers::default(),
            closed,
        }))
    }

    /// The peer.
    pub fn peer(&self) -> &WorkerId {
        &self.0.paths.pair.to
    }

    /// The life of the peer this session belongs to.
    pub fn epoch(&self) -> Epoch {
        self.0.paths.pair.epoch
    }

    /// How blocks travel now, and why so: a path that breaks, or is found to be slower, gives way to another.
    pub fn path(&self) -> PathInfo {
        self.0.paths.info(self.0.avoid)
    }

    /// What was measured so far.
    pub fn stats(&self) -> SessionStats {
        self.0.meter.snapshot()
    }

    /// Whether a read may work: not when every path has broken. A lone `tcp` path opens new streams by itself.
    pub fn is_usable(&self) -> bool {
        !self.0.closed.is_cancelled() && self.0.paths.is_usable(self.0.avoid)
    }

    /// Whether reads verify digests; those into the memory of a device leave that to the caller.
    pub fn verifies(&self) -> bool {
        self.0.verify
    }

    /// Counts blocks that the caller found corrupt.
    pub(crate) fn count_corrupt(&self, blocks: usize) {
        self.0.counters.error(ErrorKind::Integrity);
        self.0.counters.checksum_mismatches(blocks as u64);
    }

    /// Whether reads can go straight into the memory of a device, which is registered for that if need be.
    ///
    /// # Errors
    /// Why not, for people: take the blocks through host memory then.
    pub async fn reaches(&self, memory: &DeviceMemory) -> Result<(), String> {
        self.0.reaches(memory).await
    }

    /// Reads blocks granted under `handoff`; done when every byte is in place and verified.
    ///
    /// Fencing: the destination is written only while this future is being polled. Once it has returned, with
    /// whatever result, or was dropped, nothing of this read writes the destination any more, and its blocks may be
    /// reused at once. A stream with bytes still under way is closed, so that they land nowhere.
    ///
    /// Reads of one session run side by side; over `tcp` up to its number of streams, and then in order of arrival, but for
    /// one at a time of at most 1 MiB, which waits for no longer one.
    ///
    /// # Errors
    /// Each variant of [`TransferError`] but `Geometry` says what to do next. Blocks that are empty, outside the
    /// destination memory or overlapping there are refused by name before anything is asked of the peer.
    pub async fn read(
        &self,
        handoff: HandoffId,
        blocks: &[BlockRead],
        into: Destination<'_>,
        deadline: Instant,
    ) -> Result<ReadReport, TransferError> {
        match check::read(blocks, &into) {
            Ok(()) => self.run_read(handoff, blocks, into, deadline).await,
            Err(refusal) => Err(TransferError::Refused { worker: self.peer().clone(), refusal }),
        }
    }

    /// As [`Session::read`], of blocks that were checked.
    async fn run_read(
        &self,
        handoff: HandoffId,
        blocks: &[BlockRead],
        into: Destination<'_>,
        deadline: Instant,
    ) -> Result<ReadReport, TransferError> {
        match self.read_at_once(handoff, blocks, into) {
            Some(report) => report,
            // Boxed: a read that is done at once would move its kilobytes all the same.
            None => Box::pin(self.read_over_time(handoff, blocks, into, deadline)).await,
        }
    }

    /// A short read of mapped memory, which takes a microsecond altogether. `None` says nothing: the read starts anew, by
    /// [`Self::read_over_time`].
    fn read_at_once(
        &self,
        handoff: HandoffId,
        blocks: &[BlockRead],
        into: Destination<'_>,
    ) -> Option<Result<ReadReport, TransferError>> {
        let inner = &*self.0;
        if inner.closed.is_cancelled() {
            return None;
        }
        let (backend, link) = inner.paths.mapped(inner.avoid)?;
        let progress = Progress::new(blocks.len());
        let job = ReadJob { handoff, blocks, into, verify: inner.verify, progress: &progress };
        let corrupt = link.read_at_once(&job)?;
        inner.counters.read(backend, progress.moved());
        let report = self.report(&progress, Ok(corrupt));
        inner.account(&report, &progress);
        Some(report)
    }

    async fn read_over_time(
        &self,
        handoff: HandoffId,
        blocks: &[BlockRead],
        into: Destination<'_>,
        deadline: Instant,
    ) -> Result<ReadReport, TransferError> {
        let progress = Progress::new(blocks.len());
        let job = ReadJob { handoff, blocks, into, verify: self.0.verify, progress: &progress };
        let read = pin!(failover::read(&self.0, &job, deadline));
        let outcome = self.until_closed(read).await;
        let report = self.report(&progress, outcome);
        self.0.account(&report, &progress);
        report
    }

    /// Does `work`, unless the session closes before it is done.
    async fn until_closed<T>(
        &self,
        mut work: Pin<&mut impl Future<Output = Result<T, Stop>>>,
    ) -> Result<T, Stop> {
        let closed = &self.0.closed;
        if closed.is_cancelled() {
            return Err(Stop::Fault(LinkError::Closed.into()));
        }
        // Blocks of mapped memory are mostly copied by then: nothing to wait for.
        match poll!(work.as_mut()) {
            Poll::Ready(outcome) => outcome,
            Poll::Pending => tokio::select! {
                biased;
                () = closed.cancelled() => Err(Stop::Fault(LinkError::Closed.into())),
                outcome = work => outcome,
            },
        }
    }
}

impl Inner {
    async fn reaches(&self, memory: &DeviceMemory) -> Result<(), String> {
        let path = self.paths.next(self.avoid, Tried::default()).await;
        match path.ok().flatten() {
            Some(path) => path.link.reaches(memory).await,
            None => Err("there is no path to the peer".to_owned()),
        }
    }

    fn account(&self, outcome: &Result<ReadReport, TransferError>, progress: &Progress) {
        match outcome {
            Ok(report) => {
                let first = progress.first_byte().unwrap_or(report.elapsed);
                self.meter.record(report.bytes.0, report.elapsed, first);
            }
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
