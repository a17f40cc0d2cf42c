//! Words a document may choose from: one table per enum serves parsing, printing and suggestions.

use crate::geometry::{Dtype, KvLayout, Scales};
use crate::names::{Accelerator, Role};

/// An enum whose variants are words of the document.
pub trait Choice: Copy + PartialEq + 'static {
    /// Every word with its meaning, in the order they are listed to people.
    const ALL: &'static [(&'static str, Self)];

    /// The word of this variant.
    fn word(self) -> &'static str {
        Self::ALL.iter().find(|(_, value)| *value == self).map_or("?", |(word, _)| word)
    }
}

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident => $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $crate::choice::Choice for $name {
            const ALL: &'static [(&'static str, Self)] = &[$(($word, Self::$variant)),+];
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad($crate::choice::Choice::word(*self))
            }
        }
    };
}
pub(crate) use choice;

impl Choice for Role {
    const ALL: &'static [(&'static str, Self)] =
        &[("prefill", Self::Prefill), ("decode", Self::Decode), ("both", Self::Both)];
}

impl Choice for Accelerator {
    const ALL: &'static [(&'static str, Self)] = &[
        ("cpu", Self::Cpu),
        ("cuda", Self::Cuda),
        ("trainium", Self::Trainium),
        ("simulated", Self::Simulated),
    ];
}

impl Choice for KvLayout {
    const ALL: &'static [(&'static str, Self)] = &[
        ("nhd", Self::Nhd),
        ("hnd", Self::Hnd),
        ("b2lnhd", Self::B2lNhd),
        ("b2lhnd", Self::B2lHnd),
        ("l2bnhd", Self::L2bNhd),
        ("l2bhnd", Self::L2bHnd),
        ("lb2nhd", Self::Lb2Nhd),
        ("lb2hnd", Self::Lb2Hnd),
        ("lbnhc", Self::Lbnhc),
        ("lbhnc", Self::Lbhnc),
        ("lhbnc", Self::Lhbnc),
        ("blnhc", Self::Blnhc),
        ("blhnc", Self::Blhnc),
        ("bhlnc", Self::Bhlnc),
    ];
}

impl Choice for Dtype {
    const ALL: &'static [(&'static str, Self)] =
        &[("bf16", Self::Bf16), ("f16", Self::F16), ("f32", Self::F32), ("fp8_e4m3", Self::Fp8E4m3)];
}

impl Choice for Scales {
    const ALL: &'static [(&'static str, Self)] =
        &[("none", Self::None), ("block", Self::Block), ("head", Self::Head)];
}
