//! AVX2 + FMA kernels: 8 columns a register, up to 3 rows by 32 columns in 12 accumulators.

use std::arch::x86_64::{
    __m256, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_load_ps,
    _mm256_load_si256, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32,
    _mm256_store_ps,
};

use super::{Format, Line, PANEL, Tile, Work};

/// # Safety
/// The features of [`super::Level::Avx2`] must be present.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run()
}

/// # Safety
/// The pointers of `tile` must be valid for its shape and the features of [`super::Level::Avx2`] present.
pub(super) unsafe fn tile(tile: &Tile) {
    let kernel = match (tile.format, tile.rows) {
        (Format::F32, 1) => accumulate::<1, false>,
        (Format::F32, 2) => accumulate::<2, false>,
        (Format::F32, _) => accumulate::<3, false>,
        (Format::Bf16, 1) => accumulate::<1, true>,
        (Format::Bf16, 2) => accumulate::<2, true>,
        (Format::Bf16, _) => accumulate::<3, true>,
    };
    for half in 0..tile.width / 32 {
        // SAFETY: passed on from the caller; `rows` is at most 3 and `half` a 32-column half of the panel.
        unsafe { kernel(tile, half) };
    }
}

/// # Safety
/// As [`tile`], with `tile.rows == ROWS` and `tile.format` as `PAIRS` says; columns `32 * half..` must exist.
#[target_feature(enable = "avx2,fma")]
unsafe fn accumulate<const ROWS: usize, const PAIRS: bool>(tile: &Tile, half: usize) {
    let mut sums = [[_mm256_setzero_ps(); 4]; ROWS];
    let per_half = if PAIRS { 1 } else { 2 };
    let mut lines = tile.lines.wrapping_add(half * per_half);
    let mut left = tile.left.cast::<f32>();
    let mut remaining = tile.depth;
    while remaining > 0 {
        let terms = remaining.min(PANEL);
        for k in 0..terms {
            // SAFETY: `lines` holds the 32 columns of this half for each of `depth` terms.
            let weights: [__m256; 4] = unsafe { load::<PAIRS>(lines) };
            lines = lines.wrapping_add(tile.width / 32 * per_half);
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
            let at = unsafe { tile.out.cast::<f32>().add(row * PANEL + half * 32 + v * 8) };
            // SAFETY: as above.
            let sum = if tile.add { _mm256_add_ps(unsafe { _mm256_load_ps(at) }, sum) } else { sum };
            // SAFETY: as above.
            unsafe { _mm256_store_ps(at, sum) };
        }
    }
}

/// Loads 32 columns in order.
///
/// # Safety
/// `lines` must be valid for one line of PAIRS or two of f32.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn load<const PAIRS: bool>(lines: *const Line) -> [__m256; 4] {
    let at = lines.cast::<f32>();
    if PAIRS {
        let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        // SAFETY: the first and second half of one line.
        let (first, second) = unsafe { (_mm256_load_si256(at.cast()), _mm256_load_si256(at.add(8).cast())) };
        [
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(first)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(second)),
            _mm256_castsi256_ps(_mm256_and_si256(first, high)),
            _mm256_castsi256_ps(_mm256_and_si256(second, high)),
        ]
    } else {
        // SAFETY: the four quarters of two lines.
        unsafe {
            [
                _mm256_load_ps(at),
                _mm256_load_ps(at.add(8)),
                _mm256_load_ps(at.add(16)),
                _mm256_load_ps(at.add(24)),
            ]
        }
    }
}
