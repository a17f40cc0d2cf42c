use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use baton_config::{Epoch, HandoffId};

use super::*;
use crate::digest::{DigestSeed, block_digest};

#[test]
fn bytes_written_are_read_by_every_clone_and_every_mapping() {
    let memory = HostMemory::allocate(8192, "test").unwrap();
    let peer = PeerMemory::map(memory.file().unwrap().try_clone_to_owned().unwrap(), 8192, "peer").unwrap();
    memory.clone().write(4090, b"across a page");
    let (mut own, mut theirs) = ([0; 13], [0; 13]);
    memory.read(4090, &mut own);
    peer.read(4090, &mut theirs);
    assert_eq!((&own, &theirs), (b"across a page", b"across a page"));
    memory.copy_to(4090, &memory, 4095, 13);
    memory.read(4095, &mut own);
    assert_eq!(&own, b"across a page", "overlapping copies keep the bytes");
}

#[test]
fn a_mapping_outlives_the_handle_it_came_from() {
    let memory = HostMemory::allocate(4096, "short-lived").unwrap();
    memory.write(0, b"still here");
    let peer = PeerMemory::map(memory.file().unwrap().try_clone_to_owned().unwrap(), 4096, "peer").unwrap();
    drop(memory);
    let mut bytes = [0; 10];
    peer.read(0, &mut bytes);
    assert_eq!(&bytes, b"still here");
}

#[test]
fn a_peer_cannot_write_or_shrink_the_memory_it_was_passed() {
    let memory = HostMemory::allocate(4096, "sealed").unwrap();
    let file = memory.file().unwrap().try_clone_to_owned().unwrap();
    assert!(rustix::fs::ftruncate(&file, 0).is_err());
    assert!(rustix::io::pwrite(&file, b"x", 0).is_err());
    // SAFETY: the mapping is expected to be refused; nothing is accessed.
    let mapped = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            4096,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &file,
            0,
        )
    };
    assert!(mapped.is_err(), "a writable mapping of a peer's memory must be impossible");
}

#[test]
fn unsealed_or_short_files_of_a_peer_are_refused() {
    let file = rustix::fs::memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    assert!(matches!(PeerMemory::map(file, 4096, "x"), Err(MemoryError::Unsealed { .. })));
    let memory = HostMemory::allocate(4096, "short").unwrap();
    let file = memory.file().unwrap().try_clone_to_owned().unwrap();
    assert!(matches!(PeerMemory::map(file, 8192, "x"), Err(MemoryError::Unsealed { .. })));
    assert!(matches!(HostMemory::allocate(0, "none"), Err(MemoryError::Empty { .. })));
}

#[test]
#[should_panic(expected = "outside memory")]
fn reading_past_the_end_panics() {
    HostMemory::allocate(4096, "bounds").unwrap().read(4090, &mut [0; 7]);
}

#[test]
#[should_panic(expected = "outside memory")]
fn offsets_that_wrap_around_panic() {
    HostMemory::allocate(4096, "bounds").unwrap().write(usize::MAX, b"ab");
}

#[test]
fn sockets_gather_and_scatter_straight_from_memory() {
    let memory = HostMemory::allocate(4096, "gather").unwrap();
    memory.write(100, b"world");
    memory.write(0, b"hello ");
    let (mut near, far) = UnixStream::pair().unwrap();
    let spans = [Span { memory: &memory, offset: 0, len: 6 }, Span { memory: &memory, offset: 100, len: 5 }];
    assert_eq!(write_gathered(far.as_fd(), b"> ", spans.into_iter()).unwrap(), 13);
    let mut bytes = [0; 13];
    near.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"> hello world");

    near.write_all(b"# abcdef").unwrap();
    let into =
        [Span { memory: &memory, offset: 2000, len: 3 }, Span { memory: &memory, offset: 1000, len: 9 }];
    let mut head = [0; 2];
    assert_eq!(read_scattered(far.as_fd(), &mut head, into.into_iter()).unwrap(), 8);
    let (mut first, mut second) = ([0; 3], [0; 3]);
    memory.read(2000, &mut first);
    memory.read(1000, &mut second);
    assert_eq!((&head, &first, &second), (b"# ", b"abc", b"def"));
}

