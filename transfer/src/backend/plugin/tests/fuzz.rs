//! A plugin that answers at random, and a host that must neither believe nor break a promise.
//!
//! The hostile half is made of Rust functions with the C calling convention. It lies in everything it says, and checks
//! what the header promises it: handles that are its own and live, ranges within registrations, numbers never used twice.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::Path;

use crate::backend::fabric::driver::{
    Access, Done, Driver, LocalId, LocalRange, PeerId, PostError, RemoteId,
};
use crate::backend::plugin::abi::*;
use crate::backend::plugin::calls::Calls;
use crate::backend::plugin::driver::PluginDriver;
use crate::backend::plugin::load;
use crate::memory::HostMemory;

const SEQUENCES: u64 = 4000;
const STEPS: u32 = 150;
const MEMORY_BYTES: usize = 64 << 10;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }

    /// A number as attackers like them.
    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => u64::MAX - self.below(3),
            2 => 1 << self.below(64),
            3 => (1 << self.below(64)) - 1,
            4 => self.below(5000),
            _ => self.next(),
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = self.next() as u8;
        }
    }
}

/// Number, registration, peer and key, length.
type Posted = (u64, u64, Option<(u64, Option<u64>)>, u64);

/// What the hostile half knows; one per thread, as drivers are.
struct Hostile {
    random: Random,
    /// One lie in so many answers.
    lies: u64,
    open: bool,
    locals: HashMap<u64, (u64, u32)>,
    peers: Vec<u64>,
    remotes: Vec<(u64, u64)>,
    posted: Vec<Posted>,
    /// Numbers of what is over, and to be reported nevertheless.
    ghosts: Vec<u64>,
    last_number: u64,
    last_handle: u64,
    /// Promises of the header that the host broke.
    broken: Vec<String>,
}

thread_local! {
    static HOSTILE: RefCell<Option<Hostile>> = const { RefCell::new(None) };
}

fn hostile<T>(act: impl FnOnce(&mut Hostile) -> T) -> T {
    HOSTILE.with_borrow_mut(|hostile| act(hostile.as_mut().expect("set up")))
}

impl Hostile {
    fn expect(&mut self, holds: bool, what: &str) {
        if !holds {
            self.broken.push(what.to_owned());
        }
    }

    fn lie(&mut self) -> bool {
        self.lies > 0 && self.random.one_in(self.lies)
    }

    /// Mostly success; with a lie, any status.
    fn status(&mut self, error: *mut RawError) -> i32 {
        self.expect(self.open, "a call of a driver that is not open");
        self.expect(!error.is_null(), "no place for an error");
        if self.lie() {
            // SAFETY: the host gives a valid error (checked above).
            let error = unsafe { &mut *error };
            self.random.fill(&mut error.what);
            self.random.fill(&mut error.remedy);
            return if self.lie() { self.random.next() as i32 } else { self.random.below(4) as i32 };
        }
        OK
    }

    fn handle(&mut self) -> u64 {
        self.last_handle += 1;
        self.last_handle
    }

    fn blob(&mut self, blob: *mut RawBlob) {
        // SAFETY: the host gives a valid blob.
        let blob = unsafe { &mut *blob };
        // SAFETY: it points to `room` bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(blob.bytes, blob.room as usize) };
        blob.len = 1 + self.random.below(blob.room);
        self.random.fill(&mut bytes[..blob.len.min(16) as usize]);
        if self.lie() {
            blob.len = self.random.number();
        }
    }

