//! Where requests go: to the worker that has their prefix, to the worker of their session; and how that is explained.

use std::sync::Arc;
use std::time::Duration;

use baton_config::fleet::{Disaggregation, PolicyKind};
use baton_config::prefix::{BlockHash, HashScheme, block_hashes};
use baton_config::protocol::{FailureCode, KvEvent, KvEventBatch, KvTier};
use baton_config::{Epoch, Role};
use baton_router::{Member, Roster, RouterOptions};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use serde_json::json;

use crate::fake_worker::{Act, FakeWorker};
use crate::harness::{Harness, PATIENCE};

fn aware(options: &mut RouterOptions) {
    options.policy = PolicyKind::KvAware;
    options.disaggregation = Disaggregation::Auto;
}

fn prompt(seed: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| 97 + (seed.wrapping_mul(31) + i * i) % 26).collect()
}

async fn send(harness: &Harness, tokens: &[u32]) {
    let answer = harness.complete(&json!({ "model": "tiny", "prompt": tokens, "max_tokens": 2 })).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

fn snapshot(epoch: u64, blocks: Vec<BlockHash>) -> KvEventBatch {
    KvEventBatch {
        epoch: Epoch(epoch),
        seq: 7,
        snapshot: true,
        block_tokens: 16,
        scheme: HashScheme::Baton,
        tier: KvTier::Device,
        events: vec![KvEvent::Stored { parent: BlockHash::root(0), blocks }],
    }
}

#[tokio::test]
async fn a_prompt_goes_to_the_worker_that_says_it_has_it() {
    let first = FakeWorker::start("decode-0", Role::Decode).await;
    let second = FakeWorker::start("decode-1", Role::Decode).await;
    let tokens = prompt(1, 480);
    first.kv_events(vec![snapshot(1, Vec::new())]);
    second.kv_events(vec![snapshot(1, block_hashes(0, 16, &tokens))]);
    let harness = Harness::start(&[&first, &second], aware).await;
    harness
        .until("the index is fed", async || harness.metric("baton_router_index_blocks").await > 29.5)
        .await;
    for _ in 0..10 {
        send(&harness, &tokens).await;
    }
    assert_eq!((first.generated().len(), second.generated().len()), (0, 10));
    assert!(harness.metric("baton_router_predicted_cached_tokens_total").await >= 4700.0);
    // A worker that leaves takes its blocks along.
    let roster = Roster { members: vec![first.member.clone()], age: Duration::ZERO };
    harness.members.send_replace(Arc::new(roster));
    harness
        .until("the index is empty", async || harness.metric("baton_router_index_blocks").await < 0.5)
        .await;
    send(&harness, &tokens).await;
    assert_eq!(first.generated().len(), 1);
    harness.finish().await;
}

#[tokio::test]
async fn events_of_another_life_and_gaps_are_not_believed() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let blocks = block_hashes(0, 16, &prompt(1, 480));
    let mut gap = snapshot(1, blocks.clone());
    gap.snapshot = false;
    worker.kv_events(vec![gap]);
    let harness = Harness::start(&[&worker], aware).await;
    harness
        .until("gaps are counted", async || harness.metric("baton_router_index_gaps_total").await > 1.5)
        .await;
    worker.kv_events(vec![snapshot(2, blocks.clone())]);
    send(&harness, &prompt(1, 480)).await;
    assert!(harness.metric("baton_router_index_blocks").await < 0.5, "another life");
    worker.kv_events(vec![snapshot(1, blocks)]);
    harness
        .until("the snapshot is taken", async || harness.metric("baton_router_index_blocks").await > 29.5)
        .await;
    harness.finish().await;
}

#[tokio::test]
async fn workers_without_events_are_remembered_by_what_they_were_sent() {
    let first = FakeWorker::start("decode-0", Role::Decode).await;
    let second = FakeWorker::start("decode-1", Role::Decode).await;
    let harness = Harness::start(&[&first, &second], aware).await;
    let mut owners = std::collections::BTreeSet::new();
    for seed in 0..8 {
        let tokens = prompt(seed, 480);
        for _ in 0..4 {
            send(&harness, &tokens).await;
        }
        let count = |worker: &FakeWorker| worker.generated().iter().filter(|r| r.tokens == tokens).count();
        assert!(matches!((count(&first), count(&second)), (0, 4) | (4, 0)), "prompt {seed} moved");
        owners.insert(count(&first) == 4);
    }
    assert_eq!(owners.len(), 2, "different prompts go to different workers");
    let blocks = async || harness.metric("baton_router_index_blocks").await;
    harness.until("it is in the index", async || blocks().await > 0.5).await;
    harness.members.send_replace(Arc::new(Roster::default()));
    harness.until("it is forgotten with them", async || blocks().await < 0.5).await;
    harness.finish().await;
}

#[tokio::test]
async fn a_worker_that_has_no_events_any_more_is_remembered_by_what_it_is_sent() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let mut gap = snapshot(1, block_hashes(0, 16, &prompt(1, 480)));
    gap.snapshot = false;
    worker.kv_events(vec![gap]);
    let harness = Harness::start(&[&worker], aware).await;
    let gaps = async || harness.metric("baton_router_index_gaps_total").await;
    harness.until("there were some", async || gaps().await > 0.5).await;
    worker.no_kv_events();
    let noted = async || {
        send(&harness, &prompt(2, 480)).await;
        harness.metric("baton_router_index_blocks").await > 29.5
    };
    harness.until("it is remembered", noted).await;
    harness.finish().await;
}

