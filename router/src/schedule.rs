//! The scheduler: one pure function from a snapshot of the fleet to a choice of workers.
//!
//! Nothing here reads a clock or a lock: [`choose`] is called with the loads as they are and a ticket number that only
//! grows; the same snapshot, ticket and seed give the same choice.

mod joint;
mod predict;

use baton_config::fleet::{Disaggregation, PolicyKind};

pub(crate) use joint::{Offer, offers};
pub(crate) use predict::{Prefill, Side, Timing, remote_is_sooner};

/// A worker that may be chosen.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Candidate {
    /// Its place in the caller's list.
    pub(crate) key: usize,
    /// The same number for the same worker in every snapshot.
    pub(crate) identity: u64,
    /// Requests running and waiting.
    pub(crate) requests: u32,
    /// Prompt tokens queued or being computed.
    pub(crate) prefill_tokens: u64,
    /// Measured prefill speed.
    pub(crate) prefill_tokens_per_s: Option<f64>,
    /// By which factor its prefills take longer than its speed says.
    pub(crate) slowness: f64,
    /// Measured time between tokens.
    pub(crate) itl_ms: Option<f64>,
    /// Share of its KV blocks that hold live requests.
    pub(crate) kv_used: f64,
    /// Tokens of the work whose KV it has.
    pub(crate) cached_tokens: u32,
    /// Tokens of anything whose KV it has.
    pub(crate) held_tokens: u64,
}

/// The fleet at one moment.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// Workers that can decode.
    pub(crate) decode: Vec<Candidate>,
    /// Workers that can prefill for others.
    pub(crate) prefill: Vec<Candidate>,
}

impl Snapshot {
    /// A snapshot in which workers that have measured nothing are taken to be as fast as the fastest of the fleet,
    /// so that they are tried, and then measured.
    pub(crate) fn new(mut decode: Vec<Candidate>, mut prefill: Vec<Candidate>) -> Self {
        let all = || decode.iter().chain(&prefill);
        let fastest = all().filter_map(|candidate| candidate.prefill_tokens_per_s).max_by(f64::total_cmp);
        let itl_ms = all().filter_map(|candidate| candidate.itl_ms).min_by(f64::total_cmp);
        for candidate in decode.iter_mut().chain(&mut prefill) {
            candidate.prefill_tokens_per_s = candidate.prefill_tokens_per_s.or(fastest);
            candidate.itl_ms = candidate.itl_ms.or(itl_ms);
        }
        Self { decode, prefill }
    }
}

/// What is to be placed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Work {
    /// Tokens whose KV is needed.
    pub(crate) tokens: u32,
    /// A number no other request has.
    pub(crate) ticket: u64,
    /// What requests that should stay together have in common.
    pub(crate) session: Option<u64>,
}

impl Work {
    /// Tokens that a worker which has `cached` of them computes: the last one always, its logits are wanted.
    pub(crate) fn uncached(&self, cached: u32) -> u32 {
        self.tokens.saturating_sub(cached).max(1)
    }
}

/// The rules.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) policy: PolicyKind,
    pub(crate) disaggregation: Disaggregation,
    pub(crate) seed: u64,
    /// Time between tokens to stay below, in seconds.
    pub(crate) slo_itl_s: f64,
    /// `prefix` and `session`: requests a worker may have more than the least loaded one before it is passed over.
    pub(crate) spill_requests: Option<u32>,
}

/// Where a request goes: keys of the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) decode: usize,
    /// Absent: the decode worker prefills.
    pub(crate) prefill: Option<usize>,
}

/// Seconds to move the KV of so many tokens from a prefill to a decode worker, given by their keys; `None` for a pair to
/// be avoided.
pub(crate) type Transfer<'a> = &'a dyn Fn(usize, usize, u32) -> Option<f64>;

/// Chooses the workers of one request; `None` when nobody can decode.
pub(crate) fn choose(
    snapshot: &Snapshot,
    work: Work,
    rules: Rules,
    transfer_s: Transfer<'_>,
) -> Option<Choice> {
    if rules.policy == PolicyKind::KvAware {
        return joint::choose(snapshot, work, rules, transfer_s);
    }
    let decode = pick(&snapshot.decode, work, rules, Side::Decode)?;
    let others: Vec<Candidate> =
        snapshot.prefill.iter().filter(|candidate| candidate.key != decode.key).cloned().collect();
    let alone = Choice { decode: decode.key, prefill: None };
    let Some(prefill) = pick(&others, work, rules, Side::Prefill) else { return Some(alone) };
    let Some(timing) = timing(prefill, decode, work, transfer_s) else { return Some(alone) };
    let remote = decide(rules.disaggregation, &timing);
    Some(Choice { prefill: remote.then_some(prefill.key), ..alone })
}

