//! Which member of etcd is asked, and when: one at a time, the next one after a failure. No I/O, no clock.
//!
//! A client that spreads its calls over all members keeps asking the dead one; one that stays where it gets answers
//! loses at most the call that finds out.

use tokio::time::Instant;

use crate::dice::{Backoff, Dice};

/// Where to ask. A failure is reported with the generation it was seen in, so that many callers who fail together
/// move on once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) endpoint: usize,
    pub(super) generation: u64,
}

/// The choice of the member.
#[derive(Debug)]
pub(super) struct Pin {
    endpoints: usize,
    place: Place,
    failures: u32,
    not_before: Instant,
    backoff: Backoff,
    dice: Dice,
}

impl Pin {
    pub(super) fn new(endpoints: usize, now: Instant, dice: Dice) -> Self {
        assert!(endpoints > 0, "etcd needs an endpoint");
        let place = Place { endpoint: 0, generation: 1 };
        Self { endpoints, place, failures: 0, not_before: now, backoff: Backoff::CONDUCTOR, dice }
    }

    pub(super) fn place(&self) -> Place {
        self.place
    }

    /// Nobody connects before this moment.
    pub(super) fn not_before(&self) -> Instant {
        self.not_before
    }

    /// The member answered.
    pub(super) fn good(&mut self, generation: u64) {
        if generation == self.place.generation {
            self.failures = 0;
        }
    }

    /// The member did not answer. Whether this is news: then it is given up for the next one.
    pub(super) fn failed(&mut self, now: Instant, generation: u64) -> bool {
        if generation != self.place.generation {
            return false;
        }
        self.place.endpoint = (self.place.endpoint + 1) % self.endpoints;
        self.place.generation += 1;
        // Each round over all members doubles the pause: during an election the next one may know the leader.
        let rounds = self.failures / u32::try_from(self.endpoints).unwrap_or(u32::MAX);
        self.failures = self.failures.saturating_add(1);
        self.not_before = now + self.backoff.delay(rounds, &mut self.dice);
        true
    }
}

#[cfg(test)]
mod tests;
