//! Owners of the library's objects: each closes its own, and they nest so that they are dropped in the C order.
//!
//! Ownership rules, on which every `SAFETY` comment of this module and of its neighbours leans:
//!
//! 1. An owner holds the only handle to an open object, from the call that opened it until its `Drop` closes it.
//! 2. Whoever holds several declares them so that what was made *from* an object is dropped before it: endpoint,
//!    address vector, queue, registration, domain, fabric, info.
//! 3. All calls on the objects of one domain come from the thread that has the driver, one at a time.
//! 4. Buffers handed to the library belong to a registration, contexts to the slots: both outlive the endpoint.

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;

use baton_libfabric_sys::abi::*;
use baton_libfabric_sys::{Errno, Library, call};
use rustix::event::{Timespec, epoll};

/// An entry of `fi_getinfo`: what an endpoint will be like.
pub(super) struct Info {
    library: &'static Library,
    raw: NonNull<fi_info>,
}

impl Info {
    /// A copy of one entry of a list.
    ///
    /// # Safety
    /// `entry` is an intact entry of `library`.
    pub(super) unsafe fn copy_of(library: &'static Library, entry: *const fi_info) -> Option<Self> {
        // SAFETY: by the caller.
        let copy = unsafe { library.dupinfo(entry) };
        NonNull::new(copy).map(|raw| Self { library, raw })
    }

    pub(super) fn raw(&self) -> *mut fi_info {
        self.raw.as_ptr()
    }

    pub(super) fn library(&self) -> &'static Library {
        self.library
    }

    fn get(&self) -> &fi_info {
        // SAFETY: intact until dropped (rule 1), and longer in the library than in our declaration.
        unsafe { self.raw.as_ref() }
    }

    pub(super) fn endpoint_attr(&self) -> &fi_ep_attr {
        // SAFETY: `fi_dupinfo` gives every entry all its attributes, which live as long as the entry.
        unsafe { &*self.get().ep_attr }
    }

    pub(super) fn domain_attr(&self) -> &fi_domain_attr {
        // SAFETY: as above.
        unsafe { &*self.get().domain_attr }
    }

    fn fabric_attr(&self) -> &fi_fabric_attr {
        // SAFETY: as above.
        unsafe { &*self.get().fabric_attr }
    }

    /// Queue lengths: of sends and other posted operations, of receives.
    pub(super) fn queue_sizes(&self) -> (usize, usize) {
        // SAFETY: as above.
        unsafe { ((*self.get().tx_attr).size, (*self.get().rx_attr).size) }
    }

    /// Pieces of memory that one operation may be of, on either side.
    pub(super) fn pieces_max(&self) -> usize {
        // SAFETY: as above.
        let (local, remote) =
            unsafe { ((*self.get().tx_attr).iov_limit, (*self.get().tx_attr).rma_iov_limit) };
        local.min(remote).clamp(1, PIECES_MAX)
    }

    pub(super) fn provider(&self) -> String {
        // SAFETY: a string of the entry.
        unsafe { text(self.fabric_attr().prov_name) }
    }

    pub(super) fn fabric(&self) -> String {
        // SAFETY: a string of the entry.
        unsafe { text(self.fabric_attr().name) }
    }

    pub(super) fn domain(&self) -> String {
        // SAFETY: a string of the entry.
        unsafe { text(self.domain_attr().name) }
    }

    pub(super) fn address_format(&self) -> u32 {
        self.get().addr_format
    }

    /// The address that its endpoints will send from, where one is set.
    pub(super) fn source(&self) -> Vec<u8> {
        let (address, len) = (self.get().src_addr, self.get().src_addrlen);
        if address.is_null() {
            return Vec::new();
        }
        // SAFETY: the entry's own copy of an address of that length.
        unsafe { std::slice::from_raw_parts(address.cast::<u8>(), len) }.to_vec()
    }

    pub(super) fn has_mr_mode(&self, bit: i32) -> bool {
        self.domain_attr().mr_mode & bit != 0
    }

    pub(super) fn has_cap(&self, bit: u64) -> bool {
        self.get().caps & bit != 0
    }
}

