//! Warnings about what fails many times a second for as long as it fails, such as taking connections without descriptors.

use std::time::Duration;

use tokio::time::Instant;

/// Least time between two warnings.
const EVERY: Duration = Duration::from_secs(60);

/// Says when a failure is to be warned of: the first one, and then one a minute.
#[derive(Debug, Default)]
pub struct Seldom {
    warned: Option<Instant>,
}

impl Seldom {
    /// Whether this failure is to be warned of.
    pub fn is_due(&mut self) -> bool {
        let now = Instant::now();
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

    #[tokio::test(start_paused = true)]
    async fn the_first_failure_is_warned_of_and_then_one_a_minute() {
        let mut seldom = Seldom::default();
        let mut warned = Vec::new();
        for tenth in 0..1_210 {
            if seldom.is_due() {
                warned.push(tenth);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(warned, [0, 600, 1_200]);
    }
}
