//! libfabric by itself, for the bench: one endpoint, memory registered once, a read for each block, and a look at the
//! completion queue again and again. What Baton's reads cost beyond this is Baton's; the rest is the library's.
//!
//! Settings are those of the driver: the same provider, and connections within the host that are not paced.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::time::{Duration, Instant};

use baton_libfabric_sys::abi::{FI_MR_LOCAL, FI_MR_VIRT_ADDR, FI_WAIT_NONE, fi_cq_tagged_entry};
use baton_libfabric_sys::{Errno, Library};

use super::blob::{self, Expected, Key};
use super::object::{Call, CallPiece, Rail, Registered, Verb};
use super::register::register_piece;
use super::{LibfabricOptions, library, select};
use crate::backend::fabric::driver::{Access, DriverError};
use crate::backend::{handlers, sockets};
use crate::memory::MemorySpan;

/// Completions read at once.
const BATCH: usize = 32;
/// Blocks that do not come within this time do not come.
const PATIENCE: Duration = Duration::from_secs(10);
/// Looks between two looks at the clock.
const LOOKS: u32 = 1 << 16;

/// An endpoint and the memory that it works on.
struct End {
    registered: Option<Registered>,
    rail: Rail,
    /// Kept until nothing of the library knows it.
    span: MemorySpan,
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.rail.passive.close() {
            // The library may still know the memory.
            std::mem::forget(self.span.clone());
        }
        drop(self.registered.take());
    }
}

fn fault(what: impl Into<String>) -> DriverError {
    DriverError { what: what.into(), remedy: String::new() }
}

impl End {
    fn open(span: &MemorySpan, access: Access) -> Result<Self, DriverError> {
        handlers::keep(|| {
            let library = library()?;
            let rail = first_rail(library)?;
            let needed = access != Access::Local || rail.info.has_mr_mode(FI_MR_LOCAL);
            let registered =
                needed.then(|| register_piece(&rail, span, access, (0, span.len()))).transpose()?;
            Ok(Self { registered, rail, span: span.clone() })
        })
    }

    fn descriptor(&self) -> *mut c_void {
        self.registered.as_ref().map_or(std::ptr::null_mut(), Registered::descriptor)
    }

    fn failed(&self, step: &str, errno: Errno) -> DriverError {
        fault(format!("{step}: {}", self.rail.info.library().strerror(errno)))
    }
}

/// The interface that the driver would take.
fn first_rail(library: &'static Library) -> Result<Rail, DriverError> {
    let bind = LibfabricOptions::default().bind;
    let found = select::ORDER.iter().find_map(|provider| {
        let info = select::interfaces(library, provider, bind).ok()?.into_iter().next()?;
        Rail::open_with(info, FI_WAIT_NONE).ok()
    });
    found.ok_or_else(|| fault(format!("no provider of libfabric works at {bind}")))
}

/// The side whose memory is read.
pub(crate) struct Owner(End);

impl Owner {
    /// Shows memory to who is told its address and key.
    ///
    /// # Errors
    /// The library's.
    pub(crate) fn open(span: &MemorySpan) -> Result<Self, DriverError> {
        let end = End::open(span, Access::RemoteRead)?;
        blob::socket_address(&end.rail.name).into_iter().for_each(sockets::tune_listener);
        Ok(Self(end))
    }

    /// Where it is.
    pub(crate) fn address(&self) -> Vec<u8> {
        blob::encode_address(std::slice::from_ref(&self.0.rail.name))
    }

    /// What a reader needs for its memory.
    pub(crate) fn key(&self) -> Vec<u8> {
        let Self(end) = self;
        let virtual_addresses = end.rail.info.has_mr_mode(FI_MR_VIRT_ADDR);
        let key = Key {
            len: end.span.len() as u64,
            base: if virtual_addresses { end.span.address() as u64 } else { 0 },
            segment: u64::MAX,
            virtual_addresses,
            rails: 1,
            keys: end.registered.iter().map(Registered::key).collect(),
        };
        key.encode()
    }

    /// Lets the library answer.
    pub(crate) fn turn(&mut self) {
        let mut entries = empty();
        if let Err(Errno::AVAIL) = self.0.rail.passive.queue.read(&mut entries) {
            let _ = self.0.rail.passive.queue.read_error(self.0.rail.info.library());
        }
    }
}

