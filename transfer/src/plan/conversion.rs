//! What happens to the numbers on the way.

use baton_config::{Dtype, KvGeometry, Scales};

/// How numbers change on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Conversion {
    /// Not at all, and there are no scales.
    Copy,
    /// Into a format without scales, times the scale of the source if it has one.
    Convert,
    /// fp8 bits stay, each scale of the destination is the one the source has for the same numbers.
    Carry,
    /// Into fp8 with scales worked out anew.
    Requantize,
}

impl Conversion {
    /// What carries `heads` heads of `source` to `dest`.
    pub(super) fn between(source: &KvGeometry, dest: &KvGeometry, heads: u32) -> Self {
        if dest.scales == Scales::None {
            let same = source.dtype == dest.dtype && source.scales == Scales::None;
            return if same { Self::Copy } else { Self::Convert };
        }
        // Every number under one scale of the destination must be under one scale of the source.
        let in_one_block = source.block_tokens.is_multiple_of(dest.block_tokens);
        let in_one_scale = dest.scales == Scales::Head || source.scales == Scales::Block || heads == 1;
        match source.scales {
            Scales::None if source.dtype == Dtype::Fp8E4m3 => Self::Carry,
            Scales::Block | Scales::Head if in_one_block && in_one_scale => Self::Carry,
            _ => Self::Requantize,
        }
    }

    /// Whether whole blocks of equal size and order are the same bytes.
    pub(super) fn is_move(self, source: &KvGeometry, dest: &KvGeometry) -> bool {
        match self {
            Self::Copy => true,
            Self::Carry => source.scale_count() == dest.scale_count(),
            Self::Convert | Self::Requantize => false,
        }
    }
}
