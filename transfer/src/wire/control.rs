//! Payloads of the control connection: how fabrics meet, share keys and windows, and how users notify each other.
//!
//! Beside them, the requests that announce blocks to be written.

use baton_config::HandoffId;

use super::metadata::{backend_code, backend_of};
use super::read::{put_descriptor, take_blocks, take_descriptor};
use super::{
    ADDRESS_MAX_BYTES, DESCRIPTOR_BYTES, Fields, HANDOFF_BYTES, KEY_MAX_BYTES, MAX_NOTIFICATION_BYTES,
    MAX_READ_BLOCKS, MAX_WIRE_TEXT_BYTES, READ_MAX_BYTES, Read, WireError, encode_read, put_text,
};
use crate::agent::{BackendKind, RegionId};
use crate::session::Descriptor;

pub(super) const ATTACH_MAX_BYTES: usize = 1 + 1 + MAX_WIRE_TEXT_BYTES + ADDRESS_MAX_BYTES;
pub(super) const KEY_REQUEST_BYTES: usize = 1 + 4;
pub(super) const KEY_IS_MAX_BYTES: usize = 8 + 8 + KEY_MAX_BYTES;
pub(super) const ATTACHED_MAX_BYTES: usize = 16 + ADDRESS_MAX_BYTES;
/// Of a [`Pack`] of no blocks.
pub(super) const PACK_MIN_BYTES: usize = 1 + 8 + HANDOFF_BYTES;
pub(super) const PACK_MAX_BYTES: usize = 1 + 8 + READ_MAX_BYTES;
/// Most windows of one answer.
pub const MAX_WINDOWS: usize = 16;
pub(super) const WINDOW_MAX_BYTES: usize = 1 + READ_MAX_BYTES;
pub(super) const WINDOW_IS_MAX_BYTES: usize =
    4 + MAX_WINDOWS * (8 + DESCRIPTOR_BYTES + 8 + 4 + KEY_MAX_BYTES);
pub(super) const NOTIFY_MAX_BYTES: usize = HANDOFF_BYTES + MAX_NOTIFICATION_BYTES;
const DIGEST_BYTES: usize = 8;
/// Most memories that one writer lends at once.
pub const MAX_LENT: u8 = 8;
pub(super) const LEND_BYTES: usize = 2 + 8 + 8 + 8 + 16;
pub(super) const WRITE_MAX_BYTES: usize = 1 + 4 + MAX_READ_BLOCKS * 8 + ANNOUNCE_MAX_BYTES;
const ANNOUNCE_MAX_BYTES: usize =
    HANDOFF_BYTES + 4 + 2 + MAX_WINDOWS * 8 + MAX_READ_BLOCKS * (DESCRIPTOR_BYTES + DIGEST_BYTES);

/// Makes the endpoint of a fabric known to the peer, which answers with its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attach {
    /// Which fabric.
    pub backend: BackendKind,
    /// What both ends must have in common.
    pub wire: String,
    /// The address of the endpoint that asks, opaque.
    pub address: Vec<u8>,
}

impl Attach {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert!(self.wire.len() <= MAX_WIRE_TEXT_BYTES && self.address.len() <= ADDRESS_MAX_BYTES);
        let mut bytes = Vec::with_capacity(2 + self.wire.len() + self.address.len());
        bytes.push(backend_code(self.backend));
        put_text(&mut bytes, &self.wire);
        bytes.extend_from_slice(&self.address);
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut, too long, or names no backend.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let backend = backend(&mut fields)?;
        let wire = fields.text()?;
        if wire.len() > MAX_WIRE_TEXT_BYTES || fields.rest_len() > ADDRESS_MAX_BYTES {
            return Err(WireError::Long);
        }
        let wire = wire.to_owned();
        Ok(Self { backend, wire, address: fields.rest().to_vec() })
    }
}

/// The answer to an [`Attach`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// What names the peer in requests over the fabric, random; 0: there are none.
    pub ticket: u128,
    /// Where the fabric's operations reach the owner, opaque.
    pub address: Vec<u8>,
}

