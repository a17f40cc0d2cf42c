//! What two ends of a fabric say to each other over the fabric itself: requests for blocks or for a confirmation, and
//! the head of what answers them.
//!
//! Nothing here is signed. A request carries the ticket that its sender was given over the authenticated control
//! connection, an answer the number that was made up for it; both are random and used by one sender, for one request.

use baton_config::{Epoch, HandoffId};

use super::control::Pack;
use super::{Fields, HEADER_BYTES, Header, Kind, WireError};
use crate::agent::BackendKind;
use crate::session::Descriptor;

/// Most bytes of a request; what asks for more blocks goes over the control connection.
pub const ASK_MAX_BYTES: usize = 4096;
/// Bytes of what names its sender.
pub const TICKET_BYTES: usize = 16;
/// Most blocks of a request.
pub const ASK_MAX_BLOCKS: usize =
    (ASK_MAX_BYTES - TICKET_BYTES - HEADER_BYTES - super::control::PACK_MIN_BYTES) / super::DESCRIPTOR_BYTES;

/// A request over a fabric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Whose it is.
    pub ticket: u128,
    /// [`Kind::Pack`] or [`Kind::Confirm`].
    pub kind: Kind,
    /// The life of the owner that is meant.
    pub epoch: Epoch,
    /// Which blocks, and the tag under which the answer is awaited.
    pub pack: Pack,
}

impl Ask {
    /// The request in bytes; at most [`ASK_MAX_BLOCKS`] blocks.
    pub fn encode(
        (ticket, kind, epoch): (u128, Kind, Epoch),
        (backend, tag): (BackendKind, u64),
        handoff: HandoffId,
        blocks: impl ExactSizeIterator<Item = Descriptor>,
    ) -> Vec<u8> {
        debug_assert!(blocks.len() <= ASK_MAX_BLOCKS, "requests are bounded");
        let payload = Pack::encode(backend, tag, handoff, blocks);
        let header = Header { kind, code: 0, len: payload.len() as u32, epoch, seq: tag };
        let mut bytes = Vec::with_capacity(TICKET_BYTES + HEADER_BYTES + payload.len());
        bytes.extend_from_slice(&ticket.to_le_bytes());
        bytes.extend_from_slice(&header.encode(&payload));
        bytes.extend_from_slice(&payload);
        bytes
    }

    /// Reads a request.
    ///
    /// # Errors
    /// When it is cut, too long, damaged, of another kind, or asks for blocks that make no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > ASK_MAX_BYTES {
            return Err(WireError::Long);
        }
        let mut fields = Fields(bytes);
        let (ticket, head) = (fields.u128()?, fields.take::<HEADER_BYTES>()?);
        let header = Header::decode(&head)?;
        if !matches!(header.kind, Kind::Pack | Kind::Confirm) || header.code != 0 {
            return Err(WireError::Kind);
        }
        let payload = fields.bytes(header.len as usize)?;
        header.verify(&head, payload)?;
        let pack = Pack::decode(payload)?;
        if pack.tag != header.seq {
            return Err(WireError::Field);
        }
        fields.end(Self { ticket, kind: header.kind, epoch: header.epoch, pack })
    }
}

/// The head of an answer: of so many bytes of blocks, of none that confirms, or a refusal.
pub fn answer_head(kind: Kind, len: u32, epoch: Epoch, tag: u64) -> [u8; HEADER_BYTES] {
    Header { kind, code: 0, len, epoch, seq: tag }.encode(&[])
}

/// The head of what came under `tag`.
///
/// # Errors
/// When it is no head, damaged, or of another answer.
pub fn decode_answer_head(head: &[u8; HEADER_BYTES], tag: u64) -> Result<Header, WireError> {
    let header = Header::decode(head)?;
    header.verify(head, &[])?;
    if header.seq == tag { Ok(header) } else { Err(WireError::Field) }
}
