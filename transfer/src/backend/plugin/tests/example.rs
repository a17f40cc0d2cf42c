//! The example plugin: two drivers in one process.

use std::os::fd::BorrowedFd;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::support::{Node, deadline, example, pattern, source};
use crate::backend::fabric::driver::{Access, Driver, LocalId, LocalRange, PostError};
use crate::backend::plugin::{PluginOptions, open, probe};
use crate::memory::HostMemory;

const LEN: usize = 4 << 20;

#[test]
fn it_says_what_it_is() {
    let plugin = example();
    let driver = open(&PluginOptions { bind: Some([127, 0, 0, 1].into()), ..plugin.options() }).unwrap();
    let info = driver.info();
    assert_eq!((info.wire.as_str(), info.rails, info.message_max), ("example-cma/1", 1, 64 << 10));
    assert!(info.same_host && info.read && info.write && info.op_max == 1 << 20);
    assert!(info.device_memory.iter().all(|(_, takes)| takes.is_err()), "{:?}", info.device_memory);
    let [probed] = &probe(&plugin.options())[..] else { panic!("one plugin, one probe") };
    assert!(probed.works && probed.detail == info.detail, "{probed:?}");
}

#[test]
fn reads_and_writes_move_the_bytes_asked_for_and_no_others() {
    let plugin = example();
    let mut owner = Node::open(&plugin, LEN, Access::RemoteWrite);
    let mut user = Node::open(&plugin, LEN, Access::Local);
    assert!(user.key.is_empty(), "a local registration has no key");
    owner.memory.write(0, &pattern(1, LEN));
    user.memory.write(0, &pattern(2, LEN));
    let mut owners = pattern(1, LEN);
    let mut users = pattern(2, LEN);
    let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
    let limit = user.driver.info().op_max;
    for (from, to, len) in [(0, 0, 1), (4095, 17, 4097), (LEN - limit, 3, limit), (8, LEN - 8, 8)] {
        let op = user.op();
        user.driver.read(peer, remote, from as u64, user.range(to, len), op).unwrap();
        assert_eq!(user.finish(op), Ok(len), "a read does not need its owner to poll");
        users[to..to + len].copy_from_slice(&owners[from..from + len]);
        assert!(user.bytes(0, LEN) == users, "read {from}+{len} to {to}");
    }
    for (from, to, len) in [(0, 5, 1), (4095, 17, 4097), (LEN - limit, LEN - limit, limit)] {
        let op = user.op();
        user.driver.write(peer, remote, to as u64, user.range(from, len), op).unwrap();
        assert_eq!(user.finish_beside(&mut owner, op), Ok(len));
        owners[to..to + len].copy_from_slice(&users[from..from + len]);
        assert!(owner.bytes(0, LEN) == owners, "wrote {from}+{len} to {to}");
    }
    assert!(
        user.done.is_empty() && owner.done.is_empty(),
        "nothing is reported twice, and nothing to the owner"
    );
}

#[test]
fn ranges_outside_either_end_are_not_posted() {
    let plugin = example();
    let owner = Node::open(&plugin, 8192, Access::RemoteWrite);
    let mut user = Node::open(&plugin, 4 << 20, Access::Local);
    let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
    let before = user.bytes(0, 4 << 20);
    let limit = user.driver.info().op_max;
    let ranges = [
        (0, user.range(4 << 20, 1)),
        (0, user.range(0, 0)),
        (0, user.range(usize::MAX, 2)),
        (0, user.range(0, limit + 1)),
        (0, LocalRange { id: LocalId(77), offset: 0, len: 1 }),
        (8192, user.range(0, 1)),
        (1, user.range(0, 8192)),
        (u64::MAX, user.range(0, 1)),
        (u64::MAX - 100, user.range(0, 200)),
    ];
    for (offset, range) in ranges {
        let driver = &mut user.driver;
        assert_eq!(driver.read(peer, remote, offset, range, 1), Err(PostError::Range), "{offset} {range:?}");
        assert_eq!(driver.write(peer, remote, offset, range, 2), Err(PostError::Range), "{offset} {range:?}");
    }
    let long = user.range(0, user.driver.info().message_max + 1);
    assert_eq!(user.driver.send(peer, 5, long, 3), Err(PostError::Range));
    user.poll();
    assert!(user.done.is_empty() && user.bytes(0, 4 << 20) == before);
}

