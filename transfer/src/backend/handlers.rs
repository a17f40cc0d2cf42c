//! Keeps the signal handlers of the process: libraries that are opened at run time must not take them over.
//!
//! Debian's libfabric brings libpsm, which on being loaded installs handlers of its own for SIGTERM, SIGINT, SIGSEGV and
//! others: a worker told to drain would then print a backtrace and die.

use std::ffi::{CStr, c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Signals whose handlers are looked after: all but the real-time ones.
const SIGNALS: std::ops::Range<c_int> = 1..32;

/// What the loads under way found, for all of them: the libraries of several agents, and of one, are opened side by side,
/// and who begins while another library has its handlers in place must not take those for the program's.
static KEPT: Mutex<Kept> = Mutex::new(Kept { loads: 0, before: Vec::new() });

struct Kept {
    loads: usize,
    /// The handlers when the first of them began, and those that the program has installed since.
    before: Vec<(c_int, libc::sigaction)>,
}

/// Runs `load` and puts back every handler that a shared library installed meanwhile.
///
/// A handler that this program itself installs at the same time, on another thread, stays.
pub(crate) fn keep<T>(load: impl FnOnce() -> T) -> T {
    let _keeping = Keeping::begin();
    load()
}

/// A load under way.
struct Keeping;

impl Keeping {
    fn begin() -> Self {
        let mut kept = lock();
        if kept.loads == 0 {
            kept.before = SIGNALS.filter_map(|signal| Some((signal, current(signal)?))).collect();
        } else {
            for (signal, before) in &mut kept.before {
                let now = current(*signal).filter(|now| !is_foreign(now.sa_sigaction));
                *before = now.unwrap_or(*before);
            }
        }
        kept.loads += 1;
        Self
    }
}

impl Drop for Keeping {
    fn drop(&mut self) {
        let mut kept = lock();
        for (signal, before) in &kept.before {
            let Some(now) = current(*signal) else { continue };
            if now.sa_sigaction != before.sa_sigaction && is_foreign(now.sa_sigaction) {
                // SAFETY: `before` is what the system reported for this signal a moment ago.
                let restored = unsafe { libc::sigaction(*signal, before, std::ptr::null_mut()) };
                debug_assert_eq!(restored, 0, "a handler that was there can be put back");
            }
        }
        kept.loads -= 1;
    }
}

fn lock() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// As a library does.
    fn install(signal: c_int, handler: libc::sighandler_t) {
        let mut action = current(signal).unwrap();
        action.sa_sigaction = handler;
        // SAFETY: never raised here, so that it does not matter what it would do.
        assert_eq!(unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) }, 0);
    }

    #[test]
    fn a_library_that_is_opened_beside_another_does_not_pass_for_the_program() {
        // No test and no library takes this one.
        let signal = libc::SIGURG;
        let before = handler(signal);
        let foreign = libc::getpid as *const () as usize;
        let (begun, begins) = std::sync::mpsc::sync_channel::<()>(1);
        let (other, ended) = std::sync::mpsc::sync_channel::<()>(1);
        let second = keep(|| {
            install(signal, foreign);
            let second = std::thread::spawn(move || {
                keep(|| {
                    begun.send(()).unwrap();
                    // The first has put back what was there; this one is late with its own.
                    ended.recv().unwrap();
                    install(signal, foreign);
                });
            });
            begins.recv().unwrap();
            second
        });
        assert_eq!(handler(signal), before);
        other.send(()).unwrap();
        second.join().unwrap();
        assert_eq!(handler(signal), before);
    }

    #[test]
    fn what_a_load_that_panics_leaves_is_put_back() {
        let before = handler(libc::SIGPWR);
        let foreign = libc::getpid as *const () as usize;
        let loading = std::panic::catch_unwind(|| {
            keep(|| {
                install(libc::SIGPWR, foreign);
                panic!("broken library");
            })
        });
        assert!(loading.is_err());
        assert_eq!(handler(libc::SIGPWR), before);
    }

    #[test]
    fn a_handler_of_a_library_is_told_from_one_of_the_program() {
        assert!(is_foreign(libc::getpid as *const () as usize), "it lies in the C library");
        assert!(!is_foreign(own as *const () as usize));
        assert!(!is_foreign(libc::SIG_DFL) && !is_foreign(libc::SIG_IGN));
    }
}
