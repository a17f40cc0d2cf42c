//! Streams: kept alive while nothing comes, held back by who does not read, ended with whoever leaves.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_config::Role;
use baton_config::protocol::FailureCode;
use http_body_util::BodyExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::fake_worker::{Act, FakeWorker};
use crate::harness::{Harness, PATIENCE, without_end};

async fn alive(worker: &FakeWorker) -> Harness {
    Harness::start(&[worker], |options| options.timeouts.keep_alive = Duration::from_millis(200)).await
}

fn streamed(tokens: u32) -> String {
    json!({
        "model": "tiny", "prompt": "hello", "max_tokens": tokens, "stream": true,
        "stream_options": { "include_usage": true }
    })
    .to_string()
}

#[tokio::test]
async fn a_long_prefill_is_bridged_by_comments() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Slow(Duration::from_millis(900)));
    let harness = alive(&worker).await;
    let begun = Instant::now();
    let answer = harness.send("POST", "/v1/completions", streamed(2)).await;
    assert_eq!(answer.status(), 200);
    assert!(begun.elapsed() < Duration::from_millis(850), "the answer begins before the first token");
    let body = tokio::time::timeout(PATIENCE, answer.into_body().collect()).await.expect("in time");
    let text = String::from_utf8(body.expect("a body").to_bytes().to_vec()).expect("UTF-8");
    let comments = text.matches(": keep-alive\n\n").count();
    assert!(text.starts_with(": keep-alive\n\n") && comments >= 4, "{comments} in {text}");
    let plain = text.replace(": keep-alive\n\n", "");
    assert!(plain.starts_with("data: {") && plain.ends_with("data: [DONE]\n\n"), "{plain}");
    assert!(plain.contains("\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2,"), "{plain}");
    harness.finish().await;
}

#[tokio::test]
async fn quick_streams_carry_no_comments_and_early_errors_keep_their_status() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = alive(&worker).await;
    let answer = harness.ask("POST", "/v1/completions", streamed(20)).await;
    assert!(!answer.text.contains("keep-alive"));
    worker.always(Act::Status(400, FailureCode::Refused));
    assert_eq!(harness.ask("POST", "/v1/completions", streamed(20)).await.status, 400);
    harness.finish().await;
}

#[tokio::test]
async fn an_error_after_the_comments_is_an_event() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::SilentAfter(0));
    let harness = Harness::start(&[&worker], |options| {
        options.timeouts.keep_alive = Duration::from_millis(100);
        options.timeouts.request = Duration::from_millis(600);
    })
    .await;
    let answer = harness.ask("POST", "/v1/completions", streamed(20)).await;
    assert_eq!(answer.status, 200);
    let last = answer.text.trim_end().rsplit("\n\n").next().expect("an event").to_owned();
    assert!(last.contains("\"error\"") && last.contains("\"code\":\"timeout\""), "{}", answer.text);
    let failed = "baton_router_requests_ended_total{outcome=\"failed\"}";
    assert!((harness.metric(failed).await - 1.0).abs() < 0.5);
    harness.finish().await;
}

/// How long the worker goes on after its client has left; printed for the record, bounded generously.
#[tokio::test]
async fn who_leaves_is_noticed_at_once_in_every_phase() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    let another = "GET /livez HTTP/1.1\r\nhost: a\r\n\r\n";
    for (phase, act, stream, more) in [
        ("before the first token", Act::SilentAfter(0), true, ""),
        ("within the stream", Act::SilentAfter(2), true, ""),
        ("before a whole answer", Act::SilentAfter(2), false, ""),
        // What is sent beyond the request hides nothing.
        ("with a line too many", Act::SilentAfter(2), false, "\r\n"),
        ("with another request sent", Act::SilentAfter(2), true, another),
    ] {
        worker.always(act);
        let body =
            json!({ "model": "tiny", "prompt": "hello", "max_tokens": 20, "stream": stream }).to_string();
        let mut longest = Duration::ZERO;
        for _ in 0..5 {
            let mut connection = tokio::net::TcpStream::connect(harness.address).await.expect("a connection");
            let head =
                format!("POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", body.len());
            let request = format!("{head}{body}{more}");
            tokio::io::AsyncWriteExt::write_all(&mut connection, request.as_bytes()).await.expect("written");
            let busy = async || worker.seen.open.load(Ordering::SeqCst) == 1;
            harness.until("the worker is busy", busy).await;
            let left = Instant::now();
            drop(connection);
            while worker.seen.open.load(Ordering::SeqCst) != 0 {
                assert!(left.elapsed() < PATIENCE, "never noticed {phase}");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            longest = longest.max(left.elapsed());
        }
        println!("left {phase}: the worker is let go after at most {longest:?}");
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_costs_little() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Endless);
    let harness = Harness::start(&[&worker], without_end).await;
    let body = json!({
        "model": "tiny", "messages": [{ "role": "user", "content": "hello" }], "stream": true, "ignore_eos": true,
        "logprobs": true, "top_logprobs": 20, "max_tokens": 1_000_000
    });
    let connection = harness.sleeper("/v1/chat/completions", &body).await;
    harness.until_it_stands_still(&worker).await;
    let sent = || worker.seen.sent.load(Ordering::SeqCst);
    println!("a worker has sent {} bytes for a client that reads nothing", sent());
    assert!(sent() < 2 << 20, "{}", sent());
    drop(connection);
    harness.until("cancelled", async || worker.seen.open.load(Ordering::SeqCst) == 0).await;
    harness.finish().await;
}

