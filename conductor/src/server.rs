//! The conductor process: store, reconcilers and HTTP API.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use baton_config::fleet::{Autoscale, ConductorGuard};
use baton_config::secret::SecretFault;
use baton_config::{PoolName, Role};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::autoscale::{Autoscaler, Board, scalers};
use crate::leader::{Candidate, ConductorRecord};
use crate::mirror::Mirror;
use crate::reconcile::{DrainWishes, Runner, UnleasedWorkers};
use crate::registry::{Registry, Rules};
use crate::store::Store;
use crate::store::embedded::{Embedded, EmbeddedOptions, StateFileError};
use crate::store::etcd::{Etcd, EtcdError, EtcdOptions};
use crate::tls::TlsError;

mod answer;
mod auth;
mod history;
mod http;
mod metrics;
mod routes;
mod tls;

use auth::Guard;
use http::Door;
use routes::{App, Entrance, Shared};
use tls::Certificates;

/// How often what concerns nobody any more is looked for.
const TIDY_INTERVAL: Duration = Duration::from_secs(10);

/// How long a conductor waits for its store before it serves without one.
const FIRST_LISTING: Duration = Duration::from_millis(500);

/// Where a conductor keeps the fleet's state.
#[derive(Debug, Clone)]
pub enum StoreOptions {
    /// In its own memory.
    Embedded {
        /// Where epochs and operators' wishes survive a restart; `None` keeps them in memory and takes epochs from the
        /// clock.
        state_file: Option<PathBuf>,
    },
    /// In etcd, with other conductors.
    Etcd(EtcdOptions),
}

/// What a conductor is told by the fleet document.
#[derive(Debug, Clone)]
pub struct ConductorOptions {
    /// Where the state is kept.
    pub store: StoreOptions,
    /// A worker not heard for so long is removed.
    pub lease_ttl: Duration,
    /// Pools of the fleet document.
    pub pools: Vec<PoolOptions>,
    /// Pools that scale by themselves, and how.
    pub autoscale: BTreeMap<PoolName, Autoscale>,
    /// What the other conductors call this one; unique among them. `None`: its address and process id.
    pub name: Option<String>,
    /// Where operators and workers reach this one; `None`: where it listens.
    pub url: Option<String>,
    /// The model that all workers serve; `None` takes any.
    pub model: Option<String>,
    /// Whom it lets in: everybody by default, which only a loopback address allows.
    pub guard: ConductorGuard,
    /// Bounds of connections and requests.
    pub limits: HttpLimits,
}

impl ConductorOptions {
    /// Options with a lease of 10 s and nothing kept on disk.
    pub fn new(pools: Vec<PoolOptions>) -> Self {
        let store = StoreOptions::Embedded { state_file: None };
        Self {
            store,
            lease_ttl: Duration::from_secs(10),
            pools,
            autoscale: BTreeMap::new(),
            name: None,
            url: None,
            model: None,
            guard: ConductorGuard::default(),
            limits: HttpLimits::default(),
        }
    }
}

