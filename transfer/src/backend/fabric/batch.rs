//! Operations that belong together: posted, awaited, aborted and fenced as one.

use std::any::Any;
use std::future::poll_fn;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::bell::{Bell, Rope};
use super::driver::{LocalRange, RemoteId};
use super::thread::{Fabric, Patience, Peer};
use super::window::Work;

/// What a task waits for at most when it wants to know of parts.
const NEWS_BYTES: u64 = 256 << 10;
/// How long an aborted batch may take to end by itself before its peer is disconnected, which ends what others read from it
/// as well: so much, and what its bytes take at a rate that any fabric has, but never long, for a thread waits.
const ABORT_GRACE: Duration = Duration::from_millis(2);
const ABORT_BYTES_PER_MS: u64 = 500_000;
const ABORT_GRACE_MAX: Duration = Duration::from_millis(50);
/// How often a fence that takes too long is told of.
const FENCE_REPORT: Duration = Duration::from_secs(5);
/// Bytes in place that are worth waking a task for before the batch is whole: they are still in a cache then.
const WAKE_BYTES: usize = 1 << 20;

/// One transfer of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) verb: Verb,
    pub(crate) local: LocalRange,
}

/// What is done with the local range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Filled from `offset` of a peer's registration.
    Read { remote: RemoteId, offset: u64 },
    /// Written to `offset` of a peer's registration.
    Write { remote: RemoteId, offset: u64 },
    /// Sent to where the peer awaits `tag`.
    Send { tag: u64 },
    /// Filled by the message of `tag`, which may be shorter.
    Receive { tag: u64 },
    /// Sent as a request.
    Ask,
}

/// Transfers with one peer, all of one verb.
pub(crate) struct Batch {
    pub(super) peer: Peer,
    transfers: Vec<Transfer>,
    state: Mutex<State>,
    settled: Condvar,
    settling: Notify,
    /// What must live until nothing of the batch is posted any more: registrations, slots.
    _keep: Box<dyn Any + Send + Sync>,
}

#[derive(Default)]
struct State {
    /// Transfers that are complete and not yet handed to the task.
    done: Vec<u32>,
    done_bytes: usize,
    /// Bytes of the message that was awaited.
    arrived: usize,
    /// Only the end is of interest.
    end_only: bool,
    failed: Option<Arc<str>>,
    /// The driver awaits its messages.
    posted: bool,
    /// Nothing of the batch is posted, or ever will be.
    settled: bool,
    /// It was settled by force: what it had posted may have left and not arrived.
    cut: bool,
    waiting: Option<Wake>,
    /// Threads that wait for the end.
    blocked: usize,
    /// Of who waits until it is posted.
    posting: Option<Waker>,
}

/// Wakes who waits for news.
enum Wake {
    Bell(Rope),
    Waker(Waker),
}

impl Wake {
    fn wake(self) {
        match self {
            Self::Bell(rope) => rope.pull(),
            Self::Waker(waker) => waker.wake(),
        }
    }
}

impl Batch {
    pub(crate) fn new(peer: Peer, transfers: Vec<Transfer>, keep: Box<dyn Any + Send + Sync>) -> Arc<Self> {
        let receives = matches!(transfers.first(), Some(Transfer { verb: Verb::Receive { .. }, .. }));
        debug_assert!(!transfers.is_empty(), "a batch of nothing never ends");
        debug_assert!(!receives || transfers.len() == 1, "messages are awaited one by one");
        Arc::new(Self {
            peer,
            transfers,
            state: Mutex::default(),
            settled: Condvar::new(),
            settling: Notify::new(),
            _keep: keep,
        })
    }

    pub(super) fn transfer(&self, index: usize) -> Transfer {
        self.transfers[index]
    }

    /// Whether it awaits messages, which no peer's window holds.
    pub(super) fn receives(&self) -> bool {
        matches!(self.transfers.first(), Some(Transfer { verb: Verb::Receive { .. }, .. }))
    }

    /// Whether the peer's bytes land in its local ranges: what fences are about.
    fn fills(&self) -> bool {
        matches!(
            self.transfers.first(),
            Some(Transfer { verb: Verb::Read { .. } | Verb::Receive { .. }, .. })
        )
    }

