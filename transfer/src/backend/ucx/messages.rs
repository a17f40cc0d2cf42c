//! Reads, writes and messages as active messages.
//!
//! ```text
//! MESSAGE tag, bytes                                    ► lands where the tag is awaited, else dropped
//! READ    slot, nonce; pieces: region, flags, secret, range        ► for some: ANSWER slot, which, nonce, status, bytes
//! WRITE   slot, nonce, region, flags, secret, range, bytes (eager) ► ANSWER slot, 0, nonce, status
//! WRITES  slot, count, nonce; pieces as in READ, their bytes (eager) ► ANSWER slot, which, nonce, status
//! ```
//! The owner answers inside the callback, where the endpoint UCX gives for answers certainly lives. Nonces are random,
//! so only who got the request can answer it. Bytes by rendezvous are taken up outside of the callback.

use std::ffi::c_void;

use baton_ucx_sys::{
    UCP_AM_RECV_ATTR_FIELD_REPLY_EP, UCP_AM_RECV_ATTR_FLAG_RNDV, UCP_AM_SEND_FLAG_EAGER,
    UCP_AM_SEND_FLAG_REPLY, UCP_AM_SEND_FLAG_RNDV, UCP_DATATYPE_IOV, UCP_OP_ATTR_FIELD_DATATYPE,
    UCP_OP_ATTR_FIELD_FLAGS, UCP_OP_ATTR_FIELD_MEMORY_TYPE, UCS_INPROGRESS, UCS_MEMORY_TYPE_HOST, UCS_OK,
    is_request, status_of, ucp_am_recv_callback_t, ucp_am_recv_param_t, ucp_dt_iov_t, ucp_ep_h,
    ucp_request_param_t, ucs_status_t,
};

use super::core::Core;
use super::slots::{HEADER_WORDS, Job, PIECE_WORDS, Place, Slot, Work};
use super::{Access, PIECES_MAX, PostError, REQUEST_MAX_BYTES};

/// Which form the messages have.
pub(super) const VERSION: &str = "v3";

const MESSAGE: u32 = 0;
const READ: u32 = 1;
const WRITE: u32 = 2;
const ANSWER: u32 = 3;
const REQUEST: u32 = 4;
const WRITES: u32 = 5;

/// The handlers of all kinds of messages.
pub(super) const HANDLERS: [(u32, ucp_am_recv_callback_t); 6] = [
    (MESSAGE, on_message),
    (READ, on_read),
    (WRITE, on_write),
    (ANSWER, on_answer),
    (REQUEST, on_request),
    (WRITES, on_writes),
];

/// Most requests that wait to be taken. They are, with every poll: only who sends without waiting for answers loses some.
const REQUESTS_MAX: usize = 4096;

/// Longest read, write or message: an eager write is assembled in memory at the peer.
pub(super) const BYTES_MAX: usize = 16 << 20;

/// Shorter pieces are answered together, in messages of no more than so many bytes: each message costs system calls and
/// a packet that is not full on either side. Longer ones are taken by rendezvous where that is quicker.
const TOGETHER_BELOW_BYTES: usize = 128 << 10;
pub(super) const TOGETHER_BYTES: usize = 256 << 10;

/// Bytes that name a piece.
const PIECE_BYTES: usize = PIECE_WORDS * size_of::<u64>();

/// Statuses of ours, below all of UCX's.
pub(super) const REFUSED: ucs_status_t = -101;
pub(super) const MISFIT: ucs_status_t = -102;

/// Asks for the bytes by rendezvous, because they go to memory the CPU cannot write.
const FLAG_RENDEZVOUS: u32 = 1;

/// A message whose bytes are still with their sender.
pub(super) struct Arrival {
    slot: u32,
    to: Place,
    data: *mut c_void,
    len: usize,
}

/// What a reader or writer names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) region: u32,
    pub(super) secret: u128,
    pub(super) offset: u64,
}

type Header = [u64; HEADER_WORDS];

/// What names a range of a registration.
fn piece_words(target: &Target, flags: u32, len: usize) -> [u64; PIECE_WORDS] {
    [
        u64::from(target.region) | u64::from(flags) << 32,
        target.secret as u64,
        (target.secret >> 64) as u64,
        target.offset,
        len as u64,
    ]
}

