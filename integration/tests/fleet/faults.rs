//! Workers killed and restarted, clients that leave, bytes damaged on the way: never a wrong token, never a hung request.

use std::time::Duration;

use baton_integration::process::{alive, eventually, signal};
use baton_integration::scenario::{ask, counter, long_prompts, pair, undisturbed};
use baton_integration::tamper::{Damage, MemoryTamper, WireDamage, WireTamper};
use baton_integration::{Fleet, FleetOptions, Prompt, ports, prompts};
use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::json;

#[tokio::test]
async fn a_prefill_worker_killed_and_restarted_costs_no_token_and_hangs_nobody() {
    let wanted = long_prompts(100, 24);
    let expected = undisturbed(&wanted).await;
    // A slow device keeps transfers under way long enough to be hit.
    let fleet = Fleet::start(pair("transfer: { path: host_buffered, device_bandwidth: 8MB/s }", "")).await;
    let client = fleet.client();
    let (name, pid) = fleet.workers("prefill").await[0].clone();
    let answers = join_all(wanted.iter().map(|prompt| ask(&client, prompt)));
    let kill = async {
        eventually("KV is moving", Duration::from_secs(20), async || {
            (counter(&fleet, &fleet.workers("decode").await[0].0, "baton_transfer_bytes_total").await > 0.0)
                .then_some(())
        })
        .await;
        signal(pid, Signal::KILL);
    };
    let (answers, ()) = tokio::join!(answers, kill);
    for (want, got) in expected.iter().zip(&answers) {
        assert_eq!(want.proof(), got.proof(), "{:?}", got.baton);
    }
    assert!(answers.iter().any(|answer| answer.fallback().is_some()), "the kill was to hit something");
    // The launcher restarts it on the same address under a new epoch, and handoffs work again.
    let again = eventually("the prefill worker is back", Duration::from_secs(30), async || {
        fleet
            .workers("prefill")
            .await
            .into_iter()
            .find(|(back, new)| *back == name && *new != pid && alive(*new))
    })
    .await;
    assert_ne!(again.1, pid);
    let fresh = long_prompts(900, 4);
    let expected = undisturbed(&fresh).await;
    eventually("a handoff to the restarted worker", Duration::from_secs(20), async || {
        let probe =
            ask(&client, &Prompt::Tokens(prompts::random_tokens(std::process::id().into(), 700))).await;
        (probe.imported_tokens() > 0 || probe.fallback().is_none()).then_some(())
    })
    .await;
    for (prompt, want) in fresh.iter().zip(&expected) {
        let got = ask(&client, prompt).await;
        assert_eq!(want.proof(), got.proof(), "{:?}", got.baton);
        assert!(got.imported_tokens() > 0, "{:?}", got.baton);
    }
    fleet.eventually_nothing_held(Duration::from_secs(10)).await;
    fleet.stop().await;
}

#[tokio::test]
async fn a_decode_worker_killed_mid_stream_is_replaced_without_a_lost_or_repeated_token() {
    let prompt = Prompt::Tokens(prompts::random_tokens(31, 300));
    // Without the digest: a running digest cannot be taken up by another worker.
    let long = json!({"ignore_eos": true, "temperature": 0.7, "seed": 5, "baton": {"token_ids": true}});
    let pools = "  - { name: decode, role: both, replicas: 2, kv: { memory: 32MiB } }\n";
    let fleet = Fleet::start(FleetOptions::tiny(pools)).await;
    let client = fleet.client();
    let expected = client.complete(&prompt, 1500, &long).await.unwrap();
    let mut running = tokio::task::JoinSet::new();
    running.spawn({
        let (client, prompt, long) = (client.clone(), prompt.clone(), long.clone());
        async move { client.complete(&prompt, 1500, &long).await }
    });
    let victim = eventually("a worker is generating", Duration::from_secs(10), async || {
        let status = fleet.status().await;
        let busy = status["workers"]
            .as_array()?
            .iter()
            .find(|worker| worker["requests_running"].as_u64() > Some(0))?;
        busy["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok())
    })
    .await;
    signal(victim, Signal::KILL);
    let got = running.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(expected.tokens, got.tokens);
    let metrics = fleet.get_text(&format!("{}/metrics", fleet.router)).await;
    let migrated = metrics
        .lines()
        .any(|line| line.starts_with("baton_router_migrations_total{") && !line.ends_with(" 0"));
    assert!(migrated, "the kill was to hit the stream");
    fleet.stop().await;
}

/// Bytes of a block of the prefill pool: 32 tokens of 1,024 bytes.
const BLOCK_BYTES: usize = 32 * 1024;

/// Whether blocks lie in the memory and, before a second is over, nothing changes any more.
async fn settles(staging: &MemoryTamper) -> bool {
    let mut before = Vec::new();
    for _ in 0..15 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        let now = staging.snapshot();
        if now == before && now.iter().any(|byte| *byte != 0) {
            return true;
        }
        before = now;
    }
    false
}

