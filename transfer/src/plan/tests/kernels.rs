use half::{bf16, f16};

use super::*;
use crate::plan::numbers::{kernel, quantize, scale_for};
use crate::plan::reference::{fp8, to_fp8};

/// One number through the kernel.
fn one<const OUT: usize>(from: Dtype, to: Dtype, bytes: &[u8]) -> [u8; OUT] {
    let mut out = [0; OUT];
    kernel(from, to)(bytes, 1.0, &mut out);
    out
}

fn narrow<const OUT: usize>(to: Dtype, bits: u32) -> [u8; OUT] {
    one(Dtype::F32, to, &bits.to_le_bytes())
}

/// Bits that meet the corners of every format: around powers of two, ties, the ends of the ranges.
fn corners() -> impl Iterator<Item = u32> {
    const MANTISSAS: [u32; 12] = [
        0, 1, 0x0fff, 0x1000, 0x1001, 0x8000, 0x0f_ffff, 0x10_0000, 0x10_0001, 0x60_0000, 0x6f_ffff,
        0x7f_ffff,
    ];
    let number =
        |exponent: u32, mantissa: u32| [0, 1 << 31].map(|sign: u32| sign | exponent << 23 | mantissa);
    (0..=255)
        .flat_map(move |exponent| MANTISSAS.into_iter().flat_map(move |mantissa| number(exponent, mantissa)))
}

#[test]
fn narrowing_agrees_with_the_half_crate_and_the_list_of_fp8() {
    let mut bits: u32 = 0x9e37_79b9;
    let random = std::iter::repeat_with(move || {
        bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bits
    });
    // Random bits are rarely near the ranges of f16 and fp8: their exponents are brought there.
    let near = random
        .take(300_000)
        .flat_map(|bits| [bits, bits & 0x87ff_ffff | 0x3800_0000, bits & 0x81ff_ffff | 0x3c00_0000]);
    for bits in near.chain(corners()) {
        let number = f32::from_bits(bits);
        assert_eq!(narrow(Dtype::Bf16, bits), bf16::from_f32(number).to_le_bytes(), "{bits:#x}");
        assert_eq!(narrow(Dtype::F16, bits), f16::from_f32(number).to_le_bytes(), "{bits:#x} {number}");
        assert_eq!(narrow(Dtype::Fp8E4m3, bits), [to_fp8(number)], "{bits:#x} {number}");
    }
}

#[test]
fn narrowing_rounds_ties_to_even_and_keeps_nan() {
    for (bits, expected) in [
        (0x3f80_8000, 0x3f80), // tie, even below
        (0x3f81_8000, 0x3f82), // tie, even above
        (0x3f80_8001, 0x3f81),
        (0x7f7f_ffff, 0x7f80), // largest finite rounds to infinity
        (0xff80_0000, 0xff80),
        (0x7f80_0001, 0x7fc0), // a NaN whose payload is cut off must not become infinity
        (0x0000_8001, 0x0001), // subnormal
    ] {
        assert_eq!(u16::from_le_bytes(narrow(Dtype::Bf16, bits)), expected, "{bits:08x}");
    }
    for (number, expected) in [
        (448.0, 0x7e),
        (464.0, 0x7e), // saturates
        (f32::INFINITY, 0x7e),
        (f32::NEG_INFINITY, 0xfe),
        (1.0625, 0x38), // tie, even below
        (1.1875, 0x3a), // tie, even above
        (2f32.powi(-9), 0x01),
        (2f32.powi(-10), 0x00), // tie to zero
        (-0.0, 0x80),
    ] {
        assert_eq!(narrow(Dtype::Fp8E4m3, f32::to_bits(number)), [expected], "{number}");
    }
    assert_eq!(narrow::<1>(Dtype::Fp8E4m3, f32::NAN.to_bits())[0] & 0x7f, 0x7f);
    assert_eq!(f16::from_le_bytes(narrow(Dtype::F16, 65519f32.to_bits())), f16::MAX);
    assert_eq!(f16::from_le_bytes(narrow(Dtype::F16, 65520f32.to_bits())), f16::INFINITY);
}

#[test]
fn widening_is_exact_for_every_number() {
    for bits in 0..=u16::MAX {
        let half = f32::from_le_bytes(one(Dtype::F16, Dtype::F32, &bits.to_le_bytes()));
        let brain = f32::from_le_bytes(one(Dtype::Bf16, Dtype::F32, &bits.to_le_bytes()));
        let (expected_half, expected_brain) = (f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32());
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(same(half, expected_half), "{bits:04x}: {half} {expected_half}");
        assert!(same(brain, expected_brain), "{bits:04x}: {brain} {expected_brain}");
        let back = |dtype, n: f32| u16::from_le_bytes(narrow(dtype, n.to_bits()));
        assert!(half.is_nan() || back(Dtype::F16, half) == bits, "{bits:04x} must survive a round trip");
        assert!(brain.is_nan() || back(Dtype::Bf16, brain) == bits, "{bits:04x} must survive a round trip");
    }
    for byte in 0..=u8::MAX {
        let number = f32::from_le_bytes(one(Dtype::Fp8E4m3, Dtype::F32, &[byte]));
        assert!(number == fp8(byte) || byte & 0x7f == 0x7f && number.is_nan(), "{byte:02x}: {number}");
        assert_eq!(number.is_sign_negative(), byte & 0x80 != 0);
        assert_eq!(narrow(Dtype::Fp8E4m3, number.to_bits()), [byte], "{byte:02x} must survive a round trip");
    }
}

#[test]
fn a_scale_brings_the_largest_number_to_448() {
    let bytes = |numbers: &[f32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    assert_eq!(scale_for(&bytes(&[1.0, -896.0, 3.0])), 2.0);
    assert_eq!(scale_for(&bytes(&[0.0, -0.0])), 1.0, "nothing but zeros");
    assert_eq!(
        scale_for(&bytes(&[f32::INFINITY, f32::NAN, 4.48])),
        4.48 / 448.0,
        "only finite numbers count"
    );
    assert_eq!(scale_for(&bytes(&[1e-40])), f32::MIN_POSITIVE);
    let mut out = [0; 4];
    quantize(&bytes(&[896.0, -2.0, f32::NAN, f32::INFINITY]), 2.0, &mut out);
    assert_eq!([fp8(out[0]), fp8(out[1]), fp8(out[3])], [448.0, -1.0, 448.0]);
    assert!(fp8(out[2]).is_nan());
}