/// Who asks for a piece, and what for.
fn request_header(asker: [u64; 2], piece: [u64; PIECE_WORDS]) -> Header {
    let mut header = [0; HEADER_WORDS];
    header[..2].copy_from_slice(&asker);
    header[2..].copy_from_slice(&piece);
    header
}

impl Core {
    /// Posts a message.
    pub(super) fn post_message(&self, ep: ucp_ep_h, job: Job, tag: u64) -> Result<(), PostError> {
        let slot = self.start(job).ok_or(PostError::Again)?;
        let flags = if self.is_host(job.region) { 0 } else { UCP_AM_SEND_FLAG_RNDV };
        let mut header = [0; HEADER_WORDS];
        header[0] = tag.to_le();
        slot.header.set(header);
        self.send(ep, MESSAGE, slot, Place { address: job.address, len: job.len }, flags)
    }

    /// Posts a request of the core above: an eager message that nobody has to await.
    pub(super) fn post_request(&self, ep: ucp_ep_h, job: Job) -> Result<(), PostError> {
        let slot = self.start(job).ok_or(PostError::Again)?;
        slot.header.set([0; HEADER_WORDS]);
        self.send(ep, REQUEST, slot, Place { address: job.address, len: job.len }, UCP_AM_SEND_FLAG_EAGER)
    }

    /// Posts a read: the request, which the owner answers with the bytes of each piece.
    pub(super) fn post_read(
        &self,
        ep: ucp_ep_h,
        job: Job,
        pieces: &[Target],
        places: [Place; PIECES_MAX],
    ) -> Result<(), PostError> {
        let flags = if self.is_host(job.region) { 0 } else { FLAG_RENDEZVOUS };
        let slot = self.start(job).ok_or(PostError::Again)?;
        slot.places.set(places);
        slot.header.set(request_header([u64::from(slot.index), job.nonce], [0; PIECE_WORDS]).map(u64::to_le));
        let mut wanted = [[0; PIECE_WORDS]; PIECES_MAX];
        for (words, (target, place)) in wanted.iter_mut().zip(pieces.iter().zip(&places)) {
            *words = piece_words(target, flags, place.len).map(u64::to_le);
        }
        slot.wanted.set(wanted);
        let asked =
            Place { address: slot.wanted.as_ptr().expose_provenance(), len: pieces.len() * PIECE_BYTES };
        self.send(ep, READ, slot, asked, UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER)
    }

    /// Posts a write: the bytes, which the owner acknowledges once they are in place.
    pub(super) fn post_write(&self, ep: ucp_ep_h, job: Job, target: &Target) -> Result<(), PostError> {
        let slot = self.start(job).ok_or(PostError::Again)?;
        let header = request_header([u64::from(slot.index), job.nonce], piece_words(target, 0, job.len));
        slot.header.set(header.map(u64::to_le));
        let bytes = Place { address: job.address, len: job.len };
        self.send(ep, WRITE, slot, bytes, UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER)
    }

    /// Posts a write of several pieces, in host memory: what names each and then their bytes, which the owner acknowledges
    /// together.
    pub(super) fn post_writes(
        &self,
        ep: ucp_ep_h,
        job: Job,
        pieces: &[Target],
        places: [Place; PIECES_MAX],
    ) -> Result<(), PostError> {
        if !self.is_host(job.region) {
            return Err(PostError::Range);
        }
        let slot = self.start(job).ok_or(PostError::Again)?;
        slot.header.set(about([u64::from(slot.index), job.nonce], 0, pieces.len()).map(u64::to_le));
        let mut wanted = [[0; PIECE_WORDS]; PIECES_MAX];
        let mut parts = slot.parts.get();
        for (at, (target, place)) in pieces.iter().zip(&places).enumerate() {
            wanted[at] = piece_words(target, 0, place.len).map(u64::to_le);
            let buffer = std::ptr::with_exposed_provenance_mut(place.address);
            parts[1 + at] = ucp_dt_iov_t { buffer, length: place.len };
        }
        slot.wanted.set(wanted);
        parts[0] = ucp_dt_iov_t { buffer: slot.wanted.as_ptr().cast(), length: pieces.len() * PIECE_BYTES };
        slot.parts.set(parts);
        self.send_parts(ep, WRITES, slot, 1 + pieces.len(), UCP_AM_SEND_FLAG_REPLY)
    }

