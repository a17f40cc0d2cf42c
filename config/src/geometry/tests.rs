use super::*;
use crate::choice::Choice;

/// A small geometry of `layout`.
fn small(layout: KvLayout) -> KvGeometry {
    let (layers, kv_heads, head_dim, block_tokens) = (3, 2, 8, 4);
    KvGeometry { layers, kv_heads, head_dim, block_tokens, layout, ..KvGeometry::PLAIN }
}

fn layouts() -> impl Iterator<Item = KvLayout> {
    KvLayout::ALL.iter().map(|(_, layout)| *layout)
}

#[test]
fn rows_tile_the_block_without_overlap() {
    for g in layouts().map(small) {
        let mut starts: Vec<usize> = Vec::new();
        for layer in 0..3 {
            for kv in 0..2 {
                for token in 0..4 {
                    starts.extend((0..2).map(|head| g.row_offset(layer, kv, token, head)));
                }
            }
        }
        starts.sort_unstable();
        let expected: Vec<usize> = (0..g.block_bytes() / g.row_bytes()).map(|i| i * g.row_bytes()).collect();
        assert_eq!(starts, expected, "{g}");
    }
}

#[test]
fn rows_tile_an_arena_without_overlap() {
    const BLOCKS: u32 = 5;
    for g in layouts().map(small) {
        let s = g.arena_strides(BLOCKS);
        let mut starts = vec![0];
        for (count, stride) in [(BLOCKS, s.block), (3, s.layer), (2, s.kv), (4, s.token), (2, s.head)] {
            starts = (0..count as usize).flat_map(|i| starts.iter().map(move |s| s + i * stride)).collect();
        }
        starts.sort_unstable();
        let expected: Vec<usize> = (0..starts.len()).map(|i| i * g.head_dim as usize).collect();
        assert_eq!(starts, expected, "{g}");
    }
}

#[test]
fn scales_of_an_arena_follow_the_numbers_of_their_block_or_of_all_blocks() {
    for layout in layouts() {
        let g = KvGeometry {
            dtype: Dtype::Fp8E4m3,
            scales: Scales::Head,
            head_dim: 3,
            kv_heads: 1,
            layers: 1,
            block_tokens: 1,
            ..small(layout)
        };
        let blocks: Vec<BlockAt> = (0..5).map(|block| g.arena_at(5, block)).collect();
        let end = if layout.is_block_first() { 5 * 16 } else { 32 + 5 * 8 };
        assert_eq!(g.arena_bytes(5), end);
        assert_eq!(blocks[4].scales + 8, end, "{g}");
        assert!(blocks.windows(2).all(|pair| pair[1].scales - pair[0].scales >= 8));
        if layout.is_block_first() {
            assert_eq!(blocks[3], g.packed_at(3 * 16));
        } else {
            assert_eq!(blocks[0].scales, 32, "behind the numbers of all blocks");
        }
    }
}

#[test]
fn a_word_spells_the_order_in_memory() {
    for layout in layouts() {
        let letter = |axis: &KvAxis| match axis {
            KvAxis::Layer => 'l',
            KvAxis::Block => 'b',
            KvAxis::Kv => '2',
            KvAxis::Head => 'h',
            KvAxis::Token => 'n',
        };
        let spelled: String = layout.axes().iter().map(letter).collect();
        let word = layout.to_string();
        let word = if word.len() == 3 { format!("bl2{word}") } else { word };
        let expected = word.replace('c', "2").replace('d', "");
        assert_eq!(spelled, expected);
        assert_eq!(serde_json::to_value(layout).unwrap(), layout.to_string(), "one word everywhere");
    }
    for (word, dtype) in Dtype::ALL {
        assert_eq!(serde_json::to_value(dtype).unwrap(), *word, "one word everywhere");
    }
}

