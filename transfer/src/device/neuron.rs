//! AWS Neuron device memory (Trainium, Inferentia 2) through libnrt, opened at run time.
//!
//! ```text
//! arena: one tensor in device memory ── copy threads ──► slab ── any backend
//!         └── span (dma-buf) ──► libfabric on EFA: no copy through the host
//! ```
//!
//! There are no kernels: digests are computed by the processor, so that blocks are host-buffered unless integrity is
//! off. Signatures are those of the public headers of Neuron SDK 2.32 (`nrt.h`, `nrt_version.h`, `nrt_status.h`), but for
//! `nrt_get_dmabuf_fd_v2`, which they lack: that one is as libfabric 2.5 calls it. Tried out against a stand-in for the
//! library only, never on a Neuron device.

use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use self::raw::Runtime;
use super::calls::CallError;
use super::{Device, DeviceError, Submitted, Unavailable};
use crate::memory::{HostMemory, MemorySpan, Place};

mod probe;
mod raw;

pub use self::probe::probe;

const KIND: &str = "trainium";

/// Copies that wait for a copy thread: who submits more waits.
const QUEUED_MAX: usize = 64;

/// Loads libnrt for the whole process, so that libfabric, which looks for it by name alone, finds it. To be called
/// before libfabric is first asked what it has.
///
/// # Errors
/// When the library is not on this machine.
pub fn load() -> Result<(), Unavailable> {
    raw::library().map(|_| ())
}

/// An arena in the memory of a Neuron device. Clones share it.
#[derive(Clone)]
pub struct NeuronDevice(Arc<Inner>);

struct Inner {
    // Dropped in this order: the threads end before the tensor they copy from and to.
    to_host: CopyThread,
    from_host: CopyThread,
    tensor: Arc<Tensor>,
    core: u32,
}

impl NeuronDevice {
    /// An arena of `bytes` zeroed bytes in the memory of logical NeuronCore number `core`.
    ///
    /// # Errors
    /// Without the runtime, this core, or this much memory; the remedy says what would help.
    pub fn open(core: u32, bytes: usize) -> Result<Self, Unavailable> {
        let runtime = raw::runtime()?;
        let tensor = Tensor::allocate(runtime, core, bytes.max(1)).map_err(|error| Unavailable {
            what: format!("NeuronCore {core} does not give {bytes} bytes: {error}"),
            remedy: "check neuron-ls and NEURON_RT_VISIBLE_CORES, give the pool less kv.memory, or end what else uses \
                     the device (neuron-top)"
                .to_owned(),
        })?;
        let tensor = Arc::new(tensor);
        let thread = |name: &str| {
            CopyThread::start(name).map_err(|error| Unavailable {
                what: format!("no thread for copies of NeuronCore {core}: {error}"),
                remedy: "raise the limit of threads".to_owned(),
            })
        };
        let (to_host, from_host) = (thread("neuron-to-host")?, thread("neuron-from-host")?);
        Ok(Self(Arc::new(Inner { to_host, from_host, tensor, core })))
    }
}

impl fmt::Debug for NeuronDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NeuronDevice({} bytes on NeuronCore {})", self.0.tensor.len, self.0.core)
    }
}

impl Inner {
    #[track_caller]
    fn check(&self, offset: usize, len: usize) {
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.tensor.len);
        assert!(fits, "bytes {offset}+{len} are outside Neuron memory of {} bytes", self.tensor.len);
    }
}

impl Device for NeuronDevice {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn len(&self) -> usize {
        self.0.tensor.len
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.0.check(offset, into.len());
        // SAFETY: the range was checked, `into` is exclusive; the call returns when the bytes are there.
        let read = unsafe { self.0.tensor.read(offset, into.as_mut_ptr().cast(), into.len()) };
        if let Err(error) = read {
            panic!("NeuronCore {} failed while it computed: {error}", self.0.core);
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.0.check(offset, from.len());
        // SAFETY: as in `read`.
        let written = unsafe { self.0.tensor.write(offset, from.as_ptr().cast(), from.len()) };
        if let Err(error) = written {
            panic!("NeuronCore {} failed while it computed: {error}", self.0.core);
        }
    }

