//! Requests that workers die with: after two deaths a request is refused for a while, instead of killing a third worker.
//!
//! A death counts when the connection to a worker breaks with the request on it and no token of it yet, and the worker, asked
//! once more, turns out to be gone or in another life. A token clears the request: the engine has survived its prompt. Whether a
//! server of another project died is found out otherwise ([`crate::forward`]); what follows from it is the same.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::protocol::Sampling;
use tokio::time::Instant;

use super::{CallError, Caller};
use crate::fleet::Worker;

/// Deaths after which a request is refused,
const DEATHS: usize = 2;
/// for so long. Deaths are forgotten after this, too.
const BARRED_FOR: Duration = Duration::from_secs(600);
/// Cases kept; the oldest makes room.
const CASES_MAX: usize = 1024;
/// So soon after its end no server is back, unless it has answered something.
const DYING: Duration = Duration::from_secs(1);
/// For a worker to say that it lives. Who says nothing at all may be cut off, which is nobody's fault.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is told of a request before it is placed.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It may go on.
    Free,
    /// Once it is known which of these are deaths.
    Doubtful(Vec<Death>),
    /// Enough died.
    Barred,
}

/// The requests that workers died with.
#[derive(Debug, Default)]
pub(crate) struct Suspects {
    /// Nobody can make a request that is taken for another's.
    key: RandomState,
    /// How many there are, read by every request.
    count: AtomicUsize,
    cases: Mutex<HashMap<u64, Case>>,
}

#[derive(Debug)]
struct Case {
    deaths: Vec<Death>,
    last: Instant,
}

/// What may have been the death of a worker, or of the server beside it.
#[derive(Debug, Clone)]
pub(crate) struct Death {
    pub(crate) worker: Arc<Worker>,
    /// When the request was sent there,
    pub(crate) sent_at: Instant,
    /// and when it failed.
    pub(crate) at: Instant,
    /// When its server had answered anything last.
    answered: Option<Instant>,
    /// It is known to be dead, not only out of reach for a moment.
    certain: bool,
}

impl Death {
    /// One that is not certain.
    pub(crate) fn of(worker: &Arc<Worker>, sent_at: Instant, at: Instant) -> Self {
        Self { worker: Arc::clone(worker), sent_at, at, answered: *worker.answered(), certain: false }
    }

    /// Whether it is of the same life as `later`. A worker has another epoch in another life; the server beside one just goes
    /// on, and what was sent to it after it broke was sent to another life of it, if it did die: but one that is dying
    /// still takes connections for a moment, without answering anything.
    fn same_life(&self, later: &Self) -> bool {
        let dying = later.sent_at < self.at + DYING && later.answered.is_none_or(|last| last < self.at);
        self.same_worker(later) && (self.worker.member.server.is_none() || later.sent_at < self.at || dying)
    }

    fn same_worker(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.worker.member, &other.worker.member);
        ours.worker == theirs.worker && ours.epoch == theirs.epoch
    }

    fn is(&self, other: &Self) -> bool {
        self.same_worker(other) && self.at == other.at
    }
}

impl Case {
    fn is_closed(&self) -> bool {
        self.deaths.iter().filter(|death| death.certain).count() >= DEATHS
    }
}

impl Suspects {
    /// What names a request of `owner`: what an engine sees of it, but for the seed, what it has generated and what separates
    /// its prefixes from others.
    pub(crate) fn print(&self, prompt: &[u32], owner: u64, sampling: &Sampling) -> u64 {
        let Sampling { seed: _, logit_bias, stop_tokens, .. } = sampling;
        let numbers = [
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.repetition_penalty,
        ];
        let bits = numbers.map(|number| u64::from(number.to_bits()));
        let bias: Vec<_> = logit_bias.iter().map(|(token, bias)| (*token, bias.to_bits())).collect();
        let rest = (sampling.top_k, sampling.logprobs, sampling.ignore_eos, stop_tokens);
        self.key.hash_one((prompt, owner, bits, bias, rest))
    }

    /// What names a request of `owner` that is passed on to servers as it came.
    pub(crate) fn print_of_body(&self, path: &str, body: &[u8], owner: u64) -> u64 {
        self.key.hash_one((path, body, owner))
    }

    /// Whether no request is under suspicion: nothing needs to be asked, then.
    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    /// A worker may have died with the request.
    pub(crate) fn broke(&self, print: u64, death: Death) {
        let now = death.at;
        let mut cases = self.cases();
        cases.retain(|_, case| now < case.last + BARRED_FOR);
        if cases.len() >= CASES_MAX
            && !cases.contains_key(&print)
            && let Some(oldest) = cases.iter().min_by_key(|(_, case)| case.last).map(|(print, _)| *print)
        {
            cases.remove(&oldest);
        }
        let case = cases.entry(print).or_insert_with(|| Case { deaths: Vec::new(), last: now });
        if !case.is_closed() && !case.deaths.iter().any(|known| known.same_life(&death)) {
            case.deaths.push(death);
            case.last = now;
        }
        self.count.store(cases.len(), Ordering::Relaxed);
    }

    /// A worker gave a token of the request and lives.
    pub(crate) fn survived(&self, print: u64) {
        let mut cases = self.cases();
        if cases.get(&print).is_some_and(|case| !case.is_closed()) {
            cases.remove(&print);
            self.count.store(cases.len(), Ordering::Relaxed);
        }
    }

    /// Whether the request may be placed.
    pub(crate) fn verdict(&self, print: u64, now: Instant) -> Verdict {
        let cases = self.cases();
        let Some(case) = cases.get(&print).filter(|case| now < case.last + BARRED_FOR) else {
            return Verdict::Free;
        };
        if case.is_closed() {
            return Verdict::Barred;
        }
        if case.deaths.len() < DEATHS {
            return Verdict::Free;
        }
        Verdict::Doubtful(case.deaths.iter().filter(|death| !death.certain).cloned().collect())
    }

    /// It turned out whether it was a death.
    pub(crate) fn settle(&self, print: u64, death: &Death, died: bool) {
        let mut cases = self.cases();
        let Some(case) = cases.get_mut(&print).filter(|case| !case.is_closed()) else { return };
        if died {
            let same = case.deaths.iter_mut().filter(|known| known.is(death) || known.same_life(death));
            same.for_each(|known| known.certain = true);
        } else {
            case.deaths.retain(|known| !known.is(death));
        }
    }

    fn cases(&self) -> MutexGuard<'_, HashMap<u64, Case>> {
        self.cases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks whether the life of a worker has ended.
pub(crate) async fn has_died(caller: &Caller, death: &Death) -> bool {
    let worker = &death.worker;
    match tokio::time::timeout(PATIENCE, caller.state(worker.authority())).await {
        Ok(Ok(status)) => status.worker != worker.member.worker || status.epoch != Some(worker.member.epoch),
        Ok(Err(error)) => matches!(error, CallError::Connect(_) | CallError::Broken(_)),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests;
