//! The progress thread of a fabric and the handle through which tasks reach it.
//!
//! Who owns what:
//!
//! 1. The thread owns the driver: it alone calls it, from the first to the last call. Where any thread may call the
//!    driver, tasks take turns at it as well, see [`turns`].
//! 2. Tasks hand it commands through a bounded queue and wake it through an event descriptor if it sleeps.
//! 3. What comes of a [`Batch`] is noted in the batch, once per turn of the thread; its task is woken when a good part
//!    or all of it is done, not for every operation.
//! 4. However the thread ends, the driver is closed first and then every batch is settled: nobody waits for ever.

mod gate;
mod progress;
mod queue;
#[expect(unsafe_code, reason = "lends the descriptor of a driver to poll(2)")]
mod sleep;
mod turns;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::gate::Gate;
use self::progress::Progress;
pub(crate) use self::queue::{Answering, Exchange, Then};
use self::queue::{Asleep, Command, Need};
pub(super) use self::queue::{Keep, Queue};
use self::sleep::Alarm;
pub(super) use self::turns::Patience;
use self::turns::Turns;
use super::FabricLimits;
use super::batch::{Batch, Running};
use super::bell::Bells;
use super::driver::{self, Access, Driver, DriverError, DriverInfo, PeerId, REQUEST_MAX_BYTES, RemoteId};
use super::registry::{Registration, Registry};
use crate::agent::BackendKind;
use crate::memory::{MemoryError, MemorySpan};
use crate::slab::Slab;
use crate::wire::HEADER_BYTES;

/// Buffers of each direction that bytes pass through.
const SLOTS: usize = 64;
/// Bytes of each: what is copied out of one is still in a core's cache.
pub(super) const SLOT_BYTES: usize = 256 << 10;
/// Where the bytes of a message begin in a slot: at a cache line, right behind the head.
pub(super) const DATA_AT: usize = 64;
/// Where the head of a message is in a slot.
pub(super) const HEAD_AT: usize = DATA_AT - HEADER_BYTES;
/// Requests of this side on their way, and answers to those of the other sides without blocks.
const NOTES: usize = 128;
/// Of a thread that waits for the end of what was given up.
const BETWEEN_TURNS: Duration = Duration::from_micros(100);

/// A network library at work on a thread of its own; clones share it. With the last one the library is closed.
#[derive(Clone)]
pub(crate) struct Fabric(Arc<Inner>);

