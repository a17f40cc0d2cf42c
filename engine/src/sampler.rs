//! Logits to tokens.
//!
//! In this order: logit bias, repetition penalty, presence and frequency penalties, temperature, min-p, top-k, top-p,
//! draw. The draw is keyed by (seed, position), so that the same logits at the same position give the same token on any
//! worker, after any replay. Sums run in a fixed order, the exponential is our own, ties go to the lowest
//! id: nothing depends on a platform or on what was sampled before. Log-probabilities are of the model's own
//! distribution, before any of these.

mod exp;
mod history;
mod range;

use std::cmp::Ordering;

use baton_config::protocol::{Sampling, TokenLogprob};

pub use self::history::History;
pub use self::range::{LOGPROBS_MAX, RangeError, check};
use crate::mix::{GOLDEN, mix, unit};

/// Why no token can be chosen from a row of logits.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// A logit is infinite or not a number.
    #[error("logit of token {token} is {value}")]
    NotFinite {
        /// The first such token.
        token: u32,
        /// Its logit.
        value: f32,
    },
    /// There is no logit at all.
    #[error("no logits")]
    Empty,
}

/// What a token is chosen from.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Of the model, indexed by token.
    pub logits: &'a [f32],
    /// Position in the sequence of the token to be chosen.
    pub position: u32,
    /// How; must have passed [`check`].
    pub sampling: &'a Sampling,
    /// What came before, for the penalties.
    pub history: &'a History,
}

/// A token that was chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// When the sampling asks for it.
    pub logprob: Option<TokenLogprob>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
    /// Relative to the likeliest, which has 1.
    weight: f64,
}

/// Chooses tokens; holds nothing but buffers.
#[derive(Debug, Default)]
pub struct Sampler {
    adjusted: Vec<f32>,
    /// Apart from the candidates, so that computing them vectorises.
    weights: Vec<f64>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Chooses the next token.
    ///
    /// # Errors
    /// When a logit is not finite: the model or its KV cache is damaged.
    pub fn sample(&mut self, row: Row<'_>) -> Result<Sampled, SampleError> {
        if let Some(at) = row.logits.iter().position(|logit| !logit.is_finite()) {
            return Err(SampleError::NotFinite { token: at as u32, value: row.logits[at] });
        }
        let token = if row.sampling.logit_bias.is_empty() && row.history.is_off() {
            self.choose(row.logits, &row)?
        } else {
            let mut adjusted = std::mem::take(&mut self.adjusted);
            adjusted.clear();
            adjusted.extend_from_slice(row.logits);
            adjust(&mut adjusted, &row);
            let token = self.choose(&adjusted, &row);
            self.adjusted = adjusted;
            token?
        };
        let logprob = row.sampling.logprobs.map(|top| self.logprob(row.logits, token, top));
        Ok(Sampled { token, logprob })
    }

    fn choose(&mut self, logits: &[f32], row: &Row<'_>) -> Result<u32, SampleError> {
        let (likeliest, max) = argmax(logits).ok_or(SampleError::Empty)?;
        if row.sampling.temperature <= 0.0 || row.sampling.top_k == 1 {
            return Ok(likeliest);
        }
        self.weigh(logits, max, row.sampling);
        let total = self.cut(row.sampling);
        let bits =
            mix(mix(row.sampling.seed ^ GOLDEN)
                .wrapping_add((u64::from(row.position) + 1).wrapping_mul(GOLDEN)));
        let mut left = unit(bits) * total;
        for candidate in &self.candidates {
            if left < candidate.weight {
                return Ok(candidate.token);
            }
            left -= candidate.weight;
        }
        // Rounding may leave a crumb beyond the last candidate.
        Ok(likeliest)
    }

