//! TLS from the PEM files that the fleet document names, for both ends of a connection.
//!
//! What files hold is kept beside what was made of it, so that a change is noticed by comparing contents: rotation works
//! the same whether files are rewritten, renamed over, or reached through a link that moves.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use baton_config::fleet::{ConductorAccess, Identity, ServerTls};
use baton_config::secret::{SecretFault, Tokens, read_public, read_secret};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

mod pinned;

pub(crate) use pinned::pinned;

/// Why the files of a certificate, key or authority cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is not there or not fit to be trusted.
    #[error(transparent)]
    File(#[from] SecretFault),
    /// A file holds something else.
    #[error("{} holds no {what} in PEM", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// Certificate and key do not go together, or are of an unknown kind.
    #[error("the certificate {} and the key {} cannot be used", cert_file.display(), key_file.display())]
    Identity {
        /// The certificate.
        cert_file: PathBuf,
        /// Its key.
        key_file: PathBuf,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
    /// The authority's certificate is no authority.
    #[error("{} holds no authority that can be used: {why}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A server of another project speaks TLS, and there is nobody to believe.
    #[error("this system names no authority to trust: name that of the server with {key}")]
    UnknownServer {
        /// What names one in the fleet document.
        key: &'static str,
    },
    /// There is an `https` endpoint and nobody to believe.
    #[error("this system names no authority to trust: name one with conductor.tls.ca_file")]
    NoAuthorities,
}

/// A certificate and its key, as the files have them.
#[derive(Clone, PartialEq, Eq)]
struct IdentityPem {
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl IdentityPem {
    fn read(identity: &Identity) -> Result<Self, TlsError> {
        Ok(Self { cert: read_public(&identity.cert_file)?, key: read_secret(&identity.key_file)? })
    }

    fn parse(
        &self,
        of: &Identity,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| TlsError::NotPem { path: of.key_file.clone(), what: "private key" })?;
        Ok((certificates(&self.cert, &of.cert_file)?, key))
    }
}

fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match parsed {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) | Err(_) => Err(TlsError::NotPem { path: path.to_owned(), what: "certificate" }),
    }
}

fn authorities(pem: &[u8], path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem, path)? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::Authority { path: path.to_owned(), why: error.to_string() })?;
    }
    Ok(roots)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// What the files of a listener hold.
#[derive(Clone, PartialEq, Eq)]
struct ServerFiles {
    identity: IdentityPem,
    client_ca: Option<Vec<u8>>,
}

impl ServerFiles {
    fn read(tls: &ServerTls) -> Result<Self, TlsError> {
        let client_ca = tls.client_ca_file.as_deref().map(read_public).transpose()?;
        Ok(Self { identity: IdentityPem::read(&tls.identity)?, client_ca })
    }

    /// The listener's side. A client need not show a certificate, so that health and metrics can be asked for without;
    /// one that it shows must be good.
    fn config(&self, tls: &ServerTls, alpn: &[Vec<u8>]) -> Result<ServerConfig, TlsError> {
        let (chain, key) = self.identity.parse(&tls.identity)?;
        let builder = versions(ServerConfig::builder_with_provider(provider()));
        let builder = match (&self.client_ca, &tls.client_ca_file) {
            (Some(pem), Some(path)) => {
                let roots = Arc::new(authorities(pem, path)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                    .allow_unauthenticated()
                    .build()
                    .map_err(|error| TlsError::Authority { path: path.clone(), why: error.to_string() })?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let identity = &tls.identity;
        let mut config = builder.with_single_cert(chain, key).map_err(|source| unusable(identity, source))?;
        config.alpn_protocols = alpn.to_vec();
        Ok(config)
    }
}

/// What a listener shows to those who connect, as of the last good state of its files.
pub struct ServerCertificates {
    tls: ServerTls,
    alpn: Vec<Vec<u8>>,
    current: RwLock<(ServerFiles, Arc<ServerConfig>)>,
}

impl ServerCertificates {
    /// Reads the files; `alpn` names the protocols that are spoken, the best first.
    ///
    /// # Errors
    /// A file is missing, readable by others, or does not hold what it should.
    pub fn load(tls: &ServerTls, alpn: &[&[u8]]) -> Result<Self, TlsError> {
        let (tls, alpn) = (tls.clone(), alpn.iter().map(|name| name.to_vec()).collect::<Vec<_>>());
        let files = ServerFiles::read(&tls)?;
        let config = Arc::new(files.config(&tls, &alpn)?);
        Ok(Self { tls, alpn, current: RwLock::new((files, config)) })
    }

    /// For the next connection.
    pub fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).1)
    }

