//! Carries decisions out where somebody else starts and stops workers: level-triggered, with pauses after failures.

use std::sync::Arc;
use std::time::Duration;

use baton_config::fleet::{Autoscale, ScalerSpec};
use baton_config::{PoolName, Role};
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::{Board, Scaled};
use crate::dice::{Backoff, Dice};
use crate::reconcile::{Fence, Reconciler, Turn};
use crate::record::WorkerState;
use crate::registry::RegistryError;
use crate::server::PoolOptions;

mod kubernetes;
mod webhook;

use kubernetes::Kubernetes;
use webhook::{Notice, Webhook};

/// How often a scaler looks whether there is something to do.
const PERIOD: Duration = Duration::from_secs(1);
/// How often it is compared with what is there although nothing was decided.
const COMPARE_EVERY: Duration = Duration::from_secs(10);
/// Pauses between attempts that fail.
const BACKOFF: Backoff = Backoff { base: Duration::from_secs(1), cap: Duration::from_secs(30) };

/// Why a scaler did not do what was decided. The text is told to operators as it is.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct ScalerError(pub(super) String);

enum Means {
    Kubernetes(Kubernetes),
    Webhook(Webhook),
}

/// The scaler of one pool.
pub(crate) struct ScalerAgent {
    pool: PoolName,
    role: Role,
    means: Option<Means>,
    board: Arc<Board>,
    dice: Dice,
    failures: u32,
    next: Option<Instant>,
    /// The decision that was carried out last, in this term; nothing when what was tried since may have been carried out.
    done: Option<(String, u32)>,
    term: Option<Fence>,
}

impl ScalerAgent {
    pub(crate) fn new(pool: &PoolOptions, scale: Autoscale, board: Arc<Board>) -> Self {
        let means = match scale.scaler {
            ScalerSpec::Kubernetes(spec) => Some(Means::Kubernetes(Kubernetes::new(spec))),
            ScalerSpec::Webhook(spec) => Some(Means::Webhook(Webhook::new(spec))),
            ScalerSpec::None | ScalerSpec::Process => None,
        };
        let (pool, role) = (pool.name.clone(), pool.role);
        Self {
            pool,
            role,
            means,
            board,
            dice: Dice::from_entropy(),
            failures: 0,
            next: None,
            done: None,
            term: None,
        }
    }

    async fn turn(&mut self, turn: Turn<'_>) {
        if self.term.replace(turn.fence) != Some(turn.fence) {
            // Another conductor may have led, and told otherwise, in between.
            self.done = None;
        }
        let scaled =
            turn.fleet.scale.get(&self.pool).map(|seen| &seen.scaled).filter(|scaled| !scaled.dry_run);
        let news = scaled.is_some_and(|scaled| self.done.as_ref().is_none_or(|(id, _)| *id != scaled.id));
        // News do not wait for the next comparison, but for the end of a pause.
        if self.next.is_some_and(|next| turn.now < next && (self.failures > 0 || !news)) {
            return;
        }
        let ready =
            turn.fleet.workers.values().filter(|w| w.pool == self.pool && w.state == WorkerState::Ready);
        let ready = u32::try_from(ready.count()).unwrap_or(u32::MAX);
        let done = self.done.as_ref().map(|(_, desired)| *desired);
        let outcome = match (&mut self.means, scaled) {
            (Some(Means::Kubernetes(kubernetes)), None) => kubernetes.current().await.map(Some),
            (Some(Means::Kubernetes(kubernetes)), Some(scaled)) => {
                kubernetes.scale(scaled.desired).await.map(Some)
            }
            (Some(Means::Webhook(webhook)), Some(scaled)) if news && done != Some(scaled.desired) => {
                let (pool, role) = (&self.pool, self.role);
                let Scaled { desired, reason, id, .. } = scaled;
                // Until it answers, and when it doesn't, nobody knows what it took.
                self.done = None;
                webhook
                    .tell(&Notice { pool, role, desired: *desired, ready, reason, id })
                    .await
                    .map(|()| None)
            }
            _ => Ok(None),
        };
        self.note(turn.now, scaled, outcome);
    }

    fn note(&mut self, now: Instant, scaled: Option<&Scaled>, outcome: Result<Option<u32>, ScalerError>) {
        let pool = &self.pool;
        match outcome {
            Ok(found) => {
                if let Some(found) = found {
                    self.board.finds(pool, found);
                }
                if self.board.went_well(pool) {
                    tracing::info!(%pool, "the scaler works again");
                }
                self.done = scaled.map(|scaled| (scaled.id.clone(), scaled.desired));
                self.failures = 0;
                self.next = Some(now + COMPARE_EVERY);
            }
            Err(ScalerError(problem)) => {
                if self.board.failed(pool, problem.clone()) {
                    tracing::warn!(%pool, problem, "the scaler can't do what was decided; trying again");
                }
                self.next = Some(now + BACKOFF.delay(self.failures, &mut self.dice));
                self.failures = self.failures.saturating_add(1);
            }
        }
    }
}

impl Reconciler for ScalerAgent {
    fn name(&self) -> &'static str {
        "scaler"
    }

    fn period(&self) -> Duration {
        PERIOD
    }

    fn reconcile<'a>(&'a mut self, turn: Turn<'a>) -> BoxFuture<'a, Result<(), RegistryError>> {
        Box::pin(async {
            // Failures are told by the board, not by the runner.
            self.turn(turn).await;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests;
