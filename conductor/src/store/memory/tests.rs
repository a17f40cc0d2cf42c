use super::*;
use crate::dice::Dice;

/// The plainest thing that could be right: nothing indexed, nothing forgotten.
struct Model {
    revision: Revision,
    keys: Vec<KeyValue>,
    leases: Vec<(LeaseId, Duration, Instant)>,
    log: Vec<Batch>,
}

impl Model {
    fn holds(&self, compare: &Compare) -> bool {
        let find = |key: &str| self.keys.iter().find(|kv| kv.key == key);
        match compare {
            Compare::Created { key, revision } => find(key).map_or(0, |kv| kv.create_revision) == *revision,
            Compare::Modified { key, revision } => find(key).map_or(0, |kv| kv.mod_revision) == *revision,
        }
    }

    fn apply(&mut self, ops: &[Op]) {
        let revision = self.revision + 1;
        let mut events = Vec::new();
        for op in ops {
            let at = self.keys.iter().position(|kv| kv.key == op.key());
            let old = at.map(|at| self.keys.remove(at));
            match op {
                Op::Put { key, value, lease } => {
                    let create_revision = old.map_or(revision, |kv| kv.create_revision);
                    let (key, value) = (key.clone(), value.clone());
                    let kv = KeyValue { key, value, create_revision, mod_revision: revision, lease: *lease };
                    self.keys.push(kv.clone());
                    events.push(Event::Put(kv));
                }
                Op::Delete { key } if old.is_some() => events.push(Event::Delete { key: key.clone() }),
                Op::Delete { .. } => {}
            }
        }
        if !events.is_empty() {
            self.revision = revision;
            events.sort_by(|a, b| event_key(a).cmp(event_key(b)));
            self.log.push(Batch { revision, events });
        }
    }

    fn end_lease(&mut self, id: LeaseId) {
        self.leases.retain(|(other, ..)| *other != id);
        let of_it = self.keys.iter().filter(|kv| kv.lease == Some(id));
        let ops: Vec<Op> = of_it.map(|kv| Op::Delete { key: kv.key.clone() }).collect();
        self.apply(&ops);
    }

    fn expire(&mut self, now: Instant) {
        while let Some((_, id)) = self.leases.iter().filter(|l| l.2 <= now).map(|l| (l.2, l.0)).min() {
            self.end_lease(id);
        }
    }

    fn sorted(&self, prefix: &str) -> Vec<KeyValue> {
        let mut keys: Vec<KeyValue> =
            self.keys.iter().filter(|kv| kv.key.starts_with(prefix)).cloned().collect();
        keys.sort_by(|a, b| a.key.cmp(&b.key));
        keys
    }
}

struct Run {
    seed: u64,
    dice: Dice,
    now: Instant,
    store: Memory,
    model: Model,
    history: usize,
}

impl Run {
    fn key(&mut self) -> String {
        format!("{}/{}", ["a", "b", "ab"][self.dice.below(3) as usize], self.dice.below(6))
    }

    fn lease(&mut self) -> Option<LeaseId> {
        let count = self.model.leases.len() as u64;
        match self.dice.below(4) {
            0 => None,
            1 if self.dice.below(8) == 0 => Some(LeaseId(3)),
            _ if count == 0 => None,
            _ => Some(self.model.leases[self.dice.below(count) as usize].0),
        }
    }

    fn random_txn(&mut self) -> Txn {
        let mut ops: Vec<Op> = Vec::new();
        for _ in 0..self.dice.below(4) {
            let key = self.key();
            let op = if self.dice.below(3) == 0 {
                Op::Delete { key }
            } else {
                let value = Arc::from(self.dice.next().to_le_bytes());
                Op::Put { key, value, lease: self.lease() }
            };
            if !ops.iter().any(|other| other.key() == op.key()) {
                ops.push(op);
            }
        }
        let mut compares = Vec::new();
        for _ in 0..self.dice.below(3) {
            let key = self.key();
            let known = self.model.keys.iter().find(|kv| kv.key == key);
            let (create, modified) = known.map_or((0, 0), |kv| (kv.create_revision, kv.mod_revision));
            let wrong = u64::from(self.dice.below(4) == 0);
            compares.push(match self.dice.below(2) {
                0 => Compare::Created { key, revision: create + wrong },
                _ => Compare::Modified { key, revision: modified + wrong },
            });
        }
        Txn { compares, ops }
    }

