//! Calls to a running fleet.

use std::path::Path;
use std::time::Duration;

use baton_conductor::api::ErrorBody;
use baton_conductor::http::{Caller, TlsFault};
use baton_config::environment::Environment;
use baton_config::fleet::{ConductorAccess, Identity};
use reqwest::{Client, ClientBuilder, Method, RequestBuilder, StatusCode};
use serde::de::DeserializeOwned;
use tokio::runtime::Builder;

use crate::args::ConductorUrl;
use crate::check;
use crate::failure::Failure;

/// A part of a fleet on this network answers well within this.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// And takes a connection within this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest answer read.
const ANSWER_MAX_BYTES: usize = 64 << 20;

/// Where `baton conductor` listens unless told otherwise.
const DEFAULT_CONDUCTOR: &str = "http://127.0.0.1:7400";

/// The URLs of conductors, separated by commas.
pub(crate) fn conductor_endpoints(text: &str) -> Result<Vec<String>, Failure> {
    text.split(',').map(|url| conductor_endpoint(url.trim())).collect()
}

/// Checks that a text is the URL of a conductor; `HOST:PORT` is taken as one.
pub(crate) fn conductor_endpoint(text: &str) -> Result<String, Failure> {
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let good = reqwest::Url::parse(&full).is_ok_and(|url| {
        matches!(url.scheme(), "http" | "https") && url.has_host() && url.username().is_empty()
    });
    if good {
        Ok(full.trim_end_matches('/').to_owned())
    } else {
        Err(Failure::Usage(format!(
            "conductor {text:?} is not a URL: write http://HOST:PORT or https://HOST:PORT"
        )))
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

/// A client for routers and workers. Conductors are called otherwise: only they are shown a token.
pub(crate) fn client() -> Result<Client, Failure> {
    finish(baton_conductor::http::builder())
}

/// The same for a server of this machine that shows the certificate of a file, if it shows one.
pub(crate) fn client_believing(cert_file: Option<&Path>) -> Result<Client, Failure> {
    let Some(cert_file) = cert_file else { return client() };
    let builder = baton_conductor::http::builder_believing(cert_file)
        .map_err(|error| Failure::because("cannot use router.tls", &error))?;
    finish(builder)
}

fn finish(builder: ClientBuilder) -> Result<Client, Failure> {
    builder
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .build()
        .map_err(|error| Failure::because("cannot make an HTTP client", &error))
}

/// How conductors with these URLs are called.
pub(crate) fn caller<'a>(
    access: ConductorAccess,
    urls: impl IntoIterator<Item = &'a str>,
) -> Result<Caller, Failure> {
    Caller::new(access, urls, CONNECT_TIMEOUT)
        .map_err(|error| Failure::because("cannot call conductors", &error))
}

/// Conductors that may be asked, of which one suffices.
pub(crate) struct Conductors {
    http: Client,
    caller: Caller,
    /// At least one.
    urls: Vec<String>,
}

impl Conductors {
    /// The conductors of a flag, else of the environment, else of the fleet file, else the default one.
    pub(crate) fn named(flags: &ConductorUrl, environment: &Environment) -> Result<Self, Failure> {
        let fleet = match check::fleet_path(flags.config.as_deref(), environment) {
            Some(path) => Some(check::load(Some(&path), environment)?),
            None => None,
        };
        let given = flags.conductor.as_deref().or(environment.conductor.as_deref());
        let urls = match (given, &fleet) {
            (Some(urls), _) => conductor_endpoints(urls)?,
            (None, Some(fleet)) => fleet.conductor.endpoints.clone(),
            (None, None) => vec![DEFAULT_CONDUCTOR.to_owned()],
        };
        let mut access = fleet.map(|fleet| fleet.conductor.access).unwrap_or_default();
        access.token_file = flags.token_file.clone().or(access.token_file);
        access.ca_file = flags.ca_file.clone().or(access.ca_file);
        if let (Some(cert), Some(key)) = (&flags.client_cert_file, &flags.client_key_file) {
            access.identity = Some(Identity { cert_file: cert.clone(), key_file: key.clone() });
        }
        let caller = caller(access, urls.iter().map(String::as_str))?;
        Ok(Self { http: client()?, caller, urls })
    }

    /// The first that answers; the first of all if none does, so that the failure names one.
    pub(crate) async fn first(&self) -> Conductor {
        let mut first = 0;
        for (i, url) in self.urls.iter().enumerate().filter(|_| self.urls.len() > 1) {
            if answers(&self.caller, url).await {
                first = i;
                break;
            }
        }
        Conductor { http: self.http.clone(), caller: self.caller.clone(), url: self.urls[first].clone() }
    }
}

/// Whether a conductor answers, in whatever way.
async fn answers(caller: &Caller, url: &str) -> bool {
    let probe = caller.request(Method::GET, &format!("{url}/livez")).timeout(CONNECT_TIMEOUT);
    probe.send().await.is_ok()
}

/// A conductor that is asked things.
pub(crate) struct Conductor {
    http: Client,
    caller: Caller,
    pub(crate) url: String,
}

impl Conductor {
    /// The first of the conductors named that answers: see [`Conductors`].
    pub(crate) fn find(flags: &ConductorUrl, environment: &Environment) -> Result<Self, Failure> {
        let conductors = Conductors::named(flags, environment)?;
        block_on(async { Ok(conductors.first().await) })
    }

    /// For calls to others than conductors.
    pub(crate) fn http(&self) -> &Client {
        &self.http
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.caller.request(method, &format!("{}{path}", self.url)).timeout(CALL_TIMEOUT)
    }

    /// Whether another conductor answers, in whatever way.
    pub(crate) async fn answers(&self, url: &str) -> bool {
        url == self.url || answers(&self.caller, url).await
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
        if let Some(fault) = TlsFault::of(error) {
            return Failure::failed(format!("conductor {} {fault}", self.url));
        }
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
