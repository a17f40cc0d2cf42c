//! What a prefill would cost, here or there.

use baton_config::Role;

use super::{Candidate, Work};

/// Prefill speed assumed of a worker that has measured none: what the reference engine does on two cores with the
/// tiny model, within a factor of two.
const DEFAULT_PREFILL_TOKENS_PER_S: f64 = 2000.0;
/// Prompt tokens a decode worker computes between two of its decode steps.
const CHUNK_TOKENS: f64 = 256.0;
/// What a handoff costs besides moving bytes: two calls more and one round trip of tickets.
const HANDOFF_S: f64 = 0.002;
/// Time between tokens assumed of a worker that has measured none.
const DEFAULT_ITL_S: f64 = 0.02;
/// Tokens by which a new request delays each request that shares its batch, in the cost of a decode worker.
const DELAY_TOKENS: f64 = 0.4;

/// Share of what a worker holds more than another one that counts against it. Without it a system prompt that all chats
/// share draws nearly half of them to the worker that computed it first, whose cache then gives up what the others have room
/// for: the busiest of four workers then has 0.43 of the requests instead of 0.28, and p99 of the first token is 31 ms instead of
/// 24 (`baton bench router --workload chats --workers 4`, means of three runs).
const CROWDED: f64 = 0.1;

/// Tokens of an answer for which a decode worker that is slower than it should be is charged.
const LATE_TOKENS: f64 = 20.0;

/// Which part a worker plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Prefill = 0,
    Decode = 1,
}

impl Side {
    /// Whether workers of a role play it.
    pub(crate) fn is_of(self, role: Role) -> bool {
        match self {
            Self::Prefill => role.prefills(),
            Self::Decode => role.decodes(),
        }
    }
}

/// One worker's prefill of the work, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Prefill {
    /// Before it begins.
    pub(crate) queue_s: f64,
    /// Once begun.
    pub(crate) compute_s: f64,
}

impl Prefill {
    /// Predicts the prefill of the work on a worker that plays `side` and computes what it has not cached.
    ///
    /// On the decode side each chunk waits for a decode step of the requests already running.
    pub(crate) fn on(candidate: &Candidate, work: Work, side: Side) -> Self {
        let tokens = work.uncached(candidate.cached_tokens);
        let speed = candidate.prefill_tokens_per_s.unwrap_or(DEFAULT_PREFILL_TOKENS_PER_S);
        let step_s = match side {
            Side::Decode if candidate.requests > 0 => itl_s(candidate),
            Side::Decode | Side::Prefill => 0.0,
        };
        let seconds =
            |tokens: f64| (tokens / speed + (tokens / CHUNK_TOKENS).ceil() * step_s) * candidate.slowness;
        Self { queue_s: seconds(candidate.prefill_tokens as f64), compute_s: seconds(f64::from(tokens)) }
    }

    /// From now to the end of the prompt.
    pub(crate) fn total_s(&self) -> f64 {
        self.queue_s + self.compute_s
    }
}

/// Both ways to the first token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Timing {
    /// On the prefill worker.
    pub(crate) prefill: Prefill,
    /// On the decode worker itself.
    pub(crate) decode: Prefill,
    /// Moving what the decode worker lacks, as far as it is not hidden behind the computing.
    pub(crate) transfer_s: f64,
}

impl Timing {
    /// To the first token when the prefill worker computes the prompt.
    pub(crate) fn remote_s(&self) -> f64 {
        self.prefill.total_s() + self.transfer_s + HANDOFF_S
    }
}

/// Conditional disaggregation: whether the prefill worker brings the first token sooner than the decode worker itself.
pub(crate) fn remote_is_sooner(timing: &Timing) -> bool {
    timing.remote_s() < timing.decode.total_s()
}

/// Chunks in which so many tokens are computed.
pub(crate) fn chunks(tokens: u32) -> f64 {
    (f64::from(tokens) / CHUNK_TOKENS).ceil().max(1.0)
}

/// The part of a transfer of `moved_s` that is left when the last of `chunks` has been computed: that chunk's own, and what
/// the link could not keep up with.
pub(crate) fn visible_s(moved_s: f64, compute_s: f64, chunks: f64) -> f64 {
    (moved_s / chunks).max(moved_s - compute_s * (1.0 - 1.0 / chunks))
}

/// What one more request costs on a decode worker: the tokens it delays for those that share its batch, more where
/// blocks are short, and more where tokens come slower than they should.
pub(crate) fn decode_cost_s(decode: &Candidate, slo_itl_s: f64) -> f64 {
    let scarcity = 1.0 / (1.0 - decode.kv_used.clamp(0.0, 0.99));
    let late_s = (itl_s(decode) - slo_itl_s).max(0.0);
    let others = f64::from(decode.requests) * itl_s(decode) * DELAY_TOKENS * scarcity;
    if decode.requests == 0 { 0.0 } else { others + late_s * LATE_TOKENS }
}

/// What it costs those who come after that the work is kept by a worker whose cache is fuller than that of another, which
/// gives up sooner what will be asked for: [`CROWDED`] of the time to compute what it holds more than `least`, and no more
/// than computing all of the work. So a prompt of which others have the greater part, like the first turn of a chat, goes
/// where there is room, and one that only this worker has stays.
pub(crate) fn crowding_s(candidate: &Candidate, least: u64, work: Work) -> f64 {
    let speed = candidate.prefill_tokens_per_s.unwrap_or(DEFAULT_PREFILL_TOKENS_PER_S);
    (candidate.held_tokens.saturating_sub(least) as f64 * CROWDED).min(f64::from(work.tokens)) / speed
}

/// What the worker that holds least holds.
pub(crate) fn least_held(candidates: &[Candidate]) -> u64 {
    candidates.iter().map(|candidate| candidate.held_tokens).min().unwrap_or(0)
}

fn itl_s(candidate: &Candidate) -> f64 {
    candidate.itl_ms.map_or(DEFAULT_ITL_S, |ms| ms / 1000.0)
}
