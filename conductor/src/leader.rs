//! Which conductor leads: a lease, a key that only one can create under it, and the revision of that as the fence.
//!
//! ```text
//! Out ──grant──► Held, unlisted ──announce──► waiting ──claim: created──► leading ──silence for a ttl─┐
//!  ▲               │                            ▲  └──taken, or no answer──► unsure ◄─────────────────┘
//!  └─ lease gone ──┘                            └──────────── not ours ────────┘ └── read: ours ──► leading
//! ```
//! The state machine; no I/O, no clock. The lease's time counts from the *sending* of the last keepalive that was
//! answered well, so a leader stops before another can begin. One that stood still may not know: its writes carry the
//! fence, and fail. A lease that was silent is not given up but asked for again: after an outage of the store it is
//! often still there, and with it the key.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::dice::{Backoff, Dice};
use crate::reconcile::Fence;
use crate::store::{LeaseId, Revision};

mod driver;

pub(crate) use driver::{Candidate, Leadership, leader};

/// The name of the leading conductor.
pub(crate) const LEADER_KEY: &str = "leader";
/// Where conductors are listed.
pub(crate) const CONDUCTORS_PREFIX: &str = "conductors/";

/// A leader that died is followed by another within this.
#[cfg(test)]
pub(crate) const TTL: Duration = Duration::from_secs(3);
/// Lease asked for. Shorter than [`TTL`]: etcd ends a lease up to 500 ms late, then comes [`CLAIM_JITTER`] and the
/// claim. Not shorter than this, since etcd grants no less; while it replaces a leader of its own it ends no lease.
pub(crate) const LEASE_TTL: Duration = Duration::from_secs(2);
/// Claims of several conductors that see the leader go are spread over this.
const CLAIM_JITTER: Duration = Duration::from_millis(100);

/// What a conductor tells the others about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConductorRecord {
    pub(crate) name: String,
    pub(crate) url: String,
    pub(crate) pid: u32,
    pub(crate) version: String,
}

/// The key [`LEADER_KEY`] as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leader {
    pub(crate) name: String,
    pub(crate) lease: Option<LeaseId>,
    /// When it was created: the fence.
    pub(crate) revision: Revision,
}

/// What the driver does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask for a lease.
    Grant,
    /// List this conductor under the lease.
    Announce { lease: LeaseId },
    /// Create the leader's key under the lease, if it is not there.
    Claim { lease: LeaseId },
    /// Read the leader's key.
    Confirm,
    /// Keep the lease alive.
    KeepAlive { lease: LeaseId },
    /// Call `step` again at `until`, or when the mirror changes.
    Wait { until: Instant },
}

/// A store's answer to a write under the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    /// Done at that revision.
    At(Revision),
    /// The condition did not hold.
    Refused,
    /// The lease is gone.
    LeaseGone,
    /// No answer: it may have been done, now or later.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Unlisted { next: Instant },
    Waiting { claim: Instant },
    Unsure { next: Instant },
    Leading { fence: Fence },
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Without a lease.
    Out { next: Instant },
    /// With a lease whose time began at `good`; kept alive next at `beat`.
    Held { lease: LeaseId, ttl: Duration, good: Instant, beat: Instant, role: Role },
}

/// One conductor's part in the election; the driver does what [`Election::step`] says and reports back.
#[derive(Debug)]
pub(crate) struct Election {
    phase: Phase,
    failures: u32,
    backoff: Backoff,
    dice: Dice,
}

impl Election {
    pub(crate) fn new(now: Instant, dice: Dice) -> Self {
        Self { phase: Phase::Out { next: now }, failures: 0, backoff: Backoff::CONDUCTOR, dice }
    }

    /// The current term, if this conductor surely leads.
    pub(crate) fn term(&self, now: Instant) -> Option<Fence> {
        match self.phase {
            Phase::Held { ttl, good, role: Role::Leading { fence }, .. } if now < good + ttl => Some(fence),
            _ => None,
        }
    }

    /// When [`Election::term`] ends by itself.
    pub(crate) fn term_ends(&self) -> Option<Instant> {
        match self.phase {
            Phase::Held { ttl, good, role: Role::Leading { .. }, .. } => Some(good + ttl),
            _ => None,
        }
    }

    /// The lease to give back at the end.
    pub(crate) fn lease(&self) -> Option<LeaseId> {
        match self.phase {
            Phase::Held { lease, .. } => Some(lease),
            Phase::Out { .. } => None,
        }
    }

    pub(crate) fn step(&mut self, now: Instant) -> Step {
        let Phase::Held { lease, ttl, good, beat, role } = &mut self.phase else {
            return match self.phase {
                Phase::Out { next } if now < next => Step::Wait { until: next },
                _ => Step::Grant,
            };
        };
        let (lease, ends) = (*lease, *good + *ttl);
        let silent = now >= ends;
        if silent && matches!(role, Role::Leading { .. }) {
            *role = Role::Unsure { next: now };
        }
        if now >= *beat {
            return Step::KeepAlive { lease };
        }
        // Under a lease that may be gone, only an answer to a keepalive helps.
        if silent {
            return Step::Wait { until: *beat };
        }
        let (next, step) = match *role {
            Role::Unlisted { next } => (next, Step::Announce { lease }),
            Role::Waiting { claim } => (claim, Step::Claim { lease }),
            Role::Unsure { next } => (next, Step::Confirm),
            Role::Leading { .. } => return Step::Wait { until: (*beat).min(ends) },
        };
        if now >= next { step } else { Step::Wait { until: next.min(*beat) } }
    }

