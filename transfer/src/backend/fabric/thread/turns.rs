//! Turns at a driver that tasks take, where any thread may call it: two wake-ups less than through the progress thread.
//!
//! 1. Who has the lock has the driver. Only the thread waits for the lock: a task that finds it taken says so
//!    (`again`), and who has it looks again before going.
//! 2. A task of the runtime, the watch, waits for the driver's descriptor. Meanwhile the thread sleeps without it, but
//!    wakes up by itself as long as something is under way: a runtime that is busy with other things, or gone, delays
//!    a completion and does not lose it. A task that has what it waited for goes first: only after it the watch
//!    prepares the descriptor anew, which takes several system calls.
//!    Where it has paid, a task that waits looks again and again for a moment, and so does the watch once peers have been
//!    here. Meanwhile the descriptor wakes nobody (see [`Gate`]): it is prepared by who stops looking.
//! 3. Calls that may block are the thread's: it is woken for them.
//! 4. Only the thread drops the driver.

use std::cell::Cell;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::gate::Gate;
use super::progress::Progress;
use super::progress::rest::Rest;
use super::{Need, Queue};
use crate::backend::fabric::bell::readable;
use crate::backend::fabric::driver::Driver;
use crate::spin::Spin;

/// Turns taken one after the other before something else has its turn.
const TURNS_MAX: usize = 64;
/// How long is looked again and again before somebody waits: a peer on this host or next to it answers, or asks for more,
/// within that time. It is longer than waking takes, but only done where it has paid.
const SPIN: Duration = Duration::from_micros(30);
/// What comes within a host in a nanosecond, at least: a task looks so much longer for what it waits for.
const BYTES_PER_NS: u64 = 4;
/// The longest that a task looks, and how long without letting others run in its place.
const LOOK_MAX: Duration = Duration::from_millis(1);
const LOOK_TURN: Duration = Duration::from_micros(250);
/// Most visits of peers between which the watch does not let other tasks run.
const VISITS_MAX: usize = 8;

