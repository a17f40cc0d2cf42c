//! What agents publish.

use std::net::SocketAddr;

use super::{Fields, MAX_METADATA_BYTES, MAX_WIRE_TEXT_BYTES, VERSION, WireError, put_text};
use crate::agent::BackendKind;

const MAGIC: [u8; 4] = *b"BTNM";

/// A backend that an agent offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Which.
    pub backend: BackendKind,
    /// What both ends must have in common, such as the provider of a fabric; empty where there is nothing.
    pub wire: String,
}

impl Offer {
    /// A backend that needs nothing in common.
    pub fn of(backend: BackendKind) -> Self {
        Self { backend, wire: String::new() }
    }
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
    pub offers: Vec<Offer>,
}

impl Metadata {
    /// In bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(96);
        bytes.extend_from_slice(&MAGIC);
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.incarnation.to_le_bytes());
        bytes.extend_from_slice(&self.host.to_le_bytes());
        put_text(&mut bytes, &self.address.to_string());
        bytes.push(self.offers.len() as u8);
        for offer in &self.offers {
            debug_assert!(offer.wire.len() <= MAX_WIRE_TEXT_BYTES, "texts of fabrics are short");
            bytes.push(backend_code(offer.backend));
            put_text(&mut bytes, &offer.wire);
        }
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
        if fields.take::<4>()? != MAGIC {
            return Err(WireError::Magic);
        }
        match fields.take::<1>()? {
            [VERSION] => {}
            [other] => return Err(WireError::Version(other)),
        }
        let incarnation = fields.u128()?;
        let host = fields.u128()?;
        let address = fields.text()?.parse().map_err(|_| WireError::Field)?;
        let [count] = fields.take()?;
        let mut offers = Vec::new();
        for _ in 0..count {
            let [code] = fields.take()?;
            let wire = fields.text()?;
            if wire.len() > MAX_WIRE_TEXT_BYTES {
                return Err(WireError::Long);
            }
            if let Some(backend) = backend_of(code) {
                offers.push(Offer { backend, wire: wire.to_owned() });
            }
        }
        fields.end(Self { incarnation, host, address, offers })
    }

    /// The offer of a backend.
    pub fn offer(&self, backend: BackendKind) -> Option<&Offer> {
        self.offers.iter().find(|offer| offer.backend == backend)
    }
}

pub(super) fn backend_of(code: u8) -> Option<BackendKind> {
    BackendKind::ALL.into_iter().find(|backend| backend_code(*backend) == code)
}

pub(super) fn backend_code(backend: BackendKind) -> u8 {
    match backend {
        BackendKind::Shm => 1,
        BackendKind::Tcp => 2,
        BackendKind::Cma => 3,
        BackendKind::Libfabric => 4,
        BackendKind::Ucx => 5,
        BackendKind::Plugin => 6,
    }
}
