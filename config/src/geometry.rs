//! The geometry of a KV block: which bytes of a block hold which number.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// The number format of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// IEEE single precision, 4 bytes.
    F32,
    /// bfloat16, 2 bytes: the upper half of an `F32`.
    Bf16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// The order of tokens (N), heads (H) and head dimension (D) within one K or V plane of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvLayout {
    /// `[token][head][dim]`.
    Nhd,
    /// `[head][token][dim]`.
    Hnd,
}

impl fmt::Display for KvLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nhd => "nhd",
            Self::Hnd => "hnd",
        })
    }
}

/// The shape of one KV block of one worker.
///
/// Shape: `[layers][2: K, V][tokens and heads in the order of layout][head_dim]`, block-first, so that a block
/// and every layer range of it is one contiguous run. Units: offsets and sizes in bytes from the block's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvGeometry {
    /// Transformer layers.
    pub layers: u32,
    /// Key/value heads held by this worker.
    pub kv_heads: u32,
    /// Numbers per head.
    pub head_dim: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Order within a plane.
    pub layout: KvLayout,
    /// Number format.
    pub dtype: Dtype,
}

impl KvGeometry {
    /// Bytes of one K or V plane of one layer.
    pub fn plane_bytes(&self) -> usize {
        self.block_tokens as usize * self.token_plane_bytes()
    }

    /// Bytes one token takes in one plane.
    pub fn token_plane_bytes(&self) -> usize {
        self.kv_heads as usize * self.row_bytes()
    }

    /// Bytes of one row: one token, one head.
    pub fn row_bytes(&self) -> usize {
        self.head_dim as usize * self.dtype.size()
    }

    /// Bytes of one layer (K and V planes) of a block.
    pub fn layer_bytes(&self) -> usize {
        2 * self.plane_bytes()
    }

    /// Bytes of a whole block.
    pub fn block_bytes(&self) -> usize {
        self.layers as usize * self.layer_bytes()
    }

    /// Bytes of KV cache per token, all layers.
    pub fn token_bytes(&self) -> Bytes {
        Bytes((self.layers as usize * 2 * self.token_plane_bytes()) as u64)
    }

    /// Blocks that hold `tokens`.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// Offset in a block of the row of (`layer`, K=0/V=1, `token` in the block, `head`).
    pub fn row_offset(&self, layer: u32, kv: u32, token: u32, head: u32) -> usize {
        debug_assert!(layer < self.layers && kv < 2 && token < self.block_tokens && head < self.kv_heads);
        let row = match self.layout {
            KvLayout::Nhd => token * self.kv_heads + head,
            KvLayout::Hnd => head * self.block_tokens + token,
        };
        layer as usize * self.layer_bytes()
            + kv as usize * self.plane_bytes()
            + row as usize * self.row_bytes()
    }
}

impl fmt::Display for KvGeometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layers, kv_heads, head_dim, block_tokens, layout, dtype } = self;
        write!(
            f,
            "{layers} layers x {kv_heads} kv heads x {head_dim} dims, blocks of {block_tokens} tokens, {layout}, {dtype}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_tile_the_block_without_overlap() {
        for layout in [KvLayout::Nhd, KvLayout::Hnd] {
            let g = KvGeometry {
                layers: 3,
                kv_heads: 2,
                head_dim: 8,
                block_tokens: 4,
                layout,
                dtype: Dtype::Bf16,
            };
            let mut starts: Vec<usize> = Vec::new();
            for layer in 0..3 {
                for kv in 0..2 {
                    for token in 0..4 {
                        starts.extend((0..2).map(|head| g.row_offset(layer, kv, token, head)));
                    }
                }
            }
            starts.sort_unstable();
            let expected: Vec<usize> =
                (0..g.block_bytes() / g.row_bytes()).map(|i| i * g.row_bytes()).collect();
            assert_eq!(starts, expected);
        }
    }
}
