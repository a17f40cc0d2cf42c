//! Small deterministic random numbers for jitter, and identities drawn from the operating system's entropy.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// SplitMix64. Seeded in tests, from entropy otherwise; never for secrets.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    #[cfg(test)]
    pub(crate) fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn from_entropy() -> Self {
        Self(entropy())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound` (0 for a bound of 0).
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }

    /// Uniform in `[0, most]`.
    pub(crate) fn up_to(&mut self, most: Duration) -> Duration {
        let micros = u64::try_from(most.as_micros()).unwrap_or(u64::MAX - 1);
        Duration::from_micros(self.below(micros + 1))
    }
}

/// 64 unpredictable bits: the keys of `RandomState` come from the operating system.
fn entropy() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(u64::from(std::process::id()));
    hasher.finish()
}

/// A random identity of 32 hex digits.
pub(crate) fn random_id() -> String {
    format!("{:016x}{:016x}", entropy(), entropy())
}

/// Exponential backoff with full jitter: uniform in `[0, min(base * 2^failures, cap)]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backoff {
    pub(crate) base: Duration,
    pub(crate) cap: Duration,
}

impl Backoff {
    /// 50 ms doubling to 1 s.
    pub(crate) const CONDUCTOR: Self = Self { base: Duration::from_millis(50), cap: Duration::from_secs(1) };

    pub(crate) fn delay(self, failures: u32, dice: &mut Dice) -> Duration {
        let most = self.base.saturating_mul(1u32 << failures.min(16)).min(self.cap);
        dice.up_to(most)
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_is_bounded_and_jittered() {
        let mut dice = Dice::seeded(7);
        let delays: Vec<Duration> = (0..64).map(|n| Backoff::CONDUCTOR.delay(n, &mut dice)).collect();
        assert!(delays.iter().all(|d| *d <= Backoff::CONDUCTOR.cap), "{delays:?}");
        assert!(delays[0] <= Backoff::CONDUCTOR.base, "{delays:?}");
        let late: std::collections::BTreeSet<_> = delays[10..].iter().collect();
        assert!(late.len() > 50, "full jitter seldom repeats itself: {delays:?}");
    }
}
