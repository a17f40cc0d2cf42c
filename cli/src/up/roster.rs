//! Who shall run and what is to be done about it: the launcher's core, without processes and without a clock.
//!
//! A part is started, restarted with growing pauses when it ends by itself, and stopped when it is not wanted.
//! Workers of a pool are numbered from 0; a number comes back into use when its worker is gone, except that of a
//! worker that an operator drained: its name stays retired, and another takes its place.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use baton_config::{PoolName, WorkerId};

/// First pause before a part is started again; doubled each time.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
/// Longest pause.
const PAUSE_MOST: Duration = Duration::from_secs(10);
/// A part that ran so long has its earlier ends forgiven.
const FORGIVEN_AFTER: Duration = Duration::from_secs(30);

/// One process of the fleet. The order is the one they are stopped in: nobody loses whom it depends on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PartId {
    Router,
    Worker { pool: PoolName, index: u32 },
    Conductor,
}

impl PartId {
    /// The worker's name in the fleet.
    pub(super) fn worker(&self) -> Option<WorkerId> {
        match self {
            Self::Worker { pool, index } => format!("{pool}-{index}").parse().ok(),
            Self::Router | Self::Conductor => None,
        }
    }
}

impl fmt::Display for PartId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Router => f.write_str("router"),
            Self::Conductor => f.write_str("conductor"),
            Self::Worker { pool, index } => write!(f, "{pool}-{index}"),
        }
    }
}

/// What the launcher must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Start its process.
    Start(PartId),
    /// Ask it to drain and end (SIGTERM).
    Terminate(PartId),
    /// End it now (SIGKILL).
    Kill(PartId),
}

/// What an ended process means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// It was asked to.
    Stopped,
    /// A worker left by itself after a drain: another takes its place.
    Left,
    /// It is started again after a pause.
    Restarting {
        /// The pause.
        after: Duration,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// To be started once it is time.
    Waiting {
        until: Instant,
    },
    Running {
        since: Instant,
    },
    /// Asked to end; killed when it takes longer.
    Stopping {
        kill_at: Instant,
        killed: bool,
    },
}

#[derive(Debug)]
struct Part {
    phase: Phase,
    pause: Duration,
}

/// The parts of one fleet.
#[derive(Debug)]
pub(super) struct Roster {
    parts: BTreeMap<PartId, Part>,
    wanted: BTreeMap<PoolName, u32>,
    retired: BTreeSet<PartId>,
    /// How long a part may take to drain.
    grace: Duration,
    stopping: bool,
}

impl Roster {
    /// A conductor, a router, and so many workers of each pool.
    pub(super) fn new(
        pools: impl IntoIterator<Item = (PoolName, u32)>,
        grace: Duration,
        now: Instant,
    ) -> Self {
        let parts = [PartId::Conductor, PartId::Router].map(|id| (id, Part::waiting(now)));
        let mut roster = Self {
            parts: parts.into(),
            wanted: pools.into_iter().collect(),
            retired: BTreeSet::new(),
            grace,
            stopping: false,
        };
        roster.fill(now);
        roster
    }

    /// How many workers of a pool are wanted; `None` for one that is not of this fleet.
    pub(super) fn wanted(&self, pool: &PoolName) -> Option<u32> {
        self.wanted.get(pool).copied()
    }

    /// Another number of workers is wanted. Pools that are not of this fleet are ignored.
    pub(super) fn want(&mut self, pool: &PoolName, replicas: u32) {
        if let Some(wanted) = self.wanted.get_mut(pool) {
            *wanted = replicas;
        }
    }

    /// Stops everything, in order.
    pub(super) fn stop(&mut self) {
        self.stopping = true;
    }

    /// Ends everything now.
    pub(super) fn kill(&mut self, now: Instant) {
        self.stopping = true;
        for part in self.parts.values_mut() {
            part.phase = match part.phase {
                Phase::Stopping { killed: true, .. } | Phase::Waiting { .. } => continue,
                Phase::Running { .. } | Phase::Stopping { .. } => {
                    Phase::Stopping { kill_at: now, killed: false }
                }
            };
        }
    }

    /// Whether nothing runs any more.
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Whether the part is meant to run on.
    pub(super) fn is_wanted(&self, id: &PartId) -> bool {
        self.parts.get(id).is_some_and(|part| !matches!(part.phase, Phase::Stopping { .. }))
    }

    /// The workers that are meant to run, and the pools' wanted sizes are met by them.
    pub(super) fn workers(&self) -> impl Iterator<Item = &PartId> {
        self.parts.keys().filter(|id| matches!(id, PartId::Worker { .. }) && self.is_wanted(id))
    }