#[tokio::test]
async fn damage_in_shared_memory_is_caught_by_the_digest_and_answered_right() {
    let wanted: Vec<Prompt> =
        (0..6).map(|seed| Prompt::Tokens(prompts::random_tokens(4000 + seed, 1200))).collect();
    let expected = undisturbed(&wanted).await;
    for (damage, run_bytes) in
        [(Damage::Flip, BLOCK_BYTES), (Damage::Zero, 2048), (Damage::Swap, BLOCK_BYTES), (Damage::Swap, 2048)]
    {
        let backend = "transfer: { backends: [shm] }";
        let fleet = Fleet::start(pair("transfer: { path: host_buffered, backends: [shm] }", backend)).await;
        let client = fleet.client();
        let (decode, prefill) =
            (fleet.workers("decode").await[0].clone(), fleet.workers("prefill").await[0].1);
        let staging = MemoryTamper::open(prefill, "baton-export staging");
        let answers = join_all(wanted.iter().map(|prompt| ask(&client, prompt)));
        let damage_all = async {
            eventually("KV is moving", Duration::from_secs(20), async || {
                (counter(&fleet, &decode.0, "baton_transfer_bytes_total").await > 0.0).then_some(())
            })
            .await;
            // While the reader stands still, what is staged lies there with its digests made: the moment to damage it. A
            // reader that stands still for much longer is given up, so on a busy machine it takes several of them.
            for _ in 0..20 {
                signal(decode.1, Signal::STOP);
                let damaged = if settles(&staging).await { staging.damage(damage, run_bytes) } else { 0 };
                signal(decode.1, Signal::CONT);
                if damaged > 0 {
                    return damaged;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            0
        };
        let (answers, damaged) = tokio::join!(answers, damage_all);
        assert!(damaged > 0, "{damage:?}: no byte was changed, the control is void");
        for (want, got) in expected.iter().zip(&answers) {
            assert_eq!(want.proof(), got.proof(), "{damage:?}: {:?}", got.baton);
        }
        let caught = counter(&fleet, &decode.0, "baton_transfer_checksum_mismatch_total").await;
        assert!(caught > 0.0, "{damage:?}: {damaged} runs damaged and none caught");
        fleet.eventually_nothing_held(Duration::from_secs(10)).await;
        fleet.stop().await;
    }
}

#[tokio::test]
async fn damage_on_the_wire_is_caught_by_the_digest_and_answered_right() {
    let wanted = long_prompts(7000, 8);
    let expected = undisturbed(&wanted).await;
    for damage in
        [WireDamage::Flip, WireDamage::Swap, WireDamage::Zero, WireDamage::Duplicate, WireDamage::Delay]
    {
        let port = ports::free();
        let proxy = WireTamper::start(port, damage, BLOCK_BYTES).await;
        let prefill = format!(
            "transfer: {{ path: host_buffered, backends: [tcp], port: {}, advertise: \"{}\" }}",
            port.port(),
            proxy.address
        );
        let fleet = Fleet::start(pair(&prefill, "transfer: { backends: [tcp] }")).await;
        let client = fleet.client();
        let answers = join_all(wanted.iter().map(|prompt| ask(&client, prompt))).await;
        assert!(proxy.damaged() > 0, "{damage:?}: nothing passed through the proxy, the control is void");
        for (want, got) in expected.iter().zip(&answers) {
            assert_eq!(want.proof(), got.proof(), "{damage:?}: {:?}", got.baton);
        }
        let caught =
            counter(&fleet, &fleet.workers("decode").await[0].0, "baton_transfer_checksum_mismatch_total")
                .await;
        assert_eq!(caught > 0.0, damage != WireDamage::Delay, "{damage:?}: {caught} blocks caught");
        fleet.eventually_nothing_held(Duration::from_secs(10)).await;
        fleet.stop().await;
        proxy.stop().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_gives_everything_back() {
    let fleet = Fleet::start(pair("transfer: { path: host_buffered, device_bandwidth: 20MB/s }", "")).await;
    let client = fleet.client();
    for (index, patience_ms) in [1, 5, 20, 60, 150, 400].into_iter().enumerate() {
        let tokens = prompts::random_tokens(50 + index as u64, 2000);
        let body = json!({"model": "tiny", "prompt": tokens, "max_tokens": 3000, "stream": true, "ignore_eos": true});
        let leave = tokio::time::timeout(Duration::from_millis(patience_ms), async {
            let mut stream = client.open("/v1/completions", &body).await.unwrap();
            while stream.chunk().await.unwrap().is_some() {}
        });
        assert!(leave.await.is_err(), "3,000 tokens take longer than {patience_ms} ms");
        fleet.eventually_nothing_held(Duration::from_secs(5)).await;
    }
    eventually("nobody works any more", Duration::from_secs(5), async || {
        let status = fleet.status().await;
        let busy = |worker: &serde_json::Value| {
            worker["requests_running"].as_u64().unwrap_or(1)
                + worker["requests_waiting"].as_u64().unwrap_or(1)
        };
        (status["workers"].as_array()?.iter().map(busy).sum::<u64>() == 0).then_some(())
    })
    .await;
    fleet.stop().await;
}

#[tokio::test]
async fn the_conductor_may_go_and_come_back() {
    let fleet = Fleet::start(pair("", "")).await;
    let client = fleet.client();
    let prompt = Prompt::Tokens(prompts::random_tokens(3, 200));
    let before = ask(&client, &prompt).await;
    let ready = |list: &serde_json::Value| {
        list["workers"]
            .as_array()
            .map_or(0, |workers| workers.iter().filter(|w| w["state"] == "ready").count())
    };
    assert_eq!(ready(&fleet.status().await), 2);
    let http = baton_conductor::http::client();
    let asked =
        http.put(format!("{}/v1/pools/decode/replicas", fleet.conductor)).json(&json!({"replicas": 1}));
    assert_eq!(asked.send().await.unwrap().status(), 200);
    let conductor = conductor_pid(&fleet);
    signal(conductor, Signal::KILL);
    for _ in 0..5 {
        assert_eq!(before.proof(), ask(&client, &prompt).await.proof(), "served from the cached view");
    }
    eventually("the workers have joined the restarted conductor", Duration::from_secs(20), async || {
        let pid = conductor_pid_now(&fleet)?;
        let answer = baton_conductor::http::client()
            .get(format!("{}/v1/workers", fleet.conductor))
            .send()
            .await
            .ok()?;
        let list: serde_json::Value = answer.json().await.ok()?;
        (pid != conductor && ready(&list) == 2).then_some(())
    })
    .await;
    let pools = fleet.get_json(&format!("{}/v1/pools", fleet.conductor)).await;
    let decode =
        pools["pools"].as_array().and_then(|pools| pools.iter().find(|pool| pool["name"] == "decode"));
    assert_eq!(
        decode.unwrap()["operator_set"],
        true,
        "what an operator asked for outlives the conductor: {pools}"
    );
    let fresh = Prompt::Tokens(prompts::random_tokens(4, 300));
    let answer = ask(&client, &fresh).await;
    assert!(answer.imported_tokens() > 0, "handoffs go on under the new epochs: {:?}", answer.baton);
    fleet.stop().await;
}

fn conductor_pid_now(fleet: &Fleet) -> Option<u32> {
    baton_integration::process::children(fleet.launcher_pid()).into_iter().find(|pid| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == b"conductor"))
    })
}

fn conductor_pid(fleet: &Fleet) -> u32 {
    conductor_pid_now(fleet).expect("the conductor is a child of the launcher")
}
