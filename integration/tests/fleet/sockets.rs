//! What the processes of a fleet have set on their sockets.

use std::time::Duration;

use baton_integration::process::{children, connections, eventually};
use baton_integration::{Fleet, FleetOptions};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(20);

/// Tokens are small pieces: with Nagle's algorithm each waits until the one before it is acknowledged, which an ordinary
/// peer delays by 40 ms.
#[tokio::test]
async fn every_connection_of_a_fleet_sends_small_pieces_at_once() {
    let pools = "  - { name: p, role: prefill, kv: { memory: 16MiB } }\n  - { name: d, role: decode, kv: { memory: 16MiB } }\n";
    let mut options = FleetOptions::tiny(pools);
    options.document =
        options.document.replace("listen: 127.0.0.1:0 }", "listen: 127.0.0.1:0, disaggregation: always }");
    let behind = Fleet::start(options).await;
    let document = format!(
        "version: 1\nmodel: {{ id: tiny }}\nrouter: {{ listen: 127.0.0.1:0 }}\npools:\n  - {{ name: servers, role: both, engine: {{ kind: openai, url: \"{}\" }} }}\n",
        behind.router
    );
    let front = Fleet::start(FleetOptions { document }).await;
    let body = json!({ "model": "tiny", "prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": true, "stream": true });
    // One over both fleets, one over the second alone, while they are looked at.
    let mut streams = Vec::new();
    for fleet in [&front, &behind] {
        let mut stream = fleet.client().open("/v1/completions", &body).await.unwrap();
        assert!(stream.chunk().await.unwrap().is_some());
        streams.push(stream);
    }
    for fleet in [&front, &behind] {
        let router: std::net::SocketAddr = fleet.router.trim_start_matches("http://").parse().unwrap();
        let seen = eventually("clients, workers and servers are connected", PATIENCE, async || {
            let mut seen = Vec::new();
            for pid in children(fleet.launcher_pid()) {
                match connections(pid) {
                    Ok(found) => seen.extend(found.into_iter().map(|one| (pid, one))),
                    // It may have ended; and a system may forbid to look.
                    Err(error) => println!("not looked at {pid}: {error}"),
                }
            }
            let clients = seen.iter().filter(|(_, one)| one.local == router).count();
            (clients > 0 && seen.len() >= 6).then_some(seen)
        })
        .await;
        println!("{} connections of {}", seen.len(), fleet.router);
        let late: Vec<_> = seen.iter().filter(|(_, one)| !one.nodelay).collect();
        assert!(late.is_empty(), "{late:?}");
    }
    drop(streams);
    front.stop().await;
    behind.stop().await;
}
