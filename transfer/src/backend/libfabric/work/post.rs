//! Posting: ranges checked, operations cut where registrations are, rails chosen.

use baton_libfabric_sys::Errno;
use baton_libfabric_sys::abi::FI_ADDR_UNSPEC;

use super::super::blob::Key;
use super::super::object::{Call, CallPiece, Verb};
use super::super::register::Registration;
use super::{Kind, LibfabricDriver, Owner, Part, Peer, Waiting};
use crate::backend::fabric::driver::{LocalId, LocalRange, PeerId, Piece, PostError};

/// Most operations that wait for the connection to a new peer.
const UNCONNECTED_MAX: usize = 64;

/// An operation of a peer's memory, in parts that lie in one piece of either registration each.
struct Span<'a> {
    registration: &'a Registration,
    range: LocalRange,
    key: &'a Key,
    offset: u64,
    verb: Verb,
}

impl Span<'_> {
    /// Adds its parts to `parts`, of which each may have `most` pieces.
    fn add(&self, peer: &Peer, parts: &mut Vec<(usize, Call)>, most: usize) -> Result<(), PostError> {
        let end = self.offset.checked_add(self.range.len as u64).ok_or(PostError::Range)?;
        if end > self.key.len {
            return Err(PostError::Range);
        }
        let mut done = 0;
        while done < self.range.len {
            let (here, there) = (self.range.offset + done, self.offset + done as u64);
            let piece = self.registration.left_in_segment(here);
            let their_piece = self.key.segment - there % self.key.segment;
            let len =
                (self.range.len - done).min(piece).min(usize::try_from(their_piece).unwrap_or(usize::MAX));
            // Whole operations go to the rail with the least to do; the parts of one share it.
            let rail = peer.least_loaded();
            let via = &peer.rails[rail];
            let piece = CallPiece {
                local: self.registration.span.address() + here,
                len,
                descriptor: self.registration.descriptor(rail, here),
                remote: self.key.address(there),
                key: self.key.of(via.leads_to, there),
            };
            if !parts.last_mut().is_some_and(|(_, call)| call.push(piece, most)) {
                parts.push((rail, Call::new(self.verb, via.to, piece)));
            }
            done += len;
        }
        Ok(())
    }
}

impl LibfabricDriver {
    pub(super) fn one_sided(
        &mut self,
        peer: PeerId,
        pieces: &[Piece],
        (verb, op): (Verb, u64),
    ) -> Result<(), PostError> {
        let state = self.peer(peer)?;
        if verb == Verb::Write && !self.info.write {
            return Err(PostError::Failed("this provider is not used for writes".to_owned()));
        }
        let first = pieces.first().ok_or(PostError::Range)?.local.id;
        let total = pieces.iter().try_fold(0usize, |sum, piece| sum.checked_add(piece.local.len));
        if total.is_none_or(|total| total > self.info.op_max) {
            return Err(PostError::Range);
        }
        let mut parts = Vec::with_capacity(1);
        for Piece { remote, offset, local } in pieces {
            let registration = self.local(*local, self.info.op_max)?;
            let key = state.remotes.get(&remote.0).filter(|_| local.id == first).ok_or(PostError::Range)?;
            let span = Span { registration, range: *local, key, offset: *offset, verb };
            span.add(state, &mut parts, self.pieces_max)?;
        }
        self.post(peer, first, op, &parts)
    }

    /// Awaits a message at the first rail, where all of them arrive.
    pub(in super::super) fn post_receive(
        &mut self,
        tag: u64,
        to: LocalRange,
        op: u64,
        kind: Kind,
    ) -> Result<u32, PostError> {
        let call = self.message(Verb::Receive, tag, to, FI_ADDR_UNSPEC)?;
        let at = self.begin(op, 1, to.id, kind);
        let part = Part { op: at, owner: Owner::Passive, rail: 0, len: to.len };
        let Some(slot) = self.slots.take(part) else {
            self.unbegin(at);
            return Err(PostError::Again);
        };
        match self.rails[0].passive.post(&call, self.slots.context(slot)) {
            Ok(()) => Ok(slot),
            Err(errno) => {
                self.slots.give_back(slot);
                self.unbegin(at);
                let reason = self.strerror(errno);
                Err(if errno == Errno::AGAIN { PostError::Again } else { PostError::Failed(reason) })
            }
        }
    }

    /// Asks for the end of a receive.
    pub(in super::super) fn cancel(&self, slot: u32) {
        if let Some(rail) = self.rails.first() {
            rail.passive.cancel(self.slots.context(slot));
        }
    }

