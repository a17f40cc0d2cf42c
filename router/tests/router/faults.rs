//! Workers die, freeze, refuse and talk nonsense; clients leave. The answer is right all the same, or honestly an error.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_config::fleet::{AuthSpec, Disaggregation, Isolation};
use baton_config::protocol::FailureCode;
use baton_config::{Epoch, Role};
use baton_router::{Member, Roster, RouterOptions, mint};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use serde_json::{Value, json};

use crate::api::text;
use crate::fake_server::{Does, FakeServer};
use crate::fake_worker::{Act, FakeWorker, oracle};
use crate::harness::{Harness, PATIENCE, nowhere, sse};
use crate::model_dir::{EOS, VOCAB};

fn ask(stream: bool) -> Value {
    json!({
        "model": "tiny", "messages": [{ "role": "user", "content": "hello world" }],
        "max_tokens": 20, "seed": 3, "temperature": 0.7, "stream": stream
    })
}

fn alone(options: &mut RouterOptions) {
    options.disaggregation = Disaggregation::Never;
    options.timeouts.progress = Duration::from_millis(400);
    options.timeouts.replacement = Duration::from_millis(500);
}

async fn two_workers() -> (FakeWorker, FakeWorker, Harness) {
    let first = FakeWorker::start("decode-0", Role::Decode).await;
    let second = FakeWorker::start("decode-1", Role::Decode).await;
    let harness = Harness::start(&[&first, &second], alone).await;
    (first, second, harness)
}

const MOVED: [&str; 4] = ["connection", "timeout", "worker", "protocol"];

async fn moved(harness: &Harness, result: &str) -> f64 {
    let mut sum = 0.0;
    for reason in MOVED {
        let name = format!("baton_router_migrations_total{{reason=\"{reason}\",result=\"{result}\"}}");
        sum += harness.metric(&name).await;
    }
    sum
}

#[tokio::test]
async fn a_stream_goes_on_elsewhere_whatever_stops_it() {
    for act in [
        Act::DieAfter(5),
        Act::CloseAfter(5),
        Act::SilentAfter(5),
        Act::GarbageAfter(5),
        Act::FailAfter(5, FailureCode::Engine),
        Act::FailAfter(5, FailureCode::Unavailable),
        // Nobody else need think so: what has begun can go on.
        Act::FailAfter(5, FailureCode::Refused),
    ] {
        for (framed, stream) in [(true, true), (true, false), (false, true)] {
            let (first, second, harness) = two_workers().await;
            if !framed {
                first.without_frames();
                second.without_frames();
            }
            first.always(act.clone());
            second.then(Act::DieAfter(0));
            // Round robin: whoever is first, the bad worker gets at least one of two requests.
            for _ in 0..2 {
                let answer = harness.chat(&ask(stream)).await;
                assert_eq!(answer.status, 200, "{act:?}: {}", answer.text);
                let prompt = &first.generated()[0].tokens;
                let prompt = &prompt[..prompt.len() - first.generated()[0].generated as usize];
                assert_eq!(answer.content(0), text(&oracle(prompt, 3, 20)), "{act:?}, frames: {framed}");
                if stream {
                    let ids: std::collections::BTreeSet<String> =
                        answer.events().iter().map(|event| event["id"].to_string()).collect();
                    assert_eq!(ids.len(), 1, "the stream keeps its id");
                }
            }
            let reason = match act {
                Act::SilentAfter(_) => "timeout",
                Act::GarbageAfter(_) => "protocol",
                Act::FailAfter(..) => "worker",
                _ => "connection",
            };
            let name = format!("baton_router_migrations_total{{reason=\"{reason}\",result=\"moved\"}}");
            assert!(harness.metric(&name).await >= 1.0, "{act:?}");
            assert!(moved(&harness, "lost").await < 0.5, "{act:?}");
            let replay =
                second.generated().into_iter().find(|request| request.generated > 0).expect("a replay");
            assert_eq!(replay.generated, 5);
            assert_eq!(replay.max_tokens, 15);
            harness.finish().await;
        }
    }
}

