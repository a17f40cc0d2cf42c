//! The reading side of `shm` and `cma`: copies out of a peer's mapped memory, or has the kernel do so.

mod write;

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_config::Epoch;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Pid;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use self::write::Lendings;
use super::cma::{self, Batch};
use super::control::{INCARNATION_AT, PeerControl, Shown};
use super::pass::{self, Passed};
use super::regions::{PeerRegion, Regions};
use crate::agent::RegionId;
use crate::backend::{CONNECT_TIMEOUT, Fault, Pair, ReadJob};
use crate::error::{LinkError, Refusal};
use crate::memory::{MemoryError, PeerMemory, Process, copy_from_process};
use crate::session::Destination;
use crate::wire::{self, Kind, WireError};

/// How long a read copies before other tasks get a turn.
const TURN: Duration = Duration::from_micros(250);
/// How old the last sign of life may be when a read starts. Nothing is lost with a peer that ended meanwhile: what is
/// mapped stays as it was, and a copy by address fails.
const LIFE_NS: u64 = 50_000;
/// Bytes copied between two looks at the clock, each of which takes about as long as copying 1 KiB.
const LOOK_BYTES: u64 = 64 << 10;
/// Most bytes of a read that is done at once: less than a turn's.
const AT_ONCE_BYTES: u64 = 1 << 20;

/// How a peer's regions are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Mapped; what cannot be mapped is copied by the kernel.
    Map,
    /// Copied by the kernel.
    Copy,
}

/// A peer's memory as reached from here.
pub(crate) struct ShmLink {
    pair: Pair,
    access: Access,
    control: PeerControl,
    regions: Regions,
    /// The peer's process, once something must be copied by address.
    process: OnceLock<Process>,
    /// A second handle of the socket: its closing is the peer's end.
    life: OwnedFd,
    opened: Instant,
    /// When the socket was last looked at and open, in nanoseconds since `opened`.
    alive_ns: AtomicU64,
    requests: Mutex<Requests>,
}

/// A read at work.
struct Reading<'a> {
    job: &'a ReadJob<'a>,
    shown: Shown,
    corrupt: Vec<usize>,
    staging: Vec<u8>,
    /// Blocks the kernel is still to copy.
    batch: Batch,
    /// The block to be copied next.
    next: usize,
    /// When this turn began.
    turn: Instant,
    /// Bytes that were moved when the clock was looked at last.
    looked: u64,
}

impl<'a> Reading<'a> {
    fn new(job: &'a ReadJob<'a>, shown: Shown, turn: Instant) -> Self {
        let (corrupt, staging, batch) = (Vec::new(), Vec::new(), Batch::default());
        Self { job, shown, corrupt, staging, batch, next: 0, turn, looked: 0 }
    }
}

/// Why a read stops for a while.
enum Pause {
    /// This region is not known yet.
    Ask(RegionId),
    /// Other tasks should get a turn.
    Turn,
}

struct Requests {
    stream: UnixStream,
    next_seq: u64,
    lendings: Box<Lendings>,
}

impl Requests {
    /// Asks for a region, to map it or for its place.
    async fn ask(&mut self, kind: Kind, id: RegionId, epoch: Epoch) -> Result<Passed, Fault> {
        let seq = self.send(kind, epoch, &id.0.to_le_bytes()).await?;
        self.answer(seq).await?
    }

    /// Sends a request; its number.
    async fn send(&mut self, kind: Kind, epoch: Epoch, payload: &[u8]) -> Result<u64, Fault> {
        let seq = self.next_seq;
        self.next_seq += 1;
        let frame = wire::encode_frame(kind, epoch, seq, payload);
        self.stream.write_all(&frame).await.map_err(LinkError::io("asking for memory"))?;
        Ok(seq)
    }

    /// Receives the answer to a request, which may be a refusal.
    async fn answer(&mut self, seq: u64) -> Result<Result<Passed, Fault>, Fault> {
        const ANSWERS: [Kind; 4] = [Kind::Mapped, Kind::Located, Kind::Lent, Kind::Written];
        loop {
            let (header, passed) = pass::receive(&self.stream, &ANSWERS).await?;
            // An earlier answer belongs to a read or a write that was dropped while it waited.
            if header.seq == seq {
                return Ok(passed);
            }
        }
    }
}

