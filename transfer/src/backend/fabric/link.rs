//! The reading side of a fabric: one-sided reads straight into place, messages and buffers for the rest.
//!
//! ```text
//! large blocks, memory   owner ══read══► destination, digested there
//! large blocks, sink     owner ══read══► buffer ──copied and digested in one pass──► sink
//! small blocks           owner gathers ══message══► buffer ──copied and digested in one pass──► destination
//! ```
//!
//! What the owner cannot see it cannot check: a block that was read one-sidedly counts when its digest is right or,
//! without one, when the owner confirms after its arrival that it was still granted.

mod ask;
mod landing;
mod plan;
mod write;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::FuturesOrdered;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;

use self::landing::Landing;
use self::plan::{Load, Plan, Ways};
use self::write::{ShortWrites, Writes};
use super::SHARES;
use super::batch::{Batch, Running, Transfer, Verb};
use super::driver::{Access, DriverError, LocalRange, RemoteId};
use super::registry::Registration;
use super::thread::{DATA_AT, Fabric, HEAD_AT, Peer, SLOT_BYTES, Then};
use crate::agent::server::Denial;
use crate::agent::{DeviceMemory, RegionId};
use crate::backend::control::{Control, Handler};
use crate::backend::handshake::Route;
use crate::backend::{Fault, Pair, ReadJob};
use crate::error::{LinkError, Refusal};
use crate::memory::MemorySpan;
use crate::random::random_u64;
use crate::session::{Descriptor, Destination};
use crate::slab::{Share, Slot};
use crate::wire::ask::ASK_MAX_BLOCKS;
use crate::wire::control::{Attach, Attached, Key, KeyIs, Pack, decode_fence};
use crate::wire::{self, HEADER_BYTES, Kind, MAX_READ_BLOCKS, MAX_READ_BYTES, WireError};

/// How long two fabrics may take to meet.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);
/// Buffers one read fills at once: one is copied out of while the others are on the way.
const LOADS_AT_ONCE: usize = 4;
/// Bytes digested or copied between two turns of other tasks.
const YIELD_BYTES: usize = 1 << 20;
/// The end of a read that is confirmed by itself. What is asked about the rest, meanwhile, keeps both sides awake: without
/// it the last question finds the owner asleep and its answer the reader, which takes longer than all else about it.
const LATE_BYTES: u64 = 512 << 10;
/// Buffers come free when other reads end, which all have deadlines; so has this one.
const BUFFER_TIMEOUT: Duration = Duration::from_secs(3600);

/// A session's end of a fabric.
pub(crate) struct FabricLink {
    pair: Pair,
    control: Control,
    fabric: Fabric,
    peer: Peer,
    /// Names this side in requests over the fabric; 0: there are none.
    ticket: u128,
    /// Regions of the peer whose keys are here.
    regions: Mutex<HashMap<RegionId, Remote>>,
    /// Held while a key is asked for.
    asking_key: tokio::sync::Mutex<()>,
    /// Where requests to this peer are made, and its blocks land: one that does not answer leaves the others theirs.
    asking: Share,
    landing: Share,
    writes: Arc<Writes>,
    short_writes: Box<ShortWrites>,
    /// How often windows may be open.
    windows: Arc<Semaphore>,
    /// Runs what a write that was given up leaves to be done.
    tasks: TaskTracker,
}

/// A region of the peer.
#[derive(Debug, Clone, Copy)]
struct Remote {
    id: RemoteId,
    base: u64,
    len: u64,
}

impl Remote {
    /// Where a block begins in the registration.
    fn at(&self, block: &Descriptor) -> Result<u64, Fault> {
        let end = block.offset.checked_add(u64::from(block.len));
        match end.is_some_and(|end| end <= self.len) {
            true => Ok(self.base + block.offset),
            false => Err(Fault::Refused(Refusal::OutsideRegion)),
        }
    }
}

fn broken(why: Arc<str>) -> Fault {
    LinkError::Fabric(why.to_string()).into()
}

/// What the owner's fabric cannot do is no refusal of the read: another path may lead there.
fn closed(fault: Fault) -> Fault {
    match fault {
        Fault::Refused(Refusal::Unavailable) => LinkError::Fabric("the peer cannot use it now".into()).into(),
        Fault::Refused(Refusal::Overloaded) => LinkError::Fabric("the peer is at a limit".into()).into(),
        other => other,
    }
}

fn unable(error: DriverError) -> Fault {
    LinkError::Fabric(error.what).into()
}

