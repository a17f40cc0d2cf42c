//! The transfer agent of a worker: its regions, its grants, its listeners, its sessions with peers.

pub(crate) mod dial;
pub(crate) mod grants;
pub mod notifications;
pub mod options;
pub(crate) mod paths;
pub(crate) mod probe;
pub(crate) mod region;
pub(crate) mod server;
pub(crate) mod strangers;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use baton_config::{Bytes, Epoch, HandoffId, WorkerId};
use tokio::net::TcpListener;
use tokio_util::sync::DropGuard;

pub use self::grants::Revoked;
pub use self::notifications::{Notification, Notifications};
pub use self::options::{AgentOptions, Choose, Integrity, TransferLimits};
pub use self::region::DeviceMemory;

use self::dial::Dialer;
use self::region::Region;
use self::server::Server;
use crate::backend::fabric::fabrics::Fabrics;
use crate::backend::fabric::serve::requests;
use crate::backend::{shm, tcp};
use crate::error::Refusal;
use crate::memory::HostMemory;
use crate::session::{Descriptor, Session};
use crate::stats::Stats;
use crate::wire::Metadata;

/// A way to move blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BackendKind {
    /// The peer's memory mapped read-only; needs one host.
    Shm,
    /// The peer's memory copied by the kernel (`process_vm_readv`); needs one host, and memory of any kind will do.
    Cma,
    /// libfabric: EFA and other network cards with one-sided operations.
    Libfabric,
    /// UCX: network cards with one-sided operations, and GPU memory.
    Ucx,
    /// A driver loaded from a shared object.
    Plugin,
    /// Own framing over TCP streams; works everywhere.
    Tcp,
}

impl BackendKind {
    /// All of them, best first.
    pub const ALL: [Self; 6] = [Self::Shm, Self::Cma, Self::Libfabric, Self::Ucx, Self::Plugin, Self::Tcp];

    /// Those that need nothing of the machine.
    pub const ALWAYS: [Self; 2] = [Self::Shm, Self::Tcp];

    /// Whether it is for two processes of one host, whose memory the processor copies: it reaches no device.
    pub fn copies_in_host_memory(self) -> bool {
        matches!(self, Self::Shm | Self::Cma)
    }

    /// As in the fleet document and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Cma => "cma",
            Self::Libfabric => "libfabric",
            Self::Ucx => "ucx",
            Self::Plugin => "plugin",
            Self::Tcp => "tcp",
        }
    }
}

impl std::fmt::Display for BackendKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A registered memory, numbered by its owner from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u32);

/// Why an agent did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The listener could not be had.
    #[error("cannot listen for transfers at {address}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Bound to every address, so peers must be told which one to use.
    #[error("transfers listen at {address}: say which address peers should use")]
    Advertise {
        /// The address bound.
        address: SocketAddr,
    },
    /// Other hosts could connect, and nothing would tell friend from foe.
    #[error(
        "transfers would listen at {address}, where other hosts can connect, without a token: give all agents of the \
         fleet the same token, or bind a loopback address"
    )]
    Unprotected {
        /// The address asked for.
        address: IpAddr,
    },
    /// No backend was asked for.
    #[error("no transfer backend is enabled")]
    NoBackend,
    /// The control memory of `shm` could not be had.
    #[error("cannot set up shared memory")]
    Memory(#[from] crate::memory::MemoryError),
}

/// Why a memory was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The table is full.
    #[error("{limit} regions are registered already, which is the limit (transfer.limits.regions)")]
    Full {
        /// Most regions of one agent.
        limit: usize,
    },
    /// Too much memory.
    #[error(
        "{wanted} more than the {registered} registered would pass the limit of {limit} (transfer.limits.registered)"
    )]
    Bytes {
        /// Bytes of the memory.
        wanted: Bytes,
        /// Bytes registered already.
        registered: Bytes,
        /// Most bytes of one agent.
        limit: Bytes,
    },
}

