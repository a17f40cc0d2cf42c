//! Destination blocks whose scales are worked out from all their numbers.

use std::ops::Range;

use baton_config::{BlockAt, Dtype};

use super::numbers::{kernel, quantize, scale_for};
use super::scatter::{CONVERT_CHUNK, NUMBER_MAX_BYTES};
use super::{Part, Piece, RelayoutPlan, axis};
use crate::layout::Nest;
use crate::memory::HostMemory;

/// A piece and the source block it comes from.
type Sourced<'a> = (Piece, &'a [u8]);

impl RelayoutPlan {
    /// Fills destination block `index` of the sequence, at `at` of `to`, with the tokens of it that are among `tokens`.
    /// `source(i)` is source block `i`; it is asked for those of [`RelayoutPlan::sources_of`].
    ///
    /// Each scale is the largest finite magnitude it covers, divided by 448; the tokens outside `tokens` do not
    /// count, and what is kept of them loses its meaning.
    ///
    /// # Panics
    /// When the destination block is not within `to`, or a source block is not one: bugs of the caller.
    pub fn assemble<'a>(
        &self,
        index: u32,
        tokens: &Range<u32>,
        source: impl Fn(u32) -> &'a [u8],
        to: &HostMemory,
        at: BlockAt,
    ) {
        let wanted = self.dest_tokens_of(index, tokens);
        let pieces: Vec<Sourced<'_>> = self
            .source_blocks(&wanted)
            .flat_map(|i| self.pieces(i, wanted.clone()).map(move |piece| (piece, i)))
            .map(|(piece, i)| (piece, source(i)))
            .collect();
        for (_, block) in &pieces {
            assert_eq!(block.len(), self.source.block_bytes(), "blocks are assembled of whole source blocks");
        }
        let mut numbers =
            vec![0; self.heads as usize * wanted.len() * self.dest.row_bytes() * NUMBER_MAX_BYTES];
        self.for_each_part(self.dest.scales, |part| {
            let numbers = &mut numbers[..part.heads as usize * wanted.len() * self.row_f32()];
            self.gather(&pieces, part, numbers);
            let scale = scale_for(numbers);
            self.place(&pieces, (part, scale), numbers, to, at);
            to.write(self.dest_scale_at(at, part), &scale.to_le_bytes());
        });
    }

    /// The source blocks with tokens of destination block `index` that are among `tokens`.
    pub fn sources_of(&self, index: u32, tokens: &Range<u32>) -> Range<u32> {
        self.source_blocks(&self.dest_tokens_of(index, tokens))
    }

    /// Bytes of a row in f32.
    fn row_f32(&self) -> usize {
        self.dest.head_dim as usize * NUMBER_MAX_BYTES
    }

    /// Brings the numbers of `part` to f32, `[heads][tokens][head_dim]`.
    fn gather(&self, pieces: &[Sourced<'_>], part: Part, into: &mut [u8]) {
        let (widen, size) = (kernel(self.source.dtype, Dtype::F32), self.source.dtype.size());
        for head in 0..part.heads {
            let part = Part { head: part.head + head, heads: 1, ..part };
            for (piece, block) in pieces {
                let scale = self.source_scale(block, part);
                let nest = self.gather_nest(pieces, piece, part, head);
                nest.for_each(|source, dest| {
                    let (from, to) = (source * size, dest * NUMBER_MAX_BYTES);
                    let run = &block[from..][..nest.run_len() * size];
                    widen(run, scale, &mut into[to..][..nest.run_len() * NUMBER_MAX_BYTES]);
                });
            }
        }
    }

    /// The runs of one head of a piece, from its source block to the `head`-th head of the gathered numbers.
    fn gather_nest(&self, pieces: &[Sourced<'_>], piece: &Piece, part: Part, head: u32) -> Nest {
        let (strides, dims) = (&self.source_strides, self.source.head_dim as usize);
        let (tokens, before) = counts(pieces, piece);
        let [layer, kv, token] = [part.layer, part.kv, piece.source_token].map(|n| n as usize);
        let source_head = (self.source_head + part.head) as usize;
        Nest::new(
            layer * strides.layer + kv * strides.kv + token * strides.token + source_head * strides.head,
            (head as usize * tokens + before) * dims,
            dims,
            [axis(piece.tokens, strides.token, dims), axis(1, 0, 0), axis(1, 0, 0), axis(1, 0, 0)],
        )
    }

    /// Writes gathered numbers to their place, divided by their scale.
    fn place(
        &self,
        pieces: &[Sourced<'_>],
        (part, scale): (Part, f32),
        numbers: &[u8],
        to: &HostMemory,
        at: BlockAt,
    ) {
        let Some((first, _)) = pieces.first() else { return };
        let (strides, dims) = (&self.dest_strides, self.dest.head_dim as usize);
        let tokens: u32 = pieces.iter().map(|(piece, _)| piece.tokens).sum();
        let [layer, kv, token] = [part.layer, part.kv, first.dest_token].map(|n| n as usize);
        let head = (self.dest_head + part.head) as usize;
        let nest = Nest::new(
            0,
            layer * strides.layer + kv * strides.kv + token * strides.token + head * strides.head,
            dims,
            [
                axis(tokens, dims, strides.token),
                axis(part.heads, tokens as usize * dims, strides.head),
                axis(1, 0, 0),
                axis(1, 0, 0),
            ],
        );
        let mut converted = [0; CONVERT_CHUNK];
        nest.for_each(|source, dest| {
            let run = &numbers[source * NUMBER_MAX_BYTES..][..nest.run_len() * NUMBER_MAX_BYTES];
            for (i, chunk) in run.chunks(CONVERT_CHUNK * NUMBER_MAX_BYTES).enumerate() {
                let converted = &mut converted[..chunk.len() / NUMBER_MAX_BYTES];
                quantize(chunk, scale, converted);
                to.write(at.numbers + dest + i * CONVERT_CHUNK, converted);
            }
        });
    }
}

/// The tokens of all pieces, and of those before `piece`.
fn counts(pieces: &[Sourced<'_>], piece: &Piece) -> (usize, usize) {
    let tokens = |pieces: &[Sourced<'_>]| pieces.iter().map(|(piece, _)| piece.tokens as usize).sum();
    let before = pieces.iter().take_while(|(other, _)| other.dest_token < piece.dest_token).count();
    (tokens(pieces), tokens(&pieces[..before]))
}