    fn post(&mut self, number: u64, local: *const RawLocal, to: Option<(u64, Option<u64>)>, status: i32) {
        // SAFETY: the host gives a valid range.
        let local = unsafe { *local };
        let len = self.locals.get(&local.registration).map(|(len, _)| *len);
        let within = len.is_some_and(|len| local.offset.checked_add(local.len).is_some_and(|end| end <= len));
        self.expect(within && local.len > 0, "a range outside its registration");
        self.expect(number > self.last_number, "a number used twice");
        if let Some((peer, key)) = to {
            self.expect(self.peers.contains(&peer), "a peer that is not connected");
            let known = key.is_none_or(|key| self.remotes.contains(&(peer, key)));
            self.expect(known, "a key that was not imported");
        }
        if status == OK {
            self.last_number = number;
            self.posted.push((number, local.registration, to, local.len));
        }
    }
}

unsafe extern "C" fn open(
    options: *const RawOpenOptions,
    driver: *mut *mut RawDriver,
    error: *mut RawError,
) -> i32 {
    hostile(|h| {
        // SAFETY: the host gives valid options.
        let size = unsafe { (*options).size };
        h.expect(size as usize == size_of::<RawOpenOptions>(), "options of another size");
        h.open = true;
        let status = h.status(error);
        h.open = status == OK && !h.lie();
        let at: *mut c_void =
            if h.open { std::ptr::dangling_mut::<u64>().cast() } else { std::ptr::null_mut() };
        // SAFETY: the host gives a place for the driver.
        unsafe { *driver = at.cast() };
        status
    })
}

unsafe extern "C" fn close(_: *mut RawDriver) {
    hostile(|h| {
        h.expect(h.open, "closed twice");
        h.open = false;
    });
}

unsafe extern "C" fn info(_: *mut RawDriver, info: *mut RawInfo, error: *mut RawError) -> i32 {
    hostile(|h| {
        // SAFETY: the host gives a valid place.
        let info = unsafe { &mut *info };
        (info.flags, info.rails, info.message_max, info.op_max) = (CAN_READ | CAN_WRITE, 1, 4096, 8192);
        info.wire[..4].copy_from_slice(b"fuzz");
        if h.lie() {
            info.flags = h.random.number() as u32;
            info.rails = h.random.below(70) as u32;
            info.message_max = h.random.number();
            info.op_max = h.random.number();
            info.nap_us = h.random.number() as u32;
            h.random.fill(&mut info.detail);
        }
        if h.lie() {
            h.random.fill(&mut info.wire);
        }
        h.status(error)
    })
}

unsafe extern "C" fn address(_: *mut RawDriver, blob: *mut RawBlob, error: *mut RawError) -> i32 {
    hostile(|h| {
        h.blob(blob);
        h.status(error)
    })
}

unsafe extern "C" fn register_memory(
    _: *mut RawDriver,
    memory: *const RawMemory,
    access: u32,
    handle: *mut u64,
    key: *mut RawBlob,
    error: *mut RawError,
) -> i32 {
    hostile(|h| {
        h.blob(key);
        let status = h.status(error);
        let new = h.handle();
        if status == OK {
            // SAFETY: the host gives valid memory.
            h.locals.insert(new, (unsafe { (*memory).len }, access));
        }
        // SAFETY: the host gives a place for the handle.
        unsafe { *handle = new };
        status
    })
}

unsafe extern "C" fn deregister(_: *mut RawDriver, handle: u64) {
    hostile(|h| {
        let known = h.locals.remove(&handle).is_some();
        h.expect(h.open && known, "deregistered what is not registered");
        let idle = h.posted.iter().all(|(_, local, ..)| *local != handle);
        h.expect(idle, "deregistered while an operation is posted");
    });
}

unsafe extern "C" fn connect(
    _: *mut RawDriver,
    bytes: *const u8,
    len: u64,
    peer: *mut u64,
    error: *mut RawError,
) -> i32 {
    hostile(|h| {
        h.expect(!bytes.is_null() && (1..=4096).contains(&len), "an address out of bounds");
        let status = h.status(error);
        let new = h.handle();
        if status == OK {
            h.peers.push(new);
        }
        // SAFETY: the host gives a place for the handle.
        unsafe { *peer = new };
        status
    })
}

