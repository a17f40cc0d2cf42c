//! All handoffs of one worker: finds the one a message is for, checks epochs, parks what comes too early.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use baton_config::protocol::{HandoffOutcome, HandoffStatus, PeerRef, Ticket, TicketAck, Want};
use baton_config::{Epoch, HandoffId, KvGeometry, WorkerId};

use super::decode::{DecodeEnd, Writers};
use super::parking::{Ended, Parking};
use super::{
    Answer, Decode, DecodeAction, DecodeEvent, Limits, Prefill, PrefillAction, PrefillEvent, Side, Waiter,
};

/// What the driver is to do, and for which handoff.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// On the prefill side of a handoff.
    Prefill(HandoffId, PrefillAction),
    /// On the decode side of a handoff.
    Decode(HandoffId, DecodeAction),
    /// Answer a message that no handoff took.
    Answer {
        /// Who waits.
        waiter: Waiter,
        /// The answer.
        answer: Answer,
    },
    /// The prefill side is over and forgotten.
    PrefillEnded(HandoffId, HandoffOutcome),
    /// The decode side is over; its request goes on in the engine unless it was cancelled.
    DecodeEnded(HandoffId, DecodeEnd),
}

/// A handoff to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    /// Its id.
    pub id: HandoffId,
    /// The life of this worker the request is for.
    pub own_epoch: Epoch,
    /// The other side.
    pub peer: PeerRef,
    /// Tokens of the prompt.
    pub prompt: u32,
}

/// Why a handoff was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The request is for another life of this worker.
    #[error("the request is for epoch {asked}, this worker is in epoch {}", .current.map_or_else(|| "none".to_owned(), |e| e.to_string()))]
    Stale {
        /// Epoch in the request.
        asked: Epoch,
        /// The live one.
        current: Option<Epoch>,
    },
    /// A handoff with this id is open here.
    #[error("a handoff with this id is already open")]
    Duplicate,
    /// A handoff with this id was cancelled or has ended here.
    #[error("the handoff has already ended")]
    Ended,
    /// Both sides are the same worker.
    #[error("a worker can not hand over to itself")]
    Itself,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Prefill(HandoffOutcome),
    Decode(DecodeEnd),
    /// Deleted before its request arrived.
    DeletedEarly,
}

#[derive(Debug)]
enum Parked {
    Ticket(Ticket, Waiter),
    Want(Want, Waiter),
}

impl Parked {
    fn waiter(&self) -> Waiter {
        match self {
            Self::Ticket(_, waiter) | Self::Want(_, waiter) => *waiter,
        }
    }
}

/// The handoffs of one worker. What is gone through is in the order of the ids: the same events have the same consequences.
#[derive(Debug)]
pub struct Desk {
    own: WorkerId,
    epoch: Option<Epoch>,
    limits: Limits,
    prefills: BTreeMap<HandoffId, Prefill>,
    decodes: BTreeMap<HandoffId, Decode>,
    parked_tickets: Parking<Parked>,
    parked_wants: Parking<Parked>,
    ended: Ended<End>,
    timers: BTreeSet<(Instant, Side, HandoffId)>,
    timer_of: HashMap<(Side, HandoffId), Instant>,
}

impl Desk {
    /// A desk of the worker `own`, with no epoch yet.
    pub fn new(own: WorkerId, limits: Limits) -> Self {
        Self {
            own,
            epoch: None,
            prefills: BTreeMap::new(),
            decodes: BTreeMap::new(),
            parked_tickets: Parking::new(),
            parked_wants: Parking::new(),
            ended: Ended::new(&limits),
            timers: BTreeSet::new(),
            timer_of: HashMap::new(),
            limits,
        }
    }

    /// The bounds in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The life this worker is in.
    pub fn epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// Handoffs open on the prefill side: leases on blocks.
    pub fn prefills(&self) -> usize {
        self.prefills.len()
    }

    /// Handoffs open on the decode side.
    pub fn decodes(&self) -> usize {
        self.decodes.len()
    }

    /// Messages waiting for their request.
    pub fn parked(&self) -> usize {
        self.parked_tickets.len() + self.parked_wants.len()
    }

