//! Who is let in: tokens, certificates, and what each side says when the other is not to its liking.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use baton_config::fleet::{ConductorAccess, Identity, ServerTls};
use reqwest::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::client::CallError;
use crate::client::transport::{CallTiming, Transport};
use crate::http::TlsFault;
use crate::test_authority::Authority;

const OLD: &str = "k7Jw0pQx9ZfLr2TnVb5Ys8HdMc3Ge6Ua";
const NEW: &str = "Zq4Xn8Rb1Kd6Wm3Ty9Hv5Lc2Pf7Js0Ge";

/// A folder of secrets and certificates.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        // Renamed into place, as an operator or Kubernetes does: nobody reads half a file.
        let (path, fresh) = (self.path(name), self.path("fresh"));
        std::fs::write(&fresh, content).unwrap();
        std::fs::set_permissions(&fresh, Permissions::from_mode(0o600)).unwrap();
        std::fs::rename(fresh, &path).unwrap();
        path
    }

    /// A certificate of `authority` for `names`.
    fn identity(&self, file: &str, authority: &Authority, names: &[&str]) -> Identity {
        let (cert, key) = authority.identity(names);
        Identity {
            cert_file: self.write(&format!("{file}.pem"), &cert),
            key_file: self.write(&format!("{file}.key"), &key),
        }
    }
}

async fn guarded(guard: ConductorGuard) -> Server {
    let limits = HttpLimits {
        handshake_timeout: Duration::from_millis(500),
        header_timeout: Duration::from_millis(500),
        rotate_interval: Duration::from_millis(50),
        ..HttpLimits::default()
    };
    let options = ConductorOptions { guard, limits, ..ConductorOptions::new(pools()) };
    Server::with("127.0.0.1:0".parse().unwrap(), options).await
}

fn with_token(path: &Path) -> ConductorAccess {
    ConductorAccess { token_file: Some(path.to_owned()), ..ConductorAccess::default() }
}

fn transport(url: &str, access: ConductorAccess) -> Transport {
    let timing = CallTiming { connect: Duration::from_secs(5), call: PATIENCE };
    Transport::new(vec![url.to_owned()], access, timing).unwrap()
}

async fn refusal(transport: &Transport) -> (u16, String, String) {
    match transport.list(0).await {
        Err(error @ CallError::Refused { .. }) => {
            let text = error.to_string();
            let CallError::Refused { status, detail, .. } = error else { unreachable!() };
            (status, detail.code, text)
        }
        other => panic!("{other:?}"),
    }
}

async fn distrust(transport: &Transport) -> (TlsFault, String) {
    match transport.list(0).await {
        Err(CallError::Tls { fault, endpoint, source }) => {
            let text = CallError::Tls { fault, endpoint, source }.to_string();
            (fault, text)
        }
        other => panic!("{other:?}"),
    }
}

async fn metrics(url: &str, caller: &crate::http::Caller) -> String {
    let reply = caller.request(Method::GET, &format!("{url}/metrics")).send().await.unwrap();
    assert_eq!(reply.status(), 200);
    reply.text().await.unwrap()
}

