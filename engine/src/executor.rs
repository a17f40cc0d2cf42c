//! What computes: tokens in, KV rows into the arena, logits out.

use std::time::Duration;

use baton_config::KvGeometry;

use crate::arena::{Arena, BlockId};

/// What an engine must know about the model it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// For people.
    pub name: String,
    /// Token ids are below this; also the length of a row of logits.
    pub vocab: u32,
    /// Most tokens of a sequence, prompt and output together.
    pub max_context: u32,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
    /// Transformer layers.
    pub layers: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Numbers per head.
    pub head_dim: u32,
}

impl ModelInfo {
    /// Whether KV blocks of this geometry can hold the keys and values of this model.
    pub fn fits(&self, geometry: &KvGeometry) -> bool {
        (self.layers, self.kv_heads, self.head_dim) == (geometry.layers, geometry.kv_heads, geometry.head_dim)
    }
}

/// The part of one sequence that a forward pass computes.
#[derive(Debug, Clone, Copy)]
pub struct BatchItem<'a> {
    /// The tokens before `start`, whose KV rows are in the arena already. A transformer needs only the rows; the
    /// simulation checks the rows against the tokens.
    pub context: &'a [u32],
    /// The tokens to compute; never empty.
    pub tokens: &'a [u32],
    /// Position of the first of `tokens`; the length of `context`.
    pub start: u32,
    /// Block table from position 0, long enough for all of `tokens`.
    pub blocks: &'a [BlockId],
    /// Whether the logits after the last of `tokens` are wanted.
    pub logits: bool,
}

/// What a forward pass gives back; reused from pass to pass.
#[derive(Debug, Clone, Default)]
pub struct Forward {
    /// One row of `vocab` logits per item that asked, in their order.
    pub logits: Vec<f32>,
    /// Instead of logits, from an executor without: the next token of each item that asked.
    pub tokens: Vec<u32>,
    /// How long the modelled hardware would have taken; zero where the pass itself took its time.
    pub modelled: Duration,
}

/// Why a forward pass gave no result. No KV row of an earlier token was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExecuteError {
    /// A row attended to is not what was computed for its token: the item must not go on from this block.
    #[error(
        "KV of token {position} in layer {layer}, block {} is not what its token prefix gives (item {item})",
        block.0
    )]
    CorruptKv {
        /// Index of the item in the batch.
        item: usize,
        /// Position of the token in its sequence.
        position: u32,
        /// Layer of the first wrong row.
        layer: u32,
        /// Block that holds it.
        block: BlockId,
    },
    /// An item is malformed: a bug of the caller.
    #[error("item {item} of the batch is malformed: {reason}")]
    Malformed {
        /// Index of the item in the batch.
        item: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// The executor itself broke; nothing of the batch was computed.
    #[error("the executor broke: {reason}")]
    Broken {
        /// What happened.
        reason: String,
    },
}

impl ExecuteError {
    /// The item of the batch at fault, when it is a single one: the others can go on without it.
    pub fn item(&self) -> Option<usize> {
        match self {
            Self::CorruptKv { item, .. } | Self::Malformed { item, .. } => Some(*item),
            Self::Broken { .. } => None,
        }
    }
}

/// Runs the model.
///
/// The logits of an item depend bitwise on its tokens alone: not on the other items, on how its tokens were cut into
/// passes, on block size, layout, or the number of threads (the KV dtype does matter).
pub trait Executor: Send {
    /// The model that runs.
    fn model(&self) -> &ModelInfo;

    /// Whether it computes logits that tokens are chosen from. One that does not names the tokens itself.
    fn has_logits(&self) -> bool {
        true
    }

    /// Computes the KV rows of the new tokens of every item into `arena`, and the logits asked for into `out`.
    ///
    /// Overwrites what `out` held before. Repeating a pass writes the same rows again and gives the same logits.
    ///
    /// # Errors
    /// When an item is malformed or its context corrupt; `out` is then meaningless.
    fn forward(
        &mut self,
        arena: &Arena,
        batch: &[BatchItem<'_>],
        out: &mut Forward,
    ) -> Result<(), ExecuteError>;
}

/// Checks what every executor requires of a batch.
///
/// # Errors
/// [`ExecuteError::Malformed`] naming the first item that does not hold to [`BatchItem`].
pub fn check_batch(model: &ModelInfo, arena: &Arena, batch: &[BatchItem<'_>]) -> Result<(), ExecuteError> {
    for (item, part) in batch.iter().enumerate() {
        let malformed = |reason| Err(ExecuteError::Malformed { item, reason });
        let end = part.start as usize + part.tokens.len();
        if part.tokens.is_empty() {
            return malformed("no tokens");
        }
        if part.context.len() != part.start as usize {
            return malformed("context does not end where the tokens start");
        }
        if end > model.max_context as usize {
            return malformed("longer than the context of the model");
        }
        if part.blocks.len() * (arena.geometry().block_tokens as usize) < end {
            return malformed("block table too short");
        }
        if part.blocks.iter().any(|block| block.0 >= arena.blocks()) {
            return malformed("a block outside the arena");
        }
        if part.tokens.iter().any(|token| *token >= model.vocab) {
            return malformed("a token outside the vocabulary");
        }
    }
    Ok(())
}