unsafe extern "C" fn disconnect(_: *mut RawDriver, peer: u64) {
    hostile(|h| {
        h.expect(h.open && h.peers.contains(&peer), "disconnected who is not connected");
        h.peers.retain(|known| *known != peer);
        h.remotes.retain(|(of, _)| *of != peer);
        let over = |posted: &Posted| posted.2.is_some_and(|(of, _)| of == peer);
        if h.lie() {
            // Reported later, against rule 11.
            h.ghosts.extend(h.posted.iter().filter(|posted| over(posted)).map(|posted| posted.0));
        }
        h.posted.retain(|posted| !over(posted));
    });
}

unsafe extern "C" fn import_key(
    _: *mut RawDriver,
    peer: u64,
    bytes: *const u8,
    len: u64,
    imported: *mut u64,
    error: *mut RawError,
) -> i32 {
    hostile(|h| {
        h.expect(!bytes.is_null() && (1..=2048).contains(&len), "a key out of bounds");
        h.expect(h.peers.contains(&peer), "a key of a peer that is not connected");
        let status = h.status(error);
        let new = h.handle();
        if status == OK {
            h.remotes.push((peer, new));
        }
        // SAFETY: the host gives a place for the handle.
        unsafe { *imported = new };
        status
    })
}

unsafe extern "C" fn forget(_: *mut RawDriver, peer: u64, imported: u64) {
    hostile(|h| {
        h.expect(h.open && h.remotes.contains(&(peer, imported)), "forgot what was not imported");
        h.remotes.retain(|known| *known != (peer, imported));
        let idle = h.posted.iter().all(|(_, _, to, _)| *to != Some((peer, Some(imported))));
        h.expect(idle, "forgot a key while an operation is posted");
    });
}

unsafe extern "C" fn one_sided(
    _: *mut RawDriver,
    remote: *const RawRemote,
    local: *const RawLocal,
    number: u64,
    error: *mut RawError,
) -> i32 {
    hostile(|h| {
        // SAFETY: the host gives a valid remote end.
        let remote = unsafe { *remote };
        let status = h.status(error);
        h.post(number, local, Some((remote.peer, Some(remote.key))), status);
        status
    })
}

unsafe extern "C" fn send(
    _: *mut RawDriver,
    peer: u64,
    _tag: u64,
    local: *const RawLocal,
    number: u64,
    error: *mut RawError,
) -> i32 {
    hostile(|h| {
        let status = h.status(error);
        h.post(number, local, Some((peer, None)), status);
        status
    })
}

unsafe extern "C" fn receive(
    _: *mut RawDriver,
    _tag: u64,
    local: *const RawLocal,
    number: u64,
    error: *mut RawError,
) -> i32 {
    hostile(|h| {
        let status = h.status(error);
        h.post(number, local, None, status);
        status
    })
}

unsafe extern "C" fn cancel_receive(_: *mut RawDriver, number: u64) {
    hostile(|h| {
        let known = h.posted.iter().any(|(posted, _, to, _)| *posted == number && to.is_none());
        h.expect(known, "cancelled what is not awaited");
    });
}

unsafe extern "C" fn poll(_: *mut RawDriver, done: *mut RawDone, room: u32, count: *mut u32) -> i32 {
    hostile(|h| {
        h.expect(h.open, "polled a driver that is not open");
        // SAFETY: the host gives `room` initialised entries.
        let done = unsafe { std::slice::from_raw_parts_mut(done, room as usize) };
        let wanted = h.random.below(4);
        let mut ends = 0;
        for _ in 0..wanted {
            if h.posted.is_empty() {
                break;
            }
            let at = h.random.below(h.posted.len() as u64) as usize;
            let (number, _, _, len) = h.posted[at];
            done[ends] = RawDone { op: number, bytes: len, ..RawDone::ZEROED };
            if h.random.one_in(4) {
                done[ends].status = 1 + h.random.next() as i32 % 3;
                h.random.fill(&mut done[ends].why);
            }
            if h.lie() {
                done[ends].bytes = h.random.number();
            }
            if h.lie() {
                done[ends].op = h.random.below(h.last_number + 3);
            }
            h.posted.retain(|posted| posted.0 != done[ends].op);
            ends += 1;
        }
        if ends > 0 && h.lie() {
            done[ends] = done[0];
            ends += 1;
        }
        if let Some(op) = h.ghosts.pop() {
            done[ends] = RawDone { op, ..RawDone::ZEROED };
            ends += 1;
        }
        let said = if h.lie() { (h.random.number() as u32).max(ends as u32) } else { ends as u32 };
        // SAFETY: the host gives a place for the count.
        unsafe { *count = said };
        h.random.below(3) as i32 - 1
    })
}

