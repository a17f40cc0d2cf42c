//! Frames between agents, and the metadata they publish: versioned, bounded, checked.
//!
//! Every frame starts with a [`Header`] of 32 bytes (little endian): magic, version, kind, code, payload length,
//! check, epoch, sequence number. The check covers the header and the payload of every kind but `Data`, whose
//! bytes the digests of the blocks cover. Lengths are checked against the bound of their kind before anything is
//! allocated; nothing here trusts its input.

use std::net::SocketAddr;

use baton_config::names::NAME_MAX_BYTES;
use baton_config::{Epoch, HandoffId, WorkerId};
use twox_hash::XxHash3_64;

use crate::agent::{BackendKind, RegionId};
use crate::error::Refusal;
use crate::session::Descriptor;

/// Version of the frames; other versions are refused by name.
pub const VERSION: u8 = 1;
/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 32;
/// Most blocks of one request: what one vectored system call takes (`IOV_MAX`), less the header.
pub const MAX_READ_BLOCKS: usize = 1023;
/// Most bytes of blocks of one request.
pub const MAX_READ_BYTES: u64 = 1 << 30;
/// Most bytes of published metadata.
pub const MAX_METADATA_BYTES: usize = 512;

const MAGIC: [u8; 4] = *b"BTN\x01";
const METADATA_MAGIC: [u8; 4] = *b"BTNM";
const DESCRIPTOR_BYTES: usize = 16;
const HANDOFF_BYTES: usize = 16;
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
    /// Its answer; over a Unix socket, with the control memory.
    Welcome = 2,
    /// The answer to anything that is not served: a [`Refusal`] in the code, the current epoch in the epoch.
    Refused = 3,
    /// Asks for blocks: [`Read`].
    Read = 4,
    /// The blocks of a [`Read`], one after the other.
    Data = 5,
    /// Asks for the memory of a region (Unix socket only): its number.
    Map = 6,
    /// The memory: its length, and its descriptor beside the frame.
    Mapped = 7,
}

impl Kind {
    fn from_u8(value: u8) -> Option<Self> {
        [Self::Hello, Self::Welcome, Self::Refused, Self::Read, Self::Data, Self::Map, Self::Mapped]
            .into_iter()
            .find(|kind| *kind as u8 == value)
    }

    /// Most bytes of payload.
    pub fn max_len(self) -> u64 {
        match self {
            Self::Hello => HELLO_MAX_BYTES as u64,
            Self::Refused => 0,
            Self::Read => (HANDOFF_BYTES + MAX_READ_BLOCKS * DESCRIPTOR_BYTES) as u64,
            Self::Data => MAX_READ_BYTES,
            Self::Map => 4,
            Self::Welcome | Self::Mapped => 8,
        }
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

/// A refusal in bytes: a lone header. [`None`] in `refusal` means the epoch is not the current one.
pub fn encode_refusal(refusal: Option<Refusal>, current: Option<Epoch>, seq: u64) -> [u8; HEADER_BYTES] {
    let code = refusal.map_or(0, |refusal| {
        // Every refusal is in the table: its position is its code.
        REFUSALS.iter().position(|listed| *listed == refusal).map_or(u16::MAX, |at| at as u16 + 1)
    });
    Header { kind: Kind::Refused, code, len: 0, epoch: current.unwrap_or_default(), seq }.encode(&[])
}

/// What a refusal says.
///
/// # Errors
/// When it is not a refusal by name but another epoch: the one the peer is in, if any.
pub fn decode_refusal(header: &Header) -> Result<Refusal, Option<Epoch>> {
    match header.code {
        0 => Err((header.epoch != Epoch(0)).then_some(header.epoch)),
        code => Ok(REFUSALS.get(usize::from(code) - 1).copied().unwrap_or(Refusal::Unavailable)),
    }
}

const REFUSALS: [Refusal; 8] = [
    Refusal::NotGranted,
    Refusal::OutsideGrant,
    Refusal::OutsideRegion,
    Refusal::TooLarge,
    Refusal::Version,
    Refusal::WrongWorker,
    Refusal::WrongIncarnation,
    Refusal::Unavailable,
];

const HELLO_MAX_BYTES: usize = 2 * (1 + NAME_MAX_BYTES) + 8 + 16;

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
}

impl Hello {
    /// The payload in bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HELLO_MAX_BYTES);
        bytes.extend_from_slice(&self.incarnation.to_le_bytes());
        bytes.extend_from_slice(&self.from_epoch.0.to_le_bytes());
        put_text(&mut bytes, self.from.as_str());
        put_text(&mut bytes, self.to.as_str());
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
        };
        fields.end(hello)
    }
}

/// A request for blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Under which grant.
    pub handoff: HandoffId,
    /// Which blocks, in the order they are sent.
    pub blocks: Vec<Descriptor>,
}

