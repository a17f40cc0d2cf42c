//! A router on a port of its own, with fake workers behind it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_config::Role;
use baton_config::fleet::{Disaggregation, PolicyKind};
use baton_router::{Member, ModelOptions, Roster, RouterOptions, Stop, serve_with};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::fake_worker::FakeWorker;
use super::model_dir;

/// How long anything that should happen may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A running router.
pub(crate) struct Harness {
    pub(crate) address: std::net::SocketAddr,
    pub(crate) stop: Stop,
    pub(crate) members: watch::Sender<Arc<Roster>>,
    pub(crate) client: Client<HttpConnector, Full<Bytes>>,
    router: Option<JoinHandle<Result<(), baton_router::ServeError>>>,
    _model: tempfile::TempDir,
}

/// An answer read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {}", self.text))
    }

    /// The events of a stream; the `[DONE]` at the end is checked and left out.
    pub(crate) fn events(&self) -> Vec<Value> {
        let mut events = sse(&self.text);
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.text);
        events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }

    /// The text of choice `index`, put together from a stream or taken from a whole answer.
    pub(crate) fn content(&self, index: u64) -> String {
        let of_choice = |choice: &Value| {
            let places = ["/delta/content", "/message/content", "/text"];
            places.iter().find_map(|place| choice.pointer(place)?.as_str()).unwrap_or_default().to_owned()
        };
        let bodies = if self.text.starts_with("data:") { self.events() } else { vec![self.json()] };
        let choices = bodies.iter().flat_map(|body| body["choices"].as_array().cloned().unwrap_or_default());
        choices.filter(|choice| choice["index"] == index).map(|choice| of_choice(&choice)).collect()
    }
}

/// The data of server-sent events; anything that is no event fails the test.
pub(crate) fn sse(text: &str) -> Vec<String> {
    let blocks = text.split_terminator("\n\n");
    blocks.map(|block| block.strip_prefix("data: ").expect("an event").to_owned()).collect()
}

/// The data of named events, each checked against its name; comments are left out.
pub(crate) fn typed(text: &str) -> Vec<Value> {
    let blocks = text.split_terminator("\n\n").filter(|block| !block.starts_with(':'));
    let data = |block: &str| {
        let (name, data) = block
            .strip_prefix("event: ")
            .and_then(|rest| rest.split_once("\ndata: "))
            .unwrap_or_else(|| panic!("no event: {block}"));
        let event: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(event["type"].as_str(), Some(name), "{block}");
        event
    };
    blocks.map(data).collect()
}

/// The types of events, repetitions in a row left out.
pub(crate) fn types(events: &[Value]) -> Vec<&str> {
    let mut types: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    types.dedup();
    types
}

/// A router with one worker that does everything.
pub(crate) async fn one_worker() -> (FakeWorker, Harness) {
    let decode = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&decode], |_| {}).await;
    (decode, harness)
}

/// Gives the model room for an answer of gigabytes.
pub(crate) fn without_end(options: &mut RouterOptions) {
    let path = options.model.path.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    config["max_position_embeddings"] = serde_json::json!(4_000_000);
    std::fs::write(&path, config.to_string()).expect("written");
}

/// An address where nobody listens, and where nobody else will while the socket is kept.
pub(crate) fn nowhere() -> (TcpSocket, String) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let address = socket.local_addr().expect("an address").to_string();
    (socket, address)
}