    #[cfg(test)]
    pub(in super::super) fn slots_in_use(&self) -> usize {
        self.slots.matching(|_| true).len() - self.requests.posted()
    }

    /// Whether a slot is that of a sink.
    pub(in super::super) fn is_sink(&self, slot: u32) -> bool {
        let op = self.slots.get(slot).and_then(|part| self.ops.get(part.op as usize));
        matches!(op, Some(Some(op)) if op.kind == Kind::Sink)
    }

    /// The one call of a message, which has to lie in one piece of its registration.
    pub(super) fn message(
        &self,
        verb: Verb,
        tag: u64,
        range: LocalRange,
        to: u64,
    ) -> Result<Call, PostError> {
        let registration = self.local(range, self.info.message_max)?;
        if range.len > registration.left_in_segment(range.offset) {
            return Err(PostError::Range);
        }
        let piece = CallPiece {
            local: registration.span.address() + range.offset,
            len: range.len,
            descriptor: registration.descriptor(0, range.offset),
            remote: 0,
            key: tag,
        };
        Ok(Call::new(verb, to, piece))
    }
}

impl LibfabricDriver {
    /// Posts the parts of an operation to a peer: all of them, now or once the connection is there, or none.
    pub(super) fn post(
        &mut self,
        peer: PeerId,
        local: LocalId,
        op: u64,
        parts: &[(usize, Call)],
    ) -> Result<(), PostError> {
        if self.slots.available() < parts.len() {
            return Err(PostError::Again);
        }
        let Some(state) = self.peers.get(&peer.0) else {
            return Err(PostError::Failed("the peer is not connected".to_owned()));
        };
        if !state.waiting.is_empty() && (state.established || state.waiting.len() >= UNCONNECTED_MAX) {
            return Err(PostError::Again);
        }
        let at = self.begin(op, parts.len(), local, Kind::ToPeer);
        for (number, (rail, call)) in parts.iter().enumerate() {
            let part = Part { op: at, owner: Owner::Peer(peer.0), rail: *rail, len: call.len() };
            let slot = self.slots.take(part);
            let (Some(slot), Some(state)) = (slot, self.peers.get_mut(&peer.0)) else { continue };
            let posted = match state.waiting.is_empty() {
                true => state.rails[*rail].endpoint.post(call, self.slots.context(slot)),
                false => Err(Errno::AGAIN),
            };
            let waits = posted == Err(Errno::AGAIN) && (number > 0 || !state.established);
            if posted.is_ok() || waits {
                state.outstanding += 1;
                state.rails[*rail].outstanding_bytes += call.len();
                if waits {
                    state.waiting.push_back(Waiting { slot, rail: *rail, call: *call });
                }
                continue;
            }
            self.slots.give_back(slot);
            let Err(errno) = posted else { continue };
            if number == 0 {
                self.unbegin(at);
                return Err(self.refused(peer, errno));
            }
            // The parts before are under way: the operation is reported, as failed, when they have ended.
            let reason = self.strerror(errno);
            self.fail_peer(peer.0, &reason);
            for _ in number..parts.len() {
                self.end_part(at, Err(reason.clone()));
            }
            break;
        }
        Ok(())
    }

    /// What a refusal of the library means.
    fn refused(&mut self, peer: PeerId, errno: Errno) -> PostError {
        if errno == Errno::AGAIN {
            return PostError::Again;
        }
        let reason = self.strerror(errno);
        self.fail_peer(peer.0, &reason);
        PostError::Failed(reason)
    }

    /// Posts what waited for its connection.
    pub(super) fn post_waiting(&mut self) {
        let waiting = self.peers.iter().filter(|(_, peer)| !peer.waiting.is_empty()).map(|(id, _)| *id);
        for id in waiting.collect::<Vec<_>>() {
            self.post_waiting_of(id);
        }
    }

    fn post_waiting_of(&mut self, id: u32) {
        while let Some(peer) = self.peers.get_mut(&id)
            && let Some(next) = peer.waiting.front()
        {
            let context = self.slots.context(next.slot);
            match peer.rails[next.rail].endpoint.post(&next.call, context) {
                Ok(()) => drop(peer.waiting.pop_front()),
                Err(Errno::AGAIN) => return,
                Err(errno) => {
                    let reason = self.strerror(errno);
                    self.fail_peer(id, &reason);
                    return;
                }
            }
        }
    }
}
