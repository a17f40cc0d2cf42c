//! Hand-kept bindings of libfabric, opened at run time: only what Baton's transfers use.
//!
//! Two levels, and nothing more: [`abi`] repeats the C declarations, [`Library`] and [`call`] are thin calls that
//! return a [`Result`]. Ownership, order of closing and everything safe belong to the caller.
//!
//! One binary works with libfabric 1.17 and later 1.x and 2.x: structures that the library allocates are only ever read up to the
//! fields declared here, whose offsets are equal in all of them, and those that we allocate are zeroed and longer
//! than any version reads. Function tables name their own size, and every entry that 1.17 may lack is checked
//! against it. A test compiles `c/offsets.c` against the installed headers and compares every offset and constant.

pub mod abi;
pub mod call;
mod library;

pub use library::{Library, OpenError, reason};

/// A status of libfabric: a positive number, from `errno.h` or from `fi_errno.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[error("libfabric status {0}")]
pub struct Errno(pub i32);

impl Errno {
    /// Queues are full, or nothing is there yet.
    pub const AGAIN: Self = Self(11);
    /// Not implemented by this provider.
    pub const NOSYS: Self = Self(38);
    /// Nothing matches what was asked for.
    pub const NODATA: Self = Self(61);
    /// Cancelled as asked.
    pub const CANCELED: Self = Self(125);
    /// An error waits in the completion queue.
    pub const AVAIL: Self = Self(259);
    /// The key is in use, or none is left.
    pub const NOKEY: Self = Self(266);

    /// What a call returned: a count, or a negative status.
    ///
    /// # Errors
    /// When it is negative.
    pub fn check(returned: isize) -> Result<usize, Self> {
        usize::try_from(returned).map_err(|_| Self(i32::try_from(-returned).unwrap_or(i32::MAX)))
    }
}