#[test]
fn messages_land_where_their_tag_is_awaited() {
    let plugin = example();
    let mut left = Node::open(&plugin, 1 << 20, Access::Local);
    let mut right = Node::open(&plugin, 1 << 20, Access::Local);
    let peer = left.driver.connect(&right.driver.address()).unwrap();
    left.memory.write(0, &pattern(3, 1 << 20));
    let max = left.driver.info().message_max;
    let (a, b, short, cancelled) = (right.op(), right.op(), right.op(), right.op());
    right.driver.receive(11, right.range(0, max), a).unwrap();
    right.driver.receive(22, right.range(max, max), b).unwrap();
    right.driver.receive(33, right.range(2 * max, 10), short).unwrap();
    right.driver.receive(44, right.range(3 * max, 10), cancelled).unwrap();
    let send = |left: &mut Node, tag, offset, len| {
        let op = left.op();
        left.driver.send(peer, tag, left.range(offset, len), op).unwrap();
        assert_eq!(left.finish(op), Ok(len));
    };
    send(&mut left, 99, 0, 100);
    send(&mut left, 22, 100, max);
    assert_eq!(right.finish(b), Ok(max), "a message nobody awaits holds nothing up");
    send(&mut left, 11, 7, 5);
    assert_eq!(right.finish(a), Ok(5));
    send(&mut left, 33, 0, 11);
    assert!(right.finish(short).is_err(), "longer than its place");
    right.driver.cancel_receive(cancelled);
    right.driver.cancel_receive(cancelled);
    right.driver.cancel_receive(424242);
    assert!(right.finish(cancelled).is_err());
    send(&mut left, 44, 0, 10);
    send(&mut left, 11, 0, 10);
    while right.poll() {}
    assert!(right.done.is_empty(), "each was awaited once");
    let sent = pattern(3, 1 << 20);
    let mut expected = vec![0; 1 << 20];
    expected[..5].copy_from_slice(&sent[7..12]);
    expected[max..2 * max].copy_from_slice(&sent[100..100 + max]);
    assert!(right.bytes(0, 1 << 20) == expected, "nothing else was written");
}

#[test]
fn a_full_queue_says_so_and_takes_more_once_it_was_polled() {
    let plugin = example();
    let mut left = Node::open(&plugin, 1 << 20, Access::Local);
    let mut right = Node::open(&plugin, 1 << 20, Access::Local);
    let peer = left.driver.connect(&right.driver.address()).unwrap();
    let mut accepted = 0;
    let full = loop {
        let op = left.op();
        match left.driver.send(peer, 1000 + op, left.range(0, 64 << 10), op) {
            Ok(()) => accepted += 1,
            Err(error) => break error,
        }
        left.poll();
        assert!(accepted < 100_000, "a socket holds only so much");
    };
    assert_eq!(full, PostError::Again);
    let until = deadline();
    let op = left.op();
    while left.driver.send(peer, 1, left.range(0, 64 << 10), op) == Err(PostError::Again) {
        right.poll();
        assert!(Instant::now() < until);
    }
    assert_eq!(left.finish(op), Ok(64 << 10));
}

