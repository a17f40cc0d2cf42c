//! Errors of transfers: every variant is a decision the caller can take.

use std::io;

use baton_config::{Bytes, Epoch, WorkerId};

use crate::plan::PlanError;

/// Why a peer, or this side before asking it, would not serve a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The handoff has no live grant: revoked, or never given.
    #[error("nothing is granted under this handoff")]
    NotGranted,
    /// A descriptor is not inside what the handoff's grant covers.
    #[error("a descriptor is outside the grant")]
    OutsideGrant,
    /// A descriptor names a region the peer does not have, or bytes past its end.
    #[error("a descriptor is outside every region")]
    OutsideRegion,
    /// The request exceeds a limit of the protocol.
    #[error("the request is larger than the protocol allows")]
    TooLarge,
    /// The peer speaks another version of the protocol.
    #[error("the peer speaks another protocol version")]
    Version,
    /// The address belongs to a worker of another name.
    #[error("another worker answers at this address")]
    WrongWorker,
    /// The process is not the one that published the metadata.
    #[error("another process answers at this address")]
    WrongIncarnation,
    /// The peer is at its limit of connections, closing, or has no epoch yet.
    #[error("the peer takes no sessions now")]
    Unavailable,
    /// One side has no token, or not the other's.
    #[error("the two sides do not share a token")]
    Unauthenticated,
    /// The two ends of a fabric have nothing in common.
    #[error("the two ends speak different fabrics")]
    Mismatch,
    /// A queue or a budget of the peer is full: later it may not be.
    #[error("the peer is at a limit")]
    Overloaded,
    /// Bytes that were written do not have the digest announced.
    #[error("the bytes do not have their digest")]
    Corrupt,
    /// The request makes no sense.
    #[error("the request is malformed")]
    Malformed,
    /// A block has no bytes.
    #[error("a block has no bytes")]
    EmptyBlock,
    /// A block's place is not inside the memory of the side that asks.
    #[error("a block is outside the memory given")]
    OutsideMemory,
    /// Two blocks would be put in one place.
    #[error("two blocks overlap in their destination")]
    Overlap,
    /// The path cannot do this with the region's memory.
    #[error("the path does not reach the region's memory")]
    Unreachable,
}

impl Refusal {
    /// All of them, in the order of their codes on the wire: new ones come last.
    pub const ALL: [Self; 17] = [
        Self::NotGranted,
        Self::OutsideGrant,
        Self::OutsideRegion,
        Self::TooLarge,
        Self::Version,
        Self::WrongWorker,
        Self::WrongIncarnation,
        Self::Unavailable,
        Self::Unauthenticated,
        Self::Mismatch,
        Self::Overloaded,
        Self::Corrupt,
        Self::Malformed,
        Self::EmptyBlock,
        Self::OutsideMemory,
        Self::Overlap,
        Self::Unreachable,
    ];

    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotGranted => "not_granted",
            Self::OutsideGrant => "outside_grant",
            Self::OutsideRegion => "outside_region",
            Self::TooLarge => "too_large",
            Self::Version => "version",
            Self::WrongWorker => "wrong_worker",
            Self::WrongIncarnation => "wrong_incarnation",
            Self::Unavailable => "unavailable",
            Self::Unauthenticated => "unauthenticated",
            Self::Mismatch => "mismatch",
            Self::Overloaded => "overloaded",
            Self::Corrupt => "corrupt",
            Self::Malformed => "malformed",
            Self::EmptyBlock => "empty_block",
            Self::OutsideMemory => "outside_memory",
            Self::Overlap => "overlap",
            Self::Unreachable => "unreachable",
        }
    }
}

