//! A socket that knows where its connection is between requests, and gives hyper's own refusals a body.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use hyper::body::Body;
use hyper::rt::ReadBufCursor;
use tokio::time::Instant;

use super::ahead::Ahead;
use crate::account::Entry;
use crate::metrics::Metrics;
use crate::options::Timeouts;
use crate::reply;
use crate::routes::Route;

/// Where a connection is between requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing was heard yet.
    Fresh(Instant),
    /// No byte of the next request yet.
    Idle(Instant),
    /// The head of a request is arriving.
    Head(Instant),
    /// So many requests are being served, of which the first began then.
    Busy(u32, Instant),
}

/// The phase, shared between the socket, the service and the watch.
#[derive(Debug)]
pub(super) struct Phases(Mutex<Phase>);

impl Phases {
    /// Of a connection that was just accepted.
    pub(super) fn fresh() -> Self {
        Self(Mutex::new(Phase::Fresh(Instant::now())))
    }

    pub(super) fn get(&self) -> Phase {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When a connection that serves no request is to be cut unless something happens.
    pub(super) fn deadline_between(&self, timeouts: &Timeouts) -> Option<Instant> {
        match self.get() {
            Phase::Idle(since) => Some(since + timeouts.idle),
            Phase::Fresh(since) | Phase::Head(since) => Some(since + timeouts.header),
            Phase::Busy(..) => None,
        }
    }

    /// When a connection with one request at a time is to be cut. A request ends by itself in its time, unless its client
    /// does not read: then nothing asks for the rest of the answer, and nothing would ever notice.
    pub(super) fn deadline(&self, timeouts: &Timeouts) -> Option<Instant> {
        match self.get() {
            Phase::Busy(_, since) => Some(since + longest(timeouts)),
            _ => self.deadline_between(timeouts),
        }
    }

    /// Notes that bytes came.
    fn heard(&self) {
        let mut phase = self.lock();
        match *phase {
            Phase::Idle(_) => *phase = Phase::Head(Instant::now()),
            Phase::Fresh(since) => *phase = Phase::Head(since),
            Phase::Head(_) | Phase::Busy(..) => {}
        }
    }
}

/// The longest time that a request may take, with a client that is slow to take its answer.
pub(super) fn longest(timeouts: &Timeouts) -> Duration {
    timeouts.request + timeouts.unread
}

/// Ends the busy phase when the answer is gone, however it goes.
pub(super) struct Busy(Arc<Phases>);

impl Busy {
    pub(super) fn begin(phases: &Arc<Phases>) -> Self {
        let mut phase = phases.lock();
        *phase = match *phase {
            Phase::Busy(requests, since) => Phase::Busy(requests + 1, since),
            _ => Phase::Busy(1, Instant::now()),
        };
        drop(phase);
        Self(Arc::clone(phases))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut phase = self.0.lock();
        *phase = match *phase {
            Phase::Busy(requests, since) if requests > 1 => Phase::Busy(requests - 1, since),
            _ => Phase::Idle(Instant::now()),
        };
    }
}

/// An answer's body that keeps the connection busy.
pub(super) struct Answered<B> {
    pub(super) body: B,
    pub(super) _busy: Busy,
}

impl<B: Body + Unpin> Body for Answered<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// The socket of an HTTP/1 connection.
pub(super) struct Watched<S> {
    io: S,
    ahead: Ahead,
    phases: Arc<Phases>,
    metrics: Arc<Metrics>,
    /// What is left to write in the place of a refusal.
    instead: Bytes,
}

impl<S> Watched<S> {
    pub(super) fn new(io: S, phases: Arc<Phases>, metrics: Arc<Metrics>) -> Self {
        Self { io, ahead: Ahead::default(), phases, metrics, instead: Bytes::new() }
    }

    /// The socket itself.
    pub(super) fn into_inner(self) -> S {
        self.io
    }
}

impl<S: hyper::rt::Write + Unpin> Watched<S> {
    /// Writes the rest of what stands in for `taken` bytes of hyper's.
    fn poll_instead(&mut self, cx: &mut Context<'_>, taken: usize) -> Poll<std::io::Result<usize>> {
        while !self.instead.is_empty() {
            let written = std::task::ready!(Pin::new(&mut self.io).poll_write(cx, &self.instead))?;
            if written == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            self.instead.advance(written);
        }
        Poll::Ready(Ok(taken))
    }

    /// Whether `buf` is a refusal of hyper's, for which something else is to be written.
    fn replaces(&mut self, buf: &[u8]) -> bool {
        if !self.instead.is_empty() {
            return true;
        }
        let Some((status, answer)) = reply::unparsed(buf) else { return false };
        Entry::open(Arc::clone(&self.metrics), Route::Other).answered(status);
        self.instead = answer;
        true
    }
}

impl<S: hyper::rt::Read + Unpin> hyper::rt::Read for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        let this = &mut *self;
        let polled = this.ahead.poll_read(&mut this.io, cx, buf);
        if matches!(polled, Poll::Ready(Ok(()))) {
            this.phases.heard();
        }
        polled
    }
}

impl<S: hyper::rt::Read + hyper::rt::Write + Unpin> hyper::rt::Write for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        if self.replaces(buf) {
            return self.poll_instead(cx, buf.len());
        }
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    /// hyper ends each of its turns with this: the place to see what it does not look at.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let this = &mut *self;
        if !this.ahead.is_asked()
            && matches!(this.phases.get(), Phase::Busy(..))
            && let Poll::Ready(Err(left)) = this.ahead.poll_look(&mut this.io, cx)
        {
            return Poll::Ready(Err(left));
        }
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        if let Some(first) = bufs.iter().find(|buf| !buf.is_empty())
            && self.replaces(first)
        {
            return self.poll_instead(cx, first.len());
        }
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}
