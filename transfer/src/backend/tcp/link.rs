//! The reading side of `tcp`: a pool of streams to one peer.

mod write;

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::receive::Receiver;
use crate::auth::Mac;
use crate::backend::frames::{self, FrameWriter, HEAD_MAX_BYTES, head_len};
use crate::backend::handshake::{self, Opened, Route};
use crate::backend::{Fault, Pair, ReadJob};
use crate::error::{LinkError, Refusal};
use crate::session::BlockRead;
use crate::spin::Spin;
use crate::wire::{self, Header, Kind, MAX_READ_BLOCKS, WireError};

/// Bytes worth a stream of their own.
const STRIPE_BYTES: u64 = 8 << 20;
/// What has no more goes beside longer reads and writes where those have all streams.
const SHORT_BYTES: u64 = 1 << 20;
/// Bytes asked for at once; the next request is under way while they arrive.
const REQUEST_BYTES: u64 = 8 << 20;
/// How long a short answer from this host is looked for before the reader sleeps: about what waking up takes.
const SPIN: Duration = Duration::from_micros(5);
/// Longer answers come in pieces: who sleeps takes several of them at once.
const SPIN_BYTES: usize = 64 << 10;
/// Bytes received between two turns of other tasks.
const YIELD_BYTES: usize = 4 << 20;

/// The streams of one session.
pub(crate) struct TcpLink {
    pair: Pair,
    route: Route,
    streams: usize,
    /// Permits to use a stream, given in the order they were asked for.
    slots: Semaphore,
    /// The permit to use one more, for what is short: it waits for nothing long.
    express: Semaphore,
    idle: Mutex<Vec<Stream>>,
}

/// A connection past its handshake, with no answer outstanding.
struct Stream {
    socket: TcpStream,
    /// Whether it stays on this host.
    is_local: bool,
    writer: FrameWriter,
    /// Checks the answers, where the two sides share a token.
    mac: Option<Mac>,
    next_seq: u64,
    spin: Spin,
}

impl TcpLink {
    /// Opens the first stream, which proves that the peer is there and in the epoch meant.
    pub(crate) async fn open(pair: Pair, route: Route, streams: usize) -> Result<Self, Fault> {
        let streams = streams.clamp(1, 64);
        let first = Stream::open(&pair, &route).await?;
        let idle = Mutex::new(vec![first]);
        let (slots, express) = (Semaphore::new(streams), Semaphore::new(1));
        Ok(Self { pair, route, streams, slots, express, idle })
    }

