//! The calls that C headers inline: each goes through the function table of its object.
//!
//! # Safety
//! The same for all of them, and named by their callers: the object came from this library and is not closed; what
//! it hands to the library for later (buffers, contexts) stays in place until the library gives it back; calls on
//! objects of one domain do not run at the same time.
#![expect(clippy::missing_safety_doc, reason = "the module's doc states it once for all")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::offset_of;
use std::ptr::null_mut;

use crate::Errno;
use crate::abi::*;

/// The entry of a function table: absent in short tables of other versions, and null where not implemented.
macro_rules! entry {
    ($table:expr, $type:ident . $name:ident) => {{
        let table: *const $type = $table;
        if table.is_null() {
            return Err(Errno::NOSYS);
        }
        // SAFETY: tables are constants of the library and begin with their own size.
        let size = unsafe { (*table).size };
        if size <= offset_of!($type, $name) {
            return Err(Errno::NOSYS);
        }
        // SAFETY: the entry lies within the table, as just checked.
        unsafe { (*table).$name }.ok_or(Errno::NOSYS)?
    }};
}

fn status(returned: c_int) -> Result<(), Errno> {
    Errno::check(returned as isize).map(|_| ())
}

/// Closes an object; those made from it must be closed before.
///
/// # Errors
/// The library's status: the object is still open.
pub unsafe fn close(object: *mut fid) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let close = entry!(unsafe { (*object).ops }, fi_ops.close);
    // SAFETY: by the caller.
    status(unsafe { close(object) })
}

/// Binds one object to another.
///
/// # Errors
/// The library's status.
pub unsafe fn bind(object: *mut fid, to: *mut fid, flags: u64) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let bind = entry!(unsafe { (*object).ops }, fi_ops.bind);
    // SAFETY: by the caller.
    status(unsafe { bind(object, to, flags) })
}

/// Enables an endpoint or a registration.
///
/// # Errors
/// The library's status.
pub unsafe fn enable(object: *mut fid) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let control = entry!(unsafe { (*object).ops }, fi_ops.control);
    // SAFETY: by the caller; the command takes no argument.
    status(unsafe { control(object, FI_ENABLE, null_mut()) })
}

/// The descriptor of a completion queue opened with [`FI_WAIT_FD`]; it belongs to the queue.
///
/// # Errors
/// The library's status.
pub unsafe fn wait_fd(cq: *mut fid_cq) -> Result<c_int, Errno> {
    let mut fd: c_int = -1;
    // SAFETY: an open object has its table (module).
    let control = entry!(unsafe { (*cq).fid.ops }, fi_ops.control);
    // SAFETY: by the caller; the command writes one int.
    status(unsafe { control(cq.cast::<fid>(), FI_GETWAIT, (&raw mut fd).cast::<c_void>()) })?;
    Ok(fd)
}

/// Opens a domain, with the attributes of `info`.
///
/// # Errors
/// The library's status.
pub unsafe fn domain(fabric: *mut fid_fabric, info: *mut fi_info) -> Result<*mut fid_domain, Errno> {
    let mut opened = null_mut();
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*fabric).ops }, fi_ops_fabric.domain);
    // SAFETY: by the caller.
    status(unsafe { call(fabric, info, &raw mut opened, null_mut()) })?;
    Ok(opened)
}

/// Whether one may sleep on the descriptors of these queues: [`Errno::AGAIN`] when there is something to read first.
///
/// # Errors
/// The library's status.
pub unsafe fn trywait(fabric: *mut fid_fabric, queues: &mut [*mut fid]) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*fabric).ops }, fi_ops_fabric.trywait);
    let count = c_int::try_from(queues.len()).unwrap_or(c_int::MAX);
    // SAFETY: by the caller; `count` entries are there.
    status(unsafe { call(fabric, queues.as_mut_ptr(), count) })
}

/// Opens an address vector.
///
/// # Errors
/// The library's status.
pub unsafe fn av_open(domain: *mut fid_domain, attr: &mut fi_av_attr) -> Result<*mut fid_av, Errno> {
    let mut opened = null_mut();
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*domain).ops }, fi_ops_domain.av_open);
    // SAFETY: by the caller.
    status(unsafe { call(domain, attr, &raw mut opened, null_mut()) })?;
    Ok(opened)
}

/// Opens a completion queue.
///
/// # Errors
/// The library's status.
pub unsafe fn cq_open(domain: *mut fid_domain, attr: &mut fi_cq_attr) -> Result<*mut fid_cq, Errno> {
    let mut opened = null_mut();
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*domain).ops }, fi_ops_domain.cq_open);
    // SAFETY: by the caller.
    status(unsafe { call(domain, attr, &raw mut opened, null_mut()) })?;
    Ok(opened)
}

/// Opens an endpoint.
///
/// # Errors
/// The library's status.
pub unsafe fn endpoint(domain: *mut fid_domain, info: *mut fi_info) -> Result<*mut fid_ep, Errno> {
    let mut opened = null_mut();
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*domain).ops }, fi_ops_domain.endpoint);
    // SAFETY: by the caller.
    status(unsafe { call(domain, info, &raw mut opened, null_mut()) })?;
    Ok(opened)
}

/// Registers memory.
///
/// # Errors
/// The library's status.
pub unsafe fn mr_regattr(
    domain: *mut fid_domain,
    attr: &fi_mr_attr,
    flags: u64,
) -> Result<*mut fid_mr, Errno> {
    let mut registered = null_mut();
    // SAFETY: an open domain has its table (module).
    let call = entry!(unsafe { (*domain).mr }, fi_ops_mr.regattr);
    // SAFETY: by the caller.
    status(unsafe { call(domain.cast::<fid>(), attr, flags, &raw mut registered) })?;
    Ok(registered)
}

