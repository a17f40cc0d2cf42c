//! Keys, tenants and quotas over real sockets.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_config::Role;
use baton_config::fleet::{AuthSpec, Isolation, JwksSource, JwtSpec, PolicyKind, RemoteJwks};
use baton_router::{MintedKey, RouterOptions, mint};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::fake_provider::{self, FakeProvider};
use crate::fake_server::FakeServer;
use crate::fake_worker::{Act, FakeWorker};
use crate::forward;
use crate::harness::{Answer, Harness};

/// A file of keys, replaced as a whole as editors do.
fn write(path: &Path, tenants: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, format!("version: 1\ntenants:\n{tenants}")).expect("written");
    std::fs::rename(&beside, path).expect("renamed");
}

fn tenant(name: &str, more: &str, key: &MintedKey) -> String {
    format!("- name: {name}\n{more}  keys:\n  {}\n", key.line)
}

struct Setup {
    worker: FakeWorker,
    harness: Harness,
    directory: tempfile::TempDir,
}

impl Setup {
    async fn start(tenants: &str, isolation: Isolation, in_flight: u32, queue: u32) -> Self {
        Self::start_with(tenants, |options, keys| {
            options.auth = Some(AuthSpec::new(keys, isolation));
            options.limits.in_flight = in_flight;
            options.limits.queue = queue;
        })
        .await
    }

    /// `change` gets the options and the path of the file of keys.
    async fn start_with(tenants: &str, change: impl FnOnce(&mut RouterOptions, PathBuf)) -> Self {
        let worker = FakeWorker::start("decode-0", Role::Decode).await;
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("keys.yaml");
        write(&path, tenants);
        let harness = Harness::start(&[&worker], |options| change(options, path)).await;
        Self { worker, harness, directory }
    }

    async fn ask(&self, key: &str, body: &Value) -> Answer {
        self.send("POST", "/v1/completions", Some(key), body.to_string()).await
    }

    async fn send(&self, method: &str, path: &str, key: Option<&str>, body: String) -> Answer {
        let mut request =
            Request::builder().method(method).uri(format!("http://{}{path}", self.harness.address));
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let request = request.body(Full::new(Bytes::from(body))).expect("a request");
        let (head, body) = self.harness.client.request(request).await.expect("an answer").into_parts();
        let bytes = body.collect().await.expect("a body").to_bytes();
        let text = String::from_utf8(bytes.to_vec()).expect("UTF-8");
        Answer { status: head.status.as_u16(), headers: head.headers, text }
    }
}

fn short() -> Value {
    json!({ "model": "tiny", "prompt": "hello", "max_tokens": 4 })
}

#[tokio::test]
async fn without_a_key_nothing_is_told_but_health() {
    let key = mint("acme").expect("a key");
    let setup = Setup::start(&tenant("acme", "", &key), Isolation::Tenant, 8, 8).await;
    for (method, path) in [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
    ] {
        let refused = setup.send(method, path, None, short().to_string()).await;
        assert_eq!(refused.status, 401, "{path}");
        assert_eq!(refused.headers["www-authenticate"], "Bearer");
        assert_eq!(refused.json()["error"]["code"], "missing_api_key");
        let wrong = setup.send(method, path, Some("bk-nope-nope"), short().to_string()).await;
        assert_eq!(
            (wrong.status, &wrong.json()["error"]["code"]),
            (401, &json!("invalid_api_key")),
            "{path}"
        );
    }
    assert!(setup.worker.generated().is_empty());
    assert_eq!(setup.send("GET", "/v1/models", Some(&key.key), String::new()).await.status, 200);
    assert_eq!(setup.ask(&key.key, &short()).await.status, 200);
    let harness = &setup.harness;
    assert_eq!(harness.get("/health").await.status, 200);
    let ended = "baton_router_tenant_requests_total{outcome=\"ok\",tenant=\"acme\"}";
    assert!((harness.metric(ended).await - 2.0).abs() < 0.5);
    // One token of prompt, four of answer.
    assert!((harness.metric("baton_router_tenant_tokens_total{tenant=\"acme\"}").await - 5.0).abs() < 0.5);
    setup.harness.finish().await;
}

