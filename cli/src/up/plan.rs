//! Where every part of a fleet listens, and the command line that starts it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_conductor::api::TargetSource;
use baton_config::fleet::{ConductorAccess, Fleet, Listen, Pool, ScalerSpec, StoreSpec};
use baton_config::{Accelerator, Bytes, PoolName};
use tempfile::TempDir;

use super::ports::{Ports, is_free};
use super::roster::PartId;
use crate::failure::Failure;
use crate::logging::Logging;
use crate::output::tell;
use crate::part::{cannot_listen, fits_memory};

/// How the parts of one fleet are started.
#[derive(Debug)]
pub(super) struct Plan {
    fleet: Fleet,
    config: Option<PathBuf>,
    /// Flags of every part.
    logging: Vec<String>,
    /// Where the router listens.
    pub(super) router: SocketAddr,
    /// Where the conductor listens.
    pub(super) conductor: SocketAddr,
    workers: BTreeMap<PartId, SocketAddr>,
    ports: Ports,
    /// Where the conductor keeps what must survive its restarts, though not the end of this fleet. Removed with it.
    state: Option<TempDir>,
}

impl Plan {
    /// Settles the addresses of conductor and router; `listen` overrides the router's.
    pub(super) fn new(
        fleet: Fleet,
        config: Option<PathBuf>,
        listen: Option<SocketAddr>,
        logging: &Logging,
    ) -> Result<Self, Failure> {
        let in_host_memory =
            |pool: &&Pool| !matches!(pool.accelerator, Accelerator::Cuda | Accelerator::Trainium);
        let memory = fleet
            .pools
            .iter()
            .filter(in_host_memory)
            .map(|pool| fleet.kv_bytes(pool).0.saturating_mul(u64::from(pool.replicas)));
        fits_memory(Bytes(memory.fold(0, u64::saturating_add)), "the workers of this fleet take")?;
        let mut ports = Ports::new(std::process::id());
        let router = settle(listen.unwrap_or(fleet.router.listen.address), true, &mut ports)?;
        let conductor = fleet.conductor.listen;
        let conductor = settle(conductor.address, conductor.named, &mut ports)?;
        Ok(Self {
            config,
            logging: logging.flags("warn"),
            router,
            conductor,
            workers: BTreeMap::new(),
            ports,
            state: state_folder(&fleet)?,
            fleet,
        })
    }

    /// The pools and how many workers each starts with.
    pub(super) fn pools(&self) -> impl Iterator<Item = (PoolName, u32)> {
        self.fleet.pools.iter().map(|pool| (pool.name.clone(), pool.replicas))
    }

    /// Whether the launcher brings a pool to the size that `source` says.
    ///
    /// A pool that scales keeps the size it has until the autoscaler speaks: a conductor that was started anew knows
    /// nothing of what was decided before, and the number of the fleet document would end the workers added since.
    pub(super) fn follows(&self, pool: &PoolName, source: TargetSource) -> bool {
        let scale = self.fleet.pool(pool).and_then(|pool| pool.autoscale.as_ref());
        match (source, scale) {
            (TargetSource::Operator, _) | (TargetSource::Document, None) => true,
            (TargetSource::Document, Some(_)) => false,
            (TargetSource::Autoscaler, scale) => {
                scale.is_some_and(|scale| scale.scaler == ScalerSpec::Process)
            }
        }
    }

    /// The longest that any part may take to drain.
    pub(super) fn grace(&self) -> Duration {
        let limits = &self.fleet.router.limits;
        let workers = self.fleet.pools.iter().map(|pool| pool.limits.drain_grace);
        workers.fold(limits.drain_grace + limits.drain_settle, Duration::max)
    }

    /// The address of a worker that is gone for good may go to another.
    pub(super) fn release(&mut self, id: &PartId) {
        self.workers.remove(id);
    }

    /// Where a part listens: the same place each time it is started.
    pub(super) fn address(&mut self, id: &PartId, check: bool) -> Result<SocketAddr, Failure> {
        let (pool, index) = match id {
            PartId::Conductor => return Ok(self.conductor),
            PartId::Router => return Ok(self.router),
            PartId::Worker { pool, index } => (pool, *index),
        };
        if let Some(address) = self.workers.get(id) {
            return Ok(*address);
        }
        let listen = self.fleet.pool(pool).map(|pool| pool.listen);
        let named = listen.filter(|listen| listen.named && listen.address.port() != 0);
        let address = match named {
            Some(Listen { address, .. }) => {
                let port = u32::from(address.port()) + index;
                let port = u16::try_from(port).map_err(|_| {
                    Failure::failed(format!("{id} has no port: {address} leaves too few above it"))
                })?;
                let address = SocketAddr::new(address.ip(), port);
                if check {
                    is_free(address).map_err(|error| cannot_listen(address, &error))?;
                }
                address
            }
            None => {
                let ip = listen.map_or(IpAddr::from([127, 0, 0, 1]), |listen| listen.address.ip());
                self.ports.free(ip).map_err(|error| Failure::because("no port is free", &error))?
            }
        };
        self.workers.insert(id.clone(), address);
        Ok(address)
    }

