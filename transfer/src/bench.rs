//! Measures reads and writes between two processes of this machine, with the raw limit of the same bytes beside every
//! row.
//!
//! The peer is this program once more, in [`serve_peer`]. Every row is measured in rounds: some raw probes, some
//! reads without digests, some with, so that whatever else the machine does meets all of them alike. The raw limit
//! of `shm` is `memcpy` of equally scattered blocks; that of `cma` `process_vm_readv` of them, by as few calls as the
//! system takes them in; that of everything else `writev` and `readv` of them over TCP, by two blocking threads. Beside
//! reads over libfabric and UCX there is the library by itself as well. Where there are just two cores, each process has one
//! of them.

mod bare;
mod cores;
mod measure;
mod peer;
mod raw;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use baton_config::{Epoch, HandoffId, WorkerId};
use serde::{Deserialize, Serialize};

pub use self::peer::serve_peer;

use crate::agent::paths::chain;
use crate::agent::{AgentOptions, BackendKind, ConnectError, Integrity, RegisterError, StartError};
use crate::backend::plugin::PluginOptions;
use crate::error::TransferError;
use crate::memory::MemoryError;

/// So many blocks of so many bytes, moved by one read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Blocks.
    pub blocks: u32,
    /// Bytes of each.
    pub block_bytes: u32,
}

impl Shape {
    /// The shapes measured by default, from one small block to the cache of a long prompt.
    pub const DEFAULT: [Self; 12] = [
        Self::new(1, 4 << 10),
        Self::new(64, 4 << 10),
        Self::new(1024, 4 << 10),
        Self::new(4096, 4 << 10),
        Self::new(1, 64 << 10),
        Self::new(64, 64 << 10),
        Self::new(512, 64 << 10),
        Self::new(64, 256 << 10),
        Self::new(1, 1 << 20),
        Self::new(32, 1 << 20),
        Self::new(1, 4 << 20),
        Self::new(16, 4 << 20),
    ];
    /// Most bytes of the blocks of one of [`Shape::full`].
    pub const FULL_MAX_BYTES: usize = 256 << 20;

    /// So many blocks of so many bytes.
    pub const fn new(blocks: u32, block_bytes: u32) -> Self {
        Self { blocks, block_bytes }
    }

    /// Every power of four from 4 KiB to 4 MiB, by every one from 1 to 4096 blocks, up to [`Shape::FULL_MAX_BYTES`].
    pub fn full() -> Vec<Self> {
        let powers = |from: u32, to: u32| (from..=to).step_by(2).map(|power| 1u32 << power);
        let all = powers(12, 22).flat_map(|bytes| powers(0, 12).map(move |blocks| Self::new(blocks, bytes)));
        all.filter(|shape| shape.bytes() <= Self::FULL_MAX_BYTES).collect()
    }

    /// Bytes of all blocks.
    pub fn bytes(self) -> usize {
        self.blocks as usize * self.block_bytes as usize
    }

    /// Bytes over which the blocks are scattered: every second place is left empty.
    fn spread(self) -> usize {
        2 * self.bytes()
    }

    /// Offset of the `index`-th block read: neighbours in a read are no neighbours in memory.
    fn offset(self, index: u32) -> usize {
        let blocks = u64::from(self.blocks);
        // 5 shares no factor with a power of two, and other counts of blocks only meet some places twice.
        let place = if blocks.is_multiple_of(5) { u64::from(index) } else { u64::from(index) * 5 % blocks };
        place as usize * 2 * self.block_bytes as usize
    }
}

/// Which way the blocks go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// From the peer's memory to ours, by our doing.
    Read,
    /// From ours to the peer's.
    Write,
}

impl Op {
    /// As in rows.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Backends, in the order of the rows.
    pub backends: Vec<BackendKind>,
    /// Shapes, in the order of the rows.
    pub shapes: Vec<Shape>,
    /// Operations, in the order of the rows.
    pub ops: Vec<Op>,
    /// Time spent on each backend, shape and operation.
    pub time_per_shape: Duration,
    /// TCP streams of the session.
    pub streams: usize,
    /// The shared object of [`BackendKind::Plugin`].
    pub plugin: Option<PathBuf>,
    /// Arguments that make this program run [`serve_peer`].
    pub peer_arguments: Vec<OsString>,
}

impl BenchOptions {
    /// The defaults, with the arguments that make this program a peer.
    pub fn new(peer_arguments: Vec<OsString>) -> Self {
        Self {
            backends: BackendKind::ALL.into_iter().filter(|kind| *kind != BackendKind::Plugin).collect(),
            shapes: Shape::DEFAULT.to_vec(),
            ops: vec![Op::Read, Op::Write],
            time_per_shape: Duration::from_secs(1),
            streams: 2,
            plugin: None,
            peer_arguments,
        }
    }
}

