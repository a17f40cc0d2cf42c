use std::collections::BTreeMap;

use baton_config::{Attention, Dtype, KvLayout, Shard};
use proptest::prelude::*;

use super::reference::{blocks, naive};
use super::*;
use crate::memory::HostMemory;

mod kernels;
mod refusals;

const LAYOUTS: [KvLayout; 14] = {
    use KvLayout::*;
    [Nhd, Hnd, B2lNhd, B2lHnd, L2bNhd, L2bHnd, Lb2Nhd, Lb2Hnd, Lbnhc, Lbhnc, Lhbnc, Blnhc, Blhnc, Bhlnc]
};

/// What both sides of a pair have in common.
#[derive(Debug, Clone, Copy)]
struct Model {
    layers: u32,
    heads: u32,
    head_dim: u32,
    attention: Attention,
}

fn model() -> impl Strategy<Value = Model> {
    let heads = prop_oneof![Just(1u32), Just(2), Just(3), Just(4), Just(6)];
    let dims = prop_oneof![4 => 1u32..=9, 1 => Just(64u32)];
    (1u32..=3, heads, dims, prop::bool::weighted(0.15)).prop_map(|(layers, heads, head_dim, latent)| Model {
        layers,
        heads: if latent { 1 } else { heads },
        head_dim,
        attention: if latent { Attention::Latent } else { Attention::Kv },
    })
}

/// Any format, with scales where it may have them.
fn format() -> impl Strategy<Value = (Dtype, Scales)> {
    use Dtype::{Bf16, F16, F32, Fp8E4m3};
    prop_oneof![
        Just((F32, Scales::None)),
        Just((Bf16, Scales::None)),
        Just((F16, Scales::None)),
        Just((Fp8E4m3, Scales::None)),
        Just((Fp8E4m3, Scales::Block)),
        Just((Fp8E4m3, Scales::Head)),
    ]
}

/// Any rank of any group that can hold `heads` heads, or the whole.
fn shard(heads: u32) -> impl Strategy<Value = Shard> {
    let degrees: Vec<u16> = (1..=8)
        .filter(|m| heads.is_multiple_of(u32::from(*m)) || u32::from(*m).is_multiple_of(heads))
        .collect();
    let part = prop::sample::select(degrees)
        .prop_flat_map(move |degree| (0..degree).prop_map(move |rank| Shard::Tensor { rank, degree, heads }));
    prop_oneof![Just(Shard::Whole), part]
}

fn held(shard: Shard, heads: u32) -> u32 {
    match shard {
        Shard::Whole => heads,
        Shard::Tensor { degree, .. } => (heads / u32::from(degree)).max(1),
    }
}

/// A random geometry of a model.
fn geometry(model: Model) -> impl Strategy<Value = KvGeometry> {
    let layout = prop::sample::select(LAYOUTS.to_vec());
    (1u32..=20, layout, format(), shard(model.heads)).prop_map(
        move |(block_tokens, layout, (dtype, scales), shard)| KvGeometry {
            layers: model.layers,
            kv_heads: held(shard, model.heads),
            head_dim: model.head_dim,
            block_tokens,
            layout,
            dtype,
            scales,
            attention: model.attention,
            shard,
        },
    )
}

fn pair() -> impl Strategy<Value = (KvGeometry, KvGeometry)> {
    model().prop_flat_map(|model| (geometry(model), geometry(model)))
}

/// Tokens of the sequences of these tests.
const TOKENS: u32 = 60;

/// The blocks of a sequence, scattered over an arena of a few more.
fn table(g: &KvGeometry, seed: u64) -> (Vec<u32>, u32) {
    let needed = g.blocks_for(TOKENS);
    let count = needed + 3;
    let step = (2..).find(|step| (2..=*step).all(|d| step % d != 0 || !count.is_multiple_of(d))).unwrap();
    ((0..needed).map(|i| (i * step + (seed % 7) as u32) % count).collect(), count)
}

