use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use baton_config::{Epoch, Role, WorkerId};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::*;
use crate::api::{ErrorBody, ErrorDetail, Listing, PoolList, Registered};
use crate::membership::Standing;
use crate::{
    Client, ClientOptions, JoinError, Membership, MembershipOptions, Registration, View, WorkerState,
};

mod access;
mod etcd;
mod faults;
mod input;
mod intents;
mod metadata;
mod requests;
mod several;
mod thousand;

const PATIENCE: Duration = Duration::from_secs(20);

fn pools() -> Vec<PoolOptions> {
    let pool =
        |name: &str, role| PoolOptions { name: name.parse().unwrap(), role, replicas: 2, min: 1, max: 8 };
    vec![pool("prefill", Role::Prefill), pool("decode", Role::Decode)]
}

/// A conductor in this process, behind a real socket.
struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    done: JoinHandle<Result<(), ServeError>>,
}

impl Server {
    async fn start(address: SocketAddr, ttl: Duration) -> Self {
        Self::with(address, ConductorOptions { lease_ttl: ttl, ..ConductorOptions::new(pools()) }).await
    }

    async fn with(address: SocketAddr, options: ConductorOptions) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{address}: {error}"),
            }
        };
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let done = TaskTracker::new().spawn(serve(options, listener, stop.clone()));
        Self { address, stop, done }
    }

    async fn fresh(ttl: Duration) -> Self {
        let server = Self::start("127.0.0.1:0".parse().unwrap(), ttl).await;
        server.leads().await;
        server
    }

    async fn stop(self) -> SocketAddr {
        self.stop.cancel();
        timeout(PATIENCE, self.done).await.expect("stops in time").unwrap().expect("stops well");
        self.address
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn client(&self) -> Client {
        Client::start(ClientOptions::new(vec![self.url()])).unwrap()
    }

    /// Waits until it leads: from then on it writes nothing by itself.
    async fn leads(&self) {
        let leading = async {
            while !self.listing().await.conductors.iter().any(|conductor| conductor.leader) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, leading).await.expect("leads in time");
    }

    async fn listing(&self) -> Listing {
        crate::http::client()
            .get(format!("{}/v1/workers", self.url()))
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap()
    }
}

/// Something that listens at the address a worker advertises.
struct Host {
    listener: std::net::TcpListener,
}

impl Host {
    fn new() -> Self {
        Self { listener: std::net::TcpListener::bind("127.0.0.1:0").unwrap() }
    }

    fn address(&self) -> String {
        self.listener.local_addr().unwrap().to_string()
    }
}

fn registration(name: &str, address: &str) -> Registration {
    Registration {
        worker: name.parse().unwrap(),
        pool: "decode".parse().unwrap(),
        role: Role::Decode,
        model: "tiny".to_owned(),
        engine: "reference".to_owned(),
        kv: None,
        server: None,
        address: address.to_owned(),
        transfer: "AAEC".to_owned(),
        state: WorkerState::Joining,
    }
}

async fn join(client: &Client, name: &str, address: &str) -> Result<Membership, JoinError> {
    timeout(PATIENCE, Membership::join(client, registration(name, address), MembershipOptions::default()))
        .await
        .expect("joins in time")
}

async fn wait(client: &Client, what: &str, wanted: impl FnMut(&View) -> bool) -> Arc<View> {
    match timeout(PATIENCE, client.wait_for(wanted)).await {
        Ok(view) => view,
        Err(_) => panic!("never saw {what}: {:#?}", client.view()),
    }
}

fn epochs(view: &View) -> BTreeMap<WorkerId, Epoch> {
    view.workers.values().map(|w| (w.worker.clone(), w.epoch)).collect()
}