impl FabricLink {
    /// Makes the two ends of a fabric known to each other.
    pub(crate) async fn open(pair: Pair, route: &Route, fabric: Fabric) -> Result<Self, Fault> {
        let writes = Arc::new(Writes::default());
        let control = Control::open(pair.clone(), route, Self::handler(&writes, &fabric)).await?;
        let attach = async {
            let wire = fabric.info().wire.clone();
            let attach = Attach { backend: fabric.kind(), wire, address: fabric.address().to_vec() };
            let answer = control.ask(Kind::Attach, &attach.encode()).await.map_err(closed);
            let (_, payload) = answer?;
            let Attached { ticket, address } = Attached::decode(&payload).map_err(Fault::protocol)?;
            let ticket = if fabric.has_requests() { ticket } else { 0 };
            Ok::<_, Fault>((fabric.connect(address).await.map_err(unable)?, ticket))
        };
        let late = || LinkError::io("attaching to its fabric")(std::io::ErrorKind::TimedOut.into());
        let (peer, ticket) = timeout(ATTACH_TIMEOUT, attach).await.map_err(|_| late())??;
        let tasks = route.tasks.clone();
        let (asking, landing) = (fabric.asking().share(SHARES), fabric.landing().share(SHARES));
        Ok(Self {
            pair,
            control,
            fabric,
            peer,
            ticket,
            regions: Mutex::default(),
            asking_key: tokio::sync::Mutex::default(),
            asking,
            landing,
            writes,
            short_writes: Box::new(ShortWrites::new(route)),
            windows: Arc::new(Semaphore::new(write::WINDOWED_AT_ONCE)),
            tasks,
        })
    }

    /// Answers what the owner asks: to end writes.
    fn handler(writes: &Arc<Writes>, fabric: &Fabric) -> Handler {
        let (writes, fabric) = (Arc::clone(writes), fabric.clone());
        Arc::new(move |header, payload| {
            let (writes, fabric) = (Arc::clone(&writes), fabric.clone());
            Box::pin(async move {
                match header.kind {
                    Kind::Fence => writes.fence(&fabric, decode_fence(&payload)?).await,
                    _ => Err(Denial::Refused(Refusal::Malformed)),
                }
            })
        })
    }

    /// Whether a read may work: nothing heals a fabric's connection but a new one.
    pub(crate) fn is_usable(&self) -> bool {
        self.peer.failure().is_none() && self.control.is_alive()
    }

    /// Whether the fabric reaches the memory of a device.
    pub(crate) async fn reaches(&self, memory: &DeviceMemory) -> Result<(), String> {
        let registered = self.fabric.registered(memory.span(), Access::Local).await;
        registered.map(|_| ()).map_err(|error| error.what)
    }

    pub(crate) async fn read(&self, job: &ReadJob<'_>) -> Result<Vec<usize>, Fault> {
        if let Some(why) = self.peer.failure() {
            return Err(broken(Arc::clone(why)));
        }
        tokio::select! {
            biased;
            // A fabric may never tell that its peer is dead; this connection does.
            () = self.control.closed() => Err(LinkError::Closed.into()),
            outcome = self.run(job) => outcome,
        }
    }

    async fn run(&self, job: &ReadJob<'_>) -> Result<Vec<usize>, Fault> {
        let local = self.destination(job).await?;
        let (pack_max, emulated) = (self.fabric.pack_max(), self.fabric.info().emulated);
        let ways = Ways { pack_max, slot_bytes: SLOT_BYTES, direct: local.is_some(), emulated };
        let plan = Plan::of(job, ways);
        let direct = async {
            match (&local, plan.direct.is_empty()) {
                (Some(local), false) => self.read_direct(job, local, &plan.direct).await,
                _ => Ok(Vec::new()),
            }
        };
        let loads = async {
            match plan.loads.is_empty() {
                false => self.read_loads(job, &plan.loads).await,
                true => Ok(Vec::new()),
            }
        };
        let (mut corrupt, more) = futures_util::future::try_join(direct, loads).await?;
        corrupt.extend(more);
        if !corrupt.is_empty() {
            // Wrong bytes of a block that is no longer granted are no fault of the path.
            self.confirm(job, &corrupt).await?;
        }
        Ok(corrupt)
    }

