//! Calls to a running fleet.

use std::time::Duration;

use baton_conductor::api::ErrorBody;
use baton_config::environment::Environment;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde::de::DeserializeOwned;
use tokio::runtime::Builder;

use crate::args::ConductorUrl;
use crate::failure::Failure;

/// A part of a fleet on this network answers well within this.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest answer read.
const ANSWER_MAX_BYTES: usize = 64 << 20;

/// Where `baton conductor` listens unless told otherwise.
const DEFAULT_CONDUCTOR: &str = "http://127.0.0.1:7400";

/// The conductor of a flag, else of the environment, else the default one.
pub(crate) fn conductor_url(flag: &ConductorUrl, environment: &Environment) -> Result<String, Failure> {
    let url = flag.conductor.clone().or_else(|| environment.conductor.clone());
    conductor_endpoint(url.as_deref().unwrap_or(DEFAULT_CONDUCTOR))
}

/// Checks that a text is the URL of a conductor; `HOST:PORT` is taken as one.
pub(crate) fn conductor_endpoint(text: &str) -> Result<String, Failure> {
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let good = reqwest::Url::parse(&full)
        .is_ok_and(|url| url.scheme() == "http" && url.has_host() && url.username().is_empty());
    if good {
        Ok(full.trim_end_matches('/').to_owned())
    } else {
        Err(Failure::Usage(format!("conductor {text:?} is not a URL: write http://HOST:PORT")))
    }
}

/// Runs one short piece of work that talks to a fleet.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::because("cannot start", &error))?;
    runtime.block_on(work)
}

/// A client that talks to nobody but the fleet.
pub(crate) fn client() -> Result<Client, Failure> {
    baton_conductor::http::builder()
        .connect_timeout(Duration::from_secs(1))
        .timeout(CALL_TIMEOUT)
        .build()
        .map_err(|error| Failure::because("cannot make an HTTP client", &error))
}

/// A conductor that is asked things.
pub(crate) struct Conductor {
    http: Client,
    pub(crate) url: String,
}

impl Conductor {
    pub(crate) fn new(url: String) -> Result<Self, Failure> {
        Ok(Self { http: client()?, url })
    }

    pub(crate) fn http(&self) -> &Client {
        &self.http
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    /// Sends a request and reads a JSON answer; refusals are told in the conductor's words.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, Failure> {
        let answer = request.send().await.map_err(|error| self.silent(&error))?;
        let status = answer.status();
        let body = read(answer).await.map_err(|error| self.silent(&error))?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|_| self.stranger(status));
        }
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(refusal) => Err(Failure::failed(refusal.error.message)),
            Err(_) => Err(self.stranger(status)),
        }
    }

    fn silent(&self, error: &reqwest::Error) -> Failure {
        Failure::failed(format!(
            "no conductor answers at {} ({}); `baton up` prints its URL: give it with --conductor or BATON_CONDUCTOR",
            self.url,
            last_cause(error)
        ))
    }

    fn stranger(&self, status: StatusCode) -> Failure {
        Failure::failed(format!("{} is not a conductor: it answered {status} with something else", self.url))
    }
}

/// The whole body, if it is not too long.
async fn read(mut answer: reqwest::Response) -> Result<Vec<u8>, reqwest::Error> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        if body.len() + chunk.len() > ANSWER_MAX_BYTES {
            break;
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The innermost reason, which is the one that helps.
pub(crate) fn last_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
