//! The main claim: a disaggregated answer is the answer of one undisturbed engine, token for token and bit for bit
//! of the logits, across KV geometries and transfer backends.

use std::time::Duration;

use baton_integration::scenario::disaggregated;
use baton_integration::{Answer, Client, Fleet, FleetOptions, Prompt, prompts};
use futures_util::StreamExt;
use serde_json::{Value, json};

/// Blocks come back to the pool this soon after the last answer.
const FREED_WITHIN: Duration = Duration::from_secs(5);

fn single(dtype: &str) -> FleetOptions {
    FleetOptions::tiny(&format!(
        "  - {{ name: all, role: both, engine: {{ kind: reference }}, kv: {{ block_tokens: 16, layout: hnd, dtype: {dtype}, memory: 64MiB }} }}\n"
    ))
}

fn laptop(backend: &str) -> FleetOptions {
    disaggregated(
        &format!(
            "accelerator: simulated, kv: {{ block_tokens: 32, layout: nhd, dtype: bf16, memory: 64MiB }}, transfer: {{ path: host_buffered, backends: [{backend}] }}"
        ),
        &format!(
            "accelerator: cpu, kv: {{ block_tokens: 16, layout: hnd, dtype: bf16, memory: 64MiB }}, transfer: {{ backends: [{backend}] }}"
        ),
        2,
    )
}

/// How each prompt is answered; seeded sampling on every third one.
fn extra(index: usize) -> Value {
    if index % 3 == 2 {
        json!({"temperature": 0.8, "top_p": 0.95, "seed": index, "ignore_eos": true})
    } else {
        json!({"ignore_eos": true})
    }
}

async fn answer(client: &Client, index: usize, name: &str, prompt: &Prompt) -> Answer {
    client.complete(prompt, 12, &extra(index)).await.unwrap_or_else(|error| panic!("{name}: {error:#}"))
}

/// Each of two workers hands over to the other: blocks full of what waits for the other's would wait for ever.
#[tokio::test]
async fn two_workers_that_hand_over_to_each_other_do_not_wait_for_each_other() {
    fn pool(replicas: u32, memory: &str) -> FleetOptions {
        FleetOptions::tiny(&format!(
            "  - {{ name: all, role: both, replicas: {replicas}, kv: {{ memory: {memory} }} }}\n"
        ))
    }
    async fn ask(options: FleetOptions, count: u32, tokens: u32) -> Vec<Answer> {
        let fleet = Fleet::start(options).await;
        let client = fleet.client();
        let one = |index: u32| {
            let prompt = (0..tokens).map(|at| 10 + (index * 31 + at * (index + 7)) % 180).collect();
            let client = &client;
            async move { client.complete(&Prompt::Tokens(prompt), 4, &json!({"ignore_eos": true})).await.unwrap() }
        };
        let all = futures_util::stream::iter((0..count).map(one)).buffered(64).collect::<Vec<_>>();
        let answers =
            tokio::time::timeout(Duration::from_secs(60), all).await.expect("nobody waits for ever");
        fleet.eventually_nothing_held(FREED_WITHIN).await;
        fleet.stop().await;
        answers
    }
    // Four of these prompts fill a worker; of the others one needs more than half of it.
    for (count, tokens, modes) in [(120, 500, &["auto", "always"][..]), (8, 1200, &["always"])] {
        let expected = ask(pool(1, "64MiB"), count, tokens).await;
        for mode in modes {
            let mut options = pool(2, "2MiB");
            options.document =
                options.document.replace("router: {", &format!("router: {{ disaggregation: {mode},"));
            let got = ask(options, count, tokens).await;
            let same = expected.iter().zip(&got).filter(|(want, got)| want.proof() == got.proof()).count();
            assert_eq!(same, expected.len(), "{mode}, {tokens} tokens");
        }
    }
}

async fn answers(client: &Client, at_once: usize) -> Vec<(String, Answer)> {
    futures_util::stream::iter(prompts::all().into_iter().enumerate())
        .map(|(index, (name, prompt))| async move {
            let answer = answer(client, index, &name, &prompt).await;
            (name, answer)
        })
        .buffered(at_once)
        .collect()
        .await
}

async fn reference(dtype: &str) -> Vec<(String, Answer)> {
    let fleet = Fleet::start(single(dtype)).await;
    let answers = answers(&fleet.client(), 4).await;
    fleet.stop().await;
    assert!(answers.len() >= 60, "{} prompts", answers.len());
    assert!(answers.iter().all(|(_, answer)| answer.digest.len() == 16), "every answer carries a digest");
    answers
}

