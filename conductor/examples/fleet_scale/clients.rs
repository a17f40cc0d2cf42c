//! A thousand workers and watchers.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use baton_conductor::membership::Standing;
use baton_conductor::{Client, ClientOptions, Membership, MembershipOptions, Registration, WorkerState};
use baton_config::{Epoch, Role, WorkerId};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::METADATA_BYTES;
use crate::conductor::{Backing, Conductor};

const CONCURRENT: usize = 64;
const EVENTS: usize = 50;
const KILLS: usize = 10;
/// Time for any step before it is taken for failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Workers that share a watch in [`rejoin`]: what is measured is the way back to a lease.
const WORKERS_PER_CLIENT: usize = 100;

/// Registers everybody, 64 at a time.
pub(crate) async fn register_all(url: &str, workers: usize) -> Result<Duration> {
    let http = baton_conductor::http::client();
    let ready = http.get(format!("{url}/readyz"));
    while !ready.try_clone().context("a request")?.send().await?.status().is_success() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let start = Instant::now();
    each(workers, |i| register(&http, url, i)).await?;
    Ok(start.elapsed())
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

/// Time from sending a drain to the line about it at every watcher, sorted.
pub(crate) async fn fan_out(url: &str, workers: usize, watchers: usize) -> Result<Vec<Duration>> {
    let http = baton_conductor::http::client();
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
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut delays = Vec::with_capacity(EVENTS * watchers);
    for reader in running {
        let seen = tokio::time::timeout(PATIENCE, reader).await.context("a watcher never saw all")??;
        if seen.len() != EVENTS {
            bail!("a watcher saw {} of {EVENTS} events", seen.len());
        }
        delays.extend(seen.iter().zip(&asked).map(|(seen, asked)| seen.saturating_sub(*asked)));
    }
    delays.sort_unstable();
    Ok(delays)
}

/// One look into the client's cache.
pub(crate) async fn look_up(url: &str, workers: usize) -> Result<Duration> {
    const ROUNDS: u32 = 200_000;
    let client = Client::start(ClientOptions::new(vec![url.to_owned()]))?;
    client.wait_for(|view| view.workers.len() == workers).await;
    let name: WorkerId = format!("w{}", workers / 2).parse()?;
    let start = Instant::now();
    let mut found = 0u32;
    for _ in 0..ROUNDS {
        found += u32::from(client.view().worker(std::hint::black_box(&name)).is_some());
    }
    let each = start.elapsed() / ROUNDS;
    client.close().await;
    if found == ROUNDS { Ok(each) } else { bail!("{found} of {ROUNDS} found") }
}

/// The conductor is away for longer than the leases last; how long everybody takes to be back with a new epoch.
pub(crate) async fn rejoin(backing: &Backing, workers: usize) -> Result<String> {
    let lease_ttl = Duration::from_secs(10);
    let mut conductor = Conductor::start(backing, lease_ttl, 0).await?;
    let (url, port) = (conductor.url.clone(), conductor.port()?);
    let clients: Vec<Client> = (0..workers.div_ceil(WORKERS_PER_CLIENT))
        .map(|_| Client::start(ClientOptions::new(vec![url.clone()])))
        .collect::<Result<_, _>>()?;
    // Something must listen at the address that they tell.
    let host = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = host.local_addr()?.to_string();
    let members = tokio::sync::Mutex::new(Vec::with_capacity(workers));
    each(workers, |i| {
        let (client, address, members) = (&clients[i / WORKERS_PER_CLIENT], &address, &members);
        async move {
            let options = MembershipOptions::default();
            let member = Membership::join(client, registration(i, address)?, options).await?;
            members.lock().await.push(member);
            Ok(())
        }
    })
    .await?;
    let members = members.into_inner();
    let epochs: Vec<Option<Epoch>> = members.iter().map(|member| *member.epoch().borrow()).collect();
    conductor.stop().await?;
    tokio::time::sleep(lease_ttl + Duration::from_secs(2)).await;
    let mut conductor = Conductor::start(backing, lease_ttl, port).await?;
    let back = Instant::now();
    let mut times = Vec::with_capacity(workers);
    for (member, before) in members.iter().zip(epochs) {
        let mut standing = member.standing();
        let held = standing.wait_for(|now| matches!(now, Standing::Held { epoch } if Some(*epoch) > before));
        tokio::time::timeout(PATIENCE, held).await.context("a worker never came back")??;
        times.push(back.elapsed());
    }
    let last = times.iter().max().copied().unwrap_or_default();
    conductor.stop().await?;
    Ok(format!("{last:.2?}"))
}

/// Of two conductors the leading one is killed, again and again; how long until the other leads, at best and at worst.
pub(crate) async fn succeed(backing: &Backing) -> Result<String> {
    let start = || Conductor::start(backing, Duration::from_secs(10), 0);
    let mut leader = start().await?;
    leader.leads().await?;
    let mut times = Vec::with_capacity(KILLS);
    for _ in 0..KILLS {
        let heir = start().await?;
        // Until it is listed and waits.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let killed = Instant::now();
        leader.stop().await?;
        tokio::time::timeout(PATIENCE, heir.leads()).await.context("nobody leads")??;
        times.push(killed.elapsed());
        leader = heir;
    }
    leader.stop().await?;
    times.sort();
    Ok(format!("{:.1?} to {:.1?}", times[0], times[KILLS - 1]))
}

fn registration(i: usize, address: &str) -> Result<Registration> {
    Ok(Registration {
        worker: format!("w{i}").parse()?,
        pool: "p".parse()?,
        role: Role::Both,
        model: "m".to_owned(),
        engine: "sim".to_owned(),
        kv: None,
        server: None,
        address: address.to_owned(),
        transfer: "A".repeat(METADATA_BYTES),
        state: WorkerState::Ready,
    })
}
