//! Moving the numbers: the bytes of one source block, laid out into destination blocks in host memory.

use std::ops::Range;

use super::{Conversion, Piece, RelayoutPlan, convert};
use crate::memory::HostMemory;

/// Numbers converted at a time: the converted ones stay in the first-level cache until they are placed.
const CONVERT_CHUNK: usize = 1024;

impl RelayoutPlan {
    /// Lays the numbers of `block`, source block `index` of the sequence, out for the destination, as far as they
    /// belong to `tokens`; nothing else is written. `dest_at(b)` is where in `to` block `b` of the destination's
    /// sequence starts.
    ///
    /// # Panics
    /// When `block` is not one source block, or a destination block is not within `to`: bugs of the caller.
    pub fn scatter(
        &self,
        index: u32,
        block: &[u8],
        tokens: Range<u32>,
        to: &HostMemory,
        dest_at: impl Fn(u32) -> usize,
    ) {
        for piece in self.pieces(index, tokens) {
            self.scatter_piece(&piece, block, to, dest_at(piece.dest_block));
        }
    }

    /// As [`RelayoutPlan::scatter`], for one piece, whose destination block starts at byte `dest_at` of `to`.
    ///
    /// # Panics
    /// When `block` is not one source block, or the destination block is not within `to`.
    pub fn scatter_piece(&self, piece: &Piece, block: &[u8], to: &HostMemory, dest_at: usize) {
        assert_eq!(block.len(), self.source.block_bytes(), "a scatter takes exactly one source block");
        match self.conversion {
            Conversion::Copy => {
                let size = self.source.dtype.size();
                let bytes = piece.nest.run_len() * size;
                piece.nest.for_each(|source, dest| {
                    to.write(dest_at + dest * size, &block[source * size..][..bytes]);
                });
            }
            Conversion::Narrow => convert_runs(piece, block, (to, dest_at), convert::narrow),
            Conversion::Widen => convert_runs(piece, block, (to, dest_at), convert::widen),
        }
    }
}

/// Converts runs of numbers of `IN` bytes to numbers of `OUT` bytes.
fn convert_runs<const IN: usize, const OUT: usize>(
    piece: &Piece,
    block: &[u8],
    (to, dest_at): (&HostMemory, usize),
    convert: impl Fn(&[[u8; IN]], &mut [[u8; OUT]]),
) {
    let mut converted = [[0; OUT]; CONVERT_CHUNK];
    let (numbers, _) = block.as_chunks::<IN>();
    piece.nest.for_each(|source, dest| {
        for (i, chunk) in numbers[source..][..piece.nest.run_len()].chunks(CONVERT_CHUNK).enumerate() {
            let converted = &mut converted[..chunk.len()];
            convert(chunk, converted);
            to.write(dest_at + (dest + i * CONVERT_CHUNK) * OUT, converted.as_flattened());
        }
    });
}
