//! A worker's membership of the fleet: a lease on its name, kept alive, and taken anew when lost.
//!
//! A worker that cannot reach the conductor goes on with everything it has under its last epoch: routers serve from
//! their cached views, so that nobody notices. Its name may meanwhile be given to another; peers then learn of a
//! newer epoch and refuse the old one. That is why the epoch, not the lease, is what protects data.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use baton_config::{Epoch, KvGeometry, PoolName, Role, WorkerId};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::api::{Holder, Keepalive, Kept, Register, Registered};
use crate::client::complaint::Complaints;
use crate::client::transport::Transport;
use crate::client::{CallError, Client, View};
use crate::dice::{Dice, random_id};
use crate::record::{LAST_ERROR_MAX_BYTES, Load, WorkerState};

mod lease;

pub use lease::LostReason;
use lease::{KeepAnswer, Lease, Step, Turn};

/// Before a conductor with a fault of its own is told again that a worker leaves.
const LEAVE_AGAIN: Duration = Duration::from_millis(200);

/// What a worker tells about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Name.
    pub worker: WorkerId,
    /// Pool of the fleet document.
    pub pool: PoolName,
    /// The pool's role.
    pub role: Role,
    /// Model id.
    pub model: String,
    /// Kind of engine.
    pub engine: String,
    /// KV geometry; `None` where the engine exports no KV.
    pub kv: Option<KvGeometry>,
    /// `host:port` of the HTTP API; the worker must already listen there.
    pub address: String,
    /// As in [`WorkerRecord::server`](crate::record::WorkerRecord::server).
    pub server: Option<String>,
    /// Metadata of the transfer agent, base64.
    pub transfer: String,
    /// State to start in.
    pub state: WorkerState,
}

/// How to join.
#[derive(Debug, Clone)]
pub struct MembershipOptions {
    /// How long a first join waits for a conductor to answer.
    pub join_timeout: Duration,
    /// How long [`Membership::leave`] tries to tell the conductor.
    pub leave_timeout: Duration,
}

impl Default for MembershipOptions {
    fn default() -> Self {
        Self { join_timeout: Duration::from_secs(30), leave_timeout: Duration::from_secs(2) }
    }
}

/// Why a worker could not join for the first time. The process should say so and exit.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A live worker has the name.
    #[error(
        "the name {} is taken by the live worker at {} (pid {}, epoch {}): stop it or choose another --name",
        holder.worker, holder.address, holder.pid, holder.epoch
    )]
    NameTaken {
        /// Who has it.
        holder: Box<Holder>,
    },
    /// The conductor found fault with the registration, or one side does not trust the other.
    #[error("the registration was refused")]
    Refused(#[source] CallError),
    /// No conductor answered in time.
    #[error("no conductor answered within {waited:?} (tried {})", endpoints.join(", "))]
    Unreachable {
        /// Who was asked.
        endpoints: Vec<String>,
        /// For how long.
        waited: Duration,
        /// The last failure.
        #[source]
        source: Option<CallError>,
    },
}

/// Whether the lease stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It does.
    Held {
        /// The current life.
        epoch: Epoch,
    },
    /// It does not: go on with existing work under the last epoch; a new one will come.
    Lost {
        /// The life that ended.
        epoch: Epoch,
        /// Why.
        reason: LostReason,
    },
    /// The worker left.
    Left,
}

/// What the worker says with its keepalives.
#[derive(Debug, Clone)]
struct Said {
    state: WorkerState,
    load: Option<Load>,
}

/// A handle to the membership; dropping it stops the keepalives (the lease then runs out) without telling the conductor.
#[derive(Debug)]
pub struct Membership {
    epoch: watch::Receiver<Option<Epoch>>,
    standing: watch::Receiver<Standing>,
    drain: watch::Receiver<bool>,
    said: watch::Sender<Said>,
    leave: mpsc::Sender<()>,
    tasks: TaskTracker,
    _stop_on_drop: DropGuard,
}

