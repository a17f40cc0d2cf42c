//! The life of a lease as its holder sees it: register, keep alive, lose, register anew. No I/O, no clock.
//!
//! ```text
//! Out ──registered──► Held ──410, 409, or ttl without a good answer──► Out (lost) ──registered, new epoch──► Held
//! ```
//! The lease's clock starts when a request is *sent*: the holder is never surer of it than the conductor.

use std::time::Duration;

use baton_config::Epoch;
use tokio::time::Instant;

use crate::dice::{Backoff, Dice};

/// Longest time over which lost leases are taken anew: some 700 registrations a second where 1,000 workers lost theirs,
/// which an etcd on a slow disk still takes.
const REJOIN_SPREAD_MAX: Duration = Duration::from_millis(1500);
/// Time over which holders ask whether their leases are known, once there is reason to doubt it.
const DOUBT_SPREAD: Duration = Duration::from_millis(500);

/// What the driver does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Register { endpoint: usize },
    Keepalive { endpoint: usize, epoch: Epoch },
    Wait { until: Instant },
}

/// What changed for the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// A new life began.
    Joined(Epoch),
    /// The lease of this life is gone, for that reason.
    Lost(Epoch, LostReason),
}

/// Why a lease is taken for lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LostReason {
    /// The conductor does not know it (it expired, or the conductor restarted).
    Gone,
    /// Another registration has the name.
    Superseded,
    /// No conductor answered for the length of the lease.
    Silence,
}

/// A conductor's answer to a keepalive, as far as the lease goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeepAnswer {
    Kept {
        ttl: Duration,
    },
    Lost(LostReason),
    /// No answer, or one that says nothing about the lease.
    None,
}

#[derive(Debug)]
enum Phase {
    /// Not registered.
    Out { next: Instant },
    /// Registered.
    Held { epoch: Epoch, ttl: Duration, good: Instant, next: Instant },
}

/// The state machine; the driver does what [`Lease::step`] says and reports back.
#[derive(Debug)]
pub(crate) struct Lease {
    endpoints: usize,
    endpoint: usize,
    failures: u32,
    backoff: Backoff,
    dice: Dice,
    phase: Phase,
}

impl Lease {
    pub(crate) fn new(now: Instant, endpoints: usize, dice: Dice) -> Self {
        assert!(endpoints > 0, "a lease needs an endpoint");
        let phase = Phase::Out { next: now };
        Self { endpoints, endpoint: 0, failures: 0, backoff: Backoff::CONDUCTOR, dice, phase }
    }

    /// What to do now. A lease that ran out in silence is reported once, through `turn`.
    pub(crate) fn step(&mut self, now: Instant, turn: &mut Option<Turn>) -> Step {
        if let Phase::Held { epoch, ttl, good, .. } = self.phase
            && now >= good + ttl
        {
            *turn = Some(Turn::Lost(epoch, LostReason::Silence));
            // Attempts to reach a conductor are already spread by the backoff: no further delay.
            self.phase = Phase::Out { next: now };
        }
        let endpoint = self.endpoint;
        match self.phase {
            Phase::Out { next } if now >= next => Step::Register { endpoint },
            Phase::Held { epoch, next, .. } if now >= next => Step::Keepalive { endpoint, epoch },
            Phase::Out { next } => Step::Wait { until: next },
            Phase::Held { next, good, ttl, .. } => Step::Wait { until: next.min(good + ttl) },
        }
    }

    /// A registration sent at `sent` was granted.
    pub(crate) fn registered(&mut self, sent: Instant, epoch: Epoch, ttl: Duration, every: Duration) -> Turn {
        self.failures = 0;
        self.phase = Phase::Held { epoch, ttl, good: sent, next: sent + every.min(ttl / 3) };
        Turn::Joined(epoch)
    }

    /// A registration was not granted. `refused`: by a conductor, so that another one won't help.
    pub(crate) fn not_registered(&mut self, now: Instant, refused: bool) {
        let delay = if refused { self.backoff.cap } else { self.fail() };
        self.phase = Phase::Out { next: now + delay };
    }

    /// The answer to a keepalive for `epoch` sent at `sent`.
    pub(crate) fn kept(
        &mut self,
        sent: Instant,
        now: Instant,
        of: Epoch,
        answer: KeepAnswer,
    ) -> Option<Turn> {
        let Phase::Held { epoch, ttl, good, .. } = self.phase else { return None };
        if epoch != of {
            return None;
        }
        match answer {
            KeepAnswer::Kept { ttl } if !ttl.is_zero() => {
                self.failures = 0;
                self.phase = Phase::Held { epoch, ttl, good: sent, next: sent + ttl / 3 };
                None
            }
            KeepAnswer::Kept { .. } => Some(self.lose(now, epoch, ttl, LostReason::Gone)),
            KeepAnswer::Lost(reason) => Some(self.lose(now, epoch, ttl, reason)),
            KeepAnswer::None => {
                let next = now + self.fail();
                self.phase = Phase::Held { epoch, ttl, good, next };
                None
            }
        }
    }

    /// Makes the next keepalive due now: there is news to tell.
    pub(crate) fn hurry(&mut self, now: Instant) {
        if let Phase::Held { next, .. } = &mut self.phase
            && self.failures == 0
        {
            *next = (*next).min(now);
        }
    }

    /// The conductors' data are not those in which the lease was given: asks soon whether it is known there, instead of
    /// a third of the ttl later.
    pub(crate) fn doubt(&mut self, now: Instant) {
        let soon = now + self.dice.up_to(DOUBT_SPREAD);
        if let Phase::Held { next, .. } = &mut self.phase
            && self.failures == 0
        {
            *next = (*next).min(soon);
        }
    }

    /// Everybody loses the lease at once when a conductor restarts: come back spread over a while.
    fn lose(&mut self, now: Instant, epoch: Epoch, ttl: Duration, reason: LostReason) -> Turn {
        self.failures = 0;
        self.phase = Phase::Out { next: now + self.dice.up_to((ttl / 3).min(REJOIN_SPREAD_MAX)) };
        Turn::Lost(epoch, reason)
    }

    fn fail(&mut self) -> Duration {
        self.endpoint = (self.endpoint + 1) % self.endpoints;
        let delay = self.backoff.delay(self.failures, &mut self.dice);
        self.failures = self.failures.saturating_add(1);
        delay
    }
}

#[cfg(test)]
mod tests;
