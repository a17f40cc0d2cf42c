//! Errors in the shape of OpenAI's.

use axum::response::{IntoResponse, Response};
use baton_engine::engine::SubmitError;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde_json::json;

use super::super::lines;
use crate::engine_thread::TakeError;
use crate::in_flight::NoPlace;

/// Why a request gets no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    status: StatusCode,
    message: String,
    code: Option<&'static str>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), code: None }
    }

    pub(super) fn invalid(message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn no_model(model: &str) -> Self {
        let message = format!("The model {model:?} does not exist.");
        Self { code: Some("model_not_found"), ..Self::new(StatusCode::NOT_FOUND, message) }
    }

    #[cfg(test)]
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// The body.
    pub(super) fn json(&self) -> serde_json::Value {
        let kind = match self.status.is_client_error() {
            true => "invalid_request_error",
            false => "server_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": null, "code": self.code } })
    }
}

impl From<TakeError> for Refusal {
    fn from(error: TakeError) -> Self {
        let status = match &error {
            TakeError::Submit(SubmitError::QueueFull { .. }) => StatusCode::TOO_MANY_REQUESTS,
            TakeError::Submit(SubmitError::Duplicate(_)) => StatusCode::INTERNAL_SERVER_ERROR,
            TakeError::Submit(_) => StatusCode::BAD_REQUEST,
            TakeError::Gone(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<NoPlace> for Refusal {
    fn from(why: NoPlace) -> Self {
        let status = match why {
            NoPlace::Closed => StatusCode::SERVICE_UNAVAILABLE,
            NoPlace::Full => StatusCode::TOO_MANY_REQUESTS,
        };
        Self::new(status, why.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, [(CONTENT_TYPE, "application/json")], lines::line(&self.json())).into_response()
    }
}
