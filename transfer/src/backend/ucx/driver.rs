//! The driver: what the progress thread calls.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use baton_ucx_sys::{
    Api, UCS_ERR_CANCELED, UCS_ERR_NO_MEMORY, UCS_ERR_NO_RESOURCE, UCS_OK, is_request, status_of, ucp_ep_h,
    ucp_rkey_h, ucs_status_t,
};

use super::address::Form;
use super::config::Context;
use super::core::Core;
use super::peer::{self, Peer, Reach, Remote};
use super::region::Region;
use super::slots::{Job, Place, Work};
use super::{
    ADDRESS_MAX_BYTES, Access, CALL_MAX, Done, Driver, DriverError, DriverInfo, LocalId, LocalRange,
    MemorySpan, PIECES_MAX, PeerId, Piece, PiecesMax, PostError, REQUEST_MAX_BYTES, RemoteId, UcxOptions,
    describe, frame, messages,
};
use crate::backend::sockets;
use crate::random::random_u64;

/// See [`UcxDriver::patience`].
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a driver that ends waits for UCX to let go of requests.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// How often answers are looked at.
const LOOK: Duration = Duration::from_millis(250);

/// See the module above.
pub(super) struct UcxDriver {
    pub(super) core: Rc<Core>,
    pub(super) info: DriverInfo,
    address: Vec<u8>,
    /// What peers' addresses look like.
    form: Form,
    /// The address of all peers, where they are on this host.
    local: Option<IpAddr>,
    wait_fd: Option<RawFd>,
    /// How long answers may keep a registration after its end.
    pub(super) patience: Duration,
    /// When `cut_stragglers` looked last.
    looked: Instant,
    pub(super) peers: HashMap<u32, Peer>,
    /// The last number given to a peer, registration or key.
    pub(super) last_id: u32,
    /// Messages that are awaited or under way, by operation: tag and slot.
    pub(super) receives: HashMap<u64, (u64, u32)>,
    /// Ends of operations that were found outside of `poll`.
    done: Vec<Done>,
    /// Why nothing works any more.
    pub(super) dead: Option<String>,
}

// SAFETY: nothing outside of it holds a part of it, so that its reference counts and cells go with it; and the worker is
// one that UCX lets several threads use, one at a time (`UCS_THREAD_MODE_SERIALIZED`).
unsafe impl Send for UcxDriver {}

impl UcxDriver {
    /// Makes context and worker; `one_sided` decides what the transports found would decide otherwise.
    pub(super) fn open(
        api: &Api,
        options: &UcxOptions,
        one_sided: Option<bool>,
    ) -> Result<Self, DriverError> {
        let context = Context::open(api, options, one_sided)?;
        let info = describe(&context, options);
        let core = Rc::new(Core::new(context)?);
        core.listen()?;
        let mut payload = Vec::new();
        payload.extend_from_slice(&core.context.version.0.to_le_bytes());
        payload.extend_from_slice(&core.context.version.1.to_le_bytes());
        payload.push(u8::from(core.context.one_sided));
        let own = core.address()?;
        let form = Form::of(&own, core.context.one_sided).ok_or_else(|| DriverError {
            what: format!("the addresses of UCX {} cannot be checked", core.context.version()),
            remedy: "use UCX 1.13 to 1.22".to_owned(),
        })?;
        let local = options.bind.is_loopback().then_some(options.bind);
        let listens_at = local.map(|ip| form.listens_at(ip)).unwrap_or_default();
        listens_at.into_iter().for_each(sockets::tune_listener);
        payload.extend_from_slice(&own);
        let address = frame::seal(frame::Kind::Address, &payload);
        if address.len() > ADDRESS_MAX_BYTES {
            return Err(DriverError {
                what: format!("UCX's address has {} bytes, more than {ADDRESS_MAX_BYTES}", address.len()),
                remedy: "name fewer transports, or bind to the address of one interface".to_owned(),
            });
        }
        let wait_fd = core.wait_fd();
        Ok(Self {
            core,
            info,
            address,
            form,
            local,
            wait_fd,
            patience: PATIENCE,
            looked: Instant::now(),
            peers: HashMap::new(),
            last_id: 0,
            receives: HashMap::new(),
            done: Vec::new(),
            dead: None,
        })
    }

