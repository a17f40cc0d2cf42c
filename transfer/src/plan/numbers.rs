//! Number formats: conversions written so that the compiler vectorises them, without a branch per number.
//!
//! Every conversion goes through f32, which holds the numbers of all formats exactly. Into a narrower format it rounds to
//! nearest, ties to even. Beyond the largest number, bf16 and f16 become infinity; fp8 has none and saturates at
//! 448. NaN stays NaN.

use baton_config::Dtype;

/// Largest fp8 number.
pub(super) const FP8_MAX: f32 = 448.0;

/// A format of `N` bytes, little-endian.
trait Number<const N: usize> {
    fn load(bytes: [u8; N]) -> f32;
    fn store(number: f32) -> [u8; N];
}

struct Single;
struct Brain;
struct Half;
struct Eighth;

const MAGNITUDE: u32 = 0x7fff_ffff;
const INFINITY: u32 = 0x7f80_0000;
const SIGN: u32 = 0x8000_0000;

impl Number<4> for Single {
    #[inline(always)]
    fn load(bytes: [u8; 4]) -> f32 {
        f32::from_le_bytes(bytes)
    }

    #[inline(always)]
    fn store(number: f32) -> [u8; 4] {
        number.to_le_bytes()
    }
}

impl Number<2> for Brain {
    #[inline(always)]
    fn load(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
    }

    #[inline(always)]
    fn store(number: f32) -> [u8; 2] {
        const QUIET: u32 = 0x40;
        let bits = number.to_bits();
        let half_ulp = 0x7fff + (bits >> 16 & 1);
        let rounded = bits.wrapping_add(half_ulp) >> 16;
        let quiet = bits >> 16 | QUIET;
        (if is_nan(bits) { quiet } else { rounded } as u16).to_le_bytes()
    }
}

impl Number<2> for Half {
    #[inline(always)]
    fn load(bytes: [u8; 2]) -> f32 {
        /// The exponent of f16 has its zero at 15, that of f32 at 127.
        const REBIAS: u32 = (127 - 15) << 23;
        /// Twice the smallest normal f16: a subnormal is the difference to it.
        const SUBNORMAL: u32 = REBIAS + (1 << 23);
        let bits = u32::from(u16::from_le_bytes(bytes));
        let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7fff) << 13);
        let normal = magnitude + REBIAS;
        let subnormal = (f32::from_bits(magnitude + SUBNORMAL) - f32::from_bits(SUBNORMAL)).to_bits();
        let special = magnitude + 2 * REBIAS;
        let number = if is_below(magnitude, 0x0080_0000) { subnormal } else { normal };
        f32::from_bits(sign | if is_below(magnitude, 0x0f80_0000) { number } else { special })
    }

    #[inline(always)]
    fn store(number: f32) -> [u8; 2] {
        /// The bits of 65536: from here on, and after rounding from 65520 on, there is only infinity.
        const OVERFLOW: u32 = 0x4780_0000;
        /// Adding it makes the unit of the sum that of subnormal f16, so that the addition rounds.
        const ROUNDER: u32 = ((127 - 15) + (23 - 10) + 1) << 23;
        let bits = number.to_bits();
        let magnitude = bits & MAGNITUDE;
        let normal =
            magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0x0fff + (magnitude >> 13 & 1)) >> 13;
        let subnormal = (f32::from_bits(magnitude) + f32::from_bits(ROUNDER)).to_bits().wrapping_sub(ROUNDER);
        let finite = if is_below(magnitude, 0x3880_0000) { subnormal } else { normal };
        let special = if is_nan(bits) { 0x7e00 | (magnitude >> 13 & 0x3ff) } else { 0x7c00 };
        let half = if is_below(magnitude, OVERFLOW) { finite } else { special };
        ((half | (bits & SIGN) >> 16) as u16).to_le_bytes()
    }
}

/// The values of all fp8 numbers: looking them up is faster than working them out.
static FP8: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        values[byte] = fp8_value(byte as u32);
        byte += 1;
    }
    values
};

const fn fp8_value(bits: u32) -> f32 {
    const REBIAS: u32 = (127 - 7) << 23;
    /// Twice the smallest normal: a subnormal is the difference to it.
    const SUBNORMAL: u32 = REBIAS + (1 << 23);
    let (sign, magnitude) = ((bits & 0x80) << 24, bits & 0x7f);
    let number = match magnitude {
        0..8 => (f32::from_bits((magnitude << 20) + SUBNORMAL) - f32::from_bits(SUBNORMAL)).to_bits(),
        0x7f => INFINITY | 0x40_0000,
        _ => (magnitude << 20) + REBIAS,
    };
    f32::from_bits(sign | number)
}

