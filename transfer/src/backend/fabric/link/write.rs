//! Writing through windows: the peer opens one for each granted range, verifies what was written, and closes it.
//!
//! To open and to close them takes a word and its answer each, by TCP. What is short is sooner there in a connection of its
//! own, with one of them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::HandoffId;
use futures_util::StreamExt;
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::FuturesUnordered;
use tokio::sync::{OnceCell, OwnedSemaphorePermit};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{FabricLink, broken, closed, unable};
use crate::agent::server::Denial;
use crate::backend::control::{Answer, Control};
use crate::backend::fabric::batch::{Batch, Transfer, Verb};
use crate::backend::fabric::driver::{Access, LocalRange, RemoteId};
use crate::backend::fabric::registry::Registration;
use crate::backend::fabric::serve::windows::lies_in;
use crate::backend::fabric::thread::{Fabric, Peer};
use crate::backend::handshake::Route;
use crate::backend::tcp::link::TcpLink;
use crate::backend::{Fault, Pair, WriteJob};
use crate::digest::DigestSeed;
use crate::error::{LinkError, Refusal};
use crate::session::{BlockWrite, Descriptor};
use crate::wire::control::{OpenWindow, Window, WindowIs, Write, encode_fence};
use crate::wire::{Kind, WireError};

/// Most bytes of a write that takes no windows.
const SHORT_BYTES: u64 = 256 << 10;
/// Short writes at once; more wait for each other.
const SHORT_AT_ONCE: usize = 4;
/// Blocks written and verified together.
const GROUP_BLOCKS: usize = 512;
/// Bytes of them, unless a single block has more.
const GROUP_BYTES: u64 = 8 << 20;
/// Groups of a write under way at once: one is verified while the next is written.
const GROUPS_AT_ONCE: usize = 2;
/// Groups to one peer that have windows at once, each of them at most [`MAX_WINDOWS`]: more wait for their turn, before
/// the peer would refuse them.
///
/// [`MAX_WINDOWS`]: crate::wire::control::MAX_WINDOWS
pub(super) const WINDOWED_AT_ONCE: usize = 4;
/// How long the owner of windows waits for what was posted to end, less the way to it.
const FENCE_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long windows that nobody waits for any more may take to come.
const LATE_TIMEOUT: Duration = Duration::from_secs(10);

/// The connections that carry short writes, opened when the first of them comes.
pub(super) struct ShortWrites {
    route: Route,
    link: OnceCell<TcpLink>,
}

impl ShortWrites {
    pub(super) fn new(route: &Route) -> Self {
        Self { route: route.clone(), link: OnceCell::new() }
    }

    /// In this crate's own tests they take none, so that windows are tried with writes of every length.
    fn take(job: &WriteJob<'_>) -> bool {
        let bytes: u64 = job.blocks.iter().map(|block| u64::from(block.to.len)).sum();
        bytes <= SHORT_BYTES && !cfg!(test)
    }

    async fn write(&self, pair: &Pair, job: &WriteJob<'_>) -> Result<(), Fault> {
        let open = || TcpLink::open(pair.clone(), self.route.clone(), SHORT_AT_ONCE);
        self.link.get_or_try_init(open).await?.write(job).await
    }
}

/// The writes of one link by handoff, so that the owner of their windows can end them.
#[derive(Default)]
pub(super) struct Writes(Mutex<HashMap<HandoffId, Arc<Gate>>>);

/// What all writes of a handoff go through, until it is closed.
#[derive(Default)]
struct Gate {
    closed: CancellationToken,
    batches: Mutex<Vec<Arc<Batch>>>,
}

impl Gate {
    /// Lets a batch through, unless the gate is closed.
    fn admit(&self, batch: &Arc<Batch>) -> bool {
        let mut batches = self.batches();
        if self.closed.is_cancelled() {
            return false;
        }
        batches.retain(is_told_of);
        batches.push(Arc::clone(batch));
        true
    }

    /// Whether there is something to tell of.
    fn is_needed(&self) -> bool {
        let mut batches = self.batches();
        batches.retain(is_told_of);
        !batches.is_empty()
    }

