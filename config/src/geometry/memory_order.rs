//! The order of the axes of a KV cache in memory.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::choice::Choice;

/// An axis of a KV cache. The innermost one, the numbers of a head, is not among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvAxis {
    /// Layers.
    Layer,
    /// Blocks of the arena.
    Block,
    /// Keys, then values.
    Kv,
    /// Heads of this worker.
    Head,
    /// Tokens of a block.
    Token,
}

use KvAxis::{Block, Head, Kv, Layer, Token};

/// The order of the axes in memory, outermost first.
///
/// The words spell it: `b` blocks, `l` layers, `2` keys and values, `h` heads, `n` tokens of a block, `d` the numbers of
/// a head, `c` the numbers of a key and of its value beside each other. `nhd` and `hnd` alone are blocks of layers of
/// keys and values, `bl2nhd` and `bl2hnd`. Those of five letters are the layouts of vLLM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "each name spells the order, as said above")]
pub enum KvLayout {
    Nhd,
    Hnd,
    B2lNhd,
    B2lHnd,
    L2bNhd,
    L2bHnd,
    Lb2Nhd,
    Lb2Hnd,
    Lbnhc,
    Lbhnc,
    Lhbnc,
    Blnhc,
    Blhnc,
    Bhlnc,
}

impl KvLayout {
    /// The axes, outermost first.
    pub fn axes(self) -> [KvAxis; 5] {
        match self {
            Self::Nhd => [Block, Layer, Kv, Token, Head],
            Self::Hnd => [Block, Layer, Kv, Head, Token],
            Self::B2lNhd => [Block, Kv, Layer, Token, Head],
            Self::B2lHnd => [Block, Kv, Layer, Head, Token],
            Self::L2bNhd => [Layer, Kv, Block, Token, Head],
            Self::L2bHnd => [Layer, Kv, Block, Head, Token],
            Self::Lb2Nhd => [Layer, Block, Kv, Token, Head],
            Self::Lb2Hnd => [Layer, Block, Kv, Head, Token],
            Self::Lbnhc => [Layer, Block, Token, Head, Kv],
            Self::Lbhnc => [Layer, Block, Head, Token, Kv],
            Self::Lhbnc => [Layer, Head, Block, Token, Kv],
            Self::Blnhc => [Block, Layer, Token, Head, Kv],
            Self::Blhnc => [Block, Layer, Head, Token, Kv],
            Self::Bhlnc => [Block, Head, Layer, Token, Kv],
        }
    }

    /// Whether a block is one run of memory.
    pub fn is_block_first(self) -> bool {
        self.axes()[0] == Block
    }
}

impl fmt::Display for KvLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
