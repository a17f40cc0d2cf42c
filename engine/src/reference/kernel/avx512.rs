//! AVX-512 kernels: 16 columns a register, up to 6 rows by 64 columns in 24 accumulators.

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps, _mm512_fmadd_ps, _mm512_load_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutex2var_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setr_epi32, _mm512_setzero_ps, _mm512_shuffle_f32x4, _mm512_slli_epi32, _mm512_store_ps,
    _mm512_unpackhi_ps, _mm512_unpacklo_ps,
};

use super::{Format, Line, PANEL, Tile, Work};

/// # Safety
/// The features of [`super::Level::Avx512`] must be present.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run()
}

/// # Safety
/// The pointers of `tile` must be valid for its shape and the features of [`super::Level::Avx512`] present.
pub(super) unsafe fn tile(tile: &Tile<'_>) {
    macro_rules! by_rows {
        ($vectors:literal, $format:ident) => {
            match tile.rows {
                1 => accumulate::<1, $vectors, { $format }>,
                2 => accumulate::<2, $vectors, { $format }>,
                3 => accumulate::<3, $vectors, { $format }>,
                4 => accumulate::<4, $vectors, { $format }>,
                5 => accumulate::<5, $vectors, { $format }>,
                _ => accumulate::<6, $vectors, { $format }>,
            }
        };
    }
    let kernel = match (tile.right.vectors, tile.right.format) {
        (1, _) => by_rows!(1, F32),
        (2, Format::F32) => by_rows!(2, F32),
        (2, Format::Bf16) => by_rows!(2, BF16),
        (3, _) => by_rows!(3, F32),
        (_, Format::F32) => by_rows!(4, F32),
        (_, Format::Bf16) => by_rows!(4, BF16),
    };
    // SAFETY: passed on from the caller; `rows` is at most 6.
    unsafe { kernel(tile) }
}

const F32: bool = false;
const BF16: bool = true;

/// # Safety
/// As [`tile`], with `tile.rows == ROWS`, `tile.right.vectors == VECTORS` and its format as `PAIRS` says.
#[target_feature(enable = "avx512f")]
unsafe fn accumulate<const ROWS: usize, const VECTORS: usize, const PAIRS: bool>(tile: &Tile<'_>) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    let stride = tile.right.stride;
    let mut words = tile.right.words;
    let mut left = tile.left.cast::<f32>();
    let mut remaining = tile.right.depth;
    while remaining > 0 {
        let terms = remaining.min(PANEL);
        for k in 0..terms {
            // SAFETY: one of `depth` rows of VECTORS registers.
            let weights: [__m512; VECTORS] = unsafe { load::<VECTORS, PAIRS>(words) };
            words = words.wrapping_add(stride);
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `left` has ROWS rows of PANEL numbers here.
                let x = _mm512_set1_ps(unsafe { *left.add(row * PANEL + k) });
                for (sum, &weight) in sums.iter_mut().zip(&weights) {
                    *sum = _mm512_fmadd_ps(x, weight, *sum);
                }
            }
        }
        remaining -= terms;
        left = left.wrapping_add(tile.left_rows * PANEL);
    }
    for (row, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            // SAFETY: `out` has ROWS rows of PANEL numbers, each on a 64-byte boundary.
            let at = unsafe { tile.out.cast::<f32>().add(row * PANEL + v * 16) };
            // SAFETY: as above.
            let sum = if tile.add { _mm512_add_ps(unsafe { _mm512_load_ps(at) }, sum) } else { sum };
            // SAFETY: as above.
            unsafe { _mm512_store_ps(at, sum) };
        }
    }
}

/// # Safety
/// `words` must be valid for VECTORS registers, or for half as many when they hold PAIRS.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load<const VECTORS: usize, const PAIRS: bool>(words: *const u32) -> [__m512; VECTORS] {
    let mut weights = [_mm512_setzero_ps(); VECTORS];
    if PAIRS {
        for v in 0..VECTORS / 2 {
            // SAFETY: passed on from the caller.
            let pairs = unsafe { _mm512_loadu_si512(words.add(16 * v).cast()) };
            weights[2 * v] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
            weights[2 * v + 1] =
                _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
        }
    } else {
        for (v, weights) in weights.iter_mut().enumerate() {
            // SAFETY: as above.
            *weights = unsafe { _mm512_loadu_ps(words.add(16 * v).cast()) };
        }
    }
    weights
}

/// # Safety
/// `wide` must be valid for twice as many lines as `pairs`; the features of [`super::Level::Avx512`] must be
/// present.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn widen(pairs: &[Line], wide: *mut Line) {
    for (i, pair) in pairs.iter().enumerate() {
        // SAFETY: one line of pairs.
        let [low, high] = unsafe { load::<2, BF16>(pair.0.as_ptr()) };
        // SAFETY: lines `2 i` and `2 i + 1` of `wide`.
        unsafe {
            _mm512_store_ps(wide.add(2 * i).cast(), low);
            _mm512_store_ps(wide.add(2 * i + 1).cast(), high);
        }
    }
}

/// # Safety
/// `rows` must be valid for 16 rows of `depth` numbers (a multiple of 16), `columns` for a line at every
/// multiple of `lines_per_k` below `depth * lines_per_k`; the features of [`super::Level::Avx512`] must be
/// present.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose16(rows: *const f32, depth: usize, columns: *mut Line, lines_per_k: usize) {
    let low = _mm512_setr_epi32(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    let high = _mm512_setr_epi32(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    for start in (0..depth).step_by(16) {
        let mut a = [_mm512_setzero_ps(); 16];
        for (i, a) in a.iter_mut().enumerate() {
            // SAFETY: 16 numbers of row i from `start`, within `depth`.
            *a = unsafe { _mm512_loadu_ps(rows.add(i * depth + start)) };
        }
        let mut b = a;
        for i in 0..8 {
            b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
        }
        // Register 4 q + c now: column c of each 4-column group, of rows 4 q .. 4 q + 3.
        for q in 0..4 {
            a[4 * q] = _mm512_permutex2var_ps(b[4 * q], low, b[4 * q + 2]);
            a[4 * q + 1] = _mm512_permutex2var_ps(b[4 * q], high, b[4 * q + 2]);
            a[4 * q + 2] = _mm512_permutex2var_ps(b[4 * q + 1], low, b[4 * q + 3]);
            a[4 * q + 3] = _mm512_permutex2var_ps(b[4 * q + 1], high, b[4 * q + 3]);
        }
        for c in 0..4 {
            let even = _mm512_shuffle_f32x4::<0x88>(a[c], a[4 + c]);
            let odd = _mm512_shuffle_f32x4::<0xdd>(a[c], a[4 + c]);
            let even2 = _mm512_shuffle_f32x4::<0x88>(a[8 + c], a[12 + c]);
            let odd2 = _mm512_shuffle_f32x4::<0xdd>(a[8 + c], a[12 + c]);
            let out = [
                _mm512_shuffle_f32x4::<0x88>(even, even2),
                _mm512_shuffle_f32x4::<0x88>(odd, odd2),
                _mm512_shuffle_f32x4::<0xdd>(even, even2),
                _mm512_shuffle_f32x4::<0xdd>(odd, odd2),
            ];
            for (group, out) in out.into_iter().enumerate() {
                // SAFETY: column `start + 4 group + c` is below `depth`.
                unsafe {
                    _mm512_store_ps(columns.add((start + 4 * group + c) * lines_per_k).cast(), out);
                }
            }
        }
    }
}
