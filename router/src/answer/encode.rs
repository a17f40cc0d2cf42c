//! The JSON that answers are made of, and the chunks of chat and completions.
//!
//! Chunks are written by hand: everything that is the same in all chunks of a stream is formatted once.

use std::sync::Arc;

use baton_config::protocol::{FinishReason, TokenLogprob};
use serde::Serialize;
use serde_json::{Value, json};

use super::choice::{Delta, End};
use crate::model::Vocabulary;
use crate::request::{Debug, Repeats};
use crate::routes::Dialect;

/// What stands for a log-probability of minus infinity, which JSON cannot say (OpenAI's choice).
const LOWEST_LOGPROB: f32 = -9999.0;

/// The shape of requests and answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Api {
    Chat,
    Completions,
    Responses,
    Messages,
}

impl Api {
    /// How the ids of its answers begin.
    pub(crate) fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl-",
            Self::Completions => "cmpl-",
            Self::Responses => "resp_",
            Self::Messages => "msg_",
        }
    }

    /// The field of its requests that holds the prompt.
    pub(crate) fn prompt_field(self) -> &'static str {
        match self {
            Self::Chat | Self::Messages => "messages",
            Self::Completions => "prompt",
            Self::Responses => "input",
        }
    }

    /// The shape of its errors.
    pub(crate) fn dialect(self) -> Dialect {
        match self {
            Self::Chat | Self::Completions | Self::Responses => Dialect::OpenAi,
            Self::Messages => Dialect::Anthropic,
        }
    }
}

/// What all chunks of an answer share.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) api: Api,
    /// Begins as [`Api::id_prefix`] says.
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) logprobs: bool,
    pub(crate) debug: Debug,
    pub(crate) include_usage: bool,
    /// What of the request is told again.
    pub(crate) repeats: Option<Box<Repeats>>,
    pub(crate) vocabulary: Arc<Vocabulary>,
}

/// The `usage` object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) total_tokens: u64,
    pub(crate) prompt_tokens_details: PromptDetails,
}

/// Parts of `usage.prompt_tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(crate) struct PromptDetails {
    pub(crate) cached_tokens: u64,
}

/// Adds up the usage of a request.
#[derive(Debug, Clone)]
pub(crate) struct Meter {
    prompt_tokens: u64,
    completion_tokens: u64,
    /// Choices per prompt; the first choice of each prompt tells what was cached.
    n: u32,
    cached_tokens: u64,
}

impl Meter {
    /// A meter for prompts of `prompt_tokens` in all, with `n` choices each.
    pub(crate) fn new(prompt_tokens: u64, n: u32) -> Self {
        Self { prompt_tokens, completion_tokens: 0, n, cached_tokens: 0 }
    }

    /// Tokens generated so far.
    pub(crate) fn completion_tokens(&self) -> u64 {
        self.completion_tokens
    }

    pub(super) fn add(&mut self, delta: &Delta) {
        self.completion_tokens += delta.tokens.len() as u64;
        let report = delta.end.as_ref().and_then(|end| end.trace.report.as_ref());
        if let Some(report) = report.filter(|_| delta.index.is_multiple_of(self.n)) {
            self.cached_tokens += u64::from(report.cached_tokens);
        }
    }

    pub(super) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens: self.cached_tokens },
        }
    }
}

/// The name of an end in the API.
pub(super) fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// The extension object of a delta or a whole choice; `None` unless asked for.
pub(super) fn baton_object(
    debug: Debug,
    tokens: &[u32],
    logits_digest: Option<u64>,
    end: Option<&End>,
) -> Option<Value> {
    if !debug.report || (end.is_none() && !debug.token_ids && !debug.logits_digest) {
        return None;
    }
    let mut object = serde_json::Map::new();
    if debug.token_ids {
        object.insert("token_ids".to_owned(), json!(tokens));
    }
    if debug.logits_digest {
        let digest = logits_digest.map(|digest| format!("{digest:016x}"));
        object.insert("logits_digest".to_owned(), json!(digest));
    }
    if let Some(end) = end {
        let trace = &end.trace;
        let decision = if trace.prefill.is_some() { "disaggregated" } else { "local" };
        object.insert("decision".to_owned(), json!(decision));
        object.insert("prefill_worker".to_owned(), json!(trace.prefill));
        object.insert("decode_worker".to_owned(), json!(trace.decode));
        object.insert("migrations".to_owned(), json!(trace.migrations));
        object.insert("ttft_ms".to_owned(), json!(end.ttft_ms));
        object.insert("prefill".to_owned(), json!(trace.report));
    }
    Some(Value::Object(object))
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LOWEST_LOGPROB }
}

