//! Reads a document key by key, collecting every fault and every value with its origin.
//!
//! A [`Section`] learns which keys exist from being asked for them; when it is dropped, the keys nobody asked
//! for are faults. Reading never stops at a fault: the reader gives the default instead and goes on.

use std::cell::RefCell;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use crate::choice::Choice;
use crate::fault::{Fault, Position};
use crate::units::Bytes;
use crate::yaml::{Entry, Node, Value};

/// Where a value of the resolved document comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Written in the file.
    File(Position),
    /// Filled in.
    Default,
}

/// One value of the resolved document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Such as `pools[0].kv.block_tokens`.
    pub path: String,
    /// As it would be written; values that came from the environment show the `${NAME}` instead.
    pub value: String,
    /// Where it comes from.
    pub origin: Origin,
}

/// Looks up an environment variable.
pub(crate) type Lookup<'e> = &'e dyn Fn(&str) -> Option<String>;

/// What reading one document gathers.
pub(crate) struct Reader<'e> {
    lookup: Lookup<'e>,
    directory: Option<PathBuf>,
    faults: RefCell<Vec<Fault>>,
    resolved: RefCell<Vec<Resolved>>,
}

impl<'e> Reader<'e> {
    pub(crate) fn new(lookup: Lookup<'e>, directory: Option<PathBuf>) -> Self {
        Self { lookup, directory, faults: RefCell::default(), resolved: RefCell::default() }
    }

    /// Notes a fault.
    pub(crate) fn fault(
        &self,
        path: &str,
        at: Option<Position>,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let fault = Fault { path: path.to_owned(), at, problem: problem.into(), remedy: remedy.into() };
        self.faults.borrow_mut().push(fault);
    }

    /// Whether nothing under `path`, nor the document as a whole, is at fault so far.
    pub(crate) fn is_clean(&self, path: &str) -> bool {
        !self.faults.borrow().iter().any(|fault| fault.path.is_empty() || fault.path.starts_with(path))
    }

    /// Where the value of `path` stands, or the nearest part of the document around it.
    pub(crate) fn position(&self, path: &str) -> Option<Position> {
        self.resolved.borrow().iter().find(|value| value.path == path).and_then(|value| match value.origin {
            Origin::File(at) => Some(at),
            Origin::Default => None,
        })
    }

    pub(crate) fn record(&self, path: String, value: impl Display, at: Option<Position>) {
        let origin = at.map_or(Origin::Default, Origin::File);
        self.resolved.borrow_mut().push(Resolved { path, value: value.to_string(), origin });
    }

    /// A relative path of the file: beside the file if it is there, else in the working directory.
    pub(crate) fn resolve(&self, path: &str) -> PathBuf {
        let path = PathBuf::from(path);
        match &self.directory {
            Some(directory) if path.is_relative() && directory.join(&path).exists() => directory.join(path),
            _ => path,
        }
    }

    pub(crate) fn finish(self) -> (Vec<Fault>, Vec<Resolved>) {
        (self.faults.into_inner(), self.resolved.into_inner())
    }

    /// Replaces `${NAME}` by the environment variable; `$${` stands for a literal `${`.
    fn expand(&self, text: &str) -> Result<String, (String, String)> {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(start) = rest.find("${") {
            if rest[..start].ends_with('$') {
                out.push_str(&rest[..start - 1]);
                out.push_str("${");
                rest = &rest[start + 2..];
                continue;
            }
            out.push_str(&rest[..start]);
            let after = &rest[start + 2..];
            let name = after.split('}').next().filter(|name| name.len() < after.len() && is_variable(name));
            let Some(name) = name else {
                let problem = format!("has `${{` that is not followed by NAME}} in {text:?}");
                return Err((problem, "write ${NAME}, or $${ for a literal ${".to_owned()));
            };
            let Some(value) = (self.lookup)(name) else {
                let problem = format!("needs the environment variable {name}, which is not set");
                return Err((problem, format!("set {name}, or write the value here")));
            };
            out.push_str(&value);
            rest = &after[name.len() + 1..];
        }
        out.push_str(rest);
        Ok(out)
    }
}

