//! The decode side of one handoff.

use std::collections::BTreeMap;
use std::time::Instant;

use baton_config::KvGeometry;
use baton_config::protocol::{FirstToken, HandoffStatus, PeerRef, Ticket, TicketAck};

use super::{Answer, GiveUp, Limits, PeerFault, PullFault, Waiter};

mod message;

pub use message::{DecodeAction, DecodeEnd, DecodeEvent, ImportReport, PullOrder, Writers};

/// Waiters of one ticket; a peer that posts it more often than that gets the oldest answered `Busy`.
const TICKET_WAITERS_MAX: usize = 4;

struct Pulled {
    pull: u64,
    upto: u32,
    bytes: u64,
    fault: Option<PullFault>,
}

#[derive(Debug)]
struct Held {
    ticket: Ticket,
    waiters: Vec<Waiter>,
}

#[derive(Debug)]
struct Pulling {
    pull: u64,
    /// Tickets below this sequence number are taken when the read is good.
    next_seq: u32,
    order: PullOrder,
}

#[derive(Debug)]
struct Importing {
    since: Instant,
    progress: Instant,
    next_poll: Instant,
    polling: bool,
    poll_faults: u32,
    peer_phase: String,
    pulling: Option<Pulling>,
}

#[derive(Debug)]
enum Phase {
    /// The engine has no room yet; `lost` once the handoff is known to be of no use.
    Queued {
        lost: Option<GiveUp>,
    },
    /// Blocks are being read.
    Importing(Importing),
    /// Given up; local prefill starts when the read is gone.
    Aborting {
        pull: u64,
        why: GiveUp,
        until: Instant,
    },
    /// Cancelled; the blocks are freed when the read is gone.
    Fencing {
        pull: u64,
    },
    Ended(DecodeEnd),
}

/// The decode side of one handoff as a state machine.
#[derive(Debug)]
pub struct Decode {
    peer: PeerRef,
    prompt: u32,
    phase: Phase,
    /// Tickets that arrived and are not taken, by sequence number.
    held: BTreeMap<u32, Held>,
    /// All below are taken.
    next_seq: u32,
    /// Source block that must come next; unknown before the first ticket.
    next_index: Option<u32>,
    geometry: Option<KvGeometry>,
    /// KV of the tokens below is in place and verified.
    upto: u32,
    first: Option<FirstToken>,
    last_ticket_at: Instant,
    report: ImportReport,
    pulls: u64,
}

impl Decode {
    /// A handoff of a prompt of `prompt` tokens, not admitted yet.
    pub fn new(peer: PeerRef, prompt: u32, now: Instant) -> Self {
        Self {
            peer,
            prompt,
            phase: Phase::Queued { lost: None },
            held: BTreeMap::new(),
            next_seq: 0,
            next_index: None,
            geometry: None,
            upto: 0,
            first: None,
            last_ticket_at: now,
            report: ImportReport::default(),
            pulls: 0,
        }
    }

    /// The prefill side.
    pub fn peer(&self) -> &PeerRef {
        &self.peer
    }

    /// How it ended, once it has.
    pub fn ended(&self) -> Option<DecodeEnd> {
        match self.phase {
            Phase::Ended(end) => Some(end),
            _ => None,
        }
    }

    /// Whether the engine has no room for it yet.
    pub fn is_queued(&self) -> bool {
        matches!(self.phase, Phase::Queued { .. })
    }