impl Number<1> for Eighth {
    #[inline(always)]
    fn load([byte]: [u8; 1]) -> f32 {
        FP8[usize::from(byte)]
    }

    #[inline(always)]
    fn store(number: f32) -> [u8; 1] {
        const ROUNDER: u32 = ((127 - 7) + (23 - 3) + 1) << 23;
        const LARGEST: u32 = FP8_MAX.to_bits();
        let bits = number.to_bits();
        let magnitude = bits & MAGNITUDE;
        let magnitude = if is_below(magnitude, LARGEST) { magnitude } else { LARGEST };
        let normal =
            (magnitude.wrapping_sub((127 - 7) << 23).wrapping_add(0x7_ffff + (magnitude >> 20 & 1))) >> 20;
        let subnormal = (f32::from_bits(magnitude) + f32::from_bits(ROUNDER)).to_bits().wrapping_sub(ROUNDER);
        let finite = if is_below(magnitude, 0x3c80_0000) { subnormal } else { normal };
        let eighth = if is_nan(bits) { 0x7f } else { finite };
        [(eighth | (bits & SIGN) >> 24) as u8]
    }
}

#[inline(always)]
fn is_nan(bits: u32) -> bool {
    is_below(INFINITY, bits & MAGNITUDE)
}

/// Compares bits without a sign: as signed numbers, for which every processor has an instruction.
#[inline(always)]
fn is_below(a: u32, b: u32) -> bool {
    (a as i32) < b as i32
}

/// Converts numbers of one format to as many of another, multiplied by a scale on the way.
pub(super) type Kernel = fn(&[u8], f32, &mut [u8]);

/// The kernel between two formats.
pub(super) fn kernel(from: Dtype, to: Dtype) -> Kernel {
    match from {
        Dtype::F32 => kernel_from::<Single, 4>(to),
        Dtype::Bf16 => kernel_from::<Brain, 2>(to),
        Dtype::F16 => kernel_from::<Half, 2>(to),
        Dtype::Fp8E4m3 => kernel_from::<Eighth, 1>(to),
    }
}

fn kernel_from<S: Number<IN>, const IN: usize>(to: Dtype) -> Kernel {
    match to {
        Dtype::F32 => scaled::<S, Single, IN, 4>,
        Dtype::Bf16 => scaled::<S, Brain, IN, 2>,
        Dtype::F16 => scaled::<S, Half, IN, 2>,
        Dtype::Fp8E4m3 => scaled::<S, Eighth, IN, 1>,
    }
}

fn scaled<S: Number<IN>, D: Number<OUT>, const IN: usize, const OUT: usize>(
    from: &[u8],
    scale: f32,
    into: &mut [u8],
) {
    for (to, from) in into.as_chunks_mut::<OUT>().0.iter_mut().zip(from.as_chunks::<IN>().0) {
        *to = D::store(S::load(*from) * scale);
    }
}

/// f32 to fp8: each number divided by `scale`.
pub(super) fn quantize(from: &[u8], scale: f32, into: &mut [u8]) {
    for (to, from) in into.as_chunks_mut::<1>().0.iter_mut().zip(from.as_chunks::<4>().0) {
        *to = Eighth::store(Single::load(*from) / scale);
    }
}

/// The scale that brings the largest finite magnitude of `numbers` (f32) to the largest fp8 number.
///
/// Infinities saturate and do not count, else they would leave nothing of the others. At least the smallest normal f32;
/// 1 where there is nothing but zeros.
pub(super) fn scale_for(numbers: &[u8]) -> f32 {
    let mut largest = 0i32;
    for bytes in numbers.as_chunks::<4>().0 {
        let magnitude = (u32::from_le_bytes(*bytes) & MAGNITUDE) as i32;
        let finite = if magnitude < INFINITY as i32 { magnitude } else { 0 };
        largest = largest.max(finite);
    }
    match f32::from_bits(largest as u32) {
        0.0 => 1.0,
        amax => (amax / FP8_MAX).max(f32::MIN_POSITIVE),
    }
}
