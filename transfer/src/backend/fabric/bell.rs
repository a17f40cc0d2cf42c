//! Wakes a task from a thread of ours through the reactor of its runtime.
//!
//! A task that is woken from outside its runtime is queued there, and a worker is woken to look for it, which wakes
//! another to look for more. A descriptor that becomes readable wakes the one worker that waits for descriptors, and it
//! runs the task at once.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use rustix::event::{EventfdFlags, eventfd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Handle, Id};

/// Most bells that are kept.
const KEPT_MAX: usize = 64;

/// The bells that nobody waits at.
#[derive(Default)]
pub(super) struct Bells(Mutex<Vec<Bell>>);

impl Bells {
    /// A bell that wakes tasks of the current runtime; none where the system has none, or outside of a runtime.
    pub(super) fn take(&self) -> Option<Bell> {
        let runtime = Handle::try_current().ok()?.id();
        let mut kept = self.lock();
        if let Some(at) = kept.iter().position(|bell| bell.runtime == runtime) {
            return Some(kept.swap_remove(at));
        }
        drop(kept);
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?;
        Some(Bell { runtime, fd: Arc::new(readable(fd).ok()?) })
    }

    pub(super) fn give_back(&self, bell: Bell) {
        let mut kept = self.lock();
        if kept.len() < KEPT_MAX {
            kept.push(bell);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Bell>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A descriptor that the current runtime waits for.
pub(super) fn readable(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an open descriptor, which what is made here alone owns, and closes when it has taken it off the reactor.
    let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    registered.map_err(std::io::Error::from)
}

/// A descriptor that one task at a time waits for. It may ring for nothing.
pub(super) struct Bell {
    runtime: Id,
    fd: Arc<AsyncFd<OwnedFd>>,
}

impl Bell {
    /// What rings it.
    pub(super) fn rope(&self) -> Rope {
        Rope(Arc::clone(&self.fd))
    }

    /// Ready when it has rung since the last time; an error when it never will.
    pub(super) fn poll(&self, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        // The reactor tells of every ring anew, so that nothing has to be taken back.
        self.fd.poll_read_ready(context).map_ok(|mut rung| rung.clear_ready())
    }
}

/// Rings a bell.
pub(super) struct Rope(Arc<AsyncFd<OwnedFd>>);

impl Rope {
    pub(super) fn pull(&self) {
        // It fails only when it has rung 2^64 times.
        let _ = rustix::io::write(self.0.as_fd(), &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn every_ring_wakes_and_bells_are_used_again_within_their_runtime() {
        let bells = Bells::default();
        let bell = bells.take().unwrap();
        for _ in 0..100 {
            let rope = bell.rope();
            let ringing = std::thread::spawn(move || rope.pull());
            let rung = tokio::time::timeout(Duration::from_secs(10), poll_fn(|context| bell.poll(context)));
            rung.await.expect("it wakes").unwrap();
            ringing.join().unwrap();
        }
        bells.give_back(bell);
        let elsewhere = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { bells.take().map(|bell| bell.runtime) })
        };
        let other = std::thread::scope(|scope| scope.spawn(elsewhere).join().unwrap());
        assert!(other.is_some_and(|other| other != Handle::current().id()));
        assert_eq!(bells.lock().len(), 1, "that of this runtime is left");
        assert!(bells.take().is_some() && bells.lock().is_empty());
    }
}
