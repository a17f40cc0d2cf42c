//! TLS of the listener, from the PEM files that the fleet document names; files that change are read anew.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use baton_config::fleet::ServerTls;
use baton_config::keys::Stamp;
use baton_config::secret::{SecretFault, read_public, read_secret};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

/// Between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Why the files of a certificate and its key cannot be used.
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
    #[error("the certificate {} and its key cannot be used", cert_file.display())]
    Identity {
        /// The certificate.
        cert_file: PathBuf,
        /// Why not.
        #[source]
        source: rustls::Error,
    },
}

/// What the listener shows, as of the last good state of the files.
#[derive(Debug)]
pub(super) struct Tls {
    spec: ServerTls,
    current: RwLock<Arc<ServerConfig>>,
}

impl Tls {
    /// Reads the files.
    pub(super) fn load(spec: &ServerTls) -> Result<Self, TlsError> {
        Ok(Self { spec: spec.clone(), current: RwLock::new(Arc::new(config(spec)?)) })
    }

    /// For the next connection.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Follows the files for as long as it is polled.
    pub(super) async fn follow(self: Arc<Self>) {
        let identity = self.spec.identity.clone();
        let mut seen = None;
        loop {
            let files = identity.clone();
            let look = move || (Stamp::of(&files.cert_file), Stamp::of(&files.key_file));
            let Ok(now) = tokio::task::spawn_blocking(look).await else { return };
            if seen.replace(now).is_some_and(|seen| seen != now) {
                let spec = self.spec.clone();
                match tokio::task::spawn_blocking(move || config(&spec)).await {
                    Ok(Ok(config)) => {
                        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
                        tracing::info!("certificate read");
                    }
                    Ok(Err(error)) => {
                        tracing::error!(%error, "KEPT THE OLD CERTIFICATE: the new files cannot be used");
                        // Certificate and key are two files: the other one may come a moment later.
                        seen = Some((None, None));
                    }
                    Err(error) => tracing::error!(%error, "reading the certificate panicked"),
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

fn config(spec: &ServerTls) -> Result<ServerConfig, TlsError> {
    let identity = &spec.identity;
    let not_pem = |path: &PathBuf, what| TlsError::NotPem { path: path.clone(), what };
    let cert = read_public(&identity.cert_file)?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&cert)
        .collect::<Result<_, _>>()
        .map_err(|_| not_pem(&identity.cert_file, "certificate"))?;
    if chain.is_empty() {
        return Err(not_pem(&identity.cert_file, "certificate"));
    }
    let key = PrivateKeyDer::from_pem_slice(&read_secret(&identity.key_file)?)
        .map_err(|_| not_pem(&identity.key_file, "private key"))?;
    let unusable = |source| TlsError::Identity { cert_file: identity.cert_file.clone(), source };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