    fn next_id(&mut self) -> u32 {
        loop {
            self.last_id = self.last_id.wrapping_add(1);
            let id = self.last_id;
            let is_remote = |peer: &Peer| peer.remotes.contains_key(&id);
            // What is registered for a write, or its key, takes one: they come round.
            let is_region = self.core.regions.borrow().contains_key(&id);
            if !is_region && !self.peers.contains_key(&id) && !self.peers.values().any(is_remote) {
                return id;
            }
        }
    }

    fn gone(&self) -> Option<DriverError> {
        let what = self.dead.clone()?;
        Some(DriverError { what, remedy: String::new() })
    }

    /// A peer that operations can be posted to.
    fn usable(&self, peer: PeerId) -> Result<&Peer, PostError> {
        if let Some(why) = &self.dead {
            return Err(PostError::Failed(why.clone()));
        }
        let Some(peer) = self.peers.get(&peer.0) else {
            return Err(PostError::Failed("the peer is not connected".to_owned()));
        };
        match peer.failure() {
            Some(status) => Err(PostError::Failed(self.core.describe(status))),
            None => Ok(peer),
        }
    }

    /// Where a local range is.
    fn local(&self, range: LocalRange) -> Result<usize, PostError> {
        let regions = self.core.regions.borrow();
        let region =
            regions.get(&range.id.0).filter(|region| region.gone.is_none()).ok_or(PostError::Range)?;
        let longest = self.info.op_max;
        region.at(range.offset as u64, range.len).filter(|_| range.len <= longest).ok_or(PostError::Range)
    }

    fn post(&mut self, work: Work, peer: PeerId, pieces: &[Piece], op: u64) -> Result<(), PostError> {
        let (Some(first), true) = (pieces.first(), pieces.len() <= PIECES_MAX) else {
            return Err(PostError::Range);
        };
        let mut places = [Place::default(); PIECES_MAX];
        let mut targets = [None; PIECES_MAX];
        let target = self.usable(peer)?;
        for (piece, (place, target_of)) in pieces.iter().zip(places.iter_mut().zip(&mut targets)) {
            let key =
                target.remotes.get(&piece.remote.0).filter(|key| key.fits(piece.offset, piece.local.len));
            let reach = key.ok_or(PostError::Range)?.reach;
            if piece.local.id != first.local.id {
                return Err(PostError::Range);
            }
            *place = Place { address: self.local(piece.local)?, len: piece.local.len };
            *target_of = Some(reach);
        }
        let mut job = Job::new(work, op, Some(peer.0));
        job.region = Some(first.local.id.0);
        (job.address, job.len) = (places[0].address, pieces.iter().map(|piece| piece.local.len).sum());
        let ep = target.ep;
        match targets[0] {
            Some(Reach::OneSided { base, key }) if pieces.len() == 1 => {
                job.remote = Some(first.remote.0);
                self.post_one_sided(ep, job, base + first.offset, key)?;
            }
            Some(Reach::Messages { .. }) => {
                (job.nonce, job.parts) = (random(), 1 + pieces.len() as u8);
                job.unanswered = (1u16 << pieces.len()).wrapping_sub(1) as u8;
                let mut asked = Vec::with_capacity(PIECES_MAX);
                for (piece, reach) in pieces.iter().zip(targets.iter().flatten()) {
                    asked.push(reach.target(piece.offset).ok_or(PostError::Range)?);
                }
                match (work, &asked[..]) {
                    (Work::Read, _) => self.core.post_read(ep, job, &asked, places)?,
                    (_, [target]) => self.core.post_write(ep, job, target)?,
                    (_, asked) if job.len <= messages::TOGETHER_BYTES => {
                        self.core.post_writes(ep, job, asked, places)?;
                    }
                    _ => return Err(PostError::Range),
                }
            }
            Some(Reach::OneSided { .. }) | None => return Err(PostError::Range),
        }
        if let Some(peer) = self.peers.get_mut(&peer.0) {
            peer.posted += 1;
            if let Some(key) = job.remote.and_then(|remote| peer.remotes.get_mut(&remote)) {
                key.in_use += 1;
            }
        }
        Ok(())
    }

