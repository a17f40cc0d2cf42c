//! The table of paths.

use http::Method;

use crate::reply::Refusal;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// `POST /v1/chat/completions`.
    Chat,
    /// `POST /v1/completions`.
    Completions,
    /// `GET /v1/models`.
    Models,
    /// `GET /v1/models/{id}`.
    Model,
    /// `GET /health`: readiness under the name that OpenAI-compatible servers use.
    Health,
    /// `GET /livez`.
    Live,
    /// `GET /readyz`.
    Ready,
    /// `GET /metrics`.
    Metrics,
    /// Anything else.
    Other,
}

/// The path of the chat API.
pub(crate) const CHAT_PATH: &str = "/v1/chat/completions";
/// The path of the completions API.
pub(crate) const COMPLETIONS_PATH: &str = "/v1/completions";

impl Route {
    /// Every route.
    pub(crate) const ALL: [Self; 9] = [
        Self::Chat,
        Self::Completions,
        Self::Models,
        Self::Model,
        Self::Health,
        Self::Live,
        Self::Ready,
        Self::Metrics,
        Self::Other,
    ];

    /// The value of the `route` label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Chat => CHAT_PATH,
            Self::Completions => COMPLETIONS_PATH,
            Self::Models => "/v1/models",
            Self::Model => "/v1/models/{id}",
            Self::Health => "/health",
            Self::Live => "/livez",
            Self::Ready => "/readyz",
            Self::Metrics => "/metrics",
            Self::Other => "other",
        }
    }

    /// Whether it takes a key; probes and metrics are for those who run the router.
    pub(crate) fn needs_key(self) -> bool {
        matches!(self, Self::Chat | Self::Completions | Self::Models | Self::Model)
    }

    /// The route of a path, whatever the method.
    pub(crate) fn of_path(path: &str) -> Self {
        match path {
            CHAT_PATH => Self::Chat,
            COMPLETIONS_PATH => Self::Completions,
            "/v1/models" => Self::Models,
            "/health" => Self::Health,
            "/livez" => Self::Live,
            "/readyz" => Self::Ready,
            "/metrics" => Self::Metrics,
            _ if path.strip_prefix("/v1/models/").is_some_and(|id| !id.is_empty()) => Self::Model,
            _ => Self::Other,
        }
    }

    /// Refuses what is not in the table.
    pub(crate) fn check(self, method: &Method, path: &str) -> Result<(), Refusal> {
        let (fits, allow) = match self {
            Self::Chat | Self::Completions => (method == Method::POST, "POST"),
            Self::Other => {
                let (method, path) = (method.to_string(), path.to_owned());
                return Err(Refusal::UnknownPath { method, path });
            }
            _ => (method == Method::GET || method == Method::HEAD, "GET, HEAD"),
        };
        if fits {
            return Ok(());
        }
        Err(Refusal::Method { method: method.to_string(), path: path.to_owned(), allow })
    }
}
