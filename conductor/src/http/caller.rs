//! Calls to conductors, with the token and the certificate that the fleet document names.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use baton_config::fleet::ConductorAccess;
use http::HeaderValue;
use http::header::AUTHORIZATION;
use reqwest::{Method, RequestBuilder};
use tokio::time::Instant;

use super::builder_with;
use crate::tls::{ClientFiles, TlsError};

/// Connections kept open to each conductor while nothing is asked.
const IDLE_CONNECTIONS: usize = 4;
/// The files are looked at again at most so often.
const RENEW_INTERVAL: Duration = Duration::from_secs(1);

/// Why conductors can't be called.
#[derive(Debug, thiserror::Error)]
pub enum CallerError {
    /// A token, certificate or authority can't be used.
    #[error(transparent)]
    Files(#[from] TlsError),
    /// The HTTP client could not be made.
    #[error("the HTTP client could not be made")]
    Http(#[from] reqwest::Error),
}

/// An HTTP client that conductors know; clones share it.
///
/// Its files are read when it is made, and again when a conductor refuses what they held: a token or a certificate is
/// rotated without a restart.
#[derive(Debug, Clone)]
pub struct Caller {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    access: ConductorAccess,
    /// Whether any conductor speaks TLS.
    secure: bool,
    connect_timeout: Duration,
    loaded: RwLock<Loaded>,
    renewed: Mutex<Instant>,
}

#[derive(Debug, Clone)]
struct Loaded {
    files: ClientFiles,
    http: reqwest::Client,
    authorization: Option<HeaderValue>,
}

impl Caller {
    /// Reads the files of `access`; `urls` are those that will be called.
    ///
    /// # Errors
    /// When a file can't be used.
    pub fn new<'a>(
        access: ConductorAccess,
        urls: impl IntoIterator<Item = &'a str>,
        connect_timeout: Duration,
    ) -> Result<Self, CallerError> {
        let secure = urls.into_iter().any(|url| url.starts_with("https:"));
        let loaded = load(ClientFiles::read(&access)?, &access, secure, connect_timeout)?;
        let (loaded, renewed) = (RwLock::new(loaded), Mutex::new(Instant::now()));
        Ok(Self { shared: Arc::new(Shared { access, secure, connect_timeout, loaded, renewed }) })
    }

    /// The start of a call.
    pub fn request(&self, method: Method, url: &str) -> RequestBuilder {
        let loaded = self.shared.loaded.read().unwrap_or_else(PoisonError::into_inner);
        let request = loaded.http.request(method, url);
        match &loaded.authorization {
            Some(value) => request.header(AUTHORIZATION, value),
            None => request,
        }
    }

    /// Reads the files again, after a conductor refused what they held; true when they hold something else now.
    pub async fn renew(&self) -> bool {
        if self.shared.access == ConductorAccess::default() {
            return false;
        }
        {
            let mut renewed = self.shared.renewed.lock().unwrap_or_else(PoisonError::into_inner);
            if renewed.elapsed() < RENEW_INTERVAL {
                return false;
            }
            *renewed = Instant::now();
        }
        let shared = self.shared.clone();
        match tokio::task::spawn_blocking(move || shared.reload()).await {
            Ok(Ok(news)) => news,
            Ok(Err(error)) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "the files for calling conductors can't be used; going on with what they held"
                );
                false
            }
            // The runtime ends.
            Err(_) => false,
        }
    }
}

impl Shared {
    fn reload(&self) -> Result<bool, CallerError> {
        let files = ClientFiles::read(&self.access)?;
        if self.loaded.read().unwrap_or_else(PoisonError::into_inner).files == files {
            return Ok(false);
        }
        let loaded = load(files, &self.access, self.secure, self.connect_timeout)?;
        *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        tracing::info!("conductors are called with a new token or certificate");
        Ok(true)
    }
}

fn load(
    files: ClientFiles,
    access: &ConductorAccess,
    secure: bool,
    connect_timeout: Duration,
) -> Result<Loaded, CallerError> {
    let tls = files.config(access, secure)?;
    let http = builder_with(tls)
        .connect_timeout(connect_timeout)
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .build()?;
    // Tokens are printable ASCII: that is checked where they are read.
    let value = files.token().and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok());
    let authorization = value.map(|mut value| {
        value.set_sensitive(true);
        value
    });
    Ok(Loaded { files, http, authorization })
}