#[tokio::test]
async fn tenants_do_not_share_cached_prefixes() {
    let (a, b) = (mint("a").expect("a key"), mint("b").expect("a key"));
    let tenants = tenant("a", "", &a) + &tenant("b", "", &b);
    let setup = Setup::start(&tenants, Isolation::Tenant, 8, 8).await;
    let mut body = short();
    // Nothing that a client sends chooses the salt.
    body["cache_salt"] = json!("b");
    for key in [&a, &a, &b] {
        assert_eq!(setup.ask(&key.key, &body).await.status, 200);
    }
    let salts: Vec<u64> = setup.worker.generated().iter().map(|request| request.cache_salt).collect();
    assert_eq!(salts[0], salts[1]);
    assert!(salts[0] != salts[2] && !salts.contains(&0), "{salts:?}");
    setup.harness.finish().await;
}

#[tokio::test]
async fn quotas_are_told_before_the_body_is_looked_at() {
    let (slow, busy) = (mint("slow").expect("a key"), mint("busy").expect("a key"));
    let tenants = tenant("slow", "  limits: { requests_per_min: 2 }\n", &slow)
        + &tenant("busy", "  limits: { tokens_per_min: 600, concurrency: 3 }\n", &busy);
    let setup = Setup::start(&tenants, Isolation::None, 64, 8).await;
    for left in ["1", "0"] {
        let answer = setup.ask(&slow.key, &short()).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["x-ratelimit-limit-requests"], "2");
        assert_eq!(answer.headers["x-ratelimit-remaining-requests"], left);
    }
    // What the router answers by itself tells it, too.
    for (method, path, status) in [("GET", "/v1/models", 200), ("POST", "/tokenize", 429)] {
        let answer = setup.send(method, path, Some(&slow.key), String::new()).await;
        assert_eq!(
            (answer.status, &answer.headers["x-ratelimit-remaining-requests"]),
            (status, &"0".parse().expect("a value"))
        );
    }
    let before = Instant::now();
    let refused = setup.ask(&slow.key, &json!("this is not even a request")).await;
    assert!(before.elapsed() < Duration::from_secs(2), "at once");
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (429, &json!("rate_limit_exceeded")));
    assert_eq!(refused.json()["error"]["type"], "requests");
    let after: u64 = refused.headers["retry-after"].to_str().expect("text").parse().expect("whole seconds");
    assert!((25..=30).contains(&after), "one request in 30 s: {after}");

    setup.worker.always(Act::SilentAfter(1));
    let mut body = short();
    body["stream"] = json!(true);
    let mut open = Vec::new();
    for _ in 0..3 {
        let request = Request::post(format!("http://{}/v1/completions", setup.harness.address))
            .header("authorization", format!("Bearer {}", busy.key))
            .body(Full::new(Bytes::from(body.to_string())))
            .expect("a request");
        let answer = setup.harness.client.request(request).await.expect("an answer");
        assert_eq!(answer.status(), 200);
        open.push(answer);
    }
    let refused = setup.ask(&busy.key, &short()).await;
    assert_eq!(refused.status, 429);
    assert!(
        refused.json()["error"]["message"].as_str().expect("text").contains("at once"),
        "{}",
        refused.text
    );
    drop(open);
    let idle = async || setup.worker.seen.open.load(Ordering::SeqCst) == 0;
    setup.harness.until("all left", idle).await;
    setup.worker.always(Act::Good);
    let mut long = short();
    long["max_tokens"] = json!(400);
    let mut last = setup.ask(&busy.key, &long).await;
    for _ in 0..3 {
        last = setup.ask(&busy.key, &long).await;
    }
    assert_eq!((last.status, &last.json()["error"]["type"]), (429, &json!("tokens")), "{}", last.text);
    setup.harness.finish().await;
}

