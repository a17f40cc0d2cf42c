use std::os::unix::fs::PermissionsExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ::http::{HeaderMap, StatusCode};
use axum::Router;
use axum::extract::State;
use axum::routing::get;
use baton_config::Role;
use baton_config::fleet::ConductorAccess;

use super::*;

/// For anything that should happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// How the server is.
#[derive(Debug, Default)]
struct Mood {
    busy: AtomicBool,
    down: AtomicBool,
}

/// A server that has no `/health`, asks for a key and counts requests as vLLM does.
async fn serve(listener: TcpListener, mood: Arc<Mood>) {
    let models = async |State(mood): State<Arc<Mood>>, headers: HeaderMap| match headers.get("authorization")
    {
        Some(_) if mood.down.load(Ordering::SeqCst) => StatusCode::SERVICE_UNAVAILABLE,
        Some(key) if key == "Bearer sk-engine" => StatusCode::OK,
        _ => StatusCode::UNAUTHORIZED,
    };
    let metrics = async |State(mood): State<Arc<Mood>>| {
        let running = u32::from(mood.busy.load(Ordering::SeqCst));
        format!("vllm:num_requests_running{{engine=\"0\"}} {running}.0\nvllm:num_requests_waiting 0\n")
    };
    let routes =
        Router::new().route("/v1/models", get(models)).route("/metrics", get(metrics)).with_state(mood);
    axum::serve(listener, routes).await.expect("served");
}

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
        drain_grace: PATIENCE,
        join_timeout: PATIENCE,
    }
}

async fn until(seen: &mut watch::Receiver<Seen>, what: &str, is: impl FnMut(&Seen) -> bool) -> Seen {
    let found = tokio::time::timeout(PATIENCE, seen.wait_for(is)).await;
    found.unwrap_or_else(|_| panic!("never seen: {what}")).expect("the watcher runs").clone()
}

#[tokio::test]
async fn a_server_is_waited_for_watched_and_missed() {
    let folder = tempfile_key("sk-wrong");
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
    mood.busy.store(true, Ordering::SeqCst);
    let listener = TcpListener::bind(address).await.unwrap();
    tasks.spawn(stop.clone().run_until_cancelled_owned(serve(listener, Arc::clone(&mood))));
    let refused = |seen: &Seen| seen.last_error.as_ref().is_some_and(|error| error.what.contains("401"));
    until(&mut seen, "that the key is refused", refused).await;
    std::fs::write(folder.join("key"), "sk-engine\n").unwrap();
    let well = until(&mut seen, "that it is well", |seen| seen.verdict == Verdict::Well).await;
    assert_eq!(well.gauges.map(|gauges| gauges.running), Some(1));
    mood.busy.store(false, Ordering::SeqCst);
    let idle = |seen: &Seen| seen.gauges.is_some_and(|gauges| gauges.running == 0);
    until(&mut seen, "that it is idle", idle).await;
    mood.down.store(true, Ordering::SeqCst);
    until(&mut seen, "that it is not well", unwell).await;
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    std::fs::remove_dir_all(folder).unwrap();
}

/// A folder with a file `key` that is closed to strangers.
fn tempfile_key(key: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("baton-sidecar-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("key"), key).unwrap();
    std::fs::set_permissions(folder.join("key"), std::fs::Permissions::from_mode(0o600)).unwrap();
    folder
}
