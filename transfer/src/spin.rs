//! Whether to look again and again for a moment before one sleeps.
//!
//! It pays where who is waited for runs on another core: what comes is there before a sleeper would be awake. Where it
//! needs this very core, each look keeps it from running. Which of both holds is found by trying: after each try in vain
//! twice as many are left out.

/// Most tries that are left out after one in vain: one of 64 is made.
const MISSES_MAX: u32 = 6;

/// What the last tries brought.
#[derive(Debug, Default)]
pub(crate) struct Spin {
    misses: u32,
    left_out: u32,
}

impl Spin {
    /// Whether to try now.
    pub(crate) fn is_worth_it(&mut self) -> bool {
        match self.left_out.checked_sub(1) {
            None => true,
            Some(less) => {
                self.left_out = less;
                false
            }
        }
    }

    /// Whether the next answer will be yes.
    pub(crate) fn will_be_worth_it(&self) -> bool {
        self.left_out == 0
    }

    /// What a try brought.
    pub(crate) fn tried(&mut self, came: bool) {
        self.misses = if came { 0 } else { (self.misses + 1).min(MISSES_MAX) };
        self.left_out = (1 << self.misses) - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_in_vain_become_rare_and_one_that_is_not_brings_them_back() {
        let mut spin = Spin::default();
        let mut tries = |rounds: usize, came: bool| {
            let try_one = |_: &usize| {
                let tries = spin.is_worth_it();
                if tries {
                    spin.tried(came);
                }
                tries
            };
            (0..rounds).filter(try_one).count()
        };
        assert_eq!(tries(100, true), 100);
        assert_eq!(tries(6400, false), 5 + (6400 - 62) / 64 + 1);
        assert!(tries(64, true) >= 1);
        assert_eq!(tries(100, true), 100, "as if nothing had been");
    }
}
