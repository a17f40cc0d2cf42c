//! Reads the fields of one JSON object, each once, with errors that name the field.
//!
//! Values stay unparsed slices of the body until the field they belong to is read with its type. A key that occurs
//! twice is refused: whoever reads the body next might take the other one.

use std::collections::{BTreeMap, HashSet};

use super::json::{self, Entries, Raw, TextError};
use crate::reply::{Refusal, quoted};

/// Most fields of one object.
const FIELDS_MAX: usize = 256;
/// Longest text of a JSON parser's message that is passed on, in characters.
const PARSER_MESSAGE_MAX_CHARS: usize = 200;

/// The fields of an object that were not read yet.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    /// Where the object is, for messages: empty at the top, else like `messages[0]`.
    path: String,
    entries: Entries<'a>,
}

fn parser_message(error: &TextError) -> String {
    error.to_string().chars().take(PARSER_MESSAGE_MAX_CHARS).collect()
}

impl<'a> Fields<'a> {
    /// The fields of a request body.
    pub(super) fn parse_body(body: &'a [u8]) -> Result<Self, Refusal> {
        if body.is_empty() {
            return Err(Refusal::malformed("The request body is empty; a JSON object is expected."));
        }
        let text = std::str::from_utf8(body)
            .map_err(|_| Refusal::malformed("The request body is not valid UTF-8."))?;
        let entries = json::body(text, FIELDS_MAX).map_err(|error| {
            if error.is_data() && !text.trim_start().starts_with('{') {
                return Refusal::malformed("The request body must be a JSON object.");
            }
            Refusal::malformed(format!("The request body is not valid JSON: {}.", parser_message(&error)))
        })?;
        Self::new(String::new(), entries)
    }

    /// The fields of a nested object at `path`.
    pub(super) fn parse(path: String, raw: Raw<'a>) -> Result<Self, Refusal> {
        if !raw.get().starts_with('{') {
            let message = format!("'{path}' must be an object, not {}.", raw.kind());
            return Err(Refusal::coded(path, "invalid_type", message));
        }
        match raw.entries(FIELDS_MAX) {
            Ok(entries) => Self::new(path, entries),
            Err(error) => {
                let message = format!("'{path}' is not valid: {}.", parser_message(&error));
                Err(Refusal::invalid(path, message))
            }
        }
    }

    fn new(path: String, entries: Entries<'a>) -> Result<Self, Refusal> {
        let mut seen = HashSet::with_capacity(entries.len());
        if let Some((twice, _)) = entries.iter().find(|(key, _)| !seen.insert(key.as_ref())) {
            let name = join(&path, &quoted(twice));
            let message = format!("'{name}' occurs more than once.");
            return Err(Refusal::coded(name, "duplicate_key", message));
        }
        Ok(Self { path, entries })
    }

    /// Where the object is.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// The full name of a field of this object.
    pub(super) fn name(&self, field: &str) -> String {
        join(&self.path, field)
    }

    /// All fields that were not read yet, in their order until the first was read.
    pub(super) fn all(&self) -> impl Iterator<Item = (&str, Raw<'a>)> {
        self.entries.iter().map(|(key, raw)| (key.as_ref(), *raw))
    }