    fn submit_to_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        self.0.check(offset, len);
        assert!(host.fits(host_offset, len), "bytes {host_offset}+{len} are outside {host:?}");
        let (tensor, host) = (Arc::clone(&self.0.tensor), host.clone());
        Ok(self.0.to_host.submit(copy_error("from", offset, len), move || {
            let to = host_at(&host, host_offset);
            // SAFETY: both ranges were checked, and `host` and `tensor` are kept until the copy has ended.
            unsafe { tensor.read(offset, to, len) }
        }))
    }

    fn submit_from_host(
        &self,
        offset: usize,
        host: &HostMemory,
        host_offset: usize,
        len: usize,
    ) -> Result<Submitted, DeviceError> {
        self.0.check(offset, len);
        assert!(host.fits(host_offset, len), "bytes {host_offset}+{len} are outside {host:?}");
        let (tensor, host) = (Arc::clone(&self.0.tensor), host.clone());
        Ok(self.0.from_host.submit(copy_error("to", offset, len), move || {
            let from = host_at(&host, host_offset);
            // SAFETY: as in `submit_to_host`.
            unsafe { tensor.write(offset, from, len) }
        }))
    }

    fn span(&self) -> Result<MemorySpan, String> {
        let tensor = &self.0.tensor;
        let address = tensor.address().ok_or("the runtime gives the tensor no address")?;
        let dmabuf = match tensor.dmabuf(address) {
            Ok(dmabuf) => Some(dmabuf),
            Err(why) => {
                tracing::info!(why, "Neuron memory is registered by address: there is no dma-buf");
                None
            }
        };
        let owner: Arc<Tensor> = Arc::clone(tensor);
        // SAFETY: memory of this device, which the tensor keeps; no Rust reference to it can exist.
        Ok(unsafe { MemorySpan::new(address, tensor.len, Place::Neuron(self.0.core), dmabuf, owner) })
    }
}

fn copy_error(
    direction: &'static str,
    offset: usize,
    len: usize,
) -> impl FnOnce(CallError) -> DeviceError + Send + 'static {
    move |error| DeviceError::Copy { kind: KIND, direction, offset, len, source: error.into() }
}

/// The address of host memory, for the runtime.
fn host_at(memory: &HostMemory, offset: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(memory.span().address() + offset)
}

/// A piece of device memory.
struct Tensor {
    runtime: &'static Runtime,
    handle: *mut c_void,
    len: usize,
}

// SAFETY: a handle of the runtime, whose calls may come from any thread.
unsafe impl Send for Tensor {}
// SAFETY: as for Send; ranges that overlap are the caller's to keep apart, as everywhere in this crate.
unsafe impl Sync for Tensor {}

impl Tensor {
    fn allocate(runtime: &'static Runtime, core: u32, len: usize) -> Result<Self, CallError> {
        let name = CString::new("baton arena").unwrap_or_default();
        let mut handle = std::ptr::null_mut();
        let core = c_int::try_from(core).unwrap_or(c_int::MAX);
        // SAFETY: the pointers are valid for the call; freed on drop.
        unsafe {
            runtime.calls.nrt_tensor_allocate(
                raw::PLACEMENT_DEVICE,
                core,
                len,
                name.as_ptr(),
                &raw mut handle,
            )
        }?;
        let tensor = Self { runtime, handle, len };
        // SAFETY: exactly this tensor, which nobody else knows yet.
        unsafe { runtime.calls.nrt_tensor_memset(handle, 0, 0, len) }?;
        Ok(tensor)
    }

    /// # Safety
    /// `[offset, offset + len)` is within the tensor, `to` valid for writes of `len` bytes.
    unsafe fn read(&self, offset: usize, to: *mut c_void, len: usize) -> Result<(), CallError> {
        // SAFETY: handed on to the caller; the tensor is live.
        unsafe { self.runtime.calls.nrt_tensor_read(self.handle, to, offset, len) }
    }

