//! Progress: what queues report, and when one may sleep.

use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use baton_libfabric_sys::abi::fi_cq_tagged_entry;
use baton_libfabric_sys::{Errno, Library};
use rustix::event::{Timespec, epoll};

use super::super::object::Queue;
use super::{LibfabricDriver, Owner};

/// Completions read at once, and how often before others get a turn.
const BATCH: usize = 32;
const BATCHES_MAX: usize = 8;
/// Polls that may pass over the queues that peers reach while there is something under way on others.
const SKIPS: u32 = 7;

/// What a queue said.
pub(super) struct Event {
    owner: Owner,
    context: *mut std::ffi::c_void,
    result: Result<usize, String>,
}

/// Reads a queue until it has nothing more, or others should get a turn.
fn drain(library: &Library, owner: Owner, queue: &Queue, events: &mut Vec<Event>) -> Result<(), Errno> {
    // SAFETY: numbers and pointers only, for which zero is a value.
    let mut entries: [fi_cq_tagged_entry; BATCH] = unsafe { std::mem::zeroed() };
    for _ in 0..BATCHES_MAX {
        match queue.read(&mut entries) {
            Ok(count) => {
                let read = entries[..count].iter();
                events.extend(read.map(|entry| Event {
                    owner,
                    context: entry.op_context,
                    result: Ok(entry.len),
                }));
                if count < BATCH {
                    return Ok(());
                }
            }
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::AVAIL) => {
                let failure = queue.read_error(library)?;
                events.push(Event { owner, context: failure.context, result: Err(failure.reason) });
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Adds a descriptor that a queue owns.
pub(super) fn watch(set: &OwnedFd, fd: RawFd) -> Option<()> {
    // SAFETY: the descriptor belongs to an open queue, which its caller holds.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    // By edges: provider `net` 1.17 never takes its signal back (its `fi_trywait` does nothing), so that after the first
    // completion the descriptor of a queue is readable for ever.
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(set, fd, epoll::EventData::new_u64(0), flags).ok()
}

/// Takes what the set has seen since the last time; whether there was anything.
pub(super) fn take_edges(set: &OwnedFd) -> bool {
    const MOST: usize = 16;
    let mut edges = [const { MaybeUninit::<epoll::Event>::uninit() }; MOST];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    epoll::wait(set, &mut edges, Some(&now)).is_ok_and(|(seen, _)| !seen.is_empty())
}

pub(super) fn unwatch(set: &OwnedFd, fd: RawFd) {
    // SAFETY: as above.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let _ = epoll::delete(set, fd);
}

impl LibfabricDriver {
    /// Handles what a queue said. What is of no operation of that queue is left alone.
    fn handle(&mut self, event: Event) {
        let Some(slot) = self.slots.find(event.context) else { return };
        let Some(part) = self.slots.get(slot).filter(|part| part.owner == event.owner) else { return };
        // Providers do not all say how much was read or written; they do say how much was received.
        let received = part.owner == Owner::Passive;
        let len = part.len;
        let result = event.result.map(|bytes| if received { bytes.min(len) } else { len });
        let failed = result.as_ref().err().cloned();
        self.end_slot(slot, result);
        if let (Some(reason), Owner::Peer(peer)) = (failed, event.owner) {
            self.fail_peer(peer, &reason);
        }
    }

    /// Reads the queues of what can have something to say.
    pub(super) fn read_queues(&mut self) {
        let library = match self.rails.first() {
            Some(rail) => rail.info.library(),
            None => return,
        };
        let mut events = std::mem::take(&mut self.events);
        let active = self.peers.iter().filter(|(_, peer)| peer.is_active());
        // With domains of their own, peers' queues make no progress for the passive ones, nor the other way round: each
        // look is a system call.
        let skips = self.own_domains && self.unread < SKIPS && active.clone().next().is_some();
        self.unread = if skips { self.unread + 1 } else { 0 };
        let passive = self.rails.iter().filter(|_| !skips);
        let passive = passive.map(|rail| (Owner::Passive, &rail.passive.queue));
        let peers = active
            .flat_map(|(id, peer)| peer.rails.iter().map(|rail| (Owner::Peer(*id), &rail.endpoint.queue)));
        let mut broken = Vec::new();
        for (owner, queue) in passive.chain(peers) {
            if let Err(errno) = drain(library, owner, queue, &mut events)
                && let Owner::Peer(peer) = owner
            {
                broken.push((peer, errno));
            }
        }
        for event in events.drain(..) {
            self.handle(event);
        }
        self.events = events;
        for (peer, errno) in broken {
            let reason = self.strerror(errno);
            self.fail_peer(peer, &reason);
        }
    }

    /// Lets the descriptor cover exactly the queues that can have something to say.
    pub(super) fn watch_active(&mut self) -> Option<()> {
        let set = self.epoll.as_ref()?;
        for peer in self.peers.values_mut() {
            let active = peer.is_active();
            for rail in peer.rails.iter_mut().filter(|rail| rail.watched != active) {
                let fd = rail.endpoint.queue.fd?;
                if active {
                    watch(set, fd)?;
                } else {
                    unwatch(set, fd);
                }
                rail.watched = active;
            }
        }
        Some(())
    }
}
