//! The thread that owns the engine.
//!
//! Everybody else holds an [`EngineHandle`]: commands go in by a bounded channel, events come out by one bounded
//! channel per sequence or, for those that share a connection, by the inbox of that, which a step wakes once; what is known
//! about the engine as a whole comes by a watch. The thread sleeps on its channel when the engine is idle, and never waits
//! for a reader: a sequence's channel has room for all it can ever emit.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use baton_config::protocol::{BlockCounts, FirstToken, KvEventBatch};
use baton_engine::engine::{AuditError, EngineLoad, Purpose, Step, SubmitError, Writers};
use baton_engine::{Engine, EngineEvent, SeqId, SequenceSpec};
use tokio::sync::{mpsc, oneshot, watch};

use crate::inbox::Port;
use crate::kv_log::KvLog;
use crate::meter::Mean;

/// Commands waiting for the thread at most; senders wait beyond that.
const COMMANDS_MAX: usize = 1024;

/// Events of a sequence besides its tokens: admission, chunks, the end. Chunks coalesce beyond that.
const EVENTS_BESIDES_TOKENS: usize = 64;

/// A chunk with fewer prompt tokens says nothing about the prefill speed.
const SPEED_MIN_TOKENS: u32 = 16;

/// A modelled step that starts so soon after the one before it counts as back to back.
const BACK_TO_BACK: Duration = Duration::from_millis(5);

/// The engine as last seen by its thread.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineView {
    /// Blocks by state.
    pub counts: BlockCounts,
    /// Cached blocks that nobody references.
    pub evictable: u32,
    /// Prompt tokens computed since the start.
    pub prefilled_tokens: u64,
    /// Prompt tokens that a sequence brings to compute.
    pub prompt_tokens: Option<f64>,
    /// How busy it is.
    pub load: EngineLoad,
    /// Nothing can be computed, and somebody waits for room.
    pub blocked: bool,
    /// Measured prefill speed.
    pub prefill_tokens_per_s: Option<f64>,
    /// Measured time between tokens of a stream.
    pub itl_ms: Option<f64>,
    /// Why the thread ended, when it has.
    pub ended: Option<String>,
}

/// The engine's thread is gone: it stopped, or a bug ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine has stopped")]
pub struct EngineGone;

/// Why a sequence was not taken.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TakeError {
    /// The engine refused it.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// There is no engine any more.
    #[error(transparent)]
    Gone(#[from] EngineGone),
}

/// What the audit found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuditFailure {
    /// A discrepancy.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// There is no engine any more.
    #[error(transparent)]
    Gone(#[from] EngineGone),
}

enum Command {
    Submit { spec: Box<SequenceSpec>, taken: oneshot::Sender<Result<Sequence, SubmitError>> },
    SubmitTo { spec: Box<SequenceSpec>, port: Port, taken: oneshot::Sender<Result<SeqId, SubmitError>> },
    Wanted(SeqId),
    Imported(SeqId, u32),
    StartDecode(SeqId, FirstToken),
    PrefillLocally(SeqId),
    Cancel(SeqId, Writers),
    Pause(SeqId),
    Resume(SeqId),
    Fence(SeqId),
    Release(SeqId),
    Audit(oneshot::Sender<Result<(), AuditError>>),
    KvSnapshot(oneshot::Sender<KvEventBatch>),
    Stop,
}

/// A sequence that was taken, and its events. Dropping it does not end the sequence: cancel it.
#[derive(Debug)]
pub struct Sequence {
    /// Its name in the engine.
    pub id: SeqId,
    /// What happens to it; ends after the last event.
    pub events: mpsc::Receiver<EngineEvent>,
}

/// Commands to the engine's thread; clones share it.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<EngineView>,
    pulse: Arc<Pulse>,
}

/// When the step under way began.
#[derive(Debug)]
struct Pulse {
    base: Instant,
    /// Milliseconds since `base`, plus one; 0 between steps.
    step_since: AtomicU64,
}

impl Pulse {
    fn begin(&self) {
        let since = u64::try_from(self.base.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.step_since.store(since + 1, Ordering::Relaxed);
    }

    fn end(&self) {
        self.step_since.store(0, Ordering::Relaxed);
    }

    fn stuck_for(&self) -> Duration {
        match self.step_since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => self.base.elapsed().saturating_sub(Duration::from_millis(since - 1)),
        }
    }
}

