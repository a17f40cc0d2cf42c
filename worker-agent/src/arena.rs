//! The memory of this worker's KV arena, for the engine on one side and the transfer agent on the other.

use std::sync::Arc;

use baton_config::Bytes;
use baton_engine::KvMemory;
use baton_engine::arena::{Arena, ArenaError};
use baton_transfer::device::cuda::CudaDevice;
use baton_transfer::device::neuron::NeuronDevice;
use baton_transfer::{ArenaMemory, Device, EmulatedDevice, HostMemory, MemoryError, Unavailable};

use crate::options::{ArenaOptions, DeviceKind};

/// Why there is no arena.
#[derive(Debug, thiserror::Error)]
pub enum ArenaFailure {
    /// Fewer than two blocks: not even one request fits.
    #[error("a KV cache of {blocks} blocks is too small, give the pool more memory")]
    TooFew {
        /// Blocks asked for.
        blocks: u32,
    },
    /// The system refused the memory.
    #[error("no memory for {blocks} KV blocks of {}", Bytes(*block_bytes as u64))]
    Memory {
        /// Blocks asked for.
        blocks: u32,
        /// Bytes of each.
        block_bytes: usize,
        /// The system's reason.
        #[source]
        source: MemoryError,
    },
    /// This machine lacks the device, or what drives it.
    #[error("{source}; what helps: {}", .source.remedy)]
    Device {
        /// What is missing, and what brings it.
        source: Unavailable,
    },
    /// The geometry holds nothing.
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

/// The engine's view of memory that transfers know too.
struct EngineMemory(ArenaMemory);

impl KvMemory for EngineMemory {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.0.read(offset, into);
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.0.write(offset, from);
    }
}

/// Takes the memory and lays the arena over it.
///
/// # Errors
/// When there is not enough of it.
pub fn build(options: &ArenaOptions) -> Result<(ArenaMemory, Arc<Arena>), ArenaFailure> {
    let (blocks, block_bytes) = (options.blocks, options.geometry.block_bytes());
    if blocks < 2 {
        return Err(ArenaFailure::TooFew { blocks });
    }
    let len = block_bytes.saturating_mul(blocks as usize);
    let failed = |source| ArenaFailure::Memory { blocks, block_bytes, source };
    let unavailable = |source| ArenaFailure::Device { source };
    let memory = match options.device.as_ref().map(|device| device.kind) {
        None => ArenaMemory::Host(HostMemory::allocate(len, "arena").map_err(failed)?),
        Some(DeviceKind::Simulated { bytes_per_s, reachable }) => {
            let device = EmulatedDevice::new(len, bytes_per_s).map_err(failed)?;
            on(if reachable { device.reachable() } else { device })
        }
        Some(DeviceKind::Cuda { ordinal }) => on(CudaDevice::open(ordinal, len).map_err(unavailable)?),
        Some(DeviceKind::Neuron { core }) => on(NeuronDevice::open(core, len).map_err(unavailable)?),
    };
    let arena = Arena::new(Arc::new(EngineMemory(memory.clone())), options.geometry, blocks)?;
    Ok((memory, Arc::new(arena)))
}

fn on(device: impl Device + 'static) -> ArenaMemory {
    ArenaMemory::Device(Arc::new(device))
}
