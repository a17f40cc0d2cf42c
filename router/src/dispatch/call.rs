//! HTTP calls to workers.

use std::time::Duration;

use baton_config::protocol::{FailureCode, WorkerError, WorkerStatus};
use baton_config::{Epoch, HandoffId, frames};
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use http::uri::Authority;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, ResponseFuture};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::frames::Carriers;

/// Idle connections kept per worker.
const IDLE_CONNECTIONS: usize = 256;
/// How long an idle connection is kept.
const IDLE_FOR: Duration = Duration::from_secs(30);
/// Largest answer that is read as a whole.
const ANSWER_MAX_BYTES: usize = 4 << 20;

/// Bytes of a worker's answer that the kernel keeps for us: what it would take by itself is megabytes for each client that
/// does not read.
const RECEIVE_BYTES: usize = 256 << 10;

/// A connection without a byte is probed after this long,
const PROBE_AFTER: Duration = Duration::from_secs(15);
/// this often,
const PROBE_EVERY: Duration = Duration::from_secs(5);
/// and so many times before it counts as broken.
const PROBES: u32 = 3;

/// Why a call to a worker failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// No connection.
    #[error("cannot connect")]
    Connect(#[source] hyper_util::client::legacy::Error),
    /// The connection broke.
    #[error("the connection broke")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The worker answered with an error.
    #[error("answered {status}: {message}")]
    Refused {
        /// The status.
        status: StatusCode,
        /// Its cause.
        code: FailureCode,
        /// For the log.
        message: String,
    },
    /// The answer is not of the protocol.
    #[error("not an answer of the protocol")]
    Protocol(#[source] serde_json::Error),
}

/// The connections to all workers.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    client: Client<HttpConnector, Full<Bytes>>,
    carriers: Carriers,
}

impl Caller {
    /// A caller that gives up connecting after `connect`.
    pub(crate) fn new(connect: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(connect));
        connector.set_nodelay(true);
        connector.set_recv_buffer_size(Some(RECEIVE_BYTES));
        // A connection of frames is quiet for as long as there are no requests: something on the way may forget it.
        connector.set_keepalive(Some(PROBE_AFTER));
        connector.set_keepalive_interval(Some(PROBE_EVERY));
        connector.set_keepalive_retries(Some(PROBES));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_FOR)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .build(connector);
        Self { client, carriers: Carriers::default() }
    }

    /// Owners of connections of frames.
    pub(crate) fn carriers(&self) -> &Carriers {
        &self.carriers
    }

    /// A connection of frames to the worker in this life; `None` where it speaks none.
    pub(super) async fn frames(
        &self,
        authority: &Authority,
        epoch: Epoch,
    ) -> Result<Option<Upgraded>, CallError> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = uri(authority, &format!("{}?epoch={}", frames::PATH, epoch.0));
        let headers = request.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static(frames::PROTOCOL));
        let response = self.client.request(request).await.map_err(sort)?;
        match response.status() {
            StatusCode::SWITCHING_PROTOCOLS => {
                let upgraded = hyper::upgrade::on(response).await;
                upgraded.map(Some).map_err(|error| CallError::Broken(Box::new(error)))
            }
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Ok(None),
            _ => accepted(response).await.map(|_| None),
        }
    }

    /// Begins a POST; the future resolves when the head of the answer is there.
    pub(super) fn post(&self, authority: &Authority, path: &str, body: Bytes) -> ResponseFuture {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri(authority, path);
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.client.request(request)
    }

    /// `DELETE /v1/handoffs/{id}`: the worker goes on without its peer.
    pub(super) async fn end_handoff(&self, authority: &Authority, id: HandoffId) -> Result<(), CallError> {
        let mut request = Request::new(Full::default());
        *request.method_mut() = Method::DELETE;
        *request.uri_mut() = uri(authority, &format!("/v1/handoffs/{id}"));
        let response = self.client.request(request).await.map_err(sort)?;
        accepted(response).await.map(drop)
    }

    /// `GET /v1/state`.
    pub(crate) async fn state(&self, authority: &Authority) -> Result<WorkerStatus, CallError> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = uri(authority, "/v1/state");
        let response = self.client.request(request).await.map_err(sort)?;
        let body = accepted(response).await?;
        let bytes = read_whole(body).await?;
        serde_json::from_slice(&bytes).map_err(CallError::Protocol)
    }

    /// `GET /v1/kv/events`: the changes of its prefix cache after event `since` of the life `epoch`, as they happen.
    pub(crate) async fn kv_events(
        &self,
        authority: &Authority,
        since: u64,
        epoch: Epoch,
    ) -> Result<Incoming, CallError> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = uri(authority, &format!("/v1/kv/events?since={since}&epoch={}", epoch.0));
        accepted(self.client.request(request).await.map_err(sort)?).await
    }
}

fn uri(authority: &Authority, path: &str) -> Uri {
    let uri =
        Uri::builder().scheme(http::uri::Scheme::HTTP).authority(authority.clone()).path_and_query(path);
    // Paths are ours and plain, which is all that could go wrong.
    uri.build().unwrap_or_default()
}

/// Tells a refused connection from one that broke later.
pub(super) fn sort(error: hyper_util::client::legacy::Error) -> CallError {
    if error.is_connect() { CallError::Connect(error) } else { CallError::Broken(Box::new(error)) }
}

/// The body of a good answer, or the error that the answer is.
pub(super) async fn accepted(response: Response<Incoming>) -> Result<Incoming, CallError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response.into_body());
    }
    let bytes = read_whole(response.into_body()).await?;
    let error = serde_json::from_slice::<WorkerError>(&bytes);
    let code = match (&error, status) {
        (Ok(error), _) => error.code,
        (Err(_), StatusCode::TOO_MANY_REQUESTS) => FailureCode::Overloaded,
        (Err(_), StatusCode::SERVICE_UNAVAILABLE | StatusCode::CONFLICT) => FailureCode::Unavailable,
        // No worker is there any more, but somebody else, who says nothing about the request.
        (Err(_), StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED) => FailureCode::Unavailable,
        (Err(_), status) if status.is_client_error() => FailureCode::Refused,
        (Err(_), _) => FailureCode::Engine,
    };
    let message = error.map_or_else(|_| String::new(), |error| error.message);
    Err(CallError::Refused { status, code, message })
}

/// Reads a body of bounded size.
pub(super) async fn read_whole(body: Incoming) -> Result<Bytes, CallError> {
    let collected = Limited::new(body, ANSWER_MAX_BYTES).collect().await.map_err(CallError::Broken)?;
    Ok(collected.to_bytes())
}
