//! Fields of the routes beside chat and completions one by one: refused by name, nothing of it reaches a worker.

use baton_config::Role;
use expect_test::{ExpectFile, expect_file};
use serde_json::{Value, json};

use crate::bad_input::error_line;
use crate::fake_worker::FakeWorker;
use crate::harness::{Answer, Harness};

/// An error of Anthropic's shape as one line.
fn anthropic_line(answer: &Answer) -> String {
    assert!((400..500).contains(&answer.status), "{} {}", answer.status, answer.text);
    let body = answer.json();
    assert_eq!(body["type"], "error", "{}", answer.text);
    format!("{} {} {}", answer.status, body["error"]["type"], body["error"]["message"])
}

/// Puts each value into `valid`, asks, and compares what is said.
async fn check(path: &str, valid: &Value, cases: &[(&str, Value)], expected: ExpectFile) {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    let line = if path.starts_with("/v1/messages") { anthropic_line } else { error_line };
    let mut lines = String::new();
    for (field, value) in cases {
        let mut body = valid.clone();
        match value {
            Value::Null => drop(body.as_object_mut().expect("an object").remove(*field)),
            value => body[*field] = value.clone(),
        }
        let answer = harness.post(path, &body).await;
        let shown: String = format!("{field}: {value}").chars().take(100).collect();
        lines.push_str(&format!("{shown}\n  {}\n", line(&answer)));
    }
    expected.assert_eq(&lines);
    assert!(worker.generated().is_empty(), "nothing of this reaches a worker");
    harness.finish().await;
}

#[tokio::test]
async fn responses() {
    let item = |role: &str, part: Value| json!([{ "role": role, "content": [part] }]);
    check(
        "/v1/responses",
        &json!({ "model": "tiny", "input": "hi", "max_output_tokens": 1 }),
        &[
            ("model", Value::Null),
            ("model", json!("nope")),
            ("input", Value::Null),
            ("input", json!(7)),
            ("input", json!([])),
            ("input", json!(["hi"])),
            ("input", json!([{ "content": "hi" }])),
            ("input", json!([{ "role": "tool", "content": "hi" }])),
            ("input", json!([{ "role": "user" }])),
            ("input", json!([{ "role": "user", "content": 7 }])),
            ("input", json!([{ "role": "user", "content": [] }])),
            ("input", json!([{ "role": "user", "content": "a", "mood": 1 }])),
            ("input", json!([{ "role": "user", "content": "a", "status": "odd" }])),
            ("input", item("user", json!({ "type": "input_text" }))),
            ("input", item("user", json!({ "text": "a" }))),
            ("input", item("user", json!({ "type": "text", "text": "a" }))),
            ("input", item("user", json!({ "type": "output_text", "text": "a" }))),
            ("input", item("user", json!({ "type": "input_image", "image_url": "https://x/y.png" }))),
            ("input", item("user", json!({ "type": "input_audio", "input_audio": {} }))),
            ("input", item("user", json!({ "type": "input_text", "text": "a", "more": 1 }))),
            ("input", item("assistant", json!({ "type": "refusal", "refusal": "no" }))),
            ("input", item("assistant", json!({ "type": "output_text", "text": "a", "annotations": 7 }))),
            ("input", json!([{ "type": "item_reference", "id": "msg_1" }])),
            ("input", json!([{ "type": "function_call_output", "call_id": "a", "output": "b" }])),
            ("input", json!([{ "type": "reasoning", "summary": [] }])),
            ("input", json!([{ "type": 7, "role": "user", "content": "a" }])),
            ("input", json!([{ "role": "assistant", "content": "I speak first" }])),
            ("instructions", json!(7)),
            ("previous_response_id", json!("resp_1")),
            ("conversation", json!("conv_1")),
            ("conversation", json!({ "id": "conv_1" })),
            ("prompt", json!({ "id": "pmpt_1" })),
            ("store", json!(true)),
            ("store", json!("yes")),
            ("background", json!(true)),
            ("background", json!(1)),
            ("max_output_tokens", json!(0)),
            ("max_output_tokens", json!(600)),
            ("max_output_tokens", json!("many")),
            ("max_tokens", json!(1)),
            ("messages", json!([])),
            ("n", json!(1)),
            ("max_tool_calls", json!(0)),
            ("temperature", json!(2.1)),
            ("temperature", json!("hot")),
            ("top_p", json!(-0.1)),
            ("top_logprobs", json!(21)),
            ("include", json!("message.output_text.logprobs")),
            ("include", json!(["everything"])),
            ("include", json!([7])),
            ("text", json!("plain")),
            ("text", json!({ "format": { "type": "json_schema", "name": "a", "schema": {} } })),
            ("text", json!({ "format": { "type": "json_object" } })),
            ("text", json!({ "format": { "type": "junk" } })),
            ("text", json!({ "format": "text" })),
            ("text", json!({ "verbosity": "loud" })),
            ("text", json!({ "size": 12 })),
            ("truncation", json!("auto")),
            ("truncation", json!("sometimes")),
            ("truncation", json!(true)),
            ("reasoning", json!("high")),
            ("reasoning", json!({ "effort": "endless" })),
            ("reasoning", json!({ "summary": "short" })),
            ("reasoning", json!({ "budget": 1 })),
            ("tools", json!([{ "type": "web_search" }])),
            ("tools", json!({})),
            ("tool_choice", json!("required")),
            ("tool_choice", json!({ "type": "function", "name": "f" })),
            ("parallel_tool_calls", json!("yes")),
            ("metadata", json!({ "a": 1 })),
            ("metadata", json!({ "a": "v".repeat(513) })),
            ("moderation", json!({ "model": "omni" })),
            ("context_management", json!([{ "type": "compaction" }])),
            ("service_tier", json!("gold")),
            ("prompt_cache_retention", json!("1y")),
            ("prompt_cache_key", json!(1)),
            ("safety_identifier", json!("s".repeat(129))),
            ("user", json!(5)),
            ("stream", json!("yes")),
            ("stream_options", json!({ "include_obfuscation": true })),
            ("stop", json!([""])),
            ("baton", json!({ "what": true })),
            ("frobnicate", json!(1)),
        ],
        expect_file!["golden/responses_fields.txt"],
    )
    .await;
}

