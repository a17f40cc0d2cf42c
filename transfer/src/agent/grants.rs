//! Which bytes may be read under which handoff, and who is being served from them now.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_config::HandoffId;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::agent::RegionId;
use crate::error::Refusal;
use crate::session::Descriptor;

/// Grants by handoff.
#[derive(Debug, Default)]
pub(crate) struct Grants(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    live: HashMap<HandoffId, Grant>,
    /// What is still served under grants that have ended: who ends one of the same name waits for that, too.
    ending: Vec<(HandoffId, TaskTracker)>,
}

#[derive(Debug, Default)]
struct Grant {
    /// Region, start and length. They may overlap.
    ranges: BTreeSet<(RegionId, u64, u32)>,
    /// Length of the longest there ever was.
    longest: u32,
    revoked: CancellationToken,
    serving: TaskTracker,
}

/// The right to serve one request; ends its grant's wait when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    /// Fires when the grant ends: stop reading the memory.
    pub(crate) revoked: CancellationToken,
    _serving: TaskTrackerToken,
}

/// The end of a grant, to be awaited by who wants to reuse its memory at once.
#[derive(Debug)]
pub struct Revoked(Vec<TaskTracker>);

impl Revoked {
    /// Waits until nothing of this agent reads the granted memory for a peer, or receives into it, any more.
    ///
    /// A peer reading it over `shm` or `cma` is not waited for: it checks the grant after copying and discards what it has.
    pub async fn settled(self) {
        for serving in self.0 {
            serving.wait().await;
        }
    }

    /// Both ends.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }
}

impl Grants {
    pub(crate) fn add(&self, handoff: HandoffId, descriptors: &[Descriptor]) {
        let mut table = self.lock();
        let grant = table.live.entry(handoff).or_default();
        grant.ranges.extend(descriptors.iter().map(|d| (d.region, d.offset, d.len)));
        grant.longest = descriptors.iter().map(|d| d.len).fold(grant.longest, u32::max);
    }

    /// Takes `descriptors`, as they were granted, out of a grant; reads being served from them go on.
    pub(crate) fn narrow(&self, handoff: HandoffId, descriptors: &[Descriptor]) {
        if let Some(grant) = self.lock().live.get_mut(&handoff) {
            descriptors.iter().for_each(|descriptor| grant.take_out(descriptor));
        }
    }

    pub(crate) fn revoke(&self, handoff: HandoffId) -> Revoked {
        let mut table = self.lock();
        if let Some(grant) = table.live.remove(&handoff) {
            table.end(handoff, grant);
        }
        let ending = table.ending.iter().filter(|(of, _)| *of == handoff);
        Revoked(ending.map(|(_, serving)| serving.clone()).collect())
    }

    /// Ends all of them and names them.
    pub(crate) fn clear(&self) -> Vec<HandoffId> {
        let mut table = self.lock();
        let ended = std::mem::take(&mut table.live);
        ended
            .into_iter()
            .map(|(handoff, grant)| {
                table.end(handoff, grant);
                handoff
            })
            .collect()
    }

    /// Allows serving `blocks`, if every one lies inside a granted range.
    pub(crate) fn permit(&self, handoff: HandoffId, blocks: &[Descriptor]) -> Result<Permit, Refusal> {
        let table = self.lock();
        let grant = table.live.get(&handoff).ok_or(Refusal::NotGranted)?;
        if !grant.cover(blocks) {
            return Err(Refusal::OutsideGrant);
        }
        Ok(Permit { revoked: grant.revoked.clone(), _serving: grant.serving.token() })
    }

    /// What a grant has around the first of `blocks`: at most `most` ranges, no longer than those blocks need, and how
    /// many blocks lie in them. Ranges that were granted side by side count as one.
    pub(crate) fn around(
        &self,
        handoff: HandoffId,
        blocks: &[Descriptor],
        most: usize,
    ) -> Option<(Vec<Descriptor>, usize)> {
        let table = self.lock();
        let grant = table.live.get(&handoff)?;
        let mut found: Vec<Around> = Vec::new();
        let mut count = 0;
        for block in blocks {
            let granted = grant.range_of(block)?;
            if !found.iter_mut().rev().any(|around| around.take(block, &granted)) {
                if found.len() == most {
                    break;
                }
                found.push(Around::new(block, granted));
            }
            count += 1;
        }
        Some((found.into_iter().map(|around| around.needed()).collect(), count))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn end(&mut self, handoff: HandoffId, grant: Grant) {
        grant.revoked.cancel();
        grant.serving.close();
        self.ending.retain(|(_, serving)| !serving.is_empty());
        if !grant.serving.is_empty() {
            self.ending.push((handoff, grant.serving));
        }
    }
}

/// A granted range and the part of it that some blocks need.
struct Around {
    region: RegionId,
    granted: Range<u64>,
    needed: Range<u64>,
}

impl Around {
    fn new(block: &Descriptor, granted: Range<u64>) -> Self {
        let needed = block.offset..block.offset + u64::from(block.len);
        Self { region: block.region, granted, needed }
    }

