//! An owner in a process of its own, which is frozen and killed.

use std::os::fd::BorrowedFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Signal, kill_process};

use super::*;

/// Marks the argument that turns the test below into the other process.
const ROLE: &str = "ucx-owner:";
const LEN: usize = 32 << 20;
const PING: u64 = 42;
const PONG: u64 = 43;
const MESSAGE: usize = 300_000;

/// Polls, then sleeps as the progress thread does.
fn doze(end: &mut End) {
    if end.poll() || !end.driver.arm() {
        return;
    }
    let nap = rustix::time::Timespec { tv_sec: 0, tv_nsec: end.driver.nap().as_nanos() as i64 };
    if let Some(fd) = end.driver.wait_fd() {
        // SAFETY: the driver's, which lives for the call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&nap)).unwrap();
    }
}

/// The end of an operation, whose peer is another process.
fn result_of(end: &mut End, op: u64) -> Result<usize, String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        doze(end);
        if let Some(result) = end.result(op) {
            return result;
        }
        assert!(Instant::now() < deadline, "operation {op} did not end in time");
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// The other process: this test program, run with one more filter that no test has as its name.
#[test]
fn the_other_process() {
    let Some(role) = std::env::args().find_map(|argument| argument.strip_prefix(ROLE).map(str::to_owned))
    else {
        assert!(std::env::args().all(|argument| !argument.contains(ROLE)));
        return;
    };
    let mut role = role.split(':');
    let mut next = || role.next().unwrap().to_owned();
    let (one_sided, transports, address) = (next() == "true", next(), unhex(&next()));
    let options = UcxOptions { transports: Some(transports), ..UcxOptions::default() };
    let mut owner = End::with(&options, one_sided).unwrap();
    let (read, written, messages) = (memory(LEN, 7), memory(LEN, 0), memory(MESSAGE, 0));
    let (_, read_key) = owner.driver.register(&read.span(), Access::RemoteRead).unwrap();
    let (_, write_key) = owner.driver.register(&written.span(), Access::RemoteWrite).unwrap();
    let (local, _) = owner.driver.register(&messages.span(), Access::Local).unwrap();
    let range = owner.range(local, 0, MESSAGE);
    owner.driver.receive(PING, range, 1).unwrap();
    let reader = owner.driver.connect(&address).unwrap();
    println!("\n{{{}:{}:{}", hex(&owner.driver.address()), hex(&read_key), hex(&write_key));
    // Lives until the parent is gone or wants it gone.
    let over = Arc::new(AtomicBool::new(false));
    let ends = over.clone();
    let input = std::thread::spawn(move || {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
        ends.store(true, Ordering::SeqCst);
    });
    while !over.load(Ordering::SeqCst) {
        doze(&mut owner);
        match owner.result(1) {
            Some(Ok(MESSAGE)) => owner.driver.send(reader, PONG, range, 2).unwrap(),
            Some(other) => panic!("{other:?}"),
            None => {}
        }
    }
    input.join().unwrap();
}

struct Other {
    child: Child,
    _input: ChildStdin,
    address: Vec<u8>,
    read_key: Vec<u8>,
    write_key: Vec<u8>,
}

