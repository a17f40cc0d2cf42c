//! The fabrics of an agent: which of those asked for could be opened, and why the others could not.

use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::FabricLimits;
use super::batch::Batch;
use super::driver::{DriverError, Opened};
use super::thread::Fabric;
use crate::agent::{AgentOptions, BackendKind};
use crate::backend::{libfabric, plugin, ucx};
use crate::wire::Offer;

/// How long a library may take to look for its devices. libfabric takes seconds on a busy machine; a backend that is
/// late is not offered.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Opens a driver, as often as it must be opened.
pub(crate) type Open = Arc<dyn Fn() -> Result<Opened, DriverError> + Send + Sync>;

/// Makes the answer to a request that came over a fabric.
pub(crate) type Answer = dyn Fn(BackendKind, &[u8]) -> Option<Arc<Batch>> + Send + Sync;

/// The fabrics of an agent. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Fabrics(Arc<[Entry]>);

struct Entry {
    kind: BackendKind,
    open: Open,
    limits: FabricLimits,
    current: RwLock<Result<Fabric, DriverError>>,
    /// Held while the driver is closed and opened again.
    restarting: tokio::sync::Mutex<()>,
    /// Answers peers' requests.
    answer: OnceLock<Arc<Answer>>,
}

impl Entry {
    fn current(&self) -> Result<Fabric, DriverError> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, now: Result<Fabric, DriverError>) {
        if let Ok(fabric) = &now {
            self.answer_on(fabric);
        }
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = now;
    }

    fn answer_on(&self, fabric: &Fabric) {
        if let Some(answer) = self.answer.get().cloned() {
            let kind = self.kind;
            fabric.answer_with(Arc::new(move |request| answer(kind, request)));
        }
    }

    async fn start(&self) -> Result<Fabric, DriverError> {
        let kind = self.kind;
        let late = |_| DriverError {
            what: format!("{kind} was not open after {} s", OPEN_TIMEOUT.as_secs()),
            remedy: "try `baton doctor`: the machine may have been too busy".to_owned(),
        };
        let open = Arc::clone(&self.open);
        let started = timeout(OPEN_TIMEOUT, Fabric::start(kind, move || open(), self.limits)).await;
        let started = started.map_err(late).and_then(|started| started);
        if let Err(error) = &started {
            tracing::warn!(%kind, %error, remedy = error.remedy, "a fabric cannot be used");
        }
        started
    }
}

impl Fabrics {
    /// Opens those that `options` ask for, all at once.
    pub(crate) async fn open(options: &AgentOptions) -> Self {
        let asked = options.backends.iter().filter_map(|kind| Some((*kind, driver(*kind, options)?)));
        Self::open_with(asked.collect(), FabricLimits::of(options)).await
    }

    pub(crate) async fn open_with(drivers: Vec<(BackendKind, Open)>, limits: FabricLimits) -> Self {
        let start = |(kind, open): (BackendKind, Open)| async move {
            let unopened = Err(DriverError { what: "it is being opened".into(), remedy: String::new() });
            let restarting = tokio::sync::Mutex::default();
            let answer = OnceLock::new();
            let entry = Entry { kind, open, limits, current: RwLock::new(unopened), restarting, answer };
            let started = entry.start().await;
            entry.set(started);
            entry
        };
        Self(join_all(drivers.into_iter().map(start)).await.into())
    }

    /// Has requests of peers answered, on the progress threads: `answer` must not block. Only the first is taken.
    pub(crate) fn answer_with(&self, answer: &Arc<Answer>) {
        for entry in self.0.iter() {
            let _ = entry.answer.set(Arc::clone(answer));
            if let Ok(fabric) = entry.current() {
                entry.answer_on(&fabric);
            }
        }
    }

    fn entry(&self, kind: BackendKind) -> Option<&Entry> {
        self.0.iter().find(|entry| entry.kind == kind)
    }

    /// The fabric of a backend, if it is open.
    pub(crate) fn get(&self, kind: BackendKind) -> Option<Fabric> {
        self.entry(kind)?.current().ok().filter(Fabric::is_open)
    }

    /// Why a fabric that was asked for is not open, for people.
    pub(crate) fn missing(&self, kind: BackendKind) -> Option<String> {
        self.entry(kind)?.current().err().map(|error| error.what)
    }

    /// Closes `fabric`, so that no peer reaches any memory through it, and has it opened again by a task of `tasks`,
    /// unless the agent stops. Its peers lose their connections and make new ones.
    pub(crate) async fn restart(&self, fabric: &Fabric, tasks: &TaskTracker, stop: &CancellationToken) {
        fabric.shut().await;
        if stop.is_cancelled() {
            return;
        }
        let (all, kind) = (self.clone(), fabric.kind());
        tasks.spawn(async move {
            let Some(entry) = all.entry(kind) else { return };
            let _restarting = entry.restarting.lock().await;
            // Somebody else may have done so meanwhile.
            if !entry.current().is_ok_and(|current| current.is_open()) {
                entry.set(entry.start().await);
            }
        });
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

    /// Why a fabric cannot lead to a peer who offers `offer`, for people. One that is being opened again may, later.
    pub(crate) fn rule_out(&self, offer: &Offer, same_host: bool) -> Option<String> {
        let fabric = self.get(offer.backend)?;
        let info = fabric.info();
        if info.wire != offer.wire {
            return Some(format!("{:?} here, {:?} there", info.wire, offer.wire));
        }
        (info.same_host && !same_host).then(|| "the peer is on another host".into())
    }
}

/// The driver of a backend, where it is a fabric.
fn driver(kind: BackendKind, options: &AgentOptions) -> Option<Open> {
    match kind {
        BackendKind::Libfabric => {
            let options = options.libfabric.clone();
            Some(Arc::new(move || libfabric::open(&options).map(Opened::Movable)))
        }
        BackendKind::Ucx => {
            let options = options.ucx.clone();
            Some(Arc::new(move || ucx::open(&options).map(Opened::Movable)))
        }
        BackendKind::Plugin => {
            let options = options.plugin.clone();
            let none = || DriverError {
                what: "no plugin is named".into(),
                remedy: "set transfer.plugin to its shared object".into(),
            };
            Some(Arc::new(move || plugin::open(options.as_ref().ok_or_else(none)?).map(Opened::Bound)))
        }
        BackendKind::Shm | BackendKind::Cma | BackendKind::Tcp => None,
    }
}
