//! What a network library must do to carry KV blocks: the narrow waist of every fabric backend.
//!
//! A driver is called by one thread at a time: by the one that opened it alone or, where it can do with that, by any
//! ([`Opened`]). Nothing here needs a lock. It never blocks, but in `open`, `connect` and `disconnect`, each for at most
//! [`CALL_MAX`].
//!
//! Rules every driver keeps, on which memory safety and the fencing of reads rest:
//!
//! 1. A registered [`MemorySpan`] is kept until its registration is gone *and* no posted operation can touch it.
//! 2. Ranges are checked against the registration before anything is posted ([`PostError::Range`]).
//! 3. Every posted operation is reported exactly once by [`Driver::poll`], until the driver is closed.
//! 4. When [`Driver::disconnect`] returns, no operation posted to that peer writes local memory any more; those still
//!    unreported are reported as failed. Where a library does not let go, [`Driver::lingers`] says so, and they are
//!    reported when it does.
//! 5. A completed read is in local memory, a completed write in the *peer's* memory (delivered, not sent), a completed
//!    send no longer needs its buffer.

use std::os::fd::RawFd;
use std::time::Duration;

use crate::memory::MemorySpan;
use crate::wire::ask::ASK_MAX_BYTES;

/// Longest that a driver's call may take.
pub(crate) const CALL_MAX: Duration = Duration::from_secs(2);
/// Most bytes of an address: several rails included.
pub(crate) const ADDRESS_MAX_BYTES: usize = 4096;
/// Most bytes of a request.
pub(crate) const REQUEST_MAX_BYTES: usize = ASK_MAX_BYTES;
/// Most bytes of the key of a registration: several rails included.
pub(crate) const KEY_MAX_BYTES: usize = 2048;

/// What a driver can do, found out when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DriverInfo {
    /// Library, version, provider, devices, for people: `libfabric 1.17.0, tcp;ofi_rxm, 1 rail (lo)`.
    pub(crate) detail: String,
    /// What both ends must have in common, such as the provider; at most 64 bytes.
    pub(crate) wire: String,
    /// Whether the peer must be on this host.
    pub(crate) same_host: bool,
    /// Whether one-sided reads and writes are there.
    pub(crate) read: bool,
    /// See `read`.
    pub(crate) write: bool,
    /// Whether a read is made of messages in software: it costs copies and system calls on either side then.
    pub(crate) emulated: bool,
    /// Longest message of [`Driver::send`], in bytes; 0: there are no messages.
    pub(crate) message_max: usize,
    /// Whether there are requests: messages that nobody has to await by their tag.
    pub(crate) requests: bool,
    /// Longest one-sided operation, in bytes.
    pub(crate) op_max: usize,
    /// Network interfaces used side by side.
    pub(crate) rails: usize,
    /// Kinds of memory that [`Driver::register`] takes besides host memory, or why it does not, for people.
    pub(crate) device_memory: Vec<(&'static str, Result<(), String>)>,
}

/// Who may use a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    /// Local end of operations only.
    Local,
    /// Peers may read it.
    RemoteRead,
    /// Peers may write it: revoked by [`Driver::deregister`] or, where that is no guarantee, by closing the driver.
    RemoteWrite,
}

/// A registration of this driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct LocalId(pub(crate) u32);

/// A peer this driver was connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PeerId(pub(crate) u32);

/// A peer's registration, imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct RemoteId(pub(crate) u32);

/// A range of a local registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LocalRange {
    pub(crate) id: LocalId,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

/// A range of a peer's registration, and the local range that is filled from it or written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) remote: RemoteId,
    pub(crate) offset: u64,
    pub(crate) local: LocalRange,
}

/// Most pieces of one operation, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PiecesMax {
    pub(crate) read: usize,
    pub(crate) write: usize,
    /// Bytes of a write of several pieces.
    pub(crate) write_bytes: usize,
}

/// Why a library cannot be used, or a call of it failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub(crate) struct DriverError {
    /// For people: what failed, and the library's reason.
    pub(crate) what: String,
    /// What would help, such as the package to install; empty when nothing is known to.
    pub(crate) remedy: String,
}

/// Why an operation was not posted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PostError {
    /// The queues are full: poll, then try again.
    #[error("the queues of the fabric are full")]
    Again,
    /// The range is not within its registration, or longer than the driver takes.
    #[error("a range is outside its registration")]
    Range,
    /// The connection is broken: nothing more can be posted to this peer.
    #[error("{0}")]
    Failed(String),
}

/// The end of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Done {
    /// As given when it was posted.
    pub(crate) op: u64,
    /// Bytes moved (of a receive: bytes that arrived), or the library's reason.
    pub(crate) result: Result<usize, String>,
}

/// A driver that was opened.
pub(crate) enum Opened {
    /// Called and dropped by the thread that opened it.
    Bound(Box<dyn Driver>),
    /// Called by any thread, one at a time.
    Movable(Box<dyn Driver + Send>),
}

