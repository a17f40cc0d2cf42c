//! KV blocks in memory: rows of numbers for (layer, key or value, head, token), whatever the geometry.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use baton_config::{Attention, Dtype, KvGeometry, KvStrides, Shard};
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::memory::KvMemory;

/// A block of an arena, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}", self.0)
    }
}

/// Key or value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kv {
    /// Keys.
    Key,
    /// Values.
    Value,
}

impl Kv {
    /// Keys, then values: the order of the planes of a layer.
    pub const BOTH: [Self; 2] = [Self::Key, Self::Value];

    /// 0 for keys, 1 for values.
    pub fn index(self) -> u32 {
        match self {
            Self::Key => 0,
            Self::Value => 1,
        }
    }
}

/// The keys or the values of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Plane {
    /// Transformer layer.
    pub layer: u32,
    /// Keys or values.
    pub kv: Kv,
}

/// Why an arena cannot be laid over a memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArenaError {
    /// Some count of the geometry is zero.
    #[error("a KV block of {0} holds nothing")]
    Empty(KvGeometry),
    /// The engines here compute with keys and values of all heads, in f32, bf16 or f16.
    #[error("no engine of this build computes with KV blocks of {0}")]
    Unsupported(KvGeometry),
    /// The memory is smaller than the blocks.
    #[error("{blocks} KV blocks take {needed} bytes, the memory has {available}")]
    TooSmall {
        /// Blocks asked for.
        blocks: u32,
        /// Bytes they take.
        needed: usize,
        /// Bytes there are.
        available: usize,
    },
}

/// The KV blocks of one worker: a memory, a geometry, a number of blocks.
///
/// Shape: the order of axes is that of `geometry.layout`; with a block-first one, block `b` is the run of
/// `geometry.block_bytes()` bytes at `b * geometry.block_bytes()`.
/// Rows go in and out as `f32`; a bf16 or f16 arena rounds to nearest, ties to even, on the way in.
/// Methods take a block table: `blocks[i]` holds the tokens from `i * block_tokens`. They panic on a layer, head or
/// token outside the geometry or the table: a bug of the caller.
#[derive(Clone)]
pub struct Arena {
    memory: Arc<dyn KvMemory>,
    geometry: KvGeometry,
    strides: KvStrides,
    blocks: u32,
}

/// Bytes moved between memory and conversion at a time: small enough for the first-level cache.
const STAGE_BYTES: usize = 4096;

impl Arena {
    /// Lays `blocks` blocks of `geometry` over the start of `memory`.
    ///
    /// # Errors
    /// When the memory is too small or a block would hold nothing.
    pub fn new(memory: Arc<dyn KvMemory>, geometry: KvGeometry, blocks: u32) -> Result<Self, ArenaError> {
        if geometry.block_bytes() == 0 {
            return Err(ArenaError::Empty(geometry));
        }
        let is_plain = geometry.attention == Attention::Kv && geometry.shard == Shard::Whole;
        if !is_plain || geometry.dtype == Dtype::Fp8E4m3 {
            return Err(ArenaError::Unsupported(geometry));
        }
        let needed = geometry.block_bytes().saturating_mul(blocks as usize);
        let available = memory.len();
        if needed > available {
            return Err(ArenaError::TooSmall { blocks, needed, available });
        }
        Ok(Self { memory, geometry, strides: geometry.arena_strides(blocks), blocks })
    }

    /// What a block looks like.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// The bytes below.
    pub fn memory(&self) -> &Arc<dyn KvMemory> {
        &self.memory
    }

