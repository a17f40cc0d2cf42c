use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::timeout;

use super::*;
use crate::store::embedded::{Embedded, EmbeddedOptions};
use crate::store::{Op, Txn};

const PATIENCE: Duration = Duration::from_secs(60);

/// A store with its mirror, and a runner whose term the test sets.
struct World {
    store: Arc<dyn Store>,
    mirror: Arc<Mirror>,
    term: watch::Sender<Option<Fence>>,
    runner: Runner,
    tasks: TaskTracker,
}

impl World {
    async fn new() -> Self {
        let tasks = TaskTracker::new();
        let embedded = Embedded::start(EmbeddedOptions::default(), &tasks).await.unwrap();
        let store: Arc<dyn Store> = Arc::new(embedded);
        let mirror = Arc::new(Mirror::new(&[]));
        mirror.list(&*store).await.unwrap();
        let stop = CancellationToken::new();
        tasks.spawn(stop.clone().run_until_cancelled_owned(mirror.clone().follow(store.clone())));
        let (term, reader) = watch::channel(None);
        let runner = Runner {
            store: store.clone(),
            mirror: mirror.clone(),
            term: reader,
            tally: Arc::default(),
            stop,
        };
        Self { store, mirror, term, runner, tasks }
    }

    async fn put(&self, key: &str) -> Revision {
        let op = Op::Put { key: key.to_owned(), value: b"1".as_slice().into(), lease: None };
        let reply = self.store.txn(Txn { compares: vec![], ops: vec![op] }).await.unwrap();
        self.mirror.reached(reply.revision, PATIENCE).await;
        reply.revision
    }

    /// Creates the leader's key anew and begins the term it stands for.
    async fn lead(&self) -> Fence {
        let delete = Op::Delete { key: LEADER_KEY.to_owned() };
        self.store.txn(Txn { compares: vec![], ops: vec![delete] }).await.unwrap();
        let fence = Fence::new(self.put(LEADER_KEY).await);
        self.term.send_replace(Some(fence));
        fence
    }

    fn counts(&self, name: &str) -> Counts {
        self.runner.tally.counts()[name]
    }
}

#[derive(Clone, Copy)]
enum Manner {
    Works,
    Fails,
    Hangs,
    Panics,
}

/// Counts its turns, then does what its manner says.
struct Probe {
    name: &'static str,
    manner: Manner,
    period: Duration,
    turns: Arc<watch::Sender<u64>>,
}

impl Probe {
    fn new(name: &'static str, manner: Manner) -> (Self, watch::Receiver<u64>) {
        let (turns, seen) = watch::channel(0);
        (Self { name, manner, period: Duration::from_secs(5), turns: Arc::new(turns) }, seen)
    }
}

impl Reconciler for Probe {
    fn name(&self) -> &'static str {
        self.name
    }

    fn period(&self) -> Duration {
        self.period
    }

    fn reconcile<'a>(&'a mut self, _: Turn<'a>) -> BoxFuture<'a, Result<(), RegistryError>> {
        Box::pin(async move {
            self.turns.send_modify(|turns| *turns += 1);
            match self.manner {
                Manner::Works => Ok(()),
                Manner::Fails => Err(RegistryError::Contended { key: "k".to_owned() }),
                Manner::Hangs => std::future::pending().await,
                Manner::Panics => panic!("on purpose"),
            }
        })
    }
}

async fn until(turns: &mut watch::Receiver<u64>, count: u64) {
    timeout(PATIENCE, turns.wait_for(|turns| *turns >= count)).await.expect("in time").unwrap();
}

