//! The content of a message: a string, or parts of which only text is understood.

use super::fields::{Fields, alternatives, items_at, string_at};
use super::json::Raw;
use super::plain::PLAIN_TEXT;
use crate::reply::{Refusal, quoted};

/// Most parts of one message.
const PARTS_MAX: usize = 1024;

/// What the parts of an API look like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    /// The types of parts that hold a `text`.
    pub(super) texts: &'static [&'static str],
    /// The types that the API knows besides.
    pub(super) others: &'static [&'static str],
    /// What a part of text may hold without effect, and of what kind it is.
    pub(super) beside: &'static [(&'static str, &'static str)],
}

/// Takes a content that must be there; several parts are joined by newlines.
pub(super) fn read(fields: &mut Fields<'_>, field: &str, rules: &Parts) -> Result<String, Refusal> {
    let name = fields.name(field);
    match fields.take(field) {
        None => {
            let message = format!("'{name}' is required: a string or an array of text parts.");
            Err(Refusal::coded(name, "missing_required_parameter", message))
        }
        Some(raw) => read_value(&name, raw, rules),
    }
}

/// Reads the content at `name`.
pub(super) fn read_value(name: &str, raw: Raw<'_>, rules: &Parts) -> Result<String, Refusal> {
    match raw.kind() {
        "a string" => string_at(name, raw),
        "an array" => parts(name, raw, rules),
        other => {
            let message = format!("'{name}' must be a string or an array of text parts, not {other}.");
            Err(Refusal::coded(name, "invalid_type", message))
        }
    }
}

fn parts(name: &str, raw: Raw<'_>, rules: &Parts) -> Result<String, Refusal> {
    let items = items_at(name, raw, PARTS_MAX)?;
    if items.is_empty() {
        return Err(Refusal::coded(name, "empty_array", format!("'{name}' must have at least one part.")));
    }
    let mut text = String::new();
    for (i, item) in items.into_iter().enumerate() {
        if i > 0 {
            text.push('\n');
        }
        text.push_str(&part(format!("{name}[{i}]"), item, rules)?);
    }
    Ok(text)
}

fn part(path: String, raw: Raw<'_>, rules: &Parts) -> Result<String, Refusal> {
    let mut part = Fields::parse(path.clone(), raw)?;
    let kind = part.required("type")?;
    if rules.others.contains(&kind.as_str()) {
        let message = format!("'{path}' is of type '{kind}', which is not supported: {PLAIN_TEXT}");
        return Err(Refusal::coded(path, "unsupported_content_type", message));
    }
    if !rules.texts.contains(&kind.as_str()) {
        let name = part.name("type");
        let message = format!("'{name}' must be {}, not '{}'.", alternatives(rules.texts), quoted(&kind));
        return Err(Refusal::coded(name, "invalid_value", message));
    }
    let text = part.required("text")?;
    for (field, expected) in rules.beside {
        part.ignore(field, expected)?;
    }
    part.finish(&[])?;
    Ok(text)
}
