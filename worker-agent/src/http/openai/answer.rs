//! What goes out: the events of one sequence as bytes.

use std::fmt::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Bytes;
use baton_config::protocol::FinishReason;
use baton_engine::EngineEvent;
use baton_engine::engine::Writers;
use futures_util::Stream;
use http::StatusCode;
use serde_json::json;
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::refusal::Refusal;
use super::tokens;
use crate::engine_thread::Sequence;
use crate::http::Shared;
use crate::in_flight::Permit;
use crate::metrics::{RequestEnd, RequestKind, TokenKind};

/// Which of the two kinds of answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Completion,
}

/// How much was read and written.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    prompt: u32,
    cached: u32,
    completion: u32,
}

/// Writes an answer; everything that does not change from token to token was put together before.
#[derive(Debug)]
pub(super) struct Writer {
    kind: Kind,
    /// `"id":...,"model":...` and what else every object begins with.
    head: String,
    /// From the start of an event to the text of its token.
    before: Vec<u8>,
    usage: bool,
}

/// From the text of a token to the end of its event.
const AFTER: [&[u8]; 2] = [
    b"\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n",
    b"\",\"logprobs\":null,\"finish_reason\":null}]}\n\n",
];
const DONE: &[u8] = b"data: [DONE]\n\n";

impl Writer {
    pub(super) fn new(kind: Kind, number: u64, model: &str, usage: bool) -> Self {
        let (id, object) = match kind {
            Kind::Chat => ("chatcmpl", "chat.completion"),
            Kind::Completion => ("cmpl", "text_completion"),
        };
        // Names of models are checked where the fleet file is read; quotes in them stay harmless all the same.
        let model = serde_json::Value::from(model);
        let head = format!("\"id\":\"{id}-{number}\",\"created\":0,\"model\":{model},\"object\":\"{object}");
        let mut writer = Self { kind, head, before: Vec::new(), usage };
        writer.before = format!(
            "{}{}",
            writer.chunk(),
            match kind {
                Kind::Chat => "{\"index\":0,\"delta\":{\"content\":\"",
                Kind::Completion => "{\"index\":0,\"text\":\"",
            }
        )
        .into_bytes();
        writer
    }

    /// An event up to its choices.
    fn chunk(&self) -> String {
        let chunk = if self.kind == Kind::Chat { ".chunk" } else { "" };
        format!("data: {{{}{chunk}\",\"choices\":[", self.head)
    }

    /// What comes before the first token.
    pub(super) fn first(&self, out: &mut Vec<u8>) {
        if self.kind == Kind::Chat {
            out.extend_from_slice(self.chunk().as_bytes());
            out.extend_from_slice(b"{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},");
            out.extend_from_slice(b"\"logprobs\":null,\"finish_reason\":null}]}\n\n");
        }
    }

    pub(super) fn token(&self, token: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.before);
        tokens::word(token, out);
        out.extend_from_slice(AFTER[usize::from(self.kind == Kind::Completion)]);
    }

    fn end(&self, reason: FinishReason, usage: Usage, out: &mut Vec<u8>) {
        let empty = if self.kind == Kind::Chat { "\"delta\":{}" } else { "\"text\":\"\"" };
        let mut text = self.chunk();
        // Writing to a String does not fail.
        let _ = write!(
            text,
            "{{\"index\":0,{empty},\"logprobs\":null,\"finish_reason\":\"{}\"}}]}}\n\n",
            name(reason)
        );
        if self.usage {
            text.push_str(&self.chunk());
            let _ = write!(text, "],\"usage\":{}}}\n\n", usage.json());
        }
        out.extend_from_slice(text.as_bytes());
        out.extend_from_slice(DONE);
    }

    fn whole(&self, text: &str, reason: FinishReason, usage: Usage) -> Vec<u8> {
        let choice = match self.kind {
            Kind::Chat => format!("\"message\":{{\"role\":\"assistant\",\"content\":\"{text}\"}}"),
            Kind::Completion => format!("\"text\":\"{text}\""),
        };
        format!(
            "{{{}\",\"choices\":[{{\"index\":0,{choice},\"logprobs\":null,\"finish_reason\":\"{}\"}}],\"usage\":{}}}",
            self.head,
            name(reason),
            usage.json()
        )
        .into_bytes()
    }
}

impl Usage {
    fn json(self) -> String {
        let Self { prompt, cached, completion } = self;
        format!(
            "{{\"prompt_tokens\":{prompt},\"total_tokens\":{},\"completion_tokens\":{completion},\"prompt_tokens_details\":{{\"cached_tokens\":{cached}}}}}",
            prompt + completion
        )
    }
}