    /// Posts UCX's own read or write.
    fn post_one_sided(&self, ep: ucp_ep_h, job: Job, at: u64, key: ucp_rkey_h) -> Result<(), PostError> {
        let slot = self.core.start(job).ok_or(PostError::Again)?;
        let params = self.core.params(slot, job.region);
        let api = &self.core.context.api;
        let memory = std::ptr::with_exposed_provenance_mut::<c_void>(job.address);
        let result = if job.work == Work::Read {
            // SAFETY: endpoint and key live; the range is within the registration and stays until the callback.
            unsafe { (api.ucp_get_nbx)(ep, memory, job.len, at, key, &raw const params) }
        } else {
            // SAFETY: as above.
            unsafe { (api.ucp_put_nbx)(ep, memory, job.len, at, key, &raw const params) }
        };
        self.core.posted(slot.index, result)
    }

    /// Takes up what ended. Returns whether anything did.
    fn settle(&mut self) -> bool {
        let mut any = false;
        loop {
            let Some(index) = self.core.ended.borrow_mut().pop_front() else { break };
            any = true;
            if let Some(job) = self.core.slots.job(index) {
                self.end(index, &job);
            }
        }
        any
    }

    fn end(&mut self, index: u32, job: &Job) {
        let mut peer = job.peer.and_then(|peer| self.peers.get_mut(&peer));
        if job.work == Work::Write
            && job.status == UCS_OK
            && self.core.context.one_sided
            && let Some(peer) = &mut peer
        {
            // Counts when it is delivered: after a flush.
            peer.unflushed.push(index);
            return;
        }
        let flushed = match &mut peer {
            Some(peer) if job.work == Work::Flush => peer.flushing.take().unwrap_or_default(),
            _ => Vec::new(),
        };
        if let Some(peer) = peer {
            peer.posted -= 1;
        }
        self.core.slots.finish(index);
        for write in flushed {
            self.report(write, job.status);
        }
        self.retire(job, job.status);
    }

    /// Ends a write that waited for a flush.
    fn report(&mut self, index: u32, status: ucs_status_t) {
        let Some(job) = self.core.slots.finish(index) else { return };
        if let Some(peer) = job.peer.and_then(|peer| self.peers.get_mut(&peer)) {
            peer.posted -= 1;
        }
        self.retire(&job, status);
    }

    /// Lets go of what a job used, and tells of its end.
    fn retire(&mut self, job: &Job, status: ucs_status_t) {
        if let (Some(peer), Some(remote)) = (job.peer, job.remote)
            && let Some(peer) = self.peers.get_mut(&peer)
        {
            peer.release(&self.core, remote);
        }
        if let Some(region) = job.region {
            self.core.release(region);
        }
        if status == UCS_OK
            && let Some(peer) = job.peer.and_then(|peer| self.peers.get_mut(&peer))
        {
            peer.tune();
        }
        let moved = match job.work {
            Work::Read | Work::Write | Work::Send => job.len,
            Work::Receive => {
                self.receives.remove(&job.op);
                job.moved
            }
            Work::Serve | Work::Flush | Work::Close => return,
        };
        let result = if status == UCS_OK { Ok(moved) } else { Err(self.core.describe(status)) };
        self.done.push(Done { op: job.op, result });
    }

    /// Flushes endpoints with writes that are out.
    fn start_flushes(&mut self) {
        let mut failed = Vec::new();
        for (id, peer) in &mut self.peers {
            if peer.unflushed.is_empty() || peer.flushing.is_some() || peer.ep.is_null() {
                continue;
            }
            let Some(slot) = self.core.start(Job::new(Work::Flush, 0, Some(*id))) else { continue };
            let params = self.core.params(slot, None);
            // SAFETY: the endpoint lives, it is null once closed.
            let result = unsafe { (self.core.context.api.ucp_ep_flush_nbx)(peer.ep, &raw const params) };
            let status = if is_request(result) { UCS_OK } else { status_of(result) };
            if matches!(status, UCS_ERR_NO_MEMORY | UCS_ERR_NO_RESOURCE) {
                self.core.abandon(slot.index);
                continue;
            }
            let covered = std::mem::take(&mut peer.unflushed);
            if status != UCS_OK {
                self.core.abandon(slot.index);
                failed.extend(covered.into_iter().map(|write| (write, status)));
                continue;
            }
            peer.flushing = Some(covered);
            peer.posted += 1;
            if !is_request(result) {
                self.core.part_done(slot.index, UCS_OK, None);
            }
        }
        for (write, status) in failed {
            self.report(write, status);
        }
    }

