//! Anthropic's Messages API as a client sees it.

use std::time::Duration;

use baton_config::Role;
use serde_json::{Value, json};

use crate::api::text;
use crate::fake_worker::{Act, FakeWorker, oracle};
use crate::harness::{Harness, one_worker, typed, types};

const PATH: &str = "/v1/messages";

fn hello() -> Value {
    json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hello world" }], "max_tokens": 12 })
}

fn with(mut body: Value, key: &str, value: Value) -> Value {
    body[key] = value;
    body
}

fn word(word: &str) -> Vec<u32> {
    word.bytes().map(u32::from).collect()
}

#[tokio::test]
async fn a_stream_is_the_documented_sequence() {
    let (decode, harness) = one_worker().await;
    let answer = harness.post(PATH, &with(hello(), "stream", json!(true))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let events = typed(&answer.text);
    assert_eq!(
        types(&events),
        [
            "message_start",
            "content_block_start",
            "ping",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop"
        ]
    );
    let request = &decode.generated()[0];
    let shown: String = events.iter().filter_map(|event| event.pointer("/delta/text")?.as_str()).collect();
    assert_eq!(shown, text(&oracle(&request.tokens, request.sampling.seed, 12)));
    let start = &events[0]["message"];
    assert_eq!(
        (&start["role"], &start["content"], &start["stop_reason"]),
        (&json!("assistant"), &json!([]), &Value::Null)
    );
    assert_eq!(start["usage"]["input_tokens"], request.tokens.len());
    assert_eq!(answer.headers["request-id"].to_str().ok(), start["id"].as_str());
    let end = &events[events.len() - 2];
    assert_eq!(end["delta"], json!({ "stop_reason": "max_tokens", "stop_sequence": null }));
    // What was cached is counted by itself.
    assert_eq!(end["usage"]["cache_read_input_tokens"], 3);
    assert_eq!(end["usage"]["input_tokens"], request.tokens.len() - 3);
    assert_eq!(end["usage"]["output_tokens"], 12);
    harness.finish().await;
}

#[tokio::test]
async fn a_whole_message_says_why_it_ended() {
    let (decode, harness) = one_worker().await;
    decode.then(Act::EosAfter(5)).then(Act::Say(word("one STOP two")));
    let turn = harness.post(PATH, &hello()).await.json();
    assert_eq!(
        (&turn["type"], &turn["role"], &turn["model"]),
        (&json!("message"), &json!("assistant"), &json!("tiny"))
    );
    assert!(turn["id"].as_str().expect("an id").starts_with("msg_"));
    assert_eq!((&turn["stop_reason"], &turn["stop_sequence"]), (&json!("end_turn"), &Value::Null));
    assert_eq!(turn["content"][0]["text"].as_str().map(str::len), Some(5));
    let stops = with(hello(), "stop_sequences", json!(["never", "STOP"]));
    let stopped = harness.post(PATH, &stops).await.json();
    assert_eq!(stopped["content"][0]["text"], "one ");
    assert_eq!(
        (&stopped["stop_reason"], &stopped["stop_sequence"]),
        (&json!("stop_sequence"), &json!("STOP"))
    );
    let cut = harness.post(PATH, &with(stops, "max_tokens", json!(3))).await.json();
    assert_eq!((&cut["stop_reason"], &cut["stop_sequence"]), (&json!("max_tokens"), &Value::Null));
    assert_eq!(cut["content"][0]["text"].as_str().map(str::len), Some(3));
    harness.finish().await;
}

#[tokio::test]
async fn system_blocks_and_turns_are_the_conversation_that_chat_would_make_of_them() {
    let (decode, harness) = one_worker().await;
    let body = json!({
        "model": "tiny", "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "metadata": { "user_id": "u" },
        "system": [{ "type": "text", "text": "be" }, { "type": "text", "text": "brief", "cache_control": { "type": "ephemeral" } }],
        "messages": [
            { "role": "user", "content": "hello" },
            { "role": "user", "content": [{ "type": "text", "text": "world", "citations": [] }] },
            { "role": "assistant", "content": [{ "type": "text", "text": "yes" }] },
            { "role": "user", "content": "go on" }
        ],
        "tools": [], "tool_choice": { "type": "auto" }, "thinking": { "type": "disabled" }, "service_tier": "auto",
        "output_config": { "effort": "low" }
    });
    let answer = harness.post(PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let chat = json!({ "model": "tiny", "max_tokens": 1, "messages": [
        { "role": "system", "content": "be\nbrief" },
        { "role": "user", "content": "hello\nworld" },
        { "role": "assistant", "content": "yes" },
        { "role": "user", "content": "go on" }
    ] });
    assert_eq!(harness.chat(&chat).await.status, 200);
    let seen = decode.generated();
    assert_eq!(seen[0].tokens, seen[1].tokens);
    let sampling = &seen[0].sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.5, 0.9, 3));

    let mut count = body;
    for field in ["max_tokens", "temperature", "top_p", "top_k", "metadata", "service_tier"] {
        count.as_object_mut().expect("an object").remove(field);
    }
    let counted = harness.post("/v1/messages/count_tokens", &count).await;
    assert_eq!(counted.json(), json!({ "input_tokens": seen[0].tokens.len() }), "{}", counted.text);
    assert_eq!(decode.generated().len(), 2, "counting is no work for workers");
    harness.finish().await;
}

