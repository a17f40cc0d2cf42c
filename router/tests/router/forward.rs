//! Requests passed on to servers of other projects: byte for byte, to one that is well, broken off honestly.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_config::fleet::{AuthSpec, Isolation, OpenaiSpec, PolicyKind};
use baton_router::{ForwardOptions, ForwardPool, Roster, RouterOptions, mint};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use serde_json::{Value, json};

use crate::fake_server::{Does, END, FAILED, FakeServer, chunk, json, large_event};
use crate::harness::{Harness, PATIENCE};

/// The pool that fake workers of this role say they are of.
const POOL: &str = "both";

pub(crate) fn forward(
    options: &mut RouterOptions,
    servers: &[&FakeServer],
    change: impl FnOnce(&mut ForwardPool),
) {
    let urls = servers.iter().map(|server| server.url.clone()).collect();
    let mut pool = ForwardPool { servers: OpenaiSpec::new(urls), in_flight_max: 64 };
    change(&mut pool);
    let pools = BTreeMap::from([(POOL.parse().expect("a name"), pool)]);
    options.forward = Some(ForwardOptions { pools });
}

pub(crate) async fn start(servers: &[&FakeServer], change: impl FnOnce(&mut ForwardPool)) -> Harness {
    let workers: Vec<_> = servers.iter().map(|server| &server.worker).collect();
    Harness::start(&workers, |options| forward(options, servers, change)).await
}

fn chat(stream: bool) -> Value {
    json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hello world" }], "stream": stream })
}

fn events(count: usize) -> String {
    (0..count).map(chunk).collect::<String>()
}

#[tokio::test]
async fn a_request_and_its_answer_pass_unchanged() {
    let server = FakeServer::start("server-0").await;
    let harness = start(&[&server], |_| {}).await;
    let odd = " {\"stream\":true , \"model\":\"tiny\",\"messages\":[ {\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{\"url\":\"data:,\"}}]}],\
               \"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}],\"tool_choice\":\"required\",\"guided_regex\":\"a+\",\"temperature\":1.50,\
               \"response_format\":{\"type\":\"json_object\"},\"logprobs\":true,\"chat_template_kwargs\":{\"enable_thinking\":false}} ";
    let answer = harness.ask("POST", "/v1/chat/completions", odd).await;
    assert_eq!((answer.status, answer.text), (200, events(5) + END));
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let got = &server.got()[0];
    assert_eq!((got.path.as_str(), got.body.as_str()), ("/v1/chat/completions", odd));
    assert_eq!(
        got.id.as_deref(),
        answer.headers["x-request-id"].to_str().ok(),
        "both logs know it by one id"
    );
    assert_eq!((got.authorization.as_deref(), got.coding.as_deref()), (None, Some("identity")));
    const WHOLE: &str =
        "{ \"choices\": [],  \"model\":\"served\", \"usage\":{\"prompt_tokens\":2,\"completion_tokens\":3} }";
    server.always(Does::Says(WHOLE));
    for (path, body) in [
        ("/v1/completions", json!({ "model": "tiny", "prompt": ["a", "b"], "n": 2 })),
        ("/v1/embeddings", json!({ "model": "gpt-4o-mini", "input": [1, 2], "encoding_format": "base64" })),
        ("/v1/responses", json!({ "model": "tiny", "input": "hi", "reasoning": { "effort": "low" } })),
        (
            "/v1/messages",
            json!({ "model": "tiny", "max_tokens": 9, "messages": [{ "role": "user", "content": "hi" }] }),
        ),
        ("/tokenize", json!({ "prompt": "hi" })),
        ("/detokenize", json!({ "model": "tiny", "tokens": [1, 2] })),
    ] {
        let answer = harness.ask("POST", path, body.to_string()).await;
        assert_eq!((answer.status, answer.text.as_str()), (200, WHOLE), "{path}");
        assert_eq!(answer.headers["content-type"], "application/json");
        let got = server.got();
        let last = got.last().expect("a request");
        assert_eq!((last.path.as_str(), last.body.clone()), (path, body.to_string()));
    }
    let used = harness.metric("baton_router_completion_tokens_total").await;
    assert!((used - 25.0).abs() < 0.5, "7 of the stream and 3 of each of 6 others, not {used}");
    harness.finish().await;
}