    /// What is to be done now; everything returned is taken as done.
    pub(super) fn step(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.stopping {
            self.stop_next(now, &mut actions);
        } else {
            self.fill(now);
            self.trim(now, &mut actions);
        }
        for (id, part) in &mut self.parts {
            match &mut part.phase {
                Phase::Waiting { until } if *until <= now => {
                    part.phase = Phase::Running { since: now };
                    actions.push(Action::Start(id.clone()));
                }
                Phase::Stopping { kill_at, killed } if *kill_at <= now && !*killed => {
                    *killed = true;
                    actions.push(Action::Kill(id.clone()));
                }
                Phase::Waiting { .. } | Phase::Running { .. } | Phase::Stopping { .. } => {}
            }
        }
        actions
    }

    /// When [`Roster::step`] has something to do even if nothing happens.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        let wakes = self.parts.values().filter_map(|part| match part.phase {
            Phase::Waiting { until } => Some(until),
            Phase::Stopping { kill_at, killed: false } => Some(kill_at),
            Phase::Running { .. } | Phase::Stopping { killed: true, .. } => None,
        });
        wakes.min()
    }

    /// A process ended; `well` says whether its exit code was 0.
    pub(super) fn ended(&mut self, id: &PartId, well: bool, now: Instant) -> Ended {
        let Some(part) = self.parts.get_mut(id) else { return Ended::Stopped };
        let since = match part.phase {
            Phase::Stopping { .. } => {
                self.parts.remove(id);
                return Ended::Stopped;
            }
            Phase::Running { since } => since,
            Phase::Waiting { .. } => return Ended::Stopped,
        };
        if well && matches!(id, PartId::Worker { .. }) {
            self.parts.remove(id);
            self.retired.insert(id.clone());
            return Ended::Left;
        }
        if now.saturating_duration_since(since) >= FORGIVEN_AFTER {
            part.pause = PAUSE_FIRST;
        }
        let after = part.pause;
        part.pause = (part.pause * 2).min(PAUSE_MOST);
        part.phase = Phase::Waiting { until: now + after };
        Ended::Restarting { after }
    }

    /// Adds the workers that are missing.
    fn fill(&mut self, now: Instant) {
        for (pool, wanted) in &self.wanted {
            let mut missing = (*wanted).saturating_sub(self.count(pool));
            let mut index = 0;
            while missing > 0 {
                let id = PartId::Worker { pool: pool.clone(), index };
                if !self.parts.contains_key(&id) && !self.retired.contains(&id) {
                    self.parts.insert(id, Part::waiting(now));
                    missing -= 1;
                }
                index += 1;
            }
        }
    }

    /// Stops the workers that are too many, the youngest numbers first.
    fn trim(&mut self, now: Instant, actions: &mut Vec<Action>) {
        for (pool, wanted) in self.wanted.clone() {
            let surplus = self.count(&pool).saturating_sub(wanted) as usize;
            let last: Vec<PartId> = self.workers().filter(|id| id.is_of(&pool)).cloned().collect();
            for id in last.into_iter().rev().take(surplus) {
                self.end(&id, now, actions);
            }
        }
    }

    /// Stops whoever may be stopped now: the router first, then the workers, then the conductor.
    fn stop_next(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let rank = |id: &PartId| match id {
            PartId::Router => 0,
            PartId::Worker { .. } => 1,
            PartId::Conductor => 2,
        };
        self.parts.retain(|_, part| !matches!(part.phase, Phase::Waiting { .. }));
        let Some(first) = self.parts.keys().map(rank).min() else { return };
        let due: Vec<PartId> = self.parts.keys().filter(|id| rank(id) == first).cloned().collect();
        for id in due {
            self.end(&id, now, actions);
        }
    }

    fn end(&mut self, id: &PartId, now: Instant, actions: &mut Vec<Action>) {
        let Some(part) = self.parts.get_mut(id) else { return };
        match part.phase {
            Phase::Waiting { .. } => {
                self.parts.remove(id);
            }
            Phase::Running { .. } => {
                part.phase = Phase::Stopping { kill_at: now + self.grace, killed: false };
                actions.push(Action::Terminate(id.clone()));
            }
            Phase::Stopping { .. } => {}
        }
    }

    fn count(&self, pool: &PoolName) -> u32 {
        u32::try_from(self.workers().filter(|id| id.is_of(pool)).count()).unwrap_or(u32::MAX)
    }
}

impl PartId {
    fn is_of(&self, of: &PoolName) -> bool {
        matches!(self, Self::Worker { pool, .. } if pool == of)
    }
}

impl Part {
    fn waiting(now: Instant) -> Self {
        Self { phase: Phase::Waiting { until: now }, pause: PAUSE_FIRST }
    }
}

#[cfg(test)]
mod tests;
