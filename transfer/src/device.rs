//! Accelerator memory: an arena that the network cannot reach, only explicit copies can.
//!
//! A worker on an accelerator keeps its KV arena in a [`Device`]. Its compute reads and writes the arena where it is;
//! transfers go through host memory (see [`crate::slab`]). [`EmulatedDevice`] stands for such an accelerator, Trainium
//! first of all, on machines without one, and forces the same path.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::memory::{HostMemory, MemoryError, MemorySpan};

pub mod cuda;
pub mod neuron;
#[cfg(test)]
mod tests;

/// How far an idle copy engine may run ahead of its bandwidth: covers the wake-up latency of a sleeping thread, so
/// that the mean bandwidth is the configured one.
const BURST: Duration = Duration::from_millis(1);

/// A copy between device and host memory failed: the destination range holds garbage.
#[derive(Debug, thiserror::Error)]
#[error("a copy of {len} bytes at {offset} {direction} {kind} memory failed")]
pub struct DeviceError {
    /// What kind of device.
    pub kind: &'static str,
    /// `from` or `to`, seen from the host.
    pub direction: &'static str,
    /// Where in device memory.
    pub offset: usize,
    /// Bytes of the copy.
    pub len: usize,
    /// The driver's reason.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Memory of an accelerator.
///
/// Units: offsets and lengths in bytes from the start of the arena. Concurrent access to one range is the caller's
/// to prevent: in Baton a KV block has one writer at any time. Every method panics on a range outside the memory,
/// which is a bug of the caller.
pub trait Device: Send + Sync + fmt::Debug {
    /// What it is, for people: `simulated`, `trainium`...
    fn kind(&self) -> &'static str;

    /// Bytes of the arena.
    fn len(&self) -> usize;

    /// Whether there is no arena at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the device's own compute does to load numbers. Not for transfers.
    fn read(&self, offset: usize, into: &mut [u8]);

    /// What the device's own compute does to store numbers. Not for transfers.
    fn write(&self, offset: usize, from: &[u8]);

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
    ) -> Result<(), DeviceError>;

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
    ) -> Result<(), DeviceError>;

    /// The memory as network libraries register it, to move bytes without a copy through the host.
    ///
    /// # Errors
    /// Why they cannot reach it, for people.
    fn span(&self) -> Result<MemorySpan, String> {
        Err(format!("network libraries cannot reach {} memory", self.kind()))
    }
}

/// A device that is host memory nobody else can map, behind one copy engine of bounded bandwidth.
#[derive(Debug)]
pub struct EmulatedDevice {
    /// Never registered with a transfer agent, which is what makes it a device.
    memory: HostMemory,
    engine: Option<CopyEngine>,
    /// Whether network libraries may register it all the same.
    reachable: bool,
}

impl EmulatedDevice {
    /// A device of `len` zeroed bytes whose copies run at `bytes_per_s`, or as fast as the machine copies.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(len: usize, bytes_per_s: Option<u64>) -> Result<Self, MemoryError> {
        let memory = HostMemory::allocate(len, "emulated device")?;
        Ok(Self { memory, engine: bytes_per_s.map(CopyEngine::new), reachable: false })
    }

    /// The same device, but network libraries can reach its memory, as they can that of a GPU. Only explicit copies
    /// and network libraries can: it is no host memory to anything else.
    #[must_use]
    pub fn reachable(self) -> Self {
        Self { reachable: true, ..self }
    }

    fn paced(&self, len: usize, copy: impl FnOnce()) {
        let done = self.engine.as_ref().map(|engine| engine.reserve(len, Instant::now()));
        copy();
        if let Some(done) = done {
            wait_until(done);
        }
    }
}

impl Device for EmulatedDevice {
    fn kind(&self) -> &'static str {
        "simulated"
    }

    fn len(&self) -> usize {
        self.memory.len()
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.memory.read(offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.memory.write(offset, from);
    }

    fn copy_to_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<(), DeviceError> {
        self.paced(len, || self.memory.copy_to(offset, host, host_offset, len));
        Ok(())
    }

    fn copy_from_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<(), DeviceError> {
        self.paced(len, || host.copy_to(host_offset, &self.memory, offset, len));
        Ok(())
    }

    fn span(&self) -> Result<MemorySpan, String> {
        match self.reachable {
            true => Ok(self.memory.span()),
            false => Err("the network cannot reach the memory of an emulated device".to_owned()),
        }
    }
}

/// The one copy engine all copies of a device share: a token bucket in monotonic time.
#[derive(Debug)]
struct CopyEngine {
    bytes_per_s: u64,
    /// When everything reserved so far is done.
    free_at: Mutex<Option<Instant>>,
}

impl CopyEngine {
    fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), free_at: Mutex::new(None) }
    }

    /// Queues a copy of `len` bytes and returns when it is done.
    fn reserve(&self, len: usize, now: Instant) -> Instant {
        let takes = Duration::from_secs_f64(len as f64 / self.bytes_per_s as f64);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let done = free_at.map_or(now, |free_at| free_at.max(earliest)) + takes;
        *free_at = Some(done);
        done
    }
}

/// Blocks this thread until `deadline`.
fn wait_until(deadline: Instant) {
    while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        thread::park_timeout(left);
    }
}
