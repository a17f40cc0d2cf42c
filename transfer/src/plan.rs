//! Re-layout plans: what it takes to carry blocks of one [`KvGeometry`] into blocks of another.
//!
//! ```text
//! source blocks   |        0        |        1        |      A tokens each, some heads, any order, any format
//! tokens wanted        ..............................
//! pieces               |  |     |     |     |     |        one source block x one destination block
//! dest blocks     |  0  |  1  |  2  |  3  |  4  |  5  |    B tokens each, some heads, any order, any format
//! ```
//!
//! Neither block size need divide the other. A plan is a handful of strides and covers the heads that both sides hold.

use std::ops::Range;

use baton_config::{BlockAt, GeometryError, KvGeometry, KvStrides, Scales};

use crate::layout::{Axis, Nest};

mod assemble;
mod cache;
mod choice;
mod conversion;
mod numbers;
mod packing;
#[cfg(test)]
pub(crate) mod reference;
mod scatter;
mod shards;
#[cfg(test)]
mod tests;

pub use cache::{PlanCache, PlanCacheCounts};
pub use choice::{Choice, DIRECT_RUN_MIN_BYTES};
use conversion::Conversion;
pub(crate) use packing::Packing;
pub use shards::{TpSource, tp_sources};

/// Why there is no plan between two geometries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// They hold different numbers.
    #[error(
        "the KV cache of the source ({source_geometry}) cannot be laid out as that of the destination ({dest}): {reason}"
    )]
    Geometry {
        /// Blocks to read.
        source_geometry: KvGeometry,
        /// Blocks to fill.
        dest: KvGeometry,
        /// What cannot be reconciled.
        reason: Mismatch,
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

/// What two geometries cannot be reconciled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Layers differ.
    #[error("they differ in layers")]
    Layers,
    /// Heads of the model differ.
    #[error("they differ in the kv heads of the model")]
    Heads,
    /// Numbers per head differ.
    #[error("they differ in the numbers of a head")]
    HeadDim,
    /// Keys and values on one side, latent rows on the other.
    #[error("only one of them keeps latent rows")]
    Attention,
    /// The ranks hold different heads.
    #[error("the two ranks have no head in common")]
    NoCommonHead,
    /// The destination would hold some heads of this source and some of nobody.
    #[error("the source has only some of the heads of the destination")]
    SomeHeads,
    /// A scale of the destination covers heads that the source lacks.
    #[error("one scale covers heads of several sources: use a scale per head")]
    Scales,
    /// A scale covers tokens of several source blocks, and the destination is staged for a device block by block.
    #[error(
        "a scale would cover tokens of several source blocks, which staging for a device does not wait for"
    )]
    DeviceScales,
}

/// One piece of a re-layout: tokens that lie in one source block and in one destination block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the destination block in the sequence, in blocks of the destination.
    pub dest_block: u32,
    /// Its first token, counted within the source block.
    pub source_token: u32,
    /// Its first token, counted within the destination block.
    pub dest_token: u32,
    /// Its tokens.
    pub tokens: u32,
    /// The runs of it.
    pub nest: Nest,
}

/// Carries blocks of a source geometry into blocks of a destination geometry.
///
/// Shape: layers, heads of the model, head size and the kind of attention agree; block size, order, number format,
/// scales and shards are free. The plan covers the heads that both hold. Source blocks are one run each, destination
/// blocks too unless [`RelayoutPlan::into_arena`] says otherwise. Units: token positions count from the start
/// of the sequence. Source: `docs/kv-layout.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelayoutPlan {
    source: KvGeometry,
    dest: KvGeometry,
    source_strides: KvStrides,
    dest_strides: KvStrides,
    /// The first common head, counted within the source and within the destination.
    source_head: u32,
    dest_head: u32,
    /// Common heads.
    heads: u32,
    conversion: Conversion,
    /// See [`RelayoutPlan::is_direct`].
    is_direct: bool,
}

