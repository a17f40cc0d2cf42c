use baton_config::Role;
use futures_util::StreamExt;
use tokio_util::task::TaskTracker;

use super::*;
use crate::record::WorkerState;
use crate::registry::worker_key;
use crate::store::embedded::{Embedded, EmbeddedOptions};
use crate::store::overtaken::Overtaken;
use crate::store::{Op, Txn};

async fn store(tasks: &TaskTracker) -> Overtaken {
    Overtaken::new(Embedded::start(EmbeddedOptions::default(), tasks).await.unwrap())
}

/// The registering write of a life with that metadata.
fn life(name: &str, transfer: &str, lease: Option<LeaseId>) -> Op {
    let record = WorkerRecord {
        worker: name.parse().unwrap(),
        epoch: Epoch(0),
        pool: "decode".parse().unwrap(),
        role: Role::Decode,
        model: "tiny".to_owned(),
        engine: "reference".to_owned(),
        kv: None,
        address: "127.0.0.1:1".to_owned(),
        server: None,
        transfer: transfer.into(),
        state: WorkerState::Ready,
        pid: 1,
    };
    let stored = StoredWorker { record, incarnation: "1".repeat(32) };
    Op::Put { key: key(name), value: serde_json::to_vec(&stored).unwrap().into(), lease }
}

fn key(name: &str) -> String {
    worker_key(&name.parse().unwrap())
}

fn end(name: &str) -> Op {
    Op::Delete { key: key(name) }
}

async fn write(store: &dyn Store, ops: Vec<Op>) -> Revision {
    store.txn(Txn { compares: vec![], ops }).await.unwrap().revision
}

/// What the mirror tells those who follow it, from `since` on.
fn told(mirror: &Mirror, since: Revision) -> Vec<(Revision, Vec<Change>)> {
    let (lines, _) = mirror.lines(since, usize::MAX, true).unwrap();
    let line = |bytes: Bytes| match serde_json::from_slice(&bytes).unwrap() {
        WatchLine::Changes { revision, changes } => (revision, changes),
        other => panic!("{other:?}"),
    };
    lines.into_iter().map(line).collect()
}

fn lives(mirror: &Mirror) -> BTreeMap<String, Epoch> {
    mirror.fleet().workers.values().map(|w| (w.worker.to_string(), w.epoch)).collect()
}

#[tokio::test]
async fn what_happens_between_two_pages_is_neither_missed_nor_undone() {
    let tasks = TaskTracker::new();
    let store = store(&tasks).await;
    for name in ["a", "b", "c"] {
        write(&store, vec![life(name, "one", None)]).await;
    }
    let begin = store.list("", None, 1).await.unwrap().revision;
    let other = store.store.clone();
    store.after_page(async move {
        write(&other, vec![end("a")]).await;
        write(&other, vec![life("b", "two", None), end("c")]).await;
        write(&other, vec![life("b", "three", None), life("c", "two", None)]).await;
    });
    let mirror = Mirror::new(&[]);
    mirror.list(&store).await.unwrap();
    let newest = Epoch(begin + 3);
    assert_eq!(mirror.position().1, begin, "what came after the first page is still to be heard of");
    let mut watch = store.watch("", begin);
    for revision in begin + 1..=begin + 3 {
        mirror.apply(watch.next().await.unwrap().unwrap());
        assert_eq!(mirror.position().1, revision);
        let expected = [("b", newest), ("c", newest)].map(|(name, epoch)| (name.to_owned(), epoch));
        assert_eq!(lives(&mirror), expected.into(), "at {revision}: nobody lives twice or goes back");
    }
}

#[tokio::test]
async fn a_life_that_follows_another_without_a_gap_is_told_whole() {
    let tasks = TaskTracker::new();
    let store = store(&tasks).await;
    let mirror = Mirror::new(&[]);
    let begin = write(&store, vec![life("a", "one", None)]).await;
    mirror.list(&store).await.unwrap();
    write(&store, vec![life("a", "two", None)]).await;
    mirror.apply(store.watch("", begin).next().await.unwrap().unwrap());
    let [(revision, changes)] = &told(&mirror, begin)[..] else { panic!("one line") };
    let [Change::Put { worker }] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!((worker.epoch, &*worker.transfer), (Epoch(*revision), "two"));
}

