//! Sends blocks straight out of memory.

use std::io;
use std::os::fd::AsFd;

use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::error::LinkError;
use crate::memory::{Span, write_gathered};

/// Most bytes handed to the system at once, so that streams take turns.
pub(super) const GATHER_BYTES: usize = 1 << 20;

/// What is still to be sent.
pub(super) struct Gather<'a> {
    pub(super) head: &'a [u8],
    pub(super) spans: &'a [Span<'a>],
    /// Bytes of the first span already sent.
    pub(super) within: usize,
}

impl Gather<'_> {
    /// Sends what the socket takes now.
    pub(super) fn send_some(&mut self, stream: &TcpStream) -> Result<(), LinkError> {
        self.sent(self.write(stream))
    }

    pub(super) async fn send_rest(mut self, stream: &TcpStream) -> Result<(), LinkError> {
        while !self.is_done() {
            let wrote = stream.async_io(Interest::WRITABLE, || self.write(stream)).await;
            self.sent(wrote)?;
        }
        Ok(())
    }

    fn sent(&mut self, wrote: io::Result<usize>) -> Result<(), LinkError> {
        match wrote {
            Ok(0) => return Err(LinkError::Closed),
            Ok(bytes) => self.advance(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(LinkError::io("sending blocks")(error)),
        }
        Ok(())
    }

    fn write(&self, stream: &TcpStream) -> io::Result<usize> {
        let mut room = GATHER_BYTES;
        let spans = self.spans.iter().enumerate().map_while(|(i, span)| {
            let skip = if i == 0 { self.within } else { 0 };
            let len = (span.len - skip).min(room);
            room -= len;
            (len > 0).then_some(Span { memory: span.memory, offset: span.offset + skip, len })
        });
        write_gathered(stream.as_fd(), self.head, spans)
    }

    fn advance(&mut self, mut bytes: usize) {
        let of_head = bytes.min(self.head.len());
        self.head = &self.head[of_head..];
        bytes -= of_head;
        while let Some((first, rest)) = self.spans.split_first() {
            let left = first.len - self.within;
            if bytes < left {
                self.within += bytes;
                return;
            }
            bytes -= left;
            self.within = 0;
            self.spans = rest;
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.head.is_empty() && self.spans.is_empty()
    }
}
