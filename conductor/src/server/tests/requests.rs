//! Bad input: a precise 4xx with a body, and nothing changed.

use ::http::header;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::api::BODY_MAX_BYTES;

pub(super) const JSON: &str = "application/json; charset=utf-8";

pub(super) fn good() -> Value {
    json!({
        "worker": "w", "incarnation": "0123456789abcdef0123456789abcdef", "pool": "decode", "role": "decode",
        "model": "tiny", "engine": "reference", "address": "127.0.0.1:1", "transfer": "", "state": "ready", "pid": 1,
        "kv": {"layers": 2, "kv_heads": 2, "head_dim": 16, "block_tokens": 16, "layout": "hnd", "dtype": "bf16"},
    })
}

pub(super) fn with(key: &str, value: Value) -> Value {
    let mut body = good();
    body[key] = value;
    body
}

fn kv(key: &str, value: Value) -> Value {
    let mut body = good();
    body["kv"][key] = value;
    body
}

pub(super) async fn refused(reply: reqwest::Response, what: &str) -> (u16, String) {
    let status = reply.status().as_u16();
    let text = reply.text().await.unwrap();
    let body: ErrorBody =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{what}: {status} {text:?}: {e}"));
    assert!((400..500).contains(&status), "{what}: {status} {text}");
    assert!(!body.error.message.is_empty() && body.error.kind.ends_with("_error"), "{what}: {text}");
    (status, body.error.code)
}

#[tokio::test]
async fn bad_registrations_are_refused_and_change_nothing() {
    let options = ConductorOptions { model: Some("tiny".to_owned()), ..ConductorOptions::new(pools()) };
    let server = Server::with("127.0.0.1:0".parse().unwrap(), options).await;
    let url = format!("{}/v1/workers", server.url());
    let http = crate::http::client();
    server.leads().await;
    let before = server.listing().await;
    let bodies = [
        ("no pool of that name", with("pool", json!("other")), "invalid_field"),
        ("another role than the pool's", with("role", json!("prefill")), "invalid_field"),
        ("an unknown role", with("role", json!("boss")), "invalid_body"),
        ("a bad name", with("worker", json!("A b")), "invalid_body"),
        ("a long name", with("worker", json!("w".repeat(64))), "invalid_body"),
        ("a name of the wrong type", with("worker", json!(7)), "invalid_body"),
        ("no incarnation", with("incarnation", json!("x")), "invalid_field"),
        ("another model than the fleet's", with("model", json!("other")), "invalid_field"),
        ("an empty model", with("model", json!("")), "invalid_field"),
        ("a model with a line end", with("model", json!("a\nb")), "invalid_field"),
        ("a long engine", with("engine", json!("e".repeat(300))), "invalid_field"),
        ("an address for everybody", with("address", json!("0.0.0.0:80")), "invalid_field"),
        ("an address without a port", with("address", json!("localhost")), "invalid_field"),
        ("an address with a path", with("address", json!("localhost:80/x")), "invalid_field"),
        ("metadata that is not base64", with("transfer", json!("§")), "invalid_field"),
        ("too much metadata", with("transfer", json!("A".repeat(65_540))), "invalid_field"),
        ("an unknown state", with("state", json!("lost")), "invalid_body"),
        ("a negative pid", with("pid", json!(-1)), "invalid_body"),
        ("an unknown field", with("color", json!("red")), "invalid_body"),
        ("no heads", kv("kv_heads", json!(0)), "invalid_field"),
        ("huge blocks", kv("block_tokens", json!(60_000)), "invalid_field"),
        ("a geometry beyond all numbers", kv("layers", json!(4_294_967_295u32)), "invalid_field"),
        ("an unknown layout", kv("layout", json!("dnh")), "invalid_body"),
        ("a number", json!(1), "invalid_body"),
        ("nothing", json!({}), "invalid_body"),
    ];
    let mut huge = kv("block_tokens", json!(65_536));
    huge["kv"]["head_dim"] = json!(65_536);
    let bodies = bodies.into_iter().chain([("blocks of terabytes", huge, "invalid_field")]);
    let bodies: Vec<_> = bodies.filter(|(what, ..)| *what != "huge blocks").collect();
    for (what, body, code) in bodies {
        let reply = http.post(&url).json(&body).send().await.unwrap();
        assert_eq!(refused(reply, what).await, (400, code.to_owned()), "{what}");
    }
    for raw in ["", "{", "[]", "null", "\u{0}", "{\"worker\":\"w\",\"worker\":\"x\"}", &"[".repeat(10_000)] {
        let reply =
            http.post(&url).header(header::CONTENT_TYPE, JSON).body(raw.to_owned()).send().await.unwrap();
        assert_eq!(refused(reply, raw).await, (400, "invalid_body".to_owned()));
    }
    let large = http
        .post(&url)
        .header(header::CONTENT_TYPE, JSON)
        .body("x".repeat(BODY_MAX_BYTES + 1))
        .send()
        .await
        .unwrap();
    assert_eq!(refused(large, "a large body").await, (413, "body_too_large".to_owned()));
    assert_eq!(server.listing().await.revision, before.revision, "the store is untouched");

    let reply = http.post(&url).json(&good()).send().await.unwrap();
    assert_eq!(reply.status(), 201);
    let registered: Registered = reply.json().await.unwrap();
    assert_eq!((registered.ttl_ms, registered.keepalive_ms), (10_000, 3_333));
    assert_eq!(server.listing().await.workers[0].record.epoch, registered.epoch);
    server.stop().await;
}

