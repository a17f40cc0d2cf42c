//! One client connection: HTTP/1.1 or HTTP/2, plain or over TLS, with deadlines on what hyper would wait for without end.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::settled::Settled;
use super::tls::Tls;
use super::watched::{Answered, Busy, Phase, Phases, Watched, longest};
use crate::account::Entry;
use crate::answer::AnswerBody;
use crate::body::HEAD_MAX_BYTES;
use crate::gateway::Gateway;
use crate::reply;
use crate::routes::Route;

/// How every HTTP/2 connection begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Between two looks at a connection that began like HTTP/2 and did not go on.
const PREFACE_PAUSE: Duration = Duration::from_millis(10);
/// Bytes the kernel may hold that a client has no room for: what a client that does not read costs, with hyper's buffer.
const UNSENT_MAX_BYTES: u32 = 128 << 10;
/// Requests of one HTTP/2 connection at once.
const STREAMS_MAX: u32 = 256;
/// Resets by the client before their requests were looked at, then the connection ends (CVE-2023-44487).
const RESETS_MAX: usize = 20;
/// Resets of our own because of what the client sent, then the connection ends (CVE-2025-8671).
const OWN_RESETS_MAX: usize = 100;
/// Bytes of the bodies of one connection that may be under way.
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Bytes of one body that may be under way.
const STREAM_WINDOW: u32 = 256 << 10;
/// Bytes of an answer that a client has no room for.
const STREAM_UNSENT_BYTES: usize = 64 << 10;
/// Between two pings of a quiet HTTP/2 connection, and until it is given up.
const PING_EVERY: Duration = Duration::from_secs(20);
/// Head of an HTTP/2 request that is read at all: well beyond what is taken, because h2 refuses the rest without a body.
const HTTP2_HEAD_BYTES: usize = 2 * HEAD_MAX_BYTES;
/// For the answer to a client that was too slow.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a connection needs besides its socket.
pub(super) struct Connection {
    pub(super) gateway: Arc<Gateway>,
    pub(super) tls: Option<Arc<Tls>>,
    /// Owns the requests of HTTP/2 connections.
    pub(super) tracker: TaskTracker,
    pub(super) closing: CancellationToken,
    pub(super) abort: CancellationToken,
}

