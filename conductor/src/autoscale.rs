//! The autoscaler: how many workers each pool should have, decided by the leading conductor and written to the store.
//!
//! ```text
//!  GET /v1/state of the workers ──► Poller ──► decide (no I/O, no clock) ──► scale/POOL, with the fence ──► mirror
//!                                                 ▲      memory of this leader                               │
//!                        problems, what is there ─┤                      baton up, HPA, KEDA ◄── desired ────┤
//!                                                 └── Board ◄── scalers: Kubernetes, web hook ◄── scale/POOL ┘
//! ```
//! Written only when a number or the reason for it changes. Whoever starts and stops workers follows what is written,
//! so that a new leader, or a scaler that was away, carries on without being told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_config::PoolName;
use baton_config::fleet::{Autoscale, ScalerKind, ScalerSpec};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::dice::{Dice, random_id};
use crate::mirror::{Fleet, Mirror};
use crate::reconcile::{Reconciler, Turn};
use crate::record::WorkerState;
use crate::registry::RegistryError;
use crate::server::PoolOptions;
use crate::store::{Op, Revision, Txn};

mod board;
mod decide;
mod measure;
mod poll;
mod rules;
mod scaler;

pub(crate) use board::Board;
pub(crate) use decide::Kind;
use decide::{Decision, Inputs, Memory, PoolInput, decide};
use measure::WorkerInput;
use poll::Poller;
pub(crate) use scaler::ScalerAgent;

/// Where the autoscaler's decisions are kept.
pub(crate) const SCALE_PREFIX: &str = "scale/";
/// How often the workers are asked.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// A decision as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Scaled {
    /// Wanted number of workers.
    pub(crate) desired: u32,
    /// What the decision was about: `up`, `down`, `steady`...
    pub(crate) kind: String,
    /// Why, with its inputs.
    pub(crate) reason: String,
    /// Whether nobody shall follow it.
    pub(crate) dry_run: bool,
    /// Who follows it.
    pub(crate) scaler: ScalerKind,
    /// The same over all attempts to carry it out.
    pub(crate) id: String,
    /// Why the scaler can't.
    #[serde(default)]
    pub(crate) problem: Option<String>,
}

/// A pool that scales.
#[derive(Debug, Clone)]
struct Scaling {
    options: PoolOptions,
    scale: Option<Autoscale>,
}

/// The reconciler that decides.
pub(crate) struct Autoscaler {
    pools: Vec<Scaling>,
    mirror: Arc<Mirror>,
    board: Arc<Board>,
    poller: Poller,
    memory: Memory,
    warm_up: Duration,
    /// The term that the memory is of.
    term: Option<Revision>,
    /// Written, and maybe not yet in the mirror.
    written: BTreeMap<PoolName, (Revision, Scaled)>,
    dice: Dice,
    gap: Duration,
    next: Option<Instant>,
}

impl Autoscaler {
    /// For these pools; `None` if none of them scales. `warm_up` is the time in which workers find back after a restart.
    pub(crate) fn new(
        pools: &[PoolOptions],
        autoscale: &BTreeMap<PoolName, Autoscale>,
        mirror: Arc<Mirror>,
        board: Arc<Board>,
        warm_up: Duration,
    ) -> Option<Self> {
        if autoscale.is_empty() {
            return None;
        }
        let of =
            |pool: &PoolOptions| Scaling { options: pool.clone(), scale: autoscale.get(&pool.name).cloned() };
        Some(Self {
            pools: pools.iter().map(of).collect(),
            mirror,
            board,
            poller: Poller::new()?,
            memory: Memory::new(warm_up),
            warm_up,
            term: None,
            written: BTreeMap::new(),
            dice: Dice::from_entropy(),
            gap: POLL_INTERVAL,
            next: None,
        })
    }

    async fn turn(&mut self, turn: Turn<'_>) -> Result<(), RegistryError> {
        if self.term != Some(turn.fence.revision()) {
            // What another term remembers may have been overtaken.
            self.memory = Memory::new(self.warm_up);
            self.written.clear();
            self.term = Some(turn.fence.revision());
        }
        if self.next.is_some_and(|next| turn.now < next) {
            return Ok(());
        }
        self.gap = POLL_INTERVAL * 9 / 10 + self.dice.up_to(POLL_INTERVAL / 5);
        self.next = Some(turn.now + self.gap);
        self.poller.poll(turn.fleet.workers.values()).await;
        // The poll took a while: a decision made meanwhile must not be overlooked.
        let fleet = self.mirror.fleet();
        let inputs = self.inputs(&fleet);
        let decisions = decide(&mut self.memory, Instant::now(), &inputs);
        for decision in decisions {
            let pool = decision.pool.clone();
            if let Err(error) = self.write(&turn, decision).await {
                self.memory.forget(&pool);
                return Err(error);
            }
        }
        self.write_problems(&turn, &fleet).await
    }

