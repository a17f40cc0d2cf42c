//! Input that is bad in more than its fields: replayed, from elsewhere, broken off, slow, of another kind.

use ::http::header;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::requests::{JSON, good, refused, with};
use super::*;

async fn count(server: &Server, code: &str) -> u64 {
    let url = format!("{}/metrics", server.url());
    let text = crate::http::client().get(url).send().await.unwrap().text().await.unwrap();
    let series = format!("baton_conductor_refused_total{{code=\"{code}\"}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&series)).unwrap_or_else(|| panic!("{text}"));
    value.parse().unwrap()
}

#[tokio::test]
async fn a_keepalive_counts_once() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let http = crate::http::client();
    let register = || http.post(format!("{}/v1/workers", server.url())).json(&good()).send();
    let first: Registered = register().await.unwrap().json().await.unwrap();
    let keepalive = |epoch: Epoch, seq: u64, state: &str| {
        let body = json!({"epoch": epoch, "seq": seq, "state": state});
        http.post(format!("{}/v1/workers/w/keepalive", server.url())).json(&body).send()
    };
    assert_eq!(keepalive(first.epoch, 5, "ready").await.unwrap().status(), 200);
    assert_eq!(keepalive(first.epoch, 6, "draining").await.unwrap().status(), 200);
    for seq in [0, 4, 5, 6] {
        let reply = keepalive(first.epoch, seq, "draining").await.unwrap();
        assert_eq!(refused(reply, "a copy").await, (409, "replayed".to_owned()), "{seq}");
    }
    assert_eq!(keepalive(first.epoch, 7, "draining").await.unwrap().status(), 200);
    let absent = json!({"epoch": first.epoch, "state": "draining"});
    let reply =
        http.post(format!("{}/v1/workers/w/keepalive", server.url())).json(&absent).send().await.unwrap();
    assert_eq!(refused(reply, "none").await, (400, "invalid_body".to_owned()));
    // Another life counts anew, and its predecessor's keepalives are of no use at all.
    let second: Registered = register().await.unwrap().json().await.unwrap();
    assert_eq!(keepalive(second.epoch, 1, "ready").await.unwrap().status(), 200);
    let reply = keepalive(first.epoch, 100, "ready").await.unwrap();
    assert_eq!(refused(reply, "a former life").await, (409, "stale_epoch".to_owned()));
    assert_eq!((count(&server, "replayed").await, count(&server, "stale_epoch").await), (4, 1));
    server.stop().await;
}

