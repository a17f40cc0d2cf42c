//! The prefill side of one handoff.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use baton_config::protocol::{FirstToken, HandoffOutcome, PeerRef, Ticket, TicketAck, TicketBlock};
use baton_config::{Epoch, KvGeometry, WorkerId};

use super::{Limits, PeerFault};

/// What happened, seen from the prefill side.
#[derive(Debug, Clone)]
pub enum PrefillEvent {
    /// KV of the prompt tokens below `upto` is computed (or was cached).
    Computed {
        /// Exclusive end.
        upto: u32,
    },
    /// The first token was chosen.
    First(FirstToken),
    /// The decode side says which blocks it needs.
    Want {
        /// From this token on.
        from_token: u32,
    },
    /// Blocks are where the peer can read them; `Err` when they can't be brought there.
    Exported(Result<Vec<TicketBlock>, ()>),
    /// The peer answered the ticket, or did not.
    Answered {
        /// Which.
        seq: u32,
        /// How.
        result: Result<TicketAck, PeerFault>,
    },
    /// The peer asked for the state of the handoff.
    Asked,
    /// The view no longer has the peer in the life of this handoff.
    PeerGone,
    /// The peer, the router, or the router's absence ended the handoff; or this worker has a new epoch.
    Cancel,
    /// The engine can't finish the prompt.
    EngineFailed,
    /// Time passed.
    Tick,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum PrefillAction {
    /// The peer has room: the engine may give all its blocks to this prompt.
    Wanted,
    /// Bring these blocks (indices in the sequence) where the peer can read them, with their digests.
    Export {
        /// Indices.
        blocks: Range<u32>,
    },
    /// Send the ticket to the peer; a post of the same ticket under way is replaced.
    Post {
        /// The ticket.
        ticket: Ticket,
    },
    /// The staging of these blocks may be reused.
    ReleaseStaged {
        /// Indices.
        blocks: Vec<u32>,
    },
    /// Take everything back: posts, exports, grants, staging.
    Withdraw,
    /// The prompt's blocks may be freed: the peer has what it wants.
    ReleaseEngine,
    /// Stop computing and free the blocks.
    CancelEngine,
    /// Tell the peer that nothing more will come.
    DeleteAtPeer,
}

#[derive(Debug)]
struct Posted {
    ticket: Ticket,
    repost_at: Instant,
    pause: Duration,
    faults: u32,
    /// The peer has no room for its blocks yet; no call is under way.
    put_off: bool,
}

/// The prefill side of one handoff as a state machine.
#[derive(Debug)]
pub struct Prefill {
    peer: PeerRef,
    worker: WorkerId,
    epoch: Epoch,
    geometry: KvGeometry,
    prompt: u32,
    computed: u32,
    from_token: u32,
    /// The peer has room: it said so, asked, or took the first ticket.
    wanted: bool,
    greeted: bool,
    /// Blocks below were exported or are not wanted.
    next_index: u32,
    exporting: Option<Range<u32>>,
    next_seq: u32,
    posted: BTreeMap<u32, Posted>,
    first: Option<FirstToken>,
    first_posted: bool,
    contact: Instant,
    ended: Option<HandoffOutcome>,
}

impl Prefill {
    /// A handoff of a prompt of `prompt` tokens to `peer`, from `worker` in its life `epoch`.
    pub fn new(
        worker: WorkerId,
        epoch: Epoch,
        peer: PeerRef,
        geometry: KvGeometry,
        prompt: u32,
        now: Instant,
    ) -> Self {
        Self {
            peer,
            worker,
            epoch,
            geometry,
            prompt,
            computed: 0,
            from_token: 0,
            wanted: false,
            greeted: false,
            next_index: 0,
            exporting: None,
            next_seq: 0,
            posted: BTreeMap::new(),
            first: None,
            first_posted: false,
            contact: now,
            ended: None,
        }
    }

    /// The decode side.
    pub fn peer(&self) -> &PeerRef {
        &self.peer
    }

    /// Tokens of the prompt, if all of them are computed and the peer has not shown yet that it has room for them.
    pub fn unwanted_tokens(&self) -> Option<u32> {
        (self.ended.is_none() && !self.wanted && self.computed == self.prompt).then_some(self.prompt)
    }

    /// How it ended, once it has.
    pub fn ended(&self) -> Option<HandoffOutcome> {
        self.ended
    }