impl Membership {
    /// Registers the worker and keeps its lease in the background.
    ///
    /// # Errors
    /// [`JoinError`]; all of them are final.
    pub async fn join(
        client: &Client,
        registration: Registration,
        options: MembershipOptions,
    ) -> Result<Self, JoinError> {
        let endpoints = client.endpoints().len();
        let said = Said { state: registration.state, load: None };
        let (said, said_reader) = watch::channel(said);
        let mut keeper = Keeper {
            transport: client.transport().clone(),
            lease: Lease::new(Instant::now(), endpoints, Dice::from_entropy()),
            register: registration.into_request(),
            said: said_reader,
            epoch: watch::channel(None).0,
            standing: watch::channel(Standing::Left).0,
            drain: watch::channel(false).0,
            leave_timeout: options.leave_timeout,
            seq: 0,
            instance: String::new(),
            complaints: Complaints::default(),
        };
        keeper.first_join(options.join_timeout).await?;
        let (leave, leave_requests) = mpsc::channel(1);
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let membership = Self {
            epoch: keeper.epoch.subscribe(),
            standing: keeper.standing.subscribe(),
            drain: keeper.drain.subscribe(),
            said,
            leave,
            tasks: tasks.clone(),
            _stop_on_drop: stop.clone().drop_guard(),
        };
        let views = client.changed();
        tasks.spawn(stop.run_until_cancelled_owned(keeper.run(views, leave_requests)));
        tasks.close();
        Ok(membership)
    }

    /// The current life, or the last one while the lease is lost. Grows with each registration.
    pub fn epoch(&self) -> watch::Receiver<Option<Epoch>> {
        self.epoch.clone()
    }

    /// Whether the lease stands.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Becomes true when an operator asks this worker to drain, and stays so.
    pub fn drain_requested(&self) -> watch::Receiver<bool> {
        self.drain.clone()
    }

    /// Tells the conductor a new state at once. Draining is final.
    pub fn set_state(&self, state: WorkerState) {
        self.said.send_if_modified(|said| {
            let news = said.state != state && said.state != WorkerState::Draining;
            if news {
                said.state = state;
            }
            news
        });
    }

    /// Sets the load told with the next keepalive.
    pub fn set_load(&self, mut load: Load) {
        if let Some(error) = &mut load.last_error {
            let end =
                (0..=LAST_ERROR_MAX_BYTES.min(error.len())).rev().find(|at| error.is_char_boundary(*at));
            error.truncate(end.unwrap_or(0));
        }
        self.said.send_if_modified(|said| {
            said.load = Some(load);
            false
        });
    }

    /// Gives the lease back, so that the worker leaves every view at once, and stops.
    pub async fn leave(self) {
        // A closed channel means that the keeper has already stopped.
        if self.leave.send(()).await.is_ok() {
            self.tasks.wait().await;
        }
    }
}

impl Registration {
    fn into_request(self) -> Register {
        let Self { worker, pool, role, model, engine, kv, address, server, transfer, state } = self;
        let (incarnation, pid) = (random_id(), std::process::id());
        Register { worker, incarnation, pool, role, model, engine, kv, address, server, transfer, state, pid }
    }
}

/// Owns the lease: the only task that talks to the conductor for this worker.
struct Keeper {
    transport: Transport,
    lease: Lease,
    register: Register,
    said: watch::Receiver<Said>,
    epoch: watch::Sender<Option<Epoch>>,
    standing: watch::Sender<Standing>,
    drain: watch::Sender<bool>,
    leave_timeout: Duration,
    /// Keepalives sent.
    seq: u64,
    /// Whose data the last view showed.
    instance: String,
    complaints: Complaints,
}

