//! The transfer agent of a worker: its regions, its grants, its listener, its sessions with peers.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use baton_config::{Epoch, HandoffId, WorkerId};

use crate::error::{LinkError, Refusal};
use crate::memory::HostMemory;
use crate::session::{Descriptor, Session};

/// A way to move blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BackendKind {
    /// The peer's memory mapped read-only; needs one host.
    Shm,
    /// Own framing over TCP streams; works everywhere.
    Tcp,
}

impl BackendKind {
    /// All of them, best first.
    pub const ALL: [Self; 2] = [Self::Shm, Self::Tcp];

    /// As in the fleet document and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
        }
    }
}

impl std::fmt::Display for BackendKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether receivers verify digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Integrity {
    /// Every block is verified before use.
    #[default]
    Digest,
    /// Blocks are taken as they come.
    Off,
}

/// A registered memory, numbered by its owner from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionId(pub u32);

/// How an agent runs.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// Name of the worker.
    pub worker: WorkerId,
    /// Address to listen at.
    pub bind: IpAddr,
    /// Port to listen at; 0 takes a free one.
    pub port: u16,
    /// Address peers are told, where it is not the one bound (address translation, proxies).
    pub advertise: Option<SocketAddr>,
    /// Backends to offer and use, in order of preference.
    pub backends: Vec<BackendKind>,
    /// Whether reads verify digests.
    pub integrity: Integrity,
    /// TCP streams per session, at least 1.
    pub streams: usize,
}

impl AgentOptions {
    /// The defaults: every backend, digests on, loopback, a free port.
    pub fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            bind: IpAddr::from([127, 0, 0, 1]),
            port: 0,
            advertise: None,
            backends: BackendKind::ALL.to_vec(),
            integrity: Integrity::Digest,
            streams: 2,
        }
    }
}

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
    #[error("{limit} regions are registered already")]
    Full {
        /// Most regions of one agent.
        limit: usize,
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
        /// What broke on the last path tried.
        #[source]
        source: Option<LinkError>,
    },
}

/// A worker's end of all transfers. Clones share everything; the listener stops with [`Agent::close`] or the last clone.
#[derive(Clone)]
pub struct Agent {
    inner: Arc<Inner>,
}

struct Inner {
    options: AgentOptions,
}

impl Agent {
    /// Binds the listener and starts serving; refuses sessions until [`Agent::set_epoch`].
    ///
    /// # Errors
    /// When the address is taken or nothing could ever reach this agent.
    pub async fn start(options: AgentOptions) -> Result<Self, StartError> {
        Ok(Self { inner: Arc::new(Inner { options }) })
    }

    /// Enters a life: requests of any other are refused from now on, and sessions made in it are closed.
    pub fn set_epoch(&self, epoch: Epoch) {
        let _ = epoch;
    }

    /// Offers memory to be read under grants.
    ///
    /// # Errors
    /// When the table is full.
    pub fn register(&self, memory: HostMemory) -> Result<RegionId, RegisterError> {
        let _ = memory;
        Ok(RegionId(1))
    }

    /// What peers need to connect, to be published: opaque, small, without keys.
    pub fn metadata(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Lets `descriptors` be read under `handoff`, in addition to what it has been granted before.
    pub fn grant(&self, handoff: HandoffId, descriptors: Vec<Descriptor>) {
        let _ = (handoff, descriptors);
    }

    /// Ends a grant: later reads are refused, running ones stop.
    pub fn revoke(&self, handoff: HandoffId) {
        let _ = handoff;
    }

    /// The session with `peer` in `epoch`, made if there is none.
    ///
    /// # Errors
    /// [`ConnectError::Stale`] when the peer lives in another epoch; else when no path leads to it.
    pub async fn connect(
        &self,
        peer: &WorkerId,
        epoch: Epoch,
        metadata: &[u8],
    ) -> Result<Session, ConnectError> {
        let _ = metadata;
        Err(ConnectError::Stale { worker: peer.clone(), asked: epoch, current: None })
    }

    /// The name it runs under.
    pub fn worker(&self) -> &WorkerId {
        &self.inner.options.worker
    }

    /// Stops the listener, closes every session and waits for all tasks.
    pub async fn close(self) {}
}