fn is_variable(name: &str) -> bool {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    first && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// A scalar after expansion.
pub(crate) struct Text {
    /// The text.
    pub(crate) text: String,
    /// What may be shown of it: never a value of the environment.
    pub(crate) shown: String,
    /// Whether it stood in quotes and did not come from the environment: then it is no number.
    quoted: bool,
}

/// A map of the document, read key by key.
pub(crate) struct Section<'r, 'e> {
    pub(crate) reader: &'r Reader<'e>,
    pub(crate) path: String,
    pub(crate) at: Option<Position>,
    entries: Vec<Entry>,
    known: Vec<&'static str>,
    /// The section is at fault as a whole: keys missing from it are no further faults.
    broken: bool,
}

impl<'r, 'e> Section<'r, 'e> {
    /// Opens `node` as a section; anything but a map is a fault.
    pub(crate) fn open(reader: &'r Reader<'e>, path: String, node: Node) -> Self {
        let at = Some(node.at);
        let kind = node.kind();
        let mut section = Self { reader, path, at, entries: Vec::new(), known: Vec::new(), broken: false };
        match node.value {
            Value::Null => {}
            Value::Map(entries) => section.take_entries(entries),
            Value::Scalar { .. } | Value::List(_) => {
                section.broken = true;
                let name = if section.path.is_empty() { "the document" } else { "this" };
                reader.fault(
                    &section.path,
                    at,
                    format!("{name} is {kind}, not a section"),
                    "write `key: value` pairs",
                );
            }
        }
        section
    }

    /// A section the document does not have: every value is the default.
    pub(crate) fn absent(reader: &'r Reader<'e>, path: String) -> Self {
        Self { reader, path, at: None, entries: Vec::new(), known: Vec::new(), broken: false }
    }

    fn take_entries(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            match self.entries.iter().find(|seen| seen.key == entry.key) {
                None => self.entries.push(entry),
                Some(first) => {
                    let problem = format!("key is given a second time (first in line {})", first.at.line);
                    self.reader.fault(&self.child(&entry.key), Some(entry.at), problem, "keep one of them");
                }
            }
        }
    }

    /// The path of a key.
    pub(crate) fn child(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Takes the value of a key out; an empty one counts as missing.
    pub(crate) fn take(&mut self, key: &'static str) -> Option<Node> {
        self.known.push(key);
        let index = self.entries.iter().position(|entry| entry.key == key)?;
        let node = self.entries.remove(index).value;
        (!matches!(node.value, Value::Null)).then_some(node)
    }

    /// Whether a key is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.key == key && !matches!(entry.value.value, Value::Null))
    }

    /// Where the value of a key stands.
    pub(crate) fn position(&self, key: &str) -> Option<Position> {
        self.entries.iter().find(|entry| entry.key == key).map(|entry| entry.value.at)
    }

    /// Reports that a key must be there.
    pub(crate) fn missing(&self, key: &str, expected: &str) {
        if !self.broken {
            self.reader.fault(
                &self.child(key),
                self.at,
                "is missing",
                format!("write `{key}:` with {expected}"),
            );
        }
    }

    /// A section within this one; all defaults when it is missing.
    pub(crate) fn section(&mut self, key: &'static str) -> Section<'r, 'e> {
        let path = self.child(key);
        match self.take(key) {
            Some(node) => Section::open(self.reader, path, node),
            None => Section::absent(self.reader, path),
        }
    }

    /// A section within this one, if it is there.
    pub(crate) fn section_if_given(&mut self, key: &'static str) -> Option<Section<'r, 'e>> {
        let path = self.child(key);
        self.take(key).map(|node| Section::open(self.reader, path, node))
    }

    /// The items of a list, each with its path.
    pub(crate) fn list(&mut self, key: &'static str) -> Option<Vec<(String, Node)>> {
        let path = self.child(key);
        let node = self.take(key)?;
        let (at, kind) = (node.at, node.kind());
        match node.value {
            Value::List(items) => {
                Some(items.into_iter().enumerate().map(|(i, item)| (format!("{path}[{i}]"), item)).collect())
            }
            Value::Null | Value::Scalar { .. } | Value::Map(_) => {
                self.reader.fault(&path, Some(at), format!("is {kind}, not a list"), "write it as [a, b]");
                None
            }
        }
    }

    /// The value of a key, if it is there and good; `expected` says in words what good is.
    pub(crate) fn optional<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&Text) -> Option<T>,
    ) -> Option<T> {
        let path = self.child(key);
        let node = self.take(key)?;
        read_scalar(self.reader, &path, node, expected, parse)
    }

    /// The value of a key, which must be there.
    pub(crate) fn required<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&Text) -> Option<T>,
    ) -> Option<T> {
        if !self.has(key) {
            self.missing(key, expected);
        }
        self.optional(key, expected, parse)
    }

    /// The value of a key, or its default.
    pub(crate) fn value<T: Display>(
        &mut self,
        key: &'static str,
        expected: &str,
        default: T,
        parse: impl FnOnce(&Text) -> Option<T>,
    ) -> T {
        if !self.has(key) {
            self.take(key);
            self.reader.record(self.child(key), &default, None);
            return default;
        }
        let expected = format!("{expected} (the default is {default})");
        self.optional(key, &expected, parse).unwrap_or(default)
    }

    /// One of the words of `T`, or its default.
    pub(crate) fn choice<T: Choice + Display>(&mut self, key: &'static str, default: T) -> T {
        if !self.has(key) {
            return self.value(key, "", default, |_| None);
        }
        self.choice_if_given(key).unwrap_or(default)
    }

    /// One of the words of `T`, if the key is there.
    pub(crate) fn choice_if_given<T: Choice>(&mut self, key: &'static str) -> Option<T> {
        let path = self.child(key);
        let node = self.take(key)?;
        read_choice(self.reader, &path, node)
    }

    /// A whole number within `range`, or its default.
    pub(crate) fn integer(&mut self, key: &'static str, range: RangeInclusive<u64>, default: u64) -> u64 {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.value(key, &expected, default, |text| text.integer().filter(|n| range.contains(n)))
    }

    /// As [`Section::integer`], for numbers of 32 bits.
    pub(crate) fn count(&mut self, key: &'static str, range: RangeInclusive<u32>, default: u32) -> u32 {
        let wide = u64::from(*range.start())..=u64::from(*range.end());
        u32::try_from(self.integer(key, wide, u64::from(default))).unwrap_or(default)
    }

    /// `true` or `false`, or its default.
    pub(crate) fn flag(&mut self, key: &'static str, default: bool) -> bool {
        self.value(key, "true or false", default, |text| match text.text.as_str() {
            "true" if !text.quoted => Some(true),
            "false" if !text.quoted => Some(false),
            _ => None,
        })
    }

    /// A number of bytes within `range`, or its default.
    pub(crate) fn bytes(&mut self, key: &'static str, range: RangeInclusive<Bytes>, default: Bytes) -> Bytes {
        let expected = format!("a size from {} to {}, like 64MiB", range.start(), range.end());
        self.value(key, &expected, default, |text| text.text.parse().ok().filter(|n| range.contains(n)))
    }

    /// A duration of at most `max` whose unit the key's name tells (`_ms`, `_us_`, `_ns_`), or its default.
    pub(crate) fn duration(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u64>,
        default: Duration,
    ) -> Duration {
        let nanos_per_unit = match key {
            _ if key.ends_with("_ms") => 1_000_000,
            _ if key.contains("_us_") => 1_000,
            _ => 1,
        };
        let default = u64::try_from(default.as_nanos() / nanos_per_unit).unwrap_or(u64::MAX);
        let value = self.integer(key, range, default);
        Duration::from_nanos(value.saturating_mul(u64::try_from(nanos_per_unit).unwrap_or(1)))
    }

    /// A text of 1 to 1024 characters, if the key is there.
    pub(crate) fn text(&mut self, key: &'static str, expected: &str) -> Option<String> {
        self.optional(key, expected, Text::words)
    }

    /// The path of a file, if the key is there.
    pub(crate) fn file(&mut self, key: &'static str) -> Option<PathBuf> {
        let text = self.optional(key, "the path of a file", Text::words)?;
        Some(self.reader.resolve(&text))
    }
}