impl Keeper {
    async fn first_join(&mut self, timeout: Duration) -> Result<(), JoinError> {
        let deadline = Instant::now() + timeout;
        let mut last = None;
        let mut distrusted = BTreeSet::new();
        while Instant::now() < deadline {
            match self.lease.step(Instant::now(), &mut None) {
                Step::Wait { until } => tokio::time::sleep_until(until.min(deadline)).await,
                Step::Keepalive { .. } => return Ok(()),
                Step::Register { endpoint } => match self.register_at(endpoint).await {
                    Ok(()) => return Ok(()),
                    // Neither tokens nor certificates get better by waiting: once every conductor was asked, that is it.
                    Err(error) if error.is_distrust() => {
                        distrusted.insert(endpoint);
                        if distrusted.len() == self.transport.endpoints().len() {
                            return Err(JoinError::Refused(error));
                        }
                        last = Some(error);
                    }
                    Err(CallError::Refused { status, detail, endpoint }) if status < 500 => {
                        return Err(match detail.holder {
                            Some(holder) => JoinError::NameTaken { holder: Box::new(holder) },
                            None => JoinError::Refused(CallError::Refused { status, detail, endpoint }),
                        });
                    }
                    Err(error) => last = Some(error),
                },
            }
        }
        let endpoints = self.transport.endpoints().to_vec();
        Err(JoinError::Unreachable { endpoints, waited: timeout, source: last })
    }

