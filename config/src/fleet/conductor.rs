//! `conductor:` of the fleet document.

use std::path::PathBuf;
use std::time::Duration;

use super::Listen;

/// The conductor.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ConductorSpec {
    /// Where it listens.
    pub listen: Listen,
    /// Where routers, workers and operators reach it (`http://HOST:PORT`); never empty.
    pub endpoints: Vec<String>,
    /// Where its state lives.
    pub store: StoreSpec,
    /// How long a worker that stops renewing stays registered; renewed every third of it.
    pub lease_ttl: Duration,
}

/// Where the conductor keeps its state.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreSpec {
    /// In the memory of one conductor.
    Embedded {
        /// Keeps the epoch counter and operator intents over restarts; memory only without it.
        state_file: Option<PathBuf>,
    },
    /// In etcd, shared by several conductors.
    Etcd(EtcdSpec),
}

/// How to reach etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EtcdSpec {
    /// `http://HOST:PORT` or `https://HOST:PORT`; never empty.
    pub endpoints: Vec<String>,
    /// Under which key everything is kept.
    pub prefix: String,
    /// Certificates, for `https`.
    pub tls: Option<EtcdTls>,
    /// User and password.
    pub auth: Option<EtcdAuth>,
}

/// Certificates for etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EtcdTls {
    /// Authority that signed the servers' certificates.
    pub ca_file: PathBuf,
    /// This client's certificate.
    pub cert_file: Option<PathBuf>,
    /// This client's key.
    pub key_file: Option<PathBuf>,
}

/// User of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EtcdAuth {
    /// Name.
    pub user: String,
    /// File that holds the password.
    pub password_file: PathBuf,
}
