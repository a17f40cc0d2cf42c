use baton_config::{KvLayout, Scales};

use super::*;
use crate::memory::HeapMemory;

fn arena(layout: KvLayout, dtype: Dtype, block_tokens: u32) -> Arena {
    let geometry =
        KvGeometry { layers: 2, kv_heads: 3, head_dim: 6, block_tokens, layout, dtype, ..KvGeometry::PLAIN };
    let memory = Arc::new(HeapMemory::new(geometry.block_bytes() * 9));
    Arena::new(memory, geometry, 9).unwrap()
}

fn number(plane: Plane, token: u32, i: usize) -> f32 {
    (plane.layer * 64 + plane.kv.index() * 32 + token) as f32 - i as f32 * 0.5
}

#[test]
fn rows_come_back_in_every_geometry_and_by_either_way() {
    use KvLayout::*;
    let layouts =
        [Nhd, Hnd, B2lNhd, B2lHnd, L2bNhd, L2bHnd, Lb2Nhd, Lb2Hnd, Lbnhc, Lbhnc, Lhbnc, Blnhc, Blhnc, Bhlnc];
    for layout in layouts {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for block_tokens in [1, 4, 5, 16] {
                let arena = arena(layout, dtype, block_tokens);
                let blocks: Vec<BlockId> = [7, 2, 8, 0, 5, 1, 3].map(BlockId).to_vec();
                let tokens = (7 * block_tokens).min(23);
                let planes = (0..2).flat_map(|layer| Kv::BOTH.map(|kv| Plane { layer, kv }));
                for plane in planes.clone() {
                    let rows = |from: u32, to: u32| {
                        (from..to).flat_map(|t| (0..18).map(move |i| number(plane, t, i)))
                    };
                    let cut = tokens / 3;
                    arena.scatter_tokens(plane, &blocks, 0, &rows(0, cut).collect::<Vec<_>>());
                    arena.scatter_tokens(plane, &blocks, cut, &rows(cut, tokens - 1).collect::<Vec<_>>());
                    let last: Vec<f32> = rows(tokens - 1, tokens).collect();
                    arena.scatter_token(plane, &blocks, tokens - 1, &last);
                }
                for plane in planes {
                    for head in 0..3 {
                        let range = 1..tokens;
                        let mut out = vec![0.0; range.len() * 6];
                        arena.gather_head(plane, head, &blocks, range.clone(), &mut out);
                        let expected =
                            range.flat_map(|t| (0..6).map(move |i| number(plane, t, head as usize * 6 + i)));
                        assert!(out.iter().copied().eq(expected), "{plane:?} {head} of {}", arena.geometry());
                    }
                    let mut out = vec![0.0; 18];
                    arena.gather_token(plane, &blocks, tokens / 2, &mut out);
                    assert!(out.iter().copied().eq((0..18).map(|i| number(plane, tokens / 2, i))));
                }
            }
        }
    }
}

#[test]
fn bf16_rounds_like_the_half_crate() {
    let mut bits: u32 = 0x9e37_79b9;
    for _ in 0..200_000 {
        bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        for bits in [bits, bits | 0x7f80_0000, bits & 0xffff_8000, (bits & 0xffff_0000) | 0x8000] {
            let number = f32::from_bits(bits);
            assert_eq!(bf16_bits(number), half::bf16::from_f32(number).to_bits(), "{bits:#x}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let good = *arena(KvLayout::Nhd, Dtype::F32, 4).geometry();
    let memory: Arc<dyn KvMemory> = Arc::new(HeapMemory::new(good.block_bytes() * 2));
    assert!(matches!(Arena::new(memory.clone(), good, 3), Err(ArenaError::TooSmall { blocks: 3, .. })));
    let empty = KvGeometry { kv_heads: 0, ..good };
    assert_eq!(Arena::new(memory.clone(), empty, 1).unwrap_err(), ArenaError::Empty(empty));
    let fp8 = KvGeometry { dtype: Dtype::Fp8E4m3, scales: Scales::Head, ..good };
    let part = KvGeometry { shard: Shard::Tensor { rank: 0, degree: 2, heads: 6 }, ..good };
    let latent = KvGeometry { attention: Attention::Latent, kv_heads: 1, ..good };
    for other in [fp8, part, latent] {
        assert_eq!(Arena::new(memory.clone(), other, 1).unwrap_err(), ArenaError::Unsupported(other));
    }
}

#[test]
#[should_panic(expected = "block 9")]
fn a_block_beyond_the_arena_is_a_bug() {
    arena(KvLayout::Nhd, Dtype::F32, 4).block_offset(BlockId(9));
}