#[tokio::test]
async fn workers_are_where_they_may_be() {
    let guard = ConductorGuard {
        allowed_addresses: vec!["10.1.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()],
        ..Default::default()
    };
    let options = ConductorOptions { guard, ..ConductorOptions::new(pools()) };
    let server = Server::with("127.0.0.1:0".parse().unwrap(), options).await;
    server.leads().await;
    let before = server.listing().await.revision;
    let http = crate::http::client();
    let register = |address: &str| {
        http.post(format!("{}/v1/workers", server.url())).json(&with("address", json!(address))).send()
    };
    let outside =
        ["127.0.0.1:1", "10.2.0.1:80", "[fe80::1]:80", "[::ffff:10.2.0.1]:80", "worker-0.workers:80"];
    for address in outside {
        let reply = register(address).await.unwrap();
        let text = reply.text().await.unwrap();
        let body: ErrorBody = serde_json::from_str(&text).unwrap();
        assert_eq!(body.error.code, "address_not_allowed", "{address}");
        assert!(
            body.error.message.contains("conductor.allowed_addresses is 10.1.0.0/16, fd00::/8"),
            "{text}"
        );
    }
    assert_eq!(server.listing().await.revision, before, "the store is untouched");
    assert_eq!(count(&server, "address_not_allowed").await, outside.len() as u64);
    for address in ["10.1.2.3:80", "[fd00::1]:80", "[::ffff:10.1.2.3]:80"] {
        assert_eq!(register(address).await.unwrap().status(), 201, "{address}");
    }
    server.stop().await;
}

#[tokio::test]
async fn bodies_are_json_and_say_so() {
    let server = Server::fresh(Duration::from_secs(10)).await;
    let url = format!("{}/v1/workers", server.url());
    let body = good().to_string();
    for kind in
        [None, Some("text/plain"), Some("application/x-www-form-urlencoded"), Some("application/jsonx")]
    {
        let request = crate::http::client().post(&url).body(body.clone());
        let request = match kind {
            Some(kind) => request.header(header::CONTENT_TYPE, kind),
            None => request,
        };
        let reply = request.send().await.unwrap();
        assert_eq!(refused(reply, "a kind").await, (415, "unsupported_media_type".to_owned()), "{kind:?}");
    }
    for kind in [JSON, "application/json", "Application/JSON"] {
        let request = crate::http::client().post(&url).body(body.clone()).header(header::CONTENT_TYPE, kind);
        assert_eq!(request.send().await.unwrap().status(), 201, "{kind}");
    }
    assert_eq!(count(&server, "unsupported_media_type").await, 4);
    server.stop().await;
}

#[tokio::test]
async fn bodies_that_break_off_or_take_too_long_change_nothing() {
    let limits = HttpLimits { body_timeout: Duration::from_millis(300), ..HttpLimits::default() };
    let options = ConductorOptions { limits, ..ConductorOptions::new(pools()) };
    let server = Server::with("127.0.0.1:0".parse().unwrap(), options).await;
    server.leads().await;
    let before = server.listing().await.revision;
    let body = good().to_string();
    let head = format!(
        "POST /v1/workers HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut slow = TcpStream::connect(server.address).await.unwrap();
    slow.write_all(head.as_bytes()).await.unwrap();
    slow.write_all(&body.as_bytes()[..20]).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = timeout(PATIENCE, slow.read(&mut answer)).await.expect("answered").unwrap();
    let text = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(text.starts_with("HTTP/1.1 408 ") && text.contains("body_too_slow"), "{text}");

    let mut broken = TcpStream::connect(server.address).await.unwrap();
    broken.write_all(head.as_bytes()).await.unwrap();
    broken.write_all(&body.as_bytes()[..20]).await.unwrap();
    broken.shutdown().await.unwrap();
    let mut rest = Vec::new();
    timeout(PATIENCE, broken.read_to_end(&mut rest)).await.expect("answered or cut").unwrap();
    let counted = async {
        while count(&server, "invalid_body").await == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, counted).await.expect("what broke off is counted");
    assert_eq!(count(&server, "body_too_slow").await, 1);
    assert_eq!(server.listing().await.revision, before, "the store is untouched");
    server.stop().await;
}

#[tokio::test]
async fn the_holder_of_a_name_is_asked_before_its_own_address_is_given_away() {
    use tokio::net::TcpListener;

    let server = Server::fresh(Duration::from_secs(10)).await;
    let http = crate::http::client();
    let host = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = host.local_addr().unwrap().to_string();
    let claim = |incarnation: char, address: &str| {
        let mut body = with("address", json!(address));
        body["incarnation"] = json!(incarnation.to_string().repeat(32));
        http.post(format!("{}/v1/workers", server.url())).json(&body).send()
    };
    let first: Registered = claim('a', &address).await.unwrap().json().await.unwrap();
    // The holder lives: it tells the epoch that it has.
    let epoch = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(first.epoch.0));
    let told = epoch.clone();
    let state = move || {
        let epoch = Epoch(told.load(std::sync::atomic::Ordering::SeqCst));
        async move { axum::Json(json!({"worker": "w", "epoch": epoch, "more": true})) }
    };
    let router = axum::Router::new().route("/v1/state", axum::routing::get(state));
    TaskTracker::new().spawn(async move { axum::serve(host, router).await });
    for elsewhere in [address.as_str(), "127.0.0.1:9", "10.0.0.9:80"] {
        let reply = claim('b', elsewhere).await.unwrap();
        let text = reply.text().await.unwrap();
        let body: ErrorBody = serde_json::from_str(&text).unwrap();
        assert_eq!(body.error.code, "name_taken", "{elsewhere}: {text}");
        assert_eq!(body.error.holder.unwrap().epoch, first.epoch);
    }
    let again: Registered = claim('a', &address).await.unwrap().json().await.unwrap();
    assert!(again.epoch > first.epoch, "the same process just goes on");
    // Whoever answers there now knows nothing of that life: it is the successor.
    let second: Registered = claim('b', &address).await.unwrap().json().await.unwrap();
    assert!(second.epoch > again.epoch);
    server.stop().await;
}

#[tokio::test]
async fn only_those_who_are_known_or_near_say_that_a_silent_address_is_dead() {
    let http = crate::http::client();
    let closed = { std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string() };
    let claim = |server: &Server, incarnation: char, address: &str| {
        let mut body = with("address", json!(address));
        body["incarnation"] = json!(incarnation.to_string().repeat(32));
        http.post(format!("{}/v1/workers", server.url())).json(&body).send()
    };
    let server = Server::fresh(Duration::from_secs(10)).await;
    assert_eq!(claim(&server, 'a', &closed).await.unwrap().status(), 201);
    let reply = claim(&server, 'b', "10.0.0.9:80").await.unwrap();
    assert_eq!(refused(reply, "from another host").await, (409, "name_taken".to_owned()));
    assert_eq!(claim(&server, 'c', "127.0.0.1:9").await.unwrap().status(), 201, "from the same host");
    server.stop().await;
}
