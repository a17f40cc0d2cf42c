//! The fields that say how tokens are chosen.

use baton_config::protocol::Sampling;

use super::Bounds;
use super::fields::Fields;
use super::json::Raw;
use crate::entropy;
use crate::reply::{Refusal, quoted};

/// Most entries of `logit_bias`.
const LOGIT_BIAS_MAX: usize = 256;
/// Most entries of `stop_token_ids`.
const STOP_TOKENS_MAX: usize = 64;
/// Most `top_logprobs` of chat (OpenAI's bound).
const CHAT_LOGPROBS_MAX: i64 = 20;
/// Most `logprobs` of completions (OpenAI's bound).
const COMPLETION_LOGPROBS_MAX: i64 = 5;
/// Stands for a `top_p` of 0, which OpenAI takes as "the likeliest token only".
pub(super) const SMALLEST_TOP_P: f32 = 1e-6;

/// Reads everything but the log-probabilities, which the two APIs ask for differently.
pub(super) fn common(fields: &mut Fields<'_>, bounds: &Bounds) -> Result<Sampling, Refusal> {
    let default = Sampling::default();
    let seed = match fields.integer("seed", i64::MIN, i64::MAX)? {
        Some(seed) => seed.cast_unsigned(),
        None => random_seed()?,
    };
    let top_k = fields.integer("top_k", -1, i64::from(u32::MAX))?.unwrap_or(0);
    let repetition = fields.number("repetition_penalty", 0.01, 10.0)?;
    Ok(Sampling {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(default.temperature),
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(default.top_p).max(SMALLEST_TOP_P),
        top_k: u32::try_from(top_k).unwrap_or(0),
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(default.min_p),
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0),
        repetition_penalty: repetition.unwrap_or(default.repetition_penalty),
        logit_bias: logit_bias(fields, bounds)?,
        seed,
        logprobs: None,
        stop_tokens: stop_tokens(fields, bounds)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
    })
}

/// A seed that nobody asked for.
pub(super) fn random_seed() -> Result<u64, Refusal> {
    entropy::number().map_err(|error| {
        tracing::error!(%error, "no random numbers from the system");
        Refusal::Internal
    })
}

fn logit_bias(fields: &mut Fields<'_>, bounds: &Bounds) -> Result<Vec<(u32, f32)>, Refusal> {
    let Some(mut object) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let keys = object.keys();
    if keys.len() > LOGIT_BIAS_MAX {
        let message = format!("'logit_bias' may have at most {LOGIT_BIAS_MAX} tokens.");
        return Err(Refusal::invalid("logit_bias", message));
    }
    let mut biases = Vec::with_capacity(keys.len());
    for key in keys {
        let token = key.parse::<u32>().ok().filter(|token| *token < bounds.vocab);
        let Some(token) = token else {
            let message = format!(
                "Keys of 'logit_bias' must be token ids from 0 to {}, not '{}'.",
                bounds.vocab - 1,
                quoted(&key)
            );
            return Err(Refusal::coded("logit_bias", "invalid_token_id", message));
        };
        biases.push((token, object.number(&key, -100.0, 100.0)?.unwrap_or(0.0)));
    }
    // The order of keys in the body must not matter to anything downstream.
    biases.sort_unstable_by_key(|(token, _)| *token);
    if biases.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Err(Refusal::coded("logit_bias", "duplicate_key", "A token of 'logit_bias' occurs twice."));
    }
    Ok(biases)
}

fn stop_tokens(fields: &mut Fields<'_>, bounds: &Bounds) -> Result<Vec<u32>, Refusal> {
    let items = fields.items("stop_token_ids", STOP_TOKENS_MAX)?.unwrap_or_default();
    let id = |(i, raw): (usize, Raw<'_>)| {
        raw.get().parse::<u32>().ok().filter(|id| *id < bounds.vocab).ok_or_else(|| {
            let name = format!("stop_token_ids[{i}]");
            let shown = if raw.kind() == "a number" { quoted(raw.get()) } else { raw.kind().to_owned() };
            let message = format!("'{name}' must be a token id from 0 to {}, not {shown}.", bounds.vocab - 1);
            Refusal::coded("stop_token_ids", "invalid_token_id", message)
        })
    };
    items.into_iter().enumerate().map(id).collect()
}

/// Reads `logprobs` and `top_logprobs` of a chat.
pub(super) fn chat_logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, Refusal> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0, CHAT_LOGPROBS_MAX)?;
    match (wanted, top) {
        (false, Some(1..)) => {
            Err(Refusal::invalid("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true."))
        }
        (false, _) => Ok(None),
        (true, top) => Ok(Some(u32::try_from(top.unwrap_or(0)).unwrap_or(0))),
    }
}

/// Reads `logprobs` of a completion.
pub(super) fn completion_logprobs(fields: &mut Fields<'_>) -> Result<Option<u32>, Refusal> {
    let top = fields.integer("logprobs", 0, COMPLETION_LOGPROBS_MAX)?;
    Ok(top.and_then(|top| u32::try_from(top).ok()))
}
