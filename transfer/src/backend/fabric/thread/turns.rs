//! Turns at a driver that tasks take, where any thread may call it: two wake-ups less than through the progress thread.
//!
//! 1. Who has the lock has the driver. Only the thread waits for the lock: a task that finds it taken says so
//!    (`again`), and who has it looks again before going.
//! 2. A task of the runtime, the watch, waits for the driver's descriptor. Meanwhile the thread sleeps without it, but
//!    wakes up by itself as long as something is under way: a runtime that is busy with other things, or gone, delays
//!    a completion and does not lose it. A task that has what it waited for goes first: only after it the watch
//!    prepares the descriptor anew, which takes several system calls.
//! 3. Calls that may block are the thread's: it is woken for them.
//! 4. Only the thread drops the driver.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::progress::Progress;
use super::progress::rest::Rest;
use super::{Need, Queue};
use crate::backend::fabric::bell::readable;
use crate::backend::fabric::driver::Driver;
use crate::spin::Spin;

/// Turns taken one after the other before something else has its turn.
const TURNS_MAX: usize = 64;
/// How long a task looks again and again before it waits: less than waking it takes.
const SPIN: Duration = Duration::from_micros(5);

thread_local! {
    /// Whether this thread is in a turn.
    static TURNING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is in a turn, so that it cannot wait for one to end.
pub(super) fn is_turning() -> bool {
    TURNING.get()
}

/// What came of turns that a task has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turned {
    /// The driver is closed, or will be.
    Over,
    /// Somebody else is at it, and looks again.
    Taken,
    /// Nothing happens, and the descriptor tells when something does.
    Idle,
    /// More may happen.
    Busy,
    /// The same, and a task has what it waited for.
    Told,
}

/// See the module.
pub(super) struct Turns {
    queue: Arc<Queue>,
    progress: Mutex<Option<Progress<dyn Driver + Send>>>,
    /// Somebody came in vain.
    again: AtomicBool,
    /// Whether the watch is there.
    watched: AtomicBool,
    /// Tells the watch that the descriptor is to be prepared.
    left: Notify,
    fd: OwnedFd,
    /// Whether looking again and again has paid: of tasks that wait, and of the watch.
    spins: [Mutex<Spin>; 2],
}

/// Who looks again and again.
#[derive(Debug, Clone, Copy)]
pub(super) enum Spinner {
    Task,
    Watch,
}

