//! What a process holds of a GPU: each value gives back what it owns when it is dropped.
//!
//! Rules, on which every `SAFETY` comment of these modules leans:
//!
//! 1. Every owner keeps its [`Context`], so that the context outlives all that was made in it.
//! 2. Every call that needs a current context comes after [`Context::enter`] on the same thread. CUDA's handles may be
//!    used from any thread.
//! 3. A copy or a kernel owns the ranges it was checked for until its stream or event was waited for; who posts it
//!    keeps the memory of both sides until then.

use std::ffi::{CStr, c_int, c_void};
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys::{
    CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP,
    CU_MEMHOSTREGISTER_PORTABLE, CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent,
    CUevent_flags, CUfunction, CUmodule, CUstream, CUstream_flags,
};

use super::raw::{CallError, Cuda};
use crate::memory::HostMemory;

/// Longest name of a GPU that is shown.
const NAME_BYTES: usize = 128;

/// A GPU, as the driver numbers it.
#[derive(Clone, Copy)]
pub(super) struct Gpu {
    pub(super) cuda: &'static Cuda,
    pub(super) ordinal: u32,
    device: CUdevice,
}

impl Gpu {
    pub(super) fn count(cuda: &Cuda) -> Result<u32, CallError> {
        let mut count = 0;
        // SAFETY: the pointer is valid for the call.
        unsafe { cuda.cuDeviceGetCount(&raw mut count) }?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// GPU number `ordinal`, which is less than [`Gpu::count`].
    pub(super) fn get(cuda: &'static Cuda, ordinal: u32) -> Result<Self, CallError> {
        let mut device = 0;
        // SAFETY: the pointer is valid for the call.
        unsafe { cuda.cuDeviceGet(&raw mut device, c_int::try_from(ordinal).unwrap_or(c_int::MAX)) }?;
        Ok(Self { cuda, ordinal, device })
    }

    pub(super) fn name(&self) -> Result<String, CallError> {
        let mut name = [0; NAME_BYTES];
        // SAFETY: the driver writes at most as many bytes as it is told there are, with a zero at the end.
        unsafe { self.cuda.cuDeviceGetName(name.as_mut_ptr().cast(), NAME_BYTES as c_int, self.device) }?;
        let name = CStr::from_bytes_until_nul(&name).map(CStr::to_string_lossy);
        Ok(name.unwrap_or_default().into_owned())
    }

    pub(super) fn memory_bytes(&self) -> Result<usize, CallError> {
        let mut bytes = 0;
        // SAFETY: the pointer is valid for the call.
        unsafe { self.cuda.cuDeviceTotalMem_v2(&raw mut bytes, self.device) }?;
        Ok(bytes)
    }

    pub(super) fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32, CallError> {
        self.attribute_number(attribute as c_int)
    }

    /// As [`Gpu::attribute`], by number: for attributes newer than the declarations used.
    pub(super) fn attribute_number(&self, attribute: c_int) -> Result<i32, CallError> {
        let mut value = 0;
        // SAFETY: the pointer is valid for the call; an unknown attribute is refused.
        unsafe { self.cuda.cuDeviceGetAttribute(&raw mut value, attribute, self.device) }?;
        Ok(value)
    }

    /// Compute capability: 90 for 9.0.
    pub(super) fn architecture(&self) -> Result<i32, CallError> {
        use CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        Ok(self.attribute(MAJOR)? * 10 + self.attribute(MINOR)?)
    }

    /// Whether this GPU can read the memory of `other` over NVLink or PCIe.
    pub(super) fn reaches(&self, other: &Self) -> Result<bool, CallError> {
        let mut can = 0;
        // SAFETY: the pointer is valid for the call.
        unsafe { self.cuda.cuDeviceCanAccessPeer(&raw mut can, self.device, other.device) }?;
        Ok(can != 0)
    }
}

/// The context all of this process shares on a GPU.
pub(super) struct Context {
    pub(super) gpu: Gpu,
    handle: CUcontext,
}

// SAFETY: a handle, usable from any thread (rule 2).
unsafe impl Send for Context {}
// SAFETY: as for Send.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn open(gpu: Gpu) -> Result<Arc<Self>, CallError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the call; released on drop.
        unsafe { gpu.cuda.cuDevicePrimaryCtxRetain(&raw mut handle, gpu.device) }?;
        Ok(Arc::new(Self { gpu, handle }))
    }

    /// Makes it the current context of this thread.
    pub(super) fn enter(&self) -> Result<&'static Cuda, CallError> {
        // SAFETY: the context is live until `self` is dropped.
        unsafe { self.gpu.cuda.cuCtxSetCurrent(self.handle) }?;
        Ok(self.gpu.cuda)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by this value; all that was made in it is gone (rule 1).
        let _ = unsafe { self.gpu.cuda.cuDevicePrimaryCtxRelease_v2(self.gpu.device) };
    }
}

