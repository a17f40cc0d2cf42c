//! What a sidecar is told at start.

use std::path::PathBuf;
use std::time::Duration;

use baton_config::fleet::{ConductorAccess, EngineKind, EngineSpec, Fleet, OpenaiSpec};
use baton_config::{PoolName, Role, WorkerId};

/// Everything a sidecar needs to know.
#[derive(Debug, Clone)]
pub struct SidecarOptions {
    /// Its name.
    pub worker: WorkerId,
    /// Its pool.
    pub pool: PoolName,
    /// What the server does.
    pub role: Role,
    /// Model id of the fleet.
    pub model: String,
    /// `http://HOST:PORT` at which this process reaches the server.
    pub server: String,
    /// What the server calls the model.
    pub server_model: String,
    /// File of the key that the server asks for.
    pub api_key_file: Option<PathBuf>,
    /// Authority that signed its certificate; those of the system without.
    pub ca_file: Option<PathBuf>,
    /// The path that tells whether the server is well.
    pub health_path: Option<String>,
    /// Host that routers are told; that of the listening address without.
    pub advertise: Option<String>,
    /// `http://host:port` of each conductor.
    pub conductors: Vec<String>,
    /// What is shown to the conductors, and whom to believe.
    pub conductor_access: ConductorAccess,
    /// How long the server's requests may take to end once an operator drains the worker.
    pub drain_grace: Duration,
    /// How long joining the fleet may take.
    pub join_timeout: Duration,
}

/// Why a pool of the fleet document has no such sidecar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SidecarOptionsError {
    /// No such pool.
    #[error("the fleet has no pool {pool} (it has {})", .known.join(", "))]
    NoPool {
        /// As asked.
        pool: PoolName,
        /// Names there are.
        known: Vec<String>,
    },
    /// A pool whose workers compute by themselves.
    #[error("pool {pool} runs {kind}, not a server beside its workers")]
    Engine {
        /// The pool.
        pool: PoolName,
        /// What it runs.
        kind: EngineKind,
    },
    /// More replicas than servers.
    #[error(
        "pool {pool} names {servers} servers in engine.urls: there is none for replica {replica}, counted from 0"
    )]
    NoServer {
        /// The pool.
        pool: PoolName,
        /// Servers it names.
        servers: usize,
        /// As asked.
        replica: u16,
    },
}

impl SidecarOptions {
    /// Options of replica number `replica` (counted from 0) of a pool of the fleet document.
    ///
    /// # Errors
    /// When the pool is not there, or has no server for this replica.
    pub fn from_fleet(
        fleet: &Fleet,
        pool: &PoolName,
        worker: WorkerId,
        replica: u16,
    ) -> Result<Self, SidecarOptionsError> {
        let known = || fleet.pools.iter().map(|p| p.name.to_string()).collect();
        let pool = fleet
            .pool(pool)
            .ok_or_else(|| SidecarOptionsError::NoPool { pool: pool.clone(), known: known() })?;
        let EngineSpec::Openai(spec) = &pool.engine else {
            return Err(SidecarOptionsError::Engine { pool: pool.name.clone(), kind: pool.engine.kind() });
        };
        let no_server =
            || SidecarOptionsError::NoServer { pool: pool.name.clone(), servers: spec.urls.len(), replica };
        let server = spec.url(replica).ok_or_else(no_server)?;
        Ok(Self {
            worker,
            pool: pool.name.clone(),
            role: pool.role,
            model: fleet.model.id.clone(),
            server: server.to_owned(),
            server_model: spec.model.clone().unwrap_or_else(|| fleet.model.id.clone()),
            api_key_file: spec.api_key_file.clone(),
            ca_file: spec.ca_file.clone(),
            health_path: spec.health_path.clone(),
            advertise: pool.advertise.clone(),
            conductors: fleet.conductor.endpoints.clone(),
            conductor_access: fleet.conductor.access.clone(),
            drain_grace: pool.limits.drain_grace,
            join_timeout: Duration::from_secs(30),
        })
    }

    /// The URL of the server as routers are told it.
    pub(super) fn server_told(&self, own_address: &str) -> String {
        OpenaiSpec::reached_at(&self.server, own_address)
    }
}
