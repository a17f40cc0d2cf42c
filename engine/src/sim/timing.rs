//! How long simulated hardware takes.

use std::time::Duration;

use super::SimConfig;
use crate::executor::BatchItem;

impl SimConfig {
    /// The time of one pass over `batch`. An item of one token counts as decode.
    pub(super) fn modelled(&self, batch: &[BatchItem<'_>]) -> Duration {
        let (mut prefill_us, mut decode_us) = (0.0, 0.0);
        for item in batch {
            let (start, tokens) = (f64::from(item.start), item.tokens.len() as f64);
            if item.tokens.len() == 1 {
                decode_us += self.decode_per_sequence_us + self.decode_per_context_token_ns * start / 1e3;
            } else {
                let pairs = tokens * start + tokens * (tokens + 1.0) / 2.0;
                prefill_us += self.prefill_per_token_us * tokens + self.prefill_per_pair_ns * pairs / 1e3;
            }
        }
        let decodes = batch.iter().any(|item| item.tokens.len() == 1);
        let prefills = batch.iter().any(|item| item.tokens.len() > 1);
        let base_us = if prefills { self.prefill_base_us } else { 0.0 }
            + if decodes { self.decode_base_us } else { 0.0 };
        // A nonsensical configuration (negative, NaN) takes no time rather than the process down.
        Duration::try_from_secs_f64((base_us + prefill_us + decode_us) / 1e6).unwrap_or_default()
    }
}
