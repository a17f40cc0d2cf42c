//! Requests that workers die with.

use std::time::Duration;

use baton_config::fleet::{AuthSpec, Disaggregation, Isolation};
use baton_config::{Epoch, Role};
use baton_router::{MintedKey, RouterOptions, mint};
use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use serde_json::{Value, json};

use crate::fake_server::{Does, FakeServer};
use crate::fake_worker::{Act, FakeWorker};
use crate::forward;
use crate::harness::Harness;

const MANY: usize = 5;

fn ask(text: &str) -> Value {
    json!({ "model": "tiny", "messages": [{ "role": "user", "content": text }], "max_tokens": 20, "stream": true })
}

/// Workers that take requests and say nothing, until they are told otherwise.
async fn fleet(framed: bool) -> (Vec<FakeWorker>, Harness) {
    fleet_with(framed, |_| ()).await
}

async fn fleet_with(framed: bool, change: impl FnOnce(&mut RouterOptions)) -> (Vec<FakeWorker>, Harness) {
    let mut workers = Vec::new();
    for at in 0..MANY {
        let worker = FakeWorker::start(&format!("decode-{at}"), Role::Decode).await;
        worker.always(Act::SilentAfter(0));
        if !framed {
            worker.without_frames();
        }
        workers.push(worker);
    }
    let all: Vec<&FakeWorker> = workers.iter().collect();
    let harness = Harness::start(&all, |options| {
        options.disaggregation = Disaggregation::Never;
        change(options);
    })
    .await;
    (workers, harness)
}

/// Kills the next worker that gets a request.
async fn kill_one(workers: &mut Vec<FakeWorker>, harness: &Harness) {
    let before: Vec<usize> = workers.iter().map(|worker| worker.generated().len()).collect();
    let taken =
        || workers.iter().zip(&before).position(|(worker, before)| worker.generated().len() > *before);
    harness.until("a worker took it", async || taken().is_some()).await;
    let at = taken().expect("it did");
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(workers.remove(at));
}

/// Two tenants, each with a key; the file goes with the folder.
fn two_tenants() -> (tempfile::TempDir, AuthSpec, [MintedKey; 2]) {
    let [key, other] = ["k", "o"].map(|name| mint(name).expect("a key"));
    let directory = tempfile::tempdir().expect("a directory");
    let keys = directory.path().join("keys.yaml");
    let tenants = tenant("acme", &key) + &tenant("other", &other);
    std::fs::write(&keys, format!("version: 1\ntenants:\n{tenants}")).expect("written");
    (directory, AuthSpec::new(keys, Isolation::Request), [key, other])
}

/// Sends the same prompt with a key; the status of its answer.
async fn deadly(harness: &Harness, key: &MintedKey) -> u16 {
    let request = Request::post(format!("http://{}/v1/completions", harness.address))
        .header("authorization", format!("Bearer {}", key.key))
        .body(Full::new(Bytes::from(json!({ "model": "tiny", "prompt": "deadly" }).to_string())))
        .expect("a request");
    harness.client.request(request).await.expect("an answer").status().as_u16()
}

fn tenant(name: &str, key: &MintedKey) -> String {
    format!("- name: {name}\n  keys:\n  {}\n", key.line)
}

fn all_do(workers: &[FakeWorker], act: &Act) {
    for worker in workers {
        worker.always(act.clone());
    }
}

fn calls(workers: &[FakeWorker]) -> usize {
    workers.iter().map(|worker| worker.generated().len()).sum()
}

#[tokio::test]
async fn a_request_that_workers_die_with_does_not_reach_a_third() {
    for framed in [true, false] {
        let (mut workers, harness) = fleet(framed).await;
        let (body, other) = (ask("a deadly one"), ask("a harmless one"));
        let (answer, ()) = tokio::join!(harness.chat(&body), async {
            kill_one(&mut workers, &harness).await;
            kill_one(&mut workers, &harness).await;
        });
        assert_eq!(answer.status, 500, "{framed}: {}", answer.text);
        assert_eq!(answer.json()["error"]["code"], "request_failed_repeatedly");
        assert_eq!(calls(&workers), 0, "{framed}");
        all_do(&workers, &Act::Good);
        for _ in 0..3 {
            let again = harness.chat(&body).await;
            assert_eq!(again.status, 500, "{}", again.text);
        }
        assert_eq!(calls(&workers), 0, "{framed}");
        let answer = harness.chat(&other).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(harness.metric("baton_router_barred_total").await as u64, 4);
        harness.finish().await;
    }
}

