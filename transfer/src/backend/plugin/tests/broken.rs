//! Plugins with one thing wrong: refused when they are opened, or closed at the first breach.

use std::path::PathBuf;

use super::support::{Node, build};
use crate::backend::fabric::driver::{Access, DriverError, PostError};
use crate::backend::plugin::{PluginOptions, open, probe};
use crate::memory::HostMemory;

fn refusal(options: &PluginOptions) -> DriverError {
    match open(options) {
        Ok(driver) => panic!("{:?} was opened", driver.info()),
        Err(error) => error,
    }
}

#[test]
fn what_cannot_be_opened_is_refused_by_name() {
    let expected = [
        ("WRONG_SYMBOL", "does not export baton_driver_v1"),
        ("WRONG_TABLE", "gives no table"),
        ("WRONG_TABLE_UNALIGNED", "gives no table"),
        ("WRONG_VERSION", "is of ABI version 2; this program takes 1"),
        ("WRONG_SIZE_SMALL", "has a table of 8 bytes; version 1 has 152"),
        ("WRONG_SIZE_HUGE", "has a table of 4294967295 bytes; version 1 has 152"),
        ("WRONG_FUNCTION_POLL", "lacks the function `poll`"),
        ("WRONG_FUNCTION_WAIT_FD", "lacks the function `wait_fd`"),
        ("WRONG_OPEN_FAILS", "`open` failed: xxx"),
        ("WRONG_OPEN_NULL", "`open` succeeded without a driver"),
        ("WRONG_OPEN_STATUS", "`open` returned the status -7"),
        ("WRONG_INFO_WIRE", "its `wire` is not a word of printable ASCII"),
        ("WRONG_INFO_NO_WIRE", "its `wire` is not a word of printable ASCII"),
        ("WRONG_INFO_OP_MAX", "its longest operation is 7 bytes"),
        ("WRONG_INFO_MESSAGE_MAX", "its longest message is 18446744073709551615 bytes"),
        ("WRONG_INFO_RAILS", "it has 0 rails"),
        ("WRONG_INFO_NAP", "sleep for 4294967295 us"),
        ("WRONG_INFO_NOTHING", "neither reads nor writes nor messages"),
        ("WRONG_ADDRESS_LONG", "an address of 4097 bytes where 4096 have room"),
        ("WRONG_ADDRESS_EMPTY", "its address is empty"),
        ("WRONG_FD", "`wait_fd` gave 987654, which is no descriptor"),
        ("WRONG_FD_NEGATIVE", "`wait_fd` gave -2"),
    ];
    for (wrong, why) in expected {
        let plugin = build("tests/broken.c", &[wrong]);
        let error = refusal(&plugin.options());
        assert!(error.what.contains(why), "{wrong}: {error:?}");
        assert!(error.what.contains("libplugin.so"), "{wrong}: {error:?}");
        assert!(!error.remedy.is_empty(), "{wrong}");
        let [probed] = &probe(&plugin.options())[..] else { panic!("one plugin, one probe") };
        assert!(!probed.works && probed.detail == error.what, "{probed:?}");
    }
}

#[test]
fn what_is_no_plugin_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("text.so");
    std::fs::write(&text, "not an object").unwrap();
    // The C library is not looked for in library directories, although it is there: a path is a path.
    let expected = [
        (directory.path().join("none.so"), "there is no plugin at"),
        (directory.path().to_owned(), "is not a file"),
        (text, "cannot be loaded: "),
        (PathBuf::from("libc.so.6"), "there is no plugin at"),
        (PathBuf::new(), "there is no plugin at"),
    ];
    for (path, why) in expected {
        let error = refusal(&PluginOptions { path, bind: None });
        assert!(error.what.contains(why) && !error.remedy.is_empty(), "{error:?}");
    }
}

#[test]
fn texts_are_cut_and_cleaned() {
    let plugin = build("tests/broken.c", &["WRONG_INFO_TEXT"]);
    let driver = open(&plugin.options()).unwrap();
    let detail = &driver.info().detail;
    assert!(!detail.contains(char::is_control) && detail.ends_with('x') && detail.len() < 300, "{detail:?}");
    assert_eq!(driver.info().op_max, isize::MAX as usize);
    let error = refusal(&build("tests/broken.c", &["WRONG_OPEN_FAILS"]).options());
    assert!(error.what.ends_with(&"x".repeat(512)) && error.remedy == "x".repeat(256));
}

#[test]
fn the_signal_handlers_of_the_process_stay_its_own() {
    let caught = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        status.lines().find_map(|line| line.strip_prefix("SigCgt:").map(str::to_owned)).unwrap()
    };
    let before = caught();
    let plugin = build("tests/broken.c", &["WRONG_SIGNALS"]);
    let driver = open(&plugin.options()).unwrap();
    assert_eq!(caught(), before, "with {:?}", driver.info());
}