struct Inner {
    kind: BackendKind,
    limits: FabricLimits,
    opened: Opened,
    queue: Arc<Queue>,
    /// Where tasks take turns, if they do.
    turns: Option<Arc<Turns>>,
    registry: Registry,
    bounce: Bounce,
    bells: Bells,
    /// Fires when the driver is closed.
    ended: CancellationToken,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What is known of a driver once it is open.
#[derive(Debug, Clone)]
struct Opened {
    info: DriverInfo,
    address: Vec<u8>,
}

impl Opened {
    fn of(driver: &(impl Driver + ?Sized)) -> Self {
        Self { info: driver.info().clone(), address: driver.address() }
    }
}

/// What is known of an open driver, and where tasks take turns at it.
type Start = Result<(Opened, Option<Arc<Turns>>), DriverError>;

/// The work of the thread with an open driver.
fn work(driver: driver::Opened, queue: Arc<Queue>, limits: FabricLimits, tell: oneshot::Sender<Start>) {
    match driver {
        driver::Opened::Bound(driver) => work_alone(driver, queue, limits, tell),
        driver::Opened::Movable(driver) => {
            let bounds = limits.bounds(driver.info(), driver.pieces_max());
            let gate = sleep::wait_fd(&*driver).and_then(|fd| Gate::new(fd).ok());
            let Some(gate) = gate else {
                // Nothing tells a task when to take a turn.
                return work_alone(driver, queue, limits, tell);
            };
            let opened = Opened::of(&*driver);
            let progress = Progress::new(driver, Arc::clone(&queue), bounds);
            let turns = Arc::new(Turns::new(queue, progress, gate));
            if tell.send(Ok((opened, Some(Arc::clone(&turns))))).is_ok() {
                turns.run();
            }
        }
    }
}

fn work_alone(
    driver: Box<dyn Driver>,
    queue: Arc<Queue>,
    limits: FabricLimits,
    tell: oneshot::Sender<Start>,
) {
    let (opened, bounds) = (Opened::of(&*driver), limits.bounds(driver.info(), driver.pieces_max()));
    let progress = Progress::new(driver, queue, bounds);
    if tell.send(Ok((opened, None))).is_ok() {
        progress.run();
    }
}

/// Host memory that bytes pass through where they cannot go straight to their place. Pages are taken at first use.
struct Bounce {
    landing: Slab,
    sending: Slab,
    /// Requests; where an answer without blocks lands, a head is before each.
    asking: Slab,
    answers: Slab,
    pack_max: usize,
}

impl Bounce {
    fn new(info: &DriverInfo) -> Result<Self, MemoryError> {
        let slab = |label| Slab::new(SLOTS, DATA_AT + SLOT_BYTES, label);
        let pack_max = info.message_max.saturating_sub(HEADER_BYTES).min(SLOT_BYTES);
        Ok(Self {
            landing: slab("fabric landing")?,
            sending: slab("fabric sending")?,
            asking: Slab::new(NOTES, DATA_AT + REQUEST_MAX_BYTES, "fabric requests")?,
            answers: Slab::new(NOTES, DATA_AT, "fabric answers")?,
            pack_max,
        })
    }
}

fn gone(kind: BackendKind) -> DriverError {
    DriverError { what: format!("the progress thread of {kind} has ended"), remedy: String::new() }
}

impl Fabric {
    /// Opens a driver on a thread of its own.
    ///
    /// Dropped before it is done, the driver is closed as soon as it is open.
    ///
    /// # Errors
    /// The driver's, or the system's when it gives no thread.
    pub(crate) async fn start(
        kind: BackendKind,
        open: impl FnOnce() -> Result<driver::Opened, DriverError> + Send + 'static,
        limits: FabricLimits,
    ) -> Result<Self, DriverError> {
        let system = |error: std::io::Error| DriverError {
            what: format!("no progress thread for {kind}: {error}"),
            remedy: String::new(),
        };
        let alarm = Alarm::new().map_err(system)?;
        let queue = Arc::new(Queue::new(alarm));
        let (tell, told) = oneshot::channel();
        let own = Arc::clone(&queue);
        let ended = CancellationToken::new();
        let over = ended.clone().drop_guard();
        let run = move || {
            let _over = over;
            let driver = match open() {
                Ok(driver) => driver,
                Err(error) => {
                    let _ = tell.send(Err(error));
                    return;
                }
            };
            work(driver, own, limits, tell);
        };
        let thread = std::thread::Builder::new().name(format!("baton-{kind}")).spawn(run).map_err(system)?;
        let (opened, turns) = told.await.map_err(|_| gone(kind))??;
        if let Some(turns) = &turns {
            // Ends with the driver.
            TaskTracker::new().spawn(Arc::clone(turns).watch(ended.clone()));
        }
        tracing::debug!(%kind, detail = opened.info.detail, "fabric opened");
        let bounce = Bounce::new(&opened.info).map_err(|error| {
            // Nobody else will: there is no handle yet.
            queue.close();
            DriverError {
                what: format!("no memory for the buffers of {kind}: {error}"),
                remedy: String::new(),
            }
        })?;
        let thread = Mutex::new(Some(thread));
        Ok(Self(Arc::new(Inner {
            kind,
            limits,
            opened,
            queue,
            turns,
            registry: Registry::default(),
            bounce,
            bells: Bells::default(),
            ended,
            thread,
        })))
    }

    /// Which backend it is.
    pub(crate) fn kind(&self) -> BackendKind {
        self.0.kind
    }

    /// What the driver can do.
    pub(crate) fn info(&self) -> &DriverInfo {
        &self.0.opened.info
    }

    /// Where peers' drivers reach this one.
    pub(crate) fn address(&self) -> &[u8] {
        &self.0.opened.address
    }

    /// Its bounds.
    pub(crate) fn limits(&self) -> &FabricLimits {
        &self.0.limits
    }

