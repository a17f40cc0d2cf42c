//! A fleet under load while its etcd is killed, frozen, split, filled up and locked: no request fails, no answer is
//! wrong, no worker leaves the view, and afterwards the view is what the store holds.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use baton_integration::etcd::{Etcd, EtcdOptions};
use baton_integration::load::Load;
use baton_integration::process::eventually;
use baton_integration::scenario::{ask, disaggregated, long_prompts};
use baton_integration::{Fleet, FleetOptions};

/// Workers of the fleet.
const WORKERS: usize = 4;
/// From the end of a fault until everything is as before, on a machine that is busy with other tests.
const HEALED_WITHIN: Duration = Duration::from_secs(40);

fn over(etcd: &Etcd, auth: &str) -> FleetOptions {
    let mut options = disaggregated("kv: { memory: 64MiB }", "kv: { memory: 64MiB }", 2);
    let store = format!("{{ endpoints: [{}]{auth} }}", etcd.endpoints().join(", "));
    let conductor = format!("conductor: {{ listen: 127.0.0.1:0, store: {{ etcd: {store} }} }}\nrouter: {{");
    options.document = options.document.replacen("router: {", &conductor, 1);
    options
}

/// Worker and epoch as the conductor lists them.
async fn listed(fleet: &Fleet) -> Option<BTreeMap<String, u64>> {
    let answer = baton_conductor::http::client()
        .get(format!("{}/v1/workers", fleet.conductor))
        .timeout(Duration::from_secs(2))
        .send()
        .await
        .ok()?;
    let list: serde_json::Value = answer.json().await.ok()?;
    let epoch = |worker: &serde_json::Value| {
        (worker["state"] == "ready")
            .then(|| Some((worker["worker"].as_str()?.to_owned(), worker["epoch"].as_u64()?)))?
    };
    list["workers"].as_array()?.iter().map(epoch).collect()
}

/// The workers that the store holds.
async fn stored(etcd: &Etcd) -> Vec<String> {
    let prefix = "/baton/workers/";
    let keys = etcd.keys(prefix).await;
    keys.into_iter().map(|(key, _)| key.trim_start_matches(prefix).to_owned()).collect()
}

/// Seconds since the router last knew its view to be true.
async fn view_age(fleet: &Fleet) -> f64 {
    let metrics = fleet.get_text(&format!("{}/metrics", fleet.router)).await;
    let line = metrics.lines().find(|line| line.starts_with("baton_router_view_age_seconds "));
    line.and_then(|line| line.split(' ').next_back()?.parse().ok()).expect("the age of the view")
}

/// Waits until the router says that its view is stale.
async fn stale(fleet: &Fleet) {
    eventually("the router's view is marked stale", Duration::from_secs(20), async || {
        (view_age(fleet).await > 2.0).then_some(())
    })
    .await;
}