impl Drop for Info {
    fn drop(&mut self) {
        // SAFETY: owned (rule 1).
        unsafe { self.library.freeinfo(self.raw.as_ptr()) };
    }
}

/// A string of the library, or an empty one for null.
///
/// # Safety
/// `from` is null or a terminated string.
pub(super) unsafe fn text(from: *const c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: by the caller.
    unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned()
}

thread_local! {
    /// Objects that the library would not close: what they may still write has to stay in place for ever.
    static UNCLOSED: Cell<usize> = const { Cell::new(0) };
    /// How often closing an endpoint is to fail on this thread.
    #[cfg(test)]
    pub(super) static REFUSALS: Cell<usize> = const { Cell::new(0) };
}

/// Drops, on this thread, and says whether the library closed all of it.
pub(super) fn close<T>(objects: T) -> bool {
    let before = UNCLOSED.get();
    drop(objects);
    UNCLOSED.get() == before
}

/// An object that is closed when dropped.
macro_rules! owner {
    ($(#[$doc:meta])* $name:ident of $raw:ident) => {
        $(#[$doc])*
        pub(super) struct $name(NonNull<$raw>);

        impl $name {
            fn own(raw: *mut $raw) -> Result<Self, Errno> {
                NonNull::new(raw).map(Self).ok_or(Errno::NOSYS)
            }

            pub(super) fn raw(&self) -> *mut $raw {
                self.0.as_ptr()
            }

            /// As what every object begins with.
            pub(super) fn fid(&self) -> *mut fid {
                self.0.as_ptr().cast::<fid>()
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: owned and open (rule 1); what was made from it is closed (rule 2).
                if let Err(errno) = unsafe { call::close(self.fid()) } {
                    UNCLOSED.set(UNCLOSED.get() + 1);
                    tracing::warn!(object = stringify!($name), %errno, "libfabric did not close an object: it stays");
                }
            }
        }
    };
}

owner!(
    /// A network, as the library sees it.
    Fabric of fid_fabric
);
owner!(
    /// A network interface.
    Domain of fid_domain
);
owner!(
    /// The addresses an endpoint knows.
    AddressVector of fid_av
);
owner!(
    /// Where the ends of operations are reported.
    RawQueue of fid_cq
);
owner!(
    /// An endpoint without what it is bound to.
    RawEndpoint of fid_ep
);
owner!(
    /// A registration of memory.
    Registered of fid_mr
);

impl Fabric {
    pub(super) fn open(info: &Info) -> Result<Self, Errno> {
        // SAFETY: the attributes of an intact entry.
        Self::own(unsafe { info.library.fabric(info.get().fabric_attr) }?)
    }

    /// Whether one may sleep until a queue's descriptor is readable.
    pub(super) fn may_sleep(&self, queues: &mut [*mut fid]) -> bool {
        // SAFETY: open objects of this fabric (rule 1), called by the one thread that may (rule 3).
        unsafe { call::trywait(self.raw(), queues) }.is_ok()
    }
}

impl Domain {
    pub(super) fn open(fabric: &Fabric, info: &Info) -> Result<Self, Errno> {
        // SAFETY: an open fabric and the entry it was opened for.
        Self::own(unsafe { call::domain(fabric.raw(), info.raw()) }?)
    }
}

impl Registered {
    pub(super) fn new(domain: &Domain, attr: &fi_mr_attr, flags: u64) -> Result<Self, Errno> {
        // SAFETY: an open domain; `attr` describes memory that its registration keeps (rule 4).
        Self::own(unsafe { call::mr_regattr(domain.raw(), attr, flags) }?)
    }

    /// Binds it to the endpoint that peers reach it through, for providers that want that.
    pub(super) fn bind(&self, endpoint: &Endpoint) -> Result<(), Errno> {
        // SAFETY: two open objects of one domain.
        unsafe { call::bind(self.fid(), endpoint.ep.fid(), 0) }?;
        // SAFETY: an open registration.
        unsafe { call::enable(self.fid()) }
    }

    pub(super) fn key(&self) -> u64 {
        // SAFETY: an open registration, whose key does not change.
        unsafe { (*self.raw()).key }
    }

    /// What local operations on this memory are posted with.
    pub(super) fn descriptor(&self) -> *mut c_void {
        // SAFETY: as above.
        unsafe { (*self.raw()).mem_desc }
    }
}

/// A completion queue.
pub(super) struct Queue {
    raw: RawQueue,
    /// Readable when there may be something to read; it belongs to the queue.
    pub(super) fd: Option<RawFd>,
}

impl Queue {
    /// With a descriptor to wait on where the provider has them and `wait` asks for one.
    fn open(domain: &Domain, size: usize, wait: i32) -> Result<Self, Errno> {
        match Self::open_with(domain, size, wait) {
            Ok(queue) => Ok(queue),
            Err(_) => Self::open_with(domain, size, FI_WAIT_NONE),
        }
    }

    fn open_with(domain: &Domain, size: usize, wait: i32) -> Result<Self, Errno> {
        // SAFETY: numbers and pointers only, for which zero is a value.
        let mut attr: fi_cq_attr = unsafe { std::mem::zeroed() };
        attr.size = size;
        attr.format = FI_CQ_FORMAT_TAGGED;
        attr.wait_obj = wait;
        // SAFETY: an open domain.
        let raw = RawQueue::own(unsafe { call::cq_open(domain.raw(), &mut attr) }?)?;
        let fd = match wait {
            FI_WAIT_FD => {
                // SAFETY: an open queue with a descriptor.
                let fd = unsafe { call::wait_fd(raw.raw()) }?;
                if fd < 0 {
                    return Err(Errno::NOSYS);
                }
                Some(fd)
            }
            _ => None,
        };
        Ok(Self { raw, fd })
    }

    pub(super) fn fid(&self) -> *mut fid {
        self.raw.fid()
    }

    /// Whether there is input for the library to work on, for libraries whose `fi_trywait` does not look.
    ///
    /// Their descriptor is an epoll set with the queue's own signal, which stays up for ever, and the set of the
    /// connections, which goes by the address of the queue.
    pub(super) fn has_input(&self) -> bool {
        let Some(fd) = self.fd else { return false };
        // SAFETY: the descriptor belongs to this queue, which is open.
        let set = unsafe { BorrowedFd::borrow_raw(fd) };
        let mut ready = [const { MaybeUninit::<epoll::Event>::uninit() }; 4];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok((ready, _)) = epoll::wait(set, &mut ready, Some(&now)) else { return false };
        ready.iter().any(|event| event.data.u64() == self.raw.raw().addr() as u64)
    }

    /// Reads what was reported.
    pub(super) fn read(&self, into: &mut [fi_cq_tagged_entry]) -> Result<usize, Errno> {
        // SAFETY: an open queue of tagged entries, read by the one thread that may (rule 3).
        unsafe { call::cq_read(self.raw.raw(), into) }
    }

    /// Reads a reported failure; its context and the reason.
    pub(super) fn read_error(&self, library: &Library) -> Result<Failure, Errno> {
        // SAFETY: numbers and pointers only, for which zero is a value.
        let mut entry: fi_cq_err_entry = unsafe { std::mem::zeroed() };
        // SAFETY: an open queue; the entry is longer than the library's.
        unsafe { call::cq_readerr(self.raw.raw(), &mut entry) }?;
        let mut reason = library.strerror(Errno(entry.err));
        // SAFETY: an open queue and the entry just read from it.
        if let Ok(detail) = unsafe { call::cq_strerror(self.raw.raw(), &entry) }
            && !detail.is_empty()
            && detail != reason
        {
            reason = format!("{reason} ({detail})");
        }
        Ok(Failure { context: entry.op_context, reason })
    }
}

/// A failed operation, as its queue reports it.
pub(super) struct Failure {
    pub(super) context: *mut c_void,
    pub(super) reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Read,
    Write,
    Send,
    Receive,
}

/// Most pieces of one operation.
pub(super) const PIECES_MAX: usize = 4;

/// A piece of local memory and, of a one-sided operation, the piece of the peer's that it belongs to.
#[derive(Debug, Clone, Copy)]
pub(super) struct CallPiece {
    /// Where in our memory, checked against its registration.
    pub(super) local: usize,
    pub(super) len: usize,
    /// Of the registration, or null where the provider needs none.
    pub(super) descriptor: *mut c_void,
    /// Where in the peer's memory.
    pub(super) remote: u64,
    /// The peer's key, or the tag of a message.
    pub(super) key: u64,
}

/// An operation as the library takes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) verb: Verb,
    /// The peer, as its address vector names it.
    pub(super) to: u64,
    pieces: [CallPiece; PIECES_MAX],
    count: usize,
}

impl Call {
    pub(super) fn new(verb: Verb, to: u64, piece: CallPiece) -> Self {
        Self { verb, to, pieces: [piece; PIECES_MAX], count: 1 }
    }

    /// Adds a piece of a one-sided operation; false: it has `most`.
    pub(super) fn push(&mut self, piece: CallPiece, most: usize) -> bool {
        let fits = self.count < most.min(PIECES_MAX);
        if fits {
            self.pieces[self.count] = piece;
            self.count += 1;
        }
        fits
    }

    /// Bytes of all pieces.
    pub(super) fn len(&self) -> usize {
        self.pieces[..self.count].iter().map(|piece| piece.len).sum()
    }
}

/// An enabled endpoint with its own queue and addresses, closed in this order: as long as the endpoint is open, the
/// others stay, too.
pub(super) struct Endpoint {
    pub(super) ep: ManuallyDrop<RawEndpoint>,
    addresses: ManuallyDrop<AddressVector>,
    pub(super) queue: ManuallyDrop<Queue>,
    is_closed: bool,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if !self.close() {
            UNCLOSED.set(UNCLOSED.get() + 1);
            tracing::warn!("libfabric did not close an endpoint: it stays");
        }
    }
}

