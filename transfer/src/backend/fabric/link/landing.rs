//! Takes blocks out of buffers: copies and digests them in one pass, judges them, hands them on.

use super::plan::{Load, Part};
use crate::backend::ReadJob;
use crate::digest::BlockDigest;
use crate::memory::HostMemory;
use crate::session::{BlockSink, Destination};

/// The buffers of a read, emptied in order.
pub(super) struct Landing<'a> {
    job: &'a ReadJob<'a>,
    /// Where the bytes of a block for a sink are gathered.
    staging: Vec<u8>,
    /// Of a block that comes in parts.
    digest: Option<BlockDigest>,
    pub(super) corrupt: Vec<usize>,
}

enum To<'a> {
    Memory(&'a HostMemory),
    Sink(&'a dyn BlockSink),
}

impl<'a> Landing<'a> {
    pub(super) fn new(job: &'a ReadJob<'a>) -> Self {
        Self { job, staging: Vec::new(), digest: None, corrupt: Vec::new() }
    }

    /// Takes everything out of a buffer at `offset` of `memory`.
    pub(super) fn take(&mut self, load: &Load, memory: &HostMemory, offset: usize) {
        let to = match self.job.into {
            Destination::Memory(to) => To::Memory(to),
            Destination::Sink(sink) => To::Sink(sink),
            // Plans send blocks for a device straight there.
            Destination::Device(_) => return,
        };
        for part in &load.parts {
            let whole = part.len == self.job.blocks[part.block].source.len as usize;
            let good = match whole {
                true => Some(self.take_whole(part, memory, offset + part.at, &to)),
                false => self.take_part(part, memory, offset + part.at, &to),
            };
            self.job.progress.add(part.len);
            match good {
                Some(false) => self.corrupt.push(part.block),
                Some(true) => {
                    if let To::Sink(sink) = to {
                        let len = self.job.blocks[part.block].source.len as usize;
                        sink.block(part.block, &self.staging[..len]);
                    }
                    self.job.progress.finish(part.block);
                }
                None => {}
            }
        }
    }

    /// Whether a whole block is what it should be.
    fn take_whole(&mut self, part: &Part, memory: &HostMemory, from: usize, to: &To<'_>) -> bool {
        let block = &self.job.blocks[part.block];
        let expected = self.job.expected(part.block);
        let found = match (to, &expected) {
            (To::Memory(to), None) => {
                memory.copy_to(from, to, block.to, part.len);
                None
            }
            (To::Memory(to), Some(expected)) => {
                Some(memory.copy_to_digesting(from, (to, block.to), part.len, expected.seed))
            }
            (To::Sink(_), expected) => {
                let staging = grown(&mut self.staging, part.len);
                match expected {
                    None => {
                        memory.read(from, staging);
                        None
                    }
                    Some(expected) => Some(memory.read_digesting(from, staging, expected.seed)),
                }
            }
        };
        found == expected.map(|expected| expected.digest)
    }

    /// Whether a block is what it should be, once its last part is there.
    fn take_part(&mut self, part: &Part, memory: &HostMemory, from: usize, to: &To<'_>) -> Option<bool> {
        let block = &self.job.blocks[part.block];
        let expected = self.job.expected(part.block);
        if let (0, Some(expected)) = (part.skip, &expected) {
            self.digest = Some(BlockDigest::new(expected.seed));
        }
        let digest = self.digest.as_mut().filter(|_| expected.is_some());
        match to {
            To::Memory(to) => {
                memory.copy_to(from, to, block.to + part.skip, part.len);
                digest.into_iter().for_each(|digest| to.digest(digest, block.to + part.skip, part.len));
            }
            To::Sink(_) => {
                let staging =
                    &mut grown(&mut self.staging, block.source.len as usize)[part.skip..][..part.len];
                memory.read(from, staging);
                digest.into_iter().for_each(|digest| digest.update(staging));
            }
        }
        if part.skip + part.len < block.source.len as usize {
            return None;
        }
        let found = self.digest.take().map(|digest| digest.finish());
        Some(found == expected.map(|expected| expected.digest))
    }
}

fn grown(staging: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if staging.len() < len {
        staging.resize(len, 0);
    }
    &mut staging[..len]
}
