//! UCX by itself, for the bench: one worker, memory registered once, a `ucp_get_nbx` for each block, and a look again and
//! again. What Baton's reads cost beyond this is Baton's; the rest is the library's.
//!
//! Settings are those of the driver, but for UCX's own reads, which the driver switches on with RDMA only.

use std::cell::Cell;
use std::ffi::c_void;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use baton_ucx_sys::{
    UCP_EP_CLOSE_FLAG_FORCE, UCP_EP_PARAM_FIELD_REMOTE_ADDRESS, UCP_OP_ATTR_FIELD_CALLBACK,
    UCP_OP_ATTR_FIELD_FLAGS, UCP_OP_ATTR_FIELD_MEMH, UCP_OP_ATTR_FIELD_USER_DATA, UCS_OK, Zeroed, is_request,
    status_of, ucp_ep_h, ucp_ep_params_t, ucp_request_param_t, ucp_rkey_h, ucs_status_t,
};

use super::address::Form;
use super::config::{Context, TRANSPORTS};
use super::core::Core;
use super::region::Region;
use super::{Access, DriverError, MemorySpan, library};
use crate::backend::{handlers, sockets};

/// Blocks that do not come within this time do not come.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the end of a connection may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// Looks between two looks at the clock.
const LOOKS: u32 = 1 << 16;

fn fault(what: impl Into<String>) -> DriverError {
    DriverError { what: what.into(), remedy: String::new() }
}

/// A worker and the memory that it works on.
struct End {
    region: Option<Region>,
    core: Core,
}

impl Drop for End {
    fn drop(&mut self) {
        self.core.destroy();
        if let Some(region) = self.region.take() {
            region.unmap(&self.core.context);
        }
    }
}

impl End {
    fn open(span: &MemorySpan, access: Access) -> Result<Self, DriverError> {
        handlers::keep(|| {
            let core = Core::new(Context::bare(library::get()?, TRANSPORTS)?)?;
            let region = Some(Region::map(&core.context, span, access)?);
            Ok(Self { region, core })
        })
    }

    fn region(&self) -> Result<&Region, DriverError> {
        self.region.as_ref().ok_or_else(|| fault("the memory is not registered any more"))
    }

    /// Lets UCX work.
    fn progress(&self) {
        // SAFETY: the worker lives until the drop of the core.
        unsafe { (self.core.context.api.ucp_worker_progress)(self.core.worker.get()) };
    }
}

/// The side whose memory is read.
pub(crate) struct Owner {
    end: End,
    address: Vec<u8>,
    key: Vec<u8>,
}

impl Owner {
    /// Shows memory to who is told its address and key.
    ///
    /// # Errors
    /// The library's.
    pub(crate) fn open(span: &MemorySpan) -> Result<Self, DriverError> {
        let end = End::open(span, Access::RemoteRead)?;
        let address = end.core.address()?;
        let listens_at = Form::of(&address, true).map(|form| form.listens_at(Ipv4Addr::LOCALHOST.into()));
        listens_at.unwrap_or_default().into_iter().for_each(sockets::tune_listener);
        let mut key = (span.address() as u64).to_le_bytes().to_vec();
        key.extend(pack(&end)?);
        Ok(Self { end, address, key })
    }

    /// Where it is.
    pub(crate) fn address(&self) -> Vec<u8> {
        self.address.clone()
    }

    /// What a reader needs for its memory: where it is, and UCX's key.
    pub(crate) fn key(&self) -> Vec<u8> {
        self.key.clone()
    }

    /// Lets the library answer.
    pub(crate) fn turn(&mut self) {
        self.end.progress();
    }
}

fn pack(end: &End) -> Result<Vec<u8>, DriverError> {
    let (api, context) = (&end.core.context.api, &end.core.context);
    let (mut packed, mut len) = (std::ptr::null_mut(), 0);
    let memory = end.region()?.memory;
    // SAFETY: a mapping of this context; fills in a pointer and a length.
    let status = unsafe { (api.ucp_rkey_pack)(context.handle, memory, &raw mut packed, &raw mut len) };
    if status != UCS_OK {
        return Err(context.error("make a key", status));
    }
    // SAFETY: `len` bytes, until released below.
    let key = unsafe { std::slice::from_raw_parts(packed.cast::<u8>(), len) }.to_vec();
    // SAFETY: packed above, released once, not used after.
    unsafe { (api.ucp_rkey_buffer_release)(packed) };
    Ok(key)
}

