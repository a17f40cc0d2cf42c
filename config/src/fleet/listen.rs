//! Addresses and URLs of the fleet document.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::reader::{Section, Text};

/// Where a part listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listen {
    /// The address; for a pool, that of its first replica, the next ones take the following ports. Port 0 is any
    /// free one.
    pub address: SocketAddr,
    /// Whether the file names it; `baton up` replaces unnamed ports by free ones (except the router's).
    pub named: bool,
}

/// How an address is written.
pub(super) const ADDRESS_EXPECTED: &str = "an address and a port, like 127.0.0.1:8080";
/// How a URL is written.
pub(super) const URL_EXPECTED: &str = "a URL without user and password, like http://127.0.0.1:8001";

impl Listen {
    /// Reads `listen:` of a section.
    pub(super) fn read(section: &mut Section<'_, '_>, default: &str) -> Self {
        let fallback = default.parse().unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0));
        if !section.has("listen") {
            section.take("listen");
            section.reader.record(section.child("listen"), fallback, None);
            return Self { address: fallback, named: false };
        }
        let expected = format!("{ADDRESS_EXPECTED} (the default is {fallback})");
        let address = section.optional("listen", &expected, address);
        Self { address: address.unwrap_or(fallback), named: true }
    }
}

/// An address with a port.
pub(super) fn address(text: &Text) -> Option<SocketAddr> {
    let numeric = match text.text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.text.clone(),
    };
    numeric.parse().ok()
}

/// A plain `http` or `https` URL without credentials.
pub(super) fn url(text: &Text) -> Option<String> {
    let text = text.words()?;
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"))?;
    let host = rest.split(['/', '?', '#']).next()?;
    let good = !host.is_empty() && !host.contains('@') && !text.contains(char::is_whitespace);
    good.then(|| text.trim_end_matches('/').to_owned())
}
