//! Requests whose end two readers could see in different places: one answer, then the connection is closed.

use baton_config::Role;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fake_worker::FakeWorker;
use crate::harness::{Harness, PATIENCE};

/// What would be the second request if the first one ended early.
const HIDDEN: &str = "GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n";

async fn told(harness: &Harness, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(harness.address).await.expect("a connection");
    let _ = stream.write_all(bytes).await;
    let mut all = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut all)).await;
    assert!(read.is_ok(), "not closed: {:?}", String::from_utf8_lossy(bytes));
    String::from_utf8_lossy(&all).into_owned()
}

#[tokio::test]
async fn what_can_be_read_in_two_ways_is_read_in_none() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |options| {
        options.timeouts.header = std::time::Duration::from_millis(700);
        options.timeouts.body = std::time::Duration::from_millis(700);
        options.timeouts.idle = std::time::Duration::from_millis(700);
    })
    .await;
    let zero = "0\r\n\r\n";
    for (headers, body) in [
        ("content-length: 6\r\ntransfer-encoding: chunked\r\n", format!("{zero}{HIDDEN}")),
        ("transfer-encoding: chunked\r\ncontent-length: 6\r\n", format!("{zero}{HIDDEN}")),
        ("content-length: 5\r\ncontent-length: 50\r\n", HIDDEN.to_owned()),
        ("content-length: 5, 50\r\n", HIDDEN.to_owned()),
        ("content-length: -1\r\n", HIDDEN.to_owned()),
        ("content-length: 0x5\r\n", HIDDEN.to_owned()),
        ("content-length: 5 5\r\n", HIDDEN.to_owned()),
        ("content-length: 18446744073709551616\r\n", HIDDEN.to_owned()),
        ("transfer-encoding: identity\r\n", HIDDEN.to_owned()),
        ("transfer-encoding: chunked, identity\r\n", format!("{zero}{HIDDEN}")),
        ("transfer-encoding: xchunked\r\n", format!("{zero}{HIDDEN}")),
        ("transfer-encoding: \x0bchunked\r\n", format!("{zero}{HIDDEN}")),
        ("transfer-encoding : chunked\r\n", format!("{zero}{HIDDEN}")),
        (" content-length: 5\r\n", HIDDEN.to_owned()),
        ("x: a\r\n content-length: 5\r\n", HIDDEN.to_owned()),
        ("x: a\0b\r\ncontent-length: 0\r\n", HIDDEN.to_owned()),
        ("x: a\rcontent-length: 5\r\n", HIDDEN.to_owned()),
        ("transfer-encoding: chunked\r\n", format!("fffffffffffffffff\r\n{HIDDEN}")),
        ("transfer-encoding: chunked\r\n", format!("-1\r\n{HIDDEN}")),
        ("transfer-encoding: chunked\r\n", format!("5 x\r\nhello\r\n{zero}")),
        ("transfer-encoding: chunked\r\n", format!("5\r\nhelloXX{zero}")),
        // Nothing else is wrong with it.
        (
            "host: b\r\ncontent-length: 44\r\n",
            "{\"model\":\"tiny\",\"prompt\":\"a\",\"max_tokens\":1}".to_owned(),
        ),
    ] {
        let request = format!("POST /v1/completions HTTP/1.1\r\nhost: a\r\n{headers}\r\n{body}");
        let told = told(&harness, request.as_bytes()).await;
        let status: u16 = told.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
        assert!((400..500).contains(&status), "{headers:?}: {told:?}");
        assert!(told.contains("\"error\":{"), "{headers:?}: {told:?}");
        assert!(!told.contains("baton_router_"), "{headers:?}: the hidden request was answered: {told:?}");
    }
    assert!(worker.generated().is_empty());
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 3 });
    assert_eq!(harness.complete(&body).await.status, 200);
    harness.finish().await;
}

#[tokio::test]
async fn requests_in_a_row_are_answered_in_order() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 2 }).to_string();
    let one =
        format!("POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let last = "GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let told = told(&harness, format!("{}{last}", one.repeat(10)).as_bytes()).await;
    assert_eq!(told.matches("HTTP/1.1 200 OK").count(), 11, "{told}");
    assert!(told.ends_with("ok\n"), "{told}");
    harness.finish().await;
}

#[tokio::test]
async fn a_hundred_slow_clients_keep_nobody_waiting() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |options| {
        options.timeouts.header = std::time::Duration::from_millis(1500);
        options.timeouts.body = std::time::Duration::from_millis(1500);
    })
    .await;
    let mut slow = Vec::new();
    for n in 0..100 {
        let mut stream = TcpStream::connect(harness.address).await.expect("a connection");
        let part = match n % 4 {
            0 => "",
            1 => "POST /v1/comp",
            2 => "POST /v1/completions HTTP/1.1\r\nhost: a\r\nx-",
            _ => "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{",
        };
        stream.write_all(part.as_bytes()).await.expect("written");
        slow.push(stream);
    }
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 3 });
    assert_eq!(harness.complete(&body).await.status, 200);
    let mut answered = 0;
    for mut stream in slow {
        let mut all = Vec::new();
        let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut all)).await;
        assert!(read.is_ok(), "held open");
        let told = String::from_utf8_lossy(&all);
        assert!(
            told.is_empty() || (told.starts_with("HTTP/1.1 408 ") && told.contains("request_timeout")),
            "{told}"
        );
        answered += usize::from(!told.is_empty());
    }
    assert_eq!(answered, 75, "who said something is told what was wrong with it");
    harness.finish().await;
}
