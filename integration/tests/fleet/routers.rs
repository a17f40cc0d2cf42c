//! Several routers in front of one fleet, with no word between them: none of them disturbs what another one has under way.

use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::process::eventually;
use baton_integration::scenario::ask;
use baton_integration::{Answer, Fleet, FleetOptions, Part, Prompt, prompts};
use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);
/// Blocks of a request whose router has gone, on a loaded machine.
const FREED_WITHIN: Duration = Duration::from_secs(5);

/// Another router of a fleet.
async fn router(fleet: &Fleet) -> Part {
    let file = fleet.directory().join("fleet.yaml");
    let router = Part::start(&file, "router", &["router", "--conductor", &fleet.conductor]);
    router.until_ready(PATIENCE).await;
    router
}

async fn expected(prompts: &[Prompt]) -> Vec<Answer> {
    let roomy = "  - { name: all, role: both, kv: { memory: 64MiB } }\n";
    let fleet = Fleet::start(FleetOptions::tiny(roomy)).await;
    let client = fleet.client();
    let answers = join_all(prompts.iter().map(|prompt| ask(&client, prompt))).await;
    fleet.stop().await;
    answers
}

/// Two routers put the same requests in different orders before workers that have room for a few.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_short_of_blocks_answer_what_several_routers_send() {
    let prompts: Vec<Prompt> =
        (0..80).map(|seed| Prompt::Tokens(prompts::random_tokens(seed, 100 + seed as usize * 9))).collect();
    let expected = expected(&prompts).await;
    for pools in [
        "  - { name: all, role: both, replicas: 2, kv: { memory: 2MiB } }\n",
        "  - { name: prefill, role: prefill, replicas: 2, kv: { memory: 1MiB } }\n  - { name: decode, role: decode, replicas: 2, kv: { memory: 1MiB } }\n",
    ] {
        let mut options = FleetOptions::tiny(pools);
        options.document = options.document.replace("router: {", "router: { disaggregation: always,");
        let fleet = Fleet::start(options).await;
        let second = router(&fleet).await;
        let clients = [fleet.client(), Client::new(&second.url)];
        let all = join_all(
            prompts.iter().enumerate().map(|(index, prompt)| ask(&clients[index % clients.len()], prompt)),
        );
        let got = timeout(Duration::from_secs(60), all).await.expect("nobody waits for ever");
        for (want, got) in expected.iter().zip(&got) {
            assert_eq!(want.proof(), got.proof(), "{:?}", got.baton);
        }
        fleet.eventually_nothing_held(FREED_WITHIN).await;
        fleet.stop().await;
    }
}

/// What a router that is gone had under way ends at the workers; the rest goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_dies_takes_only_its_own_requests_along() {
    let prompts: Vec<Prompt> =
        (100..108).map(|seed| Prompt::Tokens(prompts::random_tokens(seed, 600))).collect();
    let expected = expected(&prompts).await;
    let fleet = Fleet::start(FleetOptions::tiny(
        "  - { name: prefill, role: prefill, kv: { memory: 8MiB } }\n  - { name: decode, role: decode, kv: { memory: 8MiB } }\n",
    ))
    .await;
    let second = router(&fleet).await;
    let mut lost = JoinSet::new();
    for prompt in prompts.clone() {
        let client = Client::new(&second.url);
        // Takes longer than all that follows, unless it is cancelled.
        lost.spawn(async move { client.complete(&prompt, 6000, &json!({"ignore_eos": true})).await });
    }
    eventually("its requests are decoded", PATIENCE, async || {
        let status = fleet.status().await;
        let running = status["workers"].as_array()?.iter().filter_map(|it| it["requests_running"].as_u64());
        (running.sum::<u64>() >= 4).then_some(())
    })
    .await;
    let client = fleet.client();
    let answers = async {
        let others = join_all(prompts.iter().map(|prompt| ask(&client, prompt)));
        let killed = async { second.signal(Signal::KILL) };
        tokio::join!(others, killed).0
    };
    let got = timeout(PATIENCE, answers).await.expect("the others are answered");
    for (want, got) in expected.iter().zip(&got) {
        assert_eq!(want.proof(), got.proof(), "{:?}", got.baton);
    }
    fleet.eventually_nothing_held(FREED_WITHIN).await;
    let status = fleet.status().await;
    for worker in status["workers"].as_array().expect("workers") {
        let busy = (&worker["requests_running"], &worker["requests_waiting"]);
        assert_eq!(busy, (&json!(0), &json!(0)), "nobody awaits these: {worker}");
    }
    while let Some(answer) = lost.join_next().await {
        assert!(answer.expect("no panic").is_err(), "its router was killed before the end");
    }
    fleet.stop().await;
}