impl Drop for Section<'_, '_> {
    fn drop(&mut self) {
        for entry in &self.entries {
            let (problem, remedy) = unknown(&entry.key, &self.known);
            self.reader.fault(&self.child(&entry.key), Some(entry.at), problem, remedy);
        }
    }
}

impl Text {
    /// As a whole number.
    pub(crate) fn integer(&self) -> Option<u64> {
        let digits = !self.quoted && self.text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| self.text.parse().ok())?
    }

    /// As a text of 1 to 1024 characters without line breaks.
    pub(crate) fn words(&self) -> Option<String> {
        let text = self.text.trim();
        let fits = !text.is_empty() && text.len() <= 1024 && !text.contains(['\n', '\r']);
        fits.then(|| text.to_owned())
    }
}

/// Reads a single value; faults say what was expected.
pub(crate) fn read_scalar<T>(
    reader: &Reader<'_>,
    path: &str,
    node: Node,
    expected: &str,
    parse: impl FnOnce(&Text) -> Option<T>,
) -> Option<T> {
    let text = expand_scalar(reader, path, node, expected)?;
    let (text, at) = text;
    let value = parse(&text);
    if value.is_some() {
        reader.record(path.to_owned(), &text.shown, Some(at));
    } else {
        let plain = expected.split(" (the default").next().unwrap_or(expected);
        let shown = match (text.shown.as_str(), text.quoted) {
            ("", _) => "empty".to_owned(),
            (words, true) => format!("{} in quotes", cut(words)),
            (words, false) => cut(words),
        };
        let problem = format!("is {shown}, which is not {plain}");
        reader.fault(path, Some(at), problem, format!("write {expected}"));
    }
    value
}

