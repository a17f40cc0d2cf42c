//! Elementary functions and row arithmetic, written so that every machine rounds alike.
//!
//! The platform's `exp`, `sin`, `cos` and `pow` differ between C libraries in the last bit; these use only
//! additions, multiplications, divisions, square roots and fused multiply-adds, all of which IEEE 754 defines
//! exactly.

use super::kernel::{LANES, PANEL, Row, Work};

/// `e` to the power `x`, within 2 ulp; 0 below -87, and no more than `exp(88.3)`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let low = x < -87.0;
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    // Coefficients of Cephes `expf`.
    let p = 1.987_569_2e-4_f32
        .mul_add(r, 1.398_2e-3)
        .mul_add(r, 8.333_452e-3)
        .mul_add(r, 4.166_579_6e-2)
        .mul_add(r, 1.666_666_5e-1)
        .mul_add(r, 5e-1);
    let mantissa = p.mul_add(r * r, r) + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if low { 0.0 } else { mantissa * power }
}

/// Sine and cosine of `x`, `0 <= x < 2^30`, to about 1e-15.
#[inline(always)]
pub(super) fn sin_cos(x: f64) -> (f64, f64) {
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    // pi / 2 in three parts: the products with a quadrant number below 2^30 cancel exactly under fused
    // multiply-add.
    const PARTS: [f64; 3] =
        [std::f64::consts::FRAC_PI_2, 6.123_233_995_736_766e-17, -1.497_384_904_859_169_8e-33];
    let shifted = x.mul_add(std::f64::consts::FRAC_2_PI, SHIFT);
    let n = shifted - SHIFT;
    let r = PARTS.iter().fold(x, |r, part| n.mul_add(-part, r));
    let z = r * r;
    // Coefficients of fdlibm `__kernel_sin` and `__kernel_cos`.
    let s = 1.589_690_995_211_55e-10_f64
        .mul_add(z, -2.505_076_025_340_686_3e-8)
        .mul_add(z, 2.755_731_370_707_006_8e-6)
        .mul_add(z, -1.984_126_982_985_795e-4)
        .mul_add(z, 8.333_333_333_322_49e-3)
        .mul_add(z, -1.666_666_666_666_663_2e-1);
    let sin = (s * z).mul_add(r, r);
    let c = (-1.135_964_755_778_819_5e-11_f64)
        .mul_add(z, 2.087_572_321_298_175e-9)
        .mul_add(z, -2.755_731_435_139_066_3e-7)
        .mul_add(z, 2.480_158_728_947_673e-5)
        .mul_add(z, -1.388_888_888_887_411e-3)
        .mul_add(z, 4.166_666_666_666_66e-2);
    let cos = (c * z).mul_add(z, z.mul_add(-0.5, 1.0));
    let quadrant = shifted.to_bits() & 3;
    let (sin, cos) = if quadrant & 1 == 0 { (sin, cos) } else { (cos, sin) };
    (if quadrant & 2 == 0 { sin } else { -sin }, if (quadrant + 1) & 2 == 0 { cos } else { -cos })
}

/// `base` to the power `exponent` for a normal `base` of at least 1 and an `exponent` in `0..=1`, to about
/// 1e-14.
pub(super) fn pow(base: f64, exponent: f64) -> f64 {
    const LN2: f64 = std::f64::consts::LN_2;
    // base = m * 2^e with m in [0.75, 1.5), ln m = 2 artanh((m - 1) / (m + 1)).
    let mut e = ((base.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    let mut m = f64::from_bits((base.to_bits() & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if m >= 1.5 {
        m *= 0.5;
        e += 1;
    }
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let series = (0..=13).rev().fold(0.0_f64, |sum, i| sum.mul_add(z, 1.0 / f64::from(2 * i + 1)));
    let y = f64::from(e).mul_add(LN2, 2.0 * s * series) * exponent;
    // e^y = 2^n e^r by Taylor's series, |r| < 0.35.
    let n = (y / LN2 + 0.5).floor();
    let r = n.mul_add(-LN2, y);
    let taylor = (1..=16).rev().fold(1.0_f64, |sum, i| sum * (r / f64::from(i)) + 1.0);
    taylor * f64::from_bits(((n as i64 + 1023) as u64) << 52)
}

/// The sum of all lanes by a fixed tree.
#[inline(always)]
fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The sum of squares of up to any number of values, in [`LANES`] interleaved chains.
#[inline(always)]
fn squares(values: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = x.mul_add(*x, *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = x.mul_add(*x, *lane);
    }
    tree(lanes)
}

/// The factor of root-mean-square normalisation.
#[inline(always)]
pub(super) fn inverse_rms(sum_of_squares: f32, count: usize, epsilon: f32) -> f32 {
    1.0 / (sum_of_squares / count as f32 + epsilon).sqrt()
}

/// Adds a sub-layer's output to one panel of the residual stream and takes the sum of squares of each row of
/// the panel.
pub(super) struct AddSquares<'a> {
    pub(super) hidden: &'a mut [Row],
    /// The sub-layer's output and its bias.
    pub(super) delta: Option<(&'a [Row], Option<&'a Row>)>,
    /// One number per row.
    pub(super) squares: &'a mut [f32],
}

impl Work for AddSquares<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if let Some((delta, bias)) = self.delta {
            let bias = bias.unwrap_or(&Row::ZERO);
            for (hidden, delta) in self.hidden.iter_mut().zip(delta) {
                for i in 0..PANEL {
                    hidden.0[i] += delta.0[i] + bias.0[i];
                }
            }
        }
        for (sum, hidden) in self.squares.iter_mut().zip(self.hidden.iter()) {
            *sum = squares(&hidden.0);
        }
    }
}

/// Normalises one panel: `out = weight * (hidden * factor of the row)`.
pub(super) struct Scale<'a> {
    pub(super) hidden: &'a [Row],
    pub(super) factors: &'a [f32],
    pub(super) weight: &'a Row,
    pub(super) out: &'a mut [Row],
}

