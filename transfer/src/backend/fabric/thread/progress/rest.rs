//! Between two turns: who is to take the next one, and when.

use std::os::fd::AsFd;
use std::time::Duration;

use super::super::{Asleep, Need};
use super::Progress;
use crate::backend::fabric::driver::Driver;

/// How long after the last event the thread still wakes up by itself, for libraries that miss wake-ups.
const WARM: Duration = Duration::from_millis(100);
/// Longest sleep of a thread with nothing to do.
const IDLE: Duration = Duration::from_secs(1);
/// Longest sleep of a thread with nothing to do whose driver has nothing to wait for.
const IDLE_BLIND: Duration = Duration::from_millis(10);
/// Sleep while the driver takes nothing more.
const FULL: Duration = Duration::from_micros(50);
/// How long the thread looks again and again before it sleeps while operations are under way: less than waking it takes.
const SPIN: Duration = Duration::from_micros(5);

/// What the thread is to do when nothing happens any more.
pub(in super::super) enum Rest {
    /// Nothing: look again.
    None,
    Sleep {
        most: Duration,
        /// Whether the driver's descriptor ends the sleep.
        watches: bool,
        /// Whether the descriptor is to be prepared before that.
        arms: bool,
    },
}

impl<D: Driver + ?Sized> Progress<D> {
    /// What only the thread can do.
    pub(in super::super) fn needs_thread(&self) -> Need {
        if self.held_up || !self.closing.is_empty() || self.full {
            Need::Now
        } else if self.ops.len() > 0 {
            Need::Soon
        } else {
            Need::None
        }
    }

    /// Has the descriptor tell of what comes; false: something has come.
    pub(in super::super) fn arm(&mut self) -> bool {
        self.unarmed = false;
        self.driver().arm()
    }

    /// Whether the descriptor does not tell of all that is there or under way.
    pub(in super::super) fn is_unarmed(&self) -> bool {
        self.stirred || self.unarmed && self.ops.len() > 0
    }

    /// Whether somebody was woken in the last turn who waited for a batch.
    pub(in super::super) fn has_told(&self) -> bool {
        self.told
    }

    /// Turns in which something happened.
    pub(in super::super) fn events(&self) -> u64 {
        self.events
    }

    /// Whether something came from peers since this was asked, or the descriptor prepared, also what is no event.
    pub(in super::super) fn is_visited(&mut self) -> bool {
        self.driver().is_visited()
    }

    /// The driver's descriptor is of no use.
    pub(in super::super) fn go_blind(&mut self) {
        self.blind = true;
    }

    /// Spins for a moment if something is under way, then sleeps.
    pub(super) fn rest(&mut self) {
        let idle_for = self.last.elapsed();
        let soon = self.ops.len() > 0 && idle_for < SPIN;
        if soon && (self.is_spinning || self.spin.is_worth_it()) {
            self.is_spinning = true;
            std::hint::spin_loop();
            return;
        }
        if std::mem::take(&mut self.is_spinning) {
            self.spin.tried(false);
        }
        let Some((most, blind)) = self.lie_down(idle_for) else { return };
        if self.arm() {
            let fd = self.fd.as_ref().filter(|_| !blind).map(AsFd::as_fd);
            self.blind |= !self.queue.alarm.sleep(fd, most);
        }
        self.queue.state().asleep = None;
    }

    /// As `rest`, of a thread beside which tasks take turns: how it is to sleep once others can take turns.
    pub(in super::super) fn rest_beside(&mut self, watched: bool) -> Rest {
        let idle_for = self.last.elapsed();
        let Some((most, blind)) = self.lie_down(idle_for) else { return Rest::None };
        // Who waits for a fence may be the one who would take turns; and a sleep that is long begins when nobody does.
        let alone = !watched || most > WARM || self.jobs.iter().any(|(_, job)| job.failed.is_some());
        let watches = alone && !blind;
        Rest::Sleep { most, watches, arms: watches || self.unarmed }
    }

    /// Says that the thread sleeps: for how long at most, and whether without the driver's descriptor. None: it must not.
    fn lie_down(&mut self, idle_for: Duration) -> Option<(Duration, bool)> {
        let blind = self.blind || self.fd.is_none() || self.driver().wait_fd().is_none();
        let nap = self.driver().nap();
        let (most, asleep) = match (self.full, self.ops.len() > 0 || idle_for < WARM, blind) {
            (true, _, _) => (FULL.min(nap), Asleep::Napping),
            (false, true, _) => (nap, Asleep::Napping),
            (false, false, false) => (IDLE, Asleep::Soundly),
            (false, false, true) => (IDLE_BLIND, Asleep::Soundly),
        };
        let mut state = self.queue.state();
        if !state.commands.is_empty() || state.closed {
            return None;
        }
        state.asleep = Some(asleep);
        Some((most, blind))
    }
}
