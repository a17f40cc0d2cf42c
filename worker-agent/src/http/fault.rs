//! Error answers.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use baton_config::protocol::{FailureCode, GenerateEvent, WorkerError};
use baton_config::{Epoch, HandoffId};
use baton_engine::engine::SubmitError;
use http::StatusCode;
use serde::de::DeserializeOwned;

use crate::driver::OpenFailure;
use crate::engine_thread::TakeError;
use crate::handoff::{Answer, OpenError};
use crate::in_flight::NoPlace;
use crate::validate::Invalid;

/// An error answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fault {
    status: StatusCode,
    code: FailureCode,
    message: String,
}

impl Fault {
    fn new(status: StatusCode, code: FailureCode, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, FailureCode::Refused, message)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, FailureCode::Unavailable, message)
    }

    pub(crate) fn overloaded(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, FailureCode::Overloaded, message)
    }

    /// Another life of this worker is meant.
    pub(crate) fn stale(current: Option<Epoch>) -> Self {
        let current = current.map_or_else(|| "none".to_owned(), |epoch| epoch.to_string());
        let message = format!("the message is of another life of a worker, this one is in epoch {current}");
        Self::new(StatusCode::CONFLICT, FailureCode::Unavailable, message)
    }

    /// Whether another life of this worker was meant.
    pub(crate) fn is_stale(&self) -> bool {
        self.status == StatusCode::CONFLICT
    }
}

impl From<Fault> for GenerateEvent {
    /// The same where there is no answer of its own to say it with.
    fn from(Fault { code, message, .. }: Fault) -> Self {
        Self::Failed { code, message }
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let Self { status, code, message } = self;
        (status, Json(WorkerError { code, message })).into_response()
    }
}

impl From<Invalid> for Fault {
    fn from(invalid: Invalid) -> Self {
        Self::refused(invalid.to_string())
    }
}

impl From<TakeError> for Fault {
    fn from(error: TakeError) -> Self {
        let message = error.to_string();
        match error {
            TakeError::Submit(SubmitError::QueueFull { .. }) => Self::overloaded(message),
            TakeError::Submit(SubmitError::Duplicate(_)) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, FailureCode::Engine, message)
            }
            TakeError::Submit(SubmitError::TooLong { .. }) => {
                Self::new(StatusCode::BAD_REQUEST, FailureCode::TooLong, message)
            }
            TakeError::Submit(_) => Self::refused(message),
            TakeError::Gone(_) => Self::unavailable(message),
        }
    }
}

impl From<NoPlace> for Fault {
    fn from(why: NoPlace) -> Self {
        match why {
            NoPlace::Closed => Self::unavailable(why.to_string()),
            NoPlace::Full => Self::overloaded(why.to_string()),
        }
    }
}

impl From<OpenFailure> for Fault {
    fn from(failure: OpenFailure) -> Self {
        let message = failure.to_string();
        match failure {
            OpenFailure::Refused(OpenError::Stale { .. }) => {
                Self::new(StatusCode::CONFLICT, FailureCode::Unavailable, message)
            }
            OpenFailure::Refused(OpenError::Ended) => {
                Self::new(StatusCode::GONE, FailureCode::Unavailable, message)
            }
            OpenFailure::Refused(OpenError::Duplicate | OpenError::Itself) => Self::refused(message),
            OpenFailure::Closed => Self::unavailable(message),
        }
    }
}

/// The fault that stands for an answer which is none of the good ones.
pub(crate) fn of_answer(answer: Answer) -> Fault {
    match answer {
        Answer::Stale { current } => Fault::stale(current),
        Answer::Unknown => {
            Fault::new(StatusCode::NOT_FOUND, FailureCode::Unavailable, "no such handoff is known here")
        }
        Answer::Ended => Fault::new(StatusCode::GONE, FailureCode::Unavailable, "the handoff has ended here"),
        Answer::Busy => Fault::overloaded("no room for this message now"),
        Answer::Malformed(what) => Fault::refused(what),
        Answer::Ack(_) | Answer::Noted => Fault::unavailable("an answer to another question"),
    }
}

/// The body of a request, within its limit, parsed.
pub(crate) fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, Fault> {
    let body = body
        .map_err(|rejection| Fault::new(rejection.status(), FailureCode::Refused, rejection.body_text()))?;
    serde_json::from_slice(&body)
        .map_err(|error| Fault::refused(format!("the body is not understood: {error}")))
}

/// The id in the path.
pub(crate) fn handoff_id(text: &str) -> Result<HandoffId, Fault> {
    text.parse().map_err(|error: baton_config::names::HandoffIdError| Fault::refused(error.to_string()))
}

pub(crate) async fn no_route() -> Fault {
    Fault::new(StatusCode::NOT_FOUND, FailureCode::Refused, "a worker agent has no such path")
}

pub(crate) async fn no_method() -> Fault {
    Fault::new(StatusCode::METHOD_NOT_ALLOWED, FailureCode::Refused, "not with this method")
}
