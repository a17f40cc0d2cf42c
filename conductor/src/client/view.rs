//! The fleet as a process last heard of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_config::{PoolName, WorkerId};
use tokio::time::Instant;

use crate::api::PoolTarget;
use crate::record::{WorkerRecord, WorkerState};

/// An immutable snapshot of the fleet. A worker whose record did not change keeps its `Arc` from view to view.
#[derive(Debug, Clone)]
pub struct View {
    /// Revision of the fleet; 0 before the first contact.
    pub revision: u64,
    /// Identity of the conductor's store; empty before the first contact.
    pub instance: String,
    /// Workers by name, draining ones included.
    pub workers: Arc<BTreeMap<WorkerId, Arc<WorkerRecord>>>,
    /// Workers that an operator asked to drain, whether or not they confirmed it.
    pub drain: Arc<BTreeSet<WorkerId>>,
    /// Pools of the fleet document with their wanted sizes.
    pub pools: Arc<BTreeMap<PoolName, PoolTarget>>,
    /// Whether the conductor is not answering, so that the view may be out of date. Never emptied for that.
    pub stale: bool,
    pub(crate) contact: Arc<Contact>,
}

impl View {
    pub(crate) fn empty(contact: Arc<Contact>) -> Self {
        Self {
            revision: 0,
            instance: String::new(),
            workers: Arc::default(),
            drain: Arc::default(),
            pools: Arc::default(),
            stale: true,
            contact,
        }
    }

    /// Time since the conductor was last heard, at most about a second while all is well.
    pub fn age(&self) -> Duration {
        self.contact.age(Instant::now())
    }

    /// Whether the conductor was ever heard.
    pub fn known(&self) -> bool {
        self.revision > 0
    }

    /// The worker of that name.
    pub fn worker(&self, name: &WorkerId) -> Option<&Arc<WorkerRecord>> {
        self.workers.get(name)
    }

    /// Workers that new requests may be sent to: ready, and not asked to drain.
    pub fn ready(&self) -> impl Iterator<Item = &Arc<WorkerRecord>> {
        self.workers.values().filter(|w| w.state == WorkerState::Ready && !self.drain.contains(&w.worker))
    }
}

/// When the conductor was last heard; shared by all views of a client so that age needs no new view.
#[derive(Debug)]
pub(crate) struct Contact {
    start: Instant,
    heard_ms: AtomicU64,
}

impl Contact {
    pub(crate) fn new(start: Instant) -> Self {
        Self { start, heard_ms: AtomicU64::new(0) }
    }

    pub(crate) fn heard(&self, now: Instant) {
        let ms = now.saturating_duration_since(self.start).as_millis();
        self.heard_ms.store(u64::try_from(ms).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn age(&self, now: Instant) -> Duration {
        let heard = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        now.saturating_duration_since(self.start).saturating_sub(heard)
    }
}
