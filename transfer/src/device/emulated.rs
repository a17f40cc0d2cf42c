//! An accelerator made of host memory, for machines without one and for tests.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{BlockKernels, Device, DeviceError, Move, Submitted};
use crate::digest::DigestSeed;
use crate::memory::{HostMemory, MemoryError, MemorySpan};

/// How far an idle copy engine may run ahead of its bandwidth: covers the wake-up latency of a sleeping thread, so
/// that the mean bandwidth is the configured one.
pub(super) const BURST: Duration = Duration::from_millis(1);

/// A device that is host memory nobody else can map, behind one copy engine of bounded bandwidth.
///
/// A submitted copy takes its turn at once and moves its bytes when it is finished, not before: who looks too early
/// sees the old bytes, as on a real device.
#[derive(Debug)]
pub struct EmulatedDevice {
    /// Never registered with a transfer agent, which is what makes it a device.
    memory: HostMemory,
    engine: Option<CopyEngine>,
    /// Whether network libraries may register it all the same, and it has kernels.
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

    /// The same device, as a GPU is: network libraries can reach its memory, and it computes digests itself. Only
    /// explicit copies and network libraries can reach it: it is no host memory to anything else.
    #[must_use]
    pub fn reachable(self) -> Self {
        Self { reachable: true, ..self }
    }

    fn submit(&self, len: usize, copy: impl FnOnce() + Send + 'static) -> Submitted {
        let done = self.engine.as_ref().map(|engine| engine.reserve(len, Instant::now()));
        Submitted::new(move || {
            copy();
            if let Some(done) = done {
                wait_until(done);
            }
            Ok(())
        })
    }

    #[track_caller]
    fn check(&self, offset: usize, host: &HostMemory, host_offset: usize, len: usize) {
        assert!(self.memory.fits(offset, len), "bytes {offset}+{len} are outside {self:?}");
        assert!(host.fits(host_offset, len), "bytes {host_offset}+{len} are outside {host:?}");
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

    fn submit_to_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        self.check(offset, host, host_offset, len);
        let (memory, host) = (self.memory.clone(), host.clone());
        Ok(self.submit(len, move || memory.copy_to(offset, &host, host_offset, len)))
    }

    fn submit_from_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        self.check(offset, host, host_offset, len);
        let (memory, host) = (self.memory.clone(), host.clone());
        Ok(self.submit(len, move || host.copy_to(host_offset, &memory, offset, len)))
    }

    fn kernels(&self) -> Result<&dyn BlockKernels, String> {
        match self.reachable {
            true => Ok(self),
            false => Err("an emulated device has no kernels for blocks".to_owned()),
        }
    }

    fn span(&self) -> Result<MemorySpan, String> {
        match self.reachable {
            true => Ok(self.memory.span()),
            false => Err("the network cannot reach the memory of an emulated device".to_owned()),
        }
    }
}

impl BlockKernels for EmulatedDevice {
    fn digest_blocks(&self, blocks: &[(usize, DigestSeed)], len: usize) -> Result<Vec<u64>, DeviceError> {
        Ok(blocks.iter().map(|(offset, seed)| self.memory.block_digest(*seed, *offset, len)).collect())
    }

    fn relayout(&self, moves: &[Move]) -> Result<(), DeviceError> {
        for each in moves {
            let [inner, middle, outer] = each.loops;
            for (o, m, i) in (0..outer.count)
                .flat_map(|o| (0..middle.count).flat_map(move |m| (0..inner.count).map(move |i| (o, m, i))))
            {
                let from = each.from + o * outer.from + m * middle.from + i * inner.from;
                let to = each.to + o * outer.to + m * middle.to + i * inner.to;
                self.memory.copy_to(from, &self.memory, to, each.run);
            }
        }
        Ok(())
    }
}

/// The one copy engine all copies of a device share: a token bucket in monotonic time.
#[derive(Debug)]
pub(super) struct CopyEngine {
    bytes_per_s: u64,
    /// When everything reserved so far is done.
    free_at: Mutex<Option<Instant>>,
}

impl CopyEngine {
    pub(super) fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), free_at: Mutex::new(None) }
    }

    /// Queues a copy of `len` bytes and returns when it is done.
    pub(super) fn reserve(&self, len: usize, now: Instant) -> Instant {
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
