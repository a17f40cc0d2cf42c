//! What sampling values are accepted.

use baton_config::protocol::Sampling;

/// Most alternatives reported per token.
pub const LOGPROBS_MAX: u32 = 128;

/// A sampling value is out of range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{field} is {value}, must be {allowed}")]
pub struct RangeError {
    /// Name of the field.
    pub field: &'static str,
    /// As given.
    pub value: f64,
    /// What is accepted.
    pub allowed: &'static str,
}

/// Checks every value of `sampling`, for a vocabulary of `vocab` tokens.
///
/// # Errors
/// The first value that is out of range.
pub fn check(sampling: &Sampling, vocab: u32) -> Result<(), RangeError> {
    let within = |field, value: f32, range: std::ops::RangeInclusive<f32>, allowed| {
        // NaN is within no range.
        if range.contains(&value) {
            Ok(())
        } else {
            Err(RangeError { field, value: f64::from(value), allowed })
        }
    };
    within("temperature", sampling.temperature, 0.0..=100.0, "from 0 to 100")?;
    within("top_p", sampling.top_p, f32::MIN_POSITIVE..=1.0, "above 0, at most 1")?;
    within("min_p", sampling.min_p, 0.0..=1.0, "from 0 to 1")?;
    within("presence_penalty", sampling.presence_penalty, -100.0..=100.0, "from -100 to 100")?;
    within("frequency_penalty", sampling.frequency_penalty, -100.0..=100.0, "from -100 to 100")?;
    within("repetition_penalty", sampling.repetition_penalty, 0.01..=100.0, "from 0.01 to 100")?;
    for (token, bias) in &sampling.logit_bias {
        within("logit_bias", *bias, -1000.0..=1000.0, "from -1000 to 1000")?;
        below("logit_bias token", *token, vocab)?;
    }
    sampling.stop_tokens.iter().try_for_each(|token| below("stop token", *token, vocab))?;
    match sampling.logprobs {
        Some(top) if top > LOGPROBS_MAX => {
            Err(RangeError { field: "logprobs", value: f64::from(top), allowed: "at most 128" })
        }
        _ => Ok(()),
    }
}

fn below(field: &'static str, token: u32, vocab: u32) -> Result<(), RangeError> {
    if token < vocab {
        return Ok(());
    }
    Err(RangeError { field, value: f64::from(token), allowed: "below the size of the vocabulary" })
}