thread_local! {
    /// Whether this thread is in a turn.
    static TURNING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is in a turn, so that it cannot wait for one to end.
pub(super) fn is_turning() -> bool {
    TURNING.get()
}

/// How long a task is still to look for what it waits for.
#[derive(Debug, Default)]
pub(in super::super) struct Patience {
    left: Duration,
    /// Whether it is the one that looks long, until it no longer does.
    long: Option<Arc<AtomicBool>>,
}

impl Patience {
    /// With so many bytes, none of which may be there yet.
    pub(in super::super) fn with(bytes: u64) -> Self {
        let moving = Duration::from_nanos(bytes / BYTES_PER_NS);
        // What takes much longer than that is not looked for: somebody else moves it.
        let left = if moving > 2 * LOOK_MAX { SPIN } else { (SPIN + moving).min(LOOK_MAX) };
        Self { left, long: None }
    }

    pub(in super::super) fn is_over(&self) -> bool {
        self.left.is_zero()
    }

    /// How long the next look is to be. One task at a time looks long: that one moves what the others wait for, too, and
    /// between its looks there are other tasks than such that look.
    fn take(&mut self, long: &Arc<AtomicBool>) -> Duration {
        if self.left > SPIN && self.long.is_none() {
            match long.swap(true, Ordering::Relaxed) {
                true => self.left = SPIN,
                false => self.long = Some(Arc::clone(long)),
            }
        }
        let look = self.left.min(LOOK_TURN);
        self.left -= look;
        look
    }
}

impl Drop for Patience {
    fn drop(&mut self) {
        if let Some(long) = &self.long {
            long.store(false, Ordering::Relaxed);
        }
    }
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
    gate: Gate,
    /// Whether looking again and again has paid: of tasks that wait, and of the watch.
    spins: [Mutex<Spin>; 2],
    /// Tasks that look now.
    looking: AtomicUsize,
    /// Whether one of them looks long.
    long: Arc<AtomicBool>,
    /// Whether the watch takes turns.
    attending: AtomicBool,
}

/// Who looks again and again.
#[derive(Debug, Clone, Copy)]
pub(super) enum Spinner {
    Task,
    Watch,
}

impl Turns {
    /// `gate` is that of the driver's descriptor.
    pub(super) fn new(queue: Arc<Queue>, progress: Progress<dyn Driver + Send>, gate: Gate) -> Self {
        let progress = Mutex::new(Some(progress));
        let (again, watched) = (AtomicBool::new(false), AtomicBool::new(false));
        Self {
            queue,
            progress,
            again,
            watched,
            left: Notify::new(),
            gate,
            spins: Default::default(),
            looking: AtomicUsize::new(0),
            long: Arc::default(),
            attending: AtomicBool::new(false),
        }
    }

    /// As if the watch had taken note of what the descriptor told, and left.
    #[cfg(test)]
    pub(super) fn shut_gate(&self) {
        self.gate.take();
    }

    #[cfg(test)]
    pub(super) fn is_gate_open(&self) -> bool {
        self.gate.is_open()
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
                    false => match progress.rest_beside(self.watched.load(Ordering::Relaxed)) {
                        // Who took note of the descriptor last may have found somebody at the driver, and left.
                        Rest::Sleep { arms, watches, .. }
                            if (arms || !self.gate.is_open())
                                && (watches || !self.is_attended())
                                && !self.arm(progress) =>
                        {
                            Rest::None
                        }
                        rest => rest,
                    },
                }
            };
            let slept = match rest {
                _ if self.is_asked_again() => true,
                Rest::None => true,
                Rest::Sleep { most, watches, .. } => {
                    let fd = watches.then(|| self.gate.inner());
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
    pub(super) fn look<T>(&self, at: impl FnOnce(&mut Progress<dyn Driver + Send>) -> T) -> Option<T> {
        let mut progress = self.progress.try_lock().ok()?;
        let found = progress.as_mut().map(at);
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
                let misses = arm && !busy && !ends && !self.arm(at_it);
                (busy || misses, ends, at_it.needs_thread())
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

    /// Has the descriptor tell of what comes later; false: something has come already.
    fn arm(&self, progress: &mut Progress<dyn Driver + Send>) -> bool {
        let armed = progress.arm();
        if armed {
            self.gate.open();
        }
        armed
    }

    /// Takes turns for a moment, if that is likely to pay, until `came`: for a task, which waits if it did not.
    pub(super) fn spin(&self, patience: &mut Patience, came: impl Fn() -> bool) {
        let found = if self.spinning(Spinner::Task).is_worth_it() {
            let _looks = Looks::begin(self);
            let turn = patience.take(&self.long);
            self.look_for(Spinner::Task, (turn, patience.is_over()), came)
        } else {
            *patience = Patience::default();
            false
        };
        if found && self.watched.load(Ordering::Relaxed) {
            self.left.notify_one();
        } else if self.is_unarmed() {
            // Posted by somebody who came in vain, or more was there than was taken.
            self.take_all();
        }
    }

    /// Takes turns for something new. Who waits for it has the descriptor tell of what comes, if it does not look for that
    /// itself.
    pub(super) fn take_new(&self) {
        if self.take(!self.spinning(Spinner::Task).will_be_worth_it()) == Turned::Busy {
            self.queue.rouse(Need::Now);
        }
    }

    /// Takes turns and has the descriptor tell of what comes later. What is too much for a task is the thread's.
    pub(super) fn take_all(&self) {
        if self.take(true) == Turned::Busy {
            self.queue.rouse(Need::Now);
        }
    }

    /// Whether a task looks: it sees all that comes, and has the descriptor prepared when it is done.
    fn is_looked_at(&self) -> bool {
        self.looking.load(Ordering::SeqCst) > 0
    }

    /// The same of tasks and the watch.
    fn is_attended(&self) -> bool {
        self.is_looked_at() || self.attending.load(Ordering::SeqCst)
    }

    fn spinning(&self, who: Spinner) -> MutexGuard<'_, Spin> {
        self.spins[who as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes turns for so long until `came`; whether it did, which says something if this is the last look for it.
    fn look_for(&self, who: Spinner, (most, last): (Duration, bool), came: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        let mut found = came();
        while !found && start.elapsed() < most {
            std::hint::spin_loop();
            if self.take(false) == Turned::Over {
                break;
            }
            found = came();
        }
        if found || last {
            self.spinning(who).tried(found);
        }
        found
    }

    /// Whether the descriptor does not tell of all that is there or under way. Who has the lock now asks the same before going.
    fn is_unarmed(&self) -> bool {
        !self.gate.is_open() || self.look(|progress| progress.is_unarmed()).unwrap_or(false)
    }

    /// Whether the descriptor tells of all that is there or under way, and nobody came in vain.
    fn is_settled(&self) -> bool {
        let armed = match self.progress.try_lock() {
            Ok(progress) => progress.as_ref().is_some_and(|progress| !progress.is_unarmed()),
            Err(_) => false,
        };
        // After the release of the lock: who came while it was held here is heard.
        !self.is_asked_again() && armed && self.gate.is_open()
    }

    /// How often something happened, as far as that can be seen now.
    fn events(&self) -> Option<u64> {
        self.look(|progress| progress.events())
    }

    /// Whether peers did something here that may be no event.
    fn is_visited(&self) -> bool {
        self.look(Progress::is_visited).unwrap_or(true)
    }

    /// Waits for the descriptor and takes turns when it tells of something, until `over`.
    pub(super) async fn watch(self: Arc<Self>, over: CancellationToken) {
        let fd = self.gate.as_fd().try_clone_to_owned();
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
                        Ok(mut ready) => {
                            ready.clear_ready();
                            self.gate.take();
                        }
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
    ///
    /// Where peers mostly come again at once, they are looked for before that: preparing the descriptor, sleeping and
    /// waking take longer than they do.
    async fn attend(&self) -> bool {
        let over = {
            let _attends = Attends::begin(&self.attending);
            self.attend_until_idle().await
        };
        // Who had the driver left this to the watch.
        if !over && !self.is_looked_at() && self.is_unarmed() {
            self.take_all();
        }
        over
    }

    async fn attend_until_idle(&self) -> bool {
        let (mut looks, mut visits) = (self.spinning(Spinner::Watch).is_worth_it(), 0);
        loop {
            if self.is_looked_at() {
                return false;
            }
            match self.take_until(!looks, true) {
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
                Turned::Idle if looks => {
                    let before = self.events();
                    looks = self.look_for(Spinner::Watch, (SPIN, true), || {
                        self.events() != before || self.is_visited()
                    });
                    visits += 1;
                    if visits % VISITS_MAX == 0 {
                        tokio::task::yield_now().await;
                    }
                }
                Turned::Idle => return false,
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

/// That a task looks.
struct Looks<'a>(&'a AtomicUsize);

impl<'a> Looks<'a> {
    fn begin(turns: &'a Turns) -> Self {
        turns.looking.fetch_add(1, Ordering::SeqCst);
        Self(&turns.looking)
    }
}

impl Drop for Looks<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// That the watch takes turns, and prepares the descriptor when it is done.
struct Attends<'a>(&'a AtomicBool);

impl<'a> Attends<'a> {
    fn begin(attending: &'a AtomicBool) -> Self {
        attending.store(true, Ordering::SeqCst);
        Self(attending)
    }
}

impl Drop for Attends<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
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
