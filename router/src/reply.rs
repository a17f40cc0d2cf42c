//! Turns what went wrong into HTTP: the only file that knows status codes and the error bodies of both APIs.

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{Response, StatusCode};

use crate::admit::{Left, Reason, Refused};
use crate::answer::AnswerBody;
use crate::routes::Dialect;

mod foreign;

pub(crate) use foreign::refused_by_server;

/// Longest text of a request that an error message repeats, in characters.
const QUOTE_MAX_CHARS: usize = 100;

const HEAD_TOO_LARGE: &str = "The request's head is too large.";

/// An answer other than the one asked for, as the client sees it.
///
/// Messages are public: they name what the client sent, never what happened inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A field is missing, of the wrong type, out of range or not supported.
    Invalid { message: String, param: Option<String>, code: Option<&'static str> },
    /// Prompt and answer do not fit the model.
    ContextLength { message: String, param: &'static str },
    /// No model of that name.
    UnknownModel { model: String },
    /// No such path.
    UnknownPath { method: String, path: String },
    /// A response by its id: none is kept.
    NotStored { id: String },
    /// The path exists, the method does not.
    Method { method: String, path: String, allow: &'static str },
    /// The body did not arrive in time.
    SlowBody,
    /// The body is larger than allowed.
    TooLarge { limit: u64 },
    /// The head is larger than allowed.
    HeadTooLarge,
    /// The body is not plain JSON.
    MediaType { message: String },
    /// There is no key, or not a good one.
    Unauthorized { message: &'static str, code: &'static str },
    /// Who asks is known and may not.
    Forbidden { message: &'static str, code: &'static str },
    /// Whether a token is good cannot be told yet.
    NoSigners,
    /// Turned away at the gate: by the state of the router, or by what the key may use.
    Overloaded(Refused),
    /// Every worker refused for want of room.
    WorkersBusy,
    /// No worker can serve.
    NoWorker,
    /// The worker died and the request could not be moved.
    WorkerLost,
    /// Two workers died with this very request.
    Barred,
    /// A server of another project refused the request, in its own words.
    RefusedByServer {
        status: StatusCode,
        message: String,
        kind: String,
        param: Option<String>,
        code: Option<String>,
    },
    /// No server takes the router's key: a fault of whoever runs both.
    ServerDenied,
    /// The whole request took too long.
    TimedOut,
    /// A fault of the router itself.
    Internal,
}

/// Who is to blame for the end of a request, for the books.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answered as asked.
    Ok,
    /// The client asked for something impossible, or left.
    ClientError,
    /// Turned away for want of room or workers.
    Refused,
    /// Broke on our side.
    Failed,
}

/// The label of a request whose client left before the end.
pub(crate) const CLIENT_LEFT: u16 = 499;

impl Refusal {
    /// A 400 about `param`.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: Some(param.into()), code: None }
    }

    /// A 400 about `param` with a machine-readable code.
    pub(crate) fn coded(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: Some(param.into()), code: Some(code) }
    }

    /// A 400 about the body as a whole.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), param: None, code: None }
    }

    /// The status code.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Invalid { .. } | Self::ContextLength { .. } => StatusCode::BAD_REQUEST,
            Self::UnknownModel { .. } | Self::UnknownPath { .. } | Self::NotStored { .. } => {
                StatusCode::NOT_FOUND
            }
            Self::Unauthorized { .. } => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::MediaType { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Overloaded(_) | Self::WorkersBusy => StatusCode::TOO_MANY_REQUESTS,
            Self::NoWorker | Self::NoSigners => StatusCode::SERVICE_UNAVAILABLE,
            Self::RefusedByServer { status, .. } => *status,
            Self::WorkerLost | Self::ServerDenied => StatusCode::BAD_GATEWAY,
            Self::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Self::Barred | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The error body.
    pub(crate) fn body(&self, dialect: Dialect) -> Bytes {
        let body = match dialect {
            Dialect::OpenAi => self.openai_body(),
            Dialect::Anthropic => self.anthropic_body(),
        };
        Bytes::from(body.to_string())
    }

    /// Anthropic's errors have no place for the field at fault but the message, which names it.
    fn anthropic_body(&self) -> serde_json::Value {
        let kind = match self.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            400..500 => "invalid_request_error",
            _ => "api_error",
        };
        serde_json::json!({ "type": "error", "error": { "type": kind, "message": self.message() } })
    }

    fn openai_body(&self) -> serde_json::Value {
        let (kind, code) = match self {
            Self::Invalid { code, .. } => ("invalid_request_error", *code),
            Self::ContextLength { .. } => ("invalid_request_error", Some("context_length_exceeded")),
            Self::UnknownModel { .. } => ("invalid_request_error", Some("model_not_found")),
            Self::UnknownPath { .. } => ("invalid_request_error", Some("unknown_url")),
            Self::NotStored { .. } => ("invalid_request_error", Some("response_not_found")),
            Self::Method { .. } => ("invalid_request_error", Some("method_not_supported")),
            Self::SlowBody => ("invalid_request_error", Some("request_timeout")),
            Self::TooLarge { .. } => ("invalid_request_error", Some("request_too_large")),
            Self::HeadTooLarge => ("invalid_request_error", Some("header_fields_too_large")),
            Self::MediaType { .. } => ("invalid_request_error", Some("unsupported_media_type")),
            Self::Unauthorized { code, .. } | Self::Forbidden { code, .. } => {
                ("invalid_request_error", Some(*code))
            }
            Self::Overloaded(refused) => match refused.reason {
                Reason::QueueFull
                | Reason::Deadline
                | Reason::WorkersQueued
                | Reason::Bodies
                | Reason::QueueTimeout => ("rate_limit_error", Some("overloaded")),
                Reason::Requests | Reason::Concurrency => ("requests", Some("rate_limit_exceeded")),
                Reason::Tokens => ("tokens", Some("rate_limit_exceeded")),
            },
            Self::WorkersBusy => ("rate_limit_error", Some("overloaded")),
            Self::NoWorker => ("server_error", Some("no_worker")),
            Self::NoSigners => ("server_error", Some("identity_provider_unavailable")),
            Self::WorkerLost => ("server_error", Some("worker_lost")),
            Self::Barred => ("server_error", Some("request_failed_repeatedly")),
            Self::RefusedByServer { kind, code, .. } => (kind.as_str(), code.as_deref()),
            Self::ServerDenied => ("server_error", Some("server_denied")),
            Self::TimedOut => ("server_error", Some("timeout")),
            Self::Internal => ("server_error", Some("internal_error")),
        };
        let param = match self {
            Self::Invalid { param, .. } | Self::RefusedByServer { param, .. } => param.as_deref(),
            Self::ContextLength { param, .. } => Some(*param),
            Self::UnknownModel { .. } => Some("model"),
            _ => None,
        };
        serde_json::json!({
            "error": { "message": self.message(), "type": kind, "param": param, "code": code }
        })
    }

    /// What the client is told.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Invalid { message, .. }
            | Self::ContextLength { message, .. }
            | Self::RefusedByServer { message, .. }
            | Self::MediaType { message } => message.clone(),
            Self::UnknownModel { model } => {
                format!("The model '{}' does not exist. GET /v1/models lists what is served.", quoted(model))
            }
            Self::UnknownPath { method, path } => {
                format!("Unknown request URL: {} {}.", quoted(method), quoted(path))
            }
            Self::NotStored { id } => {
                format!("Response '{}' is not found: this service keeps no responses.", quoted(id))
            }
            Self::Method { method, path, allow } => {
                format!("Method {} is not allowed on {}; use {allow}.", quoted(method), quoted(path))
            }
            Self::SlowBody => "The request body did not arrive in time.".to_owned(),
            Self::TooLarge { limit } => {
                format!("The request body is larger than the limit of {limit} bytes.")
            }
            Self::HeadTooLarge => HEAD_TOO_LARGE.to_owned(),
            Self::Unauthorized { message, .. } | Self::Forbidden { message, .. } => (*message).to_owned(),
            Self::Overloaded(refused) => overloaded(refused),
            Self::WorkersBusy => "All workers are at their limit. Try again later.".to_owned(),
            Self::NoWorker => "No worker can serve this model now. Try again later.".to_owned(),
            Self::NoSigners => {
                "Tokens cannot be checked now: the keys of the identity provider could not be fetched. Try again later."
                    .to_owned()
            }
            Self::WorkerLost => {
                "The worker that served this request was lost and it could not be moved to another one."
                    .to_owned()
            }
            Self::Barred => {
                "Two workers died while they served this very request: it is not tried again for ten minutes.".to_owned()
            }
            Self::ServerDenied => "The server behind this service does not let it in.".to_owned(),
            Self::TimedOut => "The request took longer than the service allows.".to_owned(),
            Self::Internal => "The service failed to answer this request.".to_owned(),
        }
    }

    /// The whole answer.
    pub(crate) fn response(&self, dialect: Dialect) -> Response<AnswerBody> {
        let mut response = json(self.status(), self.body(dialect));
        let headers = response.headers_mut();
        match self {
            Self::Overloaded(refused) => {
                headers.insert(RETRY_AFTER, HeaderValue::from(refused.retry_after_s()));
            }
            Self::Unauthorized { .. } => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::WorkersBusy | Self::NoWorker | Self::NoSigners => {
                headers.insert(RETRY_AFTER, HeaderValue::from(1));
            }
            Self::Method { allow, .. } => {
                headers.insert(ALLOW, HeaderValue::from_static(allow));
            }
            // The rest of the body is never read: the connection cannot be used again.
            Self::SlowBody | Self::TooLarge { .. } | Self::HeadTooLarge => {
                headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }

    /// Who is to blame.
    pub(crate) fn outcome(&self) -> Outcome {
        outcome(self.status().as_u16())
    }

    /// The label of `baton_router_rejected_total`, for requests that were turned away.
    pub(crate) fn rejected_reason(&self) -> Option<&'static str> {
        match self {
            Self::Overloaded(refused) => Some(refused.reason.label()),
            Self::WorkersBusy => Some("workers_busy"),
            Self::NoWorker => Some("no_worker"),
            _ => None,
        }
    }
}

