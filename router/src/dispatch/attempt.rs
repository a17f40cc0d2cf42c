//! One attempt at a generation: a decode worker, perhaps a prefill worker, both called at once.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use baton_config::HandoffId;
use baton_config::protocol::{
    FailureCode, FinishReason, GenerateEvent, GenerateRequest, HandoffRef, PrefillReply, PrefillReport,
    PrefillRequest, Sampling, TokenLogprob,
};
use bytes::Bytes;
use futures_util::FutureExt as _;
use http::uri::Authority;
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper_util::client::legacy::ResponseFuture;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::call::{self, CallError, Caller};
use super::frames::{Found, Item, Stream, Way};
use super::lines::{LineError, Lines};
use super::place::Placement;
use super::{Death, Dispatcher, Job, Suspects};
use crate::alarm::Alarm;
use crate::fleet::{Occupied, Worker};
use crate::metrics::{Metrics, MoveReason};
use crate::options::Timeouts;
use crate::schedule::Predicted;

/// How often a stream over a connection of its own looks whether its worker still lives, if no token comes.
const TICK: Duration = Duration::from_millis(250);
/// For the body of an error answer, and for what is left after the last token.
const LINGER: Duration = Duration::from_secs(2);

/// A connection that breaks sooner after a request was sent may have been broken before.
const HEARD_AFTER: Duration = Duration::from_millis(20);

/// The workers of an attempt.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) decode: Arc<Worker>,
    pub(super) prefill: Option<Arc<Worker>>,
}

/// What a worker sent.
#[derive(Debug)]
pub(super) enum Event {
    Token { token: u32, logprob: Option<TokenLogprob>, logits_digest: Option<u64> },
    Prefilled(PrefillReport),
    Finished(FinishReason),
}

/// Why an attempt ended without an end.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Lost {
    /// Never connected.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// The connection broke, or ended early.
    #[error("connection lost: {0}")]
    Broken(String),
    /// Nothing for too long.
    #[error("no progress for {} ms", .0.as_millis())]
    Silent(Duration),
    /// The request's time is over: nobody's fault.
    #[error("the request's time is over")]
    Deadline,
    /// The worker is full.
    #[error("overloaded")]
    Overloaded,
    /// The worker is leaving, or in another life than the view says.
    #[error("unavailable: {0}")]
    Unavailable(String),
    /// The worker says that this can never be served.
    #[error("refused: {0}")]
    Refused(String),
    /// The worker's KV cache is too small for the sequence.
    #[error("too long: {0}")]
    TooLong(String),
    /// The engine broke.
    #[error("engine failed: {0}")]
    Engine(String),
    /// Bytes that are not of the protocol.
    #[error("not the protocol: {0}")]
    Protocol(String),
}

impl Lost {
    /// A breach of the protocol.
    pub(super) fn protocol(what: &str) -> Self {
        Self::Protocol(what.to_owned())
    }

    /// Whether others should keep away from the worker for a while.
    pub(super) fn unreachable(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Broken(_) | Self::Silent(_) | Self::Unavailable(_))
    }

    /// Whether the worker never took the request: another one may, or this one later.
    pub(super) fn began_nothing(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Unavailable(_) | Self::Overloaded)
    }

    /// The label of the migration that follows.
    pub(super) fn reason(&self) -> MoveReason {
        match self {
            Self::Unreachable(_) | Self::Broken(_) => MoveReason::Connection,
            Self::Silent(_) | Self::Deadline => MoveReason::Timeout,
            Self::Overloaded
            | Self::Unavailable(_)
            | Self::Refused(_)
            | Self::TooLong(_)
            | Self::Engine(_) => MoveReason::Worker,
            Self::Protocol(_) => MoveReason::Protocol,
        }
    }

    fn of_code(code: FailureCode, message: String) -> Self {
        match code {
            FailureCode::Refused => Self::Refused(message),
            FailureCode::TooLong => Self::TooLong(message),
            FailureCode::Overloaded => Self::Overloaded,
            FailureCode::Unavailable => Self::Unavailable(message),
            FailureCode::Engine => Self::Engine(message),
        }
    }
}

/// The whole chain of causes on one line, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl From<CallError> for Lost {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Connect(_) => Self::Unreachable(chain(&error)),
            CallError::Broken(_) => Self::Broken(chain(&error)),
            CallError::Refused { code, message, .. } => Self::of_code(code, message),
            CallError::Protocol(_) => Self::Protocol(chain(&error)),
        }
    }
}

impl From<LineError> for Lost {
    fn from(error: LineError) -> Self {
        Self::Protocol(chain(&error))
    }
}

/// The call to the prefill worker, until it answers.
type PrefillCall = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The call to the decode worker, until its answer begins.
type Opening = Pin<Box<dyn Future<Output = Result<Source, Lost>> + Send>>;

