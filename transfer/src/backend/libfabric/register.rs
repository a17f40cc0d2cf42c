//! Registrations of memory.

use std::collections::HashMap;
use std::ffi::c_void;
use std::os::fd::AsRawFd;

use baton_libfabric_sys::Errno;
use baton_libfabric_sys::abi::*;

use super::blob::{self, KEYS_MAX, Key};
use super::device;
use super::object::{Rail, Registered};
use super::work::LibfabricDriver;
use crate::backend::fabric::driver::{Access, DriverError, LocalId};
use crate::memory::{MemorySpan, Place};

/// How often another random key is tried when one is taken.
const KEY_TRIES: usize = 8;
/// Bytes of retired memory from which on it is told of, and again whenever they doubled.
const RETIRED_BYTES: u64 = 64 << 30;

/// Memory that operations may use. It stays until nothing can touch it any more.
pub(super) struct Registration {
    /// For each rail, for each piece; none where the provider needs no registration of local memory.
    pieces: Vec<Vec<Registered>>,
    pub(super) span: MemorySpan,
    segment: u64,
    access: Access,
    /// Operations under way that use it.
    pub(super) busy: u32,
    /// Whether it is to end with the last of them.
    pub(super) ended: bool,
}

/// Memory that peers could reach, once each however often it was registered.
#[derive(Default)]
pub(super) struct Retired {
    spans: HashMap<(usize, usize), Vec<MemorySpan>>,
    bytes: u64,
    /// How many bytes are worth a word.
    told: u64,
}

