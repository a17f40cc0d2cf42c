//! An owner in a process of its own, which is frozen and killed.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, kill_process};

use super::*;

const LEN: usize = 32 << 20;
/// Marks the argument that turns the test below into the other process: `libfabric-owner:PROVIDER`.
const ROLE: &str = "libfabric-owner:";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
}

/// The other process: this test program, run with one more filter that no test has as its name.
#[test]
fn the_other_process() {
    let role = std::env::args().find_map(|argument| argument.strip_prefix(ROLE).map(str::to_owned));
    let Some(provider) = role else {
        assert!(std::env::args().all(|argument| !argument.contains(ROLE)));
        return;
    };
    let mut owner = End::new(&options(&provider), LEN, Access::RemoteRead, Tuning::USUAL);
    owner.fill(42);
    let (_, for_writing) = owner.driver.register(&owner.memory.span(), Access::RemoteWrite).unwrap();
    println!("\n{{{}:{}:{}", hex(&owner.driver.address()), hex(&owner.key), hex(&for_writing));
    // Each line asks for a message: ADDRESS:TAG:LEN. The end of the input ends the process.
    let (lines, asked) = std::sync::mpsc::sync_channel::<String>(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            lines.send(line).unwrap();
        }
    });
    let mut peers = std::collections::HashMap::new();
    loop {
        match asked.try_recv() {
            Ok(line) => {
                let parts: Vec<_> = line.split(':').collect();
                let [address, tag, len] = parts[..] else { panic!("{line}") };
                let peer = *peers
                    .entry(address.to_owned())
                    .or_insert_with(|| owner.driver.connect(&unhex(address)).unwrap());
                let (from, tag) = (owner.range(0, len.parse().unwrap()), tag.parse().unwrap());
                post_alone(&mut owner, |end| end.driver.send(peer, tag, from, tag));
            }
            Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
            Err(std::sync::mpsc::TryRecvError::Empty) => {}
        }
        owner.poll();
        sleep(&mut owner, Duration::from_millis(1));
    }
}

/// Sleeps as the progress thread does: until the descriptor is readable, or for so long.
fn sleep(end: &mut End, most: Duration) -> bool {
    if !end.driver.arm() {
        return false;
    }
    let timeout = Timespec { tv_sec: 0, tv_nsec: most.as_nanos() as _ };
    let Some(fd) = end.driver.wait_fd() else {
        std::thread::park_timeout(most);
        return false;
    };
    // SAFETY: the descriptor belongs to the driver, which outlives the call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&timeout)).unwrap() > 0
}

struct Other {
    child: Child,
    input: ChildStdin,
    _output: BufReader<ChildStdout>,
    address: Vec<u8>,
    key: Vec<u8>,
    for_writing: Vec<u8>,
}

