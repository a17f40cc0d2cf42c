//! Every field with values of every kind: whatever comes, it is served or refused by the name of the field.

use baton_config::Role;
use serde_json::{Value, json};

use crate::fake_worker::FakeWorker;
use crate::harness::{Answer, Harness};

const SHARED: [&str; 32] = [
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "stream",
    "stream_options",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "stop_token_ids",
    "ignore_eos",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "baton",
    "kv_transfer_params",
    "cache_salt",
    "nvext",
    "bootstrap_host",
    "no_such_field",
    "__proto__",
];
const CHAT: [&str; 14] = [
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "response_format",
    "modalities",
    "audio",
    "web_search_options",
    "parallel_tool_calls",
    "reasoning_effort",
    "prediction",
];
const COMPLETIONS: [&str; 4] = ["prompt", "echo", "best_of", "suffix"];

/// As text: some of them no JSON library would write.
const VALUES: [&str; 34] = [
    "null",
    "true",
    "0",
    "-1",
    "-0",
    "1.5",
    "1e308",
    "-1e308",
    "1e-400",
    "1e999",
    "NaN",
    "Infinity",
    "0x10",
    "01",
    "9223372036854775808",
    "-9223372036854775809",
    "99999999999999999999999999999999999999999999999999",
    "\"\"",
    "\"x\"",
    "\"\\ud800\"",
    "\"\\udc00\\ud800\"",
    "\"\\u0000\"",
    "\"\\x\"",
    "[]",
    "[null]",
    "[[]]",
    "[{}]",
    "[\"a\",1]",
    "[1e999]",
    "{}",
    "{\"a\":null}",
    "{\"a\":1,\"a\":2}",
    "{\"type\":[]}",
    "{\"\\ud800\":1}",
];

const RESPONSES: [&str; 24] = [
    "input",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "include",
    "top_logprobs",
    "text",
    "truncation",
    "reasoning",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "previous_response_id",
    "conversation",
    "prompt",
    "background",
    "context_management",
    "moderation",
    "prompt_cache_options",
    "messages",
    "stream_options",
    "max_completion_tokens",
    "image",
    "access_programs",
];
const MESSAGES: [&str; 18] = [
    "messages",
    "system",
    "stop_sequences",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
    "mcp_servers",
    "container",
    "inference_geo",
    "context_management",
    "diagnostics",
    "speed",
    "cache_control",
    "prompt",
    "input",
    "user_profile_id",
    "workspace_id",
];
const TOKENIZE: [&str; 12] = [
    "prompt",
    "messages",
    "add_special_tokens",
    "return_token_strs",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "tools",
    "tokens",
];
const EMBEDDINGS: [&str; 3] = ["input", "dimensions", "encoding_format"];

/// Fields whose limits follow from another one.
const RELATED: [&str; 8] =
    ["messages", "prompt", "n", "stream_options", "top_logprobs", "echo", "input", "tokens"];

fn check(answer: &Answer, field: &str, value: &str) {
    let case = format!("{field}: {value}: {} {}", answer.status, answer.text);
    match answer.status {
        200 => {}
        400 | 404 => {
            assert_eq!(answer.headers["content-type"], "application/json", "{case}");
            let body = answer.json();
            let error = &body["error"];
            let message = error["message"].as_str().unwrap_or_default();
            assert!((1..600).contains(&message.len()), "{case}");
            let kind = error["type"].as_str().unwrap_or_default();
            assert!(matches!(kind, "invalid_request_error" | "not_found_error"), "{case}");
            let named =
                |text: &str| text.starts_with(field) || RELATED.iter().any(|name| text.starts_with(name));
            match &error["param"] {
                // Anthropic's errors have nothing but the message.
                Value::Null if body["type"] == "error" => {
                    let mut quoted = message.split('\'').skip(1).step_by(2);
                    let is_named = quoted.any(named) || message.starts_with("The model '");
                    assert!(
                        is_named || message.contains("JSON") || message.contains("chat template"),
                        "{case}"
                    );
                }
                // The body as a whole is no JSON.
                Value::Null => assert!(message.contains("JSON"), "{case}"),
                Value::String(param) => {
                    let whole_model = param == "model" && error["code"] == "unsupported_model";
                    assert!(named(param) || whole_model, "{case}");
                }
                other => panic!("{other}: {case}"),
            }
        }
        _ => panic!("{case}"),
    }
}

