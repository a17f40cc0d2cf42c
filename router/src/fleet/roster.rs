//! The members of the fleet, and where their list comes from.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use baton_conductor::client::{Client, View};
use baton_conductor::record::WorkerState;
use baton_config::{Epoch, KvGeometry, PoolName, Role, WorkerId};
use tokio::sync::watch;

/// How often the age of the view is brought up to date while nothing else changes.
const AGE_EVERY: Duration = Duration::from_secs(1);

/// A worker as the conductor lists it.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its name.
    pub worker: WorkerId,
    /// Its life.
    pub epoch: Epoch,
    /// Its pool.
    pub pool: PoolName,
    /// What it does.
    pub role: Role,
    /// `host:port` of its HTTP API.
    pub address: String,
    /// `http://HOST:PORT` of the server that requests are passed on to, where the worker stands beside one.
    pub server: Option<String>,
    /// Geometry of its KV blocks, where it has any of its own.
    pub kv: Option<KvGeometry>,
    /// Whether it may be given new requests: ready and not asked to drain.
    pub ready: bool,
}

/// The members of the fleet at one moment.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Roster {
    /// All known workers.
    pub members: Vec<Member>,
    /// How long ago the conductor confirmed this.
    pub age: Duration,
}

/// Where rosters come from.
pub type RosterFeed = watch::Receiver<Arc<Roster>>;

impl Roster {
    /// The members that a view of the conductor lists.
    fn of_view(view: &View) -> Self {
        let member = |record: &baton_conductor::record::WorkerRecord| Member {
            worker: record.worker.clone(),
            epoch: record.epoch,
            pool: record.pool.clone(),
            role: record.role,
            address: record.address.clone(),
            server: record.server.clone(),
            kv: record.kv,
            ready: record.state == WorkerState::Ready && !view.drain.contains(&record.worker),
        };
        Self { members: view.workers.values().map(|record| member(record)).collect(), age: view.age() }
    }
}

/// A feed of what the conductors list, and the task that keeps it up to date until dropped.
pub(crate) fn follow(client: &Client) -> (RosterFeed, impl Future<Output = ()> + Send + use<>) {
    let mut views = client.changed();
    let (send, feed) = watch::channel(Arc::new(Roster::of_view(&views.borrow())));
    let follower = async move {
        loop {
            let changed = tokio::time::timeout(AGE_EVERY, views.changed()).await;
            if matches!(changed, Ok(Err(_))) {
                return;
            }
            let roster = Roster::of_view(&views.borrow_and_update());
            send.send_replace(Arc::new(roster));
        }
    };
    (feed, follower)
}
