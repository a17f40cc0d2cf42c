//! OpenAI's Responses API as a client sees it.

use std::time::Duration;

use baton_config::Role;
use serde_json::{Value, json};

use crate::api::text;
use crate::fake_worker::{Act, FakeWorker, oracle};
use crate::harness::{Harness, one_worker, typed, types};

const PATH: &str = "/v1/responses";

const SEQUENCE: [&str; 9] = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
];

fn hello() -> Value {
    json!({ "model": "tiny", "input": "hello world", "max_output_tokens": 12, "seed": 7 })
}

fn streamed(mut body: Value) -> Value {
    body["stream"] = json!(true);
    body
}

#[tokio::test]
async fn a_stream_is_the_documented_sequence_and_ends_in_what_a_whole_answer_is() {
    let (decode, harness) = one_worker().await;
    decode.always(Act::EosAfter(5));
    let answer = harness.post(PATH, &streamed(hello())).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let events = typed(&answer.text);
    assert_eq!(types(&events), SEQUENCE);
    let numbers: Vec<u64> = events.iter().filter_map(|event| event["sequence_number"].as_u64()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let shown: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    let prompt = decode.generated()[0].tokens.clone();
    assert_eq!(shown, text(&oracle(&prompt, 7, 5)));
    let ended = &events.last().expect("events")["response"];
    assert_eq!(ended["output"][0]["content"][0]["text"], shown.as_str());
    assert_eq!(ended["usage"]["input_tokens"], prompt.len());
    assert_eq!(ended["usage"]["input_tokens_details"]["cached_tokens"], 3);
    // The end token counts.
    assert_eq!(ended["usage"]["output_tokens"], 6);
    assert_eq!(ended["usage"]["total_tokens"], prompt.len() + 6);
    assert_eq!(answer.headers["x-request-id"].to_str().ok(), ended["id"].as_str());

    let mut whole = harness.post(PATH, &hello()).await.json();
    let mut ended = ended.clone();
    for object in [&mut whole, &mut ended] {
        assert!(object["id"].as_str().expect("an id").starts_with("resp_"));
        assert!(object["output"][0]["id"].as_str().expect("an id").starts_with("msg_"));
        for place in ["/id", "/output/0/id", "/created_at"] {
            *object.pointer_mut(place).expect("there") = Value::Null;
        }
    }
    assert_eq!(whole, ended);
    assert_eq!(whole["status"], "completed");
    harness.finish().await;
}

#[tokio::test]
async fn a_response_repeats_its_request() {
    let (_decode, harness) = one_worker().await;
    let body = json!({
        "model": "gpt-4o-mini", "input": "hello", "instructions": "be brief", "max_output_tokens": 3,
        "temperature": 0.25, "top_p": 0.5, "metadata": { "k": "v" }, "reasoning": { "effort": "low", "summary": "auto" },
        "text": { "format": { "type": "text" }, "verbosity": "low" }, "truncation": "disabled", "store": false,
        "background": false, "tools": [], "tool_choice": "none", "parallel_tool_calls": false, "max_tool_calls": 2,
        "include": ["reasoning.encrypted_content"], "user": "u", "safety_identifier": "s", "prompt_cache_key": "c",
        "service_tier": "auto", "previous_response_id": null, "conversation": null, "top_logprobs": 0,
        "prompt_cache_retention": "24h"
    });
    let answer = harness.post(PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let told = answer.json();
    for field in [
        "model",
        "instructions",
        "max_output_tokens",
        "temperature",
        "top_p",
        "metadata",
        "reasoning",
        "text",
        "truncation",
        "store",
        "background",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "max_tool_calls",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "previous_response_id",
        "top_logprobs",
    ] {
        assert_eq!(told[field], body[field], "{field}");
    }
    assert_eq!((&told["object"], &told["error"]), (&json!("response"), &Value::Null));
    harness.finish().await;
}

#[tokio::test]
async fn instructions_and_items_are_the_conversation_that_chat_would_make_of_them() {
    let (decode, harness) = one_worker().await;
    let first = harness.post(PATH, &hello()).await.json();
    let items = json!([
        { "role": "user", "content": "hello" },
        { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "a" }, { "type": "input_text", "text": "b" }] },
        // What came back goes in again as it is.
        first["output"][0],
        { "type": "message", "role": "developer", "content": "be brief", "status": "completed" },
        { "role": "assistant", "content": "yes", "phase": "final_answer" },
        { "role": "user", "content": "world" }
    ]);
    let body = json!({ "model": "tiny", "instructions": "you are", "input": items, "max_output_tokens": 1 });
    let answer = harness.post(PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let chat = json!({ "model": "tiny", "max_tokens": 1, "messages": [
        { "role": "system", "content": "you are" },
        { "role": "user", "content": "hello" },
        { "role": "user", "content": "a\nb" },
        { "role": "assistant", "content": first["output"][0]["content"][0]["text"] },
        { "role": "system", "content": "be brief" },
        { "role": "assistant", "content": "yes" },
        { "role": "user", "content": "world" }
    ] });
    assert_eq!(harness.chat(&chat).await.status, 200);
    let seen = decode.generated();
    assert_eq!(seen[1].tokens, seen[2].tokens);
    harness.finish().await;
}

#[tokio::test]
async fn an_answer_that_was_cut_is_incomplete_in_both_forms() {
    let (_decode, harness) = one_worker().await;
    let whole = harness.post(PATH, &hello()).await.json();
    let stream = harness.post(PATH, &streamed(hello())).await;
    let events = typed(&stream.text);
    let end = events.last().expect("events");
    assert_eq!(end["type"], "response.incomplete");
    for response in [&whole, &end["response"]] {
        assert_eq!(response["status"], "incomplete");
        assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");
        assert_eq!(response["output"][0]["status"], "incomplete");
        assert_eq!(response["usage"]["output_tokens"], 12);
    }
    harness.finish().await;
}

#[tokio::test]
async fn logprobs_come_when_they_are_included() {
    let (decode, harness) = one_worker().await;
    decode.always(Act::Say(vec![104, 0xC3, 0xA9]));
    let mut body = hello();
    body["include"] = json!(["message.output_text.logprobs"]);
    body["top_logprobs"] = json!(2);
    let whole = harness.post(PATH, &body).await.json();
    let entries = &whole["output"][0]["content"][0]["logprobs"];
    assert_eq!(entries.as_array().map(Vec::len), Some(3), "{whole}");
    assert_eq!((&entries[0]["token"], &entries[0]["bytes"]), (&json!("h"), &json!([104])));
    assert_eq!(entries[0]["top_logprobs"].as_array().map(Vec::len), Some(2));
    let stream = harness.post(PATH, &streamed(body)).await;
    let told: usize = typed(&stream.text)
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .filter_map(|event| event["logprobs"].as_array().map(Vec::len))
        .sum();
    assert_eq!(told, 3, "every token once, held back text or not");
    harness.finish().await;
}

#[tokio::test]
async fn the_extensions_of_chat_hold_here_too() {
    let (decode, harness) = one_worker().await;
    decode.always(Act::Say("one STOP two".bytes().map(u32::from).collect()));
    let mut body = hello();
    body["stop"] = json!("STOP");
    body["top_k"] = json!(5);
    body["max_output_tokens"] = json!(50);
    body["baton"] = json!({ "token_ids": true });
    let whole = harness.post(PATH, &body).await.json();
    assert_eq!(whole["output"][0]["content"][0]["text"], "one ");
    assert_eq!(whole["status"], "completed");
    assert_eq!(whole["baton"]["decode_worker"], "decode-0");
    assert_eq!(decode.generated()[0].sampling.top_k, 5);
    let events = typed(&harness.post(PATH, &streamed(body)).await.text);
    let ids: Vec<Value> = events
        .iter()
        .filter_map(|event| event.pointer("/baton/token_ids")?.as_array().cloned())
        .flatten()
        .collect();
    assert!(json!(ids) == whole["baton"]["token_ids"] && ids.len() > 4, "{ids:?}");
    harness.finish().await;
}

#[tokio::test]
async fn a_stream_that_breaks_says_so_as_an_event() {
    let (decode, harness) = one_worker().await;
    decode.always(Act::DieAfter(1));
    let answer = harness.post(PATH, &streamed(hello())).await;
    let events = typed(&answer.text);
    let end = events.last().expect("events");
    assert_eq!(end["type"], "response.failed", "{}", answer.text);
    assert_eq!(end["response"]["status"], "failed");
    assert_eq!(end["response"]["error"]["code"], "server_error");
    assert!(end["response"]["usage"]["output_tokens"].as_u64().is_some_and(|tokens| tokens >= 3));
    harness.finish().await;
}

#[tokio::test]
async fn a_long_prefill_shows_that_the_response_was_created() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Slow(Duration::from_millis(700)));
    let harness =
        Harness::start(&[&worker], |options| options.timeouts.keep_alive = Duration::from_millis(100)).await;
    let mut body = streamed(hello());
    body["max_output_tokens"] = json!(1);
    let answer = harness.post(PATH, &body).await;
    let begins = answer.text.find("event: response.created").expect("created");
    let waits = answer.text.find(": keep-alive\n\n").expect("a comment");
    let item = answer.text.find("event: response.output_item.added").expect("an item");
    assert!(begins < waits && waits < item, "{}", answer.text);
    assert_eq!(types(&typed(&answer.text)).len(), SEQUENCE.len());
    harness.finish().await;
}

#[tokio::test]
async fn nobody_finds_a_response_again() {
    let (_decode, harness) = one_worker().await;
    for (method, path) in [
        ("GET", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/resp_1"),
        ("POST", "/v1/responses/resp_1/cancel"),
        ("GET", "/v1/responses/resp_1/input_items"),
    ] {
        let answer = harness.ask(method, path, "").await;
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (404, &json!("response_not_found")),
            "{path}"
        );
    }
    assert_eq!(harness.get(PATH).await.status, 405);
    harness.finish().await;
}
