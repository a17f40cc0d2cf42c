//! Stop strings: the text ends before the first of them, wherever the borders of tokens fall.

/// Looks for stop strings in a text that arrives in pieces.
///
/// Equal to reading the text character by character and ending it as soon as it ends in a stop string, which is then
/// cut off. Text that could still turn out to be the beginning of a stop string is held back.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// Held back: a proper beginning of at least one stop string, or empty.
    held: String,
    /// Which stop string ended the text.
    matched: Option<usize>,
}

impl StopMatcher {
    /// A matcher at the start of a text; without stop strings it passes everything through.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), matched: None }
    }

    /// Takes the next piece, appends to `out` what is safe to show, and says whether the text has ended.
    pub(crate) fn push(&mut self, piece: &str, out: &mut String) -> bool {
        if self.stops.is_empty() {
            out.push_str(piece);
            return false;
        }
        self.held.push_str(piece);
        if let Some((start, which)) = self.first_match() {
            out.push_str(&self.held[..start]);
            self.held.clear();
            self.matched = Some(which);
            return true;
        }
        let safe = self.held.len() - self.longest_beginning();
        out.push_str(&self.held[..safe]);
        self.held.drain(..safe);
        false
    }

    /// Appends what was held back; the text has ended without a stop string.
    pub(crate) fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The stop string that ended the text, once one has.
    pub(crate) fn matched(&self) -> Option<&str> {
        self.matched.map(|which| self.stops[which].as_str())
    }

    /// Where the match that ends first begins, of several that end there the longest; and which string it is.
    fn first_match(&self) -> Option<(usize, usize)> {
        let found = |(which, stop): (usize, &String)| {
            self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, which))
        };
        self.stops.iter().enumerate().filter_map(found).min().map(|(_, start, which)| (start, which))
    }

    /// Bytes at the end of the text that could be the beginning of a stop string.
    fn longest_beginning(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let bytes = stop.as_bytes();
            let most = held.len().min(bytes.len().saturating_sub(1));
            (1..=most).rev().find(|len| held.ends_with(&bytes[..*len])).unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