    /// Ends what waits for an answer from peers that failed: UCX does not know that it waits.
    fn mourn(&mut self) {
        let core = &self.core;
        for (id, peer) in &mut self.peers {
            if !peer.mourned
                && let Some(status) = peer.failure()
            {
                peer.mourned = true;
                stop_waiting(core, *id, status);
            }
        }
    }

    /// Ends answers that keep registrations after their end: their peers take no bytes.
    fn cut_stragglers(&mut self) {
        if self.looked.elapsed() < LOOK {
            return;
        }
        self.looked = Instant::now();
        let regions = self.core.regions.borrow();
        let is_late = |region: &Region| region.gone.is_some_and(|since| since.elapsed() > self.patience);
        if !regions.values().any(is_late) {
            return;
        }
        let late: Vec<u32> =
            regions.iter().filter(|(_, region)| is_late(region)).map(|(id, _)| *id).collect();
        drop(regions);
        for ep in self.core.take_replies(|region| late.contains(&region)) {
            tracing::debug!(library = "ucx", "a peer takes no bytes and holds memory that is gone: closed");
            // UCX gives the same endpoint for answers and for what is posted.
            match self.peers.iter().find(|(_, peer)| peer.ep == ep).map(|(id, _)| *id) {
                Some(peer) => self.close(&[peer]),
                None => self.core.close_reply(ep),
            }
        }
    }

    /// Closes endpoints. On return nothing of those peers writes local memory, and all of it was reported.
    fn close(&mut self, ids: &[u32]) {
        let deadline = Instant::now() + CALL_MAX;
        self.core.start_arrivals();
        let mut closed = true;
        for id in ids {
            if let Some(peer) = self.peers.get_mut(id) {
                closed &= peer.close(&self.core, *id);
                stop_waiting(&self.core, *id, UCS_ERR_CANCELED);
            }
        }
        if !closed {
            self.collapse("UCX does not close a connection");
        }
        loop {
            self.settle();
            for id in ids {
                let Some(peer) = self.peers.get_mut(id) else { continue };
                for write in std::mem::take(&mut peer.unflushed) {
                    self.report(write, UCS_ERR_CANCELED);
                }
            }
            if ids.iter().all(|id| self.peers.get(id).is_none_or(|peer| peer.posted == 0)) {
                break;
            }
            if Instant::now() > deadline {
                self.collapse("UCX did not close a connection in time");
                break;
            }
            if !self.core.progress() {
                std::thread::yield_now();
            }
        }
        for id in ids {
            if let Some(mut peer) = self.peers.remove(id) {
                peer.forget_all(&self.core);
            }
        }
    }

    /// Ends the worker. UCX aborts the process if it still has requests then, so they are ended first.
    fn end_worker(&mut self) {
        let deadline = Instant::now() + LAST_ANSWERS;
        self.core.start_arrivals();
        for ep in self.core.take_replies(|_| true) {
            if self.peers.values().all(|peer| peer.ep != ep) {
                self.core.close_reply(ep);
            }
        }
        while self.core.has_requests() && Instant::now() < deadline {
            if !self.core.progress() {
                std::thread::yield_now();
            }
        }
        if self.core.has_requests() && !self.core.context.one_sided {
            // Without progress nothing happens in messages any more: memory is as safe as after the end.
            tracing::warn!(
                "UCX does not let go of what is under way: its worker and the memory are never freed"
            );
            self.core.worker.set(std::ptr::null_mut());
            std::mem::forget(Rc::clone(&self.core));
        }
        self.core.destroy();
    }

