//! Several conductors on one store: one leads, another takes over, and clients move on without losing anything.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Runtime;

use super::*;
use crate::api::Drained;
use crate::etcd_servers::Etcd as Servers;
use crate::leader::{LEASE_TTL, TTL};

/// A loaded machine answers late.
const SLACK: Duration = Duration::from_secs(3);

/// A conductor on a runtime of its own, so that it can be killed with everything it has open.
struct Conductor {
    name: &'static str,
    url: String,
    stop: CancellationToken,
    runtime: Runtime,
}

impl Conductor {
    fn start(shared: &Shared, name: &'static str, ttl: Duration) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let stop = CancellationToken::new();
        let options = ConductorOptions {
            lease_ttl: ttl,
            name: Some(name.to_owned()),
            ..ConductorOptions::new(pools())
        };
        let (shared, end) = (shared.clone(), stop.clone());
        TaskTracker::new().spawn_on(
            async move {
                let listener = TcpListener::from_std(listener).unwrap();
                let tasks = TaskTracker::new();
                let store = shared.open(&tasks);
                // Or this thread would keep the servers, and with them their files, at the end of the process.
                drop(shared);
                serve_on(store, options, listener, end, &tasks).await.unwrap();
            },
            runtime.handle(),
        );
        Self { name, url, stop, runtime }
    }

    /// As SIGKILL would: sockets closed, no goodbye.
    fn kill(self) {
        self.runtime.shutdown_background();
    }

    async fn listing(&self) -> Option<Listing> {
        let reply = crate::http::client().get(format!("{}/v1/workers", self.url)).send().await.ok()?;
        reply.json().await.ok()
    }

    async fn listed(&self, what: &str, mut wanted: impl FnMut(&Listing) -> bool) -> Listing {
        let found = async {
            loop {
                match self.listing().await {
                    Some(listing) if wanted(&listing) => return listing,
                    _ => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        match timeout(PATIENCE, found).await {
            Ok(listing) => listing,
            Err(_) => panic!("{} never listed {what}: {:#?}", self.name, self.listing().await),
        }
    }

    async fn metrics(&self) -> String {
        let reply = crate::http::client().get(format!("{}/metrics", self.url)).send().await.unwrap();
        reply.text().await.unwrap()
    }
}

/// A store that outlives every conductor on it.
#[derive(Clone)]
enum Shared {
    /// One in memory stands for it.
    Memory(Arc<dyn Store>),
    /// A real one; each conductor has its own connection.
    Etcd(Arc<Servers>),
}

impl Shared {
    async fn memory() -> Self {
        Self::Memory(Arc::new(
            Embedded::start(EmbeddedOptions::default(), &TaskTracker::new()).await.unwrap(),
        ))
    }

    async fn etcd(members: usize) -> Self {
        Self::Etcd(Arc::new(Servers::start(members).await))
    }

    fn open(&self, tasks: &TaskTracker) -> Arc<dyn Store> {
        match self {
            Self::Memory(store) => store.clone(),
            Self::Etcd(servers) => {
                let options = EtcdOptions::new(servers.endpoints(), "/baton");
                Arc::new(Etcd::start(options, tasks).unwrap())
            }
        }
    }
}

/// Each test on a store in memory and on a real etcd.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod in_memory {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(Shared::memory().await).await; })*
        }
        mod on_etcd {
            use super::*;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name(Shared::etcd(1).await).await; })*
        }
    };
}

on_both!(
    the_leader_is_killed_and_nobody_loses_anything,
    a_leader_that_is_stopped_hands_over_at_once,
    it_does_not_matter_which_conductor_is_asked,
    a_conductor_that_is_behind_waits_for_what_a_client_has_seen,
    of_two_workers_with_one_name_at_two_conductors_one_is_refused,
    a_keepalive_is_taken_by_a_conductor_that_never_heard_of_the_worker,
);

fn leading(listing: &Listing) -> Option<&str> {
    let mut leaders = listing.conductors.iter().filter(|conductor| conductor.leader);
    let leader = leaders.next()?;
    assert!(leaders.next().is_none(), "{:?}", listing.conductors);
    Some(&leader.name)
}

/// Two conductors, the leading one first.
async fn pair(store: &Shared, ttl: Duration) -> (Conductor, Conductor) {
    let (one, two) = (Conductor::start(store, "one", ttl), Conductor::start(store, "two", ttl));
    let listing = one.listed("both", |l| l.conductors.len() == 2 && leading(l).is_some()).await;
    two.listed("the same", |l| l.conductors == listing.conductors).await;
    if leading(&listing) == Some("one") { (one, two) } else { (two, one) }
}

fn client(conductors: &[&Conductor]) -> Client {
    Client::start(ClientOptions::new(conductors.iter().map(|c| c.url.clone()).collect())).unwrap()
}