impl Endpoint {
    pub(super) fn open(domain: &Domain, info: &Info) -> Result<Self, Errno> {
        Self::open_with(domain, info, FI_WAIT_FD)
    }

    /// `wait` is what its queue is waited for with: [`FI_WAIT_NONE`] for who only looks.
    fn open_with(domain: &Domain, info: &Info, wait: i32) -> Result<Self, Errno> {
        let (sends, receives) = info.queue_sizes();
        let queue = Queue::open(domain, (sends + receives).clamp(64, 8192), wait)?;
        // SAFETY: numbers and pointers only, for which zero is a value.
        let mut attr: fi_av_attr = unsafe { std::mem::zeroed() };
        attr.r#type = info.domain_attr().av_type;
        attr.count = 1;
        // SAFETY: an open domain.
        let addresses = AddressVector::own(unsafe { call::av_open(domain.raw(), &mut attr) }?)?;
        // SAFETY: an open domain and the entry it was opened for.
        let ep = RawEndpoint::own(unsafe { call::endpoint(domain.raw(), info.raw()) }?)?;
        if info.address_format() == FI_ADDR_EFA {
            // Transfers within a host would otherwise go through `shm`, which has no descriptor to wait on. Best
            // effort: libraries before 1.19 do not know the option.
            // SAFETY: an open endpoint, not enabled.
            let _ = unsafe { call::set_flag(ep.raw(), FI_OPT_SHARED_MEMORY_PERMITTED, false) };
        }
        // SAFETY: open objects of one domain, here and below.
        unsafe { call::bind(ep.fid(), addresses.fid(), 0) }?;
        // SAFETY: as above.
        unsafe { call::bind(ep.fid(), queue.fid(), FI_SEND | FI_RECV) }?;
        // SAFETY: as above.
        unsafe { call::enable(ep.fid()) }?;
        let (ep, addresses) = (ManuallyDrop::new(ep), ManuallyDrop::new(addresses));
        Ok(Self { ep, addresses, queue: ManuallyDrop::new(queue), is_closed: false })
    }

