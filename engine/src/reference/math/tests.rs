use super::*;

#[test]
fn exp_is_within_two_ulp() {
    let mut worst = 0;
    for i in 0..200_000_u32 {
        let x = -86.9 + i as f32 * (175.0 / 200_000.0);
        let expected = f64::from(x).exp() as f32;
        worst = worst.max(exp(x).to_bits().abs_diff(expected.to_bits()));
    }
    assert!(worst <= 2, "{worst} ulp");
}

#[test]
fn exp_at_the_ends() {
    assert_eq!(exp(0.0).to_bits(), 1.0_f32.to_bits());
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp(f32::MIN), 0.0);
    assert_eq!(exp(-90.0), 0.0);
    assert!(exp(1000.0).is_finite() && exp(1000.0) > 1e38);
    assert!(exp(f32::NAN).is_nan());
}

#[test]
fn sine_and_cosine() {
    for i in 0..100_000 {
        let x = f64::from(i) * 1.37;
        let (sin, cos) = sin_cos(x);
        assert!((sin - x.sin()).abs() < 4e-16 && (cos - x.cos()).abs() < 4e-16, "{x}: {sin} {cos}");
    }
}

#[test]
fn powers_round_to_the_right_f32() {
    for base in [1.0, 10_000.0, 500_000.0, 1e6, 5e6, 1e12, 12_345.678] {
        for i in 0..64 {
            let exponent = f64::from(i) / 64.0;
            let (ours, expected) = (pow(base, exponent), base.powf(exponent));
            assert!((ours / expected - 1.0).abs() < 1e-13, "{base} ^ {exponent}: {ours} {expected}");
            assert_eq!(ours as f32, expected as f32);
        }
    }
}

#[test]
fn softmax_over_tiles_is_the_softmax_over_all() {
    let scores: Vec<f32> = (0..100).map(|i| ((i * 37 % 101) as f32 - 50.0) / 3.0).collect();
    let largest = scores.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = scores.iter().map(|s| f64::from(s - largest).exp()).sum();
    let mut state = [Softmax::START];
    let mut total = [Row::ZERO];
    for (tile, scores) in scores.chunks(PANEL).enumerate() {
        let mut row = [Row([f32::NAN; PANEL])];
        row[0].0[..scores.len()].copy_from_slice(scores);
        Weigh { scores: &mut row, states: &mut state, scale: 1.0, valid: scores.len() }.run();
        // The value of key i is i, in column 0.
        let mut values = Row::ZERO;
        values.0[0] = (0..scores.len()).map(|i| row[0].0[i] * (tile * PANEL + i) as f32).sum();
        Accumulate { total: &mut total, tile: &[values], states: &state }.run();
        assert!(row[0].0[scores.len()..].iter().all(|w| *w == 0.0), "keys past the end weigh nothing");
    }
    let mut out = [0.0; PANEL];
    Finish { total: &total, states: &state, out: &mut out, stride: PANEL, first: 0 }.run();
    let expected: f64 =
        scores.iter().enumerate().map(|(i, s)| i as f64 * f64::from(s - largest).exp() / sum).sum();
    assert!((f64::from(out[0]) / expected - 1.0).abs() < 1e-5, "{} {expected}", out[0]);
}

#[test]
fn rotation_keeps_lengths_and_turns_by_the_angle() {
    let mut head = [3.0, 1.0, 4.0, 2.0];
    Rotate { head: &mut head, norm: None, cos: &[0.0, 1.0], sin: &[1.0, 0.0] }.run();
    assert_eq!(head, [-4.0, 1.0, 3.0, 2.0]);
    let mut head = [3.0, 4.0];
    Rotate { head: &mut head, norm: Some((&[2.0, 1.0], 0.0)), cos: &[1.0], sin: &[0.0] }.run();
    let rms = 12.5_f32.sqrt();
    assert!((head[0] - 6.0 / rms).abs() < 1e-6 && (head[1] - 4.0 / rms).abs() < 1e-6, "{head:?}");
}