    /// Ends everything, because only that keeps memory safe.
    fn collapse(&mut self, why: &str) {
        self.dead = Some(why.to_owned());
        self.wait_fd = None;
        for peer in self.peers.values_mut() {
            peer.abandon_keys(&self.core);
        }
        self.end_worker();
        self.settle();
        for (index, job) in self.core.slots.busy() {
            self.core.slots.finish(index);
            self.retire(&job, UCS_ERR_CANCELED);
        }
        self.core.awaited.borrow_mut().clear();
        for peer in self.peers.values_mut() {
            peer.posted = 0;
            peer.ep = std::ptr::null_mut();
        }
    }
}

impl Driver for UcxDriver {
    fn info(&self) -> &DriverInfo {
        &self.info
    }

    fn address(&self) -> Vec<u8> {
        self.address.clone()
    }

    fn register(&mut self, span: &MemorySpan, access: Access) -> Result<(LocalId, Vec<u8>), DriverError> {
        if let Some(error) = self.gone() {
            return Err(error);
        }
        let mut region = Region::map(&self.core.context, span, access)?;
        region.secret = u128::from(random()) << 64 | u128::from(random());
        let id = self.next_id();
        let key = match access {
            Access::Local => Ok(Vec::new()),
            Access::RemoteRead | Access::RemoteWrite => peer::export(&self.core, id, &region),
        };
        match key {
            Ok(key) => {
                self.core.regions.borrow_mut().insert(id, region);
                Ok((LocalId(id), key))
            }
            Err(error) => {
                region.unmap(&self.core.context);
                Err(error)
            }
        }
    }

    fn deregister(&mut self, id: LocalId) {
        // Counted once more, so that the release below is the one that ends it where nothing else does.
        self.core.hold(id.0);
        if let Some(region) = self.core.regions.borrow_mut().get_mut(&id.0) {
            region.gone.get_or_insert_with(Instant::now);
        }
        self.core.release(id.0);
    }

    fn connect(&mut self, address: &[u8]) -> Result<PeerId, DriverError> {
        if let Some(error) = self.gone() {
            return Err(error);
        }
        let peer = Peer::connect(&self.core, &self.form, address, self.local)?;
        let id = self.next_id();
        self.peers.insert(id, peer);
        Ok(PeerId(id))
    }

    fn disconnect(&mut self, peer: PeerId) {
        self.close(&[peer.0]);
    }

    fn import(&mut self, peer: PeerId, key: &[u8]) -> Result<RemoteId, DriverError> {
        let failed = |error: PostError| DriverError { what: error.to_string(), remedy: String::new() };
        let remote = Remote::import(&self.core, self.usable(peer).map_err(failed)?, key)?;
        let id = self.next_id();
        if let Some(peer) = self.peers.get_mut(&peer.0) {
            peer.remotes.insert(id, remote);
        }
        Ok(RemoteId(id))
    }