impl Work for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((out, hidden), factor) in self.out.iter_mut().zip(self.hidden).zip(self.factors) {
            for i in 0..PANEL {
                out.0[i] = self.weight.0[i] * (hidden.0[i] * factor);
            }
        }
    }
}

/// `gate = silu(gate) * up`.
pub(super) struct Gate<'a> {
    pub(super) gate: &'a mut [Row],
    pub(super) up: &'a [Row],
}

impl Work for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (gate, up) in self.gate.iter_mut().zip(self.up) {
            for i in 0..PANEL {
                let x = gate.0[i];
                gate.0[i] = x / (1.0 + exp(-x)) * up.0[i];
            }
        }
    }
}

/// Normalises (when there is a weight) and rotates one head in place.
pub(super) struct Rotate<'a> {
    pub(super) head: &'a mut [f32],
    /// Weight and epsilon of the per-head norm.
    pub(super) norm: Option<(&'a [f32], f32)>,
    /// One number per pair of dimensions.
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
}

impl Work for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if let Some((weight, epsilon)) = self.norm {
            let factor = inverse_rms(squares(self.head), self.head.len(), epsilon);
            for (x, weight) in self.head.iter_mut().zip(weight) {
                *x = weight * (*x * factor);
            }
        }
        let (first, second) = self.head.split_at_mut(self.cos.len());
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(self.cos).zip(self.sin) {
            let (x, y) = (*a, *b);
            *a = x * cos - y * sin;
            *b = y * cos + x * sin;
        }
    }
}

/// The cosines and sines of one position.
pub(super) struct Angles<'a> {
    pub(super) position: u32,
    pub(super) frequencies: &'a [f32],
    pub(super) cos: &'a mut [f32],
    pub(super) sin: &'a mut [f32],
}

impl Work for Angles<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((frequency, cos), sin) in self.frequencies.iter().zip(self.cos).zip(self.sin) {
            // The angle is rounded to f32 first, as the models were trained.
            let (s, c) = sin_cos(f64::from(self.position as f32 * frequency));
            (*cos, *sin) = (c as f32, s as f32);
        }
    }
}

/// The running softmax of one query over tiles of keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax {
    max: f32,
    sum: f32,
    /// What the accumulated values are to be multiplied with before this tile's are added.
    pub(super) rescale: f32,
}

impl Softmax {
    pub(super) const START: Self = Self { max: f32::MIN, sum: 0.0, rescale: 0.0 };
}

/// Turns one tile of scores of each query into weights, of the first `valid` keys.
pub(super) struct Weigh<'a> {
    pub(super) scores: &'a mut [Row],
    pub(super) states: &'a mut [Softmax],
    pub(super) scale: f32,
    pub(super) valid: usize,
}

impl Work for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (scores, state) in self.scores.iter_mut().zip(self.states) {
            for (i, score) in scores.0.iter_mut().enumerate() {
                *score = if i < self.valid { *score * self.scale } else { f32::MIN };
            }
            let mut highest = [f32::MIN; LANES];
            for chunk in scores.0.as_chunks::<LANES>().0 {
                for (high, score) in highest.iter_mut().zip(chunk) {
                    *high = if *score > *high { *score } else { *high };
                }
            }
            let max = highest.iter().fold(state.max, |max, high| if *high > max { *high } else { max });
            let mut sums = [0.0_f32; LANES];
            for (i, score) in scores.0.iter_mut().enumerate() {
                let weight = exp(*score - max);
                *score = if i < self.valid { weight } else { 0.0 };
            }
            for chunk in scores.0.as_chunks::<LANES>().0 {
                for (sum, weight) in sums.iter_mut().zip(chunk) {
                    *sum += weight;
                }
            }
            state.rescale = exp(state.max - max);
            state.sum = state.sum.mul_add(state.rescale, tree(sums));
            state.max = max;
        }
    }
}

/// Adds one tile's weighted values to what earlier tiles gave.
pub(super) struct Accumulate<'a> {
    pub(super) total: &'a mut [Row],
    pub(super) tile: &'a [Row],
    pub(super) states: &'a [Softmax],
}

impl Work for Accumulate<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((total, tile), state) in self.total.iter_mut().zip(self.tile).zip(self.states) {
            for i in 0..PANEL {
                total.0[i] = total.0[i].mul_add(state.rescale, tile.0[i]);
            }
        }
    }
}

/// Divides by the sum of weights and writes the columns of one panel into rows of `stride` numbers.
pub(super) struct Finish<'a> {
    pub(super) total: &'a [Row],
    pub(super) states: &'a [Softmax],
    pub(super) out: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) first: usize,
}

impl Work for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((total, state), out) in
            self.total.iter().zip(self.states).zip(self.out.chunks_exact_mut(self.stride))
        {
            for (out, total) in out[self.first..].iter_mut().zip(&total.0) {
                *out = total / state.sum;
            }
        }
    }
}

#[cfg(test)]
mod tests;