#[tokio::test]
async fn errors_have_the_shape_of_anthropic() {
    let (decode, harness) = one_worker().await;
    let mut lines = String::new();
    let mut told = |what: &str, answer: crate::harness::Answer| {
        let body = answer.json();
        assert_eq!(body.as_object().map(|object| object.len()), Some(2), "{}", answer.text);
        assert_eq!(body["type"], "error", "{}", answer.text);
        let error = &body["error"];
        lines.push_str(&format!("{what}: {} {} {}\n", answer.status, error["type"], error["message"]));
    };
    told("model", harness.post(PATH, &with(hello(), "model", json!("claude"))).await);
    told("context", harness.post(PATH, &with(hello(), "max_tokens", json!(600))).await);
    told("method", harness.get(PATH).await);
    told("path", harness.post("/v1/messages/batches", &hello()).await);
    decode.always(Act::Status(429, baton_config::protocol::FailureCode::Overloaded));
    told("full", harness.post(PATH, &hello()).await);
    expect_test::expect_file!["golden/anthropic_errors.txt"].assert_eq(&lines);
    harness.finish().await;
}

#[tokio::test]
async fn a_stream_that_breaks_says_so_as_an_event() {
    let (decode, harness) = one_worker().await;
    decode.always(Act::DieAfter(1));
    let answer = harness.post(PATH, &with(hello(), "stream", json!(true))).await;
    let events = typed(&answer.text);
    let end = events.last().expect("events");
    assert_eq!(
        (&end["type"], &end["error"]["type"]),
        (&json!("error"), &json!("api_error")),
        "{}",
        answer.text
    );
    harness.finish().await;
}

#[tokio::test]
async fn a_long_prefill_is_bridged_by_pings() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Slow(Duration::from_millis(700)));
    let harness =
        Harness::start(&[&worker], |options| options.timeouts.keep_alive = Duration::from_millis(100)).await;
    let body = with(with(hello(), "stream", json!(true)), "max_tokens", json!(1));
    let answer = harness.post(PATH, &body).await;
    assert!(answer.text.starts_with("event: message_start\n"), "{}", answer.text);
    let events = typed(&answer.text);
    assert_eq!(events[1]["type"], "ping");
    assert!(!answer.text.contains(": keep-alive"), "{}", answer.text);
    assert_eq!(events.last().expect("events")["type"], "message_stop");
    harness.finish().await;
}
