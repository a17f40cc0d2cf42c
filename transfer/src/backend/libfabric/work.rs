//! The driver at work: peers, operations, and what is reported of them.
//!
//! Each peer has an endpoint of its own on every rail, from which everything to this peer is posted; closing it ends
//! whatever was under way. One *passive* endpoint on every rail is what peers reach: their reads and writes go to it,
//! and messages arrive at the first rail's. So a peer that is closed takes nothing of another peer with it.

mod post;
mod progress;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use baton_libfabric_sys::Errno;
use baton_libfabric_sys::abi::{FI_ADDR_UNSPEC, FI_MR_LOCAL, fid};
use rustix::event::epoll;

use self::progress::{Event, take_edges, unwatch, watch};
use super::blob::{self, Key};
use super::object::{Call, Domain, Endpoint, Rail, Verb, close};
use super::register::{Registration, Retired};
use super::requests::{REQUEST_TAG, Requests};
use super::select;
use super::sinks::Sinks;
use super::slots::Slots;
use crate::backend::fabric::driver::{
    Access, Done, Driver, DriverError, DriverInfo, LocalId, LocalRange, PeerId, Piece, PiecesMax, PostError,
    REQUEST_MAX_BYTES, RemoteId,
};
use crate::backend::sockets;
use crate::memory::MemorySpan;

/// How often in a row sleep is put off for input: what the library does not take must not keep the thread awake.
const RESTLESS_MAX: u32 = 4096;

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
pub(super) struct Op {
    op: u64,
    parts: u32,
    bytes: usize,
    error: Option<String>,
    pub(super) local: LocalId,
    kind: Kind,
}

/// Where an operation came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    ToPeer,
    Receive(Awaited),
    /// Of our own: see `sinks`.
    Sink,
    /// The same: see `requests`.
    Request {
        buffer: u32,
    },
}

/// A message that is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Awaited {
    pub(super) tag: u64,
    pub(super) len: usize,
    pub(super) cancelled: bool,
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
    /// Of this peer alone, where the library needs that.
    _domain: Option<Domain>,
    to: u64,
    /// Which of the peer's rails it leads to.
    leads_to: usize,
    /// Where that is, for providers over IP.
    address: Option<SocketAddr>,
    outstanding_bytes: usize,
    watched: bool,
}

