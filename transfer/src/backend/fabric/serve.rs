//! What the owner of blocks answers about its fabrics: on control connections, and (`requests`) over the fabric.
//!
//! One-sided reads are not seen here: a peer that has the key of a region reads it. What is checked here, grant by
//! grant, is what this side sends itself ([`Kind::Pack`]), what it confirms ([`Kind::Confirm`]) and where it lets a peer
//! write ([`Kind::Window`]).

pub(crate) mod requests;
pub(super) mod windows;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::Epoch;
use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::SHARES;
use super::batch::{Batch, Transfer, Verb};
use super::driver::{Access, DriverError, LocalRange};
use super::registry::Registration;
use super::thread::{self, DATA_AT, HEAD_AT};
use crate::agent::dial::random_u128;
use crate::agent::region::Region;
use crate::agent::server::{Denial, Server, region};
use crate::agent::{BackendKind, RegionId};
use crate::backend::control::{Answer, Peer};
use crate::error::Refusal;
use crate::jobs;
use crate::session::Descriptor;
use crate::slab::{Share, Slab, Slot};
use crate::wire::ask::answer_head;
use crate::wire::control::{Attach, Attached, Key, KeyIs, Pack, Window, Write, decode_fence};
use crate::wire::{HEADER_BYTES, Header, Kind, Read};

/// How long a message waits for its buffer.
const BUFFER_TIMEOUT: Duration = Duration::from_secs(2);

/// What fabrics keep for one control connection.
#[derive(Default)]
pub(crate) struct Attachments {
    of: Mutex<HashMap<BackendKind, Attachment>>,
    windows: windows::Windows,
}

/// The endpoint of a peer's fabric.
struct Attachment {
    peer: thread::Peer,
    /// Regions whose keys the peer has: they stay registered as long as it may use them.
    shown: HashMap<RegionId, Arc<Registration>>,
    /// Where messages are gathered, and short answers.
    sending: Outlet,
    answers: Outlet,
    /// How many of its requests tasks may answer at once.
    later: Arc<Semaphore>,
    _ticket: Option<requests::Ticket>,
}

/// A peer's share of the buffers of messages to it: one that takes none leaves the others theirs.
#[derive(Clone)]
struct Outlet {
    share: Share,
    /// What they are registered as.
    registered: Arc<Registration>,
}

/// A buffer that is sent to a peer.
struct Room {
    slot: Slot,
    registered: Arc<Registration>,
}

impl Outlet {
    async fn new(fabric: &thread::Fabric, slab: &Slab) -> Result<Self, DriverError> {
        let registered = fabric.registered(&slab.memory().span(), Access::Local).await?;
        Ok(Self { share: slab.share(SHARES), registered })
    }

    /// Waits for a buffer.
    async fn wait(&self) -> Option<Room> {
        let slots = self.share.acquire(1, Instant::now() + BUFFER_TIMEOUT).await;
        slots.ok()?.pop().map(|slot| self.room(slot))
    }

    fn try_take(&self) -> Option<Room> {
        self.share.try_acquire().map(|slot| self.room(slot))
    }

    fn room(&self, slot: Slot) -> Room {
        Room { slot, registered: Arc::clone(&self.registered) }
    }
}

impl Room {
    /// The message with the `len` bytes in it.
    fn message(self, to: &thread::Peer, len: usize, (epoch, tag): (Epoch, u64)) -> Arc<Batch> {
        self.send(to, &answer_head(Kind::Data, len as u32, epoch, tag), len, tag)
    }

    /// The message with a head and the `len` bytes behind it.
    fn send(self, to: &thread::Peer, head: &[u8; HEADER_BYTES], len: usize, tag: u64) -> Arc<Batch> {
        let offset = self.slot.offset() + HEAD_AT;
        self.slot.memory().write(offset, head);
        let local = LocalRange { id: self.registered.id, offset, len: HEADER_BYTES + len };
        Batch::new(to.clone(), vec![Transfer { verb: Verb::Send { tag }, local }], Box::new(self))
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // What is under way holds the peer: without this it would never be cut off.
        self.peer.sever("the peer's connection has ended");
    }
}

