//! Chance, from a seed, and how much of it goes wrong.

use std::ops::Range;
use std::time::Duration;

/// Deterministic numbers from a seed (splitmix64).
#[derive(Debug)]
pub(in crate::handoff::tests) struct Dice(u64);

impl Dice {
    pub(in crate::handoff::tests) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x1234_5678_9abc_def0)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(in crate::handoff::tests) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// True `n` times in 1000.
    pub(in crate::handoff::tests) fn permille(&mut self, n: u64) -> bool {
        self.below(1000) < n
    }

    pub(in crate::handoff::tests) fn micros(&mut self, range: Range<u64>) -> Duration {
        Duration::from_micros(range.start + self.below(range.end - range.start))
    }
}

/// How often what goes wrong, in 1000.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::handoff::tests) struct Faults {
    pub(in crate::handoff::tests) loss: u64,
    pub(in crate::handoff::tests) duplicate: u64,
    /// Messages late by up to 1.5 s, so that they overtake each other.
    pub(in crate::handoff::tests) late: u64,
    pub(in crate::handoff::tests) corrupt_once: u64,
    pub(in crate::handoff::tests) corrupt_always: u64,
    pub(in crate::handoff::tests) link: u64,
    /// Reads that take up to 9 s to notice their abort.
    pub(in crate::handoff::tests) stuck_read: u64,
    pub(in crate::handoff::tests) client_leaves: u64,
    pub(in crate::handoff::tests) router_cancels: u64,
    /// Engines that are found blocked.
    pub(in crate::handoff::tests) blocked: u64,
    pub(in crate::handoff::tests) never_admitted: u64,
    /// Decode workers that have no room for three to four leases.
    pub(in crate::handoff::tests) slow_admission: u64,
    pub(in crate::handoff::tests) prefill_stuck: u64,
    pub(in crate::handoff::tests) one_side_only: u64,
    /// Crashes of each side over the whole run.
    pub(in crate::handoff::tests) crashes: u64,
    /// Leases each side loses, and takes anew under another epoch, over the whole run.
    pub(in crate::handoff::tests) rejoins: u64,
}
