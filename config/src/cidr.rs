//! Ranges of IP addresses, as `10.0.0.0/8`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// A range of IP addresses; a single address is a range of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    base: IpAddr,
    prefix: u8,
}

/// Why a text is no range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    /// Not of that form at all.
    #[error("is not ADDRESS/BITS")]
    Shape,
    /// More bits than an address has.
    #[error("has more bits than an address")]
    Prefix,
    /// The address has bits beyond the prefix: a range was meant, or a single address.
    #[error("has bits beyond its prefix: the range is {range}")]
    HostBits {
        /// The range that holds the address.
        range: Cidr,
    },
}

impl Cidr {
    /// Whether the address is in the range. An IPv4 address written as IPv6 counts as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.base, address.to_canonical()) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                mask(base.to_bits().into(), 32, self.prefix)
                    == mask(address.to_bits().into(), 32, self.prefix)
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                mask(base.to_bits(), 128, self.prefix) == mask(address.to_bits(), 128, self.prefix)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

/// `bits` of a number of `width` bits without what is beyond the prefix.
fn mask(bits: u128, width: u8, prefix: u8) -> u128 {
    bits.checked_shr(u32::from(width - prefix)).unwrap_or(0)
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let base: IpAddr = address.parse().map_err(|_| CidrError::Shape)?;
        let width = if base.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => width,
            Some(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
                text.parse().ok().filter(|prefix| *prefix <= width).ok_or(CidrError::Prefix)?
            }
            Some(_) => return Err(CidrError::Shape),
        };
        let host_bits = u32::from(width - prefix);
        let start = match base {
            IpAddr::V4(ip) => {
                let bits = ip.to_bits().checked_shr(host_bits).unwrap_or(0);
                IpAddr::V4(bits.checked_shl(host_bits).unwrap_or(0).into())
            }
            IpAddr::V6(ip) => {
                let bits = ip.to_bits().checked_shr(host_bits).unwrap_or(0);
                IpAddr::V6(bits.checked_shl(host_bits).unwrap_or(0).into())
            }
        };
        let range = Self { base: start, prefix };
        if start == base { Ok(range) } else { Err(CidrError::HostBits { range }) }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_their_addresses_and_no_others() {
        let holds =
            |range: &str, address: &str| range.parse::<Cidr>().unwrap().contains(address.parse().unwrap());
        for (range, inside, outside) in [
            ("10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
            ("10.1.2.3", "10.1.2.3", "10.1.2.4"),
            ("10.1.2.2/31", "10.1.2.3", "10.1.2.4"),
            ("fd00::/8", "fdff::1", "fe00::1"),
            ("::1", "::1", "::2"),
            ("2001:db8::/127", "2001:db8::1", "2001:db8::2"),
            ("10.0.0.0/8", "::ffff:10.0.0.1", "::ffff:11.0.0.1"),
            ("0.0.0.0/0", "1.2.3.4", "fd00::1"),
            ("::/0", "fd00::1", "1.2.3.4"),
        ] {
            assert!(holds(range, inside), "{inside} is in {range}");
            assert!(!holds(range, outside), "{outside} is not in {range}");
        }
    }

    #[test]
    fn what_is_no_range_is_told() {
        let fault = |text: &str| text.parse::<Cidr>().unwrap_err();
        for text in ["", "10", "10.0.0.0/", "10.0.0.0/+8", "/8", "localhost", "10.0.0.0/8/8", "10.0.0.0 /8"] {
            assert_eq!(fault(text), CidrError::Shape, "{text:?}");
        }
        for text in ["10.0.0.0/33", "::/129", "10.0.0.0/300"] {
            assert_eq!(fault(text), CidrError::Prefix, "{text:?}");
        }
        assert_eq!(fault("10.1.2.3/8").to_string(), "has bits beyond its prefix: the range is 10.0.0.0/8");
        assert_eq!("fd00::/8".parse::<Cidr>().unwrap().to_string(), "fd00::/8");
    }
}
