//! Two drivers in one process, and one in a process of its own. Debian's libucx0 is all they need.

use std::time::{Duration, Instant};

use super::*;
use crate::memory::HostMemory;

/// A driver and the ends of its operations.
struct End {
    driver: UcxDriver,
    done: Vec<Done>,
}

impl End {
    /// None, and a word about it, where UCX is not installed.
    fn open(one_sided: bool) -> Option<Self> {
        Self::with(&UcxOptions::default(), one_sided)
    }

    fn with(options: &UcxOptions, one_sided: bool) -> Option<Self> {
        match library::get() {
            Ok(api) => {
                let driver = UcxDriver::open(api, options, Some(one_sided)).unwrap();
                Some(Self { driver, done: Vec::new() })
            }
            Err(error) => {
                println!("skipped: {error}; {}", error.remedy);
                None
            }
        }
    }

    fn poll(&mut self) -> bool {
        let before = self.done.len();
        self.driver.poll(&mut self.done);
        self.done.len() > before
    }

    fn range(&self, id: LocalId, offset: usize, len: usize) -> LocalRange {
        LocalRange { id, offset, len }
    }

    fn result(&mut self, op: u64) -> Option<Result<usize, String>> {
        let at = self.done.iter().position(|done| done.op == op)?;
        Some(self.done.swap_remove(at).result)
    }
}

fn memory(len: usize, seed: u8) -> HostMemory {
    let memory = HostMemory::allocate(len, "ucx-test").unwrap();
    memory.write(0, &pattern(len, seed));
    memory
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ (at >> 16) as u8 ^ seed).collect()
}

fn bytes(memory: &HostMemory) -> Vec<u8> {
    let mut bytes = vec![0; memory.len()];
    memory.read(0, &mut bytes);
    bytes
}

/// Polls both until `over`, or fails.
fn until(ends: &mut [&mut End], mut over: impl FnMut(&mut [&mut End]) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !over(ends) {
        assert!(Instant::now() < deadline, "not done in time");
        for end in &mut *ends {
            end.poll();
        }
    }
}

/// The end of operation `op` of the first.
fn wait(ends: &mut [&mut End], op: u64) -> Result<usize, String> {
    let mut result = None;
    until(ends, |ends| {
        result = ends[0].result(op);
        result.is_some()
    });
    result.unwrap()
}

/// Both ways of moving bytes.
fn both_ways(test: impl Fn(End, End)) {
    for one_sided in [false, true] {
        let (Some(a), Some(b)) = (End::open(one_sided), End::open(one_sided)) else { return };
        println!("{}", a.driver.info.detail);
        test(a, b);
    }
}

#[test]
fn reads_bring_the_bytes_of_the_peer() {
    both_ways(|mut reader, mut owner| {
        for len in [1, 4096, 65_536, 1 << 20] {
            let (from, to) = (memory(len, 7), memory(len, 0));
            let (_, key) = owner.driver.register(&from.span(), Access::RemoteRead).unwrap();
            let (local, none) = reader.driver.register(&to.span(), Access::Local).unwrap();
            assert!(none.is_empty());
            let peer = reader.driver.connect(&owner.driver.address()).unwrap();
            let remote = reader.driver.import(peer, &key).unwrap();
            let range = reader.range(local, 0, len);
            reader.driver.read(peer, remote, 0, range, 9).unwrap();
            assert_eq!(wait(&mut [&mut reader, &mut owner], 9), Ok(len));
            assert_eq!(bytes(&to), bytes(&from));
            reader.driver.disconnect(peer);
        }
    });
}
