//! The life of a worker: build, join, serve, drain, leave.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use baton_conductor::client::ClientError;
use baton_conductor::{Client, ClientOptions, JoinError, Load, Membership, Registration, WorkerState};
use baton_config::Epoch;
use baton_engine::engine::EngineError;
use baton_engine::reference::{LoadError, Reference};
use baton_engine::sim::Sim;
use baton_engine::{Engine, Executor, ModelInfo};
use baton_transfer::export::{ExportOptions, Exporter, ExporterError};
use baton_transfer::import::{ImportOptions, Importer};
use baton_transfer::{Agent, ArenaMemory, MemoryError, StartError};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::arena::{self, ArenaFailure};
use crate::driver::{Handoffs, Io, Open};
use crate::engine_thread::{AuditFailure, EngineHandle};
use crate::http::state::drain_status;
use crate::http::{Drain, Life, Phase, Shared, UNREADY_AFTER, routes};
use crate::in_flight::InFlight;
use crate::kv_log::KvLog;
use crate::listen;
use crate::member::{self, CLOSE_TIMEOUT, LOAD_INTERVAL, SETTLE_TIMEOUT, asked, seen_leaving, told_address};
use crate::metadata_cache::MetadataCache;
use crate::metrics::Metrics;
use crate::options::{EngineChoice, TokenFault, WorkerOptions};
use crate::path::Paths;
use crate::peer::PeerClient;

/// KV events kept for followers that lag.
const KV_LOG_EVENTS: usize = 16 << 10;
/// How often everything reserved is checked for an owner.
const AUDIT_INTERVAL: Duration = Duration::from_secs(5);
/// How long tasks and connections may take to end once there is a second signal: enough to tell the conductor and the clients.
const HURRIED_CLOSE: Duration = Duration::from_millis(500);

/// How a worker is told to stop.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Finish what is in flight, then leave and end: the first signal.
    pub drain: CancellationToken,
    /// End now: the second signal.
    pub now: CancellationToken,
}

