//! What every store must do: functions over any [`Store`], each under its own prefix so that one server serves all.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{Instant, timeout};

use super::{
    Batch, Compare, Event, KeyValue, LeaseId, Op, PAGE_MAX_KEYS, Revision, Store, StoreError, Txn, TxnReply,
    VALUE_MAX_BYTES, WatchError,
};

const PATIENCE: Duration = Duration::from_secs(20);

fn value(text: &str) -> Arc<[u8]> {
    Arc::from(text.as_bytes())
}

fn put(key: &str, text: &str, lease: Option<LeaseId>) -> Op {
    Op::Put { key: key.to_owned(), value: value(text), lease }
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.to_owned() }
}

fn created(key: &str, revision: Revision) -> Compare {
    Compare::Created { key: key.to_owned(), revision }
}

fn modified(key: &str, revision: Revision) -> Compare {
    Compare::Modified { key: key.to_owned(), revision }
}

async fn write(store: &dyn Store, compares: Vec<Compare>, ops: Vec<Op>) -> TxnReply {
    store.txn(Txn { compares, ops }).await.expect("a well-formed transaction")
}

async fn read(store: &dyn Store, key: &str) -> Option<KeyValue> {
    store.get(key).await.expect("reads work")
}

async fn revision(store: &dyn Store) -> Revision {
    store.list("no-such-prefix/", None, 1).await.expect("lists work").revision
}

/// Waits on a condition with a deadline.
async fn until_gone(store: &dyn Store, key: &str) {
    let deadline = Instant::now() + PATIENCE;
    while read(store, key).await.is_some() {
        assert!(Instant::now() < deadline, "{key} is still there");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) async fn transactions_compare_and_write_at_one_revision(store: &dyn Store) {
    let first =
        write(store, vec![created("txn/a", 0)], vec![put("txn/a", "1", None), put("txn/b", "1", None)]).await;
    assert!(first.succeeded);
    let again = write(store, vec![created("txn/a", 0)], vec![put("txn/a", "2", None)]).await;
    assert!(!again.succeeded, "create-if-absent of a key that is there");
    let a = read(store, "txn/a").await.expect("written");
    let b = read(store, "txn/b").await.expect("written");
    assert_eq!((&*a.value, a.create_revision, a.mod_revision), (&b"1"[..], first.revision, first.revision));
    assert_eq!(b.mod_revision, first.revision, "one transaction, one revision");

    let second = write(store, vec![modified("txn/a", a.mod_revision)], vec![put("txn/a", "3", None)]).await;
    assert!(second.succeeded && second.revision > first.revision);
    let stale = write(store, vec![modified("txn/a", a.mod_revision)], vec![put("txn/a", "4", None)]).await;
    assert!(!stale.succeeded, "guarded by an old mod revision");
    let a = read(store, "txn/a").await.expect("written");
    assert_eq!((&*a.value, a.create_revision, a.mod_revision), (&b"3"[..], first.revision, second.revision));

    let mixed =
        write(store, vec![created("txn/a", first.revision), modified("txn/b", 1)], vec![delete("txn/a")])
            .await;
    assert!(!mixed.succeeded, "all conditions must hold");
    let third =
        write(store, vec![created("txn/a", first.revision)], vec![delete("txn/a"), put("txn/b", "9", None)])
            .await;
    assert!(third.succeeded);
    assert!(read(store, "txn/a").await.is_none());
    let reborn = write(store, vec![modified("txn/a", 0)], vec![put("txn/a", "5", None)]).await;
    let a = read(store, "txn/a").await.expect("written");
    assert_eq!(a.create_revision, reborn.revision, "a key created anew has a new create revision");
    let nothing = write(store, vec![], vec![delete("txn/never")]).await;
    assert_eq!(nothing.revision, reborn.revision, "deleting nothing changes nothing");
}

pub(crate) async fn limits_are_refused(store: &dyn Store) {
    let at = revision(store).await;
    let big: Arc<[u8]> = vec![b'x'; VALUE_MAX_BYTES + 1].into();
    let cases = [
        vec![Op::Put { key: "limit/a".to_owned(), value: big, lease: None }],
        vec![put("", "x", None)],
        vec![put(&"k".repeat(300), "x", None)],
        vec![put("limit/a", "1", None), delete("limit/a")],
        (0..65).map(|i| put(&format!("limit/{i}"), "x", None)).collect(),
    ];
    for ops in cases {
        let refused = store.txn(Txn { compares: vec![], ops }).await;
        assert!(matches!(refused, Err(StoreError::Invalid(_))), "{refused:?}");
    }
    let full: Arc<[u8]> = vec![b'x'; VALUE_MAX_BYTES].into();
    let op = Op::Put { key: "limit/full".to_owned(), value: full.clone(), lease: None };
    write(store, vec![], vec![op]).await;
    assert_eq!(read(store, "limit/full").await.expect("written").value, full);
    assert_eq!(revision(store).await, at + 1, "refused writes take no revision");
}

pub(crate) async fn listings_come_in_pages(store: &dyn Store) {
    for chunk in (0..130).collect::<Vec<_>>().chunks(50) {
        write(store, vec![], chunk.iter().map(|i| put(&format!("page/{i:03}"), "x", None)).collect()).await;
    }
    write(store, vec![], vec![put("page0", "outside", None), put("pagd/z", "outside", None)]).await;
    let mut seen = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.list("page/", after.as_deref(), 40).await.expect("lists work");
        assert!(page.items.len() <= 40);
        seen.extend(page.items.into_iter().map(|kv| kv.key));
        if !page.more {
            break;
        }
        after = seen.last().cloned();
    }
    assert_eq!(seen, (0..130).map(|i| format!("page/{i:03}")).collect::<Vec<_>>());
}

