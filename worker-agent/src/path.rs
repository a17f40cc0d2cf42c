//! The transfer paths this worker has used, and what was measured on them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::protocol::PathStatus;
use baton_config::{Epoch, WorkerId};
use baton_transfer::{BackendKind, Session};

use crate::meter::{Costs, Floor};

/// Peers remembered at most.
const PEERS_MAX: usize = 1024;
/// A want that took longer waited for its request at the peer: it says nothing about the path.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(50);
/// Longest reason kept, in characters.
const REASON_MAX_CHARS: usize = 512;

/// Paths by peer; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Paths(Arc<Mutex<BTreeMap<WorkerId, Path>>>);

#[derive(Default)]
struct Path {
    session: Option<Session>,
    failure: Option<String>,
    /// Not a mean: under load messages wait for the processor, which is no property of the path, and would pull ever more
    /// prefill work to a busy decode worker.
    round_trip_s: Floor,
}

impl std::fmt::Debug for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Path").field("failure", &self.failure).finish_non_exhaustive()
    }
}

impl Paths {
    /// A session was used.
    pub fn used(&self, peer: &WorkerId, session: &Session) {
        self.change(peer, |path| {
            path.session = Some(session.clone());
            path.failure = None;
        });
    }

    /// No session could be made.
    pub fn failed(&self, peer: &WorkerId, why: &str) {
        self.change(peer, |path| {
            path.session = None;
            path.failure = Some(why.chars().take(REASON_MAX_CHARS).collect());
        });
    }

    /// A message was answered.
    pub fn round_trip(&self, peer: &WorkerId, took: Duration) {
        if took <= ROUND_TRIP_MAX {
            self.change(peer, |path| path.round_trip_s.add(took.as_secs_f64()));
        }
    }

    /// What decides between fetching and computing, once it was measured.
    pub fn costs(&self, peer: &WorkerId, prefill_tokens_per_s: f64, bytes_per_token: f64) -> Option<Costs> {
        let paths = self.paths();
        let path = paths.get(peer)?;
        let stats = path.session.as_ref()?.stats();
        // A want there, a ticket back, and the first byte of a read.
        let overhead_s = 2.0 * path.round_trip_s.get()? + stats.latency?.as_secs_f64();
        // Reads too small to measure a bandwidth by cost their latency only.
        let bytes_per_s = stats.bytes_per_second.unwrap_or(f64::INFINITY);
        Some(Costs { prefill_tokens_per_s, bytes_per_s, bytes_per_token, overhead_s })
    }

    /// For `GET /v1/state`: this worker decodes, the peers prefill.
    pub fn status(&self, own: &WorkerId) -> Vec<PathStatus> {
        let paths = self.paths();
        let status = |(peer, path): (&WorkerId, &Path)| {
            let (prefill, decode) = (peer.clone(), own.clone());
            if let Some(session) = &path.session {
                let (info, stats) = (session.path(), session.stats());
                // Until reads have said it, and where all of them are short, what was measured when the path was chosen.
                let speed = stats.bytes_per_second.or(info.bytes_per_second);
                let latency = stats.latency.or(info.latency);
                return Some(PathStatus {
                    prefill,
                    decode,
                    backend: info.backend.to_string(),
                    reason: info.reason.clone(),
                    gb_per_s: speed.map(|speed| speed / 1e9),
                    latency_us: latency.map(|latency| latency.as_secs_f64() * 1e6),
                    fell_back: fell_back(&info.fallen_from),
                });
            }
            let reason = path.failure.clone()?;
            let backend = "none".to_owned();
            Some(PathStatus {
                prefill,
                decode,
                backend,
                reason,
                gb_per_s: None,
                latency_us: None,
                fell_back: None,
            })
        };
        paths.iter().filter_map(status).collect()
    }

    /// Forgets peers of which `life` does not know, and sessions with other lives than those it knows.
    pub fn retain(&self, life: impl Fn(&WorkerId) -> Option<Epoch>) {
        self.paths().retain(|peer, path| {
            let live = life(peer);
            path.session.take_if(|session| Some(session.epoch()) != live);
            live.is_some()
        });
    }

    fn change(&self, peer: &WorkerId, change: impl FnOnce(&mut Path)) {
        let mut paths = self.paths();
        if paths.len() < PEERS_MAX || paths.contains_key(peer) {
            change(paths.entry(peer.clone()).or_default());
        }
    }

    fn paths(&self) -> MutexGuard<'_, BTreeMap<WorkerId, Path>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The paths that should be used and are not, on one line.
fn fell_back(from: &[(BackendKind, String)]) -> Option<String> {
    let each: Vec<String> = from.iter().map(|(backend, why)| format!("{backend}: {why}")).collect();
    (!each.is_empty()).then(|| each.join("; ").chars().take(REASON_MAX_CHARS).collect())
}

#[cfg(test)]
mod tests {
    use baton_config::HandoffId;
    use baton_transfer::{Agent, AgentOptions, BlockRead, Descriptor, Destination, HostMemory};
    use tokio::time::Instant;

