//! Faults at random, one after the other, while clients ask: no wrong token, no failed or hung request, nothing held
//! afterwards. `BATON_SOAK_SECONDS` makes it longer, `BATON_SOAK_SEED` different; a failure names both.

use std::time::{Duration, Instant};

use baton_integration::client::Client;
use baton_integration::process::{alive, eventually, signal};
use baton_integration::scenario::counter;
use baton_integration::{Answer, Fleet, FleetOptions, Prompt, prompts};
use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const CLIENTS: usize = 8;
/// Workers that are frozen for longer are given up and join again.
const LEASE: Duration = Duration::from_secs(3);
/// Of workers that were killed or frozen last, on a loaded machine.
const BACK_WITHIN: Duration = Duration::from_secs(40);

/// Three geometries, over whatever moves blocks here, everything handed off.
const POOLS: &str = "  - { name: p, role: prefill, replicas: 2, kv: { block_tokens: 32, layout: nhd, memory: 4MiB }, transfer: { backends: [shm, cma, libfabric, ucx, tcp] } }
  - { name: d, role: decode, replicas: 2, kv: { block_tokens: 16, layout: hnd, memory: 4MiB }, transfer: { backends: [tcp, ucx, libfabric, cma, shm] } }
  - { name: b, role: both, kv: { block_tokens: 24, layout: nhd, memory: 4MiB }, transfer: { backends: [libfabric, ucx, tcp] } }
";

#[expect(clippy::disallowed_methods, reason = "how long, and with which faults, is up to who runs the test")]
fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect("a whole number"))
}

/// A request and how many tokens its answer has.
type Request = (Prompt, u32);

/// Short and long ones; every third begins as others do.
fn requests(seed: u64) -> Vec<Request> {
    let shared = prompts::random_tokens(seed, 500);
    let request = |index: usize| {
        let length = [3, 17, 40, 100, 200, 350, 700][index % 7];
        let mut tokens = prompts::random_tokens(seed + 1 + index as u64, length);
        if index.is_multiple_of(3) {
            let same = length / 2;
            tokens[..same].copy_from_slice(&shared[..same]);
        }
        (Prompt::Tokens(tokens), [1, 8, 40, 250][index % 4])
    };
    (0..56).map(request).collect()
}

/// With the digest of the logits a request stays with its worker: it may be told that this one was lost.
async fn ask(client: &Client, (prompt, tokens): &Request, digest: bool) -> Result<Answer, anyhow::Error> {
    let extra = json!({ "ignore_eos": true, "baton": { "token_ids": true, "logits_digest": digest } });
    client.complete(prompt, *tokens, &extra).await
}

/// Asks on and on; how many answers there were, each as expected. None takes longer than the client waits.
async fn load(client: Client, pairs: &[(Request, Answer)], first: usize, stop: &CancellationToken) -> usize {
    let mut answered = 0;
    for (at, (request, want)) in pairs.iter().cycle().skip(first * pairs.len() / CLIENTS).enumerate() {
        if stop.is_cancelled() {
            break;
        }
        let digest = at.is_multiple_of(3);
        match ask(&client, request, digest).await {
            Ok(got) => {
                assert_eq!(want.tokens, got.tokens, "{:?}", got.baton);
                assert!(!digest || want.digest == got.digest, "{:?}", got.baton);
                answered += 1;
            }
            Err(error) => assert!(digest && error.to_string().contains("worker_lost"), "{error:#}"),
        }
    }
    answered
}