    /// Sends the header of a slot and `bytes`: of its job's registration or, with a read, of itself.
    pub(super) fn send(
        &self,
        ep: ucp_ep_h,
        id: u32,
        slot: &Slot,
        bytes: Place,
        flags: u32,
    ) -> Result<(), PostError> {
        let region = slot.job.get().and_then(|job| job.region).filter(|_| bytes.len > 0 && id != READ);
        let mut params = self.params(slot, region);
        params.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
        params.flags = flags;
        self.send_with(ep, id, slot, bytes, &params)
    }

    /// Sends the header of a slot and its `count` parts, which are host memory of its job's registration.
    fn send_parts(
        &self,
        ep: ucp_ep_h,
        id: u32,
        slot: &Slot,
        count: usize,
        flags: u32,
    ) -> Result<(), PostError> {
        let mut params = self.params(slot, None);
        params.op_attr_mask |=
            UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_DATATYPE | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
        params.flags = UCP_AM_SEND_FLAG_EAGER | flags;
        params.datatype = UCP_DATATYPE_IOV;
        params.memory_type = UCS_MEMORY_TYPE_HOST;
        let parts = Place { address: slot.parts.as_ptr().expose_provenance(), len: count };
        self.send_with(ep, id, slot, parts, &params)
    }

    fn send_with(
        &self,
        ep: ucp_ep_h,
        id: u32,
        slot: &Slot,
        bytes: Place,
        params: &ucp_request_param_t,
    ) -> Result<(), PostError> {
        let words = match id {
            MESSAGE | REQUEST => 1,
            READ | WRITES => 2,
            ANSWER => 3,
            _ => HEADER_WORDS,
        };
        let from = match bytes.len {
            0 => std::ptr::null(),
            _ => std::ptr::with_exposed_provenance::<c_void>(bytes.address),
        };
        // SAFETY: the endpoint lives (it is closed only when its peer goes, or is the one of the running callback);
        // header and bytes stay in place until the callback (core rules 3 and 4).
        let result = unsafe {
            (self.context.api.ucp_am_send_nbx)(
                ep,
                id,
                slot.header.as_ptr().cast(),
                words * size_of::<u64>(),
                from,
                bytes.len,
                params,
            )
        };
        self.posted(slot.index, result)
    }

    fn is_host(&self, region: Option<u32>) -> bool {
        let regions = self.regions.borrow();
        region.and_then(|region| regions.get(&region)).is_none_or(super::region::Region::is_host)
    }

    /// Takes up messages whose bytes are still with their sender. Returns whether there were any.
    pub(super) fn start_arrivals(&self) -> bool {
        let mut any = false;
        loop {
            let Some(arrival) = self.arrivals.borrow_mut().pop_front() else { return any };
            any = true;
            let (Some(slot), Some(job)) = (self.slot(arrival.slot), self.slots.job(arrival.slot)) else {
                continue;
            };
            let params = self.receive_params(slot, job.region);
            // SAFETY: the descriptor was kept by answering `UCS_INPROGRESS`, and is used once; `len` bytes of the job's
            // memory stay in place until the callback (core rule 4).
            let result = unsafe {
                (self.context.api.ucp_am_recv_data_nbx)(
                    self.worker.get(),
                    arrival.data,
                    std::ptr::with_exposed_provenance_mut(arrival.to.address),
                    arrival.len,
                    &raw const params,
                )
            };
            if !is_request(result) {
                self.part_done(arrival.slot, status_of(result), Some(arrival.len));
            }
        }
    }

    /// Gives back a message that was to be taken up for `slot`; false: it is not among them.
    pub(super) fn drop_arrival(&self, slot: u32) -> bool {
        let mut arrivals = self.arrivals.borrow_mut();
        let Some(at) = arrivals.iter().position(|arrival| arrival.slot == slot) else { return false };
        let arrival = arrivals.remove(at);
        drop(arrivals);
        if let Some(arrival) = arrival {
            // SAFETY: kept by answering `UCS_INPROGRESS`, and given back once.
            unsafe { (self.context.api.ucp_am_data_release)(self.worker.get(), arrival.data) };
        }
        true
    }