#[test]
fn a_digesting_copy_digests_exactly_what_it_copied() {
    let seed = DigestSeed { handoff: HandoffId(1), epoch: Epoch(1), index: 0 };
    let bytes: Vec<u8> = (0..50_077).map(|i| (i % 251) as u8).collect();
    let source = HostMemory::allocate(bytes.len() + 5, "source").unwrap();
    source.write(5, &bytes);
    let peer =
        PeerMemory::map(source.file().unwrap().try_clone_to_owned().unwrap(), source.len(), "peer").unwrap();
    let dest = HostMemory::allocate(bytes.len() + 9, "dest").unwrap();
    let digest = peer.copy_to_digesting(5, &dest, 9, bytes.len(), seed);
    assert_eq!(digest, block_digest(seed, &bytes));
    let mut copied = vec![0; bytes.len()];
    dest.read(9, &mut copied);
    assert_eq!(copied, bytes);
    copied.fill(0);
    let digest = peer.read_digesting(5, &mut copied, seed);
    assert_eq!((digest, copied), (block_digest(seed, &bytes), bytes));
}

#[test]
fn control_words_travel_between_mappings() {
    let memory = HostMemory::allocate(4096, "control").unwrap();
    let peer = PeerMemory::map(memory.file().unwrap().try_clone_to_owned().unwrap(), 4096, "peer").unwrap();
    memory.store_word(64, 42);
    assert_eq!((peer.load_word(64), memory.load_word(64)), (42, 42));
}

fn copied(process: &Process, address: usize, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    copy_from_process(process, &mut vec![RemoteRange { address, len }], &mut bytes, std::iter::empty())?;
    Ok(bytes)
}

#[test]
fn a_process_is_read_by_address_and_what_is_not_there_is_an_error() {
    let own = Process::of(rustix::process::getpid());
    let memory = HostMemory::allocate(2 << 12, "test").unwrap();
    memory.write(4000, b"across a page, by address");
    let place = memory.place();
    assert_eq!(copied(&own, place.address + 4000, 25).unwrap(), b"across a page, by address");
    let into = HostMemory::allocate(4096, "test").unwrap();
    let ranges = [(4007, 1), (4000, 6)];
    let mut from = ranges.map(|(at, len)| RemoteRange { address: place.address + at, len }).to_vec();
    let spans = [(100, 3), (200, 4)].map(|(offset, len)| Span { memory: &into, offset, len });
    copy_from_process(&own, &mut from, &mut [], spans.into_iter()).unwrap();
    let mut bytes = [0; 4];
    into.read(200, &mut bytes);
    assert_eq!(&bytes, b"ross", "ranges of one side need not match those of the other");
    assert_eq!(copied(&own, 8, 16).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    let mut from = [(place.address, 8), (8, 8)].map(|(address, len)| RemoteRange { address, len }).to_vec();
    let half = copy_from_process(&own, &mut from, &mut [0; 16], std::iter::empty());
    assert_eq!(half.unwrap_err().raw_os_error(), Some(libc::EFAULT), "a part is not taken for the whole");
}

/// A number that belongs to another process by now, as this one's does for a process that never was.
#[test]
fn a_process_without_the_witness_is_not_taken_for_the_one_meant() {
    let memory = HostMemory::allocate(4096, "test").unwrap();
    memory.write(64, &[7; 16]);
    let place = memory.place();
    let meant = |value| Process::with_witness(rustix::process::getpid(), place.address + 64, value);
    assert_eq!(copied(&meant([7; 16]), place.address + 64, 4).unwrap(), [7; 4]);
    let other = copied(&meant([8; 16]), place.address + 64, 4);
    assert_eq!(other.unwrap_err().raw_os_error(), Some(libc::ESRCH));
}
