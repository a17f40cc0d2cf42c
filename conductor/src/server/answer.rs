//! The only place that knows which status an error has, and what its body looks like.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};

use crate::api::{ErrorBody, ErrorDetail, Holder};
use crate::registry::RegistryError;
use crate::store::StoreError;

/// An error answer: a 4xx, or a 503 when the store is at fault.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
    holder: Option<Holder>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), holder: None }
    }

    pub(super) fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub(super) fn code(&self) -> &'static str {
        self.code
    }
}

impl From<RegistryError> for Refusal {
    fn from(error: RegistryError) -> Self {
        let (status, code) = match &error {
            RegistryError::Fault(_) => (StatusCode::BAD_REQUEST, "invalid_field"),
            RegistryError::NotAllowed(_) => (StatusCode::FORBIDDEN, "address_not_allowed"),
            RegistryError::ReplicasOutOfRange { .. } => (StatusCode::BAD_REQUEST, "replicas_out_of_range"),
            RegistryError::NameTaken(_) => (StatusCode::CONFLICT, "name_taken"),
            RegistryError::StaleEpoch { .. } => (StatusCode::CONFLICT, "stale_epoch"),
            RegistryError::Replayed { .. } => (StatusCode::CONFLICT, "replayed"),
            RegistryError::DrainingIsFinal { .. } => (StatusCode::CONFLICT, "draining_is_final"),
            RegistryError::LeaseGone { .. } => (StatusCode::GONE, "lease_gone"),
            RegistryError::NoWorker { .. } => (StatusCode::NOT_FOUND, "no_worker"),
            RegistryError::NoPool { .. } => (StatusCode::NOT_FOUND, "no_pool"),
            RegistryError::Contended { .. } => (StatusCode::SERVICE_UNAVAILABLE, "contended"),
            // The store and the mirror say once that it is away; each of a thousand keepalives need not.
            RegistryError::Store(StoreError::Unavailable(_)) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "a request was not done");
                (StatusCode::SERVICE_UNAVAILABLE, "store_unavailable")
            }
            RegistryError::Store(_) | RegistryError::Stored { .. } => {
                tracing::error!(error = &error as &dyn std::error::Error, "a request was not done");
                (StatusCode::SERVICE_UNAVAILABLE, "store_unavailable")
            }
        };
        let message = match &error {
            RegistryError::Store(cause) => format!("{error}: {cause}"),
            _ => error.to_string(),
        };
        let holder = match error {
            RegistryError::NameTaken(holder) => Some(*holder),
            _ => None,
        };
        Self { status, code, message, holder }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let kind = match self.status {
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::CONFLICT | StatusCode::GONE => "conflict_error",
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "authentication_error",
            status if status.is_server_error() => "unavailable_error",
            _ => "invalid_request_error",
        };
        let Self { status, code, message, holder } = self;
        let error = ErrorDetail { message, kind: kind.to_owned(), code: code.to_owned(), holder };
        let mut response = (status, Json(ErrorBody { error })).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