    /// Notes what came of it since the last time; wakes the task when that is worth it, and says whether it waited.
    pub(super) fn note(&self, done: &mut Vec<u32>, failed: Option<&Arc<str>>, end: End) -> bool {
        let mut state = self.state();
        for transfer in done.drain(..) {
            state.done_bytes += self.transfers[transfer as usize].local.len;
            state.done.push(transfer);
        }
        if state.failed.is_none() {
            state.failed = failed.cloned();
        }
        if end != End::Open && !state.settled {
            state.settled = true;
            state.cut = end == End::Cut;
            if state.blocked > 0 {
                self.settled.notify_all();
            }
            self.settling.notify_waiters();
        }
        let news = state.is_news();
        let waiting = if news { state.waiting.take() } else { None };
        let posting = if state.settled { state.posting.take() } else { None };
        drop(state);
        let waited = waiting.is_some();
        if let Some(waiting) = waiting {
            waiting.wake();
        }
        if let Some(posting) = posting {
            posting.wake();
        }
        waited
    }

    /// Notes that the driver awaits its messages.
    pub(super) fn note_posted(&self) {
        let mut state = self.state();
        state.posted = true;
        let waker = state.posting.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Notes how long the message is that came.
    pub(super) fn note_arrived(&self, bytes: usize) {
        self.state().arrived = bytes;
    }

    /// Ends it before anything was posted.
    pub(super) fn refuse(&self, why: &Arc<str>) {
        self.note(&mut Vec::new(), Some(why), End::Settled);
    }

    /// Ends it after the driver was closed.
    pub(super) fn cut(&self, why: &Arc<str>) {
        self.note(&mut Vec::new(), Some(why), End::Cut);
    }

    /// Whether it has come to its end, whichever.
    pub(super) fn is_settled(&self) -> bool {
        self.state().settled
    }

    /// Whether it was ended by force.
    pub(super) fn is_cut(&self) -> bool {
        self.state().cut
    }

    /// Waits for its end; whether everything it had posted ended by itself.
    pub(super) async fn settled(&self) -> bool {
        loop {
            let settling = self.settling.notified();
            tokio::pin!(settling);
            // Before the look: an end between the two is not missed.
            settling.as_mut().enable();
            {
                let state = self.state();
                if state.settled {
                    return !state.cut;
                }
            }
            settling.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long it may take to end once it was given up.
    fn grace(&self) -> Duration {
        (ABORT_GRACE + Duration::from_millis(self.len() / ABORT_BYTES_PER_MS)).min(ABORT_GRACE_MAX)
    }

    /// Bytes of all transfers.
    pub(super) fn len(&self) -> u64 {
        self.transfers.iter().map(|transfer| transfer.local.len as u64).sum()
    }

    /// Waits for the end of everything posted, for so long; whether it came.
    pub(super) fn wait_settled(&self, grace: Duration) -> bool {
        let until = Instant::now() + grace;
        let mut state = self.state();
        while !state.settled {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return false };
            state.blocked += 1;
            state = self.settled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.blocked -= 1;
        }
        true
    }
}

impl State {
    /// What has come of it since the last time: whether more is to come, or why it failed.
    fn take_news(&mut self, done: &mut Vec<u32>) -> Option<Result<bool, Arc<str>>> {
        if !self.is_news() {
            return None;
        }
        self.done_bytes = 0;
        done.append(&mut self.done);
        Some(match &self.failed {
            Some(why) if self.settled => Err(Arc::clone(why)),
            _ => Ok(!self.settled),
        })
    }

    fn is_news(&self) -> bool {
        self.settled || self.done_bytes >= WAKE_BYTES && !self.end_only
    }
}

/// Whether something of a batch is posted, or may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Open,
    /// Everything posted has ended.
    Settled,
    /// The connection was closed under it.
    Cut,
}

/// A batch as the window of its peer sees it, with its number in the table of the thread.
#[derive(Clone)]
pub(super) struct Posting {
    pub(super) job: u64,
    pub(super) batch: Arc<Batch>,
}

impl Work for Posting {
    fn transfers(&self) -> usize {
        self.batch.transfers.len()
    }

    fn bytes(&self, transfer: usize) -> usize {
        self.batch.transfers[transfer].local.len
    }

    fn splits(&self) -> bool {
        matches!(
            self.batch.transfers.first(),
            Some(Transfer { verb: Verb::Read { .. } | Verb::Write { .. }, .. })
        )
    }

    fn writes(&self) -> bool {
        matches!(self.batch.transfers.first(), Some(Transfer { verb: Verb::Write { .. }, .. }))
    }

    fn joins(&self, transfer: usize) -> bool {
        let local = |at: usize| self.batch.transfers.get(at).map(|transfer| transfer.local.id);
        transfer > 0 && local(transfer) == local(transfer - 1)
    }
}

/// A batch handed to the progress thread. Dropping it before its end aborts it; see [`Running::fenced`].
pub(crate) struct Running {
    fabric: Fabric,
    batch: Arc<Batch>,
    /// Where it waits, once it had to.
    bell: Option<Bell>,
    /// Whether it looks again and again for a moment before it waits.
    spins: bool,
    /// For how many bytes: more take longer to come.
    bytes: u64,
    fenced: bool,
    ended: bool,
}

impl Running {
    pub(super) fn new(fabric: Fabric, batch: Arc<Batch>) -> Self {
        let bytes = batch.len();
        Self { fabric, batch, bell: None, spins: true, bytes, fenced: false, ended: false }
    }

