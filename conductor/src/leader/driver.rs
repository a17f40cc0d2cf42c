//! Stands for election: does what the state machine says, and publishes the term.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{CONDUCTORS_PREFIX, ConductorRecord, Election, LEADER_KEY, LEASE_TTL, Leader, Step, Written};
use crate::dice::Dice;
use crate::mirror::Mirror;
use crate::reconcile::Fence;
use crate::store::{Compare, KeyValue, LeaseId, Op, Store, StoreError, Txn};

/// How long a conductor that stops tries to give its lease back.
const RESIGN_TIMEOUT: Duration = Duration::from_secs(1);

/// Whether this conductor leads, for whoever wants to know.
#[derive(Debug, Clone)]
pub(crate) struct Leadership {
    term: watch::Receiver<Option<Fence>>,
    changes: Arc<AtomicU64>,
}

impl Leadership {
    /// The current term, while this conductor leads.
    pub(crate) fn term(&self) -> watch::Receiver<Option<Fence>> {
        self.term.clone()
    }

    /// Whether this conductor leads.
    pub(crate) fn leads(&self) -> bool {
        self.term.borrow().is_some()
    }

    /// How often the leader changed, as far as this conductor saw it.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }
}

/// One conductor that would lead.
pub(crate) struct Candidate {
    store: Arc<dyn Store>,
    mirror: Arc<Mirror>,
    record: ConductorRecord,
    election: Election,
    term: watch::Sender<Option<Fence>>,
    changes: Arc<AtomicU64>,
    /// The fence of the leader last seen.
    last: Option<u64>,
}

impl Candidate {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        mirror: Arc<Mirror>,
        record: ConductorRecord,
    ) -> (Self, Leadership) {
        let (term, reader) = watch::channel(None);
        let changes = Arc::new(AtomicU64::new(0));
        let leadership = Leadership { term: reader, changes: changes.clone() };
        let election = Election::new(Instant::now(), Dice::from_entropy());
        (Self { store, mirror, record, election, term, changes, last: None }, leadership)
    }

    /// Stands for election until `stop`, then gives the lease back, so that another leads at once.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut head = self.mirror.head();
        loop {
            head.borrow_and_update();
            self.look();
            let step = self.election.step(Instant::now());
            self.publish();
            if let Step::Wait { until } = step {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => break,
                    _ = head.changed() => {}
                    () = tokio::time::sleep_until(until) => {}
                }
                continue;
            }
            // A call that hangs must not keep a term alive beyond its end.
            let ends = self.election.term_ends();
            let end = async {
                match ends {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = self.call(step) => {}
                () = end => {}
            }
        }
        self.resign().await;
    }

    fn look(&mut self) {
        let (revision, leader) = self.mirror.leader();
        self.election.saw(Instant::now(), revision, leader.as_ref());
        let Some(leader) = leader else { return };
        if self.last != Some(leader.revision) {
            // The first leader seen is no change.
            if self.last.replace(leader.revision).is_some() {
                self.changes.fetch_add(1, Ordering::Relaxed);
            }
            tracing::info!(leader = leader.name, fence = leader.revision, "a conductor leads");
        }
    }

    fn publish(&self) {
        let term = self.election.term(Instant::now());
        self.term.send_if_modified(|published| {
            let news = *published != term;
            if news {
                match term {
                    Some(fence) => tracing::info!(fence = fence.revision(), "this conductor leads"),
                    None => tracing::warn!("this conductor leads no longer"),
                }
                *published = term;
            }
            news
        });
    }

    async fn call(&mut self, step: Step) {
        let sent = Instant::now();
        match step {
            Step::Grant => {
                let lease = self.store.grant(LEASE_TTL).await.map_err(unanswered).ok();
                self.election.granted(sent, Instant::now(), lease.map(|lease| (lease.id, lease.ttl)));
            }
            Step::Announce { lease } => {
                let key = format!("{CONDUCTORS_PREFIX}{}", self.record.name);
                let value = serde_json::to_vec(&self.record).unwrap_or_default();
                let op = Op::Put { key, value: value.into(), lease: Some(lease) };
                let answer = self.write(Txn { compares: vec![], ops: vec![op] }).await;
                self.election.announced(Instant::now(), answer);
            }
            Step::Claim { lease } => {
                let answer = self.write(claim(&self.record.name, lease)).await;
                self.election.claimed(Instant::now(), answer);
            }
            Step::Confirm => {
                let answer = self.store.get(LEADER_KEY).await.map_err(unanswered).ok();
                self.election.confirmed(Instant::now(), answer.map(|kv| kv.as_ref().map(leader)));
            }
            Step::KeepAlive { lease } => {
                let answer = self.store.keep_alive(lease).await.map_err(unanswered).ok();
                let left = answer.map(Option::unwrap_or_default);
                self.election.kept(sent, Instant::now(), left);
            }
            Step::Wait { .. } => {}
        }
    }

    async fn write(&self, txn: Txn) -> Written {
        match self.store.txn(txn).await {
            Ok(reply) if reply.succeeded => Written::At(reply.revision),
            Ok(_) => Written::Refused,
            Err(StoreError::LeaseNotFound(_)) => Written::LeaseGone,
            Err(error) => {
                unanswered(error);
                Written::Unknown
            }
        }
    }

    async fn resign(self) {
        self.term.send_replace(None);
        let Some(lease) = self.election.lease() else { return };
        if !matches!(tokio::time::timeout(RESIGN_TIMEOUT, self.store.revoke(lease)).await, Ok(Ok(()))) {
            tracing::warn!("stopped without telling the other conductors; the lease will run out");
        }
    }
}

