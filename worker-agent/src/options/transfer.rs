//! How blocks move: from the fleet document to the transfer agent's options.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use baton_config::fleet::defaults;
use baton_config::{WorkerId, fleet};
use baton_transfer::auth::{Token, TokenError};
use baton_transfer::{
    AgentOptions, BackendKind, Choose, Integrity, LibfabricOptions, PluginOptions, TransferLimits, UcxOptions,
};

use super::OptionsError;

/// How blocks move.
#[derive(Debug, Clone, PartialEq)]
pub struct TransferOptions {
    /// Address to listen at; port 0 is any free one.
    pub listen: SocketAddr,
    /// Address peers are told, if another.
    pub advertise: Option<SocketAddr>,
    /// Backends, best first.
    pub backends: Vec<BackendKind>,
    /// Which of them is used.
    pub choose: Choose,
    /// Whether blocks are verified.
    pub integrity: Integrity,
    /// TCP streams per peer.
    pub streams: usize,
    /// File of the token that all agents of the fleet share.
    pub token_file: Option<PathBuf>,
    /// Bounds.
    pub limits: TransferLimits,
    /// How libfabric is used.
    pub libfabric: LibfabricOptions,
    /// How UCX is used.
    pub ucx: UcxOptions,
    /// Which plugin is loaded.
    pub plugin: Option<PluginOptions>,
    /// For a session with a peer to come about.
    pub connect_timeout: Duration,
    /// A path on which nothing moves for so long is left for another one, if there is one.
    pub stall_timeout: Duration,
}

/// Why the token of the fleet cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFault {
    /// The file cannot be read.
    #[error("the token file {} cannot be read", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// What it holds is no token.
    #[error("the token file {} holds no token", .path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: TokenError,
    },
}

impl TransferOptions {
    /// Loopback, a free port, `shm` and `tcp`.
    pub fn local() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            backends: BackendKind::ALWAYS.to_vec(),
            choose: Choose::default(),
            integrity: Integrity::default(),
            streams: 2,
            token_file: None,
            limits: TransferLimits::default(),
            libfabric: LibfabricOptions::default(),
            ucx: UcxOptions::default(),
            plugin: None,
            connect_timeout: defaults::CONNECT_TIMEOUT,
            stall_timeout: defaults::STALL_TIMEOUT,
        }
    }

    /// Those of replica number `replica` of a pool.
    ///
    /// # Errors
    /// When the build has none of the pool's backends.
    pub fn from_pool(pool: &fleet::Pool, replica: u16) -> Result<Self, OptionsError> {
        let spec = &pool.transfer;
        let backends: Vec<BackendKind> = spec.backends.iter().filter_map(|kind| backend(*kind)).collect();
        if backends.is_empty() {
            return Err(OptionsError::Backend { pool: pool.name.clone() });
        }
        let nth = |port: u16| if port == 0 { 0 } else { port.saturating_add(replica) };
        let advertise = spec.advertise.map(|a| SocketAddr::new(a.ip(), nth(a.port())));
        // A fabric needs the address of one interface, also where tcp listens on all of them.
        let interface: IpAddr = match advertise {
            Some(told) if spec.bind.is_unspecified() => told.ip(),
            _ => spec.bind,
        };
        let limits = &spec.limits;
        Ok(Self {
            listen: SocketAddr::new(spec.bind, nth(spec.port)),
            advertise,
            backends,
            choose: match spec.choose {
                fleet::Choose::Measured => Choose::Measured,
                fleet::Choose::Listed => Choose::Listed,
            },
            integrity: match spec.integrity {
                fleet::Integrity::Digest => Integrity::Digest,
                fleet::Integrity::Off => Integrity::Off,
            },
            streams: spec.streams,
            token_file: spec.token_file.clone(),
            limits: TransferLimits {
                registered_bytes: limits.registered,
                regions: limits.regions as usize,
                ops_per_peer: limits.peer_ops as usize,
                bytes_per_peer: limits.peer_bytes,
                ..TransferLimits::default()
            },
            libfabric: LibfabricOptions {
                provider: spec.provider.clone(),
                rails: spec.rails,
                bind: interface,
            },
            ucx: UcxOptions { bind: interface, transports: spec.transports.clone() },
            plugin: spec.plugin.clone().map(|path| PluginOptions { path, bind: Some(interface) }),
            connect_timeout: spec.connect_timeout,
            stall_timeout: spec.stall_timeout,
        })
    }

    /// What the agent of `worker` is started with; reads the token.
    ///
    /// # Errors
    /// When there is to be a token and it cannot be had.
    pub fn agent(&self, worker: WorkerId) -> Result<AgentOptions, TokenFault> {
        let auth = self.token_file.as_ref().map(|path| {
            let bytes =
                std::fs::read(path).map_err(|source| TokenFault::Read { path: path.clone(), source })?;
            Token::from_file_bytes(&bytes).map_err(|source| TokenFault::Token { path: path.clone(), source })
        });
        Ok(AgentOptions {
            bind: self.listen.ip(),
            port: self.listen.port(),
            advertise: self.advertise,
            backends: self.backends.clone(),
            choose: self.choose,
            integrity: self.integrity,
            streams: self.streams,
            auth: auth.transpose()?,
            limits: self.limits,
            libfabric: self.libfabric.clone(),
            ucx: self.ucx.clone(),
            plugin: self.plugin.clone(),
            stall: self.stall_timeout,
            ..AgentOptions::new(worker)
        })
    }
}

fn backend(kind: fleet::BackendKind) -> Option<BackendKind> {
    match kind {
        fleet::BackendKind::Shm => Some(BackendKind::Shm),
        fleet::BackendKind::Cma => Some(BackendKind::Cma),
        fleet::BackendKind::Libfabric => Some(BackendKind::Libfabric),
        fleet::BackendKind::Ucx => Some(BackendKind::Ucx),
        fleet::BackendKind::Plugin => Some(BackendKind::Plugin),
        fleet::BackendKind::Tcp => Some(BackendKind::Tcp),
        fleet::BackendKind::File | fleet::BackendKind::Object => None,
    }
}
