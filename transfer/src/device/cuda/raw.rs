//! The CUDA driver and its compiler as tables of functions, opened at run time.
//!
//! The libraries are found by `cudarc`, whose types are used. Its functions are not: they panic when the library or
//! a symbol of it is missing, and their status is an enumeration without room for the codes of later drivers.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmodule, CUstream, culib, is_culib_present,
};
use cudarc::nvrtc::sys::nvrtcProgram;
use libloading::Library;

use crate::device::Unavailable;
pub(super) use crate::device::calls::CallError;
use crate::device::calls::{not_loaded, table};

table! {
    /// The driver.
    #[expect(non_snake_case, reason = "the names of the C functions")]
    Cuda #[expect(non_snake_case, reason = "the names of the C functions")]
    #[expect(clippy::too_many_arguments, reason = "as the C functions have them")] {
        cuInit(flags: c_uint);
        cuDriverGetVersion(version: *mut c_int);
        cuDeviceGetCount(count: *mut c_int);
        cuDeviceGet(device: *mut CUdevice, ordinal: c_int);
        cuDeviceGetName(name: *mut c_char, len: c_int, device: CUdevice);
        cuDeviceTotalMem_v2(bytes: *mut usize, device: CUdevice);
        cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: CUdevice);
        cuDeviceCanAccessPeer(can: *mut c_int, device: CUdevice, peer: CUdevice);
        cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice);
        cuDevicePrimaryCtxRelease_v2(device: CUdevice);
        cuCtxSetCurrent(context: CUcontext);
        cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize);
        cuMemFree_v2(address: CUdeviceptr);
        cuMemsetD8_v2(address: CUdeviceptr, value: u8, bytes: usize);
        cuMemcpyHtoDAsync_v2(to: CUdeviceptr, from: *const c_void, bytes: usize, stream: CUstream);
        cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream);
        cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint);
        cuMemFreeHost(address: *mut c_void);
        cuMemHostRegister_v2(address: *mut c_void, bytes: usize, flags: c_uint);
        cuMemHostUnregister(address: *mut c_void);
        cuMemHostGetDevicePointer_v2(mapped: *mut CUdeviceptr, address: *mut c_void, flags: c_uint);
        cuPointerSetAttribute(value: *const c_void, attribute: c_int, address: CUdeviceptr);
        cuStreamCreate(stream: *mut CUstream, flags: c_uint);
        cuStreamDestroy_v2(stream: CUstream);
        cuStreamSynchronize(stream: CUstream);
        cuEventCreate(event: *mut CUevent, flags: c_uint);
        cuEventDestroy_v2(event: CUevent);
        cuEventRecord(event: CUevent, stream: CUstream);
        cuEventSynchronize(event: CUevent);
        cuModuleLoadData(module: *mut CUmodule, image: *const c_void);
        cuModuleUnload(module: CUmodule);
        cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
        cuLaunchKernel(
            function: CUfunction, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint,
            block_y: c_uint, block_z: c_uint, shared_bytes: c_uint, stream: CUstream,
            parameters: *mut *mut c_void, extra: *mut *mut c_void
        );
    }
}

impl Cuda {
    #[expect(clippy::unused_self, reason = "every table names its statuses")]
    fn reason(&self, status: c_int) -> String {
        error_name(status)
    }
}

/// The driver's name of a status.
fn error_name(status: c_int) -> String {
    type GetErrorName = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;
    static NAMES: OnceLock<Option<GetErrorName>> = OnceLock::new();
    // SAFETY: the library is present, a status came from it; the function has this signature in every version of it.
    let load = || unsafe { culib().get::<GetErrorName>(b"cuGetErrorName") }.ok().map(|symbol| *symbol);
    let mut name = std::ptr::null();
    // SAFETY: the pointer is valid for the call; a known status gives a static string, an unknown one none.
    let known = NAMES.get_or_init(load).is_some_and(|get| unsafe { get(status, &raw mut name) } == 0);
    if !known || name.is_null() {
        return format!("CUDA error {status}");
    }
    // SAFETY: a static string of the driver, as it just said.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

table! {
    /// What drivers before CUDA 11.7 lack.
    #[expect(non_snake_case, reason = "the names of the C functions")]
    DmaBuf #[expect(non_snake_case, reason = "the names of the C functions")] {
        cuMemGetHandleForAddressRange(
            handle: *mut c_void, address: CUdeviceptr, bytes: usize, kind: c_int, flags: u64
        );
    }
}

impl DmaBuf {
    #[expect(clippy::unused_self, reason = "every table names its statuses")]
    fn reason(&self, status: c_int) -> String {
        error_name(status)
    }
}

table! {
    /// The compiler.
    #[expect(non_snake_case, reason = "the names of the C functions")]
    Nvrtc #[expect(non_snake_case, reason = "the names of the C functions")]
    #[expect(clippy::too_many_arguments, reason = "as the C functions have them")] {
        nvrtcVersion(major: *mut c_int, minor: *mut c_int);
        nvrtcCreateProgram(
            program: *mut nvrtcProgram, source: *const c_char, name: *const c_char, headers: c_int,
            header_sources: *const *const c_char, header_names: *const *const c_char
        );
        nvrtcDestroyProgram(program: *mut nvrtcProgram);
        nvrtcCompileProgram(program: nvrtcProgram, count: c_int, options: *const *const c_char);
        nvrtcGetProgramLogSize(program: nvrtcProgram, bytes: *mut usize);
        nvrtcGetProgramLog(program: nvrtcProgram, log: *mut c_char);
        nvrtcGetNumSupportedArchs(count: *mut c_int);
        nvrtcGetSupportedArchs(architectures: *mut c_int);
        nvrtcGetPTXSize(program: nvrtcProgram, bytes: *mut usize);
        nvrtcGetPTX(program: nvrtcProgram, image: *mut c_char);
        nvrtcGetCUBINSize(program: nvrtcProgram, bytes: *mut usize);
        nvrtcGetCUBIN(program: nvrtcProgram, image: *mut c_char);
    }
}