/// What callbacks count, where UCX finds it.
#[derive(Default)]
struct Count {
    done: Cell<usize>,
    failed: Cell<ucs_status_t>,
    free: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// The side that reads.
pub(crate) struct Reader {
    end: End,
    ep: ucp_ep_h,
    key: ucp_rkey_h,
    /// Where the memory is at its owner.
    base: u64,
    count: Box<Count>,
    /// Where connections may lead, until they are tuned.
    untuned: Vec<std::net::SocketAddr>,
}

// SAFETY: nothing outside of it holds a part of it, and the worker is one that UCX lets several threads use, one at a time
// (`UCS_THREAD_MODE_SERIALIZED`).
unsafe impl Send for Reader {}

impl Reader {
    /// Connects to an owner, which is a process of the same program; `span` is where blocks go.
    ///
    /// # Errors
    /// The library's.
    pub(crate) fn open(span: &MemorySpan, address: &[u8], key: &[u8]) -> Result<Self, DriverError> {
        let end = End::open(span, Access::Local)?;
        let context = &end.core.context;
        let untuned = super::address::listens_at(address, Ipv4Addr::LOCALHOST.into());
        let own = Form::of(&end.core.address()?, true).ok_or_else(|| fault("addresses cannot be checked"))?;
        let address = own.take(address).map_err(|why| fault(format!("the owner's address: {why}")))?;
        let mut params = ucp_ep_params_t::zeroed();
        params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
        params.address = address.as_ptr().cast();
        let mut ep = std::ptr::null_mut();
        // SAFETY: the worker lives; the address is whole and of the form UCX reads (`Form`), and is copied.
        let status =
            unsafe { (context.api.ucp_ep_create)(end.core.worker.get(), &raw const params, &raw mut ep) };
        if status != UCS_OK {
            return Err(context.error("connect", status));
        }
        let count = Box::new(Count { free: Some(context.api.ucp_request_free), ..Count::default() });
        let (base, packed) = key.split_first_chunk().ok_or_else(|| fault("no key"))?;
        let base = u64::from_le_bytes(*base);
        let mut reader = Self { end, ep, key: std::ptr::null_mut(), base, count, untuned };
        let api = &reader.end.core.context.api;
        // SAFETY: the endpoint lives; the bytes were packed by the owner, a process of this program.
        let status = unsafe { (api.ucp_ep_rkey_unpack)(ep, packed.as_ptr().cast(), &raw mut reader.key) };
        match status {
            UCS_OK => Ok(reader),
            status => Err(reader.end.core.context.error("take a key", status)),
        }
    }

    /// Reads blocks, by offset and length, each to where it is at its owner.
    ///
    /// # Errors
    /// The library's: nothing can be read any more.
    ///
    /// # Panics
    /// When a block is outside of the memory.
    pub(crate) fn read(&mut self, blocks: &[(usize, usize)]) -> Result<(), DriverError> {
        let region = self.end.region()?;
        let mut params = ucp_request_param_t::zeroed();
        params.op_attr_mask =
            UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMH;
        params.cb = Some(got);
        params.user_data = std::ptr::from_ref(&*self.count).cast_mut().cast();
        params.memh = region.memory;
        self.count.done.set(0);
        let api = &self.end.core.context.api;
        for (offset, len) in blocks.iter().copied() {
            let local = region.at(offset as u64, len).ok_or_else(|| fault("outside of the memory"))?;
            let memory = std::ptr::with_exposed_provenance_mut::<c_void>(local);
            let at = self.base + offset as u64;
            // SAFETY: endpoint and key live; the range is within the registration, which the end of this read, or of the
            // worker, outlasts.
            let result = unsafe { (api.ucp_get_nbx)(self.ep, memory, len, at, self.key, &raw const params) };
            if is_request(result) {
                continue;
            }
            match status_of(result) {
                UCS_OK => self.count.done.set(self.count.done.get() + 1),
                status => return Err(self.end.core.context.error("read", status)),
            }
        }
        let (mut looks, start) = (0u32, Instant::now());
        while self.count.done.get() < blocks.len() {
            self.end.progress();
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS) && start.elapsed() > PATIENCE {
                return Err(fault("blocks did not come in time"));
            }
        }
        // Before the first read there is no connection.
        std::mem::take(&mut self.untuned).into_iter().for_each(sockets::tune_connections);
        match self.count.failed.get() {
            UCS_OK => Ok(()),
            status => Err(self.end.core.context.error("read", status)),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let api = &self.end.core.context.api;
        if !self.key.is_null() {
            // SAFETY: unpacked in `open`, destroyed once; no read is under way.
            unsafe { (api.ucp_rkey_destroy)(self.key) };
        }
        self.count.done.set(0);
        let mut params = ucp_request_param_t::zeroed();
        params.op_attr_mask =
            UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
        params.cb = Some(got);
        params.user_data = std::ptr::from_ref(&*self.count).cast_mut().cast();
        params.flags = UCP_EP_CLOSE_FLAG_FORCE;
        // SAFETY: made in `open`, closed once, not used after.
        let closing = is_request(unsafe { (api.ucp_ep_close_nbx)(self.ep, &raw const params) });
        let until = Instant::now() + FAREWELL;
        while closing && self.count.done.get() == 0 && Instant::now() < until {
            self.end.progress();
        }
    }
}

unsafe extern "C" fn got(request: *mut c_void, status: ucs_status_t, count: *mut c_void) {
    // SAFETY: the address of the reader's count was given as user data; it stays until the worker is destroyed.
    let count = unsafe { &*count.cast::<Count>() };
    count.done.set(count.done.get() + 1);
    if status != UCS_OK {
        count.failed.set(status);
    }
    if let Some(free) = count.free {
        // SAFETY: the request of this callback, freed once.
        unsafe { free(request) };
    }
}