#[tokio::test]
async fn before_the_first_token_another_worker_is_tried() {
    for act in [
        Act::Status(429, FailureCode::Overloaded),
        Act::Status(503, FailureCode::Unavailable),
        Act::Status(409, FailureCode::Unavailable),
        Act::Status(500, FailureCode::Engine),
        Act::DieAfter(0),
        Act::FailAfter(0, FailureCode::Overloaded),
    ] {
        let (first, second, harness) = two_workers().await;
        first.always(act.clone());
        for _ in 0..4 {
            let answer = harness.chat(&ask(true)).await;
            assert_eq!(answer.status, 200, "{act:?}: {}", answer.text);
            assert_eq!(answer.content(0).len(), 20);
        }
        assert_eq!(second.generated().len(), 4, "{act:?}");
        harness.finish().await;
    }
}

/// A request to workers that turn it away because they are in another life than the view says, until the view has heard.
async fn waits_for_the_view(away: usize, frozen: usize) {
    let mut workers = Vec::new();
    for i in 0..away + frozen {
        let worker = FakeWorker::start(&format!("decode-{i}"), Role::Decode).await;
        worker.always(if i < away {
            Act::Status(409, FailureCode::Unavailable)
        } else {
            Act::SilentAfter(0)
        });
        workers.push(worker);
    }
    let harness = Harness::start(&workers.iter().collect::<Vec<_>>(), |options| {
        alone(options);
        options.timeouts.first_token = Duration::from_millis(400);
    })
    .await;
    let body = ask(true);
    let (answer, ()) = tokio::join!(harness.chat(&body), async {
        let all_asked = async || workers.iter().all(|worker| !worker.generated().is_empty());
        harness.until("all were asked", all_asked).await;
        // For as long as the one that is frozen may be silent, and then some.
        tokio::time::sleep(Duration::from_millis(700)).await;
        let mut members: Vec<Member> = workers.iter().map(|worker| worker.member.clone()).collect();
        for (worker, member) in workers.iter().zip(&mut members).take(away) {
            worker.always(Act::Good);
            member.epoch = Epoch(2);
        }
        harness.members.send_replace(Arc::new(Roster { members, age: Duration::ZERO }));
    });
    assert_eq!(answer.status, 200, "{away} {frozen}: {}", answer.text);
    assert_eq!(answer.content(0).len(), 20, "{away} {frozen}: {}", answer.text);
    harness.finish().await;
}

#[tokio::test]
async fn a_view_that_is_behind_is_waited_for_also_when_a_worker_was_lost() {
    waits_for_the_view(2, 1).await;
}

#[tokio::test]
async fn a_view_that_is_behind_is_waited_for_in_a_fleet_of_any_size() {
    waits_for_the_view(7, 0).await;
}

#[tokio::test]
async fn what_no_worker_took_is_a_503() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], alone).await;
    let (_socket, address) = nowhere();
    let mut member = worker.member.clone();
    member.worker = "decode-1".parse().expect("a name");
    member.address = address;
    let roster = Roster { members: vec![member], age: Duration::from_secs(60) };
    harness.members.send_replace(Arc::new(roster));
    harness
        .until("the view arrived", async || harness.metric("baton_router_view_age_seconds").await > 59.0)
        .await;
    for stream in [true, false] {
        let answer = harness.chat(&ask(stream)).await;
        assert_eq!(answer.status, 503, "{}", answer.text);
        assert_eq!(answer.json()["error"]["code"], "no_worker", "{}", answer.text);
    }
    harness.finish().await;
}

/// The view may be behind for as long as the conductor is away, and addresses are given out again.
#[tokio::test]
async fn who_listens_where_a_worker_was_decides_about_no_request() {
    let stranger = FakeServer::start("server-0").await;
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let mut gone = worker.member.clone();
    gone.worker = "decode-1".parse().expect("a name");
    gone.address = stranger.url.trim_start_matches("http://").to_owned();
    for status in [404, 405] {
        stranger.always(Does::Refuses(status, "<html>"));
        let harness = Harness::start(&[&worker], |options| {
            alone(options);
            options.timeouts.view_lag = Duration::from_millis(300);
        })
        .await;
        for (members, age, status) in
            [(vec![gone.clone(), worker.member.clone()], 60, 200), (vec![gone.clone()], 120, 503)]
        {
            harness.members.send_replace(Arc::new(Roster { members, age: Duration::from_secs(age) }));
            let shown = async || harness.metric("baton_router_view_age_seconds").await > age as f64 - 0.5;
            harness.until("the view arrived", shown).await;
            for _ in 0..3 {
                let answer = harness.chat(&ask(true)).await;
                assert_eq!(answer.status, status, "{}", answer.text);
            }
        }
        harness.finish().await;
    }
    assert!(stranger.got().iter().any(|got| got.path == "/v1/generate"), "it was asked");
}