impl Nvrtc {
    #[expect(clippy::unused_self, reason = "every table names its statuses")]
    fn reason(&self, status: c_int) -> String {
        match status {
            1 => "out of memory".to_owned(),
            5 => "an option is not known to it".to_owned(),
            6 => "the source does not compile".to_owned(),
            status => format!("NVRTC error {status}"),
        }
    }
}

/// The driver, opened and initialised at the first call.
pub(super) fn driver() -> Result<&'static Cuda, Unavailable> {
    static DRIVER: OnceLock<Result<Cuda, Unavailable>> = OnceLock::new();
    DRIVER.get_or_init(open_driver).as_ref().map_err(Clone::clone)
}

/// The name under which the driver's package has it.
const DRIVER: &str = "libcuda.so.1";
const INSTALL_DRIVER: &str =
    "install the NVIDIA driver (Debian: nvidia-driver and libcuda1; Ubuntu: nvidia-driver-NNN-server)";

fn open_driver() -> Result<Cuda, Unavailable> {
    let unavailable = |what: String, remedy: &str| Unavailable { what, remedy: remedy.to_owned() };
    // SAFETY: opens libraries by the names of the CUDA driver, whose initialisers have no preconditions.
    if !unsafe { is_culib_present() } {
        // SAFETY: as above.
        let why = unsafe { Library::new(DRIVER) }.err().map(|error| (DRIVER, error));
        return Err(unavailable(not_loaded("libcuda.so.1, the CUDA driver", why.as_slice()), INSTALL_DRIVER));
    }
    let cuda = Cuda::load(driver_symbol).map_err(|missing| {
        unavailable(
            format!("the CUDA driver is too old: it has no {missing}"),
            "install a driver for CUDA 12 or later",
        )
    })?;
    // SAFETY: no preconditions.
    unsafe { cuda.cuInit(0) }.map_err(|error| {
        let remedy =
            "load the kernel module (modprobe nvidia), check that /dev/nvidia* are there, see nvidia-smi";
        unavailable(format!("the CUDA driver does not start: {error}"), remedy)
    })?;
    Ok(cuda)
}

/// A symbol of the driver, which is present.
fn driver_symbol(name: &'static str) -> Result<*mut c_void, String> {
    // SAFETY: the library is present: it does not panic. The pointer's type is what the table says it is.
    let found = unsafe { culib().get::<*mut c_void>(name.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|_| name.to_owned())
}

/// What exports memory as a dma-buf, once the driver is open.
pub(super) fn dmabuf() -> Result<&'static DmaBuf, String> {
    static DMABUF: OnceLock<Result<DmaBuf, String>> = OnceLock::new();
    let load = || {
        DmaBuf::load(driver_symbol).map_err(|name| format!("the driver has no {name}: CUDA 11.7 brings it"))
    };
    DMABUF.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// Where the compiler is looked for: by name as the loader knows it, then where NVIDIA's packages put it.
const NVRTC: [&str; 8] = [
    "libnvrtc.so",
    "libnvrtc.so.13",
    "libnvrtc.so.12",
    "libnvrtc.so.11.2",
    "/usr/local/cuda/lib64/libnvrtc.so",
    "/usr/local/cuda/lib64/libnvrtc.so.13",
    "/usr/local/cuda/lib64/libnvrtc.so.12",
    "/usr/lib/x86_64-linux-gnu/libnvrtc.so.12",
];

/// The compiler, opened at the first call.
pub(super) fn compiler() -> Result<&'static Nvrtc, Unavailable> {
    static COMPILER: OnceLock<Result<Nvrtc, Unavailable>> = OnceLock::new();
    COMPILER.get_or_init(open_compiler).as_ref().map_err(Clone::clone)
}

fn open_compiler() -> Result<Nvrtc, Unavailable> {
    let remedy = "install NVRTC of CUDA 11.2 or later (NVIDIA's repository: cuda-nvrtc-12-8; PyPI: \
                  nvidia-cuda-nvrtc-cu12, its lib directory in LD_LIBRARY_PATH)";
    let unavailable = |what: String| Unavailable { what, remedy: remedy.to_owned() };
    let mut tried = Vec::new();
    let library = NVRTC.iter().find_map(|name| {
        // SAFETY: the compiler's initialisers have no preconditions.
        let opened = unsafe { Library::new(*name) };
        opened.map_err(|error| tried.push((*name, error))).ok()
    });
    let library = library.ok_or_else(|| unavailable(not_loaded("libnvrtc, the CUDA compiler", &tried)))?;
    let symbol = |name: &'static str| {
        // SAFETY: the pointer's type is what the table says it is.
        let found = unsafe { library.get::<*mut c_void>(name.as_bytes()) };
        found.map(|symbol| *symbol).map_err(|_| name.to_owned())
    };
    let table = Nvrtc::load(symbol);
    // The table lives as long as the process, and so must the library.
    std::mem::forget(library);
    table.map_err(|missing| unavailable(format!("the CUDA compiler is too old: it has no {missing}")))
}
