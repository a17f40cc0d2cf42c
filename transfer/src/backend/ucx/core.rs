//! The worker of UCX and all that its callbacks touch.
//!
//! Rules, on which every `SAFETY` comment here and in [`super::messages`] leans:
//!
//! 1. Callbacks run only inside calls into UCX, all of which are made by the thread that has the driver: one at a time.
//! 2. No `RefCell` of [`Core`] is borrowed across a call into UCX, so a callback may borrow any.
//! 3. A [`Core`] stays where it is (`Rc`) and so do its slots, until the worker is destroyed: no callback comes after.
//! 4. Bytes at the address of a job belong to its registration, which is kept while `in_use` counts the job.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::os::fd::RawFd;

use baton_ucx_sys::{
    UCP_AM_FLAG_WHOLE_MSG, UCP_AM_HANDLER_PARAM_FIELD_ARG, UCP_AM_HANDLER_PARAM_FIELD_CB,
    UCP_AM_HANDLER_PARAM_FIELD_FLAGS, UCP_AM_HANDLER_PARAM_FIELD_ID, UCP_OP_ATTR_FIELD_CALLBACK,
    UCP_OP_ATTR_FIELD_MEMH, UCP_OP_ATTR_FIELD_MEMORY_TYPE, UCP_OP_ATTR_FIELD_USER_DATA,
    UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK, UCP_WORKER_PARAM_FIELD_FLAGS, UCP_WORKER_PARAM_FIELD_THREAD_MODE,
    UCS_OK, UCS_THREAD_MODE_SERIALIZED, Zeroed, is_request, status_of, ucp_am_handler_param_t,
    ucp_am_recv_data_nbx_callback_t, ucp_request_param_t, ucp_send_nbx_callback_t, ucp_worker_h,
    ucp_worker_params_t, ucs_status_ptr_t, ucs_status_t,
};

use super::config::Context;
use super::messages::{self, Arrival};
use super::region::Region;
use super::slots::{Job, Slot, Slots};
use super::{DriverError, PostError};

/// Calls of UCX's progress in one poll, at most.
const PROGRESS_MAX: usize = 64;

/// See the module.
pub(super) struct Core {
    pub(super) slots: Slots,
    pub(super) regions: RefCell<HashMap<u32, Region>>,
    /// The receives, by tag.
    pub(super) awaited: RefCell<HashMap<u64, u32>>,
    /// Requests that came.
    pub(super) requests: RefCell<VecDeque<Vec<u8>>>,
    /// Messages whose bytes are still with their sender.
    pub(super) arrivals: RefCell<VecDeque<Arrival>>,
    /// Slots with nothing more to come.
    pub(super) ended: RefCell<VecDeque<u32>>,
    pub(super) worker: Cell<ucp_worker_h>,
    /// Goes last: worker and mappings are of it.
    pub(super) context: Context,
}

impl Core {
    /// Creates the worker. The handlers are set by [`Core::listen`], once the core is where it stays.
    pub(super) fn new(context: Context) -> Result<Self, DriverError> {
        let mut params = ucp_worker_params_t::zeroed();
        params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE | UCP_WORKER_PARAM_FIELD_FLAGS;
        params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
        params.flags = UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK;
        let mut worker = std::ptr::null_mut();
        // SAFETY: a context and parameters as UCX defines them; fills in one pointer.
        let status =
            unsafe { (context.api.ucp_worker_create)(context.handle, &raw const params, &raw mut worker) };
        if status != UCS_OK {
            return Err(context.error("create a worker", status));
        }
        Ok(Self {
            slots: Slots::default(),
            regions: RefCell::default(),
            awaited: RefCell::default(),
            requests: RefCell::default(),
            arrivals: RefCell::default(),
            ended: RefCell::default(),
            worker: Cell::new(worker),
            context,
        })
    }

    /// Takes messages from here on.
    pub(super) fn listen(&self) -> Result<(), DriverError> {
        for (id, handler) in messages::HANDLERS {
            let mut params = ucp_am_handler_param_t::zeroed();
            params.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID
                | UCP_AM_HANDLER_PARAM_FIELD_FLAGS
                | UCP_AM_HANDLER_PARAM_FIELD_CB
                | UCP_AM_HANDLER_PARAM_FIELD_ARG;
            params.id = id;
            params.flags = UCP_AM_FLAG_WHOLE_MSG;
            params.cb = Some(handler);
            params.arg = std::ptr::from_ref(self).cast_mut().cast();
            // SAFETY: the handler gets a pointer to this core (rule 3), from this thread only (rule 1).
            let status = unsafe {
                (self.context.api.ucp_worker_set_am_recv_handler)(self.worker.get(), &raw const params)
            };
            if status != UCS_OK {
                return Err(self.context.error("take messages", status));
            }
        }
        Ok(())
    }

