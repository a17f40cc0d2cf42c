//! Three conductors on one etcd, killed, frozen and thawed under load: one leads, no request fails, no epoch changes.

use std::path::Path;
use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::etcd::Etcd;
use baton_integration::process::eventually;
use baton_integration::{Part, Prompt, binary, prompts};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(30);
/// The conductors' lease, what etcd takes to end one, and a loaded machine.
const TAKEOVER: Duration = Duration::from_secs(3 + 1 + 4);

fn conductor(fleet: &Path, name: &str) -> Part {
    Part::start(fleet, name, &["conductor", "--name", name])
}

async fn listing(part: &Part) -> Option<Value> {
    serde_json::from_str(&part.get("/v1/workers").await?).ok()
}

/// Whom a conductor takes for the leader, if it is exactly one.
async fn leader_by(part: &Part) -> Option<String> {
    let listing = listing(part).await?;
    let conductors = listing["conductors"].as_array()?;
    let leaders: Vec<&Value> = conductors.iter().filter(|it| it["leader"] == true).collect();
    assert!(leaders.len() <= 1, "{conductors:?}");
    Some(leaders.first()?["name"].as_str()?.to_owned())
}

/// Takes the leader out of `parts`.
async fn take_leader(parts: &mut Vec<Part>) -> Part {
    let name = eventually("a leader", TAKEOVER, async || leader_by(&parts[0]).await).await;
    let at = parts.iter().position(|part| part.name == name).expect("one of them");
    parts.remove(at)
}

async fn another_leads(parts: &[Part], than: &str) -> String {
    eventually("another leads", TAKEOVER, async || {
        let name = leader_by(&parts[0]).await?;
        (name != than && leader_by(parts.last()?).await? == name).then_some(name)
    })
    .await
}

fn epochs(listing: &Value) -> Vec<(String, u64)> {
    let workers = listing["workers"].as_array().cloned().unwrap_or_default();
    let epoch =
        |it: &Value| (it["worker"].as_str().unwrap_or("").to_owned(), it["epoch"].as_u64().unwrap_or(0));
    workers.iter().map(epoch).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_come_and_go_and_no_request_fails() {
    let etcd = Etcd::start(1).await;
    let directory = tempfile::tempdir().expect("a directory");
    let fleet = directory.path().join("fleet.yaml");
    let document = format!(
        "version: 1\nmodel: {{ id: tiny, path: {}/examples/models/tiny }}\n\
         conductor: {{ lease_ttl_ms: 5000, store: {{ etcd: {{ endpoints: [{}] }} }} }}\n\
         pools:\n  - {{ name: all, role: both, replicas: 2, kv: {{ memory: 32MiB }} }}\n",
        binary::root().display(),
        etcd.endpoint(0)
    );
    std::fs::write(&fleet, document).expect("written");
    let mut parts: Vec<Part> = ["one", "two", "three"].map(|name| conductor(&fleet, name)).into();
    for part in &parts {
        part.until_ready(PATIENCE).await;
    }
    let urls = parts.iter().map(|part| part.url.clone()).collect::<Vec<_>>().join(",");
    let worker = |index: &'static str| {
        let name = format!("all-{index}");
        let words = ["worker", "--pool", "all", "--name", &name, "--index", index, "--conductor", &urls];
        Part::start(&fleet, &name, &words)
    };
    let workers = [worker("0"), worker("1")];
    let router = Part::start(&fleet, "router", &["router", "--conductor", &urls]);
    for part in &workers {
        part.until_ready(PATIENCE).await;
    }
    router.until_ready(PATIENCE).await;
    let ready = |listing: &Value| {
        let workers =
            listing["workers"].as_array().map_or(0, |it| it.iter().filter(|w| w["state"] == "ready").count());
        workers == 2
    };
    let before = eventually("two workers", PATIENCE, async || listing(&parts[0]).await.filter(ready)).await;

    // Requests without a pause until the end; the first that fails ends them.
    let (stop, stopped) = watch::channel(false);
    let client = Client::new(&router.url);
    let mut load = tokio::task::JoinSet::new();
    load.spawn(async move {
        let mut done = 0u64;
        while !*stopped.borrow() {
            let prompt = Prompt::Tokens(prompts::random_tokens(done, 40));
            client
                .complete(&prompt, 8, &json!({}))
                .await
                .map_err(|error| format!("request {done}: {error:#}"))?;
            done += 1;
        }
        Ok::<u64, String>(done)
    });

    let killed = take_leader(&mut parts).await;
    killed.signal(Signal::KILL);
    another_leads(&parts, &killed.name).await;

    let frozen = take_leader(&mut parts).await;
    frozen.signal(Signal::STOP);
    let last = another_leads(&parts, &frozen.name).await;
    frozen.signal(Signal::CONT);
    // It finds out that it was deposed, and says so; the new leader stays.
    eventually("the thawed one knows", PATIENCE, async || {
        let metrics = frozen.get("/metrics").await?;
        let deposed = metrics.lines().any(|line| line == "baton_conductor_leader 0");
        (deposed && leader_by(&frozen).await? == last).then_some(())
    })
    .await;
    // A graceful stop hands over at once; here to the one that had been frozen.
    let stopped_one = take_leader(&mut parts).await;
    assert_eq!(stopped_one.name, last);
    stopped_one.signal(Signal::TERM);
    eventually("the last one leads", TAKEOVER, async || {
        (leader_by(&frozen).await? == frozen.name).then_some(())
    })
    .await;

    // All that happened is nothing to workers and clients.
    let after = eventually("the listing of the last one", PATIENCE, async || listing(&frozen).await).await;
    assert_eq!(epochs(&after), epochs(&before), "a worker lost its epoch");
    stop.send_replace(true);
    let requests = load.join_next().await.expect("one task").expect("no panic").expect("no request failed");
    assert!(requests > 20, "only {requests} requests were made");
    // And it takes everything a fleet needs: a worker that leaves and its pool's size.
    let replicas = baton_conductor::http::client()
        .put(format!("{}/v1/pools/all/replicas", frozen.url))
        .json(&json!({"replicas": 3}));
    assert_eq!(replicas.send().await.expect("answers").status(), 200);
    workers[1].signal(Signal::TERM);
    eventually("one worker left", PATIENCE, async || {
        let listing = listing(&frozen).await?;
        (epochs(&listing).len() == 1 && listing["pools"][0]["desired"] == 3).then_some(())
    })
    .await;
}