    /// # Safety
    /// `[offset, offset + len)` is within the tensor, `from` valid for reads of `len` bytes.
    unsafe fn write(&self, offset: usize, from: *const c_void, len: usize) -> Result<(), CallError> {
        // SAFETY: handed on to the caller; the tensor is live.
        unsafe { self.runtime.calls.nrt_tensor_write(self.handle, from, offset, len) }
    }

    /// Where the device's memory is mapped for network cards.
    fn address(&self) -> Option<usize> {
        // SAFETY: a live tensor.
        let address = unsafe { (self.runtime.tensor_get_va)(self.handle) };
        (!address.is_null()).then(|| address.addr())
    }

    /// The memory as a file that network cards import, and where in it the tensor begins.
    fn dmabuf(&self, address: usize) -> Result<(OwnedFd, u64), String> {
        let (mut file, mut offset): (c_int, u64) = (-1, 0);
        let (address, len) = (address as u64, self.len as u64);
        let with_offset = match &self.runtime.dmabuf_v2 {
            // SAFETY: the address and length of a live tensor; the pointers are valid for the call.
            Ok(v2) => unsafe { v2.nrt_get_dmabuf_fd_v2(address, len, &raw mut file, &raw mut offset) }
                .map_err(|error| error.to_string()),
            Err(missing) => Err(format!("the runtime has no {missing}")),
        };
        if let Err(why) = with_offset {
            // This one works where the tensor begins with the file.
            offset = 0;
            let v1 = self.runtime.dmabuf_v1.as_ref().map_err(|missing| format!("{why}, nor {missing}"))?;
            // SAFETY: as above.
            unsafe { v1.nrt_get_dmabuf_fd(address, len, &raw mut file) }
                .map_err(|error| format!("{why}; {error}"))?;
        }
        if file < 0 {
            return Err("the runtime exported no file".to_owned());
        }
        // SAFETY: a descriptor just made for us, which nobody else owns: libfabric, too, closes it after use.
        Ok((unsafe { OwnedFd::from_raw_fd(file) }, offset))
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: a live tensor, freed once; copies that used it have ended, they keep it.
        unsafe { (self.runtime.tensor_free)(&raw mut self.handle) };
    }
}

/// A copy to be made.
type Job = Box<dyn FnOnce() + Send>;

/// A thread that makes copies one after the other: the runtime's own calls return only when the bytes are there.
struct CopyThread {
    /// Taken when the thread is to end.
    jobs: Mutex<Option<SyncSender<Job>>>,
    thread: Option<JoinHandle<()>>,
}

impl CopyThread {
    fn start(name: &str) -> std::io::Result<Self> {
        let (jobs, waiting): (_, Receiver<Job>) = sync_channel(QUEUED_MAX);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            for job in waiting {
                job();
            }
        })?;
        Ok(Self { jobs: Mutex::new(Some(jobs)), thread: Some(thread) })
    }

    fn submit(
        &self,
        error: impl FnOnce(CallError) -> DeviceError + Send + 'static,
        copy: impl FnOnce() -> Result<(), CallError> + Send + 'static,
    ) -> Submitted {
        let (ended, end) = sync_channel(1);
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let job: Job = Box::new(move || drop(ended.send(copy())));
        if let Some(jobs) = jobs {
            // The thread ends only with this value.
            let _ = jobs.send(job);
        }
        let gone = || CallError { call: "a copy", reason: "its thread is gone".to_owned() };
        Submitted::new(move || end.recv().unwrap_or_else(|_| Err(gone())).map_err(error))
    }
}

impl Drop for CopyThread {
    fn drop(&mut self) {
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.take() {
            // It has ended whatever it says; a copy that panicked has told who waits for it.
            let _ = thread.join();
        }
    }
}
