//! A watch of etcd: opened at the pinned member, asked for a sign of life, ended with a reason.

use std::collections::VecDeque;
use std::sync::Arc;

use etcd_client::{WatchOptions, WatchResponse, WatchStream};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::time::{Instant, timeout_at};

use super::convert::{Grouper, Told, Torn, revision};
use super::link::{Failure, Link, classify};
use super::liveness::{Liveness, Silence};
use super::{CALL_TIMEOUT, DEADLINE, Inner};
use crate::store::{Batch, Revision, StoreError, WatchError};

enum Phase {
    Opening { prefix: String, since: Revision },
    Open(Box<Watcher>),
}

pub(super) fn watch(
    inner: Arc<Inner>,
    prefix: &str,
    since: Revision,
) -> BoxStream<'static, Result<Batch, WatchError>> {
    let opening = Phase::Opening { prefix: prefix.to_owned(), since };
    stream::unfold(Some((inner, opening)), |running| async {
        let (inner, phase) = running?;
        let opened = match phase {
            Phase::Open(watcher) => Ok(watcher),
            Phase::Opening { prefix, since } => Watcher::open(&inner, &prefix, since).await.map(Box::new),
        };
        let next = match opened {
            Ok(mut watcher) => watcher.next(&inner).await.map(|batch| (batch, watcher)),
            Err(error) => Err(error),
        };
        match next {
            Ok((batch, watcher)) => Some((Ok(batch), Some((inner, Phase::Open(watcher))))),
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

/// An open watch.
struct Watcher {
    stream: WatchStream,
    generation: u64,
    liveness: Liveness,
    grouper: Grouper,
    ready: VecDeque<Batch>,
}

impl Watcher {
    async fn open(inner: &Inner, prefix: &str, since: Revision) -> Result<Self, WatchError> {
        // etcd waits in silence for a revision that has not happened, for ever if it is another store's.
        let current = inner.current().await.map_err(|error| lost(&error))?;
        if since > current {
            return Err(WatchError::Future { asked: since, current });
        }
        let key = inner.prefix.add(prefix);
        let start = i64::try_from(since.saturating_add(1)).unwrap_or(i64::MAX);
        let call = |mut link: Link| async move {
            let options = WatchOptions::new().with_prefix().with_start_revision(start);
            Ok((link.watch.watch(key, Some(options)).await?, link.place.generation))
        };
        let opened = inner.attempt(CALL_TIMEOUT, Instant::now() + DEADLINE, call).await;
        let (stream, generation) = opened.map_err(|failure| {
            tracing::debug!(?failure, "a watch of etcd could not be opened");
            WatchError::Lost
        })?;
        let liveness = Liveness::new(Instant::now());
        Ok(Self { stream, generation, liveness, grouper: Grouper::new(since), ready: VecDeque::new() })
    }

    async fn next(&mut self, inner: &Inner) -> Result<Batch, WatchError> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            let message = timeout_at(self.liveness.wake(), self.stream.message()).await;
            let now = Instant::now();
            match message {
                Err(_) => self.silent(inner, now).await?,
                Ok(Ok(Some(response))) => {
                    self.liveness.heard(now);
                    inner.good(self.generation);
                    self.take(inner, &response)?;
                }
                Ok(Ok(None)) => return Err(self.lose(inner, "the watch ended")),
                Ok(Err(error)) => {
                    return Err(match classify(&error) {
                        // It would be as large the next time: a listing comes in pages.
                        Failure::TooLarge => WatchError::Compacted { oldest: 0 },
                        _ => self.lose(inner, &error.to_string()),
                    });
                }
            }
        }
    }

    async fn silent(&mut self, inner: &Inner, now: Instant) -> Result<(), WatchError> {
        match self.liveness.tick(now) {
            Silence::Wait => Ok(()),
            Silence::Dead => Err(self.lose(inner, "the watch is silent")),
            Silence::Ask => {
                // A question that can't even be sent counts as unanswered.
                let asked = timeout_at(self.liveness.wake(), self.stream.request_progress()).await;
                match asked {
                    Ok(Err(error)) => Err(self.lose(inner, &error.to_string())),
                    Ok(Ok(())) | Err(_) => Ok(()),
                }
            }
        }
    }

    fn take(&mut self, inner: &Inner, response: &WatchResponse) -> Result<(), WatchError> {
        // The reason is an empty text where the history was compacted: only these two say so.
        if response.compact_revision() > 0 {
            return Err(WatchError::Compacted { oldest: revision(response.compact_revision()) });
        }
        if response.canceled() {
            return Err(self.lose(inner, response.cancel_reason()));
        }
        let told = response.events().iter().filter_map(|event| Told::new(&inner.prefix, event)).collect();
        match self.grouper.group(told) {
            Ok(batches) => {
                self.ready.extend(batches);
                Ok(())
            }
            Err(Torn { revision }) => {
                tracing::warn!(revision, "etcd told a revision in parts; listing anew");
                Err(WatchError::Compacted { oldest: revision })
            }
        }
    }

    /// The member is given up, unless that has already happened.
    fn lose(&self, inner: &Inner, why: &str) -> WatchError {
        inner.bad(self.generation, &Failure::NotDone(why.to_owned()));
        WatchError::Lost
    }
}

fn lost(error: &StoreError) -> WatchError {
    tracing::debug!(%error, "etcd's revision is not known");
    WatchError::Lost
}
