//! An answer that is sent as a whole.

use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};

use super::Deltas;
use super::choice::{Delta, End};
use super::encode::{Api, Head, Meter, baton_object, chat_logprobs, completion_logprobs, reason_name};
use super::messages::MessageWriter;
use super::responses::ResponseWriter;
use crate::dispatch::DispatchError;

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
    let choices: Vec<Value> = wholes.into_iter().map(|whole| choice(head, whole)).collect();
    let answer = json!({
        "id": head.id, "object": object, "created": head.created, "model": head.model,
        "system_fingerprint": null, "choices": choices, "usage": meter.usage()
    });
    Ok(Bytes::from(answer.to_string()))
}

fn choice(head: &Head, whole: Delta) -> Value {
    let reason = whole.end.as_ref().map(|end: &End| reason_name(end.reason));
    let mut choice = json!({ "index": whole.index, "finish_reason": reason, "logprobs": null });
    if head.logprobs {
        choice["logprobs"] = if head.api == Api::Chat {
            chat_logprobs(&head.vocabulary, &whole.logprobs)
        } else {
            completion_logprobs(&head.vocabulary, &whole.logprobs, &mut 0)
        };
    }
    if let Some(object) = baton_object(head.debug, &whole.tokens, whole.logits_digest, whole.end.as_ref()) {
        choice["baton"] = object;
    }
    if head.api == Api::Chat {
        choice["message"] = json!({ "role": "assistant", "content": whole.text, "refusal": null });
    } else {
        choice["text"] = Value::String(whole.text);
    }
    choice
}