impl ShmLink {
    /// Meets the peer at its socket and maps its control memory: proof that both share host, user and namespace.
    pub(crate) async fn open(pair: Pair, access: Access) -> Result<Self, Fault> {
        let connect = async {
            let mut stream = connect(pair.incarnation).map_err(LinkError::io("connecting to its socket"))?;
            let hello = wire::encode_frame(Kind::Hello, pair.epoch, 0, &pair.hello(None).encode());
            stream.write_all(&hello).await.map_err(LinkError::io("sending a hello"))?;
            let Passed::File(file, len) = pass::receive(&stream, &[Kind::Welcome]).await?.1? else {
                return Err(Fault::protocol(WireError::Kind));
            };
            let memory = PeerMemory::map(file, len, "a peer's control").map_err(LinkError::Memory)?;
            let control = PeerControl::new(memory).ok_or(LinkError::Closed)?;
            let life = stream.as_fd().try_clone_to_owned().map_err(LinkError::io("keeping its socket"))?;
            let lendings = Lendings::new().map(Box::new).map_err(LinkError::io("asking for random bytes"))?;
            let requests = Mutex::new(Requests { stream, next_seq: 1, lendings });
            let (regions, process) = (Regions::default(), OnceLock::new());
            let link = Self {
                pair: pair.clone(),
                access,
                control,
                regions,
                process,
                life,
                opened: Instant::now(),
                alive_ns: AtomicU64::new(0),
                requests,
            };
            if access == Access::Copy {
                link.find_process(&mut *link.requests.lock().await).await?;
            }
            Ok(link)
        };
        timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| {
            Err(LinkError::io("connecting to its socket")(ErrorKind::TimedOut.into()).into())
        })
    }

    /// Whether the peer's process still holds its end of the socket.
    pub(crate) fn is_alive(&self) -> bool {
        let peeked = rustix::net::recv(&self.life, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        match peeked {
            Ok((_, count)) => count > 0,
            Err(errno) => errno == rustix::io::Errno::AGAIN || errno == rustix::io::Errno::INTR,
        }
    }

    /// Reads without waiting what is short and goes to memory, from regions that are known; the blocks that failed their
    /// digest. `None`: it was none of that, or something stood against it, and [`Self::read`] starts anew.
    pub(crate) fn read_at_once(&self, job: &ReadJob<'_>) -> Option<Vec<usize>> {
        let bytes: u64 = job.blocks.iter().map(|block| u64::from(block.source.len)).sum();
        if bytes > AT_ONCE_BYTES || !matches!(job.into, Destination::Memory(_)) {
            return None;
        }
        let mut reading = self.begin(job).ok()?;
        match self.advance(&mut reading) {
            Ok(None) => Some(reading.corrupt),
            Ok(Some(_)) | Err(_) => None,
        }
    }

    /// Reads; waits only where it has to ask for something, or when others should get a turn.
    pub(crate) async fn read(&self, job: &ReadJob<'_>) -> Result<Vec<usize>, Fault> {
        let mut reading = self.begin(job)?;
        while let Some(pause) = self.advance(&mut reading)? {
            match pause {
                Pause::Ask(region) => self.find_region(region).await?,
                Pause::Turn => {
                    tokio::task::yield_now().await;
                    reading.turn = Instant::now();
                    self.check_life(reading.turn)?;
                }
            }
        }
        Ok(reading.corrupt)
    }

    fn begin<'a>(&self, job: &'a ReadJob<'a>) -> Result<Reading<'a>, Fault> {
        let started = job.progress.started();
        self.check_life(started)?;
        let shown = self.control.find(job.handoff).ok_or(Fault::Refused(Refusal::NotGranted))?;
        Ok(Reading::new(job, shown, started))
    }

    /// Copies blocks; why it stops before the last one.
    fn advance(&self, reading: &mut Reading<'_>) -> Result<Option<Pause>, Fault> {
        let job = reading.job;
        let mut region: Option<(RegionId, &PeerRegion)> = None;
        while let Some(block) = job.blocks.get(reading.next) {
            let index = reading.next;
            let memory = match region {
                Some((id, memory)) if id == block.source.region => memory,
                _ => {
                    let Some(memory) = self.regions.get(block.source.region) else {
                        return Ok(Some(Pause::Ask(block.source.region)));
                    };
                    region.insert((block.source.region, memory)).1
                }
            };
            let len = block.source.len as usize;
            let from = usize::try_from(block.source.offset).ok().filter(|from| memory.fits(*from, len));
            let from = from.ok_or(Fault::Refused(Refusal::OutsideRegion))?;
            match memory {
                PeerRegion::Mapped(memory) => self.copy(reading, index, memory, from)?,
                PeerRegion::Located(place) => {
                    if !reading.batch.has_room(job, len) {
                        self.flush(reading)?;
                    }
                    reading.batch.push(job, index, place.address + from);
                }
            }
            reading.next += 1;
            let moved = job.progress.moved();
            if moved - reading.looked < LOOK_BYTES || reading.next == job.blocks.len() {
                continue;
            }
            reading.looked = moved;
            if reading.turn.elapsed() >= TURN {
                return Ok(Some(Pause::Turn));
            }
        }
        self.flush(reading)?;
        Ok(None)
    }

    /// Copies a block that is mapped here.
    fn copy(
        &self,
        reading: &mut Reading<'_>,
        index: usize,
        memory: &PeerMemory,
        from: usize,
    ) -> Result<(), Fault> {
        let good = copy(reading.job, index, memory, from, &mut reading.staging);
        self.check_words(&reading.shown)?;
        let len = reading.job.blocks[index].source.len as usize;
        match (good, reading.job.into) {
            (false, _) => reading.corrupt.push(index),
            (true, Destination::Sink(sink)) => sink.block(index, &reading.staging[..len]),
            (true, Destination::Memory(_) | Destination::Device(_)) => {}
        }
        let progress = reading.job.progress;
        if good {
            progress.finish(index);
        }
        match reading.job.blocks.len() {
            1 => progress.add_all(len),
            _ => progress.add(len),
        }
        Ok(())
    }

    /// Has the kernel copy the blocks that wait for it.
    fn flush(&self, reading: &mut Reading<'_>) -> Result<(), Fault> {
        let Reading { job, shown, corrupt, staging, batch, .. } = reading;
        let Some(process) = self.process.get().filter(|_| !batch.blocks.is_empty()) else { return Ok(()) };
        batch.copy(job, process, staging)?;
        self.check_words(shown)?;
        for block in &batch.blocks {
            match (block.good, job.into) {
                (false, _) => corrupt.push(block.index),
                (true, Destination::Sink(sink)) => {
                    sink.block(block.index, &staging[block.to..block.to + block.len]);
                }
                (true, Destination::Memory(_) | Destination::Device(_)) => {}
            }
            if block.good {
                job.progress.finish(block.index);
            }
        }
        job.progress.add(batch.bytes);
        batch.clear();
        Ok(())
    }

    fn check_life(&self, now: Instant) -> Result<(), Fault> {
        let epoch = self.control.epoch();
        if epoch != self.pair.epoch {
            return Err(Fault::Stale(Some(epoch)));
        }
        let now_ns = now.saturating_duration_since(self.opened).as_nanos() as u64;
        if now_ns.saturating_sub(self.alive_ns.load(Ordering::Relaxed)) < LIFE_NS {
            return Ok(());
        }
        if !self.is_alive() {
            return Err(LinkError::Closed.into());
        }
        self.alive_ns.store(now_ns, Ordering::Relaxed);
        Ok(())
    }

    /// Whether what was just copied was the peer's to show: the same epoch, the grant still there.
    fn check_words(&self, shown: &Shown) -> Result<(), Fault> {
        let epoch = self.control.epoch();
        if epoch != self.pair.epoch {
            return Err(Fault::Stale(Some(epoch)));
        }
        if self.control.is_shown(shown) { Ok(()) } else { Err(Fault::Refused(Refusal::NotGranted)) }
    }

    /// Maps or finds a region of the peer, at its first use.
    async fn find_region(&self, id: RegionId) -> Result<(), Fault> {
        let mut requests = self.requests.lock().await;
        if self.regions.get(id).is_some() {
            return Ok(());
        }
        let asked = self.ask_region(&mut requests, id).await;
        let region = asked.inspect_err(|fault| {
            if !matches!(fault, Fault::Refused(_)) {
                // Where the answers stand is unknown now: end the link, a new one starts clean.
                let _ = rustix::net::shutdown(&self.life, rustix::net::Shutdown::Both);
            }
        })?;
        self.regions.insert(id, region);
        Ok(())
    }

    async fn ask_region(&self, requests: &mut Requests, id: RegionId) -> Result<PeerRegion, Fault> {
        let epoch = self.pair.epoch;
        if self.access == Access::Map
            && let Passed::File(file, len) = requests.ask(Kind::Map, id, epoch).await?
        {
            match PeerMemory::map(file, len, "a peer's region") {
                Ok(memory) => return Ok(PeerRegion::Mapped(memory)),
                Err(MemoryError::System { .. }) => {}
                Err(error) => return Err(LinkError::Memory(error).into()),
            }
        }
        self.find_process(requests).await?;
        match requests.ask(Kind::Locate, id, epoch).await? {
            Passed::Place(place) => Ok(PeerRegion::Located(place)),
            Passed::File(..) | Passed::Done(_) => Err(Fault::protocol(WireError::Kind)),
        }
    }

    /// Finds the process at the other end of the socket and proves that its memory can be read.
    ///
    /// The kernel says who listens at the socket. From then on every copy takes the incarnation along, which stands in
    /// the control memory, and so says which process it was taken from.
    async fn find_process(&self, requests: &mut Requests) -> Result<(), Fault> {
        if self.process.get().is_some() {
            return Ok(());
        }
        let credentials = requests.stream.peer_cred().map_err(LinkError::io("asking who listens"))?;
        let hidden = || LinkError::io("finding the peer's process")(ErrorKind::NotFound.into());
        let pid = credentials.pid().and_then(Pid::from_raw).ok_or_else(hidden)?;
        let place = match requests.ask(Kind::Locate, super::CONTROL, self.pair.epoch).await? {
            Passed::Place(place) if place.len >= INCARNATION_AT + size_of::<u128>() => place,
            _ => return Err(Fault::protocol(WireError::Field)),
        };
        let incarnation = self.pair.incarnation.to_le_bytes();
        let process = Process::with_witness(pid, place.address + INCARNATION_AT, incarnation);
        copy_from_process(&process, &mut Vec::new(), &mut [], std::iter::empty())
            .map_err(|error| cma::failure(&process, error))?;
        // Someone else may have been as quick; both mean the same process.
        let _ = self.process.set(process);
        Ok(())
    }
}

