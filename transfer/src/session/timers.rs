//! Timers of reads, kept from one read to the next.
//!
//! A timer that is set anew for a later time stays where it is among all the runtime's until its earlier time has come:
//! that costs next to nothing. A new one for each read makes the runtime wake another of its threads to sleep less long.

use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::runtime::{Handle, Id};
use tokio::time::{Instant, Sleep, sleep_until};

/// Most timers that are kept.
const KEPT_MAX: usize = 32;

/// The timers of a session that are not in use, each with the runtime that it is of.
#[derive(Default)]
pub(super) struct Timers(Mutex<Vec<(Id, Pin<Box<Sleep>>)>>);

impl Timers {
    /// A timer of the current runtime.
    pub(super) fn take(&self) -> Timer<'_> {
        let runtime = Handle::try_current().ok().map(|runtime| runtime.id());
        let mut kept = self.lock();
        let known = kept.iter().position(|(of, _)| Some(*of) == runtime);
        Timer { of: self, runtime, sleep: known.map(|at| kept.swap_remove(at).1) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Id, Pin<Box<Sleep>>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A timer in use.
pub(super) struct Timer<'a> {
    of: &'a Timers,
    runtime: Option<Id>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer<'_> {
    /// Waits.
    pub(super) async fn until(&mut self, at: Instant) {
        match &mut self.sleep {
            Some(sleep) => sleep.as_mut().reset(at),
            None => self.sleep = Some(Box::pin(sleep_until(at))),
        }
        if let Some(sleep) = &mut self.sleep {
            sleep.await;
        }
    }
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        // Whose time has come is no longer among the runtime's: of no use.
        let unused = self.sleep.take().filter(|sleep| !sleep.is_elapsed());
        if let (Some(sleep), Some(runtime)) = (unused, self.runtime) {
            let mut kept = self.of.lock();
            if kept.len() < KEPT_MAX {
                kept.push((runtime, sleep));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_was_used_before_ends_when_it_should() {
        let timers = Timers::default();
        let start = Instant::now();
        for seconds in [10, 20, 3, 30] {
            let mut timer = timers.take();
            tokio::select! {
                biased;
                () = timer.until(start + Duration::from_secs(seconds)) => panic!("{seconds} s are not over"),
                () = tokio::task::yield_now() => {}
            }
        }
        assert_eq!(timers.lock().len(), 1, "one at a time, kept");
        timers.take().until(start + Duration::from_secs(7)).await;
        assert_eq!(start.elapsed().as_secs(), 7);
        assert!(timers.lock().is_empty(), "it was used up");
    }
}
