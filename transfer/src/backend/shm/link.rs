//! The reading side of `shm`: copies out of a peer's mapped memory.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use baton_config::Epoch;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use super::control::{PeerControl, Shown};
use super::pass;
use crate::agent::RegionId;
use crate::backend::{CONNECT_TIMEOUT, Fault, Pair, ReadJob};
use crate::error::{LinkError, Refusal};
use crate::memory::PeerMemory;
use crate::session::Destination;
use crate::wire::{self, Kind};

/// How long a read copies before other tasks get a turn.
const TURN: Duration = Duration::from_micros(250);
/// Bytes copied between two looks at the clock, each of which takes about as long as copying 1 KiB.
const LOOK_BYTES: usize = 64 << 10;

/// A peer's memory as mapped here.
pub(crate) struct ShmLink {
    pair: Pair,
    control: PeerControl,
    regions: RwLock<HashMap<RegionId, PeerMemory>>,
    /// A second handle of the socket: its closing is the peer's end.
    life: OwnedFd,
    requests: Mutex<Requests>,
}

struct Requests {
    stream: UnixStream,
    next_seq: u64,
}

impl Requests {
    /// Asks for the memory of a region: its descriptor and length.
    async fn map(&mut self, id: RegionId, epoch: Epoch) -> Result<(OwnedFd, usize), Fault> {
        let seq = self.next_seq;
        self.next_seq += 1;
        let frame = wire::encode_frame(Kind::Map, epoch, seq, &id.0.to_le_bytes());
        self.stream.write_all(&frame).await.map_err(LinkError::io("asking for memory"))?;
        loop {
            let (header, file, len) = pass::receive(&self.stream, Kind::Mapped).await?;
            // An earlier answer belongs to a read that was dropped while it waited.
            if header.seq == seq {
                return Ok((file, len));
            }
        }
    }
}

impl ShmLink {
    /// Meets the peer at its socket and maps its control memory: proof that both share host, user and namespace.
    pub(crate) async fn open(pair: Pair) -> Result<Self, Fault> {
        let connect = async {
            let mut stream = connect(pair.incarnation).map_err(LinkError::io("connecting to its socket"))?;
            let hello = wire::encode_frame(Kind::Hello, pair.epoch, 0, &pair.hello(None).encode());
            stream.write_all(&hello).await.map_err(LinkError::io("sending a hello"))?;
            let (_, file, len) = pass::receive(&stream, Kind::Welcome).await?;
            let memory = PeerMemory::map(file, len, "a peer's control").map_err(LinkError::Memory)?;
            let control = PeerControl::new(memory).ok_or(LinkError::Closed)?;
            let life = stream.as_fd().try_clone_to_owned().map_err(LinkError::io("keeping its socket"))?;
            let requests = Mutex::new(Requests { stream, next_seq: 1 });
            Ok(Self { control, regions: RwLock::default(), life, requests, pair: pair.clone() })
        };
        timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| {
            Err(LinkError::io("connecting to its socket")(std::io::ErrorKind::TimedOut.into()).into())
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

    pub(crate) async fn read(&self, job: &ReadJob<'_>) -> Result<Vec<usize>, Fault> {
        self.check_life()?;
        let shown = self.control.find(job.handoff).ok_or(Fault::Refused(Refusal::NotGranted))?;
        let mut corrupt = Vec::new();
        let mut staging = Vec::new();
        let mut region: Option<(RegionId, PeerMemory)> = None;
        let (mut turn, mut unlooked) = (Instant::now(), 0);
        for (index, block) in job.blocks.iter().enumerate() {
            let memory = match &region {
                Some((id, memory)) if *id == block.source.region => memory,
                _ => {
                    let memory = self.region(block.source.region).await?;
                    &region.insert((block.source.region, memory)).1
                }
            };
            let len = block.source.len as usize;
            let from = usize::try_from(block.source.offset).ok().filter(|from| memory.fits(*from, len));
            let from = from.ok_or(Fault::Refused(Refusal::OutsideRegion))?;
            let good = copy(job, index, memory, from, &mut staging);
            self.check_words(&shown)?;
            match good {
                false => corrupt.push(index),
                true => {
                    if let Destination::Sink(sink) = job.into {
                        sink.block(index, &staging[..len]);
                    }
                }
            }
            job.progress.add(len);
            unlooked += len;
            if unlooked < LOOK_BYTES {
                continue;
            }
            unlooked = 0;
            if turn.elapsed() >= TURN {
                tokio::task::yield_now().await;
                self.check_life()?;
                turn = Instant::now();
            }
        }
        self.check_life()?;
        Ok(corrupt)
    }

    fn check_life(&self) -> Result<(), Fault> {
        let epoch = self.control.epoch();
        if epoch != self.pair.epoch {
            return Err(Fault::Stale(Some(epoch)));
        }
        if self.is_alive() { Ok(()) } else { Err(LinkError::Closed.into()) }
    }

    /// Whether what was just copied was the peer's to show: the same epoch, the grant still there.
    fn check_words(&self, shown: &Shown) -> Result<(), Fault> {
        let epoch = self.control.epoch();
        if epoch != self.pair.epoch {
            return Err(Fault::Stale(Some(epoch)));
        }
        if self.control.is_shown(shown) { Ok(()) } else { Err(Fault::Refused(Refusal::NotGranted)) }
    }

    /// A region of the peer, mapped at its first use.
    async fn region(&self, id: RegionId) -> Result<PeerMemory, Fault> {
        if let Some(memory) = self.regions.read().unwrap_or_else(PoisonError::into_inner).get(&id) {
            return Ok(memory.clone());
        }
        let mut requests = self.requests.lock().await;
        if let Some(memory) = self.regions.read().unwrap_or_else(PoisonError::into_inner).get(&id) {
            return Ok(memory.clone());
        }
        let (file, len) = match requests.map(id, self.pair.epoch).await {
            Ok(mapped) => mapped,
            Err(fault) => {
                if !matches!(fault, Fault::Refused(_)) {
                    // Where the answers stand is unknown now: end the link, a new one starts clean.
                    let _ = rustix::net::shutdown(&self.life, rustix::net::Shutdown::Both);
                }
                return Err(fault);
            }
        };
        let memory = PeerMemory::map(file, len, "a peer's region").map_err(LinkError::Memory)?;
        self.regions.write().unwrap_or_else(PoisonError::into_inner).insert(id, memory.clone());
        Ok(memory)
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
