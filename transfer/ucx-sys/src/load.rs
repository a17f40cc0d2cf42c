//! Opening the library, and making it behave inside a server process.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL, RTLD_NOW};

use crate::abi::*;

/// Of `dlfcn.h`: only if it is loaded.
const RTLD_NOLOAD: c_int = 4;

/// Why UCX cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There is no such library, or one it needs is missing.
    #[error("cannot open {path}")]
    Open {
        /// The name or path asked for.
        path: PathBuf,
        /// The loader's reason.
        #[source]
        source: libloading::Error,
    },
    /// It is there but not what it should be.
    #[error("{path} has no {symbol}")]
    Symbol {
        /// The name or path asked for.
        path: PathBuf,
        /// The function that is missing.
        symbol: &'static str,
    },
    /// The thread that opens libraries could not be started.
    #[error("cannot start a thread to open {path}")]
    Thread {
        /// The name or path asked for.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A constructor of the library failed.
    #[error("opening {path} panicked")]
    Panicked {
        /// The name or path asked for.
        path: PathBuf,
    },
}

macro_rules! api {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $kind:ty),* $(,)?) $(-> $out:ty)?;)*) => {
        /// The functions of UCX that Baton calls, under their own names. All are unsafe: see UCX's documentation.
        #[expect(missing_docs, reason = "documented by UCX under the same names")]
        #[derive(Clone, Copy)]
        pub struct Api {
            $(pub $name: unsafe extern "C" fn($($arg: $kind),*) $(-> $out)?,)*
        }

        impl Api {
            fn resolve(library: &Library, path: &Path) -> Result<Self, LoadError> {
                Ok(Self {
                    $($name: {
                        let symbol = stringify!($name);
                        // SAFETY: the type is that of the function in UCX's headers, kept by hand above.
                        let found = unsafe { library.get(symbol.as_bytes()) };
                        *found.map_err(|_| LoadError::Symbol { path: path.to_owned(), symbol })?
                    },)*
                })
            }
        }
    };
}