/// The answer of the decode worker.
enum Source {
    /// Not begun.
    Opening(Opening),
    /// Streaming, over a connection of its own.
    Lines(Box<(Incoming, Lines)>),
    /// Streaming, over the connection that it shares with others.
    Frames(Stream),
}

impl Source {
    /// Begins a generation; `request` is ready to be sent at once where it is known how.
    fn open(caller: &Caller, worker: &Worker, request: &GenerateRequest) -> Self {
        let (authority, epoch) = (worker.authority(), worker.member.epoch);
        let finding = match worker.lane().find(caller, authority, epoch) {
            Found::Now(Way::Plain) => {
                return Self::Opening(Box::pin(opened(post(caller, authority, request))));
            }
            Found::Now(Way::Frames(link)) => match Stream::open(&link, request) {
                Ok(stream) => return Self::Frames(stream),
                Err(lost) => return Self::Opening(Box::pin(std::future::ready(Err(lost)))),
            },
            Found::Soon(finding) => finding,
        };
        let (caller, authority, request) = (caller.clone(), authority.clone(), request.clone());
        Self::Opening(Box::pin(async move {
            match finding.await? {
                Way::Frames(link) => Stream::open(&link, &request).map(Self::Frames),
                Way::Plain => opened(post(&caller, &authority, &request)).await,
            }
        }))
    }

    /// What is there already.
    fn ready(&mut self) -> Result<Option<Item>, Lost> {
        match self {
            Self::Opening(_) => Ok(None),
            Self::Lines(answer) => {
                let event = answer.1.next_event()?;
                Ok(event.map(|event| Item::Event(Box::new(event))))
            }
            Self::Frames(stream) => Ok(stream.ready()),
        }
    }

    /// Reads the next piece of the answer.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Item>, Lost>> {
        match self {
            Self::Opening(call) => {
                *self = ready!(call.as_mut().poll(cx))?;
                Poll::Ready(Ok(None))
            }
            Self::Frames(stream) => stream.poll_next(cx).map_ok(Some),
            Self::Lines(answer) => {
                let (body, lines) = &mut **answer;
                Poll::Ready(match ready!(Pin::new(body).poll_frame(cx)) {
                    Some(Ok(frame)) => {
                        if let Some(data) = frame.data_ref() {
                            lines.push(data)?;
                        }
                        Ok(None)
                    }
                    Some(Err(error)) => Err(Lost::Broken(chain(&error))),
                    None if lines.is_mid_line() => {
                        Err(Lost::Broken("the stream ended within a line".to_owned()))
                    }
                    None => Err(Lost::Broken("the stream ended without an end".to_owned())),
                })
            }
        }
    }
}

/// One attempt.
pub(super) struct Attempt {
    pub(super) pair: Pair,
    source: Source,
    occupied: Occupied,
    prefill: Option<PrefillCall>,
    timeouts: Timeouts,
    /// Since when there is nothing although somebody waits for it: while nobody takes what came, the worker may have no credit.
    waiting_since: Option<Instant>,
    deadline: Instant,
    begun: bool,
    placed_at: Instant,
    predicted: Option<Predicted>,
    /// The stream cannot go on elsewhere once it has begun.
    irreplaceable: bool,
    /// Where there is no carrier that looks at the clock for all of its streams.
    tick: Option<Alarm>,
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt")
            .field("pair", &self.pair)
            .field("begun", &self.begun)
            .finish_non_exhaustive()
    }
}