#[tokio::test]
async fn a_client_that_leaves_pays_for_what_was_generated() {
    let key = mint("k").expect("a key");
    let setup = Setup::start(&tenant("acme", "", &key), Isolation::None, 8, 8).await;
    setup.worker.always(Act::Slow(Duration::from_millis(5)));
    // With a string to stop at, tokens are looked at as they come.
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 400, "stop": "no such text" });
    let mut left = Box::pin(setup.ask(&key.key, &body));
    let sent = || setup.worker.seen.sent.load(Ordering::SeqCst);
    tokio::select! {
        answer = &mut left => panic!("it takes two seconds: {answer:?}"),
        () = setup.harness.until("some tokens came", async || sent() > 2_000) => {}
    }
    drop(left);
    let charged = async || setup.harness.metric("baton_router_tenant_tokens_total{tenant=\"acme\"}").await;
    setup.harness.until("they are charged", async || charged().await > 10.0).await;
    setup.harness.finish().await;
}

#[tokio::test]
async fn prompts_and_answers_are_charged_streamed_or_not() {
    let key = mint("k").expect("a key");
    let limits = "  limits: { tokens_per_min: 600 }\n";
    let setup = Setup::start(&tenant("acme", limits, &key), Isolation::None, 8, 8).await;
    for stream in [true, false] {
        let body = json!({ "model": "tiny", "prompt": vec![100; 100], "max_tokens": 150, "stream": stream });
        assert_eq!(setup.ask(&key.key, &body).await.status, 200);
    }
    let models = setup.send("GET", "/v1/models", Some(&key.key), String::new()).await;
    let left: u64 =
        models.headers["x-ratelimit-remaining-tokens"].to_str().expect("text").parse().expect("a number");
    // Of 600 there went 500, and some has flowed in since: ten a second.
    assert!(left < 180, "{left}");
    let counted = setup.harness.metric("baton_router_completion_tokens_total").await;
    assert!((counted - 300.0).abs() < 0.5, "{counted}");
    setup.harness.finish().await;
}

#[tokio::test]
async fn what_a_tenant_has_sent_is_not_taken_to_be_cached_for_another() {
    let (a, b) = (mint("a").expect("a key"), mint("b").expect("a key"));
    let tenants = tenant("a", "", &a) + &tenant("b", "", &b);
    let setup = Setup::start_with(&tenants, |options, keys| {
        options.auth = Some(AuthSpec::new(keys, Isolation::Tenant));
        options.policy = PolicyKind::KvAware;
        options.explain = true;
    })
    .await;
    let body = json!({ "model": "tiny", "prompt": vec![100; 200], "max_tokens": 2 });
    check_apart(&setup.harness, &body, &a, &b).await;
    setup.harness.finish().await;
}

/// Nor where requests are passed on to servers of others.
#[tokio::test]
async fn what_a_tenant_has_passed_on_is_not_taken_to_be_cached_for_another() {
    let (a, b) = (mint("a").expect("a key"), mint("b").expect("a key"));
    let directory = tempfile::tempdir().expect("a directory");
    let keys = directory.path().join("keys.yaml");
    write(&keys, &(tenant("a", "", &a) + &tenant("b", "", &b)));
    let server = FakeServer::start("server-0").await;
    let harness = Harness::start(&[&server.worker], |options| {
        forward::forward(options, &[&server], |_| {});
        options.auth = Some(AuthSpec::new(keys, Isolation::Tenant));
        options.policy = PolicyKind::KvAware;
        options.explain = true;
    })
    .await;
    check_apart(&harness, &json!({ "model": "tiny", "prompt": "hello ".repeat(100) }), &a, &b).await;
    harness.finish().await;
}

/// Each of two tenants finds cached what it has sent itself.
async fn check_apart(harness: &Harness, body: &Value, a: &MintedKey, b: &MintedKey) {
    for (key, cached) in [(a, false), (a, true), (b, false), (b, true)] {
        let request = Request::post(format!("http://{}/v1/completions", harness.address))
            .header("authorization", format!("Bearer {}", key.key))
            .header("x-baton-explain", "1")
            .body(Full::new(Bytes::from(body.to_string())))
            .expect("a request");
        let answer = harness.client.request(request).await.expect("an answer");
        let told: Value =
            serde_json::from_slice(answer.headers()["x-baton-explain"].as_bytes()).expect("JSON");
        let tokens = told["ways"][0]["decode_cached"].as_u64().expect("a number");
        assert_eq!(tokens > 0, cached, "{told}");
    }
}

