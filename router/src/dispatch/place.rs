//! Takes a snapshot of the fleet, looks the prompt up in the prefix index, and has the scheduler choose.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_config::fleet::{Disaggregation, PolicyKind};
use baton_config::prefix::BlockHash;
use baton_config::{Epoch, WorkerId};
use tokio::time::Instant;

use super::{DEFAULT_BANDWIDTH, Dispatcher, Explanation, Job};
use crate::fleet::{Standing, Ways, Worker};
use crate::index::{Depth, Found, Namespace};
use crate::schedule::{self, Candidate, Predicted, Prefill, Side, Snapshot, Work};

/// Kinds of block hashes looked up for one request at most; workers of further ones count as having nothing.
const NAMESPACES_MAX: usize = 4;
/// What a block on the host of a worker, or in storage, is worth beside one on its device.
const LOWER_TIER_WORTH: f64 = 0.75;
/// Candidates that an explanation shows.
const EXPLAINED_MAX: usize = 6;

/// Workers for one attempt, and what was expected of them.
#[derive(Debug)]
pub(crate) struct Placement {
    pub(crate) decode: Arc<Worker>,
    pub(crate) prefill: Option<Arc<Worker>>,
    pub(crate) predicted: Option<Predicted>,
}

/// What workers are sought for.
#[derive(Debug)]
pub(crate) struct Sought<'a> {
    pub(crate) request_id: &'a str,
    /// The prompt and what was generated of it, or what stands for it where tokens are not known.
    pub(crate) tokens: &'a [u32],
    /// Whether something stands for them: then only what this router sent is known of any worker, and less often noted.
    pub(crate) stands_for: bool,
    pub(crate) cache_salt: u64,
    pub(crate) session: Option<u64>,
    /// Where to put how they were chosen, if somebody wants to know.
    pub(crate) explain: Option<&'a Explanation>,
}

/// Of what stands for tokens so many blocks are noted one by one (16 KiB of text),
const DENSE_BLOCKS: u32 = 128;
/// and then the last one of so many (2 KiB): to note all of a long text would cost more than passing it on.
const SPARSE_BLOCKS: u32 = 16;

/// One prompt in the index.
struct Looked {
    namespace: Namespace,
    chain: Vec<BlockHash>,
    /// Blocks of the prompt, all of which the chain has unless it is sparse.
    blocks: u32,
    sparse: bool,
    found: Found,
}

impl Looked {
    fn at(dispatcher: &Dispatcher, namespace: Namespace, sought: &Sought<'_>) -> Self {
        let mut chain = namespace.scheme.chain(sought.cache_salt, namespace.block_tokens, sought.tokens);
        let blocks = u32::try_from(chain.len()).unwrap_or(u32::MAX);
        let sparse = sought.stands_for;
        if sparse {
            thin(&mut chain);
        }
        let mut found = Found::default();
        dispatcher.fleet.index.find(namespace, &chain, &mut found);
        Self { namespace, chain, blocks, sparse, found }
    }

    /// Tokens that the worker has, by worth.
    fn cached_tokens(&self, worker: &Worker) -> u32 {
        let Depth { device, any } = worker.known().depth(&self.found);
        let (device, any) = (self.depth(device), self.depth(any));
        let blocks = f64::from(device) + LOWER_TIER_WORTH * f64::from(any - device.min(any));
        (blocks * f64::from(self.namespace.block_tokens)) as u32
    }

    /// Blocks that the worker has, wherever.
    fn any_depth(&self, worker: &Worker) -> u32 {
        self.depth(worker.known().depth(&self.found).any)
    }

    /// Blocks of the prompt up to the last one of so many of the chain.
    fn depth(&self, noted: u32) -> u32 {
        if self.sparse { blocks_of(noted) } else { noted }
    }
}

/// Leaves of a chain what is noted of something that stands for tokens.
fn thin(chain: &mut Vec<BlockHash>) {
    let mut at = 0;
    chain.retain(|_| {
        at += 1;
        at <= DENSE_BLOCKS || at % SPARSE_BLOCKS == 0
    });
}

/// Blocks up to the last one of so many of a chain that was made thin.
fn blocks_of(noted: u32) -> u32 {
    match noted.checked_sub(DENSE_BLOCKS) {
        Some(more) => DENSE_BLOCKS + more * SPARSE_BLOCKS,
        None => noted,
    }
}

impl Dispatcher {
    /// Chooses workers for a job with `sent` tokens behind it, among those not in `avoid`.
    pub(super) fn choose(&self, job: &Job, sent: &[u32], avoid: &[(WorkerId, Epoch)]) -> Option<Placement> {
        let replay: Vec<u32>;
        let tokens: &[u32] = if sent.is_empty() {
            &job.prompt
        } else {
            replay = job.prompt.iter().chain(sent).copied().collect();
            &replay
        };
        let sought = Sought {
            request_id: &job.request_id,
            tokens,
            stands_for: false,
            cache_salt: job.cache_salt,
            session: job.session,
            explain: job.explain.as_ref(),
        };
        self.choose_for(&sought, avoid)
    }