/// Why there is no session with a peer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The peer lives in another epoch: wait for the view to catch up.
    #[error("{worker} is not in epoch {asked}")]
    Stale {
        /// The peer.
        worker: WorkerId,
        /// The epoch asked for.
        asked: Epoch,
        /// Where the peer said so, the epoch it is in.
        current: Option<Epoch>,
    },
    /// The published metadata cannot be read.
    #[error("the transfer metadata of {worker} cannot be read")]
    Metadata {
        /// The peer.
        worker: WorkerId,
        /// What is wrong with it.
        #[source]
        source: crate::wire::WireError,
    },
    /// The peer will have no session.
    #[error("{worker} refused a session")]
    Refused {
        /// The peer.
        worker: WorkerId,
        /// Why.
        #[source]
        refusal: Refusal,
    },
    /// The peer was not reached.
    #[error("cannot reach {worker}: {tried}")]
    Link {
        /// The peer.
        worker: WorkerId,
        /// Every path that was tried or ruled out, with its reason.
        tried: String,
    },
}

/// A worker's end of all transfers.
///
/// Clones share everything; serving stops with [`Agent::close`] or the last clone.
#[derive(Clone)]
pub struct Agent {
    server: Arc<Server>,
    dialer: Arc<Dialer>,
    metadata: Arc<[u8]>,
    address: SocketAddr,
    _stop: Arc<DropGuard>,
}

impl Agent {
    /// Binds the listeners and starts serving; refuses sessions until [`Agent::set_epoch`].
    ///
    /// # Errors
    /// When the address is taken, is not loopback and there is no token, or nothing could ever reach this agent. A backend
    /// that cannot be opened is no error: sessions say why they do without it.
    pub async fn start(options: AgentOptions) -> Result<Self, StartError> {
        Self::check(&options)?;
        let fabrics = Fabrics::open(&options).await;
        Self::start_with(options, fabrics).await
    }

    fn check(options: &AgentOptions) -> Result<(), StartError> {
        if options.backends.is_empty() {
            return Err(StartError::NoBackend);
        }
        if options.auth.is_none() && !options.bind.is_loopback() {
            return Err(StartError::Unprotected { address: options.bind });
        }
        Ok(())
    }

    /// Starts with fabrics that are open.
    pub(crate) async fn start_with(options: AgentOptions, fabrics: Fabrics) -> Result<Self, StartError> {
        let wanted = SocketAddr::new(options.bind, options.port);
        let bind_error = |source| StartError::Bind { address: wanted, source };
        let listener = TcpListener::bind(wanted).await.map_err(bind_error)?;
        let bound = listener.local_addr().map_err(bind_error)?;
        let address = options.advertise.unwrap_or(bound);
        if address.ip().is_unspecified() {
            return Err(StartError::Advertise { address: bound });
        }
        let incarnation = dial::random_u128().map_err(bind_error)?;
        let probe = probe::memory()?;
        let offered = fabrics.clone();
        let server = Server::new(&options, incarnation, Region::Host(probe.clone()), fabrics)?;
        let server = Arc::new(server);
        server.fabrics.answer_with(&requests::answering(&server));
        let mut backends = options.backends.clone();
        let same_host = |backend: &BackendKind| matches!(backend, BackendKind::Shm | BackendKind::Cma);
        if backends.iter().any(same_host) {
            match shm::serve::bind(incarnation) {
                Ok(socket) => {
                    server.tasks.spawn(shm::serve::listen(Arc::clone(&server), socket));
                }
                Err(error) => {
                    tracing::warn!(%error, "shared memory is not offered to peers");
                    backends.retain(|backend| !same_host(backend));
                }
            }
        }
        server.tasks.spawn(tcp::serve::listen(Arc::clone(&server), listener));
        let offers = backends.iter().filter_map(|backend| offered.offer(*backend)).collect();
        let metadata = Metadata { incarnation, host: dial::host_id(), address, offers }.encode();
        Ok(Self {
            dialer: Arc::new(Dialer::new(options, &server, probe)),
            metadata: metadata.into(),
            address: bound,
            _stop: Arc::new(server.stop.clone().drop_guard()),
            server,
        })
    }

    /// Enters a life: requests that mean any other are refused from now on, sessions and grants of the last end.
    pub fn set_epoch(&self, epoch: Epoch) {
        if self.server.enter(epoch) {
            self.dialer.enter(epoch);
        }
    }

    /// Offers memory to be read or written under grants.
    ///
    /// # Errors
    /// When [`TransferLimits`] allow no more regions, or no more bytes.
    pub fn register(&self, memory: HostMemory) -> Result<RegionId, RegisterError> {
        self.server.register(Region::Host(memory))
    }