    /// Puts arrived bytes where a job wants them, now or (rendezvous) soon.
    fn land(
        &self,
        (index, job): (u32, &Job),
        place: Place,
        (data, len): (*mut c_void, usize),
        rendezvous: bool,
    ) -> ucs_status_t {
        if len > place.len {
            self.part_done(index, MISFIT, None);
            return UCS_OK;
        }
        if rendezvous {
            self.arrivals.borrow_mut().push_back(Arrival { slot: index, to: place, data, len });
            return UCS_INPROGRESS;
        }
        if len > 0 && !self.is_host(job.region) {
            self.part_done(index, MISFIT, None);
            return UCS_OK;
        }
        if len > 0 {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(place.address);
            // SAFETY: `len` bytes of a message, and of host memory of the job (core rule 4), which UCX's buffers are not.
            unsafe { std::ptr::copy_nonoverlapping(data.cast::<u8>(), to, len) };
        }
        self.part_done(index, UCS_OK, Some(len));
        UCS_OK
    }

    /// Where the range of a request is, if the requester may have it.
    fn allowed(&self, piece: &[u64; PIECE_WORDS], access: Access) -> Option<(u32, usize, usize)> {
        let id = piece[0] as u32;
        let secret = u128::from(piece[1]) | u128::from(piece[2]) << 64;
        let len = usize::try_from(piece[4]).ok().filter(|len| *len <= BYTES_MAX)?;
        let regions = self.regions.borrow();
        let region = regions.get(&id).filter(|region| region.gone.is_none())?;
        if region.access != access || region.secret != secret {
            return None;
        }
        Some((id, region.at(piece[3], len)?, len))
    }

    /// The endpoints of answers under way with bytes of such regions; they are the caller's to close, once.
    pub(super) fn take_replies(&self, wanted: impl Fn(u32) -> bool) -> Vec<ucp_ep_h> {
        let holds = |job: &Job| job.parts > 0 && !job.reply.is_null() && job.region.is_some_and(&wanted);
        let mut endpoints: Vec<_> =
            self.slots.busy().iter().filter(|(_, job)| holds(job)).map(|(_, job)| job.reply).collect();
        endpoints.sort_unstable();
        endpoints.dedup();
        endpoints.iter().for_each(|ep| self.forget_replies(*ep));
        endpoints
    }

    /// An endpoint is closed now: no answer under way on it may have it closed once more.
    pub(super) fn forget_replies(&self, ep: ucp_ep_h) {
        for (index, job) in self.slots.busy() {
            if job.reply == ep {
                self.slots.set(index, Job { reply: std::ptr::null_mut(), ..job });
            }
        }
    }

    /// Whether UCX has requests of ours: all jobs but messages that did not come.
    pub(super) fn has_requests(&self) -> bool {
        let awaited = self.awaited.borrow();
        let waits = |index, job: &Job| job.work == Work::Receive && awaited.values().any(|at| *at == index);
        self.slots.busy().iter().any(|(index, job)| job.parts > 0 && !waits(*index, job))
    }

    /// Answers a request for pieces: small ones of one registration together, as long as they are all there is to say.
    fn serve(&self, ep: ucp_ep_h, asker: [u64; 2], pieces: &[[u64; PIECE_WORDS]]) {
        let mut first = 0;
        while let Some(piece) = pieces.get(first) {
            let mut job = Job::new(Work::Serve, 0, None);
            let Some((region, address, len)) = self.allowed(piece, Access::RemoteRead) else {
                self.answer(ep, &about(asker, first, 1), REFUSED, job, 0);
                first += 1;
                continue;
            };
            (job.region, job.address, job.len) = (Some(region), address, len);
            let rendezvous = asks_rendezvous(piece) || !self.is_host(job.region);
            let mut parts = [Place { address, len }; PIECES_MAX];
            let mut count = 1;
            while len < TOGETHER_BELOW_BYTES
                && !rendezvous
                && let Some(piece) = pieces.get(first + count)
                && !asks_rendezvous(piece)
                && let Some((of, address, len)) = self.allowed(piece, Access::RemoteRead)
                && of == region
                && len < TOGETHER_BELOW_BYTES
                && job.len + len <= TOGETHER_BYTES
            {
                parts[count] = Place { address, len };
                job.len += len;
                count += 1;
            }
            let header = about(asker, first, count);
            match (count, rendezvous) {
                (1, true) => self.answer(ep, &header, UCS_OK, job, UCP_AM_SEND_FLAG_RNDV),
                (1, false) => self.answer(ep, &header, UCS_OK, job, 0),
                _ => self.answer_together(ep, &header, job, &parts[..count]),
            }
            first += count;
        }
    }

