//! Asks the workers how they are: many at once, none for long.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use baton_config::protocol::BlockCounts;
use baton_config::{Epoch, WorkerId};
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use tokio::time::Instant;

use super::measure::Sample;
use crate::record::{WorkerRecord, WorkerState};

/// Workers asked at once.
const AT_ONCE: usize = 64;
/// Time for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// Time for all answers: who has not answered by then is asked again in the next round.
const ROUND_TIMEOUT: Duration = Duration::from_millis(900);
/// An answer stands for so long.
const FRESH: Duration = Duration::from_secs(4);
/// Longest answer read: a worker tells its paths to all of its peers, too.
const ANSWER_MAX_BYTES: usize = 4 << 20;

/// What a worker's answer must hold; workers of other versions may say more.
#[derive(Debug, Deserialize)]
struct State {
    epoch: Option<Epoch>,
    requests_running: u32,
    requests_waiting: u32,
    prefill_tokens_pending: u64,
    kv_blocks: BlockCounts,
    #[serde(default)]
    kv_evictable: u32,
    #[serde(default)]
    prefilled_tokens: u64,
    #[serde(default)]
    prompt_tokens: Option<f64>,
    prefill_tokens_per_s: Option<f64>,
    itl_ms: Option<f64>,
}

/// The last answers.
#[derive(Debug)]
pub(super) struct Poller {
    http: reqwest::Client,
    samples: BTreeMap<WorkerId, (Epoch, Sample)>,
}

impl Poller {
    /// `None` if there can be no HTTP client, which does not occur.
    pub(super) fn new() -> Option<Self> {
        let http = crate::http::builder().timeout(ANSWER_TIMEOUT).build().ok()?;
        Some(Self { http, samples: BTreeMap::new() })
    }

    /// Asks everybody once. Whoever drains or joins is left alone: what they have says nothing about what comes.
    pub(super) async fn poll(&mut self, workers: impl Iterator<Item = &Arc<WorkerRecord>>) {
        let asked: Vec<Arc<WorkerRecord>> =
            workers.filter(|record| record.state == WorkerState::Ready).cloned().collect();
        self.samples.retain(|worker, (epoch, _)| {
            asked.iter().any(|record| record.worker == *worker && record.epoch == *epoch)
        });
        let http = &self.http;
        let answers = stream::iter(asked).map(async |record| {
            let sample = ask(http, &record).await?;
            Some((record.worker.clone(), (record.epoch, sample)))
        });
        let mut answers = std::pin::pin!(answers.buffer_unordered(AT_ONCE));
        let deadline = Instant::now() + ROUND_TIMEOUT;
        while let Ok(Some(answer)) = tokio::time::timeout_at(deadline, answers.next()).await {
            self.samples.extend(answer);
        }
    }

    /// What a worker said lately in this life.
    pub(super) fn sample(&self, worker: &WorkerId, epoch: Epoch, now: Instant) -> Option<Sample> {
        let (of, sample) = self.samples.get(worker)?;
        (*of == epoch && now < sample.at + FRESH).then_some(*sample)
    }
}

async fn ask(http: &reqwest::Client, record: &WorkerRecord) -> Option<Sample> {
    let answer = http.get(format!("http://{}/v1/state", record.address)).send().await;
    let mut answer = answer.and_then(reqwest::Response::error_for_status).ok()?;
    let at = Instant::now();
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.ok()? {
        body.extend_from_slice(&chunk);
        if body.len() > ANSWER_MAX_BYTES {
            return None;
        }
    }
    let state: State = serde_json::from_slice(&body).ok()?;
    // Somebody else listens there by now, or it has not heard of its new life.
    (state.epoch == Some(record.epoch)).then(|| sample(&state, at))
}

fn sample(state: &State, at: Instant) -> Sample {
    let positive = |value: Option<f64>| value.filter(|value| value.is_finite() && *value > 0.0);
    let blocks = &state.kv_blocks;
    Sample {
        at,
        running: state.requests_running,
        waiting: state.requests_waiting,
        pending_tokens: state.prefill_tokens_pending,
        prefilled_tokens: state.prefilled_tokens,
        prompt_tokens: positive(state.prompt_tokens),
        prefill_tokens_per_s: positive(state.prefill_tokens_per_s),
        itl_ms: positive(state.itl_ms),
        blocks: blocks.total(),
        blocks_held: blocks.total().saturating_sub(blocks.free).saturating_sub(state.kv_evictable),
    }
}
