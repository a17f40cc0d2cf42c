//! Host memory that other processes of this machine can map, or copy from through the kernel.
//!
//! Ownership rules, on which every `SAFETY` comment below leans:
//!
//! 1. A [`Mapping`] owns `[base, base + len)` from `mmap` until its `Drop` unmaps it. Nobody else unmaps it. One of
//!    foreign memory holds the [`MemorySpan`] instead, whose maker vouches for the same range.
//! 2. The file behind a mapping never shrinks: it is sealed against shrinking before it is mapped (own memory) or
//!    the seal is checked before it is mapped (a peer's), so no access within `len` can fault.
//! 3. Every access is checked against `len` first, goes through raw pointers or system calls, and keeps no
//!    reference to the mapped bytes beyond the call.
//! 4. The bytes may change under a reader: threads and processes share them. Whoever needs them stable must own
//!    the range by agreement (a KV block has one writer at a time); whoever reads a peer's memory copies first
//!    and verifies the copy.

mod process;

use std::ffi::c_void;
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

pub(crate) use self::process::{MAX_RANGES, Process, RemoteRange, copy_from_process};

use crate::digest::{BlockDigest, DigestSeed, block_digest, copy_digesting};

/// Smallest mapping worth asking huge pages for.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Why memory could not be had or mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Zero bytes were asked for.
    #[error("memory {label:?} would be empty")]
    Empty {
        /// What it was for.
        label: String,
    },
    /// The system refused it.
    #[error("cannot {step} {len} bytes for {label:?}")]
    System {
        /// The step that failed.
        step: &'static str,
        /// What it was for.
        label: String,
        /// Bytes asked for.
        len: usize,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Foreign memory that processors do not reach by plain loads and stores, or that cannot exist.
    #[error("memory {label:?} of kind {} is no host memory of this process", .place.kind())]
    NotHost {
        /// What it was for.
        label: String,
        /// Where it is.
        place: Place,
    },
    /// A peer passed a descriptor whose file is smaller than it says or could shrink under its readers.
    #[error("the memory a peer passed as {label:?} is not sealed at {len} bytes")]
    Unsealed {
        /// What it was passed as.
        label: String,
        /// Bytes announced.
        len: usize,
    },
}

/// One `mmap` of a memory file, or foreign memory.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
    backing: Backing,
    label: Box<str>,
}

/// What is behind a [`Mapping`].
enum Backing {
    File(OwnedFd),
    Foreign(MemorySpan),
}

