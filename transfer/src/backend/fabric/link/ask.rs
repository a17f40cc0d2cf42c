//! Requests that go over the fabric itself: the owner's progress thread answers them, and no other task of either side
//! has to wake up.

use std::sync::Arc;

use baton_config::HandoffId;
use tokio::time::Instant;

use super::{ASK_MAX_BLOCKS, BUFFER_TIMEOUT, FabricLink, broken, tag, unable};
use crate::backend::Fault;
use crate::backend::fabric::batch::{Batch, Running, Transfer, Verb};
use crate::backend::fabric::driver::LocalRange;
use crate::backend::fabric::registry::Registration;
use crate::backend::fabric::thread::{DATA_AT, Exchange, HEAD_AT};
use crate::error::Refusal;
use crate::memory::HostMemory;
use crate::session::Descriptor;
use crate::slab::Slot;
use crate::wire::ask::{Ask, decode_answer_head};
use crate::wire::{HEADER_BYTES, Kind, WireError};

/// Where a request is until it was sent, and, of one without blocks, where its answer lands.
pub(super) type Note = Arc<(Slot, Arc<Registration>)>;

/// Where the answer to a question lands, and its tag.
pub(super) struct Confirmation {
    memory: HostMemory,
    at: usize,
    tag: u64,
}

impl FabricLink {
    /// Whether the owner takes a request for so many blocks over the fabric.
    pub(super) fn asks(&self, blocks: usize) -> bool {
        self.ticket != 0 && blocks <= ASK_MAX_BLOCKS
    }

    /// Asks for blocks; the answer is what `receive` awaits under the tag.
    pub(super) async fn ask(
        &self,
        note: Note,
        about: (Kind, u64),
        handoff: HandoffId,
        blocks: impl ExactSizeIterator<Item = Descriptor>,
        receive: Arc<Batch>,
    ) -> Result<Running, Fault> {
        let ask = self.request(note, about, handoff, blocks);
        self.fabric.exchange(Exchange { receive, ask }).await.map_err(broken)
    }

    /// Asks whether blocks are granted.
    pub(super) async fn ask_to_confirm(
        &self,
        handoff: HandoffId,
        blocks: impl ExactSizeIterator<Item = Descriptor>,
    ) -> Result<(), Fault> {
        let (exchange, confirmation) = self.confirmation(self.note().await?, handoff, blocks)?;
        let mut running = self.fabric.exchange(exchange).await.map_err(broken)?;
        running.end().await.map_err(broken)?;
        self.confirmed(&confirmation, &running)
    }

    /// Makes the question whether blocks are granted, to be asked later.
    pub(super) fn confirmation(
        &self,
        note: Note,
        handoff: HandoffId,
        blocks: impl ExactSizeIterator<Item = Descriptor>,
    ) -> Result<(Exchange, Confirmation), Fault> {
        let tag = tag()?;
        let (memory, at) = (note.0.memory().clone(), note.0.offset() + HEAD_AT);
        let local = LocalRange { id: note.1.id, offset: at, len: HEADER_BYTES };
        let transfer = Transfer { verb: Verb::Receive { tag }, local };
        let receive = Batch::new(self.peer.clone(), vec![transfer], Box::new(Arc::clone(&note)));
        let ask = self.request(note, (Kind::Confirm, tag), handoff, blocks);
        Ok((Exchange { receive, ask }, Confirmation { memory, at, tag }))
    }

    /// Whether the answer to a question, which has come, says so.
    pub(super) fn confirmed(&self, of: &Confirmation, answer: &Running) -> Result<(), Fault> {
        self.check((&of.memory, of.at), of.tag, Kind::Confirmed, answer.arrived())
    }

    /// Whether what arrived at a place begins as the answer to a request of `tag` does, and is as long as it says.
    pub(super) fn check(
        &self,
        (memory, at): (&HostMemory, usize),
        tag: u64,
        kind: Kind,
        arrived: usize,
    ) -> Result<(), Fault> {
        let mut head = [0; HEADER_BYTES];
        if arrived < HEADER_BYTES {
            return Err(Fault::protocol(WireError::Short));
        }
        memory.read(at, &mut head);
        let header = decode_answer_head(&head, tag).map_err(Fault::protocol)?;
        match header.kind {
            Kind::Refused => Err(Fault::refused(&header)),
            _ if header.kind != kind => Err(Fault::protocol(WireError::Kind)),
            _ if header.epoch != self.pair.epoch => Err(Fault::Stale(Some(header.epoch))),
            _ if header.len as usize == arrived - HEADER_BYTES => Ok(()),
            _ => Err(Fault::protocol(WireError::Field)),
        }
    }

    /// Waits for places for requests, all at once: who has them waits for nothing else but the owner.
    pub(super) async fn notes(&self, count: usize) -> Result<Vec<Note>, Fault> {
        let slots = self.asking.acquire(count, Instant::now() + BUFFER_TIMEOUT).await;
        let slots = slots.map_err(|_| Fault::Refused(Refusal::Overloaded))?;
        let registered = self.register_host(&self.asking.memory().span()).await.map_err(unable)?;
        Ok(slots.into_iter().map(|slot| Arc::new((slot, Arc::clone(&registered)))).collect())
    }

    /// Waits for one.
    pub(super) async fn note(&self) -> Result<Note, Fault> {
        self.notes(1).await?.pop().ok_or(Fault::Refused(Refusal::Overloaded))
    }

    fn request(
        &self,
        note: Note,
        (kind, tag): (Kind, u64),
        handoff: HandoffId,
        blocks: impl ExactSizeIterator<Item = Descriptor>,
    ) -> Arc<Batch> {
        let sender = (self.ticket, kind, self.pair.epoch);
        let request = Ask::encode(sender, (self.fabric.kind(), tag), handoff, blocks);
        let offset = note.0.offset() + DATA_AT;
        note.0.memory().write(offset, &request);
        let local = LocalRange { id: note.1.id, offset, len: request.len() };
        Batch::new(self.peer.clone(), vec![Transfer { verb: Verb::Ask, local }], Box::new(note))
    }
}
