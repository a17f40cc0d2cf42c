//! Pieces of text and their tokens, the ones used last, bounded by their bytes.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use foldhash::SharedSeed;
use foldhash::quality::SeedableRandomState;
use hashbrown::HashTable;

/// Parts with a lock of their own.
const SHARDS: usize = 16;
/// Bytes that an entry takes besides its text and its tokens.
const ENTRY_BYTES: usize = 96;

/// The cache.
#[derive(Debug)]
pub(super) struct Cache {
    shards: Vec<Mutex<Shard>>,
    /// Of this process alone: clients choose the texts.
    hasher: SeedableRandomState,
    /// Bytes of a generation of one shard.
    half: usize,
}

/// What is kept of a piece.
#[derive(Debug)]
struct Known {
    hash: u64,
    salt: u64,
    text: Box<str>,
    tokens: Box<[u32]>,
}

/// Two generations: what is used goes into the new one; when that is full it becomes the old one, and what was not used
/// since the last time goes.
#[derive(Debug, Default)]
struct Shard {
    new: HashTable<Known>,
    old: HashTable<Known>,
    bytes: usize,
}

impl Cache {
    /// An empty one for `bytes`.
    pub(super) fn new(bytes: usize) -> Self {
        static SHARED: OnceLock<SharedSeed> = OnceLock::new();
        // The standard library draws its seeds from the system.
        let random = || RandomState::new().hash_one(0);
        let shared = SHARED.get_or_init(|| SharedSeed::from_u64(random()));
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, hasher: SeedableRandomState::with_seed(random(), shared), half: bytes / SHARDS / 2 }
    }

    /// Appends the tokens of a piece, if they are known.
    pub(super) fn append(&self, salt: u64, piece: &str, out: &mut Vec<u32>) -> bool {
        let hash = self.hash(salt, piece);
        let mut shard = self.shard(hash);
        if let Some(known) = shard.new.find(hash, |known| known.is(salt, piece)) {
            out.extend_from_slice(&known.tokens);
            return true;
        }
        let Ok(found) = shard.old.find_entry(hash, |known| known.is(salt, piece)) else { return false };
        let (known, _) = found.remove();
        out.extend_from_slice(&known.tokens);
        shard.put(self.half, known);
        true
    }

    /// Keeps the tokens of a piece, unless it is so large that it would push out many others.
    pub(super) fn put(&self, salt: u64, piece: &str, tokens: &[u32]) {
        if size(piece, tokens) <= self.half / 4 {
            let hash = self.hash(salt, piece);
            let known = Known { hash, salt, text: piece.into(), tokens: tokens.into() };
            self.shard(hash).put(self.half, known);
        }
    }

    fn hash(&self, salt: u64, piece: &str) -> u64 {
        self.hasher.hash_one((salt, piece.as_bytes()))
    }

    fn shard(&self, hash: u64) -> MutexGuard<'_, Shard> {
        // A table takes its places from the low bits and its tags from the highest seven.
        let at = (hash >> 40) as usize % SHARDS;
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn is(&self, salt: u64, piece: &str) -> bool {
        self.salt == salt && *self.text == *piece
    }
}

impl Shard {
    fn put(&mut self, half: usize, known: Known) {
        let bytes = size(&known.text, &known.tokens);
        if self.bytes + bytes > half {
            self.old = std::mem::take(&mut self.new);
            self.bytes = 0;
        }
        match self.new.entry(known.hash, |other| other.is(known.salt, &known.text), |other| other.hash) {
            // Somebody was quicker.
            hashbrown::hash_table::Entry::Occupied(_) => {}
            hashbrown::hash_table::Entry::Vacant(place) => {
                place.insert(known);
                self.bytes += bytes;
            }
        }
    }
}

fn size(piece: &str, tokens: &[u32]) -> usize {
    piece.len() + size_of_val(tokens) + ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(cache: &Cache, salt: u64, piece: &str) -> Option<Vec<u32>> {
        let mut tokens = vec![7];
        let known = cache.append(salt, piece, &mut tokens);
        assert_eq!(tokens[0], 7, "what was there stays");
        known.then(|| tokens.split_off(1))
    }

    #[test]
    fn what_is_used_stays_and_the_rest_goes_within_its_bytes() {
        let cache = Cache::new(64 << 10);
        cache.put(7, "kept", &[1, 2]);
        for i in 0..10_000 {
            cache.put(0, &format!("passing {i}"), &[i]);
            assert_eq!(get(&cache, 7, "kept").as_deref(), Some(&[1, 2][..]), "after {i}");
        }
        assert_eq!(get(&cache, 0, "passing 1"), None);
        assert_eq!(get(&cache, 8, "kept"), None, "another salt");
        assert_eq!(get(&cache, 7, "kep"), None);
        let mut bytes = 0;
        for shard in &cache.shards {
            let shard = shard.lock().unwrap();
            let all = shard.new.iter().chain(&shard.old);
            bytes += all.map(|known| size(&known.text, &known.tokens)).sum::<usize>();
        }
        assert!(bytes > 16 << 10 && bytes <= 64 << 10, "{bytes}");
    }

    #[test]
    fn what_is_too_large_is_not_kept() {
        let cache = Cache::new(64 << 10);
        cache.put(0, &"x".repeat(32 << 10), &[1]);
        assert_eq!(get(&cache, 0, &"x".repeat(32 << 10)), None);
    }
}
