//! The handoff: how a KV cache gets from the worker that prefilled it to the worker that decodes from it.
//!
//! ```text
//!   decode worker                                              prefill worker
//!          ◄─── empty ticket: are you there? ─────────────────         (only where staging is scarce)
//!   Decode ──── want{from_token} ────────────────────────────► Prefill
//!          ◄─── ticket{seq, blocks, digests, [first token]} ──         (one per finished chunk)
//!          ──── reads the blocks, verifies every digest
//!          ──── answer of the ticket: taken ─────────────────►         (its staging may be reused)
//!          ◄─── ...                                                    (last answer: all blocks are free)
//!          ──── or: no room yet, post it again ──────────────►         (the blocks are kept)
//!          ──── status poll after 0.5 s of silence ──────────►         (returns tickets that got lost)
//!          ──── or: delete (given up: prefill here) ─────────►
//! ```
//!
//! Everything here is without I/O and without a clock: [`Desk`] owns the handoffs of a worker, takes inputs with
//! the time passed in, and returns actions; [`crate::driver`] carries them out. A simulation steps two desks in
//! virtual time through loss, duplication, reordering, crashes and corruption.
//!
//! Invariants:
//! 1. Decoding starts only when every prompt token is cached, or was read and verified.
//! 2. For each admitted request exactly one of *start decode*, *prefill locally*, *cancel* happens.
//! 3. Local prefill and reuse of blocks wait until the read that could still write them is confirmed gone.
//! 4. The prefill side frees its blocks after the last answer, a cancel, the peer's end, or a lease without contact.
//! 5. A message of another epoch changes nothing.

pub mod decode;
pub mod desk;
mod parking;
pub mod prefill;

use std::fmt;
use std::time::Duration;

use baton_config::Epoch;
use baton_config::protocol::TicketAck;

pub use decode::{Decode, DecodeAction, DecodeEvent};
pub use desk::{Action, Desk, OpenError, Opening};
pub use prefill::{Prefill, PrefillAction, PrefillEvent};

/// Every bound of the handoff.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// How long a ticket or a want waits for the request it belongs to.
    pub parked_for: Duration,
    /// Tickets and wants that wait at once.
    pub parked_max: usize,
    /// Of these, for one handoff.
    pub parked_per_handoff_max: usize,
    /// How long the end of a handoff is remembered, to answer late messages.
    pub ended_for: Duration,
    /// Ends remembered at once.
    pub ended_max: usize,
    /// Silence of the prefill side after which it is asked for lost tickets.
    pub poll_after: Duration,
    /// Pause after a question that got no answer.
    pub poll_again_after: Duration,
    /// Questions without an answer, one after another, that make the peer count as dead.
    pub poll_faults_max: u32,
    /// How often the prefill side hears from this side while a long read goes on.
    pub keepalive: Duration,
    /// How long the prefill side may make no progress.
    pub stall: Duration,
    /// How long the prefill side may not know the handoff yet (its request is on the way).
    pub unknown_grace: Duration,
    /// How long an import may take in all.
    pub import_max: Duration,
    /// How long an engine may compute nothing for want of blocks before one of those that wait for a peer is given up.
    pub blocked: Duration,
    /// How long an aborted read may take to be confirmed gone.
    pub abort_max: Duration,
    /// Tickets held until those before them arrive, and blocks each may carry.
    pub held_max: usize,
    /// Blocks in one read.
    pub pull_blocks_max: usize,
    /// Silence after which a ticket is posted again; doubles each time.
    pub repost_after: Duration,
    /// Longest pause between two posts of a ticket.
    pub repost_after_max: Duration,
    /// Pause after a post that failed; doubles each time.
    pub post_fault_pause: Duration,
    /// Failed posts, one after another, that make the decode side count as dead.
    pub post_faults_max: u32,
    /// Blocks in one ticket.
    pub ticket_blocks_max: u32,
    /// Whether blocks are brought out only for a peer that has room for them: where staging is scarce, peers that wait
    /// for room themselves must not hold it.
    pub stage_on_want: bool,
    /// The prefill side's backstop: blocks are freed after so long without hearing from the decode side. One that waits
    /// for room answers every post, so that only silence counts.
    pub lease: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            parked_for: Duration::from_secs(2),
            parked_max: 1024,
            parked_per_handoff_max: 64,
            ended_for: Duration::from_secs(60),
            ended_max: 8192,
            poll_after: Duration::from_millis(500),
            poll_again_after: Duration::from_millis(100),
            poll_faults_max: 2,
            keepalive: Duration::from_secs(5),
            stall: Duration::from_secs(10),
            unknown_grace: Duration::from_secs(2),
            import_max: Duration::from_secs(300),
            blocked: Duration::from_secs(2),
            abort_max: Duration::from_secs(5),
            held_max: 1024,
            pull_blocks_max: 256,
            repost_after: Duration::from_millis(500),
            repost_after_max: Duration::from_secs(4),
            post_fault_pause: Duration::from_millis(100),
            post_faults_max: 3,
            ticket_blocks_max: 64,
            stage_on_want: false,
            lease: Duration::from_secs(30),
        }
    }
}

