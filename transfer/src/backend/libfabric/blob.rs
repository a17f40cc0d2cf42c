//! What drivers tell each other: addresses and keys, opaque to everybody else.
//!
//! Both come from a peer and are taken apart here, bounded and checked, before the library sees any of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use baton_libfabric_sys::abi::{FI_ADDR_EFA, FI_ADDR_STR, FI_SOCKADDR, FI_SOCKADDR_IN, FI_SOCKADDR_IN6};

use crate::backend::fabric::driver::{ADDRESS_MAX_BYTES, KEY_MAX_BYTES};

/// Of both formats; a driver of another version is refused.
const VERSION: u8 = 1;
/// Most rails of an address or a key.
pub(super) const RAILS_MAX: usize = 32;
/// Longest address of one endpoint: none of the known ones is longer than that of `shm`.
const ENDPOINT_ADDRESS_MAX_BYTES: usize = 112;
const KEY_HEAD_BYTES: usize = 28;
/// Most keys of one registration: one for each rail and segment.
pub(super) const KEYS_MAX: usize = (KEY_MAX_BYTES - KEY_HEAD_BYTES) / 8;

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Why a peer's bytes are not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum BlobError {
    #[error("cut short or overlong")]
    Length,
    #[error("of version {0}, not {VERSION}")]
    Version(u8),
    #[error("{0} rails, not 1 to {RAILS_MAX}")]
    Rails(usize),
    #[error("an endpoint address of another kind or of impossible content")]
    Endpoint,
    #[error("{0} is not an address of this machine, and only loopback addresses are used here")]
    NotLoopback(IpAddr),
    #[error("impossible sizes")]
    Sizes,
}

/// Takes bytes off the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], BlobError> {
        let (front, rest) = self.0.split_at_checked(len).ok_or(BlobError::Length)?;
        self.0 = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BlobError> {
        self.take(N)?.try_into().map_err(|_| BlobError::Length)
    }

    fn version(&mut self) -> Result<(), BlobError> {
        let [version] = self.array()?;
        if version == VERSION { Ok(()) } else { Err(BlobError::Version(version)) }
    }

    fn rails(&mut self) -> Result<usize, BlobError> {
        let [rails] = self.array()?;
        let rails = usize::from(rails);
        if (1..=RAILS_MAX).contains(&rails) { Ok(rails) } else { Err(BlobError::Rails(rails)) }
    }

    fn u64(&mut self) -> Result<u64, BlobError> {
        self.array().map(u64::from_le_bytes)
    }

    fn end(&self) -> Result<(), BlobError> {
        if self.0.is_empty() { Ok(()) } else { Err(BlobError::Length) }
    }
}

/// Encodes the addresses of all rails.
pub(super) fn encode_address(rails: &[Vec<u8>]) -> Vec<u8> {
    let mut blob = vec![VERSION, rails.len() as u8];
    for rail in rails {
        blob.push(rail.len() as u8);
        blob.extend_from_slice(rail);
    }
    debug_assert!(blob.len() <= ADDRESS_MAX_BYTES, "{} rails are too many", rails.len());
    blob
}

/// What the address of a peer's endpoint has to look like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected<'a> {
    /// As of `fi_info.addr_format`.
    pub(super) format: u32,
    /// Our own address: what else of its kind looks like.
    pub(super) own: &'a [u8],
    /// Whether peers must be on this machine.
    pub(super) loopback: bool,
}

/// Takes a peer's address apart: one checked endpoint address for each of its rails.
pub(super) fn decode_address(blob: &[u8], expected: Expected<'_>) -> Result<Vec<Vec<u8>>, BlobError> {
    if blob.len() > ADDRESS_MAX_BYTES {
        return Err(BlobError::Length);
    }
    let mut reader = Reader(blob);
    reader.version()?;
    let rails = reader.rails()?;
    let mut addresses = Vec::with_capacity(rails);
    for _ in 0..rails {
        let [len] = reader.array()?;
        let address = reader.take(usize::from(len))?;
        check_endpoint(address, expected)?;
        addresses.push(address.to_vec());
    }
    reader.end()?;
    Ok(addresses)
}

