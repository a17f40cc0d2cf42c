//! How the bytes of a pair travel.

use std::fmt;

use baton_config::{KvGeometry, Scales};

use super::RelayoutPlan;
use super::conversion::Conversion;

/// Shortest runs worth a read of their own. Posting one costs 0.6 us over tcp and 1 to 5 us on a fabric, laying out the
/// same bytes from a buffer as much as copying them once more: 16 KiB at 10 GB/s are 1.6 us.
pub const DIRECT_RUN_MIN_BYTES: usize = 16 << 10;

/// The owner packs where the reader needs at most one byte of so many: it saves more of the wire than the further copy
/// costs, and copies run several times faster than wires.
const PACKED_SHARE: usize = 2;

/// The way of one pair of geometries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Choice {
    /// Wire to place: every run is read straight to where it belongs.
    Direct,
    /// The owner lays out what the reader needs, and nothing else, in the form of [`RelayoutPlan::packed_geometry`], and
    /// the reader reads that.
    Packed,
    /// Whole blocks come to a buffer of the reader, which lays them out from there.
    Staged,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Packed => "packed",
            Self::Staged => "staged",
        })
    }
}

impl RelayoutPlan {
    /// The way to take, where blocks are `verified` by digest or not. The first that applies:
    ///
    /// 1. whole blocks are the same bytes: direct;
    /// 2. bytes stay as they are and runs have at least [`DIRECT_RUN_MIN_BYTES`]: direct, unless blocks are verified,
    ///    since a digest covers a whole block and bytes in their place are too late to check;
    /// 3. at most half of the bytes of a source block are needed: packed;
    /// 4. staged.
    pub fn choice(&self, verified: bool) -> Choice {
        if self.is_direct() || (!verified && self.has_direct_runs()) {
            return Choice::Direct;
        }
        let is_little = |wire: KvGeometry| wire.block_bytes() * PACKED_SHARE <= self.source.block_bytes();
        if self.packed_geometry().is_some_and(is_little) { Choice::Packed } else { Choice::Staged }
    }

    /// Whether bytes stay as they are, in long runs.
    fn has_direct_runs(&self) -> bool {
        let tokens = self.source.block_tokens.min(self.dest.block_tokens);
        let run = self.nest(0, 0, tokens).run_len() * self.source.dtype.size();
        self.conversion == Conversion::Copy && run >= DIRECT_RUN_MIN_BYTES
    }

    /// The form in which the owner would pack blocks for this reader: its own block size, the reader's order, the
    /// narrower of the two formats, and only heads that both hold. None where no shard is made of just those. Scales
    /// are worked out by the reader alone: the owner does not know which tokens of a block count.
    pub fn packed_geometry(&self) -> Option<KvGeometry> {
        let narrow = self.dest.dtype.size() < self.source.dtype.size() && self.dest.scales == Scales::None;
        let numbers = if narrow { &self.dest } else { &self.source };
        let heads = match self.heads {
            heads if heads == self.dest.kv_heads => &self.dest,
            heads if heads == self.source.kv_heads => &self.source,
            _ => return None,
        };
        Some(KvGeometry {
            kv_heads: heads.kv_heads,
            shard: heads.shard,
            layout: self.dest.layout,
            dtype: numbers.dtype,
            scales: numbers.scales,
            ..self.source
        })
    }
}
