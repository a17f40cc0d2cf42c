use super::*;

#[test]
fn what_cannot_be_reconciled_is_refused_with_both_geometries() {
    let a = example(16, KvLayout::Nhd, Dtype::Bf16);
    let fp8 = KvGeometry { dtype: Dtype::Fp8E4m3, scales: Scales::Block, ..a };
    let latent = KvGeometry { attention: Attention::Latent, kv_heads: 1, ..a };
    let cases = [
        (a, KvGeometry { layers: 31, ..a }, Mismatch::Layers),
        (a, KvGeometry { kv_heads: 4, ..a }, Mismatch::Heads),
        (a, KvGeometry { head_dim: 64, ..a }, Mismatch::HeadDim),
        (a, latent, Mismatch::Attention),
        (rank(a, 0, 2), rank(a, 1, 2), Mismatch::NoCommonHead),
        (rank(a, 0, 2), fp8, Mismatch::Scales),
        (rank(fp8, 1, 4), rank(fp8, 1, 2), Mismatch::NoCommonHead),
        (rank(fp8, 1, 4), rank(fp8, 0, 2), Mismatch::Scales),
        (rank(fp8, 1, 4), fp8, Mismatch::Scales),
    ];
    for (a, b, reason) in cases {
        let error = RelayoutPlan::new(a, b).unwrap_err();
        assert_eq!(error, PlanError::Geometry { source_geometry: a, dest: b, reason });
        let text = error.to_string();
        assert!(text.contains(&a.to_string()) && text.contains(&b.to_string()), "{text}");
        assert!(text.ends_with(&reason.to_string()), "{text}");
    }
    let head = KvGeometry { scales: Scales::Head, ..fp8 };
    assert!(RelayoutPlan::new(rank(a, 0, 2), head).is_ok(), "a scale per head fits any part");
}

#[test]
fn impossible_geometries_are_refused_before_any_arithmetic_overflows() {
    let good = example(16, KvLayout::Nhd, Dtype::F32);
    let all = u32::MAX;
    for bad in [
        KvGeometry { layers: 0, ..good },
        KvGeometry { head_dim: 0, ..good },
        KvGeometry { block_tokens: 0, ..good },
        KvGeometry { block_tokens: all, ..good },
        KvGeometry { layers: all, kv_heads: all, head_dim: all, block_tokens: all, ..good },
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

#[test]
#[should_panic(expected = "assemble them")]
fn a_scatter_into_scales_of_several_blocks_is_a_bug() {
    let source = KvGeometry { layers: 1, ..example(16, KvLayout::Nhd, Dtype::Bf16) };
    let dest = KvGeometry { dtype: Dtype::Fp8E4m3, scales: Scales::Head, ..source };
    let plan = RelayoutPlan::new(source, dest).unwrap();
    let to = HostMemory::allocate(dest.block_bytes(), "block").unwrap();
    plan.scatter(0, &blocks(&source, 1, 1)[0], 0..16, &to, |_| dest.packed_at(0));
}
