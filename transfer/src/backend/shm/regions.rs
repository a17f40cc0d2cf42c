//! The regions of a peer that are known here: looked up with every read, so without a lock, and never forgotten before the
//! link ends.

use std::sync::OnceLock;

use crate::agent::RegionId;
use crate::memory::{PeerMemory, RemoteRange};

/// Lists that the regions are spread over by their numbers.
const LISTS: usize = 32;

/// How a region is reached.
pub(super) enum PeerRegion {
    Mapped(PeerMemory),
    Located(RemoteRange),
}

impl PeerRegion {
    pub(super) fn fits(&self, offset: usize, len: usize) -> bool {
        match self {
            Self::Mapped(memory) => memory.fits(offset, len),
            Self::Located(place) => offset.checked_add(len).is_some_and(|end| end <= place.len),
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Regions(Box<[Link; LISTS]>);

type Link = OnceLock<Box<Known>>;

struct Known {
    id: RegionId,
    region: PeerRegion,
    next: Link,
}

impl Regions {
    pub(super) fn get(&self, id: RegionId) -> Option<&PeerRegion> {
        let mut link = &self.0[id.0 as usize % LISTS];
        while let Some(known) = link.get() {
            if known.id == id {
                return Some(&known.region);
            }
            link = &known.next;
        }
        None
    }

    /// Notes a region; of two for one number the first counts.
    pub(super) fn insert(&self, id: RegionId, region: PeerRegion) {
        let mut new = Box::new(Known { id, region, next: Link::new() });
        let mut link = &self.0[id.0 as usize % LISTS];
        while let Err(back) = link.set(new) {
            let Some(known) = link.get().filter(|known| known.id != id) else { return };
            (new, link) = (back, &known.next);
        }
    }
}

impl Drop for Regions {
    fn drop(&mut self) {
        // One after the other: a peer may have any number of them.
        for list in self.0.iter_mut() {
            let mut next = list.take();
            while let Some(mut known) = next {
                next = known.next.take();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_region_is_found_under_its_number_and_the_first_of_two_stays() {
        let regions = Regions::default();
        let place = |address| PeerRegion::Located(RemoteRange { address, len: 8 });
        for id in 0..10_000u32 {
            assert!(regions.get(RegionId(id)).is_none());
            regions.insert(RegionId(id), place(id as usize));
            regions.insert(RegionId(id), place(usize::MAX));
        }
        for id in 0..10_000u32 {
            let found = regions.get(RegionId(id));
            assert!(matches!(found, Some(PeerRegion::Located(place)) if place.address == id as usize));
        }
        assert!(regions.get(RegionId(10_000)).is_none());
    }
}
