//! The ways blocks move. Each has a serving side, run by the agent, and a link, owned by a session.

pub(crate) mod control;
pub(crate) mod fabric;
pub(crate) mod frames;
#[expect(unsafe_code, reason = "asks the system for signal handlers")]
pub(crate) mod handlers;
pub(crate) mod handshake;
#[expect(unsafe_code, reason = "calls libfabric")]
pub(crate) mod libfabric;
pub(crate) mod plugin;
pub(crate) mod shm;
#[expect(unsafe_code, reason = "asks about descriptors that a network library owns")]
pub(crate) mod sockets;
pub(crate) mod tcp;
#[expect(unsafe_code, reason = "calls UCX")]
pub(crate) mod ucx;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use baton_config::{Epoch, HandoffId, WorkerId};
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::agent::DeviceMemory;
use crate::error::{LinkError, Refusal};
use crate::memory::HostMemory;
use crate::session::{BlockRead, BlockWrite, Destination, Expected};
use crate::wire::{self, Header, Hello, WireError};

/// How long a peer may take to answer a connection and its handshake.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Who connects to whom.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) from: WorkerId,
    pub(crate) from_epoch: Epoch,
    pub(crate) to: WorkerId,
    pub(crate) epoch: Epoch,
    pub(crate) incarnation: u128,
}

impl Pair {
    /// How every connection of the pair begins.
    pub(crate) fn hello(&self, nonce: Option<[u8; wire::NONCE_BYTES]>) -> Hello {
        Hello {
            from: self.from.clone(),
            from_epoch: self.from_epoch,
            to: self.to.clone(),
            incarnation: self.incarnation,
            nonce,
        }
    }
}

/// One read, as a link sees it.
pub(crate) struct ReadJob<'a> {
    pub(crate) handoff: HandoffId,
    pub(crate) blocks: &'a [BlockRead],
    pub(crate) into: Destination<'a>,
    pub(crate) verify: bool,
    pub(crate) progress: &'a Progress,
}

impl ReadJob<'_> {
    /// What the digest of a block must be, where it is to be verified here.
    pub(crate) fn expected(&self, index: usize) -> Option<Expected> {
        let here = self.verify && !matches!(self.into, Destination::Device(_));
        self.blocks[index].expected.filter(|_| here)
    }
}

/// One write, as a link sees it.
pub(crate) struct WriteJob<'a> {
    pub(crate) handoff: HandoffId,
    pub(crate) blocks: &'a [BlockWrite],
    pub(crate) from: &'a HostMemory,
    pub(crate) verify: bool,
    /// Its bytes are those that may have left: a write that has moved none can be tried over another path.
    pub(crate) progress: &'a Progress,
}

/// What a read has moved so far; outlives the read's future, so that a deadline can report it.
#[derive(Debug)]
pub(crate) struct Progress {
    started: Instant,
    moved: AtomicU64,
    first_byte_ns: AtomicU64,
    /// Whether the read waits for its turn on the link, where it cannot move.
    queued: AtomicBool,
    /// A bit per block that is in place and verified: those of the first 64, and the others.
    done: AtomicU64,
    done_later: Box<[AtomicU64]>,
}

