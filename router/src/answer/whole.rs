//! An answer that is sent as a whole.

use bytes::Bytes;
use futures_util::StreamExt as _;
use serde::Serialize;
use serde_json::Value;

use super::Deltas;
use super::choice::{Delta, End};
use super::encode::{
    Api, Head, Meter, Usage, baton_object, chat_logprobs, completion_logprobs, json_into, reason_name,
};
use super::messages::MessageWriter;
use super::responses::ResponseWriter;
use crate::dispatch::DispatchError;

/// Room for an answer of some words.
const ROOM_BYTES: usize = 512;

/// An answer of chat or completions.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: Option<&'static str>,
    choices: Vec<Choice<'a>>,
    usage: Usage,
}

#[derive(Debug, Serialize)]
struct Choice<'a> {
    index: u32,
    /// Of chat.
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message<'a>>,
    /// Of completions.
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    baton: Option<Value>,
}

#[derive(Debug, Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<&'static str>,
}

/// Waits for all choices and writes the answer.
pub(crate) async fn collect(
    mut deltas: Deltas,
    head: &Head,
    meter: &mut Meter,
    choices: usize,
) -> Result<Bytes, DispatchError> {
    let mut wholes: Vec<Delta> = Vec::new();
    wholes.resize_with(choices, Delta::default);
    while let Some(delta) = deltas.next().await {
        let delta = delta?;
        meter.add(&delta);
        let whole = &mut wholes[delta.index as usize];
        whole.index = delta.index;
        whole.text.push_str(&delta.text);
        whole.tokens.extend(delta.tokens);
        whole.logprobs.extend(delta.logprobs);
        whole.logits_digest = delta.logits_digest.or(whole.logits_digest);
        whole.end = delta.end.or(whole.end.take());
    }
    let object = match head.api {
        Api::Chat => "chat.completion",
        Api::Completions => "text_completion",
        // These have one choice.
        Api::Responses => {
            return Ok(ResponseWriter::new(head.clone()).whole(wholes.swap_remove(0), meter.usage()));
        }
        Api::Messages => {
            return Ok(MessageWriter::new(head.clone()).whole(wholes.swap_remove(0), meter.usage()));
        }
    };
    let answer = Answer {
        id: &head.id,
        object,
        created: head.created,
        model: &head.model,
        system_fingerprint: None,
        choices: wholes.iter().map(|whole| choice(head, whole)).collect(),
        usage: meter.usage(),
    };
    let mut out = Vec::with_capacity(ROOM_BYTES);
    json_into(&answer, &mut out);
    Ok(Bytes::from(out))
}

fn choice<'a>(head: &Head, whole: &'a Delta) -> Choice<'a> {
    let logprobs = match (head.logprobs, head.api) {
        (false, _) => None,
        (true, Api::Chat) => Some(chat_logprobs(&head.vocabulary, &whole.logprobs)),
        (true, _) => Some(completion_logprobs(&head.vocabulary, &whole.logprobs, &mut 0)),
    };
    let message = Message { role: "assistant", content: &whole.text, refusal: None };
    let (message, text) = match head.api {
        Api::Chat => (Some(message), None),
        _ => (None, Some(whole.text.as_str())),
    };
    Choice {
        index: whole.index,
        message,
        text,
        logprobs,
        finish_reason: whole.end.as_ref().map(|end: &End| reason_name(end.reason)),
        baton: baton_object(head.debug, &whole.tokens, whole.logits_digest, whole.end.as_ref()),
    }
}
