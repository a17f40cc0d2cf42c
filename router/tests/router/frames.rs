//! All generations on a worker over one connection, and workers that speak no frames.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_config::Role;
use baton_config::protocol::FailureCode;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::fake_worker::{Act, FakeWorker, oracle};
use crate::harness::{Harness, PATIENCE, without_end};

const SEED: u64 = 5;

fn ask(prompt: &str, tokens: u32, stream: bool) -> Value {
    json!({
        "model": "tiny", "prompt": prompt, "max_tokens": tokens, "stream": stream, "seed": SEED,
        "ignore_eos": true, "baton": { "token_ids": true }
    })
}

/// The ids behind the text of a whole answer or a stream.
fn ids(answer: &crate::harness::Answer) -> Vec<u32> {
    let bodies = if answer.text.starts_with("data:") { answer.events() } else { vec![answer.json()] };
    let choices = bodies.iter().flat_map(|body| body["choices"].as_array().cloned().unwrap_or_default());
    let tokens = choices.flat_map(|choice| {
        choice.pointer("/baton/token_ids").and_then(Value::as_array).cloned().unwrap_or_default()
    });
    tokens.map(|id| u32::try_from(id.as_u64().expect("a number")).expect("small")).collect()
}

#[tokio::test]
async fn many_generations_share_one_connection_and_mix_nothing_up() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Slow(Duration::from_millis(1)));
    let harness = Harness::start(&[&worker], |_| {}).await;
    let prompts: Vec<String> = (0..60).map(|i| format!("hello {i}")).collect();
    let answers = futures_util::future::join_all(
        prompts
            .iter()
            .enumerate()
            .map(async |(i, prompt)| harness.complete(&ask(prompt, 3 + i as u32, i % 2 == 0)).await),
    )
    .await;
    for answer in &answers {
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    for request in worker.generated() {
        let wanted = oracle(&request.tokens, request.sampling.seed, request.max_tokens as usize);
        assert!(answers.iter().any(|answer| ids(answer) == wanted), "{}", request.request_id);
    }
    assert_eq!(worker.seen.connections.load(Ordering::SeqCst), 1);
    harness.finish().await;
}

#[tokio::test]
async fn a_worker_that_speaks_no_frames_is_called_over_http() {
    let (plain, framed) = (
        FakeWorker::start("decode-0", Role::Decode).await,
        FakeWorker::start("decode-1", Role::Decode).await,
    );
    plain.without_frames();
    let harness = Harness::start(&[&plain, &framed], |_| {}).await;
    for stream in [false, true, true, false, true, false] {
        let answer = harness.complete(&ask("hello", 20, stream)).await;
        let request = [&plain, &framed].iter().find_map(|worker| worker.generated().last().cloned());
        assert_eq!(ids(&answer), oracle(&request.expect("asked").tokens, SEED, 20), "{}", answer.text);
    }
    assert!(plain.generated().len() >= 2 && framed.generated().len() >= 2, "both are used");
    // A stream that breaks on either goes on on the other.
    plain.then(Act::DieAfter(4));
    framed.then(Act::DieAfter(6));
    for _ in 0..2 {
        let answer = harness.complete(&ask("again", 20, true)).await;
        let request = framed.generated().last().cloned().expect("asked");
        let prompt = &request.tokens[..request.tokens.len() - request.generated as usize];
        assert_eq!(ids(&answer), oracle(prompt, SEED, 20), "{}", answer.text);
    }
    assert_eq!(plain.seen.connections.load(Ordering::SeqCst), 0);
    harness.finish().await;
}

