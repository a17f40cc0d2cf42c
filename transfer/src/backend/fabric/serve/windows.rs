//! Windows: parts of memory that a peer may write one-sidedly, each registered for this alone.
//!
//! ```text
//! writer                                       owner
//! Window(handoff, blocks) ─────────────────►   write grant covers them: a window for each granted range, keys
//! writes ══════════════════════════════════►   memory
//! Write(handoff, windows, digests) ────────►   deregistered, then verified: nothing of this write can land any more
//! ```
//!
//! A window reaches over all blocks asked for that lie in one granted range, or in ranges that touch: the bytes
//! between them are granted, too. Blocks of one range cost one registration, however many they are.
//!
//! A window that is still open when its grant ends is closed by force: deregistered, and the writer is asked to stop
//! ([`Kind::Fence`]). Only its word that everything it had posted has ended is taken for the end; without it the driver
//! is closed and opened again, which costs all peers of this fabric their connections. Until then the grant is not
//! settled, because the window holds its permit; and so does its registration, until the driver has ended it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::HandoffId;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{SHARES, unable};
use crate::agent::BackendKind;
use crate::agent::grants::Permit;
use crate::agent::server::{Denial, Server, region};
use crate::backend::control::{Answer, Peer};
use crate::backend::fabric::driver::Access;
use crate::backend::fabric::registry::Registration;
use crate::backend::fabric::thread::Fabric;
use crate::digest::DigestSeed;
use crate::error::Refusal;
use crate::session::{Descriptor, collide};
use crate::wire::control::{MAX_WINDOWS, OpenWindow, Window, WindowIs, Write, encode_fence};
use crate::wire::{Kind, Read};

/// How long a writer may take to end what it has posted.
const FENCE_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes verified between two turns of other tasks.
const YIELD_BYTES: usize = 1 << 20;

/// The open windows of one control connection.
#[derive(Default)]
pub(crate) struct Windows(Mutex<Table>);

#[derive(Default)]
struct Table {
    open: HashMap<u64, Open>,
    /// Handoffs with windows, each with a task that closes them when its grant ends.
    watched: HashMap<HandoffId, CancellationToken>,
    last: u64,
}

struct Open {
    fabric: Fabric,
    handoff: HandoffId,
    range: Descriptor,
    registration: Registration,
    permit: Arc<Permit>,
}

/// A window that was closed, with what its grant waits for.
struct Closed {
    fabric: Fabric,
    range: Descriptor,
    permit: Arc<Permit>,
}

impl Windows {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Closes the windows that `which` picks; what their grants wait for ends with the result.
    fn take(&mut self, which: impl Fn(u64, &Open) -> bool) -> Vec<Closed> {
        let taken: Vec<Open> =
            self.open.extract_if(|id, open| which(*id, open)).map(|(_, open)| open).collect();
        let left = |handoff: &HandoffId| self.open.values().any(|open| open.handoff == *handoff);
        self.watched.retain(|handoff, unwatch| {
            let keep = left(handoff);
            if !keep {
                unwatch.cancel();
            }
            keep
        });
        taken
            .into_iter()
            .map(|Open { fabric, range, registration, permit, .. }| {
                // The driver may be busy: until it has ended the registration, the grant is not settled.
                registration.end(Box::new(Arc::clone(&permit)));
                Closed { fabric, range, permit }
            })
            .collect()
    }
}

/// Opens windows.
pub(super) async fn open(server: &Arc<Server>, peer: &Arc<Peer>, asked: Window) -> Result<Answer, Denial> {
    let Window { backend, write: Read { handoff, blocks } } = asked;
    let fabric = server.fabrics.get(backend).ok_or(Denial::Refused(Refusal::Unavailable))?;
    if !peer.fabric.lock().contains_key(&backend) {
        return Err(Denial::Refused(Refusal::Unavailable));
    }
    if !fabric.info().write {
        return Err(Denial::Refused(Refusal::Unreachable));
    }
    let regions = server.regions();
    let permit = Arc::new(server.permit_write(&regions, handoff, &blocks)?);
    if collide(&blocks) {
        return Err(Denial::Refused(Refusal::Overlap));
    }
    let ranges = server.write_ranges(handoff, &blocks, MAX_WINDOWS);
    let (ranges, count) = ranges.ok_or(Denial::Refused(Refusal::NotGranted))?;
    let mut spans = Vec::with_capacity(ranges.len());
    for range in &ranges {
        let region = region(&regions, range.region).ok_or(Denial::Refused(Refusal::OutsideRegion))?;
        if region.host().is_none() {
            // Nobody here could verify what is written there.
            return Err(Denial::Refused(Refusal::Unreachable));
        }
        spans.push(region.span().part(range.offset as usize, range.len as usize));
    }
    // One that closes none leaves others their registrations.
    let share = (fabric.limits().regions / SHARES).max(MAX_WINDOWS);
    if peer.fabric.windows.lock().open.len() + ranges.len() > share {
        return Err(Denial::Refused(Refusal::Overloaded));
    }
    let made = fabric.registered_once(&spans, Access::RemoteWrite).await;
    let registrations = made.map_err(|error| unable(peer, &error))?;
    // Registering took a while: what ended meanwhile finds no window to close.
    if permit.revoked.is_cancelled() || peer.life.ended.is_cancelled() || !peer.control.is_alive() {
        return Err(Denial::Refused(Refusal::NotGranted));
    }
    let mut table = peer.fabric.windows.lock();
    watch(server, peer, &mut table, (backend, handoff), &permit);
    let mut windows = Vec::with_capacity(ranges.len());
    for (range, registration) in ranges.into_iter().zip(registrations) {
        table.last += 1;
        let window = table.last;
        windows.push(OpenWindow { window, range, base: 0, key: registration.key.clone() });
        let (fabric, permit) = (fabric.clone(), Arc::clone(&permit));
        table.open.insert(window, Open { fabric, handoff, range, registration, permit });
    }
    let answer = WindowIs { blocks: count as u32, windows };
    Ok(Answer { kind: Kind::WindowIs, payload: answer.encode() })
}