    /// Takes a block of this range, or of one right beside it.
    fn take(&mut self, block: &Descriptor, granted: &Range<u64>) -> bool {
        let inside = self.granted.start <= granted.start && granted.end <= self.granted.end;
        let beside = granted.start == self.granted.end || granted.end == self.granted.start;
        let needed =
            self.needed.start.min(block.offset)..self.needed.end.max(block.offset + u64::from(block.len));
        let fits = needed.end - needed.start <= u64::from(u32::MAX);
        if self.region != block.region || !(inside || beside) || !fits {
            return false;
        }
        self.granted = self.granted.start.min(granted.start)..self.granted.end.max(granted.end);
        self.needed = needed;
        true
    }

    fn needed(self) -> Descriptor {
        let Range { start, end } = self.needed;
        Descriptor { region: self.region, offset: start, len: (end - start) as u32 }
    }
}

impl Grant {
    /// The granted range that a block lies in.
    fn range_of(&self, block: &Descriptor) -> Option<Range<u64>> {
        let end = block.offset.checked_add(u64::from(block.len))?;
        let before = self.ranges.range(..=(block.region, block.offset, u32::MAX)).rev();
        // One that begins earlier may be longer, but none reaches further than the longest.
        let mut near = before.map_while(|(region, from, len)| {
            let reaches = from.saturating_add(u64::from(self.longest)) >= end;
            (*region == block.region && reaches).then(|| *from..from.saturating_add(u64::from(*len)))
        });
        near.find(|range| end <= range.end)
    }

    /// Takes a range out; where none of this length begins there, all that do.
    fn take_out(&mut self, Descriptor { region, offset, len }: &Descriptor) {
        if !self.ranges.remove(&(*region, *offset, *len)) {
            let there = (*region, *offset, 0)..=(*region, *offset, u32::MAX);
            self.ranges.retain(|range| !there.contains(range));
        }
    }