/// A network library at work. See the module for the rules.
pub(crate) trait Driver {
    /// What it can do.
    fn info(&self) -> &DriverInfo;

    /// Where peers reach it, at most [`ADDRESS_MAX_BYTES`]: opaque to all but a driver of equal `wire`.
    fn address(&self) -> Vec<u8>;

    /// Registers memory. The key lets a peer's driver use it; empty with [`Access::Local`].
    fn register(&mut self, span: &MemorySpan, access: Access) -> Result<(LocalId, Vec<u8>), DriverError>;

    /// Ends a registration, and its key with it where the library guarantees that.
    fn deregister(&mut self, id: LocalId);

    /// Makes a peer known, to post operations to. `address` is a peer's input: hostile bytes give an error.
    fn connect(&mut self, address: &[u8]) -> Result<PeerId, DriverError>;

    /// Closes the connection; see rule 4.
    fn disconnect(&mut self, peer: PeerId);

    /// Of a disconnected peer: whether the library did not close its connection yet, so that operations that were
    /// posted to it may still write local memory.
    fn lingers(&self, _peer: PeerId) -> bool {
        false
    }

    /// Takes a peer's key. `key` is a peer's input: hostile bytes give an error.
    fn import(&mut self, peer: PeerId, key: &[u8]) -> Result<RemoteId, DriverError>;

    /// Forgets a peer's key.
    fn forget(&mut self, peer: PeerId, remote: RemoteId);

    /// Posts a read of `to.len` bytes at `from_offset` of a peer's registration.
    fn read(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        from_offset: u64,
        to: LocalRange,
        op: u64,
    ) -> Result<(), PostError>;

    /// Posts a write of `from.len` bytes to `to_offset` of a peer's registration.
    fn write(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        to_offset: u64,
        from: LocalRange,
        op: u64,
    ) -> Result<(), PostError>;

    /// Most pieces of one operation: each saves what an operation of its own would cost.
    fn pieces_max(&self) -> PiecesMax {
        PiecesMax { read: 1, write: 1, write_bytes: 0 }
    }

    /// As `read`, of 1 to `pieces_max` pieces with one local registration, reported as one operation of all their bytes.
    fn read_pieces(&mut self, peer: PeerId, pieces: &[Piece], op: u64) -> Result<(), PostError> {
        match pieces {
            [only] => self.read(peer, only.remote, only.offset, only.local, op),
            _ => Err(PostError::Range),
        }
    }

    /// As `write`, of pieces as `read_pieces` takes them.
    fn write_pieces(&mut self, peer: PeerId, pieces: &[Piece], op: u64) -> Result<(), PostError> {
        match pieces {
            [only] => self.write(peer, only.remote, only.offset, only.local, op),
            _ => Err(PostError::Range),
        }
    }

    /// Posts a message, which lands where the peer awaits `tag`; at most `message_max` bytes.
    fn send(&mut self, peer: PeerId, tag: u64, from: LocalRange, op: u64) -> Result<(), PostError>;

    /// Awaits the message of `tag`. Tags are random and used once. A message that comes before may be lost.
    fn receive(&mut self, tag: u64, to: LocalRange, op: u64) -> Result<(), PostError>;

    /// Stops awaiting a message; the receive is then reported, as failed or as done, and its buffer is free from there on.
    fn cancel_receive(&mut self, op: u64);

    /// Posts a request, at most [`REQUEST_MAX_BYTES`], which the peer's driver takes whenever it comes. Only where
    /// [`DriverInfo::requests`] says so. More than the peer can hold are held back or, at the worst, lost.
    fn ask(&mut self, _peer: PeerId, _from: LocalRange, _op: u64) -> Result<(), PostError> {
        Err(PostError::Failed("there are no requests with this library".to_owned()))
    }

    /// The next request that came, from anybody who knows the address: hostile bytes, at most [`REQUEST_MAX_BYTES`].
    fn take_request(&mut self) -> Option<Vec<u8>> {
        None
    }

    /// Makes progress, also of what peers do here, and appends what is done. Returns whether anything happened.
    fn poll(&mut self, done: &mut Vec<Done>) -> bool;

    /// Whether something came from peers since the last call or `arm`, also what no completion tells of: their reads and
    /// writes.
    fn is_visited(&mut self) -> bool {
        false
    }

    /// Prepares to sleep until [`Driver::wait_fd`] is readable; false: something happened meanwhile, poll again.
    fn arm(&mut self) -> bool;

    /// Readable when there is something to poll for, once armed; without, the thread sleeps in short naps.
    fn wait_fd(&self) -> Option<RawFd>;

    /// Most that one sleep may last while operations are outstanding, for libraries that miss wake-ups.
    fn nap(&self) -> Duration {
        Duration::from_millis(1)
    }
}
