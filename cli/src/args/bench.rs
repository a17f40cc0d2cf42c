//! What `baton bench` is asked to do.

mod index;
mod router;

use std::path::PathBuf;

use baton_config::Bytes;
use baton_transfer::BackendKind;
use baton_transfer::bench::{Op, Shape};
use clap::Subcommand;

pub(crate) use self::index::BenchIndexArgs;
pub(crate) use self::router::BenchRouterArgs;

#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) what: Bench,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Reads and writes of scattered blocks, for each backend, with and without digests.
    Transfer(BenchTransferArgs),
    /// What a router costs, with the engines alone beside it.
    Router(BenchRouterArgs),
    /// The prefix index: bytes a block, time of an event and of a lookup.
    Index(BenchIndexArgs),
    /// The other process of `bench transfer`, which starts it.
    #[command(hide = true)]
    TransferPeer,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Two processes of this machine. Each row has the raw limit beside it, measured in turns in the same run: memcpy
for shm, process_vm_readv of many blocks a call for cma, scatter/gather TCP for everything else. Reads over libfabric and
UCX also have the library by itself beside them: a read for each block, and a look again and again on both sides. CPU is
that of both processes. A backend that cannot be opened is named with the reason. The keys of --json: docs/transfer.md.

Examples:
  baton bench transfer
  baton bench transfer --backend tcp,ucx --shape 64x4KiB --shape 32x1MiB --seconds 3
  baton bench transfer --plugin ./libbaton_cma.so
  baton bench transfer --full --json > transfer.jsonl"
)]
pub(crate) struct BenchTransferArgs {
    /// Seconds spent on each backend, shape and operation.
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Backends (shm, cma, libfabric, ucx, plugin, tcp), in the order of the rows [default: all but plugin].
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = backend)]
    pub(crate) backend: Vec<BackendKind>,
    /// The shared object of a plugin, for `--backend plugin`; alone, only it is measured.
    #[arg(long, value_name = "PATH")]
    pub(crate) plugin: Option<PathBuf>,
    /// Blocks and bytes of each, such as 64x4KiB [default: a dozen, from 1x4KiB to 16x4MiB].
    #[arg(long, value_name = "BLOCKSxBYTES", value_parser = shape)]
    pub(crate) shape: Vec<Shape>,
    /// Every shape from 1 to 4096 blocks of 4 KiB to 4 MiB, up to 256 MiB; takes 2 GiB of memory.
    #[arg(long, conflicts_with = "shape")]
    pub(crate) full: bool,
    /// Only reads, or only writes.
    #[arg(long, value_name = "OP", value_parser = op)]
    pub(crate) op: Option<Op>,
    /// Print one JSON object a row.
    #[arg(long)]
    pub(crate) json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.001..=600.0).contains(&seconds) { Ok(seconds) } else { Err("not within 0.001 and 600".to_owned()) }
}

fn backend(text: &str) -> Result<BackendKind, String> {
    let names = || BackendKind::ALL.map(BackendKind::as_str).join(", ");
    BackendKind::ALL
        .into_iter()
        .find(|kind| kind.as_str() == text)
        .ok_or_else(|| format!("one of {}", names()))
}

fn op(text: &str) -> Result<Op, String> {
    [Op::Read, Op::Write].into_iter().find(|op| op.as_str() == text).ok_or_else(|| "read or write".to_owned())
}

fn shape(text: &str) -> Result<Shape, String> {
    let (blocks, bytes) = text.split_once('x').ok_or("not BLOCKSxBYTES, such as 64x4KiB")?;
    let blocks = blocks.parse().map_err(|_| format!("{blocks:?} is no number of blocks"))?;
    let bytes: Bytes = bytes.parse().map_err(|error| format!("{bytes:?}: {error}"))?;
    let block_bytes = u32::try_from(bytes.0).map_err(|_| "a block of more than 4 GiB".to_owned())?;
    let shape = Shape::new(blocks, block_bytes);
    match blocks > 0 && block_bytes > 0 && shape.bytes() <= Shape::FULL_MAX_BYTES {
        true => Ok(shape),
        false => Err("nothing, or more than 256 MiB in all".to_owned()),
    }
}
