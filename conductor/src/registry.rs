//! What the conductor does with the store: names are leased, epochs given, wishes of operators noted.
//!
//! Holds nothing that another conductor on the same store could not rebuild, but for the last reported loads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use baton_config::{Cidr, Epoch, PoolName, WorkerId};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::api::{Drained, Holder, Keepalive, Kept, Register, Registered};
use crate::mirror::Mirror;
use crate::record::{Load, WorkerRecord, WorkerState};
use crate::server::PoolOptions;
use crate::store::{Compare, KeyValue, LeaseId, Op, Store, StoreError, StoreHealth, Txn};

mod takeover;
mod validate;

pub(crate) use validate::{Fault, NotAllowed};

/// Where workers are kept.
pub(crate) const WORKERS_PREFIX: &str = "workers/";
/// Where wishes to drain are kept.
pub(crate) const DRAIN_PREFIX: &str = "intents/drain/";
/// Where wanted numbers of workers are kept.
pub(crate) const REPLICAS_PREFIX: &str = "intents/replicas/";
/// The worker that left last. Written together with its removal, so that every conductor tells a goodbye from a death.
pub(crate) const GOODBYE_KEY: &str = "goodbye";

/// Attempts of a compare-and-write that others keep overtaking.
const ATTEMPTS: usize = 8;
/// How long a writer waits to see its own write in the mirror.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(1);

/// A worker as it is stored. `record.epoch` is 0 in the registering write: the epoch is that write's revision.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredWorker {
    pub(crate) record: WorkerRecord,
    pub(crate) incarnation: String,
}

impl StoredWorker {
    pub(crate) fn decode(kv: &KeyValue) -> Result<Self, serde_json::Error> {
        let mut stored: Self = serde_json::from_slice(&kv.value)?;
        if stored.record.epoch == Epoch(0) {
            stored.record.epoch = Epoch(kv.mod_revision);
        }
        Ok(stored)
    }
}

/// A stored wish to drain: of one process, not of whoever has the name next.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredDrain {
    pub(crate) incarnation: String,
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegistryError {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error(transparent)]
    NotAllowed(#[from] NotAllowed),
    #[error("the name {} is taken by the live worker at {} (epoch {})", .0.worker, .0.address, .0.epoch)]
    NameTaken(Box<Holder>),
    #[error("worker {worker} is not registered: its lease has ended; register anew")]
    LeaseGone { worker: WorkerId },
    #[error("epoch {given} of worker {worker} is not the live one, {live}")]
    StaleEpoch { worker: WorkerId, given: Epoch, live: Epoch },
    #[error("keepalive {seq} of worker {worker} is not newer than {last}, the last one taken")]
    Replayed { worker: WorkerId, seq: u64, last: u64 },
    #[error("worker {worker} is draining, which is final: register anew to be {wanted}")]
    DrainingIsFinal { worker: WorkerId, wanted: WorkerState },
    #[error("there is no worker {worker}")]
    NoWorker { worker: WorkerId },
    #[error("there is no pool {pool} in the fleet document (known: {known})")]
    NoPool { pool: PoolName, known: String },
    #[error("pool {pool} takes {min} to {max} replicas, not {asked}")]
    ReplicasOutOfRange { pool: PoolName, asked: u32, min: u32, max: u32 },
    #[error("others keep changing {key}; try again")]
    Contended { key: String },
    #[error("the store did not do it")]
    Store(#[from] StoreError),
    #[error("what is stored under {key} is not understood")]
    Stored { key: String, source: serde_json::Error },
}

/// The last load a worker told of.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) epoch: Epoch,
    /// The last keepalive taken.
    pub(crate) seq: u64,
    pub(crate) load: Option<Load>,
    pub(crate) at: Instant,
}

/// What registrations must keep to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rules {
    /// The model of the fleet document; any without.
    pub(crate) model: Option<String>,
    /// Where workers may say they are; anywhere when empty.
    pub(crate) allowed_addresses: Vec<Cidr>,
    /// Whether registrants have proved who they are.
    pub(crate) authenticated: bool,
}

/// The operations of the HTTP API.
pub(crate) struct Registry {
    store: Arc<dyn Store>,
    mirror: Arc<Mirror>,
    pools: BTreeMap<PoolName, PoolOptions>,
    rules: Rules,
    lease_ttl: Duration,
    told: Mutex<BTreeMap<WorkerId, Told>>,
}

