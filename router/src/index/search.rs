//! Finds where the holders change along a chain, without walking it.

use super::sets::EMPTY;

/// Places looked at together: their cache misses overlap.
const FAN: usize = 8;

/// Calls `emit(end, set)` for each stretch of blocks with the same set, in order, up to the first block nobody holds.
///
/// `probe(at)` tells the set of a block. Relies on sets only shrinking along a chain: stretches that begin and end with
/// the same set are not looked into.
pub(super) fn segments(len: usize, probe: &impl Fn(usize) -> u32, emit: &mut impl FnMut(u32, u32)) {
    if len > 0 {
        split((0, probe(0)), (len, EMPTY), probe, emit);
    }
}

/// Looks into a stretch whose ends differ; `false` when the chain ended in it.
fn split(
    low: (usize, u32),
    high: (usize, u32),
    probe: &impl Fn(usize) -> u32,
    emit: &mut impl FnMut(u32, u32),
) -> bool {
    if low.1 == EMPTY {
        return false;
    }
    let width = high.0 - low.0;
    if width == 1 {
        emit(u32::try_from(high.0).unwrap_or(u32::MAX), low.1);
        return high.1 != EMPTY;
    }
    let mut samples = [(0, EMPTY); FAN];
    let mut count = 0;
    let step = width.div_ceil(FAN);
    for sample in &mut samples {
        let at = low.0 + (count + 1) * step;
        if at >= high.0 {
            break;
        }
        *sample = (at, probe(at));
        count += 1;
    }
    let mut last = low;
    for next in samples[..count].iter().copied().chain([high]) {
        if next.1 != last.1 && !split(last, next, probe, emit) {
            return false;
        }
        last = next;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stretches(sets: &[u32]) -> (Vec<(u32, u32)>, usize) {
        let looks = std::cell::Cell::new(0);
        let mut out = Vec::new();
        let probe = |at: usize| {
            looks.set(looks.get() + 1);
            sets[at]
        };
        segments(sets.len(), &probe, &mut |end, set| out.push((end, set)));
        (out, looks.get())
    }

    #[test]
    fn every_change_is_found_at_any_place() {
        for len in 1..70usize {
            for first in 0..=len {
                for second in first..=len {
                    let sets: Vec<u32> = (0..len)
                        .map(|at| {
                            if at < first {
                                7
                            } else if at < second {
                                5
                            } else {
                                EMPTY
                            }
                        })
                        .collect();
                    let mut wanted = Vec::new();
                    if first > 0 {
                        wanted.push((first as u32, 7));
                    }
                    if second > first {
                        wanted.push((second as u32, 5));
                    }
                    assert_eq!(stretches(&sets).0, wanted, "{len} {first} {second}");
                }
            }
        }
    }

    #[test]
    fn a_long_prompt_is_not_walked() {
        let sets: Vec<u32> = (0..4096).map(|at| if at < 3000 { 1 } else { EMPTY }).collect();
        let (found, looks) = stretches(&sets);
        assert_eq!(found, [(3000, 1)]);
        assert!(looks <= 33, "{looks}");
        assert_eq!(stretches(&[EMPTY; 4096]), (vec![], 1), "nobody has the first block: nobody has any");
        let (found, looks) = stretches(&[3; 4096]);
        assert_eq!(found, [(4096, 3)]);
        assert!(looks <= 33, "{looks}");
    }
}
