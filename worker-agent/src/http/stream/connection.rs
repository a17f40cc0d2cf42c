//! One connection of frames: one task that reads, writes, and owns its generations.

use std::sync::Arc;
use std::time::Duration;

use baton_config::Epoch;
use baton_config::frames::{self, Command, FrameError, Open, Reader, StreamId};
use baton_config::protocol::{FailureCode, GenerateEvent};
use baton_engine::EngineEvent;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::Instant;

use super::super::Shared;
use super::super::fault::Fault;
use super::super::prompt_cost::PromptCost;
use super::check_life;
use super::start::{self, Held, Inbox, Started};
use super::streams::{Breach, Out, Pace, Reading, Streams};
use crate::driver::DecodeNews;
use crate::in_flight::Permit;
use crate::inbox::{Item, Key};
use crate::metrics::{RequestEnd, RequestKind, TokenKind};
use crate::validate;

/// Bytes that wait to be written at most, but for the frame that reaches them; the rest waits where it is bounded.
const OUT_BYTES: usize = 256 << 10;
/// Between two looks for clients that take nothing, and for a router that does not.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Tokens that nobody reads before the last one wait for each other for so long: one write for all of them, and one wake-up of
/// the router.
const HOLD: Duration = Duration::from_millis(50);
/// For what is left to write when the worker stops.
const FAREWELL: Duration = Duration::from_secs(1);

/// What became of a generation's start.
#[derive(Debug)]
enum Stage {
    /// The engine has not answered; what it and the handoff say meanwhile is kept.
    Starting(Vec<(Key, Item<Result<Started, Fault>>)>),
    /// Tokens come.
    Running { held: Held, turn: u32, cost: PromptCost },
    /// Its last event waits to be written.
    Over(RequestEnd),
}

/// A generation.
#[derive(Debug)]
struct Generation {
    stage: Stage,
    _permit: Option<Permit>,
}

/// Why a connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Breach(#[from] Breach),
}

/// A connection.
pub(super) struct Connection {
    shared: Arc<Shared>,
    /// The life of this worker that its router means.
    epoch: Epoch,
    inbox: Arc<Inbox>,
    streams: Streams<Generation>,
    reader: Reader,
    out: Vec<u8>,
    /// Bytes of `out` that are on their way.
    written: usize,
    /// Since when nothing was written although something is to be.
    stuck: Option<Instant>,
    /// Tokens not counted yet.
    tokens: u64,
}

impl Connection {
    /// A connection whose requests have at most `open_max` bytes.
    pub(super) fn new(shared: Arc<Shared>, epoch: Epoch, open_max: usize) -> Self {
        Self {
            shared,
            epoch,
            inbox: Arc::new(Inbox::new()),
            streams: Streams::new(),
            reader: Reader::new(open_max),
            out: Vec::new(),
            written: 0,
            stuck: None,
            tokens: 0,
        }
    }

    /// Serves until either side ends it; then its generations end too.
    pub(super) async fn run<S: AsyncRead + AsyncWrite + Unpin>(mut self, io: S) {
        let (mut input, mut output) = tokio::io::split(io);
        let (abort, inbox) = (self.shared.abort.clone(), Arc::clone(&self.inbox));
        let mut looks = tokio::time::interval(LOOK_EVERY.min(self.shared.stalled / 2));
        let mut held = std::pin::pin!(tokio::time::sleep(HOLD));
        let mut holds = false;
        let mut items = Vec::new();
        loop {
            inbox.take(&mut items);
            for (key, item) in items.drain(..) {
                self.take(key, item).await;
            }
            self.fill();
            self.set_paces().await;
            if self.streams.is_holding() && !std::mem::replace(&mut holds, true) {
                held.as_mut().reset(Instant::now() + HOLD);
            }
            let unwritten = self.written < self.out.len();
            tokio::select! {
                biased;
                () = abort.cancelled() => {
                    self.fail_all();
                    break self.farewell(&mut output).await;
                }
                sent = output.write(&self.out[self.written..]), if unwritten => match sent {
                    Ok(0) | Err(_) => break,
                    Ok(bytes) => self.sent(bytes),
                },
                read = input.read(self.reader.room()) => match read {
                    Ok(0) | Err(_) => break,
                    Ok(bytes) => {
                        self.reader.filled(bytes);
                        if let Err(error) = self.obey() {
                            tracing::warn!(%error, "a router is cut off: what it sends is not the protocol");
                            break;
                        }
                    }
                },
                () = inbox.arrived() => {}
                () = held.as_mut(), if holds => {
                    holds = false;
                    self.streams.release();
                }
                _ = looks.tick() => if self.look() { break },
            }
        }
        self.end();
    }