#[tokio::test]
async fn a_new_attempt_has_a_new_handoff() {
    let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
    let first = FakeWorker::start("decode-0", Role::Decode).await;
    let second = FakeWorker::start("decode-1", Role::Decode).await;
    let harness = Harness::start(&[&prefill, &first, &second], |_| {}).await;
    first.always(Act::Status(429, FailureCode::Overloaded));
    second.then(Act::Status(503, FailureCode::Unavailable));
    for _ in 0..2 {
        harness.chat(&ask(false)).await;
    }
    let mut ids: Vec<u128> = prefill.prefilled().iter().map(|request| request.handoff.id.0).collect();
    let calls = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), calls);
    assert!(calls >= 3, "each attempt calls the prefill side too");
    harness.finish().await;
}

#[tokio::test]
async fn full_workers_are_a_429_and_no_workers_a_503() {
    let (first, second, harness) = two_workers().await;
    first.always(Act::Status(429, FailureCode::Overloaded));
    second.always(Act::Status(429, FailureCode::Overloaded));
    let busy = harness.chat(&ask(true)).await;
    assert_eq!(busy.status, 429);
    assert_eq!(busy.headers["retry-after"], "1");
    assert_eq!(busy.json()["error"]["code"], "overloaded");
    harness.members.send_replace(Arc::new(Roster::default()));
    harness.until("nobody is left", async || harness.get("/readyz").await.status == 503).await;
    let none = harness.chat(&ask(false)).await;
    assert_eq!((none.status, &none.json()["error"]["code"]), (503, &json!("no_worker")));
    assert!(harness.metric("baton_router_rejected_total{reason=\"no_worker\"}").await > 0.5);
    assert!(harness.metric("baton_router_rejected_total{reason=\"workers_busy\"}").await > 0.5);
    harness.finish().await;
}

#[tokio::test]
async fn what_a_worker_refuses_for_good_is_the_clients_fault() {
    let (first, second, harness) = two_workers().await;
    first.always(Act::Status(400, FailureCode::Refused));
    second.always(Act::Status(400, FailureCode::Refused));
    let answer = harness.chat(&ask(true)).await;
    assert_eq!(answer.status, 400);
    assert!(!answer.text.contains("as told"), "a worker's words are for the log");
    assert_eq!(first.generated().len() + second.generated().len(), 1, "nobody else is bothered");
    harness.finish().await;
}

#[tokio::test]
async fn a_prompt_too_long_for_one_workers_memory_goes_to_a_larger_one_or_is_refused_by_its_name() {
    let (first, second, harness) = two_workers().await;
    first.always(Act::Status(400, FailureCode::TooLong));
    for _ in 0..4 {
        assert_eq!(harness.chat(&ask(false)).await.status, 200);
    }
    assert!(!first.generated().is_empty(), "the small one was asked too");
    second.always(Act::Status(400, FailureCode::TooLong));
    let answer = harness.chat(&ask(true)).await;
    assert_eq!(answer.status, 400);
    let error = &answer.json()["error"];
    assert_eq!(error["code"], "context_length_exceeded");
    assert!(error["message"].as_str().unwrap().contains("kv.memory"), "{error}");
    // Of one that broke it is not known: no other prompt may help.
    second.always(Act::Status(500, FailureCode::Engine));
    assert_eq!(harness.chat(&ask(true)).await.status, 502);
    harness.finish().await;
}

