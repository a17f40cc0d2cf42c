//! What parts of the router cost, for benches: a scheduling decision of the real dispatcher before a fleet that answers nobody, and
//! the prefix index.

mod index;
mod tokenizer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use baton_config::fleet::{Disaggregation, PolicyKind};
use baton_config::prefix::{BlockHash, HashScheme};
use baton_config::protocol::Sampling;
use baton_config::{Bytes, Epoch, Role};

use crate::dispatch::{Caller, Dispatcher, Job};
use crate::fleet::{Fleet, Member, Worker};
use crate::index::{PrefixIndex, Tier};
use crate::metrics::Metrics;
use crate::options::Timeouts;
use crate::schedule::Rules;

pub use self::index::{IndexFigures, IndexLoad, prefix_index};
pub use self::tokenizer::{TokenizerError, TokenizerFigures, tokenizer};

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Decisions {
    /// Workers, a quarter of which prefill for the others; none where it is fewer than four.
    pub workers: usize,
    /// Length of the prompts.
    pub prompt_tokens: u32,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Decisions of each thread.
    pub rounds: usize,
    /// Threads that decide at the same time.
    pub threads: usize,
    /// Whether workers report [`EVENTS_PER_S`] changes of their caches a second meanwhile.
    pub events: bool,
}

/// Events of 32 blocks that arrive in a second while decisions are measured under load.
pub const EVENTS_PER_S: u32 = 20_000;
/// Events that arrive together.
const EVENTS_AT_ONCE: u32 = 20;
/// Requests in flight while decisions are measured.
const IN_FLIGHT: usize = 2000;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// A name or an address of a made-up worker is refused.
    #[error("a made-up worker is refused: {0}")]
    Worker(String),
    /// The metrics could not be set up.
    #[error("metrics could not be set up")]
    Metrics(#[from] prometheus::Error),
    /// Nobody was chosen.
    #[error("no worker was chosen")]
    Nobody,
    /// A thread that decides panicked.
    #[error("a thread panicked")]
    Panicked,
}

/// CPU time of this thread in nanoseconds, from the scheduler's account.
fn cpu_ns() -> u64 {
    std::fs::read_to_string("/proc/thread-self/schedstat")
        .ok()
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .unwrap_or_default()
}

/// The time of each decision, hashing and looking up the prompt included, shortest first.
///
/// Prompts are cached by workers to different depths, so that lookups find several stretches.
///
/// # Errors
/// When the made-up fleet cannot be set up.
pub fn decisions(what: Decisions) -> Result<Vec<Duration>, MeasureError> {
    let index = PrefixIndex::new(Bytes(256 << 20));
    let workers: Vec<Arc<Worker>> = (0..what.workers).map(|i| worker(i, what)).collect::<Result<_, _>>()?;
    let tokens: Vec<u32> = (0..what.prompt_tokens).collect();
    for (i, worker) in workers.iter().enumerate() {
        let Some(holder) = worker.known().mirrored(&index, what.block_tokens) else { continue };
        let namespace = worker.known().namespace();
        let chain = namespace.scheme.chain(0, namespace.block_tokens, &tokens);
        index.store(namespace, holder, Tier::Device, &chain[..chain.len() * (i % 9) / 8]);
    }
    let rules = Rules {
        policy: PolicyKind::KvAware,
        disaggregation: Disaggregation::Auto,
        seed: 1,
        slo_itl_s: 0.05,
        spill_requests: None,
    };
    let fleet = Arc::new(Fleet::of(index, workers));
    let caller = Caller::new(Duration::from_secs(1));
    let metrics = Arc::new(Metrics::new()?);
    let dispatcher =
        Dispatcher::new(Arc::clone(&fleet), caller, rules, Timeouts::default(), metrics, u32::MAX);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        if what.events {
            scope.spawn(|| report_events(&fleet, what.block_tokens, &over));
        }
        let deciders: Vec<_> =
            (0..what.threads.max(1)).map(|_| scope.spawn(|| decide(&dispatcher, &tokens, what))).collect();
        // All of them, before the events end.
        let ended: Vec<_> = deciders.into_iter().map(|decider| decider.join()).collect();
        over.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for times in ended {
            all.extend(times.map_err(|_| MeasureError::Panicked)??);
        }
        all.sort_unstable();
        Ok(all)
    })
}

