//! What a cached block holds, in a way that nobody can forge.

use std::hash::{BuildHasher as _, RandomState};

use baton_config::prefix::BlockHash;

/// The tokens of a block and all before them, by two hashes.
///
/// The first is what routers and other workers know the block by. Anybody can compute it, and find two prompts with the same
/// one in less than a second; so the cache gives a block only to who has the second one, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// The hash that is told to others.
    pub hash: BlockHash,
    /// The hash of the same under a key of this process, which is told to nobody.
    pub seal: u64,
}

/// Makes contents; clones make the same ones.
#[derive(Debug, Clone, Default)]
pub struct Sealer(RandomState);

impl Sealer {
    /// What precedes the first block of a prompt.
    pub fn root(&self, salt: u64) -> Content {
        Content { hash: BlockHash::root(salt), seal: self.0.hash_one(salt) }
    }

    /// The content of the block that holds `tokens` and follows `parent`.
    pub fn child(&self, parent: Content, tokens: &[u32]) -> Content {
        Content { hash: parent.hash.child(tokens), seal: self.0.hash_one((parent.seal, tokens)) }
    }
}