    /// Takes what is ready to the buffer of what is to be written.
    fn fill(&mut self) {
        if self.tokens > 0 {
            self.shared.metrics.tokens(TokenKind::Generated, std::mem::take(&mut self.tokens));
        }
        let mut ended = Vec::new();
        let now = Instant::now();
        self.streams.write(now.into_std(), &mut self.out, OUT_BYTES, &mut ended);
        if self.out.len() > self.written {
            self.stuck.get_or_insert(now);
        }
        for generation in ended {
            self.count(&generation.stage);
        }
    }

    /// Stops the engine where a reader does not keep up, and lets it go on where one has.
    async fn set_paces(&mut self) {
        for pace in self.streams.take_paces() {
            let (Pace::Pause(id) | Pace::Resume(id)) = pace;
            let Some(Generation { stage: Stage::Running { held, .. }, .. }) = self.streams.get_mut(id) else {
                continue;
            };
            let (engine, seq) = (&self.shared.engine, held.seq);
            match pace {
                Pace::Pause(_) => engine.pause(seq).await,
                Pace::Resume(_) => engine.resume(seq).await,
            }
        }
    }

    fn sent(&mut self, bytes: usize) {
        self.written += bytes;
        self.stuck = None;
        if self.written == self.out.len() {
            self.out.clear();
            self.written = 0;
            self.out.shrink_to(OUT_BYTES);
        }
    }

    /// Does what the frames say that have arrived.
    fn obey(&mut self) -> Result<(), Unusable> {
        while let Some((kind, payload)) = self.reader.next_frame()? {
            match Command::decode(kind, payload)? {
                Command::Open(open) => {
                    // What is wrong within a request is its own affair.
                    let generation = begin(&self.shared, self.epoch, &self.inbox, &open);
                    let (stage, permit, reading, fault) = match generation {
                        Ok((permit, reading)) => (Stage::Starting(Vec::new()), Some(permit), reading, None),
                        Err(fault) => (Stage::Over(RequestEnd::Refused), None, Reading::Each, Some(fault)),
                    };
                    self.streams.open(
                        open.id,
                        open.credit,
                        reading,
                        Generation { stage, _permit: permit },
                    )?;
                    if let Some(fault) = fault {
                        self.streams.push(open.id, Out::Last(Box::new(fault.into())));
                    }
                }
                Command::Cancel(id) => {
                    if let Some(generation) = self.streams.remove(id) {
                        leave(&self.shared, generation, RequestEnd::Cancelled);
                    }
                }
                Command::Credit(id, tokens) => self.streams.credit(id, tokens)?,
            }
        }
        Ok(())
    }

