//! Chained hashes of full KV blocks: equal hash, equal token prefix.

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
        let mut hasher = XxHash3_64::with_seed(self.0);
        for token in tokens {
            std::hash::Hasher::write(&mut hasher, &token.to_le_bytes());
        }
        Self(std::hash::Hasher::finish(&hasher))
    }
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
}