#[tokio::test]
async fn messages() {
    let block = |role: &str, block: Value| json!([{ "role": role, "content": [block] }]);
    check(
        "/v1/messages",
        &json!({ "model": "tiny", "max_tokens": 1, "messages": [{ "role": "user", "content": "hi" }] }),
        &[
            ("model", Value::Null),
            ("model", json!("nope")),
            ("max_tokens", Value::Null),
            ("max_tokens", json!(0)),
            ("max_tokens", json!(-1)),
            ("max_tokens", json!("many")),
            ("max_tokens", json!(600)),
            ("messages", Value::Null),
            ("messages", json!([])),
            ("messages", json!("hi")),
            ("messages", json!([7])),
            ("messages", json!([{ "content": "hi" }])),
            ("messages", json!([{ "role": "tool", "content": "hi" }])),
            ("messages", json!([{ "role": "user" }])),
            ("messages", json!([{ "role": "user", "content": {} }])),
            ("messages", json!([{ "role": "user", "content": [] }])),
            ("messages", json!([{ "role": "user", "content": "a", "name": "jo" }])),
            ("messages", json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": "Sure:" }])),
            ("messages", json!([{ "role": "assistant", "content": "I speak first" }, { "role": "user", "content": "a" }])),
            ("messages", block("user", json!({ "type": "text" }))),
            ("messages", block("user", json!({ "type": "magic" }))),
            ("messages", block("user", json!({ "type": "image", "source": { "type": "base64", "data": "" } }))),
            ("messages", block("user", json!({ "type": "tool_result", "tool_use_id": "a", "content": "b" }))),
            ("messages", block("user", json!({ "type": "text", "text": "a", "cache_control": 7 }))),
            ("messages", block("user", json!({ "type": "text", "text": "a", "more": 7 }))),
            ("system", json!(7)),
            ("system", json!([])),
            ("system", json!([{ "type": "image" }])),
            ("temperature", json!(1.1)),
            ("temperature", json!(-0.1)),
            ("temperature", json!("hot")),
            ("top_p", json!(1.5)),
            ("top_k", json!(-1)),
            ("top_k", json!(1.5)),
            ("stop_sequences", json!("END")),
            ("stop_sequences", json!([""])),
            ("stop_sequences", json!(["  \n"])),
            ("stop_sequences", json!([7])),
            ("stop_sequences", json!(vec!["a"; 17])),
            ("stop_sequences", json!(["a".repeat(1025)])),
            ("stream", json!("yes")),
            ("metadata", json!("u")),
            ("metadata", json!({ "user_id": 7 })),
            ("metadata", json!({ "user_id": "u".repeat(257) })),
            ("metadata", json!({ "other": "u" })),
            ("tools", json!([{ "name": "f", "input_schema": {} }])),
            ("tools", json!({})),
            ("tool_choice", json!("auto")),
            ("tool_choice", json!({})),
            ("tool_choice", json!({ "type": "any" })),
            ("tool_choice", json!({ "type": "auto", "more": 1 })),
            ("thinking", json!({ "type": "enabled", "budget_tokens": 1024 })),
            ("thinking", json!({ "type": "deep" })),
            ("thinking", json!({})),
            ("output_config", json!({ "format": { "type": "json_schema", "schema": {} } })),
            ("output_config", json!({ "effort": "endless" })),
            ("mcp_servers", json!([{ "type": "url" }])),
            ("container", json!("c")),
            ("service_tier", json!("gold")),
            ("speed", json!("ludicrous")),
            ("stop", json!("a")),
            ("n", json!(1)),
            ("frobnicate", json!(1)),
        ],
        expect_file!["golden/messages_fields.txt"],
    )
    .await;
    check(
        "/v1/messages/count_tokens",
        &json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }] }),
        &[
            ("model", Value::Null),
            ("messages", json!([])),
            ("system", json!(7)),
            ("tools", json!([{}])),
            ("max_tokens", json!(1)),
        ],
        expect_file!["golden/count_fields.txt"],
    )
    .await;
}