#[tokio::test]
async fn who_floods_does_not_keep_others_out() {
    let (flood, quiet) = (mint("flood").expect("a key"), mint("quiet").expect("a key"));
    let tenants = tenant("flood", "", &flood) + &tenant("quiet", "", &quiet);
    let setup = Setup::start(&tenants, Isolation::Tenant, 1, 3).await;
    setup.worker.always(Act::Slow(Duration::from_millis(5)));
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 20 });
    let floods = async {
        let asked = (0..12).map(|_| setup.ask(&flood.key, &body));
        futures_util::future::join_all(asked).await
    };
    let quiets = async {
        let queued = async || setup.harness.metric("baton_router_queue_depth").await > 2.5;
        setup.harness.until("the queue is full", queued).await;
        setup.ask(&quiet.key, &body).await
    };
    let (floods, quiets) = tokio::join!(floods, quiets);
    assert_eq!(quiets.status, 200, "{}", quiets.text);
    let refused: Vec<&Answer> = floods.iter().filter(|answer| answer.status == 429).collect();
    assert!(refused.len() >= 8, "{}", refused.len());
    for answer in refused {
        let after: u64 = answer.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
        assert!((1..=300).contains(&after));
    }
    setup.harness.finish().await;
}

#[tokio::test]
async fn a_new_file_of_keys_counts_and_a_broken_one_does_not() {
    let (first, second) = (mint("acme").expect("a key"), mint("acme").expect("a key"));
    let setup = Setup::start(&tenant("acme", "", &first), Isolation::Tenant, 8, 8).await;
    let path = setup.directory.path().join("keys.yaml");
    let status = async |key: &MintedKey| setup.ask(&key.key, &short()).await.status;
    assert_eq!((status(&first).await, status(&second).await), (200, 401));
    write(&path, &tenant("acme", "", &second));
    setup.harness.until("the new key is good", async || status(&second).await == 200).await;
    assert_eq!(status(&first).await, 401, "the old one is not");
    write(&path, "- name: acme\n  weight: heavy\n");
    let stale = async || setup.harness.metric("baton_router_keys_stale").await > 0.5;
    setup.harness.until("somebody says so", stale).await;
    assert_eq!(status(&second).await, 200, "the old keys stay");
    std::fs::remove_file(&path).expect("removed");
    write(&path, &tenant("acme", "", &first));
    setup.harness.until("the first key is back", async || status(&first).await == 200).await;
    let well = async || setup.harness.metric("baton_router_keys_stale").await < 0.5;
    setup.harness.until("and all is well", well).await;
    setup.harness.finish().await;
}

#[tokio::test]
async fn a_client_says_how_long_it_waits() {
    let key = mint("acme").expect("a key");
    let setup = Setup::start(&tenant("acme", "", &key), Isolation::Tenant, 1, 8).await;
    setup.worker.always(Act::SilentAfter(1));
    let request = |wait: &str, stream: bool| {
        let mut body = short();
        body["stream"] = json!(stream);
        Request::post(format!("http://{}/v1/completions", setup.harness.address))
            .header("authorization", format!("Bearer {}", key.key))
            .header("x-baton-max-wait-ms", wait)
            .body(Full::new(Bytes::from(body.to_string())))
            .expect("a request")
    };
    let holds = setup.harness.client.request(request("1000", true)).await.expect("an answer");
    assert_eq!(holds.status(), 200);
    let waits = setup.harness.client.request(request("150", false)).await.expect("an answer");
    assert_eq!(waits.status(), 429);
    for bad in ["0", "-1", "soon", "99999999", "1.5"] {
        let answer = setup.harness.client.request(request(bad, false)).await.expect("an answer");
        assert_eq!(answer.status(), 400, "{bad}");
    }
    let timeouts = "baton_router_rejected_total{reason=\"queue_timeout\"}";
    assert!((setup.harness.metric(timeouts).await - 1.0).abs() < 0.5);
    drop(holds);
    setup.harness.finish().await;
}

