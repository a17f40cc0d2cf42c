//! What a registration may say. Each fault names the field and what would be right.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use base64::Engine as _;
use baton_config::{Cidr, KvGeometry, PoolName};

use crate::api::{Register, TRANSFER_MAX_BYTES};
use crate::record::{LAST_ERROR_MAX_BYTES, Load};
use crate::server::PoolOptions;

/// Largest value of one dimension of a KV geometry.
const DIMENSION_MAX: u32 = 1 << 16;
/// Longest model id and engine kind.
const LABEL_MAX_BYTES: usize = 256;

/// A field of a request is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {fault}")]
pub(crate) struct Fault {
    pub(crate) field: &'static str,
    pub(crate) fault: String,
}

fn fault<T>(field: &'static str, fault: impl Into<String>) -> Result<T, Fault> {
    Err(Fault { field, fault: fault.into() })
}

/// Checks everything that serde has not.
pub(crate) fn registration(request: &Register, pools: &BTreeMap<PoolName, PoolOptions>) -> Result<(), Fault> {
    let Some(pool) = pools.get(&request.pool) else {
        let known: Vec<&str> = pools.keys().map(PoolName::as_str).collect();
        return fault(
            "pool",
            format!("{} is not in the fleet document (known: {})", request.pool, known.join(", ")),
        );
    };
    if pool.role != request.role {
        return fault("role", format!("{} is not that of pool {}, {}", request.role, pool.name, pool.role));
    }
    if request.incarnation.len() != 32 || !request.incarnation.bytes().all(|b| b.is_ascii_hexdigit()) {
        return fault("incarnation", "must be 32 hexadecimal digits");
    }
    for (field, text) in [("model", &request.model), ("engine", &request.engine)] {
        if text.is_empty() || text.len() > LABEL_MAX_BYTES || text.chars().any(char::is_control) {
            return fault(field, format!("must be 1 to {LABEL_MAX_BYTES} bytes without control characters"));
        }
    }
    address(&request.address)?;
    if request.transfer.len() > TRANSFER_MAX_BYTES {
        let length = request.transfer.len();
        return fault("transfer", format!("has {length} bytes, limit {TRANSFER_MAX_BYTES}"));
    }
    if base64::engine::general_purpose::STANDARD.decode(&request.transfer).is_err() {
        return fault("transfer", "is not base64");
    }
    request.kv.as_ref().map_or(Ok(()), geometry)
}

/// Checks that a worker serves the model of the fleet.
pub(crate) fn model(given: &str, wanted: Option<&str>) -> Result<(), Fault> {
    match wanted {
        Some(wanted) if wanted != given => {
            fault("model", format!("{given} is not that of the fleet, {wanted}"))
        }
        Some(_) | None => Ok(()),
    }
}

/// A worker says that it is where no worker may be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("address {address} {fault}: conductor.allowed_addresses is {ranges}")]
pub(crate) struct NotAllowed {
    address: String,
    fault: &'static str,
    ranges: String,
}

/// Checks that an address lies in one of the ranges, if there are any. A name could lead anywhere, and elsewhere later.
pub(crate) fn allowed(address: &str, ranges: &[Cidr]) -> Result<(), NotAllowed> {
    let ip = address.parse::<SocketAddr>().ok().map(|address| address.ip());
    if ranges.is_empty() || ip.is_some_and(|ip| ranges.iter().any(|range| range.contains(ip))) {
        return Ok(());
    }
    let fault = if ip.is_some() {
        "is outside of what is allowed"
    } else {
        "is a name, and only addresses are allowed"
    };
    let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
    Err(NotAllowed { address: address.to_owned(), fault, ranges: ranges.join(", ") })
}

/// Checks the bounds of a load report.
pub(crate) fn load(load: &Load) -> Result<(), Fault> {
    let length = load.last_error.as_ref().map_or(0, String::len);
    if length > LAST_ERROR_MAX_BYTES {
        return fault("load.last_error", format!("has {length} bytes, limit {LAST_ERROR_MAX_BYTES}"));
    }
    Ok(())
}

fn geometry(kv: &KvGeometry) -> Result<(), Fault> {
    let dimensions = [kv.layers, kv.kv_heads, kv.head_dim, kv.block_tokens];
    if dimensions.iter().any(|d| !(1..=DIMENSION_MAX).contains(d)) {
        return fault("kv", format!("({kv}) must have every dimension in 1 to {DIMENSION_MAX}"));
    }
    kv.check().map_err(|error| Fault { field: "kv", fault: format!("({kv}) cannot be: {error}") })
}

/// `host:port` of the URL of a server that requests are passed on to.
pub(crate) fn authority(server: &str) -> Result<String, Fault> {
    const SHAPE: &str = "must be http://HOST:PORT or https://HOST:PORT that others can connect to";
    let (rest, port) = match server.split_once("://") {
        Some(("http", rest)) => (rest, 80),
        Some(("https", rest)) => (rest, 443),
        _ => return fault("server", SHAPE),
    };
    let named = rest.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
    let authority = if named { rest.to_owned() } else { format!("{rest}:{port}") };
    if is_address(&authority) { Ok(authority) } else { fault("server", SHAPE) }
}

fn address(text: &str) -> Result<(), Fault> {
    if is_address(text) { Ok(()) } else { fault("address", "must be host:port that others can connect to") }
}

fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let port_fits = port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p > 0);
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let ip: Option<IpAddr> = match bare {
        Some(v6) => v6.parse().ok().filter(IpAddr::is_ipv6),
        None => host.parse().ok().filter(IpAddr::is_ipv4),
    };
    let host_fits = match ip {
        Some(ip) => !ip.is_unspecified() && !ip.is_multicast(),
        None => bare.is_none() && is_dns_name(host),
    };
    port_fits && host_fits
}

fn is_dns_name(host: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    // A name of digits and dots alone is a mistyped address.
    host.len() <= 253 && host.split('.').all(label) && !host.bytes().all(|b| b.is_ascii_digit() || b == b'.')
}

#[cfg(test)]
mod tests;
