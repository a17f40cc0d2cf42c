//! Lists of blocks under a grant.

use baton_config::HandoffId;

use super::{
    DESCRIPTOR_BYTES, Fields, HANDOFF_BYTES, MAX_READ_BLOCKS, MAX_READ_BYTES, READ_MAX_BYTES, WireError,
};
use crate::agent::RegionId;
use crate::session::Descriptor;

/// A request for blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Under which grant.
    pub handoff: HandoffId,
    /// Which blocks, in the order they are sent.
    pub blocks: Vec<Descriptor>,
}

/// The payload of a [`Read`] in bytes.
pub fn encode_read(handoff: HandoffId, blocks: impl ExactSizeIterator<Item = Descriptor>) -> Vec<u8> {
    debug_assert!(blocks.len() <= MAX_READ_BLOCKS, "requests are bounded");
    let mut bytes = Vec::with_capacity(HANDOFF_BYTES + blocks.len() * DESCRIPTOR_BYTES);
    bytes.extend_from_slice(&handoff.0.to_le_bytes());
    for block in blocks {
        put_descriptor(&mut bytes, block);
    }
    bytes
}

pub(super) fn put_descriptor(bytes: &mut Vec<u8>, block: Descriptor) {
    let mut descriptor = [0; DESCRIPTOR_BYTES];
    descriptor[..4].copy_from_slice(&block.region.0.to_le_bytes());
    descriptor[4..8].copy_from_slice(&block.len.to_le_bytes());
    descriptor[8..].copy_from_slice(&block.offset.to_le_bytes());
    bytes.extend_from_slice(&descriptor);
}

/// A descriptor that has bytes, none of them past the end of any memory.
pub(super) fn take_descriptor(fields: &mut Fields<'_>) -> Result<Descriptor, WireError> {
    let region = RegionId(fields.u32()?);
    let len = fields.u32()?;
    let offset = fields.u64()?;
    if len == 0 || offset.checked_add(u64::from(len)).is_none() {
        return Err(WireError::Field);
    }
    Ok(Descriptor { region, offset, len })
}

impl Read {
    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut, too long, asks for nothing, for empty blocks, or for more than [`MAX_READ_BYTES`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > READ_MAX_BYTES {
            return Err(WireError::Long);
        }
        let mut fields = Fields(bytes);
        let handoff = HandoffId(fields.u128()?);
        if fields.is_empty() || !fields.rest_len().is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(WireError::Short);
        }
        let count = fields.rest_len() / DESCRIPTOR_BYTES;
        let blocks = take_blocks(&mut fields, count)?;
        Ok(Self { handoff, blocks })
    }
}

/// `count` descriptors, which are known to be there, of at most [`MAX_READ_BYTES`] in all.
pub(super) fn take_blocks(fields: &mut Fields<'_>, count: usize) -> Result<Vec<Descriptor>, WireError> {
    let mut blocks = Vec::with_capacity(count);
    let mut total = 0u64;
    for _ in 0..count {
        let block = take_descriptor(fields)?;
        total += u64::from(block.len);
        blocks.push(block);
    }
    if total > MAX_READ_BYTES {
        return Err(WireError::Long);
    }
    Ok(blocks)
}
