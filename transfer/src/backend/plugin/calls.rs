//! The calls of one opened driver: each a thin, safe form of one function of the table.

use std::ffi::CString;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::{NonNull, null, null_mut};
use std::time::Instant;

use super::abi::{
    self, RawBlob, RawDone, RawDriver, RawError, RawInfo, RawLocal, RawMemory, RawOpenOptions, RawRemote,
    Table,
};
use crate::backend::fabric::driver::{CALL_MAX, DriverError};
use crate::memory::{MemorySpan, Place};

/// Why a call did not do what was asked.
#[derive(Debug)]
pub(super) enum CallError {
    /// The plugin says so.
    Refused(DriverError),
    /// The queues are full.
    Again,
    /// The peer's range is not within its registration.
    Range,
    /// The plugin breaks a rule of the header: nothing it says can be relied on.
    Breach(String),
}

/// An opened driver of a plugin; closed when dropped.
pub(super) struct Calls {
    table: Table,
    driver: NonNull<RawDriver>,
    /// For logs.
    name: String,
}

impl Calls {
    pub(super) fn open(table: Table, name: String, bind: Option<IpAddr>) -> Result<Self, CallError> {
        let bind = bind.and_then(|bind| CString::new(bind.to_string()).ok());
        let options = RawOpenOptions {
            size: size_of::<RawOpenOptions>() as u32,
            reserved: 0,
            bind: bind.as_ref().map_or(null(), |bind| bind.as_ptr()),
        };
        let (mut driver, mut error) = (null_mut(), RawError::zeroed());
        let started = Instant::now();
        // SAFETY: the table's function as the header declares it; all pointers are valid for the call.
        let status = unsafe { (table.open)(&options, &mut driver, &mut error) };
        warn_if_slow(&name, "open", started);
        outcome("open", status, &error)?;
        let driver = NonNull::new(driver)
            .ok_or_else(|| CallError::Breach("`open` succeeded without a driver".to_owned()))?;
        Ok(Self { table, driver, name })
    }

    pub(super) fn info(&mut self) -> Result<RawInfo, CallError> {
        let (mut info, mut error) = (RawInfo::zeroed(), RawError::zeroed());
        // SAFETY: `driver` is open (as in every call below); the pointers are valid for the call.
        let status = unsafe { (self.table.info)(self.driver.as_ptr(), &mut info, &mut error) };
        outcome("info", status, &error)?;
        Ok(info)
    }

    pub(super) fn address(&mut self, max: usize) -> Result<Vec<u8>, CallError> {
        let (mut bytes, mut error) = (vec![0; max], RawError::zeroed());
        let mut blob = RawBlob { bytes: bytes.as_mut_ptr(), room: max as u64, len: 0 };
        // SAFETY: the blob points to `room` writable bytes; the pointers are valid for the call.
        let status = unsafe { (self.table.address)(self.driver.as_ptr(), &mut blob, &mut error) };
        outcome("address", status, &error)?;
        cut(bytes, blob.len, "an address")
    }

    /// Registers memory that stays in place until [`Calls::deregister`] or the end of the driver. Handle and key.
    pub(super) fn register(
        &mut self,
        span: &MemorySpan,
        access: u32,
        key_max: usize,
    ) -> Result<(u64, Vec<u8>), CallError> {
        let (place, device) = match span.place() {
            Place::Host => (abi::PLACE_HOST, 0),
            Place::Cuda(device) => (abi::PLACE_CUDA, device),
            Place::Neuron(device) => (abi::PLACE_NEURON, device),
        };
        let (dmabuf, dmabuf_offset) =
            span.dmabuf().map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
        let memory = RawMemory {
            address: span.address() as u64,
            len: span.len() as u64,
            place,
            device,
            dmabuf,
            reserved: 0,
            dmabuf_offset,
        };
        let (mut key, mut error, mut handle) = (vec![0; key_max], RawError::zeroed(), 0);
        let mut blob = RawBlob { bytes: key.as_mut_ptr(), room: key_max as u64, len: 0 };
        let driver = self.driver.as_ptr();
        // SAFETY: the blob points to `room` writable bytes; the memory's owner keeps it in place (this method's promise).
        let status = unsafe {
            (self.table.register_memory)(driver, &memory, access, &mut handle, &mut blob, &mut error)
        };
        outcome("register_memory", status, &error)?;
        cut(key, blob.len, "a key").map(|key| (handle, key))
    }