    /// Byte offset of the first row of a block in the memory.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn block_offset(&self, block: BlockId) -> usize {
        assert!(block.0 < self.blocks, "{block} of an arena of {}", self.blocks);
        block.0 as usize * self.strides.block * self.geometry.dtype.size()
    }

    /// Reads the rows of one head for a range of tokens.
    ///
    /// Shape: `out` is `[tokens][head_dim]`. One run of memory per block where a head's tokens follow one another, else
    /// one per token.
    ///
    /// # Panics
    /// When the range leaves the table or `out` has another size.
    pub fn gather_head(
        &self,
        plane: Plane,
        head: u32,
        blocks: &[BlockId],
        tokens: Range<u32>,
        out: &mut [f32],
    ) {
        let dim = self.geometry.head_dim as usize;
        assert_eq!(out.len(), tokens.len() * dim, "rows of {tokens:?} at {dim} numbers each");
        let mut stage = Stage::new(self);
        let mut rest = out;
        for run in self.runs(tokens) {
            let (rows, later) = rest.split_at_mut(run.tokens as usize * dim);
            rest = later;
            let base = self.block_offset(blocks[run.index]);
            if self.strides.token == dim {
                stage.read(base + self.row(plane, run.first, head), rows);
                continue;
            }
            for (row, token) in rows.chunks_exact_mut(dim).zip(run.first..) {
                stage.read(base + self.row(plane, token, head), row);
            }
        }
    }

    /// Reads the rows of all heads of one token.
    ///
    /// Shape: `out` is `[kv_heads][head_dim]`.
    ///
    /// # Panics
    /// When the token leaves the table or `out` has another size.
    pub fn gather_token(&self, plane: Plane, blocks: &[BlockId], token: u32, out: &mut [f32]) {
        assert_eq!(out.len(), self.token_numbers(), "one row per head");
        let base = self.block_offset(blocks[(token / self.geometry.block_tokens) as usize]);
        let first = token % self.geometry.block_tokens;
        let mut stage = Stage::new(self);
        let dim = self.geometry.head_dim as usize;
        if self.strides.head == dim {
            return stage.read(base + self.row(plane, first, 0), out);
        }
        for (row, head) in out.chunks_exact_mut(dim).zip(0..) {
            stage.read(base + self.row(plane, first, head), row);
        }
    }

    /// Writes the rows of all heads for consecutive tokens from `start` on.
    ///
    /// Shape: `rows` is `[tokens][kv_heads][head_dim]`, as a projection of a chunk produces them.
    ///
    /// # Panics
    /// When the tokens leave the table or `rows` is no whole number of tokens.
    pub fn scatter_tokens(&self, plane: Plane, blocks: &[BlockId], start: u32, rows: &[f32]) {
        let numbers = self.token_numbers();
        assert!(rows.len().is_multiple_of(numbers), "{} numbers at {numbers} per token", rows.len());
        let dim = self.geometry.head_dim as usize;
        let mut stage = Stage::new(self);
        let mut rest = rows;
        for run in self.runs(start..start + (rows.len() / numbers) as u32) {
            let (now, later) = rest.split_at(run.tokens as usize * numbers);
            rest = later;
            let base = self.block_offset(blocks[run.index]);
            if self.strides.head == dim && self.strides.token == numbers {
                stage.write(base + self.row(plane, run.first, 0), now);
                continue;
            }
            for (token_rows, token) in now.chunks_exact(numbers).zip(run.first..) {
                for (row, head) in token_rows.chunks_exact(dim).zip(0..) {
                    stage.write(base + self.row(plane, token, head), row);
                }
            }
        }
    }

    /// Writes the rows of all heads of one token: [`Self::scatter_tokens`] of a single one.
    ///
    /// # Panics
    /// When the token leaves the table or `row` has another size.
    pub fn scatter_token(&self, plane: Plane, blocks: &[BlockId], token: u32, row: &[f32]) {
        assert_eq!(row.len(), self.token_numbers(), "one row per head");
        self.scatter_tokens(plane, blocks, token, row);
    }

    /// Numbers one token takes in one plane.
    pub fn token_numbers(&self) -> usize {
        self.geometry.kv_heads as usize * self.geometry.head_dim as usize
    }

    fn row(&self, plane: Plane, token: u32, head: u32) -> usize {
        let g = &self.geometry;
        assert!(
            plane.layer < g.layers && head < g.kv_heads,
            "layer {} head {head} of blocks of {g}",
            plane.layer
        );
        let strides = &self.strides;
        let numbers = plane.layer as usize * strides.layer
            + plane.kv.index() as usize * strides.kv
            + token as usize * strides.token
            + head as usize * strides.head;
        numbers * g.dtype.size()
    }

    /// Cuts a token range at the block boundaries.
    fn runs(&self, tokens: Range<u32>) -> impl Iterator<Item = Run> + use<> {
        let per_block = self.geometry.block_tokens;
        let mut next = tokens.start;
        std::iter::from_fn(move || {
            if next >= tokens.end {
                return None;
            }
            let first = next % per_block;
            let count = (per_block - first).min(tokens.end - next);
            let index = (next / per_block) as usize;
            next += count;
            Some(Run { index, first, tokens: count })
        })
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("geometry", &self.geometry).field("blocks", &self.blocks).finish()
    }
}