    /// Offers memory of a device to be read under grants: in place where a backend's library registers it, else through
    /// copies, which `tcp` sends. Over `shm` it cannot be read.
    ///
    /// # Errors
    /// As [`Agent::register`].
    pub fn register_device(&self, memory: DeviceMemory) -> Result<RegionId, RegisterError> {
        self.server.register(Region::Device(memory))
    }

    /// What peers need to connect, to be published: opaque, small, without keys.
    pub fn metadata(&self) -> Vec<u8> {
        self.metadata.to_vec()
    }

    /// The address its TCP listener is bound to.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// Lets `descriptors` be read under `handoff`, in addition to what it has been granted before.
    pub fn grant(&self, handoff: HandoffId, descriptors: Vec<Descriptor>) {
        self.server.grant(handoff, &descriptors);
    }

    /// Lets peers write `descriptors` under `handoff`, in addition to what it has been granted before.
    ///
    /// What a writer leaves behind when it fails or gives up is garbage: nothing there counts before its write was
    /// acknowledged. Ended with [`Agent::revoke`], whose [`Revoked::settled`] waits until nothing is written any more.
    pub fn grant_write(&self, handoff: HandoffId, descriptors: &[Descriptor]) {
        self.server.grant_write(handoff, descriptors);
    }

    /// What peers have to say, see [`Session::notify`].
    pub fn notifications(&self) -> Notifications {
        self.server.notifications.clone()
    }

    /// Takes bytes the peer is done with out of a grant, so that their place can be granted to another handoff.
    ///
    /// `descriptors` are named as they were granted.
    pub fn ungrant(&self, handoff: HandoffId, descriptors: &[Descriptor]) {
        self.server.narrow(handoff, descriptors);
    }

    /// What a listener holds while it serves `blocks` to a peer.
    #[cfg(test)]
    pub(crate) fn serving(
        &self,
        handoff: HandoffId,
        blocks: &[Descriptor],
    ) -> Result<grants::Permit, server::Denial> {
        self.server.permit(&self.server.regions(), handoff, blocks)
    }

    /// Ends a grant: later reads are refused, running ones stop. [`Revoked::settled`] waits for those.
    pub fn revoke(&self, handoff: HandoffId) -> Revoked {
        self.server.revoke(handoff)
    }

    /// The session with `peer` in `epoch`, made if there is none that works.
    ///
    /// # Errors
    /// [`ConnectError::Stale`] when the peer lives in another epoch; else when no path leads to it.
    pub async fn connect(
        &self,
        peer: &WorkerId,
        epoch: Epoch,
        metadata: &[u8],
    ) -> Result<Session, ConnectError> {
        self.dialer.connect(peer, epoch, metadata, None).await
    }

    /// As [`Agent::connect`], over another backend than `avoid`: for a second try after [`TransferError::Integrity`].
    ///
    /// [`TransferError::Integrity`]: crate::error::TransferError::Integrity
    ///
    /// # Errors
    /// As [`Agent::connect`], also when there is no other path.
    pub async fn connect_avoiding(
        &self,
        peer: &WorkerId,
        epoch: Epoch,
        metadata: &[u8],
        avoid: BackendKind,
    ) -> Result<Session, ConnectError> {
        self.dialer.connect(peer, epoch, metadata, Some(avoid)).await
    }

    /// Forgets the sessions with `peer`, which is gone; reads under way end by themselves.
    pub fn disconnect(&self, peer: &WorkerId) {
        self.dialer.forget(peer);
    }

    /// Forgets the sessions with every peer of which `life` does not know, or knows another life than the session's, and
    /// with them what they hold: connections, mapped memory, endpoints. Reads under way end by themselves.
    pub fn retain(&self, life: impl Fn(&WorkerId) -> Option<Epoch>) {
        self.dialer.retain(life);
    }

    /// The sessions that are open now, for status pages.
    pub fn sessions(&self) -> Vec<Session> {
        self.dialer.sessions()
    }

    /// What was counted since the start.
    pub fn stats(&self) -> Stats {
        self.server.counters.snapshot()
    }

    /// The name it runs under.
    pub fn worker(&self) -> &WorkerId {
        &self.server.worker
    }

    /// Stops the listeners, closes every session and waits for all tasks.
    pub async fn close(self) {
        self.server.stop.cancel();
        self.dialer.close();
        self.server.tasks.close();
        self.server.tasks.wait().await;
    }
}