fn token_text(vocabulary: &Vocabulary, token: u32) -> (String, Vec<u8>) {
    let bytes = vocabulary.token_bytes(token);
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

/// `logprobs` in the shape of chat.
pub(super) fn chat_logprobs(vocabulary: &Vocabulary, entries: &[(u32, TokenLogprob)]) -> Value {
    json!({ "content": token_logprobs(vocabulary, entries), "refusal": null })
}

/// The log-probabilities of tokens, each with its text and bytes, as chat and responses show them.
pub(super) fn token_logprobs(vocabulary: &Vocabulary, entries: &[(u32, TokenLogprob)]) -> Vec<Value> {
    let one = |token: u32, logprob: f32| {
        let (text, bytes) = token_text(vocabulary, token);
        json!({ "token": text, "logprob": finite(logprob), "bytes": bytes })
    };
    entries
        .iter()
        .map(|(token, logprob)| {
            let mut entry = one(*token, logprob.logprob);
            entry["top_logprobs"] =
                logprob.top.iter().map(|(token, logprob)| one(*token, *logprob)).collect();
            entry
        })
        .collect()
}

/// `logprobs` in the shape of completions; `offset` is where the text of the first token begins, in characters.
pub(super) fn completion_logprobs(
    vocabulary: &Vocabulary,
    entries: &[(u32, TokenLogprob)],
    offset: &mut usize,
) -> Value {
    let (mut tokens, mut logprobs, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
    for (token, logprob) in entries {
        let (text, _) = token_text(vocabulary, *token);
        offsets.push(*offset);
        *offset += text.chars().count();
        tokens.push(text);
        logprobs.push(finite(logprob.logprob));
        let top: serde_json::Map<String, Value> = logprob
            .top
            .iter()
            .map(|(token, logprob)| (token_text(vocabulary, *token).0, json!(finite(*logprob))))
            .collect();
        tops.push(top);
    }
    json!({ "tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets })
}

/// Writes the chunks of one stream.
#[derive(Debug)]
pub(crate) struct ChunkWriter {
    head: Head,
    /// `data: {"id":...,"choices":[`.
    prefix: Vec<u8>,
    /// Per choice, indexed by its number: whether its role was sent, and where its log-probabilities have got to.
    choices: Vec<(bool, usize)>,
}

impl ChunkWriter {
    /// A writer for `choices` choices.
    pub(crate) fn new(head: Head, choices: usize) -> Self {
        let object = if head.api == Api::Chat { "chat.completion.chunk" } else { "text_completion" };
        let shared = json!({
            "id": head.id, "object": object, "created": head.created, "model": head.model,
            "system_fingerprint": null
        });
        let mut prefix = b"data: ".to_vec();
        prefix.extend_from_slice(shared.to_string().trim_end_matches('}').as_bytes());
        prefix.extend_from_slice(b",\"choices\":[");
        Self { head, prefix, choices: vec![(false, 0); choices] }
    }

    /// The API of the stream.
    pub(super) fn api(&self) -> Api {
        self.head.api
    }

    /// Writes one delta: the role first, then the text, then the end in a chunk of its own.
    pub(super) fn delta(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        let at = delta.index as usize;
        if self.head.api == Api::Chat && !self.choices[at].0 {
            self.choices[at].0 = true;
            self.open(delta.index, out);
            out.extend_from_slice(b",\"delta\":{\"role\":\"assistant\",\"content\":\"\"}");
            self.close(None, out);
        }
        let news = !delta.text.is_empty() || !delta.tokens.is_empty();
        if news {
            self.open(delta.index, out);
            self.text(&delta.text, out);
            self.logprobs(delta, out);
            let debug = baton_object(self.head.debug, &delta.tokens, delta.logits_digest, None);
            self.extension(debug, out);
            self.close(None, out);
        }
        if let Some(end) = &delta.end {
            self.open(delta.index, out);
            if self.head.api == Api::Chat {
                out.extend_from_slice(b",\"delta\":{}");
            } else {
                self.text("", out);
            }
            let quiet = Debug { token_ids: false, logits_digest: false, ..self.head.debug };
            self.extension(baton_object(quiet, &[], None, Some(end)), out);
            self.close(Some(end.reason), out);
        }
    }

    /// Writes the chunk with the usage, if asked for, and the end of the stream.
    pub(super) fn done(&self, usage: Usage, out: &mut Vec<u8>) {
        if self.head.include_usage {
            out.extend_from_slice(&self.prefix);
            out.extend_from_slice(b"],\"usage\":");
            json_into(&usage, out);
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn open(&self, index: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix);
        out.extend_from_slice(b"{\"index\":");
        json_into(&index, out);
    }

    fn text(&self, text: &str, out: &mut Vec<u8>) {
        if self.head.api == Api::Chat {
            out.extend_from_slice(b",\"delta\":{\"content\":");
            json_into(text, out);
            out.push(b'}');
        } else {
            out.extend_from_slice(b",\"text\":");
            json_into(text, out);
        }
    }

    fn logprobs(&mut self, delta: &Delta, out: &mut Vec<u8>) {
        if !self.head.logprobs {
            return;
        }
        let vocabulary = &self.head.vocabulary;
        let value = if self.head.api == Api::Chat {
            chat_logprobs(vocabulary, &delta.logprobs)
        } else {
            completion_logprobs(vocabulary, &delta.logprobs, &mut self.choices[delta.index as usize].1)
        };
        out.extend_from_slice(b",\"logprobs\":");
        json_into(&value, out);
    }

    fn extension(&self, object: Option<Value>, out: &mut Vec<u8>) {
        if let Some(object) = object {
            out.extend_from_slice(b",\"baton\":");
            json_into(&object, out);
        }
    }

    fn close(&self, reason: Option<FinishReason>, out: &mut Vec<u8>) {
        match reason {
            None => out.extend_from_slice(b",\"finish_reason\":null}]"),
            Some(reason) => {
                out.extend_from_slice(b",\"finish_reason\":\"");
                out.extend_from_slice(reason_name(reason).as_bytes());
                out.extend_from_slice(b"\"}]");
            }
        }
        out.extend_from_slice(if self.head.include_usage { b",\"usage\":null}\n\n" } else { b"}\n\n" });
    }
}

pub(super) fn json_into<T: Serialize + ?Sized>(value: &T, out: &mut Vec<u8>) {
    if let Err(error) = serde_json::to_writer(out, value) {
        tracing::error!(%error, "a part of an answer could not be written");
    }
}

#[cfg(test)]
pub(super) mod tests;