/// A key of an identity provider, and a token that OpenSSL signed with it: of https://id.example, for `baton`, good until
/// 2100, of tenant acme.
const JWKS: &str = r#"{"keys":[{"kty":"RSA","kid":"rsa","use":"sig","n":"vOGPasAfELUFOuuvwuX1agdalx0lWvhjWYBljhIPpWk6V2B7kHQB5jD1uYE3BaHRa1KRgOW9d2cs73vC6164uAqLHGCFXk94-LHS8bPgo7UElPlRcodVkMZROGrMBoskxMOjXE_rj2ZFwp4HsGYhPqKrZJw2or1QpqvWJCOwRubLQFUnwxaUPwaVsVyS-cMxXbqMZt-j87r5aiNJRaWASE-T-FWKXplxRTufGR-RFyIRlnFw7dwfnvMLQvQdlBj1evJnM34A_51l43RlIOHeAr-Z7yRWXwjIz5X-LXWIEyzrBicvnlOC7v-reqz1wj-ebcZYJs-JJjscsTdU6yp8pw","e":"AQAB"}]}"#;
const TOKEN: &str = "eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6InJzYSJ9.eyJpc3MiOiJodHRwczovL2lkLmV4YW1wbGUiLCJhdWQiOiJiYXRvbiIsImV4cCI6NDEwMjQ0NDgwMCwidGVuYW50IjoiYWNtZSJ9.sF-meOisJeDDfhiIruAhh5TitsUBF18NJMqTPqeRfSmh-3duVyx7LuONmUO-Ldjz5-wMF8dJZA9MNXFQvQkIXwp1lHKxkHjR3n6yzoquLDigLdsIQ_Qg3x5Ob_E3icvcpiRj7_a7vRxUWKGP1wU59JyJ4wcWO2u8VUvfUamrmxoemR3Fr-i8G1Fgq92XRkTPE4bzWQwG-JIwzaqHkew1l-_E_uC0LcXSdbY52_zVclrRQb9RXzkgjfXVdJylxLFmHg1eqx-osEMN-Fnmlv0AZ5mV_CMuwZ2XO-iKwRZ2b2yFWNal87uhrYf7CtPjrZx1vA77nfzgQG1VMdJhqjbF1A";

#[tokio::test]
async fn an_identity_provider_that_is_down_keeps_only_tokens_out_and_those_not_for_good() {
    let key = mint("acme").expect("a key");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    drop(listener);
    let setup = Setup::start_with(&tenant("acme", "", &key), |options, keys| {
        let mut source = RemoteJwks::new(Some(format!("http://{address}/keys")));
        source.refresh = Duration::from_millis(20);
        let source = JwksSource::Remote(source);
        let mut auth = AuthSpec::new(keys, Isolation::Tenant);
        auth.jwt = Some(JwtSpec::new(source, "https://id.example".to_owned(), "baton".to_owned()));
        options.auth = Some(auth);
    })
    .await;
    assert_eq!(setup.ask(&key.key, &short()).await.status, 200);
    let refused = setup.ask(TOKEN, &short()).await;
    assert_eq!((refused.status, refused.headers["retry-after"].as_bytes()), (503, &b"1"[..]));
    assert_eq!(refused.json()["error"]["code"], "identity_provider_unavailable");
    let denied = "baton_router_auth_denied_total{reason=\"no_signers\"}";
    assert!((setup.harness.metric(denied).await - 1.0).abs() < 0.5);
    let listener = TcpListener::bind(address).await.expect("the port again");
    let provider =
        FakeProvider::start(listener, None, |path| (path == "/keys").then(|| fake_provider::json(JWKS)));
    setup.harness.until("tokens count", async || setup.ask(TOKEN, &short()).await.status == 200).await;
    assert!(provider.asked() > 0);
    setup.harness.finish().await;
}
