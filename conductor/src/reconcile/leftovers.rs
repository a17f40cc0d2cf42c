//! Removes what concerns nobody any more: wishes to drain workers that never came back, and workers that no lease holds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_config::WorkerId;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::{Reconciler, Turn};
use crate::mirror::Mirror;
use crate::registry::{RegistryError, drain_key, worker_key};
use crate::store::{Compare, Op, Txn};

/// A wish to drain a worker that never came back is forgotten after this.
const DRAIN_KEEP: Duration = Duration::from_secs(600);
/// How often leftovers are looked for. None of them is urgent.
const PERIOD: Duration = Duration::from_secs(10);

/// Forgets wishes to drain workers that have been away for [`DRAIN_KEEP`].
///
/// When the absence began is known to this conductor alone: after a change of leader the wait begins anew.
#[derive(Debug, Default)]
pub(crate) struct DrainWishes {
    absent: BTreeMap<WorkerId, Instant>,
}

impl Reconciler for DrainWishes {
    fn name(&self) -> &'static str {
        "drain_wishes"
    }

    fn period(&self) -> Duration {
        PERIOD
    }

    fn reconcile<'a>(&'a mut self, turn: Turn<'a>) -> BoxFuture<'a, Result<(), RegistryError>> {
        let Turn { now, fleet, store, fence } = turn;
        let away = |worker: &WorkerId| fleet.drain.contains(worker) && !fleet.workers.contains_key(worker);
        self.absent.retain(|worker, _| away(worker));
        for worker in fleet.drain.iter().filter(|worker| away(worker)) {
            self.absent.entry(worker.clone()).or_insert(now);
        }
        Box::pin(async move {
            let overdue = self.absent.iter().filter(|(_, since)| now >= **since + DRAIN_KEEP);
            for (worker, _) in overdue {
                let absent = Compare::Created { key: worker_key(worker), revision: 0 };
                let ops = vec![Op::Delete { key: drain_key(worker) }];
                let reply = store.txn(Txn { compares: vec![fence.compare(), absent], ops }).await?;
                if reply.succeeded {
                    tracing::info!(%worker, "never came back: nobody is left to drain");
                }
            }
            Ok(())
        })
    }
}

/// Removes workers whose key hangs on no lease. No conductor writes such a key, and nothing else would ever end it: it
/// comes from a hand, or from a backup that was restored without its leases.
#[derive(Debug)]
pub(crate) struct UnleasedWorkers {
    pub(crate) mirror: Arc<Mirror>,
}

impl Reconciler for UnleasedWorkers {
    fn name(&self) -> &'static str {
        "unleased_workers"
    }

    fn period(&self) -> Duration {
        PERIOD
    }

    fn reconcile<'a>(&'a mut self, turn: Turn<'a>) -> BoxFuture<'a, Result<(), RegistryError>> {
        Box::pin(async move {
            for (worker, revision) in self.mirror.unleased() {
                let key = worker_key(&worker);
                let same = Compare::Modified { key: key.clone(), revision };
                let compares = vec![turn.fence.compare(), same];
                let reply = turn.store.txn(Txn { compares, ops: vec![Op::Delete { key }] }).await?;
                if reply.succeeded {
                    tracing::warn!(%worker, "held by no lease: removed");
                }
            }
            Ok(())
        })
    }
}
