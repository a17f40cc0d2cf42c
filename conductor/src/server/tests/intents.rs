//! What operators asked for: kept over restarts, bound to the process it was meant for.

use super::*;

async fn serve_on(path: &std::path::Path) -> (String, CancellationToken, JoinHandle<Result<(), ServeError>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let options = ConductorOptions {
        store: StoreOptions::Embedded { state_file: Some(path.to_owned()) },
        ..ConductorOptions::new(pools())
    };
    let stop = CancellationToken::new();
    let done = TaskTracker::new().spawn(serve(options, listener, stop.clone()));
    (url, stop, done)
}

async fn register(url: &str, incarnation: char) -> Registered {
    let body = json!({
        "worker": "w", "incarnation": incarnation.to_string().repeat(32), "pool": "decode", "role": "decode",
        "model": "tiny", "engine": "sim", "address": "127.0.0.1:1", "state": "ready",
    });
    let reply = crate::http::client().post(format!("{url}/v1/workers")).json(&body).send().await.unwrap();
    assert_eq!(reply.status(), 201);
    reply.json().await.unwrap()
}

async fn desired(url: &str) -> u32 {
    let list: PoolList =
        crate::http::client().get(format!("{url}/v1/pools")).send().await.unwrap().json().await.unwrap();
    list.pools[0].desired
}

#[tokio::test]
async fn wishes_of_operators_outlive_the_conductor_and_one_file_has_one_conductor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("conductor.state");
    let http = crate::http::client();
    let (url, stop, done) = serve_on(&path).await;
    let first = register(&url, 'a').await;
    assert!(!first.drain);
    assert_eq!(http.post(format!("{url}/v1/workers/w/drain")).send().await.unwrap().status(), 200);
    let put = http.put(format!("{url}/v1/pools/decode/replicas")).json(&json!({"replicas": 7}));
    assert_eq!(put.send().await.unwrap().status(), 200);

    let (_, _, second) = serve_on(&path).await;
    let refused = timeout(PATIENCE, second).await.expect("ends").unwrap();
    let Err(ServeError::State(error)) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains(&url), "names the holder: {error}");

    stop.cancel();
    timeout(PATIENCE, done).await.expect("stops").unwrap().unwrap();
    let (url, stop, done) = serve_on(&path).await;
    assert_eq!(desired(&url).await, 7);
    let again = register(&url, 'a').await;
    assert!(again.drain, "the same process is still to drain");
    assert!(again.epoch > first.epoch);
    let fresh = register(&url, 'b').await;
    assert!(!fresh.drain, "the wish was not meant for its successor");
    stop.cancel();
    timeout(PATIENCE, done).await.expect("stops").unwrap().unwrap();

    std::fs::write(&path, "junk").unwrap();
    let (_, _, damaged) = serve_on(&path).await;
    let refused = timeout(PATIENCE, damaged).await.expect("ends").unwrap();
    let Err(ServeError::State(error)) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains("move it away"), "{error}");
}
