//! Moving the numbers: the bytes of one source block, laid out into destination blocks in host memory.

use std::ops::Range;

use baton_config::{BlockAt, SCALE_BYTES};

use super::conversion::Conversion;
use super::numbers::{Kernel, kernel};
use super::{Part, Piece, RelayoutPlan, axis};
use crate::layout::Nest;
use crate::memory::HostMemory;

/// Numbers converted at a time: the converted ones stay in the first-level cache until they are placed.
pub(super) const CONVERT_CHUNK: usize = 1024;

/// Most bytes of a number.
pub(super) const NUMBER_MAX_BYTES: usize = 4;

impl RelayoutPlan {
    /// Lays the numbers of `block`, source block `index` of the sequence, out for the destination, as far as they
    /// belong to `tokens`; nothing else is written but the scales of the blocks they come into. `dest_at(b)` is where in
    /// `to` block `b` of the destination's sequence is.
    ///
    /// # Panics
    /// When `block` is not one source block, a destination block is not within `to`, or the plan
    /// [needs whole blocks](RelayoutPlan::needs_whole_blocks): bugs of the caller.
    pub fn scatter(
        &self,
        index: u32,
        block: &[u8],
        tokens: Range<u32>,
        to: &HostMemory,
        dest_at: impl Fn(u32) -> BlockAt,
    ) {
        for piece in self.pieces(index, tokens) {
            self.scatter_piece(&piece, block, to, dest_at(piece.dest_block));
        }
    }

    /// As [`RelayoutPlan::scatter`], for one piece, whose destination block is at `at` of `to`.
    ///
    /// # Panics
    /// As [`RelayoutPlan::scatter`].
    pub fn scatter_piece(&self, piece: &Piece, block: &[u8], to: &HostMemory, at: BlockAt) {
        assert_eq!(block.len(), self.source.block_bytes(), "a scatter takes exactly one source block");
        match self.conversion {
            Conversion::Copy => self.copy(&piece.nest, block, to, at),
            Conversion::Carry => {
                self.copy(&piece.nest, block, to, at);
                self.for_each_part(self.dest.scales, |part| {
                    let scale = self.source_scale(block, part);
                    to.write(self.dest_scale_at(at, part), &scale.to_le_bytes());
                });
            }
            Conversion::Convert => self.convert(piece, block, to, at),
            Conversion::Requantize => panic!("scales follow from whole destination blocks: assemble them"),
        }
    }

    fn copy(&self, nest: &Nest, block: &[u8], to: &HostMemory, at: BlockAt) {
        let size = self.source.dtype.size();
        let bytes = nest.run_len() * size;
        nest.for_each(|source, dest| {
            to.write(at.numbers + dest * size, &block[source * size..][..bytes]);
        });
    }

    fn convert(&self, piece: &Piece, block: &[u8], to: &HostMemory, at: BlockAt) {
        let kernel = kernel(self.source.dtype, self.dest.dtype);
        if self.source.scale_count() == 0 {
            return self.convert_runs(&piece.nest, (kernel, 1.0), block, to, at);
        }
        self.for_each_part(self.source.scales, |part| {
            let scale = self.source_scale(block, part);
            self.convert_runs(&self.part_nest(piece, part), (kernel, scale), block, to, at);
        });
    }

    /// The runs of one part of a piece.
    fn part_nest(&self, piece: &Piece, part: Part) -> Nest {
        let (source, dest) = (&self.source_strides, &self.dest_strides);
        let [layer, kv, from, to] =
            [part.layer, part.kv, piece.source_token, piece.dest_token].map(|n| n as usize);
        let [source_head, dest_head] = [self.source_head, self.dest_head].map(|h| (h + part.head) as usize);
        Nest::new(
            layer * source.layer + kv * source.kv + from * source.token + source_head * source.head,
            layer * dest.layer + kv * dest.kv + to * dest.token + dest_head * dest.head,
            self.source.head_dim as usize,
            [
                axis(piece.tokens, source.token, dest.token),
                axis(part.heads, source.head, dest.head),
                axis(1, 0, 0),
                axis(1, 0, 0),
            ],
        )
    }

    fn convert_runs(
        &self,
        nest: &Nest,
        (kernel, scale): (Kernel, f32),
        block: &[u8],
        to: &HostMemory,
        at: BlockAt,
    ) {
        let mut converted = [0; CONVERT_CHUNK * NUMBER_MAX_BYTES];
        let (from_size, to_size) = (self.source.dtype.size(), self.dest.dtype.size());
        nest.for_each(|source, dest| {
            let run = &block[source * from_size..][..nest.run_len() * from_size];
            for (i, chunk) in run.chunks(CONVERT_CHUNK * from_size).enumerate() {
                let converted = &mut converted[..chunk.len() / from_size * to_size];
                kernel(chunk, scale, converted);
                to.write(at.numbers + (dest + i * CONVERT_CHUNK) * to_size, converted);
            }
        });
    }
}

const _: () = assert!(SCALE_BYTES == NUMBER_MAX_BYTES, "scales are f32");
