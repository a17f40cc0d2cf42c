//! Copies blocks of a device to their staging slots, and digests each chunk while the device copies the next ones.

use std::collections::VecDeque;
use std::ops::Range;

use super::{ExportBlock, Prepared};
use crate::agent::Integrity;
use crate::device::{Device, DeviceError, Submitted};
use crate::digest::{BlockDigest, DigestSeed};
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

/// Brings blocks to their slots. `seed_of` is what the digest of the block of an index is bound to.
pub(super) fn stage(
    device: &dyn Device,
    work: Vec<(ExportBlock, Slot)>,
    bytes: usize,
    integrity: Integrity,
    seed_of: impl Fn(u32) -> DigestSeed,
) -> Result<Vec<Prepared>, DeviceError> {
    let per_chunk = (CHUNK_BYTES / bytes).max(1);
    let chunks = (0..work.len()).step_by(per_chunk).flat_map(|first| {
        let blocks = first..(first + per_chunk).min(work.len());
        (0..bytes)
            .step_by(CHUNK_BYTES)
            .map(move |start| (blocks.clone(), start, CHUNK_BYTES.min(bytes - start)))
    });
    let mut digests = Digests { work: &work, integrity, digest: None, found: Vec::new(), bytes };
    let mut under_way: VecDeque<Chunk> = VecDeque::with_capacity(AHEAD);
    for (blocks, start, len) in chunks {
        if under_way.len() == AHEAD
            && let Some(chunk) = under_way.pop_front()
        {
            digests.take(chunk, &seed_of)?;
        }
        let place = |(block, slot): &(ExportBlock, Slot)| {
            (block.block as usize * bytes + start, slot.offset() + start)
        };
        let places: Vec<(usize, usize)> = work[blocks.clone()].iter().map(place).collect();
        // All slots are of one slab.
        let copy = device.submit_blocks_to_host(&places, work[blocks.start].1.memory(), len)?;
        under_way.push_back(Chunk { blocks, start, len, copy });
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
                slot.memory().digest(digest, slot.offset() + start, len);
            }
            if start + len == self.bytes {
                self.found.push(self.digest.as_ref().map_or(0, BlockDigest::finish));
            }
        }
        Ok(())
    }
}
