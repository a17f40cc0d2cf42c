//! Opens and measures the paths of a pair in the background, and ranks them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep_until};

use super::{CLEARLY_BETTER, Candidate, GRACE, Paths, Stage};
use crate::agent::probe::{self, Measured};
use crate::agent::{BackendKind, ConnectError};
use crate::backend::Fault;

impl Paths {
    /// Waits until there is a path that a session may use; the others are opened and measured in the background.
    pub(crate) async fn bring_up(self: &Arc<Self>, avoid: Option<BackendKind>) -> Result<(), ConnectError> {
        match self.opener.measures() {
            true => self.bring_up_all(avoid).await,
            false => self.bring_up_listed(avoid).await,
        }
    }

    async fn bring_up_listed(&self, avoid: Option<BackendKind>) -> Result<(), ConnectError> {
        for index in self.usable(avoid) {
            match self.open(index).await {
                Ok(_) => return Ok(()),
                Err(Fault::Stale(_)) => break,
                Err(_) => {}
            }
        }
        Err(self.unreachable(avoid))
    }

    async fn bring_up_all(self: &Arc<Self>, avoid: Option<BackendKind>) -> Result<(), ConnectError> {
        if matches!(self.standing(avoid), Standing::None) {
            // All broken, some time ago.
            return self.bring_up_listed(avoid).await;
        }
        self.survey();
        let mut until: Option<Instant> = None;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.standing(avoid) {
                Standing::None => return Err(self.unreachable(avoid)),
                Standing::Best => return Ok(()),
                Standing::Some => {
                    let until = *until.get_or_insert_with(|| Instant::now() + GRACE);
                    tokio::select! {
                        biased;
                        () = changed => {}
                        () = sleep_until(until) => return Ok(()),
                    }
                }
                Standing::Waiting => tokio::select! {
                    biased;
                    () = self.route.ended.cancelled() => return Err(self.unreachable(avoid)),
                    () = changed => {}
                },
            }
        }
    }

    fn standing(&self, avoid: Option<BackendKind>) -> Standing {
        let (mut pending, mut stale) = (false, false);
        for index in self.usable(avoid) {
            match &self.candidates[index].state().stage {
                Stage::Open(_) if pending => return Standing::Some,
                Stage::Open(_) => return Standing::Best,
                Stage::Unopened | Stage::Opening => pending = true,
                Stage::Broken { verdict, .. } => stale |= matches!(verdict, Some(super::Verdict::Stale(_))),
            }
        }
        if pending && !stale { Standing::Waiting } else { Standing::None }
    }

    /// Starts a survey when a broken path may be tried again.
    pub(super) fn survey_when_due(self: &Arc<Self>) {
        let at = self.retry_at.load(Ordering::Relaxed);
        // Where nothing is broken, not even the clock is looked at.
        if at != u64::MAX && Duration::from_nanos(at) <= self.started.elapsed() && self.candidates.len() > 1 {
            self.survey();
        }
    }

    /// Opens, measures and ranks all paths in the background, unless that is being done.
    fn survey(self: &Arc<Self>) {
        if self.surveying.swap(true, Ordering::AcqRel) {
            return;
        }
        let paths = Arc::clone(self);
        self.route.tasks.spawn(async move {
            let ended = paths.route.ended.clone();
            tokio::select! {
                biased;
                () = ended.cancelled() => {}
                () = paths.run_survey() => {}
            }
            paths.surveying.store(false, Ordering::Release);
            // Who waits for a path that the end of this life kept from opening.
            paths.changed.notify_waiters();
        });
    }

    async fn run_survey(&self) {
        self.retry_at.store(u64::MAX, Ordering::Relaxed);
        let now = Instant::now();
        let due = |candidate: &Candidate| match &candidate.state().stage {
            Stage::Unopened => true,
            Stage::Broken { until, .. } => {
                let due = *until <= now;
                if !due {
                    self.note_retry(*until);
                }
                due
            }
            Stage::Opening | Stage::Open(_) => false,
        };
        let opening = (0..self.candidates.len()).filter(|index| due(&self.candidates[*index]));
        join_all(opening.map(|index| self.open(index))).await;
        if !self.opener.measures() || self.candidates.len() < 2 {
            return;
        }
        // One after the other: side by side they would measure each other.
        for (index, candidate) in self.candidates.iter().enumerate() {
            let Some(path) = candidate.path(index) else { continue };
            match probe::measure(&path.link, self.pair.epoch, &self.opener.probe).await {
                Ok(measured) => candidate.state().measured = Some(measured),
                Err(Fault::Link(error)) => self.broke(&path, &error),
                // Not all peers have something to be measured with: the path keeps its place in the list.
                Err(Fault::Refused(_) | Fault::Stale(_)) => {}
            }
        }
        let measured = self.candidates.iter().map(|candidate| candidate.state().measured);
        let order = rank(&measured.collect::<Vec<_>>());
        tracing::debug!(peer = %self.pair.to, info = ?self.info(None), "transfer paths measured");
        self.order.set(order);
        self.changed.notify_waiters();
    }
}

enum Standing {
    /// Nothing works.
    None,
    /// Something works, but something listed before it may yet.
    Some,
    /// The best that there is works.
    Best,
    /// Nothing works yet.
    Waiting,
}

/// Positions, best first: the listed order, but that a later path goes before those it is clearly quicker than.
pub(super) fn rank(measured: &[Option<Measured>]) -> Vec<usize> {
    let mut order: Vec<usize> = Vec::with_capacity(measured.len());
    for (index, own) in measured.iter().enumerate() {
        let is_beaten = |other: &usize| match (own, &measured[*other]) {
            (Some(own), Some(other)) => {
                own.typical().as_secs_f64() <= other.typical().as_secs_f64() * CLEARLY_BETTER
            }
            _ => false,
        };
        let at = order.iter().position(is_beaten).unwrap_or(order.len());
        order.insert(at, index);
    }
    order
}
