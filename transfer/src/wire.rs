//! Frames between agents, and the metadata they publish: versioned, bounded, checked.
//!
//! Every frame starts with a [`Header`] of 32 bytes (little endian): magic, version, kind, code, payload length,
//! check, epoch, sequence number. The check covers the header and the payload of every kind but `Data`, whose
//! bytes the digests of the blocks cover. Lengths are checked against the bound of their kind before anything is
//! allocated; nothing here trusts its input.

pub mod ask;
pub mod control;
mod fields;
mod hello;
mod metadata;
mod read;
#[cfg(test)]
pub(crate) mod tests;

use baton_config::Epoch;
use twox_hash::XxHash3_64;

pub use self::hello::{CHALLENGE_BYTES, Hello, NONCE_BYTES, PROOF_BYTES};
pub use self::metadata::{Metadata, Offer};
pub use self::read::{Read, encode_read};

use self::fields::{Fields, put_text};
use crate::agent::RegionId;
use crate::error::Refusal;

/// Version of the frames and of the metadata; other versions are refused by name.
pub const VERSION: u8 = 3;
/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 32;
/// Most blocks of one request: what one vectored system call takes (`IOV_MAX`), less the header.
pub const MAX_READ_BLOCKS: usize = 1023;
/// Most bytes of blocks of one request.
pub const MAX_READ_BYTES: u64 = 1 << 30;
/// Most bytes of published metadata.
pub const MAX_METADATA_BYTES: usize = 1024;
/// Most bytes of the text that two ends of a fabric must have in common.
pub const MAX_WIRE_TEXT_BYTES: usize = 64;
/// Most bytes of a notification's payload.
pub const MAX_NOTIFICATION_BYTES: usize = 4096;
/// Bytes of the code that follows the header of every frame between agents that share a token.
pub const MAC_BYTES: usize = 16;

pub(crate) use crate::backend::fabric::driver::{ADDRESS_MAX_BYTES, KEY_MAX_BYTES};

const MAGIC: [u8; 4] = *b"BTN\x01";
const DESCRIPTOR_BYTES: usize = 16;
const HANDOFF_BYTES: usize = 16;
/// Of a [`Read`], which other requests carry too.
const READ_MAX_BYTES: usize = HANDOFF_BYTES + MAX_READ_BLOCKS * DESCRIPTOR_BYTES;
const CHECK_AT: std::ops::Range<usize> = 12..16;

/// Why bytes are not what the protocol allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Fewer bytes than announced or needed.
    #[error("cut short")]
    Short,
    /// More bytes than the kind of frame may have.
    #[error("longer than its kind allows")]
    Long,
    /// Not this protocol at all.
    #[error("not a transfer frame")]
    Magic,
    /// Another version of it.
    #[error("protocol version {0}, this is {VERSION}")]
    Version(u8),
    /// A kind of frame that does not exist or does not belong here.
    #[error("a frame of an unexpected kind")]
    Kind,
    /// The check does not match: bytes changed on the way.
    #[error("a frame failed its check")]
    Check,
    /// The code made with the shared token is not there or not right: forged, replayed, or another token.
    #[error("a frame without the code of the shared token")]
    Forged,
    /// A field has a value it cannot have.
    #[error("a field has an impossible value")]
    Field,
}