    /// Whether each block lies inside a range. Neighbours often share one: the last found is tried first.
    fn cover(&self, blocks: &[Descriptor]) -> bool {
        let mut found: Option<(RegionId, std::ops::Range<u64>)> = None;
        blocks.iter().all(|block| {
            let Some(end) = block.offset.checked_add(u64::from(block.len)) else { return false };
            let inside = |(region, range): &(RegionId, std::ops::Range<u64>)| {
                *region == block.region && range.start <= block.offset && end <= range.end
            };
            if !found.as_ref().is_some_and(inside) {
                found = self.range_of(block).map(|range| (block.region, range));
            }
            found.as_ref().is_some_and(inside)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ID: HandoffId = HandoffId(1);

    fn at(region: u32, offset: u64, len: u32) -> Descriptor {
        Descriptor { region: RegionId(region), offset, len }
    }

    #[test]
    fn only_what_lies_inside_a_granted_range_is_permitted() {
        let grants = Grants::default();
        grants.add(ID, &[at(1, 100, 50), at(1, 200, 50)]);
        grants.add(ID, &[at(2, 0, 10)]);
        for good in [at(1, 100, 50), at(1, 110, 5), at(1, 249, 1), at(2, 0, 10)] {
            assert!(grants.permit(ID, &[good]).is_ok(), "{good:?}");
        }
        for bad in [at(1, 99, 2), at(1, 149, 2), at(1, 160, 1), at(2, 0, 11), at(3, 0, 1), at(1, u64::MAX, 1)]
        {
            let refused = grants.permit(ID, &[at(1, 100, 1), bad]);
            assert_eq!(refused.unwrap_err(), Refusal::OutsideGrant, "{bad:?}");
        }
        assert_eq!(grants.permit(HandoffId(2), &[at(1, 100, 1)]).unwrap_err(), Refusal::NotGranted);
        // A range that no memory has.
        grants.add(ID, &[at(9, u64::MAX - 4, 50)]);
        assert!(grants.permit(ID, &[at(9, u64::MAX - 4, 4)]).is_ok());
        assert_eq!(grants.permit(ID, &[at(9, u64::MAX - 4, 50)]).unwrap_err(), Refusal::OutsideGrant);
        assert!(grants.around(ID, &[at(9, u64::MAX - 4, 50)], 1).is_none());
    }

    /// Whatever was granted before stays granted: it is added to.
    #[test]
    fn ranges_that_overlap_are_all_granted_and_taken_out_one_by_one() {
        let grants = Grants::default();
        grants.add(ID, &[at(1, 100, 100)]);
        grants.add(ID, &[at(1, 100, 10), at(1, 150, 5), at(1, 180, 40)]);
        for good in [at(1, 100, 100), at(1, 160, 40), at(1, 155, 45), at(1, 190, 30)] {
            assert!(grants.permit(ID, &[good]).is_ok(), "{good:?}");
            assert!(grants.around(ID, &[good], 1).is_some(), "{good:?}");
        }
        assert!(grants.permit(ID, &[at(1, 199, 22)]).is_err(), "past the end of the last");
        grants.narrow(ID, &[at(1, 100, 10)]);
        assert!(grants.permit(ID, &[at(1, 100, 100)]).is_ok(), "granted by itself");
        grants.narrow(ID, &[at(1, 100, 100)]);
        assert!(grants.permit(ID, &[at(1, 100, 10)]).is_err() && grants.permit(ID, &[at(1, 150, 5)]).is_ok());
        // Named with another length than it was granted with: nothing that begins there is granted any more.
        grants.narrow(ID, &[at(1, 180, 7)]);
        assert!(grants.permit(ID, &[at(1, 180, 1)]).is_err());
    }

    #[test]
    fn what_was_taken_out_of_a_grant_is_refused_and_the_rest_stays() {
        let grants = Grants::default();
        grants.add(ID, &[at(1, 0, 10), at(1, 10, 10), at(1, 20, 10)]);
        grants.narrow(ID, &[at(1, 10, 10), at(2, 0, 10)]);
        grants.narrow(HandoffId(2), &[at(1, 0, 10)]);
        assert!(grants.permit(ID, &[at(1, 0, 10), at(1, 20, 10)]).is_ok());
        assert_eq!(grants.permit(ID, &[at(1, 10, 10)]).unwrap_err(), Refusal::OutsideGrant);
    }

    #[test]
    fn ranges_around_blocks_join_where_they_touch_and_reach_no_further() {
        let grants = Grants::default();
        grants.add(ID, &[at(1, 0, 100), at(1, 100, 50), at(1, 160, 40), at(2, 0, 100)]);
        let blocks = [at(1, 90, 10), at(2, 5, 5), at(1, 110, 10), at(1, 20, 5), at(1, 170, 5), at(2, 50, 1)];
        let (found, count) = grants.around(ID, &blocks, 8).unwrap();
        assert_eq!(found, [at(1, 20, 100), at(2, 5, 46), at(1, 170, 5)], "no byte between two grants");
        assert_eq!(count, blocks.len());
        assert_eq!(grants.around(ID, &blocks, 2).unwrap(), (vec![at(1, 20, 100), at(2, 5, 5)], 4));
        assert!(grants.around(ID, &[at(1, 140, 20)], 8).is_none(), "one block, two grants");
        assert!(grants.around(HandoffId(2), &blocks, 8).is_none());
    }

    #[tokio::test]
    async fn revoking_refuses_later_reads_and_knows_of_running_ones() {
        let grants = Grants::default();
        grants.add(ID, &[at(1, 0, 10)]);
        let permit = grants.permit(ID, &[at(1, 0, 10)]).unwrap();
        let revoked = grants.revoke(ID);
        assert_eq!(grants.permit(ID, &[at(1, 0, 10)]).unwrap_err(), Refusal::NotGranted);
        assert!(permit.revoked.is_cancelled(), "the running read is told to stop");
        let settled = revoked.settled();
        tokio::pin!(settled);
        assert!(futures_util::poll!(settled.as_mut()).is_pending(), "it is still running");
        drop(permit);
        tokio::time::timeout(Duration::from_secs(5), settled).await.unwrap();
        grants.revoke(HandoffId(9)).settled().await;
    }

    /// Nobody is told that memory is free while somebody else still waits for the same.
    #[tokio::test]
    async fn who_revokes_what_is_revoked_already_waits_for_its_end_too() {
        let grants = Grants::default();
        grants.add(ID, &[at(1, 0, 10)]);
        let permit = grants.permit(ID, &[at(1, 0, 10)]).unwrap();
        let first = grants.revoke(ID);
        for ended in [grants.revoke(ID), grants.revoke(ID)] {
            let settled = ended.settled();
            tokio::pin!(settled);
            assert!(futures_util::poll!(settled.as_mut()).is_pending(), "it is still read");
        }
        // Granted anew meanwhile, and the life over: the one that began first still goes on.
        grants.add(ID, &[at(1, 0, 10)]);
        grants.clear();
        let settled = grants.revoke(ID).settled();
        tokio::pin!(settled);
        assert!(futures_util::poll!(settled.as_mut()).is_pending(), "it is still read");
        drop(permit);
        tokio::time::timeout(Duration::from_secs(5), settled).await.unwrap();
        first.settled().await;
        grants.revoke(ID).settled().await;
        grants.revoke(HandoffId(2)).settled().await;
        grants.add(HandoffId(3), &[at(1, 0, 10)]);
        grants.revoke(HandoffId(3)).settled().await;
        assert!(grants.lock().ending.is_empty(), "nothing is kept of it");
    }

    #[test]
    fn a_new_life_ends_every_grant() {
        let grants = Grants::default();
        grants.add(ID, &[at(1, 0, 10)]);
        let permit = grants.permit(ID, &[at(1, 0, 1)]).unwrap();
        assert_eq!(grants.clear(), [ID]);
        assert!(permit.revoked.is_cancelled());
        assert!(grants.permit(ID, &[at(1, 0, 1)]).is_err());
    }
}
