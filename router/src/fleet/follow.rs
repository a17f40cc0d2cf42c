//! Follows the KV events of one life of a worker into the prefix index.

use std::sync::Arc;
use std::time::Duration;

use baton_config::Epoch;
use baton_config::protocol::KvEventBatch;
use http::StatusCode;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::poll::jitter;
use super::worker::Health;
use crate::dispatch::{CallError, Caller};
use crate::index::{Feed, Namespace, PrefixIndex, Taken};
use crate::metrics::Metrics;
use crate::search::find;

/// Between two tries, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Before a worker that has no events is asked again.
const NO_EVENTS_FOR: Duration = Duration::from_secs(60);
/// A quiet stream is opened anew: its worker may have gone without a word.
const QUIET_MAX: Duration = Duration::from_secs(60);
/// For the head of an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest line: a snapshot of some two million blocks.
const LINE_MAX_BYTES: usize = 48 << 20;
/// Longer lines are read by few followers at a time, and parsed where nobody waits.
const LARGE_BYTES: usize = 128 << 10;
/// Followers that read a large line at a time.
const LARGE_AT_ONCE: usize = 3;

/// Bounds the memory of all followers together.
#[derive(Debug, Clone)]
pub(super) struct Turns(Arc<Semaphore>);

impl Turns {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(LARGE_AT_ONCE)))
    }
}

/// The follower of one life of a worker.
pub(super) struct Follower {
    pub(super) health: Arc<Health>,
    pub(super) epoch: Epoch,
    pub(super) index: Arc<PrefixIndex>,
    pub(super) caller: Caller,
    pub(super) metrics: Arc<Metrics>,
    pub(super) turns: Turns,
    pub(super) stop: CancellationToken,
}

/// Why a stream of events was left.
#[derive(Debug, thiserror::Error)]
enum Left {
    #[error("the worker has no events")]
    NoEvents,
    #[error("events are missing")]
    Gap,
    #[error("events of another life")]
    OtherLife,
    #[error("the stream ended or was quiet")]
    Ended,
    #[error("a line of more than {LINE_MAX_BYTES} bytes")]
    TooLong,
    #[error("a line that is no batch of events")]
    Malformed(#[source] serde_json::Error),
    #[error("the call failed")]
    Call(#[source] CallError),
}

/// Bytes of an unfinished line, and the permission to hold many of them.
#[derive(Default)]
struct Partial {
    bytes: Vec<u8>,
    turn: Option<OwnedSemaphorePermit>,
}

impl Follower {
    /// Follows until stopped; the worker's blocks leave the index with it.
    pub(super) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.follow_for_ever()).await;
    }

