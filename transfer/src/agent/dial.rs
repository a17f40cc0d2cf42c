//! Keeps the sessions with peers and the paths they share.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_config::{Epoch, WorkerId};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use twox_hash::XxHash3_64;

use super::paths::{Opener, Paths};
use super::server::Server;
use super::{AgentOptions, BackendKind, ConnectError};
use crate::backend::Pair;
use crate::backend::handshake::Route;
use crate::memory::HostMemory;
use crate::session::Session;
use crate::stats::Counters;
use crate::wire::Metadata;

/// What there is of one peer; the lock is held while a session is being made.
#[derive(Default)]
struct Place {
    paths: Option<Arc<Paths>>,
    sessions: HashMap<Option<BackendKind>, Session>,
}

/// The connecting half of an agent.
pub(crate) struct Dialer {
    opener: Arc<Opener>,
    counters: Arc<Counters>,
    /// Runs what listens on connections and surveys paths.
    tasks: TaskTracker,
    own: Mutex<Own>,
}

/// What belongs to one life of this worker.
struct Own {
    epoch: Epoch,
    places: HashMap<WorkerId, Arc<tokio::sync::Mutex<Place>>>,
    /// Closes the sessions of this life.
    ended: CancellationToken,
}

impl Own {
    fn new(epoch: Epoch) -> Self {
        Self { epoch, places: HashMap::new(), ended: CancellationToken::new() }
    }
}

impl Dialer {
    pub(crate) fn new(options: AgentOptions, server: &Server, probe: HostMemory) -> Self {
        let (counters, tasks) = (Arc::clone(&server.counters), server.tasks.clone());
        let fabrics = server.fabrics.clone();
        let opener = Arc::new(Opener { options, host: host_id(), probe, fabrics });
        Self { opener, counters, tasks, own: Mutex::new(Own::new(Epoch(0))) }
    }

    /// Enters a life of this worker: peers would refuse sessions of the last one.
    pub(crate) fn enter(&self, epoch: Epoch) {
        let mut own = self.own();
        own.ended.cancel();
        *own = Own::new(epoch);
    }

    pub(crate) fn close(&self) {
        let mut own = self.own();
        own.ended.cancel();
        own.places.clear();
    }

    pub(crate) fn forget(&self, peer: &WorkerId) {
        let forgotten = self.own().places.remove(peer);
        // Not under the lock: it may unmap much.
        drop(forgotten);
    }

    pub(crate) fn retain(&self, life: impl Fn(&WorkerId) -> Option<Epoch>) {
        let is_over =
            |peer: &WorkerId, place: &tokio::sync::Mutex<Place>| match (life(peer), place.try_lock()) {
                (None, _) => true,
                // A session is being made, with which life is not known yet.
                (Some(_), Err(_)) => false,
                (Some(live), Ok(place)) => place.paths.as_ref().is_some_and(|paths| paths.pair.epoch != live),
            };
        let forgotten: Vec<_> = self.own().places.extract_if(|peer, place| is_over(peer, place)).collect();
        drop(forgotten);
    }

    pub(crate) fn sessions(&self) -> Vec<Session> {
        let own = self.own();
        let mut open = Vec::new();
        for place in own.places.values() {
            // A place that is locked is being filled: its newest session does not exist yet.
            let Ok(place) = place.try_lock() else { continue };
            open.extend(place.sessions.values().filter(|session| session.is_usable()).cloned());
        }
        open
    }

    pub(crate) async fn connect(
        &self,
        peer: &WorkerId,
        epoch: Epoch,
        metadata: &[u8],
        avoid: Option<BackendKind>,
    ) -> Result<Session, ConnectError> {
        let metadata = Metadata::decode(metadata).map_err(|source| {
            self.counters.broken(source);
            ConnectError::Metadata { worker: peer.clone(), source }
        })?;
        let (place, from_epoch, ended) = {
            let mut own = self.own();
            let place = Arc::clone(own.places.entry(peer.clone()).or_default());
            (place, own.epoch, own.ended.clone())
        };
        let mut place = place.lock().await;
        let fits =
            |paths: &Arc<Paths>| paths.pair.epoch == epoch && paths.pair.incarnation == metadata.incarnation;
        let same = place.paths.clone().filter(fits);
        if same.is_some()
            && let Some(session) = place.sessions.get(&avoid).filter(|session| session.is_usable())
        {
            return Ok(session.clone());
        }
        let paths = match same.filter(|paths| paths.is_usable(avoid)) {
            Some(paths) => paths,
            None => {
                let pair = Pair {
                    from: self.opener.options.worker.clone(),
                    from_epoch,
                    to: peer.clone(),
                    epoch,
                    incarnation: metadata.incarnation,
                };
                let route = self.route(&metadata, &ended);
                Arc::new(Paths::new(pair, route, Arc::clone(&self.opener), &metadata))
            }
        };
        paths.bring_up(avoid).await?;
        if !place.paths.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, &paths)) {
            *place = Place { paths: Some(Arc::clone(&paths)), sessions: HashMap::new() };
        }
        let options = &self.opener.options;
        let counters = Arc::clone(&self.counters);
        let session = Session::new(paths, avoid, options, counters, ended.child_token());
        place.sessions.insert(avoid, session.clone());
        Ok(session)
    }

    fn route(&self, peer: &Metadata, ended: &CancellationToken) -> Route {
        Route {
            address: peer.address,
            auth: self.opener.options.auth.clone(),
            counters: Arc::clone(&self.counters),
            tasks: self.tasks.clone(),
            ended: ended.clone(),
        }
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