api! {
    fn ucs_status_string(status: ucs_status_t) -> *const c_char;
    fn ucp_get_version(major: *mut c_uint, minor: *mut c_uint, release: *mut c_uint);
    fn ucp_config_read(prefix: *const c_char, file: *const c_char, config: *mut ucp_config_t) -> ucs_status_t;
    fn ucp_config_modify(config: ucp_config_t, name: *const c_char, value: *const c_char) -> ucs_status_t;
    fn ucp_config_release(config: ucp_config_t);
    fn ucp_init_version(
        major: c_uint,
        minor: c_uint,
        params: *const ucp_params_t,
        config: ucp_config_t,
        context: *mut ucp_context_h,
    ) -> ucs_status_t;
    fn ucp_cleanup(context: ucp_context_h);
    fn ucp_context_query(context: ucp_context_h, attributes: *mut ucp_context_attr_t) -> ucs_status_t;
    fn ucp_context_print_info(context: ucp_context_h, stream: *mut c_void);
    fn ucp_worker_create(
        context: ucp_context_h,
        params: *const ucp_worker_params_t,
        worker: *mut ucp_worker_h,
    ) -> ucs_status_t;
    fn ucp_worker_destroy(worker: ucp_worker_h);
    fn ucp_worker_get_address(worker: ucp_worker_h, address: *mut *mut c_void, len: *mut usize) -> ucs_status_t;
    fn ucp_worker_release_address(worker: ucp_worker_h, address: *mut c_void);
    fn ucp_worker_progress(worker: ucp_worker_h) -> c_uint;
    fn ucp_worker_get_efd(worker: ucp_worker_h, fd: *mut c_int) -> ucs_status_t;
    fn ucp_worker_arm(worker: ucp_worker_h) -> ucs_status_t;
    fn ucp_worker_set_am_recv_handler(worker: ucp_worker_h, param: *const ucp_am_handler_param_t) -> ucs_status_t;
    fn ucp_ep_create(worker: ucp_worker_h, params: *const ucp_ep_params_t, ep: *mut ucp_ep_h) -> ucs_status_t;
    fn ucp_ep_close_nbx(ep: ucp_ep_h, param: *const ucp_request_param_t) -> ucs_status_ptr_t;
    fn ucp_ep_flush_nbx(ep: ucp_ep_h, param: *const ucp_request_param_t) -> ucs_status_ptr_t;
    fn ucp_mem_map(
        context: ucp_context_h,
        params: *const ucp_mem_map_params_t,
        memory: *mut ucp_mem_h,
    ) -> ucs_status_t;
    fn ucp_mem_unmap(context: ucp_context_h, memory: ucp_mem_h) -> ucs_status_t;
    fn ucp_rkey_pack(
        context: ucp_context_h,
        memory: ucp_mem_h,
        buffer: *mut *mut c_void,
        len: *mut usize,
    ) -> ucs_status_t;
    fn ucp_rkey_buffer_release(buffer: *mut c_void);
    fn ucp_ep_rkey_unpack(ep: ucp_ep_h, buffer: *const c_void, key: *mut ucp_rkey_h) -> ucs_status_t;
    fn ucp_rkey_destroy(key: ucp_rkey_h);
    fn ucp_get_nbx(
        ep: ucp_ep_h,
        buffer: *mut c_void,
        count: usize,
        remote: u64,
        key: ucp_rkey_h,
        param: *const ucp_request_param_t,
    ) -> ucs_status_ptr_t;
    fn ucp_put_nbx(
        ep: ucp_ep_h,
        buffer: *const c_void,
        count: usize,
        remote: u64,
        key: ucp_rkey_h,
        param: *const ucp_request_param_t,
    ) -> ucs_status_ptr_t;
    fn ucp_am_send_nbx(
        ep: ucp_ep_h,
        id: c_uint,
        header: *const c_void,
        header_len: usize,
        buffer: *const c_void,
        count: usize,
        param: *const ucp_request_param_t,
    ) -> ucs_status_ptr_t;
    fn ucp_am_recv_data_nbx(
        worker: ucp_worker_h,
        data: *mut c_void,
        buffer: *mut c_void,
        count: usize,
        param: *const ucp_request_param_t,
    ) -> ucs_status_ptr_t;
    fn ucp_am_data_release(worker: ucp_worker_h, data: *mut c_void);
    fn ucp_request_free(request: *mut c_void);
    fn ucs_global_opts_set_value(name: *const c_char, value: *const c_char) -> ucs_status_t;
    fn ucs_debug_disable_signals();
    fn ucs_log_push_handler(handler: ucs_log_func_t);
}

impl Api {
    /// Opens UCX, by its usual name or from `path`, and makes it behave:
    ///
    /// - no signal handlers (SIGSEGV, SIGBUS, SIGILL, SIGFPE and SIGHUP would be UCX's), no stops for a debugger;
    /// - no patching of `mmap`, `munmap` and friends (`UCX_MEM_EVENTS`): Baton registers memory itself;
    /// - only errors are logged, to `log`, which may be called from any thread and must not unwind.
    ///
    /// The library is never unloaded: it has threads and exit handlers of its own.
    ///
    /// # Errors
    /// When it is missing or incomplete.
    pub fn load(path: Option<&Path>, log: ucs_log_func_t) -> Result<Self, LoadError> {
        let path = path.unwrap_or(Path::new("libucp.so.0")).to_owned();
        let failed = path.clone();
        // The constructor of `libucs` replaces the signal stack of the thread it runs on: let it be this one's.
        std::thread::Builder::new()
            .name("ucx-load".to_owned())
            .spawn(move || open(&path, log))
            .map_err(|source| LoadError::Thread { path: failed.clone(), source })?
            .join()
            .map_err(|_| LoadError::Panicked { path: failed })?
    }

