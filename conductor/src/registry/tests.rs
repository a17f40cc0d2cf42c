//! What happens between the reads and the write of another.

use baton_config::Role;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::*;
use crate::store::embedded::{Embedded, EmbeddedOptions};
use crate::store::overtaken::Overtaken;

const ONE: &str = "11111111111111111111111111111111";
const TWO: &str = "22222222222222222222222222222222";

/// Two conductors on one store; the second one may be overtaken by the first.
struct World {
    first: Arc<Registry>,
    second: Registry,
    overtaken: Arc<Overtaken>,
    _stop: DropGuard,
}

impl World {
    async fn new() -> Self {
        let tasks = TaskTracker::new();
        let store = Embedded::start(EmbeddedOptions::default(), &tasks).await.unwrap();
        let mirror = Arc::new(Mirror::new(&[]));
        mirror.list(&store).await.unwrap();
        let stop = CancellationToken::new();
        let follow = mirror.clone().follow(Arc::new(store.clone()));
        tasks.spawn(stop.clone().run_until_cancelled_owned(follow));
        let overtaken = Arc::new(Overtaken::new(store.clone()));
        let registry = |store: Arc<dyn Store>| {
            let pool = PoolOptions { name: pool(), role: Role::Decode, replicas: 1, min: 1, max: 8 };
            Registry::new(store, mirror.clone(), vec![pool], Rules::default(), Duration::from_secs(10))
        };
        let (first, second) = (Arc::new(registry(Arc::new(store))), registry(overtaken.clone()));
        Self { first, second, overtaken, _stop: stop.drop_guard() }
    }

    /// Before the next write by the second conductor, this happens.
    fn before(&self, what: impl Future<Output = ()> + Send + 'static) {
        self.overtaken.before_txn(what);
    }

    /// The life that is asked to drain, if any.
    async fn drains(&self) -> Option<String> {
        let kv = self.overtaken.store.get(&drain_key(&worker())).await.unwrap()?;
        Some(serde_json::from_slice::<StoredDrain>(&kv.value).unwrap().incarnation)
    }
}

fn worker() -> WorkerId {
    "w".parse().unwrap()
}

fn pool() -> PoolName {
    "decode".parse().unwrap()
}

/// A process at an address where nobody answers, so that the next one there gets the name.
fn process(incarnation: &str) -> Register {
    Register {
        worker: worker(),
        incarnation: incarnation.to_owned(),
        pool: pool(),
        role: Role::Decode,
        model: "tiny".to_owned(),
        engine: "reference".to_owned(),
        kv: None,
        address: "127.0.0.1:1".to_owned(),
        server: None,
        transfer: String::new(),
        state: WorkerState::Ready,
        pid: 1,
    }
}

#[tokio::test]
async fn who_takes_a_name_over_is_not_asked_to_drain_in_place_of_its_holder() {
    let world = World::new().await;
    world.first.register(process(ONE)).await.unwrap();
    let first = world.first.clone();
    world.before(async move {
        first.drain(&worker()).await.unwrap();
    });
    let registered = world.second.register(process(TWO)).await.unwrap();
    assert!(!registered.drain);
    assert_eq!(world.drains().await, None, "the wish went with whom it was about");
    let kept = Keepalive { epoch: registered.epoch, seq: 1, state: WorkerState::Ready, load: None };
    assert!(!world.second.keep_alive(&worker(), kept).await.unwrap().drain);
}

#[tokio::test]
async fn a_wish_to_drain_names_the_life_that_has_the_name_when_it_is_written() {
    let world = World::new().await;
    world.first.register(process(ONE)).await.unwrap();
    let first = world.first.clone();
    world.before(async move {
        first.register(process(TWO)).await.unwrap();
    });
    let drained = world.second.drain(&worker()).await.unwrap();
    assert_eq!(world.drains().await.as_deref(), Some(TWO));
    let registered = world.first.register(process(TWO)).await.unwrap();
    assert!(registered.drain && registered.epoch > drained.epoch, "also after it has lost its lease");
}

#[tokio::test]
async fn a_wish_to_drain_stays_with_its_process() {
    let world = World::new().await;
    world.first.register(process(ONE)).await.unwrap();
    world.first.drain(&worker()).await.unwrap();
    assert!(world.first.register(process(ONE)).await.unwrap().drain, "in all of its lives");
    let next = world.first.register(process(TWO)).await.unwrap();
    assert!(!next.drain);
    assert_eq!(world.drains().await, None);
    let kept = Keepalive { epoch: next.epoch, seq: 1, state: WorkerState::Ready, load: None };
    assert!(!world.first.keep_alive(&worker(), kept).await.unwrap().drain);
}

#[tokio::test]
async fn a_state_is_never_written_into_the_life_of_a_successor() {
    let world = World::new().await;
    let old = world.second.register(process(ONE)).await.unwrap();
    // The name is taken over, and its former lease has not ended yet.
    let store = world.overtaken.store.clone();
    world.before(async move {
        let kv = store.get(&worker_key(&worker())).await.unwrap().unwrap();
        let mut stored = decode(&kv).unwrap();
        (stored.record.epoch, stored.incarnation) = (Epoch(0), TWO.to_owned());
        let ops = vec![put(kv.key, &stored, None).unwrap()];
        store.txn(Txn { compares: vec![], ops }).await.unwrap();
    });
    let drains = Keepalive { epoch: old.epoch, seq: 1, state: WorkerState::Draining, load: None };
    let refused = world.second.keep_alive(&worker(), drains).await.unwrap_err();
    assert!(matches!(refused, RegistryError::StaleEpoch { given, .. } if given == old.epoch), "{refused}");
    let kv = world.overtaken.store.get(&worker_key(&worker())).await.unwrap().unwrap();
    let stored = decode(&kv).unwrap();
    assert_eq!((stored.record.state, stored.incarnation.as_str()), (WorkerState::Ready, TWO));
}

#[tokio::test]
async fn one_lease_is_left_of_a_name_that_others_fought_for_and_none_of_one_that_left() {
    let world = World::new().await;
    let told = |epoch| Keepalive { epoch, seq: 1, state: WorkerState::Joining, load: None };
    let old = world.second.register(process(ONE)).await.unwrap();
    let first = world.first.clone();
    world.before(async move {
        first.register(process(TWO)).await.unwrap();
    });
    let new = world.second.register(process(ONE)).await.unwrap();
    let kv = world.overtaken.store.get(&worker_key(&worker())).await.unwrap().unwrap();
    assert_eq!(world.overtaken.leases().await, kv.lease.into_iter().collect::<Vec<_>>());
    world.second.keep_alive(&worker(), told(new.epoch)).await.unwrap();
    assert!(world.second.keep_alive(&worker(), told(old.epoch)).await.is_err());
    let kv = world.overtaken.store.get(&worker_key(&worker())).await.unwrap().unwrap();
    assert_eq!(
        world.overtaken.leases().await,
        kv.lease.into_iter().collect::<Vec<_>>(),
        "also with a new state"
    );
    world.second.deregister(&worker(), new.epoch).await.unwrap();
    assert_eq!(world.overtaken.leases().await, []);
    world.second.forget_absent();
    assert!(world.second.told().is_empty(), "nor is anything remembered of it");
}