    /// Something happened to a generation.
    async fn take(&mut self, key: Key, item: Item<Result<Started, Fault>>) {
        let Some(generation) = self.streams.get_mut(key.stream) else {
            // It was given up while it began.
            return self.let_go(item);
        };
        match (&mut generation.stage, item) {
            (stage @ Stage::Starting(_), Item::Started(started)) => match started {
                Ok(Started { held, turn, cost }) => {
                    let early = std::mem::replace(stage, Stage::Running { held, turn, cost });
                    if let Stage::Starting(early) = early {
                        for (key, item) in early {
                            self.go_on(key, item).await;
                        }
                    }
                }
                Err(fault) => {
                    *stage = Stage::Over(RequestEnd::Refused);
                    if fault.is_stale() {
                        self.shared.metrics.stale_epoch.inc();
                    }
                    self.streams.push(key.stream, Out::Last(Box::new(fault.into())));
                }
            },
            (Stage::Starting(early), item) => early.push((key, item)),
            // Nothing that was begun is left of it.
            (Stage::Over(_), _) => {}
            (Stage::Running { .. }, item) => self.go_on(key, item).await,
        }
    }

    /// Something happened to a generation that the engine has taken.
    async fn go_on(&mut self, key: Key, item: Item<Result<Started, Fault>>) {
        let Some(Generation { stage: Stage::Running { held, turn, cost }, .. }) =
            self.streams.get_mut(key.stream)
        else {
            return;
        };
        if *turn != key.turn {
            return;
        }
        match item {
            Item::Engine(EngineEvent::Token { token, logprob, logits_digest, .. }) => {
                if cost.is_due() {
                    let report = GenerateEvent::Prefilled(cost.report(&self.shared.metrics));
                    self.streams.push(key.stream, Out::Aside(Box::new(report)));
                }
                self.tokens += 1;
                let out = match (logprob, logits_digest) {
                    (None, None) => Out::Token(token),
                    (logprob, logits_digest) => {
                        Out::Rich(Box::new(GenerateEvent::Token { token, logprob, logits_digest }))
                    }
                };
                self.streams.push(key.stream, out);
            }
            Item::Engine(EngineEvent::Admitted { cached_tokens, blocks, queued, .. }) => {
                cost.admitted(cached_tokens, queued);
                if let Some(id) = held.handoff {
                    self.shared.handoffs.decode_admitted(id, cached_tokens, blocks).await;
                }
            }
            Item::Engine(EngineEvent::Finished { reason, .. }) => {
                self.finish(key.stream, RequestEnd::Ok, GenerateEvent::Finished { reason });
            }
            Item::Engine(EngineEvent::Failed { error, .. }) => self.fail(key.stream, error.to_string()),
            Item::Handoff(news) => self.take_news(key.stream, news),
            Item::Engine(EngineEvent::Prefilled { .. }) | Item::Started(_) => {}
        }
    }

    fn take_news(&mut self, id: StreamId, news: DecodeNews) {
        let Some(Generation { stage: Stage::Running { cost, .. }, .. }) = self.streams.get_mut(id) else {
            return;
        };
        if let Err(unfenced) = cost.take_news(news) {
            self.fail(id, unfenced.to_string());
        }
    }

    fn fail(&mut self, id: StreamId, message: String) {
        tracing::warn!(%message, "a request failed");
        self.shared.note_error(&message);
        self.finish(id, RequestEnd::Failed, GenerateEvent::Failed { code: FailureCode::Engine, message });
    }

    /// Nothing more comes of a generation but its last event, which waits for its turn.
    fn finish(&mut self, id: StreamId, end: RequestEnd, last: GenerateEvent) {
        let Some(generation) = self.streams.get_mut(id) else { return };
        let before = std::mem::replace(&mut generation.stage, Stage::Over(end));
        match before {
            // The engine has let go of what has ended well, but for the handoff.
            Stage::Running { held, .. } if end != RequestEnd::Ok || held.handoff.is_some() => {
                let shared = Arc::clone(&self.shared);
                self.shared.tasks.spawn(async move { held.let_go(&shared).await });
            }
            Stage::Starting(_) | Stage::Running { .. } | Stage::Over(_) => {}
        }
        self.streams.push(id, Out::Last(Box::new(last)));
    }

