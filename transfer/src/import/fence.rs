//! A fence around the writes that other threads do for one operation.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Lets writers in until it is closed. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Fence(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    inside: usize,
}

impl Fence {
    /// A guard that closes the fence when dropped.
    pub(super) fn close_on_drop(&self) -> CloseOnDrop {
        CloseOnDrop(self.clone())
    }

    /// The right to write until the result is dropped; none once the fence is closed.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let mut state = self.state();
        if state.closed {
            return None;
        }
        state.inside += 1;
        Some(Inside(self))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Being inside a [`Fence`].
#[derive(Debug)]
pub(super) struct Inside<'a>(&'a Fence);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.state().inside -= 1;
        self.0.0.left.notify_all();
    }
}

/// Closes a [`Fence`] when dropped and returns once nobody is inside: blocks for what those inside are doing.
#[derive(Debug)]
pub(super) struct CloseOnDrop(Fence);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.closed = true;
        while state.inside > 0 {
            state = self.0.0.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
