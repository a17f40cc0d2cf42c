//! Checks a request for a server of another project and passes it on nearly as it came.
//!
//! Only what holds for any server is checked: one object, no key twice, known fields of their types and in their ranges.
//! Everything else is for the server to judge, whose refusals reach the client.

mod known;

use std::ops::Range;

use bytes::Bytes;

use super::fields::{Fields, items_at};
use super::json::Raw;
use super::{Bounds, INTERNAL_FIELDS, STOP_MAX_BYTES, choices, model_name};
use crate::reply::{Refusal, quoted};
use crate::routes::Dialect;
use known::{Kind, Known};

/// Bytes of the prompt by which a place for it is found; what follows makes no difference.
const ROUTED_MAX_BYTES: usize = 256 << 10;
/// Longest text of a field that is checked as a text.
const TEXT_MAX_BYTES: usize = 1 << 20;

/// What is passed on, by its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passing {
    Chat,
    Completions,
    Embeddings,
    Responses,
    CountInput,
    Messages,
    CountMessages,
    Tokenize,
    Detokenize,
}

impl Passing {
    /// The path at the server.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Responses => "/v1/responses",
            Self::CountInput => "/v1/responses/input_tokens",
            Self::Messages => "/v1/messages",
            Self::CountMessages => "/v1/messages/count_tokens",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
        }
    }

    /// Whose API its client speaks.
    pub(crate) fn dialect(self) -> Dialect {
        Dialect::of_path(self.path())
    }

    /// Whether the events of a stream of it have names.
    pub(crate) fn names_events(self) -> bool {
        matches!(self, Self::Responses | Self::Messages)
    }

    /// Whether a stream of it ends with `[DONE]`, or says before why it ends.
    pub(crate) fn says_done(self) -> bool {
        matches!(self, Self::Chat | Self::Completions)
    }
}

/// A request that any server would look at.
#[derive(Debug)]
pub(crate) struct Passed {
    /// The body without what never passes.
    body: Bytes,
    /// The model under the name that the client used, and where in the body that stands.
    model: Option<(String, Range<usize>)>,
    /// Answer as server-sent events.
    pub(crate) stream: bool,
    /// The client's name for its own user, which may name a session.
    pub(crate) user: Option<String>,
    /// The beginning of the prompt as it was written, four bytes each: about a token.
    pub(crate) words: Vec<u32>,
}

impl Passed {
    /// The model under the name that the client used.
    pub(crate) fn model(&self) -> Option<&str> {
        self.model.as_ref().map(|(name, _)| name.as_str())
    }

    /// The body as it came, without what never passes.
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    /// The body for a server that calls the model `name`.
    pub(crate) fn body_for(&self, name: Option<&str>) -> Bytes {
        match (&self.model, name) {
            (Some((own, at)), Some(name)) if own != name => {
                let quoted = serde_json::Value::from(name).to_string();
                let parts = [&self.body[..at.start], quoted.as_bytes(), &self.body[at.end..]];
                Bytes::from(parts.concat())
            }
            _ => self.body.clone(),
        }
    }
}

/// Checks the body of a request; `extra` are fields that pass besides the known ones.
pub(crate) fn parse_passed(
    passing: Passing,
    body: &Bytes,
    bounds: &Bounds,
    extra: &[String],
) -> Result<Passed, Refusal> {
    let mut fields = Fields::parse_body(body)?;
    let internal = fields.all().any(|(key, _)| INTERNAL_FIELDS.contains(&key));
    let words = words(&prompt_of(passing, &fields));
    let (kept, model_at) =
        if internal { rebuilt(&fields) } else { (body.clone(), model_span(&fields, body)) };
    let model = match passing {
        Passing::Tokenize | Passing::Detokenize if fields.peek("model").is_none() => None,
        _ => Some(model_name(&mut fields)?),
    };
    let stream = matches!(fields.peek("stream").map(Raw::get), Some("true"));
    let user = match passing {
        Passing::Chat
        | Passing::Completions
        | Passing::Embeddings
        | Passing::Responses
        | Passing::CountInput => fields.string("user")?,
        Passing::Messages | Passing::CountMessages | Passing::Tokenize | Passing::Detokenize => None,
    };
    for table in known::tables(passing) {
        for known in *table {
            check(&mut fields, known, bounds)?;
        }
    }
    for name in extra {
        fields.take(name);
    }
    fields.finish(&INTERNAL_FIELDS)?;
    Ok(Passed { body: kept, model: model.zip(model_at), stream, user, words })
}

/// The parts of a request that a server makes the beginning of its prompt of, in their order there.
fn prompt_of<'a>(passing: Passing, fields: &Fields<'a>) -> Vec<Raw<'a>> {
    let names: &[&str] = match passing {
        Passing::Chat => &["tools", "messages"],
        Passing::Completions => &["prompt"],
        Passing::Responses | Passing::CountInput => &["instructions", "tools", "input"],
        Passing::Messages | Passing::CountMessages => &["tools", "system", "messages"],
        Passing::Embeddings | Passing::Tokenize | Passing::Detokenize => &[],
    };
    names.iter().filter_map(|name| fields.peek(name)).collect()
}