fn name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// An answer under way. As a stream it gives server-sent events, a frame (and so a chunk of HTTP) for each token, as real engines
/// do: what several frames cost a gateway is part of what is measured. Dropping it ends the sequence.
pub(super) struct Answer {
    shared: Arc<Shared>,
    _permit: Permit,
    sequence: Sequence,
    writer: Writer,
    usage: Usage,
    end: Option<RequestEnd>,
    /// The worker ends what it has under way.
    aborted: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Answer {
    pub(super) fn new(
        shared: Arc<Shared>,
        permit: Permit,
        sequence: Sequence,
        writer: Writer,
        prompt: u32,
    ) -> Self {
        let usage = Usage { prompt, ..Usage::default() };
        let aborted = Box::pin(shared.abort.clone().cancelled_owned());
        Self { shared, _permit: permit, sequence, writer, usage, end: None, aborted }
    }

    fn admitted(&mut self, cached: u32) {
        self.usage.cached = cached;
        let metrics = &self.shared.metrics;
        metrics.tokens(TokenKind::Cached, u64::from(cached));
        metrics.tokens(TokenKind::Computed, u64::from(self.usage.prompt.saturating_sub(cached)));
    }

    /// The whole answer, once it is there.
    pub(super) async fn whole(mut self) -> Result<Bytes, Refusal> {
        let mut text = Vec::new();
        let reason = loop {
            let event = tokio::select! {
                biased;
                () = &mut self.aborted => None,
                event = self.sequence.events.recv() => event,
            };
            match event {
                Some(EngineEvent::Admitted { cached_tokens, .. }) => self.admitted(cached_tokens),
                Some(EngineEvent::Prefilled { .. }) => {}
                Some(EngineEvent::Token { token, .. }) => {
                    self.usage.completion += 1;
                    tokens::word(token, &mut text);
                }
                Some(EngineEvent::Finished { reason, .. }) => break reason,
                Some(EngineEvent::Failed { error, .. }) => {
                    self.end = Some(RequestEnd::Failed);
                    return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()));
                }
                None => {
                    self.end = Some(RequestEnd::Failed);
                    return Err(Refusal::new(
                        StatusCode::SERVICE_UNAVAILABLE,
                        "this worker is shutting down",
                    ));
                }
            }
        };
        self.end = Some(RequestEnd::Ok);
        Ok(Bytes::from(self.writer.whole(&String::from_utf8_lossy(&text), reason, self.usage)))
    }

    fn event(&mut self, event: Option<EngineEvent>, out: &mut Vec<u8>) {
        match event {
            Some(EngineEvent::Admitted { cached_tokens, .. }) => self.admitted(cached_tokens),
            Some(EngineEvent::Prefilled { .. }) => {}
            Some(EngineEvent::Token { token, .. }) => {
                if self.usage.completion == 0 {
                    self.writer.first(out);
                }
                self.usage.completion += 1;
                self.writer.token(token, out);
            }
            Some(EngineEvent::Finished { reason, .. }) => {
                self.writer.end(reason, self.usage, out);
                self.end = Some(RequestEnd::Ok);
            }
            Some(EngineEvent::Failed { error, .. }) => self.broke(&error.to_string(), out),
            None => self.broke("this worker is shutting down", out),
        }
    }

    fn broke(&mut self, why: &str, out: &mut Vec<u8>) {
        let refusal = Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, why);
        out.extend_from_slice(format!("data: {}\n\n", json!(refusal.json())).as_bytes());
        self.end = Some(RequestEnd::Failed);
    }
}

impl Stream for Answer {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.end.is_some() {
            return Poll::Ready(None);
        }
        let mut out = Vec::new();
        while out.is_empty() {
            let event = match self.sequence.events.poll_recv(cx) {
                Poll::Ready(event) => event,
                Poll::Pending => {
                    std::task::ready!(self.aborted.as_mut().poll(cx));
                    None
                }
            };
            out.reserve(256);
            self.event(event, &mut out);
        }
        Poll::Ready(Some(Ok(Bytes::from(out))))
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let metrics = &self.shared.metrics;
        metrics.tokens(TokenKind::Generated, u64::from(self.usage.completion));
        metrics.request(RequestKind::Openai, self.end.unwrap_or(RequestEnd::Cancelled));
        if self.end.is_none() {
            let (engine, id) = (self.shared.engine.clone(), self.sequence.id);
            self.shared.tasks.spawn(async move { engine.cancel(id, Writers::Gone).await });
        }
    }
}
