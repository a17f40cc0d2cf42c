//! Tensor parallelism: from which ranks of a source a worker gets its heads.

use std::ops::Range;

use baton_config::Shard;

/// A rank to read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TpSource {
    /// The rank, counted from 0.
    pub rank: u16,
    /// The heads of the model to take from it.
    pub heads: Range<u32>,
}

/// The ranks among `source_degree` from which a worker that holds `kv_heads` heads as `dest` says gets each of them
/// once, by rising head.
///
/// Where several ranks hold the same head, the ranks of the destination spread over them.
/// Empty when neither of ranks and heads divides the other: there is no such source.
pub fn tp_sources(dest: Shard, kv_heads: u32, source_degree: u16) -> Vec<TpSource> {
    let (heads, ranks) = (dest.model_heads(kv_heads), u32::from(source_degree));
    let wanted = dest.heads(kv_heads);
    let reader = match dest {
        Shard::Whole => 0,
        Shard::Tensor { rank, .. } => u32::from(rank),
    };
    let source = |rank: u32, heads: Range<u32>| {
        u16::try_from(rank).ok().map(|rank| TpSource { rank, heads }).filter(|s| !s.heads.is_empty())
    };
    if ranks == 0 || heads == 0 {
        return Vec::new();
    }
    if heads.is_multiple_of(ranks) {
        let share = heads / ranks;
        let part = |rank: u32| wanted.start.max(rank * share)..wanted.end.min((rank + 1) * share);
        (0..ranks).filter_map(|rank| source(rank, part(rank))).collect()
    } else if ranks.is_multiple_of(heads) {
        let copies = ranks / heads;
        wanted.filter_map(|head| source(head * copies + reader % copies, head..head + 1)).collect()
    } else {
        Vec::new()
    }
}