/// Runs `fault` under load and checks everything that must hold during and after it.
async fn survives(etcd: Etcd, options: FleetOptions, fault: impl AsyncFnOnce(&Etcd, &Fleet)) {
    let fleet = Fleet::start(options).await;
    let client = fleet.client();
    let before = eventually("all workers are ready", HEALED_WITHIN, async || {
        listed(&fleet).await.filter(|workers| workers.len() == WORKERS)
    })
    .await;
    let prompts = long_prompts(500, 6);
    let mut expected = Vec::new();
    for prompt in &prompts {
        expected.push(ask(&client, prompt).await);
    }
    let load = Load::start(&client, &prompts, &expected);
    fault(&etcd, &fleet).await;
    let during = load.answered();
    assert!(during > 0, "the load was to run through the fault");
    let after = eventually("the view is what the store holds", HEALED_WITHIN, async || {
        let workers = listed(&fleet).await.filter(|workers| workers.len() == WORKERS)?;
        let names: Vec<String> = workers.keys().cloned().collect();
        (stored(&etcd).await == names && view_age(&fleet).await < 2.0).then_some(workers)
    })
    .await;
    for (worker, epoch) in &before {
        assert!(after[worker] >= *epoch, "{worker} went from epoch {epoch} back to {}", after[worker]);
    }
    eventually("answers go on", Duration::from_secs(20), async || {
        (load.answered() > during + prompts.len()).then_some(())
    })
    .await;
    load.finish().await;
    fleet.eventually_nothing_held(Duration::from_secs(10)).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_steady_fleet_under_load_writes_nothing_to_the_store() {
    let etcd = Etcd::start(1).await;
    let fleet = Fleet::start(over(&etcd, "")).await;
    let client = fleet.client();
    let prompts = long_prompts(900, 4);
    let mut expected = Vec::new();
    for prompt in &prompts {
        expected.push(ask(&client, prompt).await);
    }
    let before = etcd.revision().await;
    let load = Load::start(&client, &prompts, &expected);
    // Longer than a lease, so that every keepalive of every worker is among it.
    tokio::time::sleep(Duration::from_secs(11)).await;
    let answers = load.finish().await;
    assert!(answers >= 20, "only {answers} answers in 11 s are no load");
    assert_eq!(before, etcd.revision().await, "{answers} requests and every keepalive, and not one write");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_killed_and_comes_back() {
    let etcd = Etcd::start(1).await;
    let options = over(&etcd, "");
    survives(etcd, options, async |etcd, fleet| {
        etcd.kill(0);
        stale(fleet).await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!(listed(fleet).await.map(|workers| workers.len()), Some(WORKERS), "never emptied");
        etcd.restart(0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_frozen_for_longer_than_a_lease() {
    let etcd = Etcd::start(1).await;
    let options = over(&etcd, "");
    survives(etcd, options, async |etcd, fleet| {
        etcd.freeze(0);
        stale(fleet).await;
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(listed(fleet).await.map(|workers| workers.len()), Some(WORKERS), "never emptied");
        etcd.thaw(0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed_and_later_comes_back() {
    let etcd = Etcd::start(3).await;
    let options = over(&etcd, "");
    survives(etcd, options, async |etcd, fleet| {
        let leader = etcd.leader().await;
        etcd.kill(leader);
        etcd.leader().await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(listed(fleet).await.map(|workers| workers.len()), Some(WORKERS));
        etcd.restart(leader);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_is_cut_off_from_its_peers() {
    let etcd = Etcd::start(3).await;
    let options = over(&etcd, "");
    survives(etcd, options, async |etcd, fleet| {
        // The conductor is pinned to some member: each is cut off in turn.
        for member in 0..3 {
            etcd.cut(member);
            tokio::time::sleep(Duration::from_secs(5)).await;
            assert_eq!(listed(fleet).await.map(|workers| workers.len()), Some(WORKERS));
            etcd.heal(member);
            etcd.leader().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_quorum_is_lost_and_comes_back_with_its_history_compacted() {
    let etcd = Etcd::start(3).await;
    let options = over(&etcd, "");
    survives(etcd, options, async |etcd, fleet| {
        etcd.kill(1);
        etcd.kill(2);
        stale(fleet).await;
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(listed(fleet).await.map(|workers| workers.len()), Some(WORKERS), "never emptied");
        etcd.restart(1);
        etcd.restart(2);
        etcd.leader().await;
        etcd.compact().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_is_full() {
    let mut options = EtcdOptions::new(1);
    options.quota_bytes = Some(16 << 20);
    let etcd = Etcd::with(options).await;
    let options = over(&etcd, "");
    survives(etcd, options, async |etcd, fleet| {
        etcd.fill().await;
        // Longer than a lease: keepalives are still taken.
        tokio::time::sleep(Duration::from_secs(11)).await;
        assert_eq!(listed(fleet).await.map(|workers| workers.len()), Some(WORKERS));
        eventually("the operator is told", Duration::from_secs(20), async || {
            fleet.status().await.to_string().contains("disarm").then_some(())
        })
        .await;
        etcd.make_space().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_the_store_are_lost_in_its_restart() {
    let mut etcd = Etcd::start(1).await;
    let (user, password) = etcd.enable_auth("correct horse").await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    std::fs::write(&file, password).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    let auth = format!(", auth: {{ user: {user}, password_file: {} }}", file.display());
    let options = over(&etcd, &auth);
    survives(etcd, options, async |etcd, fleet| {
        etcd.kill(0);
        stale(fleet).await;
        etcd.restart(0);
    })
    .await;
}
