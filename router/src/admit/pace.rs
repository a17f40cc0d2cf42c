//! How fast places become free while all are taken: what waiting times are predicted from.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Places given back that the pace is measured over.
const SAMPLES: usize = 64;

/// Measures only while the house is full: an idle hour says nothing about how long a queue takes.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Time spent full, up to `full_since`.
    full_for: Duration,
    full_since: Option<Instant>,
    /// The time spent full at each of the last places given back.
    given_back: VecDeque<Duration>,
}

impl Pace {
    /// All places are taken from now on.
    pub(super) fn full(&mut self, now: Instant) {
        self.full_since.get_or_insert(now);
    }

    /// There are places again that nobody waits for.
    pub(super) fn slack(&mut self, now: Instant) {
        self.full_for = self.clock(now);
        self.full_since = None;
    }

    /// A place was given back.
    pub(super) fn given_back(&mut self, now: Instant) {
        if self.full_since.is_none() {
            return;
        }
        if self.given_back.len() == SAMPLES {
            self.given_back.pop_front();
        }
        self.given_back.push_back(self.clock(now));
    }

    /// The time between two places, as far as it is known. It grows while none comes.
    pub(super) fn interval(&self, now: Instant) -> Option<Duration> {
        let oldest = match (self.given_back.len(), self.given_back.front()) {
            // Until the record is full it reaches back to the first moment without a place.
            (SAMPLES, Some(oldest)) => *oldest,
            _ => Duration::ZERO,
        };
        let count = match self.given_back.len() {
            0 => return None,
            SAMPLES => SAMPLES - 1,
            count => count,
        };
        Some((self.clock(now) - oldest) / u32::try_from(count).unwrap_or(1))
    }

    fn clock(&self, now: Instant) -> Duration {
        self.full_for + self.full_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}
