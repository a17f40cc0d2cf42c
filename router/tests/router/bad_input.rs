//! Bad input: a 4xx in the OpenAI shape that names the field, always; never a 5xx, never a hang.

use baton_config::Role;
use expect_test::{ExpectFile, expect_file};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fake_worker::FakeWorker;
use crate::harness::{Answer, Harness, PATIENCE};

async fn start() -> (FakeWorker, Harness) {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    (worker, harness)
}

/// Checks the shape of an error and gives it as one line.
pub(crate) fn error_line(answer: &Answer) -> String {
    assert!((400..500).contains(&answer.status), "{} {}", answer.status, answer.text);
    assert_eq!(answer.headers["content-type"], "application/json");
    let body = answer.json();
    let error = body["error"].as_object().expect("an error object");
    let keys: Vec<&str> = error.keys().map(String::as_str).collect();
    assert_eq!(keys, ["code", "message", "param", "type"], "{}", answer.text);
    let (param, code) = (&error["param"], &error["code"]);
    format!("{} {param} {code} {}", answer.status, error["message"].as_str().expect("a message"))
}

async fn check(harness: &Harness, path: &str, cases: &[&str], expected: ExpectFile) {
    let mut lines = String::new();
    for case in cases {
        let answer = harness.ask("POST", path, (*case).to_owned()).await;
        let shown: String = case.chars().take(60).collect();
        lines.push_str(&format!("{shown}\n  {}\n", error_line(&answer)));
    }
    expected.assert_eq(&lines);
}

#[tokio::test]
async fn bodies_that_are_no_json_object() {
    let (_worker, harness) = start().await;
    check(
        &harness,
        "/v1/chat/completions",
        &[
            "",
            "{",
            "[]",
            "null",
            "\"a\"",
            "{\"model\": NaN}",
            "{\"model\": 1e999}",
            "{'a': 1}",
            "{} x",
            "{\"a\": \"\u{1}\"}",
        ],
        expect_file!["golden/bodies.txt"],
    )
    .await;
    let bad_utf8 = harness.ask("POST", "/v1/completions", b"{\"model\": \"\xFF\"}".to_vec()).await;
    expect_file!["golden/utf8.txt"].assert_eq(&error_line(&bad_utf8));
    harness.finish().await;
}

#[tokio::test]
async fn chat_fields_one_by_one() {
    let (worker, harness) = start().await;
    let valid =
        json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 1 });
    let mut cases = Vec::new();
    for (field, value) in [
        ("model", json!(7)),
        ("model", json!("")),
        ("model", json!("nope")),
        ("model", Value::Null),
        ("messages", Value::Null),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("messages", json!([7])),
        ("messages", json!([{ "content": "hi" }])),
        ("messages", json!([{ "role": "wizard", "content": "hi" }])),
        ("messages", json!([{ "role": 1, "content": "hi" }])),
        ("messages", json!([{ "role": "user" }])),
        ("messages", json!([{ "role": "user", "content": 1 }])),
        ("messages", json!([{ "role": "user", "content": [] }])),
        (
            "messages",
            json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "x" } }] }]),
        ),
        ("messages", json!([{ "role": "user", "content": [{ "type": "magic" }] }])),
        ("messages", json!([{ "role": "user", "content": [{ "type": "text" }] }])),
        ("messages", json!([{ "role": "user", "content": "a", "mood": 1 }])),
        (
            "messages",
            json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": null, "tool_calls": [{}] }]),
        ),
        ("messages", json!([{ "role": "assistant", "content": "I speak first" }])),
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("temperature", json!("hot")),
        ("temperature", json!([1])),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(-2.5)),
        ("frequency_penalty", json!(3)),
        ("n", json!(0)),
        ("n", json!(100_000)),
        ("n", json!(true)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(600)),
        ("max_completion_tokens", json!("many")),
        ("max_tokens", json!(1e30)),
        ("seed", json!("x")),
        ("seed", json!(1.5)),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!([""])),
        ("stop", json!([1])),
        ("stop", json!({})),
        ("stream", json!("yes")),
        ("stream_options", json!({ "include_usage": true })),
        ("logprobs", json!(5)),
        ("top_logprobs", json!(5)),
        ("top_logprobs", json!(21)),
        ("logit_bias", json!({ "x": 1 })),
        ("logit_bias", json!({ "300": 1 })),
        ("logit_bias", json!({ "-1": 1 })),
        ("logit_bias", json!({ "5": 101 })),
        ("logit_bias", json!([])),
        ("stop_token_ids", json!([300])),
        ("stop_token_ids", json!(["a"])),
        ("tools", json!([{ "type": "function" }])),
        ("tools", json!({})),
        ("tool_choice", json!("required")),
        ("functions", json!([{}])),
        ("function_call", json!({ "name": "f" })),
        ("response_format", json!({ "type": "json_schema", "json_schema": {} })),
        ("response_format", json!({ "type": "junk" })),
        ("modalities", json!(["text", "audio"])),
        ("audio", json!({})),
        ("web_search_options", json!({})),
        ("user", json!(5)),
        ("metadata", json!({ "a": 1 })),
        ("store", json!("yes")),
        ("parallel_tool_calls", json!(1)),
        ("ignore_eos", json!(1)),
        ("baton", json!({ "token_ids": 1 })),
        ("baton", json!({ "what": true })),
        ("frobnicate", json!(1)),
    ] {
        let mut body = valid.clone();
        body[field] = value.clone();
        cases.push((format!("{field}: {value}"), body.to_string()));
    }
    let mut lines = String::new();
    for (case, body) in cases {
        let answer = harness.ask("POST", "/v1/chat/completions", body).await;
        let shown: String = case.chars().take(100).collect();
        lines.push_str(&format!("{shown}\n  {}\n", error_line(&answer)));
    }
    expect_file!["golden/chat_fields.txt"].assert_eq(&lines);
    assert!(worker.generated().is_empty(), "nothing of this reaches a worker");
    harness.finish().await;
}

