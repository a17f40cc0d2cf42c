//! What the router books and tells of handoffs, and whom it asks for prefills.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_config::Role;
use baton_config::protocol::FailureCode;
use baton_router::Roster;
use serde_json::json;

use crate::fake_worker::{Act, FakeWorker};
use crate::harness::{Harness, nowhere};

/// Whoever could not be called, or said that it leaves, is not asked for the prompts that follow.
#[tokio::test]
async fn a_prefill_worker_that_is_gone_or_leaves_is_avoided_for_a_while() {
    for leaves in [false, true] {
        let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
        let decode = FakeWorker::start("decode-0", Role::Decode).await;
        // It is not found out by anything but the calls.
        prefill.hide_state();
        let harness = Harness::start(&[&decode], |options| {
            options.timeouts.frozen = Duration::from_secs(600);
        })
        .await;
        let (_socket, address) = nowhere();
        let mut members = vec![prefill.member.clone(), decode.member.clone()];
        if leaves {
            prefill.fail_prefill(503, FailureCode::Unavailable);
        } else {
            members[0].address = address;
        }
        harness.members.send_replace(Arc::new(Roster { members, age: Duration::ZERO }));
        let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 4 });
        let with_handoff = async || {
            assert_eq!(harness.complete(&body).await.status, 200);
            decode.generated().last().is_some_and(|request| request.handoff.is_some())
        };
        harness.until("it is asked", with_handoff).await;
        harness.until("it is avoided", async || !with_handoff().await).await;
        harness.finish().await;
    }
}

/// Who comes next is told how long it would wait, and placed, by what is booked.
#[tokio::test]
async fn a_prompt_is_booked_where_it_is_computed() {
    let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
    let decode = FakeWorker::start("decode-0", Role::Decode).await;
    prefill.hang_prefill();
    decode.always(Act::SilentAfter(0));
    let harness = Harness::start(&[&decode], |options| {
        options.slo_wait = Some(Duration::from_secs(1));
    })
    .await;
    // Refused unread, or read and no request at all.
    let full = async || match harness.chat(&json!("nothing")).await.status {
        429 => true,
        400 => false,
        status => panic!("{status}"),
    };
    let view = |workers: &[&FakeWorker]| {
        let members = workers.iter().map(|worker| worker.member.clone()).collect();
        harness.members.send_replace(Arc::new(Roster { members, age: Duration::ZERO }));
    };
    for (worker, view_of) in [(&decode, vec![&decode]), (&prefill, vec![&prefill, &decode])] {
        worker.queue(1000, 100.0);
        view(&view_of);
        harness.until("its speed is known", full).await;
        worker.queue(0, 100.0);
        harness.until("its queue is empty", async || !full().await).await;
    }
    // Four seconds of work.
    let body = json!({ "model": "tiny", "prompt": vec![100; 400], "max_tokens": 4 });
    let begun = harness.sleeper("/v1/completions", &body).await;
    let both = async || {
        prefill.seen.prefilling.load(Ordering::SeqCst) == 1 && decode.seen.open.load(Ordering::SeqCst) == 1
    };
    harness.until("both were asked", both).await;
    assert!(full().await, "the prefill worker computes it");
    view(&[&decode]);
    harness.until("the decode worker does not", async || !full().await).await;
    drop(begun);
    harness.finish().await;
}

#[tokio::test]
async fn what_is_told_of_a_prompt_is_what_became_of_it_first() {
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for i in 0..2 {
        prefills.push(FakeWorker::start(&format!("prefill-{i}"), Role::Prefill).await);
        decodes.push(FakeWorker::start(&format!("decode-{i}"), Role::Decode).await);
    }
    let all: Vec<&FakeWorker> = prefills.iter().chain(&decodes).collect();
    let harness = Harness::start(&all, |_| {}).await;
    // A replay imports what was computed before.
    decodes[0].then(Act::DieAfter(5));
    for decode in &decodes {
        decode.always(Act::Import(7));
    }
    let ask = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 9, "baton": {} });
    // In turns: one of them.
    for _ in 0..2 {
        let answer = harness.complete(&ask).await;
        let told = &answer.json()["choices"][0]["baton"];
        if told["migrations"] == 0 {
            continue;
        }
        let first = decodes[0].generated().remove(0);
        let replays = decodes[1].generated().into_iter().find(|request| request.generated == 5);
        let (first, replay) =
            (first.handoff.expect("a handoff"), replays.and_then(|r| r.handoff).expect("one"));
        assert_ne!(first.peer.worker, replay.peer.worker, "the test needs two");
        assert_eq!(told["prefill_worker"], first.peer.worker.as_str(), "{told}");
        assert_eq!(told["prefill"]["imported_tokens"], 0, "{told}");
    }
    assert_eq!(decodes[1].generated().iter().filter(|request| request.generated == 5).count(), 1);
    harness.finish().await;
}

/// Who takes longer than it says is believed less: the one that computed the prompt.
#[tokio::test]
async fn a_prefill_that_takes_long_is_held_against_who_computed_it() {
    let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
    let decode = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&prefill, &decode], |options| {
        options.slo_wait = Some(Duration::from_millis(1010));
    })
    .await;
    let full = async || harness.chat(&json!("nothing")).await.status == 429;
    prefill.queue(3000, 1000.0);
    harness.until("its queue is known", full).await;
    // One second, if it is as quick as it says.
    prefill.queue(1000, 1000.0);
    harness.until("its queue is shorter", async || !full().await).await;
    decode.then(Act::PauseAfter(0, Duration::from_secs(3)));
    let body = json!({ "model": "tiny", "prompt": vec![100; 200], "max_tokens": 4 });
    assert_eq!(harness.complete(&body).await.status, 200);
    harness.until("it is longer than that", full).await;
    harness.finish().await;
}
