//! Reads, writes and messages as active messages.
//!
//! ```text
//! MESSAGE tag, bytes                                    ► lands where the tag is awaited, else dropped
//! READ    slot, nonce, region, flags, secret, range     ► ANSWER slot, nonce, status, bytes
//! WRITE   slot, nonce, region, flags, secret, range, bytes (eager) ► ANSWER slot, nonce, status
//! ```
//! The owner answers inside the callback, where the endpoint UCX gives for answers certainly lives. Nonces are random,
//! so only who got the request can answer it. Bytes by rendezvous are taken up outside of the callback.

use std::ffi::c_void;

use baton_ucx_sys::{
    UCP_AM_RECV_ATTR_FIELD_REPLY_EP, UCP_AM_RECV_ATTR_FLAG_RNDV, UCP_AM_SEND_FLAG_EAGER,
    UCP_AM_SEND_FLAG_REPLY, UCP_AM_SEND_FLAG_RNDV, UCP_OP_ATTR_FIELD_FLAGS, UCS_INPROGRESS, UCS_OK,
    is_request, status_of, ucp_am_recv_callback_t, ucp_am_recv_param_t, ucp_ep_h, ucs_status_t,
};

use super::core::Core;
use super::slots::{HEADER_WORDS, Job, Work};
use super::{Access, PostError, REQUEST_MAX_BYTES};

const MESSAGE: u32 = 0;
const READ: u32 = 1;
const WRITE: u32 = 2;
const ANSWER: u32 = 3;
const REQUEST: u32 = 4;

/// The handlers of all kinds of messages.
pub(super) const HANDLERS: [(u32, ucp_am_recv_callback_t); 5] =
    [(MESSAGE, on_message), (READ, on_read), (WRITE, on_write), (ANSWER, on_answer), (REQUEST, on_request)];

/// Most requests that wait to be taken. They are, with every poll: only who sends without waiting for answers loses some.
const REQUESTS_MAX: usize = 4096;

/// Longest read, write or message: an eager write is assembled in memory at the peer.
pub(super) const BYTES_MAX: usize = 16 << 20;

/// Statuses of ours, below all of UCX's.
pub(super) const REFUSED: ucs_status_t = -101;
pub(super) const MISFIT: ucs_status_t = -102;

/// Asks for the bytes by rendezvous, because they go to memory the CPU cannot write.
const FLAG_RENDEZVOUS: u32 = 1;

/// A message whose bytes are still with their sender.
pub(super) struct Arrival {
    slot: u32,
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

fn request_header(slot: u32, job: &Job, target: &Target, flags: u32) -> Header {
    [
        u64::from(slot),
        job.nonce,
        u64::from(target.region) | u64::from(flags) << 32,
        target.secret as u64,
        (target.secret >> 64) as u64,
        target.offset,
        job.len as u64,
    ]
}

impl Core {
    /// Posts a message.
    pub(super) fn post_message(&self, ep: ucp_ep_h, job: Job, tag: u64) -> Result<(), PostError> {
        let slot = self.start(job).ok_or(PostError::Again)?;
        let flags = if self.is_host(job.region) { 0 } else { UCP_AM_SEND_FLAG_RNDV };
        let mut header = [0; HEADER_WORDS];
        header[0] = tag.to_le();
        slot.header.set(header);
        self.send(ep, MESSAGE, slot.index, job, flags)
    }

    /// Posts a request of the core above: an eager message that nobody has to await.
    pub(super) fn post_request(&self, ep: ucp_ep_h, job: Job) -> Result<(), PostError> {
        let slot = self.start(job).ok_or(PostError::Again)?;
        slot.header.set([0; HEADER_WORDS]);
        self.send(ep, REQUEST, slot.index, job, UCP_AM_SEND_FLAG_EAGER)
    }

    /// Posts a read: the request, which the owner answers with the bytes.
    pub(super) fn post_read(&self, ep: ucp_ep_h, job: Job, target: &Target) -> Result<(), PostError> {
        let flags = if self.is_host(job.region) { 0 } else { FLAG_RENDEZVOUS };
        let slot = self.start(job).ok_or(PostError::Again)?;
        slot.header.set(request_header(slot.index, &job, target, flags).map(u64::to_le));
        let bare = Job { len: 0, ..job };
        self.send(ep, READ, slot.index, bare, UCP_AM_SEND_FLAG_REPLY)
    }

    /// Posts a write: the bytes, which the owner acknowledges once they are in place.
    pub(super) fn post_write(&self, ep: ucp_ep_h, job: Job, target: &Target) -> Result<(), PostError> {
        let slot = self.start(job).ok_or(PostError::Again)?;
        slot.header.set(request_header(slot.index, &job, target, 0).map(u64::to_le));
        self.send(ep, WRITE, slot.index, job, UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER)
    }

