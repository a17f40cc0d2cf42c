//! Passes requests on to OpenAI-compatible servers of other projects, and their answers back, byte for byte.
//!
//! ```text
//!  request -> request::passed (checks) -> place (load, prefixes of the text, session) -> attempt -> server
//!  client <-- relay (whole events, comments while it is silent, an error event if it breaks) <------+
//! ```
//!
//! Invariants: a request is sent again only while its client has heard nothing of it, and a bounded number of times; what
//! a server refuses as the client's fault never counts against it; a client that leaves, or does not read, is felt by the
//! server at once. What is absent: no token is known here, no answer is parsed, and no key of a server comes from, or goes
//! to, anywhere but this router's own files.

mod attempt;
mod cutter;
mod deaths;
mod relay;
mod rename;
mod servers;
mod tally;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_config::fleet::OpenaiSpec;
use baton_config::{Epoch, PoolName, WorkerId};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::Response;
use tokio::time::Instant;

use crate::account::Entry;
use crate::admit::Place;
use crate::answer::AnswerBody;
use crate::dispatch::{Dispatcher, Explanation, Sought};
use crate::fleet::Worker;
use crate::reply::{self, Refusal};
use crate::request::{Passed, Passing};
use crate::room::Held;
use attempt::{Answer, Lost, Opened};
pub(crate) use relay::Relay;
use servers::Servers;
pub use servers::ServersError;
use tally::Tally;

/// Servers that are tried for one request.
const ATTEMPTS_MAX: u32 = 4;
/// Of these, servers that may have been harmed by it: that broke off or failed.
const HARMED_MAX: u32 = 2;
/// Workers whose servers are not this router's business of which that is remembered, so that it is said once.
const STRANGERS_MAX: usize = 1024;

/// Servers of other projects that requests are passed on to.
#[derive(Debug, Clone)]
pub struct ForwardOptions {
    /// By pool; a worker may name no server but those of its pool.
    pub pools: BTreeMap<PoolName, ForwardPool>,
}

/// The servers of a pool.
#[derive(Debug, Clone)]
pub struct ForwardPool {
    /// Where they are and what they want.
    pub servers: OpenaiSpec,
    /// Requests of this router on one of them at once.
    pub in_flight_max: u32,
}

/// What all passed requests share.
#[derive(Debug)]
pub(crate) struct Forwarder {
    dispatcher: Arc<Dispatcher>,
    servers: Servers,
    /// Fields of requests that pass besides the known ones.
    pub(crate) extra_fields: Vec<String>,
    strangers: Mutex<BTreeSet<(WorkerId, Epoch)>>,
}

/// A request to be passed on.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) passing: Passing,
    pub(crate) request: Passed,
    /// The memory of its body.
    pub(crate) _held: Held,
    /// Under which the logs of router and server know it.
    pub(crate) id: String,
    pub(crate) cache_salt: u64,
    /// Whose requests servers died with.
    pub(crate) owner: u64,
    pub(crate) session: Option<u64>,
    pub(crate) explain: Option<Explanation>,
    pub(crate) started: Instant,
    pub(crate) deadline: Instant,
}

/// Charges the prompt, as far as it can be told, to a client that leaves before a server has answered, which may have computed
/// it.
struct PromptBill<'a> {
    forwarder: &'a Forwarder,
    asked: &'a Asked,
    entry: &'a Entry,
    place: &'a mut Place,
    left: bool,
}

impl Drop for PromptBill<'_> {
    fn drop(&mut self) {
        if self.left {
            self.forwarder.book(&Tally::new(&self.asked.request), self.entry, self.place);
        }
    }
}

type Opening = BoxFuture<'static, Result<Opened, Refusal>>;

impl Forwarder {
    /// Reads the keys of the servers.
    pub(crate) fn new(options: &ForwardOptions, dispatcher: Arc<Dispatcher>) -> Result<Self, ServersError> {
        let servers = Servers::new(options, dispatcher.timeouts.connect)?;
        let mut extra_fields: Vec<String> =
            options.pools.values().flat_map(|pool| pool.servers.pass_fields.iter().cloned()).collect();
        extra_fields.sort_unstable();
        extra_fields.dedup();
        Ok(Self { dispatcher, servers, extra_fields, strangers: Mutex::default() })
    }

