//! The other process of a bench: serves one region, and the raw probe of it.
//!
//! They talk in lines over the peer's standard streams: the size of the region in, a [`Ready`] out; then `cpu` in,
//! nanoseconds of CPU time out. The end of the input ends the peer, however this side ended.

use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::{BenchError, HANDOFF, PEER_EPOCH, PEER_NAME, fill, raw};
use crate::agent::{Agent, AgentOptions};
use crate::memory::HostMemory;
use crate::session::Descriptor;

/// What a peer says once it serves.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ready {
    pub(super) metadata: Vec<u8>,
    pub(super) region: u32,
    pub(super) raw: SocketAddr,
}

/// A running peer process; it ends when dropped.
pub(super) struct Peer {
    pub(super) ready: Ready,
    input: ChildStdin,
    output: tokio::io::Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Peer {
    pub(super) async fn spawn(arguments: &[OsString], region_bytes: usize) -> Result<Self, BenchError> {
        let program = std::env::current_exe().map_err(BenchError::io("finding this program"))?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(BenchError::io("starting the peer process"))?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(BenchError::Peer("nothing: it has no standard streams".to_owned()));
        };
        let mut output = BufReader::new(output).lines();
        let line = ask(&mut input, &mut output, &region_bytes.to_string()).await?;
        let ready = serde_json::from_str(&line).map_err(|_| BenchError::Peer(line))?;
        Ok(Self { ready, input, output, _child: child })
    }

    /// CPU time the peer process has used.
    pub(super) async fn cpu(&mut self) -> Result<Duration, BenchError> {
        let line = ask(&mut self.input, &mut self.output, "cpu").await?;
        line.parse().map(Duration::from_nanos).map_err(|_| BenchError::Peer(line))
    }
}

async fn ask(
    input: &mut ChildStdin,
    output: &mut tokio::io::Lines<BufReader<ChildStdout>>,
    line: &str,
) -> Result<String, BenchError> {
    input.write_all(format!("{line}\n").as_bytes()).await.map_err(BenchError::io("talking to the peer"))?;
    let answer = output.next_line().await.map_err(BenchError::io("listening to the peer"))?;
    answer.ok_or_else(|| BenchError::Peer("nothing: it ended".to_owned()))
}

/// CPU time this process has used.
pub(super) fn own_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Serves as the other process of [`super::run`] until its standard input ends.
///
/// # Errors
/// When the agent does not start or the other side says something that makes no sense.
pub async fn serve_peer() -> Result<(), BenchError> {
    let line = blocking(|| {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).map_err(BenchError::io("reading the first line"))?;
        Ok(line)
    });
    let line = line.await?;
    let region_bytes: usize = line.trim().parse().map_err(|_| BenchError::Peer(line))?;
    let memory = HostMemory::allocate(region_bytes, "bench")?;
    fill(&memory);
    let name = PEER_NAME.parse().map_err(|_| BenchError::Peer(PEER_NAME.to_owned()))?;
    let agent = Agent::start(AgentOptions::new(name)).await?;
    agent.set_epoch(PEER_EPOCH);
    let region = agent.register(memory.clone())?;
    let chunk = 1u32 << 30;
    let whole = (0..region_bytes as u64).step_by(chunk as usize).map(|offset| Descriptor {
        region,
        offset,
        len: (region_bytes as u64 - offset).min(u64::from(chunk)) as u32,
    });
    agent.grant(HANDOFF, whole.collect());
    let raw = raw::serve(memory).map_err(BenchError::io("starting the raw probe"))?;
    let ready = Ready { metadata: agent.metadata(), region: region.0, raw };
    blocking(move || {
        say(&serde_json::to_string(&ready).map_err(|error| BenchError::Peer(error.to_string()))?)?;
        for line in std::io::stdin().lock().lines() {
            match line.map_err(BenchError::io("reading a line"))?.as_str() {
                "cpu" => say(&own_cpu().as_nanos().to_string())?,
                other => return Err(BenchError::Peer(other.to_owned())),
            }
        }
        Ok(())
    })
    .await?;
    agent.close().await;
    Ok(())
}

fn say(line: &str) -> Result<(), BenchError> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{line}").and_then(|()| output.flush()).map_err(BenchError::io("answering"))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BenchError> + Send + 'static,
) -> Result<T, BenchError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(BenchError::io("a bench thread")(std::io::Error::other(error))))
}
