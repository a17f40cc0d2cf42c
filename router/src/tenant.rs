//! Who asks: API keys and tokens of an identity provider become a [`Principal`], or a refusal.
//!
//! Keys are found by their id and compared by a keyed hash in constant time; neither a key nor a token is ever kept,
//! logged or repeated. What clients may choose themselves never separates or joins tenants: the salt of a tenant's cached
//! prefixes follows from its name alone, so that several routers agree on it.

mod directory;
mod jwt;
mod reload;
mod remote;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use baton_conductor::TlsError;
use baton_config::fault::Faults;
use baton_config::fleet::{AuthSpec, Isolation, JwksSource, JwtSpec};
use baton_config::keys::{KeysFile, Quota};
use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderName};
use sha2::{Digest as _, Sha256};

use crate::clock::unix_seconds;
use crate::metrics::Metrics;
use crate::reply::Refusal;
use directory::Directory;
pub use directory::{MintError, MintedKey, mint};
pub use jwt::JwksError;
use jwt::Provider;
use remote::Remote;

/// Tenants with a label of their own in metrics; further ones share `other`.
const LABELS_MAX: usize = 100;
/// The header of Anthropic's clients.
static X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// Longest key or token that is looked at.
const CREDENTIAL_MAX_BYTES: usize = 16 << 10;

/// Somebody who shares the fleet with others.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tenant {
    pub(crate) name: Arc<str>,
    /// Its name in metrics.
    pub(crate) label: Arc<str>,
    pub(crate) weight: u32,
    pub(crate) priority: u32,
    /// Whether it may ask for what is meant for operators.
    pub(crate) admin: bool,
    pub(crate) max_wait: Option<Duration>,
}

/// Whose request it is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Principal {
    pub(crate) tenant: Arc<Tenant>,
    /// Under which name its use is booked.
    pub(crate) ledger: Arc<str>,
    pub(crate) quota: Quota,
}

impl Principal {
    /// Somebody of a tenant of that name, with every default.
    pub(crate) fn without_limits(name: &str) -> Self {
        let name: Arc<str> = Arc::from(name);
        let tenant = Tenant {
            name: Arc::clone(&name),
            label: Arc::clone(&name),
            weight: 1,
            priority: 0,
            admin: false,
            max_wait: None,
        };
        Self { tenant: Arc::new(tenant), ledger: name, quota: Quota::default() }
    }
}

/// Why a client was not let in, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    /// There is no key.
    Missing,
    /// There is something else than a key.
    Malformed,
    /// No such key, or another secret.
    Unknown,
    /// Its time is over.
    Expired,
    /// The token is not good.
    Token,
    /// The token is signed by a key that the identity provider is not known to have.
    Signer,
    /// No key of the identity provider is known yet.
    NoSigners,
    /// The token is good, but names no tenant of the file.
    Tenant,
}

impl Denied {
    /// Every reason.
    pub(crate) const ALL: [Self; 8] = [
        Self::Missing,
        Self::Malformed,
        Self::Unknown,
        Self::Expired,
        Self::Token,
        Self::Signer,
        Self::NoSigners,
        Self::Tenant,
    ];

    /// The label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::Unknown => "unknown_key",
            Self::Expired => "expired",
            Self::Token => "bad_token",
            Self::Signer => "unknown_signer",
            Self::NoSigners => "no_signers",
            Self::Tenant => "unknown_tenant",
        }
    }

    fn refusal(self) -> Refusal {
        let (message, code) = match self {
            Self::Missing => (
                "You did not provide an API key. Send it as 'Authorization: Bearer YOUR_KEY'.",
                "missing_api_key",
            ),
            Self::Malformed | Self::Unknown => ("Incorrect API key provided.", "invalid_api_key"),
            Self::Expired => ("The API key has expired.", "expired_api_key"),
            Self::Token | Self::Signer => {
                ("The token is not valid for this service, or no longer.", "invalid_token")
            }
            Self::NoSigners => return Refusal::NoSigners,
            Self::Tenant => {
                return Refusal::Forbidden {
                    message: "The token names no tenant of this service.",
                    code: "unknown_tenant",
                };
            }
        };
        Refusal::Unauthorized { message, code }
    }
}