#[tokio::test]
async fn tokens_and_embeddings() {
    check(
        "/tokenize",
        &json!({ "model": "tiny", "prompt": "hi" }),
        &[
            ("model", json!("nope")),
            ("model", json!(7)),
            ("prompt", Value::Null),
            ("prompt", json!(7)),
            ("prompt", json!(["hi"])),
            ("messages", json!([{ "role": "user", "content": "hi" }])),
            ("add_special_tokens", json!("yes")),
            ("return_token_strs", json!(1)),
            ("add_generation_prompt", json!(true)),
            ("frobnicate", json!(1)),
        ],
        expect_file!["golden/tokenize_fields.txt"],
    )
    .await;
    check(
        "/v1/tokenize",
        &json!({ "messages": [{ "role": "user", "content": "hi" }] }),
        &[
            ("messages", json!([])),
            ("messages", json!([{ "role": "wizard", "content": "hi" }])),
            ("messages", json!([{ "role": "assistant", "content": "I speak first" }])),
            ("add_generation_prompt", json!(1)),
            ("continue_final_message", json!(true)),
            ("chat_template", json!("{{ messages }}")),
            ("chat_template_kwargs", json!({ "a": 1 })),
            ("chat_template_kwargs", json!(7)),
            ("tools", json!([{}])),
        ],
        expect_file!["golden/tokenize_chat_fields.txt"],
    )
    .await;
    check(
        "/detokenize",
        &json!({ "tokens": [104] }),
        &[
            ("model", json!("nope")),
            ("tokens", Value::Null),
            ("tokens", json!("hi")),
            ("tokens", json!([300])),
            ("tokens", json!([-1])),
            ("tokens", json!([1.5])),
            ("tokens", json!(["a"])),
            ("tokens", json!([[1]])),
            ("prompt", json!("hi")),
        ],
        expect_file!["golden/detokenize_fields.txt"],
    )
    .await;
    check(
        "/v1/embeddings",
        &json!({ "model": "tiny", "input": "hi" }),
        &[
            ("model", Value::Null),
            ("model", json!("nope")),
            ("model", json!("tiny")),
            ("input", Value::Null),
            ("input", json!(7)),
            ("input", json!([])),
            ("input", json!([300])),
            ("input", json!(vec!["a"; 2049])),
            ("encoding_format", json!("hex")),
            ("dimensions", json!(0)),
            ("user", json!(7)),
            ("frobnicate", json!(1)),
        ],
        expect_file!["golden/embeddings_fields.txt"],
    )
    .await;
    check(
        "/v1/responses/input_tokens",
        &json!({ "model": "tiny", "input": "hi" }),
        &[
            ("model", json!("nope")),
            ("input", Value::Null),
            ("previous_response_id", json!("resp_1")),
            ("tools", json!([{}])),
            ("max_output_tokens", json!(1)),
        ],
        expect_file!["golden/input_tokens_fields.txt"],
    )
    .await;
}

