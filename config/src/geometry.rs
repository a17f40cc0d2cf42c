//! The geometry of a KV block: which bytes of a block hold which number.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

mod memory_order;
mod number;
mod shard;
#[cfg(test)]
mod tests;

pub use memory_order::{KvAxis, KvLayout};
pub use number::{Dtype, Scales};
pub use shard::{Shard, ShardFault};

/// Largest block, in bytes. Geometries come from peers, so sizes are bounded before use: 1 GiB is 64 times the block of
/// a 405B-parameter model at 32 tokens in f32.
pub const BLOCK_MAX_BYTES: u64 = 1 << 30;

/// Bytes of a scale: an f32.
pub const SCALE_BYTES: usize = 4;

/// What is kept of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attention {
    /// A key and a value for each head.
    #[default]
    Kv,
    /// One latent row, from which keys and values are computed (multi-head latent attention). It counts as one head
    /// without a value; every rank of a tensor-parallel group holds it.
    Latent,
}

/// The shape of one KV block of one worker.
///
/// Shape: the axes in the order of `layout`, then `head_dim` numbers. A block that is not one run of its arena (see
/// [`KvLayout::is_block_first`]) is one on the wire and in staging: the same order without the axis of blocks. Scales, if
/// any, stand behind the numbers of the block, at the next multiple of 4 bytes, f32: `[layers][2]` or
/// `[layers][2][heads]`. In an arena whose blocks are not one run they stand behind the numbers of all blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvGeometry {
    /// Transformer layers.
    pub layers: u32,
    /// Key/value heads held by this worker; 1 for latent rows.
    pub kv_heads: u32,
    /// Numbers per head, or of a latent row.
    pub head_dim: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Order in memory.
    pub layout: KvLayout,
    /// Number format.
    pub dtype: Dtype,
    /// What a scale covers.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scales: Scales,
    /// What is kept of a token.
    #[serde(default, skip_serializing_if = "is_default")]
    pub attention: Attention,
    /// Which heads of the model are held.
    #[serde(default, skip_serializing_if = "is_default")]
    pub shard: Shard,
}

/// What is usual stays out of records, so that readers who know nothing else can read them.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Steps along each axis, in numbers (not bytes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvStrides {
    /// From a block to the next one.
    pub block: usize,
    /// From a layer to the next one.
    pub layer: usize,
    /// From keys to values.
    pub kv: usize,
    /// From a head to the next one.
    pub head: usize,
    /// From a token of a block to the next one.
    pub token: usize,
}

/// Where the bytes of a block are, in bytes from the start of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockAt {
    /// Its first number; the others follow by the strides.
    pub numbers: usize,
    /// Its scales, all in one run.
    pub scales: usize,
}

/// Why no block can have a geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Some count is zero, or the block is larger than [`BLOCK_MAX_BYTES`].
    #[error("every count must be at least 1 and a block at most {BLOCK_MAX_BYTES} bytes")]
    Size,
    /// Scales of numbers that are not fp8.
    #[error("{0} numbers have no scales, only fp8_e4m3 has")]
    Scales(Dtype),
    /// Latent rows with heads.
    #[error("a latent row has no heads: kv_heads must be 1, and the heads of a shard too")]
    Latent,
    /// A shard that cannot be.
    #[error("{shard} with {kv_heads} kv heads cannot be: {fault}")]
    Shard {
        /// As given.
        shard: Shard,
        /// As given.
        kv_heads: u32,
        /// What is wrong.
        fault: ShardFault,
    },
}

impl KvGeometry {
    /// The usual: keys and values, no scales, all heads, token-major bf16. A base for struct updates; holds nothing
    /// by itself.
    pub const PLAIN: Self = Self {
        layers: 0,
        kv_heads: 0,
        head_dim: 0,
        block_tokens: 0,
        layout: KvLayout::Nhd,
        dtype: Dtype::Bf16,
        scales: Scales::None,
        attention: Attention::Kv,
        shard: Shard::Whole,
    };

    /// Refuses what no block can be. After this no size overflows.
    ///
    /// # Errors
    /// The first thing found wrong.
    pub fn check(&self) -> Result<(), GeometryError> {
        let counts = [self.layers, self.kv_heads, self.head_dim, self.block_tokens];
        // Scales add at most 4 bytes for each number.
        let number = 2 * (self.dtype.size() + if self.scales == Scales::None { 0 } else { SCALE_BYTES });
        let bytes =
            counts.iter().try_fold(number as u64, |bytes, count| bytes.checked_mul(u64::from(*count)));
        if !matches!(bytes, Some(1..=BLOCK_MAX_BYTES)) {
            return Err(GeometryError::Size);
        }
        if self.scales != Scales::None && self.dtype != Dtype::Fp8E4m3 {
            return Err(GeometryError::Scales(self.dtype));
        }
        if self.attention == Attention::Latent && self.model_heads() != 1 {
            return Err(GeometryError::Latent);
        }
        let (shard, kv_heads) = (self.shard, self.kv_heads);
        shard.fault(kv_heads).map_or(Ok(()), |fault| Err(GeometryError::Shard { shard, kv_heads, fault }))
    }

    /// Keys and values, or only the latent row.
    pub fn planes(&self) -> u32 {
        match self.attention {
            Attention::Kv => 2,
            Attention::Latent => 1,
        }
    }

    /// KV heads of the model.
    pub fn model_heads(&self) -> u32 {
        self.shard.model_heads(self.kv_heads)
    }