async fn the_leader_is_killed_and_nobody_loses_anything(store: Shared) {
    let (leader, other) = pair(&store, Duration::from_secs(5)).await;
    assert!(leader.metrics().await.contains("baton_conductor_leader 1"));
    assert!(other.metrics().await.contains("baton_conductor_leader 0"));
    let client = client(&[&leader, &other]);
    let (host, second) = (Host::new(), Host::new());
    let worker = join(&client, "w", &host.address()).await.unwrap();
    let epoch = worker.epoch().borrow().unwrap();
    let name: WorkerId = "w".parse().unwrap();
    let before = wait(&client, "the worker", |v| v.worker(&name).is_some()).await;
    let record = before.worker(&name).cloned().unwrap();

    let lacked = Arc::new(AtomicBool::new(false));
    let (seen, mut views, watched) = (lacked.clone(), client.changed(), name.clone());
    TaskTracker::new().spawn(async move {
        while views.changed().await.is_ok() {
            seen.fetch_or(views.borrow_and_update().worker(&watched).is_none(), Ordering::SeqCst);
        }
    });
    let fresh = leader.name;
    leader.kill();
    let killed = Instant::now();
    other.listed("itself as leader", |l| l.leader && leading(l) == Some(&l.conductors[0].name)).await;
    let took = killed.elapsed();
    assert!(took < TTL + SLACK, "led again after {took:?}");
    let listing = other.listed("only itself", |l| l.conductors.len() == 1).await;
    assert_ne!(listing.conductors[0].name, fresh);

    // The worker's keepalives reach the other one, under the same epoch, for longer than its lease.
    let heard = |l: &Listing| l.workers.iter().any(|w| w.record.epoch == epoch && w.seen_ms.is_some());
    other.listed("a keepalive", heard).await;
    let view = wait(&client, "freshness", |v| !v.stale).await;
    assert!(Arc::ptr_eq(view.worker(&name).unwrap(), &record), "its record did not change");
    let late = join(&client, "late", &second.address()).await.expect("registration goes on");
    wait(&client, "the late one", |v| v.workers.len() == 2).await;
    while killed.elapsed() < Duration::from_secs(6) {
        other.listed("a keepalive", heard).await;
        assert_eq!(*worker.standing().borrow(), Standing::Held { epoch });
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!lacked.load(Ordering::SeqCst), "the worker was missing from a view");
    late.leave().await;
    worker.leave().await;
    other.kill();
}

async fn a_leader_that_is_stopped_hands_over_at_once(store: Shared) {
    let (leader, other) = pair(&store, Duration::from_secs(10)).await;
    let asked = Instant::now();
    leader.stop.cancel();
    other.listed("itself as leader", |l| l.leader && l.conductors.len() == 1).await;
    assert!(asked.elapsed() < LEASE_TTL, "it waited for the lease: {:?}", asked.elapsed());
    let metrics = other.metrics().await;
    assert!(metrics.contains("baton_conductor_leader 1"), "{metrics}");
    // None, if it was too busy to look while the other one led.
    let changes = [0, 1].map(|changes| format!("baton_conductor_leader_changes_total {changes}\n"));
    assert!(changes.iter().any(|line| metrics.contains(line)), "{metrics}");
    leader.kill();
    other.kill();
}

async fn it_does_not_matter_which_conductor_is_asked(store: Shared) {
    let (one, two) = pair(&store, Duration::from_secs(10)).await;
    let (first, second) = (client(&[&one]), client(&[&two]));
    let hosts = [Host::new(), Host::new()];
    let a = join(&first, "a", &hosts[0].address()).await.unwrap();
    let b = join(&second, "b", &hosts[1].address()).await.unwrap();
    for client in [&first, &second] {
        wait(client, "both", |v| v.workers.len() == 2).await;
    }
    // One name has one holder, whoever is asked.
    let Err(JoinError::NameTaken { holder }) = join(&second, "a", &hosts[1].address()).await else {
        panic!("a second holder");
    };
    assert_eq!(Some(holder.epoch), *a.epoch().borrow());

    // A worker kept alive at one is asked to drain at the other, and leaves; no conductor takes that for a death.
    let http = crate::http::client();
    let drained = http.post(format!("{}/v1/workers/a/drain", two.url)).send().await.unwrap();
    assert_eq!(drained.json::<Drained>().await.unwrap().epoch, holder.epoch);
    timeout(PATIENCE, a.drain_requested().wait_for(|asked| *asked)).await.expect("a hears of it").unwrap();
    let replicas = json!({"replicas": 7});
    http.put(format!("{}/v1/pools/decode/replicas", one.url)).json(&replicas).send().await.unwrap();
    a.leave().await;
    for conductor in [&one, &two] {
        let listing = conductor.listed("a gone", |l| l.workers.len() == 1 && l.drain.is_empty()).await;
        assert_eq!(listing.pools[0].desired, 7);
        let metrics = conductor.metrics().await;
        assert!(metrics.contains("baton_conductor_lease_expired_total 0"), "{}: {metrics}", conductor.name);
    }

    // One that comes later knows what the others know, but for loads.
    let three = Conductor::start(&store, "three", Duration::from_secs(10));
    let known = three.listed("all conductors", |l| l.conductors.len() == 3).await;
    let told = one.listed("all conductors", |l| l.conductors.len() == 3).await;
    let records = |l: &Listing| l.workers.iter().map(|w| w.record.clone()).collect::<Vec<_>>();
    assert_eq!(records(&known), records(&told));
    assert_eq!((known.instance, known.drain, known.pools), (told.instance, told.drain, told.pools));
    b.leave().await;
    for conductor in [one, two, three] {
        conductor.kill();
    }
}

