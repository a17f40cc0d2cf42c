//! Brings one generation to workers and keeps it going: placement, both calls at once, replay when a worker is lost.
//!
//! A [`Generation`] is pulled, never pushed: a client that reads slowly makes it read slowly, which the worker feels;
//! dropping it closes both connections, which cancels the request on both sides.

mod attempt;
mod call;
mod frames;
mod lines;
mod place;
mod suspects;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use baton_config::protocol::{FinishReason, PrefillReport, Sampling, TokenLogprob};
use baton_config::{Epoch, HandoffId, WorkerId};
use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::fleet::{Fleet, Worker};
use crate::metrics::{Metrics, MoveReason};
use crate::options::Timeouts;
use crate::schedule::Rules;
pub(crate) use attempt::chain;
use attempt::{Attempt, Event, Lost};
pub(crate) use call::{CallError, Caller};
pub(crate) use frames::Lane;
pub(crate) use place::{Placement, Sought};
pub(crate) use suspects::{Death, Suspects, Verdict};

/// Workers that are tried before the first token,
const ATTEMPTS_MAX: usize = 4;
/// besides those that are other than the view says, and those that could not be reached: a host that dies takes all of
/// its workers with it.
const UNREACHED_MAX: usize = 16;
/// Times a stream may move after its first token.
const MIGRATIONS_MAX: u32 = 3;
/// Bandwidth assumed between two workers that have measured none, in bytes per second.
const DEFAULT_BANDWIDTH: f64 = 1e9;
/// Between two looks for a replacement worker, besides changes of the view.
const RETRY_EVERY: std::time::Duration = std::time::Duration::from_millis(200);

/// What all generations share.
#[derive(Debug)]
pub(crate) struct Dispatcher {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) caller: Caller,
    pub(crate) rules: Rules,
    pub(crate) timeouts: Timeouts,
    pub(crate) metrics: Arc<Metrics>,
    /// Owns what is left to do after a generation ended.
    pub(crate) tracker: TaskTracker,
    pub(crate) vocab: u32,
    /// Requests that workers died with.
    pub(crate) suspects: Arc<Suspects>,
    tickets: AtomicU64,
}

/// One choice to generate.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) request_id: String,
    pub(crate) prompt: Arc<[u32]>,
    pub(crate) max_tokens: u32,
    pub(crate) sampling: Sampling,
    /// Separates its cached prefixes from those of others; 0 for none.
    pub(crate) cache_salt: u64,
    /// Whose requests workers died with: the same for all of a tenant's, whatever separates their prefixes.
    pub(crate) owner: u64,
    pub(crate) logits_digest: bool,
    /// Nobody reads the tokens before the last one, and no text among them can end it.
    pub(crate) whole: bool,
    /// The model's own end tokens, unless ignored, and the request's.
    pub(crate) end_tokens: Arc<[u32]>,
    /// When it is given up.
    pub(crate) deadline: Instant,
    /// What requests that should stay on one worker have in common.
    pub(crate) session: Option<u64>,
    /// Where to put how its workers were chosen, if somebody wants to know.
    pub(crate) explain: Option<Explanation>,
}

/// How the workers of a request were chosen first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Explanation(Arc<OnceLock<String>>);

impl Explanation {
    fn put(&self, text: String) {
        // Later placements, after a worker was lost, are in the log only.
        let _ = self.0.set(text);
    }

    /// The explanation, once there is one.
    pub(crate) fn get(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }
}

/// The next thing that happened to a generation.
#[derive(Debug)]
pub(crate) enum Progress {
    /// A token.
    Token { token: u32, logprob: Option<TokenLogprob>, logits_digest: Option<u64> },
    /// The end.
    Finished(FinishReason),
}

/// Why a generation could not be brought to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DispatchError {
    /// No worker is there.
    #[error("no worker can serve")]
    NoWorker,
    /// Every worker is full.
    #[error("all workers are full")]
    Overloaded,
    /// A worker says that no worker can ever serve this.
    #[error("refused by a worker")]
    Refused,
    /// The prompt is longer than the KV cache of any worker that was asked.
    #[error("{tokens} prompt tokens are too many for the workers")]
    TooLong {
        /// Length of the prompt.
        tokens: usize,
    },
    /// Too many workers were lost, or the stream cannot be replayed.
    #[error("worker lost")]
    WorkerLost,
    /// Workers died with this very request.
    #[error("workers died with it")]
    Barred,
    /// The request's time is over.
    #[error("timed out")]
    TimedOut,
    /// The system gives no random numbers.
    #[error("no entropy")]
    Entropy,
}

