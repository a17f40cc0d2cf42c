//! HTTP calls to a conductor, each with a deadline.

use std::time::Duration;

use baton_config::fleet::ConductorAccess;
use baton_config::{Epoch, WorkerId};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{ErrorBody, ErrorDetail, Keepalive, Kept, Listing, Register, Registered, WatchLine};
use crate::http::{Caller, CallerError, TlsFault};

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
    /// One side of the connection does not trust the other, or only one speaks TLS.
    #[error("conductor {endpoint} {fault}")]
    Tls {
        /// Whom we asked.
        endpoint: String,
        /// What is wrong.
        fault: TlsFault,
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

impl CallError {
    fn sent(endpoint: &str, source: reqwest::Error) -> Self {
        let endpoint = endpoint.to_owned();
        match TlsFault::of(&source) {
            Some(fault) => Self::Tls { endpoint, fault, source },
            None => Self::Unreachable { endpoint, source },
        }
    }

    /// Whether other files of a token or a certificate could help, or a conductor that has other ones.
    pub(crate) fn is_distrust(&self) -> bool {
        match self {
            Self::Tls { .. } => true,
            Self::Refused { status, .. } => [401, 403].contains(status),
            Self::Unreachable { .. } | Self::Malformed { .. } => false,
        }
    }
}

/// The conductors of one fleet, and how they are called.
#[derive(Debug, Clone)]
pub(crate) struct Transport {
    caller: Caller,
    /// Whether transfer metadata is asked for.
    metadata: bool,
    endpoints: Vec<String>,
    timing: CallTiming,
}

impl Transport {
    pub(crate) fn new(
        endpoints: Vec<String>,
        access: ConductorAccess,
        timing: CallTiming,
    ) -> Result<Self, CallerError> {
        let caller = Caller::new(access, endpoints.iter().map(String::as_str), timing.connect)?;
        Ok(Self { caller, metadata: true, endpoints, timing })
    }

    /// For those who have no use for transfer metadata.
    pub(crate) fn without_metadata(self) -> Self {
        Self { metadata: false, ..self }
    }

    pub(crate) fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    pub(crate) async fn list(&self, endpoint: usize) -> Result<Listing, CallError> {
        let path = if self.metadata { "/v1/workers" } else { "/v1/workers?metadata=no" };
        let reply = self.send(endpoint, Method::GET, path, None::<&()>).await?;
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
        let metadata = if self.metadata { "" } else { "&metadata=no" };
        let path = format!("/v1/watch?since={since}{metadata}");
        let reply = self.send(endpoint, Method::GET, &path, None::<&()>).await?;
        Ok(Lines {
            endpoint: self.endpoints[endpoint].clone(),
            stream: reply.bytes_stream().boxed(),
            buffer: BytesMut::new(),
            scanned: 0,
        })
    }

    /// A call that was answered well; one that failed for want of trust makes the files be looked at again.
    async fn send(
        &self,
        endpoint: usize,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<reqwest::Response, CallError> {
        let result = self.send_once(endpoint, method.clone(), path, body).await;
        match result {
            Err(error) if error.is_distrust() && self.caller.renew().await => {
                self.send_once(endpoint, method, path, body).await
            }
            result => result,
        }
    }

    async fn send_once(
        &self,
        endpoint: usize,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<reqwest::Response, CallError> {
        let base = &self.endpoints[endpoint];
        let mut request = self.caller.request(method, &format!("{base}{path}"));
        if let Some(body) = body {
            request = request.json(body);
        }
        let reply = match tokio::time::timeout(self.timing.call, request.send()).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(source)) => return Err(CallError::sent(base, source)),
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
                Some(Err(source)) => return Err(CallError::sent(base, source)),
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
                Some(Err(source)) => return Err(CallError::sent(&self.endpoint, source)),
                None => return Ok(None),
            }
        }
    }
}
