use std::sync::atomic::{AtomicUsize, Ordering};

use baton_config::fleet::{AuthSpec, Isolation, JwksSource};
use futures_util::StreamExt as _;
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::PrivatePkcs8KeyDer;
use serde_json::json;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::clock::unix_seconds;
use crate::metrics::Metrics;
use crate::reply::Refusal;
use crate::tenant::tests::issuer::Issuer;
use crate::tenant::{Auth, Principal};
use fake_provider::{Document, FakeProvider};

#[path = "../../../tests/support/fake_provider.rs"]
mod fake_provider;

const PATIENCE: Duration = Duration::from_secs(20);

/// A router's side of it.
struct Side {
    auth: Arc<Auth>,
    metrics: Arc<Metrics>,
    issuer: String,
    _folder: tempfile::TempDir,
    _tasks: JoinSet<()>,
}

impl Side {
    /// Follows an issuer; `change` says how.
    fn start(issuer: &str, change: impl FnOnce(&mut RemoteJwks)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("keys.yaml");
        std::fs::write(&keys, "version: 1\ntenants:\n- name: acme\n").unwrap();
        let mut source = RemoteJwks::new(None);
        source.timeout = Duration::from_secs(5);
        change(&mut source);
        let mut spec = AuthSpec::new(keys, Isolation::Tenant);
        let mut jwt = JwtSpec::new(JwksSource::Remote(source), issuer.to_owned(), "baton".to_owned());
        jwt.leeway = Duration::ZERO;
        spec.jwt = Some(jwt);
        let metrics = Arc::new(Metrics::new().unwrap());
        let auth = Arc::new(Auth::new(Some(&spec), Arc::clone(&metrics)).unwrap());
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&auth).follow());
        Self { auth, metrics, issuer: issuer.to_owned(), _folder: folder, _tasks: tasks }
    }

    /// A token of tenant acme, signed by `signer` with what it calls `kid`.
    fn token(&self, signer: &Issuer, kid: &str) -> String {
        let claims =
            json!({ "iss": self.issuer, "aud": "baton", "exp": unix_seconds() + 600, "tenant": "acme" });
        signer.token(&json!({ "alg": "ES256", "kid": kid }), &claims)
    }

    async fn ask(&self, token: &str) -> Result<Arc<Principal>, Refusal> {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::from_str(&format!("Bearer {token}")).unwrap());
        tokio::time::timeout(PATIENCE, self.auth.authenticate(&headers)).await.expect("in time")
    }

    async fn is_let_in(&self, token: &str) -> bool {
        match self.ask(token).await {
            Ok(principal) => &*principal.tenant.name == "acme",
            Err(_) => false,
        }
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.metrics.render();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("exported");
        line.trim().parse().unwrap()
    }

    fn failed(&self) -> f64 {
        self.metric("baton_router_jwks_fetches_total{result=\"failed\"}")
    }

    fn succeeded(&self) -> f64 {
        self.metric("baton_router_jwks_fetches_total{result=\"ok\"}")
    }
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// The same address, as soon as it is free.
async fn again(address: &str) -> TcpListener {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A provider at `address` that says where its keys are and has them.
fn documents(issuer: &str, keys: Arc<Mutex<String>>) -> impl Fn(&str) -> Option<Document> + use<> {
    let said = json!({ "issuer": issuer, "jwks_uri": format!("{issuer}/keys"), "more": [1] }).to_string();
    move |path| {
        Some(match path {
            DISCOVERY_PATH => fake_provider::json(said.clone()),
            "/keys" => fake_provider::json(keys.lock().unwrap().clone()),
            _ => with_status(404),
        })
    }
}

fn with_status(status: u16) -> Document {
    let mut document = fake_provider::json("{}");
    *document.status_mut() = http::StatusCode::from_u16(status).unwrap();
    document
}

fn shared(text: String) -> Arc<Mutex<String>> {
    Arc::new(Mutex::new(text))
}

/// An authority's certificate in PEM, and a listener's side for 127.0.0.1 that it vouches for.
fn certified() -> (String, TlsAcceptor) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        )
        .unwrap();
    (ca.pem(), TlsAcceptor::from(Arc::new(config)))
}