/// Where a generation ran and what its prefill took.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace {
    /// The prefill worker of the first placement that gave a token, if not the decode worker itself.
    pub(crate) prefill: Option<WorkerId>,
    /// The decode worker that served last.
    pub(crate) decode: Option<WorkerId>,
    /// What the first decode worker said of its prefill.
    pub(crate) report: Option<PrefillReport>,
    /// Moves after the first token.
    pub(crate) migrations: u32,
}

impl Dispatcher {
    /// A dispatcher over `fleet`.
    pub(crate) fn new(
        fleet: Arc<Fleet>,
        caller: Caller,
        rules: Rules,
        timeouts: Timeouts,
        metrics: Arc<Metrics>,
        vocab: u32,
    ) -> Self {
        let tracker = TaskTracker::new();
        let suspects = Arc::default();
        Self { fleet, caller, rules, timeouts, metrics, tracker, vocab, suspects, tickets: AtomicU64::new(0) }
    }
}

/// One choice being generated.
pub(crate) struct Generation {
    dispatcher: Arc<Dispatcher>,
    job: Job,
    /// Every token received; with the prompt, all that a replay needs.
    sent: Vec<u32>,
    attempt: Option<Attempt>,
    /// Workers that failed this generation, in the life in which they did.
    failed: Vec<(WorkerId, Epoch)>,
    overloaded: bool,
    /// How many of them, before a token, for want of KV memory.
    too_long: usize,
    /// Which of them, before a token, because they leave or are in another life,
    away: Vec<(WorkerId, Epoch)>,
    /// and since when the view is waited for because of that.
    waits_since: Option<Instant>,
    /// How many of them, before a token, were never connected to.
    unreached: usize,
    /// Set when a connection broke before a token,
    broke: bool,
    /// and when those that failed were asked once more because of that.
    repeated: bool,
    /// Set while a stream that had begun looks for another worker.
    moving: Option<(MoveReason, Instant)>,
    /// Set until the worker it is on gives a token of it.
    unproven: bool,
    /// The next change of the fleet, while it is waited for.
    change: Option<BoxFuture<'static, ()>>,
    trace: Trace,
}

impl Generation {
    /// A generation that begins when first asked for progress.
    pub(crate) fn new(dispatcher: Arc<Dispatcher>, job: Job) -> Self {
        Self {
            dispatcher,
            job,
            sent: Vec::new(),
            attempt: None,
            failed: Vec::new(),
            overloaded: false,
            too_long: 0,
            away: Vec::new(),
            waits_since: None,
            unreached: 0,
            broke: false,
            repeated: false,
            moving: None,
            unproven: true,
            change: None,
            trace: Trace::default(),
        }
    }

    /// Where it ran so far.
    pub(crate) fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Whether `token` is one of those that end it.
    pub(crate) fn ends_with(&self, token: u32) -> bool {
        self.job.end_tokens.contains(&token)
    }

