//! The conductor process: store, reconcilers and HTTP API.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use baton_config::{PoolName, Role};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What a conductor is told by the fleet document.
#[derive(Debug, Clone)]
pub struct ConductorOptions {
    /// Where epochs and operators' wishes survive a restart; `None` keeps them in memory and takes epochs from the clock.
    pub data_dir: Option<PathBuf>,
    /// A worker not heard for so long is removed.
    pub lease_ttl: Duration,
    /// Pools of the fleet document.
    pub pools: Vec<PoolOptions>,
}

impl ConductorOptions {
    /// Options with a lease of 10 s and nothing kept on disk.
    pub fn new(pools: Vec<PoolOptions>) -> Self {
        Self { data_dir: None, lease_ttl: Duration::from_secs(10), pools }
    }
}

/// A pool of the fleet document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolOptions {
    /// Name.
    pub name: PoolName,
    /// What its workers do; registrations with another role are refused.
    pub role: Role,
    /// Wanted number of workers until an operator asks for another.
    pub replicas: u32,
    /// Least number that can be asked for.
    pub min: u32,
    /// Largest number that can be asked for.
    pub max: u32,
}

/// Why a conductor did not start, or ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Anybody who reaches the port could register workers.
    #[error(
        "the conductor listens on {address}, which is not loopback: there is no authentication yet, so only loopback is served"
    )]
    OpenListen {
        /// Where it was to listen.
        address: SocketAddr,
    },
    /// The socket is unusable.
    #[error("the listening socket failed")]
    Listen(#[source] std::io::Error),
}

/// Runs a conductor until `stop`.
///
/// # Errors
/// [`ServeError`], before anything is served.
pub async fn serve(
    _options: ConductorOptions,
    listener: TcpListener,
    _stop: CancellationToken,
) -> Result<(), ServeError> {
    let address = listener.local_addr().map_err(ServeError::Listen)?;
    Err(ServeError::OpenListen { address })
}
