use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Mutex;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use baton_config::fleet::{KubernetesSpec, WebhookAuth, WebhookSpec, WorkloadKind};
use http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

use super::*;
use crate::mirror::{Fleet, ScaledSeen};
use crate::reconcile::Fence;
use crate::store::Store;
use crate::store::embedded::{Embedded, EmbeddedOptions};

mod secure;

/// One request as it came.
#[derive(Debug, Clone)]
struct Call {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
}

/// A server that answers as a Kubernetes API server does for one Deployment, and as told for anything else.
#[derive(Default)]
struct Fake {
    calls: Mutex<Vec<Call>>,
    /// Answers to come before the usual one.
    faults: Mutex<VecDeque<StatusCode>>,
    replicas: Mutex<(u32, u32)>,
}

impl Fake {
    async fn start() -> (Arc<Self>, SocketAddr) {
        Self::serve(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn serve<L: Listener<Addr = SocketAddr>>(listener: L) -> (Arc<Self>, SocketAddr) {
        let fake = Arc::new(Self::default());
        *fake.replicas.lock().unwrap() = (2, 100);
        let address = listener.local_addr().unwrap();
        let app = Router::new().fallback(answer).with_state(fake.clone());
        TaskTracker::new().spawn(async move { axum::serve(listener, app).await });
        (fake, address)
    }

    fn fail(&self, status: u16) {
        self.faults.lock().unwrap().push_back(StatusCode::from_u16(status).unwrap());
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

async fn answer(
    State(fake): State<Arc<Fake>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    fake.calls.lock().unwrap().push(Call {
        method: method.clone(),
        uri: uri.clone(),
        headers,
        body: body.clone(),
    });
    let fault = fake.faults.lock().unwrap().pop_front();
    if uri.path() == "/hook" {
        return (fault.unwrap_or(StatusCode::ACCEPTED), "not today\n").into_response();
    }
    if let Some(status) = fault {
        return status_of(status, "injected");
    }
    let path = "/apis/apps/v1/namespaces/serving/deployments/prefill/scale";
    if uri.path() != path {
        return status_of(StatusCode::NOT_FOUND, "deployments.apps \"other\" not found");
    }
    let mut held = fake.replicas.lock().unwrap();
    if method == Method::PATCH {
        let patch: Value = serde_json::from_slice(&body).unwrap();
        if patch["metadata"]["resourceVersion"] != json!(held.1.to_string()) {
            return status_of(StatusCode::CONFLICT, "the object has been modified");
        }
        *held = (u32::try_from(patch["spec"]["replicas"].as_u64().unwrap()).unwrap(), held.1 + 1);
    } else if method != Method::GET {
        return status_of(StatusCode::METHOD_NOT_ALLOWED, "no");
    }
    let metadata =
        json!({ "name": "prefill", "namespace": "serving", "resourceVersion": held.1.to_string() });
    let scale = json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
        "spec": { "replicas": held.0 }, "status": { "replicas": 2, "selector": "app=prefill" },
    });
    axum::Json(scale).into_response()
}

/// An error as the API server words it.
fn status_of(status: StatusCode, message: &str) -> Response {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": status.canonical_reason(), "code": status.as_u16(),
    });
    (status, axum::Json(body)).into_response()
}

fn spec(name: &str) -> KubernetesSpec {
    KubernetesSpec {
        namespace: "serving".to_owned(),
        kind: WorkloadKind::Deployment,
        name: name.to_owned(),
        kubeconfig: None,
    }
}

fn kubernetes(address: SocketAddr, name: &str) -> Kubernetes {
    let config = kube::Config::new(format!("http://{address}").parse().unwrap());
    Kubernetes::with_client(spec(name), kube::Client::try_from(config).unwrap())
}

#[tokio::test]
async fn kubernetes_is_asked_by_the_scale_subresource_and_only_for_what_differs() {
    let (fake, address) = Fake::start().await;
    let mut scaler = kubernetes(address, "prefill");
    assert_eq!(scaler.current().await.unwrap(), 2);
    assert_eq!(scaler.scale(2).await.unwrap(), 2);
    assert!(fake.calls().iter().all(|call| call.method == Method::GET), "nothing differs");
    assert_eq!(scaler.scale(5).await.unwrap(), 5);
    let calls = fake.calls();
    let methods: Vec<&Method> = calls.iter().map(|call| &call.method).collect();
    assert_eq!(methods, [Method::GET, Method::PATCH]);
    let patch = &calls[1];
    assert_eq!(patch.uri.path(), "/apis/apps/v1/namespaces/serving/deployments/prefill/scale");
    assert!(patch.uri.query().unwrap_or_default().contains("fieldManager=baton-autoscaler"), "{}", patch.uri);
    assert_eq!(patch.headers["content-type"], "application/merge-patch+json");
    let body: Value = serde_json::from_slice(&patch.body).unwrap();
    assert_eq!(body, json!({ "metadata": { "resourceVersion": "100" }, "spec": { "replicas": 5 } }));
    assert_eq!(fake.replicas.lock().unwrap().0, 5);
}