    /// The next token or the end.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Progress, DispatchError>> {
        loop {
            let attempt = match &mut self.attempt {
                Some(attempt) => attempt,
                None => {
                    let placed = ready!(self.poll_place(cx))?;
                    self.attempt.insert(placed)
                }
            };
            match ready!(attempt.poll_next(cx)) {
                Ok(Event::Token { token, logprob, logits_digest }) => {
                    if token >= self.dispatcher.vocab || self.sent.len() >= self.job.max_tokens as usize {
                        let lost = Lost::protocol("a token beyond the vocabulary or the limit");
                        if let Some(reason) = self.go_on_without(lost)? {
                            return Poll::Ready(Ok(Progress::Finished(reason)));
                        }
                        continue;
                    }
                    if let Some((reason, _)) = self.moving.take() {
                        self.dispatcher.metrics.migrated(reason, true);
                    }
                    if std::mem::take(&mut self.unproven) && !self.dispatcher.suspects.is_empty() {
                        self.dispatcher.suspects.survived(self.print());
                    }
                    self.sent.push(token);
                    return Poll::Ready(Ok(Progress::Token { token, logprob, logits_digest }));
                }
                Ok(Event::Prefilled(report)) => self.prefilled(report),
                Ok(Event::Finished(reason)) => {
                    if let Some(attempt) = self.attempt.take() {
                        attempt.linger(&self.dispatcher.tracker);
                    }
                    return Poll::Ready(Ok(Progress::Finished(reason)));
                }
                Err(lost) => {
                    if let Some(reason) = self.go_on_without(lost)? {
                        return Poll::Ready(Ok(Progress::Finished(reason)));
                    }
                }
            }
        }
    }

    /// Gives up the worker that failed; the end, if nothing is left to be generated elsewhere.
    fn go_on_without(&mut self, lost: Lost) -> Result<Option<FinishReason>, DispatchError> {
        self.lost(lost)?;
        Ok(self.already_ended())
    }

    fn prefilled(&mut self, report: PrefillReport) {
        if let Some(attempt) = &self.attempt
            && attempt.handoff_ended(&report)
        {
            self.dispatcher.metrics.pair_trips.inc();
        }
        if let Some(why) = &report.fallback {
            self.dispatcher.metrics.fallbacks.inc();
            tracing::warn!(
                request = self.job.request_id,
                decode = self.trace.decode.as_ref().map(tracing::field::display),
                prefill = self.trace.prefill.as_ref().map(tracing::field::display),
                why,
                "handoff given up; the decode worker prefilled"
            );
        }
        self.trace.report.get_or_insert(report);
    }

    /// The end that the lost worker did not get to say: nothing is left to generate.
    fn already_ended(&self) -> Option<FinishReason> {
        let last = self.sent.last()?;
        if self.ends_with(*last) {
            return Some(FinishReason::Stop);
        }
        (self.sent.len() >= self.job.max_tokens as usize).then_some(FinishReason::Length)
    }

    /// Takes leave of the worker that failed and decides whether there may be another one.
    fn lost(&mut self, lost: Lost) -> Result<(), DispatchError> {
        let Some(attempt) = self.attempt.take() else { return Err(DispatchError::WorkerLost) };
        let worker = Arc::clone(&attempt.pair.decode);
        let now = Instant::now();
        if matches!(lost, Lost::Broken(_)) && self.unproven && attempt.was_heard(now) {
            let death = Death::of(&worker, attempt.placed_at(), now);
            self.dispatcher.suspects.broke(self.print(), death);
        }
        drop(attempt);
        let sent = self.sent.len();
        if matches!(lost, Lost::Deadline) {
            return Err(DispatchError::TimedOut);
        }
        tracing::warn!(
            request = self.job.request_id,
            worker = %worker.member.worker,
            epoch = %worker.member.epoch,
            sent,
            why = %lost,
            "worker failed a request"
        );
        if lost.unreachable() {
            worker.mark_down(now);
        }
        if matches!(lost, Lost::Refused(_)) && sent == 0 {
            return Err(DispatchError::Refused);
        }
        self.too_long += usize::from(matches!(lost, Lost::TooLong(_)) && sent == 0);
        self.unreached += usize::from(matches!(lost, Lost::Unreachable(_)) && sent == 0);
        self.broke |= matches!(lost, Lost::Broken(_));
        self.overloaded |= matches!(lost, Lost::Overloaded);
        let life = (worker.member.worker.clone(), worker.member.epoch);
        if matches!(lost, Lost::Unavailable(_)) && sent == 0 {
            self.away.push(life.clone());
        }
        self.failed.push(life);
        if sent == 0 {
            let asked = self.failed.len() - self.unreached - self.away.len();
            let more = asked < ATTEMPTS_MAX && self.unreached < UNREACHED_MAX;
            return if more { Ok(()) } else { Err(self.exhausted()) };
        }
        if self.already_ended().is_some() {
            return Ok(());
        }
        let reason = lost.reason();
        // It did not begin there: this is no further move, and as long as there is patience others are asked.
        if let Some((_, patience)) = self.moving
            && lost.began_nothing()
            && Instant::now() < patience
        {
            return Ok(());
        }
        // A running digest of logits cannot be taken up by a worker that did not compute its beginning.
        if self.job.logits_digest || self.trace.migrations >= MIGRATIONS_MAX {
            self.dispatcher.metrics.migrated(reason, false);
            return Err(DispatchError::WorkerLost);
        }
        self.trace.migrations += 1;
        let patience = Instant::now() + self.dispatcher.timeouts.replacement;
        self.moving = Some((reason, patience));
        // Only the last one is avoided for good: an earlier one may have recovered.
        let last = self.failed.len() - 1;
        self.failed.drain(..last);
        Ok(())
    }

    fn exhausted(&self) -> DispatchError {
        if self.overloaded {
            DispatchError::Overloaded
        } else if self.unreached + self.away.len() == self.failed.len() {
            // Nobody took it, or nobody is there.
            DispatchError::NoWorker
        } else if self.too_long == self.failed.len() {
            DispatchError::TooLong { tokens: self.job.prompt.len() }
        } else {
            DispatchError::WorkerLost
        }
    }

    /// Whether workers that were asked are other than the view says, and none had an answer of its own.
    fn is_outdated(&self) -> bool {
        let outdated = self.waits_since.is_some() || !self.away.is_empty();
        self.sent.is_empty() && outdated && !self.overloaded && self.too_long == 0
    }

    /// Finds workers and sends both calls.
    fn poll_place(&mut self, cx: &mut Context<'_>) -> Poll<Result<Attempt, DispatchError>> {
        let mut changes = None;
        loop {
            if let Some(change) = &mut self.change {
                ready!(change.as_mut().poll(cx));
                self.change = None;
            }
            if self.waits_since.is_some() {
                self.ask_those_who_are_back();
            }
            if let Some(inquiry) = self.inquiry()? {
                self.change = Some(inquiry);
                continue;
            }
            if let Some(placement) = self.dispatcher.choose(&self.job, &self.sent, &self.failed) {
                return Poll::Ready(self.open(placement));
            }
            let Some(mut changes) = changes.take() else {
                // Once more, now that no change can be missed.
                changes = Some(self.dispatcher.fleet.changes());
                continue;
            };
            self.may_wait()?;
            self.change = Some(Box::pin(async move {
                let _ = tokio::time::timeout(RETRY_EVERY, changes.changed()).await;
            }));
        }
    }

    /// What names the request among those that workers died with.
    fn print(&self) -> u64 {
        let job = &self.job;
        self.dispatcher.suspects.print(&job.prompt, job.owner, &job.sampling)
    }

    /// What has to be found out about the request before another worker is put at risk.
    fn inquiry(&self) -> Result<Option<BoxFuture<'static, ()>>, DispatchError> {
        if self.dispatcher.suspects.is_empty() {
            return Ok(None);
        }
        let print = self.print();
        let doubtful = match self.dispatcher.suspects.verdict(print, Instant::now()) {
            Verdict::Free => return Ok(None),
            Verdict::Doubtful(deaths) => deaths,
            Verdict::Barred => {
                if let Some((reason, _)) = self.moving {
                    self.dispatcher.metrics.migrated(reason, false);
                }
                self.dispatcher.metrics.barred.inc();
                tracing::error!(
                    request = self.job.request_id,
                    "workers died with this very request: refused for a while, instead of killing another one"
                );
                return Err(DispatchError::Barred);
            }
        };
        let (suspects, caller) = (Arc::clone(&self.dispatcher.suspects), self.dispatcher.caller.clone());
        Ok(Some(Box::pin(async move {
            for death in doubtful {
                let died = suspects::has_died(&caller, &death).await;
                suspects.settle(print, &death, died);
            }
        })))
    }

    /// Whether it is worth waiting for another worker.
    fn may_wait(&mut self) -> Result<(), DispatchError> {
        let now = Instant::now();
        if let Some((reason, patience)) = self.moving {
            if now < patience {
                // Who was full or away a moment ago is asked again; and with nobody else, so is who broke: it may have been
                // the connection.
                self.failed.clear();
                return Ok(());
            }
            self.dispatcher.metrics.migrated(reason, false);
            return Err(DispatchError::WorkerLost);
        }
        // A connection that was there already says nothing about the worker when it ends as a request goes out.
        if self.broke && !self.repeated {
            self.repeated = true;
            self.failed.clear();
            self.away.clear();
            (self.too_long, self.unreached) = (0, 0);
            return Ok(());
        }
        // Workers that are in another life than the view says may be in view again in a moment, whatever became of the others.
        if self.is_outdated()
            && now < *self.waits_since.get_or_insert(now) + self.dispatcher.timeouts.view_lag
        {
            return Ok(());
        }
        Err(self.exhausted())
    }

    /// The view may tell of a life before the worker itself has heard of it: who was away and has said since that it is there
    /// may be asked again.
    fn ask_those_who_are_back(&mut self) {
        let now = Instant::now();
        let (workers, frozen) = (self.dispatcher.fleet.workers(), self.dispatcher.timeouts.frozen);
        let is_back = |(name, epoch): &(WorkerId, Epoch)| {
            let is = |worker: &Worker| worker.member.worker == *name && worker.member.epoch == *epoch;
            workers.iter().any(|worker| is(worker) && worker.standing(now, frozen).well)
        };
        let back: Vec<_> = self.away.extract_if(.., |life| is_back(life)).collect();
        self.failed.retain(|life| !back.contains(life));
    }

    fn open(&mut self, placement: Placement) -> Result<Attempt, DispatchError> {
        let decision = if placement.prefill.is_some() { "disaggregated" } else { "local" };
        self.dispatcher.metrics.dispatched(decision);
        self.trace.decode = Some(placement.decode.member.worker.clone());
        if self.sent.is_empty() {
            self.trace.prefill = placement.prefill.as_ref().map(|worker| worker.member.worker.clone());
        }
        self.unproven = true;
        let handoff = match &placement.prefill {
            Some(_) => Some(new_handoff_id()?),
            None => None,
        };
        Ok(Attempt::open(&self.dispatcher, &self.job, &self.sent, placement, handoff))
    }
}

fn new_handoff_id() -> Result<HandoffId, DispatchError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        tracing::error!(%error, "no random numbers from the system");
        DispatchError::Entropy
    })?;
    Ok(HandoffId(u128::from_le_bytes(bytes)))
}