/// What a choice is predicted to take.
pub(crate) fn predicted(
    snapshot: &Snapshot,
    choice: Choice,
    work: Work,
    transfer_s: Transfer<'_>,
) -> Option<Predicted> {
    let decode = snapshot.decode.iter().find(|candidate| candidate.key == choice.decode)?;
    let Some(key) = choice.prefill else {
        let prefill = Prefill::on(decode, work, Side::Decode);
        return Some(Predicted {
            uncached_tokens: work.uncached(decode.cached_tokens),
            prefill_s: prefill.total_s() / decode.slowness,
            other_s: 0.0,
        });
    };
    let prefill = snapshot.prefill.iter().find(|candidate| candidate.key == key)?;
    let timing = timing(prefill, decode, work, transfer_s)?;
    Some(Predicted {
        uncached_tokens: work.uncached(prefill.cached_tokens),
        prefill_s: timing.prefill.total_s() / prefill.slowness,
        other_s: timing.remote_s() - timing.prefill.total_s(),
    })
}

/// The parts of the predicted time to the first token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Predicted {
    /// Tokens that will be computed.
    pub(crate) uncached_tokens: u32,
    /// Queue and compute, uncorrected: what corrections are learnt from.
    pub(crate) prefill_s: f64,
    /// The rest.
    pub(crate) other_s: f64,
}

fn decide(disaggregation: Disaggregation, timing: &Timing) -> bool {
    match disaggregation {
        Disaggregation::Always => true,
        Disaggregation::Never => false,
        Disaggregation::Auto => remote_is_sooner(timing),
    }
}

fn timing(prefill: &Candidate, decode: &Candidate, work: Work, transfer_s: Transfer<'_>) -> Option<Timing> {
    let missing = work.tokens.saturating_sub(decode.cached_tokens);
    let moved_s = transfer_s(prefill.key, decode.key, missing)?;
    let on_prefill = Prefill::on(prefill, work, Side::Prefill);
    let chunks = predict::chunks(work.uncached(prefill.cached_tokens));
    Some(Timing {
        prefill: on_prefill,
        decode: Prefill::on(decode, work, Side::Decode),
        transfer_s: predict::visible_s(moved_s, on_prefill.compute_s, chunks),
    })
}

/// Picks one worker by a policy that looks at each side by itself.
fn pick(candidates: &[Candidate], work: Work, rules: Rules, side: Side) -> Option<&Candidate> {
    let len = candidates.len();
    if len == 0 {
        return None;
    }
    let lot = draw(rules.seed, work.ticket, side as u64);
    let at = match rules.policy {
        PolicyKind::RoundRobin => index(work.ticket, len),
        PolicyKind::Random => index(lot, len),
        PolicyKind::LeastLoaded | PolicyKind::KvAware => return least_loaded(candidates, work, lot, side),
        PolicyKind::Prefix => {
            let cached = |candidate: &&Candidate| {
                let order = (u32::MAX - candidate.cached_tokens, burden(candidate, side));
                (order, draw(lot, work.ticket, candidate.key as u64))
            };
            let open: Vec<&Candidate> = within_spill(candidates, rules);
            return open.into_iter().min_by_key(cached);
        }
        PolicyKind::Session => {
            let Some(session) = work.session else { return least_loaded(candidates, work, lot, side) };
            // The highest draw for (session, worker) stays the highest when other workers come and go.
            let rank = |candidate: &&Candidate| draw(session, candidate.identity, side as u64);
            return within_spill(candidates, rules).into_iter().max_by_key(rank);
        }
        PolicyKind::PowerOfTwo => {
            let first = index(lot, len);
            let step = 1 + index(draw(lot, work.ticket, 1), len.max(2) - 1);
            let second = (first + step) % len;
            if burden(&candidates[second], side) < burden(&candidates[first], side) { second } else { first }
        }
    };
    candidates.get(at)
}

fn least_loaded(candidates: &[Candidate], work: Work, lot: u64, side: Side) -> Option<&Candidate> {
    let order =
        |candidate: &&Candidate| (burden(candidate, side), draw(lot, work.ticket, candidate.key as u64));
    candidates.iter().min_by_key(order)
}

/// The workers that are not too far ahead of the least loaded one in requests.
fn within_spill(candidates: &[Candidate], rules: Rules) -> Vec<&Candidate> {
    let Some(spill) = rules.spill_requests else { return candidates.iter().collect() };
    let least = candidates.iter().map(|candidate| candidate.requests).min().unwrap_or(0);
    candidates.iter().filter(|candidate| candidate.requests <= least.saturating_add(spill)).collect()
}

/// What makes a worker the busier one: for prefill the tokens before us, for decode the requests.
fn burden(candidate: &Candidate, side: Side) -> (u64, u64) {
    let requests = u64::from(candidate.requests);
    match side {
        Side::Prefill => (candidate.prefill_tokens, requests),
        Side::Decode => (requests, candidate.prefill_tokens),
    }
}

fn index(number: u64, len: usize) -> usize {
    usize::try_from(number % len as u64).unwrap_or(0)
}

/// A number drawn for (seed, ticket, what): SplitMix64.
fn draw(seed: u64, ticket: u64, what: u64) -> u64 {
    let mut z = seed ^ ticket.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ what.wrapping_mul(0xD1B5_4A32_D192_ED03);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
