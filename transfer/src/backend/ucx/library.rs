//! The one copy of UCX in this process.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::OnceLock;

use baton_ucx_sys::{Api, LoadError, UCS_LOG_FUNC_RC_STOP};

use super::DriverError;

const REMEDY: &str = "install Debian's libucx0 (or UCX built with CUDA, for GPU memory)";
/// Longest line of UCX's log that is passed on.
const LINE_MAX_BYTES: usize = 512;

unsafe extern "C" {
    fn vsnprintf(into: *mut c_char, len: usize, format: *const c_char, arguments: *mut c_void) -> c_int;
}

/// The library, opened at the first call and for good.
pub(super) fn get() -> Result<&'static Api, DriverError> {
    static LOADED: OnceLock<Api> = OnceLock::new();
    if let Some(api) = LOADED.get() {
        return Ok(api);
    }
    let api = open(None)?;
    Ok(LOADED.get_or_init(|| api))
}

/// Opens the library, by its usual name or from `path`.
pub(super) fn open(path: Option<&Path>) -> Result<Api, DriverError> {
    Api::load(path, log).map_err(|error| {
        let reason = match &error {
            LoadError::Open { source, .. } => format!(": {}", baton_libfabric_sys::reason(source)),
            LoadError::Thread { source, .. } => format!(": {source}"),
            LoadError::Symbol { .. } | LoadError::Panicked { .. } => String::new(),
        };
        DriverError { what: format!("{error}{reason}"), remedy: REMEDY.to_owned() }
    })
}

/// What UCX would have printed to standard output goes to the log of this process.
unsafe extern "C" fn log(
    _file: *const c_char,
    _line: c_uint,
    _function: *const c_char,
    _level: c_int,
    _component: *const c_void,
    message: *const c_char,
    arguments: *mut c_void,
) -> c_int {
    let mut line = [0 as c_char; LINE_MAX_BYTES];
    // SAFETY: UCX passes a format and its arguments; the buffer has the length given, and gets terminated.
    let len = unsafe { vsnprintf(line.as_mut_ptr(), line.len(), message, arguments) };
    if len >= 0 {
        // SAFETY: terminated by the call above.
        let line = unsafe { CStr::from_ptr(line.as_ptr()) };
        tracing::warn!(library = "ucx", "{}", line.to_string_lossy());
    }
    UCS_LOG_FUNC_RC_STOP
}
