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

/// Costs this much above the lowest count as equal: predictions are not better than that. Of equals the least loaded
/// are taken, and of these any one.
const TIE_RATIO: f64 = 1.05;
/// The same for costs so low that their ratio means nothing, in seconds.
const TIE_S: f64 = 0.001;

/// The pair, or the decode worker alone, with the lowest predicted cost.
fn choose_jointly(snapshot: &Snapshot, work: Work, rules: Rules, transfer_s: Transfer<'_>) -> Option<Choice> {
    let mut offers: Vec<(f64, u64, Choice)> = Vec::new();
    for decode in &snapshot.decode {
        let before = offers.len();
        if rules.disaggregation != Disaggregation::Never {
            for prefill in snapshot.prefill.iter().filter(|prefill| prefill.key != decode.key) {
                let timing = timing(prefill, decode, work, transfer_s);
                if decide(rules.disaggregation, &timing) {
                    let choice = Choice { decode: decode.key, prefill: Some(prefill.key) };
                    let cost = timing.remote_s() + predict::decode_cost_s(decode);
                    let load = u64::from(decode.requests) + u64::from(prefill.requests);
                    offers.push((cost, load, choice));
                }
            }
        }
        if offers.len() == before || rules.disaggregation != Disaggregation::Always {
            let local = Prefill::on(decode, work.tokens, Side::Decode);
            let choice = Choice { decode: decode.key, prefill: None };
            let cost = local.total_s() + predict::decode_cost_s(decode);
            offers.push((cost, u64::from(decode.requests), choice));
        }
    }
    let lowest = offers.iter().map(|(cost, ..)| *cost).min_by(f64::total_cmp)?;
    let equal = offers.iter().filter(|(cost, ..)| *cost <= (lowest * TIE_RATIO).max(lowest + TIE_S));
    let lot = |choice: &Choice| {
        let pair = (choice.decode as u64) << 32 | choice.prefill.map_or(0, |prefill| prefill as u64 + 1);
        draw(rules.seed, work.ticket, pair)
    };
    equal.min_by_key(|(_, load, choice)| (*load, lot(choice))).map(|(.., choice)| *choice)
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
