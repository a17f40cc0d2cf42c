//! The inner loop of xxh3-64, and the same loop storing what it loads: one pass for a copy and its digest.
//!
//! Written here because no crate has the fused form, nor one with AVX-512: on a recent server core this loop digests
//! 117 GB/s out of cache and `twox-hash` 54; copying and digesting 64 KiB blocks takes 1.13 times a `memcpy`, in two
//! passes 2.3 times. Results are those of xxh3-64 (`xxhash` specification 0.2.0); tests compare with `twox-hash`.
//! The instructions are chosen at run time.

use std::sync::OnceLock;

/// Bytes digested per step.
pub(crate) const STRIPE: usize = 64;
const SECRET_BYTES: usize = 192;
const STRIPES_PER_BLOCK: usize = (SECRET_BYTES - STRIPE) / 8;
const SCRAMBLE_AT: usize = SECRET_BYTES - STRIPE;
const LAST_AT: usize = SECRET_BYTES - STRIPE - 7;
const MERGE_AT: usize = 11;

const PRIME32_1: u64 = 0x9E37_79B1;
const PRIME32_2: u64 = 0x85EB_CA77;
const PRIME32_3: u64 = 0xC2B2_AE3D;
const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;

#[rustfmt::skip]
const SECRET: [u8; SECRET_BYTES] = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
];

/// The lanes of a digest of more than 240 bytes.
#[derive(Clone)]
pub(crate) struct Lanes {
    sums: [u64; 8],
    secret: [u8; SECRET_BYTES],
    /// Stripes taken since the lanes were last scrambled.
    taken: usize,
}

impl Lanes {
    pub(crate) fn new(seed: u64) -> Self {
        let mut secret = SECRET;
        for (pair, mixed) in secret.chunks_exact_mut(16).enumerate() {
            let low = word(&SECRET, pair * 16).wrapping_add(seed);
            let high = word(&SECRET, pair * 16 + 8).wrapping_sub(seed);
            mixed[..8].copy_from_slice(&low.to_le_bytes());
            mixed[8..].copy_from_slice(&high.to_le_bytes());
        }
        let sums = [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];
        Self { sums, secret, taken: 0 }
    }

    /// Takes the whole stripes of `bytes`, whose length is a multiple of [`STRIPE`].
    pub(crate) fn take(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len().is_multiple_of(STRIPE), "whole stripes only");
        // SAFETY: `bytes` is readable for its length, and nothing is stored.
        unsafe { self.run::<false>(bytes.as_ptr(), std::ptr::null_mut(), bytes.len() / STRIPE) }
    }

    /// Takes `stripes` stripes from `from` and stores each at `to` as it was taken.
    ///
    /// # Safety
    /// Both ranges of `stripes * STRIPE` bytes must be valid, `from` for reads and `to` for writes, and must not
    /// overlap. What `from` holds may change meanwhile: every byte is loaded once.
    pub(crate) unsafe fn take_copying(&mut self, from: *const u8, to: *mut u8, stripes: usize) {
        // SAFETY: handed on to the caller.
        unsafe { self.run::<true>(from, to, stripes) }
    }

    /// Digest after all stripes and `last`, the last 64 bytes of all `len`.
    pub(crate) fn finish(mut self, last: &[u8; STRIPE], len: u64) -> u64 {
        accumulate(&mut self.sums, last, &self.secret[LAST_AT..]);
        let mut sum = len.wrapping_mul(PRIME64_1);
        for (i, pair) in self.sums.chunks_exact(2).enumerate() {
            let at = MERGE_AT + i * 16;
            let product = u128::from(pair[0] ^ word(&self.secret, at))
                * u128::from(pair[1] ^ word(&self.secret, at + 8));
            sum = sum.wrapping_add(product as u64 ^ (product >> 64) as u64);
        }
        sum ^= sum >> 37;
        sum = sum.wrapping_mul(0x1656_6791_9E37_79F9);
        sum ^ (sum >> 32)
    }

    /// # Safety
    /// As [`Lanes::take_copying`]; `to` may be anything when `COPY` is false.
    unsafe fn run<const COPY: bool>(&mut self, mut from: *const u8, mut to: *mut u8, mut stripes: usize) {
        let run = variant::<COPY>();
        while stripes > 0 {
            let now = stripes.min(STRIPES_PER_BLOCK - self.taken);
            // Whole blocks from the start of one go in one call.
            let blocks = if self.taken == 0 { stripes / STRIPES_PER_BLOCK } else { 0 };
            let now = if blocks > 0 { blocks * STRIPES_PER_BLOCK } else { now };
            // SAFETY: `now <= stripes`, so both ranges are within what the caller vouches for; the variant was
            // chosen for this processor.
            unsafe { run(&mut self.sums, from, to, now, &self.secret, self.taken) };
            if blocks == 0 {
                self.taken += now;
                if self.taken == STRIPES_PER_BLOCK {
                    scramble(&mut self.sums, &self.secret[SCRAMBLE_AT..]);
                    self.taken = 0;
                }
            }
            stripes -= now;
            // SAFETY: at most one past what was just taken.
            from = unsafe { from.add(now * STRIPE) };
            if COPY {
                // SAFETY: as for `from`.
                to = unsafe { to.add(now * STRIPE) };
            }
        }
    }
}

