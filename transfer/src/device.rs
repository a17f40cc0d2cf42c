//! Accelerator memory: an arena that the network cannot reach, only explicit copies can.
//!
//! A worker on an accelerator keeps its KV arena in a [`Device`]. Its compute reads and writes the arena where it is;
//! transfers go through host memory (see [`crate::slab`]). [`EmulatedDevice`] stands for such an accelerator, Trainium
//! first of all, on machines without one, and forces the same path.

use std::any::Any;
use std::fmt;

use crate::digest::DigestSeed;
use crate::memory::{HostMemory, MemorySpan};

mod calls;
#[expect(unsafe_code, reason = "calls the CUDA driver")]
pub mod cuda;
mod emulated;
#[expect(unsafe_code, reason = "calls the Neuron runtime")]
pub mod neuron;
#[cfg(test)]
mod tests;

pub use self::emulated::EmulatedDevice;

/// What a device did not do.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A copy between device and host memory failed: the destination range holds garbage.
    #[error("a copy of {len} bytes at {offset} {direction} {kind} memory failed")]
    Copy {
        /// What kind of device.
        kind: &'static str,
        /// `from` or `to`, seen from the host.
        direction: &'static str,
        /// Where in device memory.
        offset: usize,
        /// Bytes of the copy.
        len: usize,
        /// The driver's reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Work on the device's own processors failed: what it was to write holds garbage.
    #[error("{work} on {kind} failed")]
    Work {
        /// What kind of device.
        kind: &'static str,
        /// What it was to do.
        work: &'static str,
        /// The driver's reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A device, or the library that drives it, cannot be used on this machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct Unavailable {
    /// What is missing or failed, for people.
    pub what: String,
    /// What would help, such as the package to install.
    pub remedy: String,
}

/// Memory of an accelerator.
///
/// Units: offsets and lengths in bytes from the start of the arena. Concurrent access to one range is the caller's
/// to prevent: in Baton a KV block has one writer at any time. Every method panics on a range outside the memory,
/// which is a bug of the caller.
pub trait Device: Send + Sync + fmt::Debug {
    /// What it is, for people: `simulated`, `cuda`, `trainium`...
    fn kind(&self) -> &'static str;

    /// Bytes of the arena.
    fn len(&self) -> usize;

    /// Whether there is no arena at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the device's own compute does to load numbers. Not for transfers. Panics when the device fails: nothing
    /// can be computed without it.
    fn read(&self, offset: usize, into: &mut [u8]);

    /// What the device's own compute does to store numbers. Not for transfers. Panics as [`Device::read`] does.
    fn write(&self, offset: usize, from: &[u8]);

    /// Starts a copy from device to host. Returns at once; the bytes are there when the result is finished.
    ///
    /// # Errors
    /// When the device takes no copies.
    fn submit_to_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError>;

    /// Starts a copy from host to device. Returns at once; the host range must stay as it is, and the bytes are
    /// there, when the result is finished.
    ///
    /// # Errors
    /// When the device takes no copies.
    fn submit_from_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError>;

    /// Copies device to host and returns when the bytes are there. Blocks: call it on a thread that may.
    ///
    /// # Errors
    /// When the device reports a failed copy.
    fn copy_to_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<(), DeviceError> {
        self.submit_to_host(offset, host, host_offset, len)?.finish()
    }

    /// Copies host to device and returns when the bytes are there. Blocks: call it on a thread that may.
    ///
    /// # Errors
    /// When the device reports a failed copy.
    fn copy_from_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<(), DeviceError> {
        self.submit_from_host(offset, host, host_offset, len)?.finish()
    }

    /// Starts copies of blocks of `len` bytes from device to host: each pair is where one is and where it goes.
    ///
    /// # Errors
    /// When the device takes no copies.
    fn submit_blocks_to_host(
        &self,
        blocks: &[(usize, usize)],
        host: &HostMemory,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        let copies: Result<Vec<Submitted>, DeviceError> =
            blocks.iter().map(|(from, to)| self.submit_to_host(*from, host, *to, len)).collect();
        let copies = copies?;
        Ok(Submitted::new(move || copies.into_iter().try_for_each(Submitted::finish)))
    }

    /// Makes copies from and to this host memory as fast as the device can, until the result is dropped.
    ///
    /// # Errors
    /// Why they stay slow, for people; they work all the same.
    fn pin(&self, _memory: &HostMemory) -> Result<Pinned, String> {
        Ok(Pinned::new(()))
    }

    /// What the device's own processors can do with blocks.
    ///
    /// # Errors
    /// Why they can do nothing, for people.
    fn kernels(&self) -> Result<&dyn BlockKernels, String> {
        Err(format!("{} has no kernels for blocks", self.kind()))
    }

    /// The memory as network libraries register it, to move bytes without a copy through the host.
    ///
    /// # Errors
    /// Why they cannot reach it, for people.
    fn span(&self) -> Result<MemorySpan, String> {
        Err(format!("network libraries cannot reach {} memory", self.kind()))
    }
}

/// Work on blocks that a device does itself, without a byte leaving it. Blocks the calling thread until it is done.
pub trait BlockKernels: Send + Sync {
    /// The digests of blocks of `len` bytes at offsets of the device's memory, as [`crate::digest::block_digest`] has
    /// them.
    ///
    /// # Errors
    /// When the device fails.
    fn digest_blocks(&self, blocks: &[(usize, DigestSeed)], len: usize) -> Result<Vec<u64>, DeviceError>;

    /// Copies bytes from places of the device's memory to others, each move on its own: no move may read what another
    /// of the same call writes.
    ///
    /// # Errors
    /// When the device fails.
    fn relayout(&self, moves: &[Move]) -> Result<(), DeviceError>;
}

/// Equal runs of bytes from one place to another, in three nested loops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// Where the first run starts.
    pub from: usize,
    /// Where it goes.
    pub to: usize,
    /// Bytes of each run.
    pub run: usize,
    /// The loops, innermost first.
    pub loops: [MoveLoop; 3],
}