    /// The same for what need not be a job.
    pub(crate) fn choose_for(&self, sought: &Sought<'_>, avoid: &[(WorkerId, Epoch)]) -> Option<Placement> {
        let workers = self.fleet.workers();
        let now = Instant::now();
        let looked = self.look_up(&workers, sought);
        let avoided = |worker: &Worker| {
            avoid.iter().any(|(name, epoch)| *name == worker.member.worker && *epoch == worker.member.epoch)
        };
        let (mut decode, mut prefill) = (Vec::with_capacity(workers.len()), Vec::new());
        let mut unwell = Vec::new();
        for (key, worker) in workers.iter().enumerate().filter(|(_, worker)| worker.member.ready) {
            let standing = worker.standing(now, self.timeouts.frozen);
            let (role, usable) = (worker.member.role, !avoided(worker));
            let side = match (role.decodes() && usable, standing.well) {
                (true, true) => Some(&mut decode),
                (true, false) => Some(&mut unwell),
                (false, _) => None,
            };
            let prefills = role.prefills() && standing.well;
            if side.is_none() && !prefills {
                continue;
            }
            let candidate = candidate(key, worker, &standing, &looked);
            if prefills {
                prefill.push(candidate.clone());
            }
            if let Some(side) = side {
                side.push(candidate);
            }
        }
        if decode.is_empty() {
            // Rather one that may be down than none.
            decode = unwell;
        }
        let work = Work {
            tokens: u32::try_from(sought.tokens.len()).unwrap_or(u32::MAX),
            ticket: self.tickets.fetch_add(1, Ordering::Relaxed),
            session: sought.session,
        };
        // Pairs are looked at one decode worker after the other.
        let last: RefCell<Option<(usize, Ways<'_>)>> = RefCell::new(None);
        let transfer_s = |prefill: usize, decode: usize, tokens: u32| {
            let mut last = last.borrow_mut();
            let (_, ways) = match last.take() {
                Some(known) if known.0 == decode => last.insert(known),
                _ => last.insert((decode, workers[decode].ways(now))),
            };
            transfer_s(&workers[prefill], ways, tokens)
        };
        let snapshot = Snapshot::new(decode, prefill);
        let choice = schedule::choose(&snapshot, work, self.rules, &transfer_s)?;
        if let Some(explanation) = sought.explain {
            let offers = schedule::offers(&snapshot, work, self.rules, &transfer_s);
            let text = explain(&workers, &snapshot, work, choice, offers);
            tracing::info!(request = sought.request_id, policy = %self.rules.policy, explanation = text, "placed");
            explanation.put(text);
        }
        let predicted = schedule::predicted(&snapshot, choice, work, &transfer_s);
        let placement = Placement {
            decode: Arc::clone(&workers[choice.decode]),
            prefill: choice.prefill.map(|key| Arc::clone(&workers[key])),
            predicted,
        };
        self.book(&placement, work, &looked, now);
        Some(placement)
    }

    /// One decision: decode and prefill worker.
    pub(crate) fn decide(&self, job: &Job) -> Option<(Arc<Worker>, Option<Arc<Worker>>)> {
        self.choose(job, &[], &[]).map(|placement| (placement.decode, placement.prefill))
    }

    /// How long a prompt that comes now would wait where it waits shortest; `None` when nobody can compute it.
    pub(crate) fn shortest_wait(&self) -> Option<Duration> {
        let now = Instant::now();
        let workers = self.fleet.workers();
        let shortest = |sides: &[Side]| {
            let mut shortest: Option<f64> = None;
            for worker in workers.iter().filter(|worker| worker.member.ready) {
                let standing = worker.standing(now, self.timeouts.frozen);
                if !standing.well {
                    continue;
                }
                for side in sides.iter().filter(|side| side.is_of(worker.member.role)) {
                    let wait = standing.load.prefill_tokens_per_s.map_or(0.0, |_| {
                        Prefill::on(&candidate(0, worker, &standing, &[]), Work::default(), *side).queue_s
                    });
                    shortest = Some(shortest.map_or(wait, |shortest| shortest.min(wait)));
                }
            }
            shortest
        };
        let wait = match self.rules.disaggregation {
            Disaggregation::Never => shortest(&[Side::Decode]),
            Disaggregation::Auto => shortest(&[Side::Prefill, Side::Decode]),
            // Without prefill workers decode workers compute for themselves.
            Disaggregation::Always => shortest(&[Side::Prefill]).or_else(|| shortest(&[Side::Decode])),
        };
        wait.and_then(|wait| Duration::try_from_secs_f64(wait).ok())
    }

    /// The prompt in the index, for each way in which blocks are hashed; nothing for policies that do not ask.
    fn look_up(&self, workers: &[Arc<Worker>], sought: &Sought<'_>) -> Vec<Looked> {
        if !matches!(self.rules.policy, PolicyKind::KvAware | PolicyKind::Prefix) {
            return Vec::new();
        }
        let mut looked: Vec<Looked> = Vec::new();
        for worker in workers {
            let namespace = worker.known().namespace();
            let known = looked.iter().any(|looked| looked.namespace == namespace);
            if !known && looked.len() < NAMESPACES_MAX {
                looked.push(Looked::at(self, namespace, sought));
            }
        }
        looked
    }

    fn book(&self, placement: &Placement, work: Work, looked: &[Looked], now: Instant) {
        if let Some(predicted) = &placement.predicted {
            self.metrics
                .predicted_cached
                .inc_by(u64::from(work.tokens - predicted.uncached_tokens.min(work.tokens)));
        }
        for worker in [Some(&placement.decode), placement.prefill.as_ref()].into_iter().flatten() {
            let namespace = worker.known().namespace();
            if let Some(looked) = looked.iter().find(|looked| looked.namespace == namespace) {
                let new = looked.blocks - looked.blocks.min(looked.any_depth(worker));
                worker.known().sent(&self.fleet.index, now, namespace, (&looked.chain, looked.blocks, new));
            }
        }
    }
}

fn candidate(key: usize, worker: &Worker, standing: &Standing, looked: &[Looked]) -> Candidate {
    let load = &standing.load;
    let namespace = worker.known().namespace();
    let looked = looked.iter().find(|looked| looked.namespace == namespace);
    Candidate {
        key,
        identity: worker.identity(),
        requests: load.requests,
        prefill_tokens: load.prefill_tokens,
        prefill_tokens_per_s: load.prefill_tokens_per_s,
        slowness: load.slowness,
        itl_ms: load.itl_ms,
        kv_used: load.kv_used,
        cached_tokens: looked.map_or(0, |looked| looked.cached_tokens(worker)),
        held_tokens: worker.known().held_tokens(),
    }
}

fn transfer_s(prefill: &Worker, ways: &Ways<'_>, tokens: u32) -> Option<f64> {
    let link = ways.link(prefill)?;
    let Some(geometry) = &prefill.member.kv else { return Some(0.0) };
    let bytes = geometry.token_bytes().0 as f64 * f64::from(tokens);
    Some(bytes / link.bytes_per_s.unwrap_or(DEFAULT_BANDWIDTH) + link.latency_s.unwrap_or(0.0))
}

/// The best ways with their terms, the chosen one first, as JSON.
fn explain(
    workers: &[Arc<Worker>],
    snapshot: &Snapshot,
    work: Work,
    choice: schedule::Choice,
    mut offers: Vec<schedule::Offer>,
) -> String {
    offers.sort_by(|a, b| {
        (a.choice != choice).cmp(&(b.choice != choice)).then(a.cost_s().total_cmp(&b.cost_s()))
    });
    let find = |side: &[Candidate], key: usize| side.iter().find(|candidate| candidate.key == key).cloned();
    let mut text = format!("{{\"tokens\":{},\"looked_at\":{},\"ways\":[", work.tokens, offers.len());
    for (rank, offer) in offers.iter().take(EXPLAINED_MAX).enumerate() {
        let Some(decode) = find(&snapshot.decode, offer.choice.decode) else { continue };
        let comma = if rank > 0 { "," } else { "" };
        // Writing to a string cannot fail; names of workers need no escapes.
        let _ = write!(
            text,
            "{comma}{{\"decode\":\"{}\",\"decode_cached\":{},\"requests\":{},\"chosen\":{},\"first_token_ms\":{:.3},\"decode_ms\":{:.3},\"spent_ms\":{:.3}",
            workers[decode.key].member.worker,
            decode.cached_tokens,
            decode.requests,
            offer.choice == choice,
            offer.first_token_s * 1e3,
            offer.decode_s * 1e3,
            offer.spent_s * 1e3,
        );
        if let Some(prefill) = offer.choice.prefill.and_then(|key| find(&snapshot.prefill, key)) {
            let _ = write!(
                text,
                ",\"prefill\":\"{}\",\"prefill_cached\":{},\"queued_tokens\":{}",
                workers[prefill.key].member.worker, prefill.cached_tokens, prefill.prefill_tokens,
            );
        }
        text.push('}');
    }
    text.push_str("]}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thin_chain_tells_its_depth_and_goes_on_as_it_began() {
        let chain = |blocks: u64| {
            let mut chain: Vec<BlockHash> = (0..blocks).map(BlockHash).collect();
            thin(&mut chain);
            chain
        };
        let longest = chain(5000);
        for blocks in (0..300).chain([4999, 5000]) {
            let thin = chain(blocks);
            assert!(longest.starts_with(&thin), "{blocks}");
            let depth = u64::from(blocks_of(thin.len() as u32));
            assert!(depth <= blocks && blocks - depth < u64::from(SPARSE_BLOCKS), "{blocks} {depth}");
            assert!(depth == blocks || blocks > u64::from(DENSE_BLOCKS), "{blocks}");
        }
        assert!(longest.len() < 5000 / 10);
    }
}