    fn forget(&mut self, peer: PeerId, remote: RemoteId) {
        if let Some(peer) = self.peers.get_mut(&peer.0) {
            peer.forget(&self.core, remote.0);
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
        self.post(Work::Read, peer, &[Piece { remote, offset: from_offset, local: to }], op)
    }

    fn write(
        &mut self,
        peer: PeerId,
        remote: RemoteId,
        to_offset: u64,
        from: LocalRange,
        op: u64,
    ) -> Result<(), PostError> {
        self.post(Work::Write, peer, &[Piece { remote, offset: to_offset, local: from }], op)
    }

    fn pieces_max(&self) -> PiecesMax {
        let most = if self.core.context.one_sided { 1 } else { PIECES_MAX };
        PiecesMax { read: most, write: most, write_bytes: messages::TOGETHER_BYTES }
    }

    fn read_pieces(&mut self, peer: PeerId, pieces: &[Piece], op: u64) -> Result<(), PostError> {
        self.post(Work::Read, peer, pieces, op)
    }

    fn write_pieces(&mut self, peer: PeerId, pieces: &[Piece], op: u64) -> Result<(), PostError> {
        self.post(Work::Write, peer, pieces, op)
    }

    fn send(&mut self, peer: PeerId, tag: u64, from: LocalRange, op: u64) -> Result<(), PostError> {
        let address = self.local(from)?;
        if from.len > self.info.message_max {
            return Err(PostError::Range);
        }
        let mut job = Job::new(Work::Send, op, Some(peer.0));
        (job.region, job.address, job.len) = (Some(from.id.0), address, from.len);
        self.core.post_message(self.usable(peer)?.ep, job, tag)?;
        if let Some(peer) = self.peers.get_mut(&peer.0) {
            peer.posted += 1;
        }
        Ok(())
    }

    fn ask(&mut self, peer: PeerId, from: LocalRange, op: u64) -> Result<(), PostError> {
        let address = self.local(from)?;
        if from.len > REQUEST_MAX_BYTES {
            return Err(PostError::Range);
        }
        let mut job = Job::new(Work::Send, op, Some(peer.0));
        (job.region, job.address, job.len) = (Some(from.id.0), address, from.len);
        self.core.post_request(self.usable(peer)?.ep, job)?;
        if let Some(peer) = self.peers.get_mut(&peer.0) {
            peer.posted += 1;
        }
        Ok(())
    }

    fn take_request(&mut self) -> Option<Vec<u8>> {
        self.core.requests.borrow_mut().pop_front()
    }

    fn receive(&mut self, tag: u64, to: LocalRange, op: u64) -> Result<(), PostError> {
        if let Some(why) = &self.dead {
            return Err(PostError::Failed(why.clone()));
        }
        let mut job = Job::new(Work::Receive, op, None);
        (job.region, job.address, job.len) = (Some(to.id.0), self.local(to)?, to.len);
        if self.core.awaited.borrow().contains_key(&tag) {
            return Err(PostError::Failed("the tag is awaited already".to_owned()));
        }
        let slot = self.core.start(job).ok_or(PostError::Again)?;
        self.core.awaited.borrow_mut().insert(tag, slot.index);
        self.receives.insert(op, (tag, slot.index));
        Ok(())
    }

    fn cancel_receive(&mut self, op: u64) {
        let Some((tag, index)) = self.receives.get(&op).copied() else { return };
        // The tag may be that of a later receive already.
        let awaited = match self.core.awaited.borrow_mut().entry(tag) {
            Entry::Occupied(entry) if *entry.get() == index => entry.remove() == index,
            _ => false,
        };
        // One whose bytes are on their way by rendezvous is reported when UCX is done with the buffer.
        if awaited || self.core.drop_arrival(index) {
            self.core.part_done(index, UCS_ERR_CANCELED, None);
        }
    }

    fn poll(&mut self, done: &mut Vec<Done>) -> bool {
        let progressed = self.core.progress();
        self.mourn();
        self.cut_stragglers();
        let settled = self.settle();
        self.start_flushes();
        let reported = !self.done.is_empty();
        done.append(&mut self.done);
        progressed || settled || reported
    }

    fn arm(&mut self) -> bool {
        if self.dead.is_some() {
            // Nothing will ever happen again.
            return self.done.is_empty();
        }
        let idle = self.done.is_empty()
            && self.core.requests.borrow().is_empty()
            && self.core.ended.borrow().is_empty()
            && self.core.arrivals.borrow().is_empty();
        idle && self.core.arm()
    }

    fn wait_fd(&self) -> Option<RawFd> {
        self.wait_fd
    }
}

impl Drop for UcxDriver {
    fn drop(&mut self) {
        let ids: Vec<u32> = self.peers.keys().copied().collect();
        self.close(&ids);
        self.end_worker();
    }
}

/// Ends the jobs that wait for an answer of a peer; those whose answer is already arriving end with it.
fn stop_waiting(core: &Core, peer: u32, status: ucs_status_t) {
    for (index, job) in core.slots.busy() {
        if job.peer == Some(peer) {
            core.stop_waiting(index, status);
        }
    }
}

/// A number that nobody can guess, never 0.
fn random() -> u64 {
    loop {
        // The system has always more.
        if let Ok(number @ 1..) = random_u64() {
            return number;
        }
    }
}
