//! Fetches the keys of an identity provider: at start, then at an interval, and when a token names a key that is not known.
//!
//! The start waits for none of it: an identity provider that is down keeps nobody with a key of Baton's out, and whoever
//! comes with a token meanwhile is told to come again. What was fetched is kept until something as good takes its place.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use baton_conductor::http::{builder_for_servers, server_tls};
use baton_config::fleet::{JwtSpec, RemoteJwks};
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::header::ACCEPT;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::AuthError;
use super::jwt::{JwksError, Provider};

/// Where an issuer says where its keys are (OpenID Connect Discovery 1.0, section 4).
const DISCOVERY_PATH: &str = "/.well-known/openid-configuration";
/// For one connection to be there.
const CONNECT_WITHIN: Duration = Duration::from_secs(3);
/// Largest document of a provider; real ones have a few kilobytes.
const DOCUMENT_MAX_BYTES: usize = 512 << 10;
/// Longest a request waits for keys that are being fetched.
const WAIT_MAX: Duration = Duration::from_secs(3);
/// Tokens cause a fetch at most so often, whoever sends them.
const ASKED_EVERY: Duration = Duration::from_secs(10);
/// After the first failure in a row, doubled with each further one.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest time between two attempts while they fail.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Why keys could not be fetched.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    /// Nobody answers, or not to the end.
    #[error("{url} cannot be read")]
    Call {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    /// It answers with something else than a document.
    #[error("{url} answers {status}{}", if status.is_redirection() { ", and redirects are not followed" } else { "" })]
    Status { url: String, status: StatusCode },
    /// It does not end.
    #[error("{url} has more than {DOCUMENT_MAX_BYTES} bytes")]
    Large { url: String },
    /// All of it takes too long.
    #[error("the provider took longer than {} ms", within.as_millis())]
    Slow { within: Duration },
    /// What should tell where the keys are tells something else.
    #[error("{url} is no configuration of an identity provider")]
    Configuration {
        url: String,
        #[source]
        source: serde_json::Error,
    },
    /// It speaks for somebody else.
    #[error("{url} is of the issuer {found:?}")]
    Issuer { url: String, found: String },
    /// Keys from there could be anybody's.
    #[error("{url} says that its keys are at {found:?}, which is not https")]
    Untrustworthy { url: String, found: String },
    /// There are no keys in it.
    #[error(transparent)]
    Keys(#[from] JwksError),
}

/// What an issuer says of itself; the rest is of no interest here.
#[derive(Debug, Deserialize)]
struct Configuration {
    issuer: String,
    jwks_uri: String,
}

/// Whether keys are being fetched, and how often that was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Round {
    /// Somebody waits for it, or it is under way.
    open: bool,
    finished: u64,
}