/// Time in which nobody reads is no silence of the worker, which had no credit and takes a moment to go on.
#[tokio::test]
async fn a_worker_is_not_blamed_for_a_client_that_pauses() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Lazy(Duration::from_millis(400)));
    let progress = Duration::from_secs(1);
    let harness = Harness::start(&[&worker], |options| {
        without_end(options);
        options.timeouts.progress = progress;
    })
    .await;
    let body: Value = serde_json::from_str(&streamed(100_000)).expect("JSON");
    // Small windows: the router takes from the worker hardly more than the client has read.
    let reads = async |first: usize| {
        let stream = tokio::net::TcpStream::connect(harness.address).await.expect("a connection");
        let mut http2 = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        http2.initial_stream_window_size(32 << 10);
        let (mut http2, connection) = http2.handshake(TokioIo::new(stream)).await.expect("HTTP/2");
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(connection);
        let request = http::Request::post("http://localhost/v1/completions")
            .body(http_body_util::Full::new(bytes::Bytes::from(body.to_string())))
            .expect("a request");
        let mut answer = http2.send_request(request).await.expect("an answer");
        for tokens in [first, 3000] {
            tokio::time::sleep(progress + Duration::from_millis(300)).await;
            let mut read = 0;
            while read < tokens {
                let frame = tokio::time::timeout(PATIENCE, answer.frame()).await.expect("in time");
                let data = frame.expect("no end").expect("bytes").into_data().expect("data");
                read += data.windows(6).filter(|window| window == b"data: ").count();
            }
        }
    };
    futures_util::future::join_all([0, 1, 20, 40, 60, 80, 100, 120].map(reads)).await;
    for reason in ["timeout", "connection", "worker", "protocol"] {
        let moved = format!("baton_router_migrations_total{{reason=\"{reason}\",result=\"moved\"}}");
        assert!(harness.metric(&moved).await < 0.5, "{reason}");
    }
    assert_eq!(worker.seen.connections.load(Ordering::SeqCst), 1);
    harness.finish().await;
}

/// A client that leaves the rest of an answer lying keeps its place in flight, its worker and its connection: for its
/// time, but not for ever.
#[tokio::test]
async fn a_client_that_never_reads_on_is_cut_off_when_its_time_is_over() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Endless);
    let harness = Harness::start(&[&worker], |options| {
        options.timeouts.request = Duration::from_secs(2);
        options.timeouts.unread = Duration::from_millis(500);
        options.limits.in_flight = 2;
        options.limits.queue = 2;
    })
    .await;
    // More than all buffers on the way hold, of both versions of HTTP.
    let mut body: Value = serde_json::from_str(&streamed(400)).expect("JSON");
    body["n"] = json!(100);
    body["ignore_eos"] = json!(true);
    body["logprobs"] = json!(5);
    let mut over_http1 = tokio::net::TcpStream::connect(harness.address).await.expect("a connection");
    let text = body.to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", text.len());
    over_http1.write_all(format!("{head}{text}").as_bytes()).await.expect("written");
    let stream = tokio::net::TcpStream::connect(harness.address).await.expect("a connection");
    let (mut http2, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("HTTP/2");
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(connection);
    let request = |body: Value| {
        http::Request::post("http://localhost/v1/completions")
            .body(http_body_util::Full::new(bytes::Bytes::from(body.to_string())))
            .expect("a request")
    };
    let unread = http2.send_request(request(body)).await.expect("an answer");
    let in_flight = async || harness.metric("baton_router_inflight").await;
    harness.until("both are served", async || in_flight().await > 2.5).await;
    worker.always(Act::Good);
    harness.until("both are given up", async || in_flight().await < 1.5).await;
    harness.until("the worker is free", async || worker.seen.open.load(Ordering::SeqCst) == 0).await;
    // Other requests of an HTTP/2 connection are none the worse for it.
    let answer =
        http2.send_request(request(json!({ "model": "tiny", "prompt": "hello", "max_tokens": 3 }))).await;
    assert_eq!(answer.expect("an answer").status(), 200);
    drop(unread);
    harness.finish().await;
}

/// Nobody could go on with it: a worker that says nothing of its state is no reason yet.
#[tokio::test]
async fn a_stream_that_no_other_could_take_up_waits_for_certainty() {
    let (worker, other) = (
        FakeWorker::start("decode-0", Role::Decode).await,
        FakeWorker::start("decode-1", Role::Decode).await,
    );
    for worker in [&worker, &other] {
        worker.always(Act::PauseAfter(2, Duration::from_secs(3)));
    }
    let harness = Harness::start(&[&worker, &other], |options| {
        options.timeouts.frozen = Duration::from_secs(1);
    })
    .await;
    for digest in [true, false] {
        let calls = worker.generated().len() + other.generated().len();
        worker.hide_state();
        other.hide_state();
        let body = json!({
            "model": "tiny", "prompt": "hello", "max_tokens": 4, "baton": { "logits_digest": digest }
        });
        let answer = harness.complete(&body).await;
        assert_eq!((answer.status, answer.content(0).len()), (200, 4), "{}", answer.text);
        let calls = worker.generated().len() + other.generated().len() - calls;
        // The other kind is taken elsewhere in the meantime.
        assert_eq!(calls == 1, digest, "{calls}");
    }
    harness.finish().await;
}
