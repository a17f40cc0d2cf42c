//! The body of an answer on its way from a server to a client: pulled by the client, never pushed.
//!
//! A client that reads slowly makes the server feel it; dropping the relay, because the client left or the answer ended,
//! closes the connection to the server and gives everything back.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body as _, Incoming};
use tokio::time::{Instant, Sleep};

use super::attempt::{Answer, Lost, Opened, Patience};
use super::cutter::Cutter;
use super::rename::Rename;
use super::tally::Tally;
use super::{Asked, Forwarder, Opening, TICK};
use crate::account::Entry;
use crate::admit::Place;
use crate::answer::{BrokenOff, KEEP_ALIVE, Quiet};
use crate::dispatch::chain;
use crate::fleet::{Occupied, Worker};
use crate::reply::Refusal;

/// An answer being passed on.
pub(crate) struct Relay {
    forwarder: Arc<Forwarder>,
    asked: Arc<Asked>,
    source: Source,
    /// Whole events only; `None` for an answer that is no stream of events.
    cutter: Option<Cutter>,
    tally: Tally,
    quiet: Quiet,
    held: Option<(Entry, Place)>,
}

/// Where bytes come from.
enum Source {
    /// No server has begun yet.
    Opening(Opening),
    /// One has; the bytes that came with its head go first.
    Open { first: Option<Bytes>, open: Box<Open> },
    /// The answer has ended.
    Ended,
}

/// The body of a server's answer.
struct Open {
    worker: Arc<Worker>,
    sent_at: Instant,
    /// The server has not yet said more of the answer than its beginning, which some say before they have a token.
    unproven: bool,
    _occupied: Occupied,
    body: Incoming,
    renames: Option<Rename>,
    patience: Patience,
    /// Since when there is nothing although somebody waits for it.
    waiting_since: Option<Instant>,
    tick: Pin<Box<Sleep>>,
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("request", &self.asked.id).finish_non_exhaustive()
    }
}

impl Relay {
    /// A stream of events whose client has waited long enough for it to begin.
    pub(super) fn waiting(
        forwarder: Arc<Forwarder>,
        asked: Arc<Asked>,
        opening: Opening,
        held: (Entry, Place),
    ) -> Self {
        let mut relay = Self::new(forwarder, asked, Source::Opening(opening), held);
        relay.cutter = Some(Cutter::default());
        relay
    }

    /// An answer that has begun.
    pub(super) fn begun(
        forwarder: Arc<Forwarder>,
        asked: Arc<Asked>,
        opened: Opened,
        held: (Entry, Place),
    ) -> Self {
        let mut relay = Self::new(forwarder, asked, Source::Ended, held);
        relay.cutter = matches!(opened.answer, Answer::Events { .. }).then(Cutter::default);
        relay.quiet.speak();
        // What has come whole is no stream: there is nothing left to relay.
        relay.source = relay.source_of(opened).unwrap_or(Source::Ended);
        relay
    }

    fn new(forwarder: Arc<Forwarder>, asked: Arc<Asked>, source: Source, held: (Entry, Place)) -> Self {
        let tally = Tally::new(&asked.request);
        let quiet = Quiet::new(forwarder.timeouts().keep_alive);
        Self { forwarder, asked, source, cutter: None, tally, quiet, held: Some(held) }
    }

    fn source_of(&self, opened: Opened) -> Option<Source> {
        let Opened { worker, occupied, sent_at, answer, silent_timeout, renames } = opened;
        let (first, body) = match answer {
            Answer::Events { first, body } => (first, body),
            Answer::Long { begun, body, .. } if self.cutter.is_none() => (begun, body),
            Answer::Long { .. } | Answer::Whole { .. } => return None,
        };
        let patience = Patience::within_the_answer(&self.asked, self.forwarder.timeouts(), silent_timeout);
        let tick = Box::pin(tokio::time::sleep(TICK));
        let open = Open {
            worker,
            sent_at,
            unproven: self.cutter.is_some(),
            _occupied: occupied,
            body,
            renames,
            patience,
            waiting_since: None,
            tick,
        };
        Some(Source::Open { first: Some(first), open: Box::new(open) })
    }

    /// The next bytes; `None` at the end.
    pub(crate) fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BrokenOff>>> {
        loop {
            let data = match &mut self.source {
                Source::Ended => return Poll::Ready(None),
                Source::Opening(opening) => match opening.as_mut().poll(cx) {
                    Poll::Pending => return self.bridge(cx),
                    Poll::Ready(Err(refusal)) => return Poll::Ready(self.break_off(&refusal)),
                    Poll::Ready(Ok(opened)) => {
                        let taken = self.asked.started.elapsed();
                        self.forwarder.dispatcher.metrics.ttft.observe(taken.as_secs_f64());
                        match self.source_of(opened) {
                            Some(source) => self.source = source,
                            None => return Poll::Ready(self.break_off(&Refusal::WorkerLost)),
                        }
                        continue;
                    }
                },
                Source::Open { first, open } => match first.take() {
                    Some(first) => first,
                    None => match open.poll_data(cx) {
                        Poll::Pending => return self.bridge(cx),
                        Poll::Ready(None) => return Poll::Ready(self.end()),
                        Poll::Ready(Some(Ok(data))) => data,
                        Poll::Ready(Some(Err(lost))) => return Poll::Ready(self.lose(&lost)),
                    },
                },
            };
            self.tally.push(&data);
            self.prove();
            let out = match &mut self.cutter {
                Some(cutter) => cutter.push(data),
                None => Some(data),
            };
            if let Some(out) = out {
                self.quiet.speak();
                return Poll::Ready(Some(Ok(self.rename(out))));
            }
        }
    }