    /// Bytes of one row: one token, one head.
    pub fn row_bytes(&self) -> usize {
        self.head_dim as usize * self.dtype.size()
    }

    /// Rows of a block.
    fn rows(&self) -> usize {
        [self.layers, self.planes(), self.kv_heads, self.block_tokens].map(|n| n as usize).iter().product()
    }

    /// Bytes of the numbers of a block, without scales.
    pub fn numbers_bytes(&self) -> usize {
        self.rows() * self.row_bytes()
    }

    /// Scales of a block.
    pub fn scale_count(&self) -> usize {
        let planes = self.layers as usize * self.planes() as usize;
        match self.scales {
            Scales::None => 0,
            Scales::Block => planes,
            Scales::Head => planes * self.kv_heads as usize,
        }
    }

    /// Where in a block its scales start, or would.
    pub fn scales_offset(&self) -> usize {
        match self.scales {
            Scales::None => self.numbers_bytes(),
            Scales::Block | Scales::Head => self.numbers_bytes().next_multiple_of(SCALE_BYTES),
        }
    }

    /// Bytes of a whole block, scales included.
    pub fn block_bytes(&self) -> usize {
        self.scales_offset() + self.scale_count() * SCALE_BYTES
    }

    /// Bytes of KV cache per token, all layers, without scales.
    pub fn token_bytes(&self) -> Bytes {
        let numbers = [self.layers, self.planes(), self.kv_heads, self.head_dim].map(u64::from);
        Bytes(numbers.iter().product::<u64>() * self.dtype.size() as u64)
    }

    /// Blocks that hold `tokens`.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// The strides of a block on the wire: one run of memory, whatever its arena is like.
    pub fn strides(&self) -> KvStrides {
        self.strides_of(1)
    }

    /// The strides of an arena of `blocks` blocks.
    pub fn arena_strides(&self, blocks: u32) -> KvStrides {
        if self.layout.is_block_first() { self.strides_of(1) } else { self.strides_of(blocks as usize) }
    }

    /// Bytes of an arena of `blocks` blocks; never more than so many blocks by themselves.
    pub fn arena_bytes(&self, blocks: u32) -> usize {
        let blocks = blocks as usize;
        if self.layout.is_block_first() {
            return blocks * self.block_bytes();
        }
        let scales = blocks * self.scale_count() * SCALE_BYTES;
        let numbers = blocks * self.numbers_bytes();
        if scales == 0 { numbers } else { numbers.next_multiple_of(SCALE_BYTES) + scales }
    }

    /// Where a block lies that is one run of memory from `offset` on.
    pub fn packed_at(&self, offset: usize) -> BlockAt {
        BlockAt { numbers: offset, scales: offset + self.scales_offset() }
    }

    /// Where block `block` of an arena of `blocks` blocks lies.
    pub fn arena_at(&self, blocks: u32, block: u32) -> BlockAt {
        let numbers = block as usize * self.arena_strides(blocks).block * self.dtype.size();
        if self.layout.is_block_first() {
            return self.packed_at(numbers);
        }
        let scales = self.scale_count() * SCALE_BYTES;
        let behind = (blocks as usize * self.numbers_bytes()).next_multiple_of(SCALE_BYTES);
        BlockAt { numbers, scales: behind + block as usize * scales }
    }

    fn strides_of(&self, blocks: usize) -> KvStrides {
        let mut strides = KvStrides { block: 0, layer: 0, kv: 0, head: 0, token: 0 };
        let mut step = self.head_dim as usize;
        for axis in self.layout.axes().into_iter().rev() {
            let (stride, count) = match axis {
                KvAxis::Block => (&mut strides.block, blocks),
                KvAxis::Layer => (&mut strides.layer, self.layers as usize),
                KvAxis::Kv => (&mut strides.kv, self.planes() as usize),
                KvAxis::Head => (&mut strides.head, self.kv_heads as usize),
                KvAxis::Token => (&mut strides.token, self.block_tokens as usize),
            };
            *stride = step;
            step *= count;
        }
        if self.layout.is_block_first() {
            strides.block = self.block_bytes() / self.dtype.size();
        }
        strides
    }

    /// Offset in a block on the wire of the row of (`layer`, K=0/V=1, `token` in the block, `head`).
    pub fn row_offset(&self, layer: u32, kv: u32, token: u32, head: u32) -> usize {
        debug_assert!(layer < self.layers && kv < self.planes());
        debug_assert!(token < self.block_tokens && head < self.kv_heads);
        let strides = self.strides();
        let numbers = layer as usize * strides.layer
            + kv as usize * strides.kv
            + token as usize * strides.token
            + head as usize * strides.head;
        numbers * self.dtype.size()
    }
}

impl fmt::Display for KvGeometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layers, kv_heads, head_dim, block_tokens, layout, dtype, scales, attention, shard } = self;
        match attention {
            Attention::Kv => write!(f, "{layers} layers x {kv_heads} kv heads x {head_dim} dims")?,
            Attention::Latent => write!(f, "{layers} layers x latent rows of {head_dim}")?,
        }
        write!(f, ", blocks of {block_tokens} tokens, {layout}, {dtype}")?;
        if *scales != Scales::None {
            write!(f, " with a scale per {scales}")?;
        }
        if *shard != Shard::Whole {
            write!(f, ", {shard}")?;
        }
        Ok(())
    }
}
