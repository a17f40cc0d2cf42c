//! The taking side: reads a peer's blocks and lays their tokens out in the own arena.
//!
//! ```text
//! equal blocks, host arena     peer ──► destination block, verified there
//! long runs, not verified      peer ──► each run to its place in the destination blocks
//! other blocks, host arena     peer ──► verified in the session's buffer ──re-layout──► destination blocks
//! device arena                 the same into staging slots, each copied to the device while the next are read
//! device arena, direct         equal whole blocks: peer ──► destination block, verified there by the device
//! ```
//!
//! Rules on which the block pool relies:
//!
//! 1. Only bytes of tokens that were asked for are written, and the scales of their blocks, and on the re-layout path
//!    only after the digest of their whole source block was verified. On the direct path a block that fails leaves
//!    garbage in its destination.
//! 2. [`PullReport::upto`] and [`PullError::upto`] never count a token whose bytes were not verified *and* in place.
//! 3. Destination blocks belong to the pull until its future has returned or was dropped. Both fence: afterwards nothing
//!    of this pull writes the arena any more. Dropping may block for the rest of one copy to the device.
//! 4. A destination block in a device arena is written whole, the tokens outside the range with what they were.
//!    Nobody else may write any token of such a block during the pull.

use std::collections::BTreeSet;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use baton_config::protocol::TicketBlock;
use baton_config::{Bytes, Epoch, HandoffId, KvGeometry, WorkerId};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::agent::{DeviceMemory, RegionId};
use crate::arena_memory::ArenaMemory;
use crate::device::{Device, DeviceError};
use crate::digest::DigestSeed;
use crate::error::TransferError;
use crate::export::SCATTERED;
use crate::memory::MemoryError;
use crate::plan::{Mismatch, PlanCache, PlanCacheCounts, PlanError, RelayoutPlan};
use crate::session::{BlockRead, Descriptor, Destination, Expected, ReadReport, Session};
use crate::slab::{Slab, SlabAuditError, SlabCounts, SlabError};

mod direct;
mod fence;
mod lay_out;
mod staged;
#[cfg(test)]
mod tests;

use direct::Direct;
use lay_out::Target;

/// How an importer runs.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// Staging slots for a device arena, each of one block. Host arenas need none.
    pub slots: usize,
    /// Whether blocks are read straight into a device arena, by paths that reach its memory and if the device verifies
    /// digests itself; staged in host memory otherwise.
    pub direct: bool,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self { slots: 32, direct: false }
    }
}

/// What to pull.
#[derive(Debug, Clone)]
pub struct Pull {
    /// The handoff the blocks are granted under.
    pub handoff: HandoffId,
    /// The life of the peer that computed them.
    pub epoch: Epoch,
    /// Geometry of the peer's blocks.
    pub source: KvGeometry,
    /// The peer's blocks, as its tickets name them. Those without a wanted token are not read.
    pub blocks: Vec<TicketBlock>,
    /// The wanted tokens, by position in the sequence.
    pub tokens: Range<u32>,
    /// Own blocks of the sequence, from token 0 on, at least up to the last wanted token.
    pub dest_blocks: Vec<u32>,
}

/// What a pull did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PullReport {
    /// Every wanted token before this one is verified and in place: the end of the range, unless the peer's block
    /// of this token was not among [`Pull::blocks`].
    pub upto: u32,
    /// Bytes read from the peer.
    pub bytes: Bytes,
    /// From the call to the last token in place.
    pub elapsed: Duration,
}

/// A pull that stopped early. A further pull may go on from `upto`.
#[derive(Debug, thiserror::Error)]
#[error("the pull of KV blocks stopped at token {upto}")]
pub struct PullError {
    /// Every wanted token before this one is verified and in place.
    pub upto: u32,
    /// Bytes read from the peer and verified.
    pub bytes: Bytes,
    /// Why it stopped.
    #[source]
    pub cause: PullCause,
}

/// Why a pull stopped.
#[derive(Debug, thiserror::Error)]
pub enum PullCause {
    /// The transfer failed. The blocks of an [`TransferError::Integrity`] are named by their index in the sequence.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// No staging for the device: pull less at once, or later.
    #[error("no staging for imported blocks")]
    Staging(#[from] SlabError),
    /// The device failed to copy.
    #[error("an imported block could not be copied to its device")]
    Device(#[from] DeviceError),
    /// The tokens start within an own block whose scales cover all its tokens: start at the block.
    #[error(
        "tokens from {start} on start within a block of {block_tokens}, whose scales cover all its tokens"
    )]
    Unaligned {
        /// The first wanted token.
        start: u32,
        /// Tokens of an own block.
        block_tokens: u32,
    },
    /// The importer is shutting down.
    #[error("imports are shutting down")]
    Closed,
}

