//! What is known of peers, batches and operations under way.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Instant;

use crate::backend::fabric::batch::{Batch, End, Posting};
use crate::backend::fabric::driver::PeerId;
use crate::backend::fabric::thread::PeerInner;
use crate::backend::fabric::thread::queue::Then;
use crate::backend::fabric::window::Window;

/// A peer that is connected, or was.
pub(super) struct PeerState {
    pub(super) id: PeerId,
    pub(super) window: Window<Posting>,
    pub(super) is_ready: bool,
    pub(super) failed: Option<Arc<str>>,
    pub(super) handle: Weak<PeerInner>,
}

/// A batch under way.
pub(super) struct Job {
    pub(super) batch: Arc<Batch>,
    /// The request that asks for its message.
    pub(super) ask: Option<Arc<Batch>>,
    /// What follows, in order.
    pub(super) then: VecDeque<Then>,
    pub(super) peer: u64,
    /// Bytes missing of each transfer.
    pub(super) missing: Vec<usize>,
    /// Transfers with bytes missing, and the first of them.
    pub(super) open: usize,
    pub(super) first_open: usize,
    /// Operations posted and not ended.
    pub(super) posted: usize,
    pub(super) done: Vec<u32>,
    pub(super) failed: Option<Arc<str>>,
    /// When it was submitted or, later, given up.
    pub(super) since: Instant,
    /// Its peer is disconnected: what is posted touches nothing any more.
    pub(super) cut: bool,
    /// One of its operations ended in an error.
    pub(super) lost: bool,
    pub(super) touched: bool,
}

impl Job {
    /// What is to follow now, as far as it has come.
    pub(super) fn next_then(&mut self) -> Option<Then> {
        if self.failed.is_some() {
            return None;
        }
        while self.missing.get(self.first_open) == Some(&0) {
            self.first_open += 1;
        }
        self.then.pop_front_if(|then| then.after <= self.first_open)
    }

    /// Whether nothing of it writes local memory, now or later.
    pub(super) fn end(&self) -> End {
        if self.cut {
            End::Cut
        } else if self.posted == 0 && (self.open == 0 || self.failed.is_some()) {
            // Of an operation that ended in an error, nobody knows whether it still lands at the peer.
            if self.lost { End::Cut } else { End::Settled }
        } else {
            End::Open
        }
    }
}

/// A posted operation.
pub(super) struct Op {
    pub(super) job: u64,
    /// Whose window holds it; none for a receive.
    pub(super) peer: Option<u64>,
    pub(super) transfer: usize,
    /// Transfers it is of, from `transfer` on; whole ones, if more than one.
    pub(super) count: usize,
    pub(super) len: usize,
}
