//! Processes by number: signals, liveness, open files.

use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process, pidfd_getfd, pidfd_open};

/// Sends a signal.
///
/// # Panics
/// When there is no such process.
pub fn signal(pid: u32, signal: Signal) {
    let target = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(target, signal).expect("the process is there to be signalled");
}

/// Whether the process exists and is not a zombie.
pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X'])))
}

/// Processes whose parent is `pid`.
pub fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

/// Links of the process' open files whose target contains `needle`, as paths that can be opened.
pub fn open_files(pid: u32, needle: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| {
            std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains(needle))
        })
        .map(|entry| entry.path())
        .collect()
}

/// A connection of another process.
#[derive(Debug)]
pub struct Connection {
    /// Its own end.
    pub local: SocketAddr,
    /// The other one.
    pub peer: SocketAddr,
    /// Whether small pieces are sent at once (`TCP_NODELAY`).
    pub nodelay: bool,
}

/// The TCP connections that a process has open.
///
/// # Errors
/// When the system does not let us look: that needs the right to trace the process.
pub fn connections(pid: u32) -> std::io::Result<Vec<Connection>> {
    let target = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(std::io::ErrorKind::NotFound)?;
    let process = pidfd_open(target, PidfdFlags::empty())?;
    let number = |path: PathBuf| path.file_name()?.to_str()?.parse().ok();
    let mut found = Vec::new();
    for number in open_files(pid, "socket:").into_iter().filter_map(number) {
        let socket = match pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) {
            Ok(socket) => TcpStream::from(socket),
            // Closed in the meantime.
            Err(Errno::BADF) => continue,
            Err(error) => return Err(error.into()),
        };
        // Listeners have no other end, and sockets of other kinds no address.
        if let (Ok(local), Ok(peer)) = (socket.local_addr(), socket.peer_addr()) {
            found.push(Connection { local, peer, nodelay: socket.nodelay()? });
        }
    }
    Ok(found)
}

/// CPU seconds (user and system) the process has used.
pub fn cpu_seconds(pid: u32) -> f64 {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return 0.0 };
    let Some((_, rest)) = stat.rsplit_once(") ") else { return 0.0 };
    let ticks: u64 = rest.split(' ').skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Waits until `ready` gives a value.
///
/// # Panics
/// When it has given none by the deadline; `what` is named.
pub async fn eventually<T>(what: &str, within: Duration, mut ready: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = ready().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