/// Inserts one address. The caller has checked its length for the format of the domain.
///
/// # Errors
/// The library's status; `EINVAL` when it did not take the address.
pub unsafe fn av_insert(av: *mut fid_av, address: &[u8]) -> Result<u64, Errno> {
    const EINVAL: i32 = 22;
    let mut at = FI_ADDR_UNSPEC;
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*av).ops }, fi_ops_av.insert);
    // SAFETY: by the caller.
    let inserted = unsafe { call(av, address.as_ptr().cast::<c_void>(), 1, &raw mut at, 0, null_mut()) };
    if Errno::check(inserted as isize)? == 1 && at != FI_ADDR_UNSPEC { Ok(at) } else { Err(Errno(EINVAL)) }
}

/// Reads completions; 0 or [`Errno::AGAIN`] when there are none.
///
/// # Errors
/// The library's status: [`Errno::AVAIL`] when [`cq_readerr`] is to be called first.
pub unsafe fn cq_read(cq: *mut fid_cq, into: &mut [fi_cq_tagged_entry]) -> Result<usize, Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*cq).ops }, fi_ops_cq.read);
    // SAFETY: by the caller; the queue was opened with `FI_CQ_FORMAT_TAGGED`, so entries are of this type.
    let count = Errno::check(unsafe { call(cq, into.as_mut_ptr().cast::<c_void>(), into.len()) })?;
    Ok(count.min(into.len()))
}

/// Reads one failed completion.
///
/// # Errors
/// The library's status.
pub unsafe fn cq_readerr(cq: *mut fid_cq, into: &mut fi_cq_err_entry) -> Result<usize, Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*cq).ops }, fi_ops_cq.readerr);
    // SAFETY: by the caller; the entry is at least as long as the library's.
    Errno::check(unsafe { call(cq, into, 0) })
}

/// The provider's words for a failed completion.
///
/// # Errors
/// When it has none.
pub unsafe fn cq_strerror(cq: *mut fid_cq, error: &fi_cq_err_entry) -> Result<String, Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*cq).ops }, fi_ops_cq.strerror);
    let mut buffer: [c_char; 128] = [0; 128];
    // SAFETY: by the caller; `buffer` is as long as said, and `err_data` is that of the entry just read.
    let text = unsafe { call(cq, error.prov_errno, error.err_data, buffer.as_mut_ptr(), buffer.len() - 1) };
    if text.is_null() {
        return Err(Errno::NOSYS);
    }
    // SAFETY: a terminated string: a constant of the library, or `buffer`, whose last byte is 0.
    Ok(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// The address of an enabled endpoint; longer ones than `into` are an error.
///
/// # Errors
/// The library's status.
pub unsafe fn getname(ep: *mut fid_ep, into: &mut [u8]) -> Result<usize, Errno> {
    let mut len = into.len();
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*ep).cm }, fi_ops_cm.getname);
    // SAFETY: by the caller; `into` is as long as said.
    status(unsafe { call(ep.cast::<fid>(), into.as_mut_ptr().cast::<c_void>(), &raw mut len) })?;
    Ok(len.min(into.len()))
}

/// Sets a boolean option of an endpoint that is not enabled yet.
///
/// # Errors
/// The library's status: many do not know many options.
pub unsafe fn set_flag(ep: *mut fid_ep, option: c_int, value: bool) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*ep).ops }, fi_ops_ep.setopt);
    let value = (&raw const value).cast::<c_void>();
    // SAFETY: by the caller; the option is a C `bool`, which is a Rust one.
    status(unsafe { call(ep.cast::<fid>(), FI_OPT_ENDPOINT, option, value, size_of::<bool>()) })
}

/// Cancels the operation of this context, where it is still possible.
///
/// # Errors
/// The library's status.
pub unsafe fn cancel(ep: *mut fid_ep, context: *mut c_void) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*ep).ops }, fi_ops_ep.cancel);
    // SAFETY: by the caller.
    Errno::check(unsafe { call(ep.cast::<fid>(), context) }).map(|_| ())
}

/// Posts a one-sided read.
///
/// # Errors
/// The library's status: nothing was posted, and with [`Errno::AGAIN`] it may be later.
pub unsafe fn readmsg(ep: *mut fid_ep, message: &fi_msg_rma, flags: u64) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*ep).rma }, fi_ops_rma.readmsg);
    // SAFETY: by the caller.
    Errno::check(unsafe { call(ep, message, flags) }).map(|_| ())
}

/// Posts a one-sided write.
///
/// # Errors
/// As for [`readmsg`].
pub unsafe fn writemsg(ep: *mut fid_ep, message: &fi_msg_rma, flags: u64) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*ep).rma }, fi_ops_rma.writemsg);
    // SAFETY: by the caller.
    Errno::check(unsafe { call(ep, message, flags) }).map(|_| ())
}

/// Posts a tagged send.
///
/// # Errors
/// As for [`readmsg`].
pub unsafe fn tagged_sendmsg(ep: *mut fid_ep, message: &fi_msg_tagged, flags: u64) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*ep).tagged }, fi_ops_tagged.sendmsg);
    // SAFETY: by the caller.
    Errno::check(unsafe { call(ep, message, flags) }).map(|_| ())
}

/// Posts a tagged receive.
///
/// # Errors
/// As for [`readmsg`].
pub unsafe fn tagged_recvmsg(ep: *mut fid_ep, message: &fi_msg_tagged, flags: u64) -> Result<(), Errno> {
    // SAFETY: an open object has its table (module).
    let call = entry!(unsafe { (*ep).tagged }, fi_ops_tagged.recvmsg);
    // SAFETY: by the caller.
    Errno::check(unsafe { call(ep, message, flags) }).map(|_| ())
}