/// Pulls blocks of peers into one arena.
#[derive(Debug)]
pub struct Importer {
    memory: ArenaMemory,
    geometry: KvGeometry,
    plans: PlanCache,
    slab: Option<Slab>,
    /// The arena of a device, where paths may reach it, or why they may not.
    direct: Result<DeviceMemory, String>,
    jobs: TaskTracker,
}

impl Importer {
    /// An importer into `memory`, whose blocks have `geometry`.
    ///
    /// # Errors
    /// When there is no memory for the staging of a device arena.
    pub fn new(
        memory: ArenaMemory,
        geometry: KvGeometry,
        options: &ImportOptions,
    ) -> Result<Self, MemoryError> {
        let (slab, plans) = match &memory {
            ArenaMemory::Host(memory) => {
                (None, PlanCache::of_arena(geometry, arena_blocks(memory.len(), &geometry)))
            }
            ArenaMemory::Device(device) => {
                let slab = Slab::new(options.slots, geometry.block_bytes(), "import staging")?;
                slab.pin(device.as_ref());
                (Some(slab), PlanCache::packed(geometry))
            }
        };
        let direct = match &memory {
            ArenaMemory::Device(_) if !geometry.layout.is_block_first() => Err(SCATTERED.to_owned()),
            ArenaMemory::Device(device) if options.direct => DeviceMemory::new(Arc::clone(device)),
            ArenaMemory::Device(_) => Err("blocks are to be host-buffered".to_owned()),
            ArenaMemory::Host(_) => Err("the arena is host memory".to_owned()),
        };
        Ok(Self { memory, geometry, plans, slab, direct, jobs: TaskTracker::new() })
    }

    /// Why no path reads straight into the memory of a device; whether the path of a session does, it says itself.
    pub fn why_staged(&self) -> Option<&str> {
        self.direct.as_ref().err().map(String::as_str)
    }

    /// The plan from a peer's blocks to own ones, to refuse a peer early. It is made once for each kind of block.
    ///
    /// # Errors
    /// When the two cannot be reconciled; the message shows both.
    pub fn plan(&self, source: KvGeometry) -> Result<RelayoutPlan, PlanError> {
        let plan = self.plans.plan(source)?;
        let waits =
            plan.needs_whole_blocks() && !source.block_tokens.is_multiple_of(self.geometry.block_tokens);
        if waits && self.slab.is_some() {
            let (dest, reason) = (self.geometry, Mismatch::DeviceScales);
            return Err(PlanError::Geometry { source_geometry: source, dest, reason });
        }
        Ok(plan)
    }

    /// The same, of a peer that is to fill whole blocks: those of one rank may have only some heads of them.
    ///
    /// # Errors
    /// As [`Importer::plan`], and when heads would be missing.
    pub fn whole_plan(&self, source: KvGeometry) -> Result<RelayoutPlan, PlanError> {
        let plan = self.plan(source)?;
        match plan.covers_dest() {
            true => Ok(plan),
            false => {
                let (dest, reason) = (self.geometry, Mismatch::SomeHeads);
                Err(PlanError::Geometry { source_geometry: source, dest, reason })
            }
        }
    }

    /// How often a plan was at hand.
    pub fn plan_counts(&self) -> PlanCacheCounts {
        self.plans.counts()
    }

    /// Reads what is wanted from the peer and puts it in place; see the rules of this module.
    ///
    /// # Errors
    /// [`PullError`], with how far it came.
    ///
    /// # Panics
    /// When [`Pull::dest_blocks`] ends before the range or names a block outside the arena: a bug of the caller.
    pub async fn pull(
        &self,
        session: &Session,
        pull: Pull,
        deadline: Instant,
    ) -> Result<PullReport, PullError> {
        self.pull_from(session, pull, deadline).await
    }

    async fn pull_from<P: Peer>(
        &self,
        session: &P,
        pull: Pull,
        deadline: Instant,
    ) -> Result<PullReport, PullError> {
        let start = Instant::now();
        let mut progress = Progress { upto: pull.tokens.start, bytes: Bytes(0) };
        let done = self.pull_into(session, &pull, deadline, &mut progress).await;
        let Progress { upto, bytes } = progress;
        match done {
            Ok(()) => Ok(PullReport { upto, bytes, elapsed: start.elapsed() }),
            Err(cause) => Err(PullError { upto, bytes, cause }),
        }
    }