impl Harness {
    /// Asks for an answer over a connection of its own, which takes little that is not read.
    pub(crate) async fn sleeper(&self, path: &str, body: &Value) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(16 << 10).expect("small");
        let mut sleeper = socket.connect(self.address).await.expect("a connection");
        let body = body.to_string();
        let head = format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", body.len());
        sleeper.write_all(format!("{head}{body}").as_bytes()).await.expect("written");
        sleeper
    }

    /// Waits until a worker that has begun to send sends nothing more.
    pub(crate) async fn until_it_stands_still(&self, worker: &FakeWorker) {
        let sent = || worker.seen.sent.load(Ordering::SeqCst);
        let stands = async || {
            let before = sent();
            tokio::time::sleep(Duration::from_millis(300)).await;
            before > 0 && before == sent()
        };
        self.until("the worker stands still", stands).await;
    }

    /// A router before `workers`, with every default but those that `change` touches.
    pub(crate) async fn start(workers: &[&FakeWorker], change: impl FnOnce(&mut RouterOptions)) -> Self {
        let serves = workers.iter().any(|worker| worker.member.role.decodes());
        let harness = Self::start_bare(workers, change).await;
        let wanted = if serves { 200 } else { 503 };
        harness.until("the router answers", async || harness.get("/readyz").await.status == wanted).await;
        harness
    }

    /// The same, without waiting until it is ready.
    pub(crate) async fn start_bare(workers: &[&FakeWorker], change: impl FnOnce(&mut RouterOptions)) -> Self {
        let model = tempfile::tempdir().expect("a directory");
        model_dir::write(model.path());
        let mut options = RouterOptions::new(
            ModelOptions {
                id: "tiny".to_owned(),
                served_as: vec!["gpt-4o-mini".to_owned(), "org/tiny".to_owned()],
                path: model.path().to_owned(),
                max_context: None,
            },
            "http://127.0.0.1:1".to_owned(),
        );
        options.policy = PolicyKind::RoundRobin;
        options.disaggregation = Disaggregation::Always;
        change(&mut options);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let members: Vec<Member> = workers.iter().map(|worker| worker.member.clone()).collect();
        let roster = Roster { members, age: Duration::ZERO };
        let (send, feed) = watch::channel(Arc::new(roster));
        let stop = Stop::default();
        let router = {
            let stop = stop.clone();
            #[expect(clippy::disallowed_methods, reason = "a test owns the task through its handle")]
            tokio::spawn(serve_with(options, feed, listener, stop))
        };
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { address, stop, members: send, client, router: Some(router), _model: model }
    }

    /// Waits for a condition; fails the test when it does not come.
    pub(crate) async fn until(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !condition().await {
            assert!(tokio::time::Instant::now() < deadline, "never happened: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: impl Into<Bytes>) -> Response<Incoming> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header("content-type", "application/json")
            .body(Full::new(body.into()))
            .expect("a request");
        tokio::time::timeout(PATIENCE, self.client.request(request))
            .await
            .expect("in time")
            .expect("an answer")
    }

    pub(crate) async fn ask(&self, method: &str, path: &str, body: impl Into<Bytes>) -> Answer {
        let (head, body) = self.send(method, path, body).await.into_parts();
        let bytes = tokio::time::timeout(PATIENCE, body.collect()).await.expect("in time").expect("a body");
        let text = String::from_utf8(bytes.to_bytes().to_vec()).expect("UTF-8");
        Answer { status: head.status.as_u16(), headers: head.headers, text }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "").await
    }

    pub(crate) async fn chat(&self, body: &Value) -> Answer {
        self.ask("POST", "/v1/chat/completions", body.to_string()).await
    }

    pub(crate) async fn complete(&self, body: &Value) -> Answer {
        self.ask("POST", "/v1/completions", body.to_string()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path, body.to_string()).await
    }

    /// The value of a metric; `name` with its labels, as exported.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.text;
        let line =
            text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        let line = line.unwrap_or_else(|| panic!("{name} is not exported:\n{text}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }

    /// Checks that every request that began has ended exactly once, but for the one that asks.
    pub(crate) async fn check_books(&self) {
        let balanced = async || {
            let text = self.get("/metrics").await.text;
            let value = |name: &str| -> f64 {
                let line = text.lines().find(|line| line.starts_with(name)).expect("exported");
                line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
            };
            let ended: f64 = text
                .lines()
                .filter(|line| line.starts_with("baton_router_requests_ended_total{"))
                .map(|line| line.rsplit(' ').next().and_then(|v| v.parse::<f64>().ok()).expect("a number"))
                .sum();
            let coded: f64 = text
                .lines()
                .filter(|line| line.starts_with("baton_router_requests_total{"))
                .map(|line| line.rsplit(' ').next().and_then(|v| v.parse::<f64>().ok()).expect("a number"))
                .sum();
            let in_flight = value("baton_router_inflight");
            assert!((coded - ended).abs() < 0.5, "codes and outcomes differ");
            assert!((value("baton_router_requests_started_total") - ended - in_flight).abs() < 0.5);
            in_flight < 1.5
        };
        self.until("all requests ended", balanced).await;
    }

    /// Tells the router to drain and waits for its end.
    pub(crate) async fn finish(mut self) {
        self.check_books().await;
        self.stop.drain.cancel();
        self.stop.now.cancel();
        self.join().await;
    }

    /// Waits for the end of the router.
    pub(crate) async fn join(&mut self) {
        if let Some(router) = self.router.take() {
            tokio::time::timeout(PATIENCE, router)
                .await
                .expect("in time")
                .expect("no panic")
                .expect("no error");
        }
    }
}
