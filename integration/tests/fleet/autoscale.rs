//! Pools that follow the load: real processes under `baton up`, with a modelled engine that takes its time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use baton_integration::process::{children, eventually, signal};
use baton_integration::{Client, Fleet, FleetOptions, Prompt, prompts};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// For one step of the autoscaler and a worker's start, on a machine that is busy with other tests.
const STEP: Duration = Duration::from_secs(40);
/// A prefill worker computes 2,000 tokens a second: one of these keeps it busy for 0.2 s.
const PROMPT_TOKENS: usize = 400;
const CLIENTS: u64 = 12;

/// One prefill worker that may become `max`, one decode worker.
fn fleet(autoscale: &str) -> FleetOptions {
    let sim = "decode_us_base: 1000, decode_us_per_seq: 10, prefill_ns_per_token2: 0, prefill_us_base: 1000";
    let mut options = FleetOptions::tiny(&format!(
        "  - name: prefill\n    role: prefill\n    engine: {{ kind: sim, {sim}, prefill_us_per_token: 500 }}\n    kv: {{ memory: 32MiB }}\n    autoscale: {{ {autoscale}, target: {{ queue_wait_ms: 300 }}, up_after_ms: 1000, down_after_ms: 3000 }}\n  - name: decode\n    role: decode\n    engine: {{ kind: sim, {sim}, prefill_us_per_token: 500 }}\n    kv: {{ memory: 64MiB }}\n"
    ));
    options.document = options.document.replace(
        "router: { listen: 127.0.0.1:0 }",
        "conductor: { lease_ttl_ms: 2000 }\nrouter: { listen: 127.0.0.1:0, disaggregation: always }",
    );
    options
}

/// Clients that ask one prompt after the other, with a pause between, until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: JoinSet<Result<(), String>>,
}

impl Load {
    fn start(client: &Client, clients: u64, pause: Duration) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut set = JoinSet::new();
        for who in 0..clients {
            let (client, stop, answered) = (client.clone(), stop.clone(), answered.clone());
            set.spawn(async move {
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let tokens = prompts::random_tokens(who * 100_000 + round, PROMPT_TOKENS);
                    let answer =
                        client.complete(&Prompt::Tokens(tokens), 4, &json!({"ignore_eos": true})).await;
                    let answer = answer.map_err(|error| format!("client {who}, round {round}: {error:#}"))?;
                    if answer.tokens.len() != 4 {
                        return Err(format!("client {who}, round {round}: {answer:?}"));
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(pause).await;
                }
                Ok(())
            });
        }
        Self { stop, answered, clients: set }
    }

    /// Waits for the requests in flight; how many were answered.
    async fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(done) = self.clients.join_next().await {
            if let Err(failure) = done.expect("joined") {
                panic!("{failure}");
            }
        }
        self.answered.load(Ordering::Relaxed)
    }
}

/// The pool as the conductor has it; `None` while there is no conductor.
async fn pool(fleet: &Fleet) -> Option<Value> {
    let url = format!("{}/v1/pools", fleet.conductor);
    let answer =
        baton_conductor::http::client().get(url).timeout(Duration::from_secs(5)).send().await.ok()?;
    let list: Value = answer.json().await.ok()?;
    list["pools"].as_array()?.iter().find(|pool| pool["name"] == "prefill").cloned()
}

async fn ready(fleet: &Fleet, count: u64) {
    eventually(&format!("{count} prefill workers are ready, and no other"), STEP, async || {
        let pool = pool(fleet).await?;
        let others = pool["draining"].as_u64()? + pool["joining"].as_u64()?;
        (pool["ready"] == count && pool["desired"] == count && others == 0).then_some(())
    })
    .await;
}

fn command(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ")
}

fn pids(fleet: &Fleet, words: &str) -> BTreeSet<u32> {
    children(fleet.launcher_pid()).into_iter().filter(|pid| command(*pid).contains(words)).collect()
}

/// Prompt tokens that each prefill worker has computed.
async fn prefilled(fleet: &Fleet) -> Option<Vec<u64>> {
    let list = fleet.get_json(&format!("{}/v1/workers", fleet.conductor)).await;
    let mut all = Vec::new();
    for worker in list["workers"].as_array()?.iter().filter(|worker| worker["pool"] == "prefill") {
        let state = fleet.get_json(&format!("http://{}/v1/state", worker["address"].as_str()?)).await;
        all.push(state["prefilled_tokens"].as_u64()?);
    }
    Some(all)
}

