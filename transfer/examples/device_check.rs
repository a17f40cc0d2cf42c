//! Moves KV blocks between the memories of two devices, in two processes, over every network backend that works here,
//! through host memory and straight, and checks every block by its digest:
//!
//! ```text
//! cargo run --release --example device_check -- cuda:0 cuda:1 1GiB
//! cargo run --release --example device_check -- simulated simulated 256MiB ucx
//! ```
//!
//! Arguments, all optional: the device that gives, the one that takes (`simulated`, `cuda:N`, `neuron:N`), bytes moved, and
//! backends. A device that is not there is a reason and a remedy, and exit code 2.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example talks to its user")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use baton_config::protocol::TicketBlock;
use baton_config::{Bytes, Dtype, Epoch, HandoffId, KvGeometry, KvLayout, WorkerId};
use baton_transfer::device::cuda::CudaDevice;
use baton_transfer::device::neuron::NeuronDevice;
use baton_transfer::{
    Agent, AgentOptions, ArenaMemory, BackendKind, Device, DeviceMemory, DigestSeed, EmulatedDevice,
    ExportBlock, ExportOptions, Exporter, HostMemory, ImportOptions, Importer, Pull, Unavailable,
    block_digest,
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

const HANDOFF: HandoffId = HandoffId(0x6261_746f_6e20_6465_7669_6365_2063_6b21);
const EPOCH: Epoch = Epoch(1);
/// Blocks of 1 MiB: 32 layers, 8 heads, 8 tokens in bf16.
const GEOMETRY: KvGeometry = KvGeometry {
    layers: 32,
    kv_heads: 8,
    head_dim: 128,
    block_tokens: 8,
    layout: KvLayout::Nhd,
    dtype: Dtype::Bf16,
    ..KvGeometry::PLAIN
};
/// Backends that cross from one process to another without mapping its memory.
const NETWORKS: [BackendKind; 3] = [BackendKind::Ucx, BackendKind::Libfabric, BackendKind::Tcp];
const REPEATS: usize = 5;
const DEADLINE: Duration = Duration::from_secs(120);

/// The first argument of the process that gives.
const GIVER: &str = "--give";

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Unavailable>() => {
            let remedy = error.downcast_ref::<Unavailable>().map_or("", |unavailable| &unavailable.remedy);
            eprintln!("{error}\n  remedy: {remedy}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: Vec<String>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build()?;
    if arguments.first().is_some_and(|first| first == GIVER) {
        arguments.remove(0);
        return runtime.block_on(give(&Plan::parse(&arguments)?));
    }
    let plan = Plan::parse(&arguments)?;
    runtime.block_on(take(&plan, &arguments))
}

/// What to do.
struct Plan {
    from: String,
    to: String,
    blocks: u32,
    backends: Vec<BackendKind>,
}

impl Plan {
    fn parse(arguments: &[String]) -> anyhow::Result<Self> {
        let word = |at: usize, default: &str| arguments.get(at).map_or(default, String::as_str).to_owned();
        let bytes: Bytes =
            word(2, "256MiB").parse().ok().context("the third argument is a size, like 1GiB")?;
        let named = arguments.get(3..).unwrap_or_default();
        let known = |name: &String| NETWORKS.into_iter().find(|kind| kind.as_str() == name);
        let backends = named.iter().map(|name| known(name).with_context(|| format!("no backend {name}")));
        let backends: Vec<BackendKind> = backends.collect::<anyhow::Result<_>>()?;
        Ok(Self {
            from: word(0, "simulated"),
            to: word(1, "simulated"),
            blocks: u32::try_from(bytes.0 / GEOMETRY.block_bytes() as u64)?.max(1),
            backends: if backends.is_empty() { NETWORKS.to_vec() } else { backends },
        })
    }

    fn bytes(&self) -> usize {
        self.blocks as usize * GEOMETRY.block_bytes()
    }
}

/// Opens a device by its name, with a line about it.
fn open(name: &str, bytes: usize) -> anyhow::Result<(Arc<dyn Device>, String)> {
    let (kind, number) = name.split_once(':').unwrap_or((name, "0"));
    let number = number.parse().with_context(|| format!("{name}: the number of the device"))?;
    Ok(match kind {
        "simulated" => {
            (Arc::new(EmulatedDevice::new(bytes, None)?.reachable()), "emulated device".to_owned())
        }
        "cuda" => {
            let device = CudaDevice::open(number, bytes)?;
            let kernels =
                device.kernel_target().map_or_else(|why| format!("no kernels: {why}"), str::to_owned);
            let line = format!("{}, GPU {number} ({kernels})", device.name());
            (Arc::new(device), line)
        }
        "neuron" => (Arc::new(NeuronDevice::open(number, bytes)?), format!("NeuronCore {number}")),
        other => bail!("{other} is no kind of device: simulated, cuda:N, neuron:N"),
    })
}

fn options(name: &str, backends: Vec<BackendKind>) -> anyhow::Result<AgentOptions> {
    let worker: WorkerId = name.parse().ok().context("a worker's name")?;
    Ok(AgentOptions { backends, ..AgentOptions::new(worker) })
}

/// What the taking process asks for: blocks granted directly or from staging.
#[derive(Serialize, Deserialize)]
struct Ask {
    direct: bool,
}

/// What the giving process says: once at its start, and after each publishing.
#[derive(Serialize, Deserialize)]
enum Said {
    Ready { device: String, metadata: Vec<u8> },
    Published { blocks: Vec<TicketBlock>, why_staged: Option<String> },
}

fn say(said: &Said) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(said)?)?;
    Ok(out.flush()?)
}

