//! The fabrics of an agent: which of those asked for could be opened, and why the others could not.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::FabricLimits;
use super::driver::{Driver, DriverError};
use super::thread::Fabric;
use crate::agent::{AgentOptions, BackendKind};
use crate::backend::{libfabric, plugin, ucx};
use crate::wire::Offer;

/// How long a library may take to look for its devices. libfabric takes seconds on a busy machine; a backend that is
/// late is not offered.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Opens a driver.
pub(crate) type Open = Box<dyn FnOnce() -> Result<Box<dyn Driver>, DriverError> + Send>;

/// The fabrics of an agent. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Fabrics(Arc<[Entry]>);

struct Entry {
    kind: BackendKind,
    opened: Result<Fabric, DriverError>,
}

impl Fabrics {
    /// Opens those that `options` ask for, all at once.
    pub(crate) async fn open(options: &AgentOptions) -> Self {
        let asked = options.backends.iter().filter_map(|kind| Some((*kind, driver(*kind, options)?)));
        Self::open_with(asked.collect(), FabricLimits::of(options)).await
    }

    pub(crate) async fn open_with(drivers: Vec<(BackendKind, Open)>, limits: FabricLimits) -> Self {
        let open = |(kind, open): (BackendKind, Open)| async move {
            let late = |_| DriverError {
                what: format!("{kind} was not open after {} s", OPEN_TIMEOUT.as_secs()),
                remedy: String::new(),
            };
            let opened = timeout(OPEN_TIMEOUT, Fabric::start(kind, open, limits)).await;
            let opened = opened.map_err(late).and_then(|opened| opened);
            if let Err(error) = &opened {
                tracing::warn!(%kind, %error, remedy = error.remedy, "a fabric cannot be used");
            }
            Entry { kind, opened }
        };
        Self(join_all(drivers.into_iter().map(open)).await.into())
    }

    /// The fabric of a backend, if it is open.
    pub(crate) fn get(&self, kind: BackendKind) -> Option<&Fabric> {
        self.0.iter().find(|entry| entry.kind == kind)?.opened.as_ref().ok()
    }

    /// What peers are told of a backend; nothing when it cannot be used here.
    pub(crate) fn offer(&self, kind: BackendKind) -> Option<Offer> {
        match kind {
            BackendKind::Libfabric | BackendKind::Ucx | BackendKind::Plugin => {
                Some(Offer { backend: kind, wire: self.get(kind)?.info().wire.clone() })
            }
            BackendKind::Shm | BackendKind::Cma | BackendKind::Tcp => Some(Offer::of(kind)),
        }
    }

    /// Why a fabric cannot lead to a peer who offers `offer`, for people.
    pub(crate) fn rule_out(&self, offer: &Offer, same_host: bool) -> Option<String> {
        let Some(fabric) = self.get(offer.backend) else {
            return Some(
                self.failure(offer.backend).map_or("not asked for".into(), |error| error.what.clone()),
            );
        };
        let info = fabric.info();
        if info.wire != offer.wire {
            return Some(format!("{:?} here, {:?} there", info.wire, offer.wire));
        }
        (info.same_host && !same_host).then(|| "the peer is on another host".into())
    }

    /// Why a fabric that was asked for is not open.
    pub(crate) fn failure(&self, kind: BackendKind) -> Option<&DriverError> {
        self.0.iter().find(|entry| entry.kind == kind)?.opened.as_ref().err()
    }
}

/// The driver of a backend, where it is a fabric.
fn driver(kind: BackendKind, options: &AgentOptions) -> Option<Open> {
    match kind {
        BackendKind::Libfabric => {
            let options = options.libfabric.clone();
            Some(Box::new(move || libfabric::open(&options)))
        }
        BackendKind::Ucx => {
            let options = options.ucx.clone();
            Some(Box::new(move || ucx::open(&options)))
        }
        BackendKind::Plugin => {
            let options = options.plugin.clone();
            let none = || DriverError {
                what: "no plugin is named".into(),
                remedy: "set transfer.plugin to its shared object".into(),
            };
            Some(Box::new(move || plugin::open(&options.ok_or_else(none)?)))
        }
        BackendKind::Shm | BackendKind::Cma | BackendKind::Tcp => None,
    }
}