    /// Takes note of what the stream says about the server: that it lives, or that its engine may have died.
    fn prove(&mut self) {
        let Source::Open { open, .. } = &mut self.source else { return };
        if !open.unproven {
            return;
        }
        if self.tally.says_error() {
            open.unproven = false;
            self.forwarder.suspect(&self.asked, &open.worker, open.sent_at);
        } else if self.tally.says_more() {
            open.unproven = false;
            self.forwarder.survived(&self.asked);
        }
    }

    /// Says something while there is nothing to say; only between events, and only in a stream of them.
    fn bridge(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BrokenOff>>> {
        if !self.cutter.as_ref().is_some_and(Cutter::is_between) {
            return Poll::Pending;
        }
        ready!(self.quiet.poll(cx));
        Poll::Ready(Some(Ok(Bytes::from_static(KEEP_ALIVE))))
    }

    fn rename(&self, bytes: Bytes) -> Bytes {
        match &self.source {
            Source::Open { open, .. } => match &open.renames {
                Some(rename) => rename.apply(bytes),
                None => bytes,
            },
            Source::Opening(_) | Source::Ended => bytes,
        }
    }

    /// The server has ended its answer: well, if it said so.
    fn end(&mut self) -> Option<Result<Bytes, BrokenOff>> {
        let says = self.cutter.is_some() && self.asked.passing.says_done();
        let failed = self.cutter.is_some() && self.tally.says_error();
        if says && !failed && !self.tally.says_end() {
            return self.lose(&Lost::Broken("the stream ended without an end".to_owned()));
        }
        let rest = self.cutter.as_mut().map(Cutter::rest).filter(|rest| !rest.is_empty());
        let rest = rest.map(|rest| Ok(self.rename(rest)));
        self.source = Source::Ended;
        self.settle(|entry| if failed { entry.broke() } else { entry.answered(200) });
        rest
    }

    fn lose(&mut self, lost: &Lost) -> Option<Result<Bytes, BrokenOff>> {
        if let Source::Open { open, .. } = &self.source {
            self.forwarder.lost(&self.asked, &open.worker, lost);
            if open.unproven && lost.may_be_death() {
                self.forwarder.suspect(&self.asked, &open.worker, open.sent_at);
            }
            self.forwarder.dispatcher.metrics.migrated(lost.reason(), false);
        }
        let refusal = if matches!(lost, Lost::Deadline) { Refusal::TimedOut } else { Refusal::WorkerLost };
        self.break_off(&refusal)
    }

    /// Ends with an error: as an event if it is a stream of them, else by breaking the connection off.
    fn break_off(&mut self, refusal: &Refusal) -> Option<Result<Bytes, BrokenOff>> {
        self.source = Source::Ended;
        self.settle(Entry::broke);
        match &self.cutter {
            Some(cutter) if cutter.is_between() => {
                let passing = self.asked.passing;
                let head: &[u8] = if passing.names_events() { b"event: error\ndata: " } else { b"data: " };
                let body = refusal.body(passing.dialect());
                Some(Ok(Bytes::from([head, body.as_ref(), b"\n\n"].concat())))
            }
            Some(_) | None => Some(Err(BrokenOff)),
        }
    }

    fn settle(&mut self, ending: impl FnOnce(Entry)) {
        if let Some((entry, mut place)) = self.held.take() {
            self.forwarder.book(&self.tally, &entry, &mut place);
            ending(entry);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Still held: the client left before the end.
        self.settle(drop);
    }
}

impl Open {
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Lost>>> {
        loop {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready(Some(Err(Lost::Broken(chain(&error)))));
                }
                Poll::Ready(Some(Ok(frame))) => {
                    self.waiting_since = None;
                    if let Ok(data) = frame.into_data()
                        && !data.is_empty()
                    {
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
                Poll::Pending => {
                    ready!(self.tick.as_mut().poll(cx));
                    let now = Instant::now();
                    self.tick.as_mut().reset(now + TICK);
                    let since = *self.waiting_since.get_or_insert(now);
                    if let Err(lost) = self.patience.check(&self.worker, since, now) {
                        return Poll::Ready(Some(Err(lost)));
                    }
                }
            }
        }
    }
}
