//! Templates that write a sum of texts write its terms instead, one after the other.
//!
//! `{{ '<|user|>' + message.content + '<|end|>' }}` makes a text of its own for each `+`, copied twice: of a long prompt,
//! more than all the rest costs. `{{ '<|user|>' }}{{ message.content }}{{ '<|end|>' }}` says the same, provided that the
//! terms are texts. They are wherever one of them is a literal, or else the sum fails; that they are is checked by a filter.

/// The filter that lets nothing but texts through.
pub(super) const FILTER: &str = "baton_text";

/// Words that make more of an expression than a sum.
const WORDS: [&str; 7] = ["if", "else", "and", "or", "not", "in", "is"];

/// The same template with the sums of texts that it writes taken apart.
pub(super) fn apart(source: &str) -> String {
    rewritten(source).unwrap_or_else(|| source.to_owned())
}

fn rewritten(source: &str) -> Option<String> {
    let mut out = String::with_capacity(2 * source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (text, tag) = rest.split_at(at);
        out.push_str(text);
        let end = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}")? + 2,
            Some(b'%') => end_of(tag, b"%}")?,
            Some(b'{') => end_of(tag, b"}}")?,
            _ => 1,
        };
        let (tag, after) = tag.split_at(end);
        rest = after;
        if tag.starts_with("{%")
            && tag[2..].trim_start_matches(['-', '+', ' ', '\n', '\t']).starts_with("raw")
        {
            return None;
        }
        match tag.strip_prefix("{{").and_then(|tag| terms(tag.strip_suffix("}}")?)) {
            Some(terms) => out.push_str(&terms),
            None => out.push_str(tag),
        }
    }
    out.push_str(rest);
    Some(out)
}

/// Where a tag ends, beyond its two last characters: not within a literal or a bracket.
fn end_of(tag: &str, end: &[u8; 2]) -> Option<usize> {
    let mut scan = Scan::default();
    let bytes = tag.as_bytes();
    (2..bytes.len()).find(|at| !scan.is_inside(bytes[*at]) && bytes[*at..].starts_with(end)).map(|at| at + 2)
}

/// What the inside of a tag is written as, if it is a sum of texts.
fn terms(inner: &str) -> Option<String> {
    let (inner, left) = inner.strip_prefix('-').map_or((inner, ""), |inner| (inner, "-"));
    let (inner, right) = inner.strip_suffix('-').map_or((inner, ""), |inner| (inner, "-"));
    let mut scan = Scan::default();
    let mut terms = vec![];
    let mut start = 0;
    for (at, byte) in inner.bytes().enumerate() {
        if scan.is_inside(byte) {
            continue;
        }
        match byte {
            b'+' => {
                terms.push(inner.get(start..at)?.trim());
                start = at + 1;
            }
            b'.' | b'|' | b'_' | b'\'' | b'"' => {}
            plain if plain.is_ascii_alphanumeric() || plain.is_ascii_whitespace() => {}
            _ => return None,
        }
    }
    terms.push(inner.get(start..)?.trim());
    if terms.len() < 2
        || !terms.iter().all(|term| is_term(term))
        || !terms.iter().any(|term| is_literal(term))
    {
        return None;
    }
    let last = terms.len() - 1;
    let write = |(number, term): (usize, &&str)| {
        let (left, right) = (if number == 0 { left } else { "" }, if number == last { right } else { "" });
        match is_literal(term) {
            true => format!("{{{{{left} {term} {right}}}}}"),
            false => format!("{{{{{left} {term} | {FILTER} {right}}}}}"),
        }
    };
    Some(terms.iter().enumerate().map(write).collect())
}

/// Whether it binds more tightly than a sum: a name, what is taken from it, a call, a filter of that.
fn is_term(term: &str) -> bool {
    let mut scan = Scan::default();
    let outside: String =
        term.chars().map(|c| if c.is_ascii() && !scan.is_inside(c as u8) { c } else { '\'' }).collect();
    let mut words = outside.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    !term.is_empty()
        && !term.starts_with(|c: char| c.is_ascii_digit())
        && !words.any(|word| WORDS.contains(&word))
}

fn is_literal(term: &str) -> bool {
    let mut scan = Scan::default();
    let quoted = term.len() > 1 && term.starts_with(['\'', '"']);
    let last = term.len().saturating_sub(1);
    quoted && term.bytes().enumerate().all(|(at, byte)| scan.is_inside(byte) != (at == last))
}

/// Whether the bytes of an expression are within literals or brackets; the quote that closes a literal is not.
#[derive(Debug, Default)]
struct Scan {
    quote: Option<u8>,
    escaped: bool,
    depth: u32,
}

impl Scan {
    fn is_inside(&mut self, byte: u8) -> bool {
        if let Some(quote) = self.quote {
            let ends = byte == quote && !self.escaped;
            self.escaped = byte == b'\\' && !self.escaped;
            if ends {
                self.quote = None;
            }
            return !ends || self.depth > 0;
        }
        match byte {
            b'\'' | b'"' => self.quote = Some(byte),
            b'(' | b'[' | b'{' => self.depth += 1,
            b')' | b']' | b'}' if self.depth > 0 => self.depth -= 1,
            _ => return self.depth > 0,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_texts_are_taken_apart() {
        for (source, wanted) in [
            ("{{ 'a' + b }}", "{{ 'a' }}{{ b | baton_text }}"),
            ("x{{- b['c'] + '\\'}}' -}}y", "x{{- b['c'] | baton_text }}{{ '\\'}}' -}}y"),
            (
                "{{'<' + m.role + \"+\" + m['x'] | trim + f(1 + 2, 'a')[0].strip() }}",
                "{{ '<' }}{{ m.role | baton_text }}{{ \"+\" }}{{ m['x'] | trim | baton_text }}{{ f(1 + 2, 'a')[0].strip() | baton_text }}",
            ),
            ("{# {{ 'a' + b }} #}{{ 'é' + b }}", "{# {{ 'a' + b }} #}{{ 'é' }}{{ b | baton_text }}"),
        ] {
            assert_eq!(apart(source), wanted);
        }
    }

    #[test]
    fn everything_else_stays() {
        for source in [
            "{{ a + b }}",
            "{{ 'a' }}",
            "{{ 'a' + b if c else d }}",
            "{{ 'a' + b * 2 }}",
            "{{ 'a' + b == c }}",
            "{{ 'a' + b ~ c }}",
            "{{ 'a' + }}",
            "{{ not 'a' + b }}",
            "{{ ('a' + b) }}",
            "{{ ['a'] + b }}",
            "{% set x = 'a' + b %}",
            "{% raw %}{{ 'a' + b }}{% endraw %}",
            "{{ 'a' + b",
            "{ 'a' + b }",
            "{{ 'a' - b }}",
            "{{+ 'a' + b }}",
            "{{ 'a' + 1 }}",
            "{{ {'a': 'b' + c} }}",
            "{{ {'a': 'b' + c}}}",
            "{{ 'a' + b is string }}",
            "{{ 'a' + é }}",
            "{% if 'a' + b %}{{ c }}{% endif %}",
            "{{ 'a' 'b' + c",
            "",
            "{",
            "{{",
            "{%",
        ] {
            assert_eq!(apart(source), source);
        }
    }
}