    /// The registration of the destination, where it is memory that the fabric can be made to reach.
    async fn destination(&self, job: &ReadJob<'_>) -> Result<Option<Arc<Registration>>, Fault> {
        match job.into {
            Destination::Sink(_) => Ok(None),
            Destination::Device(memory) => {
                let registered = self.fabric.registered(memory.span(), Access::Local).await;
                registered.map(Some).map_err(|error| LinkError::Device(error.what).into())
            }
            Destination::Memory(memory) => match self.register_host(&memory.span()).await {
                Ok(registered) => Ok(Some(registered)),
                Err(error) => {
                    // The blocks go through buffers then.
                    tracing::debug!(%error, remedy = error.remedy, "a destination is not registered");
                    Ok(None)
                }
            },
        }
    }

    async fn register_host(&self, span: &MemorySpan) -> Result<Arc<Registration>, DriverError> {
        self.fabric.registered(span, Access::Local).await
    }

    /// Reads blocks straight into their places; those that failed their digest.
    async fn read_direct(
        &self,
        job: &ReadJob<'_>,
        local: &Arc<Registration>,
        blocks: &[usize],
    ) -> Result<Vec<usize>, Fault> {
        let mut transfers = Vec::with_capacity(blocks.len());
        let mut region: Option<(RegionId, Remote)> = None;
        for index in blocks {
            let block = &job.blocks[*index];
            let remote = self.remote(&mut region, block.source.region).await?;
            let verb = Verb::Read { remote: remote.id, offset: remote.at(&block.source)? };
            let local = LocalRange { id: local.id, offset: block.to, len: block.source.len as usize };
            transfers.push(Transfer { verb, local });
        }
        let batch = Batch::new(self.peer.clone(), transfers, Box::new(Arc::clone(local)));
        let bytes: u64 = blocks.iter().map(|index| u64::from(job.blocks[*index].source.len)).sum();
        if blocks.iter().all(|index| job.expected(*index).is_none())
            && self.asks(blocks.len())
            && bytes <= MAX_READ_BYTES
        {
            self.read_unverified(job, batch, blocks).await?;
            return Ok(Vec::new());
        }
        // From here to its end the driver may write the destination: the drop waits until it cannot.
        let mut running = self.fabric.submit(batch).await.map_err(broken)?.fenced();
        let (mut done, mut corrupt, mut unyielded) = (Vec::new(), Vec::new(), 0);
        loop {
            let more = running.next(&mut done).await.map_err(broken)?;
            for index in done.drain(..).map(|at| blocks[at as usize]) {
                let block = &job.blocks[index];
                let len = block.source.len as usize;
                job.progress.add(len);
                if let (Some(expected), Destination::Memory(memory)) = (job.expected(index), job.into) {
                    match memory.block_digest(expected.seed, block.to, len) == expected.digest {
                        true => job.progress.finish(index),
                        false => corrupt.push(index),
                    }
                }
                unyielded += len;
                if unyielded >= YIELD_BYTES {
                    unyielded = 0;
                    tokio::task::yield_now().await;
                }
            }
            if !more {
                break;
            }
        }
        let unverified = || blocks.iter().copied().filter(|index| job.expected(*index).is_none());
        self.confirm(job, &unverified().collect::<Vec<_>>()).await?;
        unverified().for_each(|index| job.progress.finish(index));
        Ok(corrupt)
    }

    /// Reads blocks of which nothing is verified here, and has them confirmed by the owner when they are there: the
    /// progress thread asks, without waking this task in between.
    async fn read_unverified(
        &self,
        job: &ReadJob<'_>,
        batch: Arc<Batch>,
        blocks: &[usize],
    ) -> Result<(), Fault> {
        let (early, late) = blocks.split_at(early(job, blocks));
        let parts: Vec<&[usize]> = [early, late].into_iter().filter(|part| !part.is_empty()).collect();
        let (mut then, mut confirmations, mut after) = (VecDeque::new(), Vec::new(), 0);
        let notes = job.progress.queued(self.notes(parts.len())).await?;
        for (note, part) in notes.into_iter().zip(parts) {
            let sources = part.iter().map(|index| job.blocks[*index].source);
            let (exchange, confirmation) = self.confirmation(note, job.handoff, sources)?;
            after += part.len();
            then.push_back(Then { after, exchange });
            confirmations.push(confirmation);
        }
        let (running, mut answers) = self.fabric.submit_then(batch, then).await.map_err(broken)?;
        // As above: until it has ended, its drop is a fence.
        let mut running = running.fenced();
        let mut answered = Ok(());
        // The last first: meanwhile nothing wakes this task.
        for answer in answers.iter_mut().rev() {
            answered = answered.and(answer.end().await);
        }
        running.end().await.map_err(broken)?;
        answered.map_err(broken)?;
        for (confirmation, answer) in confirmations.iter().zip(&answers) {
            self.confirmed(confirmation, answer)?;
        }
        for index in blocks {
            job.progress.add(job.blocks[*index].source.len as usize);
            job.progress.finish(*index);
        }
        Ok(())
    }

