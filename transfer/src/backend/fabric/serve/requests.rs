//! Requests that come over a fabric itself: answered on its progress thread where nothing has to be waited for.
//!
//! ```text
//! reader                                             owner
//! Attach ───────────── control connection ───────►   a ticket, random, for as long as that connection lasts
//! ticket, Pack or Confirm, tag ═══ fabric ════════►   ticket ─► peer; epoch, grant; gather
//! tag ◄═══════════════════════════ fabric ═════════   head, blocks
//! ```
//!
//! Who knows no ticket gets no answer. What cannot be done at once (memory of a device, no free buffer) is left to a
//! task; there are at most so many of them for a peer, and more is refused.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use baton_config::Epoch;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Outlet, Room, all_host, copy_blocks, gather};
use crate::agent::BackendKind;
use crate::agent::server::{Denial, Life, Server};
use crate::backend::control::Peer;
use crate::backend::fabric::batch::Batch;
use crate::backend::fabric::fabrics::Answer;
use crate::backend::fabric::thread::{self, Fabric};
use crate::error::Refusal;
use crate::wire::ask::{Ask, answer_head};
use crate::wire::{Kind, Read};

/// Most requests of one peer that tasks answer at once: more than it has places for.
pub(super) const LATER_MAX: usize = 64;

/// Who sends requests, by ticket.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<HashMap<u128, Weak<Peer>>>);

impl Tickets {
    fn lock(&self) -> MutexGuard<'_, HashMap<u128, Weak<Peer>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has requests with `number` answered to `peer`, as long as the ticket lives.
    pub(super) fn give(self: &Arc<Self>, number: u128, peer: &Arc<Peer>) -> Ticket {
        self.lock().insert(number, Arc::downgrade(peer));
        Ticket { of: Arc::clone(self), number }
    }

    fn find(&self, number: u128) -> Option<Arc<Peer>> {
        self.lock().get(&number)?.upgrade()
    }
}

/// The right to send requests.
pub(super) struct Ticket {
    of: Arc<Tickets>,
    number: u128,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.of.lock().remove(&self.number);
    }
}

/// What answers peers' requests to `server`. It is called on progress threads; tasks run where this was called.
pub(crate) fn answering(server: &Arc<Server>) -> Arc<Answer> {
    let (server, runtime) = (Arc::downgrade(server), Handle::current());
    Arc::new(move |kind, request| answer(&server.upgrade()?, &runtime, kind, request))
}

fn answer(server: &Arc<Server>, runtime: &Handle, kind: BackendKind, request: &[u8]) -> Option<Arc<Batch>> {
    let ask = match Ask::decode(request) {
        Ok(ask) => ask,
        Err(error) => {
            server.counters.broken(error);
            return None;
        }
    };
    let peer = server.tickets.find(ask.ticket).filter(|_| ask.pack.backend == kind);
    let Some(peer) = peer else {
        server.counters.auth_refused();
        return None;
    };
    let request = Request::new(server, &peer, kind, ask)?;
    request.answer_now().or_else(|| match Arc::clone(&request.later).try_acquire_owned() {
        Ok(room) => {
            server.tasks.spawn_on(request.answer_later(room), runtime);
            None
        }
        Err(_) => request.refuse(Denial::Refused(Refusal::Overloaded)),
    })
}

/// A request and all that its answer takes.
struct Request {
    server: Arc<Server>,
    fabric: Fabric,
    to: thread::Peer,
    life: Life,
    sending: Outlet,
    answers: Outlet,
    later: Arc<Semaphore>,
    kind: Kind,
    epoch: Epoch,
    tag: u64,
    read: Read,
}

impl Request {
    fn new(server: &Arc<Server>, peer: &Arc<Peer>, kind: BackendKind, ask: Ask) -> Option<Self> {
        let fabric = server.fabrics.get(kind)?;
        let attached = peer.fabric.lock();
        let attachment = attached.get(&kind)?;
        Some(Self {
            server: Arc::clone(server),
            fabric,
            to: attachment.peer.clone(),
            life: peer.life.clone(),
            sending: attachment.sending.clone(),
            answers: attachment.answers.clone(),
            later: Arc::clone(&attachment.later),
            kind: ask.kind,
            epoch: ask.epoch,
            tag: ask.pack.tag,
            read: ask.pack.read,
        })
    }

    fn is_stale(&self) -> bool {
        self.epoch != self.life.epoch || self.life.ended.is_cancelled()
    }

    /// The answer, if there is nothing to wait for.
    fn answer_now(&self) -> Option<Arc<Batch>> {
        if self.is_stale() {
            return self.refuse(Denial::Stale);
        }
        let (regions, handoff) = (self.server.regions(), self.read.handoff);
        let len: usize = self.read.blocks.iter().map(|block| block.len as usize).sum();
        let packs = self.kind == Kind::Pack;
        if packs && len > self.fabric.pack_max() {
            return self.refuse(Denial::Refused(Refusal::TooLarge));
        }
        if packs && !all_host(&regions, &self.read) {
            return None;
        }
        let room = if packs { self.sending.try_take() } else { self.answers.try_take() }?;
        let _permit = match self.server.permit(&regions, handoff, &self.read.blocks) {
            Ok(permit) => permit,
            Err(denial) => return self.refuse(denial),
        };
        if !packs {
            return Some(self.confirmed(room));
        }
        match copy_blocks(&regions, &self.read, &room.slot) {
            Ok(()) => {
                self.server.count_served(handoff, len as u64);
                Some(room.message(&self.to, len, (self.epoch, self.tag)))
            }
            Err(refusal) => self.refuse(Denial::Refused(refusal)),
        }
    }

    async fn answer_later(self, _room: OwnedSemaphorePermit) {
        let answer = match self.wait_for_answer().await {
            Ok(answer) => Some(answer),
            Err(denial) => self.answers.wait().await.map(|room| self.refused(room, denial)),
        };
        if let Some(answer) = answer
            && let Ok(sending) = self.fabric.submit(answer).await
        {
            sending.detach();
        }
    }

    async fn wait_for_answer(&self) -> Result<Arc<Batch>, Denial> {
        if self.is_stale() {
            return Err(Denial::Stale);
        }
        if self.kind == Kind::Pack {
            let about = (self.epoch, self.tag);
            return gather(&self.server, &self.fabric, (&self.to, &self.sending), &self.read, about).await;
        }
        let room = self.answers.wait().await.ok_or(Denial::Refused(Refusal::Overloaded))?;
        self.server.permit(&self.server.regions(), self.read.handoff, &self.read.blocks)?;
        Ok(self.confirmed(room))
    }

    fn confirmed(&self, room: Room) -> Arc<Batch> {
        room.send(&self.to, &answer_head(Kind::Confirmed, 0, self.epoch, self.tag), 0, self.tag)
    }

    /// Says no, where there is a buffer to say it in. The reader is told what it would be told on the control connection.
    fn refuse(&self, denial: Denial) -> Option<Arc<Batch>> {
        Some(self.refused(self.answers.try_take()?, denial))
    }

    fn refused(&self, room: Room, denial: Denial) -> Arc<Batch> {
        self.server.counters.denied(denial);
        room.send(&self.to, &denial.header(self.server.epoch(), self.tag).encode(&[]), 0, self.tag)
    }
}