impl EngineHandle {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn start(
        engine: Engine,
        kv_log: Arc<KvLog>,
        runtime: tokio::runtime::Handle,
    ) -> std::io::Result<(Self, std::thread::JoinHandle<()>)> {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let view = EngineView {
            counts: engine.counts(),
            evictable: engine.evictable(),
            prefilled_tokens: 0,
            prompt_tokens: None,
            load: engine.load(),
            blocked: false,
            prefill_tokens_per_s: None,
            itl_ms: None,
            ended: None,
        };
        let (publish, view) = watch::channel(view);
        let pulse = Arc::new(Pulse { base: Instant::now(), step_since: AtomicU64::new(0) });
        let mut thread = Thread {
            engine,
            commands: receiver,
            runtime,
            routes: HashMap::new(),
            next_id: 0,
            kv_log,
            pulse: Arc::clone(&pulse),
            publish,
            prefilled: 0,
            prompt_tokens: Mean::default(),
            prefill_speed: Mean::default(),
            itl: Mean::default(),
            modelled_until: None,
        };
        let join = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            // A panic is a bug of the engine: readiness shows it, waiting requests see their channels close.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| thread.run()));
            let why = if result.is_ok() { "stopped" } else { "its thread panicked" };
            let publish = thread.publish.clone();
            // Streams and commands end before the news, so that nobody waits for what will not come.
            drop(thread);
            publish.send_modify(|view| view.ended = Some(why.to_owned()));
        })?;
        Ok((Self { commands, view, pulse }, join))
    }

    /// Hands a sequence to the engine.
    ///
    /// # Errors
    /// When the engine refuses it or is gone.
    pub async fn submit(&self, spec: SequenceSpec) -> Result<Sequence, TakeError> {
        let (taken, answer) = oneshot::channel();
        self.send(Command::Submit { spec: Box::new(spec), taken }).await?;
        Ok(answer.await.map_err(|_| EngineGone)??)
    }

    /// The same; its events go into `port`, which gets none of the progress of a prefill.
    ///
    /// # Errors
    /// When the engine refuses it or is gone.
    pub async fn submit_to(&self, spec: SequenceSpec, port: Port) -> Result<SeqId, TakeError> {
        let (taken, answer) = oneshot::channel();
        self.send(Command::SubmitTo { spec: Box::new(spec), port, taken }).await?;
        Ok(answer.await.map_err(|_| EngineGone)??)
    }

    /// See [`Engine::wanted`].
    pub async fn wanted(&self, id: SeqId) {
        self.tell(Command::Wanted(id)).await;
    }

    /// See [`Engine::imported`].
    pub async fn imported(&self, id: SeqId, upto: u32) {
        self.tell(Command::Imported(id, upto)).await;
    }

    /// See [`Engine::start_decode`].
    pub async fn start_decode(&self, id: SeqId, first: FirstToken) {
        self.tell(Command::StartDecode(id, first)).await;
    }

    /// See [`Engine::prefill_locally`].
    pub async fn prefill_locally(&self, id: SeqId) {
        self.tell(Command::PrefillLocally(id)).await;
    }

    /// See [`Engine::cancel`].
    pub async fn cancel(&self, id: SeqId, writers: Writers) {
        self.tell(Command::Cancel(id, writers)).await;
    }

    /// See [`Engine::pause`].
    pub async fn pause(&self, id: SeqId) {
        self.tell(Command::Pause(id)).await;
    }

    /// See [`Engine::resume`].
    pub async fn resume(&self, id: SeqId) {
        self.tell(Command::Resume(id)).await;
    }

    /// See [`Engine::fence`].
    pub async fn fence(&self, id: SeqId) {
        self.tell(Command::Fence(id)).await;
    }

    /// See [`Engine::release`].
    pub async fn release(&self, id: SeqId) {
        self.tell(Command::Release(id)).await;
    }

    /// See [`Engine::audit`].
    ///
    /// # Errors
    /// What the audit found, or that there is no engine.
    pub async fn audit(&self) -> Result<(), AuditFailure> {
        let (sender, answer) = oneshot::channel();
        self.send(Command::Audit(sender)).await?;
        Ok(answer.await.map_err(|_| EngineGone)??)
    }

    /// The whole prefix cache, as of the last event of the log.
    ///
    /// # Errors
    /// When there is no engine any more.
    pub async fn kv_snapshot(&self) -> Result<KvEventBatch, EngineGone> {
        let (sender, answer) = oneshot::channel();
        self.send(Command::KvSnapshot(sender)).await?;
        answer.await.map_err(|_| EngineGone)
    }

    /// Ends the thread after the commands before this one.
    pub async fn stop(&self) {
        self.tell(Command::Stop).await;
    }

    /// The engine as last seen.
    pub fn view(&self) -> EngineView {
        self.view.borrow().clone()
    }

    /// The same, with its changes.
    pub fn changes(&self) -> watch::Receiver<EngineView> {
        self.view.clone()
    }

    /// For how long the step under way has been running; zero between steps.
    pub fn stuck_for(&self) -> Duration {
        self.pulse.stuck_for()
    }

    async fn send(&self, command: Command) -> Result<(), EngineGone> {
        self.commands.send(command).await.map_err(|_| EngineGone)
    }

    /// For commands that mean nothing once the engine is gone.
    async fn tell(&self, command: Command) {
        let _ = self.send(command).await;
    }
}

