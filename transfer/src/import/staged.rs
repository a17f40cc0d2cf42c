//! Pulls into a device arena: blocks take shape in staging slots and are copied to the device from there.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use baton_config::protocol::TicketBlock;
use baton_config::{BlockAt, Bytes};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::TaskTracker;

use super::fence::Fence;
use super::{Peer, Placed, Progress, PullCause, Reader, Target};
use crate::device::{Device, DeviceError};
use crate::jobs;
use crate::plan::Packing;
use crate::slab::{Slab, SlabError, Slot};

/// Reads `blocks`, by rising index, into staging slots, a group at a time, and copies finished destination blocks to
/// the device while the next group is read. `direct` is what is in place already: equal blocks of both sides.
pub(super) async fn pull<P: Peer>(
    reader: &Reader<'_, P>,
    blocks: &[TicketBlock],
    direct: Placed,
    (device, slab): (&Arc<dyn Device>, &Slab),
    jobs: &TaskTracker,
    progress: &mut Progress,
) -> Result<(), PullCause> {
    if blocks.is_empty() {
        return Ok(());
    }
    let budget = Budget::of(reader, blocks, slab)?;
    let free = slab.acquire(budget.slots, reader.deadline).await?;
    let fence = Fence::default();
    // Declared before what it guards, so that it is dropped after the reads and before the caller goes on.
    let _close = fence.close_on_drop();
    let mut stage = Stage {
        reader,
        device,
        jobs,
        fence: fence.clone(),
        packing: Packing::of_memory(*reader.plan.dest(), device.len()),
        free,
        open: BTreeMap::new(),
        flights: FuturesUnordered::new(),
        flushed: direct.indices.clone(),
        placed: direct,
    };
    let mut rest = blocks;
    let mut done = Ok(());
    while !rest.is_empty() && done.is_ok() {
        let (group, later) = rest.split_at(budget.group(reader, rest));
        done = stage.read_group(group).await;
        stage.flush_finished();
        rest = later;
    }
    let landed = stage.land_all().await;
    progress.bytes = Bytes(stage.placed.bytes);
    progress.upto = upto(reader, &stage.flushed);
    done.and(landed)
}

/// Notes what blocks read directly amount to.
pub(super) fn note<P: Peer>(reader: &Reader<'_, P>, direct: &Placed, progress: &mut Progress) {
    progress.bytes = Bytes(direct.bytes);
    progress.upto = upto(reader, &direct.indices);
}

/// Wanted tokens in place from the start of the range without a gap, given the destination blocks in place.
fn upto<P: Peer>(reader: &Reader<'_, P>, in_place: &BTreeSet<u32>) -> u32 {
    let (tokens, size) = (&reader.tokens, reader.plan.dest().block_tokens);
    let mut upto = tokens.start;
    while upto < tokens.end && in_place.contains(&(upto / size)) {
        upto = wanted_of(reader, upto / size).end;
    }
    upto
}

/// The wanted tokens of a destination block.
fn wanted_of<P: Peer>(reader: &Reader<'_, P>, dest: u32) -> std::ops::Range<u32> {
    let (size, tokens) = (reader.plan.dest().block_tokens, &reader.tokens);
    let start = dest.saturating_mul(size);
    start.max(tokens.start)..start.saturating_add(size).min(tokens.end)
}

/// How many slots a pull takes, and how many of them one group of reads.
struct Budget {
    slots: usize,
    group: usize,
}

impl Budget {
    fn of<P: Peer>(reader: &Reader<'_, P>, blocks: &[TicketBlock], slab: &Slab) -> Result<Self, SlabError> {
        let of_block = |block: &TicketBlock| reader.plan.pieces(block.index, reader.tokens.clone()).count();
        let all: BTreeSet<u32> = blocks.iter().flat_map(|block| dest_of(reader, block)).collect();
        let widest = blocks.iter().map(of_block).max().unwrap_or(0);
        // One group being read and one being copied; but no more than half the slab, so that another pull gets its
        // turn, unless less would not do: then each waits for the other.
        let slots = all.len().min(slab.slots().div_ceil(2)).max(widest);
        if slots > slab.slots() {
            return Err(SlabError::TooMany { asked: slots, slots: slab.slots() });
        }
        Ok(Self { slots, group: (slots / 2).max(widest) })
    }

    /// How many of `blocks` are read together: at least one.
    fn group<P: Peer>(&self, reader: &Reader<'_, P>, blocks: &[TicketBlock]) -> usize {
        let mut dest = BTreeSet::new();
        let fits = |block: &&TicketBlock| {
            dest.extend(dest_of(reader, block));
            dest.len() <= self.group
        };
        blocks.iter().take_while(fits).count().max(1)
    }
}

/// The destination blocks that hold wanted tokens of a source block.
fn dest_of<P: Peer>(reader: &Reader<'_, P>, block: &TicketBlock) -> Vec<u32> {
    reader.plan.pieces(block.index, reader.tokens.clone()).map(|piece| piece.dest_block).collect()
}

/// What a job on another thread gives back: the destination block it worked for, and its slot.
type Landed = Result<Option<(u32, Slot)>, DeviceError>;

/// A job on another thread.
type Flight = Pin<Box<dyn Future<Output = Option<Landed>> + Send>>;