    use super::*;

    fn name(text: &str) -> WorkerId {
        text.parse().unwrap()
    }

    #[test]
    fn what_failed_is_told_until_its_peer_leaves() {
        let (paths, own) = (Paths::default(), name("d-0"));
        paths.failed(&name("p-0"), &"no ".repeat(REASON_MAX_CHARS));
        paths.round_trip(&name("p-1"), Duration::from_millis(1));
        let told = paths.status(&own);
        assert_eq!(told.len(), 1, "of a peer that only answered there is nothing to tell");
        assert_eq!(
            (&told[0].prefill, &told[0].decode, told[0].backend.as_str()),
            (&name("p-0"), &own, "none")
        );
        assert_eq!(told[0].reason.chars().count(), REASON_MAX_CHARS);
        paths.retain(|peer| (*peer == name("p-0")).then_some(Epoch(1)));
        assert_eq!((paths.status(&own).len(), paths.paths().len()), (1, 1));
        paths.retain(|_| None);
        assert_eq!(paths.status(&own), []);
    }

    #[test]
    fn only_so_many_peers_are_remembered_and_no_wait_for_a_request_counts() {
        let paths = Paths::default();
        for n in 0..PEERS_MAX + 10 {
            paths.round_trip(&name(&format!("p-{n}")), ROUND_TRIP_MAX);
        }
        assert_eq!(paths.paths().len(), PEERS_MAX);
        let known = name("p-0");
        paths.round_trip(&known, Duration::from_millis(10));
        paths.round_trip(&known, ROUND_TRIP_MAX + Duration::from_millis(1));
        assert_eq!(paths.paths()[&known].round_trip_s.get(), Some(0.01));
        assert_eq!(paths.costs(&known, 1.0, 1.0), None, "no read was measured");
    }
    /// A session with an agent, over which a block was read.
    async fn used_session(peer: &WorkerId) -> (Agent, Agent, Session) {
        let start = async |worker: &str| Agent::start(AgentOptions::new(name(worker))).await.unwrap();
        let (owner, reader) = (start(peer.as_str()).await, start("d-0").await);
        owner.set_epoch(Epoch(1));
        reader.set_epoch(Epoch(2));
        let session = reader.connect(peer, Epoch(1), &owner.metadata()).await.unwrap();
        let (handoff, len) = (HandoffId(1), 4096);
        let region = owner.register(HostMemory::allocate(len, "offered").unwrap()).unwrap();
        let source = Descriptor { region, offset: 0, len: len as u32 };
        owner.grant(handoff, vec![source]);
        let into = HostMemory::allocate(len, "read").unwrap();
        let block = BlockRead { source, to: 0, expected: None };
        let deadline = Instant::now() + Duration::from_secs(20);
        session.read(handoff, &[block], Destination::Memory(&into), deadline).await.unwrap();
        (owner, reader, session)
    }

    #[tokio::test]
    async fn a_path_is_told_and_reckoned_with_while_there_is_a_session_with_the_life_in_view() {
        let (paths, own, peer) = (Paths::default(), name("d-0"), name("p-0"));
        let (_owner, _reader, session) = used_session(&peer).await;
        let measured = async {
            while session.path().bytes_per_second.is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), measured).await.unwrap();
        assert_eq!(session.stats().bytes_per_second, None, "the only read was too short");
        let told = || paths.status(&own).into_iter().map(|path| path.backend).collect::<Vec<_>>();
        let backend = session.path().backend.to_string();
        paths.failed(&peer, "no");
        assert_eq!(told(), ["none"]);
        paths.used(&peer, &session);
        assert_eq!(told(), [backend.as_str()], "it works again");
        let path = &paths.status(&own)[0];
        assert!(path.gb_per_s.unwrap() > 0.0 && path.latency_us.unwrap() > 0.0, "{path:?}");
        assert_eq!(paths.costs(&peer, 1.0, 1.0), None, "no message was answered");
        paths.round_trip(&peer, Duration::from_millis(10));
        let overhead_s = paths.costs(&peer, 1.0, 1.0).unwrap().overhead_s;
        let latency_s = session.stats().latency.unwrap().as_secs_f64();
        assert!(latency_s > 0.0 && (overhead_s - 0.02 - latency_s).abs() < 1e-9, "{overhead_s} {latency_s}");
        // What failed before says nothing about a life to come.
        paths.retain(|_| Some(Epoch(3)));
        assert_eq!(told(), [""; 0]);
        paths.used(&peer, &session);
        paths.failed(&peer, "the link broke");
        assert_eq!(told(), ["none"]);
        assert_eq!(paths.costs(&peer, 1.0, 1.0), None, "what is broken is not reckoned with");
    }
}
