//! What one key may use: requests and tokens in a minute, requests at once. No clock inside.

use std::time::Duration;

use baton_config::keys::Quota;
use tokio::time::Instant;

use super::{Reason, Refused};

/// How much the latest request counts in the mean of durations.
const LATEST: f64 = 0.2;

/// What a key has used.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    concurrency: Option<u32>,
    active: u32,
    /// How long its requests take.
    mean_s: f64,
}

/// An allowance that flows in evenly and is kept for at most a minute.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    per_min: f64,
    /// Below zero after something took more than it had said it would.
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(per_min: u64, now: Instant) -> Self {
        Self { per_min: per_min as f64, level: per_min as f64, at: now }
    }

    fn flow(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.level = (self.level + since * self.per_min / 60.0).min(self.per_min);
        self.at = now;
    }

    /// How long until `wanted` can be taken; what is more than a minute's allowance needs a full bucket.
    fn wait(&self, wanted: f64) -> Duration {
        let lacks = wanted.min(self.per_min) - self.level;
        // A rounding error is no reason to send somebody away.
        if lacks <= 1e-6 { Duration::ZERO } else { Duration::from_secs_f64(lacks * 60.0 / self.per_min) }
    }
}

fn renewed(bucket: Option<Bucket>, per_min: Option<u64>, now: Instant) -> Option<Bucket> {
    let per_min = per_min?;
    match bucket {
        Some(bucket) if bucket.per_min == per_min as f64 => Some(bucket),
        // A changed limit holds at once; what was used stays used.
        Some(bucket) => {
            Some(Bucket { per_min: per_min as f64, level: bucket.level.min(per_min as f64), at: bucket.at })
        }
        None => Some(Bucket::full(per_min, now)),
    }
}

impl Ledger {
    /// Brings the ledger up to `now` and to the limits that hold now.
    pub(super) fn renew(&mut self, quota: &Quota, now: Instant) {
        self.requests = renewed(self.requests, quota.requests_per_min, now);
        self.tokens = renewed(self.tokens, quota.tokens_per_min, now);
        self.concurrency = quota.concurrency;
        for bucket in [&mut self.requests, &mut self.tokens].into_iter().flatten() {
            bucket.flow(now);
        }
    }

    /// Whether a request of about `tokens` may begin; [`Ledger::renew`] comes first.
    pub(super) fn check(&self, tokens: u64) -> Result<(), Refused> {
        if self.concurrency.is_some_and(|most| self.active >= most) {
            let most = f64::from(self.concurrency.unwrap_or(1).max(1));
            // They end one after the other, and each of them makes room.
            let after = Duration::from_secs_f64((self.mean_s / most).clamp(0.0, 3600.0));
            return Err(Refused { reason: Reason::Concurrency, after });
        }
        let buckets =
            [(&self.requests, 1.0, Reason::Requests), (&self.tokens, tokens as f64, Reason::Tokens)];
        let waits = buckets.map(|(bucket, wanted, reason)| {
            (bucket.as_ref().map_or(Duration::ZERO, |bucket| bucket.wait(wanted)), reason)
        });
        let [requests, tokens] = waits;
        // Both have to have room: the later of the two is the truth.
        let (after, reason) = if tokens.0 > requests.0 { tokens } else { requests };
        if after.is_zero() { Ok(()) } else { Err(Refused { reason, after }) }
    }

    /// Books a request of about `tokens` that begins.
    pub(super) fn begin(&mut self, tokens: u64) {
        self.active += 1;
        if let Some(bucket) = &mut self.requests {
            bucket.level -= 1.0;
        }
        if let Some(bucket) = &mut self.tokens {
            bucket.level -= tokens as f64;
        }
    }

    /// Books its end: it had been taken for `charged` tokens and used `used`.
    pub(super) fn end(&mut self, charged: u64, used: u64, took: Duration) {
        self.active -= 1;
        self.mean_s = if self.mean_s > 0.0 {
            self.mean_s + LATEST * (took.as_secs_f64() - self.mean_s)
        } else {
            took.as_secs_f64()
        };
        if let Some(bucket) = &mut self.tokens {
            bucket.level = (bucket.level + charged as f64 - used as f64).min(bucket.per_min);
        }
    }

    /// Books that it never began and used nothing.
    pub(super) fn undo(&mut self, charged: u64) {
        self.active -= 1;
        for (bucket, taken) in [(&mut self.requests, 1.0), (&mut self.tokens, charged as f64)] {
            if let Some(bucket) = bucket {
                bucket.level = (bucket.level + taken).min(bucket.per_min);
            }
        }
    }

    /// Requests under way.
    #[cfg(test)]
    pub(super) fn active(&self) -> u32 {
        self.active
    }

    /// What is left of requests and of tokens, with the limits.
    pub(super) fn left(&self) -> Left {
        let of = |bucket: &Option<Bucket>| {
            bucket.as_ref().map(|bucket| (bucket.per_min as u64, bucket.level.max(0.0) as u64))
        };
        Left { requests: of(&self.requests), tokens: of(&self.tokens) }
    }
}

/// What a key has left in this minute: limit and rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) requests: Option<(u64, u64)>,
    pub(crate) tokens: Option<(u64, u64)>,
}