/// Kills workers, and freezes them for less and for more than a lease; how often.
async fn break_things(fleet: &Fleet, seed: u64, until: Instant) -> usize {
    let mut numbers =
        prompts::random_tokens(seed ^ 0x50a4, 100_000).into_iter().cycle().map(|number| number as usize);
    let mut draw = |below: usize| numbers.next().map_or(0, |number| number % below);
    let (start, mut count, mut thaws) = (Instant::now(), 0, JoinSet::new());
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(300 + 10 * draw(250) as u64)).await;
        let pool = ["p", "d", "b"][draw(3)];
        let workers = fleet.workers(pool).await;
        let Some((name, pid)) = workers.get(draw(2) % workers.len().max(1)).filter(|(_, pid)| alive(*pid))
        else {
            continue;
        };
        let frozen = [200, 1000, 5000][draw(3)];
        let what = if draw(2) == 0 { "killed".to_owned() } else { format!("frozen for {frozen} ms") };
        println!("{:.1} s: {name} {what}", start.elapsed().as_secs_f64());
        count += 1;
        if what == "killed" {
            signal(*pid, Signal::KILL);
            continue;
        }
        signal(*pid, Signal::STOP);
        let pid = *pid;
        thaws.spawn(async move {
            tokio::time::sleep(Duration::from_millis(frozen)).await;
            if alive(pid) {
                signal(pid, Signal::CONT);
            }
        });
    }
    thaws.join_all().await;
    count
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_faults_cost_no_token_and_nothing_is_held_afterwards() {
    let (seconds, seed) =
        (from_environment("BATON_SOAK_SECONDS", 10), from_environment("BATON_SOAK_SEED", 1));
    println!("BATON_SOAK_SECONDS={seconds} BATON_SOAK_SEED={seed}");
    let requests = requests(seed);
    let alone =
        Fleet::start(FleetOptions::tiny("  - { name: all, role: both, kv: { memory: 64MiB } }\n")).await;
    let client = alone.client();
    let answers = join_all(requests.iter().map(|request| ask(&client, request, true))).await;
    alone.stop().await;
    let answers = answers.into_iter().map(|answer| answer.expect("an undisturbed answer"));
    let pairs: Vec<(Request, Answer)> = requests.into_iter().zip(answers).collect();

    let mut options = FleetOptions::tiny(POOLS);
    options.document = options.document.replace(
        "router: {",
        &format!(
            "conductor: {{ listen: 127.0.0.1:0, lease_ttl_ms: {} }}\nrouter: {{ disaggregation: always,",
            LEASE.as_millis()
        ),
    );
    let fleet = Fleet::start(options).await;
    let stop = CancellationToken::new();
    let asking = join_all((0..CLIENTS).map(|first| load(fleet.client(), &pairs, first, &stop)));
    let faults = async {
        let faults = break_things(&fleet, seed, Instant::now() + Duration::from_secs(seconds)).await;
        eventually("all workers are ready again", BACK_WITHIN, async || {
            let status = fleet.status().await;
            let workers = status["workers"].as_array()?;
            // One that was killed just now is in the view until its lease is over.
            let is_back = |worker: &serde_json::Value| {
                let pid = worker["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
                worker["state"] == "ready" && pid.is_some_and(alive)
            };
            (workers.len() == 5 && workers.iter().all(is_back)).then_some(())
        })
        .await;
        stop.cancel();
        faults
    };
    let (answered, faults) = tokio::join!(asking, faults);
    let answered = answered.iter().sum::<usize>();
    println!("{answered} answers");
    assert!(faults as u64 >= seconds / 8, "too little was broken");
    assert!(answered > pairs.len(), "too little was asked");
    fleet.eventually_nothing_held(BACK_WITHIN).await;
    // Every worker does all its work again, and found nothing amiss.
    let client = fleet.client();
    for (request, want) in &pairs {
        let got = ask(&client, request, true).await.expect("all is well again");
        assert_eq!(want.proof(), got.proof(), "{:?}", got.baton);
    }
    for pool in ["p", "d", "b"] {
        for (name, _) in fleet.workers(pool).await {
            let failures = counter(&fleet, &name, "baton_agent_audit_failures_total").await;
            assert_eq!(failures, 0.0, "{name}");
        }
    }
    fleet.stop().await;
}