    /// The worker's address.
    pub(super) fn address(&self) -> Result<Vec<u8>, DriverError> {
        let (mut address, mut len) = (std::ptr::null_mut(), 0);
        // SAFETY: the worker lives; fills in a pointer and a length.
        let status = unsafe {
            (self.context.api.ucp_worker_get_address)(self.worker.get(), &raw mut address, &raw mut len)
        };
        if status != UCS_OK {
            return Err(self.context.error("tell its address", status));
        }
        // SAFETY: `len` bytes at `address`, until released below.
        let bytes = unsafe { std::slice::from_raw_parts(address.cast::<u8>(), len) }.to_vec();
        // SAFETY: got above, released once, not used after.
        unsafe { (self.context.api.ucp_worker_release_address)(self.worker.get(), address) };
        Ok(bytes)
    }

    /// The descriptor that wakes a sleeper.
    pub(super) fn wait_fd(&self) -> Option<RawFd> {
        let mut fd = -1;
        // SAFETY: the worker lives; fills in one number.
        let status = unsafe { (self.context.api.ucp_worker_get_efd)(self.worker.get(), &raw mut fd) };
        (status == UCS_OK && fd >= 0).then_some(fd)
    }

    /// Lets UCX work. Returns whether it did anything.
    pub(super) fn progress(&self) -> bool {
        let worker = self.worker.get();
        if worker.is_null() {
            return false;
        }
        let mut any = false;
        for _ in 0..PROGRESS_MAX {
            // SAFETY: the worker lives; callbacks keep rules 1 to 3.
            if unsafe { (self.context.api.ucp_worker_progress)(worker) } == 0 && !self.start_arrivals() {
                break;
            }
            any = true;
            // Who waits for it takes it while it is in a cache; the rest comes with the next poll.
            if !self.ended.borrow().is_empty() {
                break;
            }
        }
        any
    }

    /// Prepares the descriptor; false: there is work.
    pub(super) fn arm(&self) -> bool {
        let worker = self.worker.get();
        // SAFETY: not null, so the worker lives.
        !worker.is_null() && unsafe { (self.context.api.ucp_worker_arm)(worker) } == UCS_OK
    }

    /// Ends everything at once: afterwards no callback comes and no memory is written.
    pub(super) fn destroy(&self) {
        let worker = self.worker.replace(std::ptr::null_mut());
        if !worker.is_null() {
            self.arrivals.borrow_mut().clear();
            // SAFETY: taken out above, so destroyed once and not used after.
            unsafe { (self.context.api.ucp_worker_destroy)(worker) };
        }
    }

    /// Starts a job, without posting anything yet.
    pub(super) fn start(&self, job: Job) -> Option<&Slot> {
        let region = job.region;
        let slot = self.slots.start(std::ptr::from_ref(self), job)?;
        if let Some(region) = region {
            self.hold(region);
        }
        // SAFETY: slots stay where they are for as long as the core (rule 3).
        Some(unsafe { &*slot })
    }

    /// A slot by its number.
    pub(super) fn slot(&self, index: u32) -> Option<&Slot> {
        let slot = self.slots.address(index)?;
        // SAFETY: slots stay where they are for as long as the core (rule 3).
        Some(unsafe { &*slot })
    }

    /// Takes back a job that was not posted.
    pub(super) fn abandon(&self, index: u32) {
        if let Some(region) = self.slots.finish(index).and_then(|job| job.region) {
            self.release(region);
        }
    }

    /// What was posted for a job: an error means that nothing was.
    pub(super) fn posted(&self, index: u32, result: ucs_status_ptr_t) -> Result<(), PostError> {
        if is_request(result) {
            return Ok(());
        }
        match status_of(result) {
            UCS_OK => {
                self.part_done(index, UCS_OK, None);
                Ok(())
            }
            status => {
                self.abandon(index);
                Err(match status {
                    baton_ucx_sys::UCS_ERR_NO_RESOURCE | baton_ucx_sys::UCS_ERR_NO_MEMORY => PostError::Again,
                    status => PostError::Failed(self.describe(status)),
                })
            }
        }
    }