#[tokio::test]
async fn what_kubernetes_refuses_is_told_with_a_remedy() {
    let (fake, address) = Fake::start().await;
    let mut scaler = kubernetes(address, "prefill");
    for (status, words) in [
        (401, "does not know who asks"),
        (
            403,
            "allow the conductor's service account get and patch on deployments/scale in namespace serving",
        ),
        (409, "was changed by somebody else meanwhile"),
        (500, "answers 500: injected"),
    ] {
        fake.fail(status);
        let problem = scaler.scale(4).await.unwrap_err().to_string();
        assert!(problem.contains(words), "{status}: {problem}");
    }
    assert_eq!(scaler.scale(4).await.unwrap(), 4, "and afterwards it is done");
    let problem = kubernetes(address, "other").scale(4).await.unwrap_err().to_string();
    assert_eq!(problem, "there is no Deployment other in namespace serving: check autoscale.kubernetes");
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let problem = kubernetes(closed, "prefill").scale(4).await.unwrap_err().to_string();
    assert!(problem.starts_with("the Kubernetes API server can't be reached: "), "{problem}");
    // Somebody changes it between the reading and the patch.
    fake.calls();
    fake.replicas.lock().unwrap().1 = 200;
    let racing = async {
        while fake.calls.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        fake.replicas.lock().unwrap().1 = 201;
    };
    let (raced, ()) = tokio::join!(scaler.scale(7), racing);
    if let Err(problem) = raced {
        assert!(problem.to_string().contains("changed by somebody else"), "{problem}");
    }
    assert_eq!(scaler.scale(7).await.unwrap(), 7);
}

#[tokio::test]
async fn a_silent_api_server_is_given_up_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut scaler = kubernetes(address, "prefill");
    let problem = scaler.scale(4).await.unwrap_err().to_string();
    assert_eq!(problem, "the Kubernetes API server does not answer within 4s");
}

fn webhook(url: String) -> WebhookSpec {
    WebhookSpec {
        url,
        timeout: Duration::from_secs(1),
        ca_file: None,
        secret_file: None,
        auth: WebhookAuth::Hmac,
    }
}

fn scaled(desired: u32, id: &str) -> Scaled {
    Scaled {
        desired,
        kind: "up".to_owned(),
        reason: "queue wait 812 ms".to_owned(),
        dry_run: false,
        scaler: baton_config::fleet::ScalerKind::Webhook,
        id: id.to_owned(),
        problem: None,
    }
}

/// A scaler with the store and fleet that its turns need.
struct Bench {
    agent: ScalerAgent,
    board: Arc<Board>,
    store: Arc<Embedded>,
    fleet: Fleet,
    pool: PoolName,
    term: u64,
}

impl Bench {
    async fn new(scaler: ScalerSpec) -> Self {
        let pool: PoolName = "prefill".parse().unwrap();
        let scale = Autoscale { scaler, ..Autoscale::new(Role::Prefill, 1, 8) };
        let options = PoolOptions { name: pool.clone(), role: Role::Prefill, replicas: 2, min: 1, max: 8 };
        let board = Arc::new(Board::new([&pool].into_iter()));
        let store = EmbeddedOptions { state_file: None, holder: "a test".to_owned() };
        let store = Arc::new(Embedded::start(store, &TaskTracker::new()).await.unwrap());
        let agent = ScalerAgent::new(&options, scale, board.clone());
        Self { agent, board, store, fleet: Fleet::default(), pool, term: 1 }
    }

    fn decide(&mut self, scaled: Scaled) {
        self.fleet.scale.insert(self.pool.clone(), ScaledSeen { scaled, since: Instant::now() });
    }

    async fn turn(&mut self, now: Instant) {
        let store: &dyn Store = &*self.store;
        self.agent.turn(Turn { now, fleet: &self.fleet, store, fence: Fence::new(self.term) }).await;
    }
}