#[tokio::test]
async fn every_field_takes_every_kind_of_value_or_says_its_name() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    let chat = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 1 });
    let plain = json!({ "model": "tiny", "prompt": "hi", "max_tokens": 1 });
    let input = json!({ "model": "tiny", "input": "hi", "max_output_tokens": 1 });
    let turns = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }] });
    let bounded =
        json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 1 });
    for (path, base, own) in [
        ("/v1/chat/completions", chat, &CHAT[..]),
        ("/v1/completions", plain, &COMPLETIONS[..]),
        ("/v1/responses", input, &RESPONSES[..]),
        ("/v1/responses/input_tokens", json!({ "model": "tiny", "input": "hi" }), &RESPONSES[..]),
        ("/v1/messages", bounded, &MESSAGES[..]),
        ("/v1/messages/count_tokens", turns.clone(), &MESSAGES[..]),
        ("/tokenize", json!({ "prompt": "hi" }), &TOKENIZE[..]),
        ("/v1/tokenize", turns, &TOKENIZE[..]),
        ("/detokenize", json!({ "tokens": [104] }), &TOKENIZE[..]),
        ("/v1/embeddings", json!({ "model": "tiny", "input": "hi" }), &EMBEDDINGS[..]),
    ] {
        for field in SHARED.iter().chain(own) {
            let bodies: Vec<(&str, String)> = VALUES
                .iter()
                .map(|value| {
                    let mut rest = base.clone();
                    rest.as_object_mut().expect("an object").remove(*field);
                    let rest = rest.to_string();
                    let comma = if rest == "{}" { "" } else { "," };
                    (*value, format!("{{\"{field}\":{value}{comma}{}", &rest[1..]))
                })
                .collect();
            let asked = bodies.iter().map(|(_, body)| harness.ask("POST", path, body.clone()));
            let answers = futures_util::future::join_all(asked).await;
            for ((value, _), answer) in bodies.iter().zip(&answers) {
                check(answer, field, value);
            }
        }
    }
    harness.finish().await;
}

/// Puts every value into every field of one message, wherever `place` puts the message.
async fn within(path: &str, fields: &[&str], message: Value, place: impl Fn(String) -> String) {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    for field in fields {
        for value in VALUES {
            let mut message = message.clone();
            message.as_object_mut().expect("an object").remove(*field);
            let message = message.to_string();
            let comma = if message == "{}" { "" } else { "," };
            let body = place(format!("{{\"{field}\":{value}{comma}{}", &message[1..]));
            check(&harness.ask("POST", path, body).await, field, value);
        }
    }
    harness.finish().await;
}

#[tokio::test]
async fn messages_hold_nothing_but_messages() {
    let fields = ["role", "content", "name", "refusal", "tool_calls", "tool_call_id", "junk"];
    let message = json!({ "role": "user", "content": "hi" });
    let chat = |message| format!("{{\"model\":\"tiny\",\"max_tokens\":1,\"messages\":[{message}]}}");
    within("/v1/chat/completions", &fields, message.clone(), chat).await;
    within("/v1/messages", &fields, message.clone(), chat).await;
    let tokenize = |message| format!("{{\"messages\":[{message}]}}");
    within("/tokenize", &fields, message.clone(), tokenize).await;
    let item = |message| format!("{{\"model\":\"tiny\",\"max_output_tokens\":1,\"input\":[{message}]}}");
    let fields = ["type", "role", "content", "id", "status", "phase", "call_id", "junk"];
    within("/v1/responses", &fields, message, item).await;
}

#[tokio::test]
async fn parts_hold_nothing_but_text() {
    let fields = ["type", "text", "cache_control", "citations", "annotations", "logprobs", "junk"];
    let part = |kind: &str| json!({ "type": kind, "text": "hi" });
    let chat = |part| {
        format!(
            "{{\"model\":\"tiny\",\"max_tokens\":1,\"messages\":[{{\"role\":\"user\",\"content\":[{part}]}}]}}"
        )
    };
    within("/v1/chat/completions", &fields, part("text"), chat).await;
    within("/v1/messages", &fields, part("text"), chat).await;
    let input = |part| {
        format!(
            "{{\"model\":\"tiny\",\"max_output_tokens\":1,\"input\":[{{\"role\":\"user\",\"content\":\"a\"}},\
             {{\"role\":\"assistant\",\"content\":[{part}]}}]}}"
        )
    };
    within("/v1/responses", &fields, part("output_text"), input).await;
}
