use std::collections::BTreeMap;

use half::bf16;
use proptest::prelude::*;

use super::reference::{blocks, naive};
use super::*;
use crate::memory::HostMemory;

/// A random geometry with the given layers, heads and head size.
fn geometry(layers: u32, kv_heads: u32, head_dim: u32) -> impl Strategy<Value = KvGeometry> {
    (1u32..=40, any::<bool>(), any::<bool>()).prop_map(move |(block_tokens, nhd, wide)| KvGeometry {
        layers,
        kv_heads,
        head_dim,
        block_tokens,
        layout: if nhd { KvLayout::Nhd } else { KvLayout::Hnd },
        dtype: if wide { Dtype::F32 } else { Dtype::Bf16 },
        ..KvGeometry::PLAIN
    })
}

fn pair() -> impl Strategy<Value = (KvGeometry, KvGeometry)> {
    (1u32..=3, 1u32..=4, prop_oneof![1u32..=9, Just(64), Just(128)])
        .prop_flat_map(|(l, h, d)| (geometry(l, h, d), geometry(l, h, d)))
}

/// Memory that holds `blocks` one after the other, from byte `at` on.
fn memory(blocks: &[Vec<u8>], at: usize) -> HostMemory {
    let memory = HostMemory::allocate(at + blocks.iter().map(Vec::len).sum::<usize>(), "blocks").unwrap();
    memory.write(at, &blocks.concat());
    memory
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn scatter_equals_a_copy_by_element(
        (source, dest) in pair(),
        (a, b) in (0u32..120, 0u32..120),
        seed in any::<u64>(),
    ) {
        let tokens = a.min(b)..a.max(b);
        let plan = RelayoutPlan::new(source, dest).unwrap();
        let from = blocks(&source, source.blocks_for(120), seed);
        let untouched = blocks(&dest, dest.blocks_for(120), !seed);
        let (mut expected, mut got) = (untouched.clone(), untouched);
        naive(&source, &dest, &from, tokens.clone(), &mut expected);
        let to = memory(&got, 192);
        for index in plan.source_blocks(&tokens) {
            let block = &from[index as usize];
            plan.scatter(index, block, tokens.clone(), &to, |b| 192 + b as usize * dest.block_bytes());
        }
        for (block, bytes) in got.iter_mut().enumerate() {
            to.read(192 + block * dest.block_bytes(), bytes);
        }
        prop_assert!(got == expected, "{source} -> {dest}, tokens {tokens:?}");
    }

    #[test]
    fn runs_are_as_long_as_both_sides_allow((source, dest) in pair(), index in 0u32..4, from in 0u32..100) {
        let plan = RelayoutPlan::new(source, dest).unwrap();
        for piece in plan.pieces(index, from..140) {
            let len = piece.nest.run_len();
            let mut by_dest = BTreeMap::new();
            piece.nest.for_each(|s, d| assert!(by_dest.insert(d, s).is_none(), "a destination is written twice"));
            prop_assert_eq!(by_dest.len(), piece.nest.runs());
            // The last row of a plane and the first of the next may touch by accident where the orders differ.
            let (source_plane, dest_plane) = (Strides::of(&source).plane, Strides::of(&dest).plane);
            let at_edge = |s: usize, d: usize| s.is_multiple_of(source_plane) && d.is_multiple_of(dest_plane) && len < dest_plane;
            for (d, s) in &by_dest {
                let (s_end, d_end) = (s + len, d + len);
                let touch = by_dest.get(&d_end) == Some(&s_end) && !at_edge(s_end, d_end);
                prop_assert!(!touch, "{piece:?} has runs that touch");
            }
        }
    }

    #[test]
    fn narrowing_agrees_with_the_half_crate(bits in any::<u32>()) {
        let mut out = [[0; 2]];
        convert::narrow(&[bits.to_le_bytes()], &mut out);
        prop_assert_eq!(bf16::from_le_bytes(out[0]).to_bits(), bf16::from_f32(f32::from_bits(bits)).to_bits());
    }
}

#[test]
fn narrowing_rounds_ties_to_even_and_keeps_nan_and_infinity() {
    for (bits, expected) in [
        (0x3f80_8000, 0x3f80), // tie, even below
        (0x3f81_8000, 0x3f82), // tie, even above
        (0x3f80_8001, 0x3f81),
        (0x7f7f_ffff, 0x7f80), // largest finite rounds to infinity
        (0x7f80_0000, 0x7f80),
        (0xff80_0000, 0xff80),
        (0x7f80_0001, 0x7fc0), // a NaN whose payload is cut off must not become infinity
        (0xffff_ffff, 0xffff),
        (0x0000_8001, 0x0001), // subnormal
    ] {
        let mut out = [[0; 2]];
        convert::narrow(&[u32::to_le_bytes(bits)], &mut out);
        assert_eq!(u16::from_le_bytes(out[0]), expected, "{bits:08x}");
    }
}