    fn step(&mut self) {
        let seed = self.seed;
        match self.dice.below(10) {
            0..=4 => {
                let txn = self.random_txn();
                let unknown = txn.ops.iter().any(|op| {
                    matches!(op, Op::Put { lease: Some(id), .. } if !self.model.leases.iter().any(|l| l.0 == *id))
                });
                let reply = self.store.txn(txn.clone());
                if unknown {
                    assert!(matches!(reply, Err(StoreError::LeaseNotFound(_))), "seed {seed}: {reply:?}");
                    return;
                }
                let holds = txn.compares.iter().all(|c| self.model.holds(c));
                if holds {
                    self.model.apply(&txn.ops);
                }
                let expected = TxnReply { succeeded: holds, revision: self.model.revision };
                assert_eq!(reply, Ok(expected), "seed {seed}: {txn:?}");
            }
            5 => {
                let ttl = Duration::from_millis(100 + self.dice.below(3000));
                let lease = self.store.grant(self.now, ttl);
                assert!(self.model.leases.iter().all(|l| l.0 != lease.id), "seed {seed}");
                self.model.leases.push((lease.id, ttl, self.now + ttl));
            }
            6 => {
                let Some(id) = self.lease() else { return };
                let known = self.model.leases.iter_mut().find(|l| l.0 == id);
                let expected = known.map(|l| {
                    l.2 = self.now + l.1;
                    l.1
                });
                assert_eq!(self.store.keep_alive(self.now, id), expected, "seed {seed}");
            }
            7 if self.dice.below(3) == 0 => {
                let Some(id) = self.lease() else { return };
                self.store.revoke(id);
                self.model.end_lease(id);
            }
            8 if self.dice.below(20) == 0 => {
                let stall = Duration::from_secs(5);
                self.now += stall;
                self.store.forgive(stall);
                self.model.leases.iter_mut().for_each(|l| l.2 += stall);
            }
            _ => {
                self.now += Duration::from_millis(self.dice.below(400));
                self.store.expire(self.now);
                self.model.expire(self.now);
                let next = self.model.leases.iter().map(|l| l.2).min();
                assert_eq!(self.store.next_expiry(), next, "seed {seed}");
            }
        }
    }

    fn check(&mut self) {
        let seed = self.seed;
        let prefix = ["", "a", "a/", "b/"][self.dice.below(4) as usize];
        let mut seen: Vec<KeyValue> = Vec::new();
        loop {
            let after = seen.last().map(|kv| kv.key.clone());
            let page = self.store.list(prefix, after.as_deref(), 1 + self.dice.below(5) as usize);
            assert_eq!(page.revision, self.model.revision, "seed {seed}");
            seen.extend(page.items);
            if !page.more {
                break;
            }
        }
        assert_eq!(seen, self.model.sorted(prefix), "seed {seed}: prefix {prefix:?}");

        let since = self.model.revision.saturating_sub(self.dice.below(40)).max(BASE);
        let mut upto = since;
        let mut told = Vec::new();
        let kept = self.model.log.len().saturating_sub(self.history) as u64 + BASE;
        loop {
            match self.store.changes(prefix, upto, 1 + self.dice.below(4) as usize) {
                Ok((batches, reached)) => {
                    assert!(since >= kept, "seed {seed}: served from {since}, history begins at {kept}");
                    told.extend(batches);
                    upto = reached;
                    if reached == self.model.revision {
                        break;
                    }
                }
                Err(WatchError::Compacted { oldest }) => {
                    assert!(since < kept && oldest == kept, "seed {seed}: {since} {oldest} {kept}");
                    return;
                }
                Err(error) => panic!("seed {seed}: {error}"),
            }
        }
        let mut expected: Vec<Batch> =
            self.model.log.iter().filter(|b| b.revision > since).cloned().collect();
        for batch in &mut expected {
            batch.events.retain(|event| event_key(event).starts_with(prefix));
        }
        expected.retain(|batch| !batch.events.is_empty());
        assert_eq!(told, expected, "seed {seed}: prefix {prefix:?} since {since}");
    }
}

const BASE: Revision = 100;

#[test]
fn random_histories_agree_with_a_plain_model() {
    for seed in 0..60 {
        let now = Instant::now();
        let history = if seed % 2 == 0 { 25 } else { 10_000 };
        let store = Memory::new(BASE, []).with_history(history);
        let model = Model { revision: BASE, keys: vec![], leases: vec![], log: vec![] };
        let mut run = Run { seed, dice: Dice::seeded(seed), now, store, model, history };
        for _ in 0..600 {
            run.step();
            run.check();
        }
        assert!(run.model.revision > BASE + 100, "seed {seed}: the run did something");
    }
}

#[test]
fn a_watch_cannot_begin_in_the_future() {
    let store = Memory::new(BASE, []);
    assert_eq!(store.changes("", BASE + 1, 9), Err(WatchError::Future { asked: BASE + 1, current: BASE }));
    assert_eq!(store.changes("", BASE, 9), Ok((vec![], BASE)));
    assert_eq!(store.changes("", BASE - 1, 9), Err(WatchError::Compacted { oldest: BASE }));
}

#[test]
fn the_bytes_of_a_history_are_bounded_and_what_is_forgotten_makes_room() {
    let mut memory = Memory::new(0, []);
    let value: Arc<[u8]> = vec![b'x'; 100_000].into();
    for round in 1..=1_000_u64 {
        let op = Op::Put { key: "k".to_owned(), value: value.clone(), lease: None };
        memory.txn(Txn { compares: vec![], ops: vec![op] }).unwrap();
        let bytes: usize = memory.history.iter().map(batch_bytes).sum();
        assert!(bytes <= HISTORY_MAX_BYTES);
        // The last 30 MB, at least.
        let (batches, upto) = memory.changes("", round.saturating_sub(300), usize::MAX).unwrap();
        assert_eq!((batches.len() as u64, upto), (round.min(300), round));
    }
    let oldest = memory.compacted;
    assert_eq!(memory.changes("", oldest - 1, 1), Err(WatchError::Compacted { oldest }));
}
