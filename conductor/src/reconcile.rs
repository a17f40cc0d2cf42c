//! What only the leading conductor does: work that brings the fleet towards what is wanted, over and over.
//!
//! A reconciler takes no orders: it looks at the whole fleet and does what is missing, so that it does not matter how
//! often it runs or which conductor ran it last. Each has a task of its own: one that fails, hangs or panics delays
//! nobody but itself. Every transaction carries the [`Fence`], so that a conductor that was deposed without noticing
//! (it stood still, say) changes nothing.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::leader::LEADER_KEY;
use crate::mirror::{Fleet, Mirror};
use crate::registry::RegistryError;
use crate::store::{Compare, Revision, Store};

mod leftovers;

pub(crate) use leftovers::{DrainWishes, UnleasedWorkers};

/// A turn that takes longer is ended; the next one starts from what the fleet is then.
const TURN_DEADLINE: Duration = Duration::from_secs(10);
/// Least time between the starts of two turns: a thousand workers that join at once are a few turns, not a thousand.
const TURN_GAP: Duration = Duration::from_millis(100);
/// The same after a turn that failed.
const FAILED_GAP: Duration = Duration::from_secs(1);

/// Something only the leading conductor does: idempotent, run on change of the fleet and at least every `period`.
pub(crate) trait Reconciler: Send + 'static {
    /// For logs and metrics.
    fn name(&self) -> &'static str;

    /// Longest time between two turns.
    fn period(&self) -> Duration;

    /// One turn. May be dropped at any await: when it takes too long, and when this conductor no longer leads.
    fn reconcile<'a>(&'a mut self, turn: Turn<'a>) -> BoxFuture<'a, Result<(), RegistryError>>;
}

/// What a reconciler works with.
pub(crate) struct Turn<'a> {
    /// Begin of the turn.
    pub(crate) now: Instant,
    /// The fleet at the begin of the turn.
    pub(crate) fleet: &'a Fleet,
    /// Where to write, with [`Fence::compare`] among the conditions.
    pub(crate) store: &'a dyn Store,
    /// This term of leadership.
    pub(crate) fence: Fence,
}

/// One term of leadership: the revision at which the leader's key was created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fence {
    revision: Revision,
}

impl Fence {
    pub(crate) fn new(revision: Revision) -> Self {
        Self { revision }
    }

    /// Holds as long as this term lasts. It goes into every transaction of a reconciler.
    pub(crate) fn compare(&self) -> Compare {
        Compare::Created { key: LEADER_KEY.to_owned(), revision: self.revision }
    }

    pub(crate) fn revision(self) -> Revision {
        self.revision
    }
}

/// How the turns of each reconciler ended.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<BTreeMap<&'static str, Counts>>);

/// Turns of one reconciler since the start of this conductor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counts {
    pub(crate) turns: u64,
    /// Of those, with an error, a panic, or no end in time.
    pub(crate) failed: u64,
}

impl Tally {
    /// By reconciler; each is there from its start.
    pub(crate) fn counts(&self) -> BTreeMap<&'static str, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, name: &'static str, turns: u64, failed: bool) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = counts.entry(name).or_default();
        counts.turns += turns;
        counts.failed += u64::from(failed);
    }
}

/// Runs reconcilers while this conductor leads.
#[derive(Clone)]
pub(crate) struct Runner {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) mirror: Arc<Mirror>,
    /// The current term, if this conductor leads.
    pub(crate) term: watch::Receiver<Option<Fence>>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) stop: CancellationToken,
}

/// How a turn ended.
enum Outcome {
    Done,
    Failed,
    /// This conductor no longer leads: whatever the turn was about is another's now.
    Deposed,
}

impl Runner {
    /// Starts `reconciler` on a task of its own.
    pub(crate) fn start(&self, tasks: &TaskTracker, reconciler: impl Reconciler) {
        self.tally.add(reconciler.name(), 0, false);
        let stop = self.stop.clone();
        tasks.spawn(stop.run_until_cancelled_owned(self.clone().run(Box::new(reconciler))));
    }

    async fn run(mut self, mut reconciler: Box<dyn Reconciler>) {
        let mut head = self.mirror.head();
        loop {
            let Ok(term) = self.term.wait_for(Option::is_some).await.map(|term| *term) else { return };
            let Some(fence) = term else { continue };
            head.borrow_and_update();
            let began = Instant::now();
            let gap = match self.turn(&mut *reconciler, fence).await {
                Outcome::Done => TURN_GAP,
                Outcome::Failed => FAILED_GAP,
                Outcome::Deposed => continue,
            };
            let news = async {
                tokio::time::sleep_until(began + gap).await;
                head.changed().await
            };
            tokio::select! {
                biased;
                _ = self.term.wait_for(|term| *term != Some(fence)) => {}
                _ = news => {}
                () = tokio::time::sleep_until(began + reconciler.period()) => {}
            }
        }
    }

    async fn turn(&mut self, reconciler: &mut dyn Reconciler, fence: Fence) -> Outcome {
        let name = reconciler.name();
        let fleet = self.mirror.fleet();
        let turn = Turn { now: Instant::now(), fleet: &fleet, store: &*self.store, fence };
        let work = AssertUnwindSafe(reconciler.reconcile(turn)).catch_unwind();
        let done = tokio::select! {
            biased;
            _ = self.term.wait_for(|term| *term != Some(fence)) => return Outcome::Deposed,
            done = tokio::time::timeout(TURN_DEADLINE, work) => done,
        };
        let failed = match done {
            Ok(Ok(Ok(()))) => false,
            Ok(Ok(Err(error))) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(reconciler = name, error, "not done; trying again");
                true
            }
            Ok(Err(_)) => {
                tracing::error!(reconciler = name, "panicked; trying again");
                true
            }
            Err(_) => {
                tracing::warn!(reconciler = name, "no end within {TURN_DEADLINE:?}; trying again");
                true
            }
        };
        self.tally.add(name, 1, failed);
        if failed { Outcome::Failed } else { Outcome::Done }
    }
}

#[cfg(test)]
mod tests;