impl Attached {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert!(self.address.len() <= ADDRESS_MAX_BYTES, "addresses are bounded");
        let mut bytes = self.ticket.to_le_bytes().to_vec();
        bytes.extend_from_slice(&self.address);
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut or too long.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let ticket = fields.u128()?;
        if fields.rest_len() > ADDRESS_MAX_BYTES {
            return Err(WireError::Long);
        }
        Ok(Self { ticket, address: fields.rest().to_vec() })
    }
}

/// Asks for the key by which a fabric reads a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Which fabric.
    pub backend: BackendKind,
    /// Which region.
    pub region: RegionId,
}

impl Key {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![backend_code(self.backend)];
        bytes.extend_from_slice(&self.region.0.to_le_bytes());
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut, too long, or names no backend.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let key = Self { backend: backend(&mut fields)?, region: RegionId(fields.u32()?) };
        fields.end(key)
    }
}

/// The key of a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyIs {
    /// Bytes of the region.
    pub len: u64,
    /// Where the region starts in the registration.
    pub base: u64,
    /// The key, opaque.
    pub key: Vec<u8>,
}

impl KeyIs {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        opaque(self.len, self.base, &self.key)
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut, too long, or its numbers overflow.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (len, base, key) = take_opaque(bytes)?;
        base.checked_add(len).ok_or(WireError::Field)?;
        Ok(Self { len, base, key })
    }
}

/// Asks that blocks are gathered and sent as one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pack {
    /// Over which fabric.
    pub backend: BackendKind,
    /// Where the message is awaited: random, used once.
    pub tag: u64,
    /// Which blocks.
    pub read: Read,
}

impl Pack {
    /// A payload in bytes.
    pub fn encode(
        backend: BackendKind,
        tag: u64,
        handoff: HandoffId,
        blocks: impl ExactSizeIterator<Item = Descriptor>,
    ) -> Vec<u8> {
        let mut bytes = vec![backend_code(backend)];
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend(encode_read(handoff, blocks));
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut, too long, names no backend, or its blocks make no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let (backend, tag) = (backend(&mut fields)?, fields.u64()?);
        Ok(Self { backend, tag, read: Read::decode(fields.rest())? })
    }
}

/// Asks for windows through which blocks are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Over which fabric.
    pub backend: BackendKind,
    /// Under which grant, and the bytes to be written.
    pub write: Read,
}

impl Window {
    /// The payload in bytes.
    pub fn encode(
        backend: BackendKind,
        handoff: HandoffId,
        blocks: impl ExactSizeIterator<Item = Descriptor>,
    ) -> Vec<u8> {
        let mut bytes = vec![backend_code(backend)];
        bytes.extend(encode_read(handoff, blocks));
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut, too long, names no backend, or its blocks make no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let backend = backend(&mut fields)?;
        Ok(Self { backend, write: Read::decode(fields.rest())? })
    }
}

/// A window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenWindow {
    /// Its number, new for each.
    pub window: u64,
    /// What can be written through it.
    pub range: Descriptor,
    /// Where the range starts in the registration.
    pub base: u64,
    /// The key of the registration, opaque.
    pub key: Vec<u8>,
}

/// Windows for the first blocks of a [`Window`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowIs {
    /// How many blocks, from the first on, lie in the windows.
    pub blocks: u32,
    /// At most [`MAX_WINDOWS`].
    pub windows: Vec<OpenWindow>,
}

