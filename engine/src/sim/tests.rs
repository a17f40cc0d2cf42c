use std::sync::Arc;
use std::time::Duration;

use baton_config::{Dtype, KvGeometry, KvLayout};

use super::*;
use crate::arena::BlockId;
use crate::memory::HeapMemory;

fn model() -> ModelInfo {
    ModelInfo {
        name: "sim".into(),
        vocab: 97,
        max_context: 1000,
        eos: vec![5, 96],
        layers: 2,
        kv_heads: 2,
        head_dim: 12,
    }
}

fn arena(layout: KvLayout, dtype: Dtype, block_tokens: u32) -> Arena {
    let geometry =
        KvGeometry { layers: 2, kv_heads: 2, head_dim: 12, block_tokens, layout, dtype, ..KvGeometry::PLAIN };
    let memory = HeapMemory::new(geometry.block_bytes() * 64);
    Arena::new(Arc::new(memory), geometry, 64).unwrap()
}

fn config(verify_rows: u32) -> SimConfig {
    SimConfig { verify_rows, ..SimConfig::default() }
}

fn table(len: u32) -> Vec<BlockId> {
    (0..len).map(|i| BlockId((i * 7 + 3) % 64)).collect()
}

/// Runs one item of `tokens[start..end]`.
fn pass(
    sim: &mut Sim,
    arena: &Arena,
    blocks: &[BlockId],
    tokens: &[u32],
    start: usize,
) -> Result<Forward, ExecuteError> {
    let (context, new) = tokens.split_at(start);
    let item = BatchItem { context, tokens: new, start: start as u32, blocks, logits: true };
    let mut out = Forward::default();
    sim.forward(arena, &[item], &mut out).map(|()| out)
}

fn prompt(len: u32) -> Vec<u32> {
    (0..len).map(|i| i * i % 89).collect()
}

#[test]
fn logits_peak_at_the_oracle_whatever_the_geometry_and_chunks() {
    let tokens = prompt(50);
    let mut seen = Vec::new();
    for layout in [KvLayout::Nhd, KvLayout::Hnd] {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            for chunk in [7, 50] {
                let (arena, mut sim) = (arena(layout, dtype, 8), Sim::new(config(u32::MAX), model()));
                let mut start = 0;
                while start < 50 {
                    let end = (start + chunk).min(50);
                    let out = pass(&mut sim, &arena, &table(8), &tokens[..end], start).unwrap();
                    start = end;
                    if end == 50 {
                        seen.push(out.logits);
                    }
                }
            }
        }
    }
    let expected = oracle(&config(0), &model(), &tokens, 1)[0] as usize;
    let best = seen[0].iter().copied().fold(0.0, f32::max);
    assert_eq!(seen[0].iter().position(|logit| *logit == best), Some(expected));
    assert!(seen.iter().all(|logits| *logits == seen[0]));
    let changed = pass(
        &mut Sim::new(config(9), model()),
        &arena(KvLayout::Nhd, Dtype::F32, 8),
        &table(8),
        &prompt(49),
        0,
    );
    assert_ne!(changed.unwrap().logits, seen[0]);
}

/// Damages every block of a context in several ways; each must be noticed by the next pass.
fn damage_is_noticed(verify_rows: u32) {
    let tokens = prompt(65);
    let arena = arena(KvLayout::Hnd, Dtype::Bf16, 8);
    let mut sim = Sim::new(config(verify_rows), model());
    let blocks = table(9);
    let bytes = arena.geometry().block_bytes();
    let block = |index: usize| {
        let mut bytes = vec![0; bytes];
        arena.memory().read(arena.block_offset(blocks[index]), &mut bytes);
        bytes
    };
    pass(&mut sim, &arena, &blocks, &tokens[..64], 0).unwrap();
    for damaged in 0..8 {
        let good = block(damaged);
        let zeroed = vec![0; bytes];
        let swapped = block((damaged + 1) % 8);
        for bad in [&zeroed, &swapped] {
            arena.memory().write(arena.block_offset(blocks[damaged]), bad);
            let error = pass(&mut sim, &arena, &blocks, &tokens, 64).unwrap_err();
            let ExecuteError::CorruptKv { item: 0, position, block, .. } = error else { panic!("{error}") };
            assert_eq!((position as usize / 8, block), (damaged, blocks[damaged]));
        }
        arena.memory().write(arena.block_offset(blocks[damaged]), &good);
    }
    pass(&mut sim, &arena, &blocks, &tokens, 64).unwrap();
    let mut other = tokens;
    other[0] += 1;
    pass(&mut sim, &arena, &blocks, &other, 64).unwrap_err();
}

#[test]
fn damaged_blocks_are_noticed_by_the_full_check() {
    damage_is_noticed(u32::MAX);
}

#[test]
fn damaged_blocks_are_noticed_by_a_sample() {
    damage_is_noticed(16);
}

