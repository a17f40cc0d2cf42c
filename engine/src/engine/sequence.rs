//! One sequence: its tokens, its blocks, how far it is.

use std::time::Instant;

use baton_config::protocol::Sampling;

use super::{Purpose, SeqId, SequenceSpec};
use crate::arena::BlockId;
use crate::block_pool::{BlockPool, Content};
use crate::sampler::History;

/// Where a sequence stands. Who is waiting or running is also listed, in order, in the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Holds no blocks.
    Waiting,
    /// An import: has blocks for its prompt, which the owner writes.
    Importing,
    /// Computes: `tokens[computed..]` are due.
    Running,
    /// Set aside until its reader has caught up; holds no blocks.
    Paused,
    /// An export with its first token emitted: nobody writes its blocks any more.
    Held,
    /// An export that cannot go on: its blocks stay as they are until its owner looks at them no more.
    Failed,
}

/// What is kept of the running digest of logits bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Digest {
    Off,
    On(Option<u64>),
}

#[derive(Debug)]
pub(super) struct Sequence {
    /// Grows from submission to submission: the age of the sequence, kept over preemptions.
    pub(super) order: u64,
    pub(super) phase: Phase,
    /// What was asked for, until an import is given up or complete: from then on it generates.
    pub(super) purpose: Purpose,
    /// Prompt and output. All but the last have their KV computed, or will have.
    pub(super) tokens: Vec<u32>,
    /// Tokens submitted.
    pub(super) prompt: u32,
    pub(super) max_tokens: u32,
    pub(super) sampling: Sampling,
    pub(super) history: History,
    pub(super) digest: Digest,
    pub(super) submitted: Instant,
    /// Of an export: its peer has room for it. Of an import: some of it has come.
    pub(super) met: bool,
    /// Whether the owner was told of the admission.
    pub(super) announced: bool,
    /// Prompt tokens the owner was told to be in place.
    pub(super) reported: u32,
    /// KV of `tokens[..computed]` is in place.
    pub(super) computed: u32,
    /// Block table from position 0.
    pub(super) blocks: Vec<BlockId>,
    /// Leading blocks that are complete: shared, or valid where another block has the same content.
    pub(super) settled: u32,
    salt: u64,
    /// The first full blocks; computed as needed.
    contents: Vec<Content>,
}

impl Sequence {
    pub(super) fn new(order: u64, spec: SequenceSpec, now: Instant) -> Self {
        let (prompt, output) = spec.tokens.split_at(spec.tokens.len() - spec.generated as usize);
        Self {
            order,
            phase: Phase::Waiting,
            purpose: spec.purpose,
            history: History::new(&spec.sampling, prompt, output),
            prompt: spec.tokens.len() as u32,
            tokens: spec.tokens,
            max_tokens: spec.max_tokens,
            sampling: spec.sampling,
            digest: if spec.logits_digest { Digest::On(None) } else { Digest::Off },
            submitted: now,
            met: false,
            announced: false,
            reported: 0,
            computed: 0,
            blocks: Vec::new(),
            settled: 0,
            salt: spec.cache_salt,
            contents: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Tokens emitted.
    pub(super) fn emitted(&self) -> u32 {
        self.len() - self.prompt
    }

    /// Tokens to compute before the next one can be chosen.
    pub(super) fn due(&self) -> u32 {
        self.len() - self.computed
    }

    /// The first `count` blocks, which must be full, as `pool` knows them.
    pub(super) fn contents(&mut self, pool: &BlockPool, block_tokens: u32, count: u32) -> &[Content] {
        let (block_tokens, count) = (block_tokens as usize, count as usize);
        let sealer = pool.sealer();
        while self.contents.len() < count {
            let at = self.contents.len() * block_tokens;
            let parent = self.contents.last().copied().unwrap_or_else(|| sealer.root(self.salt));
            self.contents.push(sealer.child(parent, &self.tokens[at..at + block_tokens]));
        }
        &self.contents[..count]
    }

    /// Completes the blocks of `tokens[..upto]` that are full, and puts them into the prefix cache if there is one.
    pub(super) fn settle(
        &mut self,
        id: SeqId,
        pool: &mut BlockPool,
        publish: Option<BlockTokens>,
        upto: u32,
    ) {
        while self.settled < upto {
            let index = self.settled;
            let block = self.blocks[index as usize];
            pool.complete(block, id);
            if let Some(BlockTokens(block_tokens)) = publish {
                let root = pool.sealer().root(self.salt);
                let contents = self.contents(pool, block_tokens, index + 1);
                let parent = if index == 0 { root } else { contents[index as usize - 1] };
                let content = contents[index as usize];
                pool.publish(block, id, parent.hash, content);
            }
            self.settled += 1;
        }
    }

    /// Gives all blocks back; the KV is to be computed again.
    pub(super) fn drop_blocks(&mut self, id: SeqId, pool: &mut BlockPool) {
        for block in self.blocks.drain(..).rev() {
            pool.release(block, id);
        }
        self.computed = 0;
        self.settled = 0;
    }
}

/// Tokens per block, where blocks are published under their hash.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockTokens(pub(super) u32);