/// The view may tell of a life before the worker itself has heard of it.
#[tokio::test]
async fn a_worker_that_hears_of_its_life_late_is_asked_again_but_not_without_end() {
    for (hears, lag, status) in [(true, PATIENCE, 200), (false, Duration::from_secs(2), 503)] {
        let worker = FakeWorker::start("decode-0", Role::Decode).await;
        let away = Act::Status(409, FailureCode::Unavailable);
        if hears {
            worker.then(away);
        } else {
            worker.always(away);
        }
        let harness = Harness::start(&[&worker], |options| {
            options.disaggregation = Disaggregation::Never;
            options.timeouts.view_lag = lag;
        })
        .await;
        let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 2 });
        let answer = harness.complete(&body).await;
        assert_eq!(answer.status, status, "{}", answer.text);
        // As often as it says that it is there, about once a second, not as often as is looked.
        assert!((1..8).contains(&worker.generated().len()), "{}", worker.generated().len());
        harness.finish().await;
    }
}

/// One that was away ends as it is asked again: its next life may come into view all the same.
#[tokio::test]
async fn a_view_that_is_behind_is_waited_for_although_who_was_away_is_gone() {
    let (worker, next) = (
        FakeWorker::start("decode-0", Role::Decode).await,
        FakeWorker::start("decode-0", Role::Decode).await,
    );
    worker.then(Act::Status(409, FailureCode::Unavailable));
    let harness = Harness::start(&[&worker], |options| {
        options.disaggregation = Disaggregation::Never;
        options.timeouts.view_lag = PATIENCE;
        options.timeouts.frozen = Duration::from_secs(600);
    })
    .await;
    worker.hide_state();
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 2 });
    let (answer, ()) = tokio::join!(harness.complete(&body), async {
        harness.until("it was asked", async || !worker.generated().is_empty()).await;
        drop(worker);
        let asked = async || harness.metric("baton_router_disagg_total{decision=\"local\"}").await;
        harness.until("it is asked again", async || asked().await > 1.5).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        let member = Member { epoch: Epoch(2), ..next.member.clone() };
        harness.members.send_replace(Arc::new(Roster { members: vec![member], age: Duration::ZERO }));
    });
    assert_eq!(answer.status, 200, "{}", answer.text);
    harness.finish().await;
}

/// Addresses are given out again, and lives of two workers may have the same number.
#[tokio::test]
async fn a_worker_is_not_well_because_another_one_answers_where_it_was() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let other = FakeWorker::start("other-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |options| {
        options.disaggregation = Disaggregation::Never;
    })
    .await;
    let mut gone = other.member.clone();
    gone.worker = "decode-1".parse().expect("a name");
    let members = vec![worker.member.clone(), gone];
    harness.members.send_replace(Arc::new(Roster { members, age: Duration::ZERO }));
    let avoided = async || {
        let before = worker.generated().len();
        for seed in 0..4 {
            send(&harness, &prompt(seed, 20)).await;
        }
        worker.generated().len() == before + 4
    };
    harness.until("nobody is sent there", avoided).await;
    harness.finish().await;
}

async fn send_with(harness: &Harness, header: (&str, &str), user: Option<&str>) -> Option<String> {
    let body = json!({ "model": "tiny", "prompt": prompt(9, 50), "max_tokens": 1, "user": user }).to_string();
    let request = Request::post(format!("http://{}/v1/completions", harness.address))
        .header("content-type", "application/json")
        .header(header.0, header.1)
        .body(Full::new(Bytes::from(body)))
        .unwrap();
    let answer = harness.client.request(request).await.unwrap();
    assert_eq!(answer.status(), 200);
    let explained = answer.headers().get("x-baton-explain").map(|value| value.to_str().unwrap().to_owned());
    answer.into_body().collect().await.unwrap();
    explained
}

#[tokio::test]
async fn a_session_stays_on_its_worker() {
    let first = FakeWorker::start("decode-0", Role::Decode).await;
    let second = FakeWorker::start("decode-1", Role::Decode).await;
    let harness = Harness::start(&[&first, &second], |options| {
        aware(options);
        options.policy = PolicyKind::Session;
    })
    .await;
    let mut owners = std::collections::BTreeSet::new();
    for session in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        let before = first.generated().len();
        for _ in 0..3 {
            send_with(&harness, ("x-session-id", session), None).await;
            send_with(&harness, ("x-other", "1"), Some(session)).await;
        }
        // The header goes first.
        for user in ["a", "b", "c", "d"] {
            send_with(&harness, ("x-session-id", session), Some(user)).await;
        }
        let here = first.generated().len() - before;
        assert!(here == 0 || here == 10, "session {session} moved");
        owners.insert(here);
    }
    assert_eq!(owners.len(), 2, "not all sessions on one worker");
    harness.finish().await;
}

#[tokio::test]
async fn a_choice_is_explained_to_those_who_may_know() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let quiet = Harness::start(&[&worker], aware).await;
    assert_eq!(send_with(&quiet, ("x-baton-explain", "1"), None).await, None, "off unless configured");
    quiet.finish().await;
    let harness = Harness::start(&[&worker], |options| {
        aware(options);
        options.explain = true;
    })
    .await;
    assert_eq!(send_with(&harness, ("x-baton-explain", "0"), None).await, None);
    let explained = send_with(&harness, ("x-baton-explain", "1"), None).await.expect("explained");
    let explained: serde_json::Value = serde_json::from_str(&explained).expect("JSON");
    assert_eq!(explained["ways"][0]["decode"], "decode-0");
    assert_eq!(explained["ways"][0]["chosen"], true);
    assert!(explained["ways"][0]["first_token_ms"].as_f64().unwrap() > 0.0, "{explained}");
    harness.finish().await;
}