#[tokio::test]
async fn every_other_bad_request_gets_its_own_code() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let http = crate::http::client();
    let registered: Registered = http
        .post(format!("{}/v1/workers", server.url()))
        .json(&good())
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let Epoch(epoch) = registered.epoch;
    let ahead = registered.revision + 1000;
    let keep = |epoch: u64| json!({"epoch": epoch, "seq": 2, "state": "ready"}).to_string();
    let load = json!({"epoch": epoch, "seq": 2, "state": "ready", "load": {"last_error": "x".repeat(2000)}})
        .to_string();
    let none = String::new();
    let cases: Vec<(&str, String, String, u16, &str)> = vec![
        ("POST", "/v1/workers/none/keepalive".into(), keep(epoch), 410, "lease_gone"),
        ("POST", "/v1/workers/w/keepalive".into(), keep(epoch - 1), 409, "stale_epoch"),
        ("POST", "/v1/workers/w/keepalive".into(), keep(epoch + 1), 409, "stale_epoch"),
        ("POST", "/v1/workers/w/keepalive".into(), "{}".into(), 400, "invalid_body"),
        ("POST", "/v1/workers/w/keepalive".into(), load, 400, "invalid_field"),
        ("POST", "/v1/workers/W/keepalive".into(), keep(epoch), 400, "invalid_name"),
        ("POST", "/v1/workers/%ff/keepalive".into(), keep(epoch), 400, "invalid_name"),
        ("DELETE", "/v1/workers/w".into(), none.clone(), 400, "invalid_query"),
        ("DELETE", "/v1/workers/w?epoch=-1".into(), none.clone(), 400, "invalid_query"),
        ("DELETE", format!("/v1/workers/w?epoch={}", epoch - 1), none.clone(), 409, "stale_epoch"),
        ("DELETE", "/v1/workers/none?epoch=1".into(), none.clone(), 410, "lease_gone"),
        ("POST", "/v1/workers/none/drain".into(), none.clone(), 404, "no_worker"),
        ("PUT", "/v1/pools/none/replicas".into(), "{\"replicas\":1}".into(), 404, "no_pool"),
        ("PUT", "/v1/pools/decode/replicas".into(), "{\"replicas\":0}".into(), 400, "replicas_out_of_range"),
        ("PUT", "/v1/pools/decode/replicas".into(), "{\"replicas\":9}".into(), 400, "replicas_out_of_range"),
        ("PUT", "/v1/pools/decode/replicas".into(), "{\"replicas\":-1}".into(), 400, "invalid_body"),
        ("PUT", "/v1/pools/decode/replicas".into(), "{\"replicas\":2.5}".into(), 400, "invalid_body"),
        ("GET", "/v1/watch".into(), none.clone(), 400, "invalid_query"),
        ("GET", "/v1/watch?since=x".into(), none.clone(), 400, "invalid_query"),
        ("GET", "/v1/watch?since=99999999999999999999".into(), none.clone(), 400, "invalid_query"),
        ("GET", format!("/v1/watch?since={ahead}"), none.clone(), 400, "future_revision"),
        ("GET", "/v2".into(), none.clone(), 404, "no_route"),
        ("PATCH", "/v1/workers".into(), none.clone(), 405, "no_method"),
    ];
    let before = server.listing().await.revision;
    for (method, path, body, status, code) in cases {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let what = format!("{method} {path} {body}");
        let request = http.request(method, format!("{}{path}", server.url()));
        let reply = request.header(header::CONTENT_TYPE, JSON).body(body).send().await.unwrap();
        assert_eq!(refused(reply, &what).await, (status, code.to_owned()), "{what}");
    }
    assert_eq!(server.listing().await.revision, before, "the store is untouched");
    let metrics = crate::http::client()
        .get(format!("{}/metrics", server.url()))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    for line in [
        "baton_stale_epoch_refused_total 3",
        "baton_conductor_refused_total{code=\"lease_gone\"} 2",
        "baton_conductor_refused_total{code=\"future_revision\"} 1",
    ] {
        assert!(metrics.contains(line), "no {line} in\n{metrics}");
    }

    let drain = json!({"epoch": epoch, "seq": 1, "state": "draining"});
    let keepalive = format!("{}/v1/workers/w/keepalive", server.url());
    assert_eq!(http.post(&keepalive).json(&drain).send().await.unwrap().status(), 200);
    let back =
        http.post(&keepalive).header(header::CONTENT_TYPE, JSON).body(keep(epoch)).send().await.unwrap();
    assert_eq!(refused(back, "ready after draining").await, (409, "draining_is_final".to_owned()));
    server.stop().await;
}

