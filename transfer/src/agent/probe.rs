//! The region that every agent offers to be measured with: known bytes, granted in every life.

use std::time::Duration;

use baton_config::{Epoch, HandoffId};
use tokio::time::{Instant, timeout};

use super::RegionId;
use crate::backend::{Fault, Link, Progress, ReadJob};
use crate::digest::DigestSeed;
use crate::error::LinkError;
use crate::memory::{HostMemory, MemoryError};
use crate::session::{BlockRead, Descriptor, Destination, Expected};

/// The grant that the region stands under.
pub(crate) const HANDOFF: HandoffId = HandoffId(u128::MAX);
/// The region's number; those of users start at 1.
pub(crate) const REGION: RegionId = RegionId(0);

const SMALL_BYTES: u32 = 4 << 10;
const SMALL_READS: usize = 5;
const BULK_BLOCK_BYTES: u32 = 64 << 10;
const BULK_BLOCKS: u32 = 16;
const BULK_READS: usize = 3;
const REGION_BYTES: u32 = BULK_BLOCKS * BULK_BLOCK_BYTES;
/// How long measuring one path may take.
const MEASURE_MAX: Duration = Duration::from_secs(1);
/// The read that paths are compared by: 64 blocks of 64 KiB, a chunk of a prompt.
const TYPICAL_BYTES: f64 = (4 << 20) as f64;

/// What a path was measured to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Measured {
    /// Of a small read: the shortest of several.
    pub(crate) latency: Duration,
    /// Of a large one: the highest of several.
    pub(crate) bytes_per_second: f64,
}

impl Measured {
    /// How long a typical read would take.
    pub(crate) fn typical(&self) -> Duration {
        self.latency + Duration::from_secs_f64(TYPICAL_BYTES / self.bytes_per_second)
    }
}

/// The region's memory, with bytes that every agent knows.
pub(crate) fn memory() -> Result<HostMemory, MemoryError> {
    let memory = HostMemory::allocate(REGION_BYTES as usize, "probe")?;
    let mut word = 0u64;
    let bytes: Vec<u8> = (0..REGION_BYTES / 8)
        .flat_map(|_| {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            word.to_le_bytes()
        })
        .collect();
    memory.write(0, &bytes);
    Ok(memory)
}

/// What may be read of it.
pub(crate) fn descriptor() -> Descriptor {
    Descriptor { region: REGION, offset: 0, len: REGION_BYTES }
}

/// Measures a path to a peer in `epoch`. `own` is this agent's region, which holds what the peer's must hold.
pub(crate) async fn measure(link: &Link, epoch: Epoch, own: &HostMemory) -> Result<Measured, Fault> {
    let into = HostMemory::allocate(REGION_BYTES as usize, "probed").map_err(LinkError::Memory)?;
    let small = blocks(own, epoch, 1, SMALL_BYTES);
    let bulk = blocks(own, epoch, BULK_BLOCKS, BULK_BLOCK_BYTES);
    let probing = async {
        // The first touches memory, opens streams, asks for keys.
        fastest(link, &small, &into, 1).await?;
        let latency = fastest(link, &small, &into, SMALL_READS).await?;
        let long = fastest(link, &bulk, &into, BULK_READS).await?;
        let more = f64::from(REGION_BYTES - SMALL_BYTES);
        // No path is free of cost per byte: where the clock sees none, the whole time counts.
        let rest = long.checked_sub(latency).filter(|rest| !rest.is_zero()).unwrap_or(long);
        let seconds = rest.as_secs_f64().max(1e-9);
        Ok(Measured { latency, bytes_per_second: more / seconds })
    };
    let timed_out = |_| LinkError::io("measuring")(std::io::ErrorKind::TimedOut.into());
    timeout(MEASURE_MAX, probing).await.map_err(timed_out)?
}

fn blocks(own: &HostMemory, epoch: Epoch, count: u32, len: u32) -> Vec<BlockRead> {
    let block = |index: u32| {
        let seed = DigestSeed { handoff: HANDOFF, epoch, index };
        let at = index * len;
        let digest = own.block_digest(seed, at as usize, len as usize);
        BlockRead {
            source: Descriptor { region: REGION, offset: u64::from(at), len },
            to: at as usize,
            expected: Some(Expected { seed, digest }),
        }
    };
    (0..count).map(block).collect()
}

/// The shortest of some reads.
async fn fastest(
    link: &Link,
    blocks: &[BlockRead],
    into: &HostMemory,
    reads: usize,
) -> Result<Duration, Fault> {
    let mut best = Duration::MAX;
    for _ in 0..reads {
        let progress = Progress::new(blocks.len());
        let into = Destination::Memory(into);
        let job = ReadJob { handoff: HANDOFF, blocks, into, verify: true, progress: &progress };
        let start = Instant::now();
        let corrupt = link.read(&job).await?;
        if !corrupt.is_empty() {
            return Err(LinkError::Corrupt.into());
        }
        best = best.min(start.elapsed());
    }
    Ok(best)
}