    /// Looks at a field without taking it; one that is `null` counts as absent.
    pub(super) fn peek(&self, field: &str) -> Option<Raw<'a>> {
        self.all().find(|(key, raw)| *key == field && raw.get() != "null").map(|(_, raw)| raw)
    }

    /// Takes a field; one that is `null` counts as absent.
    pub(super) fn take(&mut self, field: &str) -> Option<Raw<'a>> {
        let at = self.entries.iter().position(|(key, _)| key == field)?;
        let (_, raw) = self.entries.swap_remove(at);
        (raw.get() != "null").then_some(raw)
    }

    fn mistyped(&self, field: &str, expected: &str, raw: Raw<'_>) -> Refusal {
        let name = self.name(field);
        let message = format!("'{name}' must be {expected}, not {}.", raw.kind());
        Refusal::coded(name, "invalid_type", message)
    }

    /// Takes a boolean.
    pub(super) fn boolean(&mut self, field: &str) -> Result<Option<bool>, Refusal> {
        let Some(raw) = self.take(field) else { return Ok(None) };
        match raw.get() {
            "true" => Ok(Some(true)),
            "false" => Ok(Some(false)),
            _ => Err(self.mistyped(field, "a boolean", raw)),
        }
    }

    /// Takes an integer in `min..=max`.
    pub(super) fn integer(&mut self, field: &str, min: i64, max: i64) -> Result<Option<i64>, Refusal> {
        let Some(raw) = self.take(field) else { return Ok(None) };
        let name = self.name(field);
        if raw.kind() != "a number" {
            return Err(self.mistyped(field, "an integer", raw));
        }
        let text = raw.get();
        let digits = text.strip_prefix('-').unwrap_or(text);
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            let message = format!("'{name}' must be an integer, not {}.", quoted(text));
            return Err(Refusal::coded(name, "invalid_type", message));
        }
        match text.parse::<i64>() {
            Ok(value) if (min..=max).contains(&value) => Ok(Some(value)),
            // What is too long to be counted with is too small or too large, too.
            result if result.as_ref().map_or(text.starts_with('-'), |value| *value < min) => {
                let message = format!("'{name}' must be at least {min}, not {}.", quoted(text));
                Err(Refusal::coded(name, "integer_below_min_value", message))
            }
            _ => {
                let message = format!("'{name}' must be at most {max}, not {}.", quoted(text));
                Err(Refusal::coded(name, "integer_above_max_value", message))
            }
        }
    }

    /// Takes a number in `min..=max`.
    pub(super) fn number(&mut self, field: &str, min: f64, max: f64) -> Result<Option<f32>, Refusal> {
        let Some(raw) = self.take(field) else { return Ok(None) };
        if raw.kind() != "a number" {
            return Err(self.mistyped(field, "a number", raw));
        }
        let name = self.name(field);
        let text = raw.get();
        match serde_json::from_str::<f64>(text) {
            Ok(value) if (min..=max).contains(&value) => Ok(Some(value as f32)),
            result if result.as_ref().map_or(text.starts_with('-'), |value| *value < min) => {
                let message = format!("'{name}' must be at least {min}, not {}.", quoted(text));
                Err(Refusal::coded(name, "decimal_below_min_value", message))
            }
            _ => {
                let message = format!("'{name}' must be at most {max}, not {}.", quoted(text));
                Err(Refusal::coded(name, "decimal_above_max_value", message))
            }
        }
    }

    /// Takes a string.
    pub(super) fn string(&mut self, field: &str) -> Result<Option<String>, Refusal> {
        let Some(raw) = self.take(field) else { return Ok(None) };
        if raw.kind() != "a string" {
            return Err(self.mistyped(field, "a string", raw));
        }
        string_at(&self.name(field), raw).map(Some)
    }

    /// Takes a string or an array of at most `max` strings.
    pub(super) fn strings(&mut self, field: &str, max: usize) -> Result<Option<Vec<String>>, Refusal> {
        let Some(raw) = self.take(field) else { return Ok(None) };
        let name = self.name(field);
        match raw.kind() {
            "a string" => Ok(Some(vec![string_at(&name, raw)?])),
            "an array" => {
                let items = items_at(&name, raw, max)?;
                let text = |(i, item): (usize, Raw<'_>)| string_at(&format!("{name}[{i}]"), item);
                items.into_iter().enumerate().map(text).collect::<Result<_, _>>().map(Some)
            }
            _ => Err(self.mistyped(field, "a string or an array of strings", raw)),
        }
    }

    /// Takes an array of at most `max` values.
    pub(super) fn items(&mut self, field: &str, max: usize) -> Result<Option<Vec<Raw<'a>>>, Refusal> {
        let Some(raw) = self.take(field) else { return Ok(None) };
        if raw.kind() != "an array" {
            return Err(self.mistyped(field, "an array", raw));
        }
        items_at(&self.name(field), raw, max).map(Some)
    }

    /// Takes an object.
    pub(super) fn object(&mut self, field: &str) -> Result<Option<Fields<'a>>, Refusal> {
        let Some(raw) = self.take(field) else { return Ok(None) };
        Fields::parse(self.name(field), raw).map(Some)
    }

    /// Takes a string of at most `max` characters.
    pub(super) fn short(&mut self, field: &str, max: usize) -> Result<Option<String>, Refusal> {
        let text = self.string(field)?;
        if text.as_ref().is_some_and(|text| text.chars().count() > max) {
            let name = self.name(field);
            let message = format!("'{name}' may have at most {max} characters.");
            return Err(Refusal::coded(name, "string_above_max_length", message));
        }
        Ok(text)
    }

    /// Takes one of several words.
    pub(super) fn word(
        &mut self,
        field: &str,
        words: &'static [&'static str],
    ) -> Result<Option<&'static str>, Refusal> {
        let Some(text) = self.string(field)? else { return Ok(None) };
        let known = words.iter().find(|word| **word == text);
        known.copied().map(Some).ok_or_else(|| {
            let name = self.name(field);
            let message = format!("'{name}' must be {}, not '{}'.", alternatives(words), quoted(&text));
            Refusal::coded(name, "invalid_value", message)
        })
    }

    /// Takes a string that must be there.
    pub(super) fn required(&mut self, field: &str) -> Result<String, Refusal> {
        self.string(field)?.ok_or_else(|| self.missing(field))
    }

    /// What is said of a field that must be there and is not.
    pub(super) fn missing(&self, field: &str) -> Refusal {
        let name = self.name(field);
        let message = format!("'{name}' is required.");
        Refusal::coded(name, "missing_required_parameter", message)
    }

    /// Takes a value without effect, which must at least be `expected`, as [`kind`] says it.
    pub(super) fn ignore(&mut self, field: &str, expected: &str) -> Result<(), Refusal> {
        match self.take(field) {
            Some(raw) if raw.kind() != expected => Err(self.mistyped(field, expected, raw)),
            _ => Ok(()),
        }
    }

    /// Takes a map of strings as OpenAI bounds it: 16 pairs, keys of 64 and values of 512 characters.
    pub(super) fn metadata(&mut self, field: &str) -> Result<Option<BTreeMap<String, String>>, Refusal> {
        let Some(mut object) = self.object(field)? else { return Ok(None) };
        let mut pairs = BTreeMap::new();
        let name = self.name(field);
        if object.entries.len() > 16 {
            return Err(Refusal::invalid(name, format!("'{field}' may have at most 16 pairs.")));
        }
        for key in object.keys() {
            let value = object.string(&key)?.unwrap_or_default();
            if key.chars().count() > 64 || value.chars().count() > 512 {
                let message = format!("Keys of '{field}' may have at most 64 characters, values 512.");
                return Err(Refusal::invalid(name, message));
            }
            pairs.insert(key, value);
        }
        Ok(Some(pairs))
    }

    /// The names of the fields left.
    pub(super) fn keys(&self) -> Vec<String> {
        self.entries.iter().map(|(key, _)| key.to_string()).collect()
    }

    /// Refuses fields that nobody read, except `ignored` ones and those that are `null`.
    pub(super) fn finish(self, ignored: &[&str]) -> Result<(), Refusal> {
        let unknown =
            self.entries.iter().find(|(key, raw)| !ignored.contains(&key.as_ref()) && raw.get() != "null");
        let Some((key, _)) = unknown else { return Ok(()) };
        let name = join(&self.path, &quoted(key));
        let message = format!("'{name}' is not a known parameter.");
        Err(Refusal::coded(name, "unknown_parameter", message))
    }
}

/// `'a', 'b' or 'c'`.
pub(super) fn alternatives(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// Parses a string, refusing lone surrogates and the like.
pub(super) fn string_at(name: &str, raw: Raw<'_>) -> Result<String, Refusal> {
    if raw.kind() != "a string" {
        let message = format!("'{name}' must be a string, not {}.", raw.kind());
        return Err(Refusal::coded(name, "invalid_type", message));
    }
    raw.string().map_err(|error| Refusal::invalid(name, format!("'{name}' is not a valid string: {error}.")))
}

/// Parses an array of at most `max` values.
pub(super) fn items_at<'a>(name: &str, raw: Raw<'a>, max: usize) -> Result<Vec<Raw<'a>>, Refusal> {
    raw.items(max).map_err(|_| {
        let message = format!("'{name}' may have at most {max} elements.");
        Refusal::coded(name, "array_above_max_length", message)
    })
}