/// What broke on a link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A system call failed.
    #[error("{step} failed")]
    Io {
        /// What was being done.
        step: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
    /// Bytes whose digest is known arrived as others.
    #[error("known bytes arrived as others")]
    Corrupt,
    /// Not a byte arrived for so long that another path was taken.
    #[error("no progress for {} ms", .0.as_millis())]
    Stalled(std::time::Duration),
    /// The peer sent what the protocol does not allow.
    #[error("the peer broke the protocol")]
    Protocol(#[source] crate::wire::WireError),
    /// The path does not reach the memory of a device: take the blocks through host memory.
    #[error("the path does not reach the device's memory: {0}")]
    Device(String),
    /// The kernel does not let this process copy from the peer's memory.
    #[error(
        "reading the memory of process {pid} is not allowed: both need the same user, and the right to trace \
         (kernel.yama.ptrace_scope = 0, or CAP_SYS_PTRACE)"
    )]
    Trace {
        /// The peer's process.
        pid: i32,
    },
    /// The network library failed, or the connection to the peer's.
    #[error("the fabric failed: {0}")]
    Fabric(String),
    /// A peer's memory could not be mapped.
    #[error("the peer's memory cannot be mapped")]
    Memory(#[source] crate::memory::MemoryError),
}

impl LinkError {
    pub(crate) fn io(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io { step, source },
        }
    }
}

/// Why a block transfer did not complete.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The peer lives in another epoch than the ticket: plan again.
    #[error("ticket for {worker} is from epoch {ticket}, now {}", Now(.current))]
    Stale {
        /// The peer.
        worker: WorkerId,
        /// The epoch asked for.
        ticket: Epoch,
        /// The epoch the peer is in, where it said.
        current: Option<Epoch>,
    },
    /// The peer will not serve this read, now or later: give the handoff up.
    #[error("{worker} refused the read")]
    Refused {
        /// The peer.
        worker: WorkerId,
        /// Why.
        #[source]
        refusal: Refusal,
    },
    /// Bytes arrived that are not the ones the peer digested: read those blocks again, by another path if there is one.
    ///
    /// All other blocks of the read are verified and in place.
    #[error("block {index} from {worker} failed its digest ({} in all)", .corrupt.len())]
    Integrity {
        /// The peer.
        worker: WorkerId,
        /// Position in the read of the first bad block.
        index: usize,
        /// Positions in the read of all bad blocks.
        corrupt: Vec<usize>,
    },
    /// The link failed after `moved` bytes; destination blocks hold garbage.
    #[error("link to {worker} failed after {moved}")]
    Link {
        /// The peer.
        worker: WorkerId,
        /// Bytes received by then.
        moved: Bytes,
        /// What broke.
        #[source]
        source: LinkError,
    },
    /// The deadline passed after `moved` bytes; destination blocks hold garbage, and nothing writes them any more.
    #[error("deadline passed with {worker} after {moved}")]
    Deadline {
        /// The peer.
        worker: WorkerId,
        /// Bytes received by then.
        moved: Bytes,
    },
    /// The two sides' blocks cannot be converted into each other.
    #[error(transparent)]
    Geometry(PlanError),
}

impl TransferError {
    /// The decision as a metric label.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Stale { .. } => ErrorKind::Stale,
            Self::Refused { .. } => ErrorKind::Refused,
            Self::Integrity { .. } => ErrorKind::Integrity,
            Self::Link { .. } => ErrorKind::Link,
            Self::Deadline { .. } => ErrorKind::Deadline,
            Self::Geometry(_) => ErrorKind::Geometry,
        }
    }
}

/// The kinds of [`TransferError`], for counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// [`TransferError::Stale`].
    Stale,
    /// [`TransferError::Refused`].
    Refused,
    /// [`TransferError::Integrity`].
    Integrity,
    /// [`TransferError::Link`].
    Link,
    /// [`TransferError::Deadline`].
    Deadline,
    /// [`TransferError::Geometry`].
    Geometry,
}

impl ErrorKind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Stale, Self::Refused, Self::Integrity, Self::Link, Self::Deadline, Self::Geometry];

    /// As a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stale => "stale",
            Self::Refused => "refused",
            Self::Integrity => "integrity",
            Self::Link => "link",
            Self::Deadline => "deadline",
            Self::Geometry => "geometry",
        }
    }
}

struct Now<'a>(&'a Option<Epoch>);

impl std::fmt::Display for Now<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(epoch) => write!(f, "{epoch}"),
            None => f.write_str("unknown"),
        }
    }
}
