//! The conductor under test, in a process of its own.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use baton_conductor::store::etcd::EtcdOptions;
use baton_conductor::{ConductorOptions, PoolOptions, StoreOptions, serve};
use baton_config::Role;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

/// Where the conductor keeps its state.
#[derive(Debug, Clone)]
pub(crate) enum Backing {
    Embedded,
    /// At this URL, below this prefix.
    Etcd {
        url: String,
        prefix: String,
    },
}

/// A running conductor.
#[derive(Debug)]
pub(crate) struct Conductor {
    process: Child,
    pub(crate) url: String,
}

impl Conductor {
    /// On `port`, or a free one for 0.
    pub(crate) async fn start(backing: &Backing, lease_ttl: Duration, port: u16) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["serve", &port.to_string(), &lease_ttl.as_millis().to_string()]);
        if let Backing::Etcd { url, prefix } = backing {
            command.args([url, prefix]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn()?;
        let output = process.stdout.take().context("an output")?;
        let url = BufReader::new(output).lines().next_line().await?.context("the conductor ended")?;
        Ok(Self { process, url })
    }

    pub(crate) fn port(&self) -> Result<u16> {
        Ok(self.url.rsplit(':').next().context("a port")?.parse()?)
    }

    pub(crate) async fn stop(&mut self) -> Result<()> {
        self.process.kill().await.context("it could not be killed")
    }

    /// Waits until it leads.
    pub(crate) async fn leads(&self) -> Result<()> {
        let http = baton_conductor::http::client();
        loop {
            let metrics = http.get(format!("{}/metrics", self.url)).send().await?.text().await?;
            if metrics.lines().any(|line| line == "baton_conductor_leader 1") {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn resident_mb(&self) -> Result<f64> {
        let pid = self.process.id().context("it has ended")?;
        let status = tokio::fs::read_to_string(format!("/proc/{pid}/status")).await?;
        let line = status.lines().find(|line| line.starts_with("VmRSS")).context("no VmRSS")?;
        let kib: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
        Ok(kib * 1024.0 / 1e6)
    }
}

/// The child: `PORT LEASE_TTL_MS [ETCD PREFIX]`.
pub(crate) async fn serve_here(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let mut next = |what: &'static str| arguments.next().context(what);
    let port: u16 = next("a port")?.parse()?;
    let lease_ttl = Duration::from_millis(next("a time")?.parse()?);
    let pool = PoolOptions { name: "p".parse()?, role: Role::Both, replicas: 1, min: 1, max: 10_000 };
    let mut options = ConductorOptions::new(vec![pool]);
    options.lease_ttl = lease_ttl;
    if let Ok(url) = next("no etcd") {
        options.store = StoreOptions::Etcd(EtcdOptions::new(vec![url], &next("a prefix")?));
    }
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}", listener.local_addr()?);
    Ok(serve(options, listener, CancellationToken::new()).await?)
}