#[tokio::test]
async fn workers_join_change_drain_and_leave_in_every_view() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let (one, two) = (server.client(), server.client());
    let hosts = [Host::new(), Host::new()];
    let a = join(&one, "a", &hosts[0].address()).await.unwrap();
    let b = join(&two, "b", &hosts[1].address()).await.unwrap();
    let (epoch_a, epoch_b) = (a.epoch().borrow().unwrap(), b.epoch().borrow().unwrap());
    assert!(epoch_b > epoch_a);
    for client in [&one, &two] {
        let view = wait(client, "both workers", |v| v.workers.len() == 2).await;
        assert_eq!(
            epochs(&view),
            [("a", epoch_a), ("b", epoch_b)].map(|(n, e)| (n.parse().unwrap(), e)).into()
        );
        assert!(!view.stale && view.age() < Duration::from_secs(3));
        assert_eq!(view.ready().count(), 0, "joining workers take no requests");
        assert_eq!(view.pools.len(), 2);
    }
    let b_before = two.view().worker(&"b".parse().unwrap()).cloned().unwrap();
    a.set_state(WorkerState::Ready);
    let asked = Instant::now();
    let view = wait(&two, "a ready", |v| v.ready().count() == 1).await;
    assert!(asked.elapsed() < Duration::from_secs(1), "a state is told at once, not with the next keepalive");
    assert!(Arc::ptr_eq(&b_before, view.worker(&b_before.worker).unwrap()), "b did not change");

    let http = crate::http::client();
    let drained = http.post(format!("{}/v1/workers/a/drain", server.url())).send().await.unwrap();
    assert_eq!(drained.status(), 200);
    timeout(PATIENCE, a.drain_requested().wait_for(|asked| *asked)).await.expect("a hears of it").unwrap();
    let view = wait(&one, "the drain", |v| v.drain.contains(&"a".parse().unwrap())).await;
    assert_eq!(view.ready().count(), 0, "no new requests to a draining worker");
    a.set_state(WorkerState::Draining);
    wait(&one, "a draining", |v| v.workers.values().any(|w| w.state == WorkerState::Draining)).await;
    a.leave().await;
    let view = wait(&one, "a gone", |v| v.workers.len() == 1).await;
    assert!(view.drain.is_empty(), "the wish ended with the worker");
    assert!(!*b.drain_requested().borrow());

    let put = http.put(format!("{}/v1/pools/decode/replicas", server.url())).json(&json!({"replicas": 5}));
    assert_eq!(put.send().await.unwrap().status(), 200);
    let view = wait(&two, "5 replicas", |v| v.pools.values().any(|p| p.desired == 5)).await;
    assert_eq!(view.pools[&"prefill".parse().unwrap()].desired, 2);
    let list: PoolList = crate::http::client()
        .get(format!("{}/v1/pools", server.url()))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(list.pools[0].name.as_str(), "decode");
    assert!(list.pools[0].operator_set && list.pools[0].joining == 1, "{list:?}");
    b.leave().await;
    server.stop().await;
}

#[tokio::test]
async fn a_worker_that_dies_is_removed_after_its_lease() {
    let server = Server::fresh(Duration::from_secs(1)).await;
    let client = server.client();
    let host = Host::new();
    let kept = join(&client, "kept", &host.address()).await.unwrap();
    let dead = join(&client, "dead", &host.address()).await.unwrap();
    wait(&client, "both", |v| v.workers.len() == 2).await;
    drop(dead);
    let view = wait(&client, "one gone", |v| v.workers.len() == 1).await;
    assert!(view.worker(&"kept".parse().unwrap()).is_some());
    let metrics = crate::http::client()
        .get(format!("{}/metrics", server.url()))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(metrics.contains("baton_conductor_lease_expired_total 1"), "{metrics}");
    kept.leave().await;
    wait(&client, "none", |v| v.workers.is_empty()).await;
    let metrics = crate::http::client()
        .get(format!("{}/metrics", server.url()))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    assert!(metrics.contains("baton_conductor_lease_expired_total 1"), "a goodbye is no expiry: {metrics}");
    server.stop().await;
}

