//! What parts of the router cost, for benches: a scheduling decision of the real dispatcher before a fleet that answers nobody, and
//! the prefix index.

mod index;

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_config::fleet::{Disaggregation, PolicyKind};
use baton_config::protocol::Sampling;
use baton_config::{Bytes, Epoch, Role};

use crate::dispatch::{Caller, Dispatcher, Job};
use crate::fleet::{Fleet, Member, Worker};
use crate::index::{PrefixIndex, Tier};
use crate::metrics::Metrics;
use crate::options::Timeouts;
use crate::schedule::Rules;

pub use self::index::{IndexFigures, IndexLoad, prefix_index};

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Decisions {
    /// Workers, a quarter of which prefill for the others; none where it is fewer than four.
    pub workers: usize,
    /// Length of the prompts.
    pub prompt_tokens: u32,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Decisions.
    pub rounds: usize,
}

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
    let fleet = Arc::new(Fleet::of(index, workers.clone()));
    let caller = Caller::new(Duration::from_secs(1));
    let metrics = Arc::new(Metrics::new()?);
    let dispatcher = Dispatcher::new(fleet, caller, rules, Timeouts::default(), metrics, u32::MAX);
    let job = Job {
        request_id: "measured".to_owned(),
        prompt: tokens.into(),
        max_tokens: 1,
        sampling: Sampling::default(),
        logits_digest: false,
        cache_salt: 0,
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
        // Two thousand requests are in flight at a time.
        busy.push_back((decode.occupy(0), prefill.map(|prefill| prefill.occupy(what.prompt_tokens / 4))));
        if busy.len() > 2000 {
            busy.pop_front();
        }
    }
    times.sort_unstable();
    Ok(times)
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