/// Memory of a GPU.
pub(super) struct Memory {
    pub(super) context: Arc<Context>,
    pub(super) address: CUdeviceptr,
    pub(super) len: usize,
}

impl Memory {
    pub(super) fn allocate(context: &Arc<Context>, len: usize) -> Result<Self, CallError> {
        let mut address = 0;
        let cuda = context.enter()?;
        // SAFETY: the pointer is valid for the call; freed on drop.
        unsafe { cuda.cuMemAlloc_v2(&raw mut address, len) }?;
        Ok(Self { context: Arc::clone(context), address, len })
    }

    /// Fills it with zeros and waits for that.
    pub(super) fn clear(&self) -> Result<(), CallError> {
        let cuda = self.context.enter()?;
        // SAFETY: exactly this allocation, which nobody else knows yet.
        unsafe { cuda.cuMemsetD8_v2(self.address, 0, self.len) }?;
        // SAFETY: the null stream, which fills run on, is always there. Our own streams do not wait for it.
        unsafe { cuda.cuStreamSynchronize(std::ptr::null_mut()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Ok(cuda) = self.context.enter() {
            // SAFETY: allocated by this value and freed once. The driver waits for what still uses it.
            let _ = unsafe { cuda.cuMemFree_v2(self.address) };
        }
    }
}

/// Host memory that both sides address: parameters and results of kernels.
pub(super) struct Area {
    context: Arc<Context>,
    host: *mut c_void,
    /// Its address for the GPU.
    pub(super) mapped: CUdeviceptr,
    words: usize,
}

// SAFETY: plain memory, whose only user is who owns this value.
unsafe impl Send for Area {}
// SAFETY: writing takes `&mut self`.
unsafe impl Sync for Area {}

impl Area {
    pub(super) fn allocate(context: &Arc<Context>, words: usize) -> Result<Self, CallError> {
        let cuda = context.enter()?;
        let mut host = std::ptr::null_mut();
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the pointer is valid for the call; freed on drop.
        unsafe { cuda.cuMemHostAlloc(&raw mut host, words * size_of::<u64>(), flags) }?;
        let mut area = Self { context: Arc::clone(context), host, mapped: 0, words };
        // SAFETY: memory just allocated to be mapped.
        unsafe { cuda.cuMemHostGetDevicePointer_v2(&raw mut area.mapped, host, 0) }?;
        Ok(area)
    }

    /// Writes words at a place, in words. No kernel may be reading the area.
    pub(super) fn put(&mut self, at: usize, words: impl ExactSizeIterator<Item = u64>) {
        assert!(at + words.len() <= self.words, "parameters are outside their area");
        for (i, word) in words.enumerate() {
            // SAFETY: within the allocation, just checked, and aligned: pages are. Volatile, because a GPU reads it.
            unsafe { self.host.cast::<u64>().add(at + i).write_volatile(word) };
        }
    }

    /// Reads words that a kernel wrote, which has been waited for.
    pub(super) fn get(&self, at: usize, count: usize) -> Vec<u64> {
        assert!(at + count <= self.words, "results are outside their area");
        // SAFETY: as in `put`.
        (at..at + count).map(|i| unsafe { self.host.cast::<u64>().add(i).read_volatile() }).collect()
    }

    /// The address of a word for the GPU.
    pub(super) fn at(&self, word: usize) -> CUdeviceptr {
        self.mapped + (word * size_of::<u64>()) as u64
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if let Ok(cuda) = self.context.enter() {
            // SAFETY: allocated by this value and freed once; kernels that used it were waited for.
            let _ = unsafe { cuda.cuMemFreeHost(self.host) };
        }
    }
}

/// Pages of host memory held in place for the GPU, which then copies from and to them by itself.
pub(super) struct Registration {
    context: Arc<Context>,
    memory: HostMemory,
    /// Its address for the GPU.
    pub(super) mapped: CUdeviceptr,
}

impl Registration {
    pub(super) fn new(context: &Arc<Context>, memory: &HostMemory) -> Result<Self, CallError> {
        let cuda = context.enter()?;
        let (address, len) = (host_at(memory, 0), memory.len());
        let flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: exactly this mapping, which `memory` keeps; unregistered on drop.
        unsafe { cuda.cuMemHostRegister_v2(address, len, flags) }?;
        let mut registration = Self { context: Arc::clone(context), memory: memory.clone(), mapped: 0 };
        // SAFETY: memory just registered to be mapped.
        unsafe { cuda.cuMemHostGetDevicePointer_v2(&raw mut registration.mapped, address, 0) }?;
        Ok(registration)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Ok(cuda) = self.context.enter() {
            // SAFETY: registered by this value and unregistered once. The driver waits for copies under way.
            let _ = unsafe { cuda.cuMemHostUnregister(host_at(&self.memory, 0)) };
        }
    }
}

/// The address of host memory, for the driver.
pub(super) fn host_at(memory: &HostMemory, offset: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(memory.span().address() + offset)
}

/// A queue of work of a GPU; work of different queues runs side by side.
pub(super) struct Stream {
    pub(super) context: Arc<Context>,
    pub(super) handle: CUstream,
}

// SAFETY: a handle, usable from any thread (rule 2).
unsafe impl Send for Stream {}
// SAFETY: as for Send.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, CallError> {
        let cuda = context.enter()?;
        let mut handle = std::ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is valid for the call; destroyed on drop.
        unsafe { cuda.cuStreamCreate(&raw mut handle, flags) }?;
        Ok(Self { context: Arc::clone(context), handle })
    }

