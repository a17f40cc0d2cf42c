//! What a worker last said of itself, and whether it answers.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// A worker's own account of its load, less what this router had on it at that moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Report {
    /// Requests of others running and waiting.
    pub(super) requests: u32,
    /// Prompt tokens of others queued or being computed.
    pub(super) prefill_tokens: u64,
    /// Measured prefill speed.
    pub(super) prefill_tokens_per_s: Option<f64>,
    /// Measured time between tokens.
    pub(super) itl_ms: Option<f64>,
    /// Share of KV blocks that hold live requests, 0 to 1.
    pub(super) kv_used: f64,
}

/// Every decision reads this of every worker, and few things change it: numbers of their own beside each other, so that
/// reading them writes nothing that another processor would have to fetch. Who reads while a report comes may see one part of it
/// before the other, which is no worse than to have asked a moment earlier.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Seen {
    /// What moments are counted from.
    since: Instant,
    /// Until when it is avoided, because a connection was refused,
    down_until: AtomicU64,
    /// and the first of the polls in a row that failed: both in nanoseconds, 0 for never.
    silent_since: AtomicU64,
    requests: AtomicU32,
    /// Whether it ever reported.
    reported: AtomicBool,
    /// It says itself that it should get no requests: the conductor may not have heard, or be away.
    unwilling: AtomicBool,
    /// Of these, that it is not well.
    unhealthy: AtomicBool,
    prefill_tokens: AtomicU64,
    /// Bits of numbers; not a number where there is none.
    prefill_tokens_per_s: AtomicU64,
    itl_ms: AtomicU64,
    kv_used: AtomicU64,
}

impl Seen {
    /// Nothing yet.
    pub(super) fn nothing() -> Self {
        Self {
            since: Instant::now(),
            down_until: AtomicU64::new(0),
            silent_since: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            reported: AtomicBool::new(false),
            unwilling: AtomicBool::new(false),
            unhealthy: AtomicBool::new(false),
            prefill_tokens: AtomicU64::new(0),
            prefill_tokens_per_s: AtomicU64::new(f64::NAN.to_bits()),
            itl_ms: AtomicU64::new(f64::NAN.to_bits()),
            kv_used: AtomicU64::new(0),
        }
    }

    /// Its last report.
    pub(super) fn report(&self) -> Option<Report> {
        let number = |bits: &AtomicU64| f64::from_bits(bits.load(Ordering::Relaxed));
        let positive = |bits: &AtomicU64| Some(number(bits)).filter(|number| !number.is_nan());
        self.has_reported().then(|| Report {
            requests: self.requests.load(Ordering::Relaxed),
            prefill_tokens: self.prefill_tokens.load(Ordering::Relaxed),
            prefill_tokens_per_s: positive(&self.prefill_tokens_per_s),
            itl_ms: positive(&self.itl_ms),
            kv_used: number(&self.kv_used),
        })
    }

    /// Whether it ever reported.
    pub(super) fn has_reported(&self) -> bool {
        self.reported.load(Ordering::Acquire)
    }

    /// Whether it is to be avoided, for any reason, when `silence` is too long to be without an answer.
    pub(super) fn is_well(&self, now: Instant, silence: Duration) -> bool {
        !self.is_down(now) && !self.unwilling.load(Ordering::Relaxed) && self.silent_for(now) < silence
    }

    /// Whether a connection to it failed a moment ago.
    pub(super) fn is_down(&self, now: Instant) -> bool {
        self.moment(&self.down_until).is_some_and(|until| now < until)
    }

    /// How long it has not answered.
    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        self.moment(&self.silent_since).map_or(Duration::ZERO, |since| now.duration_since(since))
    }

    /// Whether it last said that it is not well.
    pub(super) fn is_unhealthy(&self) -> bool {
        self.unhealthy.load(Ordering::Relaxed)
    }

    /// It answered.
    pub(super) fn answered(&self, report: Report, unwilling: bool, unhealthy: bool) {
        let put = |bits: &AtomicU64, number: f64| bits.store(number.to_bits(), Ordering::Relaxed);
        self.requests.store(report.requests, Ordering::Relaxed);
        self.prefill_tokens.store(report.prefill_tokens, Ordering::Relaxed);
        put(&self.prefill_tokens_per_s, report.prefill_tokens_per_s.unwrap_or(f64::NAN));
        put(&self.itl_ms, report.itl_ms.unwrap_or(f64::NAN));
        put(&self.kv_used, report.kv_used);
        self.unwilling.store(unwilling, Ordering::Relaxed);
        self.unhealthy.store(unhealthy, Ordering::Relaxed);
        self.down_until.store(0, Ordering::Relaxed);
        self.silent_since.store(0, Ordering::Relaxed);
        self.reported.store(true, Ordering::Release);
    }

    /// It does not answer; what counts is since when.
    pub(super) fn silent(&self, now: Instant) {
        let first = self.nanoseconds(now);
        // Only who finds it answering notes the moment.
        let _ = self.silent_since.compare_exchange(0, first, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// It is to be avoided for a while.
    pub(super) fn down(&self, until: Instant) {
        self.down_until.store(self.nanoseconds(until), Ordering::Relaxed);
    }

    fn nanoseconds(&self, moment: Instant) -> u64 {
        let after = moment.saturating_duration_since(self.since).as_nanos();
        u64::try_from(after).unwrap_or(u64::MAX).max(1)
    }

    fn moment(&self, nanoseconds: &AtomicU64) -> Option<Instant> {
        match nanoseconds.load(Ordering::Relaxed) {
            0 => None,
            after => Some(self.since + Duration::from_nanos(after)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_what_is_seen() {
        let seen = Seen::nothing();
        assert_eq!((seen.report(), seen.is_unhealthy()), (None, false));
        let report = Report {
            requests: 3,
            prefill_tokens: 1 << 40,
            prefill_tokens_per_s: Some(1234.5),
            itl_ms: None,
            kv_used: 0.25,
        };
        seen.answered(report, true, true);
        assert_eq!(seen.report(), Some(report));
        assert!(seen.is_unhealthy() && !seen.is_well(Instant::now(), Duration::MAX));
        let other = Report { prefill_tokens_per_s: None, itl_ms: Some(2.0), ..report };
        seen.answered(other, false, false);
        assert_eq!(seen.report(), Some(other));
        assert!(!seen.is_unhealthy() && seen.is_well(Instant::now(), Duration::MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_counted_from_its_beginning_and_ends_with_an_answer() {
        let seen = Seen::nothing();
        let start = Instant::now();
        let second = Duration::from_secs(1);
        seen.silent(start + second);
        seen.silent(start + 2 * second);
        assert_eq!(seen.silent_for(start + 4 * second), 3 * second);
        assert!(
            seen.is_well(start + 4 * second, 4 * second) && !seen.is_well(start + 4 * second, 3 * second)
        );
        seen.down(start + 5 * second);
        assert!(seen.is_down(start + 4 * second) && !seen.is_down(start + 5 * second));
        let report =
            Report { requests: 0, prefill_tokens: 0, prefill_tokens_per_s: None, itl_ms: None, kv_used: 0.0 };
        seen.answered(report, false, false);
        assert!(!seen.is_down(start + 4 * second));
        assert_eq!(seen.silent_for(start + 9 * second), Duration::ZERO);
    }
}