#[test]
fn what_is_unreported_at_a_disconnect_has_failed_and_its_memory_is_given_up() {
    let plugin = example();
    let mut owner = Node::open(&plugin, 8192, Access::RemoteWrite);
    let mut user = Node::open(&plugin, 8192, Access::Local);
    let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
    let (again, other) = user.meet(&owner.driver.address(), &owner.key);
    // Done already, but unreported; and one that waits for the owner, who does not poll.
    let (read, write, kept) = (user.op(), user.op(), user.op());
    user.driver.read(peer, remote, 0, user.range(0, 100), read).unwrap();
    user.driver.write(peer, remote, 0, user.range(0, 100), write).unwrap();
    user.driver.read(again, other, 0, user.range(200, 100), kept).unwrap();
    user.driver.deregister(user.local);
    user.driver.disconnect(peer);
    user.driver.disconnect(peer);
    assert!(!user.driver.arm(), "there is something to poll for");
    user.poll();
    assert!(user.take(read).unwrap().is_err() && user.take(write).unwrap().is_err());
    assert_eq!(user.take(kept), Some(Ok(100)), "other connections go on");
    assert!(matches!(user.driver.read(peer, remote, 0, user.range(0, 1), 1), Err(PostError::Failed(_))));
    let gone = user.driver.read(again, other, 0, user.range(0, 1), 1);
    assert_eq!(gone, Err(PostError::Range), "the local memory is gone, too");
    assert!(matches!(user.driver.send(peer, 1, user.range(0, 1), 1), Err(PostError::Failed(_))));
    assert!(user.driver.import(peer, &owner.key).is_err());
    let span = user.memory.span();
    let (local, _) = user.driver.register(&span, Access::Local).unwrap();
    let range = LocalRange { id: local, offset: 0, len: 1 };
    assert!(matches!(user.driver.read(peer, remote, 0, range, 1), Err(PostError::Failed(_))));
    assert!(matches!(user.driver.read(peer, other, 0, range, 1), Err(PostError::Failed(_))), "another's key");
    owner.poll();
    user.poll();
    assert!(user.done.is_empty(), "the owner's late answer is the end of nothing: {:?}", user.done);
}

#[test]
fn a_key_ends_with_its_registration() {
    let plugin = example();
    let mut owner = Node::open(&plugin, 8192, Access::RemoteWrite);
    let mut user = Node::open(&plugin, 8192, Access::Local);
    let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
    let (read_only, key) = owner.driver.register(&owner.memory.span(), Access::RemoteRead).unwrap();
    let readable = user.driver.import(peer, &key).unwrap();
    let op = user.op();
    user.driver.write(peer, readable, 0, user.range(0, 64), op).unwrap();
    assert!(user.finish_beside(&mut owner, op).is_err(), "it may be read only");
    owner.driver.deregister(owner.local);
    let (read, write) = (user.op(), user.op());
    user.memory.write(0, &[7; 64]);
    user.driver.read(peer, remote, 0, user.range(64, 64), read).unwrap();
    user.driver.write(peer, remote, 0, user.range(0, 64), write).unwrap();
    assert!(user.finish(read).is_err());
    assert!(user.finish_beside(&mut owner, write).is_err());
    assert_eq!(owner.bytes(0, 64), [0; 64]);
    user.driver.forget(peer, remote);
    assert!(matches!(user.driver.read(peer, remote, 0, user.range(0, 1), 9), Err(PostError::Failed(_))));
    let op = user.op();
    user.driver.read(peer, readable, 0, user.range(0, 64), op).unwrap();
    assert_eq!(user.finish(op), Ok(64), "the other registration is still there");
    owner.driver.deregister(read_only);
}

#[test]
fn registered_memory_outlives_its_other_owners_until_nothing_can_touch_it() {
    let plugin = example();
    let owner = Node::open(&plugin, 8192, Access::RemoteRead);
    let mut user = Node::open(&plugin, 8192, Access::Local);
    let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
    let memory = HostMemory::allocate(4096, "kept").unwrap();
    let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().contains("baton-kept");
    let (local, _) = user.driver.register(&memory.span(), Access::Local).unwrap();
    drop(memory);
    assert!(mapped(), "the registration keeps it");
    let op = user.op();
    user.driver.read(peer, remote, 0, LocalRange { id: local, offset: 0, len: 4096 }, op).unwrap();
    user.driver.deregister(local);
    assert!(mapped(), "the posted read keeps it");
    let refused = user.driver.read(peer, remote, 0, LocalRange { id: local, offset: 0, len: 1 }, 5);
    assert_eq!(refused, Err(PostError::Range));
    assert_eq!(user.finish(op), Ok(4096));
    assert!(!mapped(), "nothing keeps it");
}

