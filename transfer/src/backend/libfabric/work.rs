//! The driver at work: peers, operations, and what is reported of them.
//!
//! Each peer has an endpoint of its own on every rail, from which everything to this peer is posted; closing it ends
//! whatever was under way. One *passive* endpoint on every rail is what peers reach: their reads and writes go to it,
//! and messages arrive at the first rail's. So a peer that is closed takes nothing of another peer with it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use baton_libfabric_sys::Errno;
use baton_libfabric_sys::abi::{FI_ADDR_UNSPEC, fi_cq_tagged_entry, fid};
use rustix::event::epoll;

use super::blob::{self, Key};
use super::object::{Call, Endpoint, Queue, Rail, Verb, close};
use super::register::Registration;
use super::slots::Slots;
use crate::backend::fabric::driver::{
    Access, Done, Driver, DriverError, DriverInfo, LocalId, LocalRange, PeerId, PostError, RemoteId,
};
use crate::memory::MemorySpan;

/// Most operations that wait for the connection to a new peer.
const UNCONNECTED_MAX: usize = 64;
/// Completions read at once, and how often before others get a turn.
const BATCH: usize = 32;
const BATCHES_MAX: usize = 8;

/// Whose queue a completion belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Passive,
    Peer(u32),
}

/// What a slot of the library is used for: an operation, or a piece of one.
struct Part {
    op: u32,
    owner: Owner,
    rail: usize,
    len: usize,
}

/// An operation until it is reported.
struct Op {
    op: u64,
    parts: u32,
    bytes: usize,
    error: Option<String>,
    local: LocalId,
    receive: bool,
}

/// An operation that was not posted yet, because the provider is still connecting.
struct Waiting {
    slot: u32,
    rail: usize,
    call: Call,
}

/// Our end of the connection to a peer, on one rail.
struct PeerRail {
    endpoint: Endpoint,
    to: u64,
    /// Which of the peer's rails it leads to.
    leads_to: usize,
    outstanding_bytes: usize,
    watched: bool,
}

struct Peer {
    rails: Vec<PeerRail>,
    their_rails: usize,
    remotes: HashMap<u32, Key>,
    waiting: VecDeque<Waiting>,
    outstanding: usize,
    /// Whether anything ever succeeded: from then on a full queue is the caller's to wait for.
    established: bool,
    failed: Option<String>,
}

impl Peer {
    /// Whether its queues are to be polled: nothing happens on idle ones.
    fn is_active(&self) -> bool {
        self.outstanding > 0
    }

    fn least_loaded(&self) -> usize {
        let loads = self.rails.iter().enumerate();
        loads.min_by_key(|(_, rail)| rail.outstanding_bytes).map_or(0, |(at, _)| at)
    }
}

/// What a queue said.
struct Event {
    owner: Owner,
    context: *mut std::ffi::c_void,
    result: Result<usize, String>,
}

/// The driver; see the module.
pub(super) struct LibfabricDriver {
    pub(super) info: DriverInfo,
    pub(super) loopback: bool,
    /// Bytes registered in one piece.
    pub(super) segment: u64,
    peers: HashMap<u32, Peer>,
    pub(super) registrations: HashMap<u32, Registration>,
    pub(super) rails: Vec<Rail>,
    /// Memory that peers could reach: a provider in software may still hold a pointer into it for a request that
    /// came before the registration ended. It goes with the endpoints.
    pub(super) retired: Vec<MemorySpan>,
    slots: Slots<Part>,
    ops: Vec<Option<Op>>,
    free_ops: Vec<u32>,
    receives: HashMap<u64, u32>,
    ready: Vec<Done>,
    events: Vec<Event>,
    epoll: Option<OwnedFd>,
    next_id: u32,
}

