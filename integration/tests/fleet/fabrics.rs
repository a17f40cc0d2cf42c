//! Peers that die, freeze and come back while blocks move, over every backend: never a wrong token, never a hung
//! request, and the path each pair takes is the one that was asked for.

use std::time::Duration;

use baton_integration::process::{alive, eventually, signal};
use baton_integration::scenario::{ask, counter, long_prompts, pair, undisturbed};
use baton_integration::{Answer, Client, Fleet, Prompt, prompts};
use futures_util::future::join_all;
use rustix::process::Signal;

/// A slow device keeps transfers under way long enough to be hit.
fn slow(backend: &str) -> Keys {
    Keys {
        prefill: format!(
            "transfer: {{ path: host_buffered, device_bandwidth: 8MB/s, backends: [{backend}] }}"
        ),
        decode: format!("transfer: {{ backends: [{backend}] }}"),
    }
}

/// Further keys of the two pools of a fleet.
struct Keys {
    prefill: String,
    decode: String,
}

impl Keys {
    async fn start(&self) -> Fleet {
        Fleet::start(pair(&self.prefill, &self.decode)).await
    }
}

async fn kv_is_moving(fleet: &Fleet) {
    let decode = fleet.workers("decode").await[0].0.clone();
    eventually("KV is moving", Duration::from_secs(20), async || {
        (counter(fleet, &decode, "baton_transfer_bytes_total").await > 0.0).then_some(())
    })
    .await;
}

/// The backend of the pair's path and its reason, as `baton status` shows them.
async fn path(fleet: &Fleet) -> (String, String) {
    let status = fleet.status().await;
    let path = &status["paths"][0];
    let text = |key: &str| path[key].as_str().unwrap_or_default().to_owned();
    (text("backend"), text("reason"))
}

/// Kills the prefill worker in mid-transfer, waits until it is back on its address, then hands off again.
async fn kill_and_restart(backend: &str) {
    let wanted = Wanted::new(100, 16).await;
    let fleet = slow(backend).start().await;
    let client = fleet.client();
    let (name, pid) = fleet.workers("prefill").await[0].clone();
    let kill = async {
        kv_is_moving(&fleet).await;
        signal(pid, Signal::KILL);
    };
    let (answers, ()) = tokio::join!(wanted.assert_answered(backend, &client), kill);
    assert!(
        answers.iter().any(|answer| answer.fallback().is_some()),
        "{backend}: the kill was to hit something"
    );
    eventually("the prefill worker is back", Duration::from_secs(30), async || {
        let workers = fleet.workers("prefill").await;
        workers.into_iter().find(|(back, new)| *back == name && *new != pid && alive(*new))
    })
    .await;
    eventually("a handoff to the restarted worker", Duration::from_secs(20), async || {
        let probe =
            ask(&client, &Prompt::Tokens(prompts::random_tokens(std::process::id().into(), 700))).await;
        (probe.imported_tokens() > 0).then_some(())
    })
    .await;
    let answers = Wanted::new(900, 3).await.assert_answered(backend, &client).await;
    for answer in answers {
        assert!(answer.imported_tokens() > 0, "{backend}: {:?}", answer.baton);
    }
    assert_eq!(path(&fleet).await.0, backend);
    fleet.eventually_nothing_held(Duration::from_secs(10)).await;
    fleet.stop().await;
}

/// Prompts and their answers by one undisturbed engine.
struct Wanted {
    prompts: Vec<Prompt>,
    answers: Vec<Answer>,
}

impl Wanted {
    async fn new(seed: u64, count: usize) -> Wanted {
        let prompts = long_prompts(seed, count);
        Wanted { answers: undisturbed(&prompts).await, prompts }
    }

    /// Asks all at once.
    async fn assert_answered(&self, backend: &str, client: &Client) -> Vec<Answer> {
        let answers = join_all(self.prompts.iter().map(|prompt| ask(client, prompt))).await;
        for (want, got) in self.answers.iter().zip(&answers) {
            assert_eq!(want.proof(), got.proof(), "{backend}: {:?}", got.baton);
        }
        answers
    }
}