    /// The worker's time is over: says so of every generation that is not.
    fn fail_all(&mut self) {
        for id in self.streams.ids() {
            let over = self.streams.get_mut(id).is_none_or(|one| matches!(one.stage, Stage::Over(_)));
            if !over {
                let message = "the worker's time to drain is over".to_owned();
                let last = GenerateEvent::Failed { code: FailureCode::Unavailable, message };
                self.finish(id, RequestEnd::Failed, last);
            }
        }
    }

    /// Writes what can still be written.
    async fn farewell(&mut self, output: &mut (impl AsyncWrite + Unpin)) {
        let told = async {
            loop {
                self.fill();
                if self.written == self.out.len() {
                    return output.shutdown().await;
                }
                let bytes = output.write(&self.out[self.written..]).await?;
                if bytes == 0 {
                    return Ok(());
                }
                self.sent(bytes);
            }
        };
        if !matches!(tokio::time::timeout(FAREWELL, told).await, Ok(Ok(()))) {
            tracing::debug!("a router did not hear that this worker ends");
        }
    }

    /// Looks for those who left without saying so; whether the router is one of them.
    fn look(&mut self) -> bool {
        let now = Instant::now();
        let stalled = self.shared.stalled;
        for id in self.streams.blocked_for(now.into_std(), stalled) {
            if let Some(generation) = self.streams.remove(id) {
                tracing::info!(stream = id.0, "a generation is given up: nobody takes its tokens");
                leave(&self.shared, generation, RequestEnd::Cancelled);
                self.tell_given_up(id);
            }
        }
        self.stuck.is_some_and(|since| now.duration_since(since) >= stalled)
    }

    /// Says that no more comes of a generation, although some of it was not taken: should its client take the rest after
    /// all, its router has it made elsewhere, instead of waiting for this worker.
    fn tell_given_up(&mut self, id: StreamId) {
        let message = format!("no token was taken for {} s", self.shared.stalled.as_secs());
        let last = GenerateEvent::Failed { code: FailureCode::Engine, message };
        if let Err(error) = frames::event(&mut self.out, id, &last) {
            tracing::error!(%error, "an event could not be written");
        }
    }

    fn count(&self, stage: &Stage) {
        if let Stage::Over(end) = stage {
            self.shared.metrics.request(RequestKind::Generate, *end);
        }
    }

    /// Gives everything back.
    fn end(mut self) {
        let left: Vec<Generation> = self.streams.drain().collect();
        for generation in left {
            leave(&self.shared, generation, RequestEnd::Cancelled);
        }
        for (_, item) in self.inbox.close() {
            self.let_go(item);
        }
    }

    /// Gives back what came too late.
    fn let_go(&self, item: Item<Result<Started, Fault>>) {
        if let Item::Started(Ok(Started { held, .. })) = item {
            let shared = Arc::clone(&self.shared);
            self.shared.tasks.spawn(async move { held.let_go(&shared).await });
        }
    }
}

/// Checks a request and has it started.
fn begin(
    shared: &Arc<Shared>,
    epoch: Epoch,
    inbox: &Arc<Inbox>,
    open: &Open<'_>,
) -> Result<(Permit, Reading), Fault> {
    check_life(shared, epoch)?;
    let request = open.request().map_err(|error| Fault::refused(error.to_string()))?;
    validate::generate(&request, &shared.model)?;
    let permit = shared.admit()?;
    let reading = if request.whole { Reading::Together } else { Reading::Each };
    shared.tasks.spawn(start::run(Arc::clone(shared), Arc::clone(inbox), open.id, request));
    Ok((permit, reading))
}

/// Lets a generation go that nobody wants any more.
fn leave(shared: &Arc<Shared>, generation: Generation, end: RequestEnd) {
    let Generation { stage, _permit: permit } = generation;
    match stage {
        // Its start lets it go.
        Stage::Starting(_) => {}
        Stage::Running { held, .. } => {
            let task = Arc::clone(shared);
            shared.tasks.spawn(async move {
                held.let_go(&task).await;
                drop(permit);
            });
        }
        Stage::Over(_) => {}
    }
    shared.metrics.request(RequestKind::Generate, end);
}