    /// The phase, for people; it changes whenever there is progress.
    pub fn phase(&self) -> String {
        let Self { computed, prompt, next_seq, .. } = self;
        match self.ended {
            Some(HandoffOutcome::Done) => "prefill/done".to_owned(),
            Some(HandoffOutcome::Cancelled) => "prefill/cancelled".to_owned(),
            Some(HandoffOutcome::Expired) => "prefill/expired".to_owned(),
            None if *computed == 0 => "prefill/queued".to_owned(),
            None if computed < prompt => {
                format!("prefill/computing {computed} of {prompt}, {next_seq} tickets")
            }
            None => format!("prefill/handing over, {next_seq} tickets"),
        }
    }

    /// Tickets the peer has not confirmed.
    pub fn pending(&self) -> Vec<Ticket> {
        self.posted.values().map(|p| p.ticket.clone()).collect()
    }

    /// When [`PrefillEvent::Tick`] is due.
    pub fn deadline(&self, limits: &Limits) -> Option<Instant> {
        if self.ended.is_some() {
            return None;
        }
        let repost = self.posted.values().map(|p| p.repost_at).min();
        repost.into_iter().chain([self.contact + limits.lease]).min()
    }

    /// Takes one event; what is to be done is appended to `out`.
    pub fn handle(
        &mut self,
        now: Instant,
        event: PrefillEvent,
        limits: &Limits,
        out: &mut Vec<PrefillAction>,
    ) {
        if self.ended.is_some() {
            return;
        }
        match event {
            PrefillEvent::Computed { upto } => {
                debug_assert!(upto <= self.prompt);
                self.computed = self.computed.max(upto);
                self.advance(now, limits, out);
            }
            PrefillEvent::First(first) => {
                self.first.get_or_insert(first);
                self.advance(now, limits, out);
            }
            PrefillEvent::Want { from_token } => {
                self.contact = now;
                self.want(out);
                // The peer always needs the last token, whatever it says.
                self.from_token = self.from_token.max(from_token.min(self.prompt - 1));
                // There is room now: what was put off is answered as soon as it was read.
                for posted in self.posted.values_mut().filter(|p| p.put_off) {
                    posted.repost_at = now;
                }
                self.advance(now, limits, out);
            }
            PrefillEvent::Exported(result) => self.exported(now, result, limits, out),
            PrefillEvent::Answered { seq, result } => self.answered(now, seq, result, limits, out),
            PrefillEvent::Asked => {
                self.contact = now;
                self.want(out);
                self.advance(now, limits, out);
            }
            PrefillEvent::PeerGone => self.end(HandoffOutcome::Cancelled, false, out),
            PrefillEvent::Cancel => self.end(HandoffOutcome::Cancelled, true, out),
            PrefillEvent::EngineFailed => self.end(HandoffOutcome::Cancelled, true, out),
            PrefillEvent::Tick => self.tick(now, limits, out),
        }
    }

    fn want(&mut self, out: &mut Vec<PrefillAction>) {
        if !std::mem::replace(&mut self.wanted, true) {
            out.push(PrefillAction::Wanted);
        }
    }

    /// Blocks of the prompt whose bytes are final.
    fn finished_blocks(&self) -> u32 {
        if self.computed == self.prompt {
            self.geometry.blocks_for(self.prompt)
        } else {
            self.computed / self.geometry.block_tokens
        }
    }

    fn advance(&mut self, now: Instant, limits: &Limits, out: &mut Vec<PrefillAction>) {
        if self.exporting.is_some() {
            return;
        }
        if limits.stage_on_want && !self.wanted {
            // A ticket without blocks finds out whether the peer is there, and is taken once it has room.
            if !std::mem::replace(&mut self.greeted, true) {
                self.post(now, Vec::new(), 0, limits, out);
            }
            return;
        }
        let finished = self.finished_blocks();
        let unwanted = self.from_token / self.geometry.block_tokens;
        self.next_index = self.next_index.max(unwanted.min(finished));
        if self.next_index < finished {
            let blocks = self.next_index..finished.min(self.next_index + limits.ticket_blocks_max);
            self.exporting = Some(blocks.clone());
            out.push(PrefillAction::Export { blocks });
        } else if self.computed == self.prompt && self.first.is_some() && !self.first_posted {
            // The last blocks were posted before the first token was known.
            self.post(now, Vec::new(), self.prompt, limits, out);
        }
    }