/// Why a worker did not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The model can't be loaded.
    #[error("the model in {} cannot be loaded", .dir.display())]
    Model {
        /// Its directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: Box<LoadError>,
    },
    /// There is no memory for the KV cache.
    #[error("the KV cache cannot be set up")]
    Arena(#[from] ArenaFailure),
    /// The engine can't be made of its parts.
    #[error("the engine cannot be set up")]
    Engine(#[from] EngineError),
    /// The transfer agent did not start.
    #[error("the transfer agent cannot be started")]
    Transfer(#[from] StartError),
    /// The token of the fleet can't be had.
    #[error("transfers cannot be authenticated")]
    Token(#[from] TokenFault),
    /// Blocks can't be offered.
    #[error("exports cannot be set up")]
    Export(#[from] ExporterError),
    /// Blocks can't be taken.
    #[error("imports cannot be set up")]
    Import(#[from] MemoryError),
    /// No thread, runtime or HTTP client to be had.
    #[error("the system gives no {what}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The conductors' addresses are no good.
    #[error("the conductor cannot be followed")]
    Conductor(#[from] ClientError),
    /// The fleet did not take this worker.
    #[error("cannot join the fleet")]
    Join(#[from] JoinError),
    /// The engine's thread ended by itself.
    #[error("the engine has ended: {why}")]
    EngineEnded {
        /// What is known.
        why: String,
    },
}

impl RunError {
    /// Whether the fleet document asks this machine for what it does not have: starting again would not help.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Arena(ArenaFailure::Device { .. } | ArenaFailure::TooFew { .. }))
    }

    fn system<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        what: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}

/// Runs a worker until it is told to stop, or an operator drains it. Must be called within a tokio runtime.
///
/// # Errors
/// When it can't start, the fleet refuses it, or its engine ends.
pub async fn run(options: WorkerOptions, listener: TcpListener, stop: Stop) -> Result<(), RunError> {
    let now = stop.now.clone();
    let worker = Worker::build(options, listener, stop).await?;
    let (end, membership) = match worker.join().await {
        Ok(Some(membership)) => (worker.serve(&membership).await, Some(membership)),
        Ok(None) => (Ok(()), None),
        Err(error) => (Err(error), None),
    };
    tokio::select! {
        biased;
        () = worker.close(membership) => {}
        () = at_once(now) => tracing::warn!("ended without waiting for every part"),
    }
    end
}

/// Done shortly after the second signal: what has not ended by itself by then ends with the process.
async fn at_once(now: CancellationToken) {
    now.cancelled().await;
    tokio::time::sleep(HURRIED_CLOSE).await;
}

/// A worker whose parts all run.
struct Worker {
    options: WorkerOptions,
    stop: Stop,
    address: SocketAddr,
    shared: Arc<Shared>,
    io: Arc<Io>,
    memory: ArenaMemory,
    phase: watch::Sender<Phase>,
    life: watch::Sender<Option<Life>>,
    engine_thread: std::thread::JoinHandle<()>,
    /// Ends the owner of the handoffs.
    handoffs_stop: CancellationToken,
}

impl Worker {
    async fn build(options: WorkerOptions, listener: TcpListener, stop: Stop) -> Result<Self, RunError> {
        let executor = load(options.engine.clone());
        Self::build_around(executor, options, listener, stop).await
    }

    async fn build_around(
        executor: impl Future<Output = Result<Box<dyn Executor>, RunError>>,
        options: WorkerOptions,
        listener: TcpListener,
        stop: Stop,
    ) -> Result<Self, RunError> {
        let address = listener.local_addr().map_err(RunError::system("address"))?;
        let metrics = Metrics::new().map_err(RunError::system("metrics"))?;
        let (memory, arena) = arena::build(&options.arena)?;
        let executor = executor.await?;
        let model = executor.model().clone();
        let engine = Engine::new(executor, arena, options.limits)?;
        let kv_log = Arc::new(KvLog::new(options.arena.geometry.block_tokens, KV_LOG_EVENTS));
        let runtime = tokio::runtime::Handle::current();
        let (engine, engine_thread) =
            EngineHandle::start(engine, Arc::clone(&kv_log), runtime).map_err(RunError::system("thread"))?;
        let io =
            Arc::new(build_io(&options, &memory, (engine.clone(), model.clone()), metrics.clone()).await?);
        let handoffs_stop = CancellationToken::new();
        let mut limits = options.handoff.clone();
        let max_blocks = u32::try_from(io.exporter.max_blocks()).unwrap_or(u32::MAX);
        limits.ticket_blocks_max = limits.ticket_blocks_max.min(max_blocks);
        limits.stage_on_want = io.exporter.why_staged().is_some();
        let handoffs = Handoffs::start(Arc::clone(&io), limits, handoffs_stop.clone());
        let (phase, phase_reader) = watch::channel(Phase::Joining);
        let (life, life_reader) = watch::channel(None);
        let shared = Arc::new(Shared {
            worker: options.worker.clone(),
            pool: options.pool.clone(),
            role: options.role,
            model,
            simulated: matches!(options.engine, EngineChoice::Sim { .. }),
            engine,
            handoffs,
            kv_log,
            metrics,
            transfer: io.agent.clone(),
            paths: io.paths.clone(),
            tasks: io.tasks.clone(),
            phase: phase_reader,
            life: life_reader,
            in_flight: InFlight::new(options.in_flight_max),
            drain: CancellationToken::new(),
            abort: CancellationToken::new(),
            stop: CancellationToken::new(),
            last_error: Mutex::new(None),
            body_max: usize::try_from(options.body_max.0).unwrap_or(usize::MAX),
            stalled: options.stalled,
        });
        listen::serve(listener, routes(Arc::clone(&shared)), &shared.tasks, shared.stop.clone());
        Ok(Self { options, stop, address, shared, io, memory, phase, life, engine_thread, handoffs_stop })
    }

    /// Takes a lease on the name; the worker is in view as joining. `None` when it was told to end before.
    async fn join(&self) -> Result<Option<Membership>, RunError> {
        let options = &self.options;
        let registration = Registration {
            worker: options.worker.clone(),
            pool: options.pool.clone(),
            role: options.role,
            model: options.model.clone(),
            engine: options.engine.kind().to_owned(),
            kv: Some(options.arena.geometry),
            address: told_address(options.advertise.as_deref(), self.address),
            server: None,
            transfer: base64::engine::general_purpose::STANDARD.encode(self.io.agent.metadata()),
            state: WorkerState::Joining,
        };
        Ok(member::join(&self.io.fleet, registration, options.join_timeout, &self.stop.drain).await?)
    }

    /// Serves until told to stop, then drains; the second signal ends either.
    async fn serve(&self, membership: &Membership) -> Result<(), RunError> {
        let mut epochs = membership.epoch();
        let first = *epochs.borrow_and_update();
        self.enter(first).await;
        tokio::select! {
            biased;
            () = self.stop.now.cancelled() => Ok(()),
            () = self.serve_and_drain(membership) => Ok(()),
            why = engine_ended(self.shared.engine.clone()) => Err(RunError::EngineEnded { why }),
            never = self.keep_up(membership, epochs) => match never {},
        }
    }

    async fn serve_and_drain(&self, membership: &Membership) {
        let worker = &self.options.worker;
        self.phase.send_replace(Phase::Ready);
        membership.set_state(WorkerState::Ready);
        tracing::info!(%worker, address = %self.address, arena = self.memory.kind(), "ready");
        let asked_by = self.drain_asked(membership).await;
        let since = Instant::now();
        let drain = Drain { since, until: since + self.options.drain_grace };
        self.phase.send_replace(Phase::Leaving(drain));
        membership.set_state(WorkerState::Draining);
        tracing::info!(%worker, asked_by, grace = ?self.options.drain_grace, "draining");
        // Without a conductor it is not seen to leave: then that was time enough.
        let _ = tokio::time::timeout(SETTLE_TIMEOUT, seen_leaving(&self.io.fleet, worker)).await;
        self.phase.send_replace(Phase::Draining(drain));
        match tokio::time::timeout_at(drain.until, self.idle()).await {
            Ok(()) => tracing::info!(after = ?since.elapsed(), "drained: nothing is left to do"),
            Err(_) => {
                let left = drain_status(&self.shared);
                tracing::warn!(?left, "the time to drain is over with requests in flight");
            }
        }
    }

    /// What goes on for as long as a worker lives, serving or draining. Each by itself: an engine that hangs keeps its audit
    /// from ending, and nothing else.
    async fn keep_up(&self, membership: &Membership, epochs: watch::Receiver<Option<Epoch>>) -> Infallible {
        tokio::select! {
            never = self.follow(epochs) => never,
            never = self.audit_for_ever() => never,
            never = self.tell_load(membership) => never,
        }
    }

    /// Enters each life that the fleet gives this worker.
    async fn follow(&self, mut epochs: watch::Receiver<Option<Epoch>>) -> Infallible {
        while epochs.changed().await.is_ok() {
            let epoch = *epochs.borrow_and_update();
            self.enter(epoch).await;
        }
        // There will be no other: the membership has ended.
        std::future::pending().await
    }

    async fn audit_for_ever(&self) -> Infallible {
        let mut audits = tokio::time::interval(AUDIT_INTERVAL);
        audits.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            audits.tick().await;
            if let Some(waits_for) = drain_status(&self.shared) {
                tracing::info!(?waits_for, "draining");
            }
            self.audit().await;
        }
    }

    async fn tell_load(&self, membership: &Membership) -> Infallible {
        let mut loads = tokio::time::interval(LOAD_INTERVAL);
        loop {
            loads.tick().await;
            membership.set_load(self.load());
        }
    }

    /// Done when this worker shall drain; says who asked. All ways lead here: an operator's wish that the conductor
    /// keeps, a call to this worker, and the signal of whoever stops the process or scales its pool down.
    async fn drain_asked(&self, membership: &Membership) -> &'static str {
        tokio::select! {
            biased;
            () = self.stop.drain.cancelled() => "a signal",
            () = self.shared.drain.cancelled() => "a call to this worker",
            () = asked(membership.drain_requested()) => "the conductor",
        }
    }

    /// Enters a life: from here on everything of another one is refused.
    async fn enter(&self, epoch: Option<Epoch>) {
        let Some(epoch) = epoch else { return };
        self.io.agent.set_epoch(epoch);
        self.shared.kv_log.set_epoch(epoch);
        self.shared.handoffs.set_epoch(epoch).await;
        self.life.send_replace(Some(Life { epoch, since: Instant::now() }));
    }

    /// Done when no request is in flight: generations have ended, handed-out blocks were read or their lease ran out.
    async fn idle(&self) {
        self.shared.in_flight.none().await;
        // Reads that were given up may still be fenced.
        let none = |open: &Open| open.prefills == 0 && open.decodes == 0;
        // The owner of the handoffs lives as long as this worker.
        let _ = self.shared.handoffs.open().wait_for(none).await;
    }

    async fn audit(&self) {
        let engine = &self.shared.engine;
        // One that hangs is asked no more: whoever asks it waits in its queue.
        let audited = match engine.stuck_for() < UNREADY_AFTER {
            true => tokio::time::timeout(UNREADY_AFTER, engine.audit()).await.ok(),
            false => None,
        };
        let Some(audited) = audited else {
            let stuck = engine.stuck_for();
            return self.shared.note_error(&format!("the engine made no progress for {stuck:?}"));
        };
        let failed = match audited {
            Ok(()) => self.io.exporter.audit().err().map(|error| error.to_string()),
            Err(AuditFailure::Audit(error)) => Some(error.to_string()),
            Err(AuditFailure::Gone(_)) => None,
        };
        if let Some(error) = failed {
            tracing::error!(%error, "the audit of the block pool failed");
            self.shared.metrics.audit_failures.inc();
            self.shared.note_error(&error);
        }
        // The handoffs' own leases end earlier; what this finds was forgotten by somebody.
        let forgotten = self.io.exporter.sweep(tokio::time::Instant::now()).await;
        if !forgotten.is_empty() {
            tracing::error!(handoffs = forgotten.len(), "exported blocks without an owner were taken back");
            self.shared.metrics.audit_failures.inc();
        }
        // Again: a session may have been made while the view changed.
        self.io.forget_departed(&self.io.fleet.view());
    }

    fn load(&self) -> Load {
        let view = self.shared.engine.view();
        Load {
            requests_running: view.load.running,
            requests_waiting: view.load.waiting,
            prefill_tokens_pending: view.load.prefill_tokens_pending,
            kv_blocks: view.counts,
            last_error: self.shared.last_error().map(|mishap| mishap.what),
        }
    }

    /// Leaves the fleet and ends every part, each within a bound.
    async fn close(self, membership: Option<Membership>) {
        let Self { shared, io, engine_thread, handoffs_stop, .. } = self;
        if let Some(membership) = membership {
            membership.leave().await;
        }
        shared.abort.cancel();
        let in_time = |what: &'static str, done: bool| {
            if !done {
                tracing::warn!(what, "did not end in time");
            }
        };
        // Requests tell their clients that they end here before the connections go.
        in_time("requests", tokio::time::timeout(CLOSE_TIMEOUT, shared.in_flight.none()).await.is_ok());
        shared.stop.cancel();
        handoffs_stop.cancel();
        io.tasks.close();
        in_time("tasks", tokio::time::timeout(CLOSE_TIMEOUT, io.tasks.wait()).await.is_ok());
        in_time("exports", tokio::time::timeout(CLOSE_TIMEOUT, io.exporter.close()).await.is_ok());
        in_time("imports", tokio::time::timeout(CLOSE_TIMEOUT, io.importer.close()).await.is_ok());
        in_time("transfers", tokio::time::timeout(CLOSE_TIMEOUT, io.agent.clone().close()).await.is_ok());
        in_time("the fleet's view", tokio::time::timeout(CLOSE_TIMEOUT, io.fleet.close()).await.is_ok());
        let engine = shared.engine.clone();
        let join = tokio::task::spawn_blocking(move || engine_thread.join().is_ok());
        let ended = async {
            engine.stop().await;
            join.await
        };
        in_time("the engine", tokio::time::timeout(CLOSE_TIMEOUT, ended).await.is_ok());
    }
}

/// Waits until the engine's thread has ended, and says why.
async fn engine_ended(engine: EngineHandle) -> String {
    let mut changes = engine.changes();
    match changes.wait_for(|view| view.ended.is_some()).await {
        Ok(view) => view.ended.clone().unwrap_or_default(),
        Err(_) => "its thread is gone".to_owned(),
    }
}

/// The model, loaded on a thread that may block.
async fn load(choice: EngineChoice) -> Result<Box<dyn Executor>, RunError> {
    let load = move || -> Result<Box<dyn Executor>, RunError> {
        match choice {
            EngineChoice::Reference { model_dir, threads } => match Reference::load(&model_dir, threads) {
                Ok(reference) => Ok(Box::new(reference)),
                Err(source) => Err(RunError::Model { dir: model_dir, source: Box::new(source) }),
            },
            EngineChoice::Sim { config, model } => Ok(Box::new(Sim::new(config, model))),
        }
    };
    tokio::task::spawn_blocking(load).await.map_err(RunError::system("thread"))?
}

async fn build_io(
    options: &WorkerOptions,
    memory: &ArenaMemory,
    (engine, model): (EngineHandle, ModelInfo),
    metrics: Metrics,
) -> Result<Io, RunError> {
    let transfer = &options.transfer;
    let device = options.arena.device.as_ref();
    let direct = device.is_some_and(|device| device.direct);
    let mut agent = transfer.agent(options.worker.clone())?;
    if direct && agent.backends.iter().any(|backend| !backend.copies_in_host_memory()) {
        // They would be preferred on one host, and bring every block to the processor.
        agent.backends.retain(|backend| !backend.copies_in_host_memory());
    }
    let agent = Agent::start(agent).await?;
    let geometry = options.arena.geometry;
    let slots = match options.arena.is_staged() {
        true => staging_slots(options.arena.staging.0, geometry.block_bytes()),
        false => 0,
    };
    let exports = ExportOptions {
        slots,
        integrity: transfer.integrity,
        // The handoff's own lease is what counts; this one finds what the handoff forgot.
        lease: options.handoff.lease * 2,
        direct,
    };
    let exporter = Exporter::new(agent.clone(), memory.clone(), geometry, exports)?;
    let importer = Importer::new(memory.clone(), geometry, &ImportOptions { slots, direct })?;
    if direct {
        let (out, into) = (exporter.why_staged(), importer.why_staged());
        let (kind, way) = (memory.kind(), |why: Option<&str>| why.unwrap_or("direct").to_owned());
        tracing::info!(
            out = way(out),
            into = way(into),
            "blocks in {kind} memory go direct where paths reach it"
        );
    }
    Ok(Io {
        worker: options.worker.clone(),
        geometry,
        model,
        engine,
        agent,
        exporter,
        importer,
        fleet: Client::start(ClientOptions {
            access: options.conductor_access.clone(),
            ..ClientOptions::new(options.conductors.clone())
        })?,
        metadata: MetadataCache::new(metrics.metadata_cache.clone()),
        peers: PeerClient::new().map_err(RunError::system("HTTP client"))?,
        paths: Paths::default(),
        metrics,
        tasks: TaskTracker::new(),
        local_prefill: options.local_prefill,
        connect_timeout: transfer.connect_timeout,
    })
}

/// Staging slots of one direction: at least what two handoffs need to go on.
fn staging_slots(staging_bytes: u64, block_bytes: usize) -> usize {
    usize::try_from(staging_bytes / block_bytes.max(1) as u64).unwrap_or(usize::MAX).clamp(8, 1 << 16)
}

#[cfg(test)]
mod tests;