impl Registry {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        mirror: Arc<Mirror>,
        pools: Vec<PoolOptions>,
        rules: Rules,
        lease_ttl: Duration,
    ) -> Self {
        let pools = pools.into_iter().map(|pool| (pool.name.clone(), pool)).collect();
        Self { store, mirror, pools, rules, lease_ttl, told: Mutex::default() }
    }

    pub(crate) fn pools(&self) -> &BTreeMap<PoolName, PoolOptions> {
        &self.pools
    }

    pub(crate) fn store_health(&self) -> StoreHealth {
        self.store.health()
    }

    pub(crate) fn lease_ttl(&self) -> Duration {
        self.lease_ttl
    }

    /// What workers last told this conductor.
    pub(crate) fn told(&self) -> BTreeMap<WorkerId, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) async fn register(&self, request: Register) -> Result<Registered, RegistryError> {
        validate::registration(&request, &self.pools)?;
        validate::model(&request.model, self.rules.model.as_deref())?;
        validate::allowed(&request.address, &self.rules.allowed_addresses)?;
        if let Some(server) = &request.server {
            // Where the worker says that requests go must be as good a place as where it says that it is.
            validate::allowed(&validate::authority(server)?, &self.rules.allowed_addresses)?;
        }
        let key = worker_key(&request.worker);
        for _ in 0..ATTEMPTS {
            let held = self.store.get(&key).await?;
            if let Some(kv) = &held {
                self.check_takeover(kv, &request).await?;
            }
            let lease = self.store.grant(self.lease_ttl).await?;
            let (txn, drain) = self.registration(&request, held.as_ref(), lease.id).await?;
            let reply = self.store.txn(txn).await?;
            if !reply.succeeded {
                self.store.revoke(lease.id).await?;
                continue;
            }
            // Its key has moved on: only the empty lease is left.
            if let Some(old) = held.and_then(|kv| kv.lease) {
                self.store.revoke(old).await?;
            }
            let epoch = Epoch(reply.revision);
            self.hear(&request.worker, epoch, None);
            self.mirror.reached(reply.revision, MIRROR_TIMEOUT).await;
            tracing::info!(worker = %request.worker, %epoch, address = request.address, "registered");
            let ttl_ms = millis(lease.ttl);
            return Ok(Registered {
                epoch,
                revision: reply.revision,
                ttl_ms,
                keepalive_ms: ttl_ms / 3,
                drain,
            });
        }
        Err(RegistryError::Contended { key })
    }

    pub(crate) async fn keep_alive(
        &self,
        worker: &WorkerId,
        request: Keepalive,
    ) -> Result<Kept, RegistryError> {
        if let Some(load) = &request.load {
            validate::load(load)?;
        }
        let kv = self.live(worker, request.epoch).await?;
        self.take_seq(worker, &request)?;
        let gone = || RegistryError::LeaseGone { worker: worker.clone() };
        let ttl = self.store.keep_alive(kv.lease.ok_or_else(gone)?).await?.ok_or_else(gone)?;
        self.change_state(worker, kv, &request).await?;
        self.hear(worker, request.epoch, request.load);
        Ok(Kept { ttl_ms: millis(ttl), drain: self.mirror.drains(worker) })
    }

    pub(crate) async fn deregister(&self, worker: &WorkerId, epoch: Epoch) -> Result<(), RegistryError> {
        let key = worker_key(worker);
        for _ in 0..ATTEMPTS {
            let kv = self.live(worker, epoch).await?;
            let goodbye = Op::Put {
                key: GOODBYE_KEY.to_owned(),
                value: worker.as_str().as_bytes().into(),
                lease: None,
            };
            let [worker_gone, drain_gone] = [key.clone(), drain_key(worker)].map(|key| Op::Delete { key });
            let ops = vec![goodbye, worker_gone, drain_gone];
            let compares = vec![Compare::Modified { key: key.clone(), revision: kv.mod_revision }];
            let reply = self.store.txn(Txn { compares, ops }).await?;
            if reply.succeeded {
                if let Some(lease) = kv.lease {
                    self.store.revoke(lease).await?;
                }
                self.mirror.reached(reply.revision, MIRROR_TIMEOUT).await;
                tracing::info!(%worker, %epoch, "left");
                return Ok(());
            }
        }
        Err(RegistryError::Contended { key })
    }

    pub(crate) async fn drain(&self, worker: &WorkerId) -> Result<Drained, RegistryError> {
        let key = worker_key(worker);
        for _ in 0..ATTEMPTS {
            let kv = self.store.get(&key).await?;
            let kv = kv.ok_or_else(|| RegistryError::NoWorker { worker: worker.clone() })?;
            let StoredWorker { record, incarnation } = decode(&kv)?;
            // Of the very life that was read: a name that is taken over keeps the revision at which it was created.
            let compares = vec![Compare::Modified { key: key.clone(), revision: kv.mod_revision }];
            let op = put(drain_key(worker), &StoredDrain { incarnation }, None)?;
            let reply = self.store.txn(Txn { compares, ops: vec![op] }).await?;
            if reply.succeeded {
                self.mirror.reached(reply.revision, MIRROR_TIMEOUT).await;
                tracing::info!(%worker, epoch = %record.epoch, "asked to drain");
                return Ok(Drained { worker: worker.clone(), epoch: record.epoch });
            }
        }
        Err(RegistryError::Contended { key })
    }

    pub(crate) async fn set_replicas(&self, pool: &PoolName, replicas: u32) -> Result<(), RegistryError> {
        let known = self.pools.get(pool).ok_or_else(|| {
            let known: Vec<&str> = self.pools.keys().map(PoolName::as_str).collect();
            RegistryError::NoPool { pool: pool.clone(), known: known.join(", ") }
        })?;
        let (min, max) = (known.min, known.max);
        if !(min..=max).contains(&replicas) {
            return Err(RegistryError::ReplicasOutOfRange { pool: pool.clone(), asked: replicas, min, max });
        }
        let op = put(format!("{REPLICAS_PREFIX}{pool}"), &replicas, None)?;
        let reply = self.store.txn(Txn { compares: vec![], ops: vec![op] }).await?;
        self.mirror.reached(reply.revision, MIRROR_TIMEOUT).await;
        tracing::info!(%pool, replicas, "another number of workers is wanted");
        Ok(())
    }

    /// Forgets what workers said that are no longer there. Of this conductor alone; called on a timer.
    pub(crate) fn forget_absent(&self) {
        let fleet = self.mirror.fleet();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|worker, _| fleet.workers.contains_key(worker));
    }

    /// Takes an operator's number back: the autoscaler's counts again, or else the fleet document's.
    pub(crate) async fn release_replicas(&self, pool: &PoolName) -> Result<(), RegistryError> {
        if !self.pools.contains_key(pool) {
            let known: Vec<&str> = self.pools.keys().map(PoolName::as_str).collect();
            return Err(RegistryError::NoPool { pool: pool.clone(), known: known.join(", ") });
        }
        let ops = vec![Op::Delete { key: format!("{REPLICAS_PREFIX}{pool}") }];
        let reply = self.store.txn(Txn { compares: vec![], ops }).await?;
        self.mirror.reached(reply.revision, MIRROR_TIMEOUT).await;
        tracing::info!(%pool, "no operator's number of workers is wanted any more");
        Ok(())
    }

    /// The write of a registration, and whether this process was asked to drain before.
    async fn registration(
        &self,
        request: &Register,
        held: Option<&KeyValue>,
        lease: LeaseId,
    ) -> Result<(Txn, bool), RegistryError> {
        let key = worker_key(&request.worker);
        let record = WorkerRecord {
            worker: request.worker.clone(),
            epoch: Epoch(0),
            pool: request.pool.clone(),
            role: request.role,
            model: request.model.clone(),
            engine: request.engine.clone(),
            kv: request.kv,
            address: request.address.clone(),
            server: request.server.clone(),
            transfer: request.transfer.as_str().into(),
            state: request.state,
            pid: request.pid,
        };
        let drain_key = drain_key(&request.worker);
        let wish = self.store.get(&drain_key).await?;
        // Whoever asks the holder to drain in this very moment does not mean its successor.
        let unchanged = |key: &str, kv: Option<&KeyValue>| Compare::Modified {
            key: key.to_owned(),
            revision: kv.map_or(0, |kv| kv.mod_revision),
        };
        let compares = vec![unchanged(&key, held), unchanged(&drain_key, wish.as_ref())];
        let stored = StoredWorker { record, incarnation: request.incarnation.clone() };
        let mut ops = vec![put(key, &stored, Some(lease))?];
        let drain = match wish {
            None => false,
            Some(kv) => {
                let wish: Option<StoredDrain> = serde_json::from_slice(&kv.value).ok();
                let same = wish.is_some_and(|wish| wish.incarnation == request.incarnation);
                if !same {
                    ops.push(Op::Delete { key: drain_key });
                }
                same
            }
        };
        Ok((Txn { compares, ops }, drain))
    }

    /// A name is taken over before its lease ends by the same process; by one at the holder's address, unless the
    /// holder itself answers there (its successor can only listen there once it is dead); and by one elsewhere when
    /// nothing listens at the holder's address, which only those may claim who proved who they are or share its host.
    async fn check_takeover(&self, kv: &KeyValue, request: &Register) -> Result<(), RegistryError> {
        let StoredWorker { record, incarnation } = decode(kv)?;
        if incarnation == request.incarnation {
            return Ok(());
        }
        let free = if record.address == request.address {
            !takeover::holder_answers(&record).await
        } else {
            let trusted = self.rules.authenticated || takeover::same_host(&record.address, &request.address);
            trusted && takeover::refuses_connections(&record.address).await
        };
        if free {
            tracing::info!(worker = %record.worker, epoch = %record.epoch, address = record.address, "the holder of the name is gone");
            return Ok(());
        }
        let WorkerRecord { worker, epoch, address, pid, .. } = record;
        Err(RegistryError::NameTaken(Box::new(Holder { worker, epoch, address, pid })))
    }

    /// The stored worker if `epoch` is its live one. The mirror answers unless it knows otherwise: it may lag.
    async fn live(&self, worker: &WorkerId, epoch: Epoch) -> Result<KeyValue, RegistryError> {
        if let Some((kv, live)) = self.mirror.worker(worker)
            && live == epoch
        {
            return Ok(kv);
        }
        let kv = self.store.get(&worker_key(worker)).await?;
        let kv = kv.ok_or_else(|| RegistryError::LeaseGone { worker: worker.clone() })?;
        let live = decode(&kv)?.record.epoch;
        if live == epoch {
            return Ok(kv);
        }
        Err(RegistryError::StaleEpoch { worker: worker.clone(), given: epoch, live })
    }

    async fn change_state(
        &self,
        worker: &WorkerId,
        mut kv: KeyValue,
        request: &Keepalive,
    ) -> Result<(), RegistryError> {
        let key = worker_key(worker);
        for _ in 0..ATTEMPTS {
            let mut stored = decode(&kv)?;
            if stored.record.state == request.state {
                return Ok(());
            }
            if stored.record.state == WorkerState::Draining {
                return Err(RegistryError::DrainingIsFinal { worker: worker.clone(), wanted: request.state });
            }
            stored.record.state = request.state;
            let compares = vec![Compare::Modified { key: key.clone(), revision: kv.mod_revision }];
            let op = put(key.clone(), &stored, kv.lease)?;
            let reply = match self.store.txn(Txn { compares, ops: vec![op] }).await {
                Err(StoreError::LeaseNotFound(_)) => {
                    return Err(RegistryError::LeaseGone { worker: worker.clone() });
                }
                reply => reply?,
            };
            if reply.succeeded {
                self.mirror.reached(reply.revision, MIRROR_TIMEOUT).await;
                return Ok(());
            }
            // Overtaken, or the mirror lags: the store itself knows.
            let fresh = self.store.get(&key).await?;
            kv = fresh.ok_or_else(|| RegistryError::LeaseGone { worker: worker.clone() })?;
            let live = decode(&kv)?.record.epoch;
            if live != request.epoch {
                return Err(RegistryError::StaleEpoch { worker: worker.clone(), given: request.epoch, live });
            }
        }
        Err(RegistryError::Contended { key })
    }

    /// Takes a keepalive if it is newer than the last one of that life. A conductor that knows of none takes any.
    fn take_seq(&self, worker: &WorkerId, request: &Keepalive) -> Result<(), RegistryError> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let Keepalive { epoch, seq, .. } = *request;
        match told.get_mut(worker).filter(|told| told.epoch == epoch) {
            Some(Told { seq: last, .. }) if *last >= seq => {
                Err(RegistryError::Replayed { worker: worker.clone(), seq, last: *last })
            }
            Some(told) => {
                told.seq = seq;
                Ok(())
            }
            None => {
                told.insert(worker.clone(), Told { epoch, seq, load: None, at: Instant::now() });
                Ok(())
            }
        }
    }

    /// Notes that a worker was heard, and what it said.
    fn hear(&self, worker: &WorkerId, epoch: Epoch, load: Option<Load>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let before = told.remove(worker).filter(|before| before.epoch == epoch);
        let (seq, known) = before.map_or((0, None), |before| (before.seq, before.load));
        told.insert(worker.clone(), Told { epoch, seq, load: load.or(known), at: Instant::now() });
    }
}

pub(crate) fn worker_key(worker: &WorkerId) -> String {
    format!("{WORKERS_PREFIX}{worker}")
}

pub(crate) fn drain_key(worker: &WorkerId) -> String {
    format!("{DRAIN_PREFIX}{worker}")
}

fn put(key: String, value: &impl Serialize, lease: Option<LeaseId>) -> Result<Op, RegistryError> {
    match serde_json::to_vec(value) {
        Ok(value) => Ok(Op::Put { key, value: value.into(), lease }),
        Err(source) => Err(RegistryError::Stored { key, source }),
    }
}

fn decode(kv: &KeyValue) -> Result<StoredWorker, RegistryError> {
    StoredWorker::decode(kv).map_err(|source| RegistryError::Stored { key: kv.key.clone(), source })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