#[tokio::test]
async fn a_prefill_pool_follows_a_load_step_up_and_down_and_no_request_fails() {
    let fleet = Fleet::start(fleet("min: 1, max: 4, scaler: process")).await;
    let client = fleet.client();
    ready(&fleet, 1).await;
    let load = Load::start(&client, CLIENTS, Duration::ZERO);
    ready(&fleet, 4).await;
    eventually("every worker takes its part", STEP, async || {
        let tokens = prefilled(&fleet).await?;
        (tokens.len() == 4 && tokens.iter().all(|tokens| *tokens >= PROMPT_TOKENS as u64)).then_some(())
    })
    .await;

    // A conductor that is started anew carries on from the workers that are there.
    let grown = pids(&fleet, " worker --pool prefill");
    assert_eq!(grown.len(), 4);
    for pid in pids(&fleet, " conductor ") {
        signal(pid, Signal::KILL);
    }
    eventually("the pool is adopted", STEP, async || {
        let pool = pool(&fleet).await?;
        let reason = pool["autoscale"]["reason"].as_str()?.to_owned();
        (reason.starts_with("carries on from 4") || pool["autoscale"]["decision"] == "at_max").then_some(())
    })
    .await;
    assert_eq!(pids(&fleet, " worker --pool prefill"), grown, "no worker was ended or started for it");

    let answered = load.end().await;
    assert!(answered > CLIENTS, "{answered} answers");
    // While the pool shrinks, somebody still asks, but seldom enough that one worker is plenty.
    let trickle = Load::start(&client, 1, Duration::from_millis(500));
    ready(&fleet, 1).await;
    assert!(trickle.end().await > 0);
    eventually("the processes of those that left are gone", STEP, async || {
        (pids(&fleet, " worker --pool prefill").len() == 1).then_some(())
    })
    .await;

    let log = fleet.stderr();
    let steps: Vec<&str> = log.lines().filter(|line| line.contains(" workers: ")).collect();
    let (up, down): (Vec<&str>, Vec<&str>) = steps.iter().partition(|line| line.contains(" of max 4"));
    assert!(
        up.first().is_some_and(|line| line.starts_with("prefill: 1 -> 2 workers: queue wait ")),
        "{steps:#?}"
    );
    assert!(up.iter().all(|line| line.contains("ms > 300 ms over ")), "{steps:#?}");
    assert!(down.last().is_some_and(|line| line.ends_with("-> 1 of min 1")), "{steps:#?}");
    assert!(down.iter().all(|line| line.contains("would have done for 3000 ms")), "{steps:#?}");
    let metrics = fleet.get_text(&format!("{}/metrics", fleet.conductor)).await;
    assert!(metrics.contains("baton_scale_desired{pool=\"prefill\"} 1"), "{metrics}");
    assert!(metrics.contains("baton_scale_errors_total{pool=\"prefill\"} 0"), "{metrics}");
    fleet.stop().await;
}

#[tokio::test]
async fn a_dry_run_tells_what_it_would_do_and_starts_nobody() {
    let fleet = Fleet::start(fleet("min: 1, max: 4, scaler: process, dry_run: true")).await;
    let load = Load::start(&fleet.client(), CLIENTS, Duration::ZERO);
    let pool = eventually("a decision is told", STEP, async || {
        pool(&fleet).await.filter(|pool| pool["autoscale"]["desired"].as_u64() >= Some(2))
    })
    .await;
    assert_eq!(pool["autoscale"]["dry_run"], true, "{pool}");
    assert!(pool["autoscale"]["reason"].as_str().is_some_and(|why| why.starts_with("queue wait ")), "{pool}");
    assert_eq!((&pool["desired"], &pool["ready"]), (&json!(1), &json!(1)), "{pool}");
    let metrics = fleet.get_text(&format!("{}/metrics", fleet.conductor)).await;
    assert!(metrics.contains("baton_scale_desired{pool=\"prefill\"} 2"), "exported all the same: {metrics}");
    load.end().await;
    assert_eq!(pids(&fleet, " worker --pool prefill").len(), 1);
    fleet.stop().await;
}