#[tokio::test]
async fn a_request_that_fails_everywhere_is_not_taken_all_around_the_fleet() {
    let mut workers = Vec::new();
    for i in 0..7 {
        let worker = FakeWorker::start(&format!("decode-{i}"), Role::Decode).await;
        worker.always(Act::Status(500, FailureCode::Engine));
        workers.push(worker);
    }
    let harness = Harness::start(&workers.iter().collect::<Vec<_>>(), alone).await;
    for asked in [4, 8] {
        assert_eq!(harness.chat(&ask(true)).await.status, 502);
        assert_eq!(workers.iter().map(|worker| worker.generated().len()).sum::<usize>(), asked);
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_worker_that_breaks_connections_is_avoided_for_a_while() {
    let (first, second, harness) = two_workers().await;
    first.always(Act::DieAfter(0));
    for _ in 0..20 {
        assert_eq!(harness.chat(&ask(false)).await.status, 200);
    }
    // Asked again whenever it has answered its state, which is about once a second.
    assert!((1..15).contains(&first.generated().len()), "{}", first.generated().len());
    assert_eq!(second.generated().len(), 20);
    harness.finish().await;
}

#[tokio::test]
async fn who_turned_a_request_away_before_a_connection_broke_is_not_counted_twice() {
    let mut workers = Vec::new();
    for i in 0..4 {
        let worker = FakeWorker::start(&format!("decode-{i}"), Role::Decode).await;
        let away = Act::Status(409, FailureCode::Unavailable);
        worker.always(if i < 3 { away } else { Act::Status(500, FailureCode::Engine) });
        workers.push(worker);
    }
    workers[3].then(Act::DieAfter(0));
    let harness = Harness::start(&workers.iter().collect::<Vec<_>>(), alone).await;
    let (body, mut members) = (ask(true), Vec::new());
    members.extend(workers.iter().map(|worker| worker.member.clone()));
    let (answer, ()) = tokio::join!(harness.chat(&body), async {
        harness.until("it was asked again", async || workers[3].generated().len() == 2).await;
        workers[0].always(Act::Good);
        members[0].epoch = Epoch(2);
        harness.members.send_replace(Arc::new(Roster { members: members.clone(), age: Duration::ZERO }));
    });
    assert_eq!((answer.status, answer.content(0).len()), (200, 20), "{}", answer.text);
    harness.finish().await;
}

#[tokio::test]
async fn a_view_that_is_behind_is_not_waited_for_where_somebody_had_an_answer() {
    for (act, status) in
        [(Act::Status(429, FailureCode::Overloaded), 429), (Act::Status(400, FailureCode::TooLong), 502)]
    {
        let (first, second, harness) = two_workers().await;
        first.always(Act::Status(409, FailureCode::Unavailable));
        second.always(act);
        let begun = std::time::Instant::now();
        assert_eq!(harness.chat(&ask(true)).await.status, status);
        assert!(begun.elapsed() < Duration::from_millis(2500), "{:?}", begun.elapsed());
        harness.finish().await;
    }
}

#[tokio::test]
async fn after_three_moves_the_stream_ends_with_one_error_event() {
    let (first, second, harness) = two_workers().await;
    first.always(Act::DieAfter(2));
    second.always(Act::DieAfter(2));
    let answer = harness.chat(&ask(true)).await;
    assert_eq!(answer.status, 200);
    let events = sse(&answer.text);
    let errors: Vec<&String> = events.iter().filter(|event| event.contains("\"error\"")).collect();
    assert_eq!(errors.len(), 1);
    assert_eq!(events.last(), errors.first().copied(), "the error is the end");
    let error: Value = serde_json::from_str(errors[0]).expect("JSON");
    assert_eq!(error["error"]["code"], "worker_lost");
    let shown: String = events
        .iter()
        .filter_map(|event| {
            let event: Value = serde_json::from_str(event).ok()?;
            Some(event.pointer("/choices/0/delta/content")?.as_str()?.to_owned())
        })
        .collect();
    let prompt = first.generated().into_iter().chain(second.generated()).find(|r| r.generated == 0);
    assert_eq!(shown, text(&oracle(&prompt.expect("a call").tokens, 3, 8)), "two tokens from each of four");
    assert_eq!(moved(&harness, "moved").await as u32, 3);
    assert_eq!(moved(&harness, "lost").await as u32, 1);
    // Nothing had begun for a client that takes the answer as a whole: it gets a status.
    assert_eq!(harness.chat(&ask(false)).await.status, 502);
    assert!(harness.metric("baton_router_requests_ended_total{outcome=\"failed\"}").await > 1.5);
    harness.finish().await;
}

#[tokio::test]
async fn workers_that_are_full_or_away_use_up_no_moves() {
    for code in [FailureCode::Overloaded, FailureCode::Unavailable] {
        let (first, second, harness) = {
            let first = FakeWorker::start("decode-0", Role::Decode).await;
            let second = FakeWorker::start("decode-1", Role::Decode).await;
            let harness = Harness::start(&[&first, &second], |options| {
                alone(options);
                options.timeouts.replacement = PATIENCE;
            })
            .await;
            (first, second, harness)
        };
        for worker in [&first, &second] {
            worker.then(Act::DieAfter(5));
            for _ in 0..3 {
                worker.then(Act::Status(503, code));
            }
        }
        let answer = harness.chat(&ask(true)).await;
        let prompt = first.generated().into_iter().chain(second.generated()).find(|r| r.generated == 0);
        let expected = text(&oracle(&prompt.expect("a call").tokens, 3, 20));
        assert_eq!(answer.content(0), expected, "{code:?}");
        assert_eq!(moved(&harness, "moved").await as u32, 2, "{code:?}");
        assert_eq!(moved(&harness, "lost").await as u32, 0, "{code:?}");
        harness.finish().await;
    }
}

#[tokio::test]
async fn the_only_worker_is_asked_again_when_its_connection_breaks() {
    for framed in [true, false] {
        for begun in [0, 5] {
            let worker = FakeWorker::start("decode-0", Role::Decode).await;
            if !framed {
                worker.without_frames();
            }
            let harness = Harness::start(&[&worker], |options| {
                alone(options);
                options.timeouts.replacement = PATIENCE;
            })
            .await;
            for stream in [true, false] {
                worker.then(Act::DieAfter(begun));
                let answer = harness.chat(&ask(stream)).await;
                assert_eq!(answer.status, 200, "{framed} {begun}: {}", answer.text);
                let prompt = worker.generated().into_iter().find(|request| request.generated == 0);
                let expected = text(&oracle(&prompt.expect("a call").tokens, 3, 20));
                assert_eq!(answer.content(0), expected, "{framed} {begun}");
            }
            worker.always(Act::DieAfter(0));
            assert_eq!(harness.chat(&ask(true)).await.status, 502, "but not for ever");
            harness.finish().await;
        }
    }
}

#[tokio::test]
async fn a_host_that_dies_with_all_its_workers_loses_no_request() {
    let living = FakeWorker::start("decode-0", Role::Decode).await;
    let dying = FakeWorker::start("decode-1", Role::Decode).await;
    let harness = Harness::start(&[&dying], alone).await;
    dying.always(Act::SilentAfter(5));
    let show = async |members: &[Member], age_s: u64| {
        let roster = Roster { members: members.to_vec(), age: Duration::from_secs(age_s) };
        harness.members.send_replace(Arc::new(roster));
        let shown =
            async || harness.metric("baton_router_view_age_seconds").await as u64 / 100 == age_s / 100;
        harness.until("the view arrived", shown).await;
    };
    for round in 0..4 {
        let (mut left, mut kept) = (vec![living.member.clone()], Vec::new());
        for i in 0..8 {
            let (socket, address) = nowhere();
            kept.push(socket);
            let mut member = living.member.clone();
            member.worker = format!("gone-{round}-{i}").parse().expect("a name");
            member.address = address;
            left.push(member);
        }
        // A stream that has begun, on a worker that stops; the view still has the others of its host.
        show(std::slice::from_ref(&dying.member), 100).await;
        let calls = dying.generated().len();
        let body = ask(true);
        let (begun, ()) = tokio::join!(harness.chat(&body), async {
            harness.until("it has begun", async || dying.generated().len() > calls).await;
            show(&left, 200).await;
        });
        assert_eq!(begun.content(0).len(), 20, "{}", begun.text);
        // And one that has not; the dead ones are in another life, so nothing is known of them.
        left.iter_mut().skip(1).for_each(|member| member.epoch = Epoch(2));
        show(&left, 300).await;
        let answer = harness.chat(&ask(true)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.content(0).len(), 20, "{}", answer.text);
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_worker_that_generates_too_much_is_cut_off_and_nobody_is_asked_for_nothing() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], alone).await;
    worker.always(Act::Say(vec![100; 25]));
    let answer = harness.chat(&ask(true)).await;
    assert_eq!(answer.content(0), "d".repeat(20));
    assert_eq!(worker.generated().len(), 1);
    harness.finish().await;
}

#[tokio::test]
async fn a_running_digest_cannot_be_taken_up_elsewhere() {
    let (first, second, harness) = two_workers().await;
    first.always(Act::DieAfter(2));
    second.always(Act::DieAfter(2));
    let mut body = ask(true);
    body["baton"] = json!({ "logits_digest": true });
    let answer = harness.chat(&body).await;
    assert!(answer.text.contains("worker_lost"));
    assert_eq!(first.generated().len() + second.generated().len(), 1);
    harness.finish().await;
}

#[tokio::test]
async fn an_end_that_the_worker_could_not_say_is_still_an_end() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], alone).await;
    worker.always(Act::CloseAfter(20));
    let answer = harness.chat(&ask(false)).await;
    assert_eq!(answer.json()["choices"][0]["finish_reason"], "length");
    assert_eq!(worker.generated().len(), 1);
    // Also of a stream that nobody else could take up.
    let mut body = ask(false);
    body["baton"] = json!({ "logits_digest": true });
    assert_eq!(harness.chat(&body).await.json()["choices"][0]["finish_reason"], "length");
    // And of one that ended before its limit.
    worker.always(Act::SayAndDie(vec![100, 101, EOS]));
    let answer = harness.chat(&ask(false)).await;
    assert_eq!(answer.json()["choices"][0]["finish_reason"], "stop");
    assert_eq!((answer.content(0).as_str(), worker.generated().len()), ("de", 3));
    // Unless that token was to end nothing.
    worker.always(Act::Good).then(Act::SayAndDie(vec![100, 101, EOS]));
    let mut body = ask(false);
    body["ignore_eos"] = json!(true);
    assert_eq!(harness.chat(&body).await.json()["choices"][0]["finish_reason"], "length");
    assert_eq!((worker.generated().len(), worker.generated()[4].generated), (5, 3));
    assert_eq!(
        (moved(&harness, "moved").await + moved(&harness, "lost").await) as u32,
        1,
        "nothing else had to move"
    );
    harness.finish().await;
}