unsafe extern "C" fn arm(_: *mut RawDriver) -> i32 {
    hostile(|h| h.random.number() as i32)
}

unsafe extern "C" fn wait_fd(_: *mut RawDriver) -> i32 {
    hostile(|h| if h.lie() { h.random.number() as i32 | 0x4000_0000 } else { -1 })
}

fn table() -> RawTable {
    RawTable {
        abi_version: ABI_VERSION,
        size: size_of::<RawTable>() as u32,
        open: Some(open),
        close: Some(close),
        info: Some(info),
        address: Some(address),
        register_memory: Some(register_memory),
        deregister: Some(deregister),
        connect: Some(connect),
        disconnect: Some(disconnect),
        import_key: Some(import_key),
        forget: Some(forget),
        read: Some(one_sided),
        write: Some(one_sided),
        send: Some(send),
        receive: Some(receive),
        cancel_receive: Some(cancel_receive),
        poll: Some(poll),
        arm: Some(arm),
        wait_fd: Some(wait_fd),
    }
}

/// The host's half: what it knows to be posted, by operation.
struct Host {
    driver: PluginDriver,
    random: Random,
    memory: HostMemory,
    locals: Vec<LocalId>,
    peers: Vec<PeerId>,
    remotes: Vec<(PeerId, RemoteId)>,
    posted: HashMap<u64, usize>,
    last_op: u64,
}

impl Host {
    fn pick<T: Copy>(random: &mut Random, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[random.below(from.len() as u64) as usize])
    }

    fn range(&mut self) -> LocalRange {
        let id = Self::pick(&mut self.random, &self.locals).unwrap_or(LocalId(9));
        let len = self.random.below(9000) as usize;
        let offset = if self.random.one_in(20) {
            self.random.number() as usize
        } else {
            self.random.below(MEMORY_BYTES as u64) as usize
        };
        LocalRange { id, offset, len }
    }

    fn remote(&mut self) -> (PeerId, RemoteId) {
        Self::pick(&mut self.random, &self.remotes).unwrap_or((PeerId(7), RemoteId(7)))
    }

    fn step(&mut self) {
        let range = self.range();
        let (of, remote) = self.remote();
        let offset = self.random.number();
        let peer = Self::pick(&mut self.random, &self.peers).unwrap_or(PeerId(3));
        let op = self.last_op + 1;
        let mut posting = None;
        match self.random.below(14) {
            0 | 1 => {
                let access = [Access::Local, Access::RemoteRead, Access::RemoteWrite];
                let access = access[self.random.below(3) as usize];
                if let Ok((id, key)) = self.driver.register(&self.memory.span(), access) {
                    assert!(key.len() <= 2048 && key.is_empty() == (access == Access::Local));
                    self.locals.push(id);
                }
            }
            2 => self.driver.deregister(range.id),
            3 => self.peers.extend(self.driver.connect(&[1; 100])),
            4 => self.driver.disconnect(peer),
            5 => {
                let imported = self.driver.import(peer, &[2; 60]);
                self.remotes.extend(imported.map(|remote| (peer, remote)));
            }
            6 => self.driver.forget(of, remote),
            7 | 8 => posting = Some(self.driver.read(of, remote, offset, range, op)),
            9 => posting = Some(self.driver.write(of, remote, offset, range, op)),
            10 => posting = Some(self.driver.send(peer, 5, range, op)),
            11 => posting = Some(self.driver.receive(6, range, op)),
            12 => self.driver.cancel_receive(self.random.below(op)),
            _ => self.poll(),
        }
        match posting {
            Some(Ok(())) => {
                self.posted.insert(op, range.len);
                self.last_op = op;
            }
            Some(Err(PostError::Failed(why))) => assert!(why.len() < 4000),
            Some(Err(_)) | None => {}
        }
    }

    fn poll(&mut self) {
        let mut done: Vec<Done> = Vec::new();
        self.driver.poll(&mut done);
        self.driver.arm();
        for end in done {
            let len = self.posted.remove(&end.op).expect("reported once, and posted");
            match end.result {
                Ok(moved) => assert!(moved <= len),
                Err(why) => assert!(!why.contains(char::is_control) && why.len() < 1000),
            }
        }
    }
}

