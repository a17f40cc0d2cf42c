//! Bounds on time and size, overload, and the end of the router.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_config::fleet::{Disaggregation, PolicyKind};
use baton_config::{Bytes, Role};
use baton_router::{Member, Roster};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fake_worker::{Act, FakeWorker};
use crate::harness::{Harness, PATIENCE, nowhere};

async fn raw(harness: &Harness, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(harness.address).await.expect("a connection");
    stream.write_all(bytes).await.expect("written");
    stream
}

/// Everything the other side says until it closes.
async fn rest(mut stream: TcpStream) -> String {
    let mut all = Vec::new();
    // A reset after the answer is an end too.
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut all)).await.expect("closed in time");
    if let Err(error) = read {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    String::from_utf8_lossy(&all).into_owned()
}

async fn impatient(worker: &FakeWorker) -> Harness {
    Harness::start(&[worker], |options| {
        options.timeouts.header = Duration::from_millis(300);
        options.timeouts.body = Duration::from_millis(300);
        options.timeouts.idle = Duration::from_millis(900);
        options.limits.body = Bytes(64 << 10);
    })
    .await
}

#[tokio::test]
async fn slow_heads_and_bodies_are_cut() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = impatient(&worker).await;
    let silent = raw(&harness, b"").await;
    let dripping = raw(&harness, b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-le").await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{\"mod";
    let body = raw(&harness, head.as_bytes()).await;
    assert_eq!(rest(silent).await, "");
    let told = rest(dripping).await;
    assert!(told.starts_with("HTTP/1.1 408 ") && told.contains("\"code\":\"request_timeout\""), "{told}");
    let told = rest(body).await;
    assert!(told.starts_with("HTTP/1.1 408 "), "{told}");
    assert!(told.contains("\"code\":\"request_timeout\""), "{told}");
    // Nor is a body waited for that always has one more byte.
    let mut drops = raw(&harness, head.as_bytes()).await;
    let mut told = [0; 12];
    let mut sent = 0;
    while drops.try_read(&mut told).is_err() {
        assert!(sent < 90, "it is still read");
        let _ = drops.write_all(b" ").await;
        sent += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(&told, b"HTTP/1.1 408");
    harness.finish().await;
}

#[tokio::test]
async fn an_idle_connection_lives_longer_than_a_slow_head() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = impatient(&worker).await;
    let mut stream = raw(&harness, b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut buffer = [0; 1024];
    let read = stream.read(&mut buffer).await.expect("an answer");
    assert!(String::from_utf8_lossy(&buffer[..read]).starts_with("HTTP/1.1 200"));
    tokio::time::sleep(Duration::from_millis(500)).await;
    stream.write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("still open");
    assert!(rest(stream).await.starts_with("HTTP/1.1 200"), "answered, then closed as idle");
    harness.finish().await;
}

#[tokio::test]
async fn bodies_that_are_too_large_are_refused_unread() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = impatient(&worker).await;
    for head in [
        "content-length: 67108864\r\n\r\n0123456789".to_owned(),
        "content-length: 1099511627776\r\n\r\n0123456789".to_owned(),
        format!("transfer-encoding: chunked\r\n\r\n20000\r\n{}\r\n", "x".repeat(0x20000)),
    ] {
        let request = format!("POST /v1/completions HTTP/1.1\r\nhost: a\r\n{head}");
        let told = rest(raw(&harness, request.as_bytes()).await).await;
        assert!(told.starts_with("HTTP/1.1 413 "), "{told}");
        assert!(told.contains("\"code\":\"request_too_large\""), "{told}");
    }
    harness.finish().await;
}

