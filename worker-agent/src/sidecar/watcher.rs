//! Watches one server for as long as its sidecar lives.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::gauges::{Busy, Gauges};
use super::health::{Canary, Health, Verdict};
use super::metrics::Metrics;
use super::probe::Prober;
use crate::http::Mishap;

/// Between two looks at a server that is well.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Between two looks at one that is not: its return should be noticed soon.
const RETURN_INTERVAL: Duration = Duration::from_millis(250);

/// What is known of the server.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) verdict: Verdict,
    /// What it last told of how busy it is, if it tells.
    pub(super) gauges: Option<Gauges>,
    /// When that was learnt.
    pub(super) at: Option<Instant>,
    /// Nobody listens: it works on nothing.
    pub(super) gone: bool,
    /// When nobody was found to listen, whether somebody does again or not.
    pub(super) gone_at: Option<Instant>,
    pub(super) last_error: Option<Mishap>,
}

/// The one that looks.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) prober: Prober,
    pub(super) seen: watch::Sender<Seen>,
    pub(super) metrics: Metrics,
}

impl Watcher {
    /// Looks until dropped.
    pub(super) async fn run(mut self) {
        let mut health = Health::default();
        loop {
            let began = Instant::now();
            let look = self.prober.look().await;
            self.metrics.looked(look.is_ok());
            let failure = look.as_ref().err().map(ToString::to_string);
            let busy = look.as_ref().ok().map(|busy| (began, *busy));
            let canary_due = health.looked(Instant::now(), look);
            self.tell(&health, busy, failure);
            if canary_due {
                let canary = self.prober.canary().await;
                self.metrics.canary(!matches!(canary, Canary::Dead(_)));
                health.canary(canary);
                self.tell(&health, None, None);
            }
            let well = *health.verdict() == Verdict::Well;
            tokio::time::sleep(if well { LOOK_INTERVAL } else { RETURN_INTERVAL }).await;
        }
    }

    /// `busy` is there if the server answered, with when it was asked: it may have told at once and taken on more since.
    fn tell(&self, health: &Health, busy: Option<(Instant, Busy)>, failure: Option<String>) {
        let verdict = health.verdict().clone();
        let (mut news, mut gauges) = (false, None);
        self.seen.send_modify(|seen| {
            news = seen.verdict != verdict;
            seen.gone = health.is_gone();
            match busy {
                Some((asked, Busy::Told(gauges))) => (seen.gauges, seen.at) = (Some(gauges), Some(asked)),
                Some((asked, Busy::Untold)) => (seen.gauges, seen.at) = (None, Some(asked)),
                None if seen.gone => seen.gauges = None,
                Some((_, Busy::Missed)) | None => {}
            }
            gauges = seen.gauges;
            let what = match &verdict {
                Verdict::Unwell(why) => Some(why.clone()),
                Verdict::Starting | Verdict::Well => failure.clone(),
            };
            if let Some(what) = what {
                seen.last_error = Some(Mishap { what, at: Instant::now() });
            }
            seen.gone_at = health.gone_at();
            seen.verdict = verdict.clone();
        });
        self.metrics.set(verdict == Verdict::Well, gauges);
        if !news {
            return;
        }
        match &verdict {
            Verdict::Well => tracing::info!("the server is well"),
            Verdict::Unwell(why) => tracing::warn!(why, "the server is not well"),
            Verdict::Starting => {}
        }
    }
}
