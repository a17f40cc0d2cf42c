//! Which way each block of a read takes. No driver.

use crate::backend::ReadJob;
use crate::session::Destination;
use crate::wire::MAX_READ_BLOCKS;

/// Smaller blocks are gathered into messages: each costs a copy on either side, but no operation of its own.
const PACK_BELOW_BYTES: u32 = 32 << 10;
/// Blocks of which no more than this is read are, too, where nothing here would verify them: a message needs no
/// confirmation after it, which takes longer than the copies.
const ONE_MESSAGE_BYTES: u64 = 64 << 10;
/// The same where a read by the library costs copies, too: 2 x 64 KiB took 41 us over libfabric's `net` and 37 over UCX as
/// a message, 142 and 150 with a question after them, measured.
const ONE_EMULATED_BYTES: u64 = 256 << 10;

/// What decides on the way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ways {
    /// Longest message; 0: there are none.
    pub(super) pack_max: usize,
    /// Bytes of a buffer.
    pub(super) slot_bytes: usize,
    /// Whether the destination is memory that the fabric reaches.
    pub(super) direct: bool,
    /// Whether the library's reads are messages.
    pub(super) emulated: bool,
}

/// The blocks of a read by their way, each in one of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Straight into place, by position in the read.
    pub(super) direct: Vec<usize>,
    /// Through buffers, one after the other.
    pub(super) loads: Vec<Load>,
}

/// What one buffer takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Load {
    /// Sent by the owner as one message, or read part by part.
    pub(super) packed: bool,
    pub(super) parts: Vec<Part>,
    pub(super) bytes: usize,
}

/// A block, or a part of one, in a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Position in the read.
    pub(super) block: usize,
    /// Where in the block it begins.
    pub(super) skip: usize,
    pub(super) len: usize,
    /// Where in the buffer.
    pub(super) at: usize,
}

impl Load {
    fn new(packed: bool) -> Self {
        Self { packed, parts: Vec::new(), bytes: 0 }
    }

    fn push(&mut self, block: usize, skip: usize, len: usize) {
        self.parts.push(Part { block, skip, len, at: self.bytes });
        self.bytes += len;
    }
}

impl Plan {
    pub(super) fn of(job: &ReadJob<'_>, ways: Ways) -> Self {
        let mut plan = Self::default();
        let (mut packs, mut staged) = (Load::new(true), Load::new(false));
        // Blocks that come in parts must come in order; packs are independent of them.
        let mut packed_loads = Vec::new();
        let bytes: u64 = job.blocks.iter().map(|block| u64::from(block.source.len)).sum();
        let fits_one = bytes <= if ways.emulated { ONE_EMULATED_BYTES } else { ONE_MESSAGE_BYTES };
        for (index, block) in job.blocks.iter().enumerate() {
            let len = block.source.len as usize;
            let device = matches!(job.into, Destination::Device(_));
            let small = block.source.len < PACK_BELOW_BYTES || fits_one && job.expected(index).is_none();
            if small && len <= ways.pack_max.min(ways.slot_bytes) && !device {
                if packs.bytes + len > ways.pack_max.min(ways.slot_bytes)
                    || packs.parts.len() == MAX_READ_BLOCKS
                {
                    packed_loads.push(std::mem::replace(&mut packs, Load::new(true)));
                }
                packs.push(index, 0, len);
            } else if ways.direct {
                plan.direct.push(index);
            } else {
                plan.stage(&mut staged, index, len, ways.slot_bytes);
            }
        }
        plan.loads.extend([staged].into_iter().filter(|load| load.bytes > 0));
        plan.loads.extend(packed_loads);
        plan.loads.extend([packs].into_iter().filter(|load| load.bytes > 0));
        plan
    }

