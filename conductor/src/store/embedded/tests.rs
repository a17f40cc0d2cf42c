use std::path::Path;

use super::*;
use crate::store::{Compare, suite};

async fn store(tasks: &TaskTracker) -> Embedded {
    Embedded::start(EmbeddedOptions::default(), tasks).await.unwrap()
}

macro_rules! suite {
    ($($name:ident),* $(,)?) => {$(
        #[tokio::test(start_paused = true)]
        async fn $name() {
            suite::$name(&store(&TaskTracker::new()).await).await;
        }
    )*};
}

suite!(
    transactions_compare_and_write_at_one_revision,
    limits_are_refused,
    listings_come_in_pages,
    leases_end_and_take_their_keys,
    watches_miss_nothing,
    watches_from_the_future_are_refused,
    one_of_many_wins_a_name,
    everything_of_a_revision_comes_together,
    large_values_are_listed_and_watched,
    a_lease_tells_its_time,
);

fn put(key: &str, text: &str) -> Txn {
    let op = Op::Put { key: key.to_owned(), value: Arc::from(text.as_bytes()), lease: None };
    Txn { compares: vec![], ops: vec![op] }
}

#[tokio::test(start_paused = true)]
async fn compaction_is_told() {
    let store = store(&TaskTracker::new()).await;
    suite::compaction_is_told(&store, async |store: &dyn Store| {
        for i in 0..=crate::store::memory::HISTORY_MAX_REVISIONS {
            store.txn(put("fill", &i.to_string())).await.unwrap();
        }
    })
    .await;
}

async fn open(path: &Path, tasks: &TaskTracker) -> Result<Embedded, StateFileError> {
    let options = EmbeddedOptions { state_file: Some(path.to_owned()), holder: "test at :7400".to_owned() };
    Embedded::start(options, tasks).await
}

/// Ends a store as a killed process would, as far as its file goes.
async fn end(store: Embedded, tasks: TaskTracker) {
    drop(store);
    tasks.close();
    tasks.wait().await;
}

#[tokio::test]
async fn intents_and_the_order_of_revisions_survive_a_restart_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut last = 0;
    for life in 0..4 {
        let tasks = TaskTracker::new();
        let store = open(&path, &tasks).await.unwrap();
        if life > 0 {
            let kept = store.get("intents/replicas/p").await.unwrap().expect("kept");
            assert_eq!(&*kept.value, (life - 1).to_string().as_bytes());
            assert_eq!(store.get("workers/w").await.unwrap(), None, "discovery state is soft");
            assert_eq!(store.get("intents/drain/w").await.unwrap(), None, "deleted before");
        }
        for key in ["intents/replicas/p", "intents/drain/w", "workers/w"] {
            let reply = store.txn(put(key, &life.to_string())).await.unwrap();
            assert!(reply.revision > last, "{} after {last}", reply.revision);
            last = reply.revision;
        }
        let op = Op::Delete { key: "intents/drain/w".to_owned() };
        last = store.txn(Txn { compares: vec![], ops: vec![op] }).await.unwrap().revision;
        end(store, tasks).await;
    }
    // Without the file, the clock keeps the order. These lives were shorter than real ones: let it catch up.
    let deadline = Instant::now() + Duration::from_secs(5);
    while unix_micros() <= last {
        assert!(Instant::now() < deadline, "revisions ran {} us ahead of the clock", last - unix_micros());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    std::fs::remove_file(&path).unwrap();
    let store = open(&path, &TaskTracker::new()).await.unwrap();
    assert!(store.txn(put("workers/w", "x")).await.unwrap().revision > last);
}

#[tokio::test]
async fn a_second_conductor_on_the_same_file_is_refused_with_the_holder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let tasks = TaskTracker::new();
    let first = open(&path, &tasks).await.unwrap();
    let message = open(&path, &TaskTracker::new()).await.unwrap_err().to_string();
    assert!(message.contains("test at :7400") && message.contains("state"), "{message}");
    end(first, tasks).await;
    open(&path, &TaskTracker::new()).await.expect("free again");
}

