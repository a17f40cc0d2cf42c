//! Whether a server is well: a core without clock or I/O.
//!
//! A server is unwell at once when nobody listens, after a few looks in a row that it did not answer, and when it has
//! requests that make no progress and does not answer one more either. That a port answers is not enough, and a server
//! that is merely busy is left alone.

use std::time::Duration;

use tokio::time::Instant;

use super::gauges::Busy;

/// Looks in a row without an answer that mean something.
pub(super) const FAILURES_MAX: u32 = 3;
/// Requests that yield no token for so long raise doubt.
pub(super) const PROGRESS_WITHIN: Duration = Duration::from_secs(10);
/// Between two canaries while there is doubt.
pub(super) const CANARY_INTERVAL: Duration = Duration::from_secs(10);

/// What is known of a server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Verdict {
    /// It has not answered yet.
    #[default]
    Starting,
    /// It answers, and requests make progress as far as is known.
    Well,
    /// It should get no requests, and why.
    Unwell(String),
}

/// Why a look failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// Nobody listens.
    #[error("{0}")]
    Refused(String),
    /// No answer, or not a good one.
    #[error("{0}")]
    Bad(String),
}

/// The answer to a canary: a request for one token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Canary {
    /// The token came.
    Sang,
    /// The server does not take such requests: that says nothing.
    Mute,
    /// It did not come.
    Dead(String),
}

/// The state of one server.
#[derive(Debug, Default)]
pub(super) struct Health {
    verdict: Verdict,
    failures: u32,
    /// The tokens last seen, and since when they stand still.
    still: Option<(u64, Instant)>,
    canary_at: Option<Instant>,
    stuck: Option<String>,
    /// Nobody listened at the last look that told,
    gone: bool,
    /// and since when, or when it last was so.
    gone_at: Option<Instant>,
}

impl Health {
    pub(super) fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// When nobody was found to listen, at the first look of the last time that was so: what the server had before is lost.
    pub(super) fn gone_at(&self) -> Option<Instant> {
        self.gone_at
    }

    /// Whether nobody listened at the last look that told: it works on nothing.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// Takes in a look; whether a canary should be sent now.
    pub(super) fn looked(&mut self, now: Instant, look: Result<Busy, Failure>) -> bool {
        match look {
            Ok(busy) => {
                self.failures = 0;
                self.gone = false;
                let doubt = self.doubt(now, busy);
                self.verdict = match &self.stuck {
                    Some(why) => Verdict::Unwell(why.clone()),
                    None => Verdict::Well,
                };
                doubt
            }
            Err(failure) => {
                self.failures += 1;
                match failure {
                    Failure::Refused(why) => {
                        if !std::mem::replace(&mut self.gone, true) {
                            self.gone_at = Some(now);
                        }
                        self.fail(why);
                    }
                    Failure::Bad(why) if self.failures >= FAILURES_MAX => self.fail(why),
                    Failure::Bad(_) => {}
                }
                false
            }
        }
    }

    /// Takes in the answer to a canary.
    pub(super) fn canary(&mut self, answer: Canary) {
        match answer {
            Canary::Sang | Canary::Mute => {
                self.stuck = None;
                self.verdict = Verdict::Well;
            }
            Canary::Dead(why) => {
                let why = format!("its requests make no progress, and one more did not either: {why}");
                self.stuck = Some(why.clone());
                self.verdict = Verdict::Unwell(why);
            }
        }
    }

    fn fail(&mut self, why: String) {
        // Whoever comes back is another life of the server.
        (self.still, self.stuck, self.canary_at) = (None, None, None);
        self.verdict = Verdict::Unwell(why);
    }

