//! How a conductor with the embedded store bears a large fleet: registrations, watch fan-out, look-ups, memory.
//!
//! `cargo run --release -p baton-conductor --example fleet_scale -- [WORKERS] [WATCHERS]` (1000 and 1000; needs
//! `ulimit -n` of twice the sum). Server and clients share this process: times include the clients' own work.
#![expect(clippy::print_stdout, reason = "printing is what this program is for")]

use std::time::Duration;

use anyhow::{Context, Result, bail};
use baton_conductor::{Client, ClientOptions, ConductorOptions, PoolOptions, serve};
use baton_config::{Role, WorkerId};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const METADATA_BYTES: usize = 4096;
const CONCURRENT: usize = 64;
const EVENTS: usize = 50;

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut count = || arguments.next().map_or(Ok(1000), |text| text.parse::<usize>());
    let (workers, watchers) = (count()?, count()?);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let pool = PoolOptions { name: "p".parse()?, role: Role::Both, replicas: 1, min: 1, max: 10_000 };
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let server = tasks.spawn(serve(ConductorOptions::new(vec![pool]), listener, stop.clone()));
    let before = resident_mib().await?;

    let http = baton_conductor::http::client();
    let start = Instant::now();
    each(workers, |i| register(&http, &url, i)).await?;
    let took = start.elapsed();
    println!(
        "register   {workers} workers with {METADATA_BYTES} B of metadata: {took:.2?} ({CONCURRENT} at a time)"
    );
    println!("memory     {:.1} MiB resident before, {:.1} MiB after", before, resident_mib().await?);

    let start = Instant::now();
    each(workers, |i| keep_alive(&http, &url, i)).await?;
    println!("keepalive  {workers} refused as stale: {:.2?}", start.elapsed());

    fan_out(&http, &url, workers, watchers).await?;
    look_up(&url, workers).await?;
    stop.cancel();
    server.await??;
    Ok(())
}

async fn each<F: Future<Output = Result<()>>>(count: usize, work: impl Fn(usize) -> F) -> Result<()> {
    let mut running = FuturesUnordered::new();
    for i in 0..count {
        if running.len() == CONCURRENT {
            running.next().await.context("one is running")??;
        }
        running.push(work(i));
    }
    while let Some(done) = running.next().await {
        done?;
    }
    Ok(())
}

async fn register(http: &reqwest::Client, url: &str, i: usize) -> Result<()> {
    let body = json!({
        "worker": format!("w{i}"), "incarnation": format!("{i:032x}"), "pool": "p", "role": "both", "model": "m",
        "engine": "sim", "address": format!("127.0.0.1:{}", 1 + i % 65_535), "state": "ready",
        "transfer": "A".repeat(METADATA_BYTES),
    });
    let reply = http.post(format!("{url}/v1/workers")).json(&body).send().await?;
    if reply.status() != 201 {
        bail!("registration {i}: {}", reply.text().await?);
    }
    Ok(())
}

/// With a wrong epoch, so that the whole path runs and the answer is the same whatever the epoch is.
async fn keep_alive(http: &reqwest::Client, url: &str, i: usize) -> Result<()> {
    let body = json!({"epoch": 1, "state": "ready"});
    let reply = http.post(format!("{url}/v1/workers/w{i}/keepalive")).json(&body).send().await?;
    if reply.status() != 409 {
        bail!("keepalive {i}: {}", reply.text().await?);
    }
    Ok(())
}

/// Time from sending a drain to the line about it at every watcher.
async fn fan_out(http: &reqwest::Client, url: &str, workers: usize, watchers: usize) -> Result<()> {
    let listing: serde_json::Value = http.get(format!("{url}/v1/workers")).send().await?.json().await?;
    let since = listing["revision"].as_u64().context("a revision")?;
    let mut streams = Vec::with_capacity(watchers);
    for _ in 0..watchers {
        let reply = http.get(format!("{url}/v1/watch?since={since}")).send().await?;
        streams.push(reply.error_for_status()?.bytes_stream());
    }
    let (sent, readers) = (Instant::now(), TaskTracker::new());
    let mut running = Vec::with_capacity(watchers);
    for mut stream in streams {
        running.push(readers.spawn(async move {
            let (mut seen, mut text) = (Vec::with_capacity(EVENTS), Vec::new());
            while seen.len() < EVENTS {
                let Some(Ok(chunk)) = stream.next().await else { break };
                text.extend_from_slice(&chunk);
                while let Some(end) = text.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = text.drain(..=end).collect();
                    if line.windows(7).any(|part| part == b"\"drain\"") {
                        seen.push(sent.elapsed());
                    }
                }
            }
            seen
        }));
    }
    let mut asked = Vec::with_capacity(EVENTS);
    for i in 0..EVENTS {
        asked.push(sent.elapsed());
        http.post(format!("{url}/v1/workers/w{}/drain", i % workers)).send().await?.error_for_status()?;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut delays = Vec::with_capacity(EVENTS * watchers);
    for reader in running {
        let seen = reader.await?;
        if seen.len() != EVENTS {
            bail!("a watcher saw {} of {EVENTS} events", seen.len());
        }
        delays.extend(seen.iter().zip(&asked).map(|(seen, asked)| seen.saturating_sub(*asked)));
    }
    delays.sort_unstable();
    let at = |share: usize| delays[(delays.len() - 1) * share / 100];
    let (p50, p99, worst) = (at(50), at(99), at(100));
    println!(
        "fan-out    {EVENTS} events x {watchers} watchers: p50 {p50:.2?}, p99 {p99:.2?}, worst {worst:.2?}"
    );
    Ok(())
}

async fn look_up(url: &str, workers: usize) -> Result<()> {
    const ROUNDS: u32 = 200_000;
    let client = Client::start(ClientOptions::new(vec![url.to_owned()]))?;
    client.wait_for(|view| view.workers.len() == workers).await;
    let name: WorkerId = format!("w{}", workers / 2).parse()?;
    let start = Instant::now();
    let mut found = 0u32;
    for _ in 0..ROUNDS {
        found += u32::from(client.view().worker(std::hint::black_box(&name)).is_some());
    }
    println!("look-up    {:.0?} each in the client's cache ({found} found)", start.elapsed() / ROUNDS);
    client.close().await;
    Ok(())
}

async fn resident_mib() -> Result<f64> {
    let status = tokio::fs::read_to_string("/proc/self/status").await?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib / 1024.0)
}
