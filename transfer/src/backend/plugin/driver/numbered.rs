//! Things under numbers.

use std::collections::HashMap;
use std::hash::Hash;

/// Things under numbers that are never given twice.
pub(super) struct Numbered<I, T> {
    make: fn(u32) -> I,
    last: u32,
    map: HashMap<I, T>,
}

impl<I: Copy + Eq + Hash, T> Numbered<I, T> {
    pub(super) fn new(make: fn(u32) -> I) -> Self {
        Self { make, last: 0, map: HashMap::new() }
    }

    /// A new number; none are left after 2^32.
    pub(super) fn next(&mut self) -> Option<I> {
        self.last = self.last.checked_add(1)?;
        Some((self.make)(self.last))
    }

    pub(super) fn insert(&mut self, id: I, value: T) {
        self.map.insert(id, value);
    }

    pub(super) fn get(&self, id: I) -> Option<&T> {
        self.map.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: I) -> Option<&mut T> {
        self.map.get_mut(&id)
    }

    pub(super) fn remove(&mut self, id: I) -> Option<T> {
        self.map.remove(&id)
    }

    pub(super) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        self.map.retain(|_, value| keep(value));
    }

    pub(super) fn drain(&mut self) -> Vec<T> {
        self.map.drain().map(|(_, value)| value).collect()
    }
}
