use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

use ::http::{HeaderMap, StatusCode};
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use baton_conductor::ConductorOptions;
use baton_conductor::server::PoolOptions;
use baton_config::fleet::{ConductorAccess, Fleet, Source};
use baton_config::protocol::WorkerStatus;
use baton_config::{Epoch, Role, WorkerId};
use gauges::Busy;
use health::{Canary, Failure};

use super::*;

/// For anything that should happen.
const PATIENCE: Duration = Duration::from_secs(30);
/// For what should not be waited for.
const LONG: Duration = Duration::from_secs(3600);

/// How the server is.
#[derive(Debug, Default)]
struct Mood {
    busy: AtomicBool,
    down: AtomicBool,
    /// Does not tell how busy it is.
    mute: AtomicBool,
    /// Empty lines before what it tells.
    ahead: AtomicU32,
    /// How often it was asked that.
    asked: AtomicU32,
    /// Tokens so far; not told while there is none.
    tokens: AtomicU32,
    /// What requests are answered with; all is well with 0.
    answer: AtomicU16,
}

impl Mood {
    fn is(&self, mood: impl Fn(&Self) -> &AtomicBool, so: bool) {
        mood(self).store(so, Ordering::SeqCst);
    }

    /// Waits until two more looks have begun and the first of them is over.
    async fn looks(&self) {
        let before = self.asked.load(Ordering::SeqCst);
        let twice = async {
            while self.asked.load(Ordering::SeqCst) < before + 2 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, twice).await.expect("it is looked at");
    }
}

fn has_key(headers: &HeaderMap) -> bool {
    headers.get("authorization").is_some_and(|key| key == "Bearer sk-engine")
}

/// A server that has no `/health`, asks for a key and counts requests as vLLM does.
async fn serve(listener: TcpListener, mood: Arc<Mood>) {
    let models = async |State(mood): State<Arc<Mood>>, headers: HeaderMap| match has_key(&headers) {
        _ if mood.down.load(Ordering::SeqCst) => StatusCode::SERVICE_UNAVAILABLE,
        true => StatusCode::OK,
        false => StatusCode::UNAUTHORIZED,
    };
    let metrics = async |State(mood): State<Arc<Mood>>| {
        mood.asked.fetch_add(1, Ordering::SeqCst);
        if mood.mute.load(Ordering::SeqCst) {
            return Err(StatusCode::SERVICE_UNAVAILABLE);
        }
        let running = u32::from(mood.busy.load(Ordering::SeqCst));
        let tokens = match mood.tokens.load(Ordering::SeqCst) {
            0 => String::new(),
            tokens => format!("vllm:generation_tokens_total {tokens}\n"),
        };
        let ahead = "\n".repeat(mood.ahead.load(Ordering::SeqCst) as usize);
        Ok(format!(
            "{ahead}vllm:num_requests_running{{engine=\"0\"}} {running}.0\nvllm:num_requests_waiting 0\n{tokens}"
        ))
    };
    let completions = async |State(mood): State<Arc<Mood>>, headers: HeaderMap, body: String| -> Response {
        match mood.answer.load(Ordering::SeqCst) {
            _ if !has_key(&headers) => StatusCode::UNAUTHORIZED.into_response(),
            0 if body.contains("\"tiny\"") => StatusCode::OK.into_response(),
            0 => StatusCode::NOT_FOUND.into_response(),
            HALF => {
                let pieces = futures_util::stream::unfold(0, async |n| match n {
                    0 => Some((Ok("{"), 1)),
                    // The first piece is on its way by then.
                    1 => {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        Some((Err(std::io::Error::other("it broke")), 2))
                    }
                    _ => None,
                });
                Body::from_stream(pieces).into_response()
            }
            status => StatusCode::from_u16(status).unwrap().into_response(),
        }
    };
    let routes = Router::new()
        .route("/v1/models", get(models))
        .route("/metrics", get(metrics))
        .route("/v1/completions", post(completions))
        .with_state(mood);
    axum::serve(listener, routes).await.expect("served");
}

