//! Where a worker's KV arena lives: host memory that transfers reach directly, or a device they must stage for.

use std::sync::Arc;

use crate::device::Device;
use crate::memory::HostMemory;

/// The memory of a KV arena; clones share it.
#[derive(Debug, Clone)]
pub enum ArenaMemory {
    /// Host memory: registered as it is, read and written by transfers in place.
    Host(HostMemory),
    /// Device memory: transfers stage through a slab of host memory.
    Device(Arc<dyn Device>),
}

impl ArenaMemory {
    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "an arena of no bytes cannot be allocated")]
    pub fn len(&self) -> usize {
        match self {
            Self::Host(memory) => memory.len(),
            Self::Device(device) => device.len(),
        }
    }

    /// What the engine's compute does to load numbers.
    ///
    /// # Panics
    /// When the range is outside the arena: a bug of the caller.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        match self {
            Self::Host(memory) => memory.read(offset, into),
            Self::Device(device) => device.read(offset, into),
        }
    }

    /// What the engine's compute does to store numbers.
    ///
    /// # Panics
    /// When the range is outside the arena: a bug of the caller.
    pub fn write(&self, offset: usize, from: &[u8]) {
        match self {
            Self::Host(memory) => memory.write(offset, from),
            Self::Device(device) => device.write(offset, from),
        }
    }

    /// Where it is, for people: `host` or the kind of device.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Host(_) => "host",
            Self::Device(device) => device.kind(),
        }
    }
}