fn expand_scalar(reader: &Reader<'_>, path: &str, node: Node, expected: &str) -> Option<(Text, Position)> {
    let (at, kind) = (node.at, node.kind());
    let Value::Scalar { text: raw, quoted } = node.value else {
        reader.fault(path, Some(at), format!("is {kind}, not a single value"), format!("write {expected}"));
        return None;
    };
    match reader.expand(&raw) {
        Ok(text) => {
            let quoted = quoted && text == raw;
            Some((Text { text, shown: raw, quoted }, at))
        }
        Err((problem, remedy)) => {
            reader.fault(path, Some(at), problem, remedy);
            None
        }
    }
}

/// Reads one of the words of `T`.
pub(crate) fn read_choice<T: Choice>(reader: &Reader<'_>, path: &str, node: Node) -> Option<T> {
    let words: Vec<&str> = T::ALL.iter().map(|(word, _)| *word).collect();
    let (text, at) = expand_scalar(reader, path, node, &format!("one of {}", words.join(", ")))?;
    if let Some((word, value)) = T::ALL.iter().find(|(word, _)| *word == text.text) {
        reader.record(path.to_owned(), word, Some(at));
        return Some(*value);
    }
    let problem = format!("is {}, which is not one of {}", cut(&text.shown), words.join(", "));
    let remedy = match nearest(&text.shown, &words) {
        Some(word) => format!("did you mean `{word}`?"),
        None => format!("write one of {}", words.join(", ")),
    };
    reader.fault(path, Some(at), problem, remedy);
    None
}

/// What to say about a key nobody knows.
fn unknown(key: &str, known: &[&'static str]) -> (String, String) {
    let secret = known.iter().find(|k| k.strip_suffix("_file") == Some(key));
    if let Some(file_key) = secret {
        let problem = "would hold a secret in clear text".to_owned();
        return (problem, format!("write the secret into a file and give its path as `{file_key}:`"));
    }
    let remedy = match nearest(key, known) {
        Some(word) => format!("did you mean `{word}`?"),
        None if known.is_empty() => "remove it".to_owned(),
        None => format!("remove it; the keys here are {}", known.join(", ")),
    };
    (format!("unknown key `{}`", cut(key)), remedy)
}

/// The known word nearest to `word`, if it is near enough to be what was meant.
pub(crate) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    if word.len() > 64 {
        return None;
    }
    let word = word.to_ascii_lowercase().replace('-', "_");
    let within = (word.chars().count() / 3).clamp(1, 3);
    let scored = known.iter().map(|k| (strsim::damerau_levenshtein(&word, k), *k));
    scored.filter(|(distance, _)| *distance <= within).min_by_key(|(distance, _)| *distance).map(|(_, k)| k)
}

/// At most 60 characters of a text, without the credentials of a URL.
fn cut(text: &str) -> String {
    if let (Some(scheme), Some(at)) = (text.find("://"), text.rfind('@'))
        && scheme < at
    {
        return format!("{}://(credentials)@...", &text[..scheme.min(8)]);
    }
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
