use super::*;
use crate::agent::RegionId;
use crate::session::Descriptor;

fn blocks(lens: &[u32]) -> Vec<BlockRead> {
    let read = |len: &u32| BlockRead {
        source: Descriptor { region: RegionId(1), offset: 0, len: *len },
        to: 0,
        expected: None,
    };
    lens.iter().map(read).collect()
}

#[test]
fn stripes_cover_every_block_once_in_order() {
    let mib = 1 << 20;
    for (lens, streams, expected) in [
        (vec![4096; 64], 4, 1),
        (vec![mib; 32], 2, 2),
        (vec![mib; 32], 8, 4),
        (vec![64 * mib], 4, 1),
        (vec![1, 64 * mib, 1, 64 * mib], 4, 2),
        (vec![64 * mib, 1, 1, 1], 4, 2),
    ] {
        let blocks = blocks(&lens);
        let stripes = plan_stripes(blocks.iter().map(|read| read.source.len), streams);
        let covered: Vec<usize> = stripes.iter().cloned().flatten().collect();
        assert_eq!(covered, (0..blocks.len()).collect::<Vec<_>>(), "{stripes:?}");
        assert_eq!(stripes.len(), expected, "{lens:?} over {streams}: {stripes:?}");
        assert!(stripes.iter().all(|stripe| !stripe.is_empty()));
    }
}

#[test]
fn even_blocks_are_shared_out_evenly() {
    assert_eq!(plan_stripes(blocks(&[1 << 20; 32]).iter().map(|read| read.source.len), 2), [0..16, 16..32]);
}