/// One row of the result: its fields are what `bench transfer --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `shm`, `cma`, `libfabric`, `ucx`, `plugin` or `tcp`.
    pub backend: String,
    /// `read` or `write`.
    pub op: String,
    /// `digest` or `off`.
    pub integrity: String,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Blocks of a read.
    pub blocks: u32,
    /// Median time of a read.
    pub p50_us: f64,
    /// 99th percentile of the time of a read.
    pub p99_us: f64,
    /// Bytes of a read over its median time.
    pub gb_per_s: f64,
    /// CPU time of both processes over all reads of the row.
    pub cpu_s: f64,
    /// CPU time of both processes for each 10^9 bytes.
    pub cpu_s_per_gb: f64,
    /// What the raw limit is.
    pub raw_probe: String,
    /// Median time of the raw probe.
    pub raw_p50_us: f64,
    /// CPU time of both processes for each 10^9 bytes of the raw probe.
    pub raw_cpu_s_per_gb: f64,
    /// Median over raw median: 1 is the limit.
    pub ratio: f64,
    /// What the network library does by itself, of reads over one.
    pub bare_probe: Option<String>,
    /// Median time of it.
    pub bare_p50_us: Option<f64>,
    /// 99th percentile of its time.
    pub bare_p99_us: Option<f64>,
    /// CPU time of both processes for each 10^9 bytes of it: both look again and again.
    pub bare_cpu_s_per_gb: Option<f64>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A process, pipe or socket failed.
    #[error("{step} failed")]
    Io {
        /// What was being done.
        step: &'static str,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The peer process said something that makes no sense.
    #[error("the peer process answered {0:?}")]
    Peer(String),
    /// An agent did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Memory could not be registered.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The peer was not reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A read or a write failed.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

impl BenchError {
    fn io(step: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { step, source }
    }
}

const PEER_EPOCH: Epoch = Epoch(1);
const HANDOFF: HandoffId = HandoffId(0x6261_746f_6e00_0000_6265_6e63_6800_0001);
const PEER_NAME: &str = "bench-peer";

/// A backend that was asked for and not measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Which.
    pub backend: BackendKind,
    /// Why, for people.
    pub reason: String,
}

/// What a run gives.
#[derive(Debug, Default)]
pub struct Report {
    /// By backend, operation, shape, integrity.
    pub rows: Vec<Row>,
    /// Backends, or operations of theirs, that do not work here or failed.
    pub skipped: Vec<Skipped>,
    /// What first failed of what should work. The other backends were measured all the same.
    pub failure: Option<BenchError>,
}

impl Report {
    /// Takes down what of a backend failed.
    fn fail(&mut self, backend: BackendKind, reason: String, error: BenchError) {
        self.skipped.push(Skipped { backend, reason });
        self.failure.get_or_insert(error);
    }
}

/// Runs every row of `options`.
///
/// # Errors
/// When there is no peer process or no memory. A backend that cannot be opened or fails is no error: see [`Report`].
pub async fn run(options: BenchOptions) -> Result<Report, BenchError> {
    let Some(cores) = cores::Cores::split() else { return measure_all(options, None).await };
    // The runtime this is called in may have a thread for either core, which would get in each other's way on one.
    let alone = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(BenchError::io("starting a runtime"))?;
        runtime.block_on(measure_all(options, Some(&cores)))
    });
    alone.await.unwrap_or_else(|error| Err(BenchError::io("a bench thread")(std::io::Error::other(error))))
}

async fn measure_all(options: BenchOptions, cores: Option<&cores::Cores>) -> Result<Report, BenchError> {
    let spread = options.shapes.iter().map(|shape| shape.spread()).max().unwrap_or(1);
    let backends = options.backends.iter().map(|backend| backend.as_str().to_owned()).collect();
    let wanted = peer::Wanted { region_bytes: spread, backends, plugin: options.plugin.clone() };
    let mut peer = peer::Peer::spawn(&options.peer_arguments, &wanted, cores).await?;
    let memory = measure::Memory::new(spread)?;
    let mut report = Report::default();
    for backend in options.backends.iter().copied() {
        let bench = match measure::Bench::start(&mut peer, backend, &memory, &options).await {
            Ok(bench) => bench,
            Err(BenchError::Connect(error)) => {
                report.skipped.push(Skipped { backend, reason: reason(backend, &error) });
                continue;
            }
            Err(error) => {
                report.fail(backend, chain(&error), error);
                continue;
            }
        };
        let why = bench.no_bare_probe().map(|why| format!("no probe of the library by itself: {why}"));
        report.skipped.extend(why.map(|reason| Skipped { backend, reason }));
        for op in options.ops.iter().copied() {
            let failed = bench.measure_all(&mut peer, &options, op, &mut report.rows).await.err();
            let reason = |error: &BenchError| format!("no {}: {}", op.as_str(), chain(error));
            match failed {
                None => {}
                Some(error @ BenchError::Transfer(TransferError::Refused { .. })) => {
                    report.skipped.push(Skipped { backend, reason: reason(&error) });
                }
                Some(error) => report.fail(backend, reason(&error), error),
            }
        }
        bench.close().await;
    }
    Ok(report)
}

/// Why there is no path over `backend`, the only one that was tried.
fn reason(backend: BackendKind, error: &ConnectError) -> String {
    let ConnectError::Link { tried, .. } = error else { return error.to_string() };
    tried.strip_prefix(&format!("{backend}: ")).unwrap_or(tried).to_owned()
}

/// The options of an agent of either process.
fn agent_options(worker: WorkerId, backends: Vec<BackendKind>, plugin: Option<&PathBuf>) -> AgentOptions {
    let mut options = AgentOptions::new(worker);
    options.backends = backends;
    options.plugin = plugin.map(|path| PluginOptions { path: path.clone(), bind: None });
    options
}

fn integrity_name(integrity: Integrity) -> &'static str {
    match integrity {
        Integrity::Digest => "digest",
        Integrity::Off => "off",
    }
}

/// What byte `offset` of the measured region holds, in words of 8: any block can be told from any other.
fn fill(memory: &crate::memory::HostMemory) {
    let mut bytes = vec![0u8; 64 << 10];
    for start in (0..memory.len()).step_by(bytes.len()) {
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            let n = (start / 8 + i) as u64;
            word.copy_from_slice(&(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (n >> 7)).to_le_bytes());
        }
        let len = bytes.len().min(memory.len() - start);
        memory.write(start, &bytes[..len]);
    }
}
