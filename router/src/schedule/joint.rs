//! `kv_aware`: the pair, or the decode worker alone, with the lowest predicted cost.

use baton_config::fleet::Disaggregation;

use super::predict::{self, Prefill, Side};
use super::{Candidate, Choice, Rules, Snapshot, Transfer, Work, decide, draw, timing};

/// Costs this much above the lowest count as equal: predictions are not better than that. Of equals the least loaded
/// are taken, of these the ones that lack least, and of these any one.
const TIE_RATIO: f64 = 1.05;
/// The same for costs so low that their ratio means nothing, in seconds.
const TIE_S: f64 = 0.001;
/// Workers of a side of which all pairs are looked at. Of more, those that are best by themselves: what depends on the
/// pair is the bandwidth between the two, and that differs less than queues and caches do.
const PAIRED: usize = 16;

/// A way to serve a request, and what it is predicted to cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Offer {
    pub(crate) choice: Choice,
    /// To the first token, in seconds.
    pub(crate) first_token_s: f64,
    /// What the others on the decode worker pay, in seconds.
    pub(crate) decode_s: f64,
    /// What its computing and its place in the cache cost those who come after, in seconds.
    pub(crate) spent_s: f64,
    load: u64,
    /// Tokens that its workers lack.
    lacking: u64,
}

impl Offer {
    /// What is compared.
    pub(crate) fn cost_s(&self) -> f64 {
        self.first_token_s + self.decode_s + self.spent_s
    }
}

pub(super) fn choose(
    snapshot: &Snapshot,
    work: Work,
    rules: Rules,
    transfer_s: Transfer<'_>,
) -> Option<Choice> {
    let offers = offers(snapshot, work, rules, transfer_s);
    let lowest = offers.iter().map(Offer::cost_s).min_by(f64::total_cmp)?;
    let bound = (lowest * TIE_RATIO).max(lowest + TIE_S);
    let equal = offers.iter().filter(|offer| offer.cost_s() <= bound);
    let lot = |choice: &Choice| {
        let pair = (choice.decode as u64) << 32 | choice.prefill.map_or(0, |prefill| prefill as u64 + 1);
        draw(rules.seed, work.ticket, pair)
    };
    equal.min_by_key(|offer| (offer.load, offer.lacking, lot(&offer.choice))).map(|offer| offer.choice)
}

/// Every way that is looked at.
pub(crate) fn offers(snapshot: &Snapshot, work: Work, rules: Rules, transfer_s: Transfer<'_>) -> Vec<Offer> {
    let mut offers = Vec::with_capacity(snapshot.decode.len() + PAIRED * PAIRED);
    let decode_s = |decode: &Candidate| predict::decode_cost_s(decode, rules.slo_itl_s);
    let lacking = |candidate: &Candidate| u64::from(work.uncached(candidate.cached_tokens));
    let (least_d, least_p) = (predict::least_held(&snapshot.decode), predict::least_held(&snapshot.prefill));
    // Of who computes: what a decode worker gives up in a handoff can be had again for a transfer.
    let crowding_d = |decode: &Candidate| predict::crowding_s(decode, least_d, work);
    let crowding_p = |prefill: &Candidate| predict::crowding_s(prefill, least_p, work);
    let mut paired = vec![false; snapshot.decode.len()];
    if rules.disaggregation != Disaggregation::Never && !snapshot.prefill.is_empty() {
        let lot = |candidate: &Candidate| draw(rules.seed, work.ticket, candidate.identity);
        let prefill_s = |candidate: &Candidate| {
            let prefill = Prefill::on(candidate, work, Side::Prefill);
            prefill.total_s() + prefill.compute_s * SPENT_PER_COMPUTE + crowding_p(candidate)
        };
        // What D lacks has to be moved: in the absence of a measurement as slowly as it would be computed.
        let lacking_s = |decode: &Candidate| {
            let moved_s = Prefill::on(decode, work, Side::Prefill).compute_s * MOVE_PER_COMPUTE;
            decode_s(decode) + moved_s
        };
        let prefill = best(&snapshot.prefill, &prefill_s, &lot);
        for d in best(&snapshot.decode, &lacking_s, &lot) {
            let decode = &snapshot.decode[d];
            for p in prefill.iter().map(|p| &snapshot.prefill[*p]).filter(|p| p.key != decode.key) {
                let Some(timing) = timing(p, decode, work, transfer_s) else { continue };
                if decide(rules.disaggregation, &timing) {
                    paired[d] = true;
                    offers.push(Offer {
                        choice: Choice { decode: decode.key, prefill: Some(p.key) },
                        first_token_s: timing.remote_s(),
                        decode_s: decode_s(decode),
                        spent_s: timing.prefill.compute_s * SPENT_PER_COMPUTE + crowding_p(p),
                        load: u64::from(decode.requests) + u64::from(p.requests),
                        lacking: lacking(decode) + lacking(p),
                    });
                }
            }
        }
    }
    let always = rules.disaggregation == Disaggregation::Always && paired.contains(&true);
    for decode in snapshot.decode.iter().filter(|_| !always) {
        let prefill = Prefill::on(decode, work, Side::Decode);
        offers.push(Offer {
            choice: Choice { decode: decode.key, prefill: None },
            first_token_s: prefill.total_s(),
            decode_s: decode_s(decode),
            spent_s: prefill.compute_s * SPENT_PER_COMPUTE + crowding_d(decode),
            load: u64::from(decode.requests),
            lacking: lacking(decode),
        });
    }
    offers
}

/// Seconds that others lose for a second of computing: whoever comes next waits for it, and a copy of what another worker has
/// takes the place of something else in the cache. Without it each request alone is served soonest, and prefixes spread over
/// the fleet: hit rates of 0.81, 0.74 and 0.88 become 0.84, 0.78 and 0.90, and the slowest first tokens of chats come in less than half of
/// the time (`baton bench router --workload prefixes,zipf,chats`, four workers). More than this changes little.
pub(super) const SPENT_PER_COMPUTE: f64 = 1.0;

/// Seconds of moving for a second of computing, to rank decode workers before pairs are looked at.
const MOVE_PER_COMPUTE: f64 = 0.2;

/// The places of the best candidates, all if they are few.
fn best(
    candidates: &[Candidate],
    score_s: &impl Fn(&Candidate) -> f64,
    lot: &impl Fn(&Candidate) -> u64,
) -> Vec<usize> {
    let mut places: Vec<usize> = (0..candidates.len()).collect();
    if places.len() <= PAIRED {
        return places;
    }
    let scores: Vec<f64> = candidates.iter().map(score_s).collect();
    let lowest = scores.iter().copied().min_by(f64::total_cmp).unwrap_or(0.0);
    let step = (lowest * (TIE_RATIO - 1.0)).max(TIE_S);
    // Scores within a step are equal; casting saturates.
    let orders: Vec<(u32, u32, u64)> = candidates
        .iter()
        .zip(&scores)
        .map(|(candidate, score)| (((score - lowest) / step) as u32, candidate.requests, lot(candidate)))
        .collect();
    places.select_nth_unstable_by_key(PAIRED - 1, |at| orders[*at]);
    places.truncate(PAIRED);
    places
}