    /// Waits for the turn of what takes so many streams for so many bytes.
    async fn turn(&self, streams: usize, bytes: u64) -> Result<SemaphorePermit<'_>, Fault> {
        let permit = tokio::select! {
            biased;
            permit = self.slots.acquire_many(streams as u32) => permit,
            permit = self.express.acquire(), if bytes <= SHORT_BYTES => permit,
        };
        // The semaphores are never closed; were they, the link would be.
        permit.map_err(|_| LinkError::Closed.into())
    }

    pub(crate) async fn read(&self, job: &ReadJob<'_>) -> Result<Vec<usize>, Fault> {
        let stripes = plan_stripes(job.blocks.iter().map(|read| read.source.len), self.streams);
        let bytes = job.blocks.iter().map(|read| u64::from(read.source.len)).sum();
        let _turn = job.progress.queued(self.turn(stripes.len(), bytes)).await?;
        match self.try_read(job, &stripes).await {
            // An idle stream can have died unnoticed. A new one tells why, or works.
            Err(Fault::Link(_)) if job.progress.moved() == 0 => {
                self.idle().clear();
                self.try_read(job, &stripes).await
            }
            outcome => outcome,
        }
    }

    async fn try_read(&self, job: &ReadJob<'_>, stripes: &[Range<usize>]) -> Result<Vec<usize>, Fault> {
        if let [only] = stripes {
            return self.read_stripe(job, only.clone()).await;
        }
        let reads = stripes.iter().map(|stripe| self.read_stripe(job, stripe.clone()));
        Ok(futures_util::future::try_join_all(reads).await?.concat())
    }

    async fn read_stripe(&self, job: &ReadJob<'_>, stripe: Range<usize>) -> Result<Vec<usize>, Fault> {
        let idle = self.idle().pop();
        let mut stream = match idle {
            Some(stream) => stream,
            None => Stream::open(&self.pair, &self.route).await?,
        };
        let corrupt = stream.read(job, stripe, &self.pair).await;
        if let Err(Fault::Refused(Refusal::Unauthenticated)) = corrupt {
            self.route.counters.auth_refused();
        }
        let corrupt = corrupt?;
        // Only a stream that gave every byte asked for is used again; dropping it closes it.
        self.idle().push(stream);
        Ok(corrupt)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Stream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream {
    async fn open(pair: &Pair, route: &Route) -> Result<Self, Fault> {
        let Opened { socket, reader, writer } = handshake::open(pair, route).await?;
        let is_local = super::is_local(socket.local_addr(), socket.peer_addr());
        Ok(Self { socket, is_local, writer, mac: reader.into_mac(), next_seq: 1, spin: Spin::default() })
    }

    /// Reads `blocks` of the job with one request ahead of the answer being received.
    async fn read(
        &mut self,
        job: &ReadJob<'_>,
        blocks: Range<usize>,
        pair: &Pair,
    ) -> Result<Vec<usize>, Fault> {
        let mut receiver = Receiver::new(job, blocks.clone());
        self.expect_nothing();
        let first = self.ask(job, blocks.start..blocks.end, pair).await?;
        let mut asked = first.end;
        let mut receiving = first;
        loop {
            let ahead = match asked < blocks.end {
                true => Some(self.ask(job, asked..blocks.end, pair).await?),
                false => None,
            };
            let outstanding = if ahead.is_some() { 2 } else { 1 };
            let seq = self.next_seq - outstanding;
            self.receive(&mut receiver, job, receiving, seq, pair).await?;
            let Some(next) = ahead else { return Ok(receiver.corrupt) };
            asked = next.end;
            receiving = next;
        }
    }

    /// Forgets that there was something to read: no answer is outstanding, and an attempt before the next one has
    /// arrived would be a system call for nothing. Its arrival, or the end of the stream, is told anew.
    fn expect_nothing(&self) {
        let nothing = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
        let _ = self.socket.try_io(Interest::READABLE, nothing);
    }

    /// Asks for as many of `blocks` as one request takes, and says which.
    async fn ask(
        &mut self,
        job: &ReadJob<'_>,
        blocks: Range<usize>,
        pair: &Pair,
    ) -> Result<Range<usize>, Fault> {
        let mut total = 0;
        let fits = |read: &&BlockRead| {
            let first = total == 0;
            total += u64::from(read.source.len);
            first || total <= REQUEST_BYTES
        };
        let count = job.blocks[blocks.clone()].iter().take(MAX_READ_BLOCKS).take_while(fits).count();
        let asked = blocks.start..blocks.start + count;
        let sources = job.blocks[asked.clone()].iter().map(|read| read.source);
        let payload = wire::encode_read(job.handoff, sources);
        let frame = self.writer.frame(Kind::Read, pair.epoch, self.next_seq, &payload);
        self.next_seq += 1;
        self.socket.write_all(&frame).await.map_err(LinkError::io("asking for blocks"))?;
        Ok(asked)
    }

    /// Receives the answer to one request.
    async fn receive(
        &mut self,
        receiver: &mut Receiver<'_>,
        job: &ReadJob<'_>,
        blocks: Range<usize>,
        seq: u64,
        pair: &Pair,
    ) -> Result<(), Fault> {
        let total: usize = job.blocks[blocks.clone()].iter().map(|read| read.source.len as usize).sum();
        let head_len = head_len(self.mac.as_ref());
        let mut head = [0; HEAD_MAX_BYTES];
        let (mut headed, mut received, mut unyielded) = (0, 0, 0);
        let socket = &self.socket;
        while received < total {
            let until = blocks.end;
            let mut fill = || receiver.fill(socket.as_fd(), &mut head[headed..head_len], until);
            let soon = self.is_local && total <= SPIN_BYTES && headed == 0 && self.spin.is_worth_it();
            let spun = soon.then(|| spin(&mut fill));
            spun.iter().for_each(|spun| self.spin.tried(spun.is_some()));
            let filled = match spun.flatten() {
                Some(filled) => filled,
                None => socket.async_io(Interest::READABLE, fill).await,
            };
            let filled = filled.map_err(LinkError::io("receiving blocks"))?;
            if filled == 0 {
                return Err(LinkError::Closed.into());
            }
            let of_head = filled.min(head_len - headed);
            headed += of_head;
            if of_head > 0 && headed == head_len {
                check_answer(&head[..head_len], self.mac.as_mut(), (Kind::Data, total, seq), pair)?;
            }
            receiver.advance(filled - of_head);
            received += filled - of_head;
            unyielded += filled;
            if unyielded >= YIELD_BYTES {
                unyielded = 0;
                tokio::task::yield_now().await;
            }
        }
        debug_assert_eq!(receiver.next_block(), blocks.end, "an answer ends with its last block");
        Ok(())
    }
}

/// Looks for bytes again and again for a moment: within a host they come sooner than a sleeper wakes up.
fn spin(mut fill: impl FnMut() -> io::Result<usize>) -> Option<io::Result<usize>> {
    let start = Instant::now();
    loop {
        match fill() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            filled => return Some(filled),
        }
        if start.elapsed() >= SPIN {
            return None;
        }
        std::hint::spin_loop();
    }
}

/// Whether `head` starts the answer to a request: its kind, its length and its number.
fn check_answer(
    head: &[u8],
    mac: Option<&mut Mac>,
    (kind, len, seq): (Kind, usize, u64),
    pair: &Pair,
) -> Result<(), Fault> {
    let bytes = head.first_chunk().ok_or(LinkError::Closed)?;
    let header = Header::decode(bytes).map_err(Fault::protocol)?;
    frames::check(&header, head, &[], mac).map_err(Fault::protocol)?;
    match header.kind {
        Kind::Refused => Err(Fault::refused(&header)),
        _ if header.kind != kind => Err(Fault::protocol(WireError::Kind)),
        _ if header.epoch != pair.epoch => Err(Fault::Stale(Some(header.epoch))),
        _ if header.seq == seq && header.len as usize == len => Ok(()),
        _ => Err(Fault::protocol(WireError::Field)),
    }
}

/// Shares blocks of the lengths given out to at most `streams` streams, in runs of about equal bytes, each worth its
/// stream.
fn plan_stripes(lens: impl ExactSizeIterator<Item = u32> + Clone, streams: usize) -> Vec<Range<usize>> {
    let count = lens.len();
    let total: u64 = lens.clone().map(u64::from).sum();
    let wanted = (total / STRIPE_BYTES).clamp(1, streams as u64);
    if wanted == 1 {
        return std::iter::once(0..count).collect();
    }
    let mut stripes = Vec::with_capacity(wanted as usize);
    let (mut start, mut bytes) = (0, 0);
    for (at, len) in lens.enumerate() {
        bytes += u64::from(len);
        if bytes >= total.div_ceil(wanted) {
            stripes.push(start..at + 1);
            (start, bytes) = (at + 1, 0);
        }
    }
    if start < count {
        stripes.push(start..count);
    }
    stripes
}

#[cfg(test)]
mod tests;