/// What a pull does with a plan: block by block in some order, or whole destination blocks.
fn lay_out(
    plan: &RelayoutPlan,
    from: &[Vec<u8>],
    tokens: &Range<u32>,
    to: &HostMemory,
    dest_at: impl Fn(u32) -> BlockAt,
) {
    if plan.needs_whole_blocks() {
        for dest in plan.dest_blocks(tokens) {
            plan.assemble(dest, tokens, |i| from[i as usize].as_slice(), to, dest_at(dest));
        }
        return;
    }
    for index in plan.source_blocks(tokens).rev() {
        plan.scatter(index, &from[index as usize], tokens.clone(), to, &dest_at);
    }
}

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    (0..bytes).map(|i| (i as u64 * 31 + seed) as u8 | 1).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_layout_equals_a_copy_by_element(
        (source, dest) in pair(),
        (a, b) in (0..TOKENS, 0..TOKENS),
        seed in any::<u64>(),
    ) {
        let plan = match RelayoutPlan::new(source, dest) {
            Ok(plan) => plan,
            Err(error) => {
                let ranks = [source, dest].map(|g| g.shard.heads(g.kv_heads));
                let common = |head: &u32| ranks[0].contains(head);
                match error {
                    PlanError::Geometry { reason: Mismatch::NoCommonHead, .. } => {
                        prop_assert!(!ranks[1].clone().any(|head| common(&head)));
                    }
                    PlanError::Geometry { reason: Mismatch::Scales, .. } => {
                        prop_assert!(!ranks[1].clone().all(|head| common(&head)));
                    }
                    other => prop_assert!(false, "{other}"),
                }
                return Ok(());
            }
        };
        let start = a.min(b);
        let start = if plan.may_start_at(start) { start } else { start - start % dest.block_tokens };
        let tokens = start..a.max(b);
        let (table, count) = table(&dest, seed);
        let plan = plan.into_arena(count);
        let from = blocks(&source, source.blocks_for(TOKENS), seed);
        let mut expected = noise(dest.arena_bytes(count), seed);
        let to = HostMemory::allocate(expected.len(), "arena").unwrap();
        to.write(0, &expected);
        naive(&source, &dest, &from, tokens.clone(), (&mut expected, count, &table));
        lay_out(&plan, &from, &tokens, &to, |block| dest.arena_at(count, table[block as usize]));
        let mut got = vec![0; expected.len()];
        to.read(0, &mut got);
        let differs = got.iter().zip(&expected).position(|(a, b)| a != b);
        prop_assert!(differs.is_none(), "{source} -> {dest}, tokens {tokens:?}: byte {differs:?}");
    }

    #[test]
    fn a_direct_plan_is_the_same_bytes(
        (source, other) in pair(),
        (tokens, heads, layout) in any::<(bool, bool, bool)>(),
        seed in any::<u64>(),
    ) {
        // Made alike, so that direct pairs come up.
        let mut dest = KvGeometry { dtype: source.dtype, scales: source.scales, ..other };
        if tokens {
            dest.block_tokens = source.block_tokens;
        }
        if heads {
            (dest.shard, dest.kv_heads) = (source.shard, source.kv_heads);
        }
        if layout {
            dest.layout = source.layout;
        }
        let Ok(plan) = RelayoutPlan::new(source, dest) else { return Ok(()) };
        if (source.block_tokens, source.kv_heads) != (dest.block_tokens, dest.kv_heads) {
            prop_assert!(!plan.is_direct(), "{source} -> {dest} is no copy of a block");
            return Ok(());
        }
        if source.shard.heads(source.kv_heads) != dest.shard.heads(dest.kv_heads) {
            return Ok(());
        }
        let from = blocks(&source, 1, seed);
        // The same bytes all over, so that padding counts too.
        let mut got = from[0].clone();
        naive(&source, &dest, &from, 0..source.block_tokens, (&mut got, 1, &[0]));
        if plan.is_direct() {
            prop_assert_eq!(&got, &from[0]);
            prop_assert_eq!(plan.choice(true), Choice::Direct);
        } else if source.layers > 1 && source.kv_heads > 1 && source.block_tokens > 1 && source.head_dim > 2 {
            prop_assert!(got != from[0], "{source} -> {dest} is direct");
        }
    }

    #[test]
    fn an_arena_gives_back_what_was_laid_out_in_it(g in model().prop_flat_map(geometry), seed in any::<u64>()) {
        let plan = RelayoutPlan::new(g, g).unwrap();
        let (table, count) = table(&g, seed);
        let from = blocks(&g, g.blocks_for(TOKENS), seed);
        let to = HostMemory::allocate(g.arena_bytes(count), "arena").unwrap();
        let tokens = 0..g.blocks_for(TOKENS) * g.block_tokens;
        lay_out(&plan.into_arena(count), &from, &tokens, &to, |b| g.arena_at(count, table[b as usize]));
        let packing = Packing::new(g, count);
        for (block, expected) in table.iter().zip(&from) {
            // What pads the numbers to the scales is never written.
            let mut packed = expected.clone();
            packed[g.numbers_bytes()..g.scales_offset()].fill(0);
            let mut expected = packed.clone();
            packed.fill(0);
            let done = packing.try_for_each(*block, |arena, at, len| {
                to.read(arena, &mut packed[at..][..len]);
                Ok::<(), ()>(())
            });
            prop_assert_eq!(done, Ok(()));
            packed[g.numbers_bytes()..g.scales_offset()].fill(0);
            expected[g.numbers_bytes()..g.scales_offset()].fill(0);
            prop_assert!(packed == expected, "{}", g);
        }
    }

    #[test]
    fn packing_at_the_source_changes_nothing((source, dest) in pair(), seed in any::<u64>()) {
        let Ok(plan) = RelayoutPlan::new(source, dest) else { return Ok(()) };
        let Some(wire) = plan.packed_geometry() else { return Ok(()) };
        let exact = dest.scales == Scales::None && source.scales == Scales::None && dest.dtype.size() >= 2;
        let first = RelayoutPlan::new(source, wire).unwrap();
        let second = RelayoutPlan::new(wire, dest).unwrap();
        prop_assert_eq!(first.heads, second.heads);
        prop_assert!(wire.block_bytes() <= source.block_bytes() + 4 + 4 * wire.scale_count());
        prop_assert!(!first.needs_whole_blocks());
        if !exact {
            return Ok(());
        }
        let from = blocks(&source, source.blocks_for(TOKENS), seed);
        let pass = |plan: &RelayoutPlan, from: &[Vec<u8>], g: &KvGeometry| {
            let count = g.blocks_for(TOKENS);
            let to = HostMemory::allocate(count as usize * g.block_bytes(), "blocks").unwrap();
            lay_out(plan, from, &(0..TOKENS), &to, |b| g.packed_at(b as usize * g.block_bytes()));
            let mut bytes = vec![0; count as usize * g.block_bytes()];
            to.read(0, &mut bytes);
            bytes.chunks(g.block_bytes()).map(<[u8]>::to_vec).collect::<Vec<_>>()
        };
        let straight = pass(&plan, &from, &dest);
        let packed = pass(&second, &pass(&first, &from, &wire), &dest);
        prop_assert!(straight == packed, "{source} -> {wire} -> {dest}");
    }

    #[test]
    fn ranks_together_write_everything_once(
        model in model(),
        (a, b, degree) in (1u32..=20, 1u32..=20, 1u16..=8),
        (from, to) in (prop::sample::select(LAYOUTS.to_vec()), prop::sample::select(LAYOUTS.to_vec())),
        dest_shard in (1u32..=6).prop_flat_map(shard),
    ) {
        let heads = dest_shard.model_heads(model.heads);
        let model = Model { heads, attention: Attention::Kv, ..model };
        let dest = KvGeometry { layers: model.layers, kv_heads: held(dest_shard, heads), head_dim: model.head_dim,
            block_tokens: b, layout: to, shard: dest_shard, ..KvGeometry::PLAIN };
        let sources = tp_sources(dest_shard, dest.kv_heads, degree);
        let even = heads.is_multiple_of(u32::from(degree)) || u32::from(degree).is_multiple_of(heads);
        prop_assert_eq!(sources.is_empty(), !even);
        let mut writes = vec![0u32; dest.numbers_bytes() / dest.dtype.size() * dest.blocks_for(TOKENS) as usize];
        let numbers = dest.numbers_bytes() / dest.dtype.size();
        for TpSource { rank, heads: taken } in sources {
            let shard = Shard::Tensor { rank, degree, heads };
            let source = KvGeometry { kv_heads: held(shard, heads), block_tokens: a, layout: from, shard, ..dest };
            let plan = RelayoutPlan::new(source, dest).unwrap();
            prop_assert_eq!(plan.heads, taken.len() as u32, "the plan takes what the rank is asked for");
            for index in plan.source_blocks(&(0..TOKENS)) {
                for piece in plan.pieces(index, 0..TOKENS) {
                    piece.nest.for_each(|_, at| {
                        let first = piece.dest_block as usize * numbers + at;
                        writes[first..][..piece.nest.run_len()].iter_mut().for_each(|w| *w += 1);
                    });
                }
            }
        }
        if even {
            let wanted = writes.iter().filter(|w| **w == 1).count();
            let expected = (model.layers * 2 * dest.kv_heads * model.head_dim * TOKENS) as usize;
            prop_assert_eq!(wanted, expected);
            prop_assert_eq!(writes.iter().map(|w| *w as usize).sum::<usize>(), expected, "nothing twice, nothing else");
        }
    }

    #[test]
    fn runs_are_as_long_as_both_sides_allow(
        (a, b) in (1u32..=20, 1u32..=20),
        (from, to) in (prop::bool::ANY, prop::bool::ANY),
        (layers, heads, head_dim) in (1u32..=3, 1u32..=4, 1u32..=9),
        (index, first) in (0u32..4, 0u32..60),
    ) {
        let of = |block_tokens, nhd| KvGeometry { layers, kv_heads: heads, head_dim, block_tokens,
            layout: if nhd { KvLayout::Nhd } else { KvLayout::Hnd }, ..KvGeometry::PLAIN };
        let (source, dest) = (of(a, from), of(b, to));
        let plan = RelayoutPlan::new(source, dest).unwrap();
        for piece in plan.pieces(index, first..90) {
            let len = piece.nest.run_len();
            let mut by_dest = BTreeMap::new();
            piece.nest.for_each(|s, d| assert!(by_dest.insert(d, s).is_none(), "a destination is written twice"));
            prop_assert_eq!(by_dest.len(), piece.nest.runs());
            // The last row of a plane and the first of the next may touch by accident where the orders differ.
            let (source_plane, dest_plane) = (source.strides().kv, dest.strides().kv);
            let at_edge = |s: usize, d: usize| s.is_multiple_of(source_plane) && d.is_multiple_of(dest_plane) && len < dest_plane;
            for (d, s) in &by_dest {
                let (s_end, d_end) = (s + len, d + len);
                let touch = by_dest.get(&d_end) == Some(&s_end) && !at_edge(s_end, d_end);
                prop_assert!(!touch, "{piece:?} has runs that touch");
            }
        }
    }
}