/// Stands for an answer that breaks off.
const HALF: u16 = 1;

fn options(server: String, key: Option<std::path::PathBuf>) -> SidecarOptions {
    SidecarOptions {
        worker: "servers-0".parse().unwrap(),
        pool: "servers".parse().unwrap(),
        role: Role::Both,
        model: "tiny".to_owned(),
        server,
        server_model: "tiny".to_owned(),
        api_key_file: key,
        ca_file: None,
        health_path: None,
        advertise: None,
        conductors: vec!["http://127.0.0.1:1".to_owned()],
        conductor_access: ConductorAccess::default(),
        drain_grace: LONG,
        join_timeout: PATIENCE,
    }
}

async fn until(seen: &mut watch::Receiver<Seen>, what: &str, is: impl FnMut(&Seen) -> bool) -> Seen {
    let found = tokio::time::timeout(PATIENCE, seen.wait_for(is)).await;
    found.unwrap_or_else(|_| panic!("never seen: {what}")).expect("the watcher runs").clone()
}

#[tokio::test]
async fn a_server_is_waited_for_watched_and_missed() {
    let folder = key_file("watched", "sk-wrong");
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let prober = Prober::new(&options(format!("http://{address}"), Some(folder.join("key")))).unwrap();
    let (send, mut seen) = watch::channel(Seen::default());
    let tasks = TaskTracker::new();
    let stop = CancellationToken::new();
    let watcher = Watcher { prober, seen: send, metrics: metrics::Metrics::new().unwrap() };
    tasks.spawn(stop.clone().run_until_cancelled_owned(watcher.run()));
    let unwell = |seen: &Seen| matches!(seen.verdict, Verdict::Unwell(_));
    until(&mut seen, "that nobody listens", unwell).await;

    let mood = Arc::new(Mood::default());
    mood.is(|mood| &mood.busy, true);
    let listener = TcpListener::bind(address).await.unwrap();
    let serving = stop.child_token();
    tasks.spawn(serving.clone().run_until_cancelled_owned(serve(listener, Arc::clone(&mood))));
    let refused = |seen: &Seen| seen.last_error.as_ref().is_some_and(|error| error.what.contains("401"));
    until(&mut seen, "that the key is refused", refused).await;
    std::fs::write(folder.join("key"), "sk-engine\n").unwrap();
    let well = until(&mut seen, "that it is well", |seen| seen.verdict == Verdict::Well).await;
    assert_eq!(well.gauges.map(|gauges| gauges.running), Some(1));
    // What it does not tell for a moment is not nothing.
    mood.is(|mood| &mood.mute, true);
    mood.looks().await;
    let told = seen.borrow().at;
    mood.looks().await;
    let still = seen.borrow().clone();
    assert_eq!((still.gauges.map(|gauges| gauges.running), still.at), (Some(1), told));
    mood.is(|mood| &mood.mute, false);
    mood.is(|mood| &mood.busy, false);
    let idle = |seen: &Seen| seen.gauges.is_some_and(|gauges| gauges.running == 0);
    until(&mut seen, "that it is idle", idle).await;
    mood.is(|mood| &mood.down, true);
    let unwell = until(&mut seen, "that it is not well", unwell).await;
    assert!(!unwell.gone && unwell.gauges.is_some());
    serving.cancel();
    let gone = until(&mut seen, "that nobody listens any more", |seen| seen.gone).await;
    assert!(gone.gone_at.is_some() && gone.gauges.is_none());
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    std::fs::remove_dir_all(folder).unwrap();
}