    /// Waits for all that was posted.
    pub(super) fn synchronize(&self) -> Result<(), CallError> {
        let cuda = self.context.enter()?;
        // SAFETY: a live stream.
        unsafe { cuda.cuStreamSynchronize(self.handle) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Ok(cuda) = self.context.enter() {
            // SAFETY: made by this value and destroyed once; work still queued goes on to its end.
            let _ = unsafe { cuda.cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// A point in a stream that can be waited for, asleep.
pub(super) struct Event {
    context: Arc<Context>,
    handle: CUevent,
}

// SAFETY: a handle, usable from any thread (rule 2).
unsafe impl Send for Event {}
// SAFETY: as for Send.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, CallError> {
        let cuda = context.enter()?;
        let mut handle = std::ptr::null_mut();
        let flags =
            CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32 | CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the pointer is valid for the call; destroyed on drop.
        unsafe { cuda.cuEventCreate(&raw mut handle, flags) }?;
        Ok(Self { context: Arc::clone(context), handle })
    }

    /// Marks the end of what was posted to `stream` so far.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), CallError> {
        let cuda = self.context.enter()?;
        // SAFETY: both are live, of one context.
        unsafe { cuda.cuEventRecord(self.handle, stream.handle) }
    }

    /// Waits for what [`Event::record`] marked.
    pub(super) fn wait(&self) -> Result<(), CallError> {
        let cuda = self.context.enter()?;
        // SAFETY: a live event.
        unsafe { cuda.cuEventSynchronize(self.handle) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(cuda) = self.context.enter() {
            // SAFETY: made by this value and destroyed once.
            let _ = unsafe { cuda.cuEventDestroy_v2(self.handle) };
        }
    }
}

/// Kernels the driver has loaded.
pub(super) struct Module {
    context: Arc<Context>,
    handle: CUmodule,
}

// SAFETY: a handle, usable from any thread (rule 2).
unsafe impl Send for Module {}
// SAFETY: as for Send.
unsafe impl Sync for Module {}

impl Module {
    /// Loads machine code, or PTX with a zero byte at its end.
    pub(super) fn load(context: &Arc<Context>, image: &[u8]) -> Result<Self, CallError> {
        let cuda = context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: an image of the compiler, which says its own length or ends with a zero; unloaded on drop.
        unsafe { cuda.cuModuleLoadData(&raw mut handle, image.as_ptr().cast()) }?;
        Ok(Self { context: Arc::clone(context), handle })
    }

    /// A kernel, valid as long as the module.
    pub(super) fn function(&self, name: &CStr) -> Result<Function, CallError> {
        let cuda = self.context.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a live module, a string with its zero.
        unsafe { cuda.cuModuleGetFunction(&raw mut handle, self.handle, name.as_ptr()) }?;
        Ok(Function(handle))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if let Ok(cuda) = self.context.enter() {
            // SAFETY: loaded by this value and unloaded once; its kernels were waited for.
            let _ = unsafe { cuda.cuModuleUnload(self.handle) };
        }
    }
}

/// A kernel of a [`Module`].
#[derive(Clone, Copy)]
pub(super) struct Function(pub(super) CUfunction);

// SAFETY: a handle, usable from any thread (rule 2).
unsafe impl Send for Function {}
// SAFETY: as for Send.
unsafe impl Sync for Function {}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Context(GPU {})", self.gpu.ordinal)
    }
}