#[tokio::test(start_paused = true)]
async fn turns_are_taken_on_change_and_on_time_and_only_while_leading() {
    let world = World::new().await;
    let (probe, mut turns) = Probe::new("probe", Manner::Works);
    world.runner.start(&world.tasks, probe);
    world.put("workers/x").await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(*turns.borrow(), 0, "only while leading");

    world.lead().await;
    until(&mut turns, 1).await;
    let began = Instant::now();
    world.put("workers/y").await;
    until(&mut turns, 2).await;
    assert!(began.elapsed() <= TURN_GAP, "on change, {:?}", began.elapsed());
    let began = Instant::now();
    until(&mut turns, 3).await;
    assert!(began.elapsed() <= Duration::from_secs(5), "on time, {:?}", began.elapsed());

    for i in 0..100 {
        world.put(&format!("workers/{i}")).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(*turns.borrow() <= 6, "many changes are few turns, not {}", *turns.borrow());

    world.term.send_replace(None);
    let before = *turns.borrow();
    world.put("workers/z").await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(*turns.borrow(), before, "no turn after the term");
    assert_eq!(world.counts("probe"), Counts { turns: before, failed: 0 });
}

#[tokio::test(start_paused = true)]
async fn one_that_fails_hangs_or_panics_stops_no_other() {
    let world = World::new().await;
    let manners = [("fails", Manner::Fails), ("hangs", Manner::Hangs), ("panics", Manner::Panics)];
    let mut turns = Vec::new();
    for (name, manner) in manners.into_iter().chain([("works", Manner::Works)]) {
        let (probe, seen) = Probe::new(name, manner);
        world.runner.start(&world.tasks, probe);
        turns.push(seen);
    }
    world.lead().await;
    // The one that hangs is ended each time, and begins anew like the others.
    for seen in &mut turns {
        until(seen, 3).await;
    }
    for (name, _) in manners {
        let Counts { turns, failed } = world.counts(name);
        assert!(failed >= 2 && failed <= turns, "{name}: {failed} of {turns}");
    }
    assert_eq!(world.counts("works").failed, 0);
}

#[tokio::test(start_paused = true)]
async fn a_turn_ends_with_the_term() {
    struct Guarded(Arc<AtomicU64>, watch::Sender<u64>);
    struct OnDrop(Arc<AtomicU64>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    impl Reconciler for Guarded {
        fn name(&self) -> &'static str {
            "guarded"
        }
        fn period(&self) -> Duration {
            Duration::from_secs(3600)
        }
        fn reconcile<'a>(&'a mut self, _: Turn<'a>) -> BoxFuture<'a, Result<(), RegistryError>> {
            let guard = OnDrop(self.0.clone());
            self.1.send_modify(|turns| *turns += 1);
            Box::pin(async move {
                let _guard = guard;
                std::future::pending().await
            })
        }
    }
    let world = World::new().await;
    let ended = Arc::new(AtomicU64::new(0));
    let (turns, mut seen) = watch::channel(0);
    world.runner.start(&world.tasks, Guarded(ended.clone(), turns));
    world.lead().await;
    until(&mut seen, 1).await;
    let deposed = Instant::now();
    // The next term is this conductor's again: a new turn begins, and the old one is gone.
    world.lead().await;
    until(&mut seen, 2).await;
    assert!(deposed.elapsed() < TURN_DEADLINE, "{:?}", deposed.elapsed());
    assert_eq!(ended.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn leftovers_are_removed_and_not_by_a_deposed_leader() {
    let world = World::new().await;
    let lease = world.store.grant(Duration::from_secs(100_000)).await.unwrap().id;
    let put = |key: &str, value: &str, lease| Op::Put {
        key: key.to_owned(),
        value: value.as_bytes().into(),
        lease,
    };
    let worker = |name: &str| {
        format!(
            r#"{{"record":{{"worker":"{name}","epoch":0,"pool":"p","role":"both","model":"m","engine":"sim","kv":null,
            "address":"127.0.0.1:1","transfer":"","state":"ready","pid":1}},"incarnation":"i"}}"#
        )
    };
    let ops = vec![
        put("workers/held", &worker("held"), Some(lease)),
        put("workers/loose", &worker("loose"), None),
        put("intents/drain/held", r#"{"incarnation":"i"}"#, None),
        put("intents/drain/away", r#"{"incarnation":"i"}"#, None),
    ];
    let reply = world.store.txn(Txn { compares: vec![], ops }).await.unwrap();
    world.mirror.reached(reply.revision, PATIENCE).await;
    assert_eq!(world.mirror.unleased().len(), 1);

    let start = |world: &World| {
        world.runner.start(&world.tasks, DrainWishes::default());
        world.runner.start(&world.tasks, UnleasedWorkers { mirror: world.mirror.clone() });
    };
    start(&world);
    // A fence of a term that is over: turns are taken, nothing changes.
    let old = world.lead().await;
    world.put(LEADER_KEY).await;
    let delete = Op::Delete { key: LEADER_KEY.to_owned() };
    let txn = Txn { compares: vec![old.compare()], ops: vec![delete] };
    assert!(world.store.txn(txn).await.unwrap().succeeded, "a rewritten key keeps its fence");
    world.term.send_replace(Some(Fence::new(old.revision() + 1)));
    tokio::time::sleep(Duration::from_secs(1300)).await;
    assert!(world.counts("drain_wishes").turns > 60, "{:?}", world.counts("drain_wishes"));
    let keys = |page: crate::store::Page| page.items.into_iter().map(|kv| kv.key).collect::<Vec<_>>();
    let listed = keys(world.store.list("", None, 10).await.unwrap());
    assert!(listed.contains(&"intents/drain/away".to_owned()), "{listed:?}");

    world.lead().await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    let listed = keys(world.store.list("", None, 10).await.unwrap());
    assert_eq!(listed, ["intents/drain/held", "leader", "workers/held"]);
}

/// A worker as it is stored.
fn worker(name: &str, lease: Option<crate::store::LeaseId>) -> Op {
    let value = format!(
        r#"{{"record":{{"worker":"{name}","epoch":0,"pool":"p","role":"both","model":"m","engine":"sim","kv":null,
        "address":"127.0.0.1:1","transfer":"","state":"ready","pid":1}},"incarnation":"i"}}"#
    );
    Op::Put { key: format!("workers/{name}"), value: value.into_bytes().into(), lease }
}