#[tokio::test]
async fn junk_on_the_socket_is_answered_or_cut_and_the_server_lives() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let corpus: Vec<Vec<u8>> = vec![
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"POST /v1/workers HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello"
            .to_vec(),
        b"POST /v1/workers HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999999\r\n\r\n{".to_vec(),
        b"POST /v1/workers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        [&b"GET /"[..], &[b'a'; 100_000], b" HTTP/1.1\r\n\r\n"].concat(),
        vec![0; 4096],
    ];
    for bytes in corpus {
        let mut socket = TcpStream::connect(server.address).await.unwrap();
        // The server may cut the connection while we still write.
        let _ = socket.write_all(&bytes).await;
        let mut answer = vec![0; 4096];
        let read = timeout(PATIENCE, socket.read(&mut answer)).await.expect("answered or cut").unwrap_or(0);
        let text = String::from_utf8_lossy(&answer[..read]).into_owned();
        assert!(read == 0 || text.starts_with("HTTP/1.1 4") || text.starts_with("HTTP/1.0 4"), "{text:?}");
    }
    assert_eq!(
        crate::http::client().get(format!("{}/readyz", server.url())).send().await.unwrap().status(),
        200
    );
    server.stop().await;
}

#[tokio::test]
async fn a_watch_tells_its_history_and_beats() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let http = crate::http::client();
    let since = server.listing().await.revision;
    http.post(format!("{}/v1/workers", server.url())).json(&good()).send().await.unwrap();
    let mut reply = http.get(format!("{}/v1/watch?since={since}", server.url())).send().await.unwrap();
    let mut text = String::new();
    let mut beats = 0;
    let deadline = Instant::now() + PATIENCE;
    while beats < 3 && Instant::now() < deadline {
        text.push_str(std::str::from_utf8(&reply.chunk().await.unwrap().expect("open")).unwrap());
        beats = text.matches("\"heartbeat\"").count();
    }
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["type"], "heartbeat", "whose history it is comes first");
    assert_eq!(lines[0]["revision"], since);
    assert_eq!(lines[1]["changes"][0]["worker"]["worker"], "w");
    assert_eq!(lines[2]["revision"], lines[1]["revision"]);
    let mut compacted =
        http.get(format!("{}/v1/watch?since={}", server.url(), since - 1_000)).send().await.unwrap();
    let mut text = String::new();
    while let Some(chunk) = timeout(PATIENCE, compacted.chunk()).await.expect("ends").unwrap() {
        text.push_str(std::str::from_utf8(&chunk).unwrap());
    }
    assert!(text.lines().last().unwrap().contains("\"compacted\""), "{text}");
    drop(reply);
    server.stop().await;
}
