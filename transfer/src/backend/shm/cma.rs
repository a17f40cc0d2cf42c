//! Copies blocks out of a peer by their addresses there: many blocks with one system call, neighbours as one range.

use std::io;

use crate::backend::ReadJob;
use crate::digest::{BlockDigest, DigestSeed, block_digest};
use crate::error::LinkError;
use crate::memory::{HostMemory, MAX_RANGES, Process, RemoteRange, Span, copy_from_process};
use crate::probe::Probe;
use crate::session::Destination;

/// Bytes of one call when they are looked at again, for their digest or by a sink: they should still be in cache.
const CACHED_BYTES: usize = 256 << 10;
/// Bytes of one call when they are not; other tasks wait that long.
const CALL_BYTES: usize = 4 << 20;

/// Blocks to be copied by one call.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) blocks: Vec<Waiting>,
    from: Vec<RemoteRange>,
    /// Offset and length in the destination memory, or in the staging buffer.
    to: Vec<(usize, usize)>,
    pub(super) bytes: usize,
}

/// A block of a batch.
pub(super) struct Waiting {
    pub(super) index: usize,
    /// Offset in the destination memory, or in the staging buffer.
    pub(super) to: usize,
    pub(super) len: usize,
    /// Whether it has the digest it must have.
    pub(super) good: bool,
}

impl Batch {
    /// Whether a block of `len` bytes may be added; one always may.
    pub(super) fn has_room(&self, job: &ReadJob<'_>, len: usize) -> bool {
        let cached = job.verify || matches!(job.into, Destination::Sink(_));
        let most = if cached { CACHED_BYTES } else { CALL_BYTES };
        self.blocks.is_empty() || (self.bytes + len <= most && self.blocks.len() < MAX_RANGES)
    }

    /// Adds the block `index` of the read, which is at `address` in the peer.
    pub(super) fn push(&mut self, job: &ReadJob<'_>, index: usize, address: usize) {
        if self.blocks.is_empty() {
            let most = (job.blocks.len() - index).min(MAX_RANGES);
            self.blocks.reserve(most);
            self.from.reserve(most + 1);
            self.to.reserve(most);
        }
        let block = &job.blocks[index];
        let len = block.source.len as usize;
        let to = match job.into {
            Destination::Memory(_) | Destination::Device(_) => block.to,
            Destination::Sink(_) => self.bytes,
        };
        self.blocks.push(Waiting { index, to, len, good: true });
        self.bytes += len;
        match self.from.last_mut() {
            Some(last) if last.address + last.len == address => last.len += len,
            _ => self.from.push(RemoteRange { address, len }),
        }
        match self.to.last_mut() {
            Some((start, before)) if *start + *before == to => *before += len,
            _ => self.to.push((to, len)),
        }
    }

    /// Copies the blocks to their places, or to `staging`, and compares their digests.
    pub(super) fn copy(
        &mut self,
        job: &ReadJob<'_>,
        process: &Process,
        staging: &mut Vec<u8>,
    ) -> Result<(), LinkError> {
        let copied = match job.into {
            Destination::Memory(memory) => self.copy_to_memory(job, process, memory),
            Destination::Sink(_) => {
                staging.resize(staging.len().max(self.bytes), 0);
                self.copy_to_staging(job, process, &mut staging[..self.bytes])
            }
            Destination::Device(_) => unreachable!("the session asked whether shm reaches a device"),
        };
        copied.map_err(|error| failure(process, error))
    }