#[tokio::test(start_paused = true)]
async fn whoever_came_back_in_between_is_still_to_drain() {
    let world = World::new().await;
    let fence = world.lead().await;
    world.put("intents/drain/w").await;
    let mut wishes = DrainWishes::default();
    let there = async |there: bool| {
        let op = if there { worker("w", None) } else { Op::Delete { key: "workers/w".to_owned() } };
        let reply = world.store.txn(Txn { compares: vec![], ops: vec![op] }).await.unwrap();
        world.mirror.reached(reply.revision, PATIENCE).await;
    };
    for (present, minutes) in [(false, 9), (true, 1), (false, 9)] {
        there(present).await;
        for _ in 0..=minutes {
            let fleet = world.mirror.fleet();
            let turn = Turn { now: Instant::now(), fleet: &fleet, store: &*world.store, fence };
            wishes.reconcile(turn).await.unwrap();
            tokio::time::sleep(Duration::from_secs(54)).await;
        }
    }
    assert!(world.store.get("intents/drain/w").await.unwrap().is_some(), "it was away for nine minutes");
}

#[tokio::test(start_paused = true)]
async fn who_registers_while_its_leftovers_are_removed_keeps_them() {
    let tasks = TaskTracker::new();
    let embedded = Embedded::start(EmbeddedOptions::default(), &tasks).await.unwrap();
    let store = Arc::new(crate::store::overtaken::Overtaken::new(embedded.clone()));
    let leader = Op::Put { key: LEADER_KEY.to_owned(), value: b"x".as_slice().into(), lease: None };
    let wish = Op::Put { key: "intents/drain/v".to_owned(), value: b"{}".as_slice().into(), lease: None };
    let ops = vec![leader, worker("w", None), wish];
    let fence = Fence::new(store.txn(Txn { compares: vec![], ops }).await.unwrap().revision);
    let mirror = Arc::new(Mirror::new(&[]));
    mirror.list(&*store).await.unwrap();
    assert_eq!(mirror.unleased().len(), 1);
    let lease = store.grant(Duration::from_secs(100_000)).await.unwrap().id;
    let register = |name: &'static str| {
        let embedded = embedded.clone();
        store.before_txn(async move {
            let ops = vec![worker(name, Some(lease))];
            embedded.txn(Txn { compares: vec![], ops }).await.unwrap();
        });
    };
    register("w");
    let fleet = mirror.fleet();
    let turn = Turn { now: Instant::now(), fleet: &fleet, store: &*store, fence };
    UnleasedWorkers { mirror: mirror.clone() }.reconcile(turn).await.unwrap();
    assert!(store.get("workers/w").await.unwrap().is_some(), "it is held anew");

    let mut wishes = DrainWishes::default();
    for name in ["nobody", "v"] {
        let turn = Turn { now: Instant::now(), fleet: &fleet, store: &*store, fence };
        if name == "v" {
            register(name);
        }
        wishes.reconcile(turn).await.unwrap();
        tokio::time::sleep(Duration::from_secs(601)).await;
    }
    assert!(store.get("intents/drain/v").await.unwrap().is_some(), "it came back after all");
}