// SAFETY: the mapping is plain memory, valid from any thread until dropped (rule 1); accesses follow rules 3 and 4.
unsafe impl Send for Mapping {}
// SAFETY: as for Send: no access needs exclusive ownership of the handle.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: OwnedFd, len: usize, protection: ProtFlags, label: &str) -> Result<Self, MemoryError> {
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps no other object.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, &file, 0) };
        let base = base.map_err(|errno| system("map", label, len, errno))?;
        let Some(base) = NonNull::new(base.cast::<u8>()) else {
            return Err(system("map", label, len, rustix::io::Errno::NOMEM));
        };
        let mapping = Self { base, len, backing: Backing::File(file), label: label.into() };
        if len >= HUGE_PAGE_BYTES {
            // Best effort: kernels without huge pages for shared memory say no, and small pages work as well.
            let _ = mapping.advise(Advice::LinuxHugepage);
        }
        Ok(mapping)
    }

    fn advise(&self, advice: Advice) -> rustix::io::Result<()> {
        // SAFETY: the range is exactly this mapping (rule 1) and no advice used here discards its contents.
        unsafe { rustix::mm::madvise(self.base.as_ptr().cast::<c_void>(), self.len, advice) }
    }

    fn fits(&self, offset: usize, len: usize) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// The address of `[offset, offset + len)`, which is within the mapping or a bug of the caller.
    #[track_caller]
    fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(
            self.fits(offset, len),
            "bytes {offset}+{len} are outside memory {:?} of {} bytes",
            self.label,
            self.len
        );
        // SAFETY: `offset <= len` of one mapping, just checked, so the result stays inside or one past it.
        unsafe { self.base.add(offset) }
    }

    #[track_caller]
    fn word(&self, offset: usize) -> &AtomicU64 {
        let at = self.at(offset, size_of::<AtomicU64>());
        assert!(at.cast::<AtomicU64>().is_aligned(), "word at {offset} is not aligned");
        // SAFETY: in bounds, aligned, mapped for as long as `self`, and only ever
        // accessed atomically: control words are not part of any block.
        unsafe { AtomicU64::from_ptr(at.as_ptr().cast::<u64>()) }
    }

    #[track_caller]
    fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: both ranges are valid for `into.len()` bytes; `into` is exclusive and so cannot overlap a
        // mapping to which no references exist (rule 3).
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
    }

    #[track_caller]
    fn copy_to(&self, offset: usize, to: &Mapping, to_offset: usize, len: usize) {
        let from = self.at(offset, len);
        let to = to.at(to_offset, len);
        // SAFETY: both ranges are in bounds; `copy` allows overlap, which two views of one file may have.
        unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), len) };
    }

    #[track_caller]
    fn copy_to_digesting(
        &self,
        offset: usize,
        (to, to_offset): (&Mapping, usize),
        len: usize,
        seed: DigestSeed,
    ) -> u64 {
        assert!(!std::ptr::eq(self, to), "a block is not copied within its memory");
        let from = self.at(offset, len);
        let to = to.at(to_offset, len);
        // SAFETY: both ranges are in bounds; they are of two mappings, so their addresses do not overlap; the
        // destination of a read is owned by its operation (rule 4).
        unsafe { copy_digesting(seed, from.as_ptr(), to.as_ptr(), len) }
    }

    #[track_caller]
    fn read_digesting(&self, offset: usize, into: &mut [u8], seed: DigestSeed) -> u64 {
        let from = self.at(offset, into.len());
        // SAFETY: both ranges are valid for `into.len()` bytes; `into` is exclusive (as in `Mapping::read`).
        unsafe { copy_digesting(seed, from.as_ptr(), into.as_mut_ptr(), into.len()) }
    }

    #[track_caller]
    fn digest(&self, digest: &mut BlockDigest, offset: usize, len: usize) {
        let at = self.at(offset, len);
        // SAFETY: in bounds and mapped for the call; the caller owns the range by agreement (rule 4), so it is
        // not written meanwhile, and the reference ends with the call (rule 3).
        digest.update(unsafe { std::slice::from_raw_parts(at.as_ptr(), len) });
    }

    #[track_caller]
    fn block_digest(&self, seed: DigestSeed, offset: usize, len: usize) -> u64 {
        let at = self.at(offset, len);
        // SAFETY: as in `Mapping::digest`.
        block_digest(seed, unsafe { std::slice::from_raw_parts(at.as_ptr(), len) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Backing::Foreign(_) = self.backing {
            return;
        }
        // SAFETY: this value owns the mapping (rule 1) and nothing refers to it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of a whole mapping cannot fail");
    }
}

fn system(step: &'static str, label: &str, len: usize, errno: rustix::io::Errno) -> MemoryError {
    MemoryError::System { step, label: label.to_owned(), len, source: errno.into() }
}

/// Host memory that peers on this machine may map read-only; clones share it.
///
/// Units: offsets and lengths in bytes. The memory lives until the last clone is gone, also when a transfer holds
/// one. What was [adopted](HostMemory::adopt) cannot be mapped by peers: the kernel copies it for them. Pages are taken from the system at first touch; [`HostMemory::prefault`] takes them at once.
///
/// Bytes have no lock: two parties that write the same range at once leave a mixture. In Baton a KV block has one
/// writer at any time, which the block pool guarantees.
#[derive(Clone)]
pub struct HostMemory(Arc<Mapping>);

impl HostMemory {
    /// Reserves `len` zeroed bytes; `label` shows in errors and in `/proc/PID/maps`.
    ///
    /// # Errors
    /// When `len` is 0 or the system refuses the memory.
    pub fn allocate(len: usize, label: &str) -> Result<Self, MemoryError> {
        if len == 0 {
            return Err(MemoryError::Empty { label: label.to_owned() });
        }
        let name: String = label.chars().filter(|c| *c != '\0').take(64).collect();
        let file = rustix::fs::memfd_create(
            format!("baton-{name}"),
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )
        .map_err(|errno| system("create", label, len, errno))?;
        rustix::fs::ftruncate(&file, len as u64).map_err(|errno| system("size", label, len, errno))?;
        let memory = Self(Arc::new(Mapping::new(file, len, ProtFlags::READ | ProtFlags::WRITE, label)?));
        if let Some(file) = memory.file() {
            // From here on this mapping is the only one that can ever write the file, whoever gets the descriptor.
            let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
            rustix::fs::fcntl_add_seals(file, seals).map_err(|errno| system("seal", label, len, errno))?;
        }
        Ok(memory)
    }

    /// Takes memory that something else allocated, such as the buffers of an engine, as it is; `label` shows in errors.
    ///
    /// # Errors
    /// When it is empty or not [`Place::Host`].
    pub fn adopt(span: MemorySpan, label: &str) -> Result<Self, MemoryError> {
        let len = span.len;
        if len == 0 {
            return Err(MemoryError::Empty { label: label.to_owned() });
        }
        let base = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(span.address));
        let exists = span.address.checked_add(len).is_some() && isize::try_from(len).is_ok();
        match base {
            Some(base) if span.place == Place::Host && exists => {
                let backing = Backing::Foreign(span);
                Ok(Self(Arc::new(Mapping { base, len, backing, label: label.into() })))
            }
            _ => Err(MemoryError::NotHost { label: label.to_owned(), place: span.place }),
        }
    }

    /// Takes every page from the system now instead of at first touch; adopted memory stays as it is.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn prefault(&self) -> Result<(), MemoryError> {
        if let Backing::Foreign(_) = self.0.backing {
            return Ok(());
        }
        self.0
            .advise(Advice::LinuxPopulateWrite)
            .map_err(|errno| system("take", &self.0.label, self.0.len, errno))
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "memory of no bytes cannot be allocated")]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// What it was allocated for.
    pub fn label(&self) -> &str {
        &self.0.label
    }

    /// Whether `[offset, offset + len)` lies within.
    pub fn fits(&self, offset: usize, len: usize) -> bool {
        self.0.fits(offset, len)
    }

    /// Whether `other` is the same memory.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Copies out.
    ///
    /// # Panics
    /// When the range is not within: callers check what comes from elsewhere with [`HostMemory::fits`].
    #[track_caller]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.0.read(offset, into);
    }

    /// Copies in.
    ///
    /// # Panics
    /// When the range is not within.
    #[track_caller]
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.0.at(offset, from.len());
        // SAFETY: both ranges are valid for `from.len()` bytes, and no reference into a mapping exists that
        // `from` could be (rule 3).
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len()) };
    }

    /// Copies `len` bytes to another memory (or another place of this one).
    ///
    /// # Panics
    /// When a range is not within its memory.
    #[track_caller]
    pub fn copy_to(&self, offset: usize, to: &HostMemory, to_offset: usize, len: usize) {
        self.0.copy_to(offset, &to.0, to_offset, len);
    }

    /// Feeds a range, which nobody may write meanwhile, to a digest.
    ///
    /// # Panics
    /// When the range is not within.
    #[track_caller]
    pub fn digest(&self, digest: &mut BlockDigest, offset: usize, len: usize) {
        self.0.digest(digest, offset, len);
    }

    /// The digest of a whole block, which nobody may write meanwhile.
    #[track_caller]
    pub(crate) fn block_digest(&self, seed: DigestSeed, offset: usize, len: usize) -> u64 {
        self.0.block_digest(seed, offset, len)
    }

    /// Copies a block to another memory; the digest of what was copied, found in the same pass.
    #[track_caller]
    pub(crate) fn copy_to_digesting(
        &self,
        offset: usize,
        (to, to_offset): (&HostMemory, usize),
        len: usize,
        seed: DigestSeed,
    ) -> u64 {
        self.0.copy_to_digesting(offset, (&to.0, to_offset), len, seed)
    }

    /// Copies a block out; the digest of what was copied, found in the same pass.
    #[track_caller]
    pub(crate) fn read_digesting(&self, offset: usize, into: &mut [u8], seed: DigestSeed) -> u64 {
        self.0.read_digesting(offset, into, seed)
    }

    /// The memory as a network library registers it.
    pub fn span(&self) -> MemorySpan {
        if let Backing::Foreign(span) = &self.0.backing {
            return span.clone();
        }
        let owner: Arc<dyn std::any::Any + Send + Sync> = self.0.clone();
        MemorySpan {
            address: self.0.base.as_ptr().addr(),
            len: self.0.len,
            place: Place::Host,
            dmabuf: None,
            owner,
        }
    }

    /// Publishes a control word: all writes before it are visible to who reads the word.
    pub(crate) fn store_word(&self, offset: usize, value: u64) {
        self.0.word(offset).store(value, Ordering::SeqCst);
    }

    /// Reads a control word back.
    pub(crate) fn load_word(&self, offset: usize) -> u64 {
        self.0.word(offset).load(Ordering::SeqCst)
    }

    /// The memory file, for passing to a peer: sealed, so that the peer can only read it. Adopted memory has none.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        match &self.0.backing {
            Backing::File(file) => Some(file.as_fd()),
            Backing::Foreign(_) => None,
        }
    }

    /// Where it is in the address space of this process.
    pub(crate) fn place(&self) -> RemoteRange {
        RemoteRange { address: self.0.base.as_ptr().addr(), len: self.0.len }
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostMemory({:?}, {} bytes)", self.0.label, self.0.len)
    }
}