    /// When [`Self::tick`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        let machines = self.timers.first().map(|(at, _, _)| *at);
        [machines, self.parked_tickets.deadline(), self.parked_wants.deadline()].into_iter().flatten().min()
    }

    /// This worker got a new epoch: peers void all it did in the old one.
    pub fn set_epoch(&mut self, now: Instant, epoch: Epoch, out: &mut Vec<Action>) {
        if self.epoch == Some(epoch) {
            return;
        }
        self.epoch = Some(epoch);
        for id in self.prefills.keys().copied().collect::<Vec<_>>() {
            self.prefill(now, id, PrefillEvent::Cancel, out);
        }
        for id in self.decodes.keys().copied().collect::<Vec<_>>() {
            self.decode(now, id, DecodeEvent::OwnEpochChanged, out);
        }
    }

    /// The view changed: `live` says whether a worker is in it in that epoch.
    pub fn view_changed(
        &mut self,
        now: Instant,
        live: impl Fn(&WorkerId, Epoch) -> bool,
        out: &mut Vec<Action>,
    ) {
        let gone = |peer: &PeerRef| !live(&peer.worker, peer.epoch);
        let prefills: Vec<_> =
            self.prefills.iter().filter(|(_, p)| gone(p.peer())).map(|(id, _)| *id).collect();
        let decodes: Vec<_> =
            self.decodes.iter().filter(|(_, d)| gone(d.peer())).map(|(id, _)| *id).collect();
        for id in prefills {
            self.prefill(now, id, PrefillEvent::PeerGone, out);
        }
        for id in decodes {
            self.decode(now, id, DecodeEvent::PeerGone, out);
        }
    }

    /// Opens the prefill side.
    ///
    /// # Errors
    /// See [`OpenError`]; nothing is kept then.
    pub fn open_prefill(
        &mut self,
        now: Instant,
        opening: Opening,
        geometry: KvGeometry,
        out: &mut Vec<Action>,
    ) -> Result<(), OpenError> {
        let Opening { id, own_epoch, peer, prompt } = opening;
        self.may_open(Side::Prefill, id, own_epoch, &peer)?;
        let prefill = Prefill::new(self.own.clone(), own_epoch, peer, geometry, prompt, now);
        self.prefills.insert(id, prefill);
        self.settle(now, Side::Prefill, id, out);
        for parked in self.parked_wants.take(id) {
            if let Parked::Want(want, waiter) = parked {
                self.want(now, id, want, waiter, out);
            }
        }
        Ok(())
    }

    /// Opens the decode side.
    ///
    /// # Errors
    /// See [`OpenError`]; nothing is kept then.
    pub fn open_decode(
        &mut self,
        now: Instant,
        opening: Opening,
        out: &mut Vec<Action>,
    ) -> Result<(), OpenError> {
        let Opening { id, own_epoch, peer, prompt } = opening;
        self.may_open(Side::Decode, id, own_epoch, &peer)?;
        self.decodes.insert(id, Decode::new(peer, prompt, now));
        self.settle(now, Side::Decode, id, out);
        for parked in self.parked_tickets.take(id) {
            if let Parked::Ticket(ticket, waiter) = parked {
                self.ticket(now, id, ticket, waiter, out);
            }
        }
        Ok(())
    }

    fn may_open(&self, side: Side, id: HandoffId, asked: Epoch, peer: &PeerRef) -> Result<(), OpenError> {
        if self.epoch != Some(asked) {
            return Err(OpenError::Stale { asked, current: self.epoch });
        }
        if peer.worker == self.own {
            return Err(OpenError::Itself);
        }
        if self.prefills.contains_key(&id) || self.decodes.contains_key(&id) {
            return Err(OpenError::Duplicate);
        }
        match self.ended.get(side, id) {
            None => Ok(()),
            Some(_) => Err(OpenError::Ended),
        }
    }

    /// A ticket from a prefill worker.
    pub fn ticket(
        &mut self,
        now: Instant,
        id: HandoffId,
        ticket: Ticket,
        waiter: Waiter,
        out: &mut Vec<Action>,
    ) {
        if self.epoch != Some(ticket.to_epoch) {
            return out.push(Action::Answer { waiter, answer: Answer::Stale { current: self.epoch } });
        }
        if let Some(decode) = self.decodes.get(&id) {
            let answer = match decode.peer() {
                peer if peer.worker != ticket.worker => {
                    Answer::Malformed("the ticket is from another worker")
                }
                peer if peer.epoch != ticket.epoch => Answer::Stale { current: self.epoch },
                _ => {
                    let event = DecodeEvent::Ticket { ticket, waiter: Some(waiter) };
                    return self.decode(now, id, event, out);
                }
            };
            return out.push(Action::Answer { waiter, answer });
        }
        let answer = match self.ended.get(Side::Decode, id) {
            Some(End::Decode(DecodeEnd::Imported)) => Answer::Ack(TicketAck::Taken),
            Some(_) => Answer::Ack(TicketAck::Abandoned),
            None => {
                let until = now + self.limits.parked_for;
                match self.parked_tickets.park(id, Parked::Ticket(ticket, waiter), until, &self.limits) {
                    Ok(()) => return,
                    Err(_) => Answer::Busy,
                }
            }
        };
        out.push(Action::Answer { waiter, answer });
    }

    /// A want from a decode worker.
    pub fn want(&mut self, now: Instant, id: HandoffId, want: Want, waiter: Waiter, out: &mut Vec<Action>) {
        if self.epoch != Some(want.to_epoch) {
            return out.push(Action::Answer { waiter, answer: Answer::Stale { current: self.epoch } });
        }
        let answer = if let Some(prefill) = self.prefills.get(&id) {
            match prefill.peer() {
                peer if peer.worker != want.worker => Answer::Malformed("the want is from another worker"),
                peer if peer.epoch != want.epoch => Answer::Stale { current: self.epoch },
                _ => {
                    self.prefill(now, id, PrefillEvent::Want { from_token: want.from_token }, out);
                    Answer::Noted
                }
            }
        } else if self.ended.get(Side::Prefill, id).is_some() {
            Answer::Ended
        } else {
            let until = now + self.limits.parked_for;
            match self.parked_wants.park(id, Parked::Want(want, waiter), until, &self.limits) {
                Ok(()) => return,
                Err(_) => Answer::Busy,
            }
        };
        out.push(Action::Answer { waiter, answer });
    }

    /// The state of a handoff, and contact from the peer if it is open on the prefill side.
    ///
    /// # Errors
    /// [`Answer::Unknown`] or [`Answer::Ended`].
    pub fn status(
        &mut self,
        now: Instant,
        id: HandoffId,
        out: &mut Vec<Action>,
    ) -> Result<HandoffStatus, Answer> {
        let epoch = self.epoch.ok_or(Answer::Unknown)?;
        let (phase, pending) = if self.prefills.contains_key(&id) {
            self.prefill(now, id, PrefillEvent::Asked, out);
            self.prefills.get(&id).map(|p| (p.phase(), p.pending())).ok_or(Answer::Ended)?
        } else if let Some(decode) = self.decodes.get(&id) {
            (decode.phase(), Vec::new())
        } else if self.ended.get(Side::Prefill, id).is_some() || self.ended.get(Side::Decode, id).is_some() {
            return Err(Answer::Ended);
        } else {
            return Err(Answer::Unknown);
        };
        Ok(HandoffStatus { worker: self.own.clone(), epoch, phase, pending })
    }

    /// Ends the handoff whichever side this is; remembered if its request has not arrived yet.
    ///
    /// On the decode side the request itself goes on, with a prefill of its own.
    pub fn delete(&mut self, now: Instant, id: HandoffId, out: &mut Vec<Action>) {
        let open = self.prefills.contains_key(&id) || self.decodes.contains_key(&id);
        self.prefill(now, id, PrefillEvent::Cancel, out);
        self.decode(now, id, DecodeEvent::Deleted, out);
        if open {
            return;
        }
        for (side, parked) in [
            (Side::Prefill, self.parked_wants.take(id).collect::<Vec<_>>()),
            (Side::Decode, self.parked_tickets.take(id).collect()),
        ] {
            if self.ended.get(side, id).is_none() {
                self.ended.insert(now, side, id, End::DeletedEarly);
            }
            let answer = match side {
                Side::Prefill => Answer::Ended,
                Side::Decode => Answer::Ack(TicketAck::Abandoned),
            };
            out.extend(parked.into_iter().map(|p| Action::Answer { waiter: p.waiter(), answer }));
        }
    }

    /// The request of a decode side is over: its client left, or its engine failed.
    ///
    /// Also right when the handoff itself has ended: the engine then gets its cancel from here.
    pub fn close_decode(&mut self, now: Instant, id: HandoffId, out: &mut Vec<Action>) {
        if self.decodes.contains_key(&id) {
            self.decode(now, id, DecodeEvent::Cancel, out);
        } else {
            out.push(Action::Decode(id, DecodeAction::CancelEngine { writers: Writers::Gone }));
        }
    }

    /// An event of one prefill side; ignored when it has ended.
    pub fn prefill(&mut self, now: Instant, id: HandoffId, event: PrefillEvent, out: &mut Vec<Action>) {
        let Some(prefill) = self.prefills.get_mut(&id) else { return };
        let mut actions = Vec::new();
        prefill.handle(now, event, &self.limits, &mut actions);
        out.extend(actions.into_iter().map(|action| Action::Prefill(id, action)));
        self.settle(now, Side::Prefill, id, out);
    }

    /// An event of one decode side; ignored when it has ended.
    pub fn decode(&mut self, now: Instant, id: HandoffId, event: DecodeEvent, out: &mut Vec<Action>) {
        let Some(decode) = self.decodes.get_mut(&id) else { return };
        let mut actions = Vec::new();
        decode.handle(now, event, &self.limits, &mut actions);
        out.extend(actions.into_iter().map(|action| Action::Decode(id, action)));
        self.settle(now, Side::Decode, id, out);
    }

    /// The engine computes nothing, and has had no room for those who wait for a while: ends one wait for a peer.
    ///
    /// First that of the oldest import for which nothing has come: the engine computes its prompt. Where there is none, but
    /// imports wait for room, the largest export that its peer has no room for gives up its blocks: the peer might wait
    /// for just those imports.
    pub fn blocked(&mut self, now: Instant, out: &mut Vec<Action>) {
        let imports = self.decodes.iter().filter_map(|(id, decode)| Some((decode.waits_since()?, *id)));
        if let Some((_, id)) = imports.min() {
            return self.decode(now, id, DecodeEvent::Blocked, out);
        }
        let exports =
            self.prefills.iter().filter_map(|(id, prefill)| Some((prefill.unwanted_tokens()?, *id)));
        if let Some((_, id)) = exports.max()
            && self.decodes.values().any(Decode::is_queued)
        {
            self.prefill(now, id, PrefillEvent::Cancel, out);
        }
    }

    /// Runs every timer that is due.
    pub fn tick(&mut self, now: Instant, out: &mut Vec<Action>) {
        let expired = self.parked_tickets.expire(now).into_iter().chain(self.parked_wants.expire(now));
        out.extend(expired.map(|p| Action::Answer { waiter: p.waiter(), answer: Answer::Unknown }));
        let due: Vec<_> = self.timers.iter().take_while(|(at, _, _)| *at <= now).copied().collect();
        for (_, side, id) in due {
            match side {
                Side::Prefill => self.prefill(now, id, PrefillEvent::Tick, out),
                Side::Decode => self.decode(now, id, DecodeEvent::Tick, out),
            }
        }
    }

    /// After any event: forgets a handoff that ended, sets the timer of one that did not.
    fn settle(&mut self, now: Instant, side: Side, id: HandoffId, out: &mut Vec<Action>) {
        let deadline = match side {
            Side::Prefill => {
                let Some(prefill) = self.prefills.get(&id) else { return };
                if let Some(outcome) = prefill.ended() {
                    self.prefills.remove(&id);
                    self.ended.insert(now, side, id, End::Prefill(outcome));
                    out.push(Action::PrefillEnded(id, outcome));
                    None
                } else {
                    prefill.deadline(&self.limits)
                }
            }
            Side::Decode => {
                let Some(decode) = self.decodes.get(&id) else { return };
                if let Some(end) = decode.ended() {
                    self.decodes.remove(&id);
                    self.ended.insert(now, side, id, End::Decode(end));
                    out.push(Action::DecodeEnded(id, end));
                    None
                } else {
                    decode.deadline(&self.limits)
                }
            }
        };
        if let Some(old) = self.timer_of.remove(&(side, id)) {
            self.timers.remove(&(old, side, id));
        }
        if let Some(at) = deadline {
            self.timers.insert((at, side, id));
            self.timer_of.insert((side, id), at);
        }
    }
}

#[cfg(test)]
mod tests;
