//! Conversions between f32 and bf16 rows, written so that the compiler vectorises them.

/// f32 to bf16, round to nearest, ties to even; NaN stays NaN (made quiet), infinities stay.
pub(super) fn narrow(from: &[[u8; 4]], into: &mut [[u8; 2]]) {
    for (to, from) in into.iter_mut().zip(from) {
        *to = narrow_bits(u32::from_le_bytes(*from)).to_le_bytes();
    }
}

/// bf16 to f32, exact.
pub(super) fn widen(from: &[[u8; 2]], into: &mut [[u8; 4]]) {
    for (to, from) in into.iter_mut().zip(from) {
        *to = (u32::from(u16::from_le_bytes(*from)) << 16).to_le_bytes();
    }
}

/// The bits of the bf16 nearest to the f32 of `bits`.
fn narrow_bits(bits: u32) -> u16 {
    const QUIET: u32 = 0x40;
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    let half_ulp = 0x7fff + (bits >> 16 & 1);
    let rounded = bits.wrapping_add(half_ulp) >> 16;
    let quiet = bits >> 16 | QUIET;
    (if is_nan { quiet } else { rounded }) as u16
}