fn overloaded(refused: &Refused) -> String {
    let what = match refused.reason {
        Reason::QueueFull => "The service is at its limit of requests.",
        Reason::Deadline => "The service is busy: this request would wait longer than it may.",
        Reason::WorkersQueued => "The service is busy: no worker would begin this request in time.",
        Reason::Bodies => "The service is busy: it has as many large requests to read as it can hold.",
        Reason::QueueTimeout => "The service is busy: this request waited for as long as it may.",
        Reason::Requests => "Rate limit reached: requests per minute.",
        Reason::Tokens => "Rate limit reached: tokens per minute.",
        Reason::Concurrency => "Rate limit reached: requests at once.",
    };
    format!("{what} Try again in {} s.", refused.retry_after_s())
}

/// Tells a client what its key has left in this minute, under the names that OpenAI's clients know.
pub(crate) fn with_left(mut response: Response<AnswerBody>, left: Left) -> Response<AnswerBody> {
    let named = [
        ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", left.requests),
        ("x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", left.tokens),
    ];
    for (limit_name, rest_name, left) in named {
        if let Some((limit, rest)) = left {
            response.headers_mut().insert(limit_name, HeaderValue::from(limit));
            response.headers_mut().insert(rest_name, HeaderValue::from(rest));
        }
    }
    response
}