#[tokio::test]
async fn the_server_may_call_the_model_otherwise_and_ask_for_a_key() {
    let folder = tempfile::tempdir().expect("a directory");
    let key = folder.path().join("key");
    std::fs::write(&key, "sk-engine\n").expect("written");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("closed");
    let server = FakeServer::start("server-0").await;
    let harness = start(&[&server], |pool| {
        pool.servers.model = Some("served".to_owned());
        pool.servers.api_key_file = Some(key.clone());
        pool.servers.pass_fields = vec!["priority".to_owned()];
    })
    .await;
    let mut body = chat(true);
    body["priority"] = json!(3);
    body["kv_transfer_params"] = json!({ "do_remote_decode": true });
    body["request_id"] = json!("forged");
    let answer = harness.chat(&body).await;
    assert_eq!(answer.text, events(5).replace("served", "tiny") + END);
    let got = server.got().remove(0);
    assert_eq!(got.authorization.as_deref(), Some("Bearer sk-engine"));
    assert_eq!(
        json(&got),
        json!({
            "model": "served", "messages": [{ "role": "user", "content": "hello world" }], "stream": true, "priority": 3
        })
    );
    // The key was changed: the server refuses the old one, the file has the new one.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    std::fs::write(&key, "sk-other\n").expect("written");
    server.then(Does::Refuses(401, "{}"));
    assert_eq!(harness.chat(&chat(false)).await.status, 200);
    assert_eq!(server.got().last().expect("one").authorization.as_deref(), Some("Bearer sk-other"));
    // A key that is refused for good is nothing a client could help.
    server.always(Does::Refuses(401, "{\"error\":\"secret detail\"}"));
    let answer = harness.chat(&chat(false)).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (502, &json!("server_denied")));
    assert!(!answer.text.contains("secret detail"));
    harness.finish().await;
}

#[tokio::test]
async fn what_no_server_would_take_reaches_none() {
    let server = FakeServer::start("server-0").await;
    let harness = start(&[&server], |_| {}).await;
    for (path, body, param) in [
        ("/v1/chat/completions", "{\"model\":\"tiny\",\"model\":\"x\",\"messages\":[]}", "model"),
        ("/v1/chat/completions", "{\"model\":\"tiny\",\"messages\":[]}", "messages"),
        (
            "/v1/chat/completions",
            "{\"model\":\"tiny\",\"messages\":[{\"content\":\"a\"}]}",
            "messages[0].role",
        ),
        (
            "/v1/chat/completions",
            "{\"model\":\"tiny\",\"messages\":[{\"role\":\"user\",\"role\":\"user\"}]}",
            "messages[0].role",
        ),
        (
            "/v1/chat/completions",
            "{\"model\":\"tiny\",\"messages\":[{\"role\":\"user\",\"content\":7}]}",
            "messages[0].content",
        ),
        (
            "/v1/chat/completions",
            "{\"model\":\"tiny\",\"messages\":[{\"role\":\"user\"}],\"temperature\":3}",
            "temperature",
        ),
        ("/v1/chat/completions", "{\"model\":\"tiny\",\"messages\":[{\"role\":\"user\"}],\"n\":1000}", "n"),
        (
            "/v1/chat/completions",
            "{\"model\":\"tiny\",\"messages\":[{\"role\":\"user\"}],\"stream\":\"yes\"}",
            "stream",
        ),
        (
            "/v1/chat/completions",
            "{\"model\":\"tiny\",\"messages\":[{\"role\":\"user\"}],\"chat_template\":\"{{x}}\"}",
            "chat_template",
        ),
        ("/v1/completions", "{\"model\":\"tiny\"}", "prompt"),
        ("/v1/completions", "{\"model\":\"tiny\",\"prompt\":{}}", "prompt"),
        ("/v1/completions", "{\"model\":\"tiny\",\"prompt\":[\"a\",\"b\"],\"n\":100}", "n"),
        ("/v1/completions", "{\"prompt\":\"a\"}", "model"),
        ("/v1/embeddings", "{\"model\":\"tiny\",\"input\":[true]}", "input"),
    ] {
        let answer = harness.ask("POST", path, body).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)), "{body}");
    }
    // Errors have the shape of the API that the client speaks.
    let answer = harness.ask("POST", "/v1/messages", "{\"model\":\"tiny\",\"messages\":\"a\"}").await;
    let error = &answer.json()["error"];
    assert_eq!((answer.status, &answer.json()["type"]), (400, &json!("error")));
    assert_eq!(error["type"], "invalid_request_error", "{error}");
    assert!(error["message"].as_str().is_some_and(|said| said.contains("'messages'")), "{error}");
    let unknown = harness.ask("POST", "/v1/completions", "{\"model\":\"other\",\"prompt\":\"a\"}").await;
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (404, &json!("model_not_found")));
    assert_eq!(harness.get("/v1/chat/completions").await.status, 405);
    assert_eq!(harness.ask("POST", "/v1/nothing", "{}").await.status, 404);
    assert!(server.got().is_empty());
    let models = harness.get("/v1/models").await.json();
    assert_eq!((&models["data"][0]["id"], models["data"][0].get("max_model_len")), (&json!("tiny"), None));
    harness.finish().await;
}