#[test]
fn a_key_that_cannot_be_is_refused() {
    let memory = HostMemory::allocate(4096, "key").unwrap();
    let plugin = build("tests/broken.c", &["WRONG_KEY_EMPTY"]);
    let mut driver = open(&plugin.options()).unwrap();
    let error = driver.register(&memory.span(), Access::RemoteRead).unwrap_err();
    assert!(error.what.contains("no key"), "{error:?}");
    assert!(driver.register(&memory.span(), Access::Local).is_ok(), "that one needs none");

    let plugin = build("tests/broken.c", &["WRONG_KEY_LONG"]);
    let mut driver = open(&plugin.options()).unwrap();
    let error = driver.register(&memory.span(), Access::RemoteRead).unwrap_err();
    assert!(error.what.contains("18446744073709551615 bytes where 2048 have room"), "{error:?}");
    let error = driver.register(&memory.span(), Access::RemoteRead).unwrap_err();
    assert!(error.what.contains("was closed"), "it wrote past a buffer: {error:?}");
}

/// An owner that is in order, and a user with one thing wrong.
fn pair(wrong: &str) -> (Node, Node) {
    let owner = Node::open(&super::support::example(), 8192, Access::RemoteRead);
    (owner, Node::open(&build("tests/broken.c", &[wrong]), 8192, Access::Local))
}

#[test]
fn a_plugin_that_lies_about_operations_is_closed_and_everything_posted_has_failed() {
    let expected = [
        ("WRONG_OP_UNKNOWN", "which is not posted"),
        ("WRONG_OP_TWICE", "which is not posted"),
        ("WRONG_OP_TWICE_LATER", "which is not posted"),
        ("WRONG_OP_BEFORE_POSTED", "which is not posted"),
        ("WRONG_BYTES_MORE", "it moved 101 bytes where 100 were asked for"),
        ("WRONG_COUNT", "`poll` reported 65 operations where 64 have room"),
        ("WRONG_COUNT_UNWRITTEN", "operation 0, which is not posted"),
    ];
    for (wrong, why) in expected {
        let (owner, mut user) = pair(wrong);
        let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
        let (awaited, read) = (user.op(), user.op());
        user.driver.receive(5, user.range(0, 100), awaited).unwrap();
        user.driver.read(peer, remote, 0, user.range(100, 100), read).unwrap();
        let failed = user.finish(awaited).expect_err(wrong);
        assert!(failed.contains(why), "{wrong}: {failed}");
        // The read was reported before the breach, or failed with it: but once.
        assert!(user.take(read).is_some() && user.done.is_empty(), "{wrong}: {:?}", user.done);
        assert!(!user.poll() && user.driver.arm() && user.driver.wait_fd().is_none(), "{wrong}");
        let refused = user.driver.receive(6, user.range(0, 1), 1);
        assert_eq!(refused, Err(PostError::Range), "{wrong}: its registrations are gone");
        assert!(matches!(user.driver.read(peer, remote, 0, user.range(0, 1), 1), Err(PostError::Failed(_))));
        assert!(user.driver.connect(&owner.driver.address()).unwrap_err().what.contains(why));
        assert!(user.driver.register(&user.memory.span(), Access::Local).is_err());
        user.driver.disconnect(peer);
        user.driver.forget(peer, remote);
        user.driver.deregister(user.local);
        user.driver.cancel_receive(awaited);
    }
}

#[test]
fn a_status_nobody_knows_closes_the_plugin() {
    let (owner, mut user) = pair("WRONG_STATUS");
    let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
    let Err(PostError::Failed(why)) = user.driver.read(peer, remote, 0, user.range(0, 100), 1) else {
        panic!("posted")
    };
    assert!(why.contains("`read` returned the status 99"), "{why}");
    user.poll();
    assert!(user.done.is_empty(), "it was not posted: {:?}", user.done);
}

#[test]
fn what_only_looks_odd_is_a_failed_operation() {
    for (wrong, why) in [("WRONG_BYTES_FEWER", "only 99 of 100 bytes"), ("WRONG_WHY", "xxxxxxxx")] {
        let (owner, mut user) = pair(wrong);
        let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
        for _ in 0..2 {
            let op = user.op();
            user.driver.read(peer, remote, 0, user.range(0, 100), op).unwrap();
            let failed = user.finish(op).expect_err(wrong);
            assert!(failed.contains(why) && failed.len() <= 104, "{wrong}: {failed}");
            assert!(!failed.contains(char::is_control));
        }
    }
}

#[test]
fn the_memory_of_a_plugin_that_broke_a_rule_is_kept() {
    let (owner, mut user) = pair("WRONG_OP_UNKNOWN");
    let (peer, remote) = user.meet(&owner.driver.address(), &owner.key);
    let memory = HostMemory::allocate(4096, "distrust").unwrap();
    user.driver.register(&memory.span(), Access::Local).unwrap();
    drop(memory);
    let op = user.op();
    user.driver.read(peer, remote, 0, user.range(0, 100), op).unwrap();
    assert!(user.finish(op).is_err());
    drop(user);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(maps.contains("baton-distrust"), "nothing vouches for its being left alone");
}
