//! `POST /v1/prefill`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use baton_config::HandoffId;
use baton_config::protocol::{FirstToken, HandoffOutcome, HandoffRef, PrefillReply, PrefillRequest};
use baton_engine::EngineEvent;
use baton_engine::engine::{Purpose, SequenceSpec, Writers};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Shared;
use super::fault::{Fault, parse};
use crate::driver::OpenFailure;
use crate::engine_thread::Sequence;
use crate::handoff::{OpenError, Opening, PrefillEvent};
use crate::metrics::{RequestEnd, RequestKind, TokenKind};
use crate::validate;

/// The answer to a prefill whose handoff had ended before it came.
const ENDED_BEFORE: PrefillReply = PrefillReply {
    outcome: HandoffOutcome::Cancelled,
    cached_tokens: 0,
    computed_tokens: 0,
    queue_ms: 0.0,
    prefill_ms: 0.0,
};

pub(super) async fn prefill(
    State(shared): State<Arc<Shared>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<PrefillReply>, Fault> {
    let result = begin(&shared, body).await;
    if let Err(fault) = &result {
        shared.metrics.request(RequestKind::Prefill, RequestEnd::Refused);
        if fault.is_stale() {
            shared.metrics.stale_epoch.inc();
        }
    }
    result.map(Json)
}

async fn begin(shared: &Arc<Shared>, body: Result<Bytes, BytesRejection>) -> Result<PrefillReply, Fault> {
    let request: PrefillRequest = parse(body)?;
    validate::prefill(&request, &shared.model)?;
    let permit = shared.admit()?;
    let (reply, answer) = oneshot::channel();
    let (task_shared, task_metrics) = (Arc::clone(shared), shared.metrics.clone());
    shared.tasks.spawn(async move {
        let _permit = permit;
        match Export::start(task_shared, request).await {
            Ok(Some(export)) => export.run(reply).await,
            Ok(None) => {
                task_metrics.request(RequestKind::Prefill, RequestEnd::Cancelled);
                // The router may have left.
                let _ = reply.send(Ok(ENDED_BEFORE));
            }
            Err(fault) => drop(reply.send(Err(fault))),
        }
    });
    answer.await.map_err(|_| Fault::unavailable("this worker is shutting down"))?
}

/// A prefill that the engine has taken.
struct Export {
    shared: Arc<Shared>,
    id: HandoffId,
    sequence: Sequence,
    outcome: oneshot::Receiver<HandoffOutcome>,
    prompt: u32,
    cached: u32,
    computed: u32,
    queued: Duration,
    admitted: Option<Instant>,
    prefilled: Duration,
}

impl Export {
    /// `None` if the decode side was quicker and chose to do without.
    async fn start(shared: Arc<Shared>, request: PrefillRequest) -> Result<Option<Self>, Fault> {
        let prompt = u32::try_from(request.tokens.len()).unwrap_or(u32::MAX);
        let PrefillRequest { tokens, generated, sampling, cache_salt, logits_digest, handoff, .. } = request;
        let spec = SequenceSpec {
            tokens,
            generated,
            max_tokens: 1,
            sampling,
            cache_salt,
            logits_digest,
            purpose: Purpose::Export,
        };
        let sequence = shared.engine.submit(spec).await?;
        let HandoffRef { id, own_epoch, peer } = handoff;
        let opening = Opening { id, own_epoch, peer, prompt };
        match shared.handoffs.open_prefill(opening, sequence.id).await {
            Ok(outcome) => Ok(Some(Self {
                shared,
                id,
                sequence,
                outcome,
                prompt,
                cached: 0,
                computed: 0,
                queued: Duration::ZERO,
                admitted: None,
                prefilled: Duration::ZERO,
            })),
            Err(failure) => {
                shared.engine.cancel(sequence.id, Writers::Gone).await;
                match failure {
                    OpenFailure::Refused(OpenError::Ended) => Ok(None),
                    failure => Err(failure.into()),
                }
            }
        }
    }

    async fn run(mut self, mut reply: oneshot::Sender<Result<PrefillReply, Fault>>) {
        let outcome = self.relay(&mut reply).await;
        let metrics = &self.shared.metrics;
        metrics.tokens(TokenKind::Cached, u64::from(self.cached));
        metrics.tokens(TokenKind::Computed, u64::from(self.computed.saturating_sub(self.cached)));
        metrics.request(
            RequestKind::Prefill,
            match outcome {
                HandoffOutcome::Done => RequestEnd::Ok,
                HandoffOutcome::Cancelled => RequestEnd::Cancelled,
                HandoffOutcome::Expired => RequestEnd::Failed,
            },
        );
        let report = PrefillReply {
            outcome,
            cached_tokens: self.cached,
            computed_tokens: self.computed.saturating_sub(self.cached),
            queue_ms: self.queued.as_secs_f64() * 1e3,
            prefill_ms: self.prefilled.as_secs_f64() * 1e3,
        };
        // The router may have left: then nobody wants to know.
        let _ = reply.send(Ok(report));
    }

    /// Passes what the engine does on to the handoff until the handoff ends.
    async fn relay(&mut self, reply: &mut oneshot::Sender<Result<PrefillReply, Fault>>) -> HandoffOutcome {
        let abort = self.shared.abort.clone();
        let (mut left, mut engine_done) = (false, false);
        loop {
            tokio::select! {
                biased;
                outcome = &mut self.outcome => return outcome.unwrap_or(HandoffOutcome::Cancelled),
                () = abort.cancelled(), if !left => {
                    left = true;
                    self.shared.handoffs.prefill(self.id, PrefillEvent::Cancel).await;
                }
                () = reply.closed(), if !left => {
                    left = true;
                    self.shared.handoffs.prefill(self.id, PrefillEvent::Cancel).await;
                }
                event = self.sequence.events.recv(), if !engine_done => match event {
                    Some(event) => self.pass_on(event).await,
                    None => {
                        engine_done = true;
                        if self.computed < self.prompt {
                            self.shared.handoffs.prefill(self.id, PrefillEvent::EngineFailed).await;
                        }
                    }
                },
            }
        }
    }

    async fn pass_on(&mut self, event: EngineEvent) {
        let (handoffs, id) = (&self.shared.handoffs, self.id);
        match event {
            EngineEvent::Admitted { cached_tokens, blocks, queued, .. } => {
                self.cached = cached_tokens;
                self.computed = cached_tokens;
                self.queued = queued;
                self.admitted = Some(Instant::now());
                handoffs.prefill_blocks(id, blocks).await;
                if cached_tokens > 0 {
                    handoffs.prefill(id, PrefillEvent::Computed { upto: cached_tokens }).await;
                }
            }
            EngineEvent::Prefilled { upto, .. } => {
                self.computed = self.computed.max(upto);
                handoffs.prefill(id, PrefillEvent::Computed { upto }).await;
            }
            EngineEvent::Token { token, logprob, logits_digest, .. } => {
                self.prefilled = self.admitted.map_or(Duration::ZERO, |at| at.elapsed());
                self.computed = self.prompt;
                handoffs.prefill(id, PrefillEvent::Computed { upto: self.prompt }).await;
                let first = FirstToken { token, logprob, logits_digest };
                handoffs.prefill(id, PrefillEvent::First(first)).await;
            }
            EngineEvent::Finished { .. } => {}
            EngineEvent::Failed { error, .. } => {
                self.shared.note_error(&error.to_string());
                handoffs.prefill(id, PrefillEvent::EngineFailed).await;
            }
        }
    }
}