    /// Reads blocks through buffers; those that failed their digest.
    async fn read_loads(&self, job: &ReadJob<'_>, loads: &[Load]) -> Result<Vec<usize>, Fault> {
        let mut landing = Landing::new(job);
        if let [only] = loads {
            let (load, buffer) = self.fetch(job, only, Turn::Alone).await?;
            landing.take(load, self.landing.memory(), buffer.offset);
            return Ok(landing.corrupt);
        }
        let turns = std::iter::once(Turn::First).chain(std::iter::repeat(Turn::Later));
        let mut waiting = loads.iter().zip(turns).map(|(load, turn)| self.fetch(job, load, turn));
        // In order, and started in order: the first of them always has its buffer, so reads cannot starve each other.
        let mut under_way = FuturesOrdered::new();
        under_way.extend(waiting.by_ref().take(LOADS_AT_ONCE));
        let mut unyielded = 0;
        while let Some(fetched) = self.fabric.first_of(&mut under_way).await {
            let (load, buffer) = fetched?;
            landing.take(load, self.landing.memory(), buffer.offset);
            drop(buffer);
            under_way.extend(waiting.next());
            unyielded += load.bytes;
            if unyielded >= YIELD_BYTES {
                unyielded = 0;
                tokio::task::yield_now().await;
            }
        }
        Ok(landing.corrupt)
    }