    /// Answers a request; `job` has the bytes.
    pub(super) fn answer(&self, ep: ucp_ep_h, header: &Header, status: ucs_status_t, job: Job, flags: u32) {
        let Some(slot) = self.start_answer(ep, header, status, job) else { return };
        tell_lost(self.send(ep, ANSWER, slot, Place { address: job.address, len: job.len }, flags));
    }

    /// Answers a request for several pieces with their bytes.
    fn answer_together(&self, ep: ucp_ep_h, header: &Header, job: Job, pieces: &[Place]) {
        let Some(slot) = self.start_answer(ep, header, UCS_OK, job) else { return };
        let mut parts = slot.parts.get();
        for (part, piece) in parts.iter_mut().zip(pieces) {
            let buffer = std::ptr::with_exposed_provenance_mut(piece.address);
            *part = ucp_dt_iov_t { buffer, length: piece.len };
        }
        slot.parts.set(parts);
        tell_lost(self.send_parts(ep, ANSWER, slot, pieces.len(), 0));
    }

    /// A slot for an answer. A requester that cannot be told runs into its deadline.
    fn start_answer(&self, ep: ucp_ep_h, header: &Header, status: ucs_status_t, job: Job) -> Option<&Slot> {
        let slot = self.start(Job { reply: ep, ..job })?;
        let mut answer = [0; HEADER_WORDS];
        answer[..3].copy_from_slice(&[header[0], header[1], status as u8 as u64]);
        slot.header.set(answer.map(u64::to_le));
        Some(slot)
    }
}

fn tell_lost(sent: Result<(), PostError>) {
    if sent.is_err() {
        tracing::debug!(library = "ucx", "a peer went before it was answered");
    }
}

/// Who asked, and which of the pieces this is about.
fn about([slot, nonce]: [u64; 2], first: usize, count: usize) -> Header {
    let pieces = (first as u64) << 32 | (count as u64 - 1) << 40;
    request_header([slot | pieces, nonce], [0; PIECE_WORDS])
}

/// What the first of pieces are, in words.
fn pieces_in(named: &[[u8; PIECE_BYTES]]) -> [[u64; PIECE_WORDS]; PIECES_MAX] {
    let mut pieces = [[0; PIECE_WORDS]; PIECES_MAX];
    for (piece, named) in pieces.iter_mut().zip(named) {
        let (words, _) = named.as_chunks::<{ size_of::<u64>() }>();
        *piece = std::array::from_fn(|word| u64::from_le_bytes(words[word]));
    }
    pieces
}

fn asks_rendezvous(piece: &[u64; PIECE_WORDS]) -> bool {
    (piece[0] >> 32) as u32 & FLAG_RENDEZVOUS != 0
}

/// The words of a message's header.
///
/// # Safety
/// As a callback of UCX: `len` bytes at `header`.
unsafe fn words(header: *const c_void, len: usize, expected: usize) -> Option<Header> {
    if len != expected * size_of::<u64>() || header.is_null() {
        return None;
    }
    let mut words = [0; HEADER_WORDS];
    // SAFETY: `len` bytes there, which is at most the length of `words`.
    unsafe { std::ptr::copy_nonoverlapping(header.cast::<u8>(), words.as_mut_ptr().cast::<u8>(), len) };
    Some(words.map(u64::from_le))
}

/// How a message came: whether by rendezvous, and the endpoint to answer on.
///
/// # Safety
/// As a callback of UCX.
unsafe fn how(param: *const ucp_am_recv_param_t) -> (bool, Option<ucp_ep_h>) {
    // SAFETY: UCX passes the structure for the time of the callback.
    let param = unsafe { &*param };
    let reply = param.recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP != 0;
    (param.recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV != 0, reply.then_some(param.reply_ep))
}

