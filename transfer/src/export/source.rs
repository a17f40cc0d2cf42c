//! Where peers read exported blocks from, and what is done there before they may.

use std::sync::Arc;

use baton_config::KvGeometry;

use super::{ExportBlock, ExportOptions, Prepared};
use crate::agent::{DeviceMemory, Integrity};
use crate::arena_memory::ArenaMemory;
use crate::device::{Device, DeviceError};
use crate::digest::DigestSeed;
use crate::memory::{HostMemory, MemoryError};
use crate::slab::{Slab, Slot};

/// Bytes worth a job of their own: less costs more in scheduling than it gains in overlap.
const JOB_MIN_BYTES: usize = 512 << 10;

/// Bytes of a job that a device does: it works on all blocks of a job side by side, a few are not enough for it.
const DIRECT_JOB_BYTES: usize = 64 << 20;

/// Why the blocks of some arenas are staged.
pub(crate) const SCATTERED: &str = "blocks are not one run each of the arena";

/// Where peers read from.
#[derive(Clone)]
pub(super) enum Source {
    InPlace(HostMemory),
    Direct(DeviceMemory),
    /// Host memory in which a block is not one run.
    Packed {
        memory: HostMemory,
        slab: Slab,
    },
    Staged {
        device: Arc<dyn Device>,
        slab: Slab,
    },
}

impl Source {
    /// Blocks worth a job of their own.
    pub(super) fn blocks_per_job(&self, bytes: usize) -> usize {
        match self {
            Self::InPlace(_) | Self::Packed { .. } | Self::Staged { .. } => JOB_MIN_BYTES.div_ceil(bytes),
            Self::Direct(_) => DIRECT_JOB_BYTES.div_ceil(bytes),
        }
    }

    /// Where blocks of `memory` are read from, and why not where they are.
    pub(super) fn of(
        memory: ArenaMemory,
        geometry: &KvGeometry,
        options: &ExportOptions,
    ) -> Result<(Self, Option<String>), MemoryError> {
        let is_run = geometry.layout.is_block_first();
        let slab = || Slab::new(options.slots, geometry.block_bytes(), "export staging");
        let device = match memory {
            ArenaMemory::Host(memory) if is_run => return Ok((Self::InPlace(memory), None)),
            ArenaMemory::Host(memory) => {
                return Ok((Self::Packed { memory, slab: slab()? }, Some(SCATTERED.to_owned())));
            }
            ArenaMemory::Device(device) => device,
        };
        let reached = if is_run { reachable(&device, options) } else { Err(SCATTERED.to_owned()) };
        let why = match reached {
            Ok(memory) => return Ok((Self::Direct(memory), None)),
            Err(why) => why,
        };
        let slab = slab()?;
        slab.pin(device.as_ref());
        Ok((Self::Staged { device, slab }, Some(why)))
    }
}

/// A device's memory, if its blocks can be granted where they are.
fn reachable(device: &Arc<dyn Device>, options: &ExportOptions) -> Result<DeviceMemory, String> {
    if !options.direct {
        return Err("blocks are to be host-buffered".to_owned());
    }
    if options.integrity == Integrity::Digest {
        device.kernels().map_err(|why| format!("digests take a copy in host memory: {why}"))?;
    }
    DeviceMemory::new(Arc::clone(device))
}

/// Digests blocks where they are.
pub(super) fn in_place(
    memory: &HostMemory,
    work: Vec<(ExportBlock, Option<Slot>)>,
    bytes: usize,
    integrity: Integrity,
    seed_of: impl Fn(u32) -> DigestSeed,
) -> Vec<Prepared> {
    let prepare = |(block, _): (ExportBlock, Option<Slot>)| {
        let offset = block.block as usize * bytes;
        let digest = match integrity {
            Integrity::Digest => memory.block_digest(seed_of(block.index), offset, bytes),
            Integrity::Off => 0,
        };
        Prepared { index: block.index, offset, digest, slot: None }
    };
    work.into_iter().map(prepare).collect()
}

/// Has the device digest blocks where they are.
pub(super) fn on_device(
    memory: &DeviceMemory,
    work: Vec<(ExportBlock, Option<Slot>)>,
    bytes: usize,
    integrity: Integrity,
    seed_of: impl Fn(u32) -> DigestSeed,
) -> Result<Vec<Prepared>, DeviceError> {
    let places = work.iter().map(|(block, _)| (block.block as usize * bytes, seed_of(block.index)));
    let places: Vec<(usize, DigestSeed)> = places.collect();
    let digests = match (integrity, memory.device().kernels()) {
        (Integrity::Digest, Ok(kernels)) => kernels.digest_blocks(&places, bytes)?,
        // A device without kernels is not granted from with integrity on.
        _ => vec![0; places.len()],
    };
    let prepared = |((block, offset), digest): ((ExportBlock, usize), u64)| Prepared {
        index: block.index,
        offset,
        digest,
        slot: None,
    };
    let blocks = work.into_iter().map(|(block, _)| block);
    let offsets = places.into_iter().map(|(offset, _)| offset);
    Ok(blocks.zip(offsets).zip(digests).map(prepared).collect())
}
