//! The bytes below a KV arena.

use std::sync::atomic::{AtomicU64, Ordering};

/// Memory that holds KV blocks: host memory, or a device reached by explicit copies.
///
/// Reads and writes of disjoint ranges may run at the same time from any thread. A read that overlaps a write
/// returns some mixture of old and new bytes, never anything else: who may touch which block when is settled by the
/// block states, and what came over a wire is checked by digest.
///
/// Units: offsets and lengths in bytes.
pub trait KvMemory: Send + Sync {
    /// Bytes there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the bytes at `offset` to `into`.
    ///
    /// # Panics
    /// When the range does not lie within the memory: a bug of the caller.
    fn read(&self, offset: usize, into: &mut [u8]);

    /// Copies `from` to the bytes at `offset`.
    ///
    /// # Panics
    /// When the range does not lie within the memory: a bug of the caller.
    fn write(&self, offset: usize, from: &[u8]);
}

const WORD: usize = 8;

/// Process-private memory, for engines that hand no blocks to other processes.
///
/// Made of relaxed atomic words, so that a race between a reader and a writer is defined and no unsafe is needed.
pub struct HeapMemory {
    words: Box<[AtomicU64]>,
    len: usize,
}

impl HeapMemory {
    /// `len` bytes, all zero.
    pub fn new(len: usize) -> Self {
        Self { words: (0..len.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect(), len }
    }

    fn check(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} do not lie within a memory of {}",
            self.len
        );
    }
}

impl std::fmt::Debug for HeapMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeapMemory").field("len", &self.len).finish()
    }
}

/// Bytes from `offset` to the next word boundary, at most `len`.
fn head_len(offset: usize, len: usize) -> usize {
    ((WORD - offset % WORD) % WORD).min(len)
}

impl KvMemory for HeapMemory {
    fn len(&self) -> usize {
        self.len
    }

    fn read(&self, offset: usize, into: &mut [u8]) {
        self.check(offset, into.len());
        let part = |at: usize, into: &mut [u8]| {
            let word = self.words[at / WORD].load(Ordering::Relaxed).to_le_bytes();
            into.copy_from_slice(&word[at % WORD..at % WORD + into.len()]);
        };
        let (head, rest) = into.split_at_mut(head_len(offset, into.len()));
        if !head.is_empty() {
            part(offset, head);
        }
        let start = offset + head.len();
        let (body, tail) = rest.as_chunks_mut::<WORD>();
        for (bytes, word) in body.iter_mut().zip(&self.words[start / WORD..]) {
            *bytes = word.load(Ordering::Relaxed).to_le_bytes();
        }
        if !tail.is_empty() {
            part(start + body.len() * WORD, tail);
        }
    }

    fn write(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        let part = |at: usize, from: &[u8]| {
            // Neighbouring rows may share a word and be written by two threads: only our bytes may change.
            let update = |word: u64| {
                let mut bytes = word.to_le_bytes();
                bytes[at % WORD..at % WORD + from.len()].copy_from_slice(from);
                u64::from_le_bytes(bytes)
            };
            self.words[at / WORD].update(Ordering::Relaxed, Ordering::Relaxed, update);
        };
        let (head, rest) = from.split_at(head_len(offset, from.len()));
        if !head.is_empty() {
            part(offset, head);
        }
        let start = offset + head.len();
        let (body, tail) = rest.as_chunks::<WORD>();
        for (bytes, word) in body.iter().zip(&self.words[start / WORD..]) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        if !tail.is_empty() {
            part(start + body.len() * WORD, tail);
        }
    }
}

#[cfg(test)]
mod tests;