/// Which side of a handoff this worker is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// It computes the KV cache.
    Prefill,
    /// It receives it.
    Decode,
}

/// Somebody who waits for the answer to a message; the driver knows who.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Waiter(pub u64);

/// The answer to a ticket or a want.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Answer to a ticket.
    Ack(TicketAck),
    /// Answer to a want, and to a delete.
    Noted,
    /// The message is for, or from, another life of a worker.
    Stale {
        /// The live epoch of the worker the message was for.
        current: Option<Epoch>,
    },
    /// No such handoff, and none appeared in time.
    Unknown,
    /// The handoff has ended.
    Ended,
    /// No room for the message, or yet for the blocks of a ticket that is kept: send it again later.
    Busy,
    /// The message makes no sense.
    Malformed(&'static str),
}

/// Why a call to the peer did not give its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerFault {
    /// The peer, or this worker in the peer's eyes, is in another life.
    Stale,
    /// The peer does not know the handoff.
    Unknown,
    /// At the peer the handoff has ended.
    Ended,
    /// The peer has no room now, for the message or for what it offers.
    Busy,
    /// Nothing listens at the peer's address.
    Refused,
    /// No answer in time, or a broken one.
    Unreachable,
}

/// Why a read of blocks did not complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PullFault {
    /// A block's bytes do not have the digest of its ticket.
    Integrity,
    /// The connection failed.
    Link,
    /// The serving side is in another life.
    Stale,
    /// The serving side does not grant these blocks.
    Refused,
    /// The time for it was over.
    Deadline,
    /// The two geometries cannot be reconciled.
    Geometry,
    /// It was aborted by this side.
    Aborted,
}

/// Why a decode worker prefills a prompt itself although another worker was to do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GiveUp {
    /// Too little is missing to be worth a transfer.
    Short,
    /// The peer left the view or is in another life.
    PeerGone,
    /// The peer does not answer.
    PeerUnreachable,
    /// The peer never got the request.
    PeerUnknown,
    /// The peer ended the handoff.
    PeerEnded,
    /// The peer answers but makes no progress.
    Stalled,
    /// Bytes differed from their digest twice.
    Integrity,
    /// The transfer failed twice.
    Link,
    /// The transfer took too long.
    Deadline,
    /// The peer's transfer agent refused the read.
    Refused,
    /// The two KV geometries cannot be reconciled.
    Geometry,
    /// The peer sent tickets that contradict each other.
    Protocol,
    /// The handoff was deleted here.
    Deleted,
    /// This worker has a new epoch: its peers void what it asked for before.
    OwnEpoch,
}

impl GiveUp {
    /// All of them, for metrics that exist before the first event.
    pub const ALL: [Self; 14] = [
        Self::Short,
        Self::PeerGone,
        Self::PeerUnreachable,
        Self::PeerUnknown,
        Self::PeerEnded,
        Self::Stalled,
        Self::Integrity,
        Self::Link,
        Self::Deadline,
        Self::Refused,
        Self::Geometry,
        Self::Protocol,
        Self::Deleted,
        Self::OwnEpoch,
    ];

    /// The name used in reports and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::PeerGone => "peer_gone",
            Self::PeerUnreachable => "peer_unreachable",
            Self::PeerUnknown => "peer_unknown",
            Self::PeerEnded => "peer_ended",
            Self::Stalled => "stalled",
            Self::Integrity => "integrity",
            Self::Link => "link",
            Self::Deadline => "deadline",
            Self::Refused => "refused",
            Self::Geometry => "geometry",
            Self::Protocol => "protocol",
            Self::Deleted => "deleted",
            Self::OwnEpoch => "own_epoch",
        }
    }

    /// Whether something went wrong; else it was this side's choice.
    pub fn is_fault(self) -> bool {
        self != Self::Short
    }

    /// Whether the peer may still hold something for this handoff and is worth telling.
    fn peer_may_hold(self) -> bool {
        !matches!(self, Self::PeerEnded)
    }
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests;