/// Answers all prompts one way and compares; returns how many prompts had KV moved for them.
async fn compare(expected: &[(String, Answer)], options: FleetOptions, at_once: usize) {
    let fleet = Fleet::start(options).await;
    let got = answers(&fleet.client(), at_once).await;
    let mut moved = 0;
    for ((name, want), (_, got)) in expected.iter().zip(&got) {
        assert_eq!(want.proof(), got.proof(), "{name}: {:?}", got.baton);
        assert_eq!(got.fallback(), None, "{name} was to be handed off");
        moved += u64::from(got.imported_tokens() > 0);
    }
    assert_eq!(expected.len(), got.len());
    assert!(moved >= 50, "only {moved} prompts had KV blocks moved");
    fleet.eventually_nothing_held(FREED_WITHIN).await;
    fleet.stop().await;
}

#[tokio::test]
async fn disaggregated_answers_equal_single_worker_answers_bf16() {
    let expected = reference("bf16").await;
    for backend in ["shm", "cma", "tcp", "libfabric", "ucx"] {
        compare(&expected, laptop(backend), 1).await;
    }
}

#[tokio::test]
async fn block_sizes_that_do_not_divide_each_other_and_f32() {
    let expected = reference("f32").await;
    for backend in ["shm", "tcp"] {
        let side = |block: u32, layout: &str| {
            format!(
                "accelerator: cpu, kv: {{ block_tokens: {block}, layout: {layout}, dtype: f32, memory: 64MiB }}, transfer: {{ backends: [{backend}] }}"
            )
        };
        compare(&expected, disaggregated(&side(24, "hnd"), &side(16, "nhd"), 1), 4).await;
    }
}

#[tokio::test]
async fn equal_geometries_read_straight_into_place() {
    let expected = reference("bf16").await;
    for backend in ["shm", "cma", "tcp", "libfabric", "ucx"] {
        let side = format!(
            "accelerator: cpu, kv: {{ block_tokens: 16, layout: nhd, dtype: bf16, memory: 64MiB }}, transfer: {{ backends: [{backend}] }}"
        );
        compare(&expected, disaggregated(&side, &side, 1), 4).await;
    }
}

#[tokio::test]
async fn sixty_four_at_a_time() {
    let expected = reference("bf16").await;
    for backend in ["shm", "cma", "tcp", "libfabric", "ucx"] {
        compare(&expected, laptop(backend), 64).await;
    }
}

#[tokio::test]
async fn only_blocks_the_decode_side_lacks_are_moved() {
    let fleet = Fleet::start(disaggregated(
        "accelerator: simulated, kv: { block_tokens: 32, layout: nhd, dtype: bf16, memory: 64MiB }, transfer: { path: host_buffered }",
        "accelerator: cpu, kv: { block_tokens: 16, layout: hnd, dtype: bf16, memory: 64MiB }",
        1,
    ))
    .await;
    let client = fleet.client();
    let shared = prompts::random_tokens(5, 640);
    let with_tail = |seed| {
        let mut tokens = shared.clone();
        tokens.extend(prompts::random_tokens(seed, 100));
        Prompt::Tokens(tokens)
    };
    let first = client.complete(&with_tail(1), 4, &json!({})).await.unwrap();
    let second = client.complete(&with_tail(2), 4, &json!({})).await.unwrap();
    // A token of the tiny model is 4 layers x 2 planes x 2 heads x 32 dims x 2 bytes; whole blocks of the prefill side move.
    let (token_bytes, block_tokens) = (1024, 32);
    let all_blocks = 740_u64.div_ceil(block_tokens) * block_tokens * token_bytes;
    let tail_blocks = (740_u64.div_ceil(block_tokens) - 640 / block_tokens) * block_tokens * token_bytes;
    assert_eq!(first.imported_bytes(), all_blocks, "{:?}", first.baton);
    assert_eq!(second.imported_bytes(), tail_blocks, "{:?}", second.baton);
    assert_eq!(second.baton["prefill"]["cached_tokens"], 640);
    fleet.stop().await;
}

#[tokio::test]
async fn kv_dtypes_may_differ() {
    let fleet = Fleet::start(disaggregated(
        "kv: { block_tokens: 32, layout: nhd, dtype: f32, memory: 64MiB }",
        "kv: { block_tokens: 16, layout: hnd, dtype: bf16, memory: 64MiB }",
        1,
    ))
    .await;
    let answer = fleet
        .client()
        .complete(
            &Prompt::from("<s><|user|>\nWhat does the fox eat?<|end|>\n<|assistant|>\n"),
            16,
            &json!({}),
        )
        .await
        .unwrap();
    assert_eq!(
        (answer.text.as_str(), answer.finish_reason.as_str()),
        ("The fox eats mice.", "stop"),
        "{:?}",
        answer.baton
    );
    assert!(answer.imported_tokens() > 0 && answer.fallback().is_none(), "{:?}", answer.baton);
    fleet.stop().await;
}