    async fn run(mut self, mut views: watch::Receiver<Arc<View>>, mut leave: mpsc::Receiver<()>) {
        loop {
            let view = views.borrow_and_update().clone();
            self.watch_drain(&view);
            self.watch_instance(&view);
            let mut turn = None;
            let step = self.lease.step(Instant::now(), &mut turn);
            self.announce(turn);
            let Step::Wait { until } = step else {
                tokio::select! {
                    biased;
                    _ = leave.recv() => break,
                    () = self.call(step) => {}
                }
                continue;
            };
            tokio::select! {
                biased;
                _ = leave.recv() => break,
                Ok(()) = self.said.changed() => self.lease.hurry(Instant::now()),
                Ok(()) = views.changed() => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
        self.deregister().await;
    }

    async fn call(&mut self, step: Step) {
        match step {
            Step::Register { endpoint } => {
                if let Err(error) = self.register_at(endpoint).await {
                    let (worker, cause): (_, &dyn std::error::Error) = (&self.register.worker, &error);
                    if self.complaints.is_news(&error.to_string()) {
                        tracing::warn!(%worker, error = cause, "not registered; trying again");
                    } else {
                        tracing::debug!(%worker, error = cause, "still not registered");
                    }
                }
            }
            Step::Keepalive { endpoint, epoch } => self.keep_alive_at(endpoint, epoch).await,
            Step::Wait { .. } => {}
        }
    }

    async fn register_at(&mut self, endpoint: usize) -> Result<(), CallError> {
        self.register.state = self.said.borrow_and_update().state;
        let sent = Instant::now();
        match self.transport.register(endpoint, &self.register).await {
            Ok(Registered { epoch, ttl_ms, keepalive_ms, drain, .. }) => {
                let (ttl, every) = (Duration::from_millis(ttl_ms), Duration::from_millis(keepalive_ms));
                let turn = self.lease.registered(sent, epoch, ttl, every);
                self.announce(Some(turn));
                self.note_drain(drain);
                self.complaints.settle();
                Ok(())
            }
            Err(error) => {
                let answered = matches!(error, CallError::Refused { status, .. } if status < 500);
                let refused = answered && !error.is_distrust();
                self.lease.not_registered(Instant::now(), refused);
                Err(error)
            }
        }
    }

    async fn keep_alive_at(&mut self, endpoint: usize, epoch: Epoch) {
        let Said { state, load } = self.said.borrow_and_update().clone();
        let sent = Instant::now();
        self.seq += 1;
        let body = Keepalive { epoch, seq: self.seq, state, load };
        let answer = match self.transport.keepalive(endpoint, &self.register.worker, &body).await {
            Ok(Kept { ttl_ms, drain }) => {
                self.note_drain(drain);
                if self.complaints.settle() {
                    tracing::info!(worker = %self.register.worker, "the lease is kept alive again");
                }
                KeepAnswer::Kept { ttl: Duration::from_millis(ttl_ms) }
            }
            Err(error) => {
                let answer = lease_answer(&error);
                let (worker, cause): (_, &dyn std::error::Error) = (&self.register.worker, &error);
                // A lease that is gone is told of when it turns out to be lost.
                if answer == KeepAnswer::None && self.complaints.is_news(&error.to_string()) {
                    tracing::warn!(%worker, error = cause, "the lease is not being kept alive");
                } else {
                    tracing::debug!(%worker, error = cause, "keepalive failed");
                }
                answer
            }
        };
        let turn = self.lease.kept(sent, Instant::now(), epoch, answer);
        self.announce(turn);
    }

    fn announce(&mut self, turn: Option<Turn>) {
        let worker = &self.register.worker;
        match turn {
            None => {}
            Some(Turn::Joined(epoch)) => {
                tracing::info!(%worker, %epoch, "registered");
                self.epoch.send_replace(Some(epoch));
                self.standing.send_replace(Standing::Held { epoch });
            }
            Some(Turn::Lost(epoch, reason)) => {
                tracing::warn!(%worker, %epoch, ?reason, "the lease is lost; serving on, will register anew");
                self.standing.send_replace(Standing::Lost { epoch, reason });
            }
        }
    }

    /// The view hears of a drain at once, a keepalive only within a third of the ttl.
    fn watch_drain(&self, view: &View) {
        let life = *self.epoch.borrow();
        self.note_drain(life.is_some_and(|life| is_to_drain(view, &self.register.worker, life)));
    }

    /// A conductor that came back with other data does not know this lease.
    fn watch_instance(&mut self, view: &View) {
        if view.stale || view.instance == self.instance {
            return;
        }
        if !self.instance.is_empty() {
            self.lease.doubt(Instant::now());
        }
        self.instance.clone_from(&view.instance);
    }

    fn note_drain(&self, drain: bool) {
        self.drain.send_if_modified(|asked| {
            let news = drain && !*asked;
            *asked |= drain;
            news
        });
    }

    async fn deregister(self) {
        let held = *self.epoch.borrow();
        let worker = self.register.worker.clone();
        if let Some(epoch) = held {
            let tries = async {
                loop {
                    // One that answers with a fault of its own may do better in a moment; one that is away is given up.
                    let mut again = false;
                    for endpoint in 0..self.transport.endpoints().len() {
                        let error = match self.transport.leave(endpoint, &worker, epoch).await {
                            Ok(()) => return,
                            Err(error) => error,
                        };
                        match &error {
                            CallError::Refused { status, .. } if *status >= 500 => again = true,
                            CallError::Refused { .. } if !error.is_distrust() => return,
                            _ => {}
                        }
                        let error: &dyn std::error::Error = &error;
                        tracing::debug!(%worker, error, "could not deregister here");
                    }
                    if !again {
                        return;
                    }
                    tokio::time::sleep(LEAVE_AGAIN).await;
                }
            };
            if tokio::time::timeout(self.leave_timeout, tries).await.is_err() {
                tracing::warn!(%worker, "left without telling the conductor; the lease will run out");
            }
        }
        self.standing.send_replace(Standing::Left);
    }
}

/// Whether the view says that this life of a worker shall drain. While it shows another one, a wish may be for that one: it
/// must not end the process that came after it.
fn is_to_drain(view: &View, worker: &WorkerId, life: Epoch) -> bool {
    view.drain.contains(worker) && view.worker(worker).is_some_and(|record| record.epoch == life)
}

fn lease_answer(error: &CallError) -> KeepAnswer {
    match error {
        CallError::Refused { detail, .. } if detail.code == "lease_gone" => {
            KeepAnswer::Lost(LostReason::Gone)
        }
        CallError::Refused { detail, .. } if detail.code == "stale_epoch" => {
            KeepAnswer::Lost(LostReason::Superseded)
        }
        _ => KeepAnswer::None,
    }
}

#[cfg(test)]
mod tests;
