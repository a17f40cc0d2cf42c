//! Anthropic's Messages API: one message of one text block, as events or as a whole.

use baton_config::protocol::FinishReason;
use bytes::Bytes;
use serde::Serialize;
use serde_json::json;

use super::choice::{Delta, End};
use super::encode::{Head, Usage, baton_object, json_into};
use crate::request::Debug;

/// What bridges a silence, and comes after the start of a block.
pub(super) const PING: &[u8] = b"event: ping\ndata: {\"type\":\"ping\"}\n\n";

const DELTA: &[u8] = b"event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":";

const BLOCK_START: &[u8] = b"event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n";

const BLOCK_STOP: &[u8] =
    b"event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n";

const STOP: &[u8] = b"event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";

/// Writes one message.
#[derive(Debug)]
pub(crate) struct MessageWriter {
    head: Head,
    /// The text block has begun: there is none without text.
    opened: bool,
    end: Option<Ending>,
}

/// How the message ended.
#[derive(Debug)]
struct Ending {
    reason: &'static str,
    stop: Option<String>,
    debug: Option<serde_json::Value>,
}

/// `usage`: what was found in a cache is no part of `input_tokens`.
#[derive(Debug, Serialize)]
struct MessageUsage {
    input_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    output_tokens: u64,
}

impl From<Usage> for MessageUsage {
    fn from(usage: Usage) -> Self {
        let cached = usage.prompt_tokens_details.cached_tokens;
        Self {
            input_tokens: usage.prompt_tokens.saturating_sub(cached),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: cached,
            output_tokens: usage.completion_tokens,
        }
    }
}

impl Ending {
    fn new(end: &End, debug: Option<serde_json::Value>) -> Self {
        let reason = match (end.reason, &end.stop) {
            (_, Some(_)) => "stop_sequence",
            (FinishReason::Stop, None) => "end_turn",
            (FinishReason::Length, None) => "max_tokens",
        };
        Self { reason, stop: end.stop.clone(), debug }
    }
}

impl MessageWriter {
    pub(super) fn new(head: Head) -> Self {
        Self { head, opened: false, end: None }
    }

    /// The whole message.
    pub(super) fn whole(self, whole: Delta, usage: Usage) -> Bytes {
        let head = &self.head;
        let content = if whole.text.is_empty() {
            json!([])
        } else {
            json!([{ "type": "text", "text": whole.text, "citations": null }])
        };
        let ending = whole.end.as_ref().map(|end| Ending::new(end, None));
        let mut message = json!({
            "id": head.id, "type": "message", "role": "assistant", "model": head.model, "content": content,
            "stop_reason": ending.as_ref().map(|ending| ending.reason),
            "stop_sequence": ending.and_then(|ending| ending.stop),
            "usage": MessageUsage::from(usage),
        });
        if let Some(object) = baton_object(head.debug, &whole.tokens, whole.logits_digest, whole.end.as_ref())
        {
            message["baton"] = object;
        }
        Bytes::from(message.to_string())
    }

    pub(super) fn begin(&self, usage: Usage, out: &mut Vec<u8>) {
        let head = &self.head;
        let start = json!({
            "type": "message_start",
            "message": {
                "id": head.id, "type": "message", "role": "assistant", "model": head.model, "content": [],
                "stop_reason": null, "stop_sequence": null, "usage": MessageUsage::from(usage),
            }
        });
        out.extend_from_slice(b"event: message_start\ndata: ");
        json_into(&start, out);
        out.extend_from_slice(b"\n\n");
    }

    pub(super) fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        let debug = baton_object(self.head.debug, &delta.tokens, delta.logits_digest, None);
        if !delta.text.is_empty() || (debug.is_some() && !delta.tokens.is_empty()) {
            self.open(out);
            out.extend_from_slice(DELTA);
            json_into(&delta.text, out);
            out.push(b'}');
            if let Some(debug) = debug {
                out.extend_from_slice(b",\"baton\":");
                json_into(&debug, out);
            }
            out.extend_from_slice(b"}\n\n");
        }
        if let Some(end) = &delta.end {
            let quiet = Debug { token_ids: false, logits_digest: false, ..self.head.debug };
            self.end = Some(Ending::new(end, baton_object(quiet, &[], None, Some(end))));
        }
    }

    pub(super) fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        if self.opened {
            out.extend_from_slice(BLOCK_STOP);
        }
        let Some(ending) = self.end.take() else { return };
        let mut last = json!({
            "type": "message_delta",
            "delta": { "stop_reason": ending.reason, "stop_sequence": ending.stop },
            "usage": MessageUsage::from(usage),
        });
        if let Some(debug) = ending.debug {
            last["baton"] = debug;
        }
        out.extend_from_slice(b"event: message_delta\ndata: ");
        json_into(&last, out);
        out.extend_from_slice(b"\n\n");
        out.extend_from_slice(STOP);
    }

    fn open(&mut self, out: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.opened, true) {
            out.extend_from_slice(BLOCK_START);
            out.extend_from_slice(PING);
        }
    }
}

#[cfg(test)]
mod tests;