    /// Registers memory with the driver. Without bound and not shared: [`super::registry`] is what tasks use.
    pub(super) async fn register(
        &self,
        span: MemorySpan,
        access: Access,
    ) -> Result<Registration, DriverError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::Register { span, access, reply }).await?;
        answer.await.map_err(|_| gone(self.0.kind))?
    }

    /// Longest message between two ends of this fabric; 0 where there are none.
    pub(crate) fn pack_max(&self) -> usize {
        self.0.bounce.pack_max
    }

    /// Where tasks wait for what comes of their batches.
    pub(super) fn bells(&self) -> &Bells {
        &self.0.bells
    }

    /// Buffers that messages and blocks land in.
    pub(super) fn landing(&self) -> &Slab {
        &self.0.bounce.landing
    }

    /// Buffers that messages are gathered in.
    pub(super) fn sending(&self) -> &Slab {
        &self.0.bounce.sending
    }

    /// Whether blocks can be asked for over the fabric: by requests, answered with messages that have a head at least.
    pub(super) fn has_requests(&self) -> bool {
        self.info().requests && self.info().message_max >= HEADER_BYTES
    }

    /// Requests on their way.
    pub(super) fn asking(&self) -> &Slab {
        &self.0.bounce.asking
    }

    /// Answers without blocks.
    pub(super) fn answers(&self) -> &Slab {
        &self.0.bounce.answers
    }

    /// Has requests of peers answered by `answering`, on the thread. Only the first is taken.
    pub(super) fn answer_with(&self, answering: Answering) {
        let _ = self.0.queue.answering.set(answering);
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// Makes a peer known by its driver's address.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) async fn connect(&self, address: Vec<u8>) -> Result<Peer, DriverError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::Connect { address, reply }).await?;
        answer.await.map_err(|_| gone(self.0.kind))?
    }

    /// Takes a key of a peer; it is forgotten with the peer.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) async fn import(&self, peer: &Peer, key: Vec<u8>) -> Result<RemoteId, DriverError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Command::Import { peer: peer.clone(), key, reply }).await?;
        Ok(answer.await.map_err(|_| gone(self.0.kind))??.take())
    }

    /// Forgets a key of a peer.
    pub(crate) fn forget(&self, peer: &Peer, remote: RemoteId) {
        let _ = self.0.queue.push(Command::Forget { peer: peer.clone(), remote }, None);
    }

    /// Closes the driver under everybody who has a handle: when this returns no peer reaches any memory through it.
    pub(crate) async fn shut(&self) {
        self.0.queue.close();
        self.0.ended.cancelled().await;
    }

    /// Whether the driver is open.
    pub(crate) fn is_open(&self) -> bool {
        !self.0.ended.is_cancelled()
    }

    /// Hands a batch to the thread.
    ///
    /// # Errors
    /// When the thread has ended.
    pub(crate) async fn submit(&self, batch: Arc<Batch>) -> Result<Running, Arc<str>> {
        self.ask(Command::Submit(Arc::clone(&batch))).await.map_err(|error| Arc::from(error.what))?;
        // Nothing is awaited between the two: what was taken has somebody who aborts it.
        Ok(Running::new(self.clone(), batch))
    }

    /// Hands a message to be awaited to the thread, and the request that asks for it.
    ///
    /// # Errors
    /// When the thread has ended.
    pub(crate) async fn exchange(&self, exchange: Exchange) -> Result<Running, Arc<str>> {
        let receive = Arc::clone(&exchange.receive);
        self.ask(Command::Exchange(exchange)).await.map_err(|error| Arc::from(error.what))?;
        Ok(Running::new(self.clone(), receive))
    }

    /// Hands a batch to the thread, and exchanges that follow as it comes along: if it fails, so do those left.
    ///
    /// # Errors
    /// When the thread has ended.
    pub(crate) async fn submit_then(
        &self,
        batch: Arc<Batch>,
        then: VecDeque<Then>,
    ) -> Result<(Running, Vec<Running>), Arc<str>> {
        let answers: Vec<Arc<Batch>> = then.iter().map(|then| Arc::clone(&then.exchange.receive)).collect();
        let command = Command::SubmitThen(Arc::clone(&batch), then);
        self.ask(command).await.map_err(|error| Arc::from(error.what))?;
        let bytes = batch.len();
        let running = |batch| Running::new(self.clone(), batch);
        Ok((running(batch), answers.into_iter().map(|answer| running(answer).after(bytes)).collect()))
    }

    /// Posts nothing more of a batch; it is settled when what is posted has ended, at the latest with the driver.
    pub(super) fn abort(&self, batch: &Arc<Batch>) {
        if let Err(Command::Abort(batch)) = self.0.queue.push(Command::Abort(Arc::clone(batch)), None) {
            batch.refuse(&"the fabric is closed".into());
        }
    }

    async fn ask(&self, command: Command) -> Result<(), DriverError> {
        let room = match Arc::clone(&self.0.queue.room).try_acquire_owned() {
            Ok(room) => room,
            // Never closed; were it, so would the thread be.
            Err(_) => Arc::clone(&self.0.queue.room).acquire_owned().await.map_err(|_| gone(self.0.kind))?,
        };
        let Some(turns) = self.0.turns.as_ref().filter(|_| !command.may_block()) else {
            return self.0.queue.push(command, Some(room)).map_err(|_| gone(self.0.kind));
        };
        self.0.queue.leave(command, Some(room)).map_err(|_| gone(self.0.kind))?;
        turns.take_new();
        Ok(())
    }

    /// Waits for the end of a batch that was given up, without a word to the runtime; whether it came in time. Where tasks
    /// take turns at the driver, this one does.
    pub(super) fn wait_for(&self, batch: &Batch, grace: Duration) -> bool {
        let Some(turns) = &self.0.turns else { return batch.wait_settled(grace) };
        let until = Instant::now() + grace;
        loop {
            turns.take_all();
            let left = until.saturating_duration_since(Instant::now());
            if batch.wait_settled(left.min(BETWEEN_TURNS)) {
                return true;
            }
            if left.is_zero() {
                return false;
            }
        }
    }

    /// Whether tasks take turns at the driver.
    pub(super) fn takes_turns(&self) -> bool {
        self.0.turns.is_some()
    }

    /// The next of `stream`, whose parts wait for batches without looking again and again: that is done here, for all.
    pub(super) async fn first_of<S: Stream + Unpin>(&self, stream: &mut S) -> Option<S::Item> {
        let mut looks = self.takes_turns();
        poll_fn(|context| {
            while std::mem::take(&mut looks) {
                let woken = Arc::new(Woken::default());
                let waker = Waker::from(Arc::clone(&woken));
                if let Poll::Ready(next) = stream.poll_next_unpin(&mut Context::from_waker(&waker)) {
                    return Poll::Ready(next);
                }
                self.spin(&mut Patience::with(SLOT_BYTES as u64), || woken.is());
                looks = woken.is();
            }
            stream.poll_next_unpin(context)
        })
        .await
    }

    /// Sees to it that what is under way goes on though nobody waits for it.
    pub(super) fn leave(&self) {
        if let Some(turns) = &self.0.turns {
            turns.take_all();
        }
    }

    /// Takes turns for a moment, where that is likely to pay, until `came`. It may be done again while patience is left, once
    /// others had their turn.
    pub(super) fn spin(&self, patience: &mut Patience, came: impl Fn() -> bool) {
        if let Some(turns) = &self.0.turns {
            turns.spin(patience, came);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.close();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // What a batch keeps may hold the last handle: a turn cannot wait for its own end.
        let waits = |thread: &JoinHandle<()>| {
            thread.thread().id() != std::thread::current().id() && !turns::is_turning()
        };
        if let Some(thread) = thread.filter(waits)
            && thread.join().is_err()
        {
            tracing::error!(kind = %self.kind, "the progress thread panicked");
        }
    }
}