    /// Counts one part of a job as over.
    pub(super) fn part_done(&self, index: u32, status: ucs_status_t, moved: Option<usize>) {
        let Some(mut job) = self.slots.job(index) else { return };
        if job.parts == 0 {
            return;
        }
        job.parts -= 1;
        if job.status == UCS_OK {
            job.status = status;
        }
        if let Some(moved) = moved {
            job.moved = moved;
        }
        self.slots.set(index, job);
        if job.parts == 0 {
            self.ended.borrow_mut().push_back(index);
        }
    }

    /// Awaits no answer to a job any more. What its pieces were given before stays.
    pub(super) fn stop_waiting(&self, index: u32, status: ucs_status_t) {
        let Some(mut job) = self.slots.job(index).filter(|job| job.unanswered != 0) else { return };
        let left = std::mem::take(&mut job.unanswered).count_ones();
        self.slots.set(index, job);
        for _ in 0..left {
            self.part_done(index, status, None);
        }
    }

    /// Counts a job on a registration.
    pub(super) fn hold(&self, region: u32) {
        if let Some(region) = self.regions.borrow_mut().get_mut(&region) {
            region.in_use += 1;
        }
    }

    /// Counts it off again, and ends a registration that is gone and now unused.
    pub(super) fn release(&self, id: u32) {
        let mut regions = self.regions.borrow_mut();
        let Some(region) = regions.get_mut(&id) else { return };
        region.in_use -= 1;
        let unused = region.gone.is_some() && region.in_use == 0;
        let region = if unused { regions.remove(&id) } else { None };
        drop(regions);
        if let Some(region) = region {
            region.unmap(&self.context);
        }
    }

    /// What a status means, ours included.
    pub(super) fn describe(&self, status: ucs_status_t) -> String {
        match status {
            messages::REFUSED => "the peer refused: no such registration, access or range".to_owned(),
            messages::MISFIT => "the peer's bytes do not fit what was asked for".to_owned(),
            status => self.context.api.describe(status),
        }
    }

    /// Parameters of an operation on `slot`, on memory of `region`.
    pub(super) fn params(&self, slot: &Slot, region: Option<u32>) -> ucp_request_param_t {
        let mut params = ucp_request_param_t::zeroed();
        params.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
        params.cb = Some(sent);
        params.user_data = std::ptr::from_ref(slot).cast_mut().cast();
        let regions = self.regions.borrow();
        if let Some(region) = region.and_then(|region| regions.get(&region)) {
            params.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
            params.memh = region.memory;
            params.memory_type = region.memory_type();
        }
        params
    }

    /// As `params`, for a message's bytes: their callback has one argument more.
    pub(super) fn receive_params(&self, slot: &Slot, region: Option<u32>) -> ucp_request_param_t {
        let mut params = self.params(slot, region);
        let callback: ucp_am_recv_data_nbx_callback_t = received;
        // SAFETY: UCX has a union of callback types here; that for received bytes goes to `ucp_am_recv_data_nbx` only,
        // which calls it as what it is.
        params.cb = Some(unsafe {
            std::mem::transmute::<ucp_am_recv_data_nbx_callback_t, ucp_send_nbx_callback_t>(callback)
        });
        params
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.destroy();
        for (_, region) in self.regions.get_mut().drain() {
            region.unmap(&self.context);
        }
    }
}

/// UCX is done with what was posted for a slot.
unsafe extern "C" fn sent(request: *mut c_void, status: ucs_status_t, slot: *mut c_void) {
    // SAFETY: the address of a slot was given as user data; it stays (rule 3).
    let slot = unsafe { &*slot.cast::<Slot>() };
    // SAFETY: as above.
    let core = unsafe { &*slot.core };
    if status != UCS_OK {
        // A request that was not sent is not answered.
        core.stop_waiting(slot.index, status);
    }
    core.part_done(slot.index, status, None);
    // SAFETY: the request of this callback, freed once.
    unsafe { (core.context.api.ucp_request_free)(request) };
}

/// The bytes of a message are in place.
unsafe extern "C" fn received(request: *mut c_void, status: ucs_status_t, length: usize, slot: *mut c_void) {
    // SAFETY: the address of a slot was given as user data; it stays (rule 3).
    let slot = unsafe { &*slot.cast::<Slot>() };
    // SAFETY: as above.
    let core = unsafe { &*slot.core };
    core.part_done(slot.index, status, Some(length));
    // SAFETY: the request of this callback, freed once.
    unsafe { (core.context.api.ucp_request_free)(request) };
}
