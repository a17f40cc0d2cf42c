//! One try at a server, until its answer has begun or was refused.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, select};
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::ResponseFuture;
use tokio::time::Instant;

use super::rename::Rename;
use super::{Asked, Forwarder, TICK};
use crate::dispatch::{Placement, chain};
use crate::fleet::{Occupied, Worker};
use crate::metrics::MoveReason;
use crate::options::Timeouts;
use crate::reply::{self, Refusal};

/// Bytes of an answer that are waited for before it is passed on: if it breaks off before, another server is asked.
const WHOLE_MAX_BYTES: usize = 1 << 20;
/// Bytes of a server's refusal that are read, and how long that may take.
const REFUSAL_MAX: (usize, Duration) = (64 << 10, Duration::from_secs(2));

/// Why a server did not begin an answer, or did not end it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    /// Never connected.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// The connection broke, or ended early.
    #[error("connection lost: {0}")]
    Broken(String),
    /// Nothing for too long.
    #[error("silent for {} ms", .0.as_millis())]
    Silent(Duration),
    /// The request's time is over: nobody's fault.
    #[error("the request's time is over")]
    Deadline,
    /// The server is full.
    #[error("overloaded")]
    Overloaded,
    /// The server says that it cannot serve now.
    #[error("unavailable")]
    Unavailable,
    /// The server does not take this router's key.
    #[error("it does not take the key of this router: {0}")]
    Denied(StatusCode),
    /// The server failed at this request.
    #[error("answered {0}")]
    Failing(StatusCode),
    /// The server refused the request: the client's fault.
    #[error("refused")]
    Refused(Box<Refusal>),
}

impl Lost {
    /// Whether others should keep away from the worker for a while.
    pub(super) fn is_down(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Broken(_) | Self::Silent(_) | Self::Unavailable)
    }

    /// The label of a stream that it ended.
    pub(super) fn reason(&self) -> MoveReason {
        match self {
            Self::Unreachable(_) | Self::Broken(_) => MoveReason::Connection,
            Self::Silent(_) | Self::Deadline => MoveReason::Timeout,
            _ => MoveReason::Worker,
        }
    }
}

/// An answer that has begun.
#[derive(Debug)]
pub(super) enum Answer {
    /// All of it.
    Whole { status: StatusCode, kind: HeaderValue, bytes: Bytes },
    /// The beginning of a very long one.
    Long { status: StatusCode, kind: HeaderValue, begun: Bytes, body: Incoming },
    /// A stream of events.
    Events { first: Bytes, body: Incoming },
}

/// A server that has begun to answer.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) worker: Arc<Worker>,
    pub(super) occupied: Occupied,
    /// When it was sent.
    pub(super) sent_at: Instant,
    pub(super) answer: Answer,
    /// A stream may be silent for so long.
    pub(super) silent_timeout: Duration,
    pub(super) renames: Option<Rename>,
}

impl Opened {
    /// Bytes of the answer as the client gets them.
    pub(super) fn rename(&self, bytes: Bytes) -> Bytes {
        match &self.renames {
            Some(rename) => rename.apply(bytes),
            None => bytes,
        }
    }
}

/// Sends the request to the server of a placement.
pub(super) async fn open(forwarder: &Forwarder, asked: &Asked, placement: Placement) -> Result<Opened, Lost> {
    let Placement { decode: worker, predicted, .. } = placement;
    let all = u32::try_from(asked.request.words.len()).unwrap_or(u32::MAX);
    let mut occupied = worker.occupy(predicted.map_or(all, |predicted| predicted.uncached_tokens));
    let strange = || Lost::Unreachable("its server has no usable URL".to_owned());
    let server = forwarder.servers.of(&worker.member).ok_or_else(strange)?;
    if worker.own_requests() > server.pool.in_flight_max {
        // Another request was quicker.
        return Err(Lost::Overloaded);
    }
    let spec = &server.pool.options.servers;
    let placed = Instant::now();
    let beginning = begin(server.send(asked).ok_or_else(strange)?);
    let patience = Patience::before_the_answer(asked, forwarder.timeouts());
    let answer = patience.wait(&worker, beginning).await?;
    worker.answers(Instant::now());
    occupied.prefilled();
    if let Some(predicted) = predicted.filter(|_| asked.request.stream) {
        worker.calibrate(predicted.prefill_s, placed.elapsed().as_secs_f64());
    }
    let renames = Rename::between(spec.model.as_deref(), asked.request.model());
    let silent_timeout = spec.silent_timeout;
    Ok(Opened { answer, occupied, sent_at: placed, silent_timeout, renames, worker: Arc::clone(&worker) })
}