impl RelayoutPlan {
    /// Plans the way from `source` to `dest`.
    ///
    /// # Errors
    /// [`PlanError`] when the two cannot be reconciled or one of them is no geometry at all.
    pub fn new(source: KvGeometry, dest: KvGeometry) -> Result<Self, PlanError> {
        for geometry in [source, dest] {
            geometry.check().map_err(|fault| PlanError::Impossible { geometry, fault })?;
        }
        let refused = |reason| PlanError::Geometry { source_geometry: source, dest, reason };
        let [ours, theirs] = [dest, source].map(|g| g.shard.heads(g.kv_heads));
        let common = ours.start.max(theirs.start)..ours.end.min(theirs.end);
        let mismatch = [
            (source.attention != dest.attention, Mismatch::Attention),
            (source.layers != dest.layers, Mismatch::Layers),
            (source.head_dim != dest.head_dim, Mismatch::HeadDim),
            (source.model_heads() != dest.model_heads(), Mismatch::Heads),
            (common.is_empty(), Mismatch::NoCommonHead),
            (dest.scales == Scales::Block && common != ours, Mismatch::Scales),
        ];
        if let Some((_, reason)) = mismatch.into_iter().find(|(differs, _)| *differs) {
            return Err(refused(reason));
        }
        let heads = common.end - common.start;
        let plan = Self {
            source,
            dest,
            source_strides: source.strides(),
            dest_strides: dest.strides(),
            source_head: common.start - theirs.start,
            dest_head: common.start - ours.start,
            heads,
            conversion: Conversion::between(&source, &dest, heads),
            is_direct: false,
        };
        let is_direct = plan.conversion.is_move(&source, &dest) && plan.is_one_run();
        Ok(Self { is_direct, ..plan })
    }

    /// The same for destination blocks where they are in an arena of `blocks` blocks.
    #[must_use]
    pub fn into_arena(self, blocks: u32) -> Self {
        let is_direct = self.is_direct && self.dest.layout.is_block_first();
        Self { dest_strides: self.dest.arena_strides(blocks), is_direct, ..self }
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
    /// Orders are the same where the axes they swap have one step: NHD and HND with one head, or one token per block.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// Whether one run is all of a source block and all of a destination block that is one run itself.
    fn is_one_run(&self) -> bool {
        let run = self.nest(0, 0, self.source.block_tokens).run_len() * self.source.dtype.size();
        // As many numbers may also be fewer tokens of more heads.
        self.source.block_tokens == self.dest.block_tokens
            && [self.source, self.dest].iter().all(|geometry| geometry.numbers_bytes() == run)
    }

    /// Whether the plan covers all heads of a destination block.
    pub fn covers_dest(&self) -> bool {
        self.heads == self.dest.kv_heads
    }

    /// Whether a destination block can be written only once all source blocks with tokens of it are at hand: its
    /// scales follow from all of them. See [`RelayoutPlan::assemble`].
    pub fn needs_whole_blocks(&self) -> bool {
        self.conversion == Conversion::Requantize
    }

    /// Whether wanted tokens may start at `token`: a scale covers all tokens of a block, so that those before
    /// would lose theirs.
    pub fn may_start_at(&self, token: u32) -> bool {
        self.dest.scales == Scales::None || token.is_multiple_of(self.dest.block_tokens)
    }

    /// The source blocks that hold any of `tokens`.
    pub fn source_blocks(&self, tokens: &Range<u32>) -> Range<u32> {
        blocks_of(tokens, self.source.block_tokens)
    }

    /// The destination blocks that hold any of `tokens`.
    pub fn dest_blocks(&self, tokens: &Range<u32>) -> Range<u32> {
        blocks_of(tokens, self.dest.block_tokens)
    }

    /// The tokens of source block `index` that are among `tokens`.
    pub fn tokens_of(&self, index: u32, tokens: &Range<u32>) -> Range<u32> {
        tokens_in(index, self.source.block_tokens, tokens)
    }

    /// The tokens of destination block `index` that are among `tokens`.
    pub fn dest_tokens_of(&self, index: u32, tokens: &Range<u32>) -> Range<u32> {
        tokens_in(index, self.dest.block_tokens, tokens)
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
            let (from, to) = (next % plan.source.block_tokens, next % plan.dest.block_tokens);
            next += count;
            let nest = plan.nest(from, to, count);
            Some(Piece { dest_block, source_token: from, dest_token: to, tokens: count, nest })
        })
    }

    /// The runs of `count` tokens from token `from` of a source block to token `to` of a destination block.
    fn nest(&self, from: u32, to: u32, count: u32) -> Nest {
        let (source, dest) = (&self.source_strides, &self.dest_strides);
        Nest::new(
            from as usize * source.token + self.source_head as usize * source.head,
            to as usize * dest.token + self.dest_head as usize * dest.head,
            self.source.head_dim as usize,
            [
                axis(count, source.token, dest.token),
                axis(self.heads, source.head, dest.head),
                axis(self.source.planes(), source.kv, dest.kv),
                axis(self.source.layers, source.layer, dest.layer),
            ],
        )
    }
}

