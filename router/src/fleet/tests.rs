use std::time::Duration;

use baton_config::prefix::BlockHash;
use baton_config::protocol::{BlockCounts, PathStatus, WorkerStatus};
use baton_config::{Epoch, Role};
use tokio::time::Instant;

use super::*;
use crate::index::PrefixIndex;

fn member(name: &str, epoch: u64) -> Member {
    Member {
        worker: name.parse().unwrap(),
        epoch: Epoch(epoch),
        pool: "pool".parse().unwrap(),
        role: Role::Decode,
        address: "127.0.0.1:9".to_owned(),
        server: None,
        kv: None,
        ready: true,
    }
}

fn status(running: u32, waiting: u32, tokens: u64) -> WorkerStatus {
    WorkerStatus {
        worker: "d".parse().unwrap(),
        epoch: Some(Epoch(1)),
        pool: "pool".parse().unwrap(),
        role: Role::Decode,
        state: "ready".to_owned(),
        pid: 1,
        process: None,
        requests_running: running,
        requests_waiting: waiting,
        prefill_tokens_pending: tokens,
        kv_blocks: BlockCounts { free: 50, valid: 30, shared: 20, ..BlockCounts::default() },
        kv_evictable: 0,
        prefilled_tokens: 0,
        prompt_tokens: None,
        prefill_tokens_per_s: Some(1234.0),
        itl_ms: Some(f64::NAN),
        paths: vec![PathStatus {
            prefill: "p".parse().unwrap(),
            decode: "d".parse().unwrap(),
            backend: "tcp".to_owned(),
            reason: String::new(),
            gb_per_s: Some(2.0),
            latency_us: None,
            fell_back: None,
        }],
        last_error: None,
        last_error_ago_ms: None,
        age_ms: None,
        server_gone_ms: None,
        drain: None,
    }
}

#[test]
fn load_is_the_report_corrected_by_what_happened_since() {
    let worker = Worker::new(member("d", 1)).unwrap();
    assert_eq!(worker.load().requests, 0);
    let mut first = worker.occupy(100);
    let second = worker.occupy(50);
    assert_eq!((worker.load().requests, worker.load().prefill_tokens), (2, 150));
    // The worker reports three requests: our two and one of another router.
    worker.health().reported(status(2, 1, 200));
    let load = worker.load();
    assert_eq!((load.requests, load.prefill_tokens), (3, 200));
    assert_eq!((load.prefill_tokens_per_s, load.itl_ms, load.kv_used), (Some(1234.0), None, 0.3));
    let third = worker.occupy(10);
    first.prefilled();
    assert_eq!((worker.load().requests, worker.load().prefill_tokens), (4, 110));
    drop((first, second, third));
    assert_eq!((worker.load().requests, worker.load().prefill_tokens), (1, 50));
    let from = |name: &str| worker.ways(Instant::now()).link(&Worker::new(member(name, 1)).unwrap()).unwrap();
    assert_eq!(from("p").bytes_per_s, Some(2e9));
    assert_eq!(from("q").bytes_per_s, None);
}

