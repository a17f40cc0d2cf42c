//! The accept loop: bounded connections, handshakes and headers, and an end in three phases.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use baton_config::Seldom;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::HttpLimits;
use super::auth::Peer;
use super::metrics::Metrics;
use super::tls::{Certificates, Opened};

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 16_384;
/// Largest head of a request.
const HEADER_MAX_BYTES: usize = 64 * 1024;
/// How long open requests may take to finish after the stop.
const GRACE: Duration = Duration::from_secs(2);
/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a connection needs.
pub(super) struct Door {
    /// Answers requests.
    pub(super) router: Router,
    /// Answers those who speak plain HTTP where TLS is spoken.
    pub(super) plain: Router,
    /// With TLS: what this side shows.
    pub(super) certificates: Option<Certificates>,
    /// Bounds of time.
    pub(super) limits: HttpLimits,
    /// Where failed handshakes are counted.
    pub(super) metrics: Metrics,
}

/// Serves until `stop`; open requests get a moment to finish, then their connections are dropped.
pub(super) async fn serve(listener: TcpListener, door: Door, stop: CancellationToken) {
    let connections = TaskTracker::new();
    let abort = CancellationToken::new();
    let (room, door) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), Arc::new(door));
    let mut failures = Seldom::default();
    while let Some((stream, permit)) = accept(&listener, &room, &stop, &mut failures).await {
        let connection = door.clone().open(stream, stop.clone(), permit);
        connections.spawn(abort.clone().run_until_cancelled_owned(connection));
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(GRACE, connections.wait()).await.is_err() {
        tracing::warn!(open = connections.len(), "connections did not end in time and are dropped");
        abort.cancel();
        connections.wait().await;
    }
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
    stop: &CancellationToken,
    failures: &mut Seldom,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    loop {
        let next = async {
            let permit = room.clone().acquire_owned().await.ok()?;
            Some((listener.accept().await, permit))
        };
        match stop.run_until_cancelled(next).await?? {
            (Ok((stream, _)), permit) => return Some((stream, permit)),
            (Err(error), _) => {
                if failures.is_due(Instant::now().into_std()) {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "connections cannot be accepted");
                }
                stop.run_until_cancelled(tokio::time::sleep(ACCEPT_PAUSE)).await?;
            }
        }
    }
}

impl Door {
    async fn open(
        self: Arc<Self>,
        stream: TcpStream,
        stop: CancellationToken,
        _permit: OwnedSemaphorePermit,
    ) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = &error as &dyn std::error::Error, "answers may be delayed");
        }
        let stranger = Peer { certified: false };
        let Some(certificates) = &self.certificates else {
            return self.converse(stream, stranger, &self.router, stop).await;
        };
        let handshake = certificates.open(stream, self.limits.handshake_timeout);
        match stop.run_until_cancelled(handshake).await {
            Some(Opened::Tls(stream, peer)) => self.converse(*stream, peer, &self.router, stop).await,
            Some(Opened::Plain(stream)) => self.converse(stream, stranger, &self.plain, stop).await,
            Some(Opened::Failed(fault)) => {
                self.metrics.handshake_failed(fault.reason());
                tracing::debug!(error = &fault as &dyn std::error::Error, "a connection did not come about");
            }
            Some(Opened::Silent) | None => {}
        }
    }

    /// Answers the requests of one connection.
    async fn converse<S>(&self, stream: S, peer: Peer, router: &Router, stop: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(self.limits.header_timeout);
        builder.max_buf_size(HEADER_MAX_BYTES);
        let router = TowerToHyperService::new(router.clone());
        let service = service_fn(move |mut request: http::Request<Incoming>| {
            request.extensions_mut().insert(peer);
            router.call(request)
        });
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let ended = tokio::select! {
            biased;
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
            ended = connection.as_mut() => ended,
        };
        if let Err(error) = ended {
            tracing::debug!(error = &error as &dyn std::error::Error, "a connection ended badly");
        }
    }
}