impl Turns {
    /// `fd` tells what the driver's descriptor tells.
    pub(super) fn new(queue: Arc<Queue>, progress: Progress<dyn Driver + Send>, fd: OwnedFd) -> Self {
        let progress = Mutex::new(Some(progress));
        let (again, watched) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { queue, progress, again, watched, left: Notify::new(), fd, spins: Default::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Progress<dyn Driver + Send>>> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The work of the thread, until no handle is left.
    pub(super) fn run(&self) {
        let _end = End(self);
        loop {
            let rest = {
                let mut progress = self.lock();
                let Some(progress) = progress.as_mut().filter(|_| !self.queue.state().closed) else { return };
                self.again.store(false, Ordering::Relaxed);
                match progress.turn(true) {
                    true => Rest::None,
                    false => progress.rest_beside(self.watched.load(Ordering::Relaxed)),
                }
            };
            let slept = match rest {
                _ if self.is_asked_again() => true,
                Rest::None => true,
                Rest::Sleep { most, watches } => {
                    let fd = watches.then(|| self.fd.as_fd());
                    self.queue.alarm.sleep(fd, most)
                }
            };
            self.queue.state().asleep = None;
            if !slept && let Some(progress) = self.lock().as_mut() {
                progress.go_blind();
            }
        }
    }

    fn is_asked_again(&self) -> bool {
        // Between the release of the lock and the look, as between the word and the try of who came in vain.
        fence(Ordering::SeqCst);
        self.again.load(Ordering::Relaxed) && self.again.swap(false, Ordering::Relaxed)
    }

    /// Looks at what is under way, if nobody has the driver. Who comes in vain meanwhile is not left to wait: what that
    /// one wants is done here.
    pub(super) fn look<T>(&self, at: impl FnOnce(&Progress<dyn Driver + Send>) -> T) -> Option<T> {
        let progress = self.progress.try_lock().ok()?;
        let found = progress.as_ref().map(at);
        drop(progress);
        if self.is_asked_again() {
            self.take_all();
        }
        found
    }

    /// Takes turns, until nothing happens any more; then, if `arm` says so, has the descriptor tell when something does.
    pub(super) fn take(&self, arm: bool) -> Turned {
        self.take_until(arm, false)
    }

    /// As `take`; it ends early with a turn in which a task was told of something, if `told` says so.
    fn take_until(&self, arm: bool, told: bool) -> Turned {
        for _ in 0..TURNS_MAX {
            self.again.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let mut progress = match self.progress.try_lock() {
                Ok(progress) => progress,
                Err(TryLockError::WouldBlock) => return Turned::Taken,
                Err(TryLockError::Poisoned(_)) => return Turned::Over,
            };
            self.again.store(false, Ordering::Relaxed);
            let Some(at_it) = progress.as_mut() else { return Turned::Over };
            TURNING.set(true);
            // A driver that panics takes down its fabric, and not who happens to call it.
            let turn = catch_unwind(AssertUnwindSafe(|| {
                let busy = at_it.turn(false);
                let ends = told && at_it.has_told();
                (busy || arm && !ends && !at_it.arm(), ends, at_it.needs_thread())
            }));
            TURNING.set(false);
            drop(progress);
            let Ok((busy, ends, need)) = turn else {
                self.queue.close();
                return Turned::Over;
            };
            self.queue.rouse(need);
            if ends {
                return Turned::Told;
            }
            if !busy && !self.is_asked_again() {
                return Turned::Idle;
            }
        }
        Turned::Busy
    }

    /// Takes turns for a moment, if that is likely to pay, until `came`.
    pub(super) fn spin(&self, who: Spinner, came: impl Fn() -> bool) -> bool {
        let found = self.look_again(who, came);
        match who {
            // It goes on with what it found, and looks again after that.
            Spinner::Watch if found => {}
            Spinner::Task if found && self.watched.load(Ordering::Relaxed) => self.left.notify_one(),
            // Posted by somebody who came in vain, or more was there than was taken.
            Spinner::Task | Spinner::Watch if self.is_unarmed() => self.take_all(),
            Spinner::Task | Spinner::Watch => {}
        }
        found
    }

    /// Takes turns and has the descriptor tell of what comes later. What is too much for a task is the thread's.
    pub(super) fn take_all(&self) {
        if self.take(true) == Turned::Busy {
            self.queue.rouse(Need::Now);
        }
    }

    fn look_again(&self, who: Spinner, came: impl Fn() -> bool) -> bool {
        let spin = || self.spins[who as usize].lock().unwrap_or_else(PoisonError::into_inner);
        if !spin().is_worth_it() {
            return false;
        }
        let start = Instant::now();
        let mut found = came();
        while !found && start.elapsed() < SPIN {
            std::hint::spin_loop();
            if self.take(false) == Turned::Over {
                break;
            }
            found = came();
        }
        spin().tried(found);
        found
    }

    /// Whether the descriptor does not tell of all that is there or under way. Who has the lock now asks the same before going.
    fn is_unarmed(&self) -> bool {
        self.look(Progress::is_unarmed).unwrap_or(false)
    }

    /// Whether the descriptor tells of all that is there or under way, and nobody came in vain.
    fn is_settled(&self) -> bool {
        let armed = match self.progress.try_lock() {
            Ok(progress) => progress.as_ref().is_some_and(|progress| !progress.is_unarmed()),
            Err(_) => false,
        };
        // After the release of the lock: who came while it was held here is heard.
        !self.is_asked_again() && armed
    }

    /// Has something been going on a moment ago, so that more is likely to come.
    fn is_soon(&self) -> Option<u64> {
        self.look(|progress| progress.is_soon().then(|| progress.events())).flatten()
    }

    fn events(&self) -> Option<u64> {
        self.look(Progress::events)
    }

    /// Waits for the descriptor and takes turns when it tells of something, until `over`.
    pub(super) async fn watch(self: Arc<Self>, over: CancellationToken) {
        let fd = self.fd.try_clone();
        let fd = match fd.and_then(readable) {
            Ok(fd) => fd,
            Err(error) => {
                tracing::debug!(%error, "the runtime takes no descriptor: the progress thread does all");
                return;
            }
        };
        let _watching = Watching::begin(&self);
        let watch = async {
            loop {
                tokio::select! {
                    biased;
                    ready = fd.readable() => match ready {
                        // First: what comes from here on is told anew.
                        Ok(mut ready) => ready.clear_ready(),
                        Err(_) => return,
                    },
                    () = self.left.notified() => {
                        if self.is_settled() {
                            continue;
                        }
                    }
                }
                if self.attend().await {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            () = over.cancelled() => {}
            () = watch => {}
        }
    }
}

impl Turns {
    /// Takes turns until nothing happens and the descriptor is prepared; whether the driver is closed.
    async fn attend(&self) -> bool {
        loop {
            match self.take_until(true, true) {
                Turned::Over => return true,
                Turned::Taken => return false,
                Turned::Busy => tokio::task::yield_now().await,
                Turned::Told => {
                    // Who was told runs first; mostly it asks for more, and the descriptor is prepared with that.
                    tokio::task::yield_now().await;
                    if self.is_settled() {
                        return false;
                    }
                }
                Turned::Idle => {
                    let came = |events| self.spin(Spinner::Watch, || self.events() != Some(events));
                    if !self.is_soon().is_some_and(came) {
                        return false;
                    }
                }
            }
        }
    }
}

/// Closes the driver at the end of the thread, however it ends.
struct End<'a>(&'a Turns);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let progress = self.0.lock().take();
        drop(progress);
    }
}

/// That the watch is there.
struct Watching<'a>(&'a Turns);

impl<'a> Watching<'a> {
    fn begin(turns: &'a Turns) -> Self {
        turns.watched.store(true, Ordering::Relaxed);
        Self(turns)
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.watched.store(false, Ordering::Relaxed);
        // From here on the thread waits for the descriptor.
        self.0.queue.alarm.ring();
    }
}
