//! Digest of a KV block: xxh3-64, bound to the handoff, the epoch and the index of the block.
//!
//! The binding makes a digest worthless for any other block: bytes that were swapped, come from an earlier life of
//! the worker, or belong to another request fail verification even when they are a perfectly good block. It
//! guards against faults, not against an adversary who can compute digests.

use baton_config::{Epoch, HandoffId};
use twox_hash::XxHash3_64;

/// What a digest is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DigestSeed {
    /// The handoff the block is part of.
    pub handoff: HandoffId,
    /// The life of the worker that computed the block.
    pub epoch: Epoch,
    /// Index of the block in the sequence, in blocks of that worker.
    pub index: u32,
}

impl DigestSeed {
    fn fold(&self) -> u64 {
        let mut bytes = [0; 28];
        bytes[..16].copy_from_slice(&self.handoff.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[24..].copy_from_slice(&self.index.to_le_bytes());
        XxHash3_64::oneshot(&bytes)
    }
}

/// A digest in the making: feed it the bytes of the block in order, in pieces of any size.
#[derive(Clone)]
pub struct BlockDigest(XxHash3_64);

impl BlockDigest {
    /// Starts the digest of one block.
    pub fn new(seed: DigestSeed) -> Self {
        Self(XxHash3_64::with_seed(seed.fold()))
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        std::hash::Hasher::write(&mut self.0, bytes);
    }

    /// The digest of all bytes so far.
    pub fn finish(&self) -> u64 {
        std::hash::Hasher::finish(&self.0)
    }
}

impl std::fmt::Debug for BlockDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockDigest({:016x})", self.finish())
    }
}

/// The digest of a whole block.
pub fn block_digest(seed: DigestSeed, bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(seed.fold(), bytes)
}

#[cfg(test)]
mod tests;
