//! Builds plugins from C, and drives a pair of drivers.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::backend::fabric::driver::{Access, Done, Driver, LocalId, LocalRange, PeerId, RemoteId};
use crate::backend::plugin::{PluginOptions, open};
use crate::memory::HostMemory;

/// A shared object, and the directory it goes away with.
pub(super) struct Built {
    pub(super) path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Built {
    pub(super) fn options(&self) -> PluginOptions {
        PluginOptions { path: self.path.clone(), bind: None }
    }
}

pub(super) fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("plugin").join(name)
}

/// Builds a shared object from one of the sources in `transfer/plugin`, as its users would.
pub(super) fn build(name: &str, defines: &[&str]) -> Built {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("libplugin.so");
    let mut cc = Command::new("cc");
    cc.args(["-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-o"]).arg(&path).arg(source(name));
    cc.args(defines.iter().map(|define| format!("-D{define}")));
    let output = cc.output().expect("a C compiler, which linking Rust needs, too");
    assert!(output.status.success(), "{cc:?}: {}", String::from_utf8_lossy(&output.stderr));
    Built { path, _directory: directory }
}

pub(super) fn example() -> Built {
    build("example/baton_cma.c", &[])
}

/// What has not happened by then will not.
pub(super) fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A driver with one registered memory.
pub(super) struct Node {
    pub(super) driver: Box<dyn Driver>,
    pub(super) memory: HostMemory,
    pub(super) local: LocalId,
    pub(super) key: Vec<u8>,
    pub(super) done: Vec<Done>,
    next_op: u64,
}

impl Node {
    pub(super) fn open(plugin: &Built, len: usize, access: Access) -> Self {
        let mut driver = open(&plugin.options()).unwrap();
        let memory = HostMemory::allocate(len, "node").unwrap();
        let (local, key) = driver.register(&memory.span(), access).unwrap();
        Self { driver, memory, local, key, done: Vec::new(), next_op: 1000 }
    }

    pub(super) fn range(&self, offset: usize, len: usize) -> LocalRange {
        LocalRange { id: self.local, offset, len }
    }

    /// Connects to another node and imports its key.
    pub(super) fn meet(&mut self, address: &[u8], key: &[u8]) -> (PeerId, RemoteId) {
        let peer = self.driver.connect(address).unwrap();
        (peer, self.driver.import(peer, key).unwrap())
    }

    pub(super) fn op(&mut self) -> u64 {
        self.next_op += 1;
        self.next_op
    }

    pub(super) fn poll(&mut self) -> bool {
        self.driver.poll(&mut self.done)
    }

    /// Takes the end of `op`, where it is there.
    pub(super) fn take(&mut self, op: u64) -> Option<Result<usize, String>> {
        let at = self.done.iter().position(|done| done.op == op)?;
        Some(self.done.swap_remove(at).result)
    }

    /// Polls alone until `op` ends.
    pub(super) fn finish(&mut self, op: u64) -> Result<usize, String> {
        let deadline = deadline();
        loop {
            self.poll();
            if let Some(result) = self.take(op) {
                return result;
            }
            assert!(Instant::now() < deadline, "operation {op} has not ended");
            std::thread::yield_now();
        }
    }

    /// Polls, and `other` beside it, until `op` ends.
    pub(super) fn finish_beside(&mut self, other: &mut Node, op: u64) -> Result<usize, String> {
        let deadline = deadline();
        loop {
            other.poll();
            self.poll();
            if let Some(result) = self.take(op) {
                return result;
            }
            assert!(Instant::now() < deadline, "operation {op} has not ended");
            std::thread::yield_now();
        }
    }

    pub(super) fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(offset, &mut bytes);
        bytes
    }
}

/// Bytes that differ with their position and with `seed`.
pub(super) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(next).collect()
}