/// The bytes of an answer to a head that did not arrive in time; the connection ends with it.
pub(crate) fn slow_head() -> (u16, Bytes) {
    let error = serde_json::json!({
        "error": {
            "message": "The request's head did not arrive in time.", "type": "invalid_request_error", "param": null,
            "code": "request_timeout"
        }
    });
    (408, raw_answer("408 Request Timeout", &error.to_string()))
}

fn raw_answer(status: &str, body: &str) -> Bytes {
    let length = body.len();
    let head = "content-type: application/json\r\nconnection: close\r\ncontent-length";
    Bytes::from(format!("HTTP/1.1 {status}\r\n{head}: {length}\r\n\r\n{body}"))
}

/// Who is to blame for a request that ended with this status.
pub(crate) fn outcome(status: u16) -> Outcome {
    match status {
        ..400 => Outcome::Ok,
        429 | 503 => Outcome::Refused,
        400..500 => Outcome::ClientError,
        _ => Outcome::Failed,
    }
}

/// The answer that stands in for one that hyper writes by itself, with an empty body, to what it cannot parse.
///
/// `written` is what hyper is about to write; anything else than such an answer gives `None`.
pub(crate) fn unparsed(written: &[u8]) -> Option<(u16, Bytes)> {
    let head = std::str::from_utf8(written.strip_prefix(b"HTTP/1.1 ")?).ok()?;
    if !head.ends_with("\r\n\r\n") || !head.contains("content-length: 0\r\n") {
        return None;
    }
    let (status, message, code) = match head.get(..3)? {
        "400" => (400, "The request is not valid HTTP.", "malformed_request"),
        "414" => (414, "The request URI is too long.", "uri_too_long"),
        "431" => (431, HEAD_TOO_LARGE, "header_fields_too_large"),
        _ => return None,
    };
    let error = serde_json::json!({
        "error": { "message": message, "type": "invalid_request_error", "param": null, "code": code }
    });
    let line = head.get(..head.find("\r\n")?)?;
    Some((status, raw_answer(line, &error.to_string())))
}