    /// Temperature and min-p: fills the candidates, in the order of their ids.
    fn weigh(&mut self, logits: &[f32], max: f32, sampling: &Sampling) {
        let temperature = f64::from(sampling.temperature);
        let (max, min_p) = (f64::from(max), f64::from(sampling.min_p));
        self.weights.clear();
        self.weights.extend(logits.iter().map(|logit| exp::exp((f64::from(*logit) - max) / temperature)));
        self.candidates.clear();
        for ((token, logit), weight) in (0..).zip(logits).zip(self.weights.iter().copied()) {
            if weight > 0.0 && weight >= min_p {
                self.candidates.push(Candidate { token, logit: *logit, weight });
            }
        }
    }

    /// Top-k, then top-p of what that leaves. Returns the sum of the weights kept.
    fn cut(&mut self, sampling: &Sampling) -> f64 {
        let sum = |of: &[Candidate]| of.iter().map(|candidate| candidate.weight).sum::<f64>();
        let top_k = sampling.top_k as usize;
        let mut sorted = 0;
        if top_k > 0 && top_k < self.candidates.len() {
            sort_first(&mut self.candidates, top_k);
            self.candidates.truncate(top_k);
            sorted = top_k;
        }
        let total = sum(&self.candidates);
        if sampling.top_p >= 1.0 {
            return total;
        }
        let enough = total * f64::from(sampling.top_p);
        // The nucleus is mostly small: sort only as far as it reaches.
        const FIRST_SORTED: usize = 64;
        let (mut mass, mut kept) = (0.0, 0);
        loop {
            while kept < sorted {
                mass += self.candidates[kept].weight;
                kept += 1;
                if mass >= enough || kept == self.candidates.len() {
                    self.candidates.truncate(kept);
                    return mass;
                }
            }
            sorted = (sorted * 8).clamp(FIRST_SORTED, self.candidates.len().max(FIRST_SORTED));
            sorted = sorted.min(self.candidates.len());
            sort_first(&mut self.candidates, sorted);
        }
    }

    fn logprob(&mut self, logits: &[f32], token: u32, top: u32) -> TokenLogprob {
        let max = argmax(logits).map_or(0.0, |(_, max)| f64::from(max));
        self.candidates.clear();
        let mut total = 0.0;
        for (token, logit) in (0..).zip(logits) {
            total += exp::exp(f64::from(*logit) - max);
            self.candidates.push(Candidate { token, logit: *logit, weight: 0.0 });
        }
        let log_total = total.ln();
        let logprob = |logit: f32| (f64::from(logit) - max - log_total) as f32;
        let top = (top as usize).min(self.candidates.len());
        sort_first(&mut self.candidates, top);
        let best = self.candidates[..top].iter().map(|of| (of.token, logprob(of.logit))).collect();
        TokenLogprob { logprob: logprob(logits[token as usize]), top: best }
    }
}

/// The likeliest token, the lowest id of equals.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best: Option<(u32, f32)> = None;
    for (token, logit) in (0..).zip(logits) {
        if best.is_none_or(|(_, max)| *logit > max) {
            best = Some((token, *logit));
        }
    }
    best
}

/// Brings the `count` likeliest to the front, in order.
fn sort_first(candidates: &mut [Candidate], count: usize) {
    let order = |a: &Candidate, b: &Candidate| {
        b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.token.cmp(&b.token))
    };
    if count > 0 && count < candidates.len() {
        candidates.select_nth_unstable_by(count - 1, order);
    }
    candidates[..count].sort_unstable_by(order);
}

/// Logit bias and penalties. What overflows stays finite: it only has to be out of reach.
fn adjust(logits: &mut [f32], row: &Row<'_>) {
    for (token, bias) in &row.sampling.logit_bias {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit = (*logit + bias).clamp(f32::MIN, f32::MAX);
        }
    }
    let Sampling { presence_penalty, frequency_penalty, repetition_penalty, .. } = row.sampling;
    for (token, seen) in row.history.seen() {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        let repeated = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
        let presence = if seen.output > 0 { *presence_penalty } else { 0.0 };
        let penalised = repeated - presence - frequency_penalty * seen.output as f32;
        *logit = penalised.clamp(f32::MIN, f32::MAX);
    }
}

#[cfg(test)]
mod tests;