#[tokio::test]
async fn an_issuer_says_where_its_keys_are_and_new_ones_count_when_a_token_names_them() {
    let (listener, address) = listener().await;
    let issuer = format!("https://{address}");
    let (first, second) = (Issuer::new(), Issuer::new());
    let keys = shared(first.jwks());
    let (ca, tls) = certified();
    let provider = FakeProvider::start(listener, Some(tls), documents(&issuer, Arc::clone(&keys)));
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, ca).unwrap();
    let side = Side::start(&issuer, |source| source.ca_file = Some(ca_file));

    // The first token may come before the first keys: it waits for them.
    assert!(side.is_let_in(&side.token(&first, "ec")).await);
    assert_eq!((provider.asked(), side.metric("baton_router_jwks_keys ")), (2, 2.0));

    *keys.lock().unwrap() = second.jwks().replace("\"ec\"", "\"ec-2\"");
    assert!(side.is_let_in(&side.token(&first, "ec")).await, "what is not asked for again goes on");
    let token = side.token(&second, "ec-2");
    // However many come with it, keys are fetched once.
    let all = (0..50).map(|_| side.is_let_in(&token));
    assert!(futures_util::future::join_all(all).await.into_iter().all(|good| good));
    assert_eq!(provider.asked(), 4);
    assert!(!side.is_let_in(&side.token(&first, "ec")).await, "taken back");
    // Whoever makes names up gets no further fetch, and no wait.
    for n in 0..50 {
        let refused = side.ask(&side.token(&first, &format!("made-up-{n}"))).await.unwrap_err();
        assert!(matches!(refused, Refusal::Unauthorized { code: "invalid_token", .. }), "{refused:?}");
    }
    assert_eq!((provider.asked(), side.failed()), (4, 0.0));
}

#[tokio::test]
async fn a_provider_that_nobody_vouches_for_is_not_believed() {
    let (listener, address) = listener().await;
    let issuer = format!("https://{address}");
    let signer = Issuer::new();
    let (_, tls) = certified();
    let provider = FakeProvider::start(listener, Some(tls), documents(&issuer, shared(signer.jwks())));
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, certified().0).unwrap();
    let side = Side::start(&issuer, |source| source.ca_file = Some(ca_file));
    assert_eq!(side.ask(&side.token(&signer, "ec")).await.unwrap_err(), Refusal::NoSigners);
    assert!(side.failed() > 0.5 && provider.asked() == 0);
}