    async fn pull_into<P: Peer>(
        &self,
        session: &P,
        pull: &Pull,
        deadline: Instant,
        progress: &mut Progress,
    ) -> Result<(), PullCause> {
        let plan = self.plan(pull.source).map_err(TransferError::Geometry)?;
        if session.epoch() != pull.epoch {
            let (worker, current) = (session.worker().clone(), Some(session.epoch()));
            return Err(TransferError::Stale { worker, ticket: pull.epoch, current }.into());
        }
        if !pull.tokens.is_empty() && !plan.may_start_at(pull.tokens.start) {
            let (start, block_tokens) = (pull.tokens.start, self.geometry.block_tokens);
            return Err(PullCause::Unaligned { start, block_tokens });
        }
        self.check_table(pull);
        let (blocks, tokens) = in_reach(&plan, pull);
        let reader =
            Reader { session, handoff: pull.handoff, dest_blocks: &pull.dest_blocks, tokens, plan, deadline };
        let done = match (&self.memory, &self.slab) {
            (ArenaMemory::Device(device), Some(slab)) => {
                // Boxed: what a device needs would make every pull large.
                Box::pin(self.read_to_device(&reader, blocks, (device, slab), progress)).await
            }
            (memory, _) => reader.read_to_arena(&blocks, memory, progress).await,
        };
        if progress.upto < pull.tokens.end && !plan.may_start_at(progress.upto) {
            progress.upto -= progress.upto % self.geometry.block_tokens;
        }
        done
    }

    /// Reads `blocks` to a device arena: straight, as far as the path reaches it, and through staging.
    async fn read_to_device<P: Peer>(
        &self,
        reader: &Reader<'_, P>,
        mut blocks: Vec<TicketBlock>,
        (device, slab): (&Arc<dyn Device>, &Slab),
        progress: &mut Progress,
    ) -> Result<(), PullCause> {
        let Direct { placed, done } = direct::pull(reader, &blocks, &self.direct, &self.jobs).await;
        blocks.retain(|block| !placed.indices.contains(&block.index));
        staged::note(reader, &placed, progress);
        done?;
        staged::pull(reader, &blocks, placed, (device, slab), &self.jobs, progress).await
    }

    fn check_table(&self, pull: &Pull) {
        let blocks = self.memory.len() / self.geometry.block_bytes();
        let needed = self.geometry.blocks_for(pull.tokens.end) as usize;
        assert!(
            pull.tokens.is_empty() || pull.dest_blocks.len() >= needed,
            "tokens up to {} take {needed} blocks, the table has {}",
            pull.tokens.end,
            pull.dest_blocks.len()
        );
        for block in &pull.dest_blocks {
            assert!((*block as usize) < blocks, "block {block} is outside the arena of {blocks} blocks");
        }
    }

    /// Checks the books of the slab; all zeros without one.
    ///
    /// # Errors
    /// When a slot is lost or counted twice: a bug.
    pub fn audit(&self) -> Result<SlabCounts, SlabAuditError> {
        self.slab.as_ref().map_or_else(|| Ok(SlabCounts::default()), Slab::audit)
    }

    /// Waits for copies to the device that are under way.
    pub async fn close(&self) {
        self.jobs.close();
        self.jobs.wait().await;
    }
}

/// Blocks of an arena of `len` bytes.
fn arena_blocks(len: usize, geometry: &KvGeometry) -> u32 {
    u32::try_from(len / geometry.block_bytes()).unwrap_or(u32::MAX)
}

/// The blocks to read, by rising index and without a gap, and the wanted tokens they hold: what lies behind a block
/// that was not named could not be reported as in place.
fn in_reach(plan: &RelayoutPlan, pull: &Pull) -> (Vec<TicketBlock>, Range<u32>) {
    let wanted = plan.source_blocks(&pull.tokens);
    let mut named: Vec<TicketBlock> =
        pull.blocks.iter().filter(|block| wanted.contains(&block.index)).cloned().collect();
    named.sort_by_key(|block| block.index);
    named.dedup_by_key(|block| block.index);
    let gapless = wanted.zip(named).take_while(|(index, block)| *index == block.index);
    let blocks: Vec<TicketBlock> = gapless.map(|(_, block)| block).collect();
    let last = blocks.last().map(|block| plan.tokens_of(block.index, &pull.tokens).end);
    (blocks, pull.tokens.start..last.unwrap_or(pull.tokens.start))
}

