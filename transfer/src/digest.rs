//! Digest of a KV block: xxh3-64, bound to the handoff, the epoch and the index of the block.
//!
//! The binding makes a digest worthless for any other block: bytes that were swapped, come from an earlier life of
//! the worker, or belong to another request fail verification even when they are a perfectly good block. It
//! guards against faults, not against an adversary who can compute digests.

#[expect(unsafe_code, reason = "vector instructions on memory that others map too")]
mod kernel;

use baton_config::{Epoch, HandoffId};
use twox_hash::XxHash3_64;

use self::kernel::{Lanes, STRIPE, digest_28};

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
    pub(crate) fn fold(&self) -> u64 {
        let mut bytes = [0; 28];
        bytes[..16].copy_from_slice(&self.handoff.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[24..].copy_from_slice(&self.index.to_le_bytes());
        digest_28(&bytes)
    }
}

/// A digest in the making: feed it the bytes of the block in order, in pieces of any size.
#[derive(Clone)]
pub struct BlockDigest {
    seed: u64,
    lanes: Lanes,
    len: u64,
    /// Bytes not yet taken by the lanes, `pending` of them. When there are fewer than a stripe, the end of the
    /// buffer holds the stripe before them: the digest's last step needs the last 64 bytes whatever came when.
    buffer: [u8; BUFFER_BYTES],
    pending: usize,
}

/// Longer blocks go through the lanes; the specification has other formulas for up to 240 bytes.
const SHORT_BYTES: u64 = 240;
/// Room for all of a short block, in whole stripes.
const BUFFER_BYTES: usize = 4 * STRIPE;

impl BlockDigest {
    /// Starts the digest of one block.
    pub fn new(seed: DigestSeed) -> Self {
        let seed = seed.fold();
        Self { seed, lanes: Lanes::new(seed), len: 0, buffer: [0; BUFFER_BYTES], pending: 0 }
    }

    /// Starts the digest of another block in the place of this one.
    pub fn restart(&mut self, seed: DigestSeed) {
        self.seed = seed.fold();
        self.lanes = Lanes::new(self.seed);
        (self.len, self.pending) = (0, 0);
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.len += bytes.len() as u64;
        let direct = self.direct(bytes.len());
        let (before, rest) = bytes.split_at(direct.start);
        self.buffer(before);
        let (taken, after) = rest.split_at(direct.len());
        self.flush_before(taken.len());
        self.lanes.take(taken);
        if let Some(last) = taken.last_chunk::<STRIPE>() {
            self.buffer[BUFFER_BYTES - STRIPE..].copy_from_slice(last);
        }
        self.buffer(after);
    }

    /// The digest of all bytes so far.
    pub fn finish(&self) -> u64 {
        let pending = &self.buffer[..self.pending];
        if self.len <= SHORT_BYTES {
            return XxHash3_64::oneshot_with_seed(self.seed, pending);
        }
        // The last stripe is digested in its own way, whole or not: it is never taken by the lanes.
        let stripes = pending.len().saturating_sub(1) / STRIPE;
        let mut last = [0; STRIPE];
        let of_pending = pending.len().min(STRIPE);
        last[..STRIPE - of_pending].copy_from_slice(&self.buffer[BUFFER_BYTES - (STRIPE - of_pending)..]);
        last[STRIPE - of_pending..].copy_from_slice(&pending[pending.len() - of_pending..]);
        self.lanes.finish(&pending[..stripes * STRIPE], &last, self.len)
    }

    /// Which part of the next `len` bytes needs no buffer, in whole stripes; at least a byte is left behind it.
    fn direct(&self, len: usize) -> std::ops::Range<usize> {
        let start = if self.pending == 0 { 0 } else { BUFFER_BYTES - self.pending };
        if len <= start + BUFFER_BYTES {
            return len..len;
        }
        start..start + (len - start - 1) / STRIPE * STRIPE
    }

    /// Hands a full buffer to the lanes when `direct` bytes follow it past the buffer.
    fn flush_before(&mut self, direct: usize) {
        if direct > 0 && self.pending > 0 {
            debug_assert_eq!(self.pending, BUFFER_BYTES, "bytes go past the buffer only once it is full");
            self.lanes.take(&self.buffer);
            self.pending = 0;
        }
    }

    /// Adds bytes through the buffer.
    fn buffer(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.pending == BUFFER_BYTES {
                self.lanes.take(&self.buffer);
                self.pending = 0;
            }
            let room = bytes.len().min(BUFFER_BYTES - self.pending);
            let (now, later) = bytes.split_at(room);
            self.buffer[self.pending..self.pending + room].copy_from_slice(now);
            self.pending += room;
            bytes = later;
        }
    }
}

impl std::fmt::Debug for BlockDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockDigest({:016x})", self.finish())
    }
}

/// The digest of a whole block.
pub fn block_digest(seed: DigestSeed, bytes: &[u8]) -> u64 {
    let seed = seed.fold();
    match bytes.len() as u64 <= SHORT_BYTES {
        true => XxHash3_64::oneshot_with_seed(seed, bytes),
        false => kernel::digest(seed, bytes),
    }
}

/// Copies a whole block and gives its digest, loading each byte once: what is stored is what is digested, even while
/// someone else changes the source.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes, the two may not overlap, and nobody else may
/// access what `to` points to.
#[expect(unsafe_code, reason = "copies between mapped memories in the same pass that digests")]
pub(crate) unsafe fn copy_digesting(seed: DigestSeed, from: *const u8, to: *mut u8, len: usize) -> u64 {
    if len as u64 > SHORT_BYTES {
        // SAFETY: handed on to the caller; the length was just checked.
        return unsafe { kernel::digest_copying(seed.fold(), from, to, len) };
    }
    // SAFETY: handed on to the caller; what was stored is read while nobody else accesses it.
    let stored = unsafe {
        std::ptr::copy_nonoverlapping(from, to, len);
        std::slice::from_raw_parts(to, len)
    };
    block_digest(seed, stored)
}

#[cfg(test)]
mod tests;