#[tokio::test]
async fn a_token_that_the_model_does_not_have_is_not_passed_on() {
    for beyond in [VOCAB, 1 << 30] {
        let worker = FakeWorker::start("decode-0", Role::Decode).await;
        let harness = Harness::start(&[&worker], alone).await;
        worker.then(Act::Say(vec![100, beyond, 100]));
        let answer = harness.chat(&ask(true)).await;
        let asked = worker.generated();
        assert_eq!((asked.len(), asked[1].generated), (2, 1), "it is asked again from before that token on");
        assert_eq!(answer.content(0), format!("d{}", text(&oracle(&asked[1].tokens, 3, 19))));
        harness.finish().await;
    }
}

/// Who gives tokens lives, however slowly it does, and whatever becomes of other questions put to it.
#[tokio::test]
async fn a_worker_that_goes_on_slowly_is_not_given_up() {
    for framed in [true, false] {
        let worker = FakeWorker::start("decode-0", Role::Decode).await;
        worker.always(Act::Slow(Duration::from_millis(350)));
        if !framed {
            worker.without_frames();
        }
        let harness = Harness::start(&[&worker], |options| {
            alone(options);
            options.timeouts.progress = Duration::from_secs(3);
            options.timeouts.frozen = Duration::from_secs(2);
        })
        .await;
        worker.hide_state();
        let mut body = ask(true);
        body["max_tokens"] = json!(12);
        assert_eq!(harness.chat(&body).await.content(0).len(), 12);
        assert_eq!(worker.generated().len(), 1, "{framed}");
        harness.finish().await;
    }
}