    /// The answer to [`Step::Grant`] sent at `sent`; `None` if there was no good one.
    pub(crate) fn granted(&mut self, sent: Instant, now: Instant, lease: Option<(LeaseId, Duration)>) {
        self.phase = match lease {
            Some((lease, ttl)) => {
                self.failures = 0;
                let role = Role::Unlisted { next: now };
                Phase::Held { lease, ttl, good: sent, beat: sent + ttl / 3, role }
            }
            None => Phase::Out { next: now + self.fail() },
        };
    }

    /// The answer to [`Step::Announce`].
    pub(crate) fn announced(&mut self, now: Instant, answer: Written) {
        match answer {
            Written::At(_) => {
                let claim = now + self.dice.up_to(CLAIM_JITTER);
                self.become_role(Role::Waiting { claim });
            }
            Written::LeaseGone => self.lose(now),
            Written::Refused | Written::Unknown => {
                let next = now + self.fail();
                self.become_role(Role::Unlisted { next });
            }
        }
    }

    /// The answer to [`Step::Claim`].
    pub(crate) fn claimed(&mut self, now: Instant, answer: Written) {
        match answer {
            Written::At(revision) => self.become_role(Role::Leading { fence: Fence::new(revision) }),
            // Maybe by this conductor: an earlier claim whose answer was lost.
            Written::Refused => self.become_role(Role::Unsure { next: now }),
            Written::LeaseGone => self.lose(now),
            Written::Unknown => {
                let next = now + self.fail();
                self.become_role(Role::Unsure { next });
            }
        }
    }

    /// The answer to [`Step::Confirm`]: the key (or its absence), or `None` if there was no answer.
    pub(crate) fn confirmed(&mut self, now: Instant, answer: Option<Option<Leader>>) {
        let Phase::Held { lease, ttl, .. } = self.phase else { return };
        let jitter = self.dice.up_to(CLAIM_JITTER);
        let role = match answer {
            None => Role::Unsure { next: now + self.fail() },
            Some(None) => Role::Waiting { claim: now + jitter },
            Some(Some(leader)) if leader.lease == Some(lease) => {
                Role::Leading { fence: Fence::new(leader.revision) }
            }
            // The mirror will tell when it goes. Should it fail to, a claim in vain costs little.
            Some(Some(_)) => Role::Waiting { claim: now + ttl + jitter },
        };
        self.become_role(role);
    }

    /// The answer to [`Step::KeepAlive`] sent at `sent`: the lease's time, zero if it is gone, `None` without an answer.
    pub(crate) fn kept(&mut self, sent: Instant, now: Instant, answer: Option<Duration>) {
        let Phase::Held { ttl, good, beat, .. } = &mut self.phase else { return };
        match answer {
            Some(left) if left.is_zero() => self.lose(now),
            Some(left) => {
                (*ttl, *good, *beat) = (left, sent, sent + left / 3);
                self.failures = 0;
            }
            None => {
                let delay = self.backoff.delay(self.failures, &mut self.dice);
                *beat = now + delay;
                self.failures = self.failures.saturating_add(1);
            }
        }
    }

    /// What the mirror shows at `revision`.
    pub(crate) fn saw(&mut self, now: Instant, revision: Revision, leader: Option<&Leader>) {
        let jitter = self.dice.up_to(CLAIM_JITTER);
        let Phase::Held { lease, ttl, role, .. } = &mut self.phase else { return };
        let mine = leader.is_some_and(|leader| leader.lease == Some(*lease));
        match role {
            // Deposed, but only if the mirror is not merely behind.
            Role::Leading { fence } if !mine && revision >= fence.revision() => {
                *role = Role::Unsure { next: now };
            }
            Role::Waiting { .. } if mine => *role = Role::Unsure { next: now },
            Role::Waiting { claim } if leader.is_none() => *claim = (*claim).min(now + jitter),
            Role::Waiting { claim } => *claim = now + *ttl + jitter,
            Role::Leading { .. } | Role::Unsure { .. } | Role::Unlisted { .. } => {}
        }
    }

    fn become_role(&mut self, new: Role) {
        if let Phase::Held { role, .. } = &mut self.phase {
            *role = new;
        }
    }

    fn lose(&mut self, now: Instant) {
        self.phase = Phase::Out { next: now };
    }

    fn fail(&mut self) -> Duration {
        let delay = self.backoff.delay(self.failures, &mut self.dice);
        self.failures = self.failures.saturating_add(1);
        delay
    }
}

#[cfg(test)]
mod tests;
