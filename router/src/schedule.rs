//! The scheduler: one pure function from a snapshot of the fleet to a choice of workers.
//!
//! Nothing here reads a clock or a lock: [`choose`] is called with the loads as they are and a ticket number that only
//! grows; the same snapshot, ticket and seed give the same choice.

mod predict;

use baton_config::fleet::{Disaggregation, PolicyKind};

pub(crate) use predict::{Prefill, Side, Timing, remote_is_sooner};

/// A worker that may be chosen.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Candidate {
    /// Its place in the caller's list.
    pub(crate) key: usize,
    /// Requests running and waiting.
    pub(crate) requests: u32,
    /// Prompt tokens queued or being computed.
    pub(crate) prefill_tokens: u64,
    /// Measured prefill speed.
    pub(crate) prefill_tokens_per_s: Option<f64>,
    /// Measured time between tokens.
    pub(crate) itl_ms: Option<f64>,
    /// Share of its KV blocks that hold live requests.
    pub(crate) kv_used: f64,
}

/// The fleet at one moment.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// Workers that can decode.
    pub(crate) decode: Vec<Candidate>,
    /// Workers that can prefill for others.
    pub(crate) prefill: Vec<Candidate>,
}

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    /// Tokens whose KV has to be computed.
    pub(crate) tokens: u32,
    /// A number no other request has.
    pub(crate) ticket: u64,
}

/// The rules.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) policy: PolicyKind,
    pub(crate) disaggregation: Disaggregation,
    pub(crate) seed: u64,
}

/// Where a request goes: keys of the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) decode: usize,
    /// Absent: the decode worker prefills.
    pub(crate) prefill: Option<usize>,
}

/// Seconds to move the KV of the work from a prefill to a decode worker, given by their keys.
pub(crate) type Transfer<'a> = &'a dyn Fn(usize, usize) -> f64;

/// Chooses the workers of one request. Without an index of cached prefixes, `prefix` and `kv_aware` are the same.
///
/// `None` when nobody can decode.
pub(crate) fn choose(
    snapshot: &Snapshot,
    work: Work,
    rules: Rules,
    transfer_s: Transfer<'_>,
) -> Option<Choice> {
    if matches!(rules.policy, PolicyKind::KvAware | PolicyKind::Prefix) {
        return choose_jointly(snapshot, work, rules, transfer_s);
    }
    let decode = pick(&snapshot.decode, work, rules, Side::Decode)?;
    let others: Vec<Candidate> =
        snapshot.prefill.iter().filter(|candidate| candidate.key != decode.key).cloned().collect();
    let Some(prefill) = pick(&others, work, rules, Side::Prefill) else {
        return Some(Choice { decode: decode.key, prefill: None });
    };
    let timing = timing(prefill, decode, work, transfer_s);
    let remote = decide(rules.disaggregation, &timing);
    Some(Choice { decode: decode.key, prefill: remote.then_some(prefill.key) })
}

fn decide(disaggregation: Disaggregation, timing: &Timing) -> bool {
    match disaggregation {
        Disaggregation::Always => true,
        Disaggregation::Never => false,
        Disaggregation::Auto => remote_is_sooner(timing),
    }
}

fn timing(prefill: &Candidate, decode: &Candidate, work: Work, transfer_s: Transfer<'_>) -> Timing {
    Timing {
        prefill: Prefill::on(prefill, work.tokens, Side::Prefill),
        decode: Prefill::on(decode, work.tokens, Side::Decode),
        transfer_s: transfer_s(prefill.key, decode.key),
    }
}

/// The pair, or the decode worker alone, with the lowest predicted cost.
fn choose_jointly(snapshot: &Snapshot, work: Work, rules: Rules, transfer_s: Transfer<'_>) -> Option<Choice> {
    let mut best: Option<(f64, u64, Choice)> = None;
    let mut offer = |cost: f64, choice: Choice| {
        let lot = draw(
            rules.seed,
            work.ticket,
            (choice.decode as u64) << 32 | choice.prefill.map_or(0, |p| p as u64 + 1),
        );
        let better = best.is_none_or(|(lowest, tie, _)| cost < lowest || (cost == lowest && lot < tie));
        if better {
            best = Some((cost, lot, choice));
        }
    };
    for decode in &snapshot.decode {
        let mut pairs = 0;
        if rules.disaggregation != Disaggregation::Never {
            for prefill in snapshot.prefill.iter().filter(|prefill| prefill.key != decode.key) {
                let timing = timing(prefill, decode, work, transfer_s);
                if decide(rules.disaggregation, &timing) {
                    pairs += 1;
                    let choice = Choice { decode: decode.key, prefill: Some(prefill.key) };
                    offer(timing.remote_s() + predict::decode_cost_s(decode), choice);
                }
            }
        }
        if pairs == 0 || rules.disaggregation != Disaggregation::Always {
            let local = Prefill::on(decode, work.tokens, Side::Decode);
            offer(
                local.total_s() + predict::decode_cost_s(decode),
                Choice { decode: decode.key, prefill: None },
            );
        }
    }
    best.map(|(_, _, choice)| choice)
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
        PolicyKind::LeastLoaded | PolicyKind::KvAware | PolicyKind::Prefix => {
            return candidates.iter().min_by_key(|candidate| {
                (burden(candidate, side), draw(lot, work.ticket, candidate.key as u64))
            });
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
mod tests;