    /// Fills a buffer.
    async fn fetch<'a>(
        &self,
        job: &ReadJob<'_>,
        load: &'a Load,
        turn: Turn,
    ) -> Result<(&'a Load, Buffer), Fault> {
        let slots = self.landing.acquire(1, Instant::now() + BUFFER_TIMEOUT);
        let slots = turn.wait(job, slots).await;
        let slot = slots.ok().and_then(|mut slots| slots.pop()).ok_or(Fault::Refused(Refusal::Overloaded))?;
        let local = self.register_host(&slot.memory().span()).await.map_err(unable)?;
        let (id, offset) = (local.id, slot.offset() + DATA_AT);
        if load.packed {
            let running = self.receive(job, (load, turn), slot, local).await?;
            return Ok((load, Buffer { offset, _running: running }));
        }
        let keep = Box::new((slot, local));
        let mut transfers = Vec::with_capacity(load.parts.len());
        let mut region: Option<(RegionId, Remote)> = None;
        for part in &load.parts {
            let source = &job.blocks[part.block].source;
            let remote = self.remote(&mut region, source.region).await?;
            let verb = Verb::Read { remote: remote.id, offset: remote.at(source)? + part.skip as u64 };
            let local = LocalRange { id, offset: offset + part.at, len: part.len };
            transfers.push(Transfer { verb, local });
        }
        let batch = Batch::new(self.peer.clone(), transfers, keep);
        let mut running = self.fabric.submit(batch).await.map_err(broken)?;
        running.spins(turn == Turn::Alone);
        running.end().await.map_err(broken)?;
        let unverified =
            load.parts.iter().map(|part| part.block).filter(|index| job.expected(*index).is_none());
        self.confirm(job, &unverified.collect::<Vec<_>>()).await?;
        Ok((load, Buffer { offset, _running: running }))
    }

    /// Asks for a message with the blocks of `load` and awaits it, in `slot`.
    async fn receive(
        &self,
        job: &ReadJob<'_>,
        (load, turn): (&Load, Turn),
        slot: Slot,
        registered: Arc<Registration>,
    ) -> Result<Running, Fault> {
        let tag = tag()?;
        let (memory, at) = (slot.memory().clone(), slot.offset() + HEAD_AT);
        let local = LocalRange { id: registered.id, offset: at, len: HEADER_BYTES + load.bytes };
        let transfer = Transfer { verb: Verb::Receive { tag }, local };
        let batch = Batch::new(self.peer.clone(), vec![transfer], Box::new((slot, registered)));
        let blocks = load.parts.iter().map(|part| job.blocks[part.block].source);
        let mut running;
        if self.asks(blocks.len()) {
            let note = turn.wait(job, self.note()).await?;
            running = self.ask(note, (Kind::Pack, tag), job.handoff, blocks, batch).await?;
            running.spins(turn == Turn::Alone);
            running.end().await.map_err(broken)?;
        } else {
            running = self.fabric.submit(batch).await.map_err(broken)?;
            running.awaits().await;
            let payload = Pack::encode(self.fabric.kind(), tag, job.handoff, blocks);
            let asked = self.control.ask(Kind::Pack, &payload);
            tokio::select! {
                biased;
                // The message says more than the answer that it was sent.
                ended = running.end() => ended.map_err(broken)?,
                answer = asked => {
                    answer.map_err(closed)?;
                    running.end().await.map_err(broken)?;
                }
            }
        }
        self.check((&memory, at), tag, Kind::Data, running.arrived()).map_err(closed)?;
        match running.arrived() == local.len {
            true => Ok(running),
            false => Err(Fault::protocol(WireError::Short)),
        }
    }

    /// The region `id` of the peer; `last` is the one used last.
    async fn remote(&self, last: &mut Option<(RegionId, Remote)>, id: RegionId) -> Result<Remote, Fault> {
        match last {
            Some((of, remote)) if *of == id => return Ok(*remote),
            _ => {}
        }
        let known = self.regions().get(&id).copied();
        let remote = match known {
            Some(remote) => remote,
            None => self.ask_key(id).await?,
        };
        *last = Some((id, remote));
        Ok(remote)
    }

    async fn ask_key(&self, region: RegionId) -> Result<Remote, Fault> {
        let _asking = self.asking_key.lock().await;
        if let Some(remote) = self.regions().get(&region) {
            return Ok(*remote);
        }
        let key = Key { backend: self.fabric.kind(), region };
        let (_, payload) = self.control.ask(Kind::Key, &key.encode()).await.map_err(closed)?;
        let KeyIs { len, base, key } = KeyIs::decode(&payload).map_err(Fault::protocol)?;
        let id = self.fabric.import(&self.peer, key).await.map_err(unable)?;
        let remote = Remote { id, base, len };
        self.regions().insert(region, remote);
        Ok(remote)
    }

    fn regions(&self) -> MutexGuard<'_, HashMap<RegionId, Remote>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the owner whether blocks, whose bytes are here, are still granted.
    async fn confirm(&self, job: &ReadJob<'_>, blocks: &[usize]) -> Result<(), Fault> {
        let mut rest = blocks;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |index: &&usize| {
                bytes += u64::from(job.blocks[**index].source.len);
                bytes <= MAX_READ_BYTES
            };
            let count = rest.iter().take(MAX_READ_BLOCKS).take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            let sources = now.iter().map(|index| job.blocks[*index].source);
            if self.asks(count) {
                self.ask_to_confirm(job.handoff, sources).await?;
            } else {
                let payload = wire::encode_read(job.handoff, sources);
                self.control.ask(Kind::Confirm, &payload).await?;
            }
            rest = later;
        }
        Ok(())
    }
}

impl Drop for FabricLink {
    fn drop(&mut self) {
        // What is under way holds the peer: without this it would never be cut off.
        self.peer.sever("the link is closed");
    }
}

/// Whose turn it is, of the buffers that a read fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// The only one.
    Alone,
    /// Of several.
    First,
    Later,
}

impl Turn {
    /// Waits for what a buffer needs. Without its first one a read does not move; later ones keep it moving.
    async fn wait<T>(self, job: &ReadJob<'_>, what: impl Future<Output = T>) -> T {
        match self {
            Self::Alone | Self::First => job.progress.queued(what).await,
            Self::Later => what.await,
        }
    }
}

/// A buffer that was filled; it is free when this is dropped.
struct Buffer {
    offset: usize,
    _running: Running,
}

/// How many of `blocks` are asked about before the last of them are there.
fn early(job: &ReadJob<'_>, blocks: &[usize]) -> usize {
    let mut later = 0;
    let last = blocks.iter().rposition(|index| {
        let is_early = later >= LATE_BYTES;
        later += u64::from(job.blocks[*index].source.len);
        is_early
    });
    last.map_or(0, |last| last + 1)
}

fn tag() -> Result<u64, Fault> {
    random_u64().map_err(|error| LinkError::io("asking for random bytes")(error).into())
}

#[cfg(test)]
mod tests;