#[tokio::test(start_paused = true)]
async fn a_worker_in_another_life_than_the_view_says_is_avoided() {
    let worker = Worker::new(member("d", 1)).unwrap();
    let is_well = || worker.standing(Instant::now(), Duration::from_secs(3)).well;
    for (epoch, well) in
        [(Some(Epoch(1)), true), (None, false), (Some(Epoch(2)), false), (Some(Epoch(1)), true)]
    {
        assert_eq!(worker.health().reported(WorkerStatus { epoch, ..status(0, 0, 0) }), well, "{epoch:?}");
        assert_eq!(is_well(), well, "{epoch:?}");
    }
    // One that registered a moment ago may not have heard of it: it is asked once more.
    let worker = Worker::new(member("e", 1)).unwrap();
    for well in [true, false] {
        assert!(!worker.health().reported(WorkerStatus { epoch: None, ..status(0, 0, 0) }));
        assert_eq!(worker.standing(Instant::now(), Duration::from_secs(3)).well, well);
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_is_avoided_until_it_answers_or_time_passes() {
    let worker = Worker::new(member("d", 1)).unwrap();
    worker.mark_down(Instant::now());
    assert!(worker.is_down(Instant::now()));
    worker.health().reported(status(0, 0, 0));
    assert!(!worker.is_down(Instant::now()), "it answered");
    worker.mark_down(Instant::now());
    tokio::time::advance(Duration::from_secs(3)).await;
    assert!(!worker.is_down(Instant::now()), "try again");
    let since = Instant::now();
    worker.health().silent(since);
    tokio::time::advance(Duration::from_secs(4)).await;
    worker.health().silent(Instant::now());
    assert_eq!(worker.silent_for(Instant::now()), Duration::from_secs(4), "counted from the first miss");
    worker.health().reported(status(0, 0, 0));
    assert_eq!(worker.silent_for(Instant::now()), Duration::ZERO);
}

struct Kept {
    fleet: Arc<Fleet>,
    feed: watch::Sender<Arc<Roster>>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

fn keep(members: Vec<Member>) -> Kept {
    let (feed, receiver) = watch::channel(Arc::new(Roster { members, age: Duration::ZERO }));
    let (fleet, tracker, stop) = (
        Arc::new(Fleet::new(PrefixIndex::with_capacity(1000))),
        TaskTracker::new(),
        CancellationToken::new(),
    );
    let keeper = Keeper {
        fleet: Arc::clone(&fleet),
        feed: receiver,
        caller: Caller::new(Duration::from_millis(100)),
        metrics: Arc::new(Metrics::new().unwrap()),
        tracker: tracker.clone(),
        stop: stop.clone(),
    };
    tracker.spawn(keeper.run());
    Kept { fleet, feed, tracker, stop }
}

impl Kept {
    async fn next(&self, members: Vec<Member>) -> Arc<[Arc<Worker>]> {
        let mut changes = self.fleet.changes();
        self.feed.send_replace(Arc::new(Roster { members, age: Duration::ZERO }));
        tokio::time::timeout(Duration::from_secs(5), changes.changed()).await.unwrap().unwrap();
        self.fleet.workers()
    }

    /// Waits until so many tasks are left.
    async fn comes_to(&self, tasks: usize) {
        let reached = async {
            while self.tracker.len() != tasks {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let reached = tokio::time::timeout(Duration::from_secs(20), reached).await;
        assert!(reached.is_ok(), "{} tasks, not {tasks}", self.tracker.len());
    }

    async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(Duration::from_secs(5), self.tracker.wait()).await.expect("all pollers end");
    }
}

#[tokio::test]
async fn a_life_keeps_its_books_and_a_new_one_starts_afresh() {
    let kept = keep(Vec::new());
    let before = kept.next(vec![member("d", 1), member("e", 1)]).await;
    let tasks = kept.tracker.len();
    let _busy = before[0].occupy(10);
    let mut draining = member("d", 1);
    draining.ready = false;
    let after = kept.next(vec![draining, member("e", 1)]).await;
    assert_eq!((after[0].load().requests, after[0].member.ready), (1, false), "same life, changed record");
    assert!(Arc::ptr_eq(&before[1], &after[1]), "untouched");
    let reborn = kept.next(vec![member("d", 2), member("e", 1)]).await;
    assert_eq!(reborn[0].load().requests, 0, "another life");
    let mut elsewhere = member("e", 1);
    elsewhere.address = "127.0.0.1:10".to_owned();
    let moved = kept.next(vec![member("d", 2), elsewhere]).await;
    assert_eq!(moved[1].authority().as_str(), "127.0.0.1:10", "nobody is called where it was");
    kept.comes_to(tasks).await;
    let left = kept.next(vec![member("e", 1)]).await;
    assert_eq!(left.len(), 1);
    assert!(kept.fleet.can_serve());
    kept.end().await;
}

#[test]
fn what_was_sent_to_a_worker_that_is_gone_is_forgotten_and_nothing_more_noted() {
    let index = PrefixIndex::with_capacity(1000);
    let worker = Worker::new(member("d", 1)).unwrap();
    let blocks = || {
        while index.maintain() {}
        index.stats().blocks
    };
    let chain = [BlockHash(1), BlockHash(2)];
    let send = || worker.known().sent(&index, Instant::now(), worker.known().namespace(), (&chain, 2, 2));
    send();
    assert_eq!(blocks(), 2);
    worker.known().forget(&index);
    assert_eq!(blocks(), 0);
    // It was chosen before its end was heard of.
    send();
    assert_eq!(blocks(), 0);
}

#[tokio::test]
async fn a_worker_with_a_bad_address_is_left_out() {
    let kept = keep(Vec::new());
    let mut bad = member("d", 1);
    bad.address = "not an address".to_owned();
    let workers = kept.next(vec![bad, member("e", 1)]).await;
    assert_eq!(workers.len(), 1);
    kept.end().await;
}

#[tokio::test]
async fn a_feed_that_ends_leaves_the_last_view_in_use() {
    let kept = keep(vec![member("d", 1)]);
    let mut changes = kept.fleet.changes();
    if kept.fleet.workers().is_empty() {
        changes.changed().await.unwrap();
    }
    let Kept { fleet, feed, tracker, stop } = kept;
    drop(feed);
    tokio::task::yield_now().await;
    assert_eq!(fleet.workers().len(), 1);
    stop.cancel();
    tracker.close();
    tracker.wait().await;
}

#[tokio::test(start_paused = true)]
async fn a_pair_whose_handoffs_fail_is_avoided_for_a_while() {
    let (decode, prefill) = (Worker::new(member("d", 1)).unwrap(), Worker::new(member("p", 1)).unwrap());
    let other = Worker::new(member("q", 1)).unwrap();
    assert!(!decode.handed_off(&prefill, false, Instant::now()), "one may be chance");
    assert!(!decode.handed_off(&prefill, true, Instant::now()));
    assert!(!decode.handed_off(&prefill, false, Instant::now()), "a good one between counts");
    assert!(decode.handed_off(&prefill, false, Instant::now()));
    assert_eq!(decode.ways(Instant::now()).link(&prefill), None);
    assert!(decode.ways(Instant::now()).link(&other).is_some(), "other pairs go on");
    let reborn = Worker::new(member("p", 2)).unwrap();
    assert!(decode.ways(Instant::now()).link(&reborn).is_some(), "another life, another pair");
    tokio::time::advance(Duration::from_secs(31)).await;
    assert!(decode.ways(Instant::now()).link(&prefill).is_some(), "tried again");
    assert!(decode.handed_off(&prefill, false, Instant::now()), "and avoided at once when it fails again");
}

#[test]
fn predictions_that_are_wrong_are_corrected() {
    let worker = Worker::new(member("d", 1)).unwrap();
    assert!((worker.load().slowness - 1.0).abs() < 1e-9);
    for _ in 0..60 {
        worker.calibrate(0.1, 0.25);
    }
    assert!((worker.load().slowness - 2.5).abs() < 0.05, "{}", worker.load().slowness);
    for _ in 0..200 {
        worker.calibrate(0.1, 1e9);
        worker.calibrate(0.0001, 1e-9);
    }
    assert!(worker.load().slowness <= 4.0, "bounded");
}