    fn batches(&self) -> MutexGuard<'_, Vec<Arc<Batch>>> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes it; what came through before.
    fn close(&self) -> Vec<Arc<Batch>> {
        let batches = self.batches();
        self.closed.cancel();
        batches.clone()
    }
}

/// Whether the owner of windows has to know of a batch: others have ended by themselves.
fn is_told_of(batch: &Arc<Batch>) -> bool {
    !batch.is_settled() || batch.is_cut()
}

impl Writes {
    fn lock(&self) -> MutexGuard<'_, HashMap<HandoffId, Arc<Gate>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, handoff: HandoffId) -> Arc<Gate> {
        let mut gates = self.lock();
        // A gate that nobody goes through any more has nothing to tell: windows are closed by then.
        gates.retain(|_, gate| Arc::strong_count(gate) > 1 || gate.is_needed());
        Arc::clone(gates.entry(handoff).or_default())
    }

    /// Ends the writes of a handoff, as the owner of its windows asks: nothing of them is under way when this returns.
    pub(super) async fn fence(&self, fabric: &Fabric, handoff: HandoffId) -> Result<Answer, Denial> {
        let gate = self.lock().remove(&handoff);
        let batches = gate.map(|gate| gate.close()).unwrap_or_default();
        batches.iter().for_each(|batch| fabric.abort(batch));
        let all = join_all(batches.iter().map(|batch| batch.settled()));
        match timeout(FENCE_TIMEOUT, all).await {
            Ok(ends) if ends.iter().all(|by_itself| *by_itself) => Ok(Answer::done(Kind::Fenced)),
            _ => Err(Denial::Refused(Refusal::Unavailable)),
        }
    }
}

/// A window of the peer.
struct Opened {
    range: Descriptor,
    base: u64,
    remote: RemoteId,
}

impl Opened {
    /// Where a block is, if it is in this window.
    fn find(&self, block: &Descriptor) -> Option<(RemoteId, u64)> {
        let inside = lies_in(block, &self.range);
        inside.then(|| (self.remote, self.base + (block.offset - self.range.offset)))
    }
}

/// What windows are opened and closed with.
#[derive(Clone)]
struct Way {
    control: Control,
    fabric: Fabric,
    peer: Peer,
    tasks: TaskTracker,
}

/// Windows until the peer has closed them.
struct OpenWindows {
    way: Way,
    /// Those that the peer has opened, whether or not their keys were taken.
    numbers: Vec<u64>,
    windows: Vec<Opened>,
    batch: Option<Arc<Batch>>,
    turn: Option<OwnedSemaphorePermit>,
}

/// Windows, and how many blocks lie in them.
type Opening = BoxFuture<'static, Result<(OpenWindows, usize), Fault>>;

/// Windows that are being opened. Given up, it goes on beside: they are closed as soon as they are there.
struct Asked {
    opening: Option<Opening>,
    tasks: TaskTracker,
}

impl Asked {
    async fn opened(mut self) -> Result<(OpenWindows, usize), Fault> {
        let Some(opening) = &mut self.opening else { return Err(LinkError::Closed.into()) };
        let opened = opening.await;
        self.opening = None;
        opened
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(opening) = self.opening.take() {
            self.tasks.spawn(async move { drop(timeout(LATE_TIMEOUT, opening).await) });
        }
    }
}

impl FabricLink {
    /// Writes blocks; done when the peer has verified them.
    pub(crate) async fn write(&self, job: &WriteJob<'_>) -> Result<(), Fault> {
        if let Some(why) = self.peer.failure() {
            return Err(broken(Arc::clone(why)));
        }
        if !self.fabric.info().write {
            return Err(Fault::Refused(Refusal::Unreachable));
        }
        let write = async {
            match ShortWrites::take(job) {
                true => self.short_writes.write(&self.pair, job).await,
                false => self.write_all(job).await,
            }
        };
        tokio::select! {
            biased;
            () = self.control.closed() => Err(LinkError::Closed.into()),
            outcome = write => outcome,
        }
    }