#[tokio::test]
async fn what_cannot_be_kept_is_not_promised() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("inner/state");
    let store = open(&path, &TaskTracker::new()).await.unwrap();
    store.txn(put("intents/replicas/p", "1")).await.unwrap();
    std::fs::remove_dir_all(folder.path().join("inner")).unwrap();
    let refused = store.txn(put("intents/replicas/p", "2")).await;
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
    let kept = store.get("intents/replicas/p").await.unwrap().expect("still there");
    assert_eq!(&*kept.value, b"1", "a refused write is not visible");
    store.txn(put("workers/w", "1")).await.expect("soft state needs no disk");
    std::fs::create_dir(folder.path().join("inner")).unwrap();
    store.txn(put("intents/replicas/p", "3")).await.expect("the disk is back");
}

#[tokio::test]
async fn durable_keys_are_text_without_a_lease() {
    let store = store(&TaskTracker::new()).await;
    let lease = store.grant(Duration::from_secs(9)).await.unwrap();
    for (value, lease) in [(&b"\xff"[..], None), (&b"1"[..], Some(lease.id))] {
        let op = Op::Put { key: "intents/x".to_owned(), value: value.into(), lease };
        let compares = vec![Compare::Created { key: "intents/x".to_owned(), revision: 0 }];
        let refused = store.txn(Txn { compares, ops: vec![op] }).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn time_in_which_the_process_stood_still_costs_no_lease() {
    let store = store(&TaskTracker::new()).await;
    let lease = store.grant(Duration::from_secs(10)).await.unwrap();
    // The clock jumps in one step, as over a SIGSTOP: the owner gets no turn in between.
    tokio::time::advance(Duration::from_secs(30)).await;
    assert!(store.keep_alive(lease.id).await.unwrap().is_some(), "forgiven");
    let granted = Instant::now();
    while store.keep_alive(lease.id).await.unwrap().is_some() {
        assert!(granted.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_secs(12)).await;
    }
    assert!(granted.elapsed() >= Duration::from_secs(12), "in running time it ends as ever");
}

/// The ceiling that a conductor would find after a crash now.
fn ceiling(path: &Path) -> u64 {
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    StateFile::open(&copy, "a test").unwrap().1.unwrap().ceiling
}

#[tokio::test]
async fn no_revision_is_given_out_twice_though_the_clock_is_set_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let tasks = TaskTracker::new();
    // Of a life whose clock was an hour ahead.
    let ahead = unix_micros() + 3_600_000_000;
    let (file, _) = StateFile::open(&path, "a test").unwrap();
    file.write(&Durable { ceiling: ahead, intents: BTreeMap::new() }).unwrap();
    drop(file);
    let store = open(&path, &tasks).await.unwrap();
    let mut last = ahead;
    for i in 0..3 * CEILING_STEP {
        let given = store.txn(put("workers/a", &i.to_string())).await.unwrap().revision;
        assert!(given > last, "{given} after {last}");
        last = given;
        if i % 100 == 0 {
            assert!(ceiling(&path) >= given, "{given} is not covered by what is on the disk");
        }
    }
    end(store, tasks).await;
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_lease_is_told_when_it_comes() {
    let tasks = TaskTracker::new();
    let store = store(&tasks).await;
    let lease = store.grant(Duration::from_millis(100)).await.unwrap();
    let mut txn = put("workers/a", "1");
    let Op::Put { lease: hangs_on, .. } = &mut txn.ops[0] else { panic!("a put") };
    *hangs_on = Some(lease.id);
    let since = store.txn(txn).await.unwrap().revision;
    let begun = Instant::now();
    store.watch("", since).next().await.unwrap().unwrap();
    let took = begun.elapsed();
    assert!(took >= lease.ttl && took < lease.ttl + Duration::from_millis(10), "{took:?}");
}