impl Retired {
    fn keep(&mut self, span: &MemorySpan) {
        let known = self.spans.entry((span.address(), span.len())).or_default();
        if known.iter().any(|known| known.is_same(span)) {
            return;
        }
        known.push(span.clone());
        self.bytes += span.len() as u64;
        if self.bytes > self.told.max(RETIRED_BYTES) {
            self.told = 2 * self.bytes;
            let bytes = self.bytes;
            tracing::warn!(bytes, "libfabric keeps all memory it ever showed to peers: register less often");
        }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Registration {
    pub(super) fn access(&self) -> Access {
        self.access
    }

    /// Bytes from `offset` to the end of its piece.
    pub(super) fn left_in_segment(&self, offset: usize) -> usize {
        if self.pieces.is_empty() {
            return self.span.len() - offset;
        }
        usize::try_from(self.segment - offset as u64 % self.segment).unwrap_or(usize::MAX)
    }

    /// What the library wants with an operation on this piece.
    pub(super) fn descriptor(&self, rail: usize, offset: usize) -> *mut c_void {
        let piece = self.pieces.get(rail).and_then(|pieces| {
            pieces.get(usize::try_from(offset as u64 / self.segment).unwrap_or(usize::MAX))
        });
        piece.map_or(std::ptr::null_mut(), Registered::descriptor)
    }
}

impl Key {
    /// Where an offset is, as the provider counts.
    pub(super) fn address(&self, offset: u64) -> u64 {
        if self.virtual_addresses { self.base + offset } else { offset % self.segment }
    }

    /// The key of the piece with an offset, on a rail.
    pub(super) fn of(&self, rail: usize, offset: u64) -> u64 {
        let piece = usize::try_from(offset / self.segment).unwrap_or(usize::MAX);
        self.keys.get(rail * self.segments() + piece).copied().unwrap_or(0)
    }
}

impl LibfabricDriver {
    pub(super) fn register_span(
        &mut self,
        span: &MemorySpan,
        access: Access,
    ) -> Result<(LocalId, Vec<u8>), DriverError> {
        let Some(first) = self.rails.first() else {
            return Err(fault("the driver is closed".to_owned(), ""));
        };
        if let Some((what, remedy)) = device::obstacle(&first.info, span.place()) {
            return Err(fault(what, remedy));
        }
        let segments = blob::segments(span.len() as u64, self.segment);
        let most = KEYS_MAX / self.rails.len();
        if segments > most {
            let limit = most as u64 * self.segment;
            let what = format!(
                "{} bytes are more than the {limit} that one registration over {} rails can have",
                span.len(),
                self.rails.len()
            );
            return Err(fault(what, "register the memory in several regions, or use fewer rails"));
        }
        let needed = access != Access::Local
            || first.info.has_mr_mode(FI_MR_LOCAL)
            || (span.place() != Place::Host && first.info.has_mr_mode(FI_MR_HMEM));
        let rails = if needed { self.rails.as_slice() } else { &[] };
        let pieces = rails.iter().map(|rail| register_pieces(rail, span, access, self.segment));
        let pieces = pieces.collect::<Result<Vec<_>, _>>()?;
        let key = match access {
            Access::Local => Vec::new(),
            Access::RemoteRead | Access::RemoteWrite => {
                let virtual_addresses = first.info.has_mr_mode(FI_MR_VIRT_ADDR);
                Key {
                    len: span.len() as u64,
                    base: if virtual_addresses { span.address() as u64 } else { 0 },
                    segment: self.segment,
                    virtual_addresses,
                    rails: pieces.len(),
                    keys: pieces.iter().flatten().map(Registered::key).collect(),
                }
                .encode()
            }
        };
        let id = self.next_id();
        let registration =
            Registration { pieces, span: span.clone(), segment: self.segment, access, busy: 0, ended: false };
        self.registrations.insert(id, registration);
        Ok((LocalId(id), key))
    }

    /// Ends a registration, or lets it end with the operations that use it.
    pub(super) fn end_registration(&mut self, id: LocalId) {
        let local_needed = self.rails.first().is_some_and(|rail| rail.info.has_mr_mode(FI_MR_LOCAL));
        let Some(registration) = self.registrations.get_mut(&id.0) else { return };
        registration.ended = true;
        if registration.busy == 0 {
            self.finish_registration(id);
        } else if !local_needed && registration.span.place() == Place::Host {
            // Operations under way do without it: peers' keys end now.
            registration.pieces.clear();
        }
    }

    /// No operation of ours uses it any more.
    pub(super) fn finish_registration(&mut self, id: LocalId) {
        let Some(registration) = self.registrations.remove(&id.0) else { return };
        if registration.access != Access::Local {
            self.retired.keep(&registration.span);
        }
        drop(registration.pieces);
    }
}

fn fault(what: String, remedy: &str) -> DriverError {
    DriverError { what, remedy: remedy.to_owned() }
}

/// Registers all pieces on one rail.
fn register_pieces(
    rail: &Rail,
    span: &MemorySpan,
    access: Access,
    segment: u64,
) -> Result<Vec<Registered>, DriverError> {
    let count = blob::segments(span.len() as u64, segment) as u64;
    (0..count)
        .map(|piece| {
            let offset = piece * segment;
            let len = segment.min(span.len() as u64 - offset);
            register_piece(rail, span, access, (offset as usize, len as usize))
        })
        .collect()
}

pub(super) fn register_piece(
    rail: &Rail,
    span: &MemorySpan,
    access: Access,
    (offset, len): (usize, usize),
) -> Result<Registered, DriverError> {
    let address: *mut c_void = std::ptr::without_provenance_mut(span.address() + offset);
    let memory = iovec { iov_base: address, iov_len: len };
    // The library has dma-buf from version 1.20 of its interface on.
    let dmabuf = span.dmabuf().filter(|_| rail.info.library().api() >= fi_version_of(1, 20));
    let file = dmabuf.map(|(file, start)| fi_mr_dmabuf {
        fd: file.as_raw_fd(),
        offset: start + offset as u64,
        len,
        base_addr: address,
    });
    let (memory, flags) = match &file {
        Some(file) => (fi_mr_memory { dmabuf: &raw const *file }, FI_MR_DMABUF),
        None => (fi_mr_memory { mr_iov: &raw const memory }, 0),
    };
    let (iface, number) = device::interface(span.place());
    // SAFETY: numbers and pointers only, for which zero is a value.
    let mut attr: fi_mr_attr = unsafe { std::mem::zeroed() };
    attr.memory = memory;
    attr.iov_count = 1;
    attr.iface = iface;
    attr.device = fi_mr_device { reserved: 0 };
    attr.device.cuda = number;
    attr.access = FI_SEND | FI_RECV | FI_READ | FI_WRITE;
    attr.access |= match access {
        Access::Local => 0,
        Access::RemoteRead => FI_REMOTE_READ,
        Access::RemoteWrite => FI_REMOTE_WRITE,
    };
    for _ in 0..KEY_TRIES {
        attr.requested_key = random_key(rail)?;
        match Registered::new(&rail.domain, &attr, flags) {
            // The key is taken: by another registration of this process.
            Err(Errno::NOKEY) => {}
            Ok(registered) => {
                if rail.info.has_mr_mode(FI_MR_ENDPOINT) {
                    let bound = registered.bind(&rail.passive);
                    bound.map_err(|errno| refused(rail, span, len, errno))?;
                }
                return Ok(registered);
            }
            Err(errno) => return Err(refused(rail, span, len, errno)),
        }
    }
    Err(refused(rail, span, len, Errno::NOKEY))
}

/// A key that nobody can guess, where the provider lets us choose.
fn random_key(rail: &Rail) -> Result<u64, DriverError> {
    if rail.info.has_mr_mode(FI_MR_PROV_KEY) {
        return Ok(0);
    }
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| fault(format!("the system has no random numbers: {errno}"), ""))?;
    let unused_bits = 64 - 8 * rail.info.domain_attr().mr_key_size.clamp(1, 8) as u32;
    Ok(u64::from_le_bytes(bytes) >> unused_bits)
}

fn refused(rail: &Rail, span: &MemorySpan, len: usize, errno: Errno) -> DriverError {
    const ENOMEM: i32 = 12;
    let provider = rail.info.provider();
    let reason = rail.info.library().strerror(errno);
    let kind = span.place().kind();
    let what = format!("{provider} does not register {len} bytes of {kind} memory: {reason}");
    let remedy = match (span.place(), errno.0) {
        (Place::Host, ENOMEM) => "raise the limit of locked memory (ulimit -l)",
        (Place::Host, _) => "",
        (Place::Cuda(_), _) => "use a libfabric built with CUDA, such as that of the EFA installer of AWS",
        (Place::Neuron(_), _) => {
            "use a libfabric built with Neuron, such as that of the EFA installer of AWS"
        }
    };
    fault(what, remedy)
}