#[test]
fn widening_is_exact_for_every_bf16() {
    let all: Vec<[u8; 2]> = (0..=u16::MAX).map(u16::to_le_bytes).collect();
    let mut wide = vec![[0; 4]; all.len()];
    convert::widen(&all, &mut wide);
    let mut back = vec![[0; 2]; all.len()];
    for (bits, wide) in (0..=u16::MAX).zip(&wide) {
        assert_eq!(u32::from_le_bytes(*wide), u32::from(bits) << 16);
    }
    convert::narrow(&wide, &mut back);
    for (bits, back) in (0..=u16::MAX).zip(&back) {
        let quiet = if bf16::from_bits(bits).is_nan() { bits | 0x40 } else { bits };
        assert_eq!(u16::from_le_bytes(*back), quiet, "{bits:04x} must survive a round trip");
    }
}

fn example(block_tokens: u32, layout: KvLayout, dtype: Dtype) -> KvGeometry {
    KvGeometry { layers: 32, kv_heads: 8, head_dim: 128, block_tokens, layout, dtype, ..KvGeometry::PLAIN }
}

#[test]
fn run_lengths_are_those_of_the_documented_table() {
    use Dtype::Bf16;
    use KvLayout::{Hnd, Nhd};
    let cases = [
        // (source, dest, numbers per run, runs of the first piece)
        ((16, Nhd), (16, Nhd), 32 * 2 * 16 * 8 * 128, 1),
        ((16, Hnd), (16, Hnd), 32 * 2 * 16 * 8 * 128, 1),
        ((32, Nhd), (16, Nhd), 16 * 8 * 128, 64),
        ((32, Hnd), (16, Hnd), 16 * 128, 64 * 8),
        ((32, Nhd), (16, Hnd), 128, 64 * 8 * 16),
        ((1, Hnd), (16, Nhd), 8 * 128, 64),
        ((1, Nhd), (16, Hnd), 128, 64 * 8),
    ];
    for ((a, from), (b, to), run, runs) in cases {
        let plan = RelayoutPlan::new(example(a, from, Bf16), example(b, to, Bf16)).unwrap();
        let piece = plan.pieces(0, 0..a).next().unwrap();
        assert_eq!((piece.nest.run_len(), piece.nest.runs()), (run, runs), "{from}{a} -> {to}{b}");
    }
}

#[test]
fn direct_means_byte_for_byte() {
    let nhd = example(16, KvLayout::Nhd, Dtype::Bf16);
    let hnd = KvGeometry { layout: KvLayout::Hnd, ..nhd };
    let direct = |a, b| RelayoutPlan::new(a, b).unwrap().is_direct();
    assert!(direct(nhd, nhd));
    assert!(!direct(nhd, hnd));
    assert!(!direct(nhd, KvGeometry { dtype: Dtype::F32, ..nhd }));
    assert!(!direct(nhd, KvGeometry { block_tokens: 32, ..nhd }));
    let one = |g| KvGeometry { kv_heads: 1, ..g };
    assert!(direct(one(nhd), one(hnd)), "with one head the two orders are the same");
    let single = |g| KvGeometry { block_tokens: 1, ..g };
    assert!(direct(single(nhd), single(hnd)), "with one token per block the two orders are the same");
}

#[test]
fn what_cannot_be_reconciled_is_refused_with_both_geometries() {
    let a = example(16, KvLayout::Nhd, Dtype::Bf16);
    for b in
        [KvGeometry { layers: 31, ..a }, KvGeometry { kv_heads: 4, ..a }, KvGeometry { head_dim: 64, ..a }]
    {
        let error = RelayoutPlan::new(a, b).unwrap_err();
        assert_eq!(error, PlanError::Geometry { source_geometry: a, dest: b });
        let text = error.to_string();
        assert!(text.contains(&a.to_string()) && text.contains(&b.to_string()), "{text}");
    }
}

#[test]
fn impossible_geometries_are_refused_before_any_arithmetic_overflows() {
    let good = example(16, KvLayout::Nhd, Dtype::F32);
    for bad in [
        KvGeometry { layers: 0, ..good },
        KvGeometry { head_dim: 0, ..good },
        KvGeometry { block_tokens: 0, ..good },
        KvGeometry { block_tokens: u32::MAX, ..good },
        KvGeometry {
            layers: u32::MAX,
            kv_heads: u32::MAX,
            head_dim: u32::MAX,
            block_tokens: u32::MAX,
            ..good
        },
    ] {
        let impossible = Err(PlanError::Impossible { geometry: bad, fault: GeometryError::Size });
        assert_eq!(RelayoutPlan::new(bad, good), impossible);
        assert_eq!(RelayoutPlan::new(good, bad), impossible);
    }
}

#[test]
fn indices_at_the_end_of_the_range_do_not_wrap() {
    let plan =
        RelayoutPlan::new(example(16, KvLayout::Nhd, Dtype::F32), example(7, KvLayout::Hnd, Dtype::F32))
            .unwrap();
    assert_eq!(plan.pieces(u32::MAX, 0..100).count(), 0);
    assert_eq!(plan.pieces(u32::MAX, 0..u32::MAX).count(), 0);
    assert_eq!(plan.source_blocks(&(5..5)), 0..0);
    assert_eq!(plan.source_blocks(&(15..17)), 0..2);
}
