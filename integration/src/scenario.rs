//! What several tests do alike: a prefill and a decode pool, prompts that no cache knows, the undisturbed answer.

use futures_util::future::join_all;
use serde_json::json;

use crate::client::{Answer, Client, Prompt};
use crate::fleet::{Fleet, FleetOptions};
use crate::prompts;

/// A prefill and a decode pool of the tiny model, everything handed off; the texts are keys of the two pools.
pub fn disaggregated(prefill: &str, decode: &str, replicas: u32) -> FleetOptions {
    let mut options = FleetOptions::tiny(&format!(
        "  - {{ name: prefill, role: prefill, replicas: {replicas}, {prefill} }}\n  - {{ name: decode, role: decode, replicas: {replicas}, {decode} }}\n"
    ));
    options.document =
        options.document.replace("listen: 127.0.0.1:0 }", "listen: 127.0.0.1:0, disaggregation: always }");
    options
}

/// The laptop's two geometries, one worker each: an emulated device that prefills, host memory that decodes.
///
/// `prefill` and `decode` are further keys of the pools, such as `transfer: { backends: [tcp] }`.
pub fn pair(prefill: &str, decode: &str) -> FleetOptions {
    disaggregated(
        &format!(
            "accelerator: simulated, kv: {{ block_tokens: 32, layout: nhd, dtype: bf16, memory: 64MiB }}, {prefill}"
        ),
        &format!("kv: {{ block_tokens: 16, layout: hnd, dtype: bf16, memory: 64MiB }}, {decode}"),
        1,
    )
}

/// Prompts of many blocks, all different, so that nothing is served from a cache.
pub fn long_prompts(seed: u64, count: usize) -> Vec<Prompt> {
    (0..count)
        .map(|index| Prompt::Tokens(prompts::random_tokens(seed + index as u64, 600 + index * 37)))
        .collect()
}

/// Eight tokens, greedily, with their proof.
///
/// # Panics
/// When there is no answer.
pub async fn ask(client: &Client, prompt: &Prompt) -> Answer {
    client.complete(prompt, 8, &json!({"ignore_eos": true})).await.unwrap_or_else(|error| panic!("{error:#}"))
}

/// What an undisturbed single worker says to each of `prompts`.
///
/// # Panics
/// When it does not answer.
pub async fn undisturbed(prompts: &[Prompt]) -> Vec<Answer> {
    let pools =
        "  - { name: all, role: both, kv: { block_tokens: 16, layout: hnd, dtype: bf16, memory: 64MiB } }\n";
    let fleet = Fleet::start(FleetOptions::tiny(pools)).await;
    let client = fleet.client();
    let answers = join_all(prompts.iter().map(|prompt| ask(&client, prompt))).await;
    fleet.stop().await;
    answers
}

/// The value of a worker's counter, summed over its labels.
///
/// # Panics
/// When the worker is not registered or does not answer.
pub async fn counter(fleet: &Fleet, worker: &str, name: &str) -> f64 {
    let workers = fleet.get_json(&format!("{}/v1/workers", fleet.conductor)).await;
    let list =
        workers["workers"].as_array().or_else(|| workers.as_array()).expect("a list of workers").clone();
    let record = list.iter().find(|record| record["worker"] == worker).expect("the worker is registered");
    let address = record["address"].as_str().expect("an address");
    let text = fleet.get_text(&format!("http://{address}/metrics")).await;
    text.lines()
        .filter(|line| line.starts_with(name))
        .filter_map(|line| line.rsplit_once(' ').and_then(|(_, value)| value.parse::<f64>().ok()))
        .sum()
}
