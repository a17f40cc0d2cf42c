//! xxh3 of the lengths that blocks have.
//!
//! A decision hashes every block of a prompt, each seeded with the one before, so nothing hides the time of one. The crate that
//! hashes everything else takes several times as long for inputs so short; here lengths are words, and nothing is copied.

/// The first words of xxh3's default secret.
const SECRET: [u64; 16] = [
    0xBE4B_A423_396C_FEB8,
    0x1CAD_21F7_2C81_017C,
    0xDB97_9083_E96D_D4DE,
    0x1F67_B3B7_A4A4_4072,
    0x78E5_C0CC_4EE6_79CB,
    0x2172_FFCC_7DD0_5A82,
    0x8E24_43F7_7446_08B8,
    0x4C26_3A81_E690_35E0,
    0xCB00_C391_BB52_283C,
    0xA32E_531B_8B65_D088,
    0x4EF9_0DA2_9748_6471,
    0xD8AC_DEA9_46EF_1938,
    0x3F34_9CE3_3F76_FAA8,
    0x1D4F_0BC7_C7BB_DCF9,
    0x3159_B4CD_4BE0_518A,
    0x6473_78D9_C97E_9FC8,
];

const PRIME: u64 = 0x9E37_79B1_85EB_CA87;
const AVALANCHE: u64 = 0x1656_6791_9E37_79F9;

/// Tokens of which [`short`] makes a hash: 32 to 128 bytes, in steps of 16.
pub(super) fn is_short(tokens: usize) -> bool {
    (8..=32).contains(&tokens) && tokens.is_multiple_of(4)
}

/// `XXH3_64bits_withSeed` of the little-endian bytes of so many tokens as [`is_short`] allows.
///
/// Source: the branch for 17 to 128 bytes of <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>.
#[inline]
pub(super) fn short(seed: u64, tokens: &[u32]) -> u64 {
    let count = tokens.len();
    let mut sum = (4 * count as u64).wrapping_mul(PRIME);
    let mut mix = |at: usize, secret: usize| sum = sum.wrapping_add(mixed(seed, &tokens[at..at + 4], secret));
    if count > 24 {
        mix(12, 12);
        mix(count - 16, 14);
    }
    if count > 16 {
        mix(8, 8);
        mix(count - 12, 10);
    }
    if count > 8 {
        mix(4, 4);
        mix(count - 8, 6);
    }
    mix(0, 0);
    mix(count - 4, 2);
    sum ^= sum >> 37;
    sum = sum.wrapping_mul(AVALANCHE);
    sum ^ (sum >> 32)
}

/// Sixteen bytes with two words of the secret.
#[inline]
fn mixed(seed: u64, tokens: &[u32], secret: usize) -> u64 {
    let word = |at: usize| u64::from(tokens[at]) | u64::from(tokens[at + 1]) << 32;
    let low = word(0) ^ SECRET[secret].wrapping_add(seed);
    let high = word(2) ^ SECRET[secret + 1].wrapping_sub(seed);
    let product = u128::from(low) * u128::from(high);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use twox_hash::XxHash3_64;

    use super::*;

    proptest! {
        #[test]
        fn it_is_xxh3(seed: u64, tokens in proptest::collection::vec(any::<u32>(), 32)) {
            for count in (0..=32).filter(|count| is_short(*count)) {
                let bytes: Vec<u8> = tokens[..count].iter().flat_map(|token| token.to_le_bytes()).collect();
                prop_assert_eq!(short(seed, &tokens[..count]), XxHash3_64::oneshot_with_seed(seed, &bytes));
            }
        }
    }
}