#[tokio::test]
async fn completion_fields_one_by_one() {
    let (worker, harness) = start().await;
    check(
        &harness,
        "/v1/completions",
        &[
            r#"{"model":"tiny"}"#,
            r#"{"model":"tiny","prompt":null}"#,
            r#"{"model":"tiny","prompt":7}"#,
            r#"{"model":"tiny","prompt":{}}"#,
            r#"{"model":"tiny","prompt":[]}"#,
            r#"{"model":"tiny","prompt":[[]]}"#,
            r#"{"model":"tiny","prompt":["a",1]}"#,
            r#"{"model":"tiny","prompt":[1,"a"]}"#,
            r#"{"model":"tiny","prompt":[1,-1]}"#,
            r#"{"model":"tiny","prompt":[1,300]}"#,
            r#"{"model":"tiny","prompt":[99999999999]}"#,
            r#"{"model":"tiny","prompt":[1.5]}"#,
            r#"{"model":"tiny","prompt":[[1],[2],[true]]}"#,
            r#"{"model":"tiny","prompt":"\ud800"}"#,
            r#"{"model":"tiny","prompt":"a","n":100,"best_of":3}"#,
            r#"{"model":"tiny","prompt":["a","b"],"n":100}"#,
            r#"{"model":"tiny","prompt":"a","best_of":3}"#,
            r#"{"model":"tiny","prompt":"a","suffix":"b"}"#,
            r#"{"model":"tiny","prompt":"a","logprobs":6}"#,
            r#"{"model":"tiny","prompt":"a","logprobs":true}"#,
            r#"{"model":"tiny","prompt":"a","echo":true,"logprobs":1}"#,
            r#"{"model":"tiny","prompt":"a","max_tokens":512}"#,
            r#"{"model":"tiny","prompt":"a","model":"tiny"}"#,
            r#"{"model":"tiny","prompt":"a","\u006dodel":"tiny"}"#,
            r#"{"model":"tiny","prompt":"a","stream":true,"stream_options":{"include_usage":true,"include_usage":false}}"#,
            r#"{"model":"tiny","prompt":"a","messages":[]}"#,
            r#"{"model":"tiny","prompt":"a","seed":9223372036854775808}"#,
            r#"{"model":"tiny","prompt":"a","max_tokens":99999999999999999999999999999999999999999999}"#,
            r#"{"model":"tiny","prompt":"a","max_tokens":-99999999999999999999999999999999999999999999}"#,
            r#"{"model":"tiny","prompt":"a","max_tokens":1e2}"#,
            r#"{"model":"tiny","prompt":"a","temperature":1e400}"#,
            r#"{"model":"tiny","prompt":"a","temperature":-1e400}"#,
        ],
        expect_file!["golden/completion_fields.txt"],
    )
    .await;
    assert!(worker.generated().is_empty(), "nothing of this reaches a worker");
    harness.finish().await;
}