    /// Makes room for the next blocks.
    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.from.clear();
        self.to.clear();
        self.bytes = 0;
    }

    fn copy_to_memory(
        &mut self,
        job: &ReadJob<'_>,
        process: &Process,
        memory: &HostMemory,
    ) -> io::Result<()> {
        if let ([long], [from]) = (&mut self.blocks[..], &self.from[..])
            && long.len > CACHED_BYTES
            && let Some(expected) = job.expected(long.index)
        {
            let to = Span { memory, offset: long.to, len: long.len };
            long.good = copy_long(process, *from, to, expected.seed)? == expected.digest;
            return Ok(());
        }
        let spans = self.to.iter().map(|&(offset, len)| Span { memory, offset, len });
        copy_from_process(process, &mut self.from, &mut [], spans)?;
        self.verify(job, |seed, block| memory.block_digest(seed, block.to, block.len));
        Ok(())
    }

    fn copy_to_staging(
        &mut self,
        job: &ReadJob<'_>,
        process: &Process,
        staging: &mut [u8],
    ) -> io::Result<()> {
        copy_from_process(process, &mut self.from, staging, std::iter::empty())?;
        self.verify(job, |seed, block| block_digest(seed, &staging[block.to..block.to + block.len]));
        Ok(())
    }

    fn verify(&mut self, job: &ReadJob<'_>, digest: impl Fn(DigestSeed, &Waiting) -> u64) {
        for block in &mut self.blocks {
            if let Some(expected) = job.expected(block.index) {
                block.good = digest(expected.seed, block) == expected.digest;
            }
        }
    }
}

/// Copies one block in pieces, each digested while it is in cache.
fn copy_long(process: &Process, from: RemoteRange, to: Span<'_>, seed: DigestSeed) -> io::Result<u64> {
    let mut digest = BlockDigest::new(seed);
    for done in (0..to.len).step_by(CACHED_BYTES) {
        let len = CACHED_BYTES.min(to.len - done);
        let piece = Span { offset: to.offset + done, len, ..to };
        let mut from = vec![RemoteRange { address: from.address + done, len }];
        copy_from_process(process, &mut from, &mut [], std::iter::once(piece))?;
        to.memory.digest(&mut digest, piece.offset, len);
    }
    Ok(digest.finish())
}

/// Whether the kernel lets processes of one user copy each other's memory here.
pub fn probe() -> Probe {
    const REMEDY: &str = "sysctl kernel.yama.ptrace_scope=0, or give the workers CAP_SYS_PTRACE";
    let word = [7u8; 8];
    let mut copy = [0u8; 8];
    let own = Process::of(rustix::process::getpid());
    let mut from = vec![RemoteRange { address: word.as_ptr().addr(), len: word.len() }];
    let copied = copy_from_process(&own, &mut from, &mut copy, std::iter::empty());
    if let Err(error) = copied {
        return Probe::fails(
            "cma",
            format!("process_vm_readv: {error}"),
            "allow that system call in the sandbox",
        );
    }
    // A kernel without the Yama module has no such file, and only asks that both have one user.
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    match scope.trim() {
        "" | "0" => Probe::works("cma", "process_vm_readv between processes of one user"),
        _ if may_trace() => Probe::works("cma", "process_vm_readv, with CAP_SYS_PTRACE"),
        scope => Probe::fails("cma", format!("kernel.yama.ptrace_scope is {scope}"), REMEDY),
    }
}

/// Whether this process has CAP_SYS_PTRACE.
fn may_trace() -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .is_some_and(|set| set >> CAP_SYS_PTRACE & 1 == 1)
}

/// What a failed copy means.
pub(super) fn failure(process: &Process, error: io::Error) -> LinkError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOSYS) => LinkError::Trace { pid: process.pid().as_raw_nonzero().get() },
        Some(libc::ESRCH) => LinkError::Closed,
        _ => LinkError::io("copying from the peer's memory")(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_tells_what_stands_in_the_way() {
        let probe = probe();
        let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
        let free = matches!(scope.trim(), "" | "0") || may_trace();
        assert_eq!((probe.works, probe.remedy.is_none()), (free, free), "{probe:?}");
    }

    #[test]
    fn a_lack_of_rights_says_which() {
        let own = Process::of(rustix::process::getpid());
        let denied = failure(&own, io::Error::from_raw_os_error(libc::EPERM)).to_string();
        assert!(denied.contains("kernel.yama.ptrace_scope") && denied.contains("CAP_SYS_PTRACE"), "{denied}");
        assert!(matches!(failure(&own, io::Error::from_raw_os_error(libc::ESRCH)), LinkError::Closed));
    }
}