    /// Whether requests stand still for so long that a canary is due.
    fn doubt(&mut self, now: Instant, busy: Busy) -> bool {
        let tokens = match busy {
            Busy::Told(gauges) if gauges.requests() > 0 => gauges.tokens,
            Busy::Told(_) | Busy::Untold => None,
            // Neither a token nor that there was none.
            Busy::Missed => return false,
        };
        let Some(tokens) = tokens else {
            // One that has nothing to do shows by a canary whether it could, if there was doubt.
            self.still = None;
            return self.stuck.is_some() && self.is_due(now);
        };
        match self.still {
            Some((before, since)) if before == tokens => {
                now.saturating_duration_since(since) >= PROGRESS_WITHIN && self.is_due(now)
            }
            _ => {
                self.still = Some((tokens, now));
                self.stuck = None;
                false
            }
        }
    }

    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.canary_at.is_none_or(|at| now.saturating_duration_since(at) >= CANARY_INTERVAL);
        if due {
            self.canary_at = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::super::gauges::Gauges;
    use super::*;

    fn busy(tokens: u64) -> Result<Busy, Failure> {
        Ok(Busy::Told(Gauges { running: 1, waiting: 0, tokens: Some(tokens) }))
    }

    fn bad() -> Result<Busy, Failure> {
        Err(Failure::Bad("no answer".to_owned()))
    }

    fn is_unwell(health: &Health) -> bool {
        matches!(health.verdict(), Verdict::Unwell(_))
    }

    #[test]
    fn a_refused_connection_counts_at_once_and_silence_after_a_while() {
        let now = Instant::now();
        let mut health = Health::default();
        assert_eq!(*health.verdict(), Verdict::Starting);
        health.looked(now, Ok(Busy::Untold));
        assert_eq!(*health.verdict(), Verdict::Well);
        for _ in 1..FAILURES_MAX {
            health.looked(now, bad());
            assert_eq!(*health.verdict(), Verdict::Well, "a busy server may miss a look");
        }
        health.looked(now, bad());
        assert!(is_unwell(&health));
        health.looked(now, Ok(Busy::Untold));
        assert_eq!(*health.verdict(), Verdict::Well);
        // One look in three says nothing, however long that goes on.
        for _ in 0..2 * FAILURES_MAX {
            for look in [bad(), Ok(Busy::Untold)] {
                health.looked(now, look);
                assert_eq!(*health.verdict(), Verdict::Well);
            }
        }
        health.looked(now, Err(Failure::Refused("nobody listens".to_owned())));
        assert_eq!(*health.verdict(), Verdict::Unwell("nobody listens".to_owned()));
    }

    #[test]
    fn only_requests_that_were_seen_to_stand_still_are_doubted() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let idle = || Ok(Busy::Told(Gauges { running: 0, waiting: 0, tokens: Some(7) }));
        let mut health = Health::default();
        assert!(!health.looked(at(0), busy(7)));
        assert!(!health.looked(at(5), idle()));
        assert!(!health.looked(at(30), idle()), "who has nothing to do does nothing");
        assert!(!health.looked(at(31), busy(7)), "of these nothing was seen yet");
        assert!(!health.looked(at(35), Ok(Busy::Missed)), "nor now");
        assert!(!health.looked(at(42), Ok(Busy::Missed)));
        assert!(health.looked(at(43), busy(7)), "but they have stood still since");
    }

    #[test]
    fn a_server_is_gone_from_the_first_look_that_found_nobody() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let refused = || Err(Failure::Refused("nobody listens".to_owned()));
        let mut health = Health::default();
        health.looked(at(0), Ok(Busy::Untold));
        health.looked(at(1), bad());
        assert_eq!(health.gone_at(), None, "silence is no absence");
        health.looked(at(2), refused());
        health.looked(at(3), bad());
        health.looked(at(4), refused());
        assert_eq!(health.gone_at(), Some(at(2)));
        health.looked(at(5), Ok(Busy::Untold));
        assert_eq!(health.gone_at(), Some(at(2)), "that it came back does not change what was");
        health.looked(at(9), refused());
        assert_eq!(health.gone_at(), Some(at(9)));
    }

    #[test]
    fn requests_that_stand_still_are_doubted_and_one_more_decides() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut health = Health::default();
        for s in 0..10 {
            assert!(!health.looked(at(s), busy(7)), "{s} s");
        }
        assert!(health.looked(at(10), busy(7)), "a canary is due");
        assert!(!health.looked(at(11), busy(7)), "one at a time");
        health.canary(Canary::Mute);
        assert_eq!(*health.verdict(), Verdict::Well, "what takes no canary is not judged by it");
        assert!(health.looked(at(20), busy(7)));
        health.canary(Canary::Dead("timed out".to_owned()));
        assert!(is_unwell(&health));
        health.looked(at(21), busy(7));
        assert!(is_unwell(&health), "an answer to a look changes nothing");
        assert!(!health.looked(at(22), busy(8)));
        assert_eq!(*health.verdict(), Verdict::Well, "a token does");
    }

    #[test]
    fn a_stuck_server_that_lost_its_requests_is_tried_again() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut health = Health::default();
        health.looked(at(0), busy(7));
        assert!(health.looked(at(10), busy(7)));
        health.canary(Canary::Dead("timed out".to_owned()));
        let idle = || Ok(Busy::Told(Gauges { running: 0, waiting: 0, tokens: Some(7) }));
        assert!(!health.looked(at(11), idle()));
        assert!(is_unwell(&health), "nothing says that it can do more now");
        assert!(health.looked(at(20), idle()));
        health.canary(Canary::Sang);
        assert_eq!(*health.verdict(), Verdict::Well);
    }

    #[test]
    fn a_server_that_came_back_is_judged_anew() {
        let start = Instant::now();
        let mut health = Health::default();
        health.looked(start, busy(7));
        assert!(health.looked(start + PROGRESS_WITHIN, busy(7)));
        health.canary(Canary::Dead("timed out".to_owned()));
        health.looked(start, Err(Failure::Refused("nobody listens".to_owned())));
        assert!(!health.looked(start + PROGRESS_WITHIN * 2, busy(7)));
        assert_eq!(*health.verdict(), Verdict::Well);
    }
}
