//! Chained hashes of full KV blocks: equal hash, equal token prefix.

mod xxh3;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

/// Identifies a full block of tokens *and everything before it*.
///
/// Engines use it for their prefix cache, KV events carry it, the router's prefix index is keyed by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockHash(pub u64);

impl BlockHash {
    /// The parent of a prompt's first block; `salt` separates tenants (0 for none).
    pub fn root(salt: u64) -> Self {
        Self(XxHash3_64::oneshot_with_seed(salt, b"baton block chain v1"))
    }

    /// The hash of the block that holds `tokens` and follows `self`.
    pub fn child(self, tokens: &[u32]) -> Self {
        if xxh3::is_short(tokens.len()) {
            return Self(xxh3::short(self.0, tokens));
        }
        if tokens.len() <= STACK_TOKENS {
            // Hashed in one go, without a detour over the heap.
            let mut buffer = [0; 4 * STACK_TOKENS];
            let bytes = &mut buffer[..4 * tokens.len()];
            for (place, token) in bytes.chunks_exact_mut(4).zip(tokens) {
                place.copy_from_slice(&token.to_le_bytes());
            }
            return Self(XxHash3_64::oneshot_with_seed(self.0, bytes));
        }
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        Self(XxHash3_64::oneshot_with_seed(self.0, &bytes))
    }
}

/// Tokens of a block whose bytes are put on the stack.
const STACK_TOKENS: usize = 128;

/// How the blocks of a prompt are hashed.
///
/// A router follows workers of several schemes at once; hashes of different schemes are never compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashScheme {
    /// [`block_hashes`]: xxh3 of the tokens, seeded with the hash of the block before.
    #[default]
    Baton,
    /// Each block's tokens hashed alone with seed 1337; a block's hash is that of (hash so far, its own), the first
    /// one's is its own. Engines behind adapters that speak Dynamo's hashes report these. The salt seeds the blocks.
    Xxh3Pairs,
}

/// Seed of [`HashScheme::Xxh3Pairs`].
const PAIRS_SEED: u64 = 1337;

impl HashScheme {
    /// The hashes of all full blocks of `tokens`.
    pub fn chain(self, salt: u64, block_tokens: u32, tokens: &[u32]) -> Vec<BlockHash> {
        match self {
            Self::Baton => block_hashes(salt, block_tokens, tokens),
            Self::Xxh3Pairs => pair_hashes(salt, block_tokens, tokens),
        }
    }
}

fn pair_hashes(salt: u64, block_tokens: u32, tokens: &[u32]) -> Vec<BlockHash> {
    let mut before: Option<u64> = None;
    let hash = |block: &[u32]| {
        let own = BlockHash(PAIRS_SEED.wrapping_add(salt)).child(block).0;
        let hash = before.map_or(own, |before| {
            let mut pair = [0; 16];
            pair[..8].copy_from_slice(&before.to_le_bytes());
            pair[8..].copy_from_slice(&own.to_le_bytes());
            XxHash3_64::oneshot_with_seed(PAIRS_SEED, &pair)
        });
        before = Some(hash);
        BlockHash(hash)
    };
    tokens.chunks_exact(block_tokens as usize).map(hash).collect()
}

/// The hashes of all full blocks of `tokens`.
pub fn block_hashes(salt: u64, block_tokens: u32, tokens: &[u32]) -> Vec<BlockHash> {
    let mut parent = BlockHash::root(salt);
    tokens
        .chunks_exact(block_tokens as usize)
        .map(|block| {
            parent = parent.child(block);
            parent
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_depends_on_all_that_precedes_it() {
        let a = block_hashes(0, 2, &[1, 2, 3, 4, 5]);
        assert_eq!(a.len(), 2, "the partial block has no hash");
        assert_eq!(a, block_hashes(0, 2, &[1, 2, 3, 4]));
        assert_ne!(a[1], block_hashes(0, 2, &[9, 2, 3, 4])[1]);
        assert_ne!(a[0], block_hashes(7, 2, &[1, 2])[0], "salted chains are disjoint");
    }

    #[test]
    fn hashing_in_one_go_and_in_pieces_is_the_same() {
        for len in [1, 16, 60, 64, 128, 129, 500] {
            let tokens: Vec<u32> = (0..len).map(|i| i * 7919).collect();
            let mut hasher = XxHash3_64::with_seed(42);
            for token in &tokens {
                std::hash::Hasher::write(&mut hasher, &token.to_le_bytes());
            }
            assert_eq!(BlockHash(42).child(&tokens).0, std::hash::Hasher::finish(&hasher), "{len}");
        }
    }

    #[test]
    fn schemes_chain_and_differ() {
        for scheme in [HashScheme::Baton, HashScheme::Xxh3Pairs] {
            let chain = |tokens: &[u32]| scheme.chain(0, 2, tokens);
            assert_eq!(chain(&[1, 2, 3, 4, 5]), chain(&[1, 2, 3, 4]));
            assert_eq!(chain(&[1, 2, 3, 4])[..1], chain(&[1, 2])[..]);
            assert_ne!(chain(&[1, 2, 3, 4])[1], chain(&[9, 2, 3, 4])[1]);
            assert_ne!(scheme.chain(1, 2, &[1, 2]), chain(&[1, 2]));
        }
        assert_ne!(HashScheme::Baton.chain(0, 2, &[1, 2]), HashScheme::Xxh3Pairs.chain(0, 2, &[1, 2]));
    }
}
