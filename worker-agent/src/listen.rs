//! The listener of a worker's API: so many connections, and no waiting without end for what a client does not send.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use baton_config::Seldom;
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 16_384;
/// For the head of a request, and for a connection without one: longer than routers and peers keep idle connections, which
/// must not end under the request that is just being sent.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest head of a request.
const HEAD_MAX_BYTES: usize = 64 << 10;
/// Without a byte of a request's body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an accept that failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop`; then connections end after the request they are at. Its tasks belong to `tasks`.
pub(crate) fn serve(listener: TcpListener, routes: Router, tasks: &TaskTracker, stop: CancellationToken) {
    serve_at_once(CONNECTIONS_MAX, listener, routes, tasks, stop);
}

/// The same with room for so many connections.
fn serve_at_once(
    most: usize,
    listener: TcpListener,
    routes: Router,
    tasks: &TaskTracker,
    stop: CancellationToken,
) {
    let connections = tasks.clone();
    tasks.spawn(async move {
        let room = Arc::new(Semaphore::new(most));
        let mut failures = Seldom::default();
        loop {
            let next = async {
                let permit = Arc::clone(&room).acquire_owned().await.ok()?;
                Some((listener.accept().await, permit))
            };
            match stop.run_until_cancelled(next).await.flatten() {
                None => return,
                Some((Ok((stream, _)), permit)) => {
                    let conversation = converse(stream, routes.clone(), stop.clone());
                    connections.spawn(async move {
                        conversation.await;
                        drop(permit);
                    });
                }
                Some((Err(error), _)) => {
                    if failures.is_due(Instant::now().into_std()) {
                        tracing::warn!(%error, "connections cannot be accepted");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
}

/// Answers the requests of one connection.
async fn converse(stream: TcpStream, routes: Router, stop: CancellationToken) {
    // A token is a small write: it must not wait for the acknowledgement of the one before.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection keeps its delay");
    }
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_MAX_BYTES);
    let routes = TowerToHyperService::new(routes);
    let service = service_fn(move |request: http::Request<Incoming>| {
        hyper::service::Service::call(&routes, request.map(|body| Awaited { body, patience: None }))
    });
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service).with_upgrades());
    let ended = tokio::select! {
        biased;
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        ended = connection.as_mut() => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended badly");
    }
}

/// A body that fails when it stops coming.
struct Awaited {
    body: Incoming,
    patience: Option<Pin<Box<Sleep>>>,
}

/// Why a body was not read to its end.
#[derive(Debug, thiserror::Error)]
enum BodyError {
    #[error("nothing came for {} s", BODY_TIMEOUT.as_secs())]
    Slow,
    #[error(transparent)]
    Broken(#[from] hyper::Error),
}

impl Body for Awaited {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            this.patience = None;
            return Poll::Ready(frame.map(|frame| Ok(frame?)));
        }
        let patience = this.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(BODY_TIMEOUT)));
        ready!(patience.as_mut().poll(cx));
        Poll::Ready(Some(Err(BodyError::Slow)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::post;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// What the listener says to a client that sends this and then nothing, and for how long it listens; in virtual time.
    async fn heard(sent: &[u8]) -> (String, Duration) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let routes = Router::new().route("/", post(|body: Bytes| async move { body.len().to_string() }));
        serve(listener, routes, &tasks, stop.clone());
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(sent).await.unwrap();
        let begun = Instant::now();
        let mut answer = Vec::new();
        // A reset is an end, too.
        let _ = client.read_to_end(&mut answer).await;
        let patience = begun.elapsed();
        drop(client);
        stop.cancel();
        tasks.close();
        tasks.wait().await;
        (String::from_utf8(answer).unwrap(), patience)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stops_sending_is_not_waited_for() {
        let (answer, patience) = heard(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nabc").await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
        assert!(patience >= BODY_TIMEOUT, "{patience:?}");
        for sent in [&b""[..], b"POST / HT", b"POST / HTTP/1.1\r\nhost: a\r\n"] {
            let (_, patience) = heard(sent).await;
            assert!(patience >= HEAD_TIMEOUT && patience < 2 * HEAD_TIMEOUT, "{patience:?} for {sent:?}");
        }
        let asked = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 3\r\n\r\nabc";
        assert!(heard(asked).await.0.ends_with("\r\n\r\n3"));
    }

    #[tokio::test]
    async fn a_client_that_sends_slowly_is_waited_for_and_an_idle_one_holds_up_no_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let routes = Router::new().route("/", post(|body: Bytes| async move { body.len().to_string() }));
        serve(listener, routes, &tasks, stop.clone());
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n").await.unwrap();
        // Each byte comes in time, all of them together do not.
        tokio::time::pause();
        for byte in b"abc" {
            // It is read before the clock goes on.
            client.write_all(&[*byte]).await.unwrap();
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            tokio::time::advance(BODY_TIMEOUT * 2 / 3).await;
        }
        tokio::time::resume();
        let mut answer = vec![0; 1024];
        let bytes = client.read(&mut answer).await.unwrap();
        assert!(answer[..bytes].ends_with(b"\r\n\r\n3"), "{}", String::from_utf8_lossy(&answer[..bytes]));
        // Its connection could take another request.
        stop.cancel();
        tasks.close();
        tokio::time::timeout(HEAD_TIMEOUT / 2, tasks.wait()).await.expect("nobody is at a request");
    }

    #[tokio::test]
    async fn who_finds_no_room_waits_until_somebody_leaves() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let routes = Router::new().route("/", post(|| async {}));
        serve_at_once(2, listener, routes, &tasks, stop.clone());
        let call = async || {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            client
        };
        let answered = async |client: &mut TcpStream| {
            let mut answer = [0; 12];
            client.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 200");
        };
        let (mut first, mut second) = (call().await, call().await);
        answered(&mut first).await;
        answered(&mut second).await;
        let mut third = call().await;
        let early = tokio::time::timeout(Duration::from_millis(300), answered(&mut third)).await;
        assert!(early.is_err(), "there was room for two");
        drop(first);
        tokio::time::timeout(HEAD_TIMEOUT / 2, answered(&mut third)).await.expect("there is room now");
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