fn run(seed: u64) {
    let lies = [0, 1000, 100, 10][seed as usize % 4];
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let state = Hostile {
        random: Random(random.next() | 1),
        lies,
        open: false,
        locals: HashMap::new(),
        peers: Vec::new(),
        remotes: Vec::new(),
        posted: Vec::new(),
        ghosts: Vec::new(),
        last_number: 0,
        last_handle: random.number() >> 1,
        broken: Vec::new(),
    };
    HOSTILE.set(Some(state));
    let table = load::check(&table(), Path::new("fuzz")).unwrap();
    let opened = Calls::open(table, "fuzz".to_owned(), None).and_then(PluginDriver::start);
    assert!(lies > 0 || opened.is_ok(), "without a lie it opens");
    if let Ok(driver) = opened {
        let memory = HostMemory::allocate(MEMORY_BYTES, "fuzz").unwrap();
        let (posted, last_op) = (HashMap::new(), 0);
        let (locals, peers, remotes) = (Vec::new(), Vec::new(), Vec::new());
        let mut host = Host { driver, random, memory, locals, peers, remotes, posted, last_op };
        for _ in 0..STEPS {
            host.step();
        }
        if lies > 0 {
            // A last lie: what is posted then has failed, each once.
            hostile(|h| h.lies = 1);
        }
        for _ in 0..10_000 {
            host.poll();
        }
        assert!(host.posted.is_empty(), "never reported: {:?}", host.posted);
    }
    let state = HOSTILE.take().expect("set up");
    assert!(!state.open, "it was closed");
    assert!(state.broken.is_empty(), "promises to the plugin were broken: {:?}", state.broken);
}

#[test]
fn whatever_a_plugin_says_is_bounded_and_every_operation_ends_once() {
    for seed in 0..SEQUENCES {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            println!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn tables_of_every_kind_are_taken_or_refused() {
    let mut random = Random(77);
    for _ in 0..100_000 {
        let mut words = [0u32; size_of::<RawTable>() / 4];
        words.fill_with(|| if random.one_in(3) { 0 } else { random.number() as u32 });
        words[0] = if random.one_in(8) { random.number() as u32 } else { ABI_VERSION };
        words[1] = if random.one_in(8) { random.number() as u32 } else { size_of::<RawTable>() as u32 };
        let mut pages = [0u64; size_of::<RawTable>() / 8];
        for (page, pair) in pages.iter_mut().zip(words.chunks(2)) {
            *page = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        }
        let complete = pages[1..].iter().all(|function| *function != 0);
        let [version, size] = [words[0], words[1]];
        let sized = (size_of::<RawTable>() as u32..=1 << 16).contains(&size);
        let taken = load::check(pages.as_ptr().cast(), Path::new("fuzz")).is_ok();
        assert_eq!(taken, version == ABI_VERSION && sized && complete);
    }
}