impl Attachments {
    fn lock(&self) -> MutexGuard<'_, HashMap<BackendKind, Attachment>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers what a peer asks of this agent's fabrics.
pub(crate) async fn answer(
    server: Arc<Server>,
    peer: Arc<Peer>,
    header: Header,
    payload: Bytes,
) -> Result<Answer, Denial> {
    if peer.life.ended.is_cancelled() {
        return Err(Denial::Stale);
    }
    match header.kind {
        Kind::Attach => attach(&server, &peer, Attach::decode(&payload)?).await,
        Kind::Key => key(&server, &peer, Key::decode(&payload)?).await,
        Kind::Pack => pack(&server, &peer, Pack::decode(&payload)?).await,
        Kind::Window => windows::open(&server, &peer, Window::decode(&payload)?).await,
        Kind::Write => windows::written(&server, &peer, Write::decode(&payload)?).await,
        Kind::Fence => Ok(windows::close(&peer, decode_fence(&payload)?)),
        Kind::Confirm => {
            let Read { handoff, blocks } = Read::decode(&payload)?;
            server.permit(&server.regions(), handoff, &blocks)?;
            Ok(Answer::done(Kind::Confirmed))
        }
        _ => Err(Denial::Refused(Refusal::Unavailable)),
    }
}

/// The connection of `peer` has ended.
pub(crate) fn gone(_server: &Arc<Server>, peer: &Peer) {
    peer.fabric.lock().clear();
}

async fn attach(server: &Server, peer: &Arc<Peer>, attach: Attach) -> Result<Answer, Denial> {
    let fabric = server.fabrics.get(attach.backend).ok_or(Denial::Refused(Refusal::Unavailable))?;
    if attach.wire != fabric.info().wire {
        return Err(Denial::Refused(Refusal::Mismatch));
    }
    let connected = fabric.connect(attach.address).await.map_err(|error| unable(peer, &error))?;
    let sending = Outlet::new(&fabric, fabric.sending()).await.map_err(|error| unable(peer, &error))?;
    let answers = Outlet::new(&fabric, fabric.answers()).await.map_err(|error| unable(peer, &error))?;
    let ticket = match fabric.has_requests() {
        true => random_u128().map_err(|_| Denial::Refused(Refusal::Unavailable))?,
        false => 0,
    };
    let given = (ticket != 0).then(|| server.tickets.give(ticket, peer));
    let (shown, later) = (HashMap::new(), Arc::new(Semaphore::new(requests::LATER_MAX)));
    let attachment = Attachment { peer: connected, shown, sending, answers, later, _ticket: given };
    peer.fabric.lock().insert(attach.backend, attachment);
    let attached = Attached { ticket, address: fabric.address().to_vec() };
    Ok(Answer { kind: Kind::Attached, payload: attached.encode() })
}

async fn key(server: &Server, peer: &Peer, key: Key) -> Result<Answer, Denial> {
    let fabric = server.fabrics.get(key.backend).ok_or(Denial::Refused(Refusal::Unavailable))?;
    if !peer.fabric.lock().contains_key(&key.backend) {
        return Err(Denial::Refused(Refusal::Unavailable));
    }
    let regions = server.regions();
    let region = region(&regions, key.region).ok_or(Denial::Refused(Refusal::OutsideRegion))?;
    let shown = fabric.registered(&region.span(), Access::RemoteRead).await;
    let shown = shown.map_err(|error| unable(peer, &error))?;
    let answer = KeyIs { len: shown.len() as u64, base: 0, key: shown.key.clone() };
    if let Some(attachment) = peer.fabric.lock().get_mut(&key.backend) {
        attachment.shown.insert(key.region, shown);
    }
    Ok(Answer { kind: Kind::KeyIs, payload: answer.encode() })
}

fn unable(peer: &Peer, error: &DriverError) -> Denial {
    tracing::warn!(peer = %peer.hello.from, %error, remedy = error.remedy, "a fabric cannot serve a peer");
    Denial::Refused(Refusal::Unavailable)
}

/// Gathers blocks and hands them to the fabric as one message.
async fn pack(server: &Server, peer: &Peer, pack: Pack) -> Result<Answer, Denial> {
    let unavailable = Denial::Refused(Refusal::Unavailable);
    let fabric = server.fabrics.get(pack.backend).ok_or(unavailable)?;
    let attached = |attachment: &Attachment| (attachment.peer.clone(), attachment.sending.clone());
    let attached = peer.fabric.lock().get(&pack.backend).map(attached);
    let (to, sending) = attached.ok_or(unavailable)?;
    let about = (peer.life.epoch, pack.tag);
    let message = gather(server, &fabric, (&to, &sending), &pack.read, about).await?;
    fabric.submit(message).await.map_err(|_| unavailable)?.detach();
    Ok(Answer::done(Kind::Packed))
}

/// Makes the message with the blocks of `read`, in `epoch` and for who awaits `tag`.
async fn gather(
    server: &Server,
    fabric: &thread::Fabric,
    (to, sending): (&thread::Peer, &Outlet),
    read: &Read,
    about: (Epoch, u64),
) -> Result<Arc<Batch>, Denial> {
    let len: usize = read.blocks.iter().map(|block| block.len as usize).sum();
    if len > fabric.pack_max() {
        return Err(Denial::Refused(Refusal::TooLarge));
    }
    // Before the permit, which holds up the end of its grant.
    let room = sending.wait().await.ok_or(Denial::Refused(Refusal::Overloaded))?;
    let regions = server.regions();
    let permit = server.permit(&regions, read.handoff, &read.blocks)?;
    let all_host = all_host(&regions, read);
    let (handoff, read) = (read.handoff, read.clone());
    let copy = move || {
        // Ends with the last copy, whether or not somebody still waits for it.
        let _permit = permit;
        copy_blocks(&regions, &read, &room.slot).map(|()| room)
    };
    let copied = match all_host {
        true => copy(),
        false => jobs::start(&server.tasks, copy).await.unwrap_or(Err(Refusal::Unavailable)),
    };
    let room = copied.map_err(Denial::Refused)?;
    server.count_served(handoff, len as u64);
    Ok(room.message(to, len, about))
}

/// Whether no block is in the memory of a device.
fn all_host(regions: &[Region], read: &Read) -> bool {
    let is_host =
        |block: &Descriptor| region(regions, block.region).is_some_and(|region| region.host().is_some());
    read.blocks.iter().all(is_host)
}

/// Copies blocks, one after the other, to a slot.
fn copy_blocks(regions: &[Region], read: &Read, slot: &Slot) -> Result<(), Refusal> {
    let mut at = slot.offset() + DATA_AT;
    for block in &read.blocks {
        let region = region(regions, block.region).ok_or(Refusal::OutsideRegion)?;
        let copied = region.copy_to(block.offset as usize, slot.memory(), at, block.len as usize);
        copied.map_err(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "blocks of a device cannot be sent");
            Refusal::Unavailable
        })?;
        at += block.len as usize;
    }
    Ok(())
}
