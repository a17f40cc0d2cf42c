//! HTTP calls to a conductor, each with a deadline.

use std::time::Duration;

use baton_config::{Epoch, WorkerId};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{ErrorBody, ErrorDetail, Keepalive, Kept, Listing, Register, Registered, WatchLine};

/// Largest listing read: 1,000 workers with the largest metadata take 90 MB.
const LISTING_MAX_BYTES: usize = 256 << 20;
/// Largest line of a watch: one revision.
const LINE_MAX_BYTES: usize = 8 << 20;
/// Largest answer to any other call.
const REPLY_MAX_BYTES: usize = 64 << 10;

/// Why a call has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No answer, or a broken one: another endpoint may do better.
    #[error("conductor {endpoint} does not answer")]
    Unreachable {
        /// Whom we asked.
        endpoint: String,
        /// The cause.
        #[source]
        source: reqwest::Error,
    },
    /// The conductor said no.
    #[error("conductor {endpoint} refused: {} ({status}, {})", detail.message, detail.code)]
    Refused {
        /// Whom we asked.
        endpoint: String,
        /// HTTP status.
        status: u16,
        /// Its reason.
        detail: Box<ErrorDetail>,
    },
    /// Whoever listens there does not speak this protocol.
    #[error("{endpoint} answered {what}, which a conductor would not")]
    Malformed {
        /// Whom we asked.
        endpoint: String,
        /// What was wrong.
        what: String,
    },
}

/// Timeouts of calls.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallTiming {
    pub(crate) connect: Duration,
    pub(crate) call: Duration,
}

/// A pooled HTTP client over the endpoints of one fleet.
#[derive(Debug, Clone)]
pub(crate) struct Transport {
    http: reqwest::Client,
    endpoints: Vec<String>,
    timing: CallTiming,
}

impl Transport {
    pub(crate) fn new(endpoints: Vec<String>, timing: CallTiming) -> Result<Self, reqwest::Error> {
        let http =
            crate::http::builder().connect_timeout(timing.connect).pool_max_idle_per_host(4).build()?;
        Ok(Self { http, endpoints, timing })
    }

    pub(crate) fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    pub(crate) async fn list(&self, endpoint: usize) -> Result<Listing, CallError> {
        let reply = self.send(endpoint, Method::GET, "/v1/workers", None::<&()>).await?;
        self.read_json(endpoint, reply, LISTING_MAX_BYTES).await
    }

    pub(crate) async fn register(&self, endpoint: usize, body: &Register) -> Result<Registered, CallError> {
        let reply = self.send(endpoint, Method::POST, "/v1/workers", Some(body)).await?;
        self.read_json(endpoint, reply, REPLY_MAX_BYTES).await
    }

    pub(crate) async fn keepalive(
        &self,
        endpoint: usize,
        worker: &WorkerId,
        body: &Keepalive,
    ) -> Result<Kept, CallError> {
        let path = format!("/v1/workers/{worker}/keepalive");
        let reply = self.send(endpoint, Method::POST, &path, Some(body)).await?;
        self.read_json(endpoint, reply, REPLY_MAX_BYTES).await
    }

    pub(crate) async fn leave(
        &self,
        endpoint: usize,
        worker: &WorkerId,
        epoch: Epoch,
    ) -> Result<(), CallError> {
        let path = format!("/v1/workers/{worker}?epoch={epoch}");
        self.send(endpoint, Method::DELETE, &path, None::<&()>).await.map(|_| ())
    }

    /// Opens a watch. Only the head of the answer has a deadline: the caller times the lines.
    pub(crate) async fn watch(&self, endpoint: usize, since: u64) -> Result<Lines, CallError> {
        let path = format!("/v1/watch?since={since}");
        let reply = self.send(endpoint, Method::GET, &path, None::<&()>).await?;
        Ok(Lines {
            endpoint: self.endpoints[endpoint].clone(),
            stream: reply.bytes_stream().boxed(),
            buffer: BytesMut::new(),
            scanned: 0,
        })
    }

    async fn send(
        &self,
        endpoint: usize,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<reqwest::Response, CallError> {
        let base = &self.endpoints[endpoint];
        let mut request = self.http.request(method, format!("{base}{path}"));
        if let Some(body) = body {
            request = request.json(body);
        }
        let reply = match tokio::time::timeout(self.timing.call, request.send()).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(source)) => return Err(CallError::Unreachable { endpoint: base.clone(), source }),
            Err(_) => {
                let what = format!("nothing within {:?}", self.timing.call);
                return Err(CallError::Malformed { endpoint: base.clone(), what });
            }
        };
        if reply.status().is_success() {
            return Ok(reply);
        }
        let status = reply.status().as_u16();
        let body: ErrorBody = self.read_json(endpoint, reply, REPLY_MAX_BYTES).await?;
        Err(CallError::Refused { endpoint: base.clone(), status, detail: Box::new(body.error) })
    }

    async fn read_json<T: DeserializeOwned>(
        &self,
        endpoint: usize,
        reply: reqwest::Response,
        limit: usize,
    ) -> Result<T, CallError> {
        let base = &self.endpoints[endpoint];
        let status = reply.status();
        let malformed = |what: String| CallError::Malformed { endpoint: base.clone(), what };
        let mut stream = reply.bytes_stream();
        let mut body = BytesMut::new();
        loop {
            let chunk = tokio::time::timeout(self.timing.call, stream.next())
                .await
                .map_err(|_| malformed("half a body".to_owned()))?;
            match chunk {
                Some(Ok(chunk)) if body.len() + chunk.len() <= limit => body.extend_from_slice(&chunk),
                Some(Ok(_)) => return Err(malformed(format!("more than {limit} bytes"))),
                Some(Err(source)) => {
                    return Err(CallError::Unreachable { endpoint: base.clone(), source });
                }
                None => break,
            }
        }
        serde_json::from_slice(&body).map_err(|error| {
            malformed(format!("status {status} with a body that is not its message: {error}"))
        })
    }
}

/// The lines of an open watch.
pub(crate) struct Lines {
    endpoint: String,
    stream: BoxStream<'static, Result<Bytes, reqwest::Error>>,
    buffer: BytesMut,
    /// Bytes of `buffer` known to hold no line end.
    scanned: usize,
}

impl Lines {
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The next line; `None` at the end of the stream. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<WatchLine>, CallError> {
        loop {
            if let Some(at) = self.buffer[self.scanned..].iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(self.scanned + at + 1);
                self.scanned = 0;
                return serde_json::from_slice(&line).map(Some).map_err(|error| CallError::Malformed {
                    endpoint: self.endpoint.clone(),
                    what: format!("a watch line that is none: {error}"),
                });
            }
            self.scanned = self.buffer.len();
            if self.scanned > LINE_MAX_BYTES {
                let what = format!("a watch line of more than {LINE_MAX_BYTES} bytes");
                return Err(CallError::Malformed { endpoint: self.endpoint.clone(), what });
            }
            match self.stream.next().await {
                Some(Ok(chunk)) => self.buffer.extend_from_slice(&chunk),
                Some(Err(source)) => {
                    return Err(CallError::Unreachable { endpoint: self.endpoint.clone(), source });
                }
                None => return Ok(None),
            }
        }
    }
}
