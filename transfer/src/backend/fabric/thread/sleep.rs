//! Sleeping until a driver or a task has something to do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::backend::fabric::driver::Driver;

/// A descriptor of our own for what a driver's descriptor tells: it stays open when the driver is closed.
pub(super) fn wait_fd(driver: &(impl Driver + ?Sized)) -> Option<OwnedFd> {
    // SAFETY: the descriptor is open as long as its driver, which is borrowed until this returns.
    let fd = unsafe { BorrowedFd::borrow_raw(driver.wait_fd()?) };
    fd.try_clone_to_owned().ok()
}

/// Wakes the thread out of its sleep.
#[derive(Debug)]
pub(super) struct Alarm(OwnedFd);

impl Alarm {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Ends the sleep of the thread, or its next one.
    pub(super) fn ring(&self) {
        // It fails only when it rings already, 2^64 times.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Sleeps until the alarm rings, `fd` is readable or `most` has passed. False when `fd` is of no use: it would end
    /// every sleep at once.
    pub(super) fn sleep(&self, fd: Option<BorrowedFd<'_>>, most: Duration) -> bool {
        let timeout = Timespec { tv_sec: most.as_secs() as i64, tv_nsec: i64::from(most.subsec_nanos()) };
        let own = self.0.as_fd();
        let mut fds =
            [PollFd::new(&own, PollFlags::IN), PollFd::new(fd.as_ref().unwrap_or(&own), PollFlags::IN)];
        let count = if fd.is_some() { 2 } else { 1 };
        // A signal ends the sleep, as anything else may: the thread looks again.
        let _ = poll(&mut fds[..count], Some(&timeout));
        if fds[0].revents().contains(PollFlags::IN) {
            let _ = rustix::io::read(&self.0, &mut [0; 8]);
        }
        let broken = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
        count == 1 || !fds[1].revents().intersects(broken)
    }
}
