//! The kernel for every other machine: plain Rust with `mul_add`, which is exact everywhere and an
//! instruction on most.

use super::{Format, LANES, PANEL, Row, Tile};

/// # Safety
/// The pointers of `tile` must be valid for its shape.
pub(super) unsafe fn tile(tile: &Tile<'_>) {
    let right = tile.right;
    for row in 0..tile.rows {
        for vector in 0..right.vectors {
            let (first, half) = match right.format {
                Format::F32 => (vector * LANES, None),
                Format::Bf16 => (vector / 2 * LANES, Some(vector % 2)),
            };
            let mut sums = [0.0_f32; LANES];
            for k in 0..right.depth {
                // SAFETY: panel `k / PANEL` of the left operand has this row.
                let left: &Row = unsafe { &*tile.left.add(k / PANEL * tile.left_rows + row) };
                let x = left.0[k % PANEL];
                // SAFETY: row `k` of the right operand has 16 words from `first` on.
                let words: &[u32; LANES] = unsafe { &*right.words.add(k * right.stride + first).cast() };
                for (sum, &word) in sums.iter_mut().zip(words) {
                    let bits = match half {
                        None => word,
                        Some(0) => word << 16,
                        Some(_) => word & 0xffff_0000,
                    };
                    *sum = x.mul_add(f32::from_bits(bits), *sum);
                }
            }
            // SAFETY: `out` has `rows` rows.
            let out: &mut Row = unsafe { &mut *tile.out.add(row) };
            for (out, sum) in out.0[vector * LANES..].iter_mut().zip(sums) {
                *out = if tile.add { *out + sum } else { sum };
            }
        }
    }
}