#[tokio::test]
async fn a_refusal_of_the_server_is_the_clients_and_counts_against_nobody() {
    let (first, second) = (FakeServer::start("server-0").await, FakeServer::start("server-1").await);
    let harness = start(&[&first, &second], |_| {}).await;
    const LONG: &str = "{\"object\":\"error\",\"message\":\"too long\",\"type\":\"BadRequestError\",\"param\":\"messages\",\"code\":400}";
    for server in [&first, &second] {
        server.always(Does::Refuses(400, LONG));
    }
    for _ in 0..4 {
        let answer = harness.chat(&chat(true)).await;
        assert_eq!(answer.status, 400);
        assert_eq!(
            answer.json(),
            json!({ "error": {
            "message": "too long", "type": "invalid_request_error", "param": "messages", "code": null
        } })
        );
    }
    assert_eq!((first.got().len(), second.got().len()), (2, 2), "in turns, and each but once");
    harness.finish().await;
}

#[tokio::test]
async fn before_the_first_byte_another_server_is_tried() {
    for does in [
        Does::Refuses(500, "{}"),
        Does::Refuses(503, "{}"),
        Does::Refuses(429, "{}"),
        Does::Vanishes,
        Does::Compresses,
        Does::BreaksAfter(0),
    ] {
        let (first, second) = (FakeServer::start("server-0").await, FakeServer::start("server-1").await);
        let harness = start(&[&first, &second], |_| {}).await;
        first.always(does.clone());
        for _ in 0..4 {
            let answer = harness.chat(&chat(true)).await;
            let whole = matches!(does, Does::BreaksAfter(0)) || answer.status == 200;
            assert!(whole, "{does:?}: {}", answer.text);
            if !matches!(does, Does::BreaksAfter(0)) {
                assert_eq!(answer.text, events(5) + END, "{does:?}");
            }
        }
        assert!(!second.got().is_empty(), "{does:?}");
        harness.finish().await;
    }
}

