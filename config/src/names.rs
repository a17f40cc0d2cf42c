//! Names and identities: workers, pools, epochs, handoffs, roles.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest accepted worker or pool name, in bytes (a DNS label, so that Kubernetes names fit).
pub const NAME_MAX_BYTES: usize = 63;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "name {name:?} must be 1 to {NAME_MAX_BYTES} characters of a-z, 0-9 and '-', starting and ending with a letter or digit"
)]
pub struct NameError {
    /// The refused text, cut to a printable length.
    pub name: String,
}

fn parse_name(text: &str) -> Result<String, NameError> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = text.as_bytes();
    let fits = bytes.len() <= NAME_MAX_BYTES && edge(bytes.first()) && edge(bytes.last());
    if fits && bytes.iter().all(|b| inner(*b)) {
        return Ok(text.to_owned());
    }
    Err(NameError { name: text.chars().take(80).collect() })
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                parse_name(text).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                parse_name(&text).map(Self)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// The name of a worker, unique in a fleet at any moment; lives on over restarts, unlike its [`Epoch`].
    WorkerId
}
name_type! {
    /// The name of a pool of the fleet document.
    PoolName
}

/// The life of a worker: a number that only grows, given at each registration.
///
/// Peers refuse messages, descriptors and tickets of any epoch but the one they know to be live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One handoff of a request's KV cache from a prefill to a decode worker: 128 random bits, shown as 32 hex digits.
///
/// It doubles as the capability to read the blocks granted under it, so it is never logged at info level.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HandoffId(pub u128);

impl fmt::Display for HandoffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for HandoffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HandoffId({:08x}..)", self.0 >> 96)
    }
}

/// A handoff id is not 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a handoff id is 32 hexadecimal digits")]
pub struct HandoffIdError;

impl FromStr for HandoffId {
    type Err = HandoffIdError;
    fn from_str(text: &str) -> Result<Self, HandoffIdError> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(HandoffIdError);
        }
        u128::from_str_radix(text, 16).map(Self).map_err(|_| HandoffIdError)
    }
}

impl TryFrom<String> for HandoffId {
    type Error = HandoffIdError;
    fn try_from(text: String) -> Result<Self, HandoffIdError> {
        text.parse()
    }
}

impl From<HandoffId> for String {
    fn from(id: HandoffId) -> String {
        id.to_string()
    }
}

/// What a pool's workers do for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Computes the KV cache of prompts and hands it on.
    Prefill,
    /// Receives KV caches and generates; can prefill by itself where that is cheaper.
    Decode,
    /// Both on one worker; never needs a handoff.
    Both,
}

impl Role {
    /// Whether a worker of this role streams tokens to clients.
    pub fn decodes(self) -> bool {
        matches!(self, Self::Decode | Self::Both)
    }

    /// Whether a worker of this role computes prompts for others.
    pub fn prefills(self) -> bool {
        matches!(self, Self::Prefill | Self::Both)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Both => "both",
        })
    }
}

/// What holds the KV cache of a pool's workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// Host memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An AWS Trainium device.
    Trainium,
    /// An emulated device: a memory of its own that only explicit copies reach.
    Simulated,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Trainium => "trainium",
            Self::Simulated => "simulated",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_dns_labels() {
        for good in ["a", "gpu-decode-0", "0"] {
            assert_eq!(good.parse::<WorkerId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a b", "a/b", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<WorkerId>().is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn handoff_ids_round_trip_and_refuse_junk() {
        let id = HandoffId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);
        assert_eq!(id.to_string().parse::<HandoffId>().unwrap(), id);
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"0123456789abcdef0011223344556677\"");
        for bad in ["", "12", "+1234567890123456789012345678901", "g0000000000000000000000000000000"] {
            assert!(bad.parse::<HandoffId>().is_err(), "{bad:?} must be refused");
        }
    }
}
