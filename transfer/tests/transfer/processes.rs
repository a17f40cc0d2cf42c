//! An owner in a process of its own, which is killed, frozen and started again.

use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use baton_config::Epoch;
use baton_transfer::{
    Agent, AgentOptions, BackendKind, BlockRead, ConnectError, Destination, HostMemory, RegionId, Session,
    TransferError,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use crate::support::{
    EACH, EPOCH, HANDOFF, OWNER, Owner, assert_in_place, blocks, deadline, each, memory, name, reader,
};

const REGION_BYTES: usize = 32 << 20;
/// Marks the argument that turns the test below into the other process: `owner:PORT:EPOCH`.
const ROLE: &str = "owner:";

/// The other process: this test program, run with one more filter that no test has as its name.
#[test]
fn the_other_process() {
    let Some(role) = std::env::args().find_map(|argument| argument.strip_prefix(ROLE).map(str::to_owned))
    else {
        assert!(std::env::args().all(|argument| !argument.contains(ROLE)));
        return;
    };
    let (port, epoch) = role.split_once(':').unwrap();
    let (port, epoch) = (port.parse().unwrap(), Epoch(epoch.parse().unwrap()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let owner = runtime.block_on(async {
        let mut options = AgentOptions::new(name(OWNER));
        options.port = port;
        options.backends = [&EACH[..], &[BackendKind::Libfabric, BackendKind::Ucx]].concat();
        let owner = Owner::start_with(options, REGION_BYTES).await;
        owner.agent.set_epoch(epoch);
        owner.granted(8, 1 << 20);
        owner
    });
    println!("\n{{{}:{}", owner.agent.local_address().port(), hex(&owner.metadata));
    // Lives until the parent is gone or wants it gone.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Other {
    child: Child,
    _input: ChildStdin,
    port: u16,
    metadata: Vec<u8>,
}

impl Other {
    fn start(port: u16, epoch: Epoch) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "processes::the_other_process", "--nocapture"])
            .arg(format!("{ROLE}{port}:{epoch}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = std::io::BufReader::new(child.stdout.take().unwrap());
        let line = std::io::BufRead::lines(output)
            .find_map(|line| line.unwrap().strip_prefix('{').map(str::to_owned))
            .expect("the other process says where it is");
        let (port, metadata) = line.split_once(':').unwrap();
        let byte = |at: usize| u8::from_str_radix(&metadata[at..at + 2], 16).unwrap();
        let metadata = (0..metadata.len()).step_by(2).map(byte).collect();
        let input = child.stdin.take().unwrap();
        Self { child, _input: input, port: port.parse().unwrap(), metadata }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn kill(mut self) -> u16 {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
        self.port
    }

    async fn session(&self, reader: &Agent) -> Session {
        reader.connect(&name(OWNER), EPOCH, &self.metadata).await.unwrap()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wanted() -> Vec<BlockRead> {
    blocks(RegionId(1), 8, 1 << 20)
}

async fn read(session: &Session, into: &HostMemory, until: Instant) -> Result<(), TransferError> {
    session.read(HANDOFF, &wanted(), Destination::Memory(into), until).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_cross_between_processes() {
    let other = Other::start(0, EPOCH);
    for backend in each().await {
        let reader = reader(backend).await;
        let session = other.session(&reader).await;
        assert_eq!(session.path().backend, backend);
        let into = memory(REGION_BYTES);
        read(&session, &into, deadline()).await.unwrap();
        assert_in_place(&into, &wanted());
    }
}

/// Open descriptors of this process, and mappings of shared memory in it.
fn held() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    (descriptors, maps.lines().filter(|line| line.contains("/memfd:")).count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_held_of_a_peer_that_is_not_retained() {
    let other = Other::start(0, EPOCH);
    let into = memory(REGION_BYTES);
    for backend in EACH {
        let reader = reader(backend).await;
        let before = held();
        // It left; it began another life.
        for life in [None, Some(Epoch(EPOCH.0 + 1))] {
            let session = other.session(&reader).await;
            read(&session, &into, deadline()).await.unwrap();
            reader.retain(|_| Some(EPOCH));
            assert_eq!(reader.sessions().len(), 1, "{backend}: nothing happened to it");
            drop(session);
            let open = held();
            assert!(open.0 > before.0, "{backend}: {before:?}, {open:?}");
            assert!(backend != BackendKind::Shm || open.1 > before.1, "{before:?}, {open:?}");
            reader.retain(|_| life);
            let until = deadline();
            while held().0 > before.0 || held().1 > before.1 {
                assert!(Instant::now() < until, "{backend}: {before:?}, still {:?}", held());
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        // Whoever was missed by mistake is dialled again, and a read under way goes on.
        let session = other.session(&reader).await;
        reader.retain(|_| None);
        read(&session, &into, deadline()).await.unwrap();
        assert!(reader.sessions().is_empty());
        drop(session);
        reader.close().await;
    }
}

/// Killed in the middle of reads, started again at the same address in another life.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_owner_breaks_the_link_and_its_next_life_is_stale() {
    for backend in each().await {
        let other = Other::start(0, EPOCH);
        let socket =
            format!("{:032x}", baton_transfer::wire::Metadata::decode(&other.metadata).unwrap().incarnation);
        let mut options = AgentOptions::new(name("decode-0"));
        options.backends = vec![backend];
        let reader = Agent::start(options).await.unwrap();
        let session = other.session(&reader).await;
        let metadata = other.metadata.clone();
        let into = memory(REGION_BYTES);
        read(&session, &into, deadline()).await.unwrap();
        let mut killing = None;
        let mut other = Some(other);
        let outcome = loop {
            let outcome = read(&session, &into, deadline()).await;
            if outcome.is_err() {
                break outcome;
            }
            if let Some(other) = other.take() {
                killing = Some(tokio::task::spawn_blocking(move || other.kill()));
            }
        };
        assert!(matches!(outcome, Err(TransferError::Link { .. })), "{backend}: {outcome:?}");
        let port = killing.unwrap().await.unwrap();
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
        assert!(!sockets.contains(&socket), "the socket is gone with its process");

        let next = Other::start(port, Epoch(EPOCH.0 + 1));
        assert_eq!(next.port, port);
        if backend == BackendKind::Tcp {
            let stale = read(&session, &into, deadline()).await;
            let current = Epoch(EPOCH.0 + 1);
            assert!(
                matches!(&stale, Err(TransferError::Stale { current: Some(now), .. }) if *now == current),
                "{stale:?}"
            );
        }
        assert_eq!(session.is_usable(), backend == BackendKind::Tcp);
        reader.disconnect(&name(OWNER));
        let refused = reader.connect(&name(OWNER), EPOCH, &metadata).await;
        match backend {
            BackendKind::Shm | BackendKind::Cma => {
                assert!(matches!(refused, Err(ConnectError::Link { .. })), "{refused:?}");
            }
            _ => assert!(matches!(refused, Err(ConnectError::Stale { .. })), "{refused:?}"),
        }
    }
}

/// Its memory needs nobody's help to be read; what it would have to be asked for costs the deadline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_owner_on_this_host_is_read_from_as_before() {
    let other = Other::start(0, EPOCH);
    for backend in [BackendKind::Shm, BackendKind::Cma] {
        let reader = reader(backend).await;
        let (session, fresh) =
            (other.session(&reader).await, other.session(&self::reader(backend).await).await);
        let into = memory(REGION_BYTES);
        read(&session, &into, deadline()).await.unwrap();
        other.signal(Signal::STOP);
        let into = memory(REGION_BYTES);
        read(&session, &into, deadline()).await.unwrap();
        assert_in_place(&into, &wanted());
        let start = Instant::now();
        let unknown = read(&fresh, &into, start + Duration::from_millis(300)).await;
        assert!(matches!(unknown, Err(TransferError::Deadline { .. })), "{backend}: {unknown:?}");
        other.signal(Signal::CONT);
        read(&fresh, &into, deadline()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_owner_costs_the_deadline_and_no_more() {
    let other = Other::start(0, EPOCH);
    let reader = reader(BackendKind::Tcp).await;
    let session = other.session(&reader).await;
    let into = memory(REGION_BYTES);
    read(&session, &into, deadline()).await.unwrap();
    other.signal(Signal::STOP);
    let start = Instant::now();
    let outcome = read(&session, &into, start + Duration::from_millis(400)).await;
    assert!(matches!(outcome, Err(TransferError::Deadline { .. })), "{outcome:?}");
    assert!(start.elapsed() >= Duration::from_millis(400));
    other.signal(Signal::CONT);
    read(&session, &into, deadline()).await.unwrap();
    assert_in_place(&into, &wanted());
}
