//! OpenAI's Responses API: one message with one part of text, as typed and numbered events or as a whole.

use baton_config::protocol::FinishReason;
use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};

use super::choice::Delta;
use super::encode::{Head, Usage, baton_object, json_into, token_logprobs};
use crate::reply::Refusal;
use crate::request::Debug;

/// Writes one response.
#[derive(Debug)]
pub(crate) struct ResponseWriter {
    head: Head,
    /// The id of the message in it.
    item: String,
    /// What every response object begins with: its id, and what it repeats of the request; no brace at the end.
    shared: Vec<u8>,
    /// A delta event up to its text.
    delta_prefix: Vec<u8>,
    /// The number of the next event.
    sequence: u64,
    /// The message has begun.
    opened: bool,
    /// All text so far: the events at the end tell it again.
    text: String,
    logprobs: Vec<Value>,
    end: Option<Ending>,
}

/// How the message ended.
#[derive(Debug)]
struct Ending {
    reason: FinishReason,
    debug: Option<Value>,
}

/// What has become of a response.
#[derive(Clone, Copy)]
enum State<'a> {
    InProgress,
    Ended(Usage),
    Failed(&'a Refusal, Usage),
}

/// `usage` of a response.
#[derive(Debug, Serialize)]
struct ResponseUsage {
    input_tokens: u64,
    input_tokens_details: InputDetails,
    output_tokens: u64,
    output_tokens_details: OutputDetails,
    total_tokens: u64,
}

#[derive(Debug, Serialize)]
struct InputDetails {
    cached_tokens: u64,
    cache_write_tokens: u64,
}

#[derive(Debug, Serialize)]
struct OutputDetails {
    reasoning_tokens: u64,
}

impl From<Usage> for ResponseUsage {
    fn from(usage: Usage) -> Self {
        let cached_tokens = usage.prompt_tokens_details.cached_tokens;
        Self {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputDetails { cached_tokens, cache_write_tokens: 0 },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens: 0 },
            total_tokens: usage.total_tokens,
        }
    }
}

impl ResponseWriter {
    pub(super) fn new(head: Head) -> Self {
        let bare = head.id.strip_prefix(head.api.id_prefix()).unwrap_or(&head.id);
        let item = format!("msg_{bare}");
        let mut shared = Vec::with_capacity(512);
        let begins =
            json!({ "id": head.id, "object": "response", "created_at": head.created, "model": head.model });
        shared.extend_from_slice(begins.to_string().trim_end_matches('}').as_bytes());
        if let Some(repeats) = &head.repeats {
            let from = shared.len();
            json_into(repeats, &mut shared);
            // The object of its own goes on with the one before it.
            shared[from] = b',';
            shared.pop();
        }
        let delta_prefix = format!(
            "event: response.output_text.delta\ndata: {{\"type\":\"response.output_text.delta\",\"item_id\":\"{item}\",\
             \"output_index\":0,\"content_index\":0,\"delta\":"
        );
        Self {
            head,
            item,
            shared,
            delta_prefix: delta_prefix.into_bytes(),
            sequence: 0,
            opened: false,
            text: String::new(),
            logprobs: Vec::new(),
            end: None,
        }
    }

    /// The whole response.
    pub(super) fn whole(mut self, whole: Delta, usage: Usage) -> Bytes {
        let debug = baton_object(self.head.debug, &whole.tokens, whole.logits_digest, whole.end.as_ref());
        self.end = whole.end.as_ref().map(|end| Ending { reason: end.reason, debug });
        self.logprobs = token_logprobs(&self.head.vocabulary, &whole.logprobs);
        self.text = whole.text;
        self.opened = true;
        let mut out = Vec::with_capacity(self.shared.len() + self.text.len() + 512);
        self.object(State::Ended(usage), &mut out);
        Bytes::from(out)
    }

    pub(super) fn begin(&mut self, out: &mut Vec<u8>) {
        for kind in ["response.created", "response.in_progress"] {
            self.response_event(kind, State::InProgress, out);
        }
    }