unsafe extern "C" fn on_message(
    core: *mut c_void,
    header: *const c_void,
    header_len: usize,
    data: *mut c_void,
    len: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: the core was given as the argument of the handler (core rule 3).
    let core = unsafe { &*core.cast::<Core>() };
    // SAFETY: arguments of this callback.
    let Some(header) = (unsafe { words(header, header_len, 1) }) else { return UCS_OK };
    // SAFETY: as above.
    let (rendezvous, _) = unsafe { how(param) };
    let Some(index) = core.awaited.borrow_mut().remove(&header[0]) else { return UCS_OK };
    let Some(job) = core.slots.job(index) else { return UCS_OK };
    core.land((index, &job), Place { address: job.address, len: job.len }, (data, len), rendezvous)
}

unsafe extern "C" fn on_request(
    core: *mut c_void,
    _header: *const c_void,
    _header_len: usize,
    data: *mut c_void,
    len: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: the core was given as the argument of the handler (core rule 3).
    let core = unsafe { &*core.cast::<Core>() };
    // SAFETY: arguments of this callback.
    let (rendezvous, _) = unsafe { how(param) };
    let mut requests = core.requests.borrow_mut();
    if rendezvous || data.is_null() || len > REQUEST_MAX_BYTES || requests.len() >= REQUESTS_MAX {
        tracing::debug!(library = "ucx", len, "a request is not taken");
        return UCS_OK;
    }
    // SAFETY: `len` bytes of an eager message, until the callback returns.
    requests.push_back(unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) }.to_vec());
    UCS_OK
}

unsafe extern "C" fn on_read(
    core: *mut c_void,
    header: *const c_void,
    header_len: usize,
    data: *mut c_void,
    len: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: the core was given as the argument of the handler (core rule 3).
    let core = unsafe { &*core.cast::<Core>() };
    // SAFETY: arguments of this callback.
    let Some(asker) = (unsafe { words(header, header_len, 2) }) else { return UCS_OK };
    // SAFETY: as above.
    let (rendezvous, Some(ep)) = (unsafe { how(param) }) else { return UCS_OK };
    if rendezvous || data.is_null() || asker[0] > u64::from(u32::MAX) {
        return UCS_OK;
    }
    // SAFETY: `len` bytes of an eager message, until the callback returns.
    let asked = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) };
    let (pieces, rest) = asked.as_chunks::<PIECE_BYTES>();
    if pieces.len() > PIECES_MAX || !rest.is_empty() {
        return UCS_OK;
    }
    let wanted = pieces_in(pieces);
    core.serve(ep, [asker[0], asker[1]], &wanted[..pieces.len()]);
    UCS_OK
}

unsafe extern "C" fn on_write(
    core: *mut c_void,
    header: *const c_void,
    header_len: usize,
    data: *mut c_void,
    len: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: the core was given as the argument of the handler (core rule 3).
    let core = unsafe { &*core.cast::<Core>() };
    // SAFETY: arguments of this callback.
    let Some(header) = (unsafe { words(header, header_len, HEADER_WORDS) }) else { return UCS_OK };
    // SAFETY: as above.
    let (rendezvous, Some(ep)) = (unsafe { how(param) }) else { return UCS_OK };
    let to = core
        .allowed(&std::array::from_fn(|word| header[2 + word]), Access::RemoteWrite)
        .filter(|(region, _, wanted)| *wanted == len && !rendezvous && core.is_host(Some(*region)));
    let status = match to {
        None => REFUSED,
        Some((_, address, _)) if len > 0 => {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(address);
            // SAFETY: `len` bytes of a message, and of host memory of a registration that is not gone, just checked.
            unsafe { std::ptr::copy_nonoverlapping(data.cast::<u8>(), to, len) };
            UCS_OK
        }
        Some(_) => UCS_OK,
    };
    core.answer(ep, &header, status, Job::new(Work::Serve, 0, None), 0);
    UCS_OK
}

