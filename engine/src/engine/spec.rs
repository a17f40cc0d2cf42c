//! What an owner asks of an engine, and what is refused.

use baton_config::protocol::Sampling;

use crate::sampler::RangeError;

/// What becomes of a sequence once its prompt is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Compute the prompt, generate until the end.
    Generate,
    /// Compute the prompt, emit the first token, keep the blocks until [`Engine::release`](crate::Engine::release).
    /// `max_tokens` does not matter, and no `Finished` follows. One that fails keeps its blocks just so.
    Export,
    /// Reserve the blocks and wait: for [`imported`](crate::Engine::imported) and
    /// [`start_decode`](crate::Engine::start_decode), or for [`prefill_locally`](crate::Engine::prefill_locally).
    Import,
}

/// A sequence to work on.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceSpec {
    /// Prompt tokens, then tokens generated elsewhere before.
    pub tokens: Vec<u32>,
    /// How many of the last `tokens` were generated: they count as output for the penalties.
    pub generated: u32,
    /// Tokens to emit at most, not counting `generated`.
    pub max_tokens: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Separates prefix caches.
    pub cache_salt: u64,
    /// Whether token events carry the running digest of the logits bits. It starts at the first token emitted, so a
    /// replay (`generated` > 0) starts a new one.
    pub logits_digest: bool,
    /// What becomes of it.
    pub purpose: Purpose,
}

/// Who may still write into the blocks of a cancelled sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Writers {
    /// Nobody: the blocks are free at once.
    Gone,
    /// A transfer that was not confirmed to be over: the blocks wait in quarantine for
    /// [`fence`](crate::Engine::fence).
    MayWrite,
}

/// Limits of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Prompt tokens computed in one step, over all sequences together.
    pub prefill_chunk_tokens: u32,
    /// Sequences computed in one step.
    pub max_batch_sequences: u32,
    /// Sequences waiting for room; more are refused.
    pub max_waiting_sequences: u32,
    /// Whether finished blocks are kept for later prompts that start the same.
    pub prefix_cache: bool,
    /// Whether imports come here besides exports: exports then wait until their peer has room, and imports for which
    /// nothing has come hold no more than half of the blocks, as exports without room at their peer do elsewhere.
    pub mixed: bool,
}

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            prefill_chunk_tokens: 512,
            max_batch_sequences: 64,
            max_waiting_sequences: 1024,
            prefix_cache: true,
            mixed: false,
        }
    }
}

/// Why an engine cannot be made of its parts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The KV blocks have another shape than the model.
    #[error(
        "model {model} has {layers} layers x {kv_heads} kv heads x {head_dim} dims, its KV blocks are {geometry}"
    )]
    Geometry {
        /// Name of the model.
        model: String,
        /// Of the model.
        layers: u32,
        /// Of the model.
        kv_heads: u32,
        /// Of the model.
        head_dim: u32,
        /// Of the arena.
        geometry: baton_config::KvGeometry,
    },
    /// A limit that must not be zero is.
    #[error("{limit} must be at least 1")]
    Zero {
        /// Its name.
        limit: &'static str,
    },
}

/// Why a sequence was refused; nothing was changed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// It can never fit.
    #[error("{tokens} prompt tokens leave no room for output: this worker takes {limit} tokens a sequence")]
    TooLong {
        /// Of the prompt.
        tokens: usize,
        /// Prompt and output together: the model's context, or what the KV blocks hold.
        limit: u32,
    },
    /// A token outside the vocabulary.
    #[error("token {token} of a vocabulary of {vocab}")]
    BadToken {
        /// The first such token.
        token: u32,
        /// Of the model.
        vocab: u32,
    },
    /// No tokens to continue, or none to generate.
    #[error("{0} must be at least 1")]
    Empty(&'static str),
    /// A sampling value out of range.
    #[error(transparent)]
    BadSampling(#[from] RangeError),
    /// Something that is made of logits, from an executor that has none.
    #[error("this engine has no logits, and so no {0}")]
    NoLogits(&'static str),
    /// Too many wait already: retry elsewhere or later.
    #[error("{waiting} sequences are waiting already")]
    QueueFull {
        /// Sequences waiting.
        waiting: u32,
    },
    /// The id is in use (or in quarantine).
    #[error("{0} exists")]
    Duplicate(super::SeqId),
}
