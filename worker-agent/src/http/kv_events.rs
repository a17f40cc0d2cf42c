//! `GET /v1/kv/events?since=SEQ`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use baton_config::Epoch;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::fault::Fault;
use super::{Shared, lines};
use crate::kv_log::Next;

/// Lines follow each other no more closely than this: under load one carries what many requests changed, and wakes its reader
/// once. Followers are as much behind at most; computing a block takes longer.
const GATHER: Duration = Duration::from_millis(2);
/// Lines between the log and a follower's connection.
const LINES_MAX: usize = 8;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Params {
    /// Number of the last event the follower has.
    #[serde(default)]
    since: u64,
    /// The life that number belongs to; without, the present one.
    epoch: Option<u64>,
}

pub(super) async fn events(
    State(shared): State<Arc<Shared>>,
    params: Result<Query<Params>, QueryRejection>,
) -> Result<Response, Fault> {
    let Query(params) = params.map_err(|rejection| Fault::refused(rejection.body_text()))?;
    let (out, lines) = mpsc::channel(LINES_MAX);
    let tasks = shared.tasks.clone();
    tasks.spawn(async move {
        let stop = shared.stop.clone();
        stop.run_until_cancelled(follow(shared, params, out)).await;
    });
    Ok(lines::response(lines))
}

/// Sends every event after `since`; a snapshot first where the log does not reach back, or is of another life.
async fn follow(shared: Arc<Shared>, params: Params, out: mpsc::Sender<Bytes>) {
    let mut news = shared.kv_log.news();
    let mut since = params.since;
    let mut epoch = params.epoch.map_or(news.borrow().0, Epoch);
    let mut rested = Instant::now();
    loop {
        // What is new after this wakes it again.
        news.mark_unchanged();
        let batch = match shared.kv_log.after(epoch, since) {
            Next::Batch(batch) => batch,
            Next::Gap => match shared.engine.kv_snapshot().await {
                Ok(snapshot) => snapshot,
                Err(_) => return,
            },
            Next::Wait => {
                tokio::select! {
                    biased;
                    () = out.closed() => return,
                    changed = news.changed() => if changed.is_err() { return },
                }
                tokio::time::sleep_until(rested).await;
                continue;
            }
        };
        since = batch.seq;
        epoch = batch.epoch;
        if out.send(lines::line(&batch)).await.is_err() {
            return;
        }
        rested = Instant::now() + GATHER;
    }
}