#[tokio::test]
async fn a_stream_waits_for_its_only_worker_to_come_back() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |options| {
        alone(options);
        options.timeouts.replacement = PATIENCE;
    })
    .await;
    worker.then(Act::DieAfter(4));
    let mut member = worker.member.clone();
    let body = ask(true);
    let (answer, ()) = tokio::join!(harness.chat(&body), async {
        harness.until("the worker is lost", async || !worker.generated().is_empty()).await;
        member.epoch = Epoch(2);
        let roster = Roster { members: vec![member.clone()], age: Duration::ZERO };
        harness.members.send_replace(Arc::new(roster));
    });
    assert_eq!(answer.content(0), text(&oracle(&worker.generated()[0].tokens, 3, 20)));
    harness.finish().await;
}

#[tokio::test]
async fn a_worker_that_refuses_connections_is_avoided() {
    let (first, _second, harness) = two_workers().await;
    let (_socket, address) = nowhere();
    let mut member = first.member.clone();
    member.worker = "decode-2".parse().expect("a name");
    member.address = address;
    let members = vec![member, first.member.clone()];
    harness.members.send_replace(Arc::new(Roster { members, age: Duration::ZERO }));
    for _ in 0..4 {
        assert_eq!(harness.chat(&ask(false)).await.status, 200);
    }
    harness.finish().await;
}

