//! Two drivers in one process, and one in a process of its own. Debian's libucx0 is all they need.

use std::cell::Cell;
use std::time::{Duration, Instant};

use baton_ucx_sys::{ucp_ep_h, ucp_request_param_t, ucs_status_ptr_t};

use super::driver::UcxDriver;
use super::slots::{Job, Work};
use super::*;
use crate::backend::fabric::testing::{longest_call, silent_host};
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

#[test]
fn requests_come_without_being_awaited() {
    both_ways(|mut sender, mut receiver| {
        let (count, from) = (100, memory(1 << 20, 3));
        let (id, _) = sender.driver.register(&from.span(), Access::Local).unwrap();
        let peer = sender.driver.connect(&receiver.driver.address()).unwrap();
        let len = |op: usize| 1 + op * 41 % REQUEST_MAX_BYTES;
        let (mut asked, mut came) = (0, Vec::new());
        until(&mut [&mut sender, &mut receiver], |ends| {
            while asked < count {
                let range = LocalRange { id, offset: asked, len: len(asked) };
                match ends[0].driver.ask(peer, range, asked as u64) {
                    Ok(()) => asked += 1,
                    Err(PostError::Again) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            came.extend(std::iter::from_fn(|| ends[1].driver.take_request()));
            ends[0].done.len() == count && came.len() == count
        });
        let all = bytes(&from);
        assert!((0..count).all(|op| came[op] == all[op..op + len(op)]), "in order, unchanged");
        let long = LocalRange { id, offset: 0, len: REQUEST_MAX_BYTES + 1 };
        assert_eq!(sender.driver.ask(peer, long, 1000), Err(PostError::Range));
        assert!(receiver.done.is_empty());
    });
}

/// A reader or writer with a peer's memory at hand.
struct Linked {
    near: End,
    far: End,
    peer: PeerId,
    local: LocalId,
    remote: RemoteId,
    /// The peer's registration.
    owned: LocalId,
    here: HostMemory,
    there: HostMemory,
}

impl Linked {
    fn new(mut near: End, mut far: End, len: usize, access: Access) -> Self {
        let (here, there) = (memory(len, 1), memory(len, 2));
        let (owned, key) = far.driver.register(&there.span(), access).unwrap();
        let (local, _) = near.driver.register(&here.span(), Access::Local).unwrap();
        let peer = near.driver.connect(&far.driver.address()).unwrap();
        let remote = near.driver.import(peer, &key).unwrap();
        Self { near, far, peer, local, remote, owned, here, there }
    }

    fn read(&mut self, from: u64, to: usize, len: usize, op: u64) -> Result<(), PostError> {
        let range = self.near.range(self.local, to, len);
        self.near.driver.read(self.peer, self.remote, from, range, op)
    }

    fn write(&mut self, to: u64, from: usize, len: usize, op: u64) -> Result<(), PostError> {
        let range = self.near.range(self.local, from, len);
        self.near.driver.write(self.peer, self.remote, to, range, op)
    }

    fn wait(&mut self, op: u64) -> Result<usize, String> {
        wait(&mut [&mut self.near, &mut self.far], op)
    }
}

#[test]
fn writes_are_at_the_peer_when_they_are_done() {
    both_ways(|near, far| {
        let len = 1 << 20;
        let mut link = Linked::new(near, far, len, Access::RemoteWrite);
        for (op, (to, from, len)) in [(0, 0, len), (100, 7, 1), (4096, 64, 65_537)].into_iter().enumerate() {
            link.here.write(0, &pattern(1 << 20, op as u8 + 3));
            link.write(to as u64, from, len, op as u64).unwrap();
            assert_eq!(link.wait(op as u64), Ok(len));
            assert_eq!(bytes(&link.there)[to..to + len], bytes(&link.here)[from..from + len]);
        }
    });
}

#[test]
fn many_scattered_and_big_blocks_arrive_in_their_places() {
    both_ways(|near, far| {
        let (count, len) = (32, 1 << 20);
        let mut link = Linked::new(near, far, count * len, Access::RemoteRead);
        // Whole blocks in reverse order, then thousands of small ones.
        for block in 0..count {
            link.read((block * len) as u64, (count - 1 - block) * len, len, block as u64).unwrap();
        }
        for block in 0..count {
            assert_eq!(link.wait(block as u64), Ok(len));
        }
        let (here, there) = (bytes(&link.here), bytes(&link.there));
        for block in 0..count {
            let at = count - 1 - block;
            assert!(here[at * len..][..len] == there[block * len..][..len], "block {block}");
        }
        link.here.write(0, &vec![0; count * len]);
        let small = 4096;
        for block in 0..2048 {
            link.read((block * 2 * small) as u64, block * small, small, block as u64).unwrap();
        }
        for block in 0..2048 {
            assert_eq!(link.wait(block as u64), Ok(small));
        }
        let here = bytes(&link.here);
        for block in 0..2048 {
            assert!(here[block * small..][..small] == there[block * 2 * small..][..small], "small {block}");
        }
        assert!(here[2048 * small..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn more_than_the_queues_hold_is_refused_and_can_be_posted_later() {
    both_ways(|near, far| {
        let mut link = Linked::new(near, far, 4096, Access::RemoteRead);
        let mut posted = 0;
        while link.read(0, 0, 64, posted).is_ok() {
            posted += 1;
            assert!(posted <= slots::OPS_MAX as u64);
        }
        assert_eq!(link.read(0, 0, 64, posted), Err(PostError::Again));
        for op in 0..posted {
            assert_eq!(link.wait(op), Ok(64));
        }
        link.read(0, 0, 64, posted).unwrap();
        assert_eq!(link.wait(posted), Ok(64));
    });
}

#[test]
fn messages_land_where_their_tag_is_awaited() {
    both_ways(|mut near, mut far| {
        let len = 4 << 20;
        let (from, to) = (memory(len, 5), memory(len, 0));
        let (source, _) = near.driver.register(&from.span(), Access::Local).unwrap();
        let (target, _) = far.driver.register(&to.span(), Access::Local).unwrap();
        let peer = near.driver.connect(&far.driver.address()).unwrap();
        for (op, len) in [1, 4096, 100_000, 4 << 20].into_iter().enumerate() {
            let (op, tag) = (op as u64, 0xdead_beef_0000 + op as u64);
            let range = far.range(target, 0, len);
            far.driver.receive(tag, range, op).unwrap();
            assert!(matches!(far.driver.receive(tag, range, 99), Err(PostError::Failed(_))));
            let range = near.range(source, 0, len);
            near.driver.send(peer, tag, range, op).unwrap();
            assert_eq!(wait(&mut [&mut far, &mut near], op), Ok(len));
            assert_eq!(wait(&mut [&mut near, &mut far], op), Ok(len));
            assert!(bytes(&to)[..len] == bytes(&from)[..len], "message {op}");
        }
        // One that does not fit is an error of the receiver, and writes nothing.
        let before = bytes(&to);
        let range = far.range(target, 0, 10);
        far.driver.receive(7, range, 50).unwrap();
        let range = near.range(source, 64, 4096);
        near.driver.send(peer, 7, range, 51).unwrap();
        assert!(wait(&mut [&mut far, &mut near], 50).is_err());
        assert!(bytes(&to) == before);
    });
}

#[test]
fn messages_nobody_awaits_are_dropped_and_cancelled_receives_reported() {
    both_ways(|mut near, mut far| {
        let len = 1 << 20;
        let (from, to) = (memory(len, 5), memory(len, 0));
        let before = bytes(&to);
        let (source, _) = near.driver.register(&from.span(), Access::Local).unwrap();
        let (target, _) = far.driver.register(&to.span(), Access::Local).unwrap();
        let peer = near.driver.connect(&far.driver.address()).unwrap();
        let range = far.range(target, 0, len);
        far.driver.receive(1, range, 1).unwrap();
        far.driver.cancel_receive(1);
        assert!(wait(&mut [&mut far, &mut near], 1).is_err());
        far.driver.cancel_receive(1);
        for op in 0..64 {
            let len = if op % 2 == 0 { 100 } else { len };
            let range = near.range(source, 0, len);
            near.driver.send(peer, 1 + op, range, op).unwrap();
            assert_eq!(wait(&mut [&mut near, &mut far], op), Ok(len), "the sender is not held up");
        }
        assert!(far.done.is_empty() && bytes(&to) == before);
        assert!(far.driver.core.slots.busy().is_empty() && far.driver.core.arrivals.borrow().is_empty());
    });
}

#[test]
fn ranges_outside_of_registrations_are_not_posted() {
    both_ways(|near, far| {
        let mut link = Linked::new(near, far, 4096, Access::RemoteRead);
        for (from, to, len) in
            [(0, 0, 4097), (1, 0, 4096), (0, 1, 4096), (u64::MAX, 0, 1), (0, usize::MAX, 1), (4096, 0, 1)]
        {
            assert_eq!(link.read(from, to, len, 1), Err(PostError::Range), "{from} {to} {len}");
        }
        let range = link.near.range(LocalId(999), 0, 1);
        assert_eq!(link.near.driver.read(link.peer, link.remote, 0, range, 1), Err(PostError::Range));
        link.near.driver.forget(link.peer, link.remote);
        assert_eq!(link.read(0, 0, 1, 1), Err(PostError::Range));
        assert!(link.near.driver.core.slots.busy().is_empty());
    });
}

#[test]
fn owners_of_messages_check_key_access_and_life_of_a_registration() {
    let (Some(near), Some(far)) = (End::open(false), End::open(false)) else { return };
    let mut link = Linked::new(near, far, 4096, Access::RemoteRead);
    let (before_here, before_there) = (bytes(&link.here), bytes(&link.there));
    link.write(0, 0, 4096, 1).unwrap();
    assert!(link.wait(1).unwrap_err().contains("refused"), "readable is not writable");
    // A key with another secret.
    let payload = {
        let mut regions = link.far.driver.core.regions.borrow_mut();
        let region = regions.get_mut(&link.owned.0).unwrap();
        let secret = std::mem::replace(&mut region.secret, 5);
        let key = peer::export(&link.far.driver.core, link.owned.0, region).unwrap();
        region.secret = secret;
        key
    };
    let forged = link.near.driver.import(link.peer, &payload).unwrap();
    let range = link.near.range(link.local, 0, 64);
    link.near.driver.read(link.peer, forged, 0, range, 2).unwrap();
    assert!(link.wait(2).unwrap_err().contains("refused"), "a guessed secret is none");
    link.far.driver.deregister(link.owned);
    link.read(0, 0, 4096, 3).unwrap();
    assert!(link.wait(3).unwrap_err().contains("refused"), "a registration that ended serves nothing");
    assert!(bytes(&link.here) == before_here && bytes(&link.there) == before_there);
}

#[test]
fn registrations_keep_their_memory_until_nothing_uses_it() {
    both_ways(|near, far| {
        let mut link = Linked::new(near, far, 1 << 20, Access::RemoteRead);
        link.read(0, 0, 1 << 20, 1).unwrap();
        link.near.driver.deregister(link.local);
        assert_eq!(link.read(0, 0, 1, 2), Err(PostError::Range), "it takes no more operations");
        let held = |link: &Linked| link.near.driver.core.regions.borrow().contains_key(&link.local.0);
        assert!(held(&link), "an operation is under way");
        assert_eq!(link.wait(1), Ok(1 << 20));
        assert!(!held(&link));
        assert!(bytes(&link.here) == bytes(&link.there));
    });
}

/// Stops the peer's thread at every stage of a transfer and disconnects: all is reported, nothing lands afterwards.
#[test]
fn after_a_disconnect_nothing_lands() {
    for (transports, one_sided) in [("tcp", false), ("tcp,cma", false), ("tcp", true), ("tcp,cma", true)] {
        for stage in 0..24 {
            let options = UcxOptions { transports: Some(transports.to_owned()), ..UcxOptions::default() };
            let open = || End::with(&options, one_sided);
            let (Some(near), Some(far)) = (open(), open()) else { return };
            let len = 256 << 10;
            let mut link = Linked::new(near, far, 8 * len, Access::RemoteRead);
            // Connected before, so that the stages are those of the transfer.
            link.read(0, 0, 1, 100).unwrap();
            assert_eq!(link.wait(100), Ok(1));
            for op in 0..8 {
                link.read((op * len) as u64, op * len, len, op as u64).unwrap();
            }
            for _ in 0..stage {
                link.near.poll();
                link.far.poll();
            }
            let started = Instant::now();
            link.near.driver.disconnect(link.peer);
            assert!(started.elapsed() < CALL_MAX + Duration::from_secs(1));
            assert!(
                link.near.driver.dead.is_none(),
                "{transports} {one_sided} {stage}: {:?}",
                link.near.driver.dead
            );
            link.near.poll();
            let mut reported: Vec<_> = link.near.done.drain(..).map(|done| done.op).collect();
            reported.sort_unstable();
            assert_eq!(reported, [0, 1, 2, 3, 4, 5, 6, 7], "{transports} {one_sided} {stage}");
            link.here.write(0, &vec![0xee; 8 * len]);
            for _ in 0..200 {
                link.near.poll();
                link.far.poll();
            }
            assert!(bytes(&link.here).iter().all(|byte| *byte == 0xee), "{transports} {one_sided} {stage}");
            assert!(link.near.done.is_empty());
            assert!(matches!(link.read(0, 0, 1, 9), Err(PostError::Failed(_))));
            // The other peers of either side are none the worse: connect again.
            let peer = link.near.driver.connect(&link.far.driver.address()).unwrap();
            let (_, key) = link.far.driver.register(&link.there.span(), Access::RemoteRead).unwrap();
            link.remote = link.near.driver.import(peer, &key).unwrap();
            link.peer = peer;
            link.read(0, 0, len, 10).unwrap();
            assert_eq!(link.wait(10), Ok(len), "{transports} {one_sided} {stage}");
            assert!(bytes(&link.here)[..len] == bytes(&link.there)[..len]);
        }
    }
}

unsafe extern "C" fn closes_nothing(_: ucp_ep_h, _: *const ucp_request_param_t) -> ucs_status_ptr_t {
    std::ptr::without_provenance_mut(-3_isize as usize)
}

#[test]
fn a_connection_that_does_not_close_ends_the_driver_and_lets_its_thread_sleep() {
    for one_sided in [false, true] {
        let (Ok(api), Some(far)) = (library::get(), End::open(one_sided)) else { return };
        let mut api = *api;
        api.ucp_ep_close_nbx = closes_nothing;
        let driver = UcxDriver::open(&api, &UcxOptions::default(), Some(one_sided)).unwrap();
        let mut link = Linked::new(End { driver, done: Vec::new() }, far, 1 << 20, Access::RemoteRead);
        let other = link.near.driver.connect(&link.far.driver.address()).unwrap();
        let (_, key) = link.far.driver.register(&link.there.span(), Access::RemoteRead).unwrap();
        let remote = link.near.driver.import(other, &key).unwrap();
        link.read(0, 0, 1 << 20, 1).unwrap();
        link.near.driver.disconnect(link.peer);
        assert!(link.near.driver.dead.is_some(), "nothing less makes sure that nothing lands");
        assert!(link.near.driver.core.worker.get().is_null());
        link.near.poll();
        assert!(link.near.result(1).unwrap().is_err());
        assert!(link.near.driver.arm() && !link.near.poll(), "there is nothing to wait for");
        assert!(link.near.driver.peers[&other.0].remotes.is_empty(), "keys go before their worker");
        link.near.driver.forget(other, remote);
        assert!(matches!(link.read(0, 0, 1, 2), Err(PostError::Failed(_))));
        link.near.driver.disconnect(other);
    }
}

fn is_held(end: &End, id: LocalId) -> bool {
    end.driver.core.regions.borrow().get(&id.0).is_some_and(|region| region.in_use > 0)
}

/// A reader that stands still while answers to it are under way.
fn stuck_reader(transports: &str) -> Option<Linked> {
    let options = UcxOptions { transports: Some(transports.to_owned()), ..UcxOptions::default() };
    let (near, far) = (End::with(&options, false)?, End::with(&options, false)?);
    let len = 8 << 20;
    let mut link = Linked::new(near, far, 4 * len, Access::RemoteRead);
    link.read(0, 0, 1, 100).unwrap();
    assert_eq!(link.wait(100), Ok(1));
    for op in 0..4 {
        link.read((op * len) as u64, op * len, len, op as u64).unwrap();
    }
    // The requests are out.
    let owned = link.owned;
    until(&mut [&mut link.far], |ends| is_held(ends[0], owned));
    Some(link)
}

#[test]
fn a_reader_that_takes_no_bytes_does_not_keep_memory_for_ever() {
    for transports in ["tcp", "tcp,cma"] {
        let Some(mut link) = stuck_reader(transports) else { return };
        let owned = link.owned;
        link.far.driver.deregister(owned);
        for _ in 0..100 {
            link.far.poll();
        }
        assert!(is_held(&link.far, owned), "{transports}: answers are under way");
        link.far.driver.patience = Duration::ZERO;
        until(&mut [&mut link.far], |ends| !ends[0].driver.core.regions.borrow().contains_key(&owned.0));
        assert_eq!(link.far.driver.dead, None);
        // Both go on.
        for _ in 0..100 {
            link.near.poll();
            link.far.poll();
        }
        link.near.driver.disconnect(link.peer);
        link.near.poll();
        link.near.done.clear();
        let (_, key) = link.far.driver.register(&link.there.span(), Access::RemoteRead).unwrap();
        link.peer = link.near.driver.connect(&link.far.driver.address()).unwrap();
        link.remote = link.near.driver.import(link.peer, &key).unwrap();
        link.read(0, 0, 8 << 20, 9).unwrap();
        assert_eq!(link.wait(9), Ok(8 << 20), "{transports}");
        until(&mut [&mut link.near, &mut link.far], |ends| ends[1].driver.core.slots.busy().is_empty());
    }
}

#[test]
fn a_driver_ends_while_its_answers_are_under_way() {
    for transports in ["tcp", "tcp,cma"] {
        let Some(link) = stuck_reader(transports) else { return };
        assert!(is_held(&link.far, link.owned), "{transports}");
        let Linked { mut near, far, peer, there, .. } = link;
        // UCX 1.13 aborts the process here if anything is left.
        drop(far);
        near.driver.disconnect(peer);
        drop(there);
    }
}

#[test]
fn a_receive_that_was_cancelled_does_not_take_the_next_one_of_its_tag_along() {
    let (Some(near), Some(far)) = (End::open(false), End::open(false)) else { return };
    let mut link = Linked::new(near, far, 4096, Access::RemoteRead);
    let range = link.near.range(link.local, 0, 64);
    link.near.driver.receive(5, range, 1).unwrap();
    link.near.driver.cancel_receive(1);
    link.near.driver.receive(5, range, 2).unwrap();
    link.near.driver.cancel_receive(1);
    let back = link.far.driver.connect(&link.near.driver.address()).unwrap();
    let (source, _) = link.far.driver.register(&link.there.span(), Access::Local).unwrap();
    link.far.driver.send(back, 5, LocalRange { id: source, offset: 0, len: 64 }, 1).unwrap();
    assert_eq!(link.wait(2), Ok(64));
    assert!(link.near.result(1).unwrap().is_err());
    assert!(link.near.driver.receives.is_empty());
}

mod hostile;
mod inside;
mod pieces;
mod processes;

/// As many registrations, keys and peers as there are numbers: those in use are not given again.
#[test]
fn numbers_that_come_round_are_not_given_twice() {
    both_ways(|near, far| {
        let mut link = Linked::new(near, far, 4096, Access::RemoteRead);
        let key = link.far.driver.register(&link.there.span(), Access::RemoteRead).unwrap().1;
        let used = [link.local.0, link.peer.0, link.remote.0];
        for last in [u32::MAX - 2, 0] {
            link.near.driver.last_id = last;
            for _ in 0..5 {
                let (made, _) = link.near.driver.register(&link.here.span(), Access::Local).unwrap();
                let taken = link.near.driver.import(link.peer, &key).unwrap();
                assert!(!used.contains(&made.0) && !used.contains(&taken.0) && made.0 != taken.0);
                link.near.driver.deregister(made);
                link.near.driver.forget(link.peer, taken);
            }
        }
        link.read(0, 0, 4096, 1).unwrap();
        assert_eq!(link.wait(1), Ok(4096));
    });
}

#[test]
fn a_host_that_does_not_answer_holds_up_no_call() {
    let Some(mut end) = End::open(false) else { return };
    let (silent, _kept) = silent_host();
    let mut theirs =
        frame::open(frame::Kind::Address, &end.driver.address(), ADDRESS_MAX_BYTES).unwrap().to_vec();
    // Behind the release and the way of moving bytes.
    for listens in address::listens_at(&theirs[9..], silent.ip()) {
        let port = listens.port().to_be_bytes();
        let at = theirs.windows(2).rposition(|bytes| bytes == port).unwrap();
        theirs[at..at + 2].copy_from_slice(&silent.port().to_be_bytes());
    }
    let theirs = frame::seal(frame::Kind::Address, &theirs);
    let (id, _) = end.driver.register(&memory(4096, 1).span(), Access::Local).unwrap();
    let range = end.range(id, 0, 100);
    let peer = Cell::new(PeerId(0));
    let calls: [&mut dyn FnMut(&mut UcxDriver); 3] = [
        &mut |driver| peer.set(driver.connect(&theirs).unwrap()),
        &mut |driver| driver.ask(peer.get(), range, 5).unwrap(),
        &mut |driver| driver.disconnect(peer.get()),
    ];
    let longest = longest_call(&mut end.driver, calls);
    assert!(longest < Duration::from_secs(1), "{longest:?}");
}