impl WindowIs {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert!(self.windows.len() <= MAX_WINDOWS, "answers are bounded");
        let mut bytes = self.blocks.to_le_bytes().to_vec();
        for OpenWindow { window, range, base, key } in &self.windows {
            debug_assert!(key.len() <= KEY_MAX_BYTES, "keys are bounded");
            bytes.extend_from_slice(&window.to_le_bytes());
            put_descriptor(&mut bytes, *range);
            bytes.extend_from_slice(&base.to_le_bytes());
            bytes.extend_from_slice(&(key.len() as u32).to_le_bytes());
            bytes.extend_from_slice(key);
        }
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut or too long, has no window, or too many.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let blocks = fields.u32()?;
        let mut windows = Vec::new();
        while !fields.is_empty() {
            if windows.len() == MAX_WINDOWS {
                return Err(WireError::Long);
            }
            let (window, range, base) = (fields.u64()?, take_descriptor(&mut fields)?, fields.u64()?);
            let len = fields.u32()? as usize;
            if len > KEY_MAX_BYTES {
                return Err(WireError::Long);
            }
            let key = fields.bytes(len)?.to_vec();
            base.checked_add(u64::from(range.len)).ok_or(WireError::Field)?;
            windows.push(OpenWindow { window, range, base, key });
        }
        if blocks == 0 || windows.is_empty() {
            return Err(WireError::Field);
        }
        Ok(Self { blocks, windows })
    }
}

/// The handoff of a `Fence` in bytes.
pub fn encode_fence(handoff: HandoffId) -> [u8; HANDOFF_BYTES] {
    handoff.0.to_le_bytes()
}

/// The handoff of a `Fence`.
///
/// # Errors
/// When it is cut or too long.
pub fn decode_fence(bytes: &[u8]) -> Result<HandoffId, WireError> {
    let mut fields = Fields(bytes);
    let handoff = HandoffId(fields.u128()?);
    fields.end(handoff)
}

/// A message for the peer's user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notify {
    /// What it is about.
    pub handoff: HandoffId,
    /// What it says, at most [`MAX_NOTIFICATION_BYTES`].
    pub payload: Vec<u8>,
}

impl Notify {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert!(self.payload.len() <= MAX_NOTIFICATION_BYTES, "notifications are bounded");
        let mut bytes = Vec::with_capacity(HANDOFF_BYTES + self.payload.len());
        bytes.extend_from_slice(&self.handoff.0.to_le_bytes());
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut or too long.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > NOTIFY_MAX_BYTES {
            return Err(WireError::Long);
        }
        let mut fields = Fields(bytes);
        Ok(Self { handoff: HandoffId(fields.u128()?), payload: fields.rest().to_vec() })
    }
}

/// Announces blocks to be written, whose bytes follow, or are taken from memory that was lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Under which grant.
    pub handoff: HandoffId,
    /// Position in the whole write of the first block; digests are bound to positions.
    pub first: u32,
    /// Where the blocks go.
    pub blocks: Vec<Descriptor>,
    /// The digest of each block, where they are to be verified; else empty.
    pub digests: Vec<u64>,
    /// The windows they were written through, which are closed now; at most [`MAX_WINDOWS`], none for a stream.
    pub windows: Vec<u64>,
}

impl Write {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert!(self.blocks.len() <= MAX_READ_BLOCKS, "requests are bounded");
        debug_assert!(self.digests.is_empty() || self.digests.len() == self.blocks.len());
        debug_assert!(self.windows.len() <= MAX_WINDOWS, "windows are bounded");
        let mut bytes = Vec::with_capacity(ANNOUNCE_MAX_BYTES.min(32 + self.blocks.len() * 24));
        bytes.extend_from_slice(&self.handoff.0.to_le_bytes());
        bytes.extend_from_slice(&self.first.to_le_bytes());
        bytes.push(u8::from(!self.digests.is_empty()));
        bytes.push(self.windows.len() as u8);
        bytes.extend(self.windows.iter().flat_map(|window| window.to_le_bytes()));
        for block in &self.blocks {
            put_descriptor(&mut bytes, *block);
        }
        bytes.extend(self.digests.iter().flat_map(|digest| digest.to_le_bytes()));
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut, too long, writes nothing, empty blocks, or more than one request may.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > ANNOUNCE_MAX_BYTES {
            return Err(WireError::Long);
        }
        let mut fields = Fields(bytes);
        let handoff = HandoffId(fields.u128()?);
        let first = fields.u32()?;
        let (verify, each) = match fields.take()? {
            [0] => (false, DESCRIPTOR_BYTES),
            [1] => (true, DESCRIPTOR_BYTES + DIGEST_BYTES),
            _ => return Err(WireError::Field),
        };
        let [windows] = fields.take()?;
        if usize::from(windows) > MAX_WINDOWS {
            return Err(WireError::Long);
        }
        let windows = (0..windows).map(|_| fields.u64()).collect::<Result<_, _>>()?;
        if fields.is_empty() || !fields.rest_len().is_multiple_of(each) {
            return Err(WireError::Short);
        }
        let count = fields.rest_len() / each;
        if count > MAX_READ_BLOCKS {
            return Err(WireError::Long);
        }
        first.checked_add(count as u32).ok_or(WireError::Field)?;
        let blocks = take_blocks(&mut fields, count)?;
        let digests = (0..if verify { count } else { 0 }).map(|_| fields.u64()).collect::<Result<_, _>>()?;
        fields.end(Self { handoff, first, blocks, digests, windows })
    }
}

