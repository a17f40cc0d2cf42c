//! The fields that only completions has: prompts of four shapes.

use super::Bounds;
use super::fields::{Fields, items_at, string_at};
use super::json::Raw;
use crate::reply::Refusal;

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// To be tokenized.
    Text(String),
    /// Token ids, all below the model's vocabulary.
    Tokens(Vec<u32>),
}

/// Reads `prompt`: a string, an array of strings, token ids, or an array of arrays of token ids.
pub(super) fn prompts(fields: &mut Fields<'_>, bounds: &Bounds) -> Result<Vec<Prompt>, Refusal> {
    texts(fields, "prompt", bounds)
}

/// Reads a field of the four shapes of `prompt`.
pub(super) fn texts(fields: &mut Fields<'_>, field: &str, bounds: &Bounds) -> Result<Vec<Prompt>, Refusal> {
    let Some(raw) = fields.take(field) else { return Err(fields.missing(field)) };
    match raw.kind() {
        "a string" => return Ok(vec![Prompt::Text(string_at(field, raw)?)]),
        "an array" => {}
        other => {
            let message = format!("'{field}' must be a string or an array, not {other}.");
            return Err(Refusal::coded(field, "invalid_type", message));
        }
    }
    let first = raw.get()[1..].trim_start().as_bytes().first().copied();
    match first {
        Some(b']') | None => {
            Err(Refusal::coded(field, "empty_array", format!("'{field}' must not be an empty array.")))
        }
        Some(b'"') => items_at(field, raw, bounds.choices as usize)?
            .into_iter()
            .enumerate()
            .map(|(i, item)| string_at(&format!("{field}[{i}]"), item).map(Prompt::Text))
            .collect(),
        Some(b'[') => items_at(field, raw, bounds.choices as usize)?
            .into_iter()
            .enumerate()
            .map(|(i, item)| prompt_of_ids(&format!("{field}[{i}]"), item, bounds))
            .collect(),
        Some(_) => Ok(vec![prompt_of_ids(field, raw, bounds)?]),
    }
}

fn prompt_of_ids(name: &str, raw: Raw<'_>, bounds: &Bounds) -> Result<Prompt, Refusal> {
    let ids = token_ids(name, raw, bounds)?;
    if ids.is_empty() {
        return Err(Refusal::coded(name, "empty_array", format!("'{name}' must not be empty.")));
    }
    Ok(Prompt::Tokens(ids))
}

/// Reads an array of token ids, all below the model's vocabulary.
pub(super) fn token_ids(name: &str, raw: Raw<'_>, bounds: &Bounds) -> Result<Vec<u32>, Refusal> {
    let Ok(ids) = serde_json::from_str::<Vec<u32>>(raw.get()) else {
        let message = format!("'{name}' must hold token ids only: integers from 0 to {}.", bounds.vocab - 1);
        return Err(Refusal::coded(name, "invalid_type", message));
    };
    if let Some(at) = ids.iter().position(|id| *id >= bounds.vocab) {
        let message = format!(
            "'{name}[{at}]' is {}, but token ids of this model end at {}.",
            ids[at],
            bounds.vocab - 1
        );
        return Err(Refusal::coded(name, "invalid_token_id", message));
    }
    Ok(ids)
}

/// Refuses what would change the answer and is not supported.
pub(super) fn refuse_unsupported(fields: &mut Fields<'_>, n: u32) -> Result<(), Refusal> {
    if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(Refusal::coded("suffix", "unsupported_parameter", "'suffix' is not supported."));
    }
    let best_of = fields.integer("best_of", 1, 20)?;
    if best_of.is_some_and(|best_of| best_of != i64::from(n)) {
        let message = "'best_of' other than 'n' is not supported.";
        return Err(Refusal::coded("best_of", "unsupported_parameter", message));
    }
    Ok(())
}