    /// Passes a request on and answers with what comes back.
    pub(crate) async fn answer(
        self: Arc<Self>,
        asked: Asked,
        entry: Entry,
        mut place: Place,
    ) -> Response<AnswerBody> {
        let dialect = asked.passing.dialect();
        let asked = Arc::new(asked);
        let mut opening = Arc::clone(&self).open(Arc::clone(&asked)).boxed();
        let opened = {
            let mut bill =
                PromptBill { forwarder: &self, asked: &asked, entry: &entry, place: &mut place, left: true };
            let opened = if asked.request.stream {
                // As for a stream of one's own: the status waits for the first byte, but not for ever.
                tokio::time::timeout(self.timeouts().keep_alive, &mut opening).await.ok()
            } else {
                Some(opening.as_mut().await)
            };
            bill.left = false;
            opened
        };
        let Some(opened) = opened else {
            let relay = Relay::waiting(self, Arc::clone(&asked), opening, (entry, place));
            return reply::named(reply::event_stream(AnswerBody::relayed(relay)), &asked.id, dialect);
        };
        let response = match opened {
            Ok(opened) => self.respond(&asked, opened, entry, place),
            Err(refusal) => {
                entry.refused(&refusal);
                refusal.response(dialect)
            }
        };
        reply::named(response, &asked.id, dialect)
    }

    fn respond(
        self: Arc<Self>,
        asked: &Arc<Asked>,
        opened: Opened,
        entry: Entry,
        mut place: Place,
    ) -> Response<AnswerBody> {
        match &opened.answer {
            Answer::Whole { status, kind, bytes } => {
                let mut tally = Tally::new(&asked.request);
                tally.push(bytes);
                self.book(&tally, &entry, &mut place);
                entry.answered(status.as_u16());
                reply::relayed(*status, kind.clone(), AnswerBody::full(opened.rename(bytes.clone())))
            }
            Answer::Long { status, kind, .. } => {
                let (status, kind) = (*status, kind.clone());
                let relay = Relay::begun(self, Arc::clone(asked), opened, (entry, place));
                reply::relayed(status, kind, AnswerBody::relayed(relay))
            }
            Answer::Events { .. } => {
                self.dispatcher.metrics.ttft.observe(asked.started.elapsed().as_secs_f64());
                let relay = Relay::begun(self, Arc::clone(asked), opened, (entry, place));
                reply::event_stream(AnswerBody::relayed(relay))
            }
        }
    }

    /// Finds a server that begins to answer.
    async fn open(self: Arc<Self>, asked: Arc<Asked>) -> Result<Opened, Refusal> {
        let mut tries = Tries::default();
        loop {
            self.check(&asked).await?;
            let mut avoid = self.unfit(&mut tries.full);
            avoid.extend(tries.failed.iter().cloned());
            let sought = Sought {
                request_id: &asked.id,
                tokens: &asked.request.words,
                stands_for: true,
                cache_salt: asked.cache_salt,
                session: asked.session,
                explain: asked.explain.as_ref(),
            };
            let Some(placement) = self.dispatcher.choose_for(&sought, &avoid) else {
                if tries.once_more() {
                    continue;
                }
                return Err(tries.refusal());
            };
            self.dispatcher.metrics.dispatched("local");
            let worker = Arc::clone(&placement.decode);
            let sent_at = Instant::now();
            let lost = match attempt::open(&self, &asked, placement).await {
                Ok(opened) => {
                    if let Answer::Whole { .. } | Answer::Long { .. } = opened.answer {
                        self.survived(&asked);
                    }
                    return Ok(opened);
                }
                Err(lost) => lost,
            };
            self.lost(&asked, &worker, &lost);
            match &lost {
                Lost::Refused(_) => self.survived(&asked),
                lost if lost.may_be_death() => self.suspect(&asked, &worker, sent_at),
                _ => {}
            }
            if let Lost::Denied(_) = lost
                && self.servers.read_key_again(&worker.member.pool).await
            {
                continue;
            }
            tries.add(&worker, lost)?;
        }
    }

