//! What a decode side hears and what it asks for.

use std::ops::Range;
use std::time::Duration;

use baton_config::KvGeometry;
use baton_config::protocol::{FirstToken, HandoffStatus, Ticket, TicketBlock};

use crate::handoff::{Answer, GiveUp, PeerFault, PullFault, Waiter};

/// What happened, seen from the decode side.
#[derive(Debug, Clone)]
pub enum DecodeEvent {
    /// The engine reserved the blocks of the whole prompt.
    Admitted {
        /// Prompt tokens whose KV was cached here.
        cached: u32,
        /// Prefill here when fewer tokens than this are missing.
        local_below: u32,
    },
    /// A ticket from the peer, its epochs already checked.
    Ticket {
        /// The ticket.
        ticket: Ticket,
        /// Who waits for the answer; nobody for one taken from a status.
        waiter: Option<Waiter>,
    },
    /// The want was answered.
    WantAnswered(Result<(), PeerFault>),
    /// The status poll was answered.
    StatusAnswered(Result<HandoffStatus, PeerFault>),
    /// A read ended; nothing writes into the blocks on its behalf any more.
    Pulled {
        /// Which.
        pull: u64,
        /// Every token of the order before this one is verified and in place.
        upto: u32,
        /// Bytes read and verified.
        bytes: u64,
        /// Why it ended early, if it did.
        fault: Option<PullFault>,
    },
    /// The view no longer has the peer in the life of this handoff.
    PeerGone,
    /// This worker has a new epoch.
    OwnEpochChanged,
    /// The handoff (not the request) was deleted.
    Deleted,
    /// The request is over: its client left, or its engine failed.
    Cancel,
    /// The engine computes nothing for want of blocks: an import for which nothing has come yet is computed here.
    Blocked,
    /// Time passed.
    Tick,
}

/// Whether an operation on the blocks may still be under way when the engine gets them back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writers {
    /// Nothing writes: free them.
    Gone,
    /// A read may still write: keep them aside until the fence.
    MayWrite,
}

/// A read the driver is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct PullOrder {
    /// Names the read in [`DecodeEvent::Pulled`].
    pub pull: u64,
    /// Source blocks.
    pub blocks: Vec<TicketBlock>,
    /// Their geometry.
    pub geometry: KvGeometry,
    /// Prompt tokens to lay out into this worker's blocks.
    pub tokens: Range<u32>,
    /// Why the first try failed, if this is the second. After [`PullFault::Integrity`] it takes another path, if there
    /// is one.
    pub again_after: Option<PullFault>,
}

/// What an import brought, for the report of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImportReport {
    /// Tokens whose KV was read and verified.
    pub tokens: u32,
    /// Bytes read.
    pub bytes: u64,
    /// From the arrival of the last ticket with blocks to the last block verified.
    pub tail: Duration,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum DecodeAction {
    /// Tell the peer from which token on blocks are needed.
    SendWant {
        /// First token needed.
        from_token: u32,
    },
    /// Ask the peer for the state of the handoff.
    PollStatus,
    /// Read blocks.
    Pull(PullOrder),
    /// Stop a read; `Pulled` is still expected.
    AbortPull {
        /// Which.
        pull: u64,
    },
    /// KV of the tokens below `upto` is in place.
    Imported {
        /// Exclusive end.
        upto: u32,
    },
    /// All of the prompt is in place: go on from the first token.
    StartDecode {
        /// Chosen at the peer.
        first: FirstToken,
        /// What was moved.
        report: ImportReport,
    },
    /// Compute what is missing here.
    PrefillLocally {
        /// Why.
        why: GiveUp,
        /// What was moved before.
        report: ImportReport,
    },
    /// Take the request out of the engine.
    CancelEngine {
        /// What to do with its blocks.
        writers: Writers,
    },
    /// The read that may have written is gone.
    Fence,
    /// The request cannot go on here and must be replayed elsewhere.
    Fail,
    /// Tell the peer that the handoff is over.
    DeleteAtPeer,
    /// Answer a message.
    Answer {
        /// Who waits.
        waiter: Waiter,
        /// The answer.
        answer: Answer,
    },
}

/// How a decode side ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeEnd {
    /// Everything wanted was imported.
    Imported,
    /// The prompt is prefilled here.
    Local(GiveUp),
    /// The request is over.
    Cancelled,
}