/// The keys of a provider, as they are fetched.
pub(super) struct Remote {
    spec: JwtSpec,
    source: RemoteJwks,
    http: reqwest::Client,
    round: watch::Sender<Round>,
    /// When a token last caused a fetch.
    asked: Mutex<Option<Instant>>,
    /// When the known keys came.
    fetched: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Remote {
    /// Reads whom to believe; fetches nothing yet.
    pub(super) fn new(spec: &JwtSpec, source: &RemoteJwks) -> Result<Self, AuthError> {
        let url = source.url.as_ref().unwrap_or(&spec.issuer);
        let ca_file = source.ca_file.as_deref();
        let tls = server_tls([url.as_str()], ca_file, "router.auth.jwt.ca_file")
            .map_err(|source| AuthError::Trust(Box::new(source)))?;
        let http = builder_for_servers(tls)
            .connect_timeout(CONNECT_WITHIN)
            // Minutes pass between two fetches.
            .pool_max_idle_per_host(0)
            .build()
            .map_err(AuthError::Client)?;
        Ok(Self {
            spec: spec.clone(),
            source: source.clone(),
            http,
            // The first one is about to begin.
            round: watch::Sender::new(Round { open: true, finished: 0 }),
            asked: Mutex::new(None),
            fetched: Mutex::new(None),
        })
    }

    /// Fetches for as long as it is polled, and hands on what comes of it.
    pub(super) async fn follow(&self, mut done: impl FnMut(Result<Provider, FetchError>)) {
        let mut failures = 0;
        loop {
            let within = self.source.timeout;
            let fetched = tokio::time::timeout(within, self.fetch()).await;
            let fetched = fetched.unwrap_or(Err(FetchError::Slow { within }));
            match fetched {
                Ok(_) => {
                    failures = 0;
                    *self.fetched.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                }
                Err(_) => failures += 1,
            }
            done(fetched);
            self.round.send_modify(|round| *round = Round { open: false, finished: round.finished + 1 });
            let mut asked = self.round.subscribe();
            let pause = pause(failures, self.source.refresh);
            // The sender is ours: it outlives this.
            let _ = tokio::time::timeout(pause, asked.wait_for(|round| round.open)).await;
            self.round.send_modify(|round| round.open = true);
        }
    }

    /// How long ago the known keys came.
    pub(super) fn age(&self) -> Option<Duration> {
        let fetched = *self.fetched.lock().unwrap_or_else(PoisonError::into_inner);
        fetched.map(|fetched| fetched.elapsed())
    }

    /// Waits for keys that are newer than the known ones; `false` where there will be none soon.
    pub(super) async fn newer(&self) -> bool {
        let mut rounds = self.round.subscribe();
        let mut finished = 0;
        let worth_waiting = |round: &mut Round| {
            finished = round.finished;
            let wakes = !round.open && self.may_ask(Instant::now());
            round.open |= wakes;
            wakes
        };
        self.round.send_if_modified(worth_waiting);
        if !rounds.borrow_and_update().open {
            return false;
        }
        let newer = rounds.wait_for(|round| round.finished > finished);
        tokio::time::timeout(WAIT_MAX, newer).await.is_ok_and(|round| round.is_ok())
    }

    fn may_ask(&self, now: Instant) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let may = asked.is_none_or(|asked| now.saturating_duration_since(asked) >= ASKED_EVERY);
        if may {
            *asked = Some(now);
        }
        may
    }

    async fn fetch(&self) -> Result<Provider, FetchError> {
        let url = match &self.source.url {
            Some(url) => url.clone(),
            // Asked each time: keys may move.
            None => self.discover().await?,
        };
        let set = self.get(&url).await?;
        Ok(Provider::parse(&set, &url, &self.spec)?)
    }

    async fn discover(&self) -> Result<String, FetchError> {
        let issuer = &self.spec.issuer;
        let url = format!("{}{DISCOVERY_PATH}", issuer.strip_suffix('/').unwrap_or(issuer));
        let said = self.get(&url).await?;
        let said: Configuration = serde_json::from_slice(&said)
            .map_err(|source| FetchError::Configuration { url: url.clone(), source })?;
        if said.issuer != *issuer {
            return Err(FetchError::Issuer { url, found: cut(&said.issuer) });
        }
        if !RemoteJwks::is_trustworthy(&said.jwks_uri) {
            return Err(FetchError::Untrustworthy { url, found: cut(&said.jwks_uri) });
        }
        Ok(said.jwks_uri)
    }

    async fn get(&self, url: &str) -> Result<Bytes, FetchError> {
        let failed = |source| FetchError::Call { url: url.to_owned(), source };
        let mut answer =
            self.http.get(url).header(ACCEPT, "application/json").send().await.map_err(failed)?;
        if answer.status() != StatusCode::OK {
            return Err(FetchError::Status { url: url.to_owned(), status: answer.status() });
        }
        let mut document = BytesMut::new();
        while let Some(part) = answer.chunk().await.map_err(failed)? {
            if document.len() + part.len() > DOCUMENT_MAX_BYTES {
                return Err(FetchError::Large { url: url.to_owned() });
            }
            document.extend_from_slice(&part);
        }
        Ok(document.freeze())
    }
}

/// Until the next fetch, after so many failures in a row.
fn pause(failures: u32, refresh: Duration) -> Duration {
    match failures {
        0 => refresh,
        n => RETRY_FIRST.saturating_mul(1 << (n - 1).min(10)).min(RETRY_MAX).min(refresh),
    }
}

/// As much of a foreign text as a log should have.
fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests;
