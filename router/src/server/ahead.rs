//! Reads on while hyper does not, to notice a client that leaves.
//!
//! hyper looks for the end of a connection whose request it answers only while it has nothing unread of it. A client that
//! has sent another request already, or a single byte too many, could leave unnoticed, and its answer would be generated
//! to the end for nobody.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use hyper::rt::{Read, ReadBuf, ReadBufCursor};

/// Bytes that are read ahead; who sends more of its next requests is noticed to leave later.
const AHEAD_MAX_BYTES: usize = 8 << 10;
/// Bytes read at a time.
const STEP_BYTES: usize = 1 << 10;

/// What was read and not asked for yet.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    bytes: BytesMut,
    /// hyper has asked for bytes and waits for them: it sees the end by itself.
    asked: bool,
    /// hyper has had a turn since it read last: it is not within a body, of which it reads more, and better, by itself.
    passed: bool,
    ended: bool,
}

impl Ahead {
    /// Reads for hyper: first what was read ahead.
    pub(super) fn poll_read<S: Read + Unpin>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        self.passed = false;
        if !self.bytes.is_empty() {
            self.asked = false;
            let taken = self.bytes.len().min(buf.remaining());
            buf.put_slice(&self.bytes[..taken]);
            self.bytes.advance(taken);
            return Poll::Ready(Ok(()));
        }
        if self.ended {
            self.asked = true;
            return Poll::Ready(Ok(()));
        }
        let polled = Pin::new(io).poll_read(cx, buf);
        self.asked = polled.is_pending();
        polled
    }

    /// Whether hyper waits for bytes: then there is nothing to look for.
    pub(super) fn is_asked(&self) -> bool {
        self.asked
    }

    /// Reads on where hyper does not; in its second turn without a read.
    ///
    /// # Errors
    /// When the client has left and hyper does not ask for what it has sent.
    pub(super) fn poll_look<S: Read + Unpin>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.asked && !std::mem::replace(&mut self.passed, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        while !self.asked && self.bytes.len() < AHEAD_MAX_BYTES {
            if self.ended {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            let mut space = [0; STEP_BYTES];
            let mut read = ReadBuf::new(&mut space);
            ready!(Pin::new(&mut *io).poll_read(cx, read.unfilled()))?;
            self.ended = read.filled().is_empty();
            self.bytes.extend_from_slice(read.filled());
            if self.ended {
                // hyper has one more turn: if it is within a body it has to see that this is broken off.
                cx.waker().wake_by_ref();
                break;
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// What a socket gives, one after the other; then nothing.
    struct Socket(Vec<&'static [u8]>);

    impl Read for Socket {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            mut buf: ReadBufCursor<'_>,
        ) -> Poll<io::Result<()>> {
            if self.0.is_empty() {
                return Poll::Pending;
            }
            let next = self.0.remove(0);
            buf.put_slice(next);
            Poll::Ready(Ok(()))
        }
    }

    /// What hyper gets; `None` while it waits.
    fn read(ahead: &mut Ahead, socket: &mut Socket) -> Option<Vec<u8>> {
        let mut space = [0; 4];
        let mut read = ReadBuf::new(&mut space);
        let mut cx = Context::from_waker(Waker::noop());
        let polled = ahead.poll_read(socket, &mut cx, read.unfilled());
        polled.is_ready().then(|| read.filled().to_vec())
    }

    /// A turn in which hyper does not read, after one that is let pass.
    fn look(ahead: &mut Ahead, socket: &mut Socket) -> Poll<io::Result<()>> {
        let mut cx = Context::from_waker(Waker::noop());
        if !ahead.passed {
            let unread = socket.0.len();
            assert!(ahead.poll_look(socket, &mut cx).is_pending());
            assert_eq!(socket.0.len(), unread);
        }
        ahead.poll_look(socket, &mut cx)
    }

    #[test]
    fn what_was_read_ahead_comes_first_and_in_order() {
        let (mut ahead, mut socket) = (Ahead::default(), Socket(vec![b"one", b"twothree", b"4"]));
        assert_eq!(read(&mut ahead, &mut socket).unwrap(), b"one");
        assert!(look(&mut ahead, &mut socket).is_pending());
        let mut all = Vec::new();
        while let Some(bytes) = read(&mut ahead, &mut socket) {
            all.extend(bytes);
        }
        assert_eq!(all, b"twothree4");
        // It waits by itself now.
        socket.0.push(b"more");
        assert!(look(&mut ahead, &mut socket).is_pending());
        assert_eq!(socket.0.len(), 1);
    }

    #[test]
    fn the_end_is_for_hyper_to_see_if_it_asks_and_an_error_if_not() {
        let (mut ahead, mut socket) = (Ahead::default(), Socket(vec![b"one", b""]));
        assert_eq!(read(&mut ahead, &mut socket).unwrap(), b"one");
        assert!(look(&mut ahead, &mut socket).is_pending(), "one more turn");
        assert_eq!(read(&mut ahead, &mut socket).unwrap(), b"", "within a body");
        assert!(look(&mut ahead, &mut socket).is_pending());

        let (mut ahead, mut socket) = (Ahead::default(), Socket(vec![b"one", b"next", b""]));
        assert_eq!(read(&mut ahead, &mut socket).unwrap(), b"one");
        assert!(look(&mut ahead, &mut socket).is_pending());
        let ended = look(&mut ahead, &mut socket);
        assert!(matches!(ended, Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted));
    }

    #[test]
    fn no_more_is_read_ahead_than_a_little() {
        let (mut ahead, mut socket) = (Ahead::default(), Socket(vec![&[b'x'; STEP_BYTES]; 1000]));
        assert!(look(&mut ahead, &mut socket).is_pending());
        assert_eq!(1000 - socket.0.len(), AHEAD_MAX_BYTES / STEP_BYTES);
    }
}
