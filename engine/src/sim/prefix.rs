//! Hashes of token prefixes, and what follows from them: KV rows and next tokens.

use super::SimConfig;
use crate::arena::Plane;
use crate::executor::ModelInfo;
use crate::mix::{GOLDEN, mix};

/// Stands for all tokens up to a position, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PrefixHash(pub(super) u64);

const NEXT_TOKEN: u64 = 0x6e65_7874;
const END: u64 = 0x656e_6400;

impl PrefixHash {
    /// No tokens yet, of the model that `seed` stands for.
    pub(super) fn empty(seed: u64) -> Self {
        const SALT: u64 = 0x6261_746f_6e00_0000;
        Self(SALT ^ mix(seed))
    }

    pub(super) fn push(self, token: u32) -> Self {
        Self(mix(self.0 ^ (u64::from(token) + 1).wrapping_mul(GOLDEN)))
    }

    /// The KV row of the last token of the prefix: multiples of 1/64 between -2 and 2, seven bits each and therefore
    /// exact in bf16, which has eight.
    pub(super) fn row(self, plane: Plane, head: u32, out: &mut [f32]) {
        let place = u64::from(plane.layer) << 33 | u64::from(plane.kv.index()) << 32 | u64::from(head);
        let mut bits = mix(self.0 ^ mix(place.wrapping_add(GOLDEN)));
        for eight in out.chunks_mut(8) {
            bits = mix(bits.wrapping_add(GOLDEN));
            for (number, byte) in eight.iter_mut().zip(bits.to_le_bytes()) {
                *number = f32::from(byte as i8) / 64.0;
            }
        }
    }

    /// The token that follows the prefix: an end token once in `mean_output_tokens`, else any other.
    pub(super) fn next_token(self, config: &SimConfig, model: &ModelInfo) -> u32 {
        if let (Some(mean), Some(eos)) = (config.mean_output_tokens, model.eos.first())
            && mix(self.0 ^ END).is_multiple_of(u64::from(mean.max(1)))
        {
            return *eos;
        }
        let first = (mix(self.0 ^ NEXT_TOKEN) % u64::from(model.vocab)) as u32;
        let candidates = (first..model.vocab).chain(0..first);
        let mut others = candidates.filter(|token| !model.eos.contains(token));
        others.next().unwrap_or(first)
    }
}
