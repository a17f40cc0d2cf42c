//! NVIDIA GPU memory through the CUDA driver, opened at run time.
//!
//! ```text
//! arena in GPU memory ── copy streams ──► pinned slab ── any backend
//!         │  └── kernels: digests, gathers, re-layouts
//!         └── span (dma-buf) ──► libfabric, UCX: no copy through the host
//! ```
//!
//! Nothing here panics without a driver, a GPU or a compiler: [`CudaDevice::open`] and [`probe`] say what is missing and
//! what brings it. Without a compiler the kernels alone are missing.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUdevice_attribute, CUdeviceptr, CUmemRangeHandleType, CUpointer_attribute};

use self::kernels::{Copies, Kernels, Launched};
use self::owners::{Context, Event, Gpu, Memory, Registration, Stream, host_at};
use self::raw::CallError;
use super::{BlockKernels, Device, DeviceError, Move, Pinned, Submitted, Unavailable};
use crate::digest::DigestSeed;
use crate::memory::{HostMemory, MemorySpan, Place};

mod kernels;
mod nvrtc;
mod owners;
mod probe;
mod raw;
#[cfg(test)]
mod tests;

pub use self::probe::probe;

const KIND: &str = "cuda";

/// Smaller blocks are gathered by a kernel: copying each on its own costs more than its bytes.
const GATHER_MAX_BYTES: usize = 32 << 10;

/// Arenas are allocated in multiples of this: what can be exported as a dma-buf is whole pages of the host.
const ARENA_ALIGN_BYTES: usize = 64 << 10;

/// An arena in the memory of an NVIDIA GPU. Clones share it.
#[derive(Clone)]
pub struct CudaDevice(Arc<Inner>);

struct Inner {
    // Dropped in this order: whatever uses the arena before the arena.
    kernels: Result<Arc<Kernels>, String>,
    to_host: Stream,
    from_host: Stream,
    compute: Mutex<Stream>,
    events: Mutex<Vec<Event>>,
    /// Where the GPU sees pinned host memory, by its address.
    pinned: Mutex<HashMap<usize, CUdeviceptr>>,
    arena: Memory,
    len: usize,
    name: String,
    context: Arc<Context>,
}

impl CudaDevice {
    /// An arena of `bytes` zeroed bytes on GPU number `ordinal`.
    ///
    /// # Errors
    /// Without a driver, this GPU, or this much of its memory; the remedy says what would help.
    pub fn open(ordinal: u32, bytes: usize) -> Result<Self, Unavailable> {
        let cuda = raw::driver()?;
        let failed = |error: CallError| Unavailable {
            what: format!("GPU {ordinal} cannot be used: {error}"),
            remedy: "see nvidia-smi and the kernel's log".to_owned(),
        };
        let count = Gpu::count(cuda).map_err(failed)?;
        if ordinal >= count {
            return Err(Unavailable {
                what: format!("GPU {ordinal} is not there: the driver shows {count}"),
                remedy: "check nvidia-smi and CUDA_VISIBLE_DEVICES".to_owned(),
            });
        }
        let gpu = Gpu::get(cuda, ordinal).map_err(failed)?;
        let name = gpu.name().map_err(failed)?;
        let context = Context::open(gpu).map_err(failed)?;
        let whole = bytes.max(1).next_multiple_of(ARENA_ALIGN_BYTES);
        let arena = Memory::allocate(&context, whole).map_err(|error| Unavailable {
            what: format!("{name} (GPU {ordinal}) does not give {bytes} bytes: {error}"),
            remedy: "give the pool less kv.memory, or end what else uses the GPU (see nvidia-smi)".to_owned(),
        })?;
        arena.clear().map_err(failed)?;
        let stream = || Stream::new(&context).map_err(failed);
        let kernels = Kernels::open(&context).map(Arc::new).map_err(|error| chain(&error));
        if let Err(why) = &kernels {
            tracing::warn!(why, "digests of {name} are computed by the processor: there are no kernels");
        }
        Ok(Self(Arc::new(Inner {
            kernels,
            to_host: stream()?,
            from_host: stream()?,
            compute: Mutex::new(stream()?),
            events: Mutex::default(),
            pinned: Mutex::default(),
            arena,
            len: bytes,
            name,
            context,
        })))
    }

    /// The GPU's name, as the driver has it.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What the kernels were compiled for, such as `sm_90`.
    ///
    /// # Errors
    /// Why there are none.
    pub fn kernel_target(&self) -> Result<&str, &str> {
        self.0.kernels.as_ref().map(|kernels| kernels.target.as_str()).map_err(String::as_str)
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaDevice({}, {} bytes on GPU {})", self.0.name, self.0.len, self.0.context.gpu.ordinal)
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |line, cause| format!("{line}: {cause}"))
}

fn work_error(work: &'static str) -> impl FnOnce(CallError) -> DeviceError {
    move |error| DeviceError::Work { kind: KIND, work, source: error.into() }
}