/// The write of a candidate.
fn claim(name: &str, lease: LeaseId) -> Txn {
    let key = LEADER_KEY.to_owned();
    let compares = vec![Compare::Created { key: key.clone(), revision: 0 }];
    Txn { compares, ops: vec![Op::Put { key, value: name.as_bytes().into(), lease: Some(lease) }] }
}

/// The leader's key, read.
pub(crate) fn leader(kv: &KeyValue) -> Leader {
    let name = String::from_utf8_lossy(&kv.value).into_owned();
    Leader { name, lease: kv.lease, revision: kv.create_revision }
}

#[expect(clippy::needless_pass_by_value, reason = "stands in `map_err`")]
fn unanswered(error: StoreError) {
    tracing::debug!(error = &error as &dyn std::error::Error, "the store did not answer a candidate");
}

#[cfg(test)]
mod tests {
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::store::embedded::{Embedded, EmbeddedOptions};
    use crate::store::overtaken::Overtaken;

    #[tokio::test(start_paused = true)]
    async fn a_term_ends_in_time_also_while_the_store_does_not_answer() {
        let tasks = TaskTracker::new();
        let embedded = Embedded::start(EmbeddedOptions::default(), &tasks).await.unwrap();
        let store = Arc::new(Overtaken::new(embedded));
        let mirror = Arc::new(Mirror::new(&[]));
        mirror.list(&*store).await.unwrap();
        let stop = CancellationToken::new();
        let follow = mirror.clone().follow(store.clone());
        tasks.spawn(stop.clone().run_until_cancelled_owned(follow));
        let record =
            ConductorRecord { name: "one".to_owned(), url: String::new(), pid: 1, version: String::new() };
        let (candidate, leadership) = Candidate::new(store.clone(), mirror, record);
        tasks.spawn(candidate.run(stop.clone()));
        let mut term = leadership.term();
        term.wait_for(Option::is_some).await.unwrap();
        tokio::time::sleep(5 * LEASE_TTL).await;
        assert!(leadership.leads(), "it is kept alive");
        store.hang(true);
        let hung = Instant::now();
        let ended = tokio::time::timeout(5 * LEASE_TTL, term.wait_for(Option::is_none)).await.is_ok();
        assert!(ended && hung.elapsed() <= LEASE_TTL, "{:?}", hung.elapsed());
        store.hang(false);
        let again = tokio::time::timeout(5 * LEASE_TTL, term.wait_for(Option::is_some)).await.is_ok();
        assert!(again, "and begins anew");
        stop.cancel();
    }
}