    /// `handle` is one of [`Calls::register`], used for the last time, and no operation on it is unreported.
    pub(super) fn deregister(&mut self, handle: u64) {
        // SAFETY: the handle is the driver's own and valid (as said above).
        unsafe { (self.table.deregister)(self.driver.as_ptr(), handle) };
    }

    pub(super) fn connect(&mut self, address: &[u8]) -> Result<u64, CallError> {
        let (mut error, mut peer, started) = (RawError::zeroed(), 0, Instant::now());
        let (bytes, len, driver) = (address.as_ptr(), address.len() as u64, self.driver.as_ptr());
        // SAFETY: `bytes` has `len` bytes; the pointers are valid for the call.
        let status = unsafe { (self.table.connect)(driver, bytes, len, &mut peer, &mut error) };
        warn_if_slow(&self.name, "connect", started);
        outcome("connect", status, &error)?;
        Ok(peer)
    }

    /// `peer` is one of [`Calls::connect`], used for the last time.
    pub(super) fn disconnect(&mut self, peer: u64) {
        let started = Instant::now();
        // SAFETY: the handle is the driver's own and valid (as said above).
        unsafe { (self.table.disconnect)(self.driver.as_ptr(), peer) };
        warn_if_slow(&self.name, "disconnect", started);
    }

    /// `peer` is one of [`Calls::connect`].
    pub(super) fn import(&mut self, peer: u64, key: &[u8]) -> Result<u64, CallError> {
        let (mut error, mut imported) = (RawError::zeroed(), 0);
        let (bytes, len, driver) = (key.as_ptr(), key.len() as u64, self.driver.as_ptr());
        // SAFETY: `bytes` has `len` bytes; the handle is the driver's own; the pointers are valid for the call.
        let status = unsafe { (self.table.import_key)(driver, peer, bytes, len, &mut imported, &mut error) };
        outcome("import_key", status, &error)?;
        Ok(imported)
    }

    /// `imported` is one of [`Calls::import`] for `peer`, used for the last time, and no operation on it is unreported.
    pub(super) fn forget(&mut self, peer: u64, imported: u64) {
        // SAFETY: the handles are the driver's own and valid (as said above).
        unsafe { (self.table.forget)(self.driver.as_ptr(), peer, imported) };
    }

    /// The handles are the driver's own; the local range is within its registration, as in the three below.
    pub(super) fn read(&mut self, from: &RawRemote, to: &RawLocal, op: u64) -> Result<(), CallError> {
        let mut error = RawError::zeroed();
        // SAFETY: handles and range are valid (as said above); the pointers are valid for the call.
        let status = unsafe { (self.table.read)(self.driver.as_ptr(), from, to, op, &mut error) };
        outcome("read", status, &error)
    }

    pub(super) fn write(&mut self, to: &RawRemote, from: &RawLocal, op: u64) -> Result<(), CallError> {
        let mut error = RawError::zeroed();
        // SAFETY: as in `read`.
        let status = unsafe { (self.table.write)(self.driver.as_ptr(), to, from, op, &mut error) };
        outcome("write", status, &error)
    }

    pub(super) fn send(&mut self, peer: u64, tag: u64, from: &RawLocal, op: u64) -> Result<(), CallError> {
        let mut error = RawError::zeroed();
        // SAFETY: as in `read`.
        let status = unsafe { (self.table.send)(self.driver.as_ptr(), peer, tag, from, op, &mut error) };
        outcome("send", status, &error)
    }