/// Consecutive tokens within one block.
struct Run {
    /// Index of the block in the table.
    index: usize,
    /// First token, counted within the block.
    first: u32,
    tokens: u32,
}

/// A buffer between the bytes of the memory and the numbers of the caller.
struct Stage<'a> {
    memory: &'a dyn KvMemory,
    dtype: Dtype,
    bytes: [u8; STAGE_BYTES],
}

impl<'a> Stage<'a> {
    fn new(arena: &'a Arena) -> Self {
        Self { memory: &*arena.memory, dtype: arena.geometry.dtype, bytes: [0; STAGE_BYTES] }
    }

    fn read(&mut self, mut offset: usize, out: &mut [f32]) {
        for part in out.chunks_mut(STAGE_BYTES / self.dtype.size()) {
            let bytes = &mut self.bytes[..part.len() * self.dtype.size()];
            self.memory.read(offset, bytes);
            offset += bytes.len();
            match self.dtype {
                Dtype::F32 => {
                    for (number, bytes) in part.iter_mut().zip(bytes.as_chunks().0) {
                        *number = f32::from_le_bytes(*bytes);
                    }
                }
                Dtype::Bf16 => {
                    for (number, bytes) in part.iter_mut().zip(bytes.as_chunks().0) {
                        *number = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                    }
                }
                Dtype::F16 => {
                    let mut halves = [f16::ZERO; STAGE_BYTES / 2];
                    let halves = &mut halves[..part.len()];
                    for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
                        *half = f16::from_le_bytes(*bytes);
                    }
                    halves.convert_to_f32_slice(part);
                }
                Dtype::Fp8E4m3 => unreachable!("refused when the arena was made"),
            }
        }
    }

    fn write(&mut self, mut offset: usize, numbers: &[f32]) {
        for part in numbers.chunks(STAGE_BYTES / self.dtype.size()) {
            let bytes = &mut self.bytes[..part.len() * self.dtype.size()];
            match self.dtype {
                Dtype::F32 => {
                    for (number, bytes) in part.iter().zip(bytes.as_chunks_mut().0) {
                        *bytes = number.to_le_bytes();
                    }
                }
                Dtype::Bf16 => {
                    for (number, bytes) in part.iter().zip(bytes.as_chunks_mut().0) {
                        *bytes = bf16_bits(*number).to_le_bytes();
                    }
                }
                Dtype::F16 => {
                    let mut halves = [f16::ZERO; STAGE_BYTES / 2];
                    let halves = &mut halves[..part.len()];
                    halves.convert_from_f32_slice(part);
                    for (half, bytes) in halves.iter().zip(bytes.as_chunks_mut().0) {
                        *bytes = half.to_le_bytes();
                    }
                }
                Dtype::Fp8E4m3 => unreachable!("refused when the arena was made"),
            }
            self.memory.write(offset, bytes);
            offset += bytes.len();
        }
    }
}

/// The bfloat16 nearest to `number`, ties to even; NaN stays NaN.
///
/// Branch-free on purpose: the loops above vectorise.
fn bf16_bits(number: f32) -> u16 {
    let bits = number.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    (if number.is_nan() { quiet_nan } else { rounded }) as u16
}

#[cfg(test)]
mod tests;
