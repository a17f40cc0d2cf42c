//! The handshake's payloads: who connects, and the nonces and proofs of a shared token.

use baton_config::names::NAME_MAX_BYTES;
use baton_config::{Epoch, WorkerId};

use super::{Fields, WireError, put_text};

/// Bytes of the nonces of both sides.
pub const NONCE_BYTES: usize = 32;
/// Bytes of a `Challenge`: a nonce.
pub const CHALLENGE_BYTES: usize = NONCE_BYTES;
/// Bytes of the proofs of both sides.
pub const PROOF_BYTES: usize = 32;

pub(super) const HELLO_MAX_BYTES: usize = 2 * (1 + NAME_MAX_BYTES) + 8 + 16 + NONCE_BYTES;

/// Who connects, and whom it means to reach; the header's epoch is the life it means to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The worker that connects.
    pub from: WorkerId,
    /// Its life (0 when it has none yet).
    pub from_epoch: Epoch,
    /// The worker it means to reach.
    pub to: WorkerId,
    /// The process it means to reach.
    pub incarnation: u128,
    /// Random, where the worker that connects holds a token and will prove it; else `None`.
    pub nonce: Option<[u8; NONCE_BYTES]>,
}

impl Hello {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HELLO_MAX_BYTES);
        bytes.extend_from_slice(&self.incarnation.to_le_bytes());
        bytes.extend_from_slice(&self.from_epoch.0.to_le_bytes());
        put_text(&mut bytes, self.from.as_str());
        put_text(&mut bytes, self.to.as_str());
        bytes.extend(self.nonce.iter().flatten());
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut, has bytes too many, or a name is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let hello = Self {
            incarnation: u128::from_le_bytes(fields.take()?),
            from_epoch: Epoch(u64::from_le_bytes(fields.take()?)),
            from: fields.text()?.parse().map_err(|_| WireError::Field)?,
            to: fields.text()?.parse().map_err(|_| WireError::Field)?,
            nonce: if fields.is_empty() { None } else { Some(fields.take()?) },
        };
        fields.end(hello)
    }
}