/// A loop of a [`Move`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveLoop {
    /// Steps, at least 1.
    pub count: usize,
    /// Bytes from one run read to the next.
    pub from: usize,
    /// Bytes from one run written to the next.
    pub to: usize,
}

impl MoveLoop {
    /// Once.
    pub const ONCE: Self = Self { count: 1, from: 0, to: 0 };
}

impl Move {
    /// One past the last byte read, and one past the last byte written.
    pub fn ends(&self) -> (usize, usize) {
        let last = |step: fn(&MoveLoop) -> usize| -> usize {
            self.loops.iter().map(|each| each.count.saturating_sub(1) * step(each)).sum()
        };
        (self.from + last(|each| each.from) + self.run, self.to + last(|each| each.to) + self.run)
    }
}

/// A copy under way. Dropping it waits for its end, as [`Submitted::finish`] does: nothing is copied afterwards.
#[must_use = "a copy is waited for when this is dropped"]
pub struct Submitted(Option<Box<dyn FnOnce() -> Result<(), DeviceError> + Send>>);

impl Submitted {
    /// A copy whose end `finish` waits for; it is called once.
    pub fn new(finish: impl FnOnce() -> Result<(), DeviceError> + Send + 'static) -> Self {
        Self(Some(Box::new(finish)))
    }

    /// A copy that has ended.
    pub fn ended() -> Self {
        Self(None)
    }

    /// Returns when the bytes are there. Blocks: call it on a thread that may.
    ///
    /// # Errors
    /// When the device reports a failed copy.
    pub fn finish(mut self) -> Result<(), DeviceError> {
        self.0.take().map_or(Ok(()), |finish| finish())
    }
}

impl Drop for Submitted {
    fn drop(&mut self) {
        if let Some(finish) = self.0.take() {
            // Nobody wants the bytes any more; what matters is that none comes later.
            let _ = finish();
        }
    }
}

impl fmt::Debug for Submitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Submitted")
    }
}

/// Host memory that a device copies from and to at full speed; see [`Device::pin`].
pub struct Pinned(#[expect(dead_code, reason = "held for what its drop does")] Box<dyn Any + Send + Sync>);

impl Pinned {
    /// Pinned for as long as `guard` lives.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Self(Box::new(guard))
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pinned")
    }
}