    /// Workers that must not be chosen: those whose server is not of their pool, and those with as many requests as they
    /// may have.
    fn unfit(&self, full: &mut bool) -> Vec<(WorkerId, Epoch)> {
        let mut unfit = Vec::new();
        for worker in self.dispatcher.fleet.workers().iter() {
            let fits = match self.servers.of(&worker.member) {
                Some(server) => {
                    let room = worker.own_requests() < server.pool.in_flight_max;
                    *full |= !room;
                    room
                }
                None => {
                    self.tell_stranger(worker);
                    false
                }
            };
            if !fits {
                unfit.push((worker.member.worker.clone(), worker.member.epoch));
            }
        }
        unfit
    }

    fn tell_stranger(&self, worker: &Worker) {
        let life = (worker.member.worker.clone(), worker.member.epoch);
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if strangers.len() >= STRANGERS_MAX {
            strangers.clear();
        }
        if strangers.insert(life) {
            tracing::warn!(
                worker = %worker.member.worker,
                server = worker.member.server,
                "gets no requests: its server is none of those that this router's fleet file names for its pool"
            );
        }
    }

    /// Takes note of a server that did not begin, or did not end, an answer.
    fn lost(&self, asked: &Asked, worker: &Worker, lost: &Lost) {
        if lost.is_down() {
            worker.mark_down(Instant::now());
        }
        if matches!(lost, Lost::Refused(_)) {
            return;
        }
        tracing::warn!(request = asked.id, worker = %worker.member.worker, why = %lost, "server failed a request");
    }

    /// Books what a request used, as far as its server told.
    fn book(&self, tally: &Tally, entry: &Entry, place: &mut Place) {
        let (prompt, completion) = tally.tokens();
        self.dispatcher.metrics.prompt_tokens.inc_by(prompt);
        self.dispatcher.metrics.completion_tokens.inc_by(completion);
        place.used(prompt + completion);
        entry.used(prompt + completion);
    }

    fn timeouts(&self) -> &crate::options::Timeouts {
        &self.dispatcher.timeouts
    }
}

/// What became of the tries so far.
#[derive(Debug, Default)]
struct Tries {
    failed: Vec<(WorkerId, Epoch)>,
    count: u32,
    harmed: u32,
    /// Some could not be reached, or broke: who is well now may have been among them.
    broke: bool,
    repeated: bool,
    full: bool,
    denied: bool,
}

impl Tries {
    /// Takes in a failure; the refusal if it is the last one.
    fn add(&mut self, worker: &Worker, lost: Lost) -> Result<(), Refusal> {
        self.count += 1;
        match lost {
            Lost::Refused(refusal) => return Err(*refusal),
            Lost::Deadline => return Err(Refusal::TimedOut),
            Lost::Overloaded => self.full = true,
            Lost::Denied(_) => self.denied = true,
            Lost::Broken(_) => {
                self.broke = true;
                self.harmed += 1;
            }
            Lost::Failing(_) | Lost::Silent(_) => self.harmed += 1,
            Lost::Unreachable(_) | Lost::Unavailable => {}
        }
        self.failed.push((worker.member.worker.clone(), worker.member.epoch));
        if self.count >= ATTEMPTS_MAX || self.harmed >= HARMED_MAX { Err(self.refusal()) } else { Ok(()) }
    }

    /// Whether those that failed may be tried once more: a kept-alive connection that ended as the request went out says
    /// nothing about the server.
    fn once_more(&mut self) -> bool {
        let again = self.broke && !self.repeated;
        if again {
            self.repeated = true;
            self.failed.clear();
        }
        again
    }

    fn refusal(&self) -> Refusal {
        if self.harmed > 0 {
            Refusal::WorkerLost
        } else if self.denied {
            Refusal::ServerDenied
        } else if self.full {
            Refusal::WorkersBusy
        } else {
            Refusal::NoWorker
        }
    }
}

/// Between two looks at a server that is silent.
const TICK: Duration = Duration::from_millis(250);
