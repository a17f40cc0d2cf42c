use std::sync::Arc;

use super::*;

fn put(key: &str, text: &str, lease: Option<u64>) -> Op {
    Op::Put { key: key.to_owned(), value: Arc::from(text.as_bytes()), lease: lease.map(LeaseId) }
}

fn told(revision: Revision, key: &str) -> Told {
    Told { revision, event: Event::Delete { key: key.to_owned() } }
}

fn keys(batch: &Batch) -> (Revision, Vec<&str>) {
    (batch.revision, batch.events.iter().map(event_key).collect())
}

#[test]
fn a_prefix_sees_its_own_keys_only() {
    for text in ["/baton", "/baton/", "/baton//"] {
        let prefix = Prefix::new(text);
        assert_eq!(prefix.add("workers/a"), "/baton/workers/a");
        assert_eq!(prefix.strip(b"/baton/workers/a").as_deref(), Some("workers/a"));
        for foreign in [&b"/batonette/a"[..], b"/baton", b"/baton/\xff", b"baton/a"] {
            assert_eq!(prefix.strip(foreign), None);
        }
    }
    assert_eq!(Prefix::new("").add("a"), "/a");
}

#[test]
fn only_a_transaction_that_makes_its_own_repetition_fail_is_guarded() {
    let created = |key: &str, revision| Compare::Created { key: key.to_owned(), revision };
    let modified = |key: &str, revision| Compare::Modified { key: key.to_owned(), revision };
    let delete = |key: &str| Op::Delete { key: key.to_owned() };
    let cases = [
        (vec![created("a", 0)], vec![put("a", "1", None)], Some("a")),
        (vec![modified("a", 7)], vec![put("b", "1", None), put("a", "1", None)], Some("a")),
        (vec![modified("a", 0)], vec![put("a", "1", None)], Some("a")),
        (vec![created("a", 7)], vec![put("a", "1", None)], None),
        (vec![created("a", 0)], vec![put("b", "1", None)], None),
        (vec![], vec![put("a", "1", None)], None),
        (vec![modified("a", 7)], vec![delete("a")], None),
    ];
    for (compares, ops, expected) in cases {
        let txn = Txn { compares, ops };
        assert_eq!(Guard::of(&txn).map(|guard| guard.key), expected, "{txn:?}");
    }
}

#[test]
fn a_guard_knows_its_own_write() {
    let txn = Txn {
        compares: vec![Compare::Created { key: "a".to_owned(), revision: 0 }],
        ops: vec![put("a", "1", Some(9))],
    };
    let guard = Guard::of(&txn).unwrap();
    let found = |text: &str, lease: u64| KeyValue {
        key: "a".to_owned(),
        value: Arc::from(text.as_bytes()),
        create_revision: 4,
        mod_revision: 4,
        lease: Some(LeaseId(lease)),
    };
    assert_eq!(guard.done(Some(&found("1", 9))), Some(4));
    assert_eq!(guard.done(Some(&found("1", 8))), None, "another holder that says the same");
    assert_eq!(guard.done(Some(&found("2", 9))), None);
    assert_eq!(guard.done(None), None);
}

#[test]
fn a_revision_is_one_batch_in_the_order_of_its_keys() {
    let mut grouper = Grouper::new(4);
    let batches = grouper.group(vec![told(5, "b"), told(5, "a"), told(7, "c")]).unwrap();
    assert_eq!(batches.iter().map(keys).collect::<Vec<_>>(), [(5, vec!["a", "b"]), (7, vec!["c"])]);
    assert!(grouper.group(vec![]).unwrap().is_empty(), "a progress message");
    let batches = grouper.group(vec![told(8, "c")]).unwrap();
    assert_eq!(batches.iter().map(keys).collect::<Vec<_>>(), [(8, vec!["c"])]);
}

#[test]
fn what_is_told_again_is_left_out_and_a_torn_revision_ends_the_watch() {
    let mut grouper = Grouper::new(4);
    grouper.group(vec![told(5, "a"), told(6, "a"), told(6, "b")]).unwrap();
    let again = grouper.group(vec![told(5, "a"), told(6, "b"), told(6, "a"), told(9, "x")]).unwrap();
    assert_eq!(again.iter().map(keys).collect::<Vec<_>>(), [(9, vec!["x"])]);
    grouper.group(vec![]).unwrap();
    assert_eq!(grouper.group(vec![told(9, "y")]), Err(Torn { revision: 9 }));
}