    /// Sends the header of a slot and the bytes of its job.
    fn send(&self, ep: ucp_ep_h, id: u32, index: u32, job: Job, flags: u32) -> Result<(), PostError> {
        let Some(slot) = self.slot(index) else { return Err(PostError::Again) };
        let mut params = self.params(slot, job.region.filter(|_| job.len > 0));
        params.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
        params.flags = flags;
        let words = match id {
            MESSAGE | REQUEST => 1,
            ANSWER => 3,
            _ => HEADER_WORDS,
        };
        let bytes = match job.len {
            0 => std::ptr::null(),
            _ => std::ptr::with_exposed_provenance::<c_void>(job.address),
        };
        // SAFETY: the endpoint lives (it is closed only when its peer goes, or is the one of the running callback);
        // header and bytes stay in place until the callback (core rules 3 and 4).
        let result = unsafe {
            (self.context.api.ucp_am_send_nbx)(
                ep,
                id,
                slot.header.as_ptr().cast(),
                words * size_of::<u64>(),
                bytes,
                job.len,
                &raw const params,
            )
        };
        self.posted(index, result)
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
                    std::ptr::with_exposed_provenance_mut(job.address),
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
    fn land(&self, index: u32, job: &Job, data: *mut c_void, len: usize, rendezvous: bool) -> ucs_status_t {
        if len > job.len {
            self.part_done(index, MISFIT, None);
            return UCS_OK;
        }
        if rendezvous {
            self.arrivals.borrow_mut().push_back(Arrival { slot: index, data, len });
            return UCS_INPROGRESS;
        }
        if len > 0 && !self.is_host(job.region) {
            self.part_done(index, MISFIT, None);
            return UCS_OK;
        }
        if len > 0 {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(job.address);
            // SAFETY: `len` bytes of a message, and of host memory of the job (core rule 4), which UCX's buffers are not.
            unsafe { std::ptr::copy_nonoverlapping(data.cast::<u8>(), to, len) };
        }
        self.part_done(index, UCS_OK, Some(len));
        UCS_OK
    }

    /// Where the range of a request is, if the requester may have it.
    fn allowed(&self, header: &Header, access: Access) -> Option<(u32, usize, usize)> {
        let id = header[2] as u32;
        let secret = u128::from(header[3]) | u128::from(header[4]) << 64;
        let len = usize::try_from(header[6]).ok().filter(|len| *len <= BYTES_MAX)?;
        let regions = self.regions.borrow();
        let region = regions.get(&id).filter(|region| region.gone.is_none())?;
        if region.access != access || region.secret != secret {
            return None;
        }
        Some((id, region.at(header[5], len)?, len))
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

    /// Answers a request; `job` has the bytes.
    pub(super) fn answer(&self, ep: ucp_ep_h, header: &Header, status: ucs_status_t, job: Job, flags: u32) {
        // A requester that cannot be told runs into its deadline.
        let job = Job { reply: ep, ..job };
        let Some(slot) = self.start(job) else { return };
        let mut answer = [0; HEADER_WORDS];
        answer[..3].copy_from_slice(&[header[0], header[1], status as u8 as u64]);
        slot.header.set(answer.map(u64::to_le));
        if self.send(ep, ANSWER, slot.index, job, flags).is_err() {
            tracing::debug!(library = "ucx", "a peer went before it was answered");
        }
    }
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
    core.land(index, &job, data, len, rendezvous)
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
    _data: *mut c_void,
    _len: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: the core was given as the argument of the handler (core rule 3).
    let core = unsafe { &*core.cast::<Core>() };
    // SAFETY: arguments of this callback.
    let Some(header) = (unsafe { words(header, header_len, HEADER_WORDS) }) else { return UCS_OK };
    // SAFETY: as above.
    let (_, Some(ep)) = (unsafe { how(param) }) else { return UCS_OK };
    let mut job = Job::new(Work::Serve, 0, None);
    match core.allowed(&header, Access::RemoteRead) {
        None => core.answer(ep, &header, REFUSED, job, 0),
        Some((region, address, len)) => {
            (job.region, job.address, job.len) = (Some(region), address, len);
            let asked = (header[2] >> 32) as u32 & FLAG_RENDEZVOUS != 0;
            let flags = if asked || !core.is_host(Some(region)) { UCP_AM_SEND_FLAG_RNDV } else { 0 };
            core.answer(ep, &header, UCS_OK, job, flags);
        }
    }
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
        .allowed(&header, Access::RemoteWrite)
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
    let index = header[0] as u32;
    let Some(mut job) = core.slots.job(index) else { return UCS_OK };
    if job.nonce == 0 || job.nonce != header[1] {
        return UCS_OK;
    }
    job.nonce = 0;
    core.slots.set(index, job);
    let status = header[2] as u8 as ucs_status_t;
    if status != UCS_OK {
        core.part_done(index, status.min(-1), None);
        return UCS_OK;
    }
    let expected = if job.work == Work::Read { job.len } else { 0 };
    if len != expected {
        core.part_done(index, MISFIT, None);
        return UCS_OK;
    }
    if job.work == Work::Write {
        core.part_done(index, UCS_OK, Some(job.len));
        return UCS_OK;
    }
    core.land(index, &job, data, len, rendezvous)
}
