//! The descriptor of a driver as a sleeper sees it: it tells of something once, and then no more until it is opened again.
//!
//! Who looks again and again sees for itself what comes. Without this, each arrival would wake a thread that sleeps, too.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{Timespec, epoll};

const ONCE: epoll::EventFlags = epoll::EventFlags::IN.union(epoll::EventFlags::ONESHOT);

/// See the module. It is closed at first.
pub(super) struct Gate {
    set: OwnedFd,
    of: OwnedFd,
    is_open: AtomicBool,
}

impl Gate {
    pub(super) fn new(of: OwnedFd) -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&set, &of, epoll::EventData::new_u64(0), epoll::EventFlags::empty())?;
        Ok(Self { set, of, is_open: AtomicBool::new(false) })
    }

    /// Has it tell once of what is there or comes.
    pub(super) fn open(&self) {
        self.is_open.store(true, Ordering::SeqCst);
        // Both descriptors are open, and one is in the other: it cannot fail.
        let _ = epoll::modify(&self.set, &self.of, epoll::EventData::new_u64(0), ONCE);
    }

    /// Whether it tells of what comes, or has told and was not taken note of.
    pub(super) fn is_open(&self) -> bool {
        self.is_open.load(Ordering::SeqCst)
    }

    /// Takes note of what it told; from here on it tells nothing.
    pub(super) fn take(&self) {
        let mut told = [const { MaybeUninit::<epoll::Event>::uninit() }; 1];
        let _ = epoll::wait(&self.set, &mut told, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        // Last: who opens it meanwhile opens it once too often rather than not at all.
        self.is_open.store(false, Ordering::SeqCst);
    }

    /// What the driver's descriptor tells, always.
    pub(super) fn inner(&self) -> BorrowedFd<'_> {
        self.of.as_fd()
    }
}

impl AsFd for Gate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.set.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn tells(gate: &Gate) -> bool {
        let mut fds = [PollFd::new(gate, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn it_tells_once_each_time_it_is_opened() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let gate = Gate::new(far.into()).unwrap();
        near.write_all(b"1").unwrap();
        assert!(!tells(&gate), "closed at first");
        gate.open();
        assert!(tells(&gate) && gate.is_open(), "also of what came before");
        gate.take();
        assert!(!gate.is_open());
        near.write_all(b"2").unwrap();
        assert!(!tells(&gate), "closed again");
        gate.open();
        assert!(tells(&gate));
    }
}
