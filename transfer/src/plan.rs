//! Re-layout plans: what it takes to carry blocks of one [`KvGeometry`] into blocks of another.
//!
//! ```text
//! source blocks   |        0        |        1        |      A tokens each, NHD or HND, f32 or bf16
//! tokens wanted        ..............................
//! pieces               |  |     |     |     |     |        one source block x one destination block
//! dest blocks     |  0  |  1  |  2  |  3  |  4  |  5  |    B tokens each, NHD or HND, f32 or bf16
//! ```
//!
//! Neither block size need divide the other. A plan is a handful of strides: making one costs less than looking one
//! up in a shared table would, so there is no cache of plans; callers keep the plan as long as the pair lives.

use std::ops::Range;

use baton_config::{Attention, Dtype, GeometryError, KvGeometry, KvLayout, Scales, Shard};

use crate::layout::{Axis, Nest, Strides};

mod convert;
#[cfg(test)]
pub(crate) mod reference;
mod scatter;
#[cfg(test)]
mod tests;

/// Why there is no plan between two geometries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Layers, heads or head size differ: the blocks hold different numbers.
    #[error(
        "the KV cache of the source ({source_geometry}) cannot be laid out as that of the destination ({dest})"
    )]
    Geometry {
        /// Blocks to read.
        source_geometry: KvGeometry,
        /// Blocks to fill.
        dest: KvGeometry,
    },
    /// One of them is no geometry at all.
    #[error("no block can have {geometry}: {fault}")]
    Impossible {
        /// The refused geometry.
        geometry: KvGeometry,
        /// Why.
        fault: GeometryError,
    },
}

/// How numbers change on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Conversion {
    /// Not at all.
    Copy,
    /// f32 to bf16, round to nearest, ties to even.
    Narrow,
    /// bf16 to f32, exact.
    Widen,
}

/// One piece of a re-layout: tokens that lie in one source block and in one destination block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the destination block in the sequence, in blocks of the destination.
    pub dest_block: u32,
    /// The runs of it.
    pub nest: Nest,
}

/// Carries blocks of a source geometry into blocks of a destination geometry.
///
/// Shape: both sides are `[layers][2][tokens and heads][head_dim]` with equal layers, heads and head size; block
/// size, order and number format are free. Units: token positions count from the start of the sequence.
/// Source: run lengths in `docs/kv-layout.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelayoutPlan {
    source: KvGeometry,
    dest: KvGeometry,
    source_strides: Strides,
    dest_strides: Strides,
    conversion: Conversion,
}

impl RelayoutPlan {
    /// Plans the way from `source` to `dest`.
    ///
    /// # Errors
    /// [`PlanError`] when the two hold different numbers or one of them is no geometry at all.
    pub fn new(source: KvGeometry, dest: KvGeometry) -> Result<Self, PlanError> {
        let shape = |g: &KvGeometry| (g.layers, g.kv_heads, g.head_dim);
        for geometry in [source, dest] {
            geometry.check().map_err(|fault| PlanError::Impossible { geometry, fault })?;
        }
        if shape(&source) != shape(&dest) {
            return Err(PlanError::Geometry { source_geometry: source, dest });
        }
        let known = |g: &KvGeometry| {
            let rest = KvGeometry { layout: KvLayout::Nhd, ..*g };
            let plain =
                KvGeometry { scales: Scales::None, attention: Attention::Kv, shard: Shard::Whole, ..rest };
            matches!(g.layout, KvLayout::Nhd | KvLayout::Hnd) && rest == plain
        };
        let conversion = match (source.dtype, dest.dtype) {
            _ if !known(&source) || !known(&dest) => None,
            (Dtype::F32, Dtype::Bf16) => Some(Conversion::Narrow),
            (Dtype::Bf16, Dtype::F32) => Some(Conversion::Widen),
            (Dtype::F32, Dtype::F32) | (Dtype::Bf16, Dtype::Bf16) => Some(Conversion::Copy),
            _ => None,
        };
        let conversion = conversion.ok_or(PlanError::Geometry { source_geometry: source, dest })?;
        Ok(Self {
            source,
            dest,
            source_strides: Strides::of(&source),
            dest_strides: Strides::of(&dest),
            conversion,
        })
    }

    /// The geometry of the blocks to read.
    pub fn source(&self) -> &KvGeometry {
        &self.source
    }

    /// The geometry of the blocks to fill.
    pub fn dest(&self) -> &KvGeometry {
        &self.dest
    }

    /// Whether a whole source block is, byte for byte, the destination block of the same index.
    ///
    /// NHD and HND are the same order when there is one head, or one token per block.
    pub fn is_direct(&self) -> bool {
        let canonical = |g: &KvGeometry| {
            let same = g.kv_heads == 1 || g.block_tokens == 1;
            KvGeometry { layout: if same { KvLayout::Nhd } else { g.layout }, ..*g }
        };
        canonical(&self.source) == canonical(&self.dest)
    }

    /// The source blocks that hold any of `tokens`.
    pub fn source_blocks(&self, tokens: &Range<u32>) -> Range<u32> {
        if tokens.is_empty() {
            return 0..0;
        }
        tokens.start / self.source.block_tokens..tokens.end.div_ceil(self.source.block_tokens)
    }

    /// The tokens of source block `index` that are among `tokens`.
    pub fn tokens_of(&self, index: u32, tokens: &Range<u32>) -> Range<u32> {
        let start = u64::from(index) * u64::from(self.source.block_tokens);
        let end = start + u64::from(self.source.block_tokens);
        let clip =
            |t: u64| u32::try_from(t).unwrap_or(u32::MAX).clamp(tokens.start, tokens.end.max(tokens.start));
        clip(start)..clip(end)
    }

    /// The pieces of source block `index` that are among `tokens`, by rising destination block.
    pub fn pieces(&self, index: u32, tokens: Range<u32>) -> impl Iterator<Item = Piece> + use<> {
        let plan = *self;
        let wanted = plan.tokens_of(index, &tokens);
        let mut next = wanted.start;
        std::iter::from_fn(move || {
            if next >= wanted.end {
                return None;
            }
            let dest_block = next / plan.dest.block_tokens;
            let room = plan.dest.block_tokens - next % plan.dest.block_tokens;
            let count = room.min(wanted.end - next);
            let nest = plan.nest(next % plan.source.block_tokens, next % plan.dest.block_tokens, count);
            next += count;
            Some(Piece { dest_block, nest })
        })
    }

    /// The runs of `count` tokens from token `from` of a source block to token `to` of a destination block.
    fn nest(&self, from: u32, to: u32, count: u32) -> Nest {
        let (source, dest) = (&self.source_strides, &self.dest_strides);
        let axis = |count: u32, source: usize, dest: usize| Axis { count: count as usize, source, dest };
        Nest::new(
            from as usize * source.token,
            to as usize * dest.token,
            self.source.head_dim as usize,
            [
                axis(count, source.token, dest.token),
                axis(self.source.kv_heads, source.head, dest.head),
                axis(2 * self.source.layers, source.plane, dest.plane),
            ],
        )
    }
}
