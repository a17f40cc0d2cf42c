//! The calls to a server: is it well, how busy is it, does it still give a token.

use std::error::Error as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use baton_conductor::http::{TlsFault, builder_for_servers, server_tls};
use baton_config::secret::{SecretFault, Token, read_api_key};
use http::StatusCode;
use reqwest::{RequestBuilder, Response};

use super::gauges::Busy;
use super::health::{Canary, Failure};
use super::{SidecarError, SidecarOptions};
use crate::peer::is_refused;

/// For a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// For an answer of a server that may be busy.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// For the one token of a canary: a long prompt may be before it.
const CANARY_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest answer read.
const ANSWER_MAX_BYTES: usize = 4 << 20;
/// Looks after which a server that told no gauges is asked for them again.
const GAUGES_AGAIN: u32 = 30;
/// Looks in a row at which a server that told gauges may fail to.
const MISSES_MAX: u32 = 30;
/// Where a server that has no path for it shows that it is well.
const MODELS_PATH: &str = "/v1/models";

/// Calls one server.
#[derive(Debug)]
pub(super) struct Prober {
    http: reqwest::Client,
    server: String,
    model: String,
    path: String,
    /// The path was not chosen by anybody: another one may suit the server better.
    path_is_guess: bool,
    key_file: Option<PathBuf>,
    key: Mutex<Option<Token>>,
    /// Looks until gauges are asked for.
    gauges_in: u32,
    /// Looks at which it need not tell gauges before it counts as one that does not: none for who never told.
    misses_left: u32,
}

impl Prober {
    /// Reads the server's key.
    pub(super) fn new(options: &SidecarOptions) -> Result<Self, SidecarError> {
        let key = options.api_key_file.as_deref().map(read_api_key).transpose()?;
        let tls = server_tls([options.server.as_str()], options.ca_file.as_deref(), "engine.ca_file")?;
        let http = builder_for_servers(tls)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_max_idle_per_host(1)
            .build()
            .map_err(SidecarError::system("HTTP client"))?;
        Ok(Self {
            http,
            server: options.server.clone(),
            model: options.server_model.clone(),
            path: options.health_path.clone().unwrap_or_else(|| "/health".to_owned()),
            path_is_guess: options.health_path.is_none(),
            key_file: options.api_key_file.clone(),
            key: Mutex::new(key),
            gauges_in: 0,
            misses_left: 0,
        })
    }

    /// Whether the server answers, and how busy it is if it tells.
    pub(super) async fn look(&mut self) -> Result<Busy, Failure> {
        let look = self.ask().await;
        if let Err(Failure::Refused(_)) = &look {
            // Whoever comes back may be another server.
            (self.gauges_in, self.misses_left) = (0, 0);
        }
        look
    }

    async fn ask(&mut self) -> Result<Busy, Failure> {
        let mut answer = self.get(&self.path).await?;
        let has_no_such_path =
            matches!(answer.status(), StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED);
        if self.path_is_guess && has_no_such_path {
            self.path = MODELS_PATH.to_owned();
            self.path_is_guess = false;
            answer = self.get(&self.path).await?;
        }
        let status = answer.status();
        if !status.is_success() {
            self.note_refusal(status).await;
            return Err(Failure::Bad(format!("GET {} is answered with {status}", self.path)));
        }
        // To its end, so that the connection can be used again.
        let _ = text(answer).await;
        Ok(self.gauges().await)
    }

    async fn gauges(&mut self) -> Busy {
        if self.gauges_in > 0 {
            self.gauges_in -= 1;
            return Busy::Untold;
        }
        let told = match self.get("/metrics").await {
            Ok(answer) if answer.status().is_success() => text(answer).await,
            Ok(_) | Err(_) => None,
        };
        let busy = Busy::of(told.as_deref(), self.misses_left > 0);
        match busy {
            Busy::Told(_) => self.misses_left = MISSES_MAX,
            Busy::Untold => self.gauges_in = GAUGES_AGAIN,
            Busy::Missed => self.misses_left -= 1,
        }
        busy
    }

    /// Asks for one token.
    pub(super) async fn canary(&self) -> Canary {
        let body = serde_json::json!({ "model": self.model, "prompt": "a", "max_tokens": 1 });
        let url = format!("{}/v1/completions", self.server);
        let request = self.with_key(self.http.post(url).json(&body)).timeout(CANARY_TIMEOUT);
        match request.send().await {
            Ok(answer) if answer.status().is_success() => match text(answer).await {
                Some(_) => Canary::Sang,
                None => Canary::Dead("its answer broke off".to_owned()),
            },
            Ok(answer) if answer.status().is_client_error() => {
                self.note_refusal(answer.status()).await;
                Canary::Mute
            }
            Ok(answer) => Canary::Dead(format!("answered with {}", answer.status())),
            Err(error) => Canary::Dead(why(&error)),
        }
    }

    async fn get(&self, path: &str) -> Result<Response, Failure> {
        let request = self.with_key(self.http.get(format!("{}{path}", self.server)));
        request.timeout(LOOK_TIMEOUT).send().await.map_err(|error| {
            let text = match TlsFault::of(&error) {
                // The words of the fault are for callers of conductors.
                Some(TlsFault::UnknownAuthority) => format!(
                    "{} shows a certificate of an authority that is not trusted here: check engine.ca_file",
                    self.server
                ),
                Some(fault) => format!("{} {fault}", self.server),
                None => format!("{}: {}", self.server, why(&error)),
            };
            // What else may keep a connection from coming about says nothing of who listens: names that are not resolved,
            // certificates, a busy host, want of file descriptors here.
            if is_refused(&error) { Failure::Refused(text) } else { Failure::Bad(text) }
        })
    }

    fn with_key(&self, request: RequestBuilder) -> RequestBuilder {
        match &*self.key.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(key) => request.bearer_auth(key.reveal()),
            None => request,
        }
    }

    /// The key may have been changed.
    async fn note_refusal(&self, status: StatusCode) {
        if !matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return;
        }
        let Some(path) = self.key_file.clone() else { return };
        let read = tokio::task::spawn_blocking(move || read_api_key(&path)).await;
        let read: Result<Token, SecretFault> = match read {
            Ok(read) => read,
            // The runtime ends.
            Err(_) => return,
        };
        match read {
            Ok(key) => *self.key.lock().unwrap_or_else(PoisonError::into_inner) = Some(key),
            Err(error) => tracing::warn!(%error, "the key of the server cannot be read again"),
        }
    }
}

/// The body of an answer, if it came in full and is of a bearable size.
async fn text(mut answer: Response) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        match answer.chunk().await {
            Ok(Some(chunk)) if bytes.len() + chunk.len() <= ANSWER_MAX_BYTES => {
                bytes.extend_from_slice(&chunk)
            }
            Ok(None) => return Some(String::from_utf8_lossy(&bytes).into_owned()),
            Ok(Some(_)) | Err(_) => return None,
        }
    }
}

/// The innermost cause, without the URL, which is told beside it.
fn why(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    let mut cause = error.source();
    let mut text = None;
    while let Some(error) = cause {
        text = Some(error.to_string());
        cause = error.source();
    }
    text.unwrap_or_else(|| "the call failed".to_owned())
}