    fn exported(
        &mut self,
        now: Instant,
        result: Result<Vec<TicketBlock>, ()>,
        limits: &Limits,
        out: &mut Vec<PrefillAction>,
    ) {
        let Some(range) = self.exporting.take() else { return };
        let Ok(blocks) = result else {
            return self.end(HandoffOutcome::Cancelled, true, out);
        };
        debug_assert_eq!(blocks.len(), range.len());
        self.next_index = range.end;
        let tokens = self.prompt.min(range.end * self.geometry.block_tokens);
        self.post(now, blocks, tokens, limits, out);
        self.advance(now, limits, out);
    }

    fn post(
        &mut self,
        now: Instant,
        blocks: Vec<TicketBlock>,
        tokens: u32,
        limits: &Limits,
        out: &mut Vec<PrefillAction>,
    ) {
        let first = if tokens == self.prompt { self.first.clone() } else { None };
        self.first_posted |= first.is_some();
        let ticket = Ticket {
            worker: self.worker.clone(),
            epoch: self.epoch,
            to_epoch: self.peer.epoch,
            seq: self.next_seq,
            geometry: self.geometry,
            tokens,
            blocks,
            first,
        };
        let pause = limits.repost_after;
        let posted =
            Posted { ticket: ticket.clone(), repost_at: now + pause, pause, faults: 0, put_off: false };
        self.posted.insert(self.next_seq, posted);
        self.next_seq += 1;
        out.push(PrefillAction::Post { ticket });
    }

    fn answered(
        &mut self,
        now: Instant,
        seq: u32,
        result: Result<TicketAck, PeerFault>,
        limits: &Limits,
        out: &mut Vec<PrefillAction>,
    ) {
        if !matches!(result, Err(PeerFault::Refused | PeerFault::Unreachable)) {
            self.contact = now;
        }
        let Some(posted) = self.posted.get_mut(&seq) else { return };
        match result {
            Ok(TicketAck::Taken) => {
                let blocks: Vec<u32> = posted.ticket.blocks.iter().map(|b| b.index).collect();
                self.posted.remove(&seq);
                if !blocks.is_empty() {
                    out.push(PrefillAction::ReleaseStaged { blocks });
                }
                self.want(out);
                if self.first_posted && self.posted.is_empty() {
                    self.end(HandoffOutcome::Done, false, out);
                } else {
                    self.advance(now, limits, out);
                }
            }
            Ok(TicketAck::Abandoned) | Err(PeerFault::Stale | PeerFault::Ended) => {
                self.end(HandoffOutcome::Cancelled, false, out);
            }
            Err(PeerFault::Unknown) => self.end(HandoffOutcome::Expired, false, out),
            Err(PeerFault::Busy) => {
                posted.faults = 0;
                posted.put_off = true;
                posted.repost_at = now + posted.pause;
            }
            Err(PeerFault::Refused | PeerFault::Unreachable) => {
                posted.faults += 1;
                let pause = limits.post_fault_pause * (1 << posted.faults.min(8));
                posted.repost_at = now + pause;
                if posted.faults >= limits.post_faults_max {
                    self.end(HandoffOutcome::Expired, true, out);
                }
            }
        }
    }

    fn tick(&mut self, now: Instant, limits: &Limits, out: &mut Vec<PrefillAction>) {
        if now >= self.contact + limits.lease {
            return self.end(HandoffOutcome::Expired, true, out);
        }
        for posted in self.posted.values_mut().filter(|p| p.repost_at <= now) {
            posted.pause = (posted.pause * 2).min(limits.repost_after_max);
            posted.repost_at = now + posted.pause;
            posted.put_off = false;
            out.push(PrefillAction::Post { ticket: posted.ticket.clone() });
        }
    }

    fn end(&mut self, outcome: HandoffOutcome, tell: bool, out: &mut Vec<PrefillAction>) {
        self.posted.clear();
        self.exporting = None;
        self.ended = Some(outcome);
        out.push(PrefillAction::Withdraw);
        out.push(match outcome {
            HandoffOutcome::Done => PrefillAction::ReleaseEngine,
            HandoffOutcome::Cancelled | HandoffOutcome::Expired => PrefillAction::CancelEngine,
        });
        if tell {
            out.push(PrefillAction::DeleteAtPeer);
        }
    }
}

#[cfg(test)]
mod tests;
