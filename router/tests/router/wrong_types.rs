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

fn check(answer: &Answer, field: &str, value: &str) {
    let case = format!("{field}: {value}: {} {}", answer.status, answer.text);
    match answer.status {
        200 => {}
        400 | 404 => {
            assert_eq!(answer.headers["content-type"], "application/json", "{case}");
            let error = &answer.json()["error"];
            assert_eq!(error["type"], "invalid_request_error", "{case}");
            assert!(error["message"].as_str().is_some_and(|text| text.len() < 600), "{case}");
            match &error["param"] {
                // The body as a whole is no JSON, or the field's limit follows from another one.
                Value::Null => {
                    assert!(error["message"].as_str().is_some_and(|text| text.contains("JSON")), "{case}")
                }
                Value::String(param) => {
                    let related = ["messages", "prompt", "n", "stream_options", "top_logprobs", "echo"];
                    let named =
                        param.starts_with(field) || related.iter().any(|name| param.starts_with(name));
                    assert!(named, "{case}");
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
    for (path, base, own) in
        [("/v1/chat/completions", chat, &CHAT[..]), ("/v1/completions", plain, &COMPLETIONS[..])]
    {
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

#[tokio::test]
async fn messages_hold_nothing_but_messages() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    for field in ["role", "content", "name", "refusal", "tool_calls", "tool_call_id", "junk"] {
        for value in VALUES {
            let mut message = json!({ "role": "user", "content": "hi" });
            message.as_object_mut().expect("an object").remove(field);
            let message = message.to_string();
            let body = format!(
                "{{\"model\":\"tiny\",\"max_tokens\":1,\"messages\":[{{\"{field}\":{value},{}]}}",
                &message[1..]
            );
            check(&harness.ask("POST", "/v1/chat/completions", body).await, field, value);
        }
    }
    harness.finish().await;
}
