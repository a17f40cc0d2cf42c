//! Pieces of text and their tokens, the ones used last, bounded by their bytes.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, Mutex, PoisonError};

/// Parts with a lock of their own.
const SHARDS: usize = 16;
/// Bytes that an entry takes besides its text and its tokens.
const ENTRY_BYTES: usize = 96;

/// What is kept of a piece.
type Known = HashMap<(u64, Box<str>), Arc<[u32]>>;

/// The cache.
#[derive(Debug)]
pub(super) struct Cache {
    shards: Vec<Mutex<Shard>>,
    hasher: RandomState,
    /// Bytes of a generation of one shard.
    half: usize,
}

/// Two generations: what is used goes into the new one; when that is full it becomes the old one, and what was not used
/// since the last time goes.
#[derive(Debug, Default)]
struct Shard {
    new: Known,
    old: Known,
    bytes: usize,
}

impl Cache {
    /// An empty one for `bytes`.
    pub(super) fn new(bytes: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, hasher: RandomState::new(), half: bytes / SHARDS / 2 }
    }

    /// The tokens of a piece, if they are known.
    pub(super) fn get(&self, salt: u64, piece: &str) -> Option<Arc<[u32]>> {
        let mut shard = self.shard(salt, piece);
        let key: &dyn Key = &(salt, piece);
        if let Some(known) = shard.new.get(key) {
            return Some(Arc::clone(known));
        }
        let (key, known) = shard.old.remove_entry(key)?;
        shard.put(self.half, key, Arc::clone(&known));
        Some(known)
    }

    /// Keeps the tokens of a piece, unless it is so large that it would push out many others.
    pub(super) fn put(&self, salt: u64, piece: &str, tokens: Arc<[u32]>) {
        if size(piece, &tokens) <= self.half / 4 {
            self.shard(salt, piece).put(self.half, (salt, piece.into()), tokens);
        }
    }

    fn shard(&self, salt: u64, piece: &str) -> std::sync::MutexGuard<'_, Shard> {
        // Ends of pieces differ where their beginnings, which are marks, do not; hashing all of it once is enough.
        let tail = &piece.as_bytes()[piece.len().saturating_sub(16)..];
        let at = self.hasher.hash_one((salt, piece.len(), tail)) as usize % SHARDS;
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shard {
    fn put(&mut self, half: usize, key: (u64, Box<str>), tokens: Arc<[u32]>) {
        let bytes = size(&key.1, &tokens);
        if self.bytes + bytes > half {
            self.old = std::mem::take(&mut self.new);
            self.bytes = 0;
        }
        if self.new.insert(key, tokens).is_none() {
            self.bytes += bytes;
        }
    }
}

fn size(piece: &str, tokens: &[u32]) -> usize {
    piece.len() + size_of_val(tokens) + ENTRY_BYTES
}

/// Salt and text, borrowed or owned, so that a look needs no copy.
trait Key {
    fn parts(&self) -> (u64, &str);
}

impl Key for (u64, Box<str>) {
    fn parts(&self) -> (u64, &str) {
        (self.0, &self.1)
    }
}

impl Key for (u64, &str) {
    fn parts(&self) -> (u64, &str) {
        (self.0, self.1)
    }
}

impl<'a> std::borrow::Borrow<dyn Key + 'a> for (u64, Box<str>) {
    fn borrow(&self) -> &(dyn Key + 'a) {
        self
    }
}

impl std::hash::Hash for dyn Key + '_ {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

impl PartialEq for dyn Key + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for dyn Key + '_ {}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(n: u32) -> Arc<[u32]> {
        [n].into()
    }

    #[test]
    fn what_is_used_stays_and_the_rest_goes_within_its_bytes() {
        let cache = Cache::new(64 << 10);
        cache.put(7, "kept", tokens(1));
        for i in 0..10_000 {
            cache.put(0, &format!("passing {i}"), tokens(i));
            assert_eq!(cache.get(7, "kept").as_deref(), Some(&[1][..]), "after {i}");
        }
        assert_eq!(cache.get(0, "passing 1"), None);
        assert_eq!(cache.get(8, "kept"), None, "another salt");
        assert_eq!(cache.get(7, "kep"), None);
        let mut bytes = 0;
        for shard in &cache.shards {
            let shard = shard.lock().unwrap();
            bytes +=
                shard.new.iter().chain(&shard.old).map(|(key, tokens)| size(&key.1, tokens)).sum::<usize>();
        }
        assert!(bytes > 16 << 10 && bytes <= 64 << 10, "{bytes}");
    }

    #[test]
    fn what_is_too_large_is_not_kept() {
        let cache = Cache::new(64 << 10);
        cache.put(0, &"x".repeat(32 << 10), tokens(1));
        assert_eq!(cache.get(0, &"x".repeat(32 << 10)), None);
    }
}
