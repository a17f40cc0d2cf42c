//! Copies out of another process: the kernel reads its memory by address, whatever that memory is.

use std::io::{self, IoSliceMut};

use rustix::process::Pid;

use super::Span;

/// Most ranges of one copy, on either side (`IOV_MAX`), less the witness.
pub(crate) const MAX_RANGES: usize = 1023;

/// Another process of this user.
pub(crate) struct Process {
    pid: Pid,
    witness: Option<Witness>,
}

/// What stands in the memory of the one process that is meant.
struct Witness {
    address: usize,
    value: [u8; 16],
}

impl Process {
    /// Whatever process has the number `pid`.
    pub(crate) fn of(pid: Pid) -> Self {
        Self { pid, witness: None }
    }

    /// The process `pid` that has `value`, which is like no other, at `address`.
    ///
    /// Every copy takes it along, in the same system call and so out of the same memory as everything else: another
    /// process that got the number meanwhile, or another program in the same process, is never taken for this one.
    pub(crate) fn with_witness(pid: Pid, address: usize, value: [u8; 16]) -> Self {
        Self { pid, witness: Some(Witness { address, value }) }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
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
/// At most [`MAX_RANGES`] on each side. It is an error when less than everything was copied, or when the process is
/// not the one that was meant (`ESRCH`): then whatever was copied is not what it should be.
pub(crate) fn copy_from_process<'a>(
    process: &Process,
    from: &mut Vec<RemoteRange>,
    head: &'a mut [u8],
    spans: impl Iterator<Item = Span<'a>>,
) -> io::Result<()> {
    let mut seen = [0; 16];
    let mut slices = Vec::with_capacity(spans.size_hint().1.unwrap_or(0) + 2);
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
    let ranges = from.len();
    debug_assert!(slices.len() <= MAX_RANGES && ranges <= MAX_RANGES, "the kernel takes no more");
    if let Some(witness) = &process.witness {
        from.push(RemoteRange { address: witness.address, len: seen.len() });
        slices.push(IoSliceMut::new(&mut seen));
        wanted += witness.value.len();
    }
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
    from.truncate(ranges);
    let copied = usize::try_from(copied).map_err(|_| io::Error::last_os_error())?;
    if copied != wanted {
        // Part of a range is not mapped there.
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    }
    match &process.witness {
        Some(witness) if witness.value != seen => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        _ => Ok(()),
    }
}