/// Why the router cannot tell who asks.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The file of keys.
    #[error("the file of keys cannot be used:\n{0}")]
    Keys(#[from] Faults),
    /// The keys of the identity provider.
    #[error("the keys of the identity provider cannot be used")]
    Jwks(#[from] JwksError),
    /// Whether it is the identity provider that answers cannot be checked.
    #[error("the identity provider cannot be trusted")]
    Trust(#[source] Box<TlsError>),
    /// There is nothing to call it with.
    #[error("the identity provider cannot be called")]
    Client(#[source] reqwest::Error),
}

/// Who may use the router.
#[derive(Debug)]
pub(crate) struct Auth {
    mode: Mode,
    isolation: Isolation,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
enum Mode {
    /// Anybody, as one tenant.
    Open(Arc<Principal>),
    /// Who has a key.
    Guarded(Box<Guard>),
}

#[derive(Debug)]
struct Guard {
    spec: AuthSpec,
    directory: RwLock<Arc<Directory>>,
    identity: Option<Identity>,
    labels: Mutex<HashSet<Arc<str>>>,
}

/// An identity provider.
#[derive(Debug)]
struct Identity {
    /// What is known of it; nothing before its keys were fetched.
    provider: RwLock<Option<Arc<Provider>>>,
    /// Where its keys come from, if not from a file.
    remote: Option<Remote>,
}

impl Identity {
    fn new(spec: &JwtSpec) -> Result<Self, AuthError> {
        let (provider, remote) = match &spec.keys {
            JwksSource::File(path) => (Some(Arc::new(Provider::load(path, spec)?)), None),
            JwksSource::Remote(source) => (None, Some(Remote::new(spec, source)?)),
        };
        Ok(Self { provider: RwLock::new(provider), remote })
    }

    fn current(&self) -> Result<Arc<Provider>, Denied> {
        let provider = self.provider.read().unwrap_or_else(PoisonError::into_inner);
        provider.clone().ok_or(Denied::NoSigners)
    }

    fn age(&self) -> Option<Duration> {
        self.remote.as_ref()?.age()
    }

    fn replace(&self, provider: Provider) {
        *self.provider.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(provider));
    }
}

impl Auth {
    /// Reads the files of `spec`; without one, anybody may use the router.
    pub(crate) fn new(spec: Option<&AuthSpec>, metrics: Arc<Metrics>) -> Result<Self, AuthError> {
        let Some(spec) = spec else {
            let principal = Principal::without_limits("default");
            // One tenant shares its cache with itself.
            return Ok(Self { mode: Mode::Open(Arc::new(principal)), isolation: Isolation::None, metrics });
        };
        let identity = spec.jwt.as_ref().map(Identity::new).transpose()?;
        let file = KeysFile::load(&spec.keys_file)?;
        let guard = Guard {
            spec: spec.clone(),
            directory: RwLock::new(Arc::new(Directory::default())),
            identity,
            labels: Mutex::default(),
        };
        guard.replace(&file);
        Ok(Self { mode: Mode::Guarded(Box::new(guard)), isolation: spec.isolation, metrics })
    }

    /// Whether keys are asked for.
    pub(crate) fn is_guarded(&self) -> bool {
        matches!(self.mode, Mode::Guarded(_))
    }

    /// Whose request it is. Waits where a token is signed by a key that is not known yet, and only then.
    pub(crate) async fn authenticate(&self, headers: &HeaderMap) -> Result<Arc<Principal>, Refusal> {
        let guard = match &self.mode {
            Mode::Open(anybody) => return Ok(Arc::clone(anybody)),
            Mode::Guarded(guard) => guard,
        };
        let mut found = guard.authenticate(headers);
        if let Err(Denied::Signer | Denied::NoSigners) = found
            && guard.newer_signers().await
        {
            found = guard.authenticate(headers);
        }
        found.map_err(|denied| {
            self.metrics.denied(denied);
            denied.refusal()
        })
    }

    /// What separates the cached prefixes of this request from others.
    pub(crate) fn salt(&self, principal: &Principal) -> Result<u64, Refusal> {
        match self.isolation {
            Isolation::None => Ok(0),
            Isolation::Tenant => Ok(tenant_salt(&principal.tenant.name)),
            Isolation::Request => getrandom::u64().map(|salt| salt.max(1)).map_err(|error| {
                tracing::error!(%error, "no random numbers from the system");
                Refusal::Internal
            }),
        }
    }

    /// Whose requests are counted together, where tenants are told apart.
    pub(crate) fn owner(&self, principal: &Principal) -> u64 {
        match self.isolation {
            Isolation::None => 0,
            Isolation::Tenant | Isolation::Request => tenant_salt(&principal.tenant.name),
        }
    }
}

/// Follows from the name alone: it must be the same in all routers, and need not be secret, since no client can send one.
fn tenant_salt(name: &str) -> u64 {
    let digest = Sha256::new().chain_update(b"baton tenant salt\0").chain_update(name.as_bytes()).finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    // 0 is for no salt.
    u64::from_le_bytes(first).max(1)
}

impl Guard {
    fn authenticate(&self, headers: &HeaderMap) -> Result<Arc<Principal>, Denied> {
        let credential = credential(headers)?;
        let directory = self.directory.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(identity) = &self.identity
            && !credential.starts_with(baton_config::keys::KEY_PREFIX)
        {
            let tenant = identity.current()?.tenant(credential)?;
            return directory.of_tenant(&tenant).ok_or(Denied::Tenant);
        }
        directory.of_key(credential, unix_seconds())
    }

    /// Waits for newer keys of the identity provider, where they come from itself; whether there are any.
    async fn newer_signers(&self) -> bool {
        match self.identity.as_ref().and_then(|identity| identity.remote.as_ref()) {
            Some(remote) => remote.newer().await,
            None => false,
        }
    }

    fn replace(&self, file: &KeysFile) {
        let mut labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        let label = |name: &str| -> Arc<str> {
            if let Some(known) = labels.get(name) {
                return Arc::clone(known);
            }
            if labels.len() >= LABELS_MAX {
                return Arc::from("other");
            }
            let label: Arc<str> = Arc::from(name);
            labels.insert(Arc::clone(&label));
            label
        };
        let directory = Arc::new(Directory::new(file, label));
        *self.directory.write().unwrap_or_else(PoisonError::into_inner) = directory;
    }
}

/// The key or token of a request; OpenAI's header, or Anthropic's.
fn credential(headers: &HeaderMap) -> Result<&str, Denied> {
    let credential = match only(headers, &AUTHORIZATION)? {
        Some(text) => {
            // Of an empty key only the scheme is left: what ends a header is cut off.
            let (scheme, credential) = text.split_once(' ').unwrap_or((text, ""));
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err(Denied::Malformed);
            }
            credential
        }
        None => only(headers, &X_API_KEY)?.ok_or(Denied::Missing)?,
    };
    let credential = credential.trim();
    match credential.len() {
        0 => Err(Denied::Missing),
        1..=CREDENTIAL_MAX_BYTES => Ok(credential),
        _ => Err(Denied::Malformed),
    }
}

/// The text of a header that may be there once: of two, something in front may have looked at the other one.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Denied> {
    let mut given = headers.get_all(name).iter();
    let (Some(value), None) = (given.next(), given.next()) else {
        return if headers.contains_key(name) { Err(Denied::Malformed) } else { Ok(None) };
    };
    value.to_str().map(Some).map_err(|_| Denied::Malformed)
}

#[cfg(test)]
mod tests;