/// Whether the library may be given these bytes as an address: it trusts their length and their form.
fn check_endpoint(address: &[u8], expected: Expected<'_>) -> Result<(), BlobError> {
    if address.is_empty() || address.len() > ENDPOINT_ADDRESS_MAX_BYTES {
        return Err(BlobError::Endpoint);
    }
    match expected.format {
        FI_SOCKADDR | FI_SOCKADDR_IN | FI_SOCKADDR_IN6 => {
            if address.len() != expected.own.len() || address[..2] != expected.own[..2] {
                return Err(BlobError::Endpoint);
            }
            let ip = socket_ip(address).ok_or(BlobError::Endpoint)?;
            if ip.is_unspecified() || ip.is_multicast() || address[2..4] == [0, 0] {
                return Err(BlobError::Endpoint);
            }
            if expected.loopback && !ip.is_loopback() {
                return Err(BlobError::NotLoopback(ip));
            }
            Ok(())
        }
        FI_ADDR_STR => {
            let (last, text) = address.split_last().ok_or(BlobError::Endpoint)?;
            let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_:/.-".contains(byte);
            let prefix = b"fi_shm://";
            let named = text.strip_prefix(prefix).is_some_and(|name| !name.contains(&b'/'));
            if *last == 0 && text.iter().all(plain) && named { Ok(()) } else { Err(BlobError::Endpoint) }
        }
        // A GID, a queue pair number, and random bits.
        FI_ADDR_EFA if address.len() == expected.own.len() && address[..16] != [0; 16] => Ok(()),
        FI_ADDR_EFA => Err(BlobError::Endpoint),
        _ if address.len() == expected.own.len() => Ok(()),
        _ => Err(BlobError::Endpoint),
    }
}

/// The IP address in a `sockaddr_in` or `sockaddr_in6`.
pub(super) fn socket_ip(address: &[u8]) -> Option<IpAddr> {
    let family = u16::from_ne_bytes(address.get(..2)?.try_into().ok()?);
    match (family, address.len()) {
        (AF_INET, 16) => {
            let octets: [u8; 4] = address[4..8].try_into().ok()?;
            Some(IpAddr::V4(Ipv4Addr::from(octets)))
        }
        (AF_INET6, 28) => {
            let octets: [u8; 16] = address[8..24].try_into().ok()?;
            Some(IpAddr::V6(Ipv6Addr::from(octets)).to_canonical())
        }
        _ => None,
    }
}

/// The whole of such an address.
pub(super) fn socket_address(address: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(address.get(2..4)?.try_into().ok()?);
    Some(SocketAddr::new(socket_ip(address)?, port))
}

/// A registration, as a peer uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// Bytes of the registration.
    pub(super) len: u64,
    /// What is added to offsets: where it lies in the owner's address space, for providers that want that, or 0.
    pub(super) base: u64,
    /// Bytes of every registered piece but the last: long memory is registered in pieces.
    pub(super) segment: u64,
    /// Whether offsets count from the begin of the whole, not of each piece.
    pub(super) virtual_addresses: bool,
    pub(super) rails: usize,
    /// The keys: all pieces of the first rail, then of the next.
    pub(super) keys: Vec<u64>,
}

impl Key {
    pub(super) fn segments(&self) -> usize {
        segments(self.len, self.segment)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut blob = vec![VERSION, self.rails as u8, u8::from(self.virtual_addresses), 0];
        for number in [self.len, self.base, self.segment].iter().chain(&self.keys) {
            blob.extend_from_slice(&number.to_le_bytes());
        }
        debug_assert!(blob.len() <= KEY_MAX_BYTES, "{} keys are too many", self.keys.len());
        blob
    }

    pub(super) fn decode(blob: &[u8]) -> Result<Self, BlobError> {
        if blob.len() > KEY_MAX_BYTES {
            return Err(BlobError::Length);
        }
        let mut reader = Reader(blob);
        reader.version()?;
        let rails = reader.rails()?;
        let [flags, reserved] = reader.array()?;
        if flags > 1 || reserved != 0 {
            return Err(BlobError::Sizes);
        }
        let (len, base, segment) = (reader.u64()?, reader.u64()?, reader.u64()?);
        if len == 0 || segment == 0 || base.checked_add(len).is_none() {
            return Err(BlobError::Sizes);
        }
        let count = segments(len, segment).checked_mul(rails).filter(|count| *count <= KEYS_MAX);
        let count = count.ok_or(BlobError::Sizes)?;
        let keys = (0..count).map(|_| reader.u64()).collect::<Result<Vec<_>, _>>()?;
        reader.end()?;
        Ok(Self { len, base, segment, virtual_addresses: flags == 1, rails, keys })
    }
}

/// Pieces that `len` bytes are registered in.
pub(super) fn segments(len: u64, segment: u64) -> usize {
    usize::try_from(len.div_ceil(segment)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