#[tokio::test]
async fn prefill_trouble_never_fails_a_request() {
    for trouble in ["status", "hang", "gone"] {
        let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
        let decode = FakeWorker::start("decode-0", Role::Decode).await;
        let harness = Harness::start(&[&prefill, &decode], |_| {}).await;
        let (_socket, address) = nowhere();
        match trouble {
            "status" => {
                prefill.fail_prefill(500, FailureCode::Engine);
            }
            "hang" => {
                prefill.hang_prefill();
            }
            _ => {
                let mut members = vec![prefill.member.clone(), decode.member.clone()];
                members[0].address.clone_from(&address);
                members[0].epoch = Epoch(9);
                harness.members.send_replace(Arc::new(Roster { members, age: Duration::ZERO }));
            }
        }
        for _ in 0..3 {
            let answer = harness.chat(&ask(true)).await;
            assert_eq!(answer.status, 200, "{trouble}: {}", answer.text);
            assert_eq!(answer.content(0).len(), 20, "{trouble}");
        }
        if trouble != "hang" {
            let first = decode.generated()[0].handoff.as_ref().expect("a handoff").id.to_string();
            harness
                .until("the decode worker is told", async || {
                    decode.seen.ended.lock().expect("unpoisoned").contains(&first)
                })
                .await;
        }
        harness.finish().await;
    }
}

#[tokio::test]
async fn both_sides_of_a_replay_know_what_was_generated_before() {
    let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
    let decode = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&prefill, &decode], |_| {}).await;
    decode.then(Act::DieAfter(5));
    assert_eq!(harness.chat(&ask(true)).await.status, 200);
    let (asked, prefilled) = (decode.generated(), prefill.prefilled());
    assert_eq!((asked[0].generated, asked[1].generated), (0, 5));
    // The first token is chosen there: penalties count what was said before.
    let replay = asked[1].handoff.as_ref().expect("a handoff");
    let there = prefilled.iter().find(|request| request.handoff.id == replay.id).expect("a prefill");
    assert_eq!((there.generated, &there.tokens, &there.sampling.seed), (5, &asked[1].tokens, &3));
    harness.finish().await;
}

#[tokio::test]
async fn both_sides_of_a_handoff_are_told_the_same_of_it() {
    let key = mint("k").expect("a key");
    let directory = tempfile::tempdir().expect("a directory");
    let keys = directory.path().join("keys.yaml");
    std::fs::write(&keys, format!("version: 1\ntenants:\n- name: acme\n  keys:\n  {}\n", key.line))
        .expect("written");
    let prefill = FakeWorker::start("prefill-0", Role::Prefill).await.in_life(7);
    let decode = FakeWorker::start("decode-0", Role::Decode).await.in_life(8);
    let harness = Harness::start(&[&prefill, &decode], |options| {
        options.auth = Some(AuthSpec::new(keys, Isolation::Tenant));
    })
    .await;
    let mut body = ask(false);
    body["baton"] = json!({ "logits_digest": true });
    let request = Request::post(format!("http://{}/v1/chat/completions", harness.address))
        .header("authorization", format!("Bearer {}", key.key))
        .body(Full::new(Bytes::from(body.to_string())))
        .expect("a request");
    assert_eq!(harness.client.request(request).await.expect("an answer").status(), 200);
    harness.until("both were asked", async || !prefill.prefilled().is_empty()).await;
    let (there, here) = (prefill.prefilled().remove(0), decode.generated().remove(0));
    assert_ne!(here.cache_salt, 0, "blocks are kept apart for each tenant");
    assert_eq!((there.cache_salt, there.logits_digest), (here.cache_salt, here.logits_digest));
    assert_eq!((&there.tokens, &there.sampling), (&here.tokens, &here.sampling));
    assert!(here.logits_digest && there.request_id == here.request_id);
    let (to_decode, to_prefill) = (here.handoff.expect("a handoff"), there.handoff);
    assert_eq!(to_decode.id, to_prefill.id);
    assert_eq!((to_decode.own_epoch, to_prefill.own_epoch), (Epoch(8), Epoch(7)));
    for (peer, is) in [(to_decode.peer, &prefill.member), (to_prefill.peer, &decode.member)] {
        assert_eq!((&peer.worker, peer.epoch, &peer.address), (&is.worker, is.epoch, &is.address));
    }
    harness.finish().await;
}