/// `text` cut to a length fit for a message.
pub(crate) fn quoted(text: &str) -> String {
    if text.chars().nth(QUOTE_MAX_CHARS).is_none() {
        return text.to_owned();
    }
    let cut: String = text.chars().take(QUOTE_MAX_CHARS).collect();
    format!("{cut}...")
}

/// A JSON answer.
pub(crate) fn json(status: StatusCode, body: Bytes) -> Response<AnswerBody> {
    let mut response = Response::new(AnswerBody::full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// An answer of a server of another project, as it is.
pub(crate) fn relayed(status: StatusCode, kind: HeaderValue, body: AnswerBody) -> Response<AnswerBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// The answer with its id in `x-request-id`, under which the log knows it; Anthropic's clients look for another name.
pub(crate) fn named(mut response: Response<AnswerBody>, id: &str, dialect: Dialect) -> Response<AnswerBody> {
    if let Ok(value) = HeaderValue::from_str(id) {
        if dialect == Dialect::Anthropic {
            response.headers_mut().insert("request-id", value.clone());
        }
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

/// The answer with how its workers were chosen in `x-baton-explain`.
pub(crate) fn explained(mut response: Response<AnswerBody>, how: &str) -> Response<AnswerBody> {
    if let Ok(value) = HeaderValue::from_str(how) {
        response.headers_mut().insert("x-baton-explain", value);
    }
    response
}

/// A plain-text answer, for probes and metrics.
pub(crate) fn text(ready: bool, content_type: &'static str, body: String) -> Response<AnswerBody> {
    let mut response = Response::new(AnswerBody::full(Bytes::from(body)));
    *response.status_mut() = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A server-sent event stream.
pub(crate) fn event_stream(body: AnswerBody) -> Response<AnswerBody> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Reverse proxies of the nginx family buffer answers unless told not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

#[cfg(test)]
mod tests;
