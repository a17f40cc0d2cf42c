//! Chooses the path to a peer and keeps the session made over it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_config::{Epoch, WorkerId};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use twox_hash::XxHash3_64;

use super::server::Server;
use super::{AgentOptions, BackendKind, ConnectError};
use crate::backend::handshake::Route;
use crate::backend::shm::link::{Access, ShmLink};
use crate::backend::tcp::link::TcpLink;
use crate::backend::{Fault, Link, Pair};
use crate::session::{PathInfo, Session};
use crate::stats::Counters;
use crate::wire::Metadata;

/// One session per peer and backend avoided; the lock of a place is held while it is being filled.
type Place = Arc<tokio::sync::Mutex<Option<Session>>>;

/// The connecting half of an agent.
pub(crate) struct Dialer {
    options: AgentOptions,
    host: u128,
    counters: Arc<Counters>,
    /// Runs what listens on connections.
    tasks: TaskTracker,
    own: Mutex<Own>,
}

/// What belongs to one life of this worker.
struct Own {
    epoch: Epoch,
    sessions: HashMap<(WorkerId, Option<BackendKind>), Place>,
    /// Closes the sessions of this life.
    ended: CancellationToken,
}

impl Dialer {
    pub(crate) fn new(options: AgentOptions, server: &Server) -> Self {
        let own = Own { epoch: Epoch(0), sessions: HashMap::new(), ended: CancellationToken::new() };
        let (counters, tasks) = (Arc::clone(&server.counters), server.tasks.clone());
        Self { options, host: host_id(), counters, tasks, own: Mutex::new(own) }
    }

    /// Enters a life of this worker: peers would refuse sessions of the last one.
    pub(crate) fn enter(&self, epoch: Epoch) {
        let mut own = self.own();
        own.ended.cancel();
        *own = Own { epoch, sessions: HashMap::new(), ended: CancellationToken::new() };
    }

    pub(crate) fn close(&self) {
        let mut own = self.own();
        own.ended.cancel();
        own.sessions.clear();
    }

    pub(crate) fn forget(&self, peer: &WorkerId) {
        self.own().sessions.retain(|(worker, _), _| worker != peer);
    }

    pub(crate) fn sessions(&self) -> Vec<Session> {
        let own = self.own();
        // A place that is locked is being filled: its session does not exist yet.
        let open = own.sessions.values().filter_map(|place| place.try_lock().ok()?.clone());
        open.filter(Session::is_usable).collect()
    }

    pub(crate) async fn connect(
        &self,
        peer: &WorkerId,
        epoch: Epoch,
        metadata: &[u8],
        avoid: Option<BackendKind>,
    ) -> Result<Session, ConnectError> {
        let metadata = Metadata::decode(metadata)
            .map_err(|source| ConnectError::Metadata { worker: peer.clone(), source })?;
        let (place, from_epoch, ended) = {
            let mut own = self.own();
            let place = Arc::clone(own.sessions.entry((peer.clone(), avoid)).or_default());
            (place, own.epoch, own.ended.clone())
        };
        let mut place = place.lock().await;
        let fits = |session: &&Session| session.epoch() == epoch && session.is_usable();
        if let Some(session) = place.as_ref().filter(fits) {
            return Ok(session.clone());
        }
        let pair = Pair {
            from: self.options.worker.clone(),
            from_epoch,
            to: peer.clone(),
            epoch,
            incarnation: metadata.incarnation,
        };
        let route = Route {
            address: metadata.address,
            auth: self.options.auth.clone(),
            counters: Arc::clone(&self.counters),
            tasks: self.tasks.clone(),
            ended: ended.clone(),
        };
        let (link, path) = self.choose(&pair, &metadata, &route, avoid).await?;
        let counters = Arc::clone(&self.counters);
        let session = Session::new(pair, path, link, self.options.integrity, counters, ended.child_token());
        *place = Some(session.clone());
        Ok(session)
    }

    /// Tries the backends in this side's order; the first that works is the path.
    async fn choose(
        &self,
        pair: &Pair,
        metadata: &Metadata,
        route: &Route,
        avoid: Option<BackendKind>,
    ) -> Result<(Link, PathInfo), ConnectError> {
        let mut rejected: Vec<String> = Vec::new();
        for backend in self.options.backends.iter().copied() {
            if let Some(reason) = self.rule_out(backend, metadata, avoid) {
                rejected.push(format!("{backend}: {reason}"));
                continue;
            }
            match self.open(backend, pair, route).await {
                Ok(link) => {
                    let reason = [vec![format!("{backend}: {}", why(backend))], rejected].concat().join("; ");
                    return Ok((link, PathInfo { backend, reason }));
                }
                Err(Fault::Stale(current)) => {
                    return Err(ConnectError::Stale { worker: pair.to.clone(), asked: pair.epoch, current });
                }
                // A refusal by name holds on every path.
                Err(Fault::Refused(refusal)) if backend == BackendKind::Tcp => {
                    return Err(ConnectError::Refused { worker: pair.to.clone(), refusal });
                }
                Err(Fault::Refused(refusal)) => rejected.push(format!("{backend}: {refusal}")),
                Err(Fault::Link(error)) => rejected.push(format!("{backend}: {}", chain(&error))),
            }
        }
        Err(ConnectError::Link { worker: pair.to.clone(), tried: rejected.join("; ") })
    }

    fn rule_out(
        &self,
        backend: BackendKind,
        peer: &Metadata,
        avoid: Option<BackendKind>,
    ) -> Option<&'static str> {
        if avoid == Some(backend) {
            return Some("avoided");
        }
        if peer.offer(backend).is_none() {
            return Some("not offered by the peer");
        }
        match backend {
            BackendKind::Shm | BackendKind::Cma if peer.host != self.host => {
                Some("the peer is on another host")
            }
            BackendKind::Shm | BackendKind::Cma | BackendKind::Tcp => None,
            BackendKind::Libfabric | BackendKind::Ucx | BackendKind::Plugin => Some("not part of this build"),
        }
    }

    async fn open(&self, backend: BackendKind, pair: &Pair, route: &Route) -> Result<Link, Fault> {
        let pair = pair.clone();
        match backend {
            BackendKind::Shm => ShmLink::open(pair, Access::Map).await.map(Link::Shm),
            BackendKind::Cma => ShmLink::open(pair, Access::Copy).await.map(Link::Shm),
            BackendKind::Tcp => TcpLink::open(pair, route.clone(), self.options.streams).await.map(Link::Tcp),
            BackendKind::Libfabric | BackendKind::Ucx | BackendKind::Plugin => {
                Err(Fault::Refused(crate::error::Refusal::Unavailable))
            }
        }
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn why(backend: BackendKind) -> &'static str {
    match backend {
        BackendKind::Shm => "same host, the peer's memory is mapped",
        BackendKind::Cma => "same host, the kernel copies from the peer's memory",
        BackendKind::Libfabric | BackendKind::Ucx | BackendKind::Plugin => "both have the same fabric",
        BackendKind::Tcp => "reached by address",
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Equal for processes under one kernel that was booted once; 0 where the system does not tell.
pub(crate) fn host_id() -> u128 {
    let Ok(boot) = std::fs::read("/proc/sys/kernel/random/boot_id") else { return 0 };
    u128::from(XxHash3_64::oneshot(&boot)) << 64 | u128::from(XxHash3_64::oneshot_with_seed(1, &boot))
}

pub(crate) fn random_u128() -> io::Result<u128> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u128::from_le_bytes(bytes))
}
