//! An identity provider as far as it hands out documents, over plain HTTP or TLS.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::Response;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// What a path has.
pub(crate) type Document = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// A document of JSON.
pub(crate) fn json(text: impl Into<Bytes>) -> Document {
    Response::new(Full::new(text.into()).boxed_unsync())
}

/// A provider that is there until it is dropped.
pub(crate) struct FakeProvider {
    asked: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

type Tell = dyn Fn(&str) -> Option<Document> + Send + Sync;

impl FakeProvider {
    /// `tell` has the documents, by their paths; what it has none for is never answered.
    pub(crate) fn start(
        listener: TcpListener,
        tls: Option<TlsAcceptor>,
        tell: impl Fn(&str) -> Option<Document> + Send + Sync + 'static,
    ) -> Self {
        let (asked, tell): (_, Arc<Tell>) = (Arc::new(AtomicUsize::new(0)), Arc::new(tell));
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, tls, Arc::clone(&asked), tell));
        Self { asked, _tasks: tasks }
    }

    /// How often it was asked for a document.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, asked: Arc<AtomicUsize>, tell: Arc<Tell>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, asked, tell) = (tls.clone(), Arc::clone(&asked), Arc::clone(&tell));
        connections.spawn(async move {
            match tls {
                None => serve(stream, asked, tell).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        serve(stream, asked, tell).await;
                    }
                }
            }
        });
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    asked: Arc<AtomicUsize>,
    tell: Arc<Tell>,
) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        asked.fetch_add(1, Ordering::SeqCst);
        let told = tell(request.uri().path());
        async move {
            match told {
                Some(document) => Ok::<_, Infallible>(document),
                None => std::future::pending().await,
            }
        }
    });
    // A client that has what it wants closes.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}