/// What kind of memory a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// Memory of this process.
    Host,
    /// Memory of an NVIDIA GPU, by the driver's number.
    Cuda(u32),
    /// Memory of an AWS Neuron device, by the driver's number.
    Neuron(u32),
}

impl Place {
    /// For people and capability lists: `host`, `cuda`, `neuron`.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Cuda(_) => "cuda",
            Self::Neuron(_) => "neuron",
        }
    }
}

/// Memory that a network library may register: where it is, and what keeps it there. Clones share it.
#[derive(Clone)]
pub struct MemorySpan {
    address: usize,
    len: usize,
    place: Place,
    /// The memory as a file that drivers of network cards import, and where in it the span begins.
    dmabuf: Option<(Arc<OwnedFd>, u64)>,
    owner: Arc<dyn std::any::Any + Send + Sync>,
}

impl MemorySpan {
    /// Describes foreign memory, which `owner` keeps in place.
    ///
    /// # Safety
    /// `[address, address + len)` is memory of kind `place`, to be read and written, and stays so, until every clone of
    /// `owner` is gone; no Rust reference to any of it exists while a transfer, or who holds it as [`HostMemory`], may
    /// write it.
    pub unsafe fn new(
        address: usize,
        len: usize,
        place: Place,
        dmabuf: Option<(OwnedFd, u64)>,
        owner: Arc<dyn std::any::Any + Send + Sync>,
    ) -> Self {
        let dmabuf = dmabuf.map(|(file, offset)| (Arc::new(file), offset));
        Self { address, len, place, dmabuf, owner }
    }