/// Makes sure that somebody closes the windows of a handoff when its grant ends.
fn watch(
    server: &Arc<Server>,
    peer: &Arc<Peer>,
    table: &mut Table,
    (backend, handoff): (BackendKind, HandoffId),
    permit: &Permit,
) {
    if table.watched.contains_key(&handoff) {
        return;
    }
    let unwatch = CancellationToken::new();
    table.watched.insert(handoff, unwatch.clone());
    let (server, peer, revoked) = (Arc::clone(server), Arc::clone(peer), permit.revoked.clone());
    let tasks = server.tasks.clone();
    tasks.spawn(async move {
        tokio::select! {
            biased;
            () = unwatch.cancelled() => return,
            () = revoked.cancelled() => {}
            () = peer.life.ended.cancelled() => {}
            () = peer.control.closed() => {}
        }
        fence(&server, &peer, handoff, backend).await;
    });
}

/// Ends all windows of a handoff, by the writer's word or by force.
async fn fence(server: &Arc<Server>, peer: &Peer, handoff: HandoffId, backend: BackendKind) {
    let closed = peer.fabric.windows.lock().take(|_, open| open.handoff == handoff);
    if closed.is_empty() {
        return;
    }
    let asked = timeout(FENCE_TIMEOUT, peer.control.ask(Kind::Fence, &encode_fence(handoff))).await;
    if !matches!(asked, Ok(Ok(_))) {
        tracing::warn!(peer = %peer.hello.from, %backend, "a writer did not stop: its fabric is closed and opened again");
        for window in &closed {
            server.fabrics.restart(&window.fabric, &server.tasks, &server.stop).await;
        }
    }
    // Here nothing can write the ranges any more, and the grant is settled.
    drop(closed);
}

/// Closes the windows through which blocks were written, and verifies them.
pub(super) async fn written(server: &Server, peer: &Peer, write: Write) -> Result<Answer, Denial> {
    let ranges = &write.blocks;
    let through = |id, open: &Open| open.handoff == write.handoff && write.windows.contains(&id);
    let closed = peer.fabric.windows.lock().take(through);
    let inside = |block: &Descriptor| closed.iter().any(|window| lies_in(block, &window.range));
    if !ranges.iter().all(inside) {
        return Err(Denial::Refused(Refusal::NotGranted));
    }
    if collide(ranges) {
        return Err(Denial::Refused(Refusal::Overlap));
    }
    let regions = server.regions();
    let (mut corrupt, mut unyielded, mut total) = (0, 0, 0);
    for (at, block) in ranges.iter().enumerate() {
        let memory = region(&regions, block.region).and_then(|region| region.host());
        let memory = memory.ok_or(Denial::Refused(Refusal::OutsideRegion))?;
        let len = block.len as usize;
        total += u64::from(block.len);
        if let Some(digest) = write.digests.get(at) {
            let index = write.first + at as u32;
            let seed = DigestSeed { handoff: write.handoff, epoch: peer.life.epoch, index };
            corrupt += u64::from(memory.block_digest(seed, block.offset as usize, len) != *digest);
            unyielded += len;
        }
        if unyielded >= YIELD_BYTES {
            unyielded = 0;
            tokio::task::yield_now().await;
        }
        if closed.iter().any(|window| window.permit.revoked.is_cancelled()) {
            return Err(Denial::Refused(Refusal::NotGranted));
        }
    }
    if corrupt > 0 {
        server.counters.checksum_mismatches(corrupt);
        return Err(Denial::Refused(Refusal::Corrupt));
    }
    server.counters.taken(total);
    Ok(Answer::done(Kind::Written))
}

/// Whether all bytes of a block are in a range.
pub(in super::super) fn lies_in(block: &Descriptor, range: &Descriptor) -> bool {
    let end = |of: &Descriptor| of.offset.saturating_add(u64::from(of.len));
    block.region == range.region && range.offset <= block.offset && end(block) <= end(range)
}

/// Closes a window that its writer is done with for good.
pub(super) fn close(peer: &Peer, HandoffId(window): HandoffId) -> Answer {
    drop(peer.fabric.windows.lock().take(|id, _| u128::from(id) == window));
    Answer::done(Kind::Fenced)
}