/// What a pull asks of a [`Session`]; tests put a peer with faults in its place.
trait Peer: Sync {
    fn worker(&self) -> &WorkerId;
    fn epoch(&self) -> Epoch;
    /// As [`Session::verifies`].
    fn verifies(&self) -> bool;
    /// Counts blocks that failed their digests after a read that does not verify.
    fn count_corrupt(&self, blocks: usize);
    /// As [`Session::reaches`].
    fn reaches(&self, memory: &DeviceMemory) -> impl Future<Output = Result<(), String>> + Send;
    /// Keeps the promises of [`Session::read`].
    fn read(
        &self,
        handoff: HandoffId,
        blocks: &[BlockRead],
        into: Destination<'_>,
        deadline: Instant,
    ) -> impl Future<Output = Result<ReadReport, TransferError>> + Send;
}

impl Peer for Session {
    fn worker(&self) -> &WorkerId {
        self.peer()
    }

    fn epoch(&self) -> Epoch {
        self.epoch()
    }

    fn verifies(&self) -> bool {
        self.verifies()
    }

    fn count_corrupt(&self, blocks: usize) {
        self.count_corrupt(blocks);
    }

    async fn reaches(&self, memory: &DeviceMemory) -> Result<(), String> {
        self.reaches(memory).await
    }

    async fn read(
        &self,
        handoff: HandoffId,
        blocks: &[BlockRead],
        into: Destination<'_>,
        deadline: Instant,
    ) -> Result<ReadReport, TransferError> {
        self.read(handoff, blocks, into, deadline).await
    }
}

/// How far a pull is.
#[derive(Debug, Clone, Copy)]
struct Progress {
    upto: u32,
    bytes: Bytes,
}

/// What one pull reads with.
struct Reader<'a, P> {
    session: &'a P,
    handoff: HandoffId,
    dest_blocks: &'a [u32],
    /// The wanted tokens that the blocks to read hold.
    tokens: Range<u32>,
    plan: RelayoutPlan,
    deadline: Instant,
}

/// Blocks that a read brought: verified and in place.
#[derive(Debug, Default)]
struct Placed {
    indices: BTreeSet<u32>,
    bytes: u64,
}

impl<P: Peer> Reader<'_, P> {
    /// Reads `blocks` to a host arena.
    async fn read_to_arena(
        &self,
        blocks: &[TicketBlock],
        memory: &ArenaMemory,
        progress: &mut Progress,
    ) -> Result<(), PullCause> {
        let ArenaMemory::Host(memory) = memory else { unreachable!("a device arena has a slab") };
        let geometry = self.plan.dest();
        let count = arena_blocks(memory.len(), geometry);
        let at = |block: u32| geometry.arena_at(count, self.dest_blocks[block as usize]);
        let mut placed = Placed::default();
        let done = self.read(blocks, Target { memory, at: &at }, &mut placed).await;
        progress.bytes = Bytes(placed.bytes);
        for index in self.plan.source_blocks(&self.tokens) {
            if !placed.indices.contains(&index) {
                break;
            }
            progress.upto = self.plan.tokens_of(index, &self.tokens).end;
        }
        Ok(done?)
    }

    fn note(&self, placed: &mut Placed, indices: Vec<u32>) {
        placed.bytes += indices.len() as u64 * self.plan.source().block_bytes() as u64;
        placed.indices.extend(indices);
    }

    /// The end of a pull whose deadline passed after so many bytes.
    fn late(&self, moved: u64) -> TransferError {
        TransferError::Deadline { worker: self.session.worker().clone(), moved: Bytes(moved) }
    }

    fn block_read(&self, block: &TicketBlock, to: usize) -> BlockRead {
        // Plans refuse blocks over `plan::BLOCK_MAX_BYTES`, which is less.
        let len = u32::try_from(self.plan.source().block_bytes()).unwrap_or(u32::MAX);
        let source = Descriptor { region: RegionId(block.region), offset: block.offset, len };
        let seed = DigestSeed { handoff: self.handoff, epoch: self.session.epoch(), index: block.index };
        BlockRead { source, to, expected: Some(Expected { seed, digest: block.digest }) }
    }
}

/// Names the blocks of an integrity error by their index in the sequence instead of their position in one read.
fn in_sequence(error: TransferError, blocks: &[TicketBlock]) -> TransferError {
    let index_of = |position: usize| blocks.get(position).map_or(position, |block| block.index as usize);
    match error {
        TransferError::Integrity { worker, index, corrupt } => TransferError::Integrity {
            worker,
            index: index_of(index),
            corrupt: corrupt.into_iter().map(index_of).collect(),
        },
        other => other,
    }
}
