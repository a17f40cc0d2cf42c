//! An exponential that is the same on every platform.

const LOG2_E: f64 = std::f64::consts::LOG2_E;
/// The natural logarithm of 2 in two parts; the first has enough trailing zeros that its multiples are exact.
/// Source: FreeBSD `e_exp.c`.
const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// `1/n!` from n = 13 down to 0: on |r| <= ln(2)/2 the first term left out is below 5e-18.
const TAYLOR: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// e to the power of `x`, for `x` <= 0; results below the smallest normal number are 0.
///
/// The one of the standard library calls the platform's, whose last bit varies between platforms: at a boundary of
/// top-p two workers would then draw different tokens from equal logits.
///
/// Without branches and calls: a loop over it vectorises.
pub(super) fn exp(x: f64) -> f64 {
    debug_assert!(x <= 0.0, "exp of {x}");
    // Added to a small number, it leaves the nearest integer (ties to even) in the low bits of the sum.
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    // Below this, 2^k is no normal number.
    const LOWEST: f64 = -708.0;
    let bounded = if x < LOWEST { LOWEST } else { x };
    let shifted = bounded * LOG2_E + SHIFT;
    let k = shifted - SHIFT;
    let r = (bounded - k * LN2_HIGH) - k * LN2_LOW;
    let series = TAYLOR.iter().fold(0.0, |sum, factor| sum * r + factor);
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x < LOWEST { 0.0 } else { series * power }
}
