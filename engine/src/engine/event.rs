//! What an engine tells its owner.

use std::time::Duration;

use baton_config::protocol::{FinishReason, TokenLogprob};

use crate::arena::BlockId;
use crate::executor::ExecuteError;
use crate::sampler::SampleError;

/// A sequence of an engine; chosen by the owner, free again once the sequence has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

impl std::fmt::Display for SeqId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sequence {}", self.0)
    }
}

/// Something that happened to a sequence. In the order of happening; per sequence `Admitted`, then any `Prefilled`, then
/// `Token`s, then at most one of `Finished` and `Failed`, which ends it.
#[derive(Debug, Clone, PartialEq)]
pub enum EngineEvent {
    /// The sequence has its blocks; sent once, even if it is preempted and admitted again.
    Admitted {
        /// The sequence.
        id: SeqId,
        /// Tokens found in the prefix cache: a multiple of the block size, less than the prompt.
        cached_tokens: u32,
        /// Blocks for the whole prompt, cached ones first. For an import, those after the cached ones are to be written.
        blocks: Vec<BlockId>,
        /// Time from submission to now.
        queued: Duration,
    },
    /// KV of the prompt's tokens `[0, upto)` is computed; after each chunk, `upto` only grows.
    Prefilled {
        /// The sequence.
        id: SeqId,
        /// Tokens in place, cached ones included.
        upto: u32,
    },
    /// The next token; for an import also the first one, which the owner brought.
    Token {
        /// The sequence.
        id: SeqId,
        /// Its id.
        token: u32,
        /// When the sampling asks for it.
        logprob: Option<TokenLogprob>,
        /// When the spec asks for it: running digest of the logits bits up to this token.
        logits_digest: Option<u64>,
    },
    /// The last token was sent; the blocks are given back.
    Finished {
        /// The sequence.
        id: SeqId,
        /// Why.
        reason: FinishReason,
    },
    /// The sequence cannot go on; the blocks are given back, but for an export, whose owner still has to
    /// [`release`](crate::Engine::release) them.
    Failed {
        /// The sequence.
        id: SeqId,
        /// Why.
        error: SequenceError,
    },
}

impl EngineEvent {
    /// The sequence it is about.
    pub fn id(&self) -> SeqId {
        match self {
            Self::Admitted { id, .. }
            | Self::Prefilled { id, .. }
            | Self::Token { id, .. }
            | Self::Finished { id, .. }
            | Self::Failed { id, .. } => *id,
        }
    }
}

/// Why a sequence that was accepted cannot go on. The tokens sent before stand.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SequenceError {
    /// The forward pass failed: replay elsewhere. The sequence's blocks left the prefix cache.
    #[error("the forward pass failed")]
    Execute(#[from] ExecuteError),
    /// The logits are no numbers: the model or its KV cache is damaged.
    #[error("no token can be chosen")]
    Sample(#[from] SampleError),
    /// Decode was started before the KV of the whole prompt was in place: a bug of the owner.
    #[error("decode started with KV of {imported} of {prompt} prompt tokens in place")]
    NotImported {
        /// Tokens in place.
        imported: u32,
        /// Tokens of the prompt.
        prompt: u32,
    },
    /// The first token of an import is outside the vocabulary: the peer runs another model.
    #[error("first token {token} of a vocabulary of {vocab}")]
    BadFirstToken {
        /// As brought.
        token: u32,
        /// Of this model.
        vocab: u32,
    },
}