#[tokio::test]
async fn bombs_are_refused_or_served_quickly() {
    let (_worker, harness) = start().await;
    let open = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    for (body, status) in [
        (format!(r#"{{"model":"tiny","messages":{}}}"#, open(100)), 400),
        (format!(r#"{{"model":"tiny","messages":{}}}"#, open(100_000)), 400),
        (format!(r#"{{"model":"tiny","messages":[{{"role":"user","content":{}}}]}}"#, open(1000)), 400),
        (format!(r#"{{"model":"tiny","prediction":{{"a":{}}},"messages":1}}"#, open(100_000)), 400),
        (format!(r#"{{"model":"tiny","seed":{}}}"#, "9".repeat(100_000)), 400),
        (format!(r#"{{"model":"tiny","messages":[{}0]}}"#, "0,".repeat(1_000_000)), 400),
        (
            format!(
                r#"{{"model":"tiny","messages":[{{"role":"user","content":"{}"}}]}}"#,
                "a ".repeat(50_000)
            ),
            400,
        ),
        (
            format!(
                r#"{{{}"model":"tiny"}}"#,
                (0..100_000).map(|i| format!("\"k{i}\":1,")).collect::<String>()
            ),
            400,
        ),
        (
            format!(r#"{{"model":"{}","messages":[{{"role":"user","content":"a"}}]}}"#, "m".repeat(100_000)),
            404,
        ),
    ] {
        let answer = harness.ask("POST", "/v1/chat/completions", body).await;
        assert_eq!(answer.status, status, "{}", answer.text);
        error_line(&answer);
        assert!(answer.text.len() < 2000, "an error does not repeat what was sent");
    }
    let long = format!(r#"{{"model":"tiny","prompt":[{}0]}}"#, "0,".repeat(600));
    let answer = harness.ask("POST", "/v1/completions", long).await;
    assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
    harness.finish().await;
}

#[tokio::test]
async fn harmless_and_internal_fields_are_taken_and_dropped() {
    let (worker, harness) = start().await;
    let body = json!({
        "model": "tiny", "messages": [
            { "role": "developer", "content": "be brief" },
            { "role": "user", "content": [{ "type": "text", "text": "q" }, { "type": "text", "text": "z" }], "name": "jo" },
            { "role": "assistant", "content": "c", "refusal": null },
            { "role": "user", "content": "d" }
        ],
        "max_completion_tokens": 2, "temperature": 0, "top_p": 0, "top_k": -1,
        "user": "u", "metadata": { "k": "v" }, "store": false, "service_tier": "auto", "parallel_tool_calls": true,
        "tools": [], "tool_choice": "none", "functions": null, "response_format": { "type": "text" },
        "modalities": ["text"], "reasoning_effort": "low", "logit_bias": {}, "stop": null, "n": null, "stream": null,
        "kv_transfer_params": { "do_remote_decode": true }, "bootstrap_host": "evil", "bootstrap_room": 7,
        "request_id": "mine", "data_parallel_rank": 3, "cache_salt": "x"
    });
    let answer = harness.chat(&body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let request = &worker.generated()[0];
    assert_ne!(request.request_id, "mine");
    assert_eq!(request.cache_salt, 0);
    assert_eq!(request.sampling.temperature, 0.0);
    assert!(request.sampling.top_p > 0.0);
    let prompt: String =
        request.tokens.iter().filter_map(|token| u8::try_from(*token).ok().map(char::from)).collect();
    assert!(prompt.contains("q\nz"), "parts are joined: {prompt}");
    harness.finish().await;
}

#[tokio::test]
async fn paths_methods_and_types() {
    let (_worker, harness) = start().await;
    let mut lines = String::new();
    for (method, path) in [
        ("GET", "/"),
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/v1/images/generations"),
        ("TRACE", "/metrics"),
        ("BREW", "/v1/completions"),
        ("GET", "/v1/models/nope"),
        ("GET", "/v1/models/"),
    ] {
        lines.push_str(&error_line(&harness.ask(method, path, "").await));
        lines.push('\n');
    }
    expect_file!["golden/paths.txt"].assert_eq(&lines);
    for (name, value) in [("content-type", "text/plain"), ("content-encoding", "gzip")] {
        let mut stream = TcpStream::connect(harness.address).await.expect("a connection");
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{name}: {value}\r\ncontent-length: 2\r\n\r\n{{}}"
        );
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut told = String::new();
        stream.read_to_string(&mut told).await.expect("an answer");
        assert!(told.starts_with("HTTP/1.1 415 ") && told.contains("unsupported_media_type"), "{told}");
    }
    harness.finish().await;
}

#[tokio::test]
async fn requests_that_are_no_http_get_one_answer_and_a_closed_connection() {
    let (_worker, harness) = start().await;
    let many = (0..200).map(|i| format!("h{i}: v\r\n")).collect::<String>();
    let large = format!("x: {}\r\n", "v".repeat(100 << 10));
    for (head, status) in [
        ("GET / HTTP/0.9\r\n\r\n".to_owned(), 400),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\x7c\x03\x03 hello\r\n\r\n".to_owned(), 400),
        (
            "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n"
                .to_owned(),
            400,
        ),
        ("POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: +5\r\n\r\n".to_owned(), 400),
        ("POST /v1/completions HTTP/1.1\r\nhost : a\r\n\r\n".to_owned(), 400),
        (format!("GET /livez HTTP/1.1\r\nhost: a\r\n{many}\r\n"), 431),
        (format!("GET /livez HTTP/1.1\r\nhost: a\r\n{large}\r\n"), 431),
        (format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(100 << 10)), 414),
    ] {
        let mut stream = TcpStream::connect(harness.address).await.expect("a connection");
        // The router may have answered and closed before all of a large head is written.
        let _ = stream.write_all(head.as_bytes()).await;
        let mut told = Vec::new();
        let shown: String = head.chars().take(60).collect();
        let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut told)).await;
        assert!(read.is_ok(), "{shown:?} is not answered and closed");
        let told = String::from_utf8_lossy(&told).into_owned();
        assert!(told.starts_with(&format!("HTTP/1.1 {status} ")), "{shown:?}: {told:?} {read:?}");
        assert!(told.contains("\"error\":{"), "{shown:?}: {told:?}");
        assert_eq!(told.matches("HTTP/1.1").count(), 1, "{shown:?}: {told:?}");
    }
    assert_eq!(harness.get("/livez").await.status, 200);
    harness.finish().await;
}