/// The state of one pull through staging. Every slot is in `free`, in `open` or with a job.
struct Stage<'a, P> {
    reader: &'a Reader<'a, P>,
    device: &'a Arc<dyn Device>,
    jobs: &'a TaskTracker,
    fence: Fence,
    packing: Packing,
    free: Vec<Slot>,
    /// Destination blocks taking shape.
    open: BTreeMap<u32, Slot>,
    /// Copies to the device under way.
    flights: FuturesUnordered<Flight>,
    /// Destination blocks in place.
    flushed: BTreeSet<u32>,
    placed: Placed,
}

impl<P: Peer> Stage<'_, P> {
    /// Reads a group of source blocks into the slots of their destination blocks.
    async fn read_group(&mut self, group: &[TicketBlock]) -> Result<(), PullCause> {
        for dest in group.iter().flat_map(|block| dest_of(self.reader, block)) {
            if !self.open.contains_key(&dest) {
                let slot = self.slot().await?;
                let slot = self.with_other_tokens(dest, slot).await?;
                self.open.insert(dest, slot);
            }
        }
        let Some(memory) = self.open.values().next().map(|slot| slot.memory().clone()) else {
            return Ok(());
        };
        let geometry = self.reader.plan.dest();
        let slot_at = |(block, slot): (&u32, &Slot)| (*block, geometry.packed_at(slot.offset()));
        let places: BTreeMap<u32, BlockAt> = self.open.iter().map(slot_at).collect();
        let target = Target { memory: &memory, at: &|block| places[&block] };
        Ok(self.reader.read(group, target, &mut self.placed).await?)
    }

    /// A free slot, waiting for a copy to end if there is none.
    async fn slot(&mut self) -> Result<Slot, PullCause> {
        loop {
            if let Some(slot) = self.free.pop() {
                return Ok(slot);
            }
            self.land_one().await?;
        }
    }

    /// Fills a slot with what its block holds now, if tokens outside the range or heads of others share the block.
    async fn with_other_tokens(&mut self, dest: u32, slot: Slot) -> Result<Slot, PullCause> {
        let plan = &self.reader.plan;
        let tokens = &self.reader.tokens;
        let start = u64::from(dest) * u64::from(plan.dest().block_tokens);
        let end = start + u64::from(plan.dest().block_tokens);
        if start >= u64::from(tokens.start) && end <= u64::from(tokens.end) && plan.covers_dest() {
            return Ok(slot);
        }
        let (device, block, packing) = (Arc::clone(self.device), self.block_of(dest), self.packing);
        let load = jobs::start(self.jobs, move || {
            packing.try_for_each(block, |at, packed, len| {
                device.copy_to_host(at, slot.memory(), slot.offset() + packed, len)
            })?;
            Ok(Some((dest, slot)))
        });
        let loaded = timeout_at(self.reader.deadline, load).await.map_err(|_| self.late())?;
        joined(loaded)?.map(|(_, slot)| slot).ok_or(PullCause::Closed)
    }

    /// Starts the copies of all open blocks whose wanted tokens are there.
    fn flush_finished(&mut self) {
        let finished: Vec<u32> = self.open.keys().copied().filter(|dest| self.is_complete(*dest)).collect();
        for dest in finished {
            if let Some(slot) = self.open.remove(&dest) {
                self.flights.push(self.flush(dest, slot));
            }
        }
    }

    fn is_complete(&self, dest: u32) -> bool {
        let tokens = wanted_of(self.reader, dest);
        self.reader.plan.source_blocks(&tokens).all(|index| self.placed.indices.contains(&index))
    }

    fn flush(&self, dest: u32, slot: Slot) -> Flight {
        let (device, fence) = (Arc::clone(self.device), self.fence.clone());
        let (block, packing) = (self.block_of(dest), self.packing);
        Box::pin(jobs::start(self.jobs, move || {
            let Some(_inside) = fence.enter() else { return Ok(None) };
            packing.try_for_each(block, |at, packed, len| {
                device.copy_from_host(at, slot.memory(), slot.offset() + packed, len)
            })?;
            Ok(Some((dest, slot)))
        }))
    }

    /// Waits for one copy to end.
    async fn land_one(&mut self) -> Result<(), PullCause> {
        let landed = timeout_at(self.reader.deadline, self.flights.next()).await;
        let Some(landed) = landed.map_err(|_| self.late())? else {
            unreachable!("a pull takes enough slots for one group and the block before it");
        };
        if let Some((dest, slot)) = joined(landed)? {
            self.flushed.insert(dest);
            self.free.push(slot);
        }
        Ok(())
    }

    /// Waits for all copies to end; the first failure is returned.
    async fn land_all(&mut self) -> Result<(), PullCause> {
        let mut done = Ok(());
        while !self.flights.is_empty() {
            done = done.and(self.land_one().await);
            if Instant::now() >= self.reader.deadline {
                break;
            }
        }
        done
    }

    /// The block of the arena that is block `dest` of the sequence.
    fn block_of(&self, dest: u32) -> u32 {
        self.reader.dest_blocks[dest as usize]
    }

    fn late(&self) -> PullCause {
        self.reader.late(self.placed.bytes).into()
    }
}

/// What a job did; it is lost when the runtime ends.
fn joined(landed: Option<Landed>) -> Result<Option<(u32, Slot)>, PullCause> {
    Ok(landed.ok_or(PullCause::Closed)??)
}