/// Stops one side of a pair over each of `backends` in mid-transfer for a while, and lets it go on: all answers are
/// right, and later the pair hands off again.
async fn freeze(backends: &[&str], pool: &str, pause: Duration) {
    let (during, after) = (Wanted::new(300, 8).await, Wanted::new(1300, 3).await);
    let freeze = async |backend: &str| {
        let fleet = slow(backend).start().await;
        let client = fleet.client();
        let pid = fleet.workers(pool).await[0].1;
        let stop = async {
            kv_is_moving(&fleet).await;
            signal(pid, Signal::STOP);
            tokio::time::sleep(pause).await;
            signal(pid, Signal::CONT);
        };
        tokio::join!(during.assert_answered(backend, &client), stop);
        after.assert_answered(backend, &client).await;
        hands_off_again(fleet).await;
    };
    join_all(backends.iter().map(|backend| freeze(backend))).await;
}

/// Waits until the pair is no longer avoided for what it suffered, and hands off again.
async fn hands_off_again(fleet: Fleet) {
    let client = fleet.client();
    eventually("handoffs go on", Duration::from_secs(40), async || {
        let seed = u64::from(std::process::id()) + 7;
        let probe = ask(&client, &Prompt::Tokens(prompts::random_tokens(seed, 700))).await;
        (probe.imported_tokens() > 0).then_some(())
    })
    .await;
    fleet.eventually_nothing_held(Duration::from_secs(10)).await;
    fleet.stop().await;
}

#[tokio::test]
async fn killed_and_restarted_over_libfabric() {
    kill_and_restart("libfabric").await;
}

#[tokio::test]
async fn killed_and_restarted_over_ucx() {
    kill_and_restart("ucx").await;
}

#[tokio::test]
async fn killed_and_restarted_over_tcp() {
    kill_and_restart("tcp").await;
}

#[tokio::test]
async fn killed_and_restarted_over_shm_and_cma() {
    kill_and_restart("shm").await;
    kill_and_restart("cma").await;
}

#[tokio::test]
async fn a_frozen_prefill_worker_over_every_backend() {
    // Longer than it takes to notice a frozen worker, shorter than its lease.
    freeze(&["libfabric", "ucx", "tcp", "shm", "cma"], "prefill", Duration::from_secs(4)).await;
}

#[tokio::test]
async fn a_frozen_decode_worker_over_libfabric_and_ucx() {
    // Shorter than it takes to give up the only worker there is.
    freeze(&["libfabric", "ucx"], "decode", Duration::from_millis(1200)).await;
}

#[tokio::test]
async fn a_fabric_that_only_one_side_has_leaves_tcp_and_says_why() {
    let fleet = Fleet::start(pair(
        "transfer: { path: host_buffered, backends: [libfabric, tcp], provider: sockets }",
        "transfer: { backends: [libfabric, tcp], provider: net }",
    ))
    .await;
    let answer = ask(&fleet.client(), &long_prompts(1, 1)[0]).await;
    assert!(answer.imported_tokens() > 0, "{:?}", answer.baton);
    let (backend, reason) = path(&fleet).await;
    assert_eq!(backend, "tcp");
    assert!(reason.contains("libfabric") && reason.contains("sockets") && reason.contains("net"), "{reason}");
    fleet.stop().await;
}

#[tokio::test]
async fn agents_with_a_token_hand_off_and_one_with_another_is_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let token = file("token", "6f1c0b5c9ff54f0f8ac1d1d2a2b5be8c27d1\n");
    let other = file("other", "0a8f6a4d7c3c4a51b0f2e4d61c9a7e55be42\n");
    let keys = |path: &str, backend: &str| {
        format!("transfer: {{ backends: [{backend}], auth: {{ token_file: {path} }} }}")
    };
    let prompt = &long_prompts(2, 1)[0];
    let expected = undisturbed(std::slice::from_ref(prompt)).await;
    for backend in ["tcp", "libfabric", "ucx"] {
        let fleet = Fleet::start(pair(&keys(&token, backend), &keys(&token, backend))).await;
        let answer = ask(&fleet.client(), prompt).await;
        assert!(answer.imported_tokens() > 0, "{backend}: {:?}", answer.baton);
        assert_eq!(answer.proof(), expected[0].proof());
        fleet.stop().await;
    }
    let fleet = Fleet::start(pair(&keys(&token, "tcp"), &keys(&other, "tcp"))).await;
    let answer = ask(&fleet.client(), prompt).await;
    assert_eq!(answer.imported_tokens(), 0, "{:?}", answer.baton);
    assert_eq!(answer.proof(), expected[0].proof(), "answered by the decode worker alone");
    fleet.stop().await;
}