    /// Closes it: nothing more comes of what was posted from it. Not to be used after that. False: the library does
    /// not, now; it is open as before.
    pub(super) fn close(&mut self) -> bool {
        if self.is_closed {
            return true;
        }
        #[cfg(test)]
        if REFUSALS.get() > 0 {
            REFUSALS.set(REFUSALS.get() - 1);
            return false;
        }
        // SAFETY: owned and open (rule 1), and nothing is made from an endpoint.
        if unsafe { call::close(self.ep.fid()) }.is_err() {
            return false;
        }
        self.is_closed = true;
        // SAFETY: dropped once, because of the line above, and after the endpoint that it is bound to.
        unsafe { ManuallyDrop::drop(&mut self.addresses) };
        // SAFETY: as above.
        unsafe { ManuallyDrop::drop(&mut self.queue) };
        true
    }

    /// Where peers reach it.
    pub(super) fn name(&self) -> Result<Vec<u8>, Errno> {
        let mut name = vec![0; 256];
        // SAFETY: an enabled endpoint.
        let len = unsafe { call::getname(self.ep.raw(), &mut name) }?;
        name.truncate(len);
        Ok(name)
    }

    /// Posts what `call` says, from this endpoint.
    pub(super) fn post(&self, call: &Call, context: *mut c_void) -> Result<(), Errno> {
        let mut descriptors = call.pieces.map(|piece| piece.descriptor);
        let local = call.pieces.map(|piece| iovec {
            iov_base: std::ptr::without_provenance_mut(piece.local),
            iov_len: piece.len,
        });
        let remote =
            call.pieces.map(|piece| fi_rma_iov { addr: piece.remote, len: piece.len, key: piece.key });
        let one_sided = fi_msg_rma {
            msg_iov: local.as_ptr(),
            desc: descriptors.as_mut_ptr(),
            iov_count: call.count,
            addr: call.to,
            rma_iov: remote.as_ptr(),
            rma_iov_count: call.count,
            context,
            data: 0,
        };
        let tagged = fi_msg_tagged {
            msg_iov: local.as_ptr(),
            desc: descriptors.as_mut_ptr(),
            iov_count: 1,
            addr: call.to,
            tag: call.pieces[0].key,
            ignore: 0,
            context,
            data: 0,
        };
        match call.verb {
            // SAFETY: an enabled endpoint; memory and context stay in place (rule 4), the rest is copied by the call.
            Verb::Read => unsafe { call::readmsg(self.ep.raw(), &one_sided, FI_COMPLETION) },
            Verb::Write => {
                let flags = FI_COMPLETION | FI_DELIVERY_COMPLETE;
                // SAFETY: as above.
                unsafe { call::writemsg(self.ep.raw(), &one_sided, flags) }
            }
            // SAFETY: as above.
            Verb::Send => unsafe { call::tagged_sendmsg(self.ep.raw(), &tagged, FI_COMPLETION) },
            // SAFETY: as above.
            Verb::Receive => unsafe { call::tagged_recvmsg(self.ep.raw(), &tagged, FI_COMPLETION) },
        }
    }

