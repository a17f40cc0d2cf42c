//! The example plugin between two processes, one of which is stopped and killed.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

use super::support::{Built, Node, deadline, example, pattern};
use crate::backend::fabric::driver::{Access, Driver, LocalRange, PostError};
use crate::backend::plugin::{PluginOptions, open};
use crate::memory::HostMemory;

const LEN: usize = 1 << 20;
/// Of the other's memory.
const SEED: u64 = 9;
/// The other echoes what it gets under the first tag to the second.
const TAGS: (u64, u64) = (100, 200);
/// Marks the argument that turns the test below into the other process: `plugin-owner:PATH`.
const ROLE: &str = "plugin-owner:";

/// The other process: this test program, run with one more filter that no test has as its name.
#[test]
fn the_other_process() {
    let Some(path) = std::env::args().find_map(|argument| argument.strip_prefix(ROLE).map(PathBuf::from))
    else {
        assert!(std::env::args().all(|argument| !argument.contains(ROLE)));
        return;
    };
    let mut driver = open(&PluginOptions { path, bind: None }).unwrap();
    let memory = HostMemory::allocate(LEN, "other").unwrap();
    memory.write(0, &pattern(SEED, LEN));
    let (local, key) = driver.register(&memory.span(), Access::RemoteWrite).unwrap();
    println!("\n{{{}:{}", hex(&driver.address()), hex(&key));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let parent = driver.connect(&unhex(line.trim())).unwrap();
    // Messages come and go through a memory of their own.
    let letters = HostMemory::allocate(LEN, "letters").unwrap();
    let (place, _) = driver.register(&letters.span(), Access::Local).unwrap();
    driver.receive(TAGS.0, LocalRange { id: place, offset: 0, len: 64 << 10 }, 1).unwrap();
    println!("\n{{awaiting:");
    let mut done = Vec::new();
    while !sleep_until_something_happens(&mut *driver) {
        while driver.poll(&mut done) {}
        for end in done.drain(..) {
            if let (1, Ok(len)) = (end.op, end.result) {
                driver.send(parent, TAGS.1, LocalRange { id: place, offset: 0, len }, 2).unwrap();
            }
        }
    }
    driver.deregister(local);
}

/// Whether it was the parent, who is gone.
fn sleep_until_something_happens(driver: &mut dyn Driver) -> bool {
    if !driver.arm() {
        return false;
    }
    // SAFETY: the driver, borrowed, keeps it open.
    let driver_fd = unsafe { BorrowedFd::borrow_raw(driver.wait_fd().unwrap()) };
    let stdin = std::io::stdin();
    let mut fds =
        [PollFd::new(&driver_fd, PollFlags::IN), PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
    poll(&mut fds, None::<&Timespec>).unwrap();
    !fds[1].revents().is_empty()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect()
}

struct Other {
    child: Child,
    address: Vec<u8>,
    key: Vec<u8>,
    _input: ChildStdin,
}

impl Other {
    /// Starts it and lets it know who `user` is.
    fn start(plugin: &Built, user: &Node) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "backend::plugin::tests::processes::the_other_process", "--nocapture"])
            .arg(format!("{ROLE}{}", plugin.path.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next = || lines.find_map(|line| line.unwrap().strip_prefix('{').map(str::to_owned)).unwrap();
        let line = next();
        let (address, key) = line.split_once(':').unwrap();
        writeln!(input, "{}", hex(&user.driver.address())).unwrap();
        assert_eq!(next(), "awaiting:");
        Self { address: unhex(address), key: unhex(key), child, _input: input }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn reads_writes_and_messages_between_two_processes() {
    let plugin = example();
    let mut user = Node::open(&plugin, LEN, Access::Local);
    let other = Other::start(&plugin, &user);
    let (peer, remote) = user.meet(&other.address, &other.key);

    let whole = user.op();
    user.driver.read(peer, remote, 0, user.range(0, LEN), whole).unwrap();
    assert_eq!(user.finish(whole), Ok(LEN));
    assert!(user.bytes(0, LEN) == pattern(SEED, LEN));

    let (write, back) = (user.op(), user.op());
    user.memory.write(0, &pattern(5, 3 << 10));
    user.driver.write(peer, remote, 1000, user.range(0, 3 << 10), write).unwrap();
    assert_eq!(user.finish(write), Ok(3 << 10), "the other sleeps until it is asked");
    user.driver.read(peer, remote, 0, user.range(0, LEN), back).unwrap();
    assert_eq!(user.finish(back), Ok(LEN));
    let mut expected = pattern(SEED, LEN);
    expected[1000..1000 + (3 << 10)].copy_from_slice(&pattern(5, 3 << 10));
    assert!(user.bytes(0, LEN) == expected, "delivered, to its place only");

    let (echo, send) = (user.op(), user.op());
    let max = user.driver.info().message_max;
    user.driver.receive(TAGS.1, user.range(max, max), echo).unwrap();
    user.driver.send(peer, TAGS.0, user.range(0, max), send).unwrap();
    assert_eq!((user.finish(send), user.finish(echo)), (Ok(max), Ok(max)));
    assert!(user.bytes(max, max) == user.bytes(0, max));
}

#[test]
fn a_peer_that_is_killed_fails_what_is_posted_and_what_comes_after() {
    let plugin = example();
    let mut user = Node::open(&plugin, LEN, Access::Local);
    let mut other = Other::start(&plugin, &user);
    let (peer, remote) = user.meet(&other.address, &other.key);
    other.signal(Signal::STOP);
    // A signal takes effect a moment after it was sent.
    let stopped = rustix::process::WaitOptions::UNTRACED;
    let pid = rustix::process::Pid::from_child(&other.child);
    let status = rustix::process::waitpid(Some(pid), stopped).unwrap().expect("it was waited for").1;
    assert!(status.stopped(), "{status:?}");
    let (write, frozen) = (user.op(), user.op());
    user.driver.write(peer, remote, 0, user.range(0, 100), write).unwrap();
    user.driver.read(peer, remote, 0, user.range(0, 100), frozen).unwrap();
    assert_eq!(user.finish(frozen), Ok(100), "a read needs nothing of its owner's threads");
    assert!(user.take(write).is_none(), "a write does");
    other.signal(Signal::KILL);
    let failed = user.finish(write).expect_err("nobody took it");
    assert!(!failed.is_empty());
    other.child.wait().unwrap();
    let until = deadline();
    loop {
        let op = user.op();
        match user.driver.read(peer, remote, 0, user.range(0, 100), op) {
            Ok(()) => assert!(user.finish(op).is_err(), "there is nothing to read"),
            Err(PostError::Failed(_)) => break,
            Err(error) => panic!("{error:?}"),
        }
        assert!(Instant::now() < until);
    }
    assert!(user.driver.connect(&other.address).is_err());
    user.driver.disconnect(peer);
    user.poll();
    assert!(user.done.is_empty(), "everything was reported once: {:?}", user.done);
}