#[tokio::test]
async fn a_web_hook_is_told_until_it_accepts_each_time_with_the_same_id() {
    let (fake, address) = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let secret_file = directory.path().join("secret");
    std::fs::write(&secret_file, "a secret of the scaler\n").unwrap();
    std::fs::set_permissions(&secret_file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let spec =
        WebhookSpec { secret_file: Some(secret_file.clone()), ..webhook(format!("http://{address}/hook")) };
    let mut bench = Bench::new(ScalerSpec::Webhook(spec)).await;
    let mut now = Instant::now();
    bench.turn(now).await;
    assert!(fake.calls().is_empty(), "nothing was decided");
    bench.decide(scaled(4, "one"));
    fake.fail(500);
    fake.fail(302);
    for _ in 0..5 {
        now += Duration::from_secs(31);
        bench.turn(now).await;
    }
    let calls = fake.calls();
    assert_eq!(calls.len(), 3, "two failures, one success, no more");
    for call in &calls {
        assert_eq!((&call.method, call.uri.path()), (&Method::POST, "/hook"));
        let body: Value = serde_json::from_slice(&call.body).unwrap();
        let expected = json!({
            "pool": "prefill", "role": "prefill", "desired": 4, "ready": 0, "reason": "queue wait 812 ms", "id": "one",
        });
        assert_eq!(body, expected);
        let signed = webhook::signature(b"a secret of the scaler", &call.body);
        assert_eq!(call.headers["x-baton-signature"].to_str().unwrap(), signed);
    }
    assert_eq!(bench.board.entries()[&bench.pool].errors, 2);
    assert_eq!(bench.board.problem(&bench.pool), None, "it works again");

    bench.decide(Scaled { kind: "at_max".to_owned(), ..scaled(4, "two") });
    bench.turn(now + Duration::from_secs(1)).await;
    assert!(fake.calls().is_empty(), "the number is the same");
    fake.fail(503);
    bench.decide(scaled(6, "three"));
    bench.turn(now + Duration::from_secs(2)).await;
    let problem = bench.board.problem(&bench.pool).unwrap();
    assert!(problem.ends_with("/hook answers 503 Service Unavailable: not today"), "{problem}");
    bench.decide(scaled(7, "at once"));
    bench.turn(now + Duration::from_secs(2)).await;
    assert_eq!(fake.calls().len(), 1, "who fails is given a pause, whatever the news");
    bench.decide(Scaled { dry_run: true, ..scaled(8, "four") });
    bench.turn(now + Duration::from_secs(90)).await;
    assert!(fake.calls().is_empty(), "a dry run tells nobody");

    // What failed may have been carried out: the number before is told again.
    bench.decide(scaled(4, "five"));
    bench.turn(now + Duration::from_secs(120)).await;
    assert_eq!(fake.calls().len(), 1);
    fake.fail(503);
    bench.decide(scaled(6, "six"));
    bench.turn(now + Duration::from_secs(121)).await;
    bench.decide(scaled(4, "seven"));
    bench.turn(now + Duration::from_secs(190)).await;
    assert_eq!(fake.calls().len(), 2, "one that failed, one that did not");
    // So it is when another conductor may have led in between.
    bench.turn(now + Duration::from_secs(260)).await;
    assert!(fake.calls().is_empty());
    bench.term = 9;
    bench.turn(now + Duration::from_secs(261)).await;
    assert_eq!(fake.calls().len(), 1);
}

#[tokio::test]
async fn a_web_hook_may_know_us_by_a_token_and_must_be_there() {
    let (fake, address) = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let secret_file = Some(directory.path().join("token"));
    let spec =
        WebhookSpec { secret_file, auth: WebhookAuth::Bearer, ..webhook(format!("http://{address}/hook")) };
    let path = spec.secret_file.clone().unwrap();
    let pool = "p".parse().unwrap();
    let notice = Notice { pool: &pool, role: Role::Both, desired: 1, ready: 1, reason: "", id: "" };
    let mut hook = Webhook::new(spec.clone());
    assert!(hook.tell(&notice).await.unwrap_err().to_string().starts_with("no secret: "));
    std::fs::write(&path, "token-1\n").unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    hook.tell(&notice).await.unwrap();
    assert_eq!(fake.calls()[0].headers["authorization"], "Bearer token-1");
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", silent.local_addr().unwrap());
    let problem = Webhook::new(webhook(url.clone())).tell(&notice).await.unwrap_err().to_string();
    assert_eq!(problem, format!("{url} does not answer within 1000 ms"));
    drop(silent);
    let problem = Webhook::new(webhook(url)).tell(&notice).await.unwrap_err().to_string();
    assert!(problem.contains("can't be reached: "), "{problem}");
    let missing = Some(directory.path().join("ca.pem"));
    let spec = WebhookSpec { ca_file: missing, ..webhook("https://localhost:1/".to_owned()) };
    assert!(Webhook::new(spec).tell(&notice).await.unwrap_err().to_string().starts_with("no ca_file: "));
}

#[test]
fn the_signature_is_the_standard_one() {
    // Checked with `openssl dgst -sha256 -hmac key`.
    let signed = webhook::signature(b"key", b"The quick brown fox jumps over the lazy dog");
    assert_eq!(signed, "sha256=f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8");
}

#[tokio::test]
async fn kubernetes_is_compared_with_the_decision_over_and_over() {
    let (fake, address) = Fake::start().await;
    let mut bench = Bench::new(ScalerSpec::Kubernetes(spec("prefill"))).await;
    bench.agent.means = Some(Means::Kubernetes(kubernetes(address, "prefill")));
    let now = Instant::now();
    bench.turn(now).await;
    assert_eq!(bench.board.found(&bench.pool), Some(2), "whoever adopts the pool is told what is there");
    bench.decide(scaled(4, "one"));
    bench.turn(now + Duration::from_secs(1)).await;
    assert_eq!(fake.replicas.lock().unwrap().0, 4, "news do not wait");
    fake.replicas.lock().unwrap().0 = 9;
    bench.turn(now + Duration::from_secs(2)).await;
    assert_eq!(fake.replicas.lock().unwrap().0, 9, "not all the time");
    bench.turn(now + Duration::from_secs(12)).await;
    assert_eq!(fake.replicas.lock().unwrap().0, 4, "whoever changed it was not asked");
}