/// The payload of a [`Read`] in bytes.
pub fn encode_read(handoff: HandoffId, blocks: impl ExactSizeIterator<Item = Descriptor>) -> Vec<u8> {
    debug_assert!(blocks.len() <= MAX_READ_BLOCKS, "requests are bounded");
    let mut bytes = Vec::with_capacity(HANDOFF_BYTES + blocks.len() * DESCRIPTOR_BYTES);
    bytes.extend_from_slice(&handoff.0.to_le_bytes());
    for block in blocks {
        let mut descriptor = [0; DESCRIPTOR_BYTES];
        descriptor[..4].copy_from_slice(&block.region.0.to_le_bytes());
        descriptor[4..8].copy_from_slice(&block.len.to_le_bytes());
        descriptor[8..].copy_from_slice(&block.offset.to_le_bytes());
        bytes.extend_from_slice(&descriptor);
    }
    bytes
}

impl Read {
    /// Reads a payload.
    ///
    /// # Errors
    /// When it is cut, too long, asks for nothing, for empty blocks, or for more than [`MAX_READ_BYTES`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() as u64 > Kind::Read.max_len() {
            return Err(WireError::Long);
        }
        let mut fields = Fields(bytes);
        let handoff = HandoffId(u128::from_le_bytes(fields.take()?));
        if fields.0.is_empty() || !fields.0.len().is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(WireError::Short);
        }
        let mut blocks = Vec::with_capacity(fields.0.len() / DESCRIPTOR_BYTES);
        let mut total = 0u64;
        while !fields.0.is_empty() {
            let region = RegionId(u32::from_le_bytes(fields.take()?));
            let len = u32::from_le_bytes(fields.take()?);
            let offset = u64::from_le_bytes(fields.take()?);
            total += u64::from(len);
            if len == 0 || offset.checked_add(u64::from(len)).is_none() {
                return Err(WireError::Field);
            }
            blocks.push(Descriptor { region, offset, len });
        }
        if total > MAX_READ_BYTES {
            return Err(WireError::Long);
        }
        Ok(Self { handoff, blocks })
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

/// What an agent publishes so that peers find it. It holds no keys: whoever reads it learns addresses only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// The process: random, new at each start.
    pub incarnation: u128,
    /// The host: equal for processes under one kernel.
    pub host: u128,
    /// Where its TCP listener is reached.
    pub address: SocketAddr,
    /// What it offers, in its order of preference.
    pub backends: Vec<BackendKind>,
}

impl Metadata {
    /// In bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(96);
        bytes.extend_from_slice(&METADATA_MAGIC);
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.incarnation.to_le_bytes());
        bytes.extend_from_slice(&self.host.to_le_bytes());
        put_text(&mut bytes, &self.address.to_string());
        bytes.push(self.backends.len() as u8);
        bytes.extend(self.backends.iter().map(|backend| backend_code(*backend)));
        bytes
    }

    /// Reads published bytes; backends this build does not know are passed over.
    ///
    /// # Errors
    /// When they are of another version, cut, too long, or carry impossible values.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > MAX_METADATA_BYTES {
            return Err(WireError::Long);
        }
        let mut fields = Fields(bytes);
        if fields.take::<4>()? != METADATA_MAGIC {
            return Err(WireError::Magic);
        }
        match fields.take::<1>()? {
            [VERSION] => {}
            [other] => return Err(WireError::Version(other)),
        }
        let incarnation = u128::from_le_bytes(fields.take()?);
        let host = u128::from_le_bytes(fields.take()?);
        let address = fields.text()?.parse().map_err(|_| WireError::Field)?;
        let [count] = fields.take()?;
        if fields.0.len() != usize::from(count) {
            return Err(WireError::Short);
        }
        let known = |code: &u8| BackendKind::ALL.into_iter().find(|backend| backend_code(*backend) == *code);
        let backends = fields.0.iter().filter_map(known).collect();
        Ok(Self { incarnation, host, address, backends })
    }
}

fn backend_code(backend: BackendKind) -> u8 {
    match backend {
        BackendKind::Shm => 1,
        BackendKind::Tcp => 2,
        BackendKind::Cma => 3,
        BackendKind::Libfabric => 4,
        BackendKind::Ucx => 5,
        BackendKind::Plugin => 6,
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    debug_assert!(text.len() <= usize::from(u8::MAX), "texts on the wire are short");
    bytes.push(text.len() as u8);
    bytes.extend_from_slice(text.as_bytes());
}

/// Takes fields off the front of untrusted bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(*field)
    }

    fn text(&mut self) -> Result<&'a str, WireError> {
        let [len] = self.take()?;
        let (text, rest) = self.0.split_at_checked(usize::from(len)).ok_or(WireError::Short)?;
        self.0 = rest;
        std::str::from_utf8(text).map_err(|_| WireError::Field)
    }

    fn end<T>(self, value: T) -> Result<T, WireError> {
        if self.0.is_empty() { Ok(value) } else { Err(WireError::Long) }
    }
}

#[cfg(test)]
mod tests;