    /// Says that it comes after so many bytes more.
    pub(super) fn after(mut self, bytes: u64) -> Self {
        self.bytes += bytes;
        self
    }

    /// Makes the drop a fence: once it returns, nothing of the batch writes its local ranges any more. It blocks for
    /// as long as the driver takes: a moment for what is posted to end, at most [`ABORT_GRACE_MAX`], then a disconnect.
    pub(crate) fn fenced(mut self) -> Self {
        self.fenced = self.batch.fills();
        self
    }

    /// Whether it looks again and again before it waits, or who waits for several does: see [`Fabric::first_of`].
    pub(crate) fn spins(&mut self, spins: bool) {
        self.spins = spins;
    }

    /// Waits for news and appends the transfers that are complete to `done`; whether more are to come.
    ///
    /// # Errors
    /// With the fabric's reason, once nothing of the batch is posted any more.
    pub(crate) async fn next(&mut self, done: &mut Vec<u32>) -> Result<bool, Arc<str>> {
        let mut patience = match (self.spins, self.batch.state().end_only) {
            (true, true) => Patience::with(self.bytes),
            // Who does something with each part does not move the next one meanwhile: somebody else can.
            (true, false) => Patience::with(self.bytes.min(NEWS_BYTES)),
            (false, _) => Patience::default(),
        };
        let mut looked = false;
        let more = poll_fn(|context| {
            loop {
                let mut state = self.batch.state();
                if let Some(news) = state.take_news(done) {
                    return Poll::Ready(news);
                }
                if self.fabric.takes_turns() {
                    if patience.is_over() {
                        // Mostly woken by another task, or by itself.
                        state.waiting = Some(Wake::Waker(context.waker().clone()));
                        return Poll::Pending;
                    }
                    drop(state);
                    if std::mem::replace(&mut looked, false) {
                        // Others have their turn before it looks on.
                        context.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    self.fabric.spin(&mut patience, || self.batch.state().is_news());
                    looked = true;
                    continue;
                }
                self.bell = self.bell.take().or_else(|| self.fabric.bells().take());
                let Some(bell) = &self.bell else {
                    state.waiting = Some(Wake::Waker(context.waker().clone()));
                    return Poll::Pending;
                };
                if !matches!(state.waiting, Some(Wake::Bell(_))) {
                    state.waiting = Some(Wake::Bell(bell.rope()));
                }
                drop(state);
                match bell.poll(context) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(())) => {}
                    // Its runtime ends, and this task with it.
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error.to_string().into())),
                }
            }
        });
        let more = more.await;
        self.ended = !matches!(more, Ok(true)) && self.batch.is_settled();
        more
    }

    /// Waits until the driver awaits its messages: what comes before may be lost.
    pub(crate) async fn awaits(&self) {
        poll_fn(|context| {
            let mut state = self.batch.state();
            if state.posted || state.settled {
                return Poll::Ready(());
            }
            state.posting = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Bytes of the message that was awaited, once it is there.
    pub(crate) fn arrived(&self) -> usize {
        self.batch.state().arrived
    }

    /// Says that nothing is to be done with what is complete before all of it is.
    pub(crate) fn only_the_end(&self) {
        self.batch.state().end_only = true;
    }

    /// Waits for the end of the whole batch.
    ///
    /// # Errors
    /// As [`Running::next`].
    pub(crate) async fn end(&mut self) -> Result<(), Arc<str>> {
        let mut done = Vec::new();
        self.only_the_end();
        while self.next(&mut done).await? {
            done.clear();
        }
        Ok(())
    }

    /// Lets it go on without anybody who waits for it.
    pub(crate) fn detach(mut self) {
        self.ended = true;
        self.fabric.leave();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(bell) = self.bell.take() {
            self.fabric.bells().give_back(bell);
        }
        if self.ended {
            return;
        }
        self.fabric.abort(&self.batch);
        if !self.fenced || self.fabric.wait_for(&self.batch, self.batch.grace()) {
            return;
        }
        self.batch.peer.sever("a read was given up and its operations did not end");
        // The driver may take a while, but there is no way back: the memory must not be written after this returns. The
        // progress thread settles every batch, at the latest when it ends.
        while !self.batch.wait_settled(FENCE_REPORT) {
            tracing::error!("a network library does not let go of memory: waiting");
        }
    }
}
