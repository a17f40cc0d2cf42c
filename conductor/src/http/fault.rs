//! Why TLS did not come about, in words that say what to change.

use std::error::Error;
use std::fmt;
use std::io;

use rustls::{AlertDescription, CertificateError};

/// Which side of a connection could not be trusted, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFault {
    /// The server's certificate is of an authority that this client does not know.
    UnknownAuthority,
    /// It is for another name or address.
    WrongName,
    /// It has expired, or is not valid yet.
    Expired,
    /// It is no good for another reason.
    Certificate,
    /// Whoever listens there speaks no TLS.
    NotTls,
    /// The server does not take the certificate that this client shows.
    OwnRefused,
    /// The two sides have nothing in common, or one broke the protocol.
    Protocol,
}

impl TlsFault {
    /// The fault in an error of a call, if TLS is what failed.
    pub fn of(error: &reqwest::Error) -> Option<Self> {
        let mut cause: Option<&(dyn Error + 'static)> = Some(error);
        while let Some(error) = cause {
            if let Some(fault) = error.downcast_ref::<rustls::Error>() {
                return Some(Self::of_tls(fault));
            }
            // The error within an I/O error is no source of it: it has to be asked for.
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            if let Some(fault) = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                return Some(Self::of_tls(fault));
            }
            cause = match inner {
                Some(inner) => Some(inner),
                None => error.source(),
            };
        }
        None
    }

    fn of_tls(error: &rustls::Error) -> Self {
        use CertificateError as C;
        match error {
            rustls::Error::InvalidCertificate(C::UnknownIssuer | C::BadSignature) => Self::UnknownAuthority,
            rustls::Error::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => {
                Self::WrongName
            }
            rustls::Error::InvalidCertificate(
                C::Expired | C::ExpiredContext { .. } | C::NotValidYet | C::NotValidYetContext { .. },
            ) => Self::Expired,
            rustls::Error::InvalidCertificate(_) => Self::Certificate,
            rustls::Error::InvalidMessage(_) => Self::NotTls,
            rustls::Error::AlertReceived(
                AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied
                | AlertDescription::DecryptError
                | AlertDescription::CertificateRequired,
            ) => Self::OwnRefused,
            _ => Self::Protocol,
        }
    }
}

impl fmt::Display for TlsFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownAuthority => {
                "shows a certificate of an authority that is not trusted here: check conductor.tls.ca_file"
            }
            Self::WrongName => {
                "shows a certificate for another name: use an endpoint that its certificate names"
            }
            Self::Expired => "shows a certificate that is not valid today: renew it, or check the clocks",
            Self::Certificate => "shows a certificate that cannot be used",
            Self::NotTls => "speaks no TLS: use http://, or give it conductor.tls.cert_file",
            Self::OwnRefused => {
                "refuses the certificate that is shown to it: check conductor.tls.client_cert_file"
            }
            Self::Protocol => "could not agree on a TLS connection",
        })
    }
}
