use std::sync::Mutex;

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use baton_config::protocol::BlockCounts;
use baton_config::{Epoch, Role, WorkerId};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

use super::*;
use crate::leader::LEADER_KEY;
use crate::reconcile::Fence;
use crate::record::WorkerRecord;
use crate::store::Store;
use crate::store::embedded::{Embedded, EmbeddedOptions};

/// A worker whose state is what the test says.
async fn worker(state: Arc<Mutex<Value>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = async |State(state): State<Arc<Mutex<Value>>>| axum::Json(state.lock().unwrap().clone());
    let app = Router::new().route("/v1/state", get(answer)).with_state(state);
    TaskTracker::new().spawn(async move { axum::serve(listener, app).await });
    address
}

fn state(epoch: u64, pending: u64) -> Value {
    let counts = BlockCounts { free: 60, valid: 10, shared: 30, ..BlockCounts::default() };
    json!({
        "epoch": epoch, "requests_running": 3, "requests_waiting": 1, "prefill_tokens_pending": pending,
        "kv_blocks": counts, "kv_evictable": 20, "prefilled_tokens": 700, "prompt_tokens": 100.0,
        "prefill_tokens_per_s": 1000.0, "itl_ms": -1.0, "something_new": { "of": "a later version" },
    })
}

fn record(name: &str, address: String, epoch: u64) -> Arc<WorkerRecord> {
    Arc::new(WorkerRecord {
        worker: name.parse().unwrap(),
        epoch: Epoch(epoch),
        pool: "prefill".parse().unwrap(),
        role: Role::Prefill,
        model: "tiny".to_owned(),
        engine: "sim".to_owned(),
        kv: None,
        server: None,
        address,
        transfer: "".into(),
        state: WorkerState::Ready,
        pid: 1,
    })
}

#[tokio::test]
async fn workers_are_asked_and_only_answers_of_this_life_count() {
    let told = Arc::new(Mutex::new(state(7, 500)));
    let address = worker(told.clone()).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = record("silent", silent.local_addr().unwrap().to_string(), 9);
    let workers = [record("w", address, 7), silent];
    let mut poller = Poller::new().unwrap();
    let begin = Instant::now();
    poller.poll(workers.iter()).await;
    assert!(begin.elapsed() < Duration::from_secs(5), "a silent worker holds up nobody for long");
    let name: WorkerId = "w".parse().unwrap();
    let sample = poller.sample(&name, Epoch(7), Instant::now()).unwrap();
    assert_eq!((sample.pending_tokens, sample.prefilled_tokens, sample.running), (500, 700, 3));
    assert_eq!(
        (sample.blocks, sample.blocks_held),
        (100, 20),
        "what is cached and unused is as good as free"
    );
    assert_eq!((sample.itl_ms, sample.prompt_tokens), (None, Some(100.0)));
    assert!(poller.sample(&"silent".parse().unwrap(), Epoch(9), Instant::now()).is_none());
    assert!(poller.sample(&name, Epoch(8), Instant::now()).is_none(), "another life");
    assert!(poller.sample(&name, Epoch(7), Instant::now() + Duration::from_secs(4)).is_none(), "stale");
    *told.lock().unwrap() = state(6, 0);
    poller.poll(workers.iter()).await;
    assert_eq!(
        poller.sample(&name, Epoch(7), Instant::now()).unwrap().pending_tokens,
        500,
        "a former life spoke"
    );
}

struct Bench {
    autoscaler: Autoscaler,
    mirror: Arc<Mirror>,
    store: Arc<Embedded>,
    board: Arc<Board>,
    fence: Fence,
}

impl Bench {
    async fn new(scale: Autoscale, tasks: &TaskTracker) -> Self {
        let options = EmbeddedOptions { state_file: None, holder: "a test".to_owned() };
        let store = Arc::new(Embedded::start(options, tasks).await.unwrap());
        let ops = vec![Op::Put { key: LEADER_KEY.to_owned(), value: b"x".as_slice().into(), lease: None }];
        let reply = store.txn(Txn { compares: vec![], ops }).await.unwrap();
        let pool =
            |name: &str, role| PoolOptions { name: name.parse().unwrap(), role, replicas: 2, min: 1, max: 8 };
        let pools = [pool("prefill", Role::Prefill), pool("decode", Role::Decode)];
        let mirror = Arc::new(Mirror::new(&pools));
        mirror.list(&*store).await.unwrap();
        let following: Arc<dyn Store> = store.clone();
        tasks.spawn(mirror.clone().follow(following));
        let autoscale = BTreeMap::from([(pools[0].name.clone(), scale)]);
        let board = Arc::new(Board::new(autoscale.keys()));
        let autoscaler =
            Autoscaler::new(&pools, &autoscale, mirror.clone(), board.clone(), Duration::ZERO).unwrap();
        Self { autoscaler, mirror, store, board, fence: Fence::new(reply.revision) }
    }

    async fn turn(&mut self) -> Result<(), RegistryError> {
        self.autoscaler.next = None;
        let fleet = self.mirror.fleet();
        let store: &dyn Store = &*self.store;
        self.autoscaler.turn(Turn { now: Instant::now(), fleet: &fleet, store, fence: self.fence }).await
    }

    fn decided(&self) -> Option<Scaled> {
        self.mirror.fleet().scale.get(&"prefill".parse::<PoolName>().unwrap()).map(|seen| seen.scaled.clone())
    }

