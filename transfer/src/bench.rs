//! Measures reads between two processes of this machine, with the raw limit of the same bytes beside every row.
//!
//! The peer is this program once more, in [`serve_peer`]. Every row is measured in rounds: some raw probes, some
//! reads without digests, some with, so that whatever else the machine does meets all of them alike. The raw limit
//! of `shm` is `memcpy` of equally scattered blocks; that of `tcp` is `writev` and `readv` of them by two blocking
//! threads.

mod measure;
mod peer;
mod raw;

use std::ffi::OsString;
use std::time::Duration;

use baton_config::{Epoch, HandoffId};
use serde::{Deserialize, Serialize};

pub use self::peer::serve_peer;

use crate::agent::{BackendKind, ConnectError, Integrity, RegisterError, StartError};
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
    pub const DEFAULT: [Self; 4] = [
        Self { blocks: 1, block_bytes: 4 << 10 },
        Self { blocks: 64, block_bytes: 4 << 10 },
        Self { blocks: 64, block_bytes: 64 << 10 },
        Self { blocks: 32, block_bytes: 1 << 20 },
    ];

    fn bytes(self) -> usize {
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

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Backends, in the order of the rows.
    pub backends: Vec<BackendKind>,
    /// Shapes, in the order of the rows.
    pub shapes: Vec<Shape>,
    /// Time spent on each backend and shape.
    pub time_per_shape: Duration,
    /// TCP streams of the session.
    pub streams: usize,
    /// Arguments that make this program run [`serve_peer`].
    pub peer_arguments: Vec<OsString>,
}

impl BenchOptions {
    /// The defaults, with the arguments that make this program a peer.
    pub fn new(peer_arguments: Vec<OsString>) -> Self {
        Self {
            backends: BackendKind::ALWAYS.to_vec(),
            shapes: Shape::DEFAULT.to_vec(),
            time_per_shape: Duration::from_secs(3),
            streams: 2,
            peer_arguments,
        }
    }
}

/// One row of the result: its fields are what `bench transfer --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `shm` or `tcp`.
    pub backend: String,
    /// Always `read`.
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
    /// What the raw limit is.
    pub raw_probe: String,
    /// Median time of the raw probe.
    pub raw_p50_us: f64,
    /// Median over raw median: 1 is the limit.
    pub ratio: f64,
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
    /// A read failed.
    #[error(transparent)]
    Read(#[from] TransferError),
}

impl BenchError {
    fn io(step: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { step, source }
    }
}

const PEER_EPOCH: Epoch = Epoch(1);
const HANDOFF: HandoffId = HandoffId(0x6261_746f_6e00_0000_6265_6e63_6800_0001);
const PEER_NAME: &str = "bench-peer";

/// Runs every row of `options`.
///
/// # Errors
/// When the peer process, an agent or a read fails.
pub async fn run(options: BenchOptions) -> Result<Vec<Row>, BenchError> {
    let spread = options.shapes.iter().map(|shape| shape.spread()).max().unwrap_or(1);
    let mut peer = peer::Peer::spawn(&options.peer_arguments, spread).await?;
    let mut rows = Vec::new();
    for backend in options.backends.iter().copied() {
        let bench = measure::Bench::start(&peer, backend, spread, options.streams).await?;
        for shape in options.shapes.iter().copied() {
            rows.extend(bench.measure(&mut peer, shape, options.time_per_shape).await?);
        }
        bench.close().await;
    }
    Ok(rows)
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