fn words(parts: &[Raw<'_>]) -> Vec<u32> {
    let mut words = Vec::new();
    let mut room = ROUTED_MAX_BYTES;
    for part in parts {
        let bytes = part.get().as_bytes();
        let bytes = &bytes[..bytes.len().min(room)];
        room -= bytes.len();
        words.reserve(bytes.len().div_ceil(4));
        let (whole, rest) = bytes.as_chunks();
        words.extend(whole.iter().map(|word| u32::from_le_bytes(*word)));
        if !rest.is_empty() {
            let mut word = [0; 4];
            word[..rest.len()].copy_from_slice(rest);
            words.push(u32::from_le_bytes(word));
        }
    }
    words
}

/// Where in `body` the value of `model` stands; the fields are slices of it.
fn model_span(fields: &Fields<'_>, body: &Bytes) -> Option<Range<usize>> {
    let value = fields.peek("model")?.get();
    let start = value.as_ptr().addr().checked_sub(body.as_ptr().addr())?;
    Some(start..start + value.len())
}

/// The body without what never passes, and where the value of `model` stands in it.
fn rebuilt(fields: &Fields<'_>) -> (Bytes, Option<Range<usize>>) {
    let mut text = String::from("{");
    let mut model_at = None;
    for (key, raw) in fields.all().filter(|(key, _)| !INTERNAL_FIELDS.contains(key)) {
        if text.len() > 1 {
            text.push(',');
        }
        text.push_str(&serde_json::Value::from(key).to_string());
        text.push(':');
        if key == "model" {
            model_at = Some(text.len()..text.len() + raw.get().len());
        }
        text.push_str(raw.get());
    }
    text.push('}');
    (Bytes::from(text), model_at)
}

fn check(fields: &mut Fields<'_>, known: &Known, bounds: &Bounds) -> Result<(), Refusal> {
    let Known { name, kind } = *known;
    match kind {
        Kind::Any => drop(fields.take(name)),
        Kind::Flag => drop(fields.boolean(name)?),
        Kind::Text => {
            let text = fields.string(name)?;
            if text.is_some_and(|text| text.len() > TEXT_MAX_BYTES) {
                let message = format!("'{name}' may have at most {TEXT_MAX_BYTES} bytes.");
                return Err(Refusal::invalid(name, message));
            }
        }
        Kind::Texts(max) => {
            let texts = fields.strings(name, max)?.unwrap_or_default();
            if name == "stop" && texts.iter().any(|text| text.is_empty() || text.len() > STOP_MAX_BYTES) {
                let message = format!("Each text of 'stop' must have 1 to {STOP_MAX_BYTES} bytes.");
                return Err(Refusal::invalid(name, message));
            }
        }
        Kind::Integer(min, max) => drop(fields.integer(name, min, max)?),
        Kind::Number(min, max) => drop(fields.number(name, min, max)?),
        Kind::Object => drop(fields.object(name)?),
        Kind::List(max) => drop(fields.items(name, max)?),
        Kind::Metadata => drop(fields.metadata(name)?),
        Kind::Choices => drop(choices(fields, 1, bounds)?),
        Kind::Messages => messages(fields, bounds.messages)?,
        Kind::Prompt => prompts(fields, name, bounds)?,
        Kind::Input => input(fields, name)?,
    }
    Ok(())
}

/// Messages are objects with a role; what they may hold besides is the server's affair.
fn messages(fields: &mut Fields<'_>, max: usize) -> Result<(), Refusal> {
    let Some(items) = fields.items("messages", max)? else {
        return Err(Refusal::coded("messages", "missing_required_parameter", "'messages' is required."));
    };
    if items.is_empty() {
        return Err(Refusal::coded("messages", "empty_array", "'messages' must have at least one message."));
    }
    for (i, raw) in items.into_iter().enumerate() {
        let mut message = Fields::parse(format!("messages[{i}]"), raw)?;
        let name = message.name("role");
        if message.string("role")?.is_none_or(|role| role.is_empty()) {
            let text = format!("'{name}' is required.");
            return Err(Refusal::coded(name, "missing_required_parameter", text));
        }
        let name = message.name("content");
        if let Some(raw) = message.take("content")
            && !matches!(raw.kind(), "a string" | "an array")
        {
            let text = format!("'{name}' must be a string or an array of parts, not {}.", raw.kind());
            return Err(Refusal::coded(name, "invalid_type", text));
        }
    }
    Ok(())
}

/// A text, token ids, or several of either, together with `n` at most as many as a request may have choices.
fn prompts(fields: &mut Fields<'_>, name: &'static str, bounds: &Bounds) -> Result<(), Refusal> {
    let count = count(fields, name, bounds.choices as usize)?;
    choices(fields, count, bounds).map(drop)
}

fn input(fields: &mut Fields<'_>, name: &'static str) -> Result<(), Refusal> {
    count(fields, name, known::INPUTS_MAX).map(drop)
}

fn count(fields: &mut Fields<'_>, name: &'static str, max: usize) -> Result<usize, Refusal> {
    let Some(raw) = fields.take(name) else {
        return Err(Refusal::coded(name, "missing_required_parameter", format!("'{name}' is required.")));
    };
    match raw.kind() {
        "a string" => return Ok(1),
        "an array" => {}
        other => {
            let message = format!("'{name}' must be a string or an array, not {other}.");
            return Err(Refusal::coded(name, "invalid_type", message));
        }
    }
    match raw.get()[1..].trim_start().as_bytes().first() {
        Some(b']') | None => {
            Err(Refusal::coded(name, "empty_array", format!("'{name}' must not be an empty array.")))
        }
        Some(b'"' | b'[' | b'{') => items_at(name, raw, max).map(|items| items.len()),
        Some(b'0'..=b'9') => Ok(1),
        Some(_) => {
            let message = format!("'{name}' must hold texts or token ids, not {}.", quoted(raw.get()));
            Err(Refusal::coded(name, "invalid_type", message))
        }
    }
}

#[cfg(test)]
mod tests;
