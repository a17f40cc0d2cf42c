//! Number formats of a KV cache.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::choice::Choice;

/// The number format of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// IEEE single precision, 4 bytes.
    F32,
    /// bfloat16, 2 bytes: the upper half of an `F32`.
    Bf16,
    /// IEEE half precision, 2 bytes.
    F16,
    /// 8 bits: sign, 4 of exponent, 3 of mantissa; no infinity, largest 448. Times a scale: see [`Scales`].
    #[serde(rename = "fp8_e4m3")]
    Fp8E4m3,
}

impl Dtype {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::Fp8E4m3 => 1,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What one scale of an fp8 block covers. A number is its 8 bits times its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scales {
    /// There are none: the 8 bits are the number. The only choice for the other formats.
    #[default]
    None,
    /// The keys, or the values, of one layer of the block.
    Block,
    /// The keys, or the values, of one head of one layer of the block.
    Head,
}

impl fmt::Display for Scales {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