/// Copies one block to its place or to `staging`, which grows to hold it; whether its digest is the expected one.
fn copy(job: &ReadJob<'_>, index: usize, memory: &PeerMemory, from: usize, staging: &mut Vec<u8>) -> bool {
    let block = &job.blocks[index];
    let len = block.source.len as usize;
    let expected = job.expected(index);
    let digest = match (job.into, &expected) {
        (Destination::Memory(to), None) => {
            memory.copy_to(from, to, block.to, len);
            None
        }
        (Destination::Memory(to), Some(expected)) => {
            Some(memory.copy_to_digesting(from, to, block.to, len, expected.seed))
        }
        (Destination::Sink(_), expected) => {
            staging.resize(staging.len().max(len), 0);
            let staging = &mut staging[..len];
            match expected {
                None => {
                    memory.read(from, staging);
                    None
                }
                Some(expected) => Some(memory.read_digesting(from, staging, expected.seed)),
            }
        }
        (Destination::Device(_), _) => unreachable!("the session asked whether shm reaches a device"),
    };
    digest == expected.map(|expected| expected.digest)
}

/// Connects without ever waiting: a full backlog is an error, not a reason to block a thread.
fn connect(incarnation: u128) -> std::io::Result<UnixStream> {
    let address = SocketAddrUnix::new_abstract_name(super::socket_name(incarnation).as_bytes())?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    UnixStream::from_std(std::os::unix::net::UnixStream::from(socket))
}