    pub(super) fn receive(&mut self, tag: u64, to: &RawLocal, op: u64) -> Result<(), CallError> {
        let mut error = RawError::zeroed();
        // SAFETY: as in `read`.
        let status = unsafe { (self.table.receive)(self.driver.as_ptr(), tag, to, op, &mut error) };
        outcome("receive", status, &error)
    }

    pub(super) fn cancel_receive(&mut self, op: u64) {
        // SAFETY: `op` is a number; one that the driver does not know means nothing to it.
        unsafe { (self.table.cancel_receive)(self.driver.as_ptr(), op) };
    }

    /// Whether anything happened, and how many ends were written to the front of `ends`.
    pub(super) fn poll(&mut self, ends: &mut [RawDone]) -> Result<(bool, usize), CallError> {
        let (room, mut count) = (ends.len() as u32, 0);
        // SAFETY: `ends` has `room` entries, all initialised: plain numbers and bytes.
        let happened =
            unsafe { (self.table.poll)(self.driver.as_ptr(), ends.as_mut_ptr(), room, &mut count) };
        if count > room {
            return Err(CallError::Breach(format!(
                "`poll` reported {count} operations where {room} have room"
            )));
        }
        Ok((happened != 0 || count > 0, count as usize))
    }

    pub(super) fn arm(&mut self) -> bool {
        // SAFETY: only needs an open driver.
        unsafe { (self.table.arm)(self.driver.as_ptr()) != 0 }
    }

    /// A duplicate of the driver's descriptor: it stays valid whatever the plugin does with its own.
    pub(super) fn wait_fd(&mut self) -> Result<Option<OwnedFd>, CallError> {
        // SAFETY: only needs an open driver.
        let fd: RawFd = unsafe { (self.table.wait_fd)(self.driver.as_ptr()) };
        if fd == -1 {
            return Ok(None);
        }
        let absurd =
            |why: String| CallError::Breach(format!("`wait_fd` gave {fd}, which is no descriptor{why}"));
        if fd < 0 {
            return Err(absurd(String::new()));
        }
        // SAFETY: borrowed for the next call only, which finds out whether it is open; it is not -1.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        match rustix::io::fcntl_dupfd_cloexec(borrowed, 3) {
            Ok(own) => Ok(Some(own)),
            Err(errno) => Err(absurd(format!(": {}", std::io::Error::from(errno)))),
        }
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        let started = Instant::now();
        // SAFETY: the driver is open, and this is the last call of it.
        unsafe { (self.table.close)(self.driver.as_ptr()) };
        warn_if_slow(&self.name, "close", started);
    }
}

fn warn_if_slow(plugin: &str, call: &'static str, started: Instant) {
    let took = started.elapsed();
    if took > CALL_MAX {
        tracing::warn!(plugin, call, ?took, "a transfer plugin blocks for longer than it may");
    }
}

fn outcome(call: &'static str, status: i32, error: &RawError) -> Result<(), CallError> {
    match status {
        abi::OK => Ok(()),
        abi::FAILED => {
            let why = abi::text(&error.what);
            let why = if why.is_empty() { "the plugin gave no reason".to_owned() } else { why };
            Err(CallError::Refused(DriverError {
                what: format!("`{call}` failed: {why}"),
                remedy: abi::text(&error.remedy),
            }))
        }
        abi::AGAIN => Err(CallError::Again),
        abi::RANGE => Err(CallError::Range),
        other => Err(CallError::Breach(format!("`{call}` returned the status {other}"))),
    }
}

/// What a plugin put into a buffer.
fn cut(mut bytes: Vec<u8>, len: u64, what: &str) -> Result<Vec<u8>, CallError> {
    if len > bytes.len() as u64 {
        let max = bytes.len();
        return Err(CallError::Breach(format!("it wrote {what} of {len} bytes where {max} have room")));
    }
    bytes.truncate(len as usize);
    bytes.shrink_to_fit();
    Ok(bytes)
}
