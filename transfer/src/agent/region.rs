//! What an agent lets peers read: host memory, or memory of a device that network libraries can register.

use std::sync::Arc;

use crate::device::{Device, DeviceError};
use crate::memory::{HostMemory, MemorySpan};

/// Memory of a device together with its description for network libraries. Clones share it.
#[derive(Debug, Clone)]
pub struct DeviceMemory {
    device: Arc<dyn Device>,
    span: MemorySpan,
}

impl DeviceMemory {
    /// The whole memory of `device`.
    ///
    /// # Errors
    /// Why network libraries cannot reach it, for people.
    pub fn new(device: Arc<dyn Device>) -> Result<Self, String> {
        let span = device.span()?;
        Ok(Self { device, span })
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// The memory as network libraries register it.
    pub fn span(&self) -> &MemorySpan {
        &self.span
    }

    /// Whether `[offset, offset + len)` lies within.
    pub fn fits(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.span.len())
    }
}

/// A registered memory. Clones share it.
#[derive(Debug, Clone)]
pub(crate) enum Region {
    /// Every backend reads it in place.
    Host(HostMemory),
    /// Backends whose library registers it read it in place; the others get copies of its blocks.
    Device(DeviceMemory),
}

impl Region {
    pub(crate) fn fits(&self, offset: usize, len: usize) -> bool {
        match self {
            Self::Host(memory) => memory.fits(offset, len),
            Self::Device(memory) => memory.fits(offset, len),
        }
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Host(memory) => memory.len(),
            Self::Device(memory) => memory.span().len(),
        }
    }

    /// The memory, where the processor can reach it.
    pub(crate) fn host(&self) -> Option<&HostMemory> {
        match self {
            Self::Host(memory) => Some(memory),
            Self::Device(_) => None,
        }
    }

    /// The memory as network libraries register it.
    pub(crate) fn span(&self) -> MemorySpan {
        match self {
            Self::Host(memory) => memory.span(),
            Self::Device(memory) => memory.span.clone(),
        }
    }

    /// Copies a range to `to`. Blocks for a device: call it on a thread that may.
    pub(crate) fn copy_to(
        &self,
        offset: usize,
        to: &HostMemory,
        to_offset: usize,
        len: usize,
    ) -> Result<(), DeviceError> {
        match self {
            Self::Host(memory) => memory.copy_to(offset, to, to_offset, len),
            Self::Device(memory) => memory.device.copy_to_host(offset, to, to_offset, len)?,
        }
        Ok(())
    }
}