/// Kinds of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First frame of a connection, from who connects: [`Hello`].
    Hello = 1,
    /// Its answer; over a Unix socket, with the control memory; where a token is shared, with the server's proof.
    Welcome = 2,
    /// The answer to anything that is not served: a [`Refusal`] in the code, the current epoch in the epoch.
    Refused = 3,
    /// Asks for blocks: [`Read`].
    Read = 4,
    /// The blocks of a [`Read`] or of a [`control::Write`], one after the other.
    Data = 5,
    /// Asks for the memory of a region (Unix socket only): its number.
    Map = 6,
    /// The memory: its length, and its descriptor beside the frame.
    Mapped = 7,
    /// Asks who connects to prove that it holds the token: the server's nonce.
    Challenge = 8,
    /// That proof.
    Proof = 9,
    /// Makes a fabric's endpoint known to its peer: [`control::Attach`].
    Attach = 10,
    /// The peer's endpoint: [`control::Attached`].
    Attached = 11,
    /// Asks for the key of a region: [`control::Key`].
    Key = 12,
    /// The key: [`control::KeyIs`].
    KeyIs = 13,
    /// Asks that blocks are gathered into one message: [`control::Pack`].
    Pack = 14,
    /// The message was handed over.
    Packed = 15,
    /// Asks whether a grant still covers blocks: [`Read`].
    Confirm = 16,
    /// It does.
    Confirmed = 17,
    /// Asks for windows to write through: [`control::Window`].
    Window = 18,
    /// The windows: [`control::WindowIs`].
    WindowIs = 19,
    /// From the owner of windows: nothing may be written through those of a handoff any more: its id. From who writes:
    /// nothing will be written through a window any more: its number in the place of the id.
    Fence = 20,
    /// Nothing will be.
    Fenced = 21,
    /// A message for the peer's user: [`control::Notify`].
    Notify = 22,
    /// It was queued.
    Notified = 23,
    /// Announces blocks, which follow as `Data` or, on a control connection, were written through windows:
    /// [`control::Write`]. Over a Unix socket they are copied from memory that was lent: [`control::Take`].
    Write = 24,
    /// They are in place and verified.
    Written = 25,
    /// Lends memory of who writes, to be copied from (Unix socket only): [`control::Lend`]. A file comes after the answer.
    Lend = 26,
    /// The answer to what says no more than that it was done (Unix socket only).
    Lent = 27,
    /// Asks where a region is (Unix socket only): its number, or 0 for the control memory.
    Locate = 28,
    /// Where it is: its address in the owner and its length. Also the answer to [`Kind::Map`] of what cannot be mapped.
    Located = 29,
}

impl Kind {
    const ALL: [Self; 29] = [
        Self::Hello,
        Self::Welcome,
        Self::Refused,
        Self::Read,
        Self::Data,
        Self::Map,
        Self::Mapped,
        Self::Challenge,
        Self::Proof,
        Self::Attach,
        Self::Attached,
        Self::Key,
        Self::KeyIs,
        Self::Pack,
        Self::Packed,
        Self::Confirm,
        Self::Confirmed,
        Self::Window,
        Self::WindowIs,
        Self::Fence,
        Self::Fenced,
        Self::Notify,
        Self::Notified,
        Self::Write,
        Self::Written,
        Self::Lend,
        Self::Lent,
        Self::Locate,
        Self::Located,
    ];

    fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == value)
    }

    /// Most bytes of payload.
    pub fn max_len(self) -> u64 {
        let bytes = match self {
            Self::Hello => hello::HELLO_MAX_BYTES,
            Self::Welcome => PROOF_BYTES,
            Self::Challenge => CHALLENGE_BYTES,
            Self::Proof => PROOF_BYTES,
            Self::Refused
            | Self::Packed
            | Self::Confirmed
            | Self::Fenced
            | Self::Notified
            | Self::Lent
            | Self::Written => 0,
            Self::Lend => control::LEND_BYTES,
            Self::Read | Self::Confirm => READ_MAX_BYTES,
            Self::Data => return MAX_READ_BYTES,
            Self::Map | Self::Locate => 4,
            Self::Mapped => 8,
            Self::Located => 16,
            Self::Attach => control::ATTACH_MAX_BYTES,
            Self::Attached => control::ATTACHED_MAX_BYTES,
            Self::Key => control::KEY_REQUEST_BYTES,
            Self::KeyIs => control::KEY_IS_MAX_BYTES,
            Self::Pack => control::PACK_MAX_BYTES,
            Self::Window => control::WINDOW_MAX_BYTES,
            Self::WindowIs => control::WINDOW_IS_MAX_BYTES,
            Self::Fence => HANDOFF_BYTES,
            Self::Notify => control::NOTIFY_MAX_BYTES,
            Self::Write => control::WRITE_MAX_BYTES,
        };
        bytes as u64
    }

    /// Whether a frame of this kind answers one, and so belongs to a request of the side that receives it.
    pub fn is_answer(self) -> bool {
        matches!(
            self,
            Self::Welcome
                | Self::Refused
                | Self::Data
                | Self::Mapped
                | Self::Located
                | Self::Lent
                | Self::Challenge
                | Self::Attached
                | Self::KeyIs
                | Self::Packed
                | Self::Confirmed
                | Self::WindowIs
                | Self::Fenced
                | Self::Notified
                | Self::Written
        )
    }
}

