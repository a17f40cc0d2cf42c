//! Posts what the bounds let through.

use std::sync::Arc;

use super::Progress;
use super::job::Op;
use crate::backend::fabric::batch::{Batch, Transfer, Verb};
use crate::backend::fabric::driver::{Driver, LocalRange, PeerId, Piece, PostError};
use crate::backend::fabric::window::Part;

/// Operations of one peer posted before the next peer's turn.
const TURN_OPS: usize = 16;

impl<D: Driver + ?Sized> Progress<D> {
    /// Posts what the bounds let through; whether anything was.
    pub(super) fn post(&mut self) -> bool {
        self.full = false;
        let mut any = self.post_receives();
        for _ in 0..self.ready.len() {
            let Some(key) = self.ready.pop_front() else { break };
            any |= self.post_to(key);
            let Some(peer) = self.peers.get_mut(key) else { continue };
            peer.is_ready = peer.window.next().is_some();
            if peer.is_ready {
                self.ready.push_back(key);
            }
        }
        any
    }

    fn post_receives(&mut self) -> bool {
        let mut any = false;
        while let Some((key, transfer)) = self.receives.front().copied() {
            let Some(job) = self.jobs.get_mut(key) else {
                self.receives.pop_front();
                continue;
            };
            let to = job.batch.transfer(transfer);
            let Verb::Receive { tag } = to.verb else { unreachable!("a batch is of one verb") };
            let op = self.ops.insert(Op { job: key, peer: None, transfer, count: 1, len: to.local.len });
            match self.driver().receive(tag, to.local, op) {
                Ok(()) => {
                    self.receives.pop_front();
                    self.count_posted(key);
                    any = true;
                }
                Err(error) => {
                    self.ops.remove(op);
                    if error == PostError::Again {
                        self.full = true;
                        break;
                    }
                    self.receives.pop_front();
                    self.give_up(key, &error.to_string().into());
                }
            }
        }
        any
    }

    fn post_to(&mut self, key: u64) -> bool {
        for posted in 0..TURN_OPS {
            let Some(peer) = self.peers.get_mut(key) else { return posted > 0 };
            let id = peer.id;
            let Some((posting, part)) = peer.window.next() else { return posted > 0 };
            let (job, batch) = (posting.job, Arc::clone(&posting.batch));
            let Part { transfer, count, len, .. } = part;
            let op = self.ops.insert(Op { job, peer: Some(key), transfer, count, len });
            match self.post_one(id, &batch, part, op) {
                Ok(()) => {
                    if let Some(peer) = self.peers.get_mut(key) {
                        peer.window.posted();
                    }
                    self.count_posted(job);
                }
                Err(error) => {
                    self.ops.remove(op);
                    match error {
                        PostError::Again => self.full = true,
                        PostError::Range => self.give_up(job, &error.to_string().into()),
                        PostError::Failed(why) => self.sever(key, &why.into()),
                    }
                    return posted > 0;
                }
            }
        }
        true
    }

    fn post_one(&mut self, peer: PeerId, batch: &Batch, part: Part, op: u64) -> Result<(), PostError> {
        let first = batch.transfer(part.transfer);
        match first.verb {
            Verb::Send { tag } => return self.driver().send(peer, tag, first.local, op),
            Verb::Ask => return self.driver().ask(peer, first.local, op),
            Verb::Read { .. } | Verb::Write { .. } | Verb::Receive { .. } => {}
        }
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        for at in part.transfer..part.transfer + part.count {
            let Transfer { verb, local } = batch.transfer(at);
            let (Verb::Read { remote, offset } | Verb::Write { remote, offset }) = verb else { break };
            let len = if part.count > 1 { local.len } else { part.len };
            let local = LocalRange { offset: local.offset + part.offset, len, ..local };
            pieces.push(Piece { remote, offset: offset + part.offset as u64, local });
        }
        let posted = match first.verb {
            Verb::Read { .. } => self.driver().read_pieces(peer, &pieces, op),
            Verb::Write { .. } => self.driver().write_pieces(peer, &pieces, op),
            Verb::Send { .. } | Verb::Receive { .. } | Verb::Ask => Err(PostError::Range),
        };
        self.pieces = pieces;
        posted
    }

    fn count_posted(&mut self, job: u64) {
        self.unarmed = true;
        let Some(job) = self.jobs.get_mut(job) else { return };
        job.posted += 1;
        if !job.batch.receives() {
            return;
        }
        match job.ask.take() {
            Some(ask) => drop(self.submit(ask)),
            None => job.batch.note_posted(),
        }
    }
}
