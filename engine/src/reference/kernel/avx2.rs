//! AVX2 + FMA kernels: 8 columns a register, up to 3 rows by 32 columns in 12 accumulators.

use std::arch::x86_64::{
    __m256, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_load_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_slli_epi32, _mm256_store_ps,
};

use super::{Format, PANEL, Tile, Work};

/// # Safety
/// The features of [`super::Level::Avx2`] must be present.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run()
}

/// # Safety
/// The pointers of `tile` must be valid for its shape and the features of [`super::Level::Avx2`] present.
pub(super) unsafe fn tile(tile: &Tile<'_>) {
    macro_rules! by_rows {
        ($vectors:literal, $pairs:literal) => {
            match tile.rows {
                1 => accumulate::<1, $vectors, $pairs>,
                2 => accumulate::<2, $vectors, $pairs>,
                _ => accumulate::<3, $vectors, $pairs>,
            }
        };
    }
    let width = 16 * tile.right.vectors;
    for first in (0..width).step_by(32) {
        let kernel = match tile.right.format {
            Format::Bf16 => by_rows!(4, true),
            Format::F32 if width - first < 32 => by_rows!(2, false),
            Format::F32 => by_rows!(4, false),
        };
        // SAFETY: passed on from the caller; `rows` is at most 3 and columns `first..` exist.
        unsafe { kernel(tile, first) };
    }
}

/// # Safety
/// As [`tile`], with `tile.rows == ROWS` and the format as `PAIRS` says; 8 VECTORS columns must exist from
/// `first` on.
#[target_feature(enable = "avx2,fma")]
unsafe fn accumulate<const ROWS: usize, const VECTORS: usize, const PAIRS: bool>(
    tile: &Tile<'_>,
    first: usize,
) {
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    let stride = tile.right.stride;
    let mut words = tile.right.words.wrapping_add(if PAIRS { first / 2 } else { first });
    let mut left = tile.left.cast::<f32>();
    let mut remaining = tile.right.depth;
    while remaining > 0 {
        let terms = remaining.min(PANEL);
        for k in 0..terms {
            // SAFETY: one of `depth` rows, from column `first` on.
            let weights: [__m256; VECTORS] = unsafe { load::<VECTORS, PAIRS>(words) };
            words = words.wrapping_add(stride);
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `left` has ROWS rows of PANEL numbers here.
                let x = _mm256_set1_ps(unsafe { *left.add(row * PANEL + k) });
                for (sum, &weight) in sums.iter_mut().zip(&weights) {
                    *sum = _mm256_fmadd_ps(x, weight, *sum);
                }
            }
        }
        remaining -= terms;
        left = left.wrapping_add(tile.left_rows * PANEL);
    }
    for (row, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            // SAFETY: `out` has ROWS rows of PANEL numbers, each on a 64-byte boundary.
            let at = unsafe { tile.out.cast::<f32>().add(row * PANEL + first + v * 8) };
            // SAFETY: as above.
            let sum = if tile.add { _mm256_add_ps(unsafe { _mm256_load_ps(at) }, sum) } else { sum };
            // SAFETY: as above.
            unsafe { _mm256_store_ps(at, sum) };
        }
    }
}

/// Loads 8 VECTORS columns in order; PAIRS come 32 columns at a time.
///
/// # Safety
/// `words` must be valid for 8 VECTORS f32, or for 16 words of PAIRS.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn load<const VECTORS: usize, const PAIRS: bool>(words: *const u32) -> [__m256; VECTORS] {
    let mut weights = [_mm256_setzero_ps(); VECTORS];
    if PAIRS {
        let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        for half in 0..2 {
            // SAFETY: the first or second half of one line.
            let pairs = unsafe { _mm256_loadu_si256(words.add(8 * half).cast()) };
            weights[half] = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
            weights[half + 2] = _mm256_castsi256_ps(_mm256_and_si256(pairs, high));
        }
    } else {
        for (v, weights) in weights.iter_mut().enumerate() {
            // SAFETY: passed on from the caller.
            *weights = unsafe { _mm256_loadu_ps(words.add(8 * v).cast()) };
        }
    }
    weights
}