/// How long clients may take, and how soon changed files are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HttpLimits {
    /// For a TLS handshake.
    pub handshake_timeout: Duration,
    /// For the head of a request, and for the next one on the same connection.
    pub header_timeout: Duration,
    /// For the body of a request.
    pub body_timeout: Duration,
    /// How often the files of tokens and certificates are compared with what is in use.
    pub rotate_interval: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(10),
            rotate_interval: Duration::from_secs(10),
        }
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
        "the conductor would listen on {address}, where other hosts can connect, and nobody proves who they are: set conductor.auth.token_file or conductor.tls.client_ca_file, or listen on 127.0.0.1"
    )]
    OpenListen {
        /// Where it was to listen.
        address: SocketAddr,
    },
    /// The tokens that are to be accepted can't be used.
    #[error("callers cannot be authenticated")]
    Token(#[from] SecretFault),
    /// The certificates that are to be shown can't be used.
    #[error("TLS cannot be served")]
    Tls(#[from] TlsError),
    /// The socket is unusable.
    #[error("the listening socket failed")]
    Listen(#[source] std::io::Error),
    /// The state of an earlier life can't be used.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// etcd could never be reached like this. One that is away is no error: the conductor waits for it.
    #[error("the etcd store can't be used")]
    Etcd(#[from] EtcdError),
}

/// Runs a conductor until `stop`, then lets open requests finish for a moment.
///
/// # Errors
/// [`ServeError`], before anything is served.
pub async fn serve(
    options: ConductorOptions,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    let address = listener.local_addr().map_err(ServeError::Listen)?;
    let tasks = TaskTracker::new();
    let store: Arc<dyn Store> = match options.store.clone() {
        StoreOptions::Embedded { state_file } => {
            let holder = format!("the conductor with pid {} at http://{address}", std::process::id());
            Arc::new(Embedded::start(EmbeddedOptions { state_file, holder }, &tasks).await?)
        }
        StoreOptions::Etcd(etcd) => Arc::new(Etcd::start(etcd, &tasks)?),
    };
    serve_on(store, options, listener, stop, &tasks).await?;
    tasks.close();
    tasks.wait().await;
    tracing::info!("conductor stopped");
    Ok(())
}

/// Runs a conductor on a store that others may use too.
async fn serve_on(
    store: Arc<dyn Store>,
    options: ConductorOptions,
    listener: TcpListener,
    stop: CancellationToken,
    tasks: &TaskTracker,
) -> Result<(), ServeError> {
    let address = listener.local_addr().map_err(ServeError::Listen)?;
    let (guard, certificates) = entrance(&options.guard, address)?;
    let mirror = Arc::new(Mirror::new(&options.pools).with_lease_ttl(options.lease_ttl));
    // Only so that a store that is there is shown from the first answer on; `follow` waits for any other.
    if !matches!(tokio::time::timeout(FIRST_LISTING, mirror.list(&*store)).await, Ok(Ok(()))) {
        tracing::warn!(store = store.kind(), "the store does not answer; the conductor waits for it");
    }
    let record = conductor_record(&options, address);
    let (candidate, leadership) = Candidate::new(store.clone(), mirror.clone(), record);
    let runner = Runner {
        store: store.clone(),
        mirror: mirror.clone(),
        term: leadership.term(),
        tally: Arc::default(),
        stop: stop.clone(),
    };
    let rules = Rules {
        model: options.model.clone(),
        allowed_addresses: options.guard.allowed_addresses.clone(),
        authenticated: options.guard.authenticates(),
    };
    let board = Arc::new(Board::new(options.autoscale.keys()));
    start_autoscaler(&runner, &options, &board, tasks);
    let registry = Registry::new(store.clone(), mirror.clone(), options.pools, rules, options.lease_ttl);
    let shared = Shared { mirror: mirror.clone(), leadership, tally: runner.tally.clone(), board };
    let entrance = Entrance { guard: guard.clone(), limits: options.limits };
    let app = Arc::new(App::new(registry, shared, entrance, store.kind(), stop.clone()));

    tasks.spawn(stop.clone().run_until_cancelled_owned(mirror.clone().follow(store)));
    tasks.spawn(stop.clone().run_until_cancelled_owned(tidy(app.clone())));
    tasks.spawn(stop.clone().run_until_cancelled_owned(app.clone().remember()));
    tasks.spawn(candidate.run(stop.clone()));
    start_reconcilers(&runner, tasks);
    let rotation = auth::rotate(guard, certificates.clone(), options.limits.rotate_interval);
    tasks.spawn(stop.clone().run_until_cancelled_owned(rotation));
    tracing::info!(%address, tls = certificates.is_some(), "conductor serves");
    let door = Door {
        router: routes::router(app.clone()),
        plain: routes::plain_router(app.clone()),
        certificates,
        limits: options.limits,
        metrics: app.metrics().clone(),
    };
    http::serve(listener, door, stop).await;
    Ok(())
}

/// Whom the conductor lets in and what it shows; a port that everybody reaches is not opened to everybody.
fn entrance(
    options: &ConductorGuard,
    address: SocketAddr,
) -> Result<(Arc<Guard>, Option<Certificates>), ServeError> {
    if !address.ip().is_loopback() {
        if !options.authenticates() {
            return Err(ServeError::OpenListen { address });
        }
        if options.tls.is_none() {
            tracing::warn!(%address, "tokens travel in clear text: whoever listens to this network can use them; see conductor.tls");
        }
    }
    let certificates = options.tls.as_ref().map(Certificates::load).transpose()?;
    Ok((Arc::new(Guard::load(options.clone())?), certificates))
}

/// Everything that only the leading conductor does.
fn start_reconcilers(runner: &Runner, tasks: &TaskTracker) {
    runner.start(tasks, DrainWishes::default());
    runner.start(tasks, UnleasedWorkers { mirror: runner.mirror.clone() });
}

fn start_autoscaler(runner: &Runner, options: &ConductorOptions, board: &Arc<Board>, tasks: &TaskTracker) {
    let ConductorOptions { pools, autoscale, lease_ttl, .. } = options;
    // Started before the scalers, which have nothing to follow without it.
    let autoscaler = Autoscaler::new(pools, autoscale, runner.mirror.clone(), board.clone(), *lease_ttl);
    for agent in scalers(pools, autoscale, board) {
        runner.start(tasks, agent);
    }
    if let Some(autoscaler) = autoscaler {
        runner.start(tasks, autoscaler);
    }
}

/// What the other conductors and operators are told about this one.
fn conductor_record(options: &ConductorOptions, address: SocketAddr) -> ConductorRecord {
    let pid = std::process::id();
    let scheme = if options.guard.tls.is_some() { "https" } else { "http" };
    ConductorRecord {
        name: options.name.clone().unwrap_or_else(|| format!("{address}-{pid}")),
        url: options.url.clone().unwrap_or_else(|| format!("{scheme}://{address}")),
        pid,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// Keeps the memory of this conductor small, whether or not it leads.
async fn tidy(app: Arc<App>) {
    loop {
        app.registry.forget_absent();
        tokio::time::sleep(TIDY_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests;
