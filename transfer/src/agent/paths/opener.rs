//! Which backends can lead to a peer, and how their links are opened.

use crate::agent::{AgentOptions, BackendKind, Choose};
use crate::backend::fabric::fabrics::Fabrics;
use crate::backend::fabric::link::FabricLink;
use crate::backend::handshake::Route;
use crate::backend::shm::link::{Access, ShmLink};
use crate::backend::tcp::link::TcpLink;
use crate::backend::{Fault, Link, Pair};
use crate::error::LinkError;
use crate::memory::HostMemory;
use crate::wire::Metadata;

/// What this side brings to every pair.
pub(crate) struct Opener {
    pub(crate) options: AgentOptions,
    pub(crate) host: u128,
    /// This agent's own probe region.
    pub(crate) probe: HostMemory,
    pub(crate) fabrics: Fabrics,
}

impl Opener {
    /// Why a backend cannot lead to a peer, known without a try.
    pub(super) fn rule_out(&self, backend: BackendKind, peer: &Metadata) -> Option<String> {
        // First what this side lacks: a peer that lacks the same does not offer it either.
        if let Some(why) = self.fabrics.missing(backend) {
            return Some(why);
        }
        let Some(offer) = peer.offer(backend) else { return Some("not offered by the peer".to_owned()) };
        match backend {
            BackendKind::Shm | BackendKind::Cma if peer.host != self.host => {
                Some("the peer is on another host".to_owned())
            }
            BackendKind::Shm | BackendKind::Cma | BackendKind::Tcp => None,
            BackendKind::Libfabric | BackendKind::Ucx | BackendKind::Plugin => {
                self.fabrics.rule_out(offer, peer.host == self.host)
            }
        }
    }

    pub(super) async fn open(&self, backend: BackendKind, pair: &Pair, route: &Route) -> Result<Link, Fault> {
        let pair = pair.clone();
        match backend {
            BackendKind::Shm => ShmLink::open(pair, Access::Map).await.map(Link::Shm),
            BackendKind::Cma => ShmLink::open(pair, Access::Copy).await.map(Link::Shm),
            BackendKind::Tcp => TcpLink::open(pair, route.clone(), self.options.streams).await.map(Link::Tcp),
            BackendKind::Libfabric | BackendKind::Ucx | BackendKind::Plugin => {
                let fabric = self.fabrics.get(backend).ok_or_else(|| {
                    let why = self.fabrics.missing(backend);
                    LinkError::Fabric(why.unwrap_or_else(|| "it is being opened again here".to_owned()))
                })?;
                FabricLink::open(pair, route, fabric).await.map(Link::Fabric)
            }
        }
    }

    /// Whether paths are measured, rather than taken in the order listed.
    pub(super) fn measures(&self) -> bool {
        self.options.choose == Choose::Measured
    }
}

/// What speaks for a backend.
pub(super) fn why(backend: BackendKind) -> &'static str {
    match backend {
        BackendKind::Shm => "same host, the peer's memory is mapped",
        BackendKind::Cma => "same host, the kernel copies from the peer's memory",
        BackendKind::Libfabric | BackendKind::Ucx | BackendKind::Plugin => "both have the same fabric",
        BackendKind::Tcp => "reached by address",
    }
}
