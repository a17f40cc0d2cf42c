//! Which heads of a model a worker holds.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The part of the KV heads that a worker holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Shard {
    /// All of them.
    #[default]
    Whole,
    /// Those of one rank of a tensor-parallel group.
    ///
    /// Up to `heads` ranks share the heads out, each `heads / degree` in sequence. More ranks than heads hold one head
    /// each, and `degree / heads` neighbours the same one.
    Tensor {
        /// Counted from 0.
        rank: u16,
        /// Ranks of the group.
        degree: u16,
        /// KV heads of the model.
        heads: u32,
    },
}

impl Shard {
    /// The heads of the model that are held, where a worker holds `kv_heads` of them.
    pub fn heads(self, kv_heads: u32) -> Range<u32> {
        match self {
            Self::Whole => 0..kv_heads,
            Self::Tensor { rank, degree, heads } => {
                let first = u64::from(rank) * u64::from(heads) / u64::from(degree.max(1));
                let first = u32::try_from(first).unwrap_or(u32::MAX);
                first..first.saturating_add(kv_heads)
            }
        }
    }

    /// KV heads of the model, where a worker holds `kv_heads` of them.
    pub fn model_heads(self, kv_heads: u32) -> u32 {
        match self {
            Self::Whole => kv_heads,
            Self::Tensor { heads, .. } => heads,
        }
    }

    /// Why a worker with this shard cannot hold `kv_heads`.
    pub(super) fn fault(self, kv_heads: u32) -> Option<ShardFault> {
        let Self::Tensor { rank, degree, heads } = self else { return None };
        let (ranks, per_rank) = (u32::from(degree), heads.checked_div(u32::from(degree)));
        match per_rank {
            None => Some(ShardFault::Degree),
            Some(_) if rank >= degree || heads == 0 => Some(ShardFault::Degree),
            Some(0) if ranks % heads != 0 => Some(ShardFault::Uneven),
            Some(1..) if heads % ranks != 0 => Some(ShardFault::Uneven),
            Some(share) if kv_heads != share.max(1) => Some(ShardFault::Heads { expected: share.max(1) }),
            Some(_) => None,
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str("all heads"),
            Self::Tensor { rank, degree, heads } => write!(f, "rank {rank} of {degree} over {heads} heads"),
        }
    }
}

/// What is wrong with a [`Shard`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ShardFault {
    /// No ranks, no heads, or a rank that is not one of them.
    #[error("there is no such rank")]
    Degree,
    /// Neither of ranks and heads divides the other.
    #[error("heads cannot be shared out evenly")]
    Uneven,
    /// The worker holds another number of heads.
    #[error("each rank holds {expected}")]
    Heads {
        /// Heads it would hold.
        expected: u32,
    },
}
