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
//! task; there are at most so many of them, and more is refused.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use baton_config::Epoch;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Room, all_host, copy_blocks, gather, message};
use crate::agent::BackendKind;
use crate::agent::server::{Denial, Life, Server};
use crate::backend::control::Peer;
use crate::backend::fabric::batch::{Batch, Transfer, Verb};
use crate::backend::fabric::driver::LocalRange;
use crate::backend::fabric::fabrics::Answer;
use crate::backend::fabric::registry::Registration;
use crate::backend::fabric::thread::{self, Fabric, HEAD_AT};
use crate::error::Refusal;
use crate::wire::ask::{Ask, answer_head};
use crate::wire::{HEADER_BYTES, Kind, Read};

/// Most requests that tasks answer at once.
const LATER_MAX: usize = 256;

/// Who sends requests, by ticket.
pub(crate) struct Tickets {
    peers: Mutex<HashMap<u128, Weak<Peer>>>,
    later: Arc<Semaphore>,
}

impl Default for Tickets {
    fn default() -> Self {
        Self { peers: Mutex::default(), later: Arc::new(Semaphore::new(LATER_MAX)) }
    }
}

impl Tickets {
    fn lock(&self) -> MutexGuard<'_, HashMap<u128, Weak<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
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
    match request.answer_now() {
        Outcome::Done(answer) => answer,
        Outcome::Later(request) => match Arc::clone(&server.tickets.later).try_acquire_owned() {
            Ok(room) => {
                server.tasks.spawn_on(request.answer_later(room), runtime);
                None
            }
            Err(_) => request.refuse(Denial::Refused(Refusal::Overloaded)),
        },
    }
}

/// A request and all that its answer takes.
struct Request {
    server: Arc<Server>,
    fabric: Fabric,
    to: thread::Peer,
    life: Life,
    /// What the buffers of messages, and those of short answers, are registered as.
    sending: Arc<Registration>,
    answers: Arc<Registration>,
    share: Arc<Semaphore>,
    kind: Kind,
    epoch: Epoch,
    tag: u64,
    read: Read,
}

enum Outcome {
    Done(Option<Arc<Batch>>),
    Later(Request),
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
            sending: Arc::clone(&attachment.sending),
            answers: Arc::clone(&attachment.answers),
            share: Arc::clone(&attachment.share),
            kind: ask.kind,
            epoch: ask.epoch,
            tag: ask.pack.tag,
            read: ask.pack.read,
        })
    }

    fn is_stale(&self) -> bool {
        self.epoch != self.life.epoch || self.life.ended.is_cancelled()
    }

    fn answer_now(self) -> Outcome {
        if self.is_stale() {
            return Outcome::Done(self.refuse(Denial::Stale));
        }
        let (regions, handoff) = (self.server.regions(), self.read.handoff);
        let len: usize = self.read.blocks.iter().map(|block| block.len as usize).sum();
        let packs = self.kind == Kind::Pack;
        if packs && len > self.fabric.pack_max() {
            return Outcome::Done(self.refuse(Denial::Refused(Refusal::TooLarge)));
        }
        let free = || Room::try_take(&self.fabric, &self.share).filter(|_| all_host(&regions, &self.read));
        let room = if packs { free() } else { None };
        if packs && room.is_none() {
            return Outcome::Later(self);
        }
        let _permit = match self.server.permit(&regions, handoff, &self.read.blocks) {
            Ok(permit) => permit,
            Err(denial) => return Outcome::Done(self.refuse(denial)),
        };
        let Some(room) = room else {
            return Outcome::Done(self.note(&answer_head(Kind::Confirmed, 0, self.epoch, self.tag)));
        };
        Outcome::Done(match copy_blocks(&regions, &self.read, &room.slot) {
            Ok(()) => {
                self.server.count_served(handoff, len as u64);
                Some(message(&self.to, (room, self.sending), len, (self.epoch, self.tag)))
            }
            Err(refusal) => self.refuse(Denial::Refused(refusal)),
        })
    }

    async fn answer_later(self, _room: OwnedSemaphorePermit) {
        let about = (self.epoch, self.tag);
        let packed = match self.is_stale() {
            true => Err(Denial::Stale),
            false => {
                let to = (&self.to, &self.sending, &self.share);
                gather(&self.server, &self.fabric, to, &self.read, about).await
            }
        };
        let answer = packed.map(Some).unwrap_or_else(|denial| self.refuse(denial));
        if let Some(answer) = answer
            && let Ok(sending) = self.fabric.submit(answer).await
        {
            sending.detach();
        }
    }

    /// Says no. The reader is told what it would be told on the control connection.
    fn refuse(&self, denial: Denial) -> Option<Arc<Batch>> {
        self.server.counters.denied(denial);
        self.note(&denial.header(self.server.epoch(), self.tag).encode(&[]))
    }

    /// An answer without blocks; none when there are too many of them already: nobody takes them.
    fn note(&self, head: &[u8; HEADER_BYTES]) -> Option<Arc<Batch>> {
        let slot = self.fabric.answers().try_acquire()?;
        let offset = slot.offset() + HEAD_AT;
        slot.memory().write(offset, head);
        let local = LocalRange { id: self.answers.id, offset, len: HEADER_BYTES };
        let transfer = Transfer { verb: Verb::Send { tag: self.tag }, local };
        Some(Batch::new(self.to.clone(), vec![transfer], Box::new((slot, Arc::clone(&self.answers)))))
    }
}