/// The fixed start of every frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Of a refusal: which; else 0.
    pub code: u16,
    /// Bytes of payload.
    pub len: u32,
    /// The life of the serving worker the frame belongs to (0: none).
    pub epoch: Epoch,
    /// Numbers requests of a connection; an answer repeats its request's.
    pub seq: u64,
}

impl Header {
    fn raw(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = self.kind as u8;
        bytes[6..8].copy_from_slice(&self.code.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.seq.to_le_bytes());
        bytes
    }

    /// The header in bytes; `payload` is what its check covers (nothing for `Data`).
    pub fn encode(&self, payload: &[u8]) -> [u8; HEADER_BYTES] {
        let mut bytes = self.raw();
        let check = check(&bytes, payload);
        bytes[CHECK_AT].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// Reads a header; the payload is still to be read and checked with [`Header::verify`].
    ///
    /// # Errors
    /// When it is not a header of this version or announces more than its kind may carry.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        if bytes[..4] != MAGIC {
            return Err(WireError::Magic);
        }
        if bytes[4] != VERSION {
            return Err(WireError::Version(bytes[4]));
        }
        let mut fields = Fields(&bytes[6..]);
        let header = Self {
            kind: Kind::from_u8(bytes[5]).ok_or(WireError::Kind)?,
            code: u16::from_le_bytes(fields.take()?),
            len: u32::from_le_bytes(fields.take()?),
            epoch: {
                fields.take::<4>()?;
                Epoch(u64::from_le_bytes(fields.take()?))
            },
            seq: u64::from_le_bytes(fields.take()?),
        };
        if u64::from(header.len) > header.kind.max_len() {
            return Err(WireError::Long);
        }
        Ok(header)
    }

    /// Checks that header and payload arrived as they were sent (`payload` is empty for `Data`).
    ///
    /// # Errors
    /// When they did not.
    pub fn verify(&self, bytes: &[u8; HEADER_BYTES], payload: &[u8]) -> Result<(), WireError> {
        if bytes[CHECK_AT] == check(&self.raw(), payload).to_le_bytes() {
            return Ok(());
        }
        Err(WireError::Check)
    }
}

fn check(header: &[u8; HEADER_BYTES], payload: &[u8]) -> u32 {
    let head = XxHash3_64::oneshot(header);
    let all = if payload.is_empty() { head } else { XxHash3_64::oneshot_with_seed(head, payload) };
    all as u32
}

/// A whole control frame in bytes.
pub fn encode_frame(kind: Kind, epoch: Epoch, seq: u64, payload: &[u8]) -> Vec<u8> {
    debug_assert!(payload.len() as u64 <= kind.max_len(), "{kind:?} frames are bounded");
    let header = Header { kind, code: 0, len: payload.len() as u32, epoch, seq };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&header.encode(payload));
    bytes.extend_from_slice(payload);
    bytes
}

/// A refusal, which is a lone header. [`None`] in `refusal` means the epoch is not the current one.
pub fn refusal_header(refusal: Option<Refusal>, current: Option<Epoch>, seq: u64) -> Header {
    let code = refusal.map_or(0, |refusal| {
        // Every refusal is in the table: its position is its code.
        Refusal::ALL.iter().position(|listed| *listed == refusal).map_or(u16::MAX, |at| at as u16 + 1)
    });
    Header { kind: Kind::Refused, code, len: 0, epoch: current.unwrap_or_default(), seq }
}

/// What a refusal says.
///
/// # Errors
/// When it is not a refusal by name but another epoch: the one the peer is in, if any.
pub fn decode_refusal(header: &Header) -> Result<Refusal, Option<Epoch>> {
    match header.code {
        0 => Err((header.epoch != Epoch(0)).then_some(header.epoch)),
        code => Ok(Refusal::ALL.get(usize::from(code) - 1).copied().unwrap_or(Refusal::Unavailable)),
    }
}

/// The length that `Welcome` and `Mapped` carry over a Unix socket.
///
/// # Errors
/// When it is cut or has bytes too many.
pub fn decode_len(bytes: &[u8]) -> Result<u64, WireError> {
    let mut fields = Fields(bytes);
    let len = u64::from_le_bytes(fields.take()?);
    fields.end(len)
}

/// The region that `Map` asks for.
///
/// # Errors
/// When it is cut or has bytes too many.
pub fn decode_map(bytes: &[u8]) -> Result<RegionId, WireError> {
    let mut fields = Fields(bytes);
    let region = RegionId(u32::from_le_bytes(fields.take()?));
    fields.end(region)
}