    /// Takes over what the files hold now; whether that is something else. Blocks on the disk.
    ///
    /// # Errors
    /// As [`load`](Self::load); what was shown goes on being shown.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let files = ServerFiles::read(&self.tls)?;
        if self.current.read().unwrap_or_else(PoisonError::into_inner).0 == files {
            return Ok(false);
        }
        let config = Arc::new(files.config(&self.tls, &self.alpn)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = (files, config);
        Ok(true)
    }
}

impl fmt::Debug for ServerCertificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCertificates").field("tls", &self.tls).finish_non_exhaustive()
    }
}

/// What the files of a client hold.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ClientFiles {
    ca: Option<Vec<u8>>,
    identity: Option<IdentityPem>,
    tokens: Option<Tokens>,
}

impl ClientFiles {
    pub(crate) fn read(access: &ConductorAccess) -> Result<Self, TlsError> {
        Ok(Self {
            ca: access.ca_file.as_deref().map(read_public).transpose()?,
            identity: access.identity.as_ref().map(IdentityPem::read).transpose()?,
            tokens: access.token_file.as_deref().map(Tokens::load).transpose()?,
        })
    }

    /// The token to show.
    pub(crate) fn token(&self) -> Option<&str> {
        self.tokens.as_ref().map(|tokens| tokens.shown().reveal())
    }

    /// The client's side; `secure` is whether it will be used, so that authorities are needed.
    pub(crate) fn config(&self, access: &ConductorAccess, secure: bool) -> Result<ClientConfig, TlsError> {
        let roots = match (&self.ca, &access.ca_file) {
            (Some(pem), Some(path)) => authorities(pem, path)?,
            _ if secure => system_authorities()?,
            _ => RootCertStore::empty(),
        };
        let builder = versions(ClientConfig::builder_with_provider(provider())).with_root_certificates(roots);
        match (&self.identity, &access.identity) {
            (Some(pem), Some(identity)) => {
                let (chain, key) = pem.parse(identity)?;
                builder.with_client_auth_cert(chain, key).map_err(|source| unusable(identity, source))
            }
            _ => Ok(builder.with_no_client_auth()),
        }
    }
}

impl fmt::Debug for ClientFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientFiles(secret)")
    }
}

/// The side of a client of servers of other projects, whose certificates are of this authority, or of one of the
/// system's; `key` of the fleet document names the file.
pub(crate) fn trusting(ca_file: Option<&Path>, key: &'static str) -> Result<ClientConfig, TlsError> {
    let roots = match ca_file {
        Some(path) => authorities(&read_public(path)?, path)?,
        None => system_authorities().map_err(|_| TlsError::UnknownServer { key })?,
    };
    let builder = versions(ClientConfig::builder_with_provider(provider()));
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// A client's side that trusts nobody: for plain HTTP.
pub(crate) fn trusting_nobody() -> ClientConfig {
    versions(ClientConfig::builder_with_provider(provider()))
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth()
}

fn system_authorities() -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    // Some of a system's certificates may be of kinds nobody can use: what counts is that some can.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(TlsError::NoAuthorities) } else { Ok(roots) }
}

fn unusable(identity: &Identity, source: rustls::Error) -> TlsError {
    let Identity { cert_file, key_file } = identity.clone();
    TlsError::Identity { cert_file, key_file, source }
}

fn versions<S: rustls::ConfigSide>(
    builder: rustls::ConfigBuilder<S, rustls::WantsVersions>,
) -> rustls::ConfigBuilder<S, rustls::WantsVerifier> {
    match builder.with_safe_default_protocol_versions() {
        Ok(builder) => builder,
        Err(error) => unreachable!("the provider speaks the default versions of TLS: {error}"),
    }
}