    /// Since when it has had blocks, if nothing has come for them yet.
    pub fn waits_since(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Importing(import) if self.next_seq == 0 && self.held.is_empty() => Some(import.since),
            _ => None,
        }
    }

    /// The phase, for people.
    pub fn phase(&self) -> String {
        match &self.phase {
            Phase::Queued { .. } => "decode/queued".to_owned(),
            Phase::Importing(_) => format!("decode/importing {} of {}", self.upto, self.prompt),
            Phase::Aborting { why, .. } => format!("decode/aborting {why}"),
            Phase::Fencing { .. } => "decode/fencing".to_owned(),
            Phase::Ended(DecodeEnd::Imported) => "decode/imported".to_owned(),
            Phase::Ended(DecodeEnd::Local(why)) => format!("decode/local {why}"),
            Phase::Ended(DecodeEnd::Cancelled) => "decode/cancelled".to_owned(),
        }
    }

    /// When [`DecodeEvent::Tick`] is due.
    pub fn deadline(&self, limits: &Limits) -> Option<Instant> {
        match &self.phase {
            Phase::Importing(import) => {
                let poll = (!import.polling).then_some(import.next_poll);
                let stall = import.pulling.is_none().then_some(import.progress + limits.stall);
                [poll, stall, Some(import.since + limits.import_max)].into_iter().flatten().min()
            }
            Phase::Aborting { until, .. } => Some(*until),
            Phase::Queued { .. } | Phase::Fencing { .. } | Phase::Ended(_) => None,
        }
    }

    /// Takes one event; what is to be done is appended to `out`.
    pub fn handle(&mut self, now: Instant, event: DecodeEvent, limits: &Limits, out: &mut Vec<DecodeAction>) {
        match event {
            DecodeEvent::Admitted { cached, local_below } => {
                self.admitted(now, cached, local_below, limits, out)
            }
            DecodeEvent::Ticket { ticket, waiter } => self.ticket(now, ticket, waiter, limits, out),
            DecodeEvent::WantAnswered(answer) => self.want_answered(now, answer, limits, out),
            DecodeEvent::StatusAnswered(answer) => self.status_answered(now, answer, limits, out),
            DecodeEvent::Pulled { pull, upto, bytes, fault } => {
                self.pulled(now, Pulled { pull, upto, bytes, fault }, limits, out);
            }
            DecodeEvent::PeerGone => self.give_up(now, GiveUp::PeerGone, limits, out),
            DecodeEvent::OwnEpochChanged => self.give_up(now, GiveUp::OwnEpoch, limits, out),
            DecodeEvent::Deleted => self.give_up(now, GiveUp::Deleted, limits, out),
            DecodeEvent::Cancel => self.cancel(out),
            DecodeEvent::Blocked => {
                if self.waits_since().is_some() {
                    self.give_up(now, GiveUp::Stalled, limits, out);
                }
            }
            DecodeEvent::Tick => self.tick(now, limits, out),
        }
    }

    fn admitted(
        &mut self,
        now: Instant,
        cached: u32,
        local_below: u32,
        limits: &Limits,
        out: &mut Vec<DecodeAction>,
    ) {
        let Phase::Queued { lost } = self.phase else { return };
        debug_assert!(cached < self.prompt, "the last prompt token is never cached");
        self.upto = cached;
        self.phase = Phase::Importing(Importing {
            since: now,
            progress: now,
            next_poll: now + limits.poll_after,
            polling: false,
            poll_faults: 0,
            peer_phase: String::new(),
            pulling: None,
        });
        if let Some(why) = lost {
            return self.give_up(now, why, limits, out);
        }
        if self.prompt - cached < local_below {
            return self.give_up(now, GiveUp::Short, limits, out);
        }
        out.push(DecodeAction::SendWant { from_token: cached });
        self.advance(now, limits, out);
    }

    fn ticket(
        &mut self,
        now: Instant,
        ticket: Ticket,
        waiter: Option<Waiter>,
        limits: &Limits,
        out: &mut Vec<DecodeAction>,
    ) {
        let known = match &mut self.phase {
            Phase::Ended(DecodeEnd::Imported) => Some(Answer::Ack(TicketAck::Taken)),
            Phase::Queued { lost: Some(_) }
            | Phase::Aborting { .. }
            | Phase::Fencing { .. }
            | Phase::Ended(_) => Some(Answer::Ack(TicketAck::Abandoned)),
            Phase::Queued { lost: None } => None,
            Phase::Importing(import) => {
                let pause = if import.pulling.is_some() { limits.keepalive } else { limits.poll_after };
                import.next_poll = now + pause;
                (ticket.seq < self.next_seq).then_some(Answer::Ack(TicketAck::Taken))
            }
        };
        if let Some(answer) = known {
            return reply(waiter, answer, out);
        }
        if let Some(held) = self.held.get_mut(&ticket.seq) {
            // Who posts again hears that this side is there, and keeps the blocks however long the engine has no room.
            // Only who came last still listens: a post replaces the one before it.
            if matches!(self.phase, Phase::Queued { .. }) {
                return reply(waiter, Answer::Busy, out);
            }
            if held.waiters.len() == TICKET_WAITERS_MAX {
                reply(Some(held.waiters.remove(0)), Answer::Busy, out);
            }
            held.waiters.extend(waiter);
            return;
        }
        let far = ticket.seq.saturating_sub(self.next_seq);
        if far as usize >= limits.held_max || ticket.blocks.len() > limits.held_max {
            return reply(waiter, Answer::Busy, out);
        }
        if !ticket.blocks.is_empty() {
            self.last_ticket_at = now;
        }
        self.held.insert(ticket.seq, Held { ticket, waiters: waiter.into_iter().collect() });
        if let Phase::Importing(import) = &mut self.phase {
            import.progress = now;
            self.advance(now, limits, out);
        }
    }

    fn want_answered(
        &mut self,
        now: Instant,
        answer: Result<(), PeerFault>,
        limits: &Limits,
        out: &mut Vec<DecodeAction>,
    ) {
        let Phase::Importing(_) = self.phase else { return };
        // A want that got lost is not sent again: the next question says as much, and till then blocks may be offered that
        // nobody needs, or the prompt waits for them.
        match answer {
            Ok(()) | Err(PeerFault::Unknown | PeerFault::Busy | PeerFault::Unreachable) => {}
            Err(PeerFault::Stale) => self.give_up(now, GiveUp::PeerGone, limits, out),
            Err(PeerFault::Refused) => self.give_up(now, GiveUp::PeerUnreachable, limits, out),
            Err(PeerFault::Ended) => self.give_up(now, GiveUp::PeerEnded, limits, out),
        }
    }

    fn status_answered(
        &mut self,
        now: Instant,
        answer: Result<HandoffStatus, PeerFault>,
        limits: &Limits,
        out: &mut Vec<DecodeAction>,
    ) {
        let Phase::Importing(import) = &mut self.phase else { return };
        import.polling = false;
        let pause = if import.pulling.is_some() { limits.keepalive } else { limits.poll_after };
        import.next_poll = now + pause;
        let status = match answer {
            Ok(status) => status,
            Err(PeerFault::Busy) => return,
            Err(PeerFault::Unknown) if now < import.since + limits.unknown_grace => return,
            Err(PeerFault::Unreachable) => {
                import.poll_faults += 1;
                import.next_poll = now + limits.poll_again_after;
                if import.poll_faults >= limits.poll_faults_max {
                    self.give_up(now, GiveUp::PeerUnreachable, limits, out);
                }
                return;
            }
            Err(PeerFault::Refused) => return self.give_up(now, GiveUp::PeerUnreachable, limits, out),
            Err(PeerFault::Unknown) => return self.give_up(now, GiveUp::PeerUnknown, limits, out),
            Err(PeerFault::Stale) => return self.give_up(now, GiveUp::PeerGone, limits, out),
            Err(PeerFault::Ended) => return self.give_up(now, GiveUp::PeerEnded, limits, out),
        };
        import.poll_faults = 0;
        if status.worker != self.peer.worker || status.epoch != self.peer.epoch {
            return self.give_up(now, GiveUp::PeerGone, limits, out);
        }
        if status.phase != import.peer_phase {
            import.peer_phase = status.phase;
            import.progress = now;
        }
        for ticket in status.pending {
            if ticket.worker == self.peer.worker && ticket.epoch == self.peer.epoch {
                self.ticket(now, ticket, None, limits, out);
            }
        }
    }

    /// Takes the tickets that are next in line: reads what of them is needed, confirms the rest.
    fn advance(&mut self, now: Instant, limits: &Limits, out: &mut Vec<DecodeAction>) {
        loop {
            let Phase::Importing(import) = &self.phase else { return };
            if import.pulling.is_some() {
                return;
            }
            let Some(geometry) = self.held.get(&self.next_seq).map(|held| held.ticket.geometry) else {
                return;
            };
            let mut order = PullOrder {
                pull: self.pulls,
                blocks: Vec::new(),
                geometry,
                tokens: self.upto..self.upto,
                again_after: None,
            };
            let mut seq = self.next_seq;
            while let Some(held) = self.held.get(&seq) {
                if !order.blocks.is_empty()
                    && order.blocks.len() + held.ticket.blocks.len() > limits.pull_blocks_max
                {
                    break;
                }
                let ticket = &held.ticket;
                let Some(next_index) = self.accept(ticket, order.tokens.end) else {
                    return self.give_up(now, GiveUp::Protocol, limits, out);
                };
                order.blocks.extend(ticket.blocks.iter().cloned());
                order.tokens.end = order.tokens.end.max(ticket.tokens);
                self.next_index = next_index;
                self.geometry = Some(ticket.geometry);
                if let Some(first) = &ticket.first {
                    self.first = Some(first.clone());
                }
                seq += 1;
            }
            if order.tokens.is_empty() {
                self.taken(seq, out);
                if self.finish(out) {
                    return;
                }
                continue;
            }
            return self.pull(now, order, seq, limits, out);
        }
    }

    /// Checks a ticket against those before it, which reach to token `upto`; `Some(next source block)` if it fits.
    fn accept(&self, ticket: &Ticket, upto: u32) -> Option<Option<u32>> {
        let block = ticket.geometry.block_tokens;
        if block == 0 || self.geometry.is_some_and(|g| g != ticket.geometry) {
            return None;
        }
        if ticket.tokens > self.prompt || (ticket.first.is_some() && ticket.tokens != self.prompt) {
            return None;
        }
        let Some(first) = ticket.blocks.first() else {
            return (ticket.tokens <= upto).then_some(self.next_index);
        };
        // No block twice, and none left out but those whose tokens are in place already.
        if self.next_index.is_some_and(|next| first.index < next) || first.index > upto / block {
            return None;
        }
        let follow = ticket.blocks.iter().zip(first.index..).all(|(b, index)| b.index == index);
        let end = first.index.checked_add(u32::try_from(ticket.blocks.len()).ok()?)?;
        let covered = end.checked_mul(block).is_none_or(|tokens| ticket.tokens <= tokens);
        (follow && covered).then_some(Some(end))
    }

    /// Confirms the tickets below `seq`.
    fn taken(&mut self, seq: u32, out: &mut Vec<DecodeAction>) {
        let rest = self.held.split_off(&seq);
        let taken = std::mem::replace(&mut self.held, rest);
        self.next_seq = seq;
        let waiters = taken.into_values().flat_map(|held| held.waiters);
        let answer = Answer::Ack(TicketAck::Taken);
        out.extend(waiters.map(|waiter| DecodeAction::Answer { waiter, answer }));
    }

    /// Starts decoding if nothing is missing.
    fn finish(&mut self, out: &mut Vec<DecodeAction>) -> bool {
        if self.upto < self.prompt {
            return false;
        }
        let Some(first) = self.first.take() else { return false };
        debug_assert!(matches!(&self.phase, Phase::Importing(i) if i.pulling.is_none()));
        self.phase = Phase::Ended(DecodeEnd::Imported);
        out.push(DecodeAction::StartDecode { first, report: self.report });
        self.taken(u32::MAX, out);
        true
    }

    fn pulled(&mut self, now: Instant, done: Pulled, limits: &Limits, out: &mut Vec<DecodeAction>) {
        let Pulled { pull, upto, bytes, fault } = done;
        match &mut self.phase {
            Phase::Aborting { pull: awaited, why, .. } if *awaited == pull => {
                let why = *why;
                self.verified(now, upto, bytes, out);
                self.prefill_locally(why, out);
            }
            Phase::Fencing { pull: awaited } if *awaited == pull => {
                out.push(DecodeAction::Fence);
                self.phase = Phase::Ended(DecodeEnd::Cancelled);
            }
            Phase::Importing(import) => {
                let Some(mut pulling) = import.pulling.take_if(|p| p.pull == pull) else { return };
                import.progress = now;
                import.next_poll = now + limits.poll_after;
                self.verified(now, upto, bytes, out);
                match fault {
                    None if self.upto < pulling.order.tokens.end => {
                        self.give_up(now, GiveUp::Protocol, limits, out);
                    }
                    None if self.first.is_some() && self.upto == self.prompt => {
                        self.finish(out);
                    }
                    None => {
                        self.taken(pulling.next_seq, out);
                        self.advance(now, limits, out);
                    }
                    Some(fault @ (PullFault::Integrity | PullFault::Link))
                        if pulling.order.again_after.is_none() =>
                    {
                        pulling.order.again_after = Some(fault);
                        pulling.order.tokens.start = self.upto;
                        self.pull(now, pulling.order, pulling.next_seq, limits, out);
                    }
                    Some(fault) => self.give_up(now, why_of(fault), limits, out),
                }
            }
            _ => {}
        }
    }

    /// Orders a read; the tickets below `next_seq` are taken when it is good.
    fn pull(
        &mut self,
        now: Instant,
        mut order: PullOrder,
        next_seq: u32,
        limits: &Limits,
        out: &mut Vec<DecodeAction>,
    ) {
        let Phase::Importing(import) = &mut self.phase else { return };
        order.pull = self.pulls;
        self.pulls += 1;
        let lowest = order.tokens.start / order.geometry.block_tokens;
        order.blocks.retain(|block| block.index >= lowest);
        import.next_poll = now + limits.keepalive;
        import.pulling = Some(Pulling { pull: order.pull, next_seq, order: order.clone() });
        out.push(DecodeAction::Pull(order));
    }

    fn verified(&mut self, now: Instant, upto: u32, bytes: u64, out: &mut Vec<DecodeAction>) {
        debug_assert!(upto <= self.prompt);
        self.report.bytes += bytes;
        if upto <= self.upto {
            return;
        }
        self.report.tokens += upto - self.upto;
        self.report.tail = now.saturating_duration_since(self.last_ticket_at);
        self.upto = upto;
        out.push(DecodeAction::Imported { upto });
    }

    fn give_up(&mut self, now: Instant, why: GiveUp, limits: &Limits, out: &mut Vec<DecodeAction>) {
        match &mut self.phase {
            Phase::Queued { lost } => {
                if lost.is_none() {
                    *lost = Some(why);
                    self.abandon(why, out);
                }
            }
            Phase::Importing(import) => {
                let pulling = import.pulling.take();
                self.abandon(why, out);
                match pulling {
                    None => self.prefill_locally(why, out),
                    Some(Pulling { pull, .. }) => {
                        out.push(DecodeAction::AbortPull { pull });
                        let until = now + limits.abort_max;
                        self.phase = Phase::Aborting { pull, why, until };
                    }
                }
            }
            Phase::Aborting { .. } | Phase::Fencing { .. } | Phase::Ended(_) => {}
        }
    }

    fn prefill_locally(&mut self, why: GiveUp, out: &mut Vec<DecodeAction>) {
        out.push(DecodeAction::PrefillLocally { why, report: self.report });
        self.phase = Phase::Ended(DecodeEnd::Local(why));
    }

    /// Tells everybody who waits, and the peer, that no more is taken.
    fn abandon(&mut self, why: GiveUp, out: &mut Vec<DecodeAction>) {
        let waiters = std::mem::take(&mut self.held).into_values().flat_map(|held| held.waiters);
        let answer = Answer::Ack(TicketAck::Abandoned);
        out.extend(waiters.map(|waiter| DecodeAction::Answer { waiter, answer }));
        if why.peer_may_hold() {
            out.push(DecodeAction::DeleteAtPeer);
        }
    }

    fn cancel(&mut self, out: &mut Vec<DecodeAction>) {
        let pull = match &mut self.phase {
            Phase::Fencing { .. } | Phase::Ended(DecodeEnd::Cancelled) => return,
            Phase::Ended(_) => {
                out.push(DecodeAction::CancelEngine { writers: Writers::Gone });
                return;
            }
            Phase::Queued { .. } => None,
            Phase::Importing(import) => import.pulling.take().map(|p| p.pull),
            Phase::Aborting { pull, .. } => Some(*pull),
        };
        // The peer was told already when the handoff was given up; telling it twice does no harm.
        self.abandon(GiveUp::Deleted, out);
        match pull {
            None => {
                out.push(DecodeAction::CancelEngine { writers: Writers::Gone });
                self.phase = Phase::Ended(DecodeEnd::Cancelled);
            }
            Some(pull) => {
                out.push(DecodeAction::CancelEngine { writers: Writers::MayWrite });
                out.push(DecodeAction::AbortPull { pull });
                self.phase = Phase::Fencing { pull };
            }
        }
    }

    fn tick(&mut self, now: Instant, limits: &Limits, out: &mut Vec<DecodeAction>) {
        match &mut self.phase {
            Phase::Importing(import) => {
                if now >= import.since + limits.import_max
                    || (import.pulling.is_none() && now >= import.progress + limits.stall)
                {
                    return self.give_up(now, GiveUp::Stalled, limits, out);
                }
                if now >= import.next_poll && !import.polling {
                    import.polling = true;
                    out.push(DecodeAction::PollStatus);
                }
            }
            Phase::Aborting { pull, until, .. } if now >= *until => {
                // The blocks can be neither used nor freed: the request goes on elsewhere, they wait for the fence.
                let pull = *pull;
                out.push(DecodeAction::Fail);
                out.push(DecodeAction::CancelEngine { writers: Writers::MayWrite });
                self.phase = Phase::Fencing { pull };
            }
            _ => {}
        }
    }
}

fn reply(waiter: Option<Waiter>, answer: Answer, out: &mut Vec<DecodeAction>) {
    out.extend(waiter.map(|waiter| DecodeAction::Answer { waiter, answer }));
}

fn why_of(fault: PullFault) -> GiveUp {
    match fault {
        PullFault::Integrity => GiveUp::Integrity,
        PullFault::Link | PullFault::Aborted => GiveUp::Link,
        PullFault::Stale => GiveUp::PeerGone,
        PullFault::Refused => GiveUp::Refused,
        PullFault::Deadline => GiveUp::Deadline,
        PullFault::Geometry => GiveUp::Geometry,
    }
}

#[cfg(test)]
mod tests;
