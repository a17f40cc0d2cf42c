//! libnrt as a table of functions, opened at run time.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::device::Unavailable;
use crate::device::calls::{CallError, not_loaded, table};

/// `NRT_TENSOR_PLACEMENT_DEVICE`.
pub(super) const PLACEMENT_DEVICE: c_int = 0;
/// `NRT_FRAMEWORK_TYPE_NO_FW`.
const NO_FRAMEWORK: c_int = 1;
/// As the loader finds it, and where the packages of the SDK put it, which the loader does not know.
const NAMES: [&str; 2] = ["libnrt.so.1", "/opt/aws/neuron/lib/libnrt.so.1"];
/// `RT_VERSION_DETAIL_LEN` and `GIT_HASH_LEN`.
const VERSION_TEXT_BYTES: usize = 128 + 64;

/// `nrt_version_t`.
#[repr(C)]
pub(super) struct Version {
    pub(super) major: u64,
    pub(super) minor: u64,
    pub(super) patch: u64,
    pub(super) maintenance: u64,
    text: [c_char; VERSION_TEXT_BYTES],
}

impl Version {
    pub(super) const fn zero() -> Self {
        Self { major: 0, minor: 0, patch: 0, maintenance: 0, text: [0; VERSION_TEXT_BYTES] }
    }
}

table! {
    /// What may be called before the runtime is initialised.
    Queries {
        nrt_get_version(version: *mut Version, bytes: usize);
        nrt_get_total_nc_count(count: *mut u32);
        nrt_get_visible_nc_count(count: *mut u32);
    }
}

table! {
    /// The runtime.
    Calls {
        nrt_init(framework: c_int, framework_version: *const c_char, layer_version: *const c_char);
        nrt_tensor_allocate(placement: c_int, core: c_int, bytes: usize, name: *const c_char, tensor: *mut *mut c_void);
        nrt_tensor_read(tensor: *const c_void, to: *mut c_void, offset: usize, bytes: usize);
        nrt_tensor_write(tensor: *mut c_void, from: *const c_void, offset: usize, bytes: usize);
        nrt_tensor_memset(tensor: *mut c_void, offset: u64, value: c_int, bytes: usize);
    }
}

table! {
    /// What early runtimes lack.
    DmaBufV1 { nrt_get_dmabuf_fd(address: u64, bytes: u64, file: *mut c_int); }
}

table! {
    /// What runtimes before 2026 lack.
    DmaBufV2 { nrt_get_dmabuf_fd_v2(address: u64, bytes: u64, file: *mut c_int, offset: *mut u64); }
}

/// Every table names its statuses alike.
macro_rules! reasons {
    ($($table:ident),*) => {$(
        impl $table {
            fn reason(&self, status: c_int) -> String {
                status_name(status)
            }
        }
    )*};
}
reasons!(Queries, Calls, DmaBufV1, DmaBufV2);

/// The names of `nrt_status.h`, as far as these calls give them.
fn status_name(status: c_int) -> String {
    let name = match status {
        1 => "NRT_FAILURE",
        2 => "NRT_INVALID",
        3 => "NRT_INVALID_HANDLE",
        4 => "NRT_RESOURCE",
        5 => "NRT_TIMEOUT",
        6 => "NRT_HW_ERROR",
        11 => "NRT_FAIL_HOST_MEM_ALLOC",
        13 => "NRT_UNINITIALIZED",
        14 => "NRT_CLOSED",
        1005 => "NRT_EXEC_NC_BUSY",
        status => return format!("NRT status {status}"),
    };
    name.to_owned()
}

/// The runtime, initialised.
pub(super) struct Runtime {
    pub(super) calls: Calls,
    pub(super) tensor_free: unsafe extern "C" fn(*mut *mut c_void),
    pub(super) tensor_get_va: unsafe extern "C" fn(*const c_void) -> *mut c_void,
    /// Or the name of what is missing.
    pub(super) dmabuf_v1: Result<DmaBufV1, String>,
    /// See `dmabuf_v1`.
    pub(super) dmabuf_v2: Result<DmaBufV2, String>,
}

/// The library, opened at the first call. Its symbols are there for other libraries, libfabric first of all.
pub(super) fn library() -> Result<&'static Library, Unavailable> {
    static LIBRARY: OnceLock<Result<Library, Unavailable>> = OnceLock::new();
    let open = || {
        let mut tried = Vec::new();
        for name in NAMES {
            // SAFETY: opens the runtime, whose initialisers have no preconditions.
            match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) } {
                Ok(library) => return Ok(library),
                Err(error) => tried.push((name, error)),
            }
        }
        Err(Unavailable {
            what: not_loaded("libnrt.so.1, the Neuron runtime", &tried),
            remedy: "install aws-neuronx-runtime-lib and aws-neuronx-dkms from AWS's Neuron repository"
                .to_owned(),
        })
    };
    LIBRARY.get_or_init(open).as_ref().map_err(Clone::clone)
}

/// What may be asked without taking a device.
pub(super) fn queries() -> Result<Queries, Unavailable> {
    let library = library()?;
    Queries::load(|name| symbol(library, name)).map_err(|missing| old(&missing))
}

/// The runtime. The first call initialises it, which takes every NeuronCore that is visible to this process.
pub(super) fn runtime() -> Result<&'static Runtime, Unavailable> {
    static RUNTIME: OnceLock<Result<Runtime, Unavailable>> = OnceLock::new();
    RUNTIME.get_or_init(start).as_ref().map_err(Clone::clone)
}

fn start() -> Result<Runtime, Unavailable> {
    let library = library()?;
    let find = |name| symbol(library, name);
    let missing = |name: String| old(&name);
    // SAFETY: the signatures of the public headers; pointers to data and functions have one size here.
    let (tensor_free, tensor_get_va) = unsafe {
        (
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut *mut c_void)>(
                find("nrt_tensor_free").map_err(missing)?,
            ),
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_void) -> *mut c_void>(
                find("nrt_tensor_get_va").map_err(missing)?,
            ),
        )
    };
    let runtime = Runtime {
        calls: Calls::load(find).map_err(missing)?,
        tensor_free,
        tensor_get_va,
        dmabuf_v1: DmaBufV1::load(find),
        dmabuf_v2: DmaBufV2::load(find),
    };
    let none: &CStr = c"";
    // SAFETY: strings with their zeros; called once per process, before every other call.
    let started = unsafe { runtime.calls.nrt_init(NO_FRAMEWORK, none.as_ptr(), none.as_ptr()) };
    started.map_err(|error: CallError| Unavailable {
        what: format!("the Neuron runtime does not start: {error}"),
        remedy: "check neuron-ls, that the module neuron is loaded (aws-neuronx-dkms), and that no other process holds \
                 the NeuronCores (NEURON_RT_VISIBLE_CORES chooses some)"
            .to_owned(),
    })?;
    Ok(runtime)
}

fn symbol(library: &Library, name: &'static str) -> Result<*mut c_void, String> {
    // SAFETY: the pointer's type is what the table says it is.
    let found = unsafe { library.get::<*mut c_void>(name.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|_| name.to_owned())
}

fn old(missing: &str) -> Unavailable {
    Unavailable {
        what: format!("the Neuron runtime is too old: it has no {missing}"),
        remedy: "install the runtime of Neuron SDK 2.20 or later (aws-neuronx-runtime-lib)".to_owned(),
    }
}
