//! Sleeping until a driver or a task has something to do.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::backend::fabric::driver::Driver;

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

    /// Sleeps until the alarm rings, the driver has something to poll for or `most` has passed.
    ///
    /// `blind` ignores the driver's descriptor. False when that is of no use: it would end every sleep at once.
    pub(super) fn sleep(&self, driver: &dyn Driver, most: Duration, blind: bool) -> bool {
        let timeout = Timespec { tv_sec: most.as_secs() as i64, tv_nsec: i64::from(most.subsec_nanos()) };
        // SAFETY: the descriptor is open as long as its driver, which is borrowed until this returns.
        let fd = driver.wait_fd().filter(|_| !blind).map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
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