/// Decides again and again, with as many requests in flight as a busy router has.
fn decide(dispatcher: &Dispatcher, tokens: &[u32], what: Decisions) -> Result<Vec<Duration>, MeasureError> {
    let job = Job {
        request_id: "measured".to_owned(),
        prompt: tokens.into(),
        max_tokens: 1,
        sampling: Sampling::default(),
        logits_digest: false,
        whole: false,
        cache_salt: 0,
        owner: 0,
        end_tokens: Arc::new([]),
        deadline: tokio::time::Instant::now() + Duration::from_secs(3600),
        session: None,
        explain: None,
    };
    let mut busy = std::collections::VecDeque::new();
    let mut times = Vec::with_capacity(what.rounds);
    for _ in 0..what.rounds {
        let begun = Instant::now();
        let (decode, prefill) = dispatcher.decide(&job).ok_or(MeasureError::Nobody)?;
        times.push(begun.elapsed());
        busy.push_back((decode.occupy(0), prefill.map(|prefill| prefill.occupy(what.prompt_tokens / 4))));
        if busy.len() > IN_FLIGHT / what.threads.max(1) {
            busy.pop_front();
        }
    }
    Ok(times)
}

/// Stores other prompts, and removes them again, as the events of all workers would.
#[expect(clippy::disallowed_methods, reason = "a thread of its own that nobody waits for")]
fn report_events(fleet: &Fleet, block_tokens: u32, over: &AtomicBool) {
    let holders: Vec<_> = fleet
        .workers()
        .iter()
        .filter_map(|worker| Some((worker.known().events.get()?, worker.known().namespace())))
        .collect();
    let tokens: Vec<u32> = (0..32 * block_tokens).collect();
    // Made before: workers hash, routers read.
    let chains: Vec<Vec<BlockHash>> =
        (1..=64).map(|salt| HashScheme::Baton.chain(salt, block_tokens, &tokens)).collect();
    let pause = Duration::from_secs(1) * EVENTS_AT_ONCE / EVENTS_PER_S;
    for turn in 0u64.. {
        for event in 0..u64::from(EVENTS_AT_ONCE) {
            let number = turn * u64::from(EVENTS_AT_ONCE) + event;
            let Some((holder, namespace)) = holders.get(number as usize % holders.len().max(1)) else {
                return;
            };
            // Each prompt is stored by one event and removed by the next of its worker.
            let round = number / holders.len() as u64;
            let chain = &chains[(round / 2) as usize % chains.len()];
            match round % 2 {
                0 => fleet.index.store(*namespace, *holder, Tier::Device, chain),
                _ => fleet.index.remove(*namespace, *holder, Tier::Device, chain),
            }
        }
        if over.load(Ordering::Relaxed) {
            return;
        }
        std::thread::sleep(pause);
    }
}

fn worker(number: usize, what: Decisions) -> Result<Arc<Worker>, MeasureError> {
    let refused = |error: &dyn std::fmt::Display| MeasureError::Worker(error.to_string());
    let prefills = what.workers >= 4 && number.is_multiple_of(4);
    let (name, role) = if prefills { ("prefill", Role::Prefill) } else { ("decode", Role::Decode) };
    let member = Member {
        worker: format!("{name}-{number}").parse().map_err(|error| refused(&error))?,
        epoch: Epoch(1),
        pool: name.parse().map_err(|error| refused(&error))?,
        role,
        address: format!("127.0.0.1:{}", 10_000 + number),
        server: None,
        kv: None,
        ready: true,
    };
    Worker::new(member).map(Arc::new).map_err(|error| refused(&error))
}
