//! Blocks laid out for one reader: what it needs, in its order, and nothing else.

use std::sync::Arc;

use baton_config::{Epoch, HandoffId, KvGeometry, protocol::TicketBlock};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::time::Instant;

use super::source::Source;
use super::{ExportBlock, ExportError, Exporter, Inner, JOBS_IN_FLIGHT, Job, Place, Prepared, Publishing};
use crate::agent::{Integrity, RegionId};
use crate::digest::{BlockDigest, DigestSeed};
use crate::memory::HostMemory;
use crate::plan::{Choice, Packing, RelayoutPlan};
use crate::slab::{Slab, SlabError, Slot};

/// Where blocks are packed and peers read them.
#[derive(Debug, Clone)]
pub(super) struct Packer {
    pub(super) slab: Slab,
    region: RegionId,
}

/// How blocks become what a reader needs.
#[derive(Clone)]
struct Way {
    memory: HostMemory,
    /// To the packed form; one block becomes one block.
    plan: RelayoutPlan,
    packer: Packer,
}

impl Exporter {
    /// As [`Exporter::publish`], for a peer whose blocks have the geometry `reader`: packed where that is worth it (see
    /// [`RelayoutPlan::choice`]). Says which geometry the published blocks have; tickets must name it.
    ///
    /// Packed blocks take slots of a slab, at most half of them a call, also where the arena is host memory; blocks of a
    /// device are published as they are.
    ///
    /// # Errors
    /// [`ExportError`]; nothing was published then.
    ///
    /// # Panics
    /// When a block is not in the arena.
    pub async fn publish_for(
        &self,
        reader: KvGeometry,
        handoff: HandoffId,
        epoch: Epoch,
        blocks: &[ExportBlock],
        deadline: Instant,
    ) -> Result<(KvGeometry, Vec<TicketBlock>), ExportError> {
        let Some(way) = self.0.way_for(reader) else {
            return Ok((self.0.geometry, self.publish(handoff, epoch, blocks, deadline).await?));
        };
        let publishing = Publishing::begin(Arc::clone(&self.0), handoff);
        let (slab, wire) = (&way.packer.slab, *way.plan.dest());
        let (asked, slots) = (blocks.len(), slab.slots().div_ceil(2));
        if asked > slots {
            return Err(SlabError::TooMany { asked, slots }.into());
        }
        let mut slots = slab.acquire(asked, deadline).await?.into_iter();
        let seed_of = move |index| DigestSeed { handoff, epoch, index };
        let per_job = self.0.source.blocks_per_job(self.0.geometry.block_bytes());
        let job = |blocks: &[ExportBlock]| -> Job {
            let (way, integrity) = (way.clone(), self.0.options.integrity);
            let work: Vec<(ExportBlock, Slot)> = blocks.iter().copied().zip(slots.by_ref()).collect();
            Box::new(move || Ok(way.pack(work, integrity, seed_of)))
        };
        let jobs: Vec<Job> = blocks.chunks(per_job).map(job).collect();
        let jobs: Vec<_> = jobs.into_iter().map(|job| self.0.run(job)).collect();
        let prepare = stream::iter(jobs).buffered(JOBS_IN_FLIGHT).try_collect::<Vec<Vec<Prepared>>>();
        let prepared =
            tokio::time::timeout_at(deadline, prepare).await.map_err(|_| ExportError::Deadline)??;
        let place = Place::of(way.packer.region, &wire);
        Ok((wire, publishing.finish(prepared.into_iter().flatten().collect(), place)?))
    }
}

impl Inner {
    /// How to pack for `reader`; none where blocks go as they are.
    fn way_for(&self, reader: KvGeometry) -> Option<Way> {
        let plan = RelayoutPlan::new(self.geometry, reader).ok()?;
        if plan.choice(self.options.integrity == Integrity::Digest) != Choice::Packed {
            return None;
        }
        let (memory, packer) = match &self.source {
            Source::InPlace(memory) => (memory, self.packer()?),
            Source::Packed { memory, slab } => (memory, Packer { slab: slab.clone(), region: self.region }),
            Source::Direct(_) | Source::Staged { .. } => return None,
        };
        let plan = RelayoutPlan::new(self.geometry, plan.packed_geometry()?).ok()?;
        Some(Way { memory: memory.clone(), plan, packer })
    }

    /// The slab for packed blocks of an arena that needs none otherwise: made when it is first wanted.
    fn packer(&self) -> Option<Packer> {
        let make = || {
            let slab = Slab::new(self.options.slots, self.geometry.block_bytes(), "packed exports");
            let slab = slab.inspect_err(|error| tracing::warn!(%error, "blocks are not packed")).ok()?;
            let region = self.agent.register(slab.memory().clone());
            let region = region.inspect_err(|error| tracing::warn!(%error, "blocks are not packed")).ok()?;
            Some(Packer { slab, region })
        };
        self.packer.get_or_init(make).clone()
    }
}

impl Way {
    fn pack(
        &self,
        work: Vec<(ExportBlock, Slot)>,
        integrity: Integrity,
        seed_of: impl Fn(u32) -> DigestSeed,
    ) -> Vec<Prepared> {
        let (own, wire) = (self.plan.source(), self.plan.dest());
        let packing = Packing::of_memory(*own, self.memory.len());
        let mut bytes = vec![0; own.block_bytes()];
        let pack = |(block, slot): (ExportBlock, Slot)| {
            let Ok(()) = packing.try_for_each(block.block, |at, packed, len| {
                self.memory.read(at, &mut bytes[packed..][..len]);
                Ok::<(), std::convert::Infallible>(())
            });
            let at = wire.packed_at(slot.offset());
            self.plan.scatter(0, &bytes, 0..own.block_tokens, slot.memory(), |_| at);
            let digest = match integrity {
                Integrity::Digest => {
                    let mut digest = BlockDigest::new(seed_of(block.index));
                    slot.memory().digest(&mut digest, slot.offset(), wire.block_bytes());
                    digest.finish()
                }
                Integrity::Off => 0,
            };
            Prepared { index: block.index, offset: slot.offset(), digest, slot: Some(slot) }
        };
        work.into_iter().map(pack).collect()
    }
}