/// A folder with a file `key` that is closed to strangers.
fn key_file(test: &str, key: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("baton-sidecar-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("key"), key).unwrap();
    std::fs::set_permissions(folder.join("key"), std::fs::Permissions::from_mode(0o600)).unwrap();
    folder
}

#[tokio::test]
async fn a_canary_dies_of_the_server_alone_and_sings_with_the_key_of_today() {
    let folder = key_file("canary", "sk-wrong");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("http://{}", listener.local_addr().unwrap());
    let (mood, tasks, stop) = (Arc::new(Mood::default()), TaskTracker::new(), CancellationToken::new());
    tasks.spawn(stop.clone().run_until_cancelled_owned(serve(listener, Arc::clone(&mood))));
    let prober = Prober::new(&options(server, Some(folder.join("key")))).unwrap();
    std::fs::write(folder.join("key"), "sk-engine\n").unwrap();
    assert_eq!(prober.canary().await, Canary::Mute, "the server does not take this key");
    assert_eq!(prober.canary().await, Canary::Sang, "the key was read again");
    mood.answer.store(429, Ordering::SeqCst);
    assert_eq!(prober.canary().await, Canary::Mute);
    mood.answer.store(500, Ordering::SeqCst);
    assert!(matches!(prober.canary().await, Canary::Dead(_)));
    mood.answer.store(HALF, Ordering::SeqCst);
    assert_eq!(prober.canary().await, Canary::Dead("its answer broke off".to_owned()));
    stop.cancel();
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test(start_paused = true)]
async fn nobody_is_waited_for_long_and_only_who_refuses_is_not_there() {
    // One that takes connections and never answers.
    let frozen = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for (server, refuses) in [
        (format!("http://{}", frozen.local_addr().unwrap()), false),
        ("http://nobody-has-this-name.invalid".to_owned(), false),
        (format!("http://{free}"), true),
    ] {
        let begun = Instant::now();
        let mut prober = Prober::new(&options(server.clone(), None)).unwrap();
        let look = prober.look().await;
        assert_eq!(matches!(look, Err(Failure::Refused(_))), refuses, "{server}: {look:?}");
        assert!(matches!(prober.canary().await, Canary::Dead(_)));
        assert!(begun.elapsed() < Duration::from_secs(60), "{server}: {:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_server_may_miss_some_looks_and_one_that_does_not_tell_is_seldom_asked() {
    let folder = key_file("looks", "sk-engine");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = format!("http://{address}");
    let (mood, tasks, stop) = (Arc::new(Mood::default()), TaskTracker::new(), CancellationToken::new());
    let serving = stop.child_token();
    tasks.spawn(serving.clone().run_until_cancelled_owned(serve(listener, Arc::clone(&mood))));
    let options = options(server, Some(folder.join("key")));
    let mut prober = Prober::new(&options).unwrap();
    mood.is(|mood| &mood.mute, true);
    for _ in 0..10 {
        assert_eq!(prober.look().await, Ok(Busy::Untold));
    }
    assert_eq!(mood.asked.load(Ordering::SeqCst), 1);
    mood.is(|mood| &mood.mute, false);
    let told = async |prober: &mut Prober| matches!(prober.look().await, Ok(Busy::Told(_)));
    let mut looks = 0;
    while !told(&mut prober).await {
        looks += 1;
        assert!(looks < 100, "it is asked again");
    }
    mood.is(|mood| &mood.mute, true);
    let mut missed = 0;
    while prober.look().await == Ok(Busy::Missed) {
        missed += 1;
        assert!(missed < 100, "it has ceased to tell");
    }
    assert!(missed > 10, "{missed}");
    // An answer of a size that nobody needs is none.
    mood.is(|mood| &mood.mute, false);
    for (ahead, tells) in [(1 << 20, true), (5 << 20, false), (0, true)] {
        mood.ahead.store(ahead, Ordering::SeqCst);
        let mut look = prober.look().await;
        while tells && look == Ok(Busy::Untold) {
            look = prober.look().await;
        }
        assert_eq!(matches!(look, Ok(Busy::Told(_))), tells, "{ahead}: {look:?}");
    }
    mood.is(|mood| &mood.mute, true);
    while prober.look().await == Ok(Busy::Missed) {}
    // Whoever comes after a while without anybody is another server.
    mood.is(|mood| &mood.mute, false);
    let mut looks = 0;
    while !told(&mut prober).await {
        looks += 1;
        assert!(looks < 100, "it is asked again");
    }
    mood.is(|mood| &mood.mute, true);
    serving.cancel();
    let gone = async { while !matches!(prober.look().await, Err(Failure::Refused(_))) {} };
    tokio::time::timeout(PATIENCE, gone).await.expect("nobody listens");
    let listener = TcpListener::bind(address).await.unwrap();
    tasks.spawn(stop.clone().run_until_cancelled_owned(serve(listener, Arc::clone(&mood))));
    assert_eq!(prober.look().await, Ok(Busy::Untold));
    // Where it was said where to look, nothing else is.
    let options = SidecarOptions { health_path: Some("/health".to_owned()), ..options };
    let look = Prober::new(&options).unwrap().look().await;
    assert!(
        matches!(&look, Err(Failure::Bad(why)) if why.contains("/health is answered with 404")),
        "{look:?}"
    );
    stop.cancel();
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn requests_that_stand_still_have_the_server_asked_for_one_more_token() {
    let folder = key_file("still", "sk-engine");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = format!("http://{}", listener.local_addr().unwrap());
    let (mood, tasks, stop) = (Arc::new(Mood::default()), TaskTracker::new(), CancellationToken::new());
    mood.is(|mood| &mood.busy, true);
    mood.tokens.store(7, Ordering::SeqCst);
    mood.answer.store(500, Ordering::SeqCst);
    tasks.spawn(stop.clone().run_until_cancelled_owned(serve(listener, Arc::clone(&mood))));
    let prober = Prober::new(&options(server, Some(folder.join("key")))).unwrap();
    let (send, mut seen) = watch::channel(Seen::default());
    let metrics = metrics::Metrics::new().unwrap();
    let watcher = Watcher { prober, seen: send, metrics: metrics.clone() };
    tasks.spawn(stop.clone().run_until_cancelled_owned(watcher.run()));
    let stuck = |seen: &Seen| matches!(&seen.verdict, Verdict::Unwell(why) if why.contains("no progress"));
    until(&mut seen, "that it makes no progress", stuck).await;
    assert!(metrics.text().contains("baton_agent_server_canaries_total{result=\"failed\"} 1"));
    mood.tokens.store(8, Ordering::SeqCst);
    until(&mut seen, "that it goes on", |seen| seen.verdict == Verdict::Well).await;
    stop.cancel();
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_sidecar_calls_the_model_and_looks_for_health_as_the_file_says() {
    let from = |engine: &str| {
        let text = format!(
            "version: 1\nmodel: {{ id: llama }}\npools: [{{ name: gpus, role: both, limits: {{ drain_grace_ms: 1500 }}, \
             engine: {{ kind: openai, urls: [\"http://a:1\", \"http://b:2\"]{engine} }} }}]\n"
        );
        let source = Source { name: "fleet.yaml".to_owned(), directory: None, environment: &|_| None };
        let fleet = Fleet::parse(&text, &source).unwrap();
        let pool = fleet.pools[0].name.clone();
        let of = |replica| SidecarOptions::from_fleet(&fleet, &pool, "gpus-1".parse().unwrap(), replica);
        assert!(matches!(of(2), Err(SidecarOptionsError::NoServer { servers: 2, replica: 2, .. })));
        of(1).unwrap()
    };
    let told = from(", model: org/llama, health_path: /up");
    assert_eq!((told.server.as_str(), told.server_model.as_str()), ("http://b:2", "org/llama"));
    assert_eq!((told.health_path.as_deref(), told.drain_grace), (Some("/up"), Duration::from_millis(1500)));
    let untold = from("");
    assert_eq!((untold.server_model.as_str(), untold.health_path), ("llama", None));
}

/// A conductor, a server, and a sidecar beside it.
struct Stage {
    conductor: SocketAddr,
    conductor_stop: CancellationToken,
    view: Client,
    server: SocketAddr,
    mood: Arc<Mood>,
    serving: CancellationToken,
    /// The sidecar.
    address: SocketAddr,
    stop: Stop,
    ended: tokio::task::JoinHandle<Result<(), SidecarError>>,
    folder: std::path::PathBuf,
    tasks: TaskTracker,
}

impl Stage {
    /// Everything but the server runs.
    async fn set(test: &str) -> Self {
        let folder = key_file(test, "sk-engine");
        let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (listener, own) = (bind().await, bind().await);
        let (conductor, address) = (listener.local_addr().unwrap(), own.local_addr().unwrap());
        let server = bind().await.local_addr().unwrap();
        let tasks = TaskTracker::new();
        let conductor_stop = conduct(listener, &tasks);
        let conductors = vec![format!("http://{conductor}")];
        let view = Client::start(ClientOptions::new(conductors.clone())).unwrap();
        let options =
            SidecarOptions { conductors, ..options(format!("http://{server}"), Some(folder.join("key"))) };
        let stop = Stop::default();
        let ended = tasks.spawn(run(options, own, stop.clone()));
        let (mood, serving) = (Arc::default(), CancellationToken::new());
        Self { conductor, conductor_stop, view, server, mood, serving, address, stop, ended, folder, tasks }
    }

    async fn serve(&self) {
        let listener = TcpListener::bind(self.server).await.unwrap();
        let serving = serve(listener, Arc::clone(&self.mood));
        self.tasks.spawn(self.serving.clone().run_until_cancelled_owned(serving));
    }

    async fn conductor_comes_back(&mut self) {
        self.conductor_stop.cancel();
        let bound = async {
            loop {
                match TcpListener::bind(self.conductor).await {
                    Ok(listener) => return listener,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        let listener = tokio::time::timeout(PATIENCE, bound).await.expect("it ends");
        self.conductor_stop = conduct(listener, &self.tasks);
    }

    async fn told(&self) -> (WorkerStatus, u16) {
        let get = async |path: &str| {
            let url = format!("http://{}{path}", self.address);
            baton_conductor::http::client().get(url).send().await.unwrap()
        };
        (get("/v1/state").await.json().await.unwrap(), get("/readyz").await.status().as_u16())
    }

    /// The worker's life, once it is in this state in view and has heard of it.
    async fn is(&self, state: WorkerState) -> Epoch {
        let name: WorkerId = "servers-0".parse().unwrap();
        let seen = self.view.wait_for(|view| view.worker(&name).is_some_and(|record| record.state == state));
        let view = tokio::time::timeout(PATIENCE, seen).await.expect("never in this state");
        view.worker(&name).map(|record| record.epoch).unwrap()
    }

    async fn drain(&self) {
        let url = format!("http://{}/v1/drain", self.address);
        let answer = baton_conductor::http::client().post(url).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 202);
    }

    /// Waits until the sidecar has left and ended.
    async fn over(self) {
        let name: WorkerId = "servers-0".parse().unwrap();
        tokio::time::timeout(PATIENCE, self.ended).await.expect("never ends").unwrap().unwrap();
        let gone = self.view.wait_for(|view| view.worker(&name).is_none());
        tokio::time::timeout(Duration::from_secs(5), gone).await.expect("long before its lease is over");
        std::fs::remove_dir_all(self.folder).unwrap();
    }
}

fn conduct(listener: TcpListener, tasks: &TaskTracker) -> CancellationToken {
    let name = "servers".parse().unwrap();
    let pools = vec![PoolOptions { name, role: Role::Both, replicas: 1, min: 0, max: 8 }];
    let options = ConductorOptions { lease_ttl: Duration::from_secs(20), ..ConductorOptions::new(pools) };
    let stop = CancellationToken::new();
    tasks.spawn(baton_conductor::serve(options, listener, stop.clone()));
    stop
}

#[tokio::test]
async fn a_server_joins_when_it_is_well_and_leaves_when_an_operator_says_so_and_it_is_idle() {
    let mut stage = Stage::set("operator").await;
    let first = stage.is(WorkerState::Joining).await;
    let (told, ready) = stage.told().await;
    assert_eq!((told.state.as_str(), ready), ("joining", 503));
    stage.serve().await;
    assert_eq!(stage.is(WorkerState::Ready).await, first);
    let (told, ready) = stage.told().await;
    assert_eq!(
        (told.state.as_str(), ready, told.epoch, told.requests_running),
        ("ready", 200, Some(first), 0)
    );
    assert!(told.server_gone_ms.is_some(), "there was none at first");
    // Another life, of which it knows when others do.
    stage.conductor_comes_back().await;
    let name: WorkerId = "servers-0".parse().unwrap();
    let anew = stage.view.wait_for(|view| view.worker(&name).is_some_and(|record| record.epoch > first));
    let view = tokio::time::timeout(PATIENCE, anew).await.expect("it joins again");
    let second = view.worker(&name).map(|record| (record.epoch, record.state));
    assert_eq!(stage.told().await.0.epoch.map(|epoch| (epoch, WorkerState::Ready)), second);
    // It was idle when it was last looked at, and is not any more.
    stage.mood.looks().await;
    stage.mood.is(|mood| &mood.busy, true);
    stage.drain().await;
    stage.is(WorkerState::Draining).await;
    let (told, ready) = stage.told().await;
    assert_eq!((told.state.as_str(), ready), ("draining", 503));
    // Longer than anything but its request is waited for.
    tokio::time::sleep(SETTLE_TIMEOUT).await;
    stage.mood.looks().await;
    stage.mood.is(|mood| &mood.mute, true);
    stage.mood.looks().await;
    stage.mood.looks().await;
    assert!(!stage.ended.is_finished(), "its request goes on");
    assert_eq!(stage.told().await.0.drain.map(|drain| drain.requests), Some(1));
    stage.mood.is(|mood| &mood.mute, false);
    stage.mood.is(|mood| &mood.busy, false);
    stage.over().await;
}

#[tokio::test]
async fn a_signal_leaves_the_server_to_its_requests_and_one_that_is_gone_has_none() {
    for signal in [true, false] {
        let stage = Stage::set(if signal { "signal" } else { "gone" }).await;
        stage.mood.is(|mood| &mood.busy, true);
        stage.serve().await;
        stage.is(WorkerState::Ready).await;
        match signal {
            true => stage.stop.drain.cancel(),
            false => {
                stage.serving.cancel();
                let unhealthy = async {
                    while stage.told().await.0.state != "unhealthy" {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                };
                tokio::time::timeout(PATIENCE, unhealthy).await.expect("it is missed");
                stage.drain().await;
            }
        }
        stage.over().await;
    }
}

#[tokio::test]
async fn what_never_came_about_is_not_waited_for() {
    let stage = Stage::set("never").await;
    stage.is(WorkerState::Joining).await;
    stage.stop.drain.cancel();
    stage.over().await;
    // A second signal ends a drain, whoever asked for that.
    let stage = Stage::set("second").await;
    stage.mood.is(|mood| &mood.busy, true);
    stage.serve().await;
    stage.is(WorkerState::Ready).await;
    let http = baton_conductor::http::client();
    let workers = format!("http://{}/v1/workers", stage.conductor);
    let told = async {
        loop {
            let all: serde_json::Value = http.get(&workers).send().await.unwrap().json().await.unwrap();
            if all["workers"][0]["load"]["requests_running"] == 1 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("the conductor is told how busy the server is");
    let wish = http.post(format!("{workers}/servers-0/drain")).send().await.unwrap();
    assert!(wish.status().is_success());
    let drains = async {
        while stage.told().await.0.drain.is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, drains).await.expect("it hears of the wish");
    stage.stop.now.cancel();
    stage.over().await;
}
