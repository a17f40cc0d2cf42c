//! Puts the bytes of an answer in their places and digests them while they are in cache. No socket of its own.

use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::backend::ReadJob;
use crate::digest::{BlockDigest, block_digest};
use crate::memory::{HostMemory, Span, read_scattered};
use crate::session::{BlockSink, Destination};

/// Most bytes taken from the socket at once: they are digested next and should still be in the L2 cache.
const FILL_BYTES: usize = 256 << 10;
/// Most places one system call fills.
const FILL_SPANS: usize = 64;

/// Receives a range of the blocks of a read.
pub(crate) struct Receiver<'a> {
    job: &'a ReadJob<'a>,
    landing: Landing<'a>,
    end: usize,
    /// The block being received and the bytes of it that have arrived.
    block: usize,
    within: usize,
    /// Of the current block, when it arrives in pieces and is to be verified.
    digest: Option<BlockDigest>,
    /// Digest of the current block once it is whole.
    found: Option<u64>,
    pub(crate) corrupt: Vec<usize>,
}

enum Landing<'a> {
    Memory(&'a HostMemory),
    /// Whole blocks `group` lie one after the other in `bytes`; `filled` bytes of them have arrived.
    Staging {
        sink: &'a dyn BlockSink,
        bytes: Vec<u8>,
        group: Range<usize>,
        filled: usize,
    },
}

impl<'a> Receiver<'a> {
    pub(crate) fn new(job: &'a ReadJob<'a>, blocks: Range<usize>) -> Self {
        let landing = match job.into {
            Destination::Memory(memory) => Landing::Memory(memory),
            Destination::Sink(sink) => {
                Landing::Staging { sink, bytes: Vec::new(), group: blocks.start..blocks.start, filled: 0 }
            }
            Destination::Device(_) => unreachable!("the session asked whether tcp reaches a device"),
        };
        Self {
            job,
            landing,
            end: blocks.end,
            block: blocks.start,
            within: 0,
            digest: None,
            found: None,
            corrupt: Vec::new(),
        }
    }

    /// Reads once into `head` and the places of blocks before `until`; 0 is the end of the stream.
    pub(crate) fn fill(
        &mut self,
        socket: BorrowedFd<'_>,
        head: &mut [u8],
        until: usize,
    ) -> io::Result<usize> {
        let (job, block, within) = (self.job, self.block, self.within);
        match &mut self.landing {
            Landing::Memory(memory) => {
                let mut room = FILL_BYTES;
                let memory: &HostMemory = memory;
                let blocks = job.blocks[block..until].iter().enumerate().take(FILL_SPANS);
                let spans = blocks.map_while(|(i, read)| {
                    let skip = if i == 0 { within } else { 0 };
                    let len = (read.source.len as usize - skip).min(room);
                    room -= len;
                    (len > 0).then_some(Span { memory, offset: read.to + skip, len })
                });
                read_scattered(socket, head, spans)
            }
            Landing::Staging { bytes, group, filled, .. } => {
                if group.end <= block {
                    let (end, len) = group_of(job, block, until);
                    *group = block..end;
                    *filled = 0;
                    bytes.resize(bytes.len().max(len), 0);
                }
                let len: usize = job.blocks[group.clone()].iter().map(|read| read.source.len as usize).sum();
                let mut slices = [IoSliceMut::new(head), IoSliceMut::new(&mut bytes[*filled..len])];
                rustix::io::readv(socket, &mut slices).map_err(Into::into)
            }
        }
    }

    /// Puts bytes that came in another way into their places in `memory`, where blocks go straight.
    pub(crate) fn take(&mut self, memory: &HostMemory, mut bytes: &[u8]) {
        debug_assert!(matches!(self.landing, Landing::Memory(_)), "only memory takes bytes as they come");
        while self.block < self.end && !bytes.is_empty() {
            let read = &self.job.blocks[self.block];
            let (now, later) = bytes.split_at(bytes.len().min(read.source.len as usize - self.within));
            memory.write(read.to + self.within, now);
            self.advance(now.len());
            bytes = later;
        }
    }

    /// Accounts for `bytes` of blocks that [`Receiver::fill`] has put in place.
    pub(crate) fn advance(&mut self, mut bytes: usize) {
        self.job.progress.add(bytes);
        while bytes > 0 && self.block < self.end {
            let read = &self.job.blocks[self.block];
            let len = read.source.len as usize;
            let took = bytes.min(len - self.within);
            self.digest(took);
            if let Landing::Staging { filled, .. } = &mut self.landing {
                *filled += took;
            }
            bytes -= took;
            self.within += took;
            if self.within == len {
                self.end_block(len);
            }
        }
    }

    /// Digests the next `took` bytes of the current block, which are in place.
    fn digest(&mut self, took: usize) {
        let Some(expected) = self.job.expected(self.block) else { return };
        let read = &self.job.blocks[self.block];
        let len = read.source.len as usize;
        if took == len {
            self.found = Some(match &self.landing {
                Landing::Memory(memory) => memory.block_digest(expected.seed, read.to, len),
                Landing::Staging { bytes, filled, .. } => {
                    block_digest(expected.seed, &bytes[*filled..*filled + len])
                }
            });
            return;
        }
        if self.within == 0 {
            match &mut self.digest {
                Some(digest) => digest.restart(expected.seed),
                None => self.digest = Some(BlockDigest::new(expected.seed)),
            }
        }
        let Some(digest) = &mut self.digest else { return };
        match &self.landing {
            Landing::Memory(memory) => memory.digest(digest, read.to + self.within, took),
            Landing::Staging { bytes, filled, .. } => digest.update(&bytes[*filled..*filled + took]),
        }
        if self.within + took == len {
            self.found = Some(digest.finish());
        }
    }

    /// The first block that is not complete.
    pub(crate) fn next_block(&self) -> usize {
        self.block
    }

    /// Judges the block that has just become whole, hands it on when it is good, and goes on to the next.
    fn end_block(&mut self, len: usize) {
        if self.found.take() == self.job.expected(self.block).map(|expected| expected.digest) {
            if let Landing::Staging { sink, bytes, filled, .. } = &self.landing {
                sink.block(self.block, &bytes[*filled - len..*filled]);
            }
            self.job.progress.finish(self.block);
        } else {
            self.corrupt.push(self.block);
        }
        self.block += 1;
        self.within = 0;
    }
}

/// As many whole blocks from `start` as one fill takes, at least one: their end and their bytes.
fn group_of(job: &ReadJob<'_>, start: usize, until: usize) -> (usize, usize) {
    let mut total = job.blocks[start].source.len as usize;
    let mut end = start + 1;
    while end < until && total + job.blocks[end].source.len as usize <= FILL_BYTES {
        total += job.blocks[end].source.len as usize;
        end += 1;
    }
    (end, total)
}