    /// What a status means.
    pub fn describe(&self, status: ucs_status_t) -> String {
        // SAFETY: takes any number and returns a static string.
        let text = unsafe { (self.ucs_status_string)(status) };
        if text.is_null() {
            return format!("status {status}");
        }
        // SAFETY: a static, terminated string, see above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// The version of the library.
    pub fn version(&self) -> (u32, u32, u32) {
        let (mut major, mut minor, mut release) = (0, 0, 0);
        // SAFETY: writes three numbers.
        unsafe { (self.ucp_get_version)(&raw mut major, &raw mut minor, &raw mut release) };
        (major, minor, release)
    }
}

fn open(path: &Path, log: ucs_log_func_t) -> Result<Api, LoadError> {
    // Who finds the hooks loaded takes them for somebody else's: two threads at once would set UCX up with its patches
    // on before either has switched them off, and patches of what is patched already call each other without end.
    static OPENING: Mutex<()> = Mutex::new(());
    let _alone = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
    let hooks = keep_hooks_out(&path.with_file_name("libucm.so.0"));
    // SAFETY: the constructors of UCX read its environment and set up its own state, nothing of ours.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
    let library = library.map_err(|source| LoadError::Open { path: path.to_owned(), source })?;
    let resolved = Api::resolve(&library, path).inspect(|api| behave(api, log));
    std::mem::forget(library);
    if let Some(hooks) = hooks {
        // The constructors have switched it on again, to no effect yet.
        disable_events(&hooks);
        std::mem::forget(hooks);
    }
    resolved
}

/// Initializes the library that patches `mmap` and friends before UCX does so, with its patches off. It does that once.
/// None when somebody else in this process has loaded it: what is patched by then cannot be undone.
fn keep_hooks_out(path: &Path) -> Option<Library> {
    // SAFETY: opens nothing that is not open.
    if unsafe { Library::open(Some(path), RTLD_LAZY | RTLD_NOLOAD) }.is_ok() {
        return None;
    }
    // SAFETY: its constructor only sets up its own state. Lazily, because some of its functions need `libucs`.
    let library = unsafe { Library::open(Some(path), RTLD_LAZY | RTLD_LOCAL) }.ok()?;
    disable_events(&library);
    if let Some(config) = hook_config(&library) {
        // SAFETY: a variable of the library, which no other thread uses yet; 0 is `UCM_MMAP_HOOK_NONE`.
        unsafe { (*config).mmap_hook_mode = 0 };
    }
    // SAFETY: the type of the function in UCX's sources: `void ucm_library_init()`.
    let initialize = unsafe { library.get::<unsafe extern "C" fn()>(b"ucm_library_init") };
    if let Ok(initialize) = initialize {
        // SAFETY: may be called at any time; only the first call does anything.
        unsafe { initialize() };
    }
    Some(library)
}

fn hook_config(library: &Library) -> Option<*mut ucm_global_config_t> {
    // SAFETY: the type of the variable in UCX's headers; only the first fields, equal in all versions, are used.
    let config = unsafe { library.get::<*mut ucm_global_config_t>(b"ucm_global_opts") };
    config.ok().map(|config| *config)
}

fn disable_events(library: &Library) {
    if let Some(config) = hook_config(library) {
        // SAFETY: a variable of the library, read by UCX only when somebody asks for events.
        unsafe { (*config).enable_events = 0 };
    }
}

fn behave(api: &Api, log: ucs_log_func_t) {
    // SAFETY: puts the handlers back that were there before the library was opened.
    unsafe { (api.ucs_debug_disable_signals)() };
    for (name, value) in
        [(c"HANDLE_ERRORS", c"none"), (c"LOG_LEVEL", c"error"), (c"WARN_UNUSED_ENV_VARS", c"n")]
    {
        // SAFETY: two strings, copied; a name that this version lacks is an error status, which is no harm.
        unsafe { (api.ucs_global_opts_set_value)(name.as_ptr(), value.as_ptr()) };
    }
    // SAFETY: a function that lives as long as the process; the caller vouches for its behaviour.
    unsafe { (api.ucs_log_push_handler)(log) };
}