#[tokio::test]
async fn overload_is_refused_at_once_and_told_when_to_return() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::SilentAfter(1));
    let harness = Harness::start(&[&worker], |options| {
        options.limits.in_flight = 2;
        options.limits.queue = 1;
    })
    .await;
    let body = json!({ "model": "tiny", "prompt": "hello", "stream": true }).to_string();
    let first = harness.send("POST", "/v1/completions", body.clone()).await;
    let second = harness.send("POST", "/v1/completions", body.clone()).await;
    let mut waiting = Box::pin(harness.send("POST", "/v1/completions", body.clone()));
    let queued = async || harness.metric("baton_router_queue_depth").await > 0.5;
    tokio::select! {
        _ = &mut waiting => panic!("there is no place"),
        () = harness.until("one waits", queued) => {}
    }
    let refused = harness.ask("POST", "/v1/completions", body).await;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.json()["error"]["code"], "overloaded");
    assert_eq!(worker.generated().len(), 2);
    drop(first);
    let third = waiting.await;
    assert_eq!(third.status(), 200, "a place that becomes free goes to who waits");
    drop((second, third));
    assert!(harness.metric("baton_router_rejected_total{reason=\"queue_full\"}").await > 0.5);
    harness.until("all left", async || worker.seen.open.load(Ordering::SeqCst) == 0).await;
    harness.finish().await;
}

#[tokio::test]
async fn draining_finishes_what_is_in_flight() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Slow(Duration::from_millis(20)));
    let mut harness = Harness::start(&[&worker], |options| {
        options.timeouts.settle = Duration::from_millis(300);
    })
    .await;
    let body = json!({ "model": "tiny", "prompt": "hello", "stream": true, "max_tokens": 40 }).to_string();
    let stream = harness.ask("POST", "/v1/completions", body);
    let mut stream = Box::pin(stream);
    tokio::select! {
        _ = &mut stream => panic!("too early"),
        () = harness.until("it streams", async || worker.seen.open.load(Ordering::SeqCst) == 1) => {}
    }
    harness.stop.drain.cancel();
    let unready = harness.until("readiness is off", async || harness.get("/readyz").await.status == 503);
    let (answer, ()) = tokio::join!(stream, unready);
    assert_eq!(answer.content(0).len(), 40);
    harness.join().await;
    assert!(TcpStream::connect(harness.address).await.is_err(), "the port is free");
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::SilentAfter(1));
    let mut harness = Harness::start(&[&worker], |_| {}).await;
    let body = json!({ "model": "tiny", "prompt": "hello", "stream": true }).to_string();
    let stream = harness.send("POST", "/v1/completions", body).await;
    harness.stop.drain.cancel();
    harness.stop.now.cancel();
    harness.join().await;
    harness.until("the worker is let go", async || worker.seen.open.load(Ordering::SeqCst) == 0).await;
    drop(stream);
}

#[tokio::test]
async fn a_request_has_an_end_in_time() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Slow(Duration::from_millis(100)));
    let harness = Harness::start(&[&worker], |options| {
        options.timeouts.request = Duration::from_millis(600);
    })
    .await;
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 400 });
    let answer = harness.complete(&body).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (504, &json!("timeout")));
    assert_eq!(worker.generated().len(), 1, "nobody's fault: no other worker is bothered");
    harness.finish().await;
}

#[tokio::test]
async fn a_prompt_that_no_worker_would_begin_in_time_is_refused_unread() {
    let first = FakeWorker::start("decode-0", Role::Decode).await;
    let second = FakeWorker::start("decode-1", Role::Decode).await;
    // 3 s and 2.5 s of prompts.
    first.queue(6000, 2000.0);
    second.queue(2500, 1000.0);
    let harness = Harness::start(&[&first, &second], |options| {
        options.disaggregation = Disaggregation::Never;
        options.slo_wait = Some(Duration::from_millis(500));
    })
    .await;
    let body = json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hi" }] });
    let refused = async || harness.chat(&body).await.status == 429;
    harness.until("both queues are known", refused).await;
    let answer = harness.chat(&json!("unread")).await;
    assert_eq!(answer.status, 429, "{}", answer.text);
    assert_eq!(answer.headers["retry-after"], "2");
    assert_eq!(answer.json()["error"]["code"], "overloaded");
    assert!(harness.metric("baton_router_rejected_total{reason=\"workers_queued\"}").await >= 2.0);
    assert_eq!(harness.get("/health").await.status, 200, "it is not down");

    // One of them is enough.
    second.queue(400, 1000.0);
    harness.until("the queue is known", async || !refused().await).await;
    let asked = async |max_wait: &str| {
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nx-baton-max-wait-ms: \
             {max_wait}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.to_string().len()
        );
        rest(raw(&harness, request.as_bytes()).await).await
    };
    let answer = asked("100").await;
    assert!(answer.starts_with("HTTP/1.1 429") && answer.contains("retry-after: 1"), "{answer}");
    let answer = asked("450").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    harness.finish().await;
}

