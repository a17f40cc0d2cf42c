//! What the owner of blocks answers on control connections about its fabrics.
//!
//! One-sided reads are not seen here: a peer that has the key of a region reads it. What is checked here, grant by
//! grant, is what this side sends itself ([`Kind::Pack`]), what it confirms ([`Kind::Confirm`]) and where it lets a peer
//! write ([`Kind::Window`]).

pub(super) mod windows;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::batch::{Batch, Transfer, Verb};
use super::driver::{Access, DriverError, LocalRange};
use super::registry::Registration;
use super::thread;
use crate::agent::grants::Permit;
use crate::agent::region::Region;
use crate::agent::server::{Denial, Server, region};
use crate::agent::{BackendKind, RegionId};
use crate::backend::control::{Answer, Peer};
use crate::error::Refusal;
use crate::jobs;
use crate::slab::Slot;
use crate::wire::control::{Attach, Key, KeyIs, Pack, Window, Write, decode_fence};
use crate::wire::{Header, Kind, Read};

/// How long a pack waits for a buffer to be gathered in.
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

async fn attach(server: &Server, peer: &Peer, attach: Attach) -> Result<Answer, Denial> {
    let fabric = server.fabrics.get(attach.backend).ok_or(Denial::Refused(Refusal::Unavailable))?;
    if attach.wire != fabric.info().wire {
        return Err(Denial::Refused(Refusal::Mismatch));
    }
    let connected = fabric.connect(attach.address).await.map_err(|error| unable(peer, &error))?;
    let attachment = Attachment { peer: connected, shown: HashMap::new() };
    peer.fabric.lock().insert(attach.backend, attachment);
    Ok(Answer { kind: Kind::Attached, payload: fabric.address().to_vec() })
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
    let fabric = server.fabrics.get(pack.backend).ok_or(Denial::Refused(Refusal::Unavailable))?;
    let connected = peer.fabric.lock().get(&pack.backend).map(|attachment| attachment.peer.clone());
    let connected = connected.ok_or(Denial::Refused(Refusal::Unavailable))?;
    let len: usize = pack.read.blocks.iter().map(|block| block.len as usize).sum();
    if len > fabric.pack_max() {
        return Err(Denial::Refused(Refusal::TooLarge));
    }
    // Before the permit, which holds up the end of its grant.
    let slots = fabric.sending().acquire(1, Instant::now() + BUFFER_TIMEOUT).await;
    let slot = slots.ok().and_then(|mut slots| slots.pop()).ok_or(Denial::Refused(Refusal::Overloaded))?;
    let registered = fabric.registered(&fabric.sending().memory().span(), Access::Local).await;
    let registered = registered.map_err(|error| unable(peer, &error))?;
    let regions = server.regions();
    let permit = server.permit(&regions, pack.read.handoff, &pack.read.blocks)?;
    let slot = gather(server, regions, pack.read, (permit, slot)).await?;
    let local = LocalRange { id: registered.id, offset: slot.offset(), len };
    let transfer = Transfer { verb: Verb::Send { tag: pack.tag }, local };
    let batch = Batch::new(connected, vec![transfer], Box::new((slot, registered)));
    let sending = fabric.submit(batch).await.map_err(|_| Denial::Refused(Refusal::Unavailable))?;
    sending.detach();
    server.counters.served(len as u64);
    Ok(Answer::done(Kind::Packed))
}

/// Copies blocks, one after the other, to a slot; the permit ends with the last copy.
async fn gather(
    server: &Server,
    regions: Arc<[Region]>,
    read: Read,
    (permit, slot): (Permit, Slot),
) -> Result<Slot, Denial> {
    let all_host = read
        .blocks
        .iter()
        .all(|block| region(&regions, block.region).is_some_and(|region| region.host().is_some()));
    let gather = move || {
        let _permit = permit;
        let mut at = slot.offset();
        for block in &read.blocks {
            let region = region(&regions, block.region).ok_or(Refusal::OutsideRegion)?;
            let copied = region.copy_to(block.offset as usize, slot.memory(), at, block.len as usize);
            copied.map_err(|error| {
                tracing::warn!(error = &error as &dyn std::error::Error, "blocks of a device cannot be sent");
                Refusal::Unavailable
            })?;
            at += block.len as usize;
        }
        Ok(slot)
    };
    let gathered = match all_host {
        true => gather(),
        false => jobs::start(&server.tasks, gather).await.unwrap_or(Err(Refusal::Unavailable)),
    };
    gathered.map_err(Denial::Refused)
}
