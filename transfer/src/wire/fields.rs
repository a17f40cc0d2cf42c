//! Fields of payloads, written and taken off untrusted bytes.

use super::WireError;

pub(super) fn put_text(bytes: &mut Vec<u8>, text: &str) {
    debug_assert!(text.len() <= usize::from(u8::MAX), "texts on the wire are short");
    bytes.push(text.len() as u8);
    bytes.extend_from_slice(text.as_bytes());
}

/// Takes fields off the front of untrusted bytes.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(*field)
    }

    pub(super) fn text(&mut self) -> Result<&'a str, WireError> {
        let [len] = self.take()?;
        let text = self.bytes(usize::from(len))?;
        std::str::from_utf8(text).map_err(|_| WireError::Field)
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(WireError::Short)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn rest_len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.take().map(u64::from_le_bytes)
    }

    pub(super) fn u128(&mut self) -> Result<u128, WireError> {
        self.take().map(u128::from_le_bytes)
    }

    pub(super) fn end<T>(self, value: T) -> Result<T, WireError> {
        if self.0.is_empty() { Ok(value) } else { Err(WireError::Long) }
    }
}
