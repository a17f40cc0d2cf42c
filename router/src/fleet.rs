//! The workers as this router knows them: who is there, how loaded they are, who is not answering.
//!
//! Membership comes from the conductor's view as a [`Roster`]; load is what this router has in flight plus what
//! each worker last reported. The view may be stale; it is never emptied because the conductor is away.

mod follow;
mod known;
mod pairs;
mod poll;
pub(crate) mod roster;
mod seen;
mod sweep;
mod worker;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use baton_config::WorkerId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::dispatch::Caller;
use crate::index::PrefixIndex;
use crate::metrics::Metrics;
use follow::Turns;
pub(crate) use pairs::Ways;
pub use roster::{Member, Roster, RosterFeed};
pub(crate) use worker::{Occupied, Standing, Worker};

/// Handles of all workers in view.
#[derive(Debug)]
pub(crate) struct Fleet {
    workers: RwLock<Arc<[Arc<Worker>]>>,
    /// What each of them has cached.
    pub(crate) index: Arc<PrefixIndex>,
    /// Bumped at every change, so that a stream without a worker can wait for one.
    changed: watch::Sender<u64>,
}

impl Fleet {
    /// An empty fleet.
    pub(crate) fn new(index: PrefixIndex) -> Self {
        Self { workers: RwLock::new(Arc::new([])), index: Arc::new(index), changed: watch::Sender::new(0) }
    }

    /// A fleet of these workers, which nobody keeps up to date.
    pub(crate) fn of(index: PrefixIndex, workers: Vec<Arc<Worker>>) -> Self {
        let fleet = Self::new(index);
        fleet.replace(workers);
        fleet
    }

    /// The workers in view now.
    pub(crate) fn workers(&self) -> Arc<[Arc<Worker>]> {
        Arc::clone(&self.workers.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether any worker could take a request now.
    pub(crate) fn can_serve(&self) -> bool {
        self.workers().iter().any(|worker| worker.member.role.decodes() && worker.member.ready)
    }

    /// Changes whenever the workers do.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn replace(&self, workers: Vec<Arc<Worker>>) {
        *self.workers.write().unwrap_or_else(PoisonError::into_inner) = workers.into();
        self.changed.send_modify(|generation| *generation += 1);
    }
}

/// Keeps a [`Fleet`] equal to the feed and one poller per worker running.
pub(crate) struct Keeper {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) feed: RosterFeed,
    pub(crate) caller: Caller,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tracker: TaskTracker,
    pub(crate) stop: CancellationToken,
}

impl Keeper {
    /// Follows the feed until stopped.
    pub(crate) async fn run(mut self) {
        let sweeper = sweep::Sweeper {
            index: Arc::clone(&self.fleet.index),
            metrics: Arc::clone(&self.metrics),
            stop: self.stop.clone(),
        };
        self.tracker.spawn(sweeper.run());
        let turns = Turns::new();
        let mut pollers: BTreeMap<WorkerId, CancellationToken> = BTreeMap::new();
        loop {
            let roster = Arc::clone(&self.feed.borrow_and_update());
            self.metrics.view_age.set(roster.age.as_secs_f64());
            self.apply(&roster, &mut pollers, &turns);
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                changed = self.feed.changed() => if changed.is_err() {
                    // The feed ended: the last view stays in use.
                    self.stop.cancelled().await;
                    return;
                },
            }
        }
    }

    fn apply(&self, roster: &Roster, pollers: &mut BTreeMap<WorkerId, CancellationToken>, turns: &Turns) {
        let old = self.fleet.workers();
        let unchanged = old.len() == roster.members.len()
            && old.iter().zip(&roster.members).all(|(worker, member)| worker.member == *member);
        if unchanged {
            return;
        }
        let known: BTreeMap<&WorkerId, &Arc<Worker>> =
            old.iter().map(|worker| (&worker.member.worker, worker)).collect();
        let mut workers = Vec::with_capacity(roster.members.len());
        let mut kept = BTreeMap::new();
        for member in &roster.members {
            let before = known.get(&member.worker).filter(|worker| worker.same_life(member));
            let worker = match before {
                Some(worker) if worker.member == *member => Arc::clone(worker),
                Some(worker) => Arc::new(worker.updated(member.clone())),
                None => match Worker::new(member.clone()) {
                    Ok(worker) => Arc::new(worker),
                    Err(error) => {
                        tracing::warn!(worker = %member.worker, %error, "worker left out: bad address");
                        continue;
                    }
                },
            };
            let poller = match (before, pollers.remove(&member.worker)) {
                (Some(_), Some(poller)) => poller,
                (_, stale) => {
                    stale.inspect(CancellationToken::cancel);
                    self.start_poller(&worker, turns)
                }
            };
            kept.insert(member.worker.clone(), poller);
            workers.push(worker);
        }
        for gone in pollers.values() {
            gone.cancel();
        }
        *pollers = kept;
        let stays = |old: &Arc<Worker>| workers.iter().any(|worker| worker.same_life(&old.member));
        for gone in old.iter().filter(|old| !stays(old)) {
            gone.health().known().forget(&self.fleet.index);
        }
        tracing::info!(workers = workers.len(), "fleet changed");
        self.fleet.replace(workers);
    }

    /// Starts what goes on as long as the worker lives this life.
    fn start_poller(&self, worker: &Arc<Worker>, turns: &Turns) -> CancellationToken {
        let stop = self.stop.child_token();
        let index = Arc::clone(&self.fleet.index);
        let follower = follow::Follower {
            health: worker.health(),
            epoch: worker.member.epoch,
            index: Arc::clone(&index),
            caller: self.caller.clone(),
            metrics: Arc::clone(&self.metrics),
            turns: turns.clone(),
            stop: stop.clone(),
        };
        self.tracker.spawn(follower.run());
        let poller =
            poll::Poller { health: worker.health(), caller: self.caller.clone(), index, stop: stop.clone() };
        self.tracker.spawn(poller.run());
        stop
    }
}

#[cfg(test)]
mod tests;
