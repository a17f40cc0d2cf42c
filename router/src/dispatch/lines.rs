//! Cuts a byte stream into lines and lines into events.

use baton_config::protocol::GenerateEvent;

/// Longest line a worker may send.
const LINE_MAX_BYTES: usize = 1 << 20;

/// What every line of a plain generation looks like, but for the number.
const TOKEN_PREFIX: &[u8] = b"{\"event\":\"token\",\"token\":";

/// Why a stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(super) enum LineError {
    /// No line break in sight.
    #[error("a line of more than {LINE_MAX_BYTES} bytes")]
    TooLong,
    /// Not an event.
    #[error("a line that is no event")]
    Malformed(#[source] serde_json::Error),
}

/// Bytes received and not yet read.
#[derive(Debug, Default)]
pub(super) struct Lines {
    buffer: Vec<u8>,
    /// Everything before is done with.
    read: usize,
    /// Everything from `read` to here is known to hold no line break.
    searched: usize,
}

impl Lines {
    /// Takes in what arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), LineError> {
        if self.read == self.buffer.len() {
            self.buffer.clear();
        } else {
            self.buffer.drain(..self.read);
        }
        self.searched -= self.read;
        self.read = 0;
        self.buffer.extend_from_slice(bytes);
        if self.searched > LINE_MAX_BYTES {
            return Err(LineError::TooLong);
        }
        Ok(())
    }

    /// The next event that is complete; empty lines are skipped.
    pub(super) fn next_event(&mut self) -> Result<Option<GenerateEvent>, LineError> {
        loop {
            let Some(at) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.buffer.len();
                return Ok(None);
            };
            let end = self.searched + at;
            let line = self.buffer[self.read..end].trim_ascii();
            self.read = end + 1;
            self.searched = self.read;
            if !line.is_empty() {
                return parse(line).map(Some);
            }
        }
    }

    /// Whether a line was cut off.
    pub(super) fn is_mid_line(&self) -> bool {
        self.read < self.buffer.len()
    }
}

fn parse(line: &[u8]) -> Result<GenerateEvent, LineError> {
    if let Some(token) = plain_token(line) {
        return Ok(GenerateEvent::Token { token, logprob: None, logits_digest: None });
    }
    serde_json::from_slice(line).map_err(LineError::Malformed)
}

/// The token of a line that carries nothing else, without the detour that a tagged enum takes.
fn plain_token(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(TOKEN_PREFIX)?.strip_suffix(b"}")?;
    if digits.is_empty() || digits.len() > 9 || (digits[0] == b'0' && digits.len() > 1) {
        return None;
    }
    digits
        .iter()
        .try_fold(0u32, |number, digit| digit.is_ascii_digit().then(|| number * 10 + u32::from(digit - b'0')))
}

#[cfg(test)]
mod tests;
