//! Asks one worker for its state, once a second; sooner while it does not know its life yet.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::worker::Health;
use crate::dispatch::Caller;
use crate::index::PrefixIndex;

/// Between two polls, on average.
const EVERY: Duration = Duration::from_secs(1);
/// Until the second poll of a worker that has yet to hear of the life that the view tells of; doubled each time, up to the above.
const AT_FIRST: Duration = Duration::from_millis(50);
/// For an answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// The poller of one life of a worker.
pub(super) struct Poller {
    pub(super) health: Arc<Health>,
    pub(super) caller: Caller,
    pub(super) index: Arc<PrefixIndex>,
    pub(super) stop: CancellationToken,
}

impl Poller {
    /// Polls until stopped.
    pub(super) async fn run(self) {
        let mut turn: u64 = 0;
        let mut soon = AT_FIRST;
        loop {
            let asked = Instant::now();
            let answer = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                answer = tokio::time::timeout(PATIENCE, self.caller.state(&self.health.authority)) => answer,
            };
            let mut pause = EVERY;
            match answer {
                Ok(Ok(status)) if status.worker == self.health.name => {
                    if !self.health.reported(status) {
                        pause = soon;
                        soon = (soon * 2).min(EVERY);
                    }
                }
                Ok(Ok(_)) => self.health.silent(asked),
                Ok(Err(error)) => {
                    tracing::debug!(worker = %self.health.name, %error, "state not answered");
                    self.health.silent(asked);
                }
                Err(_) => self.health.silent(asked),
            }
            self.health.known().fade(&self.index, Instant::now());
            turn += 1;
            let pause = pause.mul_f64(jitter(self.health.name.as_str(), turn));
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// 0.9 to 1.1, different for every worker and turn, so that polls do not fall together.
pub(super) fn jitter(name: &str, turn: u64) -> f64 {
    let mut hash = turn.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
    }
    0.9 + 0.2 * ((hash >> 11) as f64 / (1u64 << 53) as f64)
}