impl Attempt {
    /// Sends both calls.
    pub(super) fn open(
        dispatcher: &Dispatcher,
        job: &Job,
        sent: &[u32],
        placement: Placement,
        handoff: Option<HandoffId>,
    ) -> Self {
        let Placement { decode, prefill, predicted } = placement;
        let pair = Pair { decode, prefill };
        let mut tokens = Vec::with_capacity(job.prompt.len() + sent.len());
        tokens.extend_from_slice(&job.prompt);
        tokens.extend_from_slice(sent);
        let all = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        let uncached = predicted.map_or(all, |predicted| predicted.uncached_tokens);
        let generated = u32::try_from(sent.len()).unwrap_or(u32::MAX);
        let remote = handoff.zip(pair.prefill.as_ref());
        let mut generate = GenerateRequest {
            request_id: job.request_id.clone(),
            tokens,
            generated,
            max_tokens: job.max_tokens - generated,
            sampling: job.sampling.clone(),
            cache_salt: job.cache_salt,
            logits_digest: job.logits_digest,
            whole: job.whole,
            handoff: remote.map(|(id, prefill)| HandoffRef {
                id,
                own_epoch: pair.decode.member.epoch,
                peer: prefill.peer(),
            }),
        };
        let source = Source::open(&dispatcher.caller, &pair.decode, &generate);
        let prefill = remote.map(|(id, prefill)| {
            let request = PrefillRequest {
                request_id: job.request_id.clone(),
                tokens: std::mem::take(&mut generate.tokens),
                generated,
                sampling: job.sampling.clone(),
                cache_salt: job.cache_salt,
                logits_digest: job.logits_digest,
                handoff: HandoffRef { id, own_epoch: prefill.member.epoch, peer: pair.decode.peer() },
            };
            let body = encode(&request);
            let call = PrefillJob {
                caller: dispatcher.caller.clone(),
                metrics: Arc::clone(&dispatcher.metrics),
                prefill: Arc::clone(prefill),
                decode: Arc::clone(&pair.decode),
                handoff: id,
                suspects: Arc::clone(&dispatcher.suspects),
                prompt: Arc::clone(&job.prompt),
                owner: job.owner,
                sampling: request.sampling,
                _occupied: prefill.occupy(uncached),
            };
            Box::pin(call.run(body)) as PrefillCall
        });
        let occupied = pair.decode.occupy(if prefill.is_some() { 0 } else { uncached });
        Self {
            pair,
            source,
            occupied,
            prefill,
            timeouts: dispatcher.timeouts.clone(),
            waiting_since: None,
            deadline: job.deadline,
            begun: false,
            placed_at: Instant::now(),
            predicted,
            irreplaceable: job.logits_digest,
            tick: None,
        }
    }

    /// The next event.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, Lost>> {
        loop {
            if let Some(item) = self.source.ready()? {
                return Poll::Ready(self.take(item));
            }
            if let Poll::Ready(read) = self.source.poll_read(cx) {
                let read = read?;
                self.waiting_since = None;
                match read {
                    Some(item) => return Poll::Ready(self.take(item)),
                    None => continue,
                }
            }
            if let Some(prefill) = &mut self.prefill
                && prefill.as_mut().poll(cx).is_ready()
            {
                self.prefill = None;
            }
            let since = *self.waiting_since.get_or_insert_with(Instant::now);
            ready!(self.poll_tick(cx));
            self.check_progress(since)?;
        }
    }

    /// Ready when it is time to look whether the worker still lives.
    fn poll_tick(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Source::Frames(stream) = &mut self.source {
            return if stream.take_tick() { Poll::Ready(()) } else { Poll::Pending };
        }
        self.tick.get_or_insert_with(|| Alarm::after(TICK)).poll(cx)
    }

    fn take(&mut self, item: Item) -> Result<Event, Lost> {
        let event = match item {
            Item::Token(token) => {
                self.begin();
                return Ok(Event::Token { token, logprob: None, logits_digest: None });
            }
            Item::Event(event) => *event,
        };
        match event {
            GenerateEvent::Token { token, logprob, logits_digest } => {
                self.begin();
                Ok(Event::Token { token, logprob, logits_digest })
            }
            GenerateEvent::Prefilled(report) => Ok(Event::Prefilled(report)),
            GenerateEvent::Finished { reason } => Ok(Event::Finished(reason)),
            GenerateEvent::Failed { code, message } => Err(Lost::of_code(code, message)),
        }
    }

    /// When it was sent.
    pub(super) fn placed_at(&self) -> Instant {
        self.placed_at
    }

    /// Whether it was sent so long ago that its worker had it, and not only a connection that had broken before.
    pub(super) fn was_heard(&self, now: Instant) -> bool {
        now.duration_since(self.placed_at) >= HEARD_AFTER
    }

    /// Notes that tokens come.
    fn begin(&mut self) {
        if !self.begun {
            self.begun = true;
            self.occupied.prefilled();
            self.calibrate();
        }
    }

    /// Compares the time to the first token with what was expected of the worker that computed the prompt.
    fn calibrate(&self) {
        let Some(predicted) = &self.predicted else { return };
        let actual_s = self.placed_at.elapsed().as_secs_f64() - predicted.other_s;
        let worker = self.pair.prefill.as_ref().unwrap_or(&self.pair.decode);
        worker.calibrate(predicted.prefill_s, actual_s);
    }

    /// The decode worker says how the handoff went; `true` when its pair is avoided from now on.
    pub(super) fn handoff_ended(&self, report: &PrefillReport) -> bool {
        let Some(prefill) = &self.pair.prefill else { return false };
        let well = report.fallback.is_none();
        // A decode worker that does without the blocks, because few are missing, says nothing about the way to them.
        if well && report.imported_tokens == 0 {
            return false;
        }
        self.pair.decode.handed_off(prefill, well, Instant::now())
    }

    /// Whether a worker that nothing came from since then is given up.
    fn check_progress(&mut self, since: Instant) -> Result<(), Lost> {
        let now = Instant::now();
        if let Some(tick) = &mut self.tick {
            tick.reset(now + TICK);
        }
        if now >= self.deadline {
            return Err(Lost::Deadline);
        }
        let quiet = now.duration_since(since);
        let patience = if self.begun { self.timeouts.progress } else { self.timeouts.first_token };
        // A false alarm costs a stream that cannot be replayed its life: that one waits for certainty.
        let hasty = !(self.begun && self.irreplaceable);
        let frozen =
            hasty && quiet >= self.timeouts.frozen && self.pair.decode.is_suspect(now, self.timeouts.frozen);
        if quiet < patience && !frozen {
            return Ok(());
        }
        if let Source::Frames(stream) = &self.source {
            // It may be the connection that is dead: others get another one.
            self.pair.decode.lane().retire(stream.link());
        }
        Err(Lost::Silent(quiet))
    }

    /// Lets what is left of a finished attempt end by itself, so that its connections can be used again.
    pub(super) fn linger(self, tracker: &TaskTracker) {
        let Self { source, prefill, occupied, .. } = self;
        drop(occupied);
        let body = match source {
            Source::Lines(mut answer) => match answer.0.frame().now_or_never() {
                Some(None) => None,
                _ => Some(answer.0),
            },
            Source::Opening(_) | Source::Frames(_) => None,
        };
        if body.is_none() && prefill.is_none() {
            return;
        }
        tracker.spawn(async move {
            let rest = async move {
                if let Some(mut body) = body {
                    while let Some(Ok(_)) = body.frame().await {}
                }
                if let Some(prefill) = prefill {
                    prefill.await;
                }
            };
            let _ = tokio::time::timeout(LINGER, rest).await;
        });
    }
}