    pub(super) fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        let debug = baton_object(self.head.debug, &delta.tokens, delta.logits_digest, None);
        let entries = token_logprobs(&self.head.vocabulary, &delta.logprobs);
        if !delta.text.is_empty() || !entries.is_empty() || (debug.is_some() && !delta.tokens.is_empty()) {
            self.open(out);
            out.extend_from_slice(&self.delta_prefix);
            json_into(&delta.text, out);
            out.extend_from_slice(b",\"logprobs\":");
            json_into(&entries, out);
            if let Some(debug) = debug {
                out.extend_from_slice(b",\"baton\":");
                json_into(&debug, out);
            }
            out.extend_from_slice(b",\"sequence_number\":");
            json_into(&self.sequence, out);
            out.extend_from_slice(b"}\n\n");
            self.sequence += 1;
            self.text.push_str(&delta.text);
            self.logprobs.extend(entries);
        }
        if let Some(end) = &delta.end {
            let quiet = Debug { token_ids: false, logits_digest: false, ..self.head.debug };
            let debug = baton_object(quiet, &[], None, Some(end));
            self.end = Some(Ending { reason: end.reason, debug });
        }
    }

    pub(super) fn done(&mut self, usage: Usage, out: &mut Vec<u8>) {
        self.open(out);
        self.item_event("response.output_text.done", out, |this, out| {
            out.extend_from_slice(b",\"content_index\":0,\"text\":");
            json_into(&this.text, out);
            out.extend_from_slice(b",\"logprobs\":");
            json_into(&this.logprobs, out);
        });
        self.item_event("response.content_part.done", out, |this, out| {
            out.extend_from_slice(b",\"content_index\":0,\"part\":");
            this.part(out);
        });
        let status = self.status();
        self.event("response.output_item.done", out, |this, out| {
            out.extend_from_slice(b",\"output_index\":0,\"item\":");
            this.message(status, out);
        });
        let kind = if status == "completed" { "response.completed" } else { "response.incomplete" };
        self.response_event(kind, State::Ended(usage), out);
    }

    /// The last event of a stream that broke.
    pub(super) fn failed(&mut self, why: &Refusal, usage: Usage, out: &mut Vec<u8>) {
        self.response_event("response.failed", State::Failed(why, usage), out);
    }

    /// Begins the message, once.
    fn open(&mut self, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.opened, true) {
            return;
        }
        let item = json!({
            "id": self.item, "type": "message", "role": "assistant", "status": "in_progress", "content": []
        });
        self.event("response.output_item.added", out, |_, out| {
            out.extend_from_slice(b",\"output_index\":0,\"item\":");
            json_into(&item, out);
        });
        self.item_event("response.content_part.added", out, |_, out| {
            out.extend_from_slice(
                b",\"content_index\":0,\"part\":{\"type\":\"output_text\",\"annotations\":[],\"logprobs\":[],\"text\":\"\"}",
            );
        });
    }

    /// Writes an event with its type and number; `rest` adds fields.
    fn event(&mut self, kind: &str, out: &mut Vec<u8>, rest: impl FnOnce(&Self, &mut Vec<u8>)) {
        for piece in ["event: ", kind, "\ndata: {\"type\":\"", kind, "\",\"sequence_number\":"] {
            out.extend_from_slice(piece.as_bytes());
        }
        json_into(&self.sequence, out);
        rest(self, out);
        out.extend_from_slice(b"}\n\n");
        self.sequence += 1;
    }

    /// Writes an event about the message.
    fn item_event(&mut self, kind: &str, out: &mut Vec<u8>, rest: impl FnOnce(&Self, &mut Vec<u8>)) {
        self.event(kind, out, |this, out| {
            out.extend_from_slice(b",\"output_index\":0,\"item_id\":");
            json_into(&this.item, out);
            rest(this, out);
        });
    }

    /// Writes an event about the response.
    fn response_event(&mut self, kind: &str, state: State<'_>, out: &mut Vec<u8>) {
        self.event(kind, out, |this, out| {
            out.extend_from_slice(b",\"response\":");
            this.object(state, out);
        });
    }

    /// How the message, and with it the response, ended.
    fn status(&self) -> &'static str {
        match self.end.as_ref().map(|end| end.reason) {
            Some(FinishReason::Stop) => "completed",
            Some(FinishReason::Length) | None => "incomplete",
        }
    }

    /// Writes the response object.
    fn object(&self, state: State<'_>, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.shared);
        let (status, usage) = match state {
            State::InProgress => ("in_progress", None),
            State::Ended(usage) => (self.status(), Some(usage)),
            State::Failed(_, usage) => ("failed", Some(usage)),
        };
        out.extend_from_slice(b",\"status\":");
        json_into(status, out);
        let error = match state {
            State::Failed(why, _) => json!({ "code": "server_error", "message": why.message() }),
            State::InProgress | State::Ended(_) => Value::Null,
        };
        out.extend_from_slice(b",\"error\":");
        json_into(&error, out);
        out.extend_from_slice(match status {
            "incomplete" => b",\"incomplete_details\":{\"reason\":\"max_output_tokens\"}",
            _ => b",\"incomplete_details\":null".as_slice(),
        });
        out.extend_from_slice(b",\"output\":[");
        if usage.is_some() && self.opened {
            self.message(if status == "failed" { "incomplete" } else { status }, out);
        }
        out.extend_from_slice(b"],\"usage\":");
        json_into(&usage.map(ResponseUsage::from), out);
        if let Some(debug) = self.end.as_ref().and_then(|end| end.debug.as_ref()).filter(|_| usage.is_some())
        {
            out.extend_from_slice(b",\"baton\":");
            json_into(debug, out);
        }
        out.push(b'}');
    }

    /// Writes the message with the text so far.
    fn message(&self, status: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"id\":");
        json_into(&self.item, out);
        out.extend_from_slice(b",\"type\":\"message\",\"role\":\"assistant\",\"status\":");
        json_into(status, out);
        out.extend_from_slice(b",\"content\":[");
        self.part(out);
        out.extend_from_slice(b"]}");
    }

    /// Writes the part with the text so far.
    fn part(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"type\":\"output_text\",\"annotations\":[],\"logprobs\":");
        json_into(&self.logprobs, out);
        out.extend_from_slice(b",\"text\":");
        json_into(&self.text, out);
        out.push(b'}');
    }
}

#[cfg(test)]
mod tests;