/// A conductor whose store is away.
async fn faulty() -> (String, TaskTracker) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let tasks = TaskTracker::new();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let body = json!({ "error": { "type": "unavailable_error", "code": "store_unavailable", "message": "the store is away" } })
                .to_string();
            let head =
                "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n";
            let answer = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
            let _ = stream.read(&mut [0; 8192]).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (url, tasks)
}

#[tokio::test]
async fn a_worker_that_leaves_tells_another_conductor_when_one_has_a_fault_of_its_own() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let (broken, _tasks) = faulty().await;
    let client = Client::start(ClientOptions::new(vec![broken, server.url()])).unwrap();
    let host = Host::new();
    let worker = join(&client, "w", &host.address()).await.unwrap();
    assert_eq!(server.listing().await.workers.len(), 1);
    worker.leave().await;
    assert_eq!(server.listing().await.workers.len(), 0);
    server.stop().await;
}

#[tokio::test]
async fn a_name_has_one_holder_until_its_host_is_gone() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let client = server.client();
    let (host, other) = (Host::new(), Host::new());
    let first = join(&client, "w", &host.address()).await.unwrap();
    let first_epoch = first.epoch().borrow().unwrap();
    let Err(JoinError::NameTaken { holder }) = join(&client, "w", &other.address()).await else {
        panic!("a second holder");
    };
    assert_eq!((holder.epoch, holder.address.as_str()), (first_epoch, host.address().as_str()));
    assert_eq!(holder.pid, std::process::id());

    // The process died, and its successor has bound the same port.
    drop(first);
    let second = join(&client, "w", &host.address()).await.expect("its predecessor's address is its own now");
    let second_epoch = second.epoch().borrow().unwrap();
    assert!(second_epoch > first_epoch);
    let view = wait(&client, "the successor", |v| v.workers.values().any(|w| w.epoch == second_epoch)).await;
    assert_eq!(view.workers.len(), 1);
    let stale = json!({"epoch": first_epoch, "seq": 1, "state": "ready"});
    let reply = crate::http::client().post(format!("{}/v1/workers/w/keepalive", server.url())).json(&stale);
    let reply = reply.send().await.unwrap();
    assert_eq!(reply.status(), 409);
    let ErrorBody { error: ErrorDetail { code, .. } } = reply.json().await.unwrap();
    assert_eq!(code, "stale_epoch");

    // It died again, nothing listens there, and its successor came up elsewhere.
    drop(second);
    drop(host);
    let third = join(&client, "w", &other.address()).await.expect("nothing listens at the holder's address");
    assert!(third.epoch().borrow().unwrap() > second_epoch);
    assert_eq!(server.listing().await.workers.len(), 1);
    third.leave().await;
    server.stop().await;
}

#[tokio::test]
async fn an_address_that_others_reach_is_refused_without_authentication() {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let refused = serve(ConductorOptions::new(pools()), listener, CancellationToken::new()).await;
    let Err(error @ ServeError::OpenListen { .. }) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains("set conductor.auth.token_file or"), "{error}");
}

#[tokio::test]
async fn metrics_are_there_from_the_start() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let metrics = crate::http::client()
        .get(format!("{}/metrics", server.url()))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    for line in [
        "baton_conductor_workers{role=\"prefill\",state=\"ready\"} 0",
        "baton_conductor_workers{role=\"both\",state=\"draining\"} 0",
        "baton_conductor_lease_expired_total 0",
        "baton_conductor_store_up 1",
        "baton_scale_desired{pool=\"decode\"} 2",
        "baton_stale_epoch_refused_total 0",
        "baton_conductor_refused_total{code=\"name_taken\"} 0",
    ] {
        assert!(metrics.lines().any(|l| l == line), "no {line:?} in\n{metrics}");
    }
    for path in ["/livez", "/readyz"] {
        assert_eq!(
            crate::http::client().get(format!("{}{path}", server.url())).send().await.unwrap().status(),
            200,
            "{path}"
        );
    }
    server.stop().await;
}
