//! Copies out of another process: the kernel reads its memory by address, whatever that memory is.

use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Span;

/// Most ranges of one copy, on either side (`IOV_MAX`).
pub(crate) const MAX_RANGES: usize = 1024;

/// Another process of this user, held so that it is not mistaken for a later one of the same number.
pub(crate) struct Process {
    pid: Pid,
    handle: OwnedFd,
}

impl Process {
    /// Holds the process `pid`. Whether that is the one meant, the caller checks afterwards.
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        Ok(Self { pid, handle: pidfd_open(pid, PidfdFlags::empty())? })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether it has not ended: its number is still its own, so what was copied by that number before was its memory.
    pub(crate) fn is_alive(&self) -> bool {
        let mut ended = [PollFd::new(&self.handle, PollFlags::IN)];
        matches!(poll(&mut ended, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }
}

/// Bytes of another process, by its addresses; laid out as the kernel wants it (`struct iovec`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RemoteRange {
    pub(crate) address: usize,
    pub(crate) len: usize,
}

const _: () = assert!(size_of::<RemoteRange>() == size_of::<libc::iovec>());

/// Copies `from`, one range after the other, into `head` and then `spans`, with one system call.
///
/// At most [`MAX_RANGES`] on each side. It is an error when less than everything was copied.
pub(crate) fn copy_from_process<'a>(
    process: &Process,
    from: &[RemoteRange],
    head: &'a mut [u8],
    spans: impl Iterator<Item = Span<'a>>,
) -> io::Result<()> {
    let mut slices = Vec::with_capacity(spans.size_hint().1.unwrap_or(0) + 1);
    let mut wanted = head.len();
    if !head.is_empty() {
        slices.push(IoSliceMut::new(head));
    }
    for span in spans {
        let at = span.memory.0.at(span.offset, span.len);
        wanted += span.len;
        // SAFETY: in bounds, and mapped while `span.memory` is borrowed; the destination of a read is owned by
        // its operation (rule 4), only the kernel writes through the slice, and it is gone when this returns.
        slices.push(IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), span.len) }));
    }
    debug_assert!(slices.len() <= MAX_RANGES && from.len() <= MAX_RANGES, "the kernel takes no more");
    // SAFETY: `IoSliceMut` and `RemoteRange` are laid out as `iovec`; the local ranges are exclusive for the call, and
    // the addresses of the other process are the kernel's to check.
    let copied = unsafe {
        libc::process_vm_readv(
            process.pid.as_raw_nonzero().get(),
            slices.as_ptr().cast::<libc::iovec>(),
            slices.len() as libc::c_ulong,
            from.as_ptr().cast::<libc::iovec>(),
            from.len() as libc::c_ulong,
            0,
        )
    };
    match usize::try_from(copied) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(copied) if copied == wanted => Ok(()),
        // Part of a range is not mapped there.
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}