#[tokio::test]
async fn bombs_are_refused_quickly_on_every_route() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    let open = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    for (path, field) in [
        ("/v1/responses", "input"),
        ("/v1/responses/input_tokens", "input"),
        ("/v1/messages", "messages"),
        ("/v1/messages/count_tokens", "messages"),
        ("/tokenize", "messages"),
        ("/tokenize", "prompt"),
        ("/detokenize", "tokens"),
        ("/v1/embeddings", "input"),
    ] {
        for body in [
            String::new(),
            "{".to_owned(),
            "[]".to_owned(),
            "null".to_owned(),
            format!("{{\"{field}\": NaN}}"),
            format!("{{\"{field}\": \"\\ud800\"}}"),
            format!("{{\"{field}\": [\"\\ud800\"]}}"),
            format!("{{\"{field}\":\"a\",\"{field}\":\"a\"}}"),
            format!("{{\"model\":\"tiny\",\"{field}\":{}}}", open(100)),
            format!("{{\"model\":\"tiny\",\"{field}\":{}}}", open(100_000)),
            format!("{{\"model\":\"tiny\",\"{field}\":[{{\"role\":\"user\",\"content\":{}}}]}}", open(1000)),
            format!("{{\"model\":\"tiny\",\"{field}\":[{}-1]}}", "0,".repeat(500_000)),
            format!("{{\"model\":\"tiny\",\"{field}\":[{}{{}}]}}", "{},".repeat(500_000)),
            format!("{{\"model\":\"tiny\",\"{field}\":{}}}", "9".repeat(100_000)),
            format!(
                "{{{}\"model\":\"tiny\"}}",
                (0..100_000).map(|i| format!("\"k{i}\":1,")).collect::<String>()
            ),
        ] {
            let answer = harness.ask("POST", path, body.clone()).await;
            let case: String = format!("{path} {field} {}", body.chars().take(60).collect::<String>());
            assert_eq!(answer.status, 400, "{case}: {}", answer.text);
            assert!(answer.text.len() < 2000, "{case}: an error does not repeat what was sent");
            if path.starts_with("/v1/messages") {
                anthropic_line(&answer);
            } else {
                error_line(&answer);
            }
        }
        let bad_utf8 = [b"{\"model\": \"", &[0xFF, 0xFE][..], b"\"}"].concat();
        assert_eq!(harness.ask("POST", path, bad_utf8).await.status, 400);
    }
    assert!(worker.generated().is_empty());
    harness.finish().await;
}