impl Inner {
    /// The address of a range of the arena, which is within it or a bug of the caller.
    #[track_caller]
    fn at(&self, offset: usize, len: usize) -> CUdeviceptr {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(fits, "bytes {offset}+{len} are outside GPU memory of {} bytes", self.len);
        self.arena.address + offset as u64
    }

    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What waits for all that was posted to `stream` until now.
    fn mark(&self, stream: &Stream) -> Result<Event, CallError> {
        let free = self.events().pop();
        let event = free.map_or_else(|| Event::new(&self.context), Ok)?;
        event.record(stream)?;
        Ok(event)
    }

    /// Posts one copy and marks its end. `post` gets the addresses of both sides, which were checked.
    fn submit(
        self: &Arc<Self>,
        stream: &Stream,
        host: &HostMemory,
        error: impl FnOnce(CallError) -> DeviceError + Clone + Send + 'static,
        post: impl FnOnce(&Stream) -> Result<(), CallError>,
    ) -> Result<Submitted, DeviceError> {
        let posted = self.context.enter().and_then(|_| post(stream));
        // A copy that was posted but cannot be waited for by an event is waited for with all of its stream.
        let marked = posted.and_then(|()| {
            self.mark(stream).or_else(|_| {
                stream.synchronize()?;
                Event::new(&self.context)
            })
        });
        let event = marked.map_err(error.clone())?;
        let (inner, host) = (Arc::clone(self), host.clone());
        Ok(Submitted::new(move || {
            let ended = event.wait();
            drop(host);
            ended.map_err(error)?;
            inner.events().push(event);
            Ok(())
        }))
    }
}

impl Device for CudaDevice {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn len(&self) -> usize {
        self.0.len
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.0.at(offset, into.len());
        let stream = self.0.compute.lock().unwrap_or_else(PoisonError::into_inner);
        let read = self.0.context.enter().and_then(|cuda| {
            let (to, len) = (into.as_mut_ptr().cast(), into.len());
            // SAFETY: the range of the arena was checked, `into` is exclusive, and both stay until the copy was
            // waited for below.
            unsafe { cuda.cuMemcpyDtoHAsync_v2(to, from, len, stream.handle) }?;
            stream.synchronize()
        });
        if let Err(error) = read {
            panic!("{} failed while it computed: {error}", self.0.name);
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        let to = self.0.at(offset, from.len());
        let stream = self.0.compute.lock().unwrap_or_else(PoisonError::into_inner);
        let written = self.0.context.enter().and_then(|cuda| {
            // SAFETY: as in `read`. Waited for, because other streams do not wait for this one.
            unsafe { cuda.cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), stream.handle) }?;
            stream.synchronize()
        });
        if let Err(error) = written {
            panic!("{} failed while it computed: {error}", self.0.name);
        }
    }

    fn submit_to_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        let from = self.0.at(offset, len);
        assert!(host.fits(host_offset, len), "bytes {host_offset}+{len} are outside {host:?}");
        self.0.submit(&self.0.to_host, host, copy_error("from", offset, len), |stream| {
            let cuda = stream.context.gpu.cuda;
            // SAFETY: both ranges were checked; the result keeps both memories until the copy has ended.
            unsafe { cuda.cuMemcpyDtoHAsync_v2(host_at(host, host_offset), from, len, stream.handle) }
        })
    }

    fn submit_from_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        let to = self.0.at(offset, len);
        assert!(host.fits(host_offset, len), "bytes {host_offset}+{len} are outside {host:?}");
        self.0.submit(&self.0.from_host, host, copy_error("to", offset, len), |stream| {
            let cuda = stream.context.gpu.cuda;
            // SAFETY: as in `submit_to_host`.
            unsafe { cuda.cuMemcpyHtoDAsync_v2(to, host_at(host, host_offset), len, stream.handle) }
        })
    }

    fn submit_blocks_to_host(
        &self,
        blocks: &[(usize, usize)],
        host: &HostMemory,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        let mapped = self.0.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let mapped = mapped.get(&host.span().address()).copied();
        let (Some(to), Ok(kernels), true) = (mapped, &self.0.kernels, len <= GATHER_MAX_BYTES) else {
            let copies: Result<Vec<Submitted>, DeviceError> =
                blocks.iter().map(|(from, to)| self.submit_to_host(*from, host, *to, len)).collect();
            let copies = copies?;
            return Ok(Submitted::new(move || copies.into_iter().try_for_each(Submitted::finish)));
        };
        for (offset, host_offset) in blocks {
            self.0.at(*offset, len);
            assert!(host.fits(*host_offset, len), "bytes {host_offset}+{len} are outside {host:?}");
        }
        let launch = |places| kernels.copy(&Copies { from: self.0.arena.address, to, places, len });
        let launched: Result<Vec<Launched>, CallError> =
            blocks.chunks(Kernels::COPIES_MAX).map(launch).collect();
        let launched = launched.map_err(work_error("a gather of blocks"))?;
        let (inner, host) = (Arc::clone(&self.0), host.clone());
        Ok(Submitted::new(move || {
            let ended = launched.into_iter().try_for_each(Launched::wait);
            drop((inner, host));
            ended.map_err(work_error("a gather of blocks"))
        }))
    }

    fn pin(&self, memory: &HostMemory) -> Result<Pinned, String> {
        let registration = Registration::new(&self.0.context, memory).map_err(|error| error.to_string())?;
        let key = memory.span().address();
        self.0.pinned.lock().unwrap_or_else(PoisonError::into_inner).insert(key, registration.mapped);
        Ok(Pinned::new(PinnedMemory { device: Arc::clone(&self.0), key, _registration: registration }))
    }

    fn kernels(&self) -> Result<&dyn BlockKernels, String> {
        self.0.kernels.as_ref().map(|_| self as &dyn BlockKernels).map_err(Clone::clone)
    }

    fn span(&self) -> Result<MemorySpan, String> {
        let inner = &self.0;
        let cuda = inner.context.enter().map_err(|error| error.to_string())?;
        let on = 1u32;
        let attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_SYNC_MEMOPS as i32;
        // SAFETY: the pointer is valid for the call, the address that of a live allocation.
        unsafe { cuda.cuPointerSetAttribute((&raw const on).cast(), attribute, inner.arena.address) }
            .map_err(|error| {
                format!("the driver does not order copies with those of a network card: {error}")
            })?;
        let dmabuf = match inner.dmabuf() {
            Ok(file) => Some((file, 0)),
            Err(why) => {
                tracing::info!(why, "{} is registered by address: there is no dma-buf", inner.name);
                None
            }
        };
        let (address, place) = (inner.arena.address as usize, Place::Cuda(inner.context.gpu.ordinal));
        // SAFETY: memory of this GPU, which `inner` keeps; no Rust reference to it can exist.
        Ok(unsafe { MemorySpan::new(address, inner.len, place, dmabuf, Arc::<Inner>::clone(inner)) })
    }
}

