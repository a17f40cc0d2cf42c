use super::*;

const SEED: DigestSeed = DigestSeed { handoff: HandoffId(7), epoch: Epoch(3), index: 1 };

#[test]
fn pieces_of_any_size_give_the_digest_of_the_whole() {
    let bytes: Vec<u8> = (0..70_001u32).map(|i| ((i * 31) >> 3) as u8).collect();
    for len in [0, 1, 16, 17, 240, 241, 1024, 65_536, bytes.len()] {
        let whole = block_digest(SEED, &bytes[..len]);
        for piece in [1, 63, 64, 1000, 16 << 10] {
            let mut digest = BlockDigest::new(SEED);
            bytes[..len].chunks(piece).for_each(|piece| digest.update(piece));
            assert_eq!(digest.finish(), whole, "{len} bytes in pieces of {piece}");
            let mut again = BlockDigest::new(DigestSeed { index: 2, ..SEED });
            again.update(&bytes[..len / 2 + 900]);
            again.restart(SEED);
            bytes[..len].chunks(piece).for_each(|piece| again.update(piece));
            assert_eq!(again.finish(), whole, "{len} bytes in pieces of {piece}, in the place of others");
        }
    }
}

/// The specification's other implementation, at every length around a change of formula.
#[test]
fn digests_are_xxh3() {
    let bytes: Vec<u8> = (0..5000u32).map(|i| ((i * i) >> 5) as u8).collect();
    for len in (0..1400).chain([2047, 2048, 2049, 4096, 5000]) {
        assert_eq!(
            block_digest(SEED, &bytes[..len]),
            XxHash3_64::oneshot_with_seed(SEED.fold(), &bytes[..len]),
            "{len}"
        );
    }
}

#[test]
#[expect(unsafe_code, reason = "calls the copying form on plain vectors")]
fn copying_digests_what_it_copies() {
    let bytes: Vec<u8> = (0..9000u32).map(|i| ((i * 7) >> 2) as u8).collect();
    for len in (0..1400).chain([2047, 2048, 2049, 4096, 4097, 9000]) {
        let mut copy = vec![0; len];
        // SAFETY: both are vectors of their own and as long as said.
        let digest = unsafe { copy_digesting(SEED, bytes.as_ptr(), copy.as_mut_ptr(), len) };
        assert_eq!(copy, bytes[..len], "{len}");
        assert_eq!(digest, XxHash3_64::oneshot_with_seed(SEED.fold(), &bytes[..len]), "{len}");
    }
}

#[test]
fn seeds_are_xxh3() {
    for index in [0, 1, 77, u32::MAX] {
        let seed = DigestSeed { handoff: HandoffId(u128::MAX / 3), epoch: Epoch(1 << 40), index };
        let mut bytes = seed.handoff.0.to_le_bytes().to_vec();
        bytes.extend(seed.epoch.0.to_le_bytes());
        bytes.extend(index.to_le_bytes());
        assert_eq!(seed.fold(), XxHash3_64::oneshot(&bytes));
    }
}

#[test]
fn a_digest_is_bound_to_handoff_epoch_index_and_bytes() {
    let bytes = [5u8; 4096];
    let digest = block_digest(SEED, &bytes);
    assert_ne!(digest, block_digest(DigestSeed { handoff: HandoffId(8), ..SEED }, &bytes));
    assert_ne!(digest, block_digest(DigestSeed { epoch: Epoch(4), ..SEED }, &bytes));
    assert_ne!(digest, block_digest(DigestSeed { index: 2, ..SEED }, &bytes));
    let mut flipped = bytes;
    flipped[4095] ^= 1;
    assert_ne!(digest, block_digest(SEED, &flipped));
    assert_ne!(digest, block_digest(SEED, &bytes[..4095]));
}

/// The value is part of the contract between workers of different builds.
#[test]
fn the_digest_of_known_bytes_is_pinned() {
    assert_eq!(block_digest(SEED, b"baton"), 14_147_405_592_245_682_716);
}
