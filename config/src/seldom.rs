//! Warnings about what fails many times a second for as long as it fails, such as taking connections without descriptors.

use std::time::{Duration, Instant};

/// Least time between two warnings.
const EVERY: Duration = Duration::from_secs(60);

/// Says when a failure is to be warned of: the first one, and then one a minute.
#[derive(Debug, Default)]
pub struct Seldom {
    warned: Option<Instant>,
}

impl Seldom {
    /// Whether a failure is to be warned of that is noticed `now`.
    pub fn is_due(&mut self, now: Instant) -> bool {
        let due = self.warned.is_none_or(|warned| now >= warned + EVERY);
        if due {
            self.warned = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_warned_of_and_then_one_a_minute() {
        let (mut seldom, start) = (Seldom::default(), Instant::now());
        let warned = (0..1_210).filter(|tenth| seldom.is_due(start + Duration::from_millis(100 * tenth)));
        assert_eq!(warned.collect::<Vec<u64>>(), [0, 600, 1_200]);
    }
}
