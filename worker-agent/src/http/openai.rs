//! The OpenAI surface of a worker with a simulated engine, so that the very same engine can stand behind any gateway.
//!
//! | method and path | answer |
//! |---|---|
//! | `POST /v1/chat/completions`, `/v1/completions` | JSON, or server-sent events with `"stream": true` |
//! | `POST /tokenize` | the tokens of a text or of messages, shaped as vLLM's |
//! | `GET /v1/models`, `/health` | the model; 200 while the worker takes requests |
//!
//! It is there for measuring: what is not needed for that is not looked at. Read are `model`, `messages` or `prompt`,
//! `max_tokens` (or `max_completion_tokens`), `stream` and `stream_options.include_usage`; any other field changes nothing.
//! There is no tokenizer: four bytes of a text are one token (see [`tokens`]), and an answer is made up of words that
//! follow from the token ids. Nothing is parsed or allocated per token but the bytes that go out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use baton_config::protocol::Sampling;
use baton_engine::engine::{Purpose, SequenceSpec};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde_json::json;

use self::answer::{Answer, Kind, Writer};
use self::refusal::Refusal;
use self::request::{Prompt, Request};
use super::{Shared, lines};
use crate::metrics::{RequestEnd, RequestKind};

mod answer;
mod refusal;
mod request;
mod tokens;

#[cfg(test)]
mod tests;

/// Tokens of an answer where the request does not say.
const MAX_TOKENS_DEFAULT: u32 = 16;
const JSON: &str = "application/json";
const EVENT_STREAM: &str = "text/event-stream";

/// The routes, for a worker whose engine is simulated.
pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/tokenize", post(tokenize))
        .route("/v1/models", get(models))
        .route("/health", get(health))
}

async fn chat(State(shared): State<Arc<Shared>>, body: Result<Bytes, BytesRejection>) -> Response {
    reply(&shared, Kind::Chat, &body).await
}

async fn completion(State(shared): State<Arc<Shared>>, body: Result<Bytes, BytesRejection>) -> Response {
    reply(&shared, Kind::Completion, &body).await
}

async fn reply(shared: &Arc<Shared>, kind: Kind, body: &Result<Bytes, BytesRejection>) -> Response {
    match begin(shared, kind, body).await {
        Ok((answer, true)) => ([(CONTENT_TYPE, EVENT_STREAM)], Body::from_stream(answer)).into_response(),
        Ok((answer, false)) => match answer.whole().await {
            Ok(bytes) => ([(CONTENT_TYPE, JSON)], bytes).into_response(),
            Err(refusal) => refusal.into_response(),
        },
        Err(refusal) => {
            shared.metrics.request(RequestKind::Openai, RequestEnd::Refused);
            refusal.into_response()
        }
    }
}

/// Hands a request to the engine; says also whether its answer is to be streamed.
async fn begin(
    shared: &Arc<Shared>,
    kind: Kind,
    body: &Result<Bytes, BytesRejection>,
) -> Result<(Answer, bool), Refusal> {
    let request = request::parse(body)?;
    let model = &shared.model;
    if let Some(name) = request.model.as_deref()
        && name != model.name
    {
        return Err(Refusal::no_model(name));
    }
    let permit = shared.admit()?;
    let tokens = prompt_of(&request, Some(kind), model.vocab)?;
    let prompt = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
    let spec = SequenceSpec {
        tokens,
        generated: 0,
        max_tokens: request.max_tokens().unwrap_or(MAX_TOKENS_DEFAULT),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        cache_salt: 0,
        logits_digest: false,
        purpose: Purpose::Generate,
    };
    let sequence = shared.engine.submit(spec).await?;
    let writer = Writer::new(kind, next_id(), &model.name, request.usage_wanted());
    Ok((Answer::new(Arc::clone(shared), permit, sequence, writer, prompt), request.stream()))
}

/// The tokens of a request; either kind of prompt will do where no kind is asked for.
fn prompt_of(request: &Request<'_>, kind: Option<Kind>, vocab: u32) -> Result<Vec<u32>, Refusal> {
    match (&request.messages, &request.prompt) {
        (Some(messages), _) if kind != Some(Kind::Completion) => Ok(tokens::of_messages(messages, vocab)),
        (_, Some(Prompt::Text(text))) if kind != Some(Kind::Chat) => Ok(tokens::of_text(text, vocab)),
        (_, Some(Prompt::Tokens(tokens))) if kind != Some(Kind::Chat) => Ok(tokens.clone()),
        _ if kind == Some(Kind::Chat) => Err(Refusal::invalid("'messages' is missing".to_owned())),
        _ => Err(Refusal::invalid("'prompt' is missing".to_owned())),
    }
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

async fn tokenize(State(shared): State<Arc<Shared>>, body: Result<Bytes, BytesRejection>) -> Response {
    let tokens = request::parse(&body).and_then(|request| prompt_of(&request, None, shared.model.vocab));
    match tokens {
        Ok(tokens) => {
            let answer = json!({
                "count": tokens.len(), "max_model_len": shared.model.max_context, "tokens": tokens,
            });
            ([(CONTENT_TYPE, JSON)], lines::line(&answer)).into_response()
        }
        Err(refusal) => refusal.into_response(),
    }
}

async fn models(State(shared): State<Arc<Shared>>) -> Response {
    let (name, context) = (&shared.model.name, shared.model.max_context);
    let model = json!({
        "id": name, "object": "model", "created": 0, "owned_by": "baton", "root": name, "max_model_len": context,
    });
    let list = json!({ "object": "list", "data": [model] });
    ([(CONTENT_TYPE, JSON)], lines::line(&list)).into_response()
}

async fn health(State(shared): State<Arc<Shared>>) -> StatusCode {
    match shared.phase.borrow().accepts() {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    }
}
