//! Connections that have not said yet who they are.
//!
//! Anybody who reaches a listener can open connections and say nothing. Each of them is given some time; where there are
//! too many the oldest makes room. An honest peer is done within milliseconds, and so never the oldest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Most of them at once, of the far more connections there may be.
pub(crate) const STRANGERS_MAX: usize = 256;

/// Those of one agent. Clones share them.
#[derive(Clone)]
pub(crate) struct Strangers(Arc<Shared>);

struct Shared {
    max: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// In the order they came.
    all: BTreeMap<u64, CancellationToken>,
    last: u64,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of them, until this is dropped.
pub(crate) struct Stranger {
    of: Strangers,
    number: u64,
    /// Fires when it has to make room.
    pub(crate) displaced: CancellationToken,
}

impl Strangers {
    pub(crate) fn new(max: usize) -> Self {
        Self(Arc::new(Shared { max, waiting: Mutex::default() }))
    }

    /// Takes note of one more.
    pub(crate) fn enter(&self) -> Stranger {
        let displaced = CancellationToken::new();
        let mut waiting = self.0.waiting();
        waiting.last += 1;
        let number = waiting.last;
        waiting.all.insert(number, displaced.clone());
        if waiting.all.len() > self.0.max
            && let Some((_, oldest)) = waiting.all.pop_first()
        {
            oldest.cancel();
        }
        drop(waiting);
        Stranger { of: self.clone(), number, displaced }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.of.0.waiting().all.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room_and_who_is_known_takes_none() {
        let strangers = Strangers::new(3);
        let mut all: Vec<Stranger> = (0..3).map(|_| strangers.enter()).collect();
        let displaced = |all: &[Stranger]| -> Vec<bool> {
            all.iter().map(|stranger| stranger.displaced.is_cancelled()).collect()
        };
        assert_eq!(displaced(&all), [false; 3]);
        drop(all.remove(1));
        all.push(strangers.enter());
        assert_eq!(displaced(&all), [false; 3], "the second had said who it is");
        all.push(strangers.enter());
        assert_eq!(displaced(&all), [true, false, false, false]);
        all.push(strangers.enter());
        assert_eq!(displaced(&all), [true, true, false, false, false]);
        drop(all);
        assert!(strangers.0.waiting().all.is_empty());
    }
}