    async fn revision(&self) -> Revision {
        self.store.list("", None, 1).await.unwrap().revision
    }

    /// The mirror has everything that was written.
    async fn settle(&self) {
        self.mirror.reached(self.revision().await, Duration::from_secs(10)).await;
    }

    fn targets(&self) -> Vec<(u32, crate::api::TargetSource)> {
        let targets = self.mirror.targets(&self.mirror.fleet());
        targets.into_iter().map(|target| (target.desired, target.source)).collect()
    }
}

#[tokio::test]
async fn decisions_are_written_once_with_the_fence_and_followed_unless_they_are_dry() {
    use crate::api::TargetSource::{Autoscaler as Decided, Document, Operator};
    let tasks = TaskTracker::new();
    let mut bench = Bench::new(Autoscale::new(Role::Prefill, 3, 8), &tasks).await;
    assert_eq!(bench.targets(), [(2, Document), (2, Document)]);
    bench.turn().await.unwrap();
    bench.settle().await;
    let first = bench.decided().expect("the pool is adopted");
    assert_eq!((first.desired, first.kind.as_str(), first.dry_run), (3, "adopted", false));
    assert_eq!(bench.targets(), [(2, Document), (3, Decided)]);
    let revision = bench.revision().await;
    for _ in 0..5 {
        bench.turn().await.unwrap();
    }
    assert_eq!(bench.revision().await, revision, "nothing changed, nothing was written");
    assert_eq!(bench.board.entries()[&"prefill".parse::<PoolName>().unwrap()].decisions["adopted"], 1);

    let ops = vec![Op::Put {
        key: "intents/replicas/prefill".to_owned(),
        value: b"5".as_slice().into(),
        lease: None,
    }];
    bench.store.txn(Txn { compares: vec![], ops }).await.unwrap();
    bench.settle().await;
    assert_eq!(bench.targets()[1], (5, Operator));
    bench.turn().await.unwrap();
    bench.settle().await;
    assert_eq!(bench.decided().map(|scaled| (scaled.desired, scaled.kind)), Some((5, "pinned".to_owned())));

    bench.board.failed(&"prefill".parse().unwrap(), "it can't".to_owned());
    bench.turn().await.unwrap();
    bench.settle().await;
    let told = bench.decided().unwrap();
    assert_eq!((told.problem.as_deref(), told.desired), (Some("it can't"), 5));

    bench.fence = Fence::new(1);
    let ops = vec![
        Op::Delete { key: "intents/replicas/prefill".to_owned() },
        Op::Delete { key: "scale/prefill".to_owned() },
    ];
    bench.store.txn(Txn { compares: vec![], ops }).await.unwrap();
    bench.settle().await;
    assert!(bench.turn().await.is_err(), "a deposed leader");
    bench.settle().await;
    assert_eq!(bench.decided(), None, "writes nothing");
}

#[tokio::test]
async fn a_dry_run_is_told_but_changes_no_target() {
    let tasks = TaskTracker::new();
    let scale = Autoscale { dry_run: true, ..Autoscale::new(Role::Prefill, 3, 8) };
    let mut bench = Bench::new(scale, &tasks).await;
    bench.turn().await.unwrap();
    bench.settle().await;
    assert_eq!(bench.decided().map(|scaled| (scaled.desired, scaled.dry_run)), Some((3, true)));
    assert_eq!(bench.targets()[1], (2, crate::api::TargetSource::Document));
}

#[tokio::test]
async fn a_dry_run_carries_out_what_an_operator_wants() {
    let tasks = TaskTracker::new();
    let scale = Autoscale { dry_run: true, ..Autoscale::new(Role::Prefill, 3, 8) };
    let mut bench = Bench::new(scale, &tasks).await;
    let key = "intents/replicas/prefill".to_owned();
    let ops = vec![Op::Put { key, value: b"5".as_slice().into(), lease: None }];
    bench.store.txn(Txn { compares: vec![], ops }).await.unwrap();
    bench.settle().await;
    bench.turn().await.unwrap();
    bench.settle().await;
    assert_eq!(bench.decided().map(|scaled| (scaled.desired, scaled.dry_run)), Some((5, false)));
}

#[tokio::test]
async fn decisions_are_known_before_the_mirror_shows_them_and_wishes_to_drain_before_they_are_done() {
    let tasks = TaskTracker::new();
    let mut bench = Bench::new(Autoscale::new(Role::Prefill, 3, 8), &tasks).await;
    let mut before = bench.mirror.fleet();
    bench.turn().await.unwrap();
    let decided = |bench: &Bench, fleet: &Fleet| {
        let inputs = bench.autoscaler.inputs(fleet);
        inputs.pools.iter().find(|pool| pool.name.as_str() == "prefill").unwrap().clone()
    };
    assert_eq!(decided(&bench, &before).decided, Some(3), "not decided twice");
    let w = record("w", "127.0.0.1:1".to_owned(), 1);
    before.workers.insert(w.worker.clone(), w.clone());
    assert_eq!(decided(&bench, &before).workers[0].state, WorkerState::Ready);
    before.drain.insert(w.worker.clone());
    assert_eq!(decided(&bench, &before).workers[0].state, WorkerState::Draining, "it takes no more requests");
}
