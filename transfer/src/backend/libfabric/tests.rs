//! Against the installed library, over every provider of it that works on loopback.

mod one_process;
mod two_processes;

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use super::blob::Key;
use super::work::LibfabricDriver;
use super::{LibfabricOptions, Tuning, open_with};
use crate::backend::fabric::driver::{
    Access, Done, Driver, LocalId, LocalRange, PeerId, PostError, REQUEST_MAX_BYTES, RemoteId,
};
use crate::memory::HostMemory;

/// Software providers that libraries with one bring along.
const PROVIDERS: [&str; 4] = ["tcp;ofi_rxm", "tcp", "net", "sockets"];
/// Longest that anything here may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn options(provider: &str) -> LibfabricOptions {
    LibfabricOptions { provider: Some(provider.to_owned()), rails: 16, bind: IpAddr::V4(Ipv4Addr::LOCALHOST) }
}

/// The providers that work here; says which do not, and why.
fn providers() -> Vec<&'static str> {
    let works = |provider: &&'static str| match open_with(&options(provider), Tuning::USUAL) {
        Ok(_) => true,
        Err(error) => {
            println!("skipped {provider}: {error} ({})", error.remedy);
            false
        }
    };
    PROVIDERS.into_iter().filter(works).collect()
}

/// The same and `shm`, where keys guard nothing: processes that use it can read each other's memory anyway.
fn providers_and_shm() -> Vec<&'static str> {
    let shm = open_with(&options("shm"), Tuning::USUAL).is_ok().then_some("shm");
    providers().into_iter().chain(shm).collect()
}

/// A driver with some registered memory.
struct End {
    driver: LibfabricDriver,
    memory: HostMemory,
    id: LocalId,
    key: Vec<u8>,
    done: Vec<Done>,
}

impl End {
    fn new(options: &LibfabricOptions, len: usize, access: Access, tuning: Tuning) -> Self {
        let mut driver = open_with(options, tuning).unwrap();
        let memory = HostMemory::allocate(len, "test").unwrap();
        let (id, key) = driver.register(&memory.span(), access).unwrap();
        Self { driver, memory, id, key, done: Vec::new() }
    }

    fn range(&self, offset: usize, len: usize) -> LocalRange {
        LocalRange { id: self.id, offset, len }
    }

    fn poll(&mut self) {
        self.driver.poll(&mut self.done);
    }

    fn fill(&self, seed: u64) {
        self.memory.write(0, &pattern(seed, self.memory.len()));
    }

    fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(offset, &mut bytes);
        bytes
    }
}

/// Bytes that differ at every offset and for every seed.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len.div_ceil(8)).flat_map(|_| next()).take(len).collect()
}

/// Polls both ends until the condition holds, or panics.
fn until(ends: &mut [&mut End], what: &str, mut holds: impl FnMut(&mut [&mut End]) -> bool) {
    let begun = Instant::now();
    while !holds(ends) {
        ends.iter_mut().for_each(|end| end.poll());
        assert!(begun.elapsed() < PATIENCE, "no end: {what}");
    }
}

/// Posts, and polls both ends while the queues are full.
fn post(
    ends: (&mut End, &mut End),
    mut attempt: impl FnMut(&mut End) -> Result<(), PostError>,
) -> Result<(), PostError> {
    let begun = Instant::now();
    loop {
        match attempt(ends.0) {
            Err(PostError::Again) => {
                ends.0.poll();
                ends.1.poll();
                assert!(begun.elapsed() < PATIENCE, "the queues stay full");
            }
            other => return other,
        }
    }
}

#[test]
fn an_address_of_another_host_is_named() {
    let Ok(_) = super::library() else { return println!("skipped: no libfabric") };
    let bind = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 77));
    for provider in ["net", "sockets"] {
        let error = open_with(&LibfabricOptions { bind, ..options(provider) }, Tuning::USUAL).err().unwrap();
        assert!(error.what.ends_with("no network interface has the address 192.0.2.77"), "{error:?}");
        assert_eq!(error.remedy, "bind the worker to an address of this host");
    }
    let error = open_with(&LibfabricOptions { provider: None, ..options("") }, Tuning::USUAL);
    assert!(error.is_ok_and(|driver| driver.info().same_host), "some provider works on loopback");
}

#[test]
fn what_is_there_is_probed() {
    let probes = super::probe(&LibfabricOptions::default());
    let libfabric = probes.first().unwrap();
    if !libfabric.works {
        println!("skipped: {} ({:?})", libfabric.detail, libfabric.remedy);
        assert!(libfabric.detail.contains("libfabric.so.1"));
        return;
    }
    for probe in &probes {
        println!("{probe:?}");
        let helps = probe.remedy.as_deref().is_some_and(|remedy| !remedy.is_empty());
        assert!(probe.works || helps, "{probe:?}");
        assert!(!probe.detail.is_empty());
    }
    let names: Vec<_> = probes.iter().map(|probe| probe.name.as_str()).collect();
    assert!(names.contains(&"libfabric efa") && names.contains(&"libfabric tcp"), "{names:?}");
    let opened = super::open(&LibfabricOptions::default());
    assert!(opened.is_ok_and(|driver| driver.info().same_host && driver.info().message_max > 65536));
}
