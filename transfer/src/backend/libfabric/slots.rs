//! The words that the library keeps for each operation under way: in place from the opening of a driver to its end.
//!
//! The library is given the address of a slot and may write its words until it reports the operation; we never read
//! them. A reported address is looked up by comparing, and never followed, so that whatever a provider reports
//! cannot lead astray. Slots are reused oldest first, so that a late second report of an operation finds no other
//! operation in its place.

use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::ffi::c_void;

/// Slots allocated together.
const CHUNK: usize = 1024;
/// Most operations under way: the queues of every provider are shorter.
const CHUNKS_MAX: usize = 16;

/// Eight words, which is what `FI_CONTEXT2` asks for; `FI_CONTEXT` uses four of them.
#[repr(C, align(64))]
struct Context(UnsafeCell<[u64; 8]>);

/// Slots, and what each is used for.
pub(super) struct Slots<T> {
    chunks: Vec<Box<[Context]>>,
    used: Vec<Option<T>>,
    free: VecDeque<u32>,
}

impl<T> Slots<T> {
    pub(super) fn new() -> Self {
        Self { chunks: Vec::new(), used: Vec::new(), free: VecDeque::new() }
    }

    /// How many more could be taken.
    pub(super) fn available(&self) -> usize {
        self.free.len() + (CHUNKS_MAX - self.chunks.len()) * CHUNK
    }

    /// Takes one; none when all are in use.
    pub(super) fn take(&mut self, value: T) -> Option<u32> {
        if self.free.is_empty() && self.chunks.len() < CHUNKS_MAX {
            self.chunks.push((0..CHUNK).map(|_| Context(UnsafeCell::new([0; 8]))).collect());
            let first = self.used.len() as u32;
            self.used.extend((0..CHUNK).map(|_| None));
            self.free.extend(first..first + CHUNK as u32);
        }
        let slot = self.free.pop_front()?;
        self.used[slot as usize] = Some(value);
        Some(slot)
    }

    /// Where its words are.
    pub(super) fn context(&self, slot: u32) -> *mut c_void {
        let (chunk, at) = (slot as usize / CHUNK, slot as usize % CHUNK);
        self.chunks[chunk][at].0.get().cast::<c_void>()
    }

    /// The slot at an address that the library reports, if there is one in use.
    pub(super) fn find(&self, context: *mut c_void) -> Option<u32> {
        let address = context.addr();
        let found = self.chunks.iter().enumerate().find_map(|(number, chunk)| {
            let offset = address.checked_sub(chunk.as_ptr().addr())?;
            let at = offset / size_of::<Context>();
            (at < CHUNK && offset.is_multiple_of(size_of::<Context>())).then_some(number * CHUNK + at)
        })?;
        self.used[found].is_some().then_some(found as u32)
    }

    pub(super) fn get(&self, slot: u32) -> Option<&T> {
        self.used.get(slot as usize)?.as_ref()
    }

    /// Gives one back: the library does not know its address any more.
    pub(super) fn give_back(&mut self, slot: u32) -> Option<T> {
        let value = self.used.get_mut(slot as usize)?.take()?;
        self.free.push_back(slot);
        Some(value)
    }

    /// Those in use for which `wanted` holds.
    pub(super) fn matching(&self, wanted: impl Fn(&T) -> bool) -> Vec<u32> {
        let slots = self.used.iter().enumerate();
        slots.filter(|(_, value)| value.as_ref().is_some_and(&wanted)).map(|(slot, _)| slot as u32).collect()
    }

    /// Leaves the words in place for ever: the library could not be made to forget them.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.chunks));
    }
}

#[cfg(test)]
mod tests;
