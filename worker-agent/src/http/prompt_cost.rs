//! What the prompt of a generation cost, gathered until its first token.

use std::time::Duration;

use baton_config::protocol::PrefillReport;
use tokio::time::Instant;

use crate::driver::DecodeNews;
use crate::handoff::GiveUp;
use crate::handoff::decode::ImportReport;
use crate::metrics::{Metrics, TokenKind};

/// The parts of a [`PrefillReport`].
#[derive(Debug)]
pub(super) struct PromptCost {
    prompt: u32,
    cached: u32,
    queued: Duration,
    admitted: Option<Instant>,
    import: ImportReport,
    fallback: Option<GiveUp>,
    reported: bool,
}

/// A transfer could not be confirmed to have ended: the request cannot go on here.
#[derive(Debug, thiserror::Error)]
#[error("a transfer could not be confirmed to have ended")]
pub(super) struct Unfenced;

impl PromptCost {
    /// Nothing yet, for a prompt of so many tokens; `fallback` where its handoff had ended before it began.
    pub(super) fn new(prompt: u32, fallback: Option<GiveUp>) -> Self {
        Self {
            prompt,
            cached: 0,
            queued: Duration::ZERO,
            admitted: None,
            import: ImportReport::default(),
            fallback,
            reported: false,
        }
    }

    /// The engine has taken it up.
    pub(super) fn admitted(&mut self, cached_tokens: u32, queued: Duration) {
        self.cached = cached_tokens;
        self.queued = queued;
        self.admitted = Some(Instant::now());
    }

    /// How its handoff went.
    pub(super) fn take_news(&mut self, news: DecodeNews) -> Result<(), Unfenced> {
        match news {
            DecodeNews::Imported(report) => self.import = report,
            DecodeNews::Local(why, report) => {
                self.import = report;
                self.fallback = Some(why);
            }
            DecodeNews::Failed => return Err(Unfenced),
        }
        Ok(())
    }

    /// Whether the report is still to be made.
    pub(super) fn is_due(&self) -> bool {
        !self.reported
    }

    /// The report, to be sent right before the first token.
    pub(super) fn report(&mut self, metrics: &Metrics) -> PrefillReport {
        self.reported = true;
        let prefilled = self.admitted.map_or(Duration::ZERO, |at| at.elapsed());
        let computed = self.prompt.saturating_sub(self.cached + self.import.tokens);
        metrics.tokens(TokenKind::Cached, u64::from(self.cached));
        metrics.tokens(TokenKind::Computed, u64::from(computed));
        PrefillReport {
            cached_tokens: self.cached,
            imported_tokens: self.import.tokens,
            imported_bytes: self.import.bytes,
            queue_ms: self.queued.as_secs_f64() * 1e3,
            prefill_ms: prefilled.as_secs_f64() * 1e3,
            transfer_tail_ms: self.import.tail.as_secs_f64() * 1e3,
            fallback: self.fallback.filter(|why| why.is_fault()).map(|why| why.name().to_owned()),
        }
    }
}