impl Other {
    fn start(near: &End, transports: &str) -> Self {
        let one_sided = near.driver.core.context.one_sided;
        let address = hex(&near.driver.address());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "backend::ucx::tests::processes::the_other_process", "--nocapture"])
            .arg(format!("{ROLE}{one_sided}:{transports}:{address}"))
            // An experiment of UCX 1.13 that breaks the stack.
            .env("UCX_PROTO_ENABLE", "y")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = std::io::BufReader::new(child.stdout.take().unwrap());
        let line = std::io::BufRead::lines(output)
            .find_map(|line| line.unwrap().strip_prefix('{').map(str::to_owned))
            .expect("the other process says where it is");
        let mut parts = line.split(':').map(unhex);
        let mut next = || parts.next().unwrap();
        let (address, read_key, write_key) = (next(), next(), next());
        let input = child.stdin.take().unwrap();
        Self { child, _input: input, address, read_key, write_key }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Stops it, and returns once it stands still.
    fn freeze(&self) {
        self.signal(Signal::STOP);
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
            if status.lines().any(|line| line.starts_with("State:\tT")) {
                return;
            }
            assert!(Instant::now() < deadline, "it does not stop");
            std::thread::yield_now();
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every way to reach another process of this host.
fn every_way(test: impl Fn(End, Other)) {
    for (transports, one_sided) in [("tcp", false), ("tcp,cma", false), ("tcp", true), ("tcp,cma", true)] {
        let options = UcxOptions { transports: Some(transports.to_owned()), ..UcxOptions::default() };
        let Some(near) = End::with(&options, one_sided) else { return };
        println!("{}", near.driver.info.detail);
        let other = Other::start(&near, transports);
        test(near, other);
    }
}

#[test]
fn another_process_is_read_written_and_talked_to() {
    every_way(|mut near, other| {
        let block = 1 << 20;
        let here = memory(LEN, 0);
        let (local, _) = near.driver.register(&here.span(), Access::Local).unwrap();
        let peer = near.driver.connect(&other.address).unwrap();
        let remote = near.driver.import(peer, &other.read_key).unwrap();
        for at in 0..32 {
            let range = near.range(local, (31 - at) * block, block);
            near.driver.read(peer, remote, (at * block) as u64, range, at as u64).unwrap();
        }
        for at in 0..32 {
            assert_eq!(result_of(&mut near, at), Ok(block));
        }
        let (got, expected) = (bytes(&here), pattern(LEN, 7));
        for at in 0..32 {
            assert!(got[(31 - at) * block..][..block] == expected[at * block..][..block], "block {at}");
        }
        let target = near.driver.import(peer, &other.write_key).unwrap();
        for at in 0..32 {
            let range = near.range(local, at * block, block);
            near.driver.write(peer, target, (at * block) as u64, range, 100 + at as u64).unwrap();
        }
        for at in 0..32 {
            assert_eq!(result_of(&mut near, 100 + at), Ok(block));
        }
        let range = near.range(local, block, MESSAGE);
        here.write(block, &pattern(MESSAGE, 99));
        let back = near.range(local, 4 * block, MESSAGE);
        near.driver.receive(PONG, back, 201).unwrap();
        near.driver.send(peer, PING, range, 200).unwrap();
        assert_eq!(result_of(&mut near, 201), Ok(MESSAGE));
        assert_eq!(result_of(&mut near, 200), Ok(MESSAGE));
        assert!(bytes(&here)[4 * block..][..MESSAGE] == pattern(MESSAGE, 99));
    });
}

#[test]
fn a_frozen_process_writes_nothing_after_it_was_disconnected() {
    every_way(|mut near, other| {
        let here = memory(LEN, 0);
        let (local, _) = near.driver.register(&here.span(), Access::Local).unwrap();
        let peer = near.driver.connect(&other.address).unwrap();
        let remote = near.driver.import(peer, &other.read_key).unwrap();
        let range = near.range(local, 0, 1);
        near.driver.read(peer, remote, 0, range, 1000).unwrap();
        assert_eq!(result_of(&mut near, 1000), Ok(1));
        // Half of them may be under way when it freezes, the others are posted to a frozen process.
        let block = 1 << 20;
        for at in 0..32 {
            if at == 16 {
                near.poll();
                other.freeze();
            }
            let range = near.range(local, at * block, block);
            near.driver.read(peer, remote, (at * block) as u64, range, at as u64).unwrap();
        }
        near.driver.receive(PONG, near.range(local, 0, MESSAGE), 500).unwrap();
        for _ in 0..100 {
            near.poll();
        }
        let started = Instant::now();
        near.driver.disconnect(peer);
        assert!(started.elapsed() < CALL_MAX);
        assert_eq!(near.driver.dead, None);
        near.driver.cancel_receive(500);
        here.write(0, &vec![0xee; LEN]);
        near.poll();
        let mut reported: Vec<_> = near.done.drain(..).map(|done| done.op).collect();
        reported.sort_unstable();
        assert_eq!(reported, (0..32).chain([500]).collect::<Vec<_>>());
        other.signal(Signal::CONT);
        let deadline = Instant::now() + Duration::from_millis(300);
        while Instant::now() < deadline {
            doze(&mut near);
        }
        assert!(bytes(&here).iter().all(|byte| *byte == 0xee));
        assert!(near.done.is_empty());
    });
}

#[test]
fn a_killed_process_is_an_error_in_time() {
    every_way(|mut near, other| {
        let here = memory(LEN, 0);
        let (local, _) = near.driver.register(&here.span(), Access::Local).unwrap();
        let peer = near.driver.connect(&other.address).unwrap();
        let remote = near.driver.import(peer, &other.read_key).unwrap();
        let range = near.range(local, 0, 1);
        near.driver.read(peer, remote, 0, range, 1000).unwrap();
        assert_eq!(result_of(&mut near, 1000), Ok(1));
        other.freeze();
        for at in 0..4 {
            near.driver.read(peer, remote, 0, near.range(local, 0, 4096), at).unwrap();
        }
        other.signal(Signal::KILL);
        let ended = (0..4).map(|at| result_of(&mut near, at)).collect::<Vec<_>>();
        // The kernel copies from a frozen process, where UCX reads that way.
        let copied = near.driver.core.context.one_sided && near.driver.info.detail.contains("cma");
        assert!(copied || ended.iter().all(Result::is_err), "{ended:?}");
        if near.driver.read(peer, remote, 0, near.range(local, 0, 1), 5).is_ok() {
            assert!(result_of(&mut near, 5).is_err());
        }
        let again = near.driver.read(peer, remote, 0, near.range(local, 0, 1), 7);
        assert!(matches!(again, Err(PostError::Failed(_))), "{again:?}");
        near.driver.disconnect(peer);
        // A peer that was never reached.
        let gone = near.driver.connect(&other.address);
        if let Ok(gone) = gone {
            let posted = near
                .driver
                .import(gone, &other.read_key)
                .is_ok_and(|remote| near.driver.read(gone, remote, 0, near.range(local, 0, 1), 6).is_ok());
            assert!(!posted || result_of(&mut near, 6).is_err());
            near.driver.disconnect(gone);
        }
        assert!(near.driver.core.slots.busy().is_empty());
    });
}

#[test]
fn reads_that_a_death_interrupts_all_end() {
    every_way(|mut near, other| {
        let here = memory(LEN, 0);
        let (local, _) = near.driver.register(&here.span(), Access::Local).unwrap();
        let peer = near.driver.connect(&other.address).unwrap();
        let remote = near.driver.import(peer, &other.read_key).unwrap();
        let block = 1 << 20;
        for at in 0..256 {
            let offset = at % 32 * block;
            let range = near.range(local, offset, block);
            near.driver.read(peer, remote, offset as u64, range, at as u64).unwrap();
        }
        // Amid the reads: the first are done, the last cannot be.
        let first = result_of(&mut near, 0);
        assert_eq!(first, Ok(block));
        other.signal(Signal::KILL);
        let ended = (1..256).map(|at| result_of(&mut near, at)).collect::<Vec<_>>();
        assert!(ended.iter().flatten().all(|moved| *moved == block));
        assert!(ended.iter().any(Result::is_err), "it died too late to interrupt anything");
        near.driver.disconnect(peer);
        assert!(near.driver.core.slots.busy().is_empty());
    });
}