/// Begins a generation over a connection of its own.
fn post(caller: &Caller, authority: &Authority, request: &GenerateRequest) -> ResponseFuture {
    caller.post(authority, "/v1/generate", encode(request))
}

/// Waits for the head of the answer and, if that is an error, for its body.
async fn opened(call: ResponseFuture) -> Result<Source, Lost> {
    let response = call.await.map_err(call::sort)?;
    match tokio::time::timeout(LINGER, call::accepted(response)).await {
        Ok(accepted) => Ok(Source::Lines(Box::new((accepted?, Lines::default())))),
        Err(_) => Err(Lost::protocol("an error answer without an end")),
    }
}

fn encode<T: serde::Serialize>(message: &T) -> Bytes {
    match serde_json::to_vec(message) {
        Ok(bytes) => Bytes::from(bytes),
        Err(error) => {
            // Only non-finite numbers could do this and they are refused at the edge; the worker will refuse this too.
            tracing::error!(%error, "a message could not be written");
            Bytes::new()
        }
    }
}

/// One call to a prefill worker, for as long as it takes.
struct PrefillJob {
    caller: Caller,
    metrics: Arc<Metrics>,
    prefill: Arc<Worker>,
    decode: Arc<Worker>,
    handoff: HandoffId,
    suspects: Arc<Suspects>,
    prompt: Arc<[u32]>,
    owner: u64,
    sampling: Sampling,
    _occupied: Occupied,
}

impl PrefillJob {
    /// Calls, and where that fails tells the decode worker, which then prefills itself instead of waiting.
    async fn run(self, body: Bytes) {
        let name = &self.prefill.member.worker;
        let asked = Instant::now();
        let error = match self.call(body).await {
            Ok(reply) => {
                tracing::debug!(worker = %name, outcome = ?reply.outcome, "prefill done");
                return;
            }
            Err(error) => error,
        };
        self.metrics.prefill_failures.inc();
        let now = Instant::now();
        if matches!(error, CallError::Broken(_)) && now.duration_since(asked) >= HEARD_AFTER {
            let print = self.suspects.print(&self.prompt, self.owner, &self.sampling);
            self.suspects.broke(print, Death::of(&self.prefill, asked, now));
        }
        let leaving = matches!(error, CallError::Refused { code: FailureCode::Unavailable, .. });
        if leaving || matches!(error, CallError::Connect(_)) {
            self.prefill.mark_down(now);
        }
        tracing::warn!(worker = %name, error = chain(&error), "prefill failed");
        if let Err(error) = self.caller.end_handoff(self.decode.authority(), self.handoff).await {
            // It finds out by itself, only later.
            tracing::debug!(worker = %self.decode.member.worker, error = chain(&error), "handoff not ended");
        }
    }

    async fn call(&self, body: Bytes) -> Result<PrefillReply, CallError> {
        let answer = self.caller.post(self.prefill.authority(), "/v1/prefill", body);
        let body = call::accepted(answer.await.map_err(call::sort)?).await?;
        serde_json::from_slice(&call::read_whole(body).await?).map_err(CallError::Protocol)
    }
}
