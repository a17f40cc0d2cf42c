//! The listener's TLS: handshakes, bounded in time and number.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use baton_config::fleet::ServerTls;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::auth::Peer;
use crate::tls::{ServerCertificates, TlsError};

/// Handshakes at once; more wait, within the same limit of time.
const HANDSHAKES_MAX: usize = 512;
/// First byte of a TLS connection: a handshake record.
const HANDSHAKE_RECORD: u8 = 22;
/// How long a client whose handshake failed has to read why.
const LINGER: Duration = Duration::from_millis(500);

/// The certificates in use; clones share them.
#[derive(Clone)]
pub(super) struct Certificates {
    files: Arc<ServerCertificates>,
    room: Arc<Semaphore>,
}

/// What became of a connection's first bytes.
pub(super) enum Opened {
    /// A TLS connection.
    Tls(Box<TlsStream<TcpStream>>, Peer),
    /// The client speaks something else: HTTP, most likely.
    Plain(TcpStream),
    /// It closed without a word.
    Silent,
    /// The handshake failed, or took too long.
    Failed(HandshakeFault),
}

/// Why there was no handshake.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeFault {
    #[error("the handshake took longer than {limit:?}")]
    Slow { limit: Duration },
    #[error("the client's certificate was refused")]
    ClientCertificate(#[source] io::Error),
    #[error("the client refused this conductor's certificate")]
    Refused(#[source] io::Error),
    #[error("the handshake broke off")]
    Broken(#[source] io::Error),
}

impl HandshakeFault {
    pub(super) const REASONS: [&str; 4] = ["timeout", "client_certificate", "refused_by_client", "broken"];

    /// For metrics.
    pub(super) fn reason(&self) -> &'static str {
        let [timeout, certificate, refused, broken] = Self::REASONS;
        match self {
            Self::Slow { .. } => timeout,
            Self::ClientCertificate(_) => certificate,
            Self::Refused(_) => refused,
            Self::Broken(_) => broken,
        }
    }

    fn of(error: io::Error) -> Self {
        let fault = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match fault {
            Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
                Self::ClientCertificate(error)
            }
            Some(rustls::Error::AlertReceived(_)) => Self::Refused(error),
            _ => Self::Broken(error),
        }
    }
}

impl Certificates {
    /// Reads the files.
    pub(super) fn load(tls: &ServerTls) -> Result<Self, TlsError> {
        let files = Arc::new(ServerCertificates::load(tls, &[])?);
        Ok(Self { files, room: Arc::new(Semaphore::new(HANDSHAKES_MAX)) })
    }

    /// Takes over other certificates if the files hold some, for connections from now on.
    pub(super) fn reload(&self) -> Result<bool, TlsError> {
        self.files.reload()
    }

    /// Makes a TLS connection of a new one, within `limit`.
    pub(super) async fn open(&self, stream: TcpStream, limit: Duration) -> Opened {
        match tokio::time::timeout(limit, self.handshake(stream)).await {
            Ok(opened) => opened,
            Err(_) => Opened::Failed(HandshakeFault::Slow { limit }),
        }
    }

    async fn handshake(&self, stream: TcpStream) -> Opened {
        // Whoever says nothing takes no place among those who do.
        let mut first = [0];
        match stream.peek(&mut first).await {
            Ok(0) => return Opened::Silent,
            Ok(_) if first[0] != HANDSHAKE_RECORD => return Opened::Plain(stream),
            Ok(_) => {}
            Err(error) => return Opened::Failed(HandshakeFault::Broken(error)),
        }
        // A closed semaphore does not occur: nobody closes it.
        let Ok(_permit) = self.room.acquire().await else { return Opened::Silent };
        match TlsAcceptor::from(self.files.current()).accept(stream).into_fallible().await {
            Ok(stream) => {
                let certified = stream.get_ref().1.peer_certificates().is_some_and(|chain| !chain.is_empty());
                Opened::Tls(Box::new(stream), Peer { certified })
            }
            Err((error, stream)) => {
                linger(stream).await;
                Opened::Failed(HandshakeFault::of(error))
            }
        }
    }
}

/// Reads on for a moment: a connection closed with bytes unread is reset, and the alert that says why is lost.
async fn linger(mut stream: TcpStream) {
    let drain = async {
        let mut scratch = [0; 1024];
        while stream.read(&mut scratch).await.is_ok_and(|read| read > 0) {}
    };
    // Too long is as good as ended.
    let _ = tokio::time::timeout(LINGER, drain).await;
}
