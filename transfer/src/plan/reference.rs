//! The plainest possible re-layout, element by element: what plans and pulls are tested against.

use std::ops::Range;

use baton_config::{Dtype, KvGeometry};
use half::bf16;

/// Reads one number of a block as the bits of an f32.
fn number(g: &KvGeometry, block: &[u8], offset: usize) -> u32 {
    match g.dtype {
        Dtype::F32 => u32::from_le_bytes(block[offset..][..4].try_into().unwrap()),
        Dtype::Bf16 => u32::from(u16::from_le_bytes(block[offset..][..2].try_into().unwrap())) << 16,
        Dtype::F16 | Dtype::Fp8E4m3 => unreachable!("not planned"),
    }
}

/// What a number whose f32 bits are `bits` must become at the destination, by the `half` crate.
fn encode(source: &KvGeometry, dest: &KvGeometry, bits: u32) -> Vec<u8> {
    match (source.dtype, dest.dtype) {
        (_, Dtype::F32) => bits.to_le_bytes().to_vec(),
        (Dtype::F32, Dtype::Bf16) => bf16::from_f32(f32::from_bits(bits)).to_le_bytes().to_vec(),
        // A number whose format stays is moved, not read: even a signalling NaN keeps its bits.
        (_, Dtype::F16 | Dtype::Fp8E4m3) | (Dtype::F16 | Dtype::Fp8E4m3, _) => unreachable!("not planned"),
        (Dtype::Bf16, Dtype::Bf16) => ((bits >> 16) as u16).to_le_bytes().to_vec(),
    }
}

/// The per-element copy that plans are measured against.
pub(crate) fn naive(
    source: &KvGeometry,
    dest: &KvGeometry,
    blocks: &[Vec<u8>],
    tokens: Range<u32>,
    arena: &mut [Vec<u8>],
) {
    for t in tokens {
        let (from, to) = (&blocks[(t / source.block_tokens) as usize], t / dest.block_tokens);
        for layer in 0..source.layers {
            for kv in 0..2 {
                for head in 0..source.kv_heads {
                    let s = source.row_offset(layer, kv, t % source.block_tokens, head);
                    let d = dest.row_offset(layer, kv, t % dest.block_tokens, head);
                    for i in 0..source.head_dim as usize {
                        let bits = number(source, from, s + i * source.dtype.size());
                        let size = dest.dtype.size();
                        arena[to as usize][d + i * size..][..size]
                            .copy_from_slice(&encode(source, dest, bits));
                    }
                }
            }
        }
    }
}

/// `count` blocks of pseudo-random bits: every number format's corner cases come up, NaN included.
pub(crate) fn blocks(g: &KvGeometry, count: u32, seed: u64) -> Vec<Vec<u8>> {
    let mut state = seed | 1;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..count).map(|_| (0..g.block_bytes()).map(|_| next()).collect()).collect()
}