    /// The command line of a part.
    pub(super) fn arguments(&self, id: &PartId, address: SocketAddr) -> Vec<String> {
        let mut args = self.logging.clone();
        let mut add = |words: &[&str]| args.extend(words.iter().map(ToString::to_string));
        match id {
            PartId::Conductor => {
                add(&["conductor"]);
                if let Some(folder) = &self.state {
                    add(&["--state-file", &folder.path().join("conductor.state").display().to_string()]);
                }
            }
            PartId::Router => add(&["router", "--conductor", &self.conductor_url()]),
            PartId::Worker { pool, index } => {
                let (name, index) = (id.to_string(), index.to_string());
                let conductor = self.conductor_url();
                add(&["worker", "--pool", pool.as_str(), "--name", &name, "--index", &index]);
                add(&["--conductor", &conductor]);
            }
        }
        add(&["--listen", &address.to_string(), "--parent-pid", &std::process::id().to_string()]);
        if let Some(config) = &self.config {
            add(&["--config", &config.display().to_string()]);
        }
        args
    }

    /// How the parts reach the conductor.
    pub(super) fn conductor_url(&self) -> String {
        let scheme = if self.fleet.conductor.guard.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", reachable(self.conductor))
    }

    /// What is shown to the conductor, and whom to believe.
    pub(super) fn conductor_access(&self) -> ConductorAccess {
        self.fleet.conductor.access.clone()
    }

    /// `http://HOST:PORT` of the router, or `https`.
    pub(super) fn router_url(&self) -> String {
        let scheme = if self.fleet.router.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", reachable(self.router))
    }

    /// The certificate that the router shows, if it does.
    pub(super) fn router_certificate(&self) -> Option<&Path> {
        self.fleet.router.tls.as_ref().map(|tls| tls.identity.cert_file.as_path())
    }

    /// Where clients find the API: [`router_url`](Self::router_url) and `/v1`.
    pub(super) fn api_url(&self) -> String {
        format!("{}/v1", self.router_url())
    }

    /// The id of the model served.
    pub(super) fn model(&self) -> &str {
        &self.fleet.model.id
    }

    /// Says what the fleet asks for and has to go without.
    pub(super) fn tell_missing(&self) {
        for missing in self.fleet.unsupported() {
            let line = missing.at.map_or(String::new(), |at| format!(" (line {})", at.line));
            let (path, what, remedy) = (&missing.path, &missing.what, &missing.remedy);
            tell(&format!("{path}{line}: {what} is not available in this build; {remedy}"));
        }
    }

    /// Says what is being started.
    pub(super) fn tell_start(&self) {
        tell(&format!("conductor {}", self.conductor_url()));
        for pool in &self.fleet.pools {
            let (engine, accelerator) = (pool.engine.kind(), pool.accelerator);
            tell(&format!(
                "starting {} x {}: {}, {engine} on {accelerator}",
                pool.replicas, pool.name, pool.role
            ));
        }
    }
}

/// A folder for the conductor's state, unless the file says where that lives.
fn state_folder(fleet: &Fleet) -> Result<Option<TempDir>, Failure> {
    if !matches!(fleet.conductor.store, StoreSpec::Embedded { state_file: None }) {
        return Ok(None);
    }
    let folder = tempfile::Builder::new().prefix("baton-up-").tempdir();
    folder.map(Some).map_err(|error| Failure::because("no folder for the conductor's state", &error))
}

/// The address a part gets: its own if it is named, a free port otherwise.
fn settle(address: SocketAddr, named: bool, ports: &mut Ports) -> Result<SocketAddr, Failure> {
    if named && address.port() != 0 {
        is_free(address).map_err(|error| cannot_listen(address, &error))?;
        return Ok(address);
    }
    ports.free(address.ip()).map_err(|error| cannot_listen(address, &error))
}

/// How this machine reaches a listener.
pub(super) fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::from(([127, 0, 0, 1], address.port())),
        IpAddr::V6(ip) if ip.is_unspecified() => {
            SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, address.port()))
        }
        IpAddr::V4(_) | IpAddr::V6(_) => address,
    }
}