#[tokio::test]
async fn bodies_that_do_not_end_take_no_more_memory_than_there_is_for_them() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |options| {
        options.limits.body = Bytes(1 << 20);
        options.limits.bodies = Bytes(1 << 20);
    })
    .await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n";
    let unfinished = format!("{head}{}", "x".repeat(900_000));
    let mut greedy = raw(&harness, unfinished.as_bytes()).await;
    let large = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 1, "user": "u".repeat(300_000) });
    let large = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{large}",
        large.to_string().len()
    );
    // Who is refused may still be writing: it sees the connection end, and the answer before.
    let ask = async || {
        let mut stream = TcpStream::connect(harness.address).await.expect("a connection");
        let _ = stream.write_all(large.as_bytes()).await;
        let mut told = Vec::new();
        let read = stream.read_to_end(&mut told);
        let _ = tokio::time::timeout(PATIENCE, read).await.expect("an answer and an end");
        String::from_utf8_lossy(&told).into_owned()
    };
    let until_refused = async {
        loop {
            let told = ask().await;
            if told.starts_with("HTTP/1.1 429 ") {
                return told;
            }
            // While both were being read, the other one may have been one too many.
            if greedy.try_read(&mut [0]).is_ok() {
                greedy = raw(&harness, unfinished.as_bytes()).await;
            }
        }
    };
    let told = tokio::time::timeout(PATIENCE, until_refused).await.expect("no room for another one");
    assert!(told.contains("retry-after: 1\r\n") && told.contains("\"code\":\"overloaded\""), "{told}");
    assert!(harness.metric("baton_router_rejected_total{reason=\"bodies\"}").await > 0.5);
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 1 });
    assert_eq!(harness.complete(&body).await.status, 200, "small ones have memory of their own");
    drop(greedy);
    harness.until("there is room again", async || ask().await.starts_with("HTTP/1.1 200 ")).await;
    harness.finish().await;
}

/// A host that is gone takes all its workers along: they count as no attempts, but not without end.
#[tokio::test]
async fn workers_that_cannot_be_reached_are_tried_so_often_and_no_more() {
    let living = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&living], |options| {
        options.disaggregation = Disaggregation::Never;
        options.policy = PolicyKind::LeastLoaded;
        options.timeouts.frozen = Duration::from_secs(600);
    })
    .await;
    // Busy: whoever looks idle is preferred to it.
    living.then(Act::SilentAfter(0));
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 4 });
    let busy = harness.sleeper("/v1/completions", &body).await;
    harness.until("it is busy", async || living.generated().len() == 1).await;
    let tried = async || harness.metric("baton_router_disagg_total{decision=\"local\"}").await as usize;
    for (age, gone, status, asked) in [(100, 20, 503, 16), (200, 12, 200, 13)] {
        let mut members = vec![living.member.clone()];
        let mut kept = Vec::new();
        for i in 0..gone {
            let (socket, address) = nowhere();
            kept.push(socket);
            let worker = format!("gone-{gone}-{i}").parse().expect("a name");
            members.push(Member { worker, address, ..living.member.clone() });
        }
        harness.members.send_replace(Arc::new(Roster { members, age: Duration::from_secs(age) }));
        let shown = async || harness.metric("baton_router_view_age_seconds").await as u64 == age;
        harness.until("the view arrived", shown).await;
        let before = tried().await;
        let answer = harness.complete(&body).await;
        assert_eq!((answer.status, tried().await - before), (status, asked), "{}", answer.text);
    }
    drop(busy);
    harness.finish().await;
}