    /// Where it begins, in the address space of its kind.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "no registration is empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// What kind of memory it is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The memory as a dma-buf, and the offset of the span in it.
    pub fn dmabuf(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.dmabuf.as_ref().map(|(file, offset)| (file.as_fd(), *offset))
    }

    /// The same memory behind one more owner: however often the result is cloned, the memory's own owner is held once.
    pub(crate) fn lent(&self) -> Self {
        Self { owner: Arc::new(Lent(Arc::clone(&self.owner))), ..self.clone() }
    }

    /// A part of it.
    ///
    /// # Panics
    /// When the range is not within, or empty: callers check what comes from elsewhere.
    #[track_caller]
    pub(crate) fn part(&self, offset: usize, len: usize) -> Self {
        let within = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(within && len > 0, "bytes {offset}+{len} are outside {self:?}");
        let dmabuf = self.dmabuf.as_ref().map(|(file, at)| (Arc::clone(file), at + offset as u64));
        Self { address: self.address + offset, len, dmabuf, ..self.clone() }
    }

    /// Of a lent span: whether nobody but those it was lent to holds the memory any more.
    pub(crate) fn is_orphan(&self) -> bool {
        self.owner.downcast_ref::<Lent>().is_some_and(|Lent(owner)| Arc::strong_count(owner) == 1)
    }

    /// The host memory this is a span of, lent or not, and where in it the span begins.
    #[cfg(test)]
    pub(crate) fn host(&self) -> Option<(HostMemory, usize)> {
        let owner = self.owner.downcast_ref::<Lent>().map_or(&self.owner, |Lent(owner)| owner);
        let mapping = Arc::clone(owner).downcast::<Mapping>().ok()?;
        let offset = self.address - mapping.base.as_ptr().addr();
        Some((HostMemory(mapping), offset))
    }

    /// Whether `other` is the same memory, lent or not.
    pub fn is_same(&self, other: &Self) -> bool {
        let owner = |span: &Self| {
            Arc::clone(span.owner.downcast_ref::<Lent>().map_or(&span.owner, |Lent(owner)| owner))
        };
        (self.address, self.len, self.place) == (other.address, other.len, other.place)
            && Arc::ptr_eq(&owner(self), &owner(other))
    }
}

/// The owner of memory that was lent.
struct Lent(Arc<dyn std::any::Any + Send + Sync>);