unsafe extern "C" fn on_writes(
    core: *mut c_void,
    header: *const c_void,
    header_len: usize,
    data: *mut c_void,
    len: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: the core was given as the argument of the handler (core rule 3).
    let core = unsafe { &*core.cast::<Core>() };
    // SAFETY: arguments of this callback.
    let Some(header) = (unsafe { words(header, header_len, 2) }) else { return UCS_OK };
    // SAFETY: as above.
    let (rendezvous, Some(ep)) = (unsafe { how(param) }) else { return UCS_OK };
    let count = usize::from((header[0] >> 40) as u8) + 1;
    let named = count * PIECE_BYTES;
    if header[0] >> 48 != 0 || count > PIECES_MAX || rendezvous || data.is_null() || len < named {
        return UCS_OK;
    }
    // SAFETY: that many of `len` bytes of an eager message, until the callback returns.
    let names = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), named) };
    let pieces = pieces_in(names.as_chunks::<PIECE_BYTES>().0);
    let mut places = [Place::default(); PIECES_MAX];
    let mut whole = named;
    // All of them, before the first byte is stored.
    let allowed = pieces[..count].iter().zip(&mut places).all(|(piece, place)| {
        let Some((region, address, len)) = core.allowed(piece, Access::RemoteWrite) else { return false };
        *place = Place { address, len };
        whole = whole.saturating_add(len);
        core.is_host(Some(region))
    });
    let status = if allowed && whole == len { UCS_OK } else { REFUSED };
    if status == UCS_OK {
        let mut at = named;
        for place in &places[..count] {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(place.address);
            // SAFETY: the lengths of the places and of what names them are that of the message, all together.
            let bytes = unsafe { data.cast::<u8>().add(at) };
            // SAFETY: bytes of a message, and of host memory of a registration that is not gone, just checked.
            unsafe { std::ptr::copy_nonoverlapping(bytes, to, place.len) };
            at += place.len;
        }
    }
    let asker = [header[0] & u64::from(u32::MAX), header[1]];
    core.answer(ep, &about(asker, 0, count), status, Job::new(Work::Serve, 0, None), 0);
    UCS_OK
}

unsafe extern "C" fn on_answer(
    core: *mut c_void,
    header: *const c_void,
    header_len: usize,
    data: *mut c_void,
    len: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: the core was given as the argument of the handler (core rule 3).
    let core = unsafe { &*core.cast::<Core>() };
    // SAFETY: arguments of this callback.
    let Some(header) = (unsafe { words(header, header_len, 3) }) else { return UCS_OK };
    // SAFETY: as above.
    let (rendezvous, _) = unsafe { how(param) };
    let (index, first) = (header[0] as u32, usize::from((header[0] >> 32) as u8));
    let count = usize::from((header[0] >> 40) as u8) + 1;
    if header[0] >> 48 != 0 || first + count > PIECES_MAX {
        return UCS_OK;
    }
    let pieces = (((1u16 << count) - 1) << first) as u8;
    let (Some(slot), Some(mut job)) = (core.slot(index), core.slots.job(index)) else { return UCS_OK };
    if job.unanswered & pieces != pieces || job.nonce != header[1] {
        return UCS_OK;
    }
    job.unanswered &= !pieces;
    core.slots.set(index, job);
    let fail = |status| {
        (0..count).for_each(|_| core.part_done(index, status, None));
        UCS_OK
    };
    let status = header[2] as u8 as ucs_status_t;
    if status != UCS_OK {
        return fail(status.min(-1));
    }
    if job.work == Work::Write {
        if len > 0 {
            return fail(MISFIT);
        }
        (0..count).for_each(|_| core.part_done(index, UCS_OK, Some(job.len)));
        return UCS_OK;
    }
    let places = slot.places.get();
    let places = &places[first..first + count];
    if len != places.iter().map(|place| place.len).sum::<usize>() {
        return fail(MISFIT);
    }
    if let [only] = places {
        return core.land((index, &job), *only, (data, len), rendezvous);
    }
    if rendezvous {
        return fail(MISFIT);
    }
    let mut at = 0;
    for place in places {
        // SAFETY: the lengths of the places are that of the message, all together.
        let bytes = unsafe { data.cast::<u8>().add(at) };
        core.land((index, &job), *place, (bytes.cast(), place.len), false);
        at += place.len;
    }
    UCS_OK
}