#[tokio::test]
async fn a_lost_connection_takes_all_its_streams_elsewhere_once() {
    let (first, second) = (
        FakeWorker::start("decode-0", Role::Decode).await,
        FakeWorker::start("decode-1", Role::Decode).await,
    );
    for worker in [&first, &second] {
        worker.always(Act::Slow(Duration::from_millis(10)));
    }
    let harness = Harness::start(&[&first, &second], |_| {}).await;
    let streams = futures_util::future::join_all(
        (0..12).map(async |i| harness.complete(&ask(&format!("prompt {i}"), 40, true)).await),
    );
    let breaks = async {
        harness.until("streams run", async || first.seen.open.load(Ordering::SeqCst) >= 4).await;
        first.then(Act::DieAfter(0));
        second.then(Act::Good);
        // Whichever gets it: only the first one's connection breaks.
        harness.complete(&ask("breaks it", 2, false)).await;
        harness.complete(&ask("breaks it", 2, false)).await;
    };
    let (answers, ()) = tokio::join!(streams, breaks);
    let prompts: Vec<Vec<u32>> = [first.generated(), second.generated()]
        .concat()
        .iter()
        .map(|request| request.tokens[..request.tokens.len() - request.generated as usize].to_vec())
        .collect();
    for answer in answers {
        let ids = ids(&answer);
        assert_eq!(ids.len(), 40, "{}", answer.text);
        assert!(prompts.iter().any(|prompt| oracle(prompt, SEED, 40) == ids), "{}", answer.text);
    }
    let moved = "baton_router_migrations_total{reason=\"connection\",result=\"moved\"}";
    assert!(harness.metric(moved).await >= 1.0);
    harness.finish().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_no_other_on_its_connection() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.then(Act::Endless);
    let harness = Harness::start(&[&worker], without_end).await;
    let mut sleeper = harness.sleeper("/v1/completions", &ask("hello", 3_000_000, true)).await;
    harness.until_it_stands_still(&worker).await;
    let sent = || worker.seen.sent.load(Ordering::SeqCst);
    assert!(sent() < 1 << 20, "{}", sent());
    let answer = harness.complete(&ask("hello", 5000, true)).await;
    assert_eq!(ids(&answer).len(), 5000);
    assert_eq!(worker.seen.connections.load(Ordering::SeqCst), 1);
    // Who reads again gets the rest.
    let mut bytes = vec![0; 1 << 20];
    let before = sent();
    tokio::time::timeout(PATIENCE, sleeper.read_exact(&mut bytes)).await.expect("in time").expect("bytes");
    harness.until("the worker goes on", async || sent() > before).await;
    drop(sleeper);
    harness.until("cancelled", async || worker.seen.open.load(Ordering::SeqCst) == 0).await;
    harness.finish().await;
}

#[tokio::test]
async fn a_client_that_leaves_is_cancelled_without_the_connection() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::SilentAfter(2));
    let harness = Harness::start(&[&worker], |_| {}).await;
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        let mut answer = harness.send("POST", "/v1/completions", ask("hello", 9, true).to_string()).await;
        let first = tokio::time::timeout(PATIENCE, answer.frame()).await.expect("in time");
        assert!(first.is_some());
        let left = Instant::now();
        drop(answer);
        harness.until("cancelled", async || worker.seen.open.load(Ordering::SeqCst) == 0).await;
        longest = longest.max(left.elapsed());
    }
    println!("a client that left is cancelled after at most {longest:?}");
    worker.always(Act::Good);
    assert_eq!(harness.complete(&ask("hello", 9, true)).await.status, 200);
    assert_eq!(worker.seen.connections.load(Ordering::SeqCst), 1, "the connection outlives its streams");
    harness.finish().await;
}

/// What is silent may be the connection: whoever comes next gets another one.
#[tokio::test]
async fn a_connection_on_which_a_stream_was_silent_for_too_long_is_left_alone() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.then(Act::SilentAfter(3));
    let harness = Harness::start(&[&worker], |options| {
        options.timeouts.progress = Duration::from_millis(400);
        options.timeouts.replacement = PATIENCE;
    })
    .await;
    let answer = harness.complete(&ask("hello", 9, true)).await;
    assert_eq!(ids(&answer), oracle(&worker.generated()[0].tokens, SEED, 9), "{}", answer.text);
    assert_eq!(harness.complete(&ask("hello", 9, true)).await.status, 200);
    assert_eq!(worker.seen.connections.load(Ordering::SeqCst), 2);
    harness.finish().await;
}

/// What was silent on the former connection says nothing about the next.
#[tokio::test]
async fn a_connection_is_not_left_because_a_former_one_was_silent() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.then(Act::SilentAfter(3)).then(Act::SilentAfter(3));
    let harness = Harness::start(&[&worker], |options| {
        options.timeouts.progress = Duration::from_millis(1500);
        options.timeouts.replacement = PATIENCE;
    })
    .await;
    let calls = async |count| {
        let came = async || worker.generated().len() >= count;
        harness.until("another call", came).await;
    };
    let complete = async || harness.complete(&ask("hello", 9, true)).await;
    let (first, second, third) = tokio::join!(
        complete(),
        async {
            calls(1).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            complete().await
        },
        async {
            // The first one goes on, over another connection, which is known from here on.
            calls(3).await;
            complete().await
        }
    );
    for answer in [first, second, third] {
        assert_eq!(ids(&answer), oracle(&worker.generated()[0].tokens, SEED, 9), "{}", answer.text);
    }
    assert_eq!(worker.seen.connections.load(Ordering::SeqCst), 2);
    harness.finish().await;
}