#[test]
fn records_of_the_plain_kind_are_as_before() {
    let plain = small(KvLayout::Hnd);
    let json = r#"{"layers":3,"kv_heads":2,"head_dim":8,"block_tokens":4,"layout":"hnd","dtype":"bf16"}"#;
    assert_eq!(serde_json::to_string(&plain).unwrap(), json);
    assert_eq!(serde_json::from_str::<KvGeometry>(json).unwrap(), plain);
    let rich = KvGeometry {
        dtype: Dtype::Fp8E4m3,
        scales: Scales::Head,
        shard: Shard::Tensor { rank: 1, degree: 4, heads: 8 },
        ..small(KvLayout::Lbhnc)
    };
    let json = serde_json::to_string(&rich).unwrap();
    assert_eq!(serde_json::from_str::<KvGeometry>(&json).unwrap(), rich, "{json}");
}

#[test]
fn scales_stand_behind_the_numbers() {
    let g = KvGeometry { dtype: Dtype::Fp8E4m3, head_dim: 3, kv_heads: 1, ..small(KvLayout::Nhd) };
    assert_eq!(g.block_bytes(), 72);
    let g = KvGeometry { block_tokens: 1, layers: 1, scales: Scales::Block, ..g };
    assert_eq!((g.numbers_bytes(), g.scales_offset(), g.block_bytes()), (6, 8, 16));
    let g = KvGeometry { kv_heads: 2, scales: Scales::Head, ..g };
    assert_eq!((g.numbers_bytes(), g.scales_offset(), g.block_bytes()), (12, 12, 28));
    assert_eq!(g.strides().block, 28);
}

#[test]
fn what_cannot_be_is_refused_with_the_reason() {
    let good = small(KvLayout::Nhd);
    let tensor = |rank, degree, heads| Shard::Tensor { rank, degree, heads };
    let bad = [
        (KvGeometry { layers: 0, ..good }, "at least 1"),
        (KvGeometry { head_dim: u32::MAX, block_tokens: u32::MAX, ..good }, "at most"),
        (KvGeometry { scales: Scales::Block, ..good }, "only fp8_e4m3"),
        (KvGeometry { attention: Attention::Latent, ..good }, "no heads"),
        (KvGeometry { shard: tensor(4, 4, 8), ..good }, "no such rank"),
        (KvGeometry { shard: tensor(0, 0, 8), ..good }, "no such rank"),
        (KvGeometry { shard: tensor(0, 1, 0), ..good }, "no such rank"),
        (KvGeometry { shard: tensor(0, 3, 8), ..good }, "evenly"),
        (KvGeometry { shard: tensor(0, 12, 8), ..good }, "evenly"),
        (KvGeometry { shard: tensor(0, 2, 8), ..good }, "each rank holds 4"),
        (KvGeometry { shard: tensor(0, 16, 8), ..good }, "each rank holds 1"),
    ];
    for (geometry, reason) in bad {
        let error = geometry.check().unwrap_err().to_string();
        assert!(error.contains(reason), "{geometry}: {error}");
    }
    let latent = KvGeometry { attention: Attention::Latent, kv_heads: 1, head_dim: 576, ..good };
    let fine = [
        good,
        KvGeometry { shard: tensor(3, 4, 8), ..good },
        KvGeometry { shard: tensor(7, 8, 4), kv_heads: 1, ..good },
        latent,
        KvGeometry { shard: tensor(7, 8, 1), ..latent },
    ];
    for geometry in fine {
        assert_eq!(geometry.check(), Ok(()), "{geometry}");
    }
}

#[test]
fn ranks_hold_neighbouring_heads_and_copies_when_there_are_more_ranks_than_heads() {
    let heads = |rank, degree| Shard::Tensor { rank, degree, heads: 4 }.heads((4 / u32::from(degree)).max(1));
    assert_eq!([heads(0, 2), heads(1, 2)], [0..2, 2..4]);
    let eight: Vec<u32> = (0..8).map(|rank| heads(rank, 8).start).collect();
    assert_eq!(eight, [0, 0, 1, 1, 2, 2, 3, 3]);
}