#[test]
fn hostile_addresses_and_keys_give_errors() {
    let plugin = example();
    let owner = Node::open(&plugin, 8192, Access::RemoteRead);
    let mut user = Node::open(&plugin, 8192, Access::Local);
    let address = owner.driver.address();
    let peer = user.driver.connect(&address).unwrap();
    for len in [0, 1, address.len() - 1, address.len() + 1, 4096, 5000] {
        let mut bytes = address.clone();
        bytes.resize(len, 0);
        assert!(user.driver.connect(&bytes).is_err(), "{len} bytes");
        bytes = owner.key.clone();
        bytes.resize(if len == address.len() - 1 { owner.key.len() - 1 } else { len }, 0);
        assert!(user.driver.import(peer, &bytes).is_err(), "{len} bytes");
    }
    for at in 0..address.len() {
        let mut bytes = address.clone();
        bytes[at] ^= 0x55;
        match user.driver.connect(&bytes) {
            Err(error) => assert!(!error.what.is_empty()),
            // As it happens another process has that number; not the secret that comes with every copy.
            Ok(other) => {
                assert!((8..16).contains(&at), "byte {at} of the address");
                let remote = user.driver.import(other, &owner.key).unwrap();
                let op = user.op();
                user.driver.read(other, remote, 0, user.range(0, 4096), op).unwrap();
                assert!(user.finish(op).is_err());
            }
        }
    }
    for at in 0..owner.key.len() {
        let mut bytes = owner.key.clone();
        bytes[at] ^= 0x55;
        let Ok(remote) = user.driver.import(peer, &bytes) else { continue };
        let op = user.op();
        match user.driver.read(peer, remote, 0, user.range(0, 4096), op) {
            // Where the memory is and how long, its reader may claim: the kernel lets it read all of the process anyway.
            Ok(()) if (8..24).contains(&at) => drop(user.finish(op)),
            Ok(()) => assert!(user.finish(op).is_err(), "byte {at} of the key"),
            Err(error) => assert_eq!(error, PostError::Range),
        }
    }
}

#[test]
fn its_descriptor_wakes_a_sleeper() {
    let plugin = example();
    let mut left = Node::open(&plugin, 8192, Access::Local);
    let mut right = Node::open(&plugin, 8192, Access::Local);
    let peer = left.driver.connect(&right.driver.address()).unwrap();
    while right.poll() {}
    let readable = |driver: &dyn Driver, wait: Duration| {
        let fd = driver.wait_fd().unwrap();
        // SAFETY: the driver, borrowed, keeps it open.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
    };
    assert!(right.driver.arm() && !readable(&*right.driver, Duration::ZERO), "nothing has happened");
    let (send, receive) = (left.op(), right.op());
    right.driver.receive(7, right.range(0, 100), receive).unwrap();
    left.driver.send(peer, 7, left.range(0, 100), send).unwrap();
    assert!(readable(&*right.driver, Duration::from_secs(20)));
    assert!(!right.driver.arm(), "armed too late");
    assert!(!left.driver.arm(), "an end waits to be reported");
    assert_eq!((left.finish(send), right.finish(receive)), (Ok(100), Ok(100)));
    while left.poll() | right.poll() {}
    assert!(left.driver.arm() && right.driver.arm());
    assert!(right.driver.nap() == Duration::from_millis(1));
}

#[test]
fn a_closed_driver_is_noticed_by_those_connected_to_it() {
    let plugin = example();
    let owner = Node::open(&plugin, 8192, Access::RemoteWrite);
    let mut user = Node::open(&plugin, 8192, Access::Local);
    let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
    let memory = owner.memory.clone();
    drop(owner);
    let op = user.op();
    user.driver.read(peer, remote, 0, user.range(0, 64), op).unwrap();
    assert!(user.finish(op).is_err(), "its registrations ended with it");
    let refused = user.driver.write(peer, remote, 0, user.range(0, 64), 1);
    assert!(matches!(refused, Err(PostError::Failed(_))), "{refused:?}");
    let refused = user.driver.read(peer, remote, 0, user.range(0, 64), 2);
    assert!(matches!(refused, Err(PostError::Failed(_))), "dead is dead: {refused:?}");
    drop(memory);
}

#[test]
fn garbage_from_its_socket_is_survived_under_the_sanitizers() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("hostile");
    let built = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-g", "-O1"])
        .args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o"])
        .arg(&program)
        .arg(source("tests/hostile.c"))
        .output()
        .unwrap();
    let complaints = String::from_utf8_lossy(&built.stderr);
    if complaints.contains("-lasan") || complaints.contains("-lubsan") {
        println!("skipped: this compiler has no sanitizers: {complaints}");
        return;
    }
    assert!(built.status.success(), "{complaints}");
    let ran = Command::new(&program).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}