/// Where the events of a sequence go, and what is measured on the way.
struct Route {
    events: Sink,
    /// Prompt tokens, unless another worker computes them.
    prompt: Option<u32>,
    computed: u32,
    last_token: Option<Instant>,
}

enum Sink {
    Own(mpsc::Sender<EngineEvent>),
    Shared(Port),
}

struct Thread {
    engine: Engine,
    commands: mpsc::Receiver<Command>,
    runtime: tokio::runtime::Handle,
    routes: HashMap<SeqId, Route>,
    next_id: u64,
    kv_log: Arc<KvLog>,
    pulse: Arc<Pulse>,
    publish: watch::Sender<EngineView>,
    prefilled: u64,
    prompt_tokens: Mean,
    prefill_speed: Mean,
    itl: Mean,
    modelled_until: Option<Instant>,
}

/// Whether the thread goes on.
#[derive(PartialEq, Eq)]
enum Go {
    On,
    Stop,
}

impl Thread {
    fn run(&mut self) {
        let mut events = Vec::new();
        let mut idle = false;
        loop {
            if idle {
                let Some(command) = self.commands.blocking_recv() else { return };
                if self.obey(command) == Go::Stop {
                    return;
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                if self.obey(command) == Go::Stop {
                    return;
                }
            }
            let began = Instant::now();
            self.pulse.begin();
            let step = self.engine.step(began, &mut events);
            self.pulse.end();
            idle = step == Step::Idle;
            let modelled = match step {
                Step::Worked { modelled } => modelled,
                Step::Idle => Duration::ZERO,
            };
            if !modelled.is_zero() && self.wait_modelled(began, modelled) == Go::Stop {
                return;
            }
            // One that makes up for a late one before it took less than the hardware would.
            self.dispatch(&mut events, began.elapsed().max(modelled));
            self.publish(idle);
        }
    }

    /// Waits out the time the modelled hardware would have taken, open to commands.
    fn wait_modelled(&mut self, began: Instant, modelled: Duration) -> Go {
        let before =
            self.modelled_until.filter(|until| began.saturating_duration_since(*until) < BACK_TO_BACK);
        let until = before.unwrap_or(began) + modelled;
        self.modelled_until = Some(until);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Go::On;
            }
            // The timer belongs to the runtime, so it is made within it.
            let _entered = self.runtime.enter();
            let receive = tokio::time::timeout(left, self.commands.recv());
            let command = match self.runtime.block_on(receive) {
                Ok(Some(command)) => command,
                Ok(None) => return Go::Stop,
                Err(_) => return Go::On,
            };
            if self.obey(command) == Go::Stop {
                return Go::Stop;
            }
        }
    }

    fn obey(&mut self, command: Command) -> Go {
        match command {
            Command::Submit { spec, taken } => self.submit(*spec, taken),
            Command::SubmitTo { spec, port, taken } => self.submit_to(*spec, port, taken),
            Command::Wanted(id) => self.engine.wanted(id),
            Command::Imported(id, upto) => self.engine.imported(id, upto),
            Command::StartDecode(id, first) => self.engine.start_decode(id, first),
            Command::PrefillLocally(id) => self.engine.prefill_locally(id),
            Command::Cancel(id, writers) => {
                self.routes.remove(&id);
                self.engine.cancel(id, writers);
            }
            Command::Pause(id) => self.engine.pause(id),
            Command::Resume(id) => self.engine.resume(id),
            Command::Fence(id) => self.engine.fence(id),
            Command::Release(id) => {
                self.routes.remove(&id);
                self.engine.release(id);
            }
            Command::Audit(answer) => drop(answer.send(self.engine.audit())),
            Command::KvSnapshot(answer) => {
                self.kv_log.push(self.engine.take_kv_events());
                let snapshot = self.kv_log.snapshot(self.engine.kv_snapshot());
                drop(answer.send(snapshot));
            }
            Command::Stop => return Go::Stop,
        }
        Go::On
    }

    fn submit(&mut self, spec: SequenceSpec, taken: oneshot::Sender<Result<Sequence, SubmitError>>) {
        let tokens = match spec.purpose {
            Purpose::Export => 1,
            Purpose::Generate | Purpose::Import => {
                let room = (self.engine.model().max_context as usize).saturating_sub(spec.tokens.len());
                room.min(spec.max_tokens as usize) + 1
            }
        };
        let (sender, events) = mpsc::channel(tokens + EVENTS_BESIDES_TOKENS);
        let result = self.enter(spec, Sink::Own(sender)).map(|id| Sequence { id, events });
        if let Err(Ok(sequence)) = taken.send(result) {
            self.leave(sequence.id);
        }
    }

    fn submit_to(
        &mut self,
        spec: SequenceSpec,
        port: Port,
        taken: oneshot::Sender<Result<SeqId, SubmitError>>,
    ) {
        let result = self.enter(spec, Sink::Shared(port));
        if let Err(Ok(id)) = taken.send(result) {
            self.leave(id);
        }
    }

    fn enter(&mut self, spec: SequenceSpec, events: Sink) -> Result<SeqId, SubmitError> {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        let prompt = (spec.purpose != Purpose::Import).then_some(spec.tokens.len());
        let prompt = prompt.and_then(|tokens| u32::try_from(tokens).ok());
        self.engine.submit(id, spec, Instant::now())?;
        self.routes.insert(id, Route { events, prompt, computed: 0, last_token: None });
        Ok(id)
    }

    /// Whoever asked for the sequence left in the meantime.
    fn leave(&mut self, id: SeqId) {
        self.routes.remove(&id);
        self.engine.cancel(id, Writers::Gone);
    }

    /// Hands the events of a step to their sequences and measures.
    fn dispatch(&mut self, events: &mut Vec<EngineEvent>, took: Duration) {
        let now = Instant::now();
        let mut prefilled = 0;
        // One port of each inbox that was empty.
        let mut sleeping: Vec<Port> = Vec::new();
        for event in events.drain(..) {
            let id = event.id();
            let Some(route) = self.routes.get_mut(&id) else { continue };
            let last = matches!(event, EngineEvent::Finished { .. } | EngineEvent::Failed { .. });
            match &event {
                EngineEvent::Admitted { cached_tokens, .. } => {
                    route.computed = *cached_tokens;
                    // Once: a sequence that was put back for want of blocks is admitted again.
                    if let Some(prompt) = route.prompt.take() {
                        self.prompt_tokens.add(f64::from(prompt.saturating_sub(*cached_tokens)));
                    }
                }
                EngineEvent::Prefilled { upto, .. } => {
                    prefilled += upto.saturating_sub(route.computed);
                    route.computed = route.computed.max(*upto);
                    // Only the latest matters; the last places are for events that do.
                    match &route.events {
                        Sink::Own(events) if events.capacity() > EVENTS_BESIDES_TOKENS / 2 => {}
                        Sink::Own(_) | Sink::Shared(_) => continue,
                    }
                }
                EngineEvent::Token { .. } => {
                    if let Some(before) = route.last_token.replace(now) {
                        self.itl.add(now.duration_since(before).as_secs_f64() * 1e3);
                    }
                }
                EngineEvent::Finished { .. } | EngineEvent::Failed { .. } => {}
            }
            match &route.events {
                Sink::Shared(port) => {
                    if port.put(event) {
                        sleeping.push(port.clone());
                    }
                }
                // A closed channel: its owner has left and its cancel is on the way.
                Sink::Own(events) => {
                    if let Err(mpsc::error::TrySendError::Full(event)) = events.try_send(event) {
                        tracing::error!(?event, "a sequence emitted more than it can: it is cancelled");
                        self.leave(id);
                        continue;
                    }
                }
            }
            if last {
                self.routes.remove(&id);
            }
        }
        sleeping.iter().for_each(Port::wake);
        self.prefilled += u64::from(prefilled);
        if prefilled >= SPEED_MIN_TOKENS {
            self.prefill_speed.add(f64::from(prefilled) / took.as_secs_f64());
        }
        self.kv_log.push(self.engine.take_kv_events());
    }

    fn publish(&self, idle: bool) {
        let load = self.engine.load();
        let view = EngineView {
            counts: self.engine.counts(),
            evictable: self.engine.evictable(),
            prefilled_tokens: self.prefilled,
            prompt_tokens: self.prompt_tokens.get(),
            load,
            blocked: idle && load.waiting > 0,
            prefill_tokens_per_s: self.prefill_speed.get(),
            itl_ms: self.itl.get(),
            ended: None,
        };
        self.publish.send_if_modified(|old| {
            let news = *old != view;
            if news {
                *old = view;
            }
            news
        });
    }
}

#[cfg(test)]
pub(crate) mod tests;