#[test]
fn the_full_check_notices_a_single_bit() {
    let tokens = prompt(17);
    let arena = arena(KvLayout::Nhd, Dtype::Bf16, 8);
    let mut sim = Sim::new(config(u32::MAX), model());
    pass(&mut sim, &arena, &table(3), &tokens[..16], 0).unwrap();
    for at in (0..arena.geometry().block_bytes()).step_by(5) {
        let offset = arena.block_offset(table(3)[1]) + at;
        let mut byte = [0];
        arena.memory().read(offset, &mut byte);
        arena.memory().write(offset, &[byte[0] ^ 0x10]);
        pass(&mut sim, &arena, &table(3), &tokens, 16).unwrap_err();
        arena.memory().write(offset, &byte);
    }
    pass(&mut sim, &arena, &table(3), &tokens, 16).unwrap();
}

#[test]
fn the_model_ends_only_when_it_may() {
    let never = oracle(&config(0), &model(), &[1], 5_000);
    assert_eq!(never.len(), 5_000);
    assert!(!never.iter().any(|token| model().eos.contains(token)));
    let ending = SimConfig { mean_output_tokens: Some(20), ..config(0) };
    let lengths: Vec<usize> = (0..500).map(|i| oracle(&ending, &model(), &[i], 5_000).len()).collect();
    let mean = lengths.iter().sum::<usize>() as f64 / 500.0;
    assert!((15.0..25.0).contains(&mean), "mean length {mean}");
}

#[test]
fn another_seed_is_another_model() {
    let other = SimConfig { seed: 1, ..config(u32::MAX) };
    let tokens = prompt(17);
    let (ours, theirs) = (oracle(&config(0), &model(), &tokens, 20), oracle(&other, &model(), &tokens, 20));
    let equal = ours.iter().zip(&theirs).filter(|(a, b)| a == b).count();
    assert!(equal < 5, "{equal} of 20 tokens are equal");
    let arena = arena(KvLayout::Hnd, Dtype::Bf16, 8);
    pass(&mut Sim::new(config(u32::MAX), model()), &arena, &table(3), &tokens[..16], 0).unwrap();
    let error = pass(&mut Sim::new(other.clone(), model()), &arena, &table(3), &tokens, 16).unwrap_err();
    assert!(matches!(error, ExecuteError::CorruptKv { position: 0, .. }), "{error}");
    let out = pass(&mut Sim::new(other, model()), &arena, &table(3), &tokens, 0).unwrap();
    assert!(out.logits[theirs[0] as usize] >= 60.0);
}

#[test]
fn time_follows_the_model() {
    let config = SimConfig {
        prefill_base_us: 100.0,
        prefill_per_token_us: 2.0,
        prefill_per_pair_ns: 1000.0,
        decode_base_us: 10.0,
        decode_per_sequence_us: 3.0,
        decode_per_context_token_ns: 500.0,
        ..SimConfig::default()
    };
    let item = |start, tokens| BatchItem { context: &[], tokens, start, blocks: &[], logits: true };
    let us = Duration::from_micros;
    assert_eq!(config.modelled(&[]), us(0));
    assert_eq!(config.modelled(&[item(4, &[1, 2])]), us(100 + 2 * 2 + 5 + 6));
    assert_eq!(config.modelled(&[item(4, &[1]), item(6, &[1])]), us(10 + 2 * 3 + 2 + 3));
    assert_eq!(config.modelled(&[item(4, &[1]), item(0, &[1, 2])]), us(10 + 3 + 2 + 100 + 4 + 3));
    let nonsense = SimConfig { prefill_base_us: f64::NAN, ..config };
    assert_eq!(nonsense.modelled(&[item(0, &[1, 2])]), us(0));
}

#[test]
fn malformed_items_are_refused() {
    let (arena, mut sim) = (arena(KvLayout::Nhd, Dtype::F32, 8), Sim::new(config(9), model()));
    let good = BatchItem { context: &[1], tokens: &[2], start: 1, blocks: &table(1), logits: true };
    let bad = [
        BatchItem { tokens: &[], ..good },
        BatchItem { start: 2, ..good },
        BatchItem { tokens: &[97], ..good },
        BatchItem { tokens: &[2; 1000], blocks: &table(200), ..good },
        BatchItem { tokens: &[2; 8], ..good },
        BatchItem { blocks: &[BlockId(64)], ..good },
    ];
    for item in bad {
        let error = sim.forward(&arena, &[good, item], &mut Forward::default()).unwrap_err();
        assert!(matches!(error, ExecuteError::Malformed { item: 1, .. }));
    }
}

#[test]
fn unchecked_tokens_are_named_without_logits_and_follow_the_oracle() {
    let config = SimConfig { check_kv: false, ..config(u32::MAX) };
    let (arena, mut sim) = (arena(KvLayout::Nhd, Dtype::F32, 8), Sim::new(config.clone(), model()));
    let mut tokens = prompt(20);
    let expected = oracle(&config, &model(), &tokens, 10);
    for next in &expected {
        // Zeroes are no rows of this sequence, and nobody looks.
        let out = pass(&mut sim, &arena, &table(4), &tokens, tokens.len() - 1).unwrap();
        assert_eq!((out.logits.len(), out.tokens.as_slice()), (0, [*next].as_slice()));
        assert!(out.modelled > Duration::ZERO);
        tokens.push(*next);
    }
    let distinct: std::collections::HashSet<_> = expected.iter().collect();
    assert!(distinct.len() > 5, "{expected:?}");
}