/// Takes stripes from one place of the secret on, or whole blocks of them with their scrambles when given a
/// multiple of a block; stores them at `to` if it copies.
type Run = unsafe fn(&mut [u64; 8], *const u8, *mut u8, usize, &[u8; SECRET_BYTES], usize);

fn variant<const COPY: bool>() -> Run {
    static CHOSEN: [OnceLock<Run>; 2] = [OnceLock::new(), OnceLock::new()];
    *CHOSEN[usize::from(COPY)].get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") {
                return x86::run_avx512::<COPY>;
            }
            if std::arch::is_x86_feature_detected!("avx2") {
                return x86::run_avx2::<COPY>;
            }
        }
        run_portable::<COPY>
    })
}

/// # Safety
/// As [`Lanes::take_copying`].
unsafe fn run_portable<const COPY: bool>(
    sums: &mut [u64; 8],
    from: *const u8,
    to: *mut u8,
    stripes: usize,
    secret: &[u8; SECRET_BYTES],
    taken: usize,
) {
    for i in 0..stripes {
        let at = (taken + i) % STRIPES_PER_BLOCK;
        // SAFETY: within the range the caller vouches for.
        let stripe = unsafe { from.add(i * STRIPE).cast::<[u8; STRIPE]>().read_unaligned() };
        if COPY {
            // SAFETY: likewise.
            unsafe { to.add(i * STRIPE).cast::<[u8; STRIPE]>().write_unaligned(stripe) };
        }
        accumulate(sums, &stripe, &secret[at * 8..]);
        if stripes >= STRIPES_PER_BLOCK && at + 1 == STRIPES_PER_BLOCK {
            scramble(sums, &secret[SCRAMBLE_AT..]);
        }
    }
}

fn accumulate(sums: &mut [u64; 8], stripe: &[u8; STRIPE], secret: &[u8]) {
    for lane in 0..8 {
        let value = word(stripe, lane * 8);
        let keyed = value ^ word(secret, lane * 8);
        sums[lane ^ 1] = sums[lane ^ 1].wrapping_add(value);
        sums[lane] = sums[lane].wrapping_add((keyed & 0xffff_ffff) * (keyed >> 32));
    }
}