    /// Asks the library to give up an operation; it is reported all the same.
    pub(super) fn cancel(&self, context: *mut c_void) {
        // SAFETY: an enabled endpoint and a context in place. An error means that it is too late to cancel.
        let _ = unsafe { call::cancel(self.ep.raw(), context) };
    }

    /// Makes a checked address known.
    pub(super) fn insert(&self, address: &[u8]) -> Result<u64, Errno> {
        // SAFETY: an open address vector; the address has the length and form of its format (`blob`).
        unsafe { call::av_insert(self.addresses.raw(), address) }
    }
}

/// One network interface at work: what peers reach, and what endpoints for peers are made from.
pub(super) struct Rail {
    pub(super) passive: Endpoint,
    pub(super) domain: Domain,
    pub(super) fabric: Fabric,
    pub(super) info: Info,
    pub(super) name: Vec<u8>,
}

impl Rail {
    pub(super) fn open(info: Info) -> Result<Self, Errno> {
        Self::open_with(info, FI_WAIT_FD)
    }

    /// As `open`; `wait` as of [`Endpoint`].
    pub(super) fn open_with(info: Info, wait: i32) -> Result<Self, Errno> {
        let fabric = Fabric::open(&info)?;
        let domain = Domain::open(&fabric, &info)?;
        let passive = Endpoint::open_with(&domain, &info, wait)?;
        let name = passive.name()?;
        Ok(Self { passive, domain, fabric, info, name })
    }
}