fn copy_error(
    direction: &'static str,
    offset: usize,
    len: usize,
) -> impl FnOnce(CallError) -> DeviceError + Clone + Send + 'static {
    move |error| DeviceError::Copy { kind: KIND, direction, offset, len, source: error.into() }
}

impl BlockKernels for CudaDevice {
    fn digest_blocks(&self, blocks: &[(usize, DigestSeed)], len: usize) -> Result<Vec<u64>, DeviceError> {
        let folded = |(offset, seed): &(usize, DigestSeed)| {
            self.0.at(*offset, len);
            (*offset, seed.fold())
        };
        let blocks: Vec<(usize, u64)> = blocks.iter().map(folded).collect();
        let Ok(kernels) = &self.0.kernels else { return Ok(Vec::new()) };
        kernels.digest(self.0.arena.address, &blocks, len).map_err(work_error("digests of blocks"))
    }

    fn relayout(&self, moves: &[Move]) -> Result<(), DeviceError> {
        for each in moves {
            let (read, written) = each.ends();
            self.0.at(0, read.max(written));
        }
        let Ok(kernels) = &self.0.kernels else { return Ok(()) };
        kernels.relayout(self.0.arena.address, moves).map_err(work_error("a re-layout"))
    }
}

impl Inner {
    /// The arena as a dma-buf, which network cards import.
    fn dmabuf(&self) -> Result<OwnedFd, String> {
        let supported = self.context.gpu.attribute_number(probe::DMA_BUF_SUPPORTED).unwrap_or(0);
        if supported == 0 {
            return Err("the driver says that this GPU exports none (open kernel modules do)".to_owned());
        }
        let export = raw::dmabuf()?;
        let mut file: i32 = -1;
        let kind = CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD as i32;
        let (handle, address, bytes) = ((&raw mut file).cast(), self.arena.address, self.arena.len);
        // SAFETY: the handle of this kind is a file descriptor; the range is the whole allocation.
        unsafe { export.cuMemGetHandleForAddressRange(handle, address, bytes, kind, 0) }
            .map_err(|error| error.to_string())?;
        if file < 0 {
            return Err("the driver exported no file".to_owned());
        }
        // SAFETY: a descriptor just made for us, which nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(file) })
    }
}

/// What [`Device::pin`] holds: forgotten by the device before it is unregistered.
struct PinnedMemory {
    device: Arc<Inner>,
    key: usize,
    _registration: Registration,
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        self.device.pinned.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// Compute capability and memory of a GPU, for people.
fn describe(gpu: &Gpu) -> Result<String, CallError> {
    let architecture = gpu.architecture()?;
    let engines = gpu.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT)?;
    let bytes = baton_config::Bytes(gpu.memory_bytes()? as u64);
    let (major, minor) = (architecture / 10, architecture % 10);
    Ok(format!("{}, {bytes}, compute capability {major}.{minor}, {engines} copy engines", gpu.name()?))
}
