//! The other process of a bench: serves one region, and the raw probe of it.
//!
//! They talk in lines over the peer's standard streams: a [`Wanted`] in, a [`Ready`] out; then `cpu` in, nanoseconds
//! of CPU time out, or `bare` and the name of a library that is to look for what comes (none: all rest), `bare` out. The
//! end of the input ends the peer, however this side ended.

use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::cores::Cores;
use super::{BenchError, HANDOFF, PEER_EPOCH, PEER_NAME, agent_options, bare, fill, raw};
use crate::agent::{Agent, BackendKind, RegionId};
use crate::memory::HostMemory;
use crate::session::Descriptor;

/// Begins a line that says which library is to look.
const BARE: &str = "bare ";

/// What a peer is asked for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Wanted {
    pub(super) region_bytes: usize,
    pub(super) backends: Vec<String>,
    pub(super) plugin: Option<PathBuf>,
}

/// What a peer says once it serves.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ready {
    pub(super) metadata: Vec<u8>,
    /// The region to read, filled.
    pub(super) region: u32,
    /// The region to write to.
    pub(super) scratch: u32,
    /// Where raw TCP is served.
    pub(super) raw: SocketAddr,
    /// The process, and where the region to read is in it.
    pub(super) pid: i32,
    pub(super) address: usize,
    /// Where the libraries by themselves are.
    pub(super) bare: Vec<bare::Shown>,
}

/// A running peer process; it ends when dropped.
pub(super) struct Peer {
    pub(super) ready: Ready,
    input: ChildStdin,
    output: tokio::io::Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Peer {
    /// Starts one, on a core of its own where it has one.
    pub(super) async fn spawn(
        arguments: &[OsString],
        wanted: &Wanted,
        cores: Option<&Cores>,
    ) -> Result<Self, BenchError> {
        let program = std::env::current_exe().map_err(BenchError::io("finding this program"))?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let child = match cores {
            Some(cores) => cores.for_peer(|| command.spawn()),
            None => command.spawn(),
        };
        let mut child = child.map_err(BenchError::io("starting the peer process"))?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(BenchError::Peer("nothing: it has no standard streams".to_owned()));
        };
        let mut output = BufReader::new(output).lines();
        let wanted = serde_json::to_string(wanted).map_err(|error| BenchError::Peer(error.to_string()))?;
        let line = ask(&mut input, &mut output, &wanted).await?;
        let ready = serde_json::from_str(&line).map_err(|_| BenchError::Peer(line))?;
        Ok(Self { ready, input, output, _child: child })
    }

    /// CPU time the peer process has used.
    pub(super) async fn cpu(&mut self) -> Result<Duration, BenchError> {
        let line = ask(&mut self.input, &mut self.output, "cpu").await?;
        line.parse().map(Duration::from_nanos).map_err(|_| BenchError::Peer(line))
    }

    /// Has the peer look for what comes over one library by itself, or rest.
    pub(super) async fn look(&mut self, library: Option<BackendKind>) -> Result<(), BenchError> {
        let name = library.map_or("", BackendKind::as_str);
        let line = ask(&mut self.input, &mut self.output, &format!("{BARE}{name}")).await?;
        if line == BARE.trim() { Ok(()) } else { Err(BenchError::Peer(line)) }
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
    let Wanted { region_bytes, backends, plugin } =
        serde_json::from_str(line.trim()).map_err(|_| BenchError::Peer(line))?;
    let (memory, scratch) =
        (HostMemory::allocate(region_bytes, "bench")?, HostMemory::allocate(region_bytes, "bench scratch")?);
    fill(&memory);
    scratch.prefault()?;
    let name = PEER_NAME.parse().map_err(|_| BenchError::Peer(PEER_NAME.to_owned()))?;
    let kinds = BackendKind::ALL.into_iter().filter(|kind| backends.iter().any(|b| b == kind.as_str()));
    let kinds: Vec<_> = kinds.collect();
    let (owners, shown) = bare::Owners::start(&kinds, &memory);
    let agent = Agent::start(agent_options(name, kinds, plugin.as_ref())).await?;
    agent.set_epoch(PEER_EPOCH);
    let region = agent.register(memory.clone())?;
    let scratch_region = agent.register(scratch.clone())?;
    agent.grant(HANDOFF, whole(region, region_bytes as u64));
    agent.grant_write(HANDOFF, &whole(scratch_region, region_bytes as u64));
    let ready = Ready {
        metadata: agent.metadata(),
        region: region.0,
        scratch: scratch_region.0,
        pid: rustix::process::getpid().as_raw_nonzero().get(),
        address: memory.place().address,
        bare: shown,
        raw: raw::serve(memory, scratch).map_err(BenchError::io("starting the raw probe"))?,
    };
    blocking(move || {
        say(&serde_json::to_string(&ready).map_err(|error| BenchError::Peer(error.to_string()))?)?;
        for line in std::io::stdin().lock().lines() {
            let line = line.map_err(BenchError::io("reading a line"))?;
            match (line.as_str(), line.strip_prefix(BARE)) {
                ("cpu", _) => say(&own_cpu().as_nanos().to_string())?,
                (_, Some(library)) => {
                    owners.wake(Some(library).filter(|name| !name.is_empty()));
                    say(BARE.trim())?;
                }
                _ => return Err(BenchError::Peer(line)),
            }
        }
        Ok(())
    })
    .await?;
    agent.close().await;
    Ok(())
}

/// All of a region, in descriptors as long as they may be.
fn whole(region: RegionId, bytes: u64) -> Vec<Descriptor> {
    const LONGEST: u32 = 1 << 30;
    let descriptor = |offset: u64| {
        let len = (bytes - offset).min(u64::from(LONGEST)) as u32;
        Descriptor { region, offset, len }
    };
    (0..bytes).step_by(LONGEST as usize).map(descriptor).collect()
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
