//! Pulls straight into a device arena: whole blocks that both sides lay out alike, over a path that reaches the device's
//! memory. The device verifies each group of them while the next one is read.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use baton_config::protocol::TicketBlock;
use tokio::time::timeout_at;
use tokio_util::task::TaskTracker;

use super::{Peer, Placed, PullCause, Reader};
use crate::agent::DeviceMemory;
use crate::device::DeviceError;
use crate::digest::DigestSeed;
use crate::error::{LinkError, TransferError};
use crate::jobs;
use crate::session::{BlockRead, Destination};

/// Bytes read together: enough for the device to work on side by side, and to hide the start of the next read.
const GROUP_BYTES: usize = 32 << 20;

/// What was read directly. All other blocks are to be staged, unless it failed.
pub(super) struct Direct {
    pub(super) placed: Placed,
    pub(super) done: Result<(), PullCause>,
}

impl Default for Direct {
    fn default() -> Self {
        Self { placed: Placed::default(), done: Ok(()) }
    }
}

/// Reads those of `blocks` that need no staging, if the path reaches `memory`.
pub(super) async fn pull<P: Peer>(
    reader: &Reader<'_, P>,
    blocks: &[TicketBlock],
    memory: &Result<DeviceMemory, String>,
    jobs: &TaskTracker,
) -> Direct {
    let mut direct = Direct::default();
    let Ok(memory) = memory else { return direct };
    let whole: Vec<&TicketBlock> = blocks.iter().filter(|block| reader.is_direct(block.index)).collect();
    if whole.is_empty() || (reader.session.verifies() && memory.device().kernels().is_err()) {
        return direct;
    }
    // It may have to open a path first.
    match timeout_at(reader.deadline, reader.session.reaches(memory)).await {
        Ok(Ok(())) => {}
        Ok(Err(why)) => {
            tracing::debug!(why, peer = %reader.session.worker(), "blocks are staged in host memory");
            return direct;
        }
        Err(_) => {
            direct.done = Err(reader.late(0).into());
            return direct;
        }
    }
    let bytes = reader.plan.dest().block_bytes();
    let mut checking = None;
    for group in whole.chunks((GROUP_BYTES / bytes).max(1)) {
        let reads: Vec<BlockRead> = group
            .iter()
            .map(|block| {
                let to = reader.dest_blocks[block.index as usize] as usize * bytes;
                BlockRead { expected: None, ..reader.block_read(block, to) }
            })
            .collect();
        let into = Destination::Device(memory);
        let read = reader.session.read(reader.handoff, &reads, into, reader.deadline).await;
        let before = match checking.take() {
            Some(check) => settle(reader, check, &mut direct.placed).await,
            None => Ok(()),
        };
        direct.done = match (before, read) {
            (Err(cause), _) => Err(cause),
            // The path changed under us: what is left goes through host memory.
            (Ok(()), Err(TransferError::Link { source: LinkError::Device(_), .. })) => return direct,
            (Ok(()), Err(error)) => Err(error.into()),
            (Ok(()), Ok(_)) => Ok(()),
        };
        if direct.done.is_err() {
            return direct;
        }
        checking = Some(check(reader, memory, group, &reads, jobs));
    }
    if let Some(check) = checking {
        direct.done = settle(reader, check, &mut direct.placed).await;
    }
    direct
}

/// A job of the device; nothing when the runtime ends before it does.
type Digests = Pin<Box<dyn Future<Output = Option<Result<Vec<u64>, DeviceError>>> + Send>>;

/// Blocks that were read and are being verified.
struct Check<'a> {
    blocks: Vec<&'a TicketBlock>,
    /// What the device finds, unless nothing is verified.
    digests: Option<Digests>,
}

/// Has the device digest what was just read.
fn check<'a, P: Peer>(
    reader: &Reader<'_, P>,
    memory: &DeviceMemory,
    blocks: &[&'a TicketBlock],
    reads: &[BlockRead],
    jobs: &TaskTracker,
) -> Check<'a> {
    let seed = |index| DigestSeed { handoff: reader.handoff, epoch: reader.session.epoch(), index };
    let places = blocks.iter().zip(reads).map(|(block, read)| (read.to, seed(block.index)));
    let (places, bytes): (Vec<_>, _) = (places.collect(), reader.plan.dest().block_bytes());
    let device = Arc::clone(memory.device());
    let digests = reader.session.verifies().then(|| {
        let work = move || match device.kernels() {
            Ok(kernels) => kernels.digest_blocks(&places, bytes),
            // Asked before anything was read; no digest is one that fails.
            Err(_) => Ok(Vec::new()),
        };
        let job: Digests = Box::pin(jobs::start(jobs, work));
        job
    });
    Check { blocks: blocks.to_vec(), digests }
}

/// Notes in `placed` which blocks are good; the others are an error.
async fn settle<P: Peer>(
    reader: &Reader<'_, P>,
    check: Check<'_>,
    placed: &mut Placed,
) -> Result<(), PullCause> {
    let Check { blocks, digests } = check;
    let found = match digests {
        None => None,
        Some(digests) => {
            let late = |_| reader.late(placed.bytes);
            Some(timeout_at(reader.deadline, digests).await.map_err(late)?.ok_or(PullCause::Closed)??)
        }
    };
    let is_good =
        |position: usize| found.as_ref().is_none_or(|f| f.get(position) == Some(&blocks[position].digest));
    let (good, bad): (Vec<usize>, Vec<usize>) = (0..blocks.len()).partition(|position| is_good(*position));
    let index_of = |position: &usize| blocks[*position].index;
    reader.note(placed, good.iter().map(index_of).collect());
    let corrupt: Vec<usize> = bad.iter().map(|position| index_of(position) as usize).collect();
    let Some(index) = corrupt.first().copied() else { return Ok(()) };
    reader.session.count_corrupt(corrupt.len());
    let worker = reader.session.worker().clone();
    Err(TransferError::Integrity { worker, index, corrupt }.into())
}