/// The bytes of block `index`: no two blocks have the same.
fn contents(index: u32) -> Vec<u8> {
    let word =
        |i: usize| (i as u64 ^ u64::from(index) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    (0..GEOMETRY.block_bytes() / 8).flat_map(word).collect()
}

/// The process that gives: fills its device and publishes all of it each time it is asked.
async fn give(plan: &Plan) -> anyhow::Result<()> {
    let (device, line) = open(&plan.from, plan.bytes())?;
    for index in 0..plan.blocks {
        device.write(index as usize * GEOMETRY.block_bytes(), &contents(index));
    }
    let agent = Agent::start(options("giver", NETWORKS.to_vec())?).await?;
    agent.set_epoch(EPOCH);
    say(&Said::Ready { device: line, metadata: agent.metadata() })?;
    let memory = ArenaMemory::Device(device);
    let exporter = |direct| {
        let slots = plan.blocks as usize * 2;
        let options = ExportOptions { slots, direct, lease: DEADLINE, ..ExportOptions::default() };
        Exporter::new(agent.clone(), memory.clone(), GEOMETRY, options)
    };
    let exporters = [exporter(false)?, exporter(true)?];
    for line in std::io::stdin().lock().lines() {
        let ask: Ask = serde_json::from_str(&line?)?;
        let exporter = &exporters[usize::from(ask.direct)];
        for each in &exporters {
            each.release(HANDOFF).await;
        }
        let blocks: Vec<ExportBlock> =
            (0..plan.blocks).map(|index| ExportBlock { index, block: index }).collect();
        let published = exporter.publish(HANDOFF, EPOCH, &blocks, Instant::now() + DEADLINE).await?;
        say(&Said::Published { blocks: published, why_staged: exporter.why_staged().map(str::to_owned) })?;
    }
    Ok(())
}

/// The other process, which ends when this is dropped.
struct Giver {
    child: Child,
    asks: ChildStdin,
    says: BufReader<ChildStdout>,
}

impl Giver {
    fn start(arguments: &[String]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(GIVER).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let asks = child.stdin.take().context("its input")?;
        let says = BufReader::new(child.stdout.take().context("its output")?);
        Ok(Self { child, asks, says })
    }

    fn hear(&mut self) -> anyhow::Result<Said> {
        let mut line = String::new();
        if self.says.read_line(&mut line)? == 0 {
            bail!("the giving process has ended: {}", self.child.wait()?);
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn publish(&mut self, direct: bool) -> anyhow::Result<(Vec<TicketBlock>, Option<String>)> {
        writeln!(self.asks, "{}", serde_json::to_string(&Ask { direct })?)?;
        match self.hear()? {
            Said::Published { blocks, why_staged } => Ok((blocks, why_staged)),
            Said::Ready { .. } => bail!("the giving process started twice"),
        }
    }
}

impl Drop for Giver {
    fn drop(&mut self) {
        // It has ended already, or is to end now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process that takes, and tells.
async fn take(plan: &Plan, arguments: &[String]) -> anyhow::Result<()> {
    let (device, line) = open(&plan.to, plan.bytes())?;
    let mut giver = Giver::start(arguments)?;
    let Said::Ready { device: from, metadata } = giver.hear()? else {
        bail!("the giving process is confused")
    };
    println!("{}: {} blocks of 1 MiB from {from} to {line}", today(), plan.blocks);
    copies(device.as_ref(), plan)?;
    println!("{:10} {:14} {:>9} {:>9}  path", "backend", "way", "ms", "GB/s");
    for backend in plan.backends.iter().copied() {
        let agent = Agent::start(options("taker", vec![backend])?).await?;
        agent.set_epoch(EPOCH);
        let session = match agent.connect(&"giver".parse()?, EPOCH, &metadata).await {
            Ok(session) => session,
            Err(error) => {
                println!("{:10} not used: {error}", backend.as_str());
                continue;
            }
        };
        for direct in [false, true] {
            let reached = match DeviceMemory::new(Arc::clone(&device)) {
                Ok(memory) => session.reaches(&memory).await,
                Err(why) => Err(why),
            };
            if let (true, Err(why)) = (direct, &reached) {
                println!("{backend:10} not direct: {why}", backend = backend.as_str());
                continue;
            }
            let memory = ArenaMemory::Device(Arc::clone(&device));
            let imports = ImportOptions { slots: plan.blocks as usize, direct };
            let importer = Importer::new(memory, GEOMETRY, &imports)?;
            let mut best = Duration::MAX;
            let mut why = None;
            for _ in 0..REPEATS {
                device.write(0, &vec![0; plan.bytes()]);
                let (blocks, why_staged) = giver.publish(direct)?;
                let pull = Pull {
                    handoff: HANDOFF,
                    epoch: EPOCH,
                    source: GEOMETRY,
                    blocks,
                    tokens: 0..plan.blocks * GEOMETRY.block_tokens,
                    dest_blocks: (0..plan.blocks).rev().collect(),
                };
                let report = importer.pull(&session, pull, Instant::now() + DEADLINE).await?;
                best = best.min(report.elapsed);
                why = why_staged.or_else(|| importer.why_staged().map(str::to_owned));
            }
            check(device.as_ref(), plan)?;
            let way = match (direct, &why) {
                (true, None) => "direct",
                _ => "host-buffered",
            };
            if let (true, Some(why)) = (direct, why) {
                println!("{:10} not direct: {why}", backend.as_str());
                continue;
            }
            let gb_per_s = plan.bytes() as f64 / best.as_secs_f64() / 1e9;
            let path = session.path().reason.clone();
            println!(
                "{:10} {way:14} {:9.2} {gb_per_s:9.2}  {path}",
                backend.as_str(),
                best.as_secs_f64() * 1e3
            );
        }
        agent.close().await;
    }
    println!("every block was verified by its digest, and compared with what was sent");
    Ok(())
}

/// Whether the device holds what the other process filled its own with.
fn check(device: &dyn Device, plan: &Plan) -> anyhow::Result<()> {
    let mut found = vec![0; GEOMETRY.block_bytes()];
    for index in 0..plan.blocks {
        device.read((plan.blocks - 1 - index) as usize * GEOMETRY.block_bytes(), &mut found);
        if found != contents(index) {
            bail!("block {index} holds other bytes than were sent");
        }
    }
    Ok(())
}

/// What the device's own copies and digests take.
fn copies(device: &dyn Device, plan: &Plan) -> anyhow::Result<()> {
    let bytes = plan.bytes();
    let host = HostMemory::allocate(bytes, "check")?;
    host.prefault()?;
    let rate = |what: &str, work: &dyn Fn() -> anyhow::Result<()>| -> anyhow::Result<()> {
        work()?;
        let mut best = Duration::MAX;
        for _ in 0..REPEATS {
            let start = Instant::now();
            work()?;
            best = best.min(start.elapsed());
        }
        println!("{what:28} {:8.2} GB/s", bytes as f64 / best.as_secs_f64() / 1e9);
        Ok(())
    };
    rate("to host memory", &|| Ok(device.copy_to_host(0, &host, 0, bytes)?))?;
    match device.pin(&host) {
        Ok(_pinned) => {
            rate("to pinned host memory", &|| Ok(device.copy_to_host(0, &host, 0, bytes)?))?;
            rate("from pinned host memory", &|| Ok(device.copy_from_host(0, &host, 0, bytes)?))?;
        }
        Err(why) => println!("host memory is not pinned: {why}"),
    }
    let seed = |index| DigestSeed { handoff: HANDOFF, epoch: EPOCH, index };
    let places: Vec<(usize, DigestSeed)> =
        (0..plan.blocks).map(|index| (index as usize * GEOMETRY.block_bytes(), seed(index))).collect();
    match device.kernels() {
        Ok(kernels) => {
            for index in 0..plan.blocks {
                device.write(index as usize * GEOMETRY.block_bytes(), &contents(index));
            }
            let found = kernels.digest_blocks(&places, GEOMETRY.block_bytes())?;
            for (index, digest) in (0..plan.blocks).zip(found) {
                if digest != block_digest(seed(index), &contents(index)) {
                    bail!("the device computes another digest of block {index} than the processor");
                }
            }
            rate("digests by the device", &|| {
                kernels.digest_blocks(&places, GEOMETRY.block_bytes())?;
                Ok(())
            })?;
        }
        Err(why) => println!("digests by the device: {why}"),
    }
    Ok(())
}

/// The date, in the calendar of the Universal Time.
#[expect(clippy::disallowed_methods, reason = "a figure is told with its calendar date")]
fn today() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // Days to civil date, after Howard Hinnant's public-domain algorithm.
    let days = (since.as_secs() / 86_400) as i64 + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}