impl LibfabricDriver {
    pub(super) fn new(rails: Vec<Rail>, info: DriverInfo, loopback: bool, segment: u64) -> Self {
        let mut driver = Self {
            info,
            loopback,
            segment,
            peers: HashMap::new(),
            registrations: HashMap::new(),
            rails,
            retired: Vec::new(),
            slots: Slots::new(),
            ops: Vec::new(),
            free_ops: Vec::new(),
            receives: HashMap::new(),
            ready: Vec::new(),
            events: Vec::new(),
            epoll: None,
            next_id: 0,
        };
        driver.epoll = driver.watch_passive();
        driver
    }

    pub(super) fn next_id(&mut self) -> u32 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    /// One descriptor for the queues of all rails, where they have some.
    fn watch_passive(&self) -> Option<OwnedFd> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).ok()?;
        for rail in &self.rails {
            watch(&set, rail.passive.queue.fd?)?;
        }
        Some(set)
    }

    fn strerror(&self, errno: Errno) -> String {
        self.rails.first().map_or_else(|| errno.to_string(), |rail| rail.info.library().strerror(errno))
    }

    /// The local end of an operation, checked: where it is.
    fn local(&self, range: LocalRange, max: usize) -> Result<&Registration, PostError> {
        let registration = self.registrations.get(&range.id.0).ok_or(PostError::Range)?;
        let end = range.offset.checked_add(range.len).ok_or(PostError::Range)?;
        let fits = range.len > 0 && range.len <= max && end <= registration.span.len();
        if fits && !registration.ended { Ok(registration) } else { Err(PostError::Range) }
    }

    fn peer(&self, peer: PeerId) -> Result<&Peer, PostError> {
        let peer = self
            .peers
            .get(&peer.0)
            .ok_or_else(|| PostError::Failed("the peer is not connected".to_owned()))?;
        match &peer.failed {
            Some(reason) => Err(PostError::Failed(reason.clone())),
            None => Ok(peer),
        }
    }

    /// Takes an operation with its number of parts into the books.
    fn begin(&mut self, op: u64, parts: usize, local: LocalId, receive: bool) -> u32 {
        let entry = Op { op, parts: parts as u32, bytes: 0, error: None, local, receive };
        if let Some(registration) = self.registrations.get_mut(&local.0) {
            registration.busy += 1;
        }
        match self.free_ops.pop() {
            Some(at) => {
                self.ops[at as usize] = Some(entry);
                at
            }
            None => {
                self.ops.push(Some(entry));
                (self.ops.len() - 1) as u32
            }
        }
    }

    /// Takes it out again: nothing of it was posted.
    fn unbegin(&mut self, at: u32) {
        if let Some(op) = self.ops[at as usize].take() {
            self.free_ops.push(at);
            self.release(op.local);
        }
    }

    /// One operation less on a registration, which ends with its last one if it was to end.
    fn release(&mut self, local: LocalId) {
        let Some(registration) = self.registrations.get_mut(&local.0) else { return };
        registration.busy -= 1;
        if registration.busy == 0 && registration.ended {
            self.finish_registration(local);
        }
    }

    /// A part is over.
    fn end_part(&mut self, op: u32, result: Result<usize, String>) {
        let Some(entry) = self.ops[op as usize].as_mut() else { return };
        entry.parts -= 1;
        match result {
            Ok(bytes) => entry.bytes += bytes,
            Err(reason) => drop(entry.error.get_or_insert(reason)),
        }
        if entry.parts > 0 {
            return;
        }
        let Some(entry) = self.ops[op as usize].take() else { return };
        self.free_ops.push(op);
        if entry.receive {
            self.receives.remove(&entry.op);
        }
        self.release(entry.local);
        let result = entry.error.map_or(Ok(entry.bytes), Err);
        self.ready.push(Done { op: entry.op, result });
    }

    /// Posts the parts of an operation to a peer: all of them, now or once the connection is there, or none.
    fn post(
        &mut self,
        peer: PeerId,
        range: LocalRange,
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
        let at = self.begin(op, parts.len(), range.id, false);
        for (number, (rail, call)) in parts.iter().enumerate() {
            let part = Part { op: at, owner: Owner::Peer(peer.0), rail: *rail, len: call.len };
            let slot = self.slots.take(part);
            let (Some(slot), Some(state)) = (slot, self.peers.get_mut(&peer.0)) else { continue };
            let posted = match state.waiting.is_empty() {
                true => state.rails[*rail].endpoint.post(call, self.slots.context(slot)),
                false => Err(Errno::AGAIN),
            };
            let waits = posted == Err(Errno::AGAIN) && (number > 0 || !state.established);
            if posted.is_ok() || waits {
                state.outstanding += 1;
                state.rails[*rail].outstanding_bytes += call.len;
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

    /// Marks a peer as failed after its first error: providers do not always report what comes after it.
    fn fail_peer(&mut self, peer: u32, reason: &str) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        state.failed.get_or_insert_with(|| reason.to_owned());
        for waiting in std::mem::take(&mut state.waiting) {
            self.end_slot(waiting.slot, Err(reason.to_owned()));
        }
    }

    /// The library is done with a slot, or never got it.
    fn end_slot(&mut self, slot: u32, result: Result<usize, String>) {
        let Some(part) = self.slots.give_back(slot) else { return };
        if let Owner::Peer(peer) = part.owner
            && let Some(state) = self.peers.get_mut(&peer)
        {
            state.outstanding -= 1;
            state.rails[part.rail].outstanding_bytes -= part.len;
            state.established |= result.is_ok();
        }
        self.end_part(part.op, result);
    }

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

    /// Posts what waited for its connection.
    fn post_waiting(&mut self) {
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

    /// Reads the queues of what can have something to say.
    fn read_queues(&mut self) {
        let library = match self.rails.first() {
            Some(rail) => rail.info.library(),
            None => return,
        };
        let mut events = std::mem::take(&mut self.events);
        let passive = self.rails.iter().map(|rail| (Owner::Passive, &rail.passive.queue));
        let active = self.peers.iter().filter(|(_, peer)| peer.is_active());
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
    fn watch_active(&mut self) -> Option<()> {
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

/// Adds a descriptor that a queue owns.
fn watch(set: &OwnedFd, fd: RawFd) -> Option<()> {
    // SAFETY: the descriptor belongs to an open queue, which its caller holds.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    epoll::add(set, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN).ok()
}

fn unwatch(set: &OwnedFd, fd: RawFd) {
    // SAFETY: as above.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let _ = epoll::delete(set, fd);
}

/// Reads a queue until it has nothing more, or others should get a turn.
fn drain(
    library: &'static baton_libfabric_sys::Library,
    owner: Owner,
    queue: &Queue,
    events: &mut Vec<Event>,
) -> Result<(), Errno> {
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

/// An operation of a peer's memory, in parts that lie in one piece of either registration each.
struct Span<'a> {
    registration: &'a Registration,
    range: LocalRange,
    key: &'a Key,
    offset: u64,
    verb: Verb,
}

impl Span<'_> {
    fn parts(&self, peer: &Peer) -> Result<Vec<(usize, Call)>, PostError> {
        let end = self.offset.checked_add(self.range.len as u64).ok_or(PostError::Range)?;
        if end > self.key.len {
            return Err(PostError::Range);
        }
        let mut parts = Vec::with_capacity(1);
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
            let call = Call {
                verb: self.verb,
                local: self.registration.span.address() + here,
                len,
                descriptor: self.registration.descriptor(rail, here),
                to: via.to,
                remote: self.key.address(there),
                key: self.key.of(via.leads_to, there),
            };
            parts.push((rail, call));
            done += len;
        }
        Ok(parts)
    }
}

impl LibfabricDriver {
    fn one_sided(
        &mut self,
        (peer, remote): (PeerId, RemoteId),
        offset: u64,
        range: LocalRange,
        (verb, op): (Verb, u64),
    ) -> Result<(), PostError> {
        let state = self.peer(peer)?;
        let registration = self.local(range, self.info.op_max)?;
        let key = state.remotes.get(&remote.0).ok_or(PostError::Range)?;
        let parts = Span { registration, range, key, offset, verb }.parts(state)?;
        self.post(peer, range, op, &parts)
    }

    /// The one call of a message, which has to lie in one piece of its registration.
    fn message(&self, verb: Verb, tag: u64, range: LocalRange, to: u64) -> Result<Call, PostError> {
        let registration = self.local(range, self.info.message_max)?;
        if range.len > registration.left_in_segment(range.offset) {
            return Err(PostError::Range);
        }
        Ok(Call {
            verb,
            local: registration.span.address() + range.offset,
            len: range.len,
            descriptor: registration.descriptor(0, range.offset),
            to,
            remote: 0,
            key: tag,
        })
    }
}

impl Driver for LibfabricDriver {
    fn info(&self) -> &DriverInfo {
        &self.info
    }

    fn address(&self) -> Vec<u8> {
        let names: Vec<_> = self.rails.iter().map(|rail| rail.name.clone()).collect();
        blob::encode_address(&names)
    }

    fn register(&mut self, span: &MemorySpan, access: Access) -> Result<(LocalId, Vec<u8>), DriverError> {
        self.register_span(span, access)
    }

    fn deregister(&mut self, id: LocalId) {
        self.end_registration(id);
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, DriverError> {
        let fault = |what: String| DriverError { what, remedy: String::new() };
        let first = self.rails.first().ok_or_else(|| fault("the driver is closed".to_owned()))?;
        let expected =
            blob::Expected { format: first.info.address_format(), own: &first.name, loopback: self.loopback };
        let theirs = blob::decode_address(address, expected)
            .map_err(|error| fault(format!("the address of the peer is {error}")))?;
        let mut rails = Vec::with_capacity(self.rails.len());
        for (number, rail) in self.rails.iter().enumerate() {
            let leads_to = number % theirs.len();
            let failed = |step: &str, errno| fault(format!("cannot {step}: {}", self.strerror(errno)));
            let endpoint = Endpoint::open(&rail.domain, &rail.info)
                .map_err(|errno| failed("open an endpoint for the peer", errno))?;
            let to = endpoint
                .insert(&theirs[leads_to])
                .map_err(|errno| failed("take the address of the peer", errno))?;
            rails.push(PeerRail { endpoint, to, leads_to, outstanding_bytes: 0, watched: false });
        }
        let peer = Peer {
            rails,
            their_rails: theirs.len(),
            remotes: HashMap::new(),
            waiting: VecDeque::new(),
            outstanding: 0,
            established: false,
            failed: None,
        };
        let id = self.next_id();
        self.peers.insert(id, peer);
        Ok(PeerId(id))
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.fail_peer(peer.0, "the connection was closed");
        let Some(state) = self.peers.remove(&peer.0) else { return };
        if let Some(set) = &self.epoll {
            let watched = state.rails.iter().filter(|rail| rail.watched);
            watched.filter_map(|rail| rail.endpoint.queue.fd).for_each(|fd| unwatch(set, fd));
        }
        let slots = self.slots.matching(|part| part.owner == Owner::Peer(peer.0));
        if !close(state.rails) {
            // What the library would not close may still write: its operations are never reported, so that nobody
            // takes their memory for free.
            tracing::error!(operations = slots.len(), "libfabric keeps a connection that was to be closed");
            return;
        }
        for slot in slots {
            self.end_slot(slot, Err("the connection was closed".to_owned()));
        }
    }

    fn import(&mut self, peer: PeerId, key: &[u8]) -> Result<RemoteId, DriverError> {
        let fault = |what: String| DriverError { what, remedy: String::new() };
        let key = Key::decode(key).map_err(|error| fault(format!("the key of the peer is {error}")))?;
        let id = self.next_id();
        let state =
            self.peers.get_mut(&peer.0).ok_or_else(|| fault("the peer is not connected".to_owned()))?;
        if key.rails != state.their_rails {
            let rails = (key.rails, state.their_rails);
            return Err(fault(format!(
                "the key of the peer is for {} rails, its address for {}",
                rails.0, rails.1
            )));
        }
        state.remotes.insert(id, key);
        Ok(RemoteId(id))
    }

    fn forget(&mut self, peer: PeerId, remote: RemoteId) {
        if let Some(state) = self.peers.get_mut(&peer.0) {
            state.remotes.remove(&remote.0);
        }
    }

    fn read(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        from_offset: u64,
        to: LocalRange,
        op: u64,
    ) -> Result<(), PostError> {
        self.one_sided((peer, remote), from_offset, to, (Verb::Read, op))
    }

    fn write(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        to_offset: u64,
        from: LocalRange,
        op: u64,
    ) -> Result<(), PostError> {
        self.one_sided((peer, remote), to_offset, from, (Verb::Write, op))
    }

    fn send(&mut self, peer: PeerId, tag: u64, from: LocalRange, op: u64) -> Result<(), PostError> {
        let to = self.peer(peer)?.rails.first().map_or(FI_ADDR_UNSPEC, |rail| rail.to);
        let call = self.message(Verb::Send, tag, from, to)?;
        self.post(peer, from, op, &[(0, call)])
    }

    fn receive(&mut self, tag: u64, to: LocalRange, op: u64) -> Result<(), PostError> {
        let call = self.message(Verb::Receive, tag, to, FI_ADDR_UNSPEC)?;
        let at = self.begin(op, 1, to.id, true);
        let part = Part { op: at, owner: Owner::Passive, rail: 0, len: to.len };
        let Some(slot) = self.slots.take(part) else {
            self.unbegin(at);
            return Err(PostError::Again);
        };
        match self.rails[0].passive.post(&call, self.slots.context(slot)) {
            Ok(()) => {
                self.receives.insert(op, slot);
                Ok(())
            }
            Err(errno) => {
                self.slots.give_back(slot);
                self.unbegin(at);
                let reason = self.strerror(errno);
                Err(if errno == Errno::AGAIN { PostError::Again } else { PostError::Failed(reason) })
            }
        }
    }

    fn cancel_receive(&mut self, op: u64) {
        if let (Some(slot), Some(rail)) = (self.receives.get(&op), self.rails.first()) {
            rail.passive.cancel(self.slots.context(*slot));
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) -> bool {
        self.read_queues();
        self.post_waiting();
        let any = !self.ready.is_empty();
        done.append(&mut self.ready);
        any
    }

    fn arm(&mut self) -> bool {
        if !self.ready.is_empty() {
            return false;
        }
        if self.watch_active().is_none() {
            // Without descriptors the thread naps.
            return true;
        }
        let peers = &self.peers;
        self.rails.iter().enumerate().all(|(number, rail)| {
            let active = peers.values().filter(|peer| peer.is_active());
            let queues = active.map(|peer| &peer.rails[number].endpoint.queue);
            let queues = queues.chain(std::iter::once(&rail.passive.queue));
            let mut fids: Vec<*mut fid> = queues.map(Queue::fid).collect();
            rail.fabric.may_sleep(&mut fids)
        })
    }

    fn wait_fd(&self) -> Option<RawFd> {
        self.epoll.as_ref().map(AsRawFd::as_raw_fd)
    }
}

impl Drop for LibfabricDriver {
    fn drop(&mut self) {
        // Memory goes last: queues and endpoints may know it until they are closed.
        let spans: Vec<_> =
            self.registrations.values().map(|registration| registration.span.clone()).collect();
        let mut closed = close(std::mem::take(&mut self.peers));
        closed &= close(std::mem::take(&mut self.registrations));
        closed &= close(std::mem::take(&mut self.rails));
        if !closed {
            tracing::error!(
                "libfabric keeps connections that were to be closed: their memory is never freed"
            );
            self.slots.leak();
            std::mem::forget((spans, std::mem::take(&mut self.retired)));
        }
    }
}
