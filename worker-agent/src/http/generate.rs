//! `POST /v1/generate`.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::Response;
use baton_config::HandoffId;
use baton_config::protocol::{FailureCode, GenerateEvent, GenerateRequest, HandoffRef};
use baton_engine::EngineEvent;
use baton_engine::engine::{Purpose, SequenceSpec, Writers};
use tokio::sync::{mpsc, oneshot};

use super::fault::{Fault, parse};
use super::prompt_cost::PromptCost;
use super::{Shared, lines};
use crate::driver::{DecodeNews, OpenFailure};
use crate::engine_thread::Sequence;
use crate::handoff::{GiveUp, OpenError, Opening};
use crate::metrics::{RequestEnd, RequestKind, TokenKind};
use crate::validate;

/// Lines between the request's task and its connection; the sequence's own channel holds all the rest.
const LINES_MAX: usize = 16;

pub(super) async fn generate(
    State(shared): State<Arc<Shared>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Fault> {
    match begin(&shared, body).await {
        Ok(lines) => Ok(lines::response(lines)),
        Err(fault) => {
            shared.metrics.request(RequestKind::Generate, RequestEnd::Refused);
            if fault.is_stale() {
                shared.metrics.stale_epoch.inc();
            }
            Err(fault)
        }
    }
}

/// Starts a task that owns the request, so that nothing depends on how long the connection's future lives.
async fn begin(
    shared: &Arc<Shared>,
    body: Result<Bytes, BytesRejection>,
) -> Result<mpsc::Receiver<Bytes>, Fault> {
    let request: GenerateRequest = parse(body)?;
    validate::generate(&request, &shared.model)?;
    let permit = shared.admit()?;
    let (out, lines) = mpsc::channel(LINES_MAX);
    let (started, answer) = oneshot::channel();
    let task_shared = Arc::clone(shared);
    shared.tasks.spawn(async move {
        let _permit = permit;
        match Generation::start(task_shared, request, out).await {
            Ok(generation) => {
                // Nobody there any more shows in the channel of lines.
                let _ = started.send(Ok(()));
                generation.run().await;
            }
            Err(fault) => drop(started.send(Err(fault))),
        }
    });
    answer.await.map_err(|_| Fault::unavailable("this worker is shutting down"))??;
    Ok(lines)
}

/// A request that the engine has taken.
struct Generation {
    shared: Arc<Shared>,
    out: mpsc::Sender<Bytes>,
    sequence: Sequence,
    handoff: Option<(HandoffId, mpsc::Receiver<DecodeNews>)>,
    cost: PromptCost,
}

/// Why a request's task ends.
enum End {
    /// Its last line was sent.
    Finished,
    /// The client has left.
    Left,
    /// It cannot go on here.
    Failed(FailureCode, String),
}

impl Generation {
    async fn start(
        shared: Arc<Shared>,
        request: GenerateRequest,
        out: mpsc::Sender<Bytes>,
    ) -> Result<Self, Fault> {
        let prompt = u32::try_from(request.tokens.len()).unwrap_or(u32::MAX);
        let GenerateRequest {
            tokens,
            generated,
            max_tokens,
            sampling,
            cache_salt,
            logits_digest,
            handoff,
            ..
        } = request;
        let spec = SequenceSpec {
            tokens,
            generated,
            max_tokens,
            sampling,
            cache_salt,
            logits_digest,
            purpose: if handoff.is_some() { Purpose::Import } else { Purpose::Generate },
        };
        let alone = SequenceSpec { purpose: Purpose::Generate, ..spec.clone() };
        let mut sequence = shared.engine.submit(spec).await?;
        let mut fallback = None;
        let mut opened = None;
        if let Some(HandoffRef { id, own_epoch, peer }) = handoff {
            let opening = Opening { id, own_epoch, peer, prompt };
            match shared.handoffs.open_decode(opening, sequence.id).await {
                Ok(news) => opened = Some((id, news)),
                Err(failure) => {
                    shared.engine.cancel(sequence.id, Writers::Gone).await;
                    if failure != OpenFailure::Refused(OpenError::Ended) {
                        return Err(failure.into());
                    }
                    // The peer gave the handoff up before this request came: nothing to wait for.
                    sequence = shared.engine.submit(alone).await?;
                    shared.metrics.fallback(GiveUp::PeerEnded);
                    fallback = Some(GiveUp::PeerEnded);
                }
            }
        }
        Ok(Self { shared, out, sequence, handoff: opened, cost: PromptCost::new(prompt, fallback) })
    }

    async fn run(mut self) {
        let end = self.relay().await;
        match &self.handoff {
            Some((id, _)) => self.shared.handoffs.close_decode(*id).await,
            None => self.shared.engine.cancel(self.sequence.id, Writers::Gone).await,
        }
        let end = match end {
            End::Finished => RequestEnd::Ok,
            End::Left => RequestEnd::Cancelled,
            End::Failed(code, message) => {
                tracing::warn!(%message, "a request failed");
                self.shared.note_error(&message);
                let _ = self.send(&GenerateEvent::Failed { code, message }).await;
                RequestEnd::Failed
            }
        };
        self.shared.metrics.request(RequestKind::Generate, end);
    }

    async fn relay(&mut self) -> End {
        let abort = self.shared.abort.clone();
        let out = self.out.clone();
        loop {
            let event = tokio::select! {
                biased;
                () = abort.cancelled() => {
                    let message = "the worker's time to drain is over".to_owned();
                    return End::Failed(FailureCode::Unavailable, message);
                }
                () = out.closed() => return End::Left,
                Some(news) = next_news(&mut self.handoff) => {
                    if let Err(unfenced) = self.cost.take_news(news) {
                        return End::Failed(FailureCode::Engine, unfenced.to_string());
                    }
                    continue;
                }
                event = self.sequence.events.recv() => event,
            };
            let Some(event) = event else {
                return End::Failed(FailureCode::Engine, "the engine has stopped".to_owned());
            };
            if let Some(end) = self.pass_on(event).await {
                return end;
            }
        }
    }

    async fn pass_on(&mut self, event: EngineEvent) -> Option<End> {
        match event {
            EngineEvent::Admitted { cached_tokens, blocks, queued, .. } => {
                self.cost.admitted(cached_tokens, queued);
                if let Some((id, _)) = &self.handoff {
                    self.shared.handoffs.decode_admitted(*id, cached_tokens, blocks).await;
                }
                None
            }
            EngineEvent::Prefilled { .. } => None,
            EngineEvent::Token { token, logprob, logits_digest, .. } => {
                if self.cost.is_due()
                    && let Err(end) = self.report().await
                {
                    return Some(end);
                }
                self.shared.metrics.tokens(TokenKind::Generated, 1);
                self.send(&GenerateEvent::Token { token, logprob, logits_digest }).await.err()
            }
            EngineEvent::Finished { reason, .. } => {
                Some(self.send(&GenerateEvent::Finished { reason }).await.err().unwrap_or(End::Finished))
            }
            EngineEvent::Failed { error, .. } => Some(End::Failed(FailureCode::Engine, error.to_string())),
        }
    }

    /// Says what the prompt cost, right before the first token.
    async fn report(&mut self) -> Result<(), End> {
        // The news of a handoff is sent before the engine is told to go on, so it is there by now.
        if let Some(news) = self.handoff.as_mut().and_then(|(_, news)| news.try_recv().ok()) {
            self.cost
                .take_news(news)
                .map_err(|unfenced| End::Failed(FailureCode::Engine, unfenced.to_string()))?;
        }
        let report = self.cost.report(&self.shared.metrics);
        self.send(&GenerateEvent::Prefilled(report)).await
    }

    async fn send(&self, event: &GenerateEvent) -> Result<(), End> {
        match tokio::time::timeout(self.shared.stalled, self.out.send(lines::line(event))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(End::Left),
        }
    }
}

/// The news of a handoff, if there is one and it has any.
async fn next_news(handoff: &mut Option<(HandoffId, mpsc::Receiver<DecodeNews>)>) -> Option<DecodeNews> {
    match handoff {
        Some((_, news)) => news.recv().await,
        None => None,
    }
}