fn count(metrics: &str, series: &str) -> u64 {
    let line = metrics.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("no {series}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn without_the_token_nothing_is_told_and_nothing_changes() {
    let files = Files::new();
    let token_file = files.write("token", &format!("{OLD}\n{NEW}\n"));
    let server = guarded(ConductorGuard { token_file: Some(token_file.clone()), ..Default::default() }).await;
    let http = crate::http::client();
    let list = |header: Option<&str>| {
        let request = http.get(format!("{}/v1/workers", server.url()));
        match header {
            Some(value) => request.header("authorization", value),
            None => request,
        }
    };
    for token in [OLD, NEW] {
        assert_eq!(list(Some(&format!("bearer {token}"))).send().await.unwrap().status(), 200);
    }
    let good = transport(&server.url(), with_token(&token_file));
    let leading = async {
        // From then on the conductor writes nothing by itself.
        while !good.list(0).await.unwrap().leader {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, leading).await.expect("leads in time");
    let before = good.list(0).await.unwrap().revision;
    for (header, code) in [
        (None, "unauthenticated"),
        (Some("Basic azdKdzBwUXg="), "unauthenticated"),
        (Some(OLD), "unauthenticated"),
        (Some("Bearer"), "unauthenticated"),
        (Some("Bearer "), "unauthenticated"),
        (Some("Bearer x"), "wrong_token"),
        (Some(&format!("Bearer {}", &OLD[..31])), "wrong_token"),
        (Some(&format!("Bearer {OLD}x")), "wrong_token"),
        (Some(&format!("Bearer {}", OLD.to_lowercase())), "wrong_token"),
    ] {
        let reply = list(header).send().await.unwrap();
        assert_eq!(reply.headers()["www-authenticate"], "Bearer");
        assert_eq!(requests::refused(reply, "a wrong token").await, (401, code.to_owned()), "{header:?}");
    }
    let twice = list(Some(&format!("Bearer {OLD}"))).header("authorization", format!("Bearer {OLD}"));
    let reply = twice.send().await.unwrap();
    assert_eq!(requests::refused(reply, "two tokens").await, (401, "unauthenticated".to_owned()));
    // Every path below /v1, also those that do not exist; bodies are not even read.
    for (method, path) in [
        (Method::POST, "/v1/workers"),
        (Method::POST, "/v1/workers/w/keepalive"),
        (Method::POST, "/v1/workers/w/drain"),
        (Method::DELETE, "/v1/workers/w?epoch=1"),
        (Method::GET, "/v1/watch?since=1"),
        (Method::GET, "/v1/pools"),
        (Method::PUT, "/v1/pools/decode/replicas"),
        (Method::GET, "/v1/nothing"),
        (Method::GET, "/v1"),
    ] {
        let reply = http.request(method, format!("{}{path}", server.url())).body("{").send().await.unwrap();
        assert_eq!(requests::refused(reply, path).await, (401, "unauthenticated".to_owned()), "{path}");
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(http.get(format!("{}{path}", server.url())).send().await.unwrap().status(), 200, "{path}");
    }
    assert_eq!(good.list(0).await.unwrap().revision, before, "the store is untouched");
    let text =
        metrics(&server.url(), &crate::http::Caller::new(ConductorAccess::default(), [], PATIENCE).unwrap())
            .await;
    assert_eq!(count(&text, "baton_conductor_refused_total{code=\"unauthenticated\"}"), 15);
    assert_eq!(count(&text, "baton_conductor_refused_total{code=\"wrong_token\"}"), 4);
    server.stop().await;
}

#[tokio::test]
async fn tokens_are_rotated_under_a_running_fleet() {
    let files = Files::new();
    let (served, shown) = (files.write("served", OLD), files.write("shown", OLD));
    let wrong = files.write("wrong", NEW);
    let server = guarded(ConductorGuard { token_file: Some(served), ..Default::default() }).await;
    let client =
        Client::start(ClientOptions { access: with_token(&shown), ..ClientOptions::new(vec![server.url()]) })
            .unwrap();
    let host = Host::new();
    let worker = join(&client, "w", &host.address()).await.unwrap();
    let epoch = worker.epoch().borrow().unwrap();

    let stranger = ClientOptions { access: with_token(&wrong), ..ClientOptions::new(vec![server.url()]) };
    let stranger = Client::start(stranger).unwrap();
    let Err(JoinError::Refused(error)) = join(&stranger, "thief", &host.address()).await else { panic!() };
    assert!(error.to_string().contains("(401, wrong_token)"), "{error}");
    assert!(stranger.view().stale && !stranger.view().known());

    // First the conductor accepts both, then the clients show the new one, then the old one goes.
    files.write("served", &format!("{OLD}\n{NEW}"));
    wait(&stranger, "the new token accepted", |view| !view.stale).await;
    files.write("served", "too short");
    files.write("shown", NEW);
    files.write("served", NEW);
    let old = transport(&server.url(), with_token(&files.write("old", OLD)));
    let gone = async {
        while old.list(0).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the old token is refused");
    // A refused keepalive makes the worker look at its file again.
    worker.set_state(WorkerState::Ready);
    let view = wait(&stranger, "the worker ready", |view| view.ready().count() == 1).await;
    assert_eq!(epochs(&view).values().copied().collect::<Vec<_>>(), [epoch], "the lease went on");
    worker.leave().await;
    server.stop().await;
}

struct Secured {
    files: Files,
    authority: Authority,
    server: Server,
    url: String,
}

impl Secured {
    /// A conductor with TLS that asks for certificates.
    async fn start() -> Self {
        let (files, authority) = (Files::new(), Authority::new());
        files.write("ca.pem", &authority.pem);
        let identity = files.identity("server", &authority, &["localhost", "127.0.0.1"]);
        let tls = ServerTls { identity, client_ca_file: Some(files.path("ca.pem")) };
        let server = guarded(ConductorGuard { tls: Some(tls), ..Default::default() }).await;
        let url = format!("https://127.0.0.1:{}", server.address.port());
        Self { files, authority, server, url }
    }

    fn access(&self, identity: Option<Identity>) -> ConductorAccess {
        ConductorAccess { token_file: None, ca_file: Some(self.files.path("ca.pem")), identity }
    }
}

#[tokio::test]
async fn each_side_of_tls_says_what_is_wrong_with_the_other() {
    let secured = Secured::start().await;
    let Secured { files, authority, server, url } = &secured;
    let other = Authority::new();
    files.write("other.pem", &other.pem);
    let own = files.identity("worker", authority, &["worker"]);
    let listing = transport(url, secured.access(Some(own.clone()))).list(0).await.unwrap();
    assert!(listing.workers.is_empty());

    let nameless = transport(url, secured.access(None));
    let (status, code, text) = refusal(&nameless).await;
    assert_eq!((status, code.as_str()), (403, "certificate_required"), "{text}");
    assert!(text.contains("set conductor.tls.client_cert_file"), "{text}");
    let plain = transport(&server.url(), ConductorAccess::default());
    let (status, code, text) = refusal(&plain).await;
    assert_eq!((status, code.as_str()), (400, "tls_required"), "{text}");
    assert!(text.contains("use https://"), "{text}");

    let strange = files.identity("stranger", &other, &["worker"]);
    let (fault, text) = distrust(&transport(url, secured.access(Some(strange)))).await;
    assert_eq!(fault, TlsFault::OwnRefused, "{text}");
    let trusting =
        ConductorAccess { ca_file: Some(files.path("other.pem")), ..secured.access(Some(own.clone())) };
    let (fault, text) = distrust(&transport(url, trusting)).await;
    assert_eq!(fault, TlsFault::UnknownAuthority, "{text}");
    assert!(text.contains("check conductor.tls.ca_file"), "{text}");
    let elsewhere = format!("https://[::ffff:127.0.0.1]:{}", server.address.port());
    let (fault, text) = distrust(&transport(&elsewhere, secured.access(Some(own.clone())))).await;
    assert_eq!(fault, TlsFault::WrongName, "{text}");
    let open = Server::fresh(Duration::from_secs(10)).await;
    let wrong_scheme = format!("https://{}", open.address);
    let (fault, text) = distrust(&transport(&wrong_scheme, secured.access(None))).await;
    assert_eq!(fault, TlsFault::NotTls, "{text}");
    open.stop().await;

    // A worker that trusts nobody there does not wait for better certificates.
    let options = ClientOptions {
        access: ConductorAccess { ca_file: Some(files.path("other.pem")), ..ConductorAccess::default() },
        ..ClientOptions::new(vec![url.clone()])
    };
    let client = Client::start(options).unwrap();
    let Err(JoinError::Refused(error)) = join(&client, "w", "127.0.0.1:1").await else { panic!() };
    assert!(matches!(error, CallError::Tls { fault: TlsFault::UnknownAuthority, .. }), "{error}");

    let caller = crate::http::Caller::new(secured.access(None), [url.as_str()], PATIENCE).unwrap();
    for path in ["/livez", "/readyz"] {
        let probe = caller.request(Method::GET, &format!("{url}{path}")).send().await.unwrap();
        assert_eq!(probe.status(), 200, "probes have no certificates");
    }
    let text = metrics(url, &caller).await;
    assert_eq!(count(&text, "baton_conductor_refused_total{code=\"certificate_required\"}"), 1);
    assert_eq!(count(&text, "baton_conductor_refused_total{code=\"tls_required\"}"), 1);
    assert!(count(&text, "baton_conductor_handshakes_failed_total{reason=\"client_certificate\"}") >= 1);
    assert!(count(&text, "baton_conductor_handshakes_failed_total{reason=\"refused_by_client\"}") >= 1);
    let after = transport(url, secured.access(Some(own))).list(0).await.unwrap();
    assert!(after.revision >= listing.revision && after.workers.is_empty(), "the view is untouched");
    secured.server.stop().await;
}

#[tokio::test]
async fn certificates_are_rotated_under_a_running_fleet() {
    let secured = Secured::start().await;
    let own = secured.files.identity("worker", &secured.authority, &["worker"]);
    let options =
        ClientOptions { access: secured.access(Some(own)), ..ClientOptions::new(vec![secured.url.clone()]) };
    let client = Client::start(options).unwrap();
    let host = Host::new();
    let worker = join(&client, "w", &host.address()).await.unwrap();
    let epoch = worker.epoch().borrow().unwrap();

    // Another authority, and everything signed by it. The conductor notices by itself, the worker when it is refused.
    let next = Authority::new();
    secured.files.write("ca.pem", &next.pem);
    let server = secured.files.identity("server", &next, &["127.0.0.1"]);
    secured.files.identity("worker", &next, &["worker"]);
    let fresh = transport(&secured.url, secured.access(Some(secured.files.identity("new", &next, &["new"]))));
    let taken = async {
        while fresh.list(0).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, taken).await.expect("the new certificates are served");
    // A certificate and a key that do not go together change nothing.
    secured.files.write("server.key", &rcgen::KeyPair::generate().unwrap().serialize_pem());
    assert!(server.cert_file.exists());
    worker.set_state(WorkerState::Ready);
    let view = wait(&client, "the worker ready", |view| view.ready().count() == 1).await;
    assert_eq!(epochs(&view).values().copied().collect::<Vec<_>>(), [epoch], "the lease went on");
    let later = transport(&secured.url, secured.access(Some(secured.files.identity("new", &next, &["new"]))));
    assert!(later.list(0).await.is_ok(), "still served, also to new connections");
    worker.leave().await;
    secured.server.stop().await;
}

#[tokio::test]
async fn slow_handshakes_and_heads_are_cut() {
    let secured = Secured::start().await;
    let plain = guarded(ConductorGuard::default()).await;
    let client_hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let cases: [(SocketAddr, &[u8]); 4] = [
        (secured.server.address, b""),
        (secured.server.address, client_hello),
        (secured.server.address, b"GET /livez HTTP/1.1\r\nhost"),
        (plain.address, b"GET /livez HTTP/1.1\r\nhost"),
    ];
    for (address, bytes) in cases {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let cut = timeout(PATIENCE, socket.read_to_end(&mut answer)).await;
        assert!(cut.is_ok(), "not cut: {:?}", String::from_utf8_lossy(bytes));
    }
    let caller = crate::http::Caller::new(secured.access(None), [secured.url.as_str()], PATIENCE).unwrap();
    let text = metrics(&secured.url, &caller).await;
    assert_eq!(count(&text, "baton_conductor_handshakes_failed_total{reason=\"timeout\"}"), 2);
    plain.stop().await;
    secured.server.stop().await;
}

#[tokio::test]
async fn what_cannot_be_used_is_named_at_the_start() {
    let files = Files::new();
    let authority = Authority::new();
    let good = files.identity("server", &authority, &["localhost"]);
    let tls = |identity: Identity| ConductorGuard {
        tls: Some(ServerTls { identity, client_ca_file: None }),
        ..Default::default()
    };
    let open = files.write("open", OLD);
    std::fs::set_permissions(&open, Permissions::from_mode(0o644)).unwrap();
    let other_key = files.identity("other", &authority, &["localhost"]).key_file;
    for (guard, expected) in [
        (
            ConductorGuard { token_file: Some(files.path("none")), ..Default::default() },
            "none cannot be read",
        ),
        (ConductorGuard { token_file: Some(open), ..Default::default() }, "open to every user"),
        (tls(Identity { cert_file: good.key_file.clone(), ..good.clone() }), "holds no certificate in PEM"),
        (tls(Identity { key_file: good.cert_file.clone(), ..good.clone() }), "holds no private key in PEM"),
        (tls(Identity { key_file: other_key, ..good.clone() }), "cannot be used"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let options = ConductorOptions { guard, ..ConductorOptions::new(pools()) };
        let error = serve(options, listener, CancellationToken::new()).await.unwrap_err();
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(source.contains(expected), "{expected:?} in {error}: {source}");
    }
}
