//! What a read or a write must be before anything is asked of a peer.

use super::{BlockRead, BlockWrite, Descriptor, Destination};
use crate::error::Refusal;
use crate::memory::HostMemory;
use crate::wire::MAX_READ_BYTES;

/// Whether two of the spans (start and length) share a byte.
///
/// Lists in order, upwards or downwards, are the rule and take one pass; others are sorted.
pub(crate) fn overlaps(spans: impl Iterator<Item = (u64, u32)> + Clone) -> bool {
    let end = |(start, len): (u64, u32)| start.saturating_add(u64::from(len));
    let (mut upwards, mut downwards) = (true, true);
    let mut last: Option<(u64, u32)> = None;
    for span in spans.clone() {
        if let Some(last) = last {
            upwards &= end(last) <= span.0;
            downwards &= end(span) <= last.0;
        }
        if !upwards && !downwards {
            let mut sorted: Vec<(u64, u32)> = spans.collect();
            sorted.sort_unstable();
            return sorted.windows(2).any(|pair| end(pair[0]) > pair[1].0);
        }
        last = Some(span);
    }
    false
}

/// Whether two of the places share a byte.
pub(crate) fn collide(places: &[Descriptor]) -> bool {
    let Some(first) = places.first() else { return false };
    if places.iter().all(|place| place.region == first.region) {
        return overlaps(places.iter().map(|place| (place.offset, place.len)));
    }
    let mut sorted = places.to_vec();
    // By region, then by offset.
    sorted.sort_unstable();
    sorted.windows(2).any(|pair| {
        pair[0].region == pair[1].region
            && pair[0].offset.saturating_add(u64::from(pair[0].len)) > pair[1].offset
    })
}

/// Checks a read.
pub(super) fn read(blocks: &[BlockRead], into: &Destination<'_>) -> Result<(), Refusal> {
    sizes(blocks.iter().map(|block| block.source.len))?;
    let fits = |block: &BlockRead| match into {
        Destination::Memory(memory) => memory.fits(block.to, block.source.len as usize),
        Destination::Device(memory) => memory.fits(block.to, block.source.len as usize),
        Destination::Sink(_) => true,
    };
    if !blocks.iter().all(fits) {
        return Err(Refusal::OutsideMemory);
    }
    if matches!(into, Destination::Sink(_)) {
        return Ok(());
    }
    match overlaps(blocks.iter().map(|block| (block.to as u64, block.source.len))) {
        true => Err(Refusal::Overlap),
        false => Ok(()),
    }
}

/// Checks a write.
pub(super) fn write(blocks: &[BlockWrite], from: &HostMemory) -> Result<(), Refusal> {
    sizes(blocks.iter().map(|block| block.to.len))?;
    // Digests are bound to positions of 32 bits.
    if u32::try_from(blocks.len()).is_err() {
        return Err(Refusal::TooLarge);
    }
    if !blocks.iter().all(|block| from.fits(block.from, block.to.len as usize)) {
        return Err(Refusal::OutsideMemory);
    }
    let targets: Vec<Descriptor> = blocks.iter().map(|block| block.to).collect();
    if collide(&targets) { Err(Refusal::Overlap) } else { Ok(()) }
}

fn sizes(mut lens: impl Iterator<Item = u32>) -> Result<(), Refusal> {
    lens.try_for_each(|len| match u64::from(len) {
        0 => Err(Refusal::EmptyBlock),
        len if len > MAX_READ_BYTES => Err(Refusal::TooLarge),
        _ => Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn spans_that_touch_do_not_overlap() {
        assert!(!overlaps([(0, 4), (4, 4), (8, 1)].into_iter()));
        assert!(!overlaps([(8, 1), (4, 4), (0, 4)].into_iter()));
        assert!(!overlaps([(4, 4), (0, 4), (8, 1)].into_iter()));
        assert!(overlaps([(0, 5), (4, 4)].into_iter()));
        assert!(overlaps([(4, 4), (8, 1), (0, 5)].into_iter()));
        assert!(overlaps([(7, 1), (7, 1)].into_iter()));
        assert!(overlaps([(0, 100), (40, 1), (200, 1)].into_iter()));
    }

    proptest! {
        #[test]
        fn overlaps_are_those_a_bitmap_finds(spans in proptest::collection::vec((0..60u64, 1..6u32), 0..12)) {
            let mut taken = [false; 80];
            let clash = spans.iter().any(|(start, len)| {
                (*start..start + u64::from(*len)).any(|at| std::mem::replace(&mut taken[at as usize], true))
            });
            prop_assert_eq!(overlaps(spans.iter().copied()), clash);
        }

        #[test]
        fn places_collide_within_their_region_only(
            spans in proptest::collection::vec((0..3u32, 0..60u64, 1..6u32), 0..12),
        ) {
            let place = |(region, offset, len): &(u32, u64, u32)| Descriptor {
                region: crate::agent::RegionId(*region),
                offset: *offset,
                len: *len,
            };
            let places: Vec<Descriptor> = spans.iter().map(place).collect();
            let clash = (0..3).any(|region| {
                let of_it = spans.iter().filter(|(of, ..)| *of == region);
                overlaps(of_it.map(|(_, offset, len)| (*offset, *len)))
            });
            prop_assert_eq!(collide(&places), clash);
        }
    }
}
