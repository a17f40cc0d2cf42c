//! Finds where values begin and end, many bytes at a step.
//!
//! `None` stands for whatever is not plain: the caller has it read again. What is found is exactly what `serde_json` finds
//! in a text whose values stay unparsed: grammar of numbers and escapes, no control characters in strings, white space.

use std::borrow::Cow;

use super::{Entries, Raw};
use crate::search::before;

/// Deeper nesting is not plain.
const DEPTH_MAX: u32 = 64;

/// The fields of the object that a text is; `KNOWN` when it was gone through before.
pub(super) fn entries<const KNOWN: bool>(text: &str, max: usize) -> Option<Entries<'_>> {
    let mut cursor = Cursor::<KNOWN> { text, at: 0 };
    let mut entries = Vec::new();
    cursor.space();
    cursor.byte(b'{')?;
    cursor.space();
    if cursor.byte(b'}').is_none() {
        loop {
            let key = cursor.key()?;
            let value = cursor.next_value()?;
            if entries.len() == max {
                return None;
            }
            entries.push((Cow::Borrowed(key), value));
            if !cursor.goes_on(b'}')? {
                break;
            }
        }
    }
    cursor.space();
    (cursor.at == text.len()).then_some(entries)
}

/// The elements of the array that a text is, which was gone through before.
pub(super) fn items(text: &str, max: usize) -> Option<Vec<Raw<'_>>> {
    let mut cursor = Cursor::<true> { text, at: 0 };
    let mut items = Vec::new();
    cursor.byte(b'[')?;
    cursor.space();
    if cursor.byte(b']').is_none() {
        loop {
            cursor.space();
            let value = cursor.next_value()?;
            if items.len() == max {
                return None;
            }
            items.push(value);
            if !cursor.goes_on(b']')? {
                break;
            }
        }
    }
    (cursor.at == text.len()).then_some(items)
}

/// The text of a string that was gone through before.
pub(super) fn string(text: &str) -> Option<String> {
    let mut rest = text.strip_prefix('"')?.strip_suffix('"')?;
    let backslash = |rest: &str| before(rest.as_bytes(), |byte| u8::from(byte == b'\\'));
    let mut out = String::with_capacity(rest.len());
    loop {
        let at = backslash(rest);
        out.push_str(&rest[..at]);
        if at == rest.len() {
            return Some(out);
        }
        let (c, length) = match *rest.as_bytes().get(at + 1)? {
            b'n' => ('\n', 2),
            b't' => ('\t', 2),
            b'r' => ('\r', 2),
            b'b' => ('\u{8}', 2),
            b'f' => ('\u{c}', 2),
            escaped @ (b'"' | b'\\' | b'/') => (char::from(escaped), 2),
            b'u' => unicode(rest.as_bytes().get(at + 2..)?)?,
            _ => return None,
        };
        out.push(c);
        rest = rest.get(at + length..)?;
    }
}

/// The character of what follows `\u`, and the length of the whole escape.
fn unicode(bytes: &[u8]) -> Option<(char, usize)> {
    let unit = |at: usize| {
        let digits = std::str::from_utf8(bytes.get(at..at + 4)?).ok()?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        u32::from_str_radix(digits, 16).ok()
    };
    let first = unit(0)?;
    if !(0xD800..0xDC00).contains(&first) {
        return Some((char::from_u32(first)?, 6));
    }
    if bytes.get(4..6)? != b"\\u" {
        return None;
    }
    let second = unit(6).filter(|unit| (0xDC00..0xE000).contains(unit))?;
    let code = 0x1_0000 + ((first - 0xD800) << 10) + (second - 0xDC00);
    Some((char::from_u32(code)?, 12))
}

/// A place in a text, always between characters.
struct Cursor<'a, const KNOWN: bool> {
    text: &'a str,
    at: usize,
}

impl<'a, const KNOWN: bool> Cursor<'a, KNOWN> {
    fn rest(&self) -> &'a [u8] {
        self.text.as_bytes().get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn byte(&mut self, byte: u8) -> Option<()> {
        (self.peek()? == byte).then(|| self.at += 1)
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\t' | b'\r')) {
            self.at += 1;
        }
    }

    /// A key without escapes, and the colon.
    fn key(&mut self) -> Option<&'a str> {
        self.space();
        let start = self.at + 1;
        self.string()?;
        let key = self.text.get(start..self.at - 1)?;
        if key.as_bytes().contains(&b'\\') {
            return None;
        }
        self.space();
        self.byte(b':')?;
        self.space();
        Some(key)
    }

    fn next_value(&mut self) -> Option<Raw<'a>> {
        let start = self.at;
        self.value(DEPTH_MAX)?;
        Some(Raw(self.text.get(start..self.at)?))
    }

    /// Whether another element follows, or the end.
    fn goes_on(&mut self, end: u8) -> Option<bool> {
        self.space();
        let next = self.peek()?;
        self.at += 1;
        match next {
            b',' => Some(true),
            next if next == end => Some(false),
            _ => None,
        }
    }

    fn value(&mut self, depth: u32) -> Option<()> {
        match self.peek()? {
            b'"' => self.string(),
            b'{' => self.inside(b'}', depth),
            b'[' => self.inside(b']', depth),
            b't' => self.word(b"true"),
            b'f' => self.word(b"false"),
            b'n' => self.word(b"null"),
            _ => self.number(),
        }
    }

    fn inside(&mut self, end: u8, depth: u32) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        self.at += 1;
        self.space();
        if self.byte(end).is_some() {
            return Some(());
        }
        loop {
            self.space();
            if end == b'}' {
                self.string()?;
                self.space();
                self.byte(b':')?;
                self.space();
            }
            self.value(depth)?;
            if !self.goes_on(end)? {
                return Some(());
            }
        }
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.rest().starts_with(word).then(|| self.at += word.len())
    }

    fn number(&mut self) -> Option<()> {
        let _ = self.byte(b'-');
        let digits = self.digits()?;
        if digits > 1 && self.text.as_bytes().get(self.at - digits) == Some(&b'0') {
            return None;
        }
        if self.byte(b'.').is_some() {
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Some(())
    }

    /// How many digits there are, at least one.
    fn digits(&mut self) -> Option<usize> {
        let count = self.rest().iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        (count > 0).then_some(count)
    }

    fn string(&mut self) -> Option<()> {
        self.byte(b'"')?;
        loop {
            self.at += self.plain();
            match self.peek()? {
                b'"' => {
                    self.at += 1;
                    return Some(());
                }
                b'\\' => self.escape()?,
                _ => return None,
            }
        }
    }

    fn escape(&mut self) -> Option<()> {
        match *self.rest().get(1)? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => self.at += 2,
            b'u' if self.rest().get(2..6)?.iter().all(u8::is_ascii_hexdigit) => self.at += 6,
            _ => return None,
        }
        Some(())
    }

    /// Bytes of a string before the next one that means something.
    fn plain(&self) -> usize {
        let rest = self.rest();
        match KNOWN {
            true => before(rest, |byte| u8::from(byte == b'"') | u8::from(byte == b'\\')),
            false => {
                before(rest, |byte| u8::from(byte == b'"') | u8::from(byte == b'\\') | u8::from(byte < b' '))
            }
        }
    }
}