/// Closes endpoints; what the library would not close comes back.
fn close_all(rails: Vec<PeerRail>) -> Vec<PeerRail> {
    rails.into_iter().filter_map(|mut rail| (!rail.endpoint.close()).then_some(rail)).collect()
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

/// The driver; see the module.
pub(super) struct LibfabricDriver {
    pub(super) info: DriverInfo,
    pub(super) loopback: bool,
    /// Bytes registered in one piece.
    pub(super) segment: u64,
    /// Pieces of one operation.
    pieces_max: usize,
    /// Whether every peer needs a domain of its own.
    own_domains: bool,
    /// Polls since the passive queues were read.
    unread: u32,
    /// How often sleep was put off for input since there was none.
    restless: u32,
    peers: HashMap<u32, Peer>,
    /// What the library would not close of peers that are disconnected.
    lingering: HashMap<u32, Vec<PeerRail>>,
    pub(super) registrations: HashMap<u32, Registration>,
    pub(super) rails: Vec<Rail>,
    /// Memory that peers could reach: a provider in software may still hold a pointer into it for a request that
    /// came before the registration ended. It goes with the endpoints.
    pub(super) retired: Retired,
    slots: Slots<Part>,
    ops: Vec<Option<Op>>,
    free_ops: Vec<u32>,
    receives: HashMap<u64, u32>,
    pub(super) sinks: Sinks,
    pub(super) requests: Requests,
    ready: Vec<Done>,
    events: Vec<Event>,
    epoll: Option<OwnedFd>,
    pub(super) next_id: u32,
}

// SAFETY: nothing outside of it holds one of its objects, and the library lets several threads call those of a domain, one
// at a time (`FI_THREAD_DOMAIN`); fabrics and what is of none are made and dropped by the same calls.
unsafe impl Send for LibfabricDriver {}

impl LibfabricDriver {
    pub(super) fn new(rails: Vec<Rail>, info: DriverInfo, loopback: bool, segment: u64) -> Self {
        let first = rails.first().map(|rail| &rail.info);
        let own_domains = first.is_some_and(|info| {
            info.provider() == "net"
                && select::frees_reads_twice(info.library())
                && !info.has_mr_mode(FI_MR_LOCAL)
        });
        let pieces_max = rails.iter().map(|rail| rail.info.pieces_max()).min().unwrap_or(1);
        let mut driver = Self {
            pieces_max,
            own_domains,
            unread: 0,
            restless: 0,
            info,
            loopback,
            segment,
            peers: HashMap::new(),
            lingering: HashMap::new(),
            registrations: HashMap::new(),
            rails,
            retired: Retired::default(),
            slots: Slots::new(),
            ops: Vec::new(),
            free_ops: Vec::new(),
            receives: HashMap::new(),
            sinks: Sinks::default(),
            requests: Requests::default(),
            ready: Vec::new(),
            events: Vec::new(),
            epoll: None,
            next_id: 0,
        };
        driver.epoll = driver.watch_passive();
        for rail in &driver.rails {
            blob::socket_address(&rail.name).into_iter().for_each(sockets::tune_listener);
        }
        driver.await_requests();
        driver
    }

    pub(super) fn next_id(&mut self) -> u32 {
        loop {
            self.next_id = self.next_id.wrapping_add(1);
            let id = self.next_id;
            let is_remote = |peer: &Peer| peer.remotes.contains_key(&id);
            let is_peer = self.peers.contains_key(&id) || self.lingering.contains_key(&id);
            // What is registered for a write, or its key, takes one: they come round.
            if !is_peer && !self.registrations.contains_key(&id) && !self.peers.values().any(is_remote) {
                return id;
            }
        }
    }

    /// Whether connections have input that no edge will tell of again: one poll takes one message of each.
    fn has_input(&self) -> bool {
        let active = self.peers.values().filter(|peer| peer.is_active());
        let mut queues = active.flat_map(|peer| peer.rails.iter().map(|rail| &rail.endpoint.queue));
        self.rails.iter().any(|rail| rail.passive.queue.has_input()) || queues.any(|queue| queue.has_input())
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
    fn begin(&mut self, op: u64, parts: usize, local: LocalId, kind: Kind) -> u32 {
        let entry = Op { op, parts: parts as u32, bytes: 0, error: None, local, kind };
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
        self.release(entry.local);
        match entry.kind {
            Kind::Sink => return,
            Kind::Request { buffer } => {
                return self.end_request(buffer, entry.error.is_none().then_some(entry.bytes));
            }
            Kind::ToPeer => {}
            Kind::Receive(awaited) => {
                self.receives.remove(&entry.op);
                if awaited.cancelled && entry.error.is_some() {
                    self.sink(awaited);
                }
            }
        }
        let result = entry.error.map_or(Ok(entry.bytes), Err);
        self.ready.push(Done { op: entry.op, result });
    }

    /// Marks a peer as failed after its first error: providers do not always report what comes after it.
    fn fail_peer(&mut self, peer: u32, reason: &str) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        state.failed.get_or_insert_with(|| reason.to_owned());
        for waiting in std::mem::take(&mut state.waiting) {
            self.end_slot(waiting.slot, Err(reason.to_owned()));
        }
    }

    /// Ends what is under way to a peer whose endpoints are closed.
    fn end_slots_of(&mut self, peer: u32) {
        for slot in self.slots.matching(|part| part.owner == Owner::Peer(peer)) {
            self.end_slot(slot, Err("the connection was closed".to_owned()));
        }
    }

    /// Asks the library again to close what it did not.
    fn close_lingering(&mut self) {
        for (peer, rails) in std::mem::take(&mut self.lingering) {
            let open = close_all(rails);
            if open.is_empty() {
                self.end_slots_of(peer);
            } else {
                self.lingering.insert(peer, open);
            }
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
            if result.is_ok() && !std::mem::replace(&mut state.established, true) {
                // Before the first success there may be no connection; from it on there is.
                state.rails.iter().filter_map(|rail| rail.address).for_each(sockets::tune_connections);
            }
        }
        self.end_part(part.op, result);
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
            let own_domain = self.own_domains.then(|| Domain::open(&rail.fabric, &rail.info)).transpose();
            let own_domain = own_domain.map_err(|errno| failed("open a domain for the peer", errno))?;
            let endpoint = Endpoint::open(own_domain.as_ref().unwrap_or(&rail.domain), &rail.info)
                .map_err(|errno| failed("open an endpoint for the peer", errno))?;
            let to = endpoint
                .insert(&theirs[leads_to])
                .map_err(|errno| failed("take the address of the peer", errno))?;
            rails.push(PeerRail {
                endpoint,
                _domain: own_domain,
                to,
                leads_to,
                address: blob::socket_address(&theirs[leads_to]),
                outstanding_bytes: 0,
                watched: false,
            });
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
        let open = close_all(state.rails);
        if open.is_empty() {
            self.end_slots_of(peer.0);
        } else {
            // What the library would not close may still write: its operations are not reported until it does, so
            // that nobody takes their memory for free.
            tracing::error!("libfabric keeps a connection that was to be closed: trying again");
            self.lingering.insert(peer.0, open);
        }
    }

    fn lingers(&self, peer: PeerId) -> bool {
        self.lingering.contains_key(&peer.0)
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
        self.read_pieces(peer, &[Piece { remote, offset: from_offset, local: to }], op)
    }

    fn write(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        to_offset: u64,
        from: LocalRange,
        op: u64,
    ) -> Result<(), PostError> {
        self.write_pieces(peer, &[Piece { remote, offset: to_offset, local: from }], op)
    }

    fn pieces_max(&self) -> PiecesMax {
        PiecesMax { read: self.pieces_max, write: self.pieces_max, write_bytes: self.info.op_max }
    }

    fn read_pieces(&mut self, peer: PeerId, pieces: &[Piece], op: u64) -> Result<(), PostError> {
        self.one_sided(peer, pieces, (Verb::Read, op))
    }

    fn write_pieces(&mut self, peer: PeerId, pieces: &[Piece], op: u64) -> Result<(), PostError> {
        self.one_sided(peer, pieces, (Verb::Write, op))
    }

    fn send(&mut self, peer: PeerId, tag: u64, from: LocalRange, op: u64) -> Result<(), PostError> {
        let to = self.peer(peer)?.rails.first().map_or(FI_ADDR_UNSPEC, |rail| rail.to);
        let call = self.message(Verb::Send, tag, from, to)?;
        self.post(peer, from.id, op, &[(0, call)])
    }

    fn ask(&mut self, peer: PeerId, from: LocalRange, op: u64) -> Result<(), PostError> {
        if from.len > REQUEST_MAX_BYTES {
            return Err(PostError::Range);
        }
        self.send(peer, REQUEST_TAG, from, op)
    }

    fn take_request(&mut self) -> Option<Vec<u8>> {
        self.requests.take()
    }

    fn receive(&mut self, tag: u64, to: LocalRange, op: u64) -> Result<(), PostError> {
        let awaited = Awaited { tag, len: to.len, cancelled: false };
        let slot = self.post_receive(tag, to, op, Kind::Receive(awaited))?;
        self.receives.insert(op, slot);
        Ok(())
    }

    fn cancel_receive(&mut self, op: u64) {
        let Some(slot) = self.receives.get(&op).copied() else { return };
        let at = self.slots.get(slot).map(|part| part.op as usize);
        if let Some(Some(Op { kind: Kind::Receive(awaited), .. })) = at.and_then(|at| self.ops.get_mut(at)) {
            awaited.cancelled = true;
        }
        self.cancel(slot);
    }

    fn poll(&mut self, done: &mut Vec<Done>) -> bool {
        self.close_lingering();
        self.read_queues();
        self.post_waiting();
        self.post_requests();
        let any = !self.ready.is_empty() || !self.requests.is_empty();
        done.append(&mut self.ready);
        any
    }

    fn is_visited(&mut self) -> bool {
        self.epoll.as_ref().is_some_and(take_edges)
    }

    fn arm(&mut self) -> bool {
        if !self.ready.is_empty() || !self.requests.is_empty() {
            return false;
        }
        if self.watch_active().is_none() {
            // Without descriptors the thread naps.
            return true;
        }
        // What came before this is found by polling again; what comes after it ends the sleep.
        let came = self.epoll.as_ref().is_some_and(take_edges);
        let looks = self.own_domains && self.restless < RESTLESS_MAX;
        if looks && self.has_input() {
            self.restless += 1;
            self.unread = u32::MAX;
            return false;
        }
        // Mostly edges tell of what the polls before have read; the input itself says whether there is more.
        if came && !looks {
            return false;
        }
        self.restless = 0;
        let peers = &self.peers;
        self.rails.iter().enumerate().all(|(number, rail)| {
            let active = peers.values().filter(|peer| peer.is_active());
            let queues = active.map(|peer| &peer.rails[number].endpoint.queue);
            let queues = queues.chain(std::iter::once(&rail.passive.queue));
            let mut fids: Vec<*mut fid> = queues.map(|queue| queue.fid()).collect();
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
        let writable = self.registrations.values().any(|one| one.access() == Access::RemoteWrite);
        let mut open: Vec<_> = std::mem::take(&mut self.lingering).into_values().flatten().collect();
        open.extend(std::mem::take(&mut self.peers).into_values().flat_map(|peer| peer.rails));
        let open = close_all(open);
        let (passive, shut) =
            self.rails.drain(..).fold((Vec::new(), Vec::new()), |(mut open, mut shut), mut rail| {
                let kept = if rail.passive.close() { &mut shut } else { &mut open };
                kept.push(rail);
                (open, shut)
            });
        let endpoints_closed = open.is_empty() && passive.is_empty();
        let posted = !self.slots.matching(|part| part.owner != Owner::Passive).is_empty();
        let awaited = writable || !self.receives.is_empty();
        if !open.is_empty() && posted || !passive.is_empty() && awaited {
            // The memory of these operations is about to be somebody else's, and the library would write it. Nothing
            // less than the end of the process prevents that.
            tracing::error!("libfabric does not let go of memory that it may still write: the process ends");
            std::process::abort();
        }
        let mut closed = endpoints_closed && close(std::mem::take(&mut self.registrations));
        if !endpoints_closed {
            std::mem::forget((open, passive, std::mem::take(&mut self.registrations)));
        }
        closed &= close(shut);
        if !closed {
            tracing::error!(
                "libfabric keeps connections that were to be closed: their memory is never freed"
            );
            self.slots.leak();
            std::mem::forget((spans, std::mem::take(&mut self.retired)));
        }
    }
}
