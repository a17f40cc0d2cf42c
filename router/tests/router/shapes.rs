//! Every route refuses in the shape of its own API, whatever is wrong with a request.

use std::time::Duration;

use baton_config::Role;
use baton_config::fleet::{AuthSpec, Isolation};
use baton_router::mint;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fake_worker::{Act, FakeWorker};
use crate::harness::{Harness, PATIENCE};

const OPENAI: [&str; 10] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/responses/input_tokens",
    "/tokenize",
    "/v1/tokenize",
    "/detokenize",
    "/v1/detokenize",
    "/v1/embeddings",
    "/v1/nothing",
];
const ANTHROPIC: [&str; 3] = ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/nothing"];

/// Every path, and whether it is Anthropic's.
fn paths() -> impl Iterator<Item = (&'static str, bool)> {
    OPENAI.into_iter().map(|path| (path, false)).chain(ANTHROPIC.into_iter().map(|path| (path, true)))
}

/// Sends bytes and reads to the end of the connection.
async fn told(harness: &Harness, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(harness.address).await.expect("a connection");
    let _ = stream.write_all(bytes).await;
    let mut all = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut all)).await;
    assert!(read.is_ok(), "held open: {}", String::from_utf8_lossy(bytes));
    String::from_utf8_lossy(&all).into_owned()
}

/// Checks status, type and shape.
fn check(told: &str, status: u16, anthropic: bool) {
    assert!(told.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {told}");
    assert!(told.contains("content-type: application/json\r\n"), "{told}");
    let (_, body) = told.split_once("\r\n\r\n").expect("a body");
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {told}"));
    let keys =
        |value: &Value| -> Vec<String> { value.as_object().expect("an object").keys().cloned().collect() };
    if anthropic {
        assert_eq!(keys(&body), ["error", "type"], "{told}");
        assert_eq!(keys(&body["error"]), ["message", "type"], "{told}");
    } else {
        assert_eq!(keys(&body), ["error"], "{told}");
        assert_eq!(keys(&body["error"]), ["code", "message", "param", "type"], "{told}");
    }
}

#[tokio::test]
async fn heads_and_bodies_that_cannot_be() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |options| {
        options.limits.body = baton_config::Bytes(4096);
        options.timeouts.body = Duration::from_millis(300);
    })
    .await;
    for (path, anthropic) in paths() {
        let known = !path.ends_with("nothing");
        let or_404 = |status: u16| if known { status } else { 404 };
        let end = "host: a\r\nconnection: close\r\n";
        let large = format!("x: {}\r\n", "v".repeat(60 << 10));
        let query = "q".repeat(6 << 10);
        for (request, status) in [
            (format!("GET {path} HTTP/1.1\r\n{end}\r\n"), or_404(405)),
            (format!("PUT {path} HTTP/1.1\r\n{end}content-length: 2\r\n\r\n{{}}"), or_404(405)),
            (format!("POST {path} HTTP/1.1\r\n{end}content-length: 2\r\n\r\n{{}}"), or_404(400)),
            (
                format!(
                    "POST {path} HTTP/1.1\r\n{end}content-type: text/plain\r\ncontent-length: 2\r\n\r\n{{}}"
                ),
                or_404(415),
            ),
            (
                format!(
                    "POST {path} HTTP/1.1\r\n{end}content-encoding: gzip\r\ncontent-length: 2\r\n\r\n{{}}"
                ),
                or_404(415),
            ),
            (format!("POST {path} HTTP/1.1\r\n{end}content-length: 5000\r\n\r\n"), or_404(413)),
            (format!("POST {path} HTTP/1.1\r\n{end}content-length: 50\r\n\r\n{{"), or_404(408)),
            (format!("POST {path}?{query} HTTP/1.1\r\n{end}{large}content-length: 2\r\n\r\n{{}}"), 431),
            (format!("POST {path} HTTP/1.1\r\nhost: b\r\n{end}content-length: 2\r\n\r\n{{}}"), 400),
        ] {
            check(&told(&harness, request.as_bytes()).await, status, anthropic);
        }
    }
    assert!(worker.generated().is_empty());
    harness.finish().await;
}

#[tokio::test]
async fn keys_and_quotas() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let key = mint("acme").expect("a key");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("keys.yaml");
    let tenant = format!(
        "version: 1\ntenants:\n- name: acme\n  limits: {{ requests_per_min: 1 }}\n  keys:\n  {}\n",
        key.line
    );
    std::fs::write(&file, tenant).expect("written");
    let harness =
        Harness::start(&[&worker], |options| options.auth = Some(AuthSpec::new(file, Isolation::Tenant)))
            .await;
    let last = "connection: close\r\ncontent-length: 2\r\n\r\n{}";
    let routes = || paths().filter(|(path, _)| !path.ends_with("nothing"));
    for (path, anthropic) in routes() {
        let without = format!("POST {path} HTTP/1.1\r\nhost: a\r\n{last}");
        check(&told(&harness, without.as_bytes()).await, 401, anthropic);
        let wrong = format!("POST {path} HTTP/1.1\r\nhost: a\r\nx-api-key: nope\r\n{last}");
        check(&told(&harness, wrong.as_bytes()).await, 401, anthropic);
    }
    let mut refused = 0;
    for (path, anthropic) in routes() {
        let request = format!("POST {path} HTTP/1.1\r\nhost: a\r\nx-api-key: {}\r\n{last}", key.key);
        let told = told(&harness, request.as_bytes()).await;
        // The first one is let in, and is no valid request.
        let status = if told.starts_with("HTTP/1.1 400 ") { 400 } else { 429 };
        check(&told, status, anthropic);
        assert_eq!(told.contains("\r\nretry-after: "), status == 429, "{told}");
        refused += usize::from(status == 429);
    }
    assert_eq!(refused, routes().count() - 1);
    harness.finish().await;
}

#[tokio::test]
async fn workers_that_are_full_or_gone() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Status(429, baton_config::protocol::FailureCode::Overloaded));
    let harness = Harness::start(&[&worker], |_| {}).await;
    let bodies = [
        (
            "/v1/chat/completions",
            false,
            json!({ "model": "tiny", "messages": [{ "role": "user", "content": "a" }] }),
        ),
        ("/v1/completions", false, json!({ "model": "tiny", "prompt": "a" })),
        ("/v1/responses", false, json!({ "model": "tiny", "input": "a" })),
        (
            "/v1/messages",
            true,
            json!({ "model": "tiny", "max_tokens": 1, "messages": [{ "role": "user", "content": "a" }] }),
        ),
    ];
    let ask = async |status: u16| {
        for (path, anthropic, body) in &bodies {
            for stream in [false, true] {
                let mut body = body.clone();
                body["stream"] = json!(stream);
                let body = body.to_string();
                let request = format!(
                    "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                check(&told(&harness, request.as_bytes()).await, status, *anthropic);
            }
        }
    };
    ask(429).await;
    worker.always(Act::DieAfter(0));
    ask(502).await;
    harness.finish().await;
}
