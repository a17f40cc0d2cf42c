//! What the prefix index knows about one worker, and where.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use baton_config::prefix::{BlockHash, HashScheme};
use baton_config::protocol::{KvEvent, KvEventBatch, KvTier};
use tokio::time::Instant;

use crate::index::{Depth, Found, Holder, HolderCell, Namespace, PrefixIndex, Recent};

/// How long a prompt sent to a worker without events is taken to be cached there, at most.
const BELIEVED: Duration = Duration::from_secs(240);
/// Blocks a worker without events is taken to hold of what was lately sent to it.
const RECENT_MAX_BLOCKS: u64 = 32 << 10;
/// Block size assumed of a worker that names none.
const DEFAULT_BLOCK_TOKENS: u32 = 32;

/// Where a worker is to be found in the index.
#[derive(Debug)]
pub(crate) struct Known {
    /// The holder that mirrors its events.
    pub(crate) events: HolderCell,
    recent: Recent,
    /// Whether it reports events; until it is known, what was sent counts.
    reports: AtomicBool,
    /// Nothing is noted any more.
    gone: AtomicBool,
    /// Scheme and block size in one number.
    namespace: AtomicU64,
    /// Blocks on its device by its events.
    held: AtomicU64,
}

impl Known {
    pub(super) fn new(block_tokens: Option<u32>) -> Self {
        let known = Self {
            events: HolderCell::default(),
            recent: Recent::new(BELIEVED, RECENT_MAX_BLOCKS),
            reports: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            namespace: AtomicU64::new(0),
            held: AtomicU64::new(0),
        };
        let block_tokens = block_tokens.filter(|tokens| *tokens > 0).unwrap_or(DEFAULT_BLOCK_TOKENS);
        known.set_namespace(Namespace { scheme: HashScheme::Baton, block_tokens });
        known
    }

    /// Makes the worker one that reports events, as if some had come.
    pub(crate) fn mirrored(&self, index: &PrefixIndex, block_tokens: u32) -> Option<Holder> {
        self.set_namespace(Namespace { scheme: HashScheme::Baton, block_tokens });
        self.set_reports(true);
        self.events.begin(index)
    }

    /// How its blocks are hashed.
    pub(crate) fn namespace(&self) -> Namespace {
        let number = self.namespace.load(Ordering::Relaxed);
        let scheme = if number >> 32 == 0 { HashScheme::Baton } else { HashScheme::Xxh3Pairs };
        Namespace { scheme, block_tokens: number as u32 }
    }

    pub(super) fn set_namespace(&self, namespace: Namespace) {
        let scheme = match namespace.scheme {
            HashScheme::Baton => 0,
            HashScheme::Xxh3Pairs => 1u64 << 32,
        };
        self.namespace.store(scheme | u64::from(namespace.block_tokens), Ordering::Relaxed);
    }

    pub(super) fn set_reports(&self, reports: bool) {
        self.reports.store(reports, Ordering::Relaxed);
    }

    /// Takes note of what a batch of its events says of its device.
    pub(super) fn took(&self, batch: &KvEventBatch) {
        if batch.tier != KvTier::Device {
            return;
        }
        // One follower writes.
        let mut held = if batch.snapshot { 0 } else { self.held.load(Ordering::Relaxed) };
        for event in &batch.events {
            match event {
                KvEvent::Stored { blocks, .. } => held += blocks.len() as u64,
                KvEvent::Removed { blocks } => held = held.saturating_sub(blocks.len() as u64),
                KvEvent::Cleared => held = 0,
            }
        }
        self.held.store(held, Ordering::Relaxed);
    }

    /// Its cache was lost, or nothing is known of it.
    pub(super) fn lost_sight(&self) {
        self.held.store(0, Ordering::Relaxed);
    }

    /// Tokens whose KV is on its device: by its events, else what of that which was sent to it is still believed to be there.
    pub(crate) fn held_tokens(&self) -> u64 {
        let reports = self.reports.load(Ordering::Relaxed);
        let blocks = if reports { self.held.load(Ordering::Relaxed) } else { self.recent.held_blocks() };
        blocks * u64::from(self.namespace().block_tokens)
    }

    /// How much of the chain that was looked up the worker has.
    pub(crate) fn depth(&self, found: &Found) -> Depth {
        let mirrored = self.events.get().map_or(Depth::default(), |holder| found.depth(holder));
        if self.reports.load(Ordering::Relaxed) { mirrored } else { self.recent.depth(found) }
    }

    /// A prompt goes to this worker: without events, that is all there is to know.
    ///
    /// The chain may hold fewer hashes than the prompt has blocks, always the same ones; `new` of these it is not known to have.
    pub(crate) fn sent(
        &self,
        index: &PrefixIndex,
        now: Instant,
        namespace: Namespace,
        (chain, blocks, new): (&[BlockHash], u32, u32),
    ) {
        if !self.reports.load(Ordering::Relaxed) && !self.gone.load(Ordering::Relaxed) {
            self.recent.note(index, now, namespace, (chain, u64::from(blocks), u64::from(new)));
        }
    }

    /// Lets old knowledge go when it is time.
    pub(super) fn fade(&self, index: &PrefixIndex, now: Instant) {
        if self.reports.load(Ordering::Relaxed) {
            self.recent.forget(index);
        } else {
            self.recent.fade(index, now);
        }
    }

    /// The worker is gone.
    pub(super) fn forget(&self, index: &PrefixIndex) {
        self.gone.store(true, Ordering::Relaxed);
        self.recent.forget(index);
    }
}
