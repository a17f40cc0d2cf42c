//! Figures of a whole fleet on this machine: `cargo bench -p baton-integration`.
//!
//! Time to first token with and without a handoff, and its parts; CPU of an idle fleet; memory of the router. Both
//! fleets run at once and take turns, so that a slow moment of the machine hits both.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::time::{Duration, Instant};

use baton_integration::process::{children, cpu_seconds};
use baton_integration::{Answer, Client, Fleet, FleetOptions, Prompt, prompts};
use serde_json::json;

const ROUNDS: usize = 9;
const IDLE: Duration = Duration::from_secs(20);

fn laptop(disaggregation: &str) -> FleetOptions {
    let mut options = FleetOptions::tiny(
        "  - { name: prefill, role: prefill, accelerator: simulated, kv: { block_tokens: 32, layout: nhd, dtype: bf16, memory: 64MiB } }\n  - { name: decode, role: decode, kv: { block_tokens: 16, layout: hnd, dtype: bf16, memory: 64MiB } }\n",
    );
    options.document = options.document.replace(
        "listen: 127.0.0.1:0 }",
        &format!("listen: 127.0.0.1:0, disaggregation: {disaggregation} }}"),
    );
    options
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Milliseconds to the only token of a one-token answer, and the answer.
async fn first_token(client: &Client, prompt: &Prompt) -> (f64, Answer) {
    let start = Instant::now();
    let answer = client.complete(prompt, 1, &json!({"ignore_eos": true})).await.expect("an answer");
    (start.elapsed().as_secs_f64() * 1e3, answer)
}

async fn time_to_first_token() {
    let (remote, local) = (Fleet::start(laptop("always")).await, Fleet::start(laptop("never")).await);
    let (remote_client, local_client) = (remote.client(), local.client());
    println!(
        "time to first token, medians of {ROUNDS}, milliseconds; one prefill and one decode worker, tiny model"
    );
    println!(
        "{:>7} {:>9} {:>9} {:>8} | {:>7} {:>8} {:>9} {:>11}",
        "tokens", "handoff", "local", "extra", "queue", "prefill", "transfer", "tail/prefill"
    );
    for length in [64, 256, 512, 1024, 2048, 4000] {
        let (mut with, mut without, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let prompt = Prompt::Tokens(prompts::random_tokens((length * 100 + round) as u64, length));
            let (remote_ms, answer) = first_token(&remote_client, &prompt).await;
            let (local_ms, _) = first_token(&local_client, &prompt).await;
            assert!(answer.imported_tokens() > 0, "{:?}", answer.baton);
            if round > 0 {
                with.push(remote_ms);
                without.push(local_ms);
                parts.push(
                    ["queue_ms", "prefill_ms", "transfer_tail_ms"]
                        .map(|part| answer.baton["prefill"][part].as_f64().unwrap_or(f64::NAN)),
                );
            }
        }
        let part = |index: usize| median(parts.iter().map(|part| part[index]).collect());
        let (with, without) = (median(with), median(without));
        println!(
            "{length:>7} {with:>9.2} {without:>9.2} {:>8.2} | {:>7.2} {:>8.2} {:>9.2} {:>10.1} %",
            with - without,
            part(0),
            part(1),
            part(2),
            100.0 * part(2) / part(1),
        );
    }
    remote.stop().await;
    local.stop().await;
}

fn resident_mib(pid: u32) -> f64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: f64 = statm.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0.0);
    pages * rustix::param::page_size() as f64 / f64::from(1 << 20)
}

fn part_name(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = line.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let part =
        words.into_iter().find(|word| ["conductor", "router", "worker", "up"].contains(&word.as_ref()));
    part.map_or_else(String::new, std::borrow::Cow::into_owned)
}

async fn idle_fleet() {
    let fleet = Fleet::start(FleetOptions::laptop()).await;
    let client = fleet.client();
    for index in 0..20 {
        first_token(&client, &Prompt::Tokens(prompts::random_tokens(index, 600))).await;
    }
    let mut parts = children(fleet.launcher_pid());
    parts.push(fleet.launcher_pid());
    let before: Vec<f64> = parts.iter().map(|pid| cpu_seconds(*pid)).collect();
    tokio::time::sleep(IDLE).await;
    println!("\nidle default fleet after 20 requests: CPU over {} s and resident memory", IDLE.as_secs());
    let mut total = 0.0;
    for (pid, before) in parts.iter().zip(before) {
        let share = 100.0 * (cpu_seconds(*pid) - before) / IDLE.as_secs_f64();
        total += share;
        println!("{:>10} {share:>6.2} % of a core {:>8.1} MiB", part_name(*pid), resident_mib(*pid));
    }
    println!("{:>10} {total:>6.2} % of a core", "all");
    fleet.stop().await;
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        time_to_first_token().await;
        idle_fleet().await;
    });
}
