//! Reads control frames off a stream, never holding more than one frame and what came with it.

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::LinkError;
use crate::wire::{HEADER_BYTES, Header, Kind, WireError};

/// Room for a typical request, so that it takes one system call.
const BUFFER_BYTES: usize = 4096;

pub(crate) struct FrameReader {
    buffer: BytesMut,
}

impl FrameReader {
    pub(crate) fn new() -> Self {
        Self { buffer: BytesMut::with_capacity(BUFFER_BYTES) }
    }

    /// The next frame, checked; `None` when the peer closed between two frames.
    ///
    /// Dropping the future loses nothing: bytes read so far stay in the buffer.
    pub(crate) async fn next(
        &mut self,
        stream: &mut (impl AsyncRead + Unpin),
    ) -> Result<Option<(Header, Bytes)>, LinkError> {
        loop {
            if let Some(frame) = self.take().map_err(LinkError::Protocol)? {
                return Ok(Some(frame));
            }
            if stream.read_buf(&mut self.buffer).await.map_err(LinkError::io("receiving a frame"))? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(LinkError::Closed) };
            }
        }
    }

    fn take(&mut self) -> Result<Option<(Header, Bytes)>, WireError> {
        let Some(head) = self.buffer.first_chunk::<HEADER_BYTES>().copied() else {
            self.buffer.reserve(BUFFER_BYTES);
            return Ok(None);
        };
        // Bounds the length by the kind of frame before room is made for it.
        let header = Header::decode(&head)?;
        if header.kind == Kind::Data {
            return Err(WireError::Kind);
        }
        let len = header.len as usize;
        if self.buffer.len() < HEADER_BYTES + len {
            self.buffer.reserve(HEADER_BYTES + len - self.buffer.len());
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        let payload = self.buffer.split_to(len).freeze();
        header.verify(&head, &payload)?;
        Ok(Some((header, payload)))
    }
}
