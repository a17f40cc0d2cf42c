//! How an agent runs.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use baton_config::{Bytes, WorkerId};

use super::BackendKind;
use crate::auth::Token;
use crate::backend::libfabric::LibfabricOptions;
use crate::backend::plugin::PluginOptions;
use crate::backend::ucx::UcxOptions;

/// Whether receivers verify digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Integrity {
    /// Every block is verified before use.
    #[default]
    Digest,
    /// Blocks are taken as they come.
    Off,
}

/// How the path to a peer is chosen among the backends that both sides have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choose {
    /// The quickest one as measured; the listed order decides where they are close.
    #[default]
    Measured,
    /// The first of the list that works.
    Listed,
}

/// Bounds of what an agent registers and has under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferLimits {
    /// Memory registered at most.
    pub registered_bytes: Bytes,
    /// Regions registered at most.
    pub regions: usize,
    /// Operations of a fabric under way with one peer.
    pub ops_per_peer: usize,
    /// Bytes of a fabric under way with one peer.
    pub bytes_per_peer: Bytes,
    /// Notifications waiting to be taken; each peer has an equal share.
    pub notifications: usize,
}

impl Default for TransferLimits {
    fn default() -> Self {
        Self {
            registered_bytes: Bytes(1 << 40),
            regions: 256,
            ops_per_peer: 64,
            bytes_per_peer: Bytes(16 << 20),
            notifications: 1024,
        }
    }
}

/// How an agent runs.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// Name of the worker.
    pub worker: WorkerId,
    /// Address to listen at: a loopback address, unless there is a token.
    pub bind: IpAddr,
    /// Port to listen at; 0 takes a free one.
    pub port: u16,
    /// Address peers are told, where it is not the one bound (address translation, proxies).
    pub advertise: Option<SocketAddr>,
    /// Backends to offer and use, in order of preference.
    pub backends: Vec<BackendKind>,
    /// How one of them is chosen for a peer.
    pub choose: Choose,
    /// Whether reads verify digests.
    pub integrity: Integrity,
    /// TCP streams per session, at least 1; one more is opened for short reads and writes when all of them are taken.
    pub streams: usize,
    /// How long a read may stand still before it goes on over another path.
    pub stall: Duration,
    /// How long a path that broke is not used, as long as there is another.
    pub retry: Duration,
    /// The secret that all agents of the fleet share.
    pub auth: Option<Token>,
    /// Bounds.
    pub limits: TransferLimits,
    /// How libfabric is used.
    pub libfabric: LibfabricOptions,
    /// How UCX is used.
    pub ucx: UcxOptions,
    /// Which plugin is loaded.
    pub plugin: Option<PluginOptions>,
}

impl AgentOptions {
    /// The defaults: `shm` and `tcp`, digests on, loopback, a free port, no token.
    pub fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            bind: IpAddr::from([127, 0, 0, 1]),
            port: 0,
            advertise: None,
            backends: BackendKind::ALWAYS.to_vec(),
            choose: Choose::default(),
            integrity: Integrity::Digest,
            streams: 2,
            stall: Duration::from_secs(1),
            retry: Duration::from_secs(30),
            auth: None,
            limits: TransferLimits::default(),
            libfabric: LibfabricOptions::default(),
            ucx: UcxOptions::default(),
            plugin: None,
        }
    }
}
