//! Sweeps out of the prefix index what workers left behind, and shows its size.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::index::PrefixIndex;
use crate::metrics::Metrics;

/// Between two looks.
const EVERY: Duration = Duration::from_millis(250);

/// The one sweeper of a router.
pub(super) struct Sweeper {
    pub(super) index: Arc<PrefixIndex>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) stop: CancellationToken,
}

impl Sweeper {
    /// Sweeps until stopped; a part at a time, so that nobody waits for long.
    pub(super) async fn run(self) {
        loop {
            while self.index.maintain() {
                tokio::task::yield_now().await;
            }
            let stats = self.index.stats();
            let gauge = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
            self.metrics.index_blocks.set(gauge(stats.blocks));
            self.metrics.index_bytes.set(gauge(stats.bytes));
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(EVERY) => {}
            }
        }
    }
}
