//! One choice: tokens become text, stop strings end it, log-probabilities and reports travel along.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use baton_config::protocol::{FinishReason, TokenLogprob};
use futures_util::Stream;
use prometheus::local::LocalHistogram;
use tokio::time::Instant;

use super::Deltas;
use crate::dispatch::{DispatchError, Dispatcher, Generation, Job, Progress, Trace};
use crate::metrics::Metrics;
use crate::model::{Decoder, Model};
use crate::stop::StopMatcher;

/// Tokens after which a stream brings what it counted to the metrics,
const BOOK_TOKENS: u64 = 64;
/// or this long.
const BOOK_EVERY: Duration = Duration::from_secs(1);

/// What to generate as one choice.
#[derive(Debug)]
pub(crate) struct ChoiceSpec {
    /// Its number in the answer.
    pub(crate) index: u32,
    pub(crate) job: Job,
    pub(crate) stop: Vec<String>,
    /// Text that comes before the generated one.
    pub(crate) echo: Option<String>,
    /// Every token is passed on at once, with its id and digest.
    pub(crate) every_token: bool,
    /// When the request began.
    pub(crate) started: Instant,
}

/// News of one choice.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    pub(crate) index: u32,
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    /// One per token, where asked for.
    pub(crate) logprobs: Vec<(u32, TokenLogprob)>,
    /// After the last of `tokens`, where asked for.
    pub(crate) logits_digest: Option<u64>,
    /// With the last delta.
    pub(crate) end: Option<End>,
}

/// The end of a choice.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    /// The stop string that ended it, if one did.
    pub(crate) stop: Option<String>,
    pub(crate) trace: Trace,
    /// Milliseconds from the request to the first token.
    pub(crate) ttft_ms: Option<f64>,
}

/// A choice being generated.
struct Run {
    generation: Generation,
    index: u32,
    /// Every token is passed on at once.
    every_token: bool,
    /// When the request began.
    started: Instant,
    metrics: Arc<Metrics>,
    decoder: Decoder,
    stops: StopMatcher,
    /// What is known and not passed on yet.
    pending: Delta,
    piece: String,
    first_at: Option<Instant>,
    last_at: Option<Instant>,
    /// The time, as long as nothing is waited for.
    now: Option<Instant>,
    /// Times between tokens that the metrics have not got yet,
    itl: LocalHistogram,
    /// as many tokens,
    unbooked: u64,
    /// since then.
    booked_at: Instant,
    over: bool,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.book();
    }
}

/// The deltas of one choice; nothing is sent before the first poll.
pub(super) fn run(dispatcher: Arc<Dispatcher>, model: Arc<Model>, spec: ChoiceSpec) -> Deltas {
    let ChoiceSpec { index, job, stop, echo, every_token, started } = spec;
    let metrics = Arc::clone(&dispatcher.metrics);
    let run = Run {
        itl: metrics.itl.local(),
        generation: Generation::new(dispatcher, job),
        index,
        every_token,
        started,
        stops: StopMatcher::new(stop),
        decoder: Decoder::new(Arc::clone(&model.vocabulary)),
        metrics,
        pending: Delta { index, text: echo.unwrap_or_default(), ..Delta::default() },
        piece: String::new(),
        first_at: None,
        last_at: None,
        now: None,
        unbooked: 0,
        booked_at: started,
        over: false,
    };
    Box::pin(run)
}

impl Stream for Run {
    type Item = Result<Delta, DispatchError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        let next = self.poll_delta(cx);
        match &next {
            Poll::Pending => self.now = None,
            Poll::Ready(Ok(delta)) => self.over = delta.end.is_some(),
            Poll::Ready(Err(_)) => self.over = true,
        }
        next.map(Some)
    }
}

impl Run {
    fn poll_delta(&mut self, cx: &mut Context<'_>) -> Poll<Result<Delta, DispatchError>> {
        loop {
            match ready!(self.generation.poll_next(cx))? {
                Progress::Token { token, logprob, logits_digest } => {
                    self.clock();
                    self.pending.tokens.push(token);
                    self.pending.logprobs.extend(logprob.map(|logprob| (token, logprob)));
                    self.pending.logits_digest = logits_digest.or(self.pending.logits_digest);
                    if self.push_text(token) {
                        return Poll::Ready(Ok(self.end(FinishReason::Stop)));
                    }
                    if self.every_token || !self.pending.text.is_empty() {
                        return Poll::Ready(Ok(self.take()));
                    }
                }
                Progress::Finished(reason) => {
                    self.piece.clear();
                    self.decoder.finish(&mut self.piece);
                    let stopped = self.stops.push(&self.piece, &mut self.pending.text);
                    if !stopped {
                        self.stops.finish(&mut self.pending.text);
                    }
                    return Poll::Ready(Ok(self.end(if stopped { FinishReason::Stop } else { reason })));
                }
            }
        }
    }

    /// Adds the text of a token; whether a stop string ended it.
    fn push_text(&mut self, token: u32) -> bool {
        // An end token is no part of the text, even if it is an ordinary one.
        if self.generation.ends_with(token) {
            return false;
        }
        self.piece.clear();
        self.decoder.push(token, &mut self.piece);
        self.stops.push(&self.piece, &mut self.pending.text)
    }

    /// Books a token. Those that were there together came at the same time.
    fn clock(&mut self) {
        let now = *self.now.get_or_insert_with(Instant::now);
        match self.last_at.replace(now) {
            Some(last) => self.itl.observe(now.duration_since(last).as_secs_f64()),
            None => {
                self.first_at = Some(now);
                self.booked_at = now;
                self.metrics.ttft.observe(now.duration_since(self.started).as_secs_f64());
            }
        }
        self.unbooked += 1;
        if self.unbooked >= BOOK_TOKENS || now.duration_since(self.booked_at) >= BOOK_EVERY {
            self.booked_at = now;
            self.book();
        }
    }

    /// Brings what was counted here to the metrics of the router.
    fn book(&mut self) {
        self.itl.flush();
        self.metrics.completion_tokens.inc_by(std::mem::take(&mut self.unbooked));
    }

    fn take(&mut self) -> Delta {
        let next = Delta { index: self.index, ..Delta::default() };
        std::mem::replace(&mut self.pending, next)
    }

    fn end(&mut self, reason: FinishReason) -> Delta {
        let mut delta = self.take();
        let ttft = self.first_at.map(|at| at.duration_since(self.started));
        delta.end = Some(End {
            reason,
            stop: self.stops.matched().map(str::to_owned),
            trace: self.generation.trace().clone(),
            ttft_ms: ttft.map(|ttft| ttft.as_secs_f64() * 1000.0),
        });
        delta
    }
}
