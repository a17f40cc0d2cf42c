//! Workers leave without a request noticing: whoever asks them to, and whatever they still have.

use std::collections::BTreeSet;
use std::process::{Command, Output};
use std::time::Duration;

use baton_integration::process::{alive, eventually, signal};
use baton_integration::scenario::{ask, disaggregated, pair};
use baton_integration::{Answer, Client, Fleet, FleetOptions, Prompt, binary, prompts};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// A stream of some seconds.
const TOKENS: u32 = 1000;
/// How long anything may take on a machine that does other things, too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two workers that do everything, requests in turn: each of two streams is on another one.
fn two_workers(limits: &str) -> FleetOptions {
    let pools = format!(
        "  - {{ name: all, role: both, replicas: 2, engine: {{ kind: sim, decode_us_base: 8000 }}, kv: {{ memory: 32MiB }}{limits} }}\n"
    );
    let mut options = FleetOptions::tiny(&pools);
    options.document = options
        .document
        .replace("listen: 127.0.0.1:0 }", "listen: 127.0.0.1:0, policy: { kind: round_robin } }");
    options
}

fn baton(fleet: &Fleet, args: &[&str]) -> Output {
    Command::new(binary::baton()).args(args).args(["--conductor", &fleet.conductor]).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn worker(fleet: &Fleet, name: &str) -> Option<Value> {
    let status = fleet.status().await;
    status["workers"].as_array()?.iter().find(|worker| worker["name"] == *name).cloned()
}

/// A stream that cannot be moved: with the digest of the logits, any other worker but the first would show.
async fn stream(client: Client, seed: u64) -> Answer {
    let prompt = Prompt::Tokens(prompts::random_tokens(seed, 200));
    let extra = json!({"ignore_eos": true});
    client
        .complete(&prompt, TOKENS, &extra)
        .await
        .unwrap_or_else(|error| panic!("a stream failed: {error:#}"))
}

/// A stream on each of two workers; done once both generate.
async fn stream_on_both(fleet: &Fleet) -> JoinSet<Answer> {
    let mut streams = JoinSet::new();
    for seed in [1, 2] {
        streams.spawn(stream(fleet.client(), seed));
    }
    eventually("a stream runs on each worker", PATIENCE, async || {
        let status = fleet.status().await;
        let running = |worker: &&Value| worker["requests_running"] == 1;
        (status["workers"].as_array()?.iter().filter(running).count() == 2).then_some(())
    })
    .await;
    streams
}

async fn migrations(fleet: &Fleet) -> f64 {
    let metrics = fleet.get_text(&format!("{}/metrics", fleet.router)).await;
    let lines = metrics.lines().filter(|line| line.starts_with("baton_router_migrations_total{"));
    lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// A worker is drained in the middle of a stream: the stream goes on to its end where it is, what comes next goes
/// elsewhere, and the worker leaves the view and ends.
async fn drained_mid_stream(ask_it_to: impl AsyncFnOnce(&Fleet, &str, u32)) {
    let fleet = Fleet::start(two_workers("")).await;
    let mut streams = stream_on_both(&fleet).await;
    // Scaling down takes the youngest number.
    let (name, pid) = ("all-1", fleet.workers("all").await.into_iter().find(|w| w.0 == "all-1").unwrap().1);
    ask_it_to(&fleet, name, pid).await;
    let waits_for = eventually("it drains and says what it waits for", PATIENCE, async || {
        let worker = worker(&fleet, name).await?;
        assert_eq!(worker["requests_running"], 1, "the stream was to be under way: {worker}");
        (worker["state"] == "draining").then(|| worker["drain"].clone())
    })
    .await;
    assert_eq!(waits_for["requests"], 1, "{waits_for}");
    assert!(waits_for["blocks_held"].as_u64() > Some(0) && waits_for["grace_left_ms"].as_u64() > Some(0));
    let shown = text(&baton(&fleet, &["status"]).stdout);
    assert!(shown.contains(&format!("{name} drains for ")), "{shown}");
    // Requests go to the other one from now on.
    let client = fleet.client();
    let before: BTreeSet<String> = BTreeSet::from(["all-0".to_owned()]);
    let mut served = BTreeSet::new();
    for seed in 10..14 {
        let answer = ask(&client, &Prompt::Tokens(prompts::random_tokens(seed, 50))).await;
        served.insert(answer.baton["decode_worker"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(served, before, "a draining worker was given a request");
    assert!(worker(&fleet, name).await.is_some(), "it drains as long as its stream runs");
    while let Some(answer) = streams.join_next().await {
        assert_eq!(answer.unwrap().tokens.len(), TOKENS as usize);
    }
    eventually("it has left and ended", PATIENCE, async || {
        (worker(&fleet, name).await.is_none() && !alive(pid)).then_some(())
    })
    .await;
    assert_eq!(migrations(&fleet).await, 0.0, "no stream was to move");
    ask(&client, &Prompt::Tokens(prompts::random_tokens(99, 50))).await;
    fleet.stop().await;
}

#[tokio::test]
async fn an_operator_drains_a_worker_mid_stream() {
    drained_mid_stream(async |fleet, name, _| {
        let output = baton(fleet, &["drain", name]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    })
    .await;
}

#[tokio::test]
async fn a_signal_drains_a_worker_mid_stream() {
    drained_mid_stream(async |_, _, pid| signal(pid, Signal::TERM)).await;
}

#[tokio::test]
async fn a_smaller_pool_drains_a_worker_mid_stream() {
    drained_mid_stream(async |fleet, _, _| {
        let output = baton(fleet, &["scale", "all", "1"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    })
    .await;
}

#[tokio::test]
async fn drain_waits_until_the_worker_is_gone_or_says_what_it_waits_for() {
    let fleet = Fleet::start(two_workers("")).await;
    let mut streams = stream_on_both(&fleet).await;
    let late = baton(&fleet, &["drain", "all-0", "--wait", "1"]);
    assert_eq!(late.status.code(), Some(1), "{}", text(&late.stderr));
    let said = text(&late.stderr);
    assert!(said.contains("all-0 has not left within 1s") && said.contains("waits for 1 requests"), "{said}");
    let done = {
        let conductor = fleet.conductor.clone();
        tokio::task::spawn_blocking(move || {
            let args = ["drain", "all-0", "--wait", "--conductor", &conductor];
            Command::new(binary::baton()).args(args).output().unwrap()
        })
    };
    while let Some(answer) = streams.join_next().await {
        assert_eq!(answer.unwrap().tokens.len(), TOKENS as usize);
    }
    let done = done.await.unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stdout).starts_with("all-0 has left after "), "{}", text(&done.stdout));
    assert!(worker(&fleet, "all-0").await.is_none());
    fleet.stop().await;
}

#[tokio::test]
async fn drain_waits_for_the_worker_although_the_conductor_has_just_begun() {
    let fleet = Fleet::start(two_workers("")).await;
    let mut streams = stream_on_both(&fleet).await;
    let done = {
        let conductor = fleet.conductor.clone();
        tokio::task::spawn_blocking(move || {
            let args = ["drain", "all-0", "--wait", "--conductor", &conductor];
            Command::new(binary::baton()).args(args).output().unwrap()
        })
    };
    eventually("it drains", PATIENCE, async || {
        (worker(&fleet, "all-0").await?["state"] == "draining").then_some(())
    })
    .await;
    signal(conductor_pid(&fleet).expect("a conductor"), Signal::KILL);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!done.is_finished(), "it has a stream");
    while let Some(answer) = streams.join_next().await {
        assert_eq!(answer.unwrap().tokens.len(), TOKENS as usize);
    }
    let done = done.await.unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stdout).starts_with("all-0 has left after "), "{}", text(&done.stdout));
    fleet.stop().await;
}

#[tokio::test]
async fn a_drain_ends_with_its_grace_and_its_stream_goes_on_elsewhere() {
    let fleet = Fleet::start(two_workers(", limits: { drain_grace_ms: 300 }")).await;
    let client = fleet.client();
    // Without the digest: the rest comes from the other worker.
    let prompt = Prompt::Tokens(prompts::random_tokens(5, 100));
    let extra = json!({"ignore_eos": true, "baton": {"token_ids": true}});
    let expected = client.complete(&prompt, TOKENS, &extra).await.unwrap();
    let mut running = JoinSet::new();
    running.spawn({
        let (client, prompt, extra) = (client.clone(), prompt.clone(), extra.clone());
        async move { client.complete(&prompt, TOKENS, &extra).await }
    });
    let (name, pid) = eventually("a worker generates", PATIENCE, async || {
        let status = fleet.status().await;
        let busy = status["workers"].as_array()?.iter().find(|worker| worker["requests_running"] == 1)?;
        Some((busy["name"].as_str()?.to_owned(), u32::try_from(busy["pid"].as_u64()?).ok()?))
    })
    .await;
    signal(pid, Signal::TERM);
    let answer = running.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(expected.tokens, answer.tokens);
    assert!(migrations(&fleet).await > 0.0, "the grace was to end before the stream");
    eventually("it has ended", PATIENCE, async || (!alive(pid)).then_some(())).await;
    assert!(fleet.stderr().contains(&format!("{name} was drained and left")), "{}", fleet.stderr());
    fleet.stop().await;
}

#[tokio::test]
async fn a_second_signal_ends_a_drain_now() {
    let fleet = Fleet::start(two_workers("")).await;
    let streams = stream_on_both(&fleet).await;
    let (name, pid) = fleet.workers("all").await[0].clone();
    signal(pid, Signal::TERM);
    eventually("it drains", PATIENCE, async || {
        (worker(&fleet, &name).await?["state"] == "draining").then_some(())
    })
    .await;
    let asked = std::time::Instant::now();
    signal(pid, Signal::TERM);
    eventually("it has ended", PATIENCE, async || (!alive(pid)).then_some(())).await;
    // The stream would have gone on for seconds, and the grace for two minutes.
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    drop(streams);
    fleet.stop().await;
}

#[tokio::test]
async fn what_a_drained_prefill_worker_has_handed_out_is_read() {
    // A slow device: blocks are staged long after they are computed.
    let fleet = Fleet::start(pair("transfer: { path: host_buffered, device_bandwidth: 4MB/s }", "")).await;
    let (name, pid) = fleet.workers("prefill").await[0].clone();
    let client = fleet.client();
    let mut asked = JoinSet::new();
    asked.spawn(async move { ask(&client, &Prompt::Tokens(prompts::random_tokens(77, 3000))).await });
    eventually("a part of the KV is handed out", PATIENCE, async || {
        let metrics = metrics_of(&fleet, &name).await?;
        (value(&metrics, "baton_agent_leases") > 0.0).then_some(())
    })
    .await;
    signal(pid, Signal::TERM);
    let waits_for = eventually("it drains and says what it waits for", PATIENCE, async || {
        let worker = worker(&fleet, &name).await?;
        (worker["state"] == "draining").then(|| worker["drain"].clone())
    })
    .await;
    assert_eq!((&waits_for["leases"], &waits_for["requests"]), (&json!(1), &json!(1)), "{waits_for}");
    let answer = asked.join_next().await.unwrap().unwrap();
    assert_eq!((answer.fallback(), answer.imported_tokens()), (None, 3000), "{:?}", answer.baton);
    eventually("it has left and ended", PATIENCE, async || {
        (worker(&fleet, &name).await.is_none() && !alive(pid)).then_some(())
    })
    .await;
    fleet.stop().await;
}

#[tokio::test]
async fn without_a_conductor_a_drained_worker_is_left_alone_all_the_same() {
    let options = disaggregated(
        "engine: { kind: sim }, kv: { memory: 32MiB }",
        "engine: { kind: sim }, kv: { memory: 32MiB }",
        2,
    );
    let fleet = Fleet::start(options).await;
    let client = fleet.client();
    let (name, pid) = fleet.workers("decode").await[0].clone();
    let conductor = conductor_pid(&fleet).expect("a conductor");
    // Frozen rather than killed: the launcher would start another one.
    signal(conductor, Signal::STOP);
    signal(pid, Signal::TERM);
    for seed in 0..40 {
        // Nobody tells the router, but the worker itself.
        ask(&client, &Prompt::Tokens(prompts::random_tokens(300 + seed, 40))).await;
    }
    eventually("it has ended", PATIENCE, async || (!alive(pid)).then_some(())).await;
    signal(conductor, Signal::CONT);
    eventually("it is gone from the view", PATIENCE, async || {
        let current = worker(&fleet, &name).await;
        current.is_none_or(|worker| worker["pid"] != json!(pid)).then_some(())
    })
    .await;
    fleet.stop().await;
}

#[tokio::test]
async fn a_conductor_that_is_asked_to_end_ends_its_watches_and_nobody_misses_it() {
    let fleet = Fleet::start(two_workers("")).await;
    // A fleet serves before its conductor was elected.
    let listing = eventually("the conductor leads", PATIENCE, async || {
        let listing = fleet.get_json(&format!("{}/v1/workers", fleet.conductor)).await;
        (listing["leader"] == true).then_some(listing)
    })
    .await;
    assert_eq!(listing["store_health"]["up"], true, "{listing}");
    let url = format!("{}/v1/watch?since={}", fleet.conductor, listing["revision"]);
    let mut watch = baton_conductor::http::client().get(url).send().await.unwrap();
    assert!(watch.chunk().await.unwrap().is_some(), "a heartbeat");
    let conductor = conductor_pid(&fleet).expect("a conductor");
    signal(conductor, Signal::TERM);
    let ended = tokio::time::timeout(PATIENCE, async { while watch.chunk().await.unwrap().is_some() {} });
    ended.await.expect("the watch ends, and not in the middle of a line");
    eventually("it has ended", PATIENCE, async || (!alive(conductor)).then_some(())).await;
    ask(&fleet.client(), &Prompt::Tokens(prompts::random_tokens(1, 30))).await;
    eventually("its successor leads the same fleet", PATIENCE, async || {
        conductor_pid(&fleet).filter(|pid| *pid != conductor)?;
        let output = baton(&fleet, &["status", "--json"]);
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        let ready = status["workers"].as_array()?.iter().filter(|worker| worker["state"] == "ready").count();
        (status["conductor"]["leader"] == true && ready == 2).then_some(())
    })
    .await;
    fleet.stop().await;
}

fn conductor_pid(fleet: &Fleet) -> Option<u32> {
    baton_integration::process::children(fleet.launcher_pid()).into_iter().find(|pid| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == b"conductor"))
    })
}

async fn metrics_of(fleet: &Fleet, worker_name: &str) -> Option<String> {
    let address = worker(fleet, worker_name).await?["address"].as_str()?.to_owned();
    Some(fleet.get_text(&format!("http://{address}/metrics")).await)
}

fn value(metrics: &str, name: &str) -> f64 {
    let lines = metrics.lines().filter(|line| line.starts_with(name));
    lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}