#[tokio::test]
async fn known_keys_outlive_their_provider_and_whatever_it_says_instead() {
    let (listener, address) = listener().await;
    let url = format!("http://{address}/keys");
    let (first, second) = (Issuer::new(), Issuer::new());
    let side = {
        let jwks = first.jwks();
        let _provider = FakeProvider::start(listener, None, move |_| Some(fake_provider::json(jwks.clone())));
        let side = Side::start("https://id.example", |source| {
            source.url = Some(url);
            source.refresh = Duration::from_millis(20);
            source.timeout = Duration::from_millis(200);
        });
        assert!(side.is_let_in(&side.token(&first, "ec")).await);
        side
    };
    let token = side.token(&first, "ec");
    let broken = async || {
        let before = side.failed();
        until("it fails again", async || side.failed() > before + 1.5).await;
        assert!(side.is_let_in(&token).await);
    };
    // Nobody listens.
    broken().await;
    // Nothing that is answered takes the place of keys.
    let elsewhere = Arc::new(AtomicUsize::new(0));
    let of_others =
        json!({ "keys": [{ "kty": "oct", "kid": "ec", "alg": "HS256", "k": "AAAA" }] }).to_string();
    for junk in [
        "",
        "null",
        "[]",
        "{}",
        r#"{"keys":[]}"#,
        r#"{"keys":7}"#,
        r#"{"keys":[{"kty":"EC"}]}"#,
        "<html>",
        &of_others,
        "status 500",
        "status 404",
        "status 204",
        "redirect",
        "silence",
        "endless",
        "drops",
    ] {
        let listener = again(&address).await;
        let (junk, jwks, elsewhere) = (junk.to_owned(), second.jwks(), Arc::clone(&elsewhere));
        let provider = FakeProvider::start(listener, None, move |path| {
            if path == "/elsewhere" {
                elsewhere.fetch_add(1, Ordering::SeqCst);
                return Some(fake_provider::json(jwks.clone()));
            }
            Some(match junk.as_str() {
                "redirect" => {
                    let mut moved = with_status(302);
                    moved.headers_mut().insert("location", HeaderValue::from_static("/elsewhere"));
                    moved
                }
                "silence" => return None,
                // It begins well.
                "endless" => drips(jwks.clone(), Duration::ZERO),
                "drops" => drips(jwks.clone(), Duration::from_millis(5)),
                junk => match junk.strip_prefix("status ") {
                    Some(status) => with_status(status.parse().unwrap()),
                    None => fake_provider::json(junk.to_owned()),
                },
            })
        });
        broken().await;
        assert!(provider.asked() > 0);
    }
    assert_eq!(elsewhere.load(Ordering::SeqCst), 0, "redirects are not followed");
    // It is back, with other keys.
    let listener = again(&address).await;
    let jwks = second.jwks();
    let _provider = FakeProvider::start(listener, None, move |_| Some(fake_provider::json(jwks.clone())));
    let renewed = side.token(&second, "ec");
    until("new keys count", async || side.is_let_in(&renewed).await).await;
    assert!(!side.is_let_in(&token).await && side.succeeded() > 1.5);
}

/// Keys, and then blanks without end.
fn drips(begin: String, pause: Duration) -> Document {
    let more = futures_util::stream::repeat(()).then(move |()| async move {
        tokio::time::sleep(pause).await;
        Bytes::from(vec![b' '; if pause.is_zero() { 16 << 10 } else { 1 }])
    });
    let all = futures_util::stream::iter([Bytes::from(begin)]).chain(more);
    Response::new(StreamBody::new(all.map(|part| Ok(Frame::data(part)))).boxed_unsync())
}

#[tokio::test]
async fn an_issuer_speaks_for_itself_and_of_trustworthy_places_only() {
    for (issuer_said, keys_at) in [
        ("https://id.example", "https://id.example/keys"),
        ("", "http://id.example/keys"),
        ("", "file:///keys"),
    ] {
        let (listener, address) = listener().await;
        let issuer = format!("http://{address}");
        let issuer_said = if issuer_said.is_empty() { issuer.as_str() } else { issuer_said };
        let said = json!({ "issuer": issuer_said, "jwks_uri": keys_at }).to_string();
        let provider = FakeProvider::start(listener, None, move |_| Some(fake_provider::json(said.clone())));
        let side = Side::start(&issuer, |_| {});
        let signer = Issuer::new();
        assert_eq!(side.ask(&side.token(&signer, "ec")).await.unwrap_err(), Refusal::NoSigners);
        assert!(provider.asked() == 1 && side.failed() > 0.5, "{keys_at}");
    }
}

#[test]
fn pauses_grow_and_end_at_the_interval() {
    let refresh = Duration::from_secs(300);
    let pauses: Vec<u64> = (0..=7).map(|failures| pause(failures, refresh).as_secs()).collect();
    assert_eq!(pauses, [300, 1, 2, 4, 8, 16, 30, 30]);
    assert_eq!(pause(u32::MAX, Duration::from_secs(5)), Duration::from_secs(5));
}