pub(crate) async fn leases_end_and_take_their_keys(store: &dyn Store) {
    let lease = store.grant(Duration::from_secs(2)).await.expect("granted");
    assert!(lease.ttl >= Duration::from_secs(2), "{lease:?}");
    let other = store.grant(Duration::from_secs(120)).await.expect("granted");
    let keys = vec![
        put("lease/a", "1", Some(lease.id)),
        put("lease/b", "1", Some(lease.id)),
        put("lease/moved", "1", Some(lease.id)),
        put("lease/free", "1", None),
    ];
    write(store, vec![], keys).await;
    let at = write(store, vec![], vec![put("lease/moved", "2", Some(other.id))]).await.revision;
    assert_eq!(read(store, "lease/a").await.expect("written").lease, Some(lease.id));

    // Kept alive for longer than its ttl.
    let granted = Instant::now();
    while granted.elapsed() < lease.ttl + Duration::from_secs(1) {
        assert!(store.keep_alive(lease.id).await.expect("answers").is_some(), "kept alive in time");
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    assert!(read(store, "lease/a").await.is_some());

    // Left alone, it ends, with all its keys at one revision.
    let mut watch = store.watch("lease/", at);
    let batch = timeout(PATIENCE, watch.next()).await.expect("in time").expect("open").expect("good");
    let gone: Vec<Event> = ["lease/a", "lease/b"].map(|key| Event::Delete { key: key.to_owned() }).into();
    assert_eq!(batch.events, gone);
    assert_eq!(store.keep_alive(lease.id).await, Ok(None), "an ended lease does not come back");
    assert!(read(store, "lease/moved").await.is_some() && read(store, "lease/free").await.is_some());
    let late = store.txn(Txn { compares: vec![], ops: vec![put("lease/c", "1", Some(lease.id))] }).await;
    assert_eq!(late, Err(StoreError::LeaseNotFound(lease.id)));

    store.revoke(other.id).await.expect("revoked");
    until_gone(store, "lease/moved").await;
    store.revoke(other.id).await.expect("revoking twice is no error");
}

pub(crate) async fn watches_miss_nothing(store: &dyn Store) {
    let start = revision(store).await;
    let lease = store.grant(Duration::from_secs(60)).await.expect("granted");
    let one =
        write(store, vec![], vec![put("watch/a", "1", None), put("watch/b", "1", Some(lease.id))]).await;
    write(store, vec![], vec![put("elsewhere/a", "1", None)]).await;
    let two = write(store, vec![], vec![delete("watch/a"), put("watch/c", "1", None)]).await;

    let mut watch = store.watch("watch/", start);
    let mut next = async || -> Batch {
        timeout(PATIENCE, watch.next()).await.expect("in time").expect("open").expect("good")
    };
    let batch = next().await;
    assert_eq!(batch.revision, one.revision);
    assert!(
        matches!(&batch.events[..], [Event::Put(a), Event::Put(b)] if a.key == "watch/a" && b.lease == Some(lease.id)),
        "{batch:?}"
    );
    let batch = next().await;
    assert_eq!(batch.revision, two.revision, "changes elsewhere are not told");
    assert!(
        matches!(&batch.events[..], [Event::Delete { key }, Event::Put(c)] if key == "watch/a" && c.key == "watch/c"),
        "{batch:?}"
    );
    // Now what happens while it waits.
    let three = write(store, vec![], vec![put("watch/d", "1", None)]).await;
    assert_eq!(next().await.revision, three.revision);
    store.revoke(lease.id).await.expect("revoked");
    assert_eq!(next().await.events, vec![Event::Delete { key: "watch/b".to_owned() }]);

    // Resumed in the middle: exactly the rest.
    let mut resumed = store.watch("watch/", one.revision);
    let batch = timeout(PATIENCE, resumed.next()).await.expect("in time").expect("open").expect("good");
    assert_eq!(batch.revision, two.revision);
}

pub(crate) async fn watches_from_the_future_are_refused(store: &dyn Store) {
    let ahead = revision(store).await + 1_000_000;
    let mut watch = store.watch("watch/", ahead);
    let first = timeout(PATIENCE, watch.next()).await.expect("in time");
    assert!(matches!(first, Some(Err(WatchError::Future { asked, .. })) if asked == ahead), "{first:?}");
    assert!(timeout(PATIENCE, watch.next()).await.expect("in time").is_none(), "the stream has ended");
}

/// `compact` makes the store forget its history so far.
pub(crate) async fn compaction_is_told(store: &dyn Store, compact: impl AsyncFnOnce(&dyn Store)) {
    let start = write(store, vec![], vec![put("compact/a", "1", None)]).await.revision;
    compact(store).await;
    let mut watch = store.watch("compact/", start);
    let first = timeout(PATIENCE, watch.next()).await.expect("in time").expect("open");
    let Err(WatchError::Compacted { oldest }) = first else { panic!("{first:?} instead of compacted") };
    assert!(oldest > start);
    // The way out: list, then watch from there.
    let page = store.list("compact/", None, 10).await.expect("lists work");
    assert!(page.items.iter().any(|kv| kv.key == "compact/a"), "{page:?}");
    let mut watch = store.watch("compact/", page.revision);
    let next = write(store, vec![], vec![put("compact/a", "2", None)]).await;
    let batch = timeout(PATIENCE, watch.next()).await.expect("in time").expect("open").expect("good");
    assert_eq!(batch.revision, next.revision);
}

pub(crate) async fn everything_of_a_revision_comes_together(store: &dyn Store) {
    let start = revision(store).await;
    let lease = store.grant(Duration::from_secs(60)).await.expect("granted");
    let ops = (0..64).map(|i| put(&format!("together/a{i:02}"), "1", Some(lease.id))).collect();
    let one = write(store, vec![], ops).await;
    let ops = (0..64).map(|i| put(&format!("together/b{i:02}"), "1", Some(lease.id))).collect();
    let two = write(store, vec![], ops).await;
    let mut watch = store.watch("together/", start);
    let mut next = async || -> Batch {
        timeout(PATIENCE, watch.next()).await.expect("in time").expect("open").expect("good")
    };
    for expected in [one.revision, two.revision] {
        let batch = next().await;
        assert_eq!((batch.revision, batch.events.len()), (expected, 64));
    }
    store.revoke(lease.id).await.expect("revoked");
    let batch = next().await;
    let keys: Vec<String> =
        ["a", "b"].iter().flat_map(|part| (0..64).map(move |i| format!("together/{part}{i:02}"))).collect();
    let gone: Vec<Event> = keys.into_iter().map(|key| Event::Delete { key }).collect();
    assert_eq!(batch.events, gone, "a lease ends at one revision, told in the order of its keys");
}

pub(crate) async fn large_values_are_listed_and_watched(store: &dyn Store) {
    let start = revision(store).await;
    let full: Arc<[u8]> = vec![b'x'; VALUE_MAX_BYTES].into();
    for i in 0..48 {
        let op = Op::Put { key: format!("large/{i:02}"), value: full.clone(), lease: None };
        write(store, vec![], vec![op]).await;
    }
    // 6 MiB at once.
    let page = store.list("large/", None, PAGE_MAX_KEYS).await.expect("lists work");
    assert_eq!((page.items.len(), page.more), (48, false));
    assert!(page.items.iter().all(|kv| kv.value == full));
    let mut watch = store.watch("large/", start);
    for i in 0..48 {
        let batch = timeout(PATIENCE, watch.next()).await.expect("in time").expect("open").expect("good");
        let Event::Put(kv) = &batch.events[0] else { panic!("{batch:?}") };
        assert_eq!((kv.key.as_str(), kv.value.len()), (format!("large/{i:02}").as_str(), VALUE_MAX_BYTES));
    }
    let ops = (0..48).map(|i| delete(&format!("large/{i:02}"))).collect();
    write(store, vec![], ops).await;
}

pub(crate) async fn a_lease_tells_its_time(store: &dyn Store) {
    let lease = store.grant(Duration::from_millis(30_500)).await.expect("granted");
    assert!(lease.ttl >= Duration::from_millis(30_500), "{lease:?}");
    for _ in 0..3 {
        assert_eq!(store.keep_alive(lease.id).await, Ok(Some(lease.ttl)));
    }
    let other = store.grant(Duration::from_secs(30)).await.expect("granted");
    assert_ne!(lease.id, other.id);
    store.revoke(lease.id).await.expect("revoked");
    assert_eq!(store.keep_alive(lease.id).await, Ok(None));
    assert!(store.keep_alive(other.id).await.expect("answers").is_some());
    assert_eq!(store.keep_alive(LeaseId(1)).await, Ok(None), "never granted");
    assert!(store.health().up && store.health().last_ok.is_some(), "{:?}", store.health());
}

pub(crate) async fn one_of_many_wins_a_name(store: &dyn Store) {
    let attempts = (0..32).map(|i| async move {
        let ops = vec![put("race/name", &i.to_string(), None)];
        write(store, vec![created("race/name", 0)], ops).await.succeeded.then_some(i)
    });
    let winners: Vec<i32> = futures_util::future::join_all(attempts).await.into_iter().flatten().collect();
    assert_eq!(winners.len(), 1, "{winners:?}");
    let holder = read(store, "race/name").await.expect("written");
    assert_eq!(&*holder.value, winners[0].to_string().as_bytes());
}
