//! Whether a watch that says nothing is alive: it is asked for its progress, and must answer. No I/O, no clock.

use std::time::Duration;

use tokio::time::Instant;

/// A watch silent for so long is asked for its progress, and asked again after the same time.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// So many questions without any message, and the watch is dead.
const UNANSWERED_MAX: u32 = 3;

/// What to do about the silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Silence {
    /// Nothing yet.
    Wait,
    /// Ask for progress.
    Ask,
    /// Give the watch up.
    Dead,
}

/// The silence of one watch.
#[derive(Debug)]
pub(super) struct Liveness {
    next: Instant,
    unanswered: u32,
}

impl Liveness {
    pub(super) fn new(now: Instant) -> Self {
        Self { next: now + ASK_EVERY, unanswered: 0 }
    }

    /// Any message came.
    pub(super) fn heard(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    /// When to call [`Liveness::tick`].
    pub(super) fn wake(&self) -> Instant {
        self.next
    }

    pub(super) fn tick(&mut self, now: Instant) -> Silence {
        if now < self.next {
            return Silence::Wait;
        }
        if self.unanswered == UNANSWERED_MAX {
            return Silence::Dead;
        }
        self.unanswered += 1;
        self.next = now + ASK_EVERY;
        Silence::Ask
    }
}

#[cfg(test)]
mod tests;
