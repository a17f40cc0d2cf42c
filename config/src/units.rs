//! Counts with a unit: bytes and tokens.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A count of bytes; written and read as `4096`, `64KiB`, `4MiB`, `2GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// Why a byte count was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a size: write a number with an optional unit, like 512KiB, 4MiB or 2GiB")]
pub struct BytesError {
    text: String,
}

const UNITS: [(&str, u64); 8] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("B", 1),
];

impl FromStr for Bytes {
    type Err = BytesError;
    fn from_str(text: &str) -> Result<Self, BytesError> {
        let refused = || BytesError { text: text.chars().take(40).collect() };
        let trimmed = text.trim();
        let (number, scale) = UNITS
            .iter()
            .find_map(|(unit, scale)| trimmed.strip_suffix(unit).map(|n| (n.trim_end(), *scale)))
            .unwrap_or((trimmed, 1));
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(scale).map(Self).ok_or_else(refused);
        }
        let fraction: f64 = number.parse().map_err(|_| refused())?;
        let bytes = fraction * scale as f64;
        if !bytes.is_finite() || !(0.0..9.0e18).contains(&bytes) || scale == 1 {
            return Err(refused());
        }
        Ok(Self(bytes.round() as u64))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, scale) = match self.0 {
            n if n >= 1 << 40 => ("TiB", 1u64 << 40),
            n if n >= 1 << 30 => ("GiB", 1 << 30),
            n if n >= 1 << 20 => ("MiB", 1 << 20),
            n if n >= 1 << 10 => ("KiB", 1 << 10),
            n => return write!(f, "{n} B"),
        };
        if self.0.is_multiple_of(scale) {
            write!(f, "{} {unit}", self.0 / scale)
        } else {
            write!(f, "{:.2} {unit}", self.0 as f64 / scale as f64)
        }
    }
}

/// Bytes per second; written and read as `8GiB/s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRate(pub u64);

/// Why a rate was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a rate: write a size per second, like 500MB/s or 8GiB/s")]
pub struct ByteRateError {
    text: String,
}

impl FromStr for ByteRate {
    type Err = ByteRateError;
    fn from_str(text: &str) -> Result<Self, ByteRateError> {
        let refused = || ByteRateError { text: text.chars().take(40).collect() };
        let bytes = text.trim().strip_suffix("/s").ok_or_else(refused)?;
        match bytes.parse::<Bytes>() {
            Ok(Bytes(rate)) if rate > 0 => Ok(Self(rate)),
            _ => Err(refused()),
        }
    }
}

impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Bytes(self.0))
    }
}

/// A count of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct Tokens(pub u32);

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_with_units() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64KiB", 65536),
            ("1.5MiB", 1_572_864),
            ("2 GiB", 2 << 30),
            ("3MB", 3_000_000),
        ] {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes), "{text}");
        }
        for bad in
            ["", "x", "-1", "1.5", "MiB", "99999999999999999999", "1e400GiB", "NaNMiB", "20000000000GiB"]
        {
            assert!(bad.parse::<Bytes>().is_err(), "{bad:?} must be refused");
        }
    }

    #[test]
    fn sizes_print_with_units() {
        assert_eq!(Bytes(512).to_string(), "512 B");
        assert_eq!(Bytes(65536).to_string(), "64 KiB");
        assert_eq!(Bytes(1_572_864).to_string(), "1.50 MiB");
    }
}