    /// Puts a block into buffers: whole into one if it fits, else in parts of a buffer each.
    fn stage(&mut self, load: &mut Load, block: usize, len: usize, slot_bytes: usize) {
        let mut skip = 0;
        while skip < len {
            let part = (len - skip).min(slot_bytes);
            if load.bytes + part > slot_bytes || load.parts.len() == MAX_READ_BLOCKS {
                self.loads.push(std::mem::replace(load, Load::new(false)));
            }
            load.push(block, skip, part);
            skip += part;
        }
    }
}

#[cfg(test)]
mod tests {
    use baton_config::HandoffId;
    use proptest::prelude::*;

    use super::*;
    use crate::agent::RegionId;
    use crate::backend::Progress;
    use crate::session::{BlockRead, Descriptor};

    fn blocks(lens: &[u32]) -> Vec<BlockRead> {
        let source = |len| Descriptor { region: RegionId(1), offset: 0, len };
        lens.iter().map(|len| BlockRead { source: source(*len), to: 0, expected: None }).collect()
    }

    fn plan(lens: &[u32], ways: Ways) -> Plan {
        let (blocks, progress) = (blocks(lens), Progress::new(lens.len()));
        let sink = |_: usize, _: &[u8]| {};
        let into = Destination::Sink(&sink);
        Plan::of(
            &ReadJob { handoff: HandoffId(1), blocks: &blocks, into, verify: true, progress: &progress },
            ways,
        )
    }

    #[test]
    fn small_blocks_are_packed_and_large_ones_go_straight() {
        let ways = Ways { pack_max: 1 << 20, slot_bytes: 256 << 10, direct: true, emulated: false };
        let plan = plan(&[4096, 1 << 20, 4096, 64 << 10], ways);
        assert_eq!(plan.direct, [1, 3]);
        let parts =
            [Part { block: 0, skip: 0, len: 4096, at: 0 }, Part { block: 2, skip: 0, len: 4096, at: 4096 }];
        assert_eq!(plan.loads, [Load { packed: true, parts: parts.into(), bytes: 8192 }]);
    }

    #[test]
    fn what_fits_one_message_is_one_where_nothing_verifies_it() {
        for (emulated, most) in [(false, 64 << 10), (true, 256 << 10)] {
            let ways = Ways { pack_max: 1 << 20, slot_bytes: 256 << 10, direct: true, emulated };
            let fits = plan(&[most / 2, most / 2], ways);
            assert_eq!((fits.direct.len(), fits.loads.len(), fits.loads[0].packed), (0, 1, true));
            let more = plan(&[most / 2, most / 2 + 1], ways);
            assert_eq!((more.direct.len(), more.loads.len()), (2, 0));
        }
    }

    proptest! {
        #[test]
        fn every_byte_is_in_one_place_and_no_buffer_overflows(
            lens in prop::collection::vec(prop_oneof![1u32..100, 1u32..40_000, 1u32..2_000_000], 1..60),
            pack_max in prop_oneof![Just(0usize), 1usize..100, 1usize..500_000],
            direct: bool,
            emulated: bool,
        ) {
            let ways = Ways { pack_max, slot_bytes: 256 << 10, direct, emulated };
            let plan = plan(&lens, ways);
            let mut found = vec![0; lens.len()];
            for block in &plan.direct {
                prop_assert!(direct);
                found[*block] += lens[*block] as usize;
            }
            for load in &plan.loads {
                prop_assert!(load.bytes > 0 && load.bytes <= ways.slot_bytes);
                prop_assert!(!load.packed || load.bytes <= pack_max);
                prop_assert!(load.parts.len() <= MAX_READ_BLOCKS);
                let mut at = 0;
                for part in &load.parts {
                    prop_assert_eq!((part.at, part.skip), (at, found[part.block]), "one after the other");
                    prop_assert!(!load.packed || part.len == lens[part.block] as usize);
                    prop_assert!(load.packed || !direct);
                    at += part.len;
                    found[part.block] += part.len;
                }
                prop_assert_eq!(at, load.bytes);
            }
            prop_assert!(found.iter().zip(&lens).all(|(found, len)| *found == *len as usize));
        }
    }
}