#[tokio::test]
async fn a_decode_worker_that_does_without_the_blocks_says_nothing_about_its_pair() {
    // What fails twice in a row is avoided; an import that went well between the two makes the count begin anew.
    for (between, asked) in [(Act::Good, 3), (Act::Import(5), 4)] {
        let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
        let decode = FakeWorker::start("decode-0", Role::Decode).await;
        let harness = Harness::start(&[&prefill, &decode], |_| {}).await;
        decode.then(Act::GiveUp).then(between.clone()).then(Act::GiveUp).then(Act::Good);
        for _ in 0..4 {
            assert_eq!(harness.chat(&ask(false)).await.status, 200);
        }
        let handoffs = decode.generated().iter().filter(|request| request.handoff.is_some()).count();
        assert_eq!(handoffs, asked, "{between:?}");
        harness.finish().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_cancels_both_sides_in_every_phase() {
    let prefill = FakeWorker::start("prefill-0", Role::Prefill).await;
    let decode = FakeWorker::start("decode-0", Role::Decode).await;
    prefill.hang_prefill();
    let harness = Harness::start(&[&prefill, &decode], |_| {}).await;
    let busy = async || {
        decode.seen.open.load(Ordering::SeqCst) == 1 && prefill.seen.prefilling.load(Ordering::SeqCst) == 1
    };
    let idle = async || {
        decode.seen.open.load(Ordering::SeqCst) == 0 && prefill.seen.prefilling.load(Ordering::SeqCst) == 0
    };
    for (act, stream, reads) in [
        (Act::SilentAfter(0), true, false),
        (Act::SilentAfter(0), false, false),
        (Act::SilentAfter(3), true, true),
        (Act::Slow(Duration::from_millis(50)), true, true),
    ] {
        decode.always(act);
        let request = harness.send("POST", "/v1/chat/completions", ask(stream).to_string());
        let mut request = Box::pin(request);
        if reads {
            let mut response = request.await;
            response.body_mut().frame().await.expect("a frame").expect("bytes");
            harness.until("both sides are busy", busy).await;
            drop(response);
        } else {
            tokio::select! {
                _ = &mut request => panic!("no answer can come"),
                () = harness.until("both sides are busy", busy) => {}
            }
            drop(request);
        }
        harness.until("both sides are cancelled", idle).await;
    }
    let left = "baton_router_requests_total{code=\"499\",route=\"/v1/chat/completions\"}";
    harness.until("four clients left", async || harness.metric(left).await > 3.5).await;
    harness.finish().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_the_worker_back() {
    let (first, second, harness) = two_workers().await;
    first.always(Act::Endless);
    second.always(Act::Endless);
    let mut body = ask(true);
    body["max_tokens"] = json!(400);
    body["ignore_eos"] = json!(true);
    body["n"] = json!(100);
    // Some 60 MB in all, far more than the buffers of the kernel hold.
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(20);
    let response = harness.send("POST", "/v1/chat/completions", body.to_string()).await;
    assert_eq!(response.status(), 200);
    let sent = || first.seen.sent.load(Ordering::SeqCst) + second.seen.sent.load(Ordering::SeqCst);
    // Stands still: nothing is taken from the workers that the client does not take.
    harness
        .until("the workers stand still", async || {
            let before = sent();
            tokio::time::sleep(Duration::from_millis(200)).await;
            before == sent()
        })
        .await;
    let open = || first.seen.open.load(Ordering::SeqCst) + second.seen.open.load(Ordering::SeqCst);
    // What the first choices sent fills the sockets; nobody reads on, so the other ones are not even begun.
    let begun = first.generated().len() + second.generated().len();
    assert!(begun < 100, "the whole answer was taken from the workers");
    drop(response);
    harness.until("all are cancelled", async || open() == 0).await;
    harness.finish().await;
}

#[tokio::test]
async fn a_draining_worker_gets_nothing_new() {
    let (first, second, harness) = two_workers().await;
    let mut members = vec![first.member.clone(), second.member.clone()];
    members[0].ready = false;
    harness.members.send_replace(Arc::new(Roster { members, age: Duration::from_secs(60) }));
    harness
        .until("the view arrived", async || harness.metric("baton_router_view_age_seconds").await > 59.0)
        .await;
    for _ in 0..4 {
        assert_eq!(harness.chat(&ask(false)).await.status, 200, "a stale view is served from");
    }
    assert_eq!((first.generated().len(), second.generated().len()), (0, 4));
    harness.finish().await;
}