/// Runs the requests of an HTTP/2 connection as tasks that the server waits for.
#[derive(Clone)]
struct Requests {
    tracker: TaskTracker,
    abort: CancellationToken,
    /// After so long a request has a client that does not read: its stream is reset.
    longest: Duration,
}

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Requests {
    fn execute(&self, request: F) {
        let (abort, longest) = (self.abort.clone(), self.longest);
        self.tracker.spawn(async move {
            let request = tokio::time::timeout(longest, request);
            if let Some(Err(_)) = abort.run_until_cancelled(request).await {
                tracing::debug!("stream cut: deadline");
            }
        });
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
        if let Err(error) = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_MAX_BYTES) {
            tracing::debug!(%error, "a client that does not read may cost more than it should");
        }
        self.gateway.metrics.connections.inc();
        self.begin(stream).await;
        self.gateway.metrics.connections.dec();
    }

    /// Finds out what is spoken. Most connections are plain HTTP/1.1: only they are served in place, and make no room for others.
    async fn begin(&self, stream: TcpStream) {
        let phases = Arc::new(Phases::fresh());
        match &self.tls {
            None => match self.opening(speaks_http2(&stream)).await {
                Some(Ok(true)) => Box::pin(self.http2(stream, phases)).await,
                Some(Ok(false)) => self.http1(stream, phases).await,
                Some(Err(error)) => tracing::debug!(%error, "connection gone before it was served"),
                None => {}
            },
            Some(tls) => Box::pin(self.secured(tls, stream, phases)).await,
        }
    }

    async fn secured(&self, tls: &Tls, stream: TcpStream, phases: Arc<Phases>) {
        match self.opening(tls.acceptor().accept(stream)).await {
            Some(Ok(stream)) if stream.get_ref().1.alpn_protocol() == Some(b"h2") => {
                Box::pin(self.http2(stream, phases)).await;
            }
            Some(Ok(stream)) => Box::pin(self.http1(stream, phases)).await,
            Some(Err(error)) => tracing::debug!(%error, "no TLS"),
            None => {}
        }
    }

    /// Waits for something before the first request, for a while.
    async fn opening<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        let patience = self.gateway.timeouts.header;
        tokio::select! {
            biased;
            () = self.abort.cancelled() => None,
            () = self.closing.cancelled() => None,
            ended = tokio::time::timeout(patience, what) => ended.ok(),
        }
    }

    async fn http1<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S, phases: Arc<Phases>) {
        let watched =
            Watched::new(TokioIo::new(stream), Arc::clone(&phases), Arc::clone(&self.gateway.metrics));
        let service = service(&self.gateway, &phases);
        let mut http = http1::Builder::new();
        http.max_buf_size(HEAD_MAX_BYTES).half_close(false);
        let mut connection = Settled::new(http.serve_connection(watched, service_fn(service)));
        let mut closed = false;
        loop {
            let deadline = phases.deadline(&self.gateway.timeouts);
            tokio::select! {
                biased;
                () = self.abort.cancelled() => return,
                ended = &mut connection => {
                    note(ended);
                    return;
                }
                () = self.closing.cancelled(), if !closed => {
                    closed = true;
                    Pin::new(connection.get_mut()).graceful_shutdown();
                }
                () = wait_until(deadline) => {
                    if is_over(&phases, phases.deadline(&self.gateway.timeouts)) {
                        break;
                    }
                }
            }
        }
        if matches!(phases.get(), Phase::Head(_)) {
            self.tell_slow(connection.into_inner().into_parts().io.into_inner().into_inner()).await;
        }
    }

    /// Answers a head that never ended.
    async fn tell_slow<S: AsyncWrite + Unpin>(&self, mut stream: S) {
        let (status, answer) = reply::slow_head();
        Entry::open(Arc::clone(&self.gateway.metrics), Route::Other).answered(status);
        let told = async {
            stream.write_all(&answer).await?;
            stream.shutdown().await
        };
        if !matches!(tokio::time::timeout(FAREWELL, told).await, Ok(Ok(()))) {
            tracing::debug!("a client that was too slow did not hear so");
        }
    }

    async fn http2<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S, phases: Arc<Phases>) {
        let service = service(&self.gateway, &phases);
        let requests = Requests {
            tracker: self.tracker.clone(),
            abort: self.abort.clone(),
            longest: longest(&self.gateway.timeouts),
        };
        let mut http = http2::Builder::new(requests);
        http.timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_MAX)
            .max_pending_accept_reset_streams(RESETS_MAX)
            .max_local_error_reset_streams(OWN_RESETS_MAX)
            .max_header_list_size(u32::try_from(HTTP2_HEAD_BYTES).unwrap_or(u32::MAX))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(STREAM_UNSENT_BYTES)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_EVERY);
        let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service_fn(service)));
        let mut closed = false;
        loop {
            let deadline = phases.deadline_between(&self.gateway.timeouts);
            tokio::select! {
                biased;
                () = self.abort.cancelled() => return,
                ended = connection.as_mut() => {
                    note(ended);
                    return;
                }
                () = self.closing.cancelled(), if !closed => {
                    closed = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = wait_until(deadline) => {
                    if is_over(&phases, phases.deadline_between(&self.gateway.timeouts)) {
                        return;
                    }
                }
            }
        }
    }
}

/// Whether the deadline of a connection has passed, which nothing has moved meanwhile.
fn is_over(phases: &Phases, deadline: Option<Instant>) -> bool {
    let over = deadline.is_some_and(|deadline| deadline <= Instant::now());
    if over {
        tracing::debug!(phase = ?phases.get(), "connection cut: deadline");
    }
    over
}

fn note(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended badly");
    }
}

type Answering =
    Pin<Box<dyn Future<Output = Result<http::Response<Answered<AnswerBody>>, Infallible>> + Send>>;

fn service(
    gateway: &Arc<Gateway>,
    phases: &Arc<Phases>,
) -> impl Fn(http::Request<Incoming>) -> Answering + use<> {
    let (gateway, phases) = (Arc::clone(gateway), Arc::clone(phases));
    move |request| {
        let busy = Busy::begin(&phases);
        let gateway = Arc::clone(&gateway);
        Box::pin(async move {
            let response = gateway.handle(request).await;
            Ok(response.map(|body| Answered { body, _busy: busy }))
        })
    }
}

/// Whether the first bytes are those of HTTP/2; they stay where they are.
async fn speaks_http2(stream: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0; PREFACE.len()];
    loop {
        let heard = stream.peek(&mut first).await?;
        match &first[..heard] {
            PREFACE => return Ok(true),
            [] => return Ok(false),
            part if PREFACE.starts_with(part) => tokio::time::sleep(PREFACE_PAUSE).await,
            _ => return Ok(false),
        }
    }
}

/// Sleeps until the deadline, or a while where there is none now but may be one later.
async fn wait_until(deadline: Option<Instant>) {
    let recheck = Instant::now() + Duration::from_secs(5);
    tokio::time::sleep_until(deadline.map_or(recheck, |deadline| deadline.min(recheck))).await;
}
