//! One client connection: HTTP/1.1 with deadlines on what hyper would wait for without end.

use std::convert::Infallible;
use std::pin::Pin;
use std::pin::pin;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use hyper::body::{Body, Incoming};
use hyper::rt::{ReadBufCursor, Write as _};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::account::Entry;
use crate::body::HEAD_MAX_BYTES;
use crate::gateway::Gateway;
use crate::metrics::Metrics;
use crate::options::Timeouts;
use crate::reply;
use crate::routes::Route;

/// What a connection needs besides its socket.
pub(super) struct Connection {
    pub(super) gateway: Arc<Gateway>,
    pub(super) closing: CancellationToken,
    pub(super) abort: CancellationToken,
}

/// Where a connection is between requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No byte of the next request yet.
    Idle(Instant),
    /// The head of a request is arriving.
    Head(Instant),
    /// A request is being served.
    Busy,
}

/// The phase, shared between the socket, the service and the watch.
#[derive(Debug)]
struct Phases(Mutex<Phase>);

impl Phases {
    fn get(&self) -> Phase {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, phase: Phase) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }

    /// When the connection is to be cut unless something happens.
    fn deadline(&self, timeouts: &Timeouts) -> Option<Instant> {
        match self.get() {
            Phase::Idle(since) => Some(since + timeouts.idle),
            Phase::Head(since) => Some(since + timeouts.header),
            Phase::Busy => None,
        }
    }
}

/// A socket that notes when the first byte of a request arrives, and gives hyper's own refusals a body.
struct Watched {
    io: TokioIo<TcpStream>,
    phases: Arc<Phases>,
    metrics: Arc<Metrics>,
    /// What is left to write in the place of a refusal.
    instead: Bytes,
}

impl Watched {
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

impl hyper::rt::Read for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<std::io::Result<()>> {
        let polled = Pin::new(&mut self.io).poll_read(cx, buf);
        if matches!(polled, Poll::Ready(Ok(())))
            && let Phase::Idle(_) = self.phases.get()
        {
            self.phases.set(Phase::Head(Instant::now()));
        }
        polled
    }
}

impl hyper::rt::Write for Watched {
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

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
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

/// Ends the busy phase when the answer is gone, however it goes.
struct Busy(Arc<Phases>);

impl Busy {
    fn begin(phases: &Arc<Phases>) -> Self {
        phases.set(Phase::Busy);
        Self(Arc::clone(phases))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.set(Phase::Idle(Instant::now()));
    }
}

/// An answer's body that keeps the connection busy.
struct Answered<B> {
    body: B,
    _busy: Busy,
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

impl Connection {
    /// Serves requests until the client, the deadlines or the router end it.
    pub(super) async fn serve(self, stream: TcpStream) {
        // Tokens are small writes: with Nagle's algorithm each would wait for the client's delayed ACK.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "connection gone before it was served");
            return;
        }
        let Self { gateway, closing, abort } = self;
        gateway.metrics.connections.inc();
        let phases = Arc::new(Phases(Mutex::new(Phase::Head(Instant::now()))));
        let watched = Watched {
            io: TokioIo::new(stream),
            phases: Arc::clone(&phases),
            metrics: Arc::clone(&gateway.metrics),
            instead: Bytes::new(),
        };
        let service = {
            let (gateway, phases) = (Arc::clone(&gateway), Arc::clone(&phases));
            service_fn(move |request: http::Request<Incoming>| {
                let busy = Busy::begin(&phases);
                let gateway = Arc::clone(&gateway);
                async move {
                    let response = gateway.handle(request).await;
                    Ok::<_, Infallible>(response.map(|body| Answered { body, _busy: busy }))
                }
            })
        };
        let mut http = http1::Builder::new();
        http.max_buf_size(HEAD_MAX_BYTES).half_close(false);
        let mut connection = pin!(http.serve_connection(watched, service));
        let mut closed = false;
        loop {
            let deadline = phases.deadline(&gateway.timeouts);
            tokio::select! {
                biased;
                () = abort.cancelled() => break,
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "connection ended badly");
                    }
                    break;
                }
                () = closing.cancelled(), if !closed => {
                    closed = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = wait_until(deadline) => {
                    if phases.deadline(&gateway.timeouts).is_some_and(|deadline| deadline <= Instant::now()) {
                        tracing::debug!(phase = ?phases.get(), "connection cut: deadline");
                        break;
                    }
                }
            }
        }
        gateway.metrics.connections.dec();
    }
}

/// Sleeps until the deadline, or a while where there is none now but may be one later.
async fn wait_until(deadline: Option<Instant>) {
    let recheck = Instant::now() + std::time::Duration::from_secs(5);
    tokio::time::sleep_until(deadline.map_or(recheck, |deadline| deadline.min(recheck))).await;
}