/// Four words, or eight, that the library wants for an operation.
struct Context(UnsafeCell<[u64; 8]>);

/// The side that reads.
pub(crate) struct Reader {
    end: End,
    /// One for each block of a read.
    contexts: Vec<Context>,
    to: u64,
    key: Key,
    /// Where the connection leads, until it is tuned.
    untuned: Option<std::net::SocketAddr>,
}

// SAFETY: nothing outside of it holds one of its objects, and the library lets several threads call those of a domain, one
// at a time (`FI_THREAD_DOMAIN`).
unsafe impl Send for Reader {}

impl Reader {
    /// Connects to an owner; `span` is where blocks go.
    ///
    /// # Errors
    /// The library's.
    pub(crate) fn open(span: &MemorySpan, address: &[u8], key: &[u8]) -> Result<Self, DriverError> {
        let end = End::open(span, Access::Local)?;
        let own = Expected {
            format: end.rail.info.address_format(),
            own: &end.rail.name,
            loopback: LibfabricOptions::default().bind.is_loopback(),
        };
        let theirs = blob::decode_address(address, own).map_err(|error| fault(error.to_string()))?;
        let theirs = theirs.first().ok_or_else(|| fault("no address"))?;
        let key = Key::decode(key).map_err(|error| fault(error.to_string()))?;
        let to = end.rail.passive.insert(theirs);
        let to = to.map_err(|errno| end.failed("taking the address", errno))?;
        let untuned = blob::socket_address(theirs);
        Ok(Self { end, contexts: Vec::new(), to, key, untuned })
    }

    /// Reads blocks, by offset and length, each to where it is at its owner.
    ///
    /// # Errors
    /// The library's: nothing can be read any more.
    ///
    /// # Panics
    /// When a block is outside of the memory.
    pub(crate) fn read(&mut self, blocks: &[(usize, usize)]) -> Result<(), DriverError> {
        if self.contexts.len() < blocks.len() {
            // Nothing is under way that knows where they are.
            self.contexts.resize_with(blocks.len(), || Context(UnsafeCell::new([0; 8])));
        }
        let (mut posted, mut done, mut looks) = (0, 0, 0u32);
        let start = Instant::now();
        while done < blocks.len() {
            while posted < blocks.len() && self.post(blocks[posted], posted)? {
                posted += 1;
            }
            done += self.look()?;
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS) && start.elapsed() > PATIENCE {
                return Err(fault("blocks did not come in time"));
            }
        }
        // Before the first read there is no connection.
        self.untuned.take().into_iter().for_each(sockets::tune_connections);
        Ok(())
    }

    /// Posts the read of a block; false: the library takes no more for now.
    fn post(&self, (offset, len): (usize, usize), number: usize) -> Result<bool, DriverError> {
        let span = &self.end.span;
        assert!(offset.checked_add(len).is_some_and(|end| end <= span.len()), "outside of the memory");
        let piece = CallPiece {
            local: span.address() + offset,
            len,
            descriptor: self.end.descriptor(),
            remote: self.key.address(offset as u64),
            key: self.key.of(0, offset as u64),
        };
        let context = self.contexts[number].0.get().cast::<c_void>();
        match self.end.rail.passive.post(&Call::new(Verb::Read, self.to, piece), context) {
            Ok(()) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(self.end.failed("posting a read", errno)),
        }
    }

    /// Reads that have ended since the last look.
    fn look(&self) -> Result<usize, DriverError> {
        let mut entries = empty();
        let queue = &self.end.rail.passive.queue;
        match queue.read(&mut entries) {
            Ok(count) => Ok(count),
            Err(Errno::AGAIN) => Ok(0),
            Err(Errno::AVAIL) => {
                let failure = queue.read_error(self.end.rail.info.library());
                let reason = failure.map_or_else(|errno| errno.to_string(), |failure| failure.reason);
                Err(fault(format!("a read failed: {reason}")))
            }
            Err(errno) => Err(self.end.failed("reading the queue", errno)),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if !self.end.rail.passive.close() {
            std::mem::forget(std::mem::take(&mut self.contexts));
        }
    }
}

fn empty() -> [fi_cq_tagged_entry; BATCH] {
    // SAFETY: numbers and pointers only, for which zero is a value.
    unsafe { std::mem::zeroed() }
}