    fn inputs(&self, fleet: &Fleet) -> Inputs {
        let now = Instant::now();
        let pool = |pool: &Scaling| {
            let name = &pool.options.name;
            let workers = fleet.workers.values().filter(|record| record.pool == *name).map(|record| {
                let drains = fleet.drain.contains(&record.worker);
                WorkerInput {
                    worker: record.worker.clone(),
                    epoch: record.epoch,
                    state: if drains { WorkerState::Draining } else { record.state },
                    sample: self.poller.sample(&record.worker, record.epoch, now),
                }
            });
            PoolInput {
                role: pool.options.role,
                scale: pool.scale.clone(),
                replicas: pool.options.replicas,
                decided: self.stored(fleet, name).map(|scaled| scaled.desired),
                found: self.board.found(name),
                pinned: fleet.replicas.get(name).copied(),
                workers: workers.collect(),
                name: name.clone(),
            }
        };
        Inputs { pools: self.pools.iter().map(pool).collect() }
    }

    /// The last decision: written by this one, or as the mirror has it.
    fn stored<'a>(&'a self, fleet: &'a Fleet, pool: &PoolName) -> Option<&'a Scaled> {
        let mirrored = fleet.scale.get(pool).map(|seen| &seen.scaled);
        match self.written.get(pool) {
            Some((revision, scaled)) if *revision > fleet.revision => Some(scaled),
            _ => mirrored,
        }
    }

    async fn write(&mut self, turn: &Turn<'_>, decision: Decision) -> Result<(), RegistryError> {
        let Decision { pool, kind, from, desired, reason, counts } = decision;
        let scaling = self.pools.iter().find(|scaling| scaling.options.name == pool);
        let Some(scale) = scaling.and_then(|scaling| scaling.scale.as_ref()) else { return Ok(()) };
        let scaler = scale.scaler.kind();
        // An operator's word is done even where the autoscaler's is only told.
        let dry_run = scale.dry_run && kind != Kind::Pinned;
        let scaled = Scaled {
            desired,
            kind: kind.word().to_owned(),
            reason: reason.clone(),
            dry_run,
            scaler,
            id: random_id(),
            problem: self.board.problem(&pool),
        };
        self.put(turn, &pool, scaled).await?;
        self.board.decided(&pool, kind);
        tracing::info!(
            %pool, decision = kind.word(), from, desired, reason, dry_run, ready = counts.ready,
            joining = counts.joining, draining = counts.draining, silent = counts.silent,
            %scaler, "autoscaler"
        );
        Ok(())
    }

    /// Operators see beside the decision what keeps the scaler from following it.
    async fn write_problems(&mut self, turn: &Turn<'_>, fleet: &Fleet) -> Result<(), RegistryError> {
        let names: Vec<PoolName> = self.pools.iter().map(|pool| pool.options.name.clone()).collect();
        for pool in names {
            let problem = self.board.problem(&pool);
            let Some(scaled) = self.stored(fleet, &pool).filter(|scaled| scaled.problem != problem) else {
                continue;
            };
            let scaled = Scaled { problem, ..scaled.clone() };
            self.put(turn, &pool, scaled).await?;
        }
        Ok(())
    }

    async fn put(&mut self, turn: &Turn<'_>, pool: &PoolName, scaled: Scaled) -> Result<(), RegistryError> {
        let key = format!("{SCALE_PREFIX}{pool}");
        let value = match serde_json::to_vec(&scaled) {
            Ok(value) => value.into(),
            Err(source) => return Err(RegistryError::Stored { key, source }),
        };
        let ops = vec![Op::Put { key: key.clone(), value, lease: None }];
        let reply = turn.store.txn(Txn { compares: vec![turn.fence.compare()], ops }).await?;
        if !reply.succeeded {
            // Deposed: the next leader decides.
            return Err(RegistryError::Contended { key });
        }
        self.written.insert(pool.clone(), (reply.revision, scaled));
        Ok(())
    }
}

impl Reconciler for Autoscaler {
    fn name(&self) -> &'static str {
        "autoscaler"
    }

    fn period(&self) -> Duration {
        self.gap
    }

    fn reconcile<'a>(&'a mut self, turn: Turn<'a>) -> BoxFuture<'a, Result<(), RegistryError>> {
        Box::pin(self.turn(turn))
    }
}

/// The reconcilers that carry decisions out, one for each pool that somebody else has to be told of.
pub(crate) fn scalers(
    pools: &[PoolOptions],
    autoscale: &BTreeMap<PoolName, Autoscale>,
    board: &Arc<Board>,
) -> Vec<ScalerAgent> {
    let agent = |pool: &PoolOptions| {
        let scale = autoscale.get(&pool.name)?;
        let outside = matches!(scale.scaler, ScalerSpec::Kubernetes(_) | ScalerSpec::Webhook(_));
        outside.then(|| ScalerAgent::new(pool, scale.clone(), board.clone()))
    };
    pools.iter().filter_map(agent).collect()
}

#[cfg(test)]
mod tests;
