//! Admission: so many requests at once, so many waiting, the rest refused before any work is spent on them.
//!
//! [`fair`] decides without clock or I/O; [`Gate`] gives it the time and wakes who got a place.

mod fair;
mod pace;
mod quota;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::metrics::Metrics;
use crate::tenant::Principal;
use fair::{Fair, Id, Offer, Offered};
pub(crate) use quota::Left;

/// Bytes of a body that make a token, roughly; too many rather than too few.
const BYTES_PER_TOKEN: u64 = 4;

/// Why a request was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// All places and the queue are taken.
    QueueFull,
    /// It would have waited longer than it may.
    Deadline,
    /// No worker would begin it in time.
    WorkersQueued,
    /// Bodies of others take all the memory that there is for them.
    Bodies,
    /// It has waited as long as it may.
    QueueTimeout,
    /// Its key has had its requests of this minute.
    Requests,
    /// Its key has had its tokens of this minute.
    Tokens,
    /// Its key has enough requests under way.
    Concurrency,
}

impl Reason {
    /// Every reason.
    pub(crate) const ALL: [Self; 8] = [
        Self::QueueFull,
        Self::Deadline,
        Self::WorkersQueued,
        Self::Bodies,
        Self::QueueTimeout,
        Self::Requests,
        Self::Tokens,
        Self::Concurrency,
    ];

    /// The label of `baton_router_rejected_total`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::Deadline => "deadline",
            Self::WorkersQueued => "workers_queued",
            Self::Bodies => "bodies",
            Self::QueueTimeout => "queue_timeout",
            Self::Requests => "request_rate",
            Self::Tokens => "token_rate",
            Self::Concurrency => "concurrency",
        }
    }
}

/// A request that was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) reason: Reason,
    /// When it would be let in, as far as can be told.
    pub(crate) after: Duration,
}

impl Refused {
    /// `Retry-After`: whole seconds, rounded up, at least one.
    pub(crate) fn retry_after_s(&self) -> u64 {
        let whole = self.after.as_secs() + u64::from(self.after.subsec_nanos() > 0);
        whole.max(1)
    }
}

/// The gate in front of all generation.
#[derive(Debug)]
pub(crate) struct Gate {
    core: Mutex<Core>,
    patience: Duration,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Core {
    fair: Fair,
    /// Who waits, until it is told.
    waiting: HashMap<Id, oneshot::Sender<Result<(), Refused>>>,
}

/// A place in flight, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    gate: Arc<Gate>,
    id: Id,
    used: u64,
}

impl Place {
    /// Books tokens that the request used.
    pub(crate) fn used(&mut self, tokens: u64) {
        self.used += tokens;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gate.end(self.id, self.used);
    }
}

impl Gate {
    /// A gate with `in_flight` places and `queue` waiting ones, each for at most `patience`.
    pub(crate) fn new(in_flight: u32, queue: u32, patience: Duration, metrics: Arc<Metrics>) -> Self {
        let core = Core { fair: Fair::new(in_flight, queue), waiting: HashMap::new() };
        Self { core: Mutex::new(core), patience, metrics }
    }

    /// Refuses at once what [`Gate::enter`] would refuse, before the body of `bytes` is read.
    pub(crate) fn check(
        &self,
        principal: &Principal,
        bytes: u64,
        max_wait: Option<Duration>,
    ) -> Result<(), Refused> {
        let now = Instant::now();
        let offer = self.offer(principal, bytes, max_wait, now);
        self.core().fair.check(now, &offer)
    }

    /// Takes a place for a request with a body of `bytes`, waiting for its turn if none is free and the queue has room.
    pub(crate) async fn enter(
        self: &Arc<Self>,
        principal: &Principal,
        bytes: u64,
        max_wait: Option<Duration>,
    ) -> Result<Place, Refused> {
        let now = Instant::now();
        let offer = self.offer(principal, bytes, max_wait, now);
        let (place, turn) = {
            let mut core = self.core();
            match core.fair.offer(now, &offer)? {
                Offered::Placed(id) => return Ok(Place { gate: Arc::clone(self), id, used: 0 }),
                Offered::Waits(id, evicted) => {
                    let (told, turn) = oneshot::channel();
                    core.waiting.insert(id, told);
                    if let Some((evicted, refused)) = evicted {
                        core.tell(evicted, Err(refused));
                    }
                    self.metrics.queue_depth.set(core.depth());
                    // Gives the turn up, or the place back, should this request leave now.
                    (Place { gate: Arc::clone(self), id, used: 0 }, turn)
                }
            }
        };
        match tokio::time::timeout_at(offer.deadline, turn).await {
            Ok(Ok(told)) => told.map(|()| place),
            Ok(Err(_)) | Err(_) => {
                drop(place);
                let patience = offer.deadline - now;
                let now = Instant::now();
                let again = Offer { deadline: now + patience, ..offer };
                Err(Refused { reason: Reason::QueueTimeout, after: self.core().fair.away(now, &again) })
            }
        }
    }

    /// What the key has left in this minute.
    pub(crate) fn left(&self, principal: &Principal) -> Left {
        self.core().fair.left(&principal.ledger)
    }

    fn offer(&self, principal: &Principal, bytes: u64, max_wait: Option<Duration>, now: Instant) -> Offer {
        let patience =
            [max_wait, principal.tenant.max_wait].into_iter().flatten().fold(self.patience, Duration::min);
        Offer {
            tenant: Arc::clone(&principal.tenant.name),
            weight: principal.tenant.weight,
            priority: principal.tenant.priority,
            ledger: Arc::clone(&principal.ledger),
            quota: principal.quota,
            cost: bytes / BYTES_PER_TOKEN + 1,
            deadline: now + patience,
        }
    }

    fn end(&self, id: Id, used: u64) {
        let mut core = self.core();
        core.waiting.remove(&id);
        if let Some(granted) = core.fair.end(Instant::now(), id, used) {
            // Who leaves in this very moment gives the place back by itself.
            core.tell(granted, Ok(()));
        }
        self.metrics.queue_depth.set(core.depth());
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Core {
    fn tell(&mut self, id: Id, what: Result<(), Refused>) {
        if let Some(told) = self.waiting.remove(&id) {
            // Nobody listens any more: its guard gives the place back.
            let _ = told.send(what);
        }
    }

    fn depth(&self) -> i64 {
        i64::try_from(self.fair.depth()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests;