#[tokio::test]
async fn a_connection_that_could_not_be_had_is_asked_for_again() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.refuse_frames(1);
    let harness = Harness::start(&[&worker], |_| {}).await;
    assert_eq!(harness.complete(&ask("hello", 9, true)).await.status, 502);
    for _ in 0..2 {
        assert_eq!(harness.complete(&ask("hello", 9, true)).await.status, 200);
    }
    assert_eq!(worker.seen.connections.load(Ordering::SeqCst), 1);
    harness.finish().await;
}

#[tokio::test]
async fn what_is_not_the_protocol_counts_against_the_worker() {
    let (bad, good) = (
        FakeWorker::start("decode-0", Role::Decode).await,
        FakeWorker::start("decode-1", Role::Decode).await,
    );
    bad.always(Act::GarbageAfter(3));
    let harness = Harness::start(&[&bad, &good], |_| {}).await;
    for _ in 0..4 {
        let answer = harness.complete(&ask("hello", 9, true)).await;
        assert_eq!(ids(&answer).len(), 9, "{}", answer.text);
    }
    let moved = "baton_router_migrations_total{reason=\"protocol\",result=\"moved\"}";
    assert!(harness.metric(moved).await >= 1.0);
    harness.finish().await;
}

#[tokio::test]
async fn refusals_in_frames_are_those_of_http() {
    for framed in [true, false] {
        let worker = FakeWorker::start("decode-0", Role::Decode).await;
        if !framed {
            worker.without_frames();
        }
        let harness = Harness::start(&[&worker], |_| {}).await;
        for (act, status, code) in [
            (Act::Status(429, FailureCode::Overloaded), 429, "overloaded"),
            (Act::Status(500, FailureCode::Engine), 502, "worker_lost"),
        ] {
            worker.always(act);
            let answer = harness.complete(&ask("hello", 3, false)).await;
            assert_eq!(
                (answer.status, answer.json()["error"]["code"].as_str()),
                (status, Some(code)),
                "{framed}"
            );
        }
        harness.finish().await;
    }
}

/// Reads what is there, acknowledging as late as an ordinary client in the middle of a stream: the kernel acknowledges the
/// first pieces of a connection at once unless told otherwise each time.
async fn read_lazily(client: &tokio::net::TcpStream, piece: &mut [u8]) -> usize {
    loop {
        socket2::SockRef::from(client).set_tcp_quickack(false).expect("a socket");
        client.readable().await.expect("a socket");
        match client.try_read(piece) {
            Ok(bytes) => return bytes,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
}

/// With Nagle's algorithm on either of the router's sockets the second piece of a small answer waits for the
/// acknowledgement of the first, which a client delays by 40 ms.
#[tokio::test]
async fn small_pieces_do_not_wait_for_acknowledgements() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::Slow(Duration::from_millis(6)));
    for framed in [true, false] {
        if !framed {
            worker.without_frames();
        }
        let harness = Harness::start(&[&worker], |_| {}).await;
        let body = ask("hello", 4, true).to_string();
        let mut quickest = Duration::MAX;
        for _ in 0..5 {
            let mut client = tokio::net::TcpStream::connect(harness.address).await.expect("a connection");
            client.set_nodelay(true).expect("a socket");
            let head =
                format!("POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", body.len());
            client.write_all(format!("{head}{body}").as_bytes()).await.expect("written");
            let (mut text, mut piece) = (Vec::new(), [0; 4096]);
            let mut first = None;
            while !text.windows(6).any(|window| window == b"[DONE]") {
                let read = read_lazily(&client, &mut piece);
                let bytes = tokio::time::timeout(PATIENCE, read).await.expect("in time");
                assert!(bytes > 0, "{}", String::from_utf8_lossy(&text));
                first.get_or_insert_with(Instant::now);
                text.extend_from_slice(&piece[..bytes]);
            }
            quickest = quickest.min(first.expect("a piece").elapsed());
        }
        println!("from the first piece to the last: {quickest:?} (frames: {framed})");
        assert!(quickest < Duration::from_millis(36), "{quickest:?}, frames: {framed}");
        harness.finish().await;
    }
}
