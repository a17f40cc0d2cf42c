//! Writes frames.

use super::{CANCEL, CREDIT, EVENT, HEADER_BYTES, OPEN, StreamId, TOKENS};
use crate::protocol::{GenerateEvent, GenerateRequest};

/// Most tokens of a frame; further ones go into the next.
const TOKENS_MAX: usize = 4096;

/// Appends the beginning of a generation.
///
/// # Errors
/// When the request cannot be said in JSON, or not in one frame; nothing is appended then.
pub fn open(
    out: &mut Vec<u8>,
    id: StreamId,
    credit: u32,
    request: &GenerateRequest,
) -> Result<(), serde_json::Error> {
    let start = begin(out, OPEN);
    put(out, id.0);
    put(out, credit);
    let head = out.len();
    put(out, 0);
    let written = serde_json::to_writer(&mut *out, &WithoutTokens(request));
    let json = u32::try_from(out.len() - head - 4);
    let room = out.len() as u64 + 4 * request.tokens.len() as u64 - start as u64 <= u64::from(u32::MAX);
    let error = match (written, json, room) {
        (Ok(()), Ok(json), true) => {
            out[head..head + 4].copy_from_slice(&json.to_le_bytes());
            let tokens = out.len();
            out.resize(tokens + 4 * request.tokens.len(), 0);
            for (place, token) in out[tokens..].as_chunks_mut().0.iter_mut().zip(&request.tokens) {
                *place = token.to_le_bytes();
            }
            finish(out, start);
            return Ok(());
        }
        (Err(error), ..) => error,
        _ => serde::ser::Error::custom("a request of more than 4 GiB"),
    };
    out.truncate(start);
    Err(error)
}

/// Appends the end of interest in a generation.
pub fn cancel(out: &mut Vec<u8>, id: StreamId) {
    let start = begin(out, CANCEL);
    put(out, id.0);
    finish(out, start);
}

/// Appends room for more tokens.
pub fn credit(out: &mut Vec<u8>, id: StreamId, tokens: u32) {
    let start = begin(out, CREDIT);
    put(out, id.0);
    put(out, tokens);
    finish(out, start);
}

/// Appends something that happened to a generation.
///
/// # Errors
/// When it cannot be said in JSON; nothing is appended then.
pub fn event(out: &mut Vec<u8>, id: StreamId, event: &GenerateEvent) -> Result<(), serde_json::Error> {
    let start = begin(out, EVENT);
    put(out, id.0);
    if let Err(error) = serde_json::to_writer(&mut *out, event) {
        out.truncate(start);
        return Err(error);
    }
    finish(out, start);
    Ok(())
}

/// Plain tokens on their way into one frame. Call [`TokenFrame::close`] before anything else is written.
#[derive(Debug, Default)]
pub struct TokenFrame {
    start: Option<usize>,
}

impl TokenFrame {
    /// Appends a token.
    pub fn push(&mut self, out: &mut Vec<u8>, id: StreamId, token: u32) {
        if let Some(start) = self.start
            && out.len() - start >= HEADER_BYTES + 8 * TOKENS_MAX
        {
            self.close(out);
        }
        self.start.get_or_insert_with(|| begin(out, TOKENS));
        put(out, id.0);
        put(out, token);
    }

    /// Ends the frame, if one was begun.
    pub fn close(&mut self, out: &mut [u8]) {
        if let Some(start) = self.start.take() {
            finish(out, start);
        }
    }
}

fn begin(out: &mut Vec<u8>, kind: u8) -> usize {
    let start = out.len();
    out.extend_from_slice(&[0, 0, 0, 0, kind]);
    start
}

/// Puts the length in its place; what is longer than it can say was kept out before.
fn finish(out: &mut [u8], start: usize) {
    let bytes = u32::try_from(out.len() - start - HEADER_BYTES).unwrap_or(u32::MAX);
    out[start..start + 4].copy_from_slice(&bytes.to_le_bytes());
}

fn put(out: &mut Vec<u8>, number: u32) {
    out.extend_from_slice(&number.to_le_bytes());
}

/// A request as JSON, its tokens left to the rest of the frame.
struct WithoutTokens<'a>(&'a GenerateRequest);

impl serde::Serialize for WithoutTokens<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct as _;
        let GenerateRequest {
            request_id,
            tokens: _,
            generated,
            max_tokens,
            sampling,
            cache_salt,
            logits_digest,
            whole,
            handoff,
        } = self.0;
        let none: [u32; 0] = [];
        let mut fields = serializer.serialize_struct("GenerateRequest", 9)?;
        fields.serialize_field("request_id", request_id)?;
        fields.serialize_field("tokens", &none)?;
        fields.serialize_field("generated", generated)?;
        fields.serialize_field("max_tokens", max_tokens)?;
        fields.serialize_field("sampling", sampling)?;
        fields.serialize_field("cache_salt", cache_salt)?;
        fields.serialize_field("logits_digest", logits_digest)?;
        fields.serialize_field("whole", whole)?;
        fields.serialize_field("handoff", handoff)?;
        fields.end()
    }
}