#[tokio::test]
async fn requests_that_share_no_prefixes_are_still_the_same_request() {
    let (_directory, auth, [key, other]) = two_tenants();
    let (mut workers, harness) = fleet_with(true, |options| options.auth = Some(auth)).await;
    let ask = async |key: &MintedKey| deadly(&harness, key).await;
    let (status, ()) = tokio::join!(ask(&key), async {
        kill_one(&mut workers, &harness).await;
        kill_one(&mut workers, &harness).await;
    });
    assert_eq!((status, ask(&key).await, calls(&workers)), (500, 500, 0));
    all_do(&workers, &Act::Good);
    assert_eq!(ask(&other).await, 200, "what one tenant has done is held against no other");
    harness.finish().await;
}

#[tokio::test]
async fn a_request_that_is_answered_between_two_deaths_did_not_cause_them() {
    let (mut workers, harness) = fleet(true).await;
    let body = ask("a popular one");
    for _ in 0..3 {
        all_do(&workers, &Act::SilentAfter(0));
        let (answer, ()) = tokio::join!(harness.chat(&body), async {
            kill_one(&mut workers, &harness).await;
            all_do(&workers, &Act::Good);
        });
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_stream_that_goes_on_elsewhere_is_kept_from_a_third_that_dies_with_it() {
    let (mut workers, harness) = fleet(true).await;
    all_do(&workers, &Act::SilentAfter(3));
    let body = ask("deadly only later");
    let (answer, ()) = tokio::join!(harness.chat(&body), async {
        harness.until("a stream has begun", async || calls(&workers) == 1).await;
        let begun = workers.iter().position(|worker| !worker.generated().is_empty()).expect("one has");
        tokio::time::sleep(Duration::from_millis(200)).await;
        all_do(&workers, &Act::SilentAfter(0));
        // Its prompt was survived here: this is no death with it, but the two that follow are.
        drop(workers.remove(begun));
        for _ in 0..2 {
            harness.until("the next one took it", async || calls(&workers) == 1).await;
            let next = workers.iter().position(|worker| !worker.generated().is_empty()).expect("one has");
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(workers.remove(next));
        }
    });
    assert!(answer.text.contains("request_failed_repeatedly"), "{}", answer.text);
    assert_eq!((workers.len(), calls(&workers)), (MANY - 3, 0));
    harness.finish().await;
}

#[tokio::test]
async fn connections_that_break_are_no_deaths() {
    for framed in [true, false] {
        let (workers, harness) = fleet(framed).await;
        for worker in &workers {
            worker.always(Act::Good);
            worker.then(Act::DieAfter(0));
        }
        for _ in 0..MANY {
            let answer = harness.chat(&ask("an unlucky one")).await;
            assert!([200, 502].contains(&answer.status), "{}", answer.text);
        }
        let answer = harness.chat(&ask("an unlucky one")).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(harness.metric("baton_router_barred_total").await as u64, 0);
        harness.finish().await;
    }
}

/// Asked is whoever is there now: another life, or another worker, means that this one ended. Silence means nothing.
#[tokio::test]
async fn a_worker_has_died_where_another_life_answers_and_not_where_nobody_says_anything() {
    for (case, status, asked) in [("another life", 500, 2), ("another worker", 500, 2), ("silence", 502, 4)] {
        let mut workers = Vec::new();
        for at in 0..MANY {
            let name = format!("decode-{at}");
            let mut worker = FakeWorker::start(&name, Role::Decode).await.in_life(2);
            match case {
                "another life" => worker.member.epoch = Epoch(1),
                "another worker" => worker.member.worker = format!("former-{at}").parse().expect("a name"),
                _ => {
                    worker.hide_state();
                }
            }
            worker.always(Act::DieAfter(0));
            workers.push(worker);
        }
        let all: Vec<&FakeWorker> = workers.iter().collect();
        let harness = Harness::start(&all, |options| options.disaggregation = Disaggregation::Never).await;
        let answer = harness.chat(&ask("a deadly one")).await;
        assert_eq!((answer.status, calls(&workers)), (status, asked), "{case}: {}", answer.text);
        harness.finish().await;
    }
}

#[tokio::test]
async fn a_prefill_worker_that_dies_with_a_request_counts_like_any_other() {
    let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
    prefill.hang_prefill();
    let mut decodes = Vec::new();
    for at in 0..3 {
        decodes.push(FakeWorker::start(&format!("decode-{at}"), Role::Decode).await);
    }
    all_do(&decodes, &Act::SilentAfter(0));
    let all: Vec<&FakeWorker> = decodes.iter().chain([&prefill]).collect();
    let harness = Harness::start(&all, |_| {}).await;
    let body = ask("a deadly one");
    let (answer, ()) = tokio::join!(harness.chat(&body), async {
        let both = async || calls(&decodes) == 1 && prefill.prefilled().len() == 1;
        harness.until("both have it", both).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(prefill);
        let told = |decode: &FakeWorker| !decode.seen.ended.lock().expect("unpoisoned").is_empty();
        harness.until("the other side is told", async || decodes.iter().any(told)).await;
        let at = decodes.iter().position(told).expect("one is");
        drop(decodes.remove(at));
    });
    assert_eq!((answer.status, calls(&decodes)), (500, 0), "{}", answer.text);
    assert_eq!(answer.json()["error"]["code"], "request_failed_repeatedly");
    harness.finish().await;
}

/// Servers that take requests and say nothing, until they are told otherwise.
async fn servers() -> (Vec<FakeServer>, Harness) {
    servers_with(|_| ()).await
}

async fn servers_with(change: impl FnOnce(&mut RouterOptions)) -> (Vec<FakeServer>, Harness) {
    let mut servers = Vec::new();
    for at in 0..MANY {
        let server = FakeServer::start(&format!("server-{at}")).await;
        server.always(Does::Hangs);
        servers.push(server);
    }
    let all: Vec<&FakeServer> = servers.iter().collect();
    let workers: Vec<&FakeWorker> = servers.iter().map(|server| &server.worker).collect();
    let harness = Harness::start(&workers, |options| {
        forward::forward(options, &all, |_| {});
        change(options);
    })
    .await;
    (servers, harness)
}

fn got(servers: &[FakeServer]) -> usize {
    servers.iter().map(|server| server.got().len()).sum()
}

/// Kills the next server that gets a request.
async fn kill_server(servers: &mut Vec<FakeServer>, harness: &Harness) {
    let before: Vec<usize> = servers.iter().map(|server| server.got().len()).collect();
    let taken = || servers.iter().zip(&before).position(|(server, before)| server.got().len() > *before);
    harness.until("a server took it", async || taken().is_some()).await;
    let at = taken().expect("it did");
    drop(servers.remove(at));
}

#[tokio::test]
async fn a_request_that_servers_of_others_die_with_does_not_reach_a_third() {
    for stream in [true, false] {
        let (mut servers, harness) = servers().await;
        let (mut body, mut other) = (ask("a deadly one"), ask("a harmless one"));
        (body["stream"], other["stream"]) = (json!(stream), json!(stream));
        let (answer, ()) = tokio::join!(harness.chat(&body), async {
            kill_server(&mut servers, &harness).await;
            kill_server(&mut servers, &harness).await;
        });
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (502, &json!("worker_lost")),
            "{stream}"
        );
        for server in &servers {
            server.always(Does::Streams(3, Duration::ZERO));
        }
        for _ in 0..3 {
            let again = harness.chat(&body).await;
            assert_eq!(again.status, 500, "{}", again.text);
            assert_eq!(again.json()["error"]["code"], "request_failed_repeatedly");
        }
        assert_eq!(got(&servers), 0, "{stream}");
        let answer = harness.chat(&other).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(harness.metric("baton_router_barred_total").await as u64, 3);
        harness.finish().await;
    }
}

#[tokio::test]
async fn what_one_tenant_did_to_servers_is_held_against_no_other() {
    let (_directory, auth, [key, other]) = two_tenants();
    let (mut servers, harness) = servers_with(|options| options.auth = Some(auth)).await;
    let ask = async |key: &MintedKey| deadly(&harness, key).await;
    let (status, ()) = tokio::join!(ask(&key), async {
        kill_server(&mut servers, &harness).await;
        kill_server(&mut servers, &harness).await;
    });
    assert_eq!((status, ask(&key).await, got(&servers)), (502, 500, 0));
    for server in &servers {
        server.always(Does::Says("{}"));
    }
    assert_eq!((ask(&other).await, ask(&key).await), (200, 500));
    harness.finish().await;
}

#[tokio::test]
async fn a_server_that_dies_after_the_first_event_died_with_the_request() {
    let (mut servers, harness) = servers().await;
    let body = ask("deadly after its beginning");
    for server in &servers {
        server.always(Does::SilentAfter(1));
    }
    for _ in 0..2 {
        let (answer, ()) = tokio::join!(harness.chat(&body), kill_server(&mut servers, &harness));
        assert!(answer.text.contains("worker_lost"), "{}", answer.text);
    }
    let again = harness.chat(&body).await;
    assert_eq!((again.status, got(&servers)), (500, 0), "{}", again.text);
    harness.finish().await;
}

#[tokio::test]
async fn a_server_that_fails_a_request_before_it_is_gone_died_with_it() {
    const DEAD: &str = "{\"error\":{\"message\":\"the engine is dead\"}}";
    for case in ["after", "never", "before", "unknown"] {
        let (servers, harness) = servers().await;
        for server in &servers {
            server.always(Does::Refuses(500, DEAD));
            match case {
                "before" => {
                    server.worker.misses_its_server();
                }
                "unknown" => {
                    server.worker.hide_state();
                }
                _ => {}
            }
        }
        if case == "before" {
            // Longer than an answer about it is under way.
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        let body = ask("a deadly one");
        let answer = harness.chat(&body).await;
        assert_eq!((answer.status, got(&servers)), (502, 2), "{}", answer.text);
        for server in servers.iter().filter(|server| case == "after" && !server.got().is_empty()) {
            server.worker.misses_its_server();
        }
        let again = harness.chat(&body).await;
        let expected = if case == "after" { (500, 2) } else { (502, 4) };
        assert_eq!((again.status, got(&servers)), expected, "{case}: {}", again.text);
        harness.finish().await;
    }
}

#[tokio::test]
async fn a_server_that_says_in_a_stream_that_it_failed_and_is_gone_died_with_the_request() {
    let (servers, harness) = servers().await;
    for server in &servers {
        server.always(Does::FailsAfter(1));
    }
    let body = ask("deadly after its beginning");
    for _ in 0..2 {
        assert_eq!(harness.chat(&body).await.status, 200);
    }
    for server in servers.iter().filter(|server| !server.got().is_empty()) {
        server.worker.misses_its_server();
    }
    let again = harness.chat(&body).await;
    assert_eq!((again.status, got(&servers)), (500, 2), "{}", again.text);
    harness.finish().await;
}

#[tokio::test]
async fn a_request_that_servers_answer_between_two_deaths_did_not_cause_them() {
    for (does, stream, status) in [
        (Does::Streams(3, Duration::ZERO), true, 200),
        (Does::Says("{}"), false, 200),
        (Does::Refuses(400, "{}"), false, 400),
    ] {
        let (mut servers, harness) = servers().await;
        let mut body = ask("a popular one");
        body["stream"] = json!(stream);
        for _ in 0..3 {
            for server in &servers {
                server.always(Does::Hangs);
            }
            let (answer, ()) = tokio::join!(harness.chat(&body), async {
                kill_server(&mut servers, &harness).await;
                for server in &servers {
                    server.always(does.clone());
                }
            });
            assert_eq!(answer.status, status, "{does:?}: {}", answer.text);
        }
        harness.finish().await;
    }
}

#[tokio::test]
async fn servers_that_break_connections_have_not_died() {
    let (servers, harness) = servers().await;
    let body = ask("an unlucky one");
    for does in [Does::Vanishes, Does::BreaksAfter(0), Does::BreaksAfter(1)] {
        for server in &servers {
            server.always(does.clone());
        }
        for _ in 0..MANY {
            let answer = harness.chat(&body).await;
            assert!([200, 502].contains(&answer.status), "{}", answer.text);
        }
    }
    for server in &servers {
        server.always(Does::Streams(3, Duration::ZERO));
    }
    let answer = harness.chat(&body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(harness.metric("baton_router_barred_total").await as u64, 0);
    harness.finish().await;
}