fn axis(count: u32, source: usize, dest: usize) -> Axis {
    Axis { count: count as usize, source, dest }
}

/// The blocks of `size` tokens that hold any of `tokens`.
fn blocks_of(tokens: &Range<u32>, size: u32) -> Range<u32> {
    if tokens.is_empty() { 0..0 } else { tokens.start / size..tokens.end.div_ceil(size) }
}

/// The tokens of the block of `size` tokens with index `index` that are among `tokens`.
fn tokens_in(index: u32, size: u32, tokens: &Range<u32>) -> Range<u32> {
    let start = u64::from(index) * u64::from(size);
    let end = start + u64::from(size);
    let clip =
        |t: u64| u32::try_from(t).unwrap_or(u32::MAX).clamp(tokens.start, tokens.end.max(tokens.start));
    clip(start)..clip(end)
}

/// Where a plane or a head of it is, among those both sides hold.
#[derive(Debug, Clone, Copy)]
struct Part {
    layer: u32,
    kv: u32,
    /// The first head, counted among the common ones, and how many.
    head: u32,
    heads: u32,
}

impl RelayoutPlan {
    /// Calls `each` for every part of a block that has one scale at `scales`, counted among the common heads.
    fn for_each_part(&self, scales: Scales, mut each: impl FnMut(Part)) {
        for layer in 0..self.source.layers {
            for kv in 0..self.source.planes() {
                match scales {
                    Scales::Head => {
                        (0..self.heads).for_each(|head| each(Part { layer, kv, head, heads: 1 }));
                    }
                    Scales::None | Scales::Block => each(Part { layer, kv, head: 0, heads: self.heads }),
                }
            }
        }
    }

    /// The index of the scale of `part` in a block of `geometry`, whose first common head is `first`.
    fn scale_index(geometry: &KvGeometry, first: u32, part: Part) -> usize {
        let plane = (part.layer * geometry.planes() + part.kv) as usize;
        match geometry.scales {
            Scales::None | Scales::Block => plane,
            Scales::Head => plane * geometry.kv_heads as usize + (first + part.head) as usize,
        }
    }

    /// The scale of `part` in a source block; 1 where it has none.
    fn source_scale(&self, block: &[u8], part: Part) -> f32 {
        if self.source.scales == Scales::None {
            return 1.0;
        }
        let (scales, _) = block[self.source.scales_offset()..].as_chunks::<4>();
        f32::from_le_bytes(scales[Self::scale_index(&self.source, self.source_head, part)])
    }

    /// Where the scale of `part` is in the destination block at `at`, in bytes.
    fn dest_scale_at(&self, at: BlockAt, part: Part) -> usize {
        at.scales + Self::scale_index(&self.dest, self.dest_head, part) * baton_config::SCALE_BYTES
    }
}