#[tokio::test]
async fn tries_are_bounded_and_their_end_is_told() {
    let mut servers = Vec::new();
    for i in 0..6 {
        servers.push(FakeServer::start(&format!("server-{i}")).await);
    }
    let harness = start(&servers.iter().collect::<Vec<_>>(), |_| {}).await;
    let tried = || servers.iter().map(|server| server.got().len()).sum::<usize>();
    for (does, status, code, tries) in [
        (Does::Refuses(500, "{}"), 502, "worker_lost", 2),
        (Does::Vanishes, 502, "worker_lost", 2),
        (Does::Refuses(429, "{}"), 429, "overloaded", 4),
        (Does::Refuses(503, "{}"), 503, "no_worker", 4),
    ] {
        for server in &servers {
            server.always(does.clone());
        }
        let before = tried();
        let answer = harness.chat(&chat(false)).await;
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (status, &json!(code)), "{does:?}");
        assert_eq!(tried() - before, tries, "{does:?}");
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_after_whole_events() {
    let server = FakeServer::start("server-0").await;
    let harness = start(&[&server], |pool| pool.servers.silent_timeout = Duration::from_millis(400)).await;
    for does in [Does::BreaksAfter(3), Does::ClosesAfter(3), Does::SilentAfter(3)] {
        server.always(does.clone());
        let answer = harness.chat(&chat(true)).await;
        assert_eq!(answer.status, 200);
        let rest =
            answer.text.strip_prefix(&events(3)).unwrap_or_else(|| panic!("{does:?}: {}", answer.text));
        let rest = rest.strip_prefix(": bye\n\n").unwrap_or(rest);
        let error =
            rest.strip_prefix("data: ").and_then(|rest| rest.strip_suffix("\n\n")).expect("one event");
        let error: Value = serde_json::from_str(error).unwrap_or_else(|_| panic!("{does:?}: {rest}"));
        assert_eq!(error["error"]["code"], "worker_lost", "{does:?}");
    }
    // What the server says itself is not said once more.
    server.always(Does::FailsAfter(2));
    assert_eq!(harness.chat(&chat(true)).await.text, events(2) + FAILED);
    let failed = "baton_router_requests_ended_total{outcome=\"failed\"}";
    assert!((harness.metric(failed).await - 4.0).abs() < 0.5);
    harness.finish().await;
}

#[tokio::test]
async fn silence_is_bridged_and_leavers_are_felt_at_once() {
    let server = FakeServer::start("server-0").await;
    let workers = [&server.worker];
    let harness = Harness::start(&workers, |options| {
        options.timeouts.keep_alive = Duration::from_millis(200);
        forward(options, &[&server], |_| {});
    })
    .await;
    server.always(Does::Streams(2, Duration::from_millis(900)));
    let answer = harness.chat(&chat(true)).await;
    assert!(answer.text.starts_with(": keep-alive\n\n"), "{}", answer.text);
    assert_eq!(answer.text.replace(": keep-alive\n\n", ""), events(2) + END);
    for (does, stream) in [(Does::SilentAfter(1), true), (Does::Hangs, true), (Does::Hangs, false)] {
        server.always(does.clone());
        let body = chat(stream).to_string();
        let mut connection = tokio::net::TcpStream::connect(harness.address).await.expect("a connection");
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        tokio::io::AsyncWriteExt::write_all(&mut connection, format!("{head}{body}").as_bytes())
            .await
            .expect("written");
        harness.until("the server is busy", async || server.open() == 1).await;
        let left = Instant::now();
        drop(connection);
        while server.open() != 0 {
            assert!(left.elapsed() < PATIENCE, "never noticed: {does:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        println!("left {does:?}: the server is let go after {:?}", left.elapsed());
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_server() {
    let server = FakeServer::start("server-0").await;
    server.always(Does::Endless);
    let harness = start(&[&server], |_| {}).await;
    let body = chat(true).to_string();
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(16 << 10).expect("small");
    let mut connection = socket.connect(harness.address).await.expect("a connection");
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", body.len());
    tokio::io::AsyncWriteExt::write_all(&mut connection, format!("{head}{body}").as_bytes())
        .await
        .expect("written");
    harness
        .until("the server stands still", async || {
            let before = server.sent();
            tokio::time::sleep(Duration::from_millis(300)).await;
            before > 0 && before == server.sent()
        })
        .await;
    println!("a server has sent {} bytes for a client that reads nothing", server.sent());
    assert!(server.sent() < 2 << 20, "{}", server.sent());
    drop(connection);
    harness.until("cancelled", async || server.open() == 0).await;
    harness.finish().await;
}

#[tokio::test]
async fn a_server_gets_no_more_than_it_may_and_none_that_its_pool_does_not_name() {
    let server = FakeServer::start("server-0").await;
    let harness = start(&[&server], |pool| pool.in_flight_max = 1).await;
    server.then(Does::SilentAfter(1));
    let busy = harness.send("POST", "/v1/chat/completions", chat(true).to_string()).await;
    assert_eq!(busy.status(), 200);
    let refused = harness.chat(&chat(true)).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &json!("overloaded")));
    drop(busy);
    harness.until("room again", async || harness.chat(&chat(true)).await.status == 200).await;
    // The worker moves to a server of its own choosing.
    let mut member = server.worker.member.clone();
    member.server = Some("http://127.0.0.1:9".to_owned());
    harness.members.send_replace(Arc::new(Roster { members: vec![member], age: Duration::ZERO }));
    let gone = async || harness.chat(&chat(true)).await.status == 503;
    harness.until("nothing is sent there", gone).await;
    harness.finish().await;
}

#[tokio::test]
async fn prompts_come_back_to_the_server_that_has_seen_their_beginning() {
    let servers = [
        FakeServer::start("server-0").await,
        FakeServer::start("server-1").await,
        FakeServer::start("server-2").await,
    ];
    let all = [&servers[0], &servers[1], &servers[2]];
    for (policy, by) in
        [(PolicyKind::Prefix, "prefix"), (PolicyKind::KvAware, "kv_aware"), (PolicyKind::Session, "session")]
    {
        let workers = all.map(|server| &server.worker);
        let harness = Harness::start(&workers, |options| {
            options.policy = policy;
            forward(options, &all, |_| {});
        })
        .await;
        let count = |server: &FakeServer| server.got().len();
        let before: Vec<usize> = servers.iter().map(count).collect();
        let mut messages =
            vec![json!({ "role": "user", "content": format!("{by}: {}", "a long story ".repeat(400)) })];
        for turn in 0..8 {
            let body = json!({ "model": "tiny", "messages": messages, "user": "me", "stream": true });
            assert_eq!(harness.chat(&body).await.status, 200);
            messages.push(json!({ "role": "assistant", "content": format!("answer {turn}") }));
            messages.push(json!({ "role": "user", "content": format!("and then, {turn}?") }));
        }
        let after = servers.iter().zip(before).map(|(server, before)| count(server) - before);
        let mut turns: Vec<usize> = after.collect();
        turns.sort_unstable();
        assert_eq!(turns, [0, 0, 8], "{by}");
        harness.finish().await;
    }
}

#[tokio::test]
async fn the_only_server_is_tried_once_more_when_its_connection_breaks_and_not_for_ever() {
    let server = FakeServer::start("server-0").await;
    let harness = Harness::start(&[&server.worker], |options| {
        forward(options, &[&server], |_| {});
        options.timeouts.request = Duration::from_secs(1);
    })
    .await;
    for stream in [true, false] {
        server.then(Does::Vanishes);
        assert_eq!(harness.chat(&chat(stream)).await.status, 200);
        server.then(Does::Hangs);
        let late = harness.chat(&chat(stream)).await;
        assert_eq!((late.status, &late.json()["error"]["code"]), (504, &json!("timeout")));
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_server_that_breaks_connections_is_avoided_for_a_while() {
    let servers = [FakeServer::start("server-0").await, FakeServer::start("server-1").await];
    let harness = start(&[&servers[0], &servers[1]], |_| {}).await;
    servers[0].always(Does::Vanishes);
    for _ in 0..20 {
        assert_eq!(harness.chat(&chat(true)).await.status, 200);
    }
    // Asked again whenever the worker beside it has answered its state, which is about once a second.
    assert!((1..15).contains(&servers[0].got().len()), "{}", servers[0].got().len());
    harness.finish().await;
}

/// What a worker says of its server is no reason to send prompts, and this router's key, anywhere.
#[tokio::test]
async fn a_server_that_the_file_does_not_name_gets_nothing() {
    let (server, stranger) = (FakeServer::start("server-0").await, FakeServer::start("server-1").await);
    let workers = [&server.worker, &stranger.worker];
    let harness = Harness::start(&workers, |options| forward(options, &[&server], |_| {})).await;
    for _ in 0..4 {
        assert_eq!(harness.chat(&chat(true)).await.status, 200);
    }
    assert_eq!((server.got().len(), stranger.got().len()), (4, 0));
    let members = vec![stranger.worker.member.clone()];
    harness.members.send_replace(Arc::new(Roster { members, age: Duration::ZERO }));
    let nobody = async || harness.chat(&chat(true)).await.status == 503;
    harness.until("nobody is left", nobody).await;
    assert!(stranger.got().is_empty());
    harness.finish().await;
}

/// Each API has its own end and its own errors.
#[tokio::test]
async fn a_stream_ends_as_its_api_says() {
    let server = FakeServer::start("server-0").await;
    let harness = Harness::start(&[&server.worker], |options| {
        forward(options, &[&server], |_| {});
        options.timeouts.request = Duration::from_secs(1);
    })
    .await;
    let messages = json!({
        "model": "tiny", "max_tokens": 9, "stream": true, "messages": [{ "role": "user", "content": "hi" }]
    });
    server.then(Does::ClosesAfter(3));
    assert_eq!(harness.post("/v1/messages", &messages).await.text, events(3) + ": bye\n\n");
    server.then(Does::BreaksAfter(3));
    let broken = harness.post("/v1/messages", &messages).await.text;
    assert!(broken.starts_with(&(events(3) + "event: error\ndata: {")), "{broken}");
    // Its time is over, which is no fault of the server.
    server.then(Does::SilentAfter(2));
    let late = harness.chat(&chat(true)).await.text;
    assert!(late.starts_with(&events(2)) && late.contains("\"code\":\"timeout\""), "{late}");
    harness.finish().await;
}

#[tokio::test]
async fn nothing_is_said_within_an_event() {
    let server = FakeServer::start("server-0").await;
    let harness = Harness::start(&[&server.worker], |options| {
        options.timeouts.keep_alive = Duration::from_millis(200);
        forward(options, &[&server], |_| {});
    })
    .await;
    let (begins, ends) = large_event();
    server.then(Does::Large(Duration::from_millis(900), true));
    let answer = harness.chat(&chat(true)).await;
    let told = answer.text.trim_start_matches(": keep-alive\n\n");
    assert!(told == begins + &ends, "{} bytes", answer.text.len());
    // No error can be told there, either: the client sees that it is broken off.
    server.then(Does::Large(Duration::from_millis(900), false));
    let broken = harness.send("POST", "/v1/chat/completions", chat(true).to_string()).await;
    assert!(broken.into_body().collect().await.is_err());
    harness.finish().await;
}

/// Only a stream shows by its beginning that its server is at work.
#[tokio::test]
async fn a_whole_answer_may_take_as_long_as_the_request_has() {
    let server = FakeServer::start("server-0").await;
    let harness = Harness::start(&[&server.worker], |options| {
        forward(options, &[&server], |_| {});
        options.timeouts.first_token = Duration::from_millis(400);
    })
    .await;
    server.always(Does::Streams(2, Duration::from_millis(1500)));
    assert_eq!(harness.chat(&chat(false)).await.status, 200);
    assert_eq!(harness.chat(&chat(true)).await.status, 502);
    harness.finish().await;
}

#[tokio::test]
async fn the_one_server_with_room_is_found_among_many_that_are_full() {
    let mut servers = Vec::new();
    for i in 0..8 {
        servers.push(FakeServer::start(&format!("server-{i}")).await);
    }
    let harness = start(&servers.iter().collect::<Vec<_>>(), |pool| pool.in_flight_max = 1).await;
    let mut busy = Vec::new();
    servers.iter().for_each(|server| {
        server.always(Does::Hangs);
    });
    for _ in 1..servers.len() {
        busy.push(harness.sleeper("/v1/chat/completions", &chat(false)).await);
        let open = async || servers.iter().map(FakeServer::open).sum::<usize>() == busy.len();
        harness.until("one more is busy", open).await;
    }
    servers.iter().for_each(|server| {
        server.always(Does::Streams(5, Duration::ZERO));
    });
    for _ in 0..8 {
        assert_eq!(harness.chat(&chat(true)).await.text, events(5) + END);
    }
    assert!(servers.iter().all(|server| server.open() <= 1));
    drop(busy);
    harness.finish().await;
}

#[tokio::test]
async fn a_server_that_goes_on_slowly_is_not_given_up() {
    let server = FakeServer::start("server-0").await;
    let harness = start(&[&server], |pool| pool.servers.silent_timeout = Duration::from_millis(1500)).await;
    server.always(Does::Streams(7, Duration::from_millis(400)));
    assert_eq!(harness.chat(&chat(true)).await.text, events(7) + END);
    harness.finish().await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_pays_for_its_prompt() {
    let key = mint("k").expect("a key");
    let directory = tempfile::tempdir().expect("a directory");
    let keys = directory.path().join("keys.yaml");
    std::fs::write(&keys, format!("version: 1\ntenants:\n- name: acme\n  keys:\n  {}\n", key.line))
        .expect("written");
    let server = FakeServer::start("server-0").await;
    server.always(Does::Hangs);
    let harness = Harness::start(&[&server.worker], |options| {
        forward(options, &[&server], |_| {});
        options.auth = Some(AuthSpec::new(keys, Isolation::None));
    })
    .await;
    let tokens = "baton_router_tenant_tokens_total{tenant=\"acme\"}";
    for (stream, charged) in [(false, 9.5), (true, 19.5)] {
        let request = Request::post(format!("http://{}/v1/chat/completions", harness.address))
            .header("authorization", format!("Bearer {}", key.key))
            .body(Full::new(Bytes::from(chat(stream).to_string())))
            .expect("a request");
        let asked = server.got().len();
        tokio::select! {
            answer = harness.client.request(request) => panic!("no answer can come: {answer:?}"),
            () = harness.until("the server has it", async || server.got().len() > asked) => {}
        }
        harness.until("it is charged", async || harness.metric(tokens).await > charged).await;
    }
    // Who stays pays once, as the server says.
    server.always(Does::Streams(5, Duration::ZERO));
    let before = harness.metric(tokens).await;
    let request = Request::post(format!("http://{}/v1/chat/completions", harness.address))
        .header("authorization", format!("Bearer {}", key.key))
        .body(Full::new(Bytes::from(chat(true).to_string())))
        .expect("a request");
    let answer = harness.client.request(request).await.expect("an answer");
    answer.into_body().collect().await.expect("all of it");
    harness.until("all is charged", async || harness.metric(tokens).await > before + 17.5).await;
    assert!(harness.metric(tokens).await < before + 18.5, "11 and 7");
    harness.finish().await;
}