impl Progress {
    /// Of a read of so many blocks.
    pub(crate) fn new(blocks: usize) -> Self {
        Self {
            started: Instant::now(),
            moved: AtomicU64::new(0),
            first_byte_ns: AtomicU64::new(0),
            queued: AtomicBool::new(false),
            done: AtomicU64::new(0),
            done_later: (1..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Notes that a block is in place and, where it is to be, verified. A link says so for every block that it does
    /// not report as corrupt, after the last byte was written and before the next await: what is not noted when the
    /// link fails is read again over another path. Only the task that reads calls this.
    pub(crate) fn finish(&self, block: usize) {
        let word = self.done_word(block);
        word.store(word.load(Ordering::Relaxed) | 1 << (block % 64), Ordering::Relaxed);
    }

    pub(crate) fn is_finished(&self, block: usize) -> bool {
        self.done_word(block).load(Ordering::Relaxed) & 1 << (block % 64) != 0
    }

    fn done_word(&self, block: usize) -> &AtomicU64 {
        match (block / 64).checked_sub(1) {
            None => &self.done,
            Some(later) => &self.done_later[later],
        }
    }

    /// Says whether the read waits for its turn on the link: that is no sign of a broken path.
    pub(crate) fn set_queued(&self, queued: bool) {
        self.queued.store(queued, Ordering::Relaxed);
    }

    /// Waits for `turn`, and says so for as long as that takes.
    pub(crate) async fn queued<T>(&self, turn: impl Future<Output = T>) -> T {
        self.set_queued(true);
        let turn = turn.await;
        self.set_queued(false);
        turn
    }

    pub(crate) fn is_queued(&self) -> bool {
        self.queued.load(Ordering::Relaxed)
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Counts bytes. Only the task that reads does so: no read-modify-write, which would wait for the copy's stores.
    pub(crate) fn add(&self, bytes: usize) {
        let moved = self.moved.load(Ordering::Relaxed);
        if moved == 0 {
            let ns = self.started.elapsed().as_nanos() as u64;
            self.first_byte_ns.store(ns, Ordering::Relaxed);
        }
        self.moved.store(moved + bytes as u64, Ordering::Relaxed);
    }

    /// Counts all the bytes of a read at once, as `add` does: the first came with the last, without a look at the clock.
    pub(crate) fn add_all(&self, bytes: usize) {
        self.moved.store(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// When the first byte came; none: with the last, or none did.
    pub(crate) fn first_byte(&self) -> Option<Duration> {
        let ns = self.first_byte_ns.load(Ordering::Relaxed);
        (ns > 0).then(|| Duration::from_nanos(ns))
    }
}

/// Why a link could not be made or a read on it failed.
#[derive(Debug)]
pub(crate) enum Fault {
    Stale(Option<Epoch>),
    Refused(Refusal),
    Link(LinkError),
}

impl Fault {
    pub(crate) fn protocol(error: WireError) -> Self {
        match error {
            WireError::Version(_) => Self::Refused(Refusal::Version),
            WireError::Forged => Self::Refused(Refusal::Unauthenticated),
            other => Self::Link(LinkError::Protocol(other)),
        }
    }

    /// What a `Refused` frame means.
    pub(crate) fn refused(header: &Header) -> Self {
        match wire::decode_refusal(header) {
            Ok(refusal) => Self::Refused(refusal),
            Err(current) => Self::Stale(current),
        }
    }
}

impl From<LinkError> for Fault {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

/// A session's end of a path.
pub(crate) enum Link {
    Shm(shm::link::ShmLink),
    Fabric(fabric::link::FabricLink),
    Tcp(tcp::link::TcpLink),
}

impl Link {
    /// Reads: the positions of the blocks that failed their digest; all others are in place.
    pub(crate) fn read<'a>(&'a self, job: &'a ReadJob<'a>) -> BoxFuture<'a, Result<Vec<usize>, Fault>> {
        match (self, job.into) {
            (_, Destination::Device(memory)) => Box::pin(async move {
                self.reaches(memory).await.map_err(LinkError::Device)?;
                match self {
                    Self::Shm(_) | Self::Tcp(_) => Err(Fault::Refused(Refusal::Unreachable)),
                    Self::Fabric(link) => link.read(job).await,
                }
            }),
            (Self::Shm(link), _) => Box::pin(link.read(job)),
            (Self::Fabric(link), _) => Box::pin(link.read(job)),
            (Self::Tcp(link), _) => Box::pin(link.read(job)),
        }
    }

    /// Writes blocks; done when they are in place and verified by the peer.
    pub(crate) fn write<'a>(&'a self, job: &'a WriteJob<'a>) -> BoxFuture<'a, Result<(), Fault>> {
        match self {
            Self::Tcp(link) => Box::pin(link.write(job)),
            Self::Fabric(link) => Box::pin(link.write(job)),
            Self::Shm(link) => Box::pin(link.write(job)),
        }
    }

    /// Whether a read can go straight into the memory of a device.
    pub(crate) async fn reaches(&self, memory: &DeviceMemory) -> Result<(), String> {
        match self {
            Self::Shm(_) => Err("shm copies to host memory only".to_owned()),
            Self::Fabric(link) => link.reaches(memory).await,
            Self::Tcp(_) => Err("tcp receives into host memory only".to_owned()),
        }
    }

    /// Whether a read may work: `tcp` opens new streams by itself, `shm` ends with its peer.
    pub(crate) fn is_usable(&self) -> bool {
        match self {
            Self::Shm(link) => link.is_alive(),
            Self::Fabric(link) => link.is_usable(),
            Self::Tcp(_) => true,
        }
    }
}