fn example(block_tokens: u32, layout: KvLayout, dtype: Dtype) -> KvGeometry {
    KvGeometry { layers: 32, kv_heads: 8, head_dim: 128, block_tokens, layout, dtype, ..KvGeometry::PLAIN }
}

/// The example's part of a rank.
fn rank(g: KvGeometry, rank: u16, degree: u16) -> KvGeometry {
    let shard = Shard::Tensor { rank, degree, heads: 8 };
    KvGeometry { shard, kv_heads: held(shard, 8), ..g }
}

#[test]
fn run_lengths_are_those_of_the_documented_table() {
    use Dtype::Bf16;
    use KvLayout::*;
    let plain = |tokens, layout| example(tokens, layout, Bf16);
    let cases = [
        // (source, dest, numbers per run, runs of the first piece)
        (plain(16, Nhd), plain(16, Nhd), 32 * 2 * 16 * 8 * 128, 1),
        (plain(16, Hnd), plain(16, Hnd), 32 * 2 * 16 * 8 * 128, 1),
        (plain(32, Nhd), plain(16, Nhd), 16 * 8 * 128, 64),
        (plain(32, Hnd), plain(16, Hnd), 16 * 128, 64 * 8),
        (plain(32, Nhd), plain(16, Hnd), 128, 64 * 8 * 16),
        (plain(1, Hnd), plain(16, Nhd), 8 * 128, 64),
        (plain(1, Nhd), plain(16, Hnd), 128, 64 * 8),
        // Planes in another order, and layers outside of blocks: the plane stays whole.
        (plain(16, Nhd), plain(16, B2lNhd), 16 * 8 * 128, 64),
        (plain(16, Hnd), plain(16, L2bHnd), 16 * 8 * 128, 64),
        (plain(16, L2bHnd), plain(16, Hnd), 32 * 2 * 16 * 8 * 128, 1),
        (plain(16, Lb2Nhd), plain(16, Lb2Nhd), 2 * 16 * 8 * 128, 32),
        (plain(16, Lbhnc), plain(16, Lbhnc), 2 * 16 * 8 * 128, 32),
        (plain(16, Nhd), plain(16, Lbnhc), 128, 64 * 8 * 16),
        (plain(32, Lbhnc), plain(16, Lbhnc), 2 * 16 * 128, 32 * 8),
        // Two ranks to four: two heads in common.
        (rank(plain(16, Nhd), 0, 2), rank(plain(16, Nhd), 1, 4), 2 * 128, 64 * 16),
        (rank(plain(16, Hnd), 0, 2), rank(plain(16, Hnd), 1, 4), 2 * 16 * 128, 64),
        (rank(plain(16, Nhd), 0, 2), rank(plain(16, Hnd), 1, 4), 128, 64 * 16 * 2),
        (rank(plain(16, Bhlnc), 0, 2), rank(plain(16, Bhlnc), 1, 4), 2 * 32 * 2 * 16 * 128, 1),
    ];
    for (source, dest, run, runs) in cases {
        let plan = RelayoutPlan::new(source, dest).unwrap().into_arena(100);
        let piece = plan.pieces(0, 0..source.block_tokens).next().unwrap();
        assert_eq!((piece.nest.run_len(), piece.nest.runs()), (run, runs), "{source} -> {dest}");
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
    assert!(!direct(nhd, rank(nhd, 0, 2)));
    let one = |g| KvGeometry { kv_heads: 1, ..g };
    assert!(direct(one(nhd), one(hnd)), "with one head the two orders are the same");
    // Where heads, or tokens, come first in a block, those of fewer are where they are in a longer one.
    let heads = KvGeometry { layout: KvLayout::Bhlnc, ..nhd };
    assert!(!direct(heads, rank(heads, 0, 2)) && !direct(rank(heads, 0, 2), heads));
    let small = KvGeometry { layers: 1, kv_heads: 2, block_tokens: 2, ..hnd };
    let shard = Shard::Tensor { rank: 0, degree: 2, heads: 2 };
    let as_many = KvGeometry { kv_heads: 1, block_tokens: 4, shard, ..small };
    assert!(!direct(as_many, small) && !direct(small, as_many), "as many bytes of other tokens");
    let tokens = KvGeometry { layers: 1, layout: KvLayout::Blnhc, ..nhd };
    let longer = KvGeometry { block_tokens: 32, ..tokens };
    assert!(direct(tokens, tokens) && !direct(tokens, longer) && !direct(longer, tokens));
    let single = |g| KvGeometry { block_tokens: 1, ..g };
    assert!(direct(single(nhd), single(hnd)), "with one token per block the two orders are the same");
    let layers = KvGeometry { layout: KvLayout::L2bNhd, ..nhd };
    let plan = RelayoutPlan::new(layers, layers).unwrap();
    assert!(plan.is_direct(), "packed blocks of any arena are the same bytes");
    assert!(!plan.into_arena(7).is_direct(), "in the arena they are not");
    let fp8 = KvGeometry { dtype: Dtype::Fp8E4m3, scales: Scales::Block, ..nhd };
    assert!(direct(fp8, fp8));
    let layer = KvGeometry { layers: 1, layout: KvLayout::Lb2Nhd, ..fp8 };
    let plan = RelayoutPlan::new(layer, layer).unwrap();
    assert!(plan.is_direct() && !plan.into_arena(7).is_direct(), "scales lie behind all blocks of the arena");
    let by_head = KvGeometry { scales: Scales::Head, ..fp8 };
    assert!(!direct(fp8, by_head));
    assert!(direct(one(fp8), one(by_head)), "with one head the two scales are the same");
}

#[test]
fn the_way_follows_from_runs_and_from_what_is_needed() {
    use Dtype::{Bf16, F32};
    use KvLayout::{Hnd, Nhd};
    let nhd = example(32, Nhd, Bf16);
    let choice = |a, b, verified| RelayoutPlan::new(a, b).unwrap().choice(verified);
    assert_eq!(choice(nhd, nhd, true), Choice::Direct);
    let halves = KvGeometry { block_tokens: 16, ..nhd };
    assert_eq!(choice(nhd, halves, false), Choice::Direct, "runs of 32 KiB");
    assert_eq!(choice(nhd, halves, true), Choice::Staged, "a digest covers the whole block");
    let short = KvGeometry { block_tokens: 4, ..nhd };
    assert_eq!(choice(nhd, short, false), Choice::Staged, "runs of 8 KiB");
    assert_eq!(choice(nhd, KvGeometry { dtype: F32, ..halves }, false), Choice::Staged, "numbers change");
    assert_eq!(choice(nhd, KvGeometry { layout: Hnd, ..nhd }, false), Choice::Staged);
    assert_eq!(choice(nhd, rank(nhd, 0, 2), false), Choice::Packed, "half of the heads, in runs of 1 KiB");
    assert_eq!(choice(KvGeometry { dtype: F32, ..nhd }, nhd, true), Choice::Packed, "half of the bytes");
    assert_eq!(choice(nhd, KvGeometry { dtype: F32, ..nhd }, true), Choice::Staged);
    let hnd = KvGeometry { layout: Hnd, ..nhd };
    assert_eq!(choice(hnd, rank(hnd, 0, 4), false), Choice::Direct, "only what is needed, in runs of 16 KiB");
    assert_eq!(choice(hnd, rank(hnd, 0, 4), true), Choice::Packed);
}

#[test]
fn replicas_share_the_load_of_their_readers() {
    let of = |rank| tp_sources(Shard::Tensor { rank, degree: 8, heads: 2 }, 1, 8);
    let ranks: Vec<u16> = (0..8).flat_map(of).map(|source| source.rank).collect();
    assert_eq!(ranks, [0, 1, 2, 3, 4, 5, 6, 7], "each of eight readers has its own source");
    let all = tp_sources(Shard::Whole, 2, 8);
    assert_eq!(all, [TpSource { rank: 0, heads: 0..1 }, TpSource { rank: 4, heads: 1..2 }]);
    assert_eq!(
        tp_sources(Shard::Whole, 8, 2),
        [TpSource { rank: 0, heads: 0..4 }, TpSource { rank: 1, heads: 4..8 }]
    );
}

#[test]
fn plans_are_made_once_per_pair() {
    let g = example(16, KvLayout::Nhd, Dtype::Bf16);
    let cache = PlanCache::of_arena(g, 9);
    let other = KvGeometry { block_tokens: 32, ..g };
    let first = cache.plan(other).unwrap();
    assert_eq!(first, RelayoutPlan::new(other, g).unwrap().into_arena(9));
    assert_eq!(cache.plan(other).unwrap(), first);
    assert_eq!(cache.counts(), PlanCacheCounts { hits: 1, misses: 1 });
    cache.plan(KvGeometry { layers: 1, ..g }).unwrap_err();
    // Seventeen further kinds push the first one out, but not the one that is used all the time.
    for block_tokens in 100..117 {
        cache.plan(KvGeometry { block_tokens, ..g }).unwrap();
        let often = cache.plan(KvGeometry { block_tokens: 100, ..g }).unwrap();
        assert_eq!(often.source().block_tokens, 100);
    }
    let before = cache.counts();
    cache.plan(KvGeometry { block_tokens: 100, ..g }).unwrap();
    assert_eq!(cache.counts().hits, before.hits + 1);
    cache.plan(other).unwrap();
    assert_eq!(cache.counts().misses, before.misses + 1);
}
