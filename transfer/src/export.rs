//! The giving side: makes finished blocks of the arena readable under a handoff, and takes them back.
//!
//! ```text
//! host arena            block ──digest in place──► granted where it is
//! host, by layers       block ──copy run by run──► staging slot ──digest each run while it is in cache──► granted in the slab
//! device arena          block ──copy in chunks──► staging slot ──digest each chunk while it is in cache──► granted in the slab
//! device arena, direct  block ──digest by the device──► granted where it is, for network libraries that reach it
//! ```
//!
//! Every exported block has an owner, its handoff, and an end: [`Exporter::acked`], [`Exporter::release`], or
//! [`Exporter::sweep`] once the handoff has shown no life for the lease. Several copies run at a time, on threads that
//! may block, so that the copy engine, hashing and serving overlap.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use baton_config::protocol::TicketBlock;
use baton_config::{Epoch, HandoffId, KvGeometry};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::agent::{Agent, Integrity, RegionId, RegisterError};
use crate::arena_memory::ArenaMemory;
use crate::device::{DeviceError, Submitted};
use crate::digest::DigestSeed;
use crate::jobs;
use crate::memory::{HostMemory, MemoryError};
use crate::plan::Packing;
use crate::session::Descriptor;
use crate::slab::{SlabAuditError, SlabCounts, SlabError, Slot, SlotState};

use self::packed::Packer;
pub(crate) use self::source::SCATTERED;
use self::source::Source;

mod packed;
mod source;
mod stage;
#[cfg(test)]
mod tests;

/// Jobs of one call that run at a time: one copies while others hash, and none starves the other handoffs.
const JOBS_IN_FLIGHT: usize = 3;

/// How an exporter runs.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// Staging slots for a device arena, each of one block. Host arenas need none.
    pub slots: usize,
    /// Whether digests are computed; without, tickets carry 0.
    pub integrity: Integrity,
    /// Longest a handoff keeps its blocks without a sign of life.
    pub lease: Duration,
    /// Whether blocks of a device arena are granted where they are, if network libraries reach its memory and the
    /// device computes digests itself; else, or where it does not, they are staged in host memory.
    pub direct: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { slots: 32, integrity: Integrity::Digest, lease: Duration::from_secs(30), direct: false }
    }
}

/// A finished block of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportBlock {
    /// Its index in the sequence.
    pub index: u32,
    /// Its number in the arena.
    pub block: u32,
}

