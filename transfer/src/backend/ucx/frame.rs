//! What peers hand each other of UCX's addresses and keys, framed: UCX takes both on trust and would crash on garbage.
//!
//! ```text
//! magic u32 │ version u8 │ kind u8 │ 0 u16 │ length u32 │ xxh3-64 of what precedes and follows │ payload
//! ```
//! The checksum finds damage and mix-ups. It is no signature: that the peer is who it should be is the business of the
//! connection the frame came by, and what a liar could seal is the business of [`super::address`].

use super::DriverError;

const MAGIC: u32 = u32::from_le_bytes(*b"BUCX");
const VERSION: u8 = 1;
const HEAD: usize = 12;
const OVERHEAD: usize = HEAD + 8;

/// What a frame is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Address = 1,
    Key = 2,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Key => "key",
        }
    }
}

fn checksum(head: &[u8], payload: &[u8]) -> u64 {
    let mut hasher = twox_hash::XxHash3_64::with_seed(0);
    std::hash::Hasher::write(&mut hasher, head);
    std::hash::Hasher::write(&mut hasher, payload);
    std::hash::Hasher::finish(&hasher)
}

/// Frames a payload.
pub(super) fn seal(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(OVERHEAD + payload.len());
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&[VERSION, kind as u8, 0, 0]);
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&checksum(&out, payload).to_le_bytes());
    out.extend_from_slice(payload);
    out
}

/// The payload of a peer's frame.
pub(super) fn open(kind: Kind, bytes: &[u8], most: usize) -> Result<&[u8], DriverError> {
    let bad = |why: &str| DriverError {
        what: format!("the peer's UCX {} is not one: {why}", kind.name()),
        remedy: String::new(),
    };
    if bytes.len() > most {
        return Err(bad("it is too long"));
    }
    let (Some((head, rest)), true) = (bytes.split_at_checked(HEAD), bytes.len() >= OVERHEAD) else {
        return Err(bad("it is too short"));
    };
    let (sum, payload) = rest.split_at(8);
    if head[..4] != MAGIC.to_le_bytes() {
        return Err(bad("it does not begin like one"));
    }
    if head[4] != VERSION || head[6..8] != [0, 0] {
        return Err(bad("it is of another version"));
    }
    if head[5] != kind as u8 {
        return Err(bad("it is something else"));
    }
    if head[8..] != (payload.len() as u32).to_le_bytes() {
        return Err(bad("its length is wrong"));
    }
    if sum != checksum(head, payload).to_le_bytes() {
        return Err(bad("it was damaged"));
    }
    Ok(payload)
}

/// Takes integers off the front of a payload.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.take::<2>().map(u16::from_le_bytes)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(u8::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take::<4>().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take::<8>().map(u64::from_le_bytes)
    }

    pub(super) fn u128(&mut self) -> Option<u128> {
        self.take::<16>().map(u128::from_le_bytes)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }
}
