//! Copies blocks to their staging slots, where each is one run, and digests each chunk while a device copies the next
//! ones.

use std::collections::VecDeque;
use std::ops::Range;

use super::{ExportBlock, Prepared};
use crate::agent::Integrity;
use crate::device::{DeviceError, Submitted};
use crate::digest::{BlockDigest, DigestSeed};
use crate::memory::HostMemory;
use crate::plan::Packing;
use crate::slab::Slot;

/// Bytes copied before they are hashed: they are still in the second-level cache then.
const CHUNK_BYTES: usize = 128 << 10;

/// Copies under way ahead of the digest: one that the device works on and one behind it, so that it never waits for us.
const AHEAD: usize = 2;

/// A part of a block on its way, or several whole ones.
struct Chunk {
    /// Positions of its blocks in the job.
    blocks: Range<usize>,
    start: usize,
    len: usize,
    copy: Submitted,
}

/// Brings blocks to their slots. `copy` starts to copy so many bytes from places in the arena to others in host memory;
/// `seed_of` is what the digest of the block of an index is bound to.
pub(super) fn stage(
    copy: impl Fn(&[(usize, usize)], &HostMemory, usize) -> Result<Submitted, DeviceError>,
    work: Vec<(ExportBlock, Slot)>,
    packing: &Packing,
    integrity: Integrity,
    seed_of: impl Fn(u32) -> DigestSeed,
) -> Result<Vec<Prepared>, DeviceError> {
    let bytes = packing.block_bytes();
    // Blocks of several runs come one after the other, so that each is digested in sequence.
    let per_chunk = if packing.is_identity() { (CHUNK_BYTES / bytes).max(1) } else { 1 };
    let mut digests = Digests { work: &work, integrity, digest: None, found: Vec::new(), bytes, done: 0 };
    let mut under_way: VecDeque<Chunk> = VecDeque::with_capacity(AHEAD);
    for first in (0..work.len()).step_by(per_chunk) {
        let blocks = first..(first + per_chunk).min(work.len());
        packing.try_for_each(work[first].0.block, |from, packed, run| {
            for at in (0..run).step_by(CHUNK_BYTES) {
                if under_way.len() == AHEAD
                    && let Some(chunk) = under_way.pop_front()
                {
                    digests.take(chunk, &seed_of)?;
                }
                let (start, len) = (packed + at, CHUNK_BYTES.min(run - at));
                let place = |(block, slot): &(ExportBlock, Slot)| {
                    // More than one only where blocks are one run each.
                    let from = if per_chunk > 1 { block.block as usize * bytes } else { from };
                    (from + at, slot.offset() + start)
                };
                let places: Vec<(usize, usize)> = work[blocks.clone()].iter().map(place).collect();
                // All slots are of one slab.
                let copy = copy(&places, work[first].1.memory(), len)?;
                under_way.push_back(Chunk { blocks: blocks.clone(), start, len, copy });
            }
            Ok(())
        })?;
    }
    for chunk in under_way {
        digests.take(chunk, &seed_of)?;
    }
    let found = digests.found;
    let prepared = |((block, slot), digest): ((ExportBlock, Slot), u64)| Prepared {
        index: block.index,
        offset: slot.offset(),
        digest,
        slot: Some(slot),
    };
    Ok(work.into_iter().zip(found).map(prepared).collect())
}

/// Digests of blocks whose chunks come in order.
struct Digests<'a> {
    work: &'a [(ExportBlock, Slot)],
    integrity: Integrity,
    bytes: usize,
    /// Bytes of the block whose chunks are coming that were digested.
    done: usize,
    /// Of the block whose chunks are coming.
    digest: Option<BlockDigest>,
    /// One for each block that is whole; 0 without integrity.
    found: Vec<u64>,
}

impl Digests<'_> {
    /// Waits for a chunk and digests it.
    fn take(&mut self, chunk: Chunk, seed_of: impl Fn(u32) -> DigestSeed) -> Result<(), DeviceError> {
        let Chunk { blocks, start, len, copy } = chunk;
        copy.finish()?;
        for (block, slot) in &self.work[blocks] {
            if self.integrity == Integrity::Digest {
                let digest = self.digest.get_or_insert_with(|| BlockDigest::new(seed_of(block.index)));
                if start == 0 {
                    digest.restart(seed_of(block.index));
                }
                // What pads numbers to scales is digested too, whatever it is.
                slot.memory().digest(digest, slot.offset() + self.done, start + len - self.done);
            }
            if start + len == self.bytes {
                self.found.push(self.digest.as_ref().map_or(0, BlockDigest::finish));
            }
        }
        self.done = (start + len) % self.bytes;
        Ok(())
    }
}
