//! The prefix index over real processes: prompts go where their KV is, and only as long as it is there.

use std::time::Duration;

use baton_integration::client::{Answer, Prompt};
use baton_integration::fleet::{Fleet, FleetOptions};
use baton_integration::process::{alive, eventually, signal};
use baton_integration::prompts;
use baton_integration::scenario::ask;
use rustix::process::Signal;
use serde_json::json;

/// From a change of a worker's cache to the router's knowing.
const KNOWN_WITHIN: Duration = Duration::from_secs(10);

async fn index_blocks(fleet: &Fleet) -> u64 {
    let text = fleet.get_text(&format!("{}/metrics", fleet.router)).await;
    let line = text.lines().find(|line| line.starts_with("baton_router_index_blocks ")).expect("exported");
    line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
}

fn decoder(answer: &Answer) -> String {
    answer.baton["decode_worker"].as_str().expect("a worker").to_owned()
}

fn cached(answer: &Answer) -> u64 {
    answer.baton["prefill"]["cached_tokens"].as_u64().expect("a number")
}

#[tokio::test]
async fn a_prompt_comes_back_to_its_cache_until_that_is_gone() {
    let pools = "  - { name: all, role: both, replicas: 2, kv: { block_tokens: 16, memory: 64MiB } }\n";
    let fleet = Fleet::start(FleetOptions::tiny(pools)).await;
    let client = fleet.client();
    let prompt = Prompt::Tokens(prompts::random_tokens(77, 640));
    let first = ask(&client, &prompt).await;
    assert_eq!(cached(&first), 0);
    let owner = decoder(&first);
    eventually("the router knows", KNOWN_WITHIN, async || (index_blocks(&fleet).await >= 40).then_some(()))
        .await;
    for _ in 0..5 {
        let again = ask(&client, &prompt).await;
        assert_eq!(decoder(&again), owner, "{:?}", again.baton);
        assert!(cached(&again) >= 624, "{:?}", again.baton);
        assert_eq!(again.proof(), first.proof());
    }
    // The worker dies, and its cache with it; the other one has nothing.
    let workers = fleet.workers("all").await;
    let (name, pid) = workers.iter().find(|(name, _)| *name == owner).expect("the owner").clone();
    signal(pid, Signal::KILL);
    eventually("its blocks are gone", KNOWN_WITHIN * 3, async || {
        (index_blocks(&fleet).await == 0).then_some(())
    })
    .await;
    eventually("the worker is back", Duration::from_secs(30), async || {
        let workers = fleet.workers("all").await;
        workers.into_iter().find(|(back, new)| *back == name && *new != pid && alive(*new))
    })
    .await;
    let after = ask(&client, &prompt).await;
    assert_eq!(cached(&after), 0, "{:?}", after.baton);
    assert_eq!(after.proof(), first.proof());
    fleet.stop().await;
}

#[tokio::test]
async fn a_handoff_goes_to_the_decode_worker_that_lacks_least_and_moves_only_that() {
    let mut options = FleetOptions::tiny(
        "  - { name: prefill, role: prefill, kv: { block_tokens: 16, memory: 64MiB } }\n  \
         - { name: decode, role: decode, replicas: 3, kv: { block_tokens: 16, memory: 64MiB } }\n",
    );
    options.document =
        options.document.replace("listen: 127.0.0.1:0 }", "listen: 127.0.0.1:0, disaggregation: always }");
    let fleet = Fleet::start(options).await;
    let client = fleet.client();
    let shared = prompts::random_tokens(5, 640);
    let with_tail = |seed| {
        let mut tokens = shared.clone();
        tokens.extend(prompts::random_tokens(seed, 100));
        Prompt::Tokens(tokens)
    };
    let first = client.complete(&with_tail(1), 4, &json!({})).await.unwrap();
    assert!(first.imported_bytes() > 0, "{:?}", first.baton);
    // 46 whole blocks at P and at D.
    eventually("the router knows", KNOWN_WITHIN, async || (index_blocks(&fleet).await >= 46).then_some(()))
        .await;
    for seed in 2..6 {
        let next = client.complete(&with_tail(seed), 4, &json!({})).await.unwrap();
        assert_eq!(decoder(&next), decoder(&first), "{:?}", next.baton);
        assert_eq!(cached(&next), 640, "{:?}", next.baton);
        assert!(next.imported_bytes() * 5 < first.imported_bytes(), "{:?}", next.baton);
    }
    fleet.stop().await;
}