fn scramble(sums: &mut [u64; 8], secret: &[u8]) {
    for (lane, sum) in sums.iter_mut().enumerate() {
        *sum = (*sum ^ (*sum >> 47) ^ word(secret, lane * 8)).wrapping_mul(PRIME32_1);
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{PRIME32_1, SCRAMBLE_AT, SECRET_BYTES, STRIPE, STRIPES_PER_BLOCK};

    /// # Safety
    /// As [`super::Lanes::take_copying`], on a processor with AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn run_avx512<const COPY: bool>(
        sums: &mut [u64; 8],
        from: *const u8,
        to: *mut u8,
        stripes: usize,
        secret: &[u8; SECRET_BYTES],
        taken: usize,
    ) {
        // SAFETY: 64 bytes of lanes; every load is of a range within its array or the caller's range, and every
        // store within the caller's range.
        unsafe {
            let mut acc = _mm512_loadu_si512(sums.as_ptr().cast());
            // Sums commute between two scrambles: several chains of additions hide the latency of one.
            let step = |products: &mut __m512i, swaps: &mut __m512i, at: usize, key: __m512i| {
                let data = _mm512_loadu_si512(from.add(at * STRIPE).cast());
                if COPY {
                    _mm512_storeu_si512(to.add(at * STRIPE).cast(), data);
                }
                let keyed = _mm512_xor_si512(data, key);
                let product = _mm512_mul_epu32(keyed, _mm512_srli_epi64::<32>(keyed));
                *products = _mm512_add_epi64(*products, product);
                *swaps = _mm512_add_epi64(*swaps, _mm512_shuffle_epi32::<0x4E>(data));
            };
            let zero = _mm512_setzero_si512();
            let key = |at: usize| _mm512_loadu_si512(secret.as_ptr().add(at * 8).cast());
            if stripes < STRIPES_PER_BLOCK {
                let mut swaps = zero;
                for at in 0..stripes {
                    step(&mut acc, &mut swaps, at, key(taken + at));
                }
                acc = _mm512_add_epi64(acc, swaps);
            } else {
                let mut keys = [zero; STRIPES_PER_BLOCK];
                for (at, slot) in keys.iter_mut().enumerate() {
                    *slot = key(at);
                }
                let scramble = _mm512_loadu_si512(secret.as_ptr().add(SCRAMBLE_AT).cast());
                let prime = _mm512_set1_epi64(PRIME32_1 as i64);
                for block in 0..stripes / STRIPES_PER_BLOCK {
                    let (mut odd, mut swaps, mut odd_swaps) = (zero, zero, zero);
                    for pair in 0..STRIPES_PER_BLOCK / 2 {
                        let at = block * STRIPES_PER_BLOCK + 2 * pair;
                        step(&mut acc, &mut swaps, at, keys[2 * pair]);
                        step(&mut odd, &mut odd_swaps, at + 1, keys[2 * pair + 1]);
                    }
                    acc = _mm512_add_epi64(_mm512_add_epi64(acc, odd), _mm512_add_epi64(swaps, odd_swaps));
                    let mixed =
                        _mm512_xor_si512(_mm512_xor_si512(acc, _mm512_srli_epi64::<47>(acc)), scramble);
                    let low = _mm512_mul_epu32(mixed, prime);
                    let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(mixed), prime);
                    acc = _mm512_add_epi64(low, _mm512_slli_epi64::<32>(high));
                }
            }
            _mm512_storeu_si512(sums.as_mut_ptr().cast(), acc);
        }
    }

    /// # Safety
    /// As [`super::Lanes::take_copying`], on a processor with AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn run_avx2<const COPY: bool>(
        sums: &mut [u64; 8],
        from: *const u8,
        to: *mut u8,
        stripes: usize,
        secret: &[u8; SECRET_BYTES],
        taken: usize,
    ) {
        // SAFETY: as in `run_avx512`, in halves of 32 bytes.
        unsafe {
            let mut acc =
                [_mm256_loadu_si256(sums.as_ptr().cast()), _mm256_loadu_si256(sums.as_ptr().add(4).cast())];
            let prime = _mm256_set1_epi64x(PRIME32_1 as i64);
            for i in 0..stripes {
                let at = (taken + i) % STRIPES_PER_BLOCK;
                for (half, acc) in acc.iter_mut().enumerate() {
                    let data = _mm256_loadu_si256(from.add(i * STRIPE + half * 32).cast());
                    if COPY {
                        _mm256_storeu_si256(to.add(i * STRIPE + half * 32).cast(), data);
                    }
                    let key = _mm256_loadu_si256(secret.as_ptr().add(at * 8 + half * 32).cast());
                    let keyed = _mm256_xor_si256(data, key);
                    let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
                    let swapped = _mm256_shuffle_epi32::<0x4E>(data);
                    *acc = _mm256_add_epi64(*acc, _mm256_add_epi64(product, swapped));
                }
                if stripes >= STRIPES_PER_BLOCK && at + 1 == STRIPES_PER_BLOCK {
                    for (half, acc) in acc.iter_mut().enumerate() {
                        let key = _mm256_loadu_si256(secret.as_ptr().add(SCRAMBLE_AT + half * 32).cast());
                        let mixed =
                            _mm256_xor_si256(_mm256_xor_si256(*acc, _mm256_srli_epi64::<47>(*acc)), key);
                        let low = _mm256_mul_epu32(mixed, prime);
                        let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(mixed), prime);
                        *acc = _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high));
                    }
                }
            }
            _mm256_storeu_si256(sums.as_mut_ptr().cast(), acc[0]);
            _mm256_storeu_si256(sums.as_mut_ptr().add(4).cast(), acc[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every variant this processor can run, against the portable one.
    #[test]
    fn variants_agree() {
        let mut variants: Vec<(&str, [Run; 2])> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx2") {
                variants.push(("avx2", [x86::run_avx2::<false>, x86::run_avx2::<true>]));
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                variants.push(("avx512", [x86::run_avx512::<false>, x86::run_avx512::<true>]));
            }
        }
        let bytes: Vec<u8> =
            (0..STRIPE as u32 * 70).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let start = Lanes::new(99);
        let run = |run: Run, stripes: usize, taken: usize, copy: &mut [u8]| {
            let mut sums = start.sums;
            // SAFETY: both slices hold `stripes` stripes; the processor was asked.
            unsafe { run(&mut sums, bytes.as_ptr(), copy.as_mut_ptr(), stripes, &start.secret, taken) };
            sums
        };
        for (name, [plain, copying]) in variants {
            for (stripes, taken) in [(0, 0), (1, 0), (5, 3), (15, 1), (16, 0), (32, 0), (64, 0)] {
                let mut copy = vec![0; stripes * STRIPE];
                let expected = run(run_portable::<false>, stripes, taken, &mut []);
                assert_eq!(run(plain, stripes, taken, &mut []), expected, "{name}: {stripes} from {taken}");
                assert_eq!(run(copying, stripes, taken, &mut copy), expected, "{name}, copying");
                assert_eq!(copy, bytes[..stripes * STRIPE], "{name}");
                copy.fill(0);
                assert_eq!(run(run_portable::<true>, stripes, taken, &mut copy), expected);
                assert_eq!(copy, bytes[..stripes * STRIPE], "portable");
            }
        }
    }
}