impl Other {
    fn start(provider: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "backend::libfabric::tests::two_processes::the_other_process", "--nocapture"])
            .arg(format!("{ROLE}{provider}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let line = loop {
            let mut line = String::new();
            assert!(output.read_line(&mut line).unwrap() > 0, "the other process says where it is");
            if let Some(said) = line.trim().strip_prefix('{') {
                break said.to_owned();
            }
        };
        let parts: Vec<_> = line.split(':').map(unhex).collect();
        let [address, key, for_writing] = parts.try_into().unwrap();
        let input = child.stdin.take().unwrap();
        Self { child, input, _output: output, address, key, for_writing }
    }

    fn ask_message(&mut self, reader: &End, tag: u64, len: usize) {
        writeln!(self.input, "{}:{tag}:{len}", hex(&reader.driver.address())).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// A reader that has read once, so that its connection is there.
    fn reader(&self, provider: &str) -> (End, PeerId, RemoteId) {
        let mut reader = End::new(&options(provider), LEN, Access::Local, Tuning::USUAL);
        let peer = reader.driver.connect(&self.address).unwrap();
        let remote = reader.driver.import(peer, &self.key).unwrap();
        let to = reader.range(0, 4096);
        post_alone(&mut reader, |end| end.driver.read(peer, remote, 0, to, u64::MAX));
        wait(&mut reader, "the first read", |end| !end.done.is_empty());
        assert_eq!(std::mem::take(&mut reader.done), [Done { op: u64::MAX, result: Ok(4096) }], "{provider}");
        (reader, peer, remote)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Of the provider `shm`, 16 MiB each: a process that is killed leaves them.
        let own = format!("{}:", self.child.id());
        for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&own) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// Polls and sleeps until the condition holds, or panics.
fn wait(end: &mut End, what: &str, mut holds: impl FnMut(&mut End) -> bool) {
    let begun = Instant::now();
    while !holds(end) {
        sleep(end, Duration::from_millis(1));
        end.poll();
        assert!(begun.elapsed() < PATIENCE, "no end: {what}");
    }
}

/// Posts reads of one MiB all over the memory, as many as are taken at once.
fn post_reads(reader: &mut End, peer: PeerId, remote: RemoteId) -> usize {
    let mut posted = 0;
    for op in 0..LEN >> 20 {
        let to = reader.range(op << 20, 1 << 20);
        posted += usize::from(reader.driver.read(peer, remote, (op << 20) as u64, to, op as u64).is_ok());
    }
    posted
}

/// Posts, and polls while the queues are full.
fn post_alone(end: &mut End, mut attempt: impl FnMut(&mut End) -> Result<(), PostError>) {
    let begun = Instant::now();
    loop {
        match attempt(end) {
            Err(PostError::Again) => end.poll(),
            other => return assert_eq!(other, Ok(())),
        }
        assert!(begun.elapsed() < PATIENCE, "the queues stay full");
    }
}

#[test]
fn blocks_and_messages_cross_processes() {
    for provider in providers_and_shm() {
        let mut other = Other::start(provider);
        let (mut reader, peer, remote) = other.reader(provider);
        for op in 0..32 {
            let (from, to) = ((op << 20) as u64, reader.range(op << 20, 1 << 20));
            post_alone(&mut reader, |end| end.driver.read(peer, remote, from, to, op as u64));
        }
        wait(&mut reader, provider, |end| end.done.len() == 32);
        assert!(reader.done.iter().all(|done| done.result == Ok(1 << 20)), "{provider}: {:?}", reader.done);
        assert!(reader.bytes(0, LEN) == pattern(42, LEN), "{provider}");
        if reader.driver.info().write {
            reader.done.clear();
            write_and_read_back(&mut reader, peer, remote, &other.for_writing);
        }

        reader.done.clear();
        for (tag, len) in [(7, 1), (8, 16 << 10), (9, 1 << 20)] {
            let to = reader.range(tag << 20, len + 3);
            reader.driver.receive(tag as u64, to, tag as u64).unwrap();
            other.ask_message(&reader, tag as u64, len);
        }
        wait(&mut reader, provider, |end| end.done.len() == 3);
        reader.done.clear();
        let whole = reader.range(16 << 20, 1 << 20);
        post_alone(&mut reader, |end| end.driver.read(peer, remote, 0, whole, 1));
        wait(&mut reader, provider, |end| end.done.len() == 1);
        for (tag, len) in [(7, 1), (8, 16 << 10), (9, 1 << 20)] {
            assert!(reader.bytes(tag << 20, len) == reader.bytes(16 << 20, len), "{provider}: message {tag}");
        }
    }
}

fn write_and_read_back(reader: &mut End, peer: PeerId, remote: RemoteId, for_writing: &[u8]) {
    reader.fill(43);
    let for_writing = reader.driver.import(peer, for_writing).unwrap();
    for (op, len) in [(0, 1 << 20), (1, 100), (2, 65536)] {
        let (to, from) = ((op << 20) as u64, reader.range(op << 20, len));
        post_alone(reader, |end| end.driver.write(peer, for_writing, to, from, op as u64));
    }
    wait(reader, "writes", |end| end.done.len() == 3);
    assert!(reader.done.iter().all(|done| done.result.is_ok()), "{:?}", reader.done);
    let back = reader.range(4 << 20, 3 << 20);
    post_alone(reader, |end| end.driver.read(peer, remote, 0, back, 9));
    wait(reader, "what was written", |end| end.done.len() == 4);
    for (op, len) in [(0, 1 << 20), (1, 100), (2, 65536)] {
        let (there, ours) = (reader.bytes((4 + op) << 20, len), reader.bytes(op << 20, len));
        assert!(there == ours, "write {op}");
    }
}

#[test]
fn the_descriptor_wakes_who_sleeps() {
    for provider in providers() {
        let other = Other::start(provider);
        let (mut reader, peer, remote) = other.reader(provider);
        if reader.driver.wait_fd().is_none() {
            println!("skipped {provider}: it has no descriptor to wait on");
            continue;
        }
        let (mut woken, mut slept) = (0, 0);
        for op in 0..50 {
            // Long enough that it is not done before anybody sleeps.
            reader.driver.read(peer, remote, 0, reader.range(0, 1 << 20), op).unwrap();
            let begun = Instant::now();
            while reader.done.len() as u64 == op {
                if sleep(&mut reader, Duration::from_millis(900)) {
                    woken += 1;
                } else if begun.elapsed() > Duration::from_millis(900) {
                    slept += 1;
                }
                reader.poll();
                assert!(begun.elapsed() < PATIENCE);
            }
        }
        println!("{provider}: 50 reads, woken {woken} times, overslept {slept} times");
        assert!(woken > 0, "{provider}: never woken");
        // The contract lets a driver miss some: naps are short while operations are outstanding.
        assert!(slept < 10, "{provider}: overslept {slept} of 50");
        reader.poll();
        // Idle, it sleeps.
        let idle = (0..50).any(|_| {
            reader.poll();
            !sleep(&mut reader, Duration::from_millis(20)) && reader.driver.arm()
        });
        assert!(idle, "{provider}: the descriptor of an idle driver is readable");
    }
}

#[test]
fn disconnecting_a_frozen_peer_ends_what_it_could_still_answer() {
    for provider in providers_and_shm() {
        let other = Other::start(provider);
        let (mut reader, peer, remote) = other.reader(provider);
        let quiet = vec![0xee; LEN];
        reader.memory.write(0, &quiet);
        // It is frozen with requests in its queue, some of which it may be answering.
        let posted = post_reads(&mut reader, peer, remote);
        reader.poll();
        other.signal(Signal::STOP);
        for _ in 0..100 {
            reader.poll();
        }
        let finished = reader.done.len();
        let begun = Instant::now();
        reader.driver.disconnect(peer);
        let took = begun.elapsed();
        assert!(took < crate::backend::fabric::driver::CALL_MAX, "{provider}: {took:?}");
        reader.memory.write(0, &quiet);
        reader.poll();
        println!("{provider}: {finished} of {posted} were done, disconnecting took {took:?}");
        assert_eq!(reader.done.len(), posted, "{provider}: each once");
        assert!(reader.done[finished..].iter().all(|done| done.result.is_err()), "{provider}");
        other.signal(Signal::CONT);
        // Another connection shows that it is at work again.
        let again = reader.driver.connect(&other.address).unwrap();
        let remote = reader.driver.import(again, &other.key).unwrap();
        reader.done.clear();
        let to = reader.range(0, 4096);
        post_alone(&mut reader, |end| end.driver.read(again, remote, 0, to, 77));
        wait(&mut reader, provider, |end| !end.done.is_empty());
        for _ in 0..50 {
            sleep(&mut reader, Duration::from_millis(1));
            reader.poll();
        }
        assert_eq!(reader.done, [Done { op: 77, result: Ok(4096) }], "{provider}");
        assert!(
            reader.bytes(4096, LEN - 4096) == quiet[4096..],
            "{provider}: written after it was disconnected"
        );
    }
}

#[test]
fn operations_of_a_killed_peer_end() {
    for provider in providers_and_shm() {
        let mut other = Other::start(provider);
        let (mut reader, peer, remote) = other.reader(provider);
        let posted = post_reads(&mut reader, peer, remote);
        other.child.kill().unwrap();
        other.child.wait().unwrap();
        let begun = Instant::now();
        while reader.done.len() < posted && begun.elapsed() < Duration::from_secs(1) {
            sleep(&mut reader, Duration::from_millis(1));
            reader.poll();
        }
        let by_itself = reader.done.len();
        println!("{provider}: {by_itself} of {posted} ended by themselves: {:?}", reader.done.last());
        let refused = reader.driver.read(peer, remote, 0, reader.range(0, 4096), 99);
        if by_itself > 0 && reader.done.iter().any(|done| done.result.is_err()) {
            assert!(matches!(refused, Err(PostError::Failed(_))), "{provider}: {refused:?}");
        }
        let all = posted + usize::from(refused.is_ok());
        reader.driver.disconnect(peer);
        reader.poll();
        assert_eq!(reader.done.len(), all, "{provider}: each once");
        let mut ops: Vec<_> = reader.done.iter().map(|done| done.op).collect();
        ops.sort_unstable();
        ops.dedup();
        assert_eq!(ops.len(), all, "{provider}: each once");
        for _ in 0..50 {
            sleep(&mut reader, Duration::from_millis(1));
            reader.poll();
        }
        assert_eq!(reader.done.len(), all, "{provider}: each once");
    }
}