/// Notes that something came that a task would be woken for.
#[derive(Default)]
struct Woken(AtomicBool);

impl Woken {
    fn is(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// A peer that the driver is connected to; clones share it. It is disconnected with the last one.
#[derive(Clone)]
pub(crate) struct Peer(Arc<PeerInner>);

struct PeerInner {
    id: PeerId,
    /// Its number in the table of the thread.
    key: OnceLock<u64>,
    queue: Arc<Queue>,
    failed: OnceLock<Arc<str>>,
}

impl Peer {
    /// Why nothing can be exchanged with it any more.
    pub(crate) fn failure(&self) -> Option<&Arc<str>> {
        self.0.failed.get()
    }

    /// Ends everything with this peer: what is posted ends or is cut off, and nothing more is posted.
    pub(crate) fn sever(&self, why: &'static str) {
        let _ = self.0.failed.set(why.into());
        let _ = self.0.queue.push(Command::Sever { peer: self.key(), why }, None);
    }

    /// Whether it is a peer of the fabric with this queue.
    fn is_of(&self, queue: &Arc<Queue>) -> bool {
        Arc::ptr_eq(&self.0.queue, queue)
    }

    fn key(&self) -> u64 {
        // Set before the handle leaves the thread; the table has no key 0.
        self.0.key.get().copied().unwrap_or(0)
    }
}

impl Drop for PeerInner {
    fn drop(&mut self) {
        if let Some(key) = self.key.get() {
            let _ = self.queue.push(Command::Disconnect { peer: *key }, None);
        }
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Peer({:?})", self.0.id)
    }
}

#[cfg(test)]
mod tests;
