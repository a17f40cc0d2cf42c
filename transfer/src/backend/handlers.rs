//! Keeps the signal handlers of the process: libraries that are opened at run time must not take them over.
//!
//! Debian's libfabric brings libpsm, which on being loaded installs handlers of its own for SIGTERM, SIGINT, SIGSEGV and
//! others: a worker told to drain would then print a backtrace and die.

use std::ffi::{CStr, c_int, c_void};
use std::mem::MaybeUninit;

/// Signals whose handlers are looked after: all but the real-time ones.
const SIGNALS: std::ops::Range<c_int> = 1..32;

/// Runs `load` and puts back every handler that a shared library installed meanwhile.
///
/// A handler that this program itself installs at the same time, on another thread, stays.
pub(crate) fn keep<T>(load: impl FnOnce() -> T) -> T {
    let before: Vec<(c_int, Option<libc::sigaction>)> =
        SIGNALS.map(|signal| (signal, current(signal))).collect();
    let loaded = load();
    for (signal, before) in before {
        let (Some(before), Some(now)) = (before, current(signal)) else { continue };
        if now.sa_sigaction != before.sa_sigaction && is_foreign(now.sa_sigaction) {
            // SAFETY: `before` is what the system reported for this signal a moment ago.
            let restored = unsafe { libc::sigaction(signal, &raw const before, std::ptr::null_mut()) };
            debug_assert_eq!(restored, 0, "a handler that was there can be put back");
        }
    }
    loaded
}

fn current(signal: c_int) -> Option<libc::sigaction> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null action only asks; the answer goes to a place of the right type.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: all-zero bytes are a sigaction, and the call has filled it where it succeeded.
    (asked == 0).then(|| unsafe { action.assume_init() })
}

/// Whether a handler lies in another file than this program.
fn is_foreign(handler: libc::sighandler_t) -> bool {
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        return false;
    }
    file_of(handler).is_some_and(|file| Some(file) != file_of(is_foreign as *const () as usize))
}

/// The file of the code at an address.
fn file_of(address: usize) -> Option<Vec<u8>> {
    let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: the address is only looked up, and the answer goes to a place of the right type.
    let found = unsafe { libc::dladdr(address as *const c_void, info.as_mut_ptr()) };
    // SAFETY: all-zero bytes are a Dl_info, and the call has filled it where it succeeded.
    let info = unsafe { info.assume_init() };
    if found == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the linker's name of a loaded file is a C string that lives as long as the file is loaded.
    Some(unsafe { CStr::from_ptr(info.dli_fname) }.to_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::libfabric::{self, LibfabricOptions};
    use crate::backend::ucx::{self, UcxOptions};

    extern "C" fn own(_: c_int) {}

    fn handler(signal: c_int) -> libc::sighandler_t {
        current(signal).unwrap().sa_sigaction
    }

    #[test]
    fn libraries_leave_the_handlers_of_the_process_alone() {
        // Each test is a process of its own under nextest; under `cargo test` no other one touches this signal.
        let mut action = current(libc::SIGQUIT).unwrap();
        action.sa_sigaction = own as *const () as usize;
        // SAFETY: a handler that does nothing may run at any time.
        assert_eq!(unsafe { libc::sigaction(libc::SIGQUIT, &raw const action, std::ptr::null_mut()) }, 0);
        let before: Vec<_> = SIGNALS.map(handler_or_none).collect();
        let fabric = libfabric::open(&LibfabricOptions::default());
        let ucx = ucx::open(&UcxOptions::default());
        assert!(fabric.is_ok() || ucx.is_ok(), "neither library is installed: nothing was tested");
        assert_eq!(before, SIGNALS.map(handler_or_none).collect::<Vec<_>>());
        assert_eq!(handler(libc::SIGQUIT), own as *const () as usize);
    }

    fn handler_or_none(signal: c_int) -> Option<libc::sighandler_t> {
        current(signal).map(|action| action.sa_sigaction)
    }

    #[test]
    fn a_handler_of_a_library_is_told_from_one_of_the_program() {
        assert!(is_foreign(libc::getpid as *const () as usize), "it lies in the C library");
        assert!(!is_foreign(own as *const () as usize));
        assert!(!is_foreign(libc::SIG_DFL) && !is_foreign(libc::SIG_IGN));
    }
}