impl fmt::Debug for MemorySpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemorySpan({:?}, {} bytes)", self.place, self.len)
    }
}

/// A peer's [`HostMemory`], mapped read-only.
#[derive(Clone)]
pub(crate) struct PeerMemory(Arc<Mapping>);

impl PeerMemory {
    /// Maps what a peer passed, once it is certain that the peer cannot shrink it under us (SIGBUS).
    pub(crate) fn map(file: OwnedFd, len: usize, label: &str) -> Result<Self, MemoryError> {
        let unsealed = || MemoryError::Unsealed { label: label.to_owned(), len };
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| unsealed())?;
        let size = rustix::fs::fstat(&file).map_err(|errno| system("stat", label, len, errno))?.st_size;
        if len == 0
            || !seals.contains(SealFlags::SHRINK)
            || usize::try_from(size).is_ok_and(|size| size < len)
        {
            return Err(unsealed());
        }
        Mapping::new(file, len, ProtFlags::READ, label).map(|mapping| Self(Arc::new(mapping)))
    }

    pub(crate) fn fits(&self, offset: usize, len: usize) -> bool {
        self.0.fits(offset, len)
    }

    /// Copies out.
    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) {
        self.0.read(offset, into);
    }

    /// Copies to own memory.
    pub(crate) fn copy_to(&self, offset: usize, to: &HostMemory, to_offset: usize, len: usize) {
        self.0.copy_to(offset, &to.0, to_offset, len);
    }

    /// Copies a block to own memory; the digest of what was copied, found in the same pass.
    pub(crate) fn copy_to_digesting(
        &self,
        offset: usize,
        to: &HostMemory,
        to_offset: usize,
        len: usize,
        seed: DigestSeed,
    ) -> u64 {
        self.0.copy_to_digesting(offset, (&to.0, to_offset), len, seed)
    }

    /// Copies a block out; the digest of what was copied, found in the same pass.
    pub(crate) fn read_digesting(&self, offset: usize, into: &mut [u8], seed: DigestSeed) -> u64 {
        self.0.read_digesting(offset, into, seed)
    }

    /// Reads a control word; what was read before the call is not mixed with what comes after it.
    pub(crate) fn load_word(&self, offset: usize) -> u64 {
        // Orders the copies before this load: a word unchanged after a copy vouches for the copy.
        fence(Ordering::Acquire);
        // Relaxed plus a fence, because only relaxed loads are specified for read-only pages.
        let value = self.0.word(offset).load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        value
    }
}

/// A range of some [`HostMemory`].
#[derive(Clone, Copy)]
pub(crate) struct Span<'a> {
    pub(crate) memory: &'a HostMemory,
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

/// Writes `head` and then `spans` to a socket with one system call; may write less than all.
pub(crate) fn write_gathered<'a>(
    socket: BorrowedFd<'_>,
    head: &[u8],
    spans: impl Iterator<Item = Span<'a>>,
) -> io::Result<usize> {
    let mut slices = Vec::with_capacity(spans.size_hint().1.unwrap_or(0) + 1);
    if !head.is_empty() {
        slices.push(IoSlice::new(head));
    }
    for span in spans {
        let at = span.memory.0.at(span.offset, span.len);
        // SAFETY: in bounds, and mapped while `span.memory` is borrowed; the slice is only handed to the kernel,
        // which copies bytes that may change meanwhile (rule 4), and is gone when this function returns.
        slices.push(IoSlice::new(unsafe { std::slice::from_raw_parts(at.as_ptr(), span.len) }));
    }
    rustix::io::writev(socket, &slices).map_err(Into::into)
}

/// Reads `head` and then `spans` from a socket with one system call; may read less than all, 0 is the end.
pub(crate) fn read_scattered<'a>(
    socket: BorrowedFd<'_>,
    head: &'a mut [u8],
    spans: impl Iterator<Item = Span<'a>>,
) -> io::Result<usize> {
    let mut slices = Vec::with_capacity(spans.size_hint().1.unwrap_or(0) + 1);
    if !head.is_empty() {
        slices.push(IoSliceMut::new(head));
    }
    for span in spans {
        let at = span.memory.0.at(span.offset, span.len);
        // SAFETY: in bounds, and mapped while `span.memory` is borrowed; the destination of a read is owned by
        // its operation (rule 4), only the kernel writes through the slice, and it is gone when this returns.
        slices.push(IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), span.len) }));
    }
    rustix::io::readv(socket, &mut slices).map_err(Into::into)
}

#[cfg(test)]
mod tests;