    async fn write_all(&self, job: &WriteJob<'_>) -> Result<(), Fault> {
        let local = self.fabric.registered(&job.from.span(), Access::Local).await.map_err(unable)?;
        let gate = self.writes.enter(job.handoff);
        let mut groups = groups(job);
        let mut under_way = FuturesUnordered::new();
        under_way.extend(
            groups.by_ref().take(GROUPS_AT_ONCE).map(|group| self.write_group(job, &local, &gate, group)),
        );
        while let Some(written) = under_way.next().await {
            written?;
            under_way.extend(groups.next().map(|group| self.write_group(job, &local, &gate, group)));
        }
        Ok(())
    }

    /// Writes a group, in as many parts as its windows come in: few, unless every block has a grant of its own.
    async fn write_group(
        &self,
        job: &WriteJob<'_>,
        local: &Arc<Registration>,
        gate: &Gate,
        mut group: Range<usize>,
    ) -> Result<(), Fault> {
        while !group.is_empty() {
            group.start = self.write_part(job, local, gate, group.clone()).await?;
        }
        Ok(())
    }

    /// Writes as many of `blocks` as one answer has windows for, and says where the rest begins.
    async fn write_part(
        &self,
        job: &WriteJob<'_>,
        local: &Arc<Registration>,
        gate: &Gate,
        group: Range<usize>,
    ) -> Result<usize, Fault> {
        let turn = Arc::clone(&self.windows).acquire_owned();
        let turn = match group.start {
            0 => job.progress.queued(turn).await,
            _ => turn.await,
        };
        // Never closed; were it, so would the link be.
        let turn = turn.map_err(|_| LinkError::Closed)?;
        let blocks = &job.blocks[group.clone()];
        let (mut open, count) = self.open_windows(job.handoff, blocks, turn).await?;
        let group = group.start..group.start + count;
        let blocks = &job.blocks[group.clone()];
        let mut transfers = Vec::with_capacity(blocks.len());
        for block in blocks {
            let place = open.windows.iter().find_map(|window| window.find(&block.to));
            let (remote, offset) = place.ok_or_else(|| Fault::protocol(WireError::Field))?;
            let local = LocalRange { id: local.id, offset: block.from, len: block.to.len as usize };
            transfers.push(Transfer { verb: Verb::Write { remote, offset }, local });
        }
        let batch = Batch::new(self.peer.clone(), transfers, Box::new(Arc::clone(local)));
        if !gate.admit(&batch) {
            return Err(Fault::Refused(Refusal::NotGranted));
        }
        open.batch = Some(Arc::clone(&batch));
        // From here on the peer may have taken some of it.
        job.progress.add(blocks.iter().map(|block| block.to.len as usize).sum());
        let mut running = self.fabric.submit(batch).await.map_err(broken)?;
        let digests = if job.verify { self.digests(job, group.clone()).await } else { Vec::new() };
        tokio::select! {
            biased;
            // First: who closes it also ends what is posted, which is no fault of the fabric.
            () = gate.closed.cancelled() => return Err(Fault::Refused(Refusal::NotGranted)),
            ended = running.end() => ended.map_err(broken)?,
        }
        let to = blocks.iter().map(|block| block.to).collect();
        let windows = open.numbers.clone();
        let done = Write { handoff: job.handoff, first: group.start as u32, blocks: to, digests, windows };
        let answer = self.control.ask(Kind::Write, &done.encode()).await;
        // However it was answered, the peer has closed the windows.
        open.forget();
        answer.map_err(closed)?;
        group.clone().for_each(|index| job.progress.finish(index));
        Ok(group.end)
    }

    /// The digests of a group, found while it is on its way.
    async fn digests(&self, job: &WriteJob<'_>, group: Range<usize>) -> Vec<u64> {
        let mut digests = Vec::with_capacity(group.len());
        let mut unyielded = 0;
        for index in group {
            let block = &job.blocks[index];
            let seed = DigestSeed { handoff: job.handoff, epoch: self.pair.epoch, index: index as u32 };
            digests.push(job.from.block_digest(seed, block.from, block.to.len as usize));
            unyielded += block.to.len as usize;
            if unyielded >= super::YIELD_BYTES {
                unyielded = 0;
                tokio::task::yield_now().await;
            }
        }
        digests
    }

