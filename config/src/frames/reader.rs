//! Cuts a byte stream into frames.

use super::{FrameError, HEADER_BYTES, OPEN, PAYLOAD_MAX_BYTES, number};

/// Room for what one read brings.
const READ_BYTES: usize = 32 << 10;
/// A buffer that a long frame made larger than this is given back.
const KEPT_BYTES: usize = 256 << 10;

/// Bytes received and not yet read.
///
/// Grows with what has arrived, never with what a head announces.
#[derive(Debug)]
pub struct Reader {
    buffer: Vec<u8>,
    /// Everything before is done with.
    read: usize,
    /// Everything from here on is room.
    filled: usize,
    open_max: usize,
}

impl Reader {
    /// A reader that takes `open` frames of at most `open_max` bytes; a router's takes none.
    pub fn new(open_max: usize) -> Self {
        Self { buffer: Vec::new(), read: 0, filled: 0, open_max }
    }

    /// Room for the next bytes; say with [`Self::filled`] how many came.
    pub fn room(&mut self) -> &mut [u8] {
        if self.read == self.filled {
            (self.read, self.filled) = (0, 0);
            if self.buffer.len() > KEPT_BYTES {
                self.buffer = Vec::new();
            }
        }
        if self.buffer.len() - self.filled < READ_BYTES / 2 {
            self.buffer.copy_within(self.read..self.filled, 0);
            self.filled -= self.read;
            self.read = 0;
        }
        if self.buffer.len() - self.filled < READ_BYTES / 2 {
            let more = READ_BYTES.max(self.filled);
            self.buffer.resize(self.filled + more, 0);
        }
        &mut self.buffer[self.filled..]
    }

    /// Takes in what was put at the beginning of the room.
    pub fn filled(&mut self, bytes: usize) {
        self.filled = (self.filled + bytes).min(self.buffer.len());
    }

    /// Takes in bytes.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.room();
            let fits = room.len().min(bytes.len());
            room[..fits].copy_from_slice(&bytes[..fits]);
            self.filled(fits);
            bytes = &bytes[fits..];
        }
    }

    /// Kind and payload of the next frame that is complete.
    ///
    /// # Errors
    /// [`FrameError::TooLong`], as soon as its head is there.
    pub fn next_frame(&mut self) -> Result<Option<(u8, &[u8])>, FrameError> {
        let there = &self.buffer[self.read..self.filled];
        let Some((head, rest)) = there.split_at_checked(HEADER_BYTES) else { return Ok(None) };
        let (bytes, kind) = (number(head, 0) as usize, head[4]);
        let max = if kind == OPEN { self.open_max } else { PAYLOAD_MAX_BYTES };
        if bytes > max {
            return Err(FrameError::TooLong { bytes, max });
        }
        if rest.len() < bytes {
            return Ok(None);
        }
        let start = self.read + HEADER_BYTES;
        self.read = start + bytes;
        Ok(Some((kind, &self.buffer[start..start + bytes])))
    }

    /// Bytes of memory that it holds.
    #[cfg(test)]
    pub(super) fn room_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Whether a frame was cut off.
    pub fn is_mid_frame(&self) -> bool {
        self.read < self.filled
    }
}
