//! Control frames off and onto a stream, never holding more than one frame and what came with it.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use baton_config::Epoch;
use bytes::{Bytes, BytesMut};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::Instant;

use crate::auth::Mac;
use crate::error::LinkError;
use crate::wire::{HEADER_BYTES, Header, Kind, MAC_BYTES, WireError};

/// Room for a typical request, so that it takes one system call.
const BUFFER_BYTES: usize = 4096;
/// Most bytes before the payload of a frame.
pub(crate) const HEAD_MAX_BYTES: usize = HEADER_BYTES + MAC_BYTES;

/// Takes frames off a stream.
pub(crate) struct FrameReader {
    buffer: BytesMut,
    mac: Option<Mac>,
}

impl FrameReader {
    pub(crate) fn new() -> Self {
        Self { buffer: BytesMut::with_capacity(BUFFER_BYTES), mac: None }
    }

    /// From the next frame on, each must be signed.
    pub(crate) fn expect_signed(&mut self, mac: Mac) {
        self.mac = Some(mac);
    }

    /// What checks the frames, for who goes on reading them in another way.
    pub(crate) fn into_mac(self) -> Option<Mac> {
        self.mac
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

    /// As [`FrameReader::next`], looking again and again for a while and never waiting; `None` when no frame is whole by
    /// then, or none will be.
    pub(crate) fn next_soon(
        &mut self,
        socket: BorrowedFd<'_>,
        spin: Duration,
    ) -> Result<Option<(Header, Bytes)>, LinkError> {
        let start = Instant::now();
        loop {
            if let Some(frame) = self.take().map_err(LinkError::Protocol)? {
                return Ok(Some(frame));
            }
            let mut bytes = [0; BUFFER_BYTES];
            match rustix::net::recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
                // Its end is met again by who waits for a frame.
                Ok((0, _)) => return Ok(None),
                Ok((len, _)) => self.buffer.extend_from_slice(&bytes[..len]),
                Err(Errno::AGAIN | Errno::INTR) if start.elapsed() < spin => std::hint::spin_loop(),
                Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
                Err(errno) => return Err(LinkError::io("receiving a frame")(errno.into())),
            }
        }
    }

    fn take(&mut self) -> Result<Option<(Header, Bytes)>, WireError> {
        let head_len = head_len(self.mac.as_ref());
        let Some(bytes) = self.buffer.first_chunk::<HEADER_BYTES>().copied() else {
            self.buffer.reserve(BUFFER_BYTES);
            return Ok(None);
        };
        // Bounds the length by the kind of frame before room is made for it.
        let header = Header::decode(&bytes)?;
        if header.kind == Kind::Data {
            return Err(WireError::Kind);
        }
        let len = header.len as usize;
        if self.buffer.len() < head_len + len {
            self.buffer.reserve(head_len + len - self.buffer.len());
            return Ok(None);
        }
        let head = self.buffer.split_to(head_len);
        let payload = self.buffer.split_to(len).freeze();
        check(&header, &head, &payload, self.mac.as_mut())?;
        Ok(Some((header, payload)))
    }
}

impl FrameReader {
    /// The head of a `Data` frame, which must come next, checked. Its bytes follow: first those of
    /// [`FrameReader::take_rest`], then those still in the stream.
    pub(crate) async fn next_data(
        &mut self,
        stream: &mut (impl AsyncRead + Unpin),
    ) -> Result<Header, LinkError> {
        let head_len = head_len(self.mac.as_ref());
        while self.buffer.len() < head_len {
            self.buffer.reserve(BUFFER_BYTES);
            if stream.read_buf(&mut self.buffer).await.map_err(LinkError::io("receiving a frame"))? == 0 {
                return Err(LinkError::Closed);
            }
        }
        let head = self.buffer.split_to(head_len);
        let bytes = head.first_chunk().ok_or(LinkError::Closed)?;
        let header = Header::decode(bytes).map_err(LinkError::Protocol)?;
        if header.kind != Kind::Data {
            return Err(LinkError::Protocol(WireError::Kind));
        }
        check(&header, &head, &[], self.mac.as_mut()).map_err(LinkError::Protocol)?;
        Ok(header)
    }

    /// Takes bytes that came behind the last frame, at most `max`.
    pub(crate) fn take_rest(&mut self, max: usize) -> Bytes {
        let len = max.min(self.buffer.len());
        self.buffer.split_to(len).freeze()
    }
}

/// Bytes before the payload of each frame.
pub(crate) fn head_len(mac: Option<&Mac>) -> usize {
    HEADER_BYTES + if mac.is_some() { MAC_BYTES } else { 0 }
}

/// Checks that a frame arrived as it was sent, by its code where the two sides share a token.
pub(crate) fn check(
    header: &Header,
    head: &[u8],
    payload: &[u8],
    mac: Option<&mut Mac>,
) -> Result<(), WireError> {
    let (bytes, code) = head.split_first_chunk::<HEADER_BYTES>().ok_or(WireError::Short)?;
    header.verify(bytes, payload)?;
    let Some(mac) = mac else { return Ok(()) };
    let code = code.first_chunk::<MAC_BYTES>().ok_or(WireError::Short)?;
    if mac.check(bytes, payload, code) { Ok(()) } else { Err(WireError::Forged) }
}

/// Makes frames of one connection, signed where the two sides share a token. They must be sent in the order made.
#[derive(Default)]
pub(crate) struct FrameWriter {
    mac: Option<Mac>,
}

/// What comes before the payload of a frame.
pub(crate) struct Head {
    bytes: [u8; HEAD_MAX_BYTES],
    len: usize,
}

impl std::ops::Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl FrameWriter {
    /// From the next frame on, each is signed.
    pub(crate) fn sign(&mut self, mac: Mac) {
        self.mac = Some(mac);
    }

    /// The start of a frame; `payload` is what its check and its code cover (nothing for `Data`).
    pub(crate) fn head(&mut self, header: &Header, payload: &[u8]) -> Head {
        let len = head_len(self.mac.as_ref());
        let mut bytes = [0; HEAD_MAX_BYTES];
        let head = header.encode(payload);
        bytes[..HEADER_BYTES].copy_from_slice(&head);
        if let Some(mac) = &mut self.mac {
            bytes[HEADER_BYTES..].copy_from_slice(&mac.sign(&head, payload));
        }
        Head { bytes, len }
    }

    /// A whole frame.
    pub(crate) fn frame(&mut self, kind: Kind, epoch: Epoch, seq: u64, payload: &[u8]) -> Vec<u8> {
        debug_assert!(payload.len() as u64 <= kind.max_len(), "{kind:?} frames are bounded");
        let head = self.head(&Header { kind, code: 0, len: payload.len() as u32, epoch, seq }, payload);
        let mut bytes = Vec::with_capacity(head.len() + payload.len());
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(payload);
        bytes
    }
}