/// How long a server is waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    deadline: Instant,
    /// Silence that is too long whatever the worker says; none where an answer comes as a whole.
    silence: Option<Duration>,
    /// Silence that is too long if the worker says that its server is not well.
    unwell: Duration,
}

impl Patience {
    fn before_the_answer(asked: &Asked, timeouts: &Timeouts) -> Self {
        let silence = asked.request.stream.then_some(timeouts.first_token);
        Self { deadline: asked.deadline, silence, unwell: timeouts.frozen }
    }

    /// Once bytes flow.
    pub(super) fn within_the_answer(asked: &Asked, timeouts: &Timeouts, silence: Duration) -> Self {
        Self { deadline: asked.deadline, silence: Some(silence), unwell: timeouts.frozen }
    }

    /// Whether a server that has been silent since then is given up.
    pub(super) fn check(&self, worker: &Worker, since: Instant, now: Instant) -> Result<(), Lost> {
        if now >= self.deadline {
            return Err(Lost::Deadline);
        }
        let quiet = now.saturating_duration_since(since);
        let unwell = quiet >= self.unwell && worker.is_unhealthy();
        let silent = self.silence.is_some_and(|silence| quiet >= silence);
        if unwell || silent { Err(Lost::Silent(quiet)) } else { Ok(()) }
    }

    async fn wait<T>(&self, worker: &Worker, what: impl Future<Output = Result<T, Lost>>) -> Result<T, Lost> {
        let since = Instant::now();
        let mut what = pin!(what);
        loop {
            match select(what.as_mut(), pin!(tokio::time::sleep(TICK))).await {
                Either::Left((out, _)) => return out,
                Either::Right(_) => self.check(worker, since, Instant::now())?,
            }
        }
    }
}

/// Waits for the head of the answer and its first bytes, or all of it if it is none of events.
async fn begin(call: ResponseFuture) -> Result<Answer, Lost> {
    let response = call.await.map_err(|error| {
        let text = chain(&error);
        if error.is_connect() { Lost::Unreachable(text) } else { Lost::Broken(text) }
    })?;
    let status = response.status();
    if !status.is_success() {
        return Err(refused(response).await);
    }
    if response.headers().get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(Lost::Broken("it compresses its answers although it was asked not to".to_owned()));
    }
    let json = HeaderValue::from_static("application/json");
    let kind = response.headers().get(CONTENT_TYPE).cloned().unwrap_or(json);
    let mut body = response.into_body();
    if kind.as_bytes().starts_with(b"text/event-stream") {
        return match next(&mut body).await? {
            Some(first) => Ok(Answer::Events { first, body }),
            None => Err(Lost::Broken("a stream without an event".to_owned())),
        };
    }
    let mut first: Option<Bytes> = None;
    let mut all = BytesMut::new();
    while let Some(data) = next(&mut body).await? {
        match first.take() {
            None if all.is_empty() => first = Some(data),
            before => {
                all.extend_from_slice(before.as_deref().unwrap_or_default());
                all.extend_from_slice(&data);
            }
        }
        if all.len() > WHOLE_MAX_BYTES {
            return Ok(Answer::Long { status, kind, begun: all.freeze(), body });
        }
    }
    Ok(Answer::Whole { status, kind, bytes: first.unwrap_or_else(|| all.freeze()) })
}

/// The next bytes of a body; `None` at its end.
async fn next(body: &mut Incoming) -> Result<Option<Bytes>, Lost> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Err(error)) => return Err(Lost::Broken(chain(&error))),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

/// What an answer that is no good one means.
async fn refused(response: Response<Incoming>) -> Lost {
    let status = response.status();
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Lost::Denied(status),
        StatusCode::TOO_MANY_REQUESTS => Lost::Overloaded,
        StatusCode::SERVICE_UNAVAILABLE => Lost::Unavailable,
        // It will not learn what the request asks for.
        StatusCode::NOT_IMPLEMENTED => relayed(response).await,
        status if status.is_client_error() => relayed(response).await,
        status => Lost::Failing(status),
    }
}

async fn relayed(response: Response<Incoming>) -> Lost {
    let status = response.status();
    let (most, patience) = REFUSAL_MAX;
    let body = Limited::new(response.into_body(), most).collect();
    let bytes = match tokio::time::timeout(patience, body).await {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(_)) | Err(_) => Bytes::new(),
    };
    Lost::Refused(Box::new(reply::refused_by_server(status, &bytes)))
}