    async fn follow_for_ever(&self) {
        let mut feed =
            Some(Feed::new(Arc::clone(&self.index), self.epoch, self.health.known().events.clone()));
        let mut backoff = BACKOFF.0;
        let mut turn = 0;
        loop {
            let before = feed.as_ref().map_or(0, Feed::since);
            let left = self.follow(&mut feed).await;
            if feed.as_ref().is_some_and(|feed| feed.since() != before) {
                backoff = BACKOFF.0;
            }
            turn += 1;
            let mut pause = backoff;
            match &left {
                Left::NoEvents => {
                    self.health.known().set_reports(false);
                    pause = NO_EVENTS_FOR;
                }
                Left::Gap => self.metrics.index_gaps.inc(),
                _ => {}
            }
            tracing::debug!(worker = %self.health.name, why = %left, "KV events not followed for a while");
            tokio::time::sleep(pause.mul_f64(jitter(self.health.name.as_str(), turn))).await;
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    /// Follows one stream to its end. The feed is lent to a thread of its own for large lines.
    async fn follow(&self, feed: &mut Option<Feed>) -> Left {
        let since = feed.as_ref().map_or(0, Feed::since);
        let call = self.caller.kv_events(&self.health.authority, since, self.epoch);
        let mut body = match tokio::time::timeout(PATIENCE, call).await {
            Err(_) => return Left::Ended,
            Ok(Err(CallError::Refused {
                status: StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED,
                ..
            })) => return Left::NoEvents,
            Ok(Err(error)) => return Left::Call(error),
            Ok(Ok(body)) => body,
        };
        self.health.known().set_reports(true);
        let mut partial = Partial::default();
        loop {
            if let Err(left) = self.read(&mut body, &mut partial, feed).await {
                return left;
            }
        }
    }

    /// Takes in the next piece of the stream and every line that it completes.
    async fn read(
        &self,
        body: &mut Incoming,
        partial: &mut Partial,
        feed: &mut Option<Feed>,
    ) -> Result<(), Left> {
        let Ok(Some(Ok(frame))) = tokio::time::timeout(QUIET_MAX, body.frame()).await else {
            return Err(Left::Ended);
        };
        let Ok(mut data) = frame.into_data() else { return Ok(()) };
        while let Some(end) = find(&data, b'\n') {
            let line = data.split_to(end + 1);
            if partial.bytes.is_empty() {
                self.take_line(feed, &line)?;
                continue;
            }
            partial.bytes.extend_from_slice(&line);
            let whole = std::mem::take(partial);
            if whole.bytes.len() <= LARGE_BYTES {
                self.take_line(feed, &whole.bytes)?;
            } else {
                self.take_large(feed, whole).await?;
            }
        }
        partial.bytes.extend_from_slice(&data);
        if partial.bytes.len() > LINE_MAX_BYTES {
            return Err(Left::TooLong);
        }
        if partial.bytes.len() > LARGE_BYTES && partial.turn.is_none() {
            partial.turn = Arc::clone(&self.turns.0).acquire_owned().await.ok();
        }
        Ok(())
    }

    fn take_line(&self, feed: &mut Option<Feed>, line: &[u8]) -> Result<(), Left> {
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        let batch: KvEventBatch = serde_json::from_slice(line).map_err(Left::Malformed)?;
        let Some(feed) = feed else { return Err(Left::Ended) };
        take(&self.health, &self.metrics, feed, &batch)
    }

    async fn take_large(&self, feed: &mut Option<Feed>, line: Partial) -> Result<(), Left> {
        let Some(mut own) = feed.take() else { return Err(Left::Ended) };
        let (health, metrics) = (Arc::clone(&self.health), Arc::clone(&self.metrics));
        let work = tokio::task::spawn_blocking(move || {
            let batch: Result<KvEventBatch, _> = serde_json::from_slice(&line.bytes);
            let taken =
                batch.map_err(Left::Malformed).and_then(|batch| take(&health, &metrics, &mut own, &batch));
            (own, taken)
        });
        match work.await {
            Ok((own, taken)) => {
                *feed = Some(own);
                taken
            }
            Err(error) => {
                tracing::error!(%error, "taking in a snapshot panicked");
                let cell = self.health.known().events.clone();
                *feed = Some(Feed::new(Arc::clone(&self.index), self.epoch, cell));
                self.health.known().lost_sight();
                Err(Left::Ended)
            }
        }
    }
}

fn take(health: &Health, metrics: &Metrics, feed: &mut Feed, batch: &KvEventBatch) -> Result<(), Left> {
    if batch.block_tokens == 0 {
        return Err(Left::Ended);
    }
    if batch.snapshot && feed.since() > 0 && batch.epoch == feed.epoch() {
        // This router fell behind what the worker keeps.
        metrics.index_gaps.inc();
    }
    health.known().set_namespace(Namespace { scheme: batch.scheme, block_tokens: batch.block_tokens });
    match feed.take(batch) {
        Taken::Applied => {
            health.known().took(batch);
            Ok(())
        }
        Taken::Gap => Err(Left::Gap),
        Taken::OtherLife => {
            health.known().lost_sight();
            Err(Left::OtherLife)
        }
    }
}
