//! TLS of the listener: certificates that follow their files.

use std::sync::Arc;
use std::time::Duration;

use baton_conductor::{ServerCertificates, TlsError};
use baton_config::fleet::ServerTls;
use tokio_rustls::TlsAcceptor;

/// Between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// What is spoken, the best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// What the listener shows.
#[derive(Debug)]
pub(super) struct Tls {
    certificates: ServerCertificates,
}

impl Tls {
    /// Reads the files.
    pub(super) fn load(spec: &ServerTls) -> Result<Self, TlsError> {
        Ok(Self { certificates: ServerCertificates::load(spec, &PROTOCOLS)? })
    }

    /// For the next connection.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.certificates.current())
    }

    /// Follows the files for as long as it is polled.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut refused = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let this = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || this.certificates.reload()).await {
                Ok(Ok(changed)) => {
                    refused = None;
                    if changed {
                        tracing::info!("certificate read");
                    }
                }
                Ok(Err(error)) => {
                    // Certificate and key are two files: the other one may come a moment later. Said once.
                    let why = error.to_string();
                    if refused.as_ref() != Some(&why) {
                        tracing::error!(%error, "KEPT THE OLD CERTIFICATE: the new files cannot be used");
                        refused = Some(why);
                    }
                }
                Err(error) => tracing::error!(%error, "reading the certificate panicked"),
            }
        }
    }
}