async fn a_conductor_that_is_behind_waits_for_what_a_client_has_seen(store: Shared) {
    let one = Conductor::start(&store, "one", Duration::from_secs(10));
    let writer = store.open(&TaskTracker::new());
    let mut attempts = 0;
    let since = loop {
        attempts += 1;
        let listing = one.listed("itself", |l| l.leader).await;
        // Beyond what conductors write by themselves when they start.
        let since = listing.revision + 20;
        let url = format!("{}/v1/watch?since={since}", one.url);
        // The client asks first, the changes come a moment later.
        let asked = crate::http::client().get(&url).send();
        let change = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let mut revision = 0;
            while revision < since {
                let op =
                    crate::store::Op::Put { key: "x".to_owned(), value: b"1".as_slice().into(), lease: None };
                revision =
                    writer.txn(crate::store::Txn { compares: vec![], ops: vec![op] }).await.unwrap().revision;
            }
        };
        let (reply, ()) = tokio::join!(asked, change);
        // On a busy machine the changes may take longer than a conductor waits.
        if reply.unwrap().status() == 200 {
            break since;
        }
        assert!(attempts < 3, "it never waited");
    };
    let never = since + 1_000_000;
    let ahead = crate::http::client().get(format!("{}/v1/watch?since={never}", one.url)).send().await;
    assert_eq!(ahead.unwrap().status(), 400, "what never happens is refused");
    one.kill();
}

async fn of_two_workers_with_one_name_at_two_conductors_one_is_refused(store: Shared) {
    let (one, two) = pair(&store, Duration::from_secs(10)).await;
    let (near_one, near_two) = (client(&[&one]), client(&[&two]));
    for round in 0..20 {
        let name = format!("w{round}");
        let hosts = [Host::new(), Host::new()];
        let addresses = hosts.each_ref().map(Host::address);
        let (first, second) =
            tokio::join!(join(&near_one, &name, &addresses[0]), join(&near_two, &name, &addresses[1]));
        let (winner, refused, at) = match (first, second) {
            (Ok(winner), Err(refused)) => (winner, refused, &addresses[0]),
            (Err(refused), Ok(winner)) => (winner, refused, &addresses[1]),
            both => panic!("{name}: {both:?}"),
        };
        let JoinError::NameTaken { holder } = refused else { panic!("{name}: {refused:?}") };
        let epoch = winner.epoch().borrow().unwrap();
        assert_eq!((holder.epoch, &holder.address), (epoch, at), "{name}");
        winner.leave().await;
    }
    one.kill();
    two.kill();
}

async fn a_keepalive_is_taken_by_a_conductor_that_never_heard_of_the_worker(store: Shared) {
    let (one, two) = pair(&store, Duration::from_secs(10)).await;
    let http = crate::http::client();
    let body = requests::good();
    let reply = http.post(format!("{}/v1/workers", one.url)).json(&body).send().await.unwrap();
    let registered: Registered = reply.json().await.unwrap();
    let keepalive = |conductor: &Conductor, seq: u64| {
        let load = crate::record::Load::default();
        let body = json!({"epoch": registered.epoch, "seq": seq, "state": "ready", "load": load});
        let request = http.post(format!("{}/v1/workers/w/keepalive", conductor.url)).json(&body).send();
        async move { request.await.unwrap().status() }
    };
    assert_eq!(keepalive(&one, 7).await, 200);
    assert_eq!(keepalive(&one, 7).await, 409);
    assert_eq!(keepalive(&two, 8).await, 200, "the next one, at a conductor that has not seen the life");
    assert_eq!(keepalive(&two, 8).await, 409);
    assert_eq!(keepalive(&one, 9).await, 200, "and back");
    // What a former life told one conductor is not told of the next one, whichever conductor that joins.
    let load = |listing: &Listing| listing.workers.first().map(|w| (w.record.epoch, w.load.is_some()));
    let told = |listing: &Listing| load(listing) == Some((registered.epoch, true));
    two.listed("what it told", told).await;
    let reply = http.post(format!("{}/v1/workers", one.url)).json(&body).send().await.unwrap();
    let next: Registered = reply.json().await.unwrap();
    let listing =
        two.listed("the next life", |l| load(l).is_some_and(|(epoch, _)| epoch == next.epoch)).await;
    assert_eq!(load(&listing), Some((next.epoch, false)), "it has said nothing yet");
    one.kill();
    two.kill();
}