/// Why there is no exporter.
#[derive(Debug, thiserror::Error)]
pub enum ExporterError {
    /// No memory for the staging slab.
    #[error("cannot set up staging for exports")]
    Memory(#[from] MemoryError),
    /// The agent takes no more regions.
    #[error("cannot register the memory of exports")]
    Register(#[from] RegisterError),
}

/// Why blocks were not published; none of the call were.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The staging slab is too small for the call, or full until the deadline: offer fewer blocks, or try later.
    #[error("no staging for exported blocks")]
    Staging(#[from] SlabError),
    /// The device failed to copy.
    #[error("an exported block could not be copied from its device")]
    Device(#[from] DeviceError),
    /// The blocks were not ready for the peer before the deadline.
    #[error("exported blocks were not ready before the deadline")]
    Deadline,
    /// The handoff was released meanwhile: forget it.
    #[error("the handoff was released while its blocks were being exported")]
    Released,
    /// The exporter is shutting down.
    #[error("exports are shutting down")]
    Closed,
}

/// Makes blocks of one arena readable; clones share it.
#[derive(Clone)]
pub struct Exporter(Arc<Inner>);

struct Inner {
    agent: Agent,
    geometry: KvGeometry,
    source: Source,
    /// Why the arena's own memory is not granted.
    why_staged: Option<String>,
    region: RegionId,
    /// For host arenas of which a reader needs little: see [`Exporter::publish_for`].
    packer: OnceLock<Option<Packer>>,
    options: ExportOptions,
    jobs: TaskTracker,
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    handoffs: HashMap<HandoffId, Export>,
    /// Tells a handoff from one of the same name that was released before.
    next_life: u64,
}

struct Export {
    life: u64,
    /// Calls of `publish` under way.
    publishing: usize,
    blocks: BTreeMap<u32, Published>,
    expires: Instant,
}

/// A block peers may read; dropping it gives its slot back.
struct Published {
    descriptor: Descriptor,
    slot: Option<Slot>,
}

/// A block on its way to being published.
struct Prepared {
    index: u32,
    offset: usize,
    digest: u64,
    slot: Option<Slot>,
}

impl Exporter {
    /// Registers `memory` itself, or a slab to stage it through, with `agent`.
    ///
    /// # Errors
    /// When there is no memory for the slab or the agent takes no more regions.
    pub fn new(
        agent: Agent,
        memory: ArenaMemory,
        geometry: KvGeometry,
        options: ExportOptions,
    ) -> Result<Self, ExporterError> {
        let (source, why_staged) = Source::of(memory, &geometry, &options)?;
        let region = match &source {
            Source::InPlace(memory) => agent.register(memory.clone())?,
            Source::Direct(memory) => agent.register_device(memory.clone())?,
            Source::Packed { slab, .. } | Source::Staged { slab, .. } => {
                agent.register(slab.memory().clone())?
            }
        };
        let (jobs, books) = (TaskTracker::new(), Mutex::default());
        let packer = OnceLock::new();
        let inner = Inner { agent, geometry, source, why_staged, region, packer, options, jobs, books };
        Ok(Self(Arc::new(inner)))
    }

    /// Most blocks one call of [`Exporter::publish`] takes: half the slab, so that one call fills while another is read.
    pub fn max_blocks(&self) -> usize {
        self.0.max_blocks()
    }

    /// Why blocks are copied to host memory before peers read them; nothing where peers read the arena itself.
    pub fn why_staged(&self) -> Option<&str> {
        self.0.why_staged.as_deref()
    }

    /// Makes `blocks` readable under `handoff` and says where they are, in the order given.
    ///
    /// The blocks must stay as they are until this returns, and where peers read the arena itself (see
    /// [`Exporter::why_staged`]) until they are acknowledged or released. Slots of all blocks are waited for together, behind
    /// whoever asked before. The call begins here, not when the future is first polled: a release in between ends it. Dropping
    /// the future publishes nothing.
    ///
    /// # Errors
    /// [`ExportError`]; nothing was published then.
    ///
    /// # Panics
    /// When a block is not in the arena.
    pub fn publish(
        &self,
        handoff: HandoffId,
        epoch: Epoch,
        blocks: &[ExportBlock],
        deadline: Instant,
    ) -> impl Future<Output = Result<Vec<TicketBlock>, ExportError>> + Send + use<> {
        let publishing = Publishing::begin(Arc::clone(&self.0), handoff);
        let blocks = blocks.to_vec();
        async move {
            let inner = &publishing.inner;
            let prepared = inner.prepare(handoff, epoch, &blocks, deadline).await?;
            let place = Place::of(inner.region, &inner.geometry);
            publishing.finish(prepared, place)
        }
    }

    /// The peer is done with these blocks: their place may be used again.
    pub fn acked(&self, handoff: HandoffId, indices: impl IntoIterator<Item = u32>) {
        let mut books = self.0.books();
        let Some(export) = books.handoffs.get_mut(&handoff) else { return };
        export.expires = Instant::now() + self.0.options.lease;
        let done: Vec<Published> = indices.into_iter().filter_map(|i| export.blocks.remove(&i)).collect();
        let descriptors: Vec<Descriptor> = done.iter().map(|block| block.descriptor).collect();
        self.0.agent.ungrant(handoff, &descriptors);
    }

    /// The handoff showed life: its lease starts anew.
    pub fn touch(&self, handoff: HandoffId) {
        if let Some(export) = self.0.books().handoffs.get_mut(&handoff) {
            export.expires = Instant::now() + self.0.options.lease;
        }
    }

    /// Withdraws everything published under `handoff`; a call of [`Exporter::publish`] under way fails.
    ///
    /// Done when nothing of this agent reads the blocks for a peer any more. Slots are given back then and not before,
    /// also when the future is dropped after its first poll.
    pub async fn release(&self, handoff: HandoffId) {
        let (withdrawn, revoked) = {
            let mut books = self.0.books();
            (books.handoffs.remove(&handoff), self.0.agent.revoke(handoff))
        };
        // Somebody else may have withdrawn it a moment ago: its end is waited for all the same.
        let Some(withdrawn) = withdrawn else { return revoked.settled().await };
        for slot in withdrawn.blocks.values().filter_map(|block| block.slot.as_ref()) {
            slot.set_state(SlotState::Quarantined);
        }
        let settled = self.0.jobs.spawn(async move {
            revoked.settled().await;
            drop(withdrawn);
        });
        // It cannot be aborted; it fails only when the runtime ends, and then nothing is served any more.
        let _ = settled.await;
    }

    /// Releases every handoff whose lease is over and says which.
    pub async fn sweep(&self, now: Instant) -> Vec<HandoffId> {
        let over = |export: &Export| export.publishing == 0 && export.expires <= now;
        let expired: Vec<HandoffId> = {
            let books = self.0.books();
            books.handoffs.iter().filter(|(_, export)| over(export)).map(|(handoff, _)| *handoff).collect()
        };
        for handoff in &expired {
            self.release(*handoff).await;
        }
        expired
    }

    /// Checks the books of the slab; all zeros without one.
    ///
    /// # Errors
    /// When a slot is lost or counted twice: a bug.
    pub fn audit(&self) -> Result<SlabCounts, SlabAuditError> {
        match &self.0.source {
            Source::InPlace(_) => match self.0.packer.get() {
                Some(Some(packer)) => packer.slab.audit(),
                None | Some(None) => Ok(SlabCounts::default()),
            },
            Source::Direct(_) => Ok(SlabCounts::default()),
            Source::Packed { slab, .. } | Source::Staged { slab, .. } => slab.audit(),
        }
    }

    /// Blocks published now.
    pub fn published(&self) -> usize {
        self.0.books().handoffs.values().map(|export| export.blocks.len()).sum()
    }

    /// Withdraws everything and waits for copies under way.
    pub async fn close(&self) {
        self.0.jobs.close();
        let handoffs: Vec<HandoffId> = self.0.books().handoffs.keys().copied().collect();
        for handoff in handoffs {
            self.release(handoff).await;
        }
        self.0.jobs.wait().await;
    }
}

/// The region blocks are published in, and their length.
#[derive(Debug, Clone, Copy)]
struct Place {
    region: RegionId,
    len: u32,
}

impl Place {
    fn of(region: RegionId, geometry: &KvGeometry) -> Self {
        // Geometries over `BLOCK_MAX_BYTES`, which is less, are refused.
        Self { region, len: u32::try_from(geometry.block_bytes()).unwrap_or(u32::MAX) }
    }
}

/// A call of `publish` under way, in the books until it ends one way or another.
struct Publishing {
    inner: Arc<Inner>,
    handoff: HandoffId,
    life: u64,
}

impl Publishing {
    fn begin(inner: Arc<Inner>, handoff: HandoffId) -> Self {
        let mut books = inner.books();
        let expires = Instant::now() + inner.options.lease;
        books.next_life += 1;
        let life = books.next_life;
        let export = books.handoffs.entry(handoff).or_insert_with(|| Export {
            life,
            publishing: 0,
            blocks: BTreeMap::new(),
            expires,
        });
        export.publishing += 1;
        export.expires = expires;
        let life = export.life;
        drop(books);
        Self { inner, handoff, life }
    }

    /// Grants the blocks, unless the handoff was released since the call began.
    fn finish(self, prepared: Vec<Prepared>, place: Place) -> Result<Vec<TicketBlock>, ExportError> {
        let mut books = self.inner.books();
        let export = books.handoffs.get_mut(&self.handoff).filter(|export| export.life == self.life);
        let export = export.ok_or(ExportError::Released)?;
        export.expires = Instant::now() + self.inner.options.lease;
        let (mut tickets, mut indices) = (Vec::new(), BTreeSet::new());
        // Dropped at the end: a slot is free for others when no grant covers it any more.
        let mut replaced: Vec<Published> = Vec::new();
        for Prepared { index, offset, digest, slot } in prepared {
            let offset = offset as u64;
            let descriptor = Descriptor { region: place.region, offset, len: place.len };
            if let Some(slot) = &slot {
                slot.set_state(SlotState::Published);
            }
            tickets.push(TicketBlock { index, region: descriptor.region.0, offset, digest });
            indices.insert(index);
            let before = export.blocks.insert(index, Published { descriptor, slot });
            replaced.extend(before.filter(|before| before.descriptor != descriptor));
        }
        let places: Vec<Descriptor> = replaced.iter().map(|block| block.descriptor).collect();
        self.inner.agent.ungrant(self.handoff, &places);
        // Of an index that was named twice the last counts: the slot of the first is another's from here on.
        let granted = indices.iter().filter_map(|index| export.blocks.get(index));
        self.inner.agent.grant(self.handoff, granted.map(|block| block.descriptor).collect());
        drop(books);
        Ok(tickets)
    }
}

impl Drop for Publishing {
    fn drop(&mut self) {
        let mut books = self.inner.books();
        let Some(export) = books.handoffs.get_mut(&self.handoff).filter(|export| export.life == self.life)
        else {
            return;
        };
        export.publishing -= 1;
        if export.publishing == 0 && export.blocks.is_empty() {
            books.handoffs.remove(&self.handoff);
        }
    }
}

/// What runs on a thread that may block.
type Job = Box<dyn FnOnce() -> Result<Vec<Prepared>, DeviceError> + Send>;

impl Inner {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes blocks ready to be granted.
    async fn prepare(
        &self,
        handoff: HandoffId,
        epoch: Epoch,
        blocks: &[ExportBlock],
        deadline: Instant,
    ) -> Result<Vec<Prepared>, ExportError> {
        let slots = self.slots(blocks.len(), deadline).await?;
        let jobs = self.jobs_of(handoff, epoch, blocks, slots);
        // Collected first: a closure in the stream would make the compiler lose sight of the future being `Send`.
        let jobs: Vec<_> = jobs.into_iter().map(|job| self.run(job)).collect();
        let prepare = stream::iter(jobs).buffered(JOBS_IN_FLIGHT).try_collect::<Vec<Vec<Prepared>>>();
        let prepared =
            tokio::time::timeout_at(deadline, prepare).await.map_err(|_| ExportError::Deadline)??;
        Ok(prepared.into_iter().flatten().collect())
    }

    /// One slot for each of `count` blocks, or none where the arena needs no staging.
    async fn slots(&self, count: usize, deadline: Instant) -> Result<Vec<Option<Slot>>, SlabError> {
        let (Source::Packed { slab, .. } | Source::Staged { slab, .. }) = &self.source else {
            return Ok(std::iter::repeat_with(|| None).take(count).collect());
        };
        let slots = self.max_blocks();
        if count > slots {
            return Err(SlabError::TooMany { asked: count, slots });
        }
        Ok(slab.acquire(count, deadline).await?.into_iter().map(Some).collect())
    }

    fn max_blocks(&self) -> usize {
        match &self.source {
            Source::InPlace(_) | Source::Direct(_) => usize::MAX,
            Source::Packed { slab, .. } | Source::Staged { slab, .. } => slab.slots().div_ceil(2),
        }
    }

    /// Splits the work of a call into jobs of neighbouring blocks.
    fn jobs_of(
        &self,
        handoff: HandoffId,
        epoch: Epoch,
        blocks: &[ExportBlock],
        slots: Vec<Option<Slot>>,
    ) -> Vec<Job> {
        let (geometry, bytes) = (self.geometry, self.geometry.block_bytes());
        let per_job = self.source.blocks_per_job(bytes);
        let mut slots = slots.into_iter();
        let job = |blocks: &[ExportBlock]| -> Job {
            let (source, integrity) = (self.source.clone(), self.options.integrity);
            let work: Vec<(ExportBlock, Option<Slot>)> = blocks.iter().copied().zip(slots.by_ref()).collect();
            let seed_of = move |index| DigestSeed { handoff, epoch, index };
            Box::new(move || match source {
                Source::InPlace(memory) => Ok(source::in_place(&memory, work, bytes, integrity, seed_of)),
                Source::Direct(memory) => source::on_device(&memory, work, bytes, integrity, seed_of),
                Source::Packed { memory, .. } => {
                    let packing = Packing::of_memory(geometry, memory.len());
                    let copy = |places: &[(usize, usize)], to: &HostMemory, len| {
                        places.iter().for_each(|(from, at)| memory.copy_to(*from, to, *at, len));
                        Ok(Submitted::ended())
                    };
                    stage::stage(copy, with_slots(work), &packing, integrity, seed_of)
                }
                Source::Staged { device, .. } => {
                    let packing = Packing::of_memory(geometry, device.len());
                    let copy = |places: &[(usize, usize)], to: &HostMemory, len| {
                        device.submit_blocks_to_host(places, to, len)
                    };
                    stage::stage(copy, with_slots(work), &packing, integrity, seed_of)
                }
            })
        };
        blocks.chunks(per_job).map(job).collect()
    }

    async fn run(&self, job: Job) -> Result<Vec<Prepared>, ExportError> {
        Ok(jobs::start(&self.jobs, job).await.ok_or(ExportError::Closed)??)
    }
}

/// Every block of a slab has its slot.
fn with_slots(work: Vec<(ExportBlock, Option<Slot>)>) -> Vec<(ExportBlock, Slot)> {
    work.into_iter().filter_map(|(block, slot)| Some((block, slot?))).collect()
}