    /// Opens windows for the first of `blocks`; for how many.
    async fn open_windows(
        &self,
        handoff: HandoffId,
        blocks: &[BlockWrite],
        turn: OwnedSemaphorePermit,
    ) -> Result<(OpenWindows, usize), Fault> {
        let asked = Window::encode(self.fabric.kind(), handoff, blocks.iter().map(|block| block.to));
        let (control, fabric) = (self.control.clone(), self.fabric.clone());
        let way = Way { control, fabric, peer: self.peer.clone(), tasks: self.tasks.clone() };
        let (tasks, most) = (self.tasks.clone(), blocks.len());
        Asked { opening: Some(Box::pin(way.open(asked, most, turn))), tasks }.opened().await
    }
}

impl Way {
    /// Asks for windows, for at most so many blocks, and takes their keys.
    async fn open(
        self,
        asked: Vec<u8>,
        most: usize,
        turn: OwnedSemaphorePermit,
    ) -> Result<(OpenWindows, usize), Fault> {
        let (_, payload) = self.control.ask(Kind::Window, &asked).await.map_err(closed)?;
        let WindowIs { blocks: count, windows } = WindowIs::decode(&payload).map_err(Fault::protocol)?;
        let numbers = windows.iter().map(|window| window.window).collect();
        let (way, turn) = (self.clone(), Some(turn));
        let mut open = OpenWindows { way, numbers, windows: Vec::new(), batch: None, turn };
        let import = |OpenWindow { window: _, range, base, key }| {
            let (fabric, peer) = (&self.fabric, &self.peer);
            async move {
                let remote = fabric.import(peer, key).await.map_err(unable)?;
                Ok(Opened { range, base, remote })
            }
        };
        let mut fault = None;
        for imported in join_all(windows.into_iter().map(import)).await {
            match imported {
                Ok(window) => open.windows.push(window),
                Err(error) => fault = Some(error),
            }
        }
        match (fault, count as usize) {
            (Some(fault), _) => Err(fault),
            (None, count) if count > most => Err(Fault::protocol(WireError::Field)),
            (None, count) => Ok((open, count)),
        }
    }
}

impl OpenWindows {
    /// The peer has closed them.
    fn forget(&mut self) {
        self.numbers.clear();
        for window in self.windows.drain(..) {
            self.way.fabric.forget(&self.way.peer, window.remote);
        }
    }
}

impl Drop for OpenWindows {
    /// Tells the peer, once nothing of the group is under way, that its windows can be closed.
    fn drop(&mut self) {
        let (numbers, windows) = (std::mem::take(&mut self.numbers), std::mem::take(&mut self.windows));
        if numbers.is_empty() {
            return;
        }
        let (Way { control, fabric, peer, tasks }, batch) = (self.way.clone(), self.batch.take());
        let turn = self.turn.take();
        tasks.spawn(async move {
            let _turn = turn;
            if let Some(batch) = &batch {
                fabric.abort(batch);
                if !matches!(timeout(FENCE_TIMEOUT, batch.settled()).await, Ok(true)) {
                    // They are closed with their grant.
                    return;
                }
            }
            windows.iter().for_each(|window| fabric.forget(&peer, window.remote));
            for number in numbers {
                let window = encode_fence(HandoffId(number.into()));
                let asked = control.ask(Kind::Fence, &window);
                if !matches!(timeout(FENCE_TIMEOUT, asked).await, Ok(Ok(_))) {
                    return;
                }
            }
        });
    }
}

/// Runs of blocks that are written together.
fn groups<'a>(job: &'a WriteJob<'_>) -> impl Iterator<Item = Range<usize>> + 'a {
    let mut start = 0;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |block: &&BlockWrite| {
            bytes += u64::from(block.to.len);
            bytes <= GROUP_BYTES
        };
        let rest = &job.blocks[start..];
        let count = rest.iter().take(GROUP_BLOCKS).take_while(fits).count().max(1).min(rest.len());
        let group = start..start + count;
        start = group.end;
        (count > 0).then_some(group)
    })
}