#[tokio::test]
async fn a_history_is_bounded_read_once_and_whoever_falls_out_of_it_is_told() {
    let mirror = Mirror::new(&[]);
    let metadata = "x".repeat(100_000);
    let Op::Put { key, value, .. } = life("a", &metadata, None) else { panic!("a put") };
    let put = |revision| {
        let (key, value) = (key.clone(), value.clone());
        let kv = KeyValue { key, value, create_revision: 1, mod_revision: revision, lease: None };
        Batch { revision, events: vec![Event::Put(kv)] }
    };
    for revision in 1..=400 {
        mirror.apply(put(revision));
    }
    let (oldest, kept) = {
        let state = mirror.lock();
        assert_eq!(state.lines_bytes, state.lines.iter().map(Line::len).sum::<usize>());
        (state.oldest, state.lines_bytes)
    };
    assert!(kept <= LINES_MAX_BYTES && kept + 2 * metadata.len() > LINES_MAX_BYTES, "{kept} bytes");
    assert_eq!(mirror.lines(oldest - 1, 7, true), Err(Forgotten { revision: 400 }));
    let (mut since, mut read) = (oldest, Vec::new());
    while since < 400 {
        let (lines, upto) = mirror.lines(since, 7, true).unwrap();
        assert!(lines.len() <= 7 && upto > since);
        read.extend(lines);
        since = upto;
    }
    let revisions = read.iter().map(|line| match serde_json::from_slice(line).unwrap() {
        WatchLine::Changes { revision, .. } => revision,
        other => panic!("{other:?}"),
    });
    assert_eq!(revisions.collect::<Vec<_>>(), (oldest + 1..=400).collect::<Vec<_>>());
}

#[tokio::test]
async fn followers_of_a_store_that_went_back_list_again() {
    let tasks = TaskTracker::new();
    let (backup, store) = (store(&tasks).await, store(&tasks).await);
    let mirror = Mirror::new(&[]);
    let since = write(&store, vec![life("a", "", None)]).await;
    mirror.list(&store).await.unwrap();
    assert_eq!(mirror.lines(since, 1, true), Ok((vec![], since)));
    mirror.list(&backup).await.unwrap();
    let now = mirror.position().1;
    assert!(now < since);
    assert_eq!(mirror.lines(since, 1, true), Err(Forgotten { revision: now }), "not: nothing new, for ever");
}

#[tokio::test(start_paused = true)]
async fn doubt_outlives_the_listing_that_ends_an_outage() {
    let tasks = TaskTracker::new();
    let store = store(&tasks).await;
    let ttl = Duration::from_secs(10);
    let mirror = Mirror::new(&[]).with_lease_ttl(ttl);
    mirror.list(&store).await.unwrap();
    assert!(!mirror.settling() && mirror.following(), "at the start nobody was waited for");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let silent = StoreHealth { last_ok: Some(ttl / 2), ..store.health() };
    mirror.lock().lose(&silent);
    assert!(mirror.settling() && !mirror.following(), "away since the store was last heard");
    mirror.list(&store).await.unwrap();
    tokio::time::sleep(ttl - Duration::from_millis(1)).await;
    assert!(mirror.settling() && mirror.following());
    tokio::time::sleep(Duration::from_millis(2)).await;
    assert!(!mirror.settling());
    mirror.lock().lose(&StoreHealth { last_ok: Some(ttl / 2 - Duration::from_millis(1)), ..silent });
    mirror.list(&store).await.unwrap();
    assert!(!mirror.settling(), "a moment costs nobody its lease");
}

#[tokio::test]
async fn whoever_left_and_came_back_can_die_and_deaths_are_counted_over_listings() {
    let tasks = TaskTracker::new();
    let store = store(&tasks).await;
    let lease = store.grant(Duration::from_secs(60)).await.unwrap().id;
    let goodbye = Op::Put { key: GOODBYE_KEY.to_owned(), value: b"a".as_slice().into(), lease: None };
    write(&store, vec![goodbye]).await;
    write(&store, vec![life("a", "", Some(lease)), life("b", "", Some(lease))]).await;
    let mirror = Mirror::new(&[]);
    mirror.list(&store).await.unwrap();
    let since = mirror.position().1;
    store.revoke(lease).await.unwrap();
    mirror.apply(store.watch("", since).next().await.unwrap().unwrap());
    let [(_, changes)] = &told(&mirror, since)[..] else { panic!("one line") };
    assert!(
        changes.iter().all(|change| matches!(change, Change::Delete { expired: true, .. })),
        "{changes:?}"
    );
    mirror.list(&store).await.unwrap();
    assert_eq!((mirror.expired(), lives(&mirror).len()), (2, 0));
}