/// Lends memory to the owner of granted ranges, who copies from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lend {
    /// Below [`MAX_LENT`]; what had the number before is given back.
    pub number: u8,
    /// Whether its file follows.
    pub has_file: bool,
    /// Where it is in the process of who lends it.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Where in that process to find `witness`, by which the process is told from any other.
    pub witness_at: u64,
    /// Random.
    pub witness: u128,
}

impl Lend {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.number, u8::from(self.has_file)];
        for word in [self.address, self.len, self.witness_at] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&self.witness.to_le_bytes());
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut or too long, or its numbers make no sense.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let [number, has_file] = fields.take()?;
        let (address, len, witness_at) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let witness = fields.u128()?;
        if number >= MAX_LENT || has_file > 1 || len == 0 || address.checked_add(len).is_none() {
            return Err(WireError::Field);
        }
        fields.end(Self { number, has_file: has_file == 1, address, len, witness_at, witness })
    }
}

/// Asks the owner of granted ranges to copy blocks there out of memory that was lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Take {
    /// The number of the memory.
    pub number: u8,
    /// Where each block begins in it.
    pub from: Vec<u64>,
    /// The blocks.
    pub write: Write,
}

impl Take {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        debug_assert_eq!(self.from.len(), self.write.blocks.len());
        let mut bytes = vec![self.number];
        bytes.extend_from_slice(&(self.from.len() as u32).to_le_bytes());
        bytes.extend(self.from.iter().flat_map(|from| from.to_le_bytes()));
        bytes.extend(self.write.encode());
        bytes
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// As [`Write::decode`], or when there are not as many places as blocks.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(bytes);
        let [number] = fields.take()?;
        let count = fields.u32()? as usize;
        let from = (0..count).map(|_| fields.u64()).collect::<Result<Vec<_>, _>>()?;
        let write = Write::decode(fields.rest())?;
        match number < MAX_LENT && write.blocks.len() == count {
            true => Ok(Self { number, from, write }),
            false => Err(WireError::Field),
        }
    }
}

fn backend(fields: &mut Fields<'_>) -> Result<BackendKind, WireError> {
    let [code] = fields.take()?;
    backend_of(code).ok_or(WireError::Field)
}

fn opaque(first: u64, second: u64, key: &[u8]) -> Vec<u8> {
    debug_assert!(key.len() <= KEY_MAX_BYTES, "keys are bounded");
    let mut bytes = Vec::with_capacity(16 + key.len());
    bytes.extend_from_slice(&first.to_le_bytes());
    bytes.extend_from_slice(&second.to_le_bytes());
    bytes.extend_from_slice(key);
    bytes
}

fn take_opaque(bytes: &[u8]) -> Result<(u64, u64, Vec<u8>), WireError> {
    let mut fields = Fields(bytes);
    let (first, second) = (fields.u64()?, fields.u64()?);
    if fields.rest_len() > KEY_MAX_BYTES {
        return Err(WireError::Long);
    }
    Ok((first, second, fields.rest().to_vec()))
}
