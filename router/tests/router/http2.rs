//! HTTP/2, with and without TLS, and what hostile clients do with it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use baton_config::Role;
use baton_config::fleet::{Identity, ServerTls};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::{http1, http2};
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use crate::fake_worker::{Act, FakeWorker};
use crate::harness::{Harness, PATIENCE};

type Sender = http2::SendRequest<Full<Bytes>>;

async fn over_http2<S>(stream: S, tasks: &mut JoinSet<()>) -> Sender
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (send, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("a connection");
    tasks.spawn(async move { drop(connection.await) });
    send
}

async fn plain(harness: &Harness) -> TcpStream {
    TcpStream::connect(harness.address).await.expect("a connection")
}

fn completion(scheme: &str, stream: bool, tokens: u32) -> Request<Full<Bytes>> {
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": tokens, "stream": stream });
    Request::post(format!("{scheme}://localhost/v1/completions"))
        .body(Full::new(Bytes::from(body.to_string())))
        .expect("a request")
}

#[tokio::test]
async fn many_streams_of_one_connection_are_served_at_once() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    let mut tasks = JoinSet::new();
    let send = over_http2(plain(&harness).await, &mut tasks).await;
    let asks = (0..50).map(|n| {
        let mut send = send.clone();
        async move {
            let answer = send.send_request(completion("http", n % 2 == 0, 20)).await.expect("an answer");
            assert_eq!(answer.status(), 200);
            answer.into_body().collect().await.expect("a body").to_bytes().len()
        }
    });
    let lengths = futures_util::future::join_all(asks).await;
    assert!(lengths.iter().all(|length| *length > 100), "{lengths:?}");
    // Errors have their shape here, too.
    let mut send = send;
    let unknown = Request::get("http://localhost/nope").body(Full::default()).expect("a request");
    let answer = send.send_request(unknown).await.expect("an answer");
    assert_eq!(answer.status(), 404);
    let body = answer.into_body().collect().await.expect("a body").to_bytes();
    assert!(body.starts_with(b"{\"error\":{"), "{body:?}");
    // Also where the head is too large.
    let large = Request::get("http://localhost/livez").header("x", "y".repeat(70 << 10));
    let answer = send.send_request(large.body(Full::default()).expect("a request")).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let many =
        (0..120).fold(Request::get("http://localhost/livez"), |many, n| many.header(format!("x-{n}"), "y"));
    let refused = send.send_request(many.body(Full::default()).expect("a request")).await.expect("an answer");
    assert_eq!(refused.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let body = answer.into_body().collect().await.expect("a body").to_bytes();
    assert!(body.starts_with(b"{\"error\":{"), "{body:?}");
    drop(send);
    harness.finish().await;
}

#[tokio::test]
async fn a_stream_that_is_reset_reaches_the_worker() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    worker.always(Act::SilentAfter(1));
    let harness = Harness::start(&[&worker], |_| {}).await;
    let mut tasks = JoinSet::new();
    let mut send = over_http2(plain(&harness).await, &mut tasks).await;
    let answer = send.send_request(completion("http", true, 20)).await.expect("an answer");
    let mut waiting = Box::pin(send.send_request(completion("http", false, 20)));
    let both = async || worker.seen.open.load(Ordering::SeqCst) == 2;
    tokio::select! {
        _ = &mut waiting => panic!("too early"),
        () = harness.until("both are with the worker", both) => {}
    }
    drop((answer, waiting));
    let none = async || worker.seen.open.load(Ordering::SeqCst) == 0;
    harness.until("both are cancelled", none).await;
    harness.finish().await;
}

struct Pem {
    _directory: tempfile::TempDir,
    tls: ServerTls,
    roots: RootCertStore,
}

fn certificates() -> Pem {
    let mut params = CertificateParams::new(Vec::new()).expect("names");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority =
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
    let key = KeyPair::generate().expect("a key");
    let names = CertificateParams::new(vec!["localhost".to_owned()]).expect("names");
    let certificate = names.signed_by(&key, &authority).expect("a certificate");
    let directory = tempfile::tempdir().expect("a directory");
    let identity =
        Identity { cert_file: directory.path().join("cert.pem"), key_file: directory.path().join("key.pem") };
    fs::write(&identity.cert_file, certificate.pem()).expect("written");
    fs::write(&identity.key_file, key.serialize_pem()).expect("written");
    fs::set_permissions(&identity.key_file, fs::Permissions::from_mode(0o600)).expect("private");
    let mut roots = RootCertStore::empty();
    roots.add(authority.der().clone()).expect("an authority");
    Pem { _directory: directory, tls: ServerTls { identity, client_ca_file: None }, roots }
}

async fn secure(
    harness: &Harness,
    roots: &RootCertStore,
    alpn: &[&[u8]],
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let name = ServerName::try_from("localhost").expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, plain(harness).await).await.expect("TLS")
}

#[tokio::test]
async fn tls_speaks_what_the_client_prefers() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let pem = certificates();
    let mut harness = Harness::start_bare(&[&worker], |options| {
        options.tls = Some(pem.tls.clone());
        options.timeouts.header = Duration::from_millis(500);
    })
    .await;
    let mut tasks = JoinSet::new();
    let stream = secure(&harness, &pem.roots, &[b"h2", b"http/1.1"]).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let mut send = over_http2(stream, &mut tasks).await;
    let ready = async || {
        let mut send = send.clone();
        let ask = Request::get("https://localhost/readyz").body(Full::default()).expect("a request");
        send.send_request(ask).await.expect("an answer").status() == 200
    };
    harness.until("ready", ready).await;
    let answer = send.send_request(completion("https", true, 5)).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::OK);
    let text = answer.into_body().collect().await.expect("a body").to_bytes();
    assert!(text.ends_with(b"data: [DONE]\n\n"));

    let stream = secure(&harness, &pem.roots, &[b"http/1.1"]).await;
    let (mut send, connection) = http1::handshake(TokioIo::new(stream)).await.expect("a connection");
    tasks.spawn(async move { drop(connection.await) });
    let request: Request<Full<Bytes>> =
        Request::get("/v1/models").header("host", "localhost").body(Full::default()).expect("a request");
    assert_eq!(send.send_request(request).await.expect("an answer").status(), StatusCode::OK);

    // Who does not speak TLS, or does not finish its hello, is cut.
    for hello in [&b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n"[..], b"\x16\x03\x01\x02\x00\x01", b""] {
        let mut stream = plain(&harness).await;
        stream.write_all(hello).await.expect("written");
        let mut told = Vec::new();
        let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut told)).await;
        assert!(read.is_ok(), "{hello:?} is held open");
        assert!(!told.starts_with(b"HTTP"), "{told:?}");
    }
    harness.stop.drain.cancel();
    harness.stop.now.cancel();
    harness.join().await;
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = u32::try_from(payload.len()).expect("small").to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// `POST /v1/completions` in HPACK, without its body.
fn post() -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x04, 15];
    block.extend(b"/v1/completions");
    block.extend([0x41, 1, b'a']);
    block
}

async fn flood(harness: &Harness, frames: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut stream = plain(harness).await;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("written");
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.expect("written");
    for bytes in frames {
        // The other side may have had enough.
        if stream.write_all(&bytes).await.is_err() {
            break;
        }
    }
    let mut told = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut told)).await;
    told
}

/// Whether the last frame of what a server said is a GOAWAY.
fn says_goodbye(mut told: &[u8]) -> bool {
    let mut last = None;
    while let Some((head, rest)) = told.split_first_chunk::<9>() {
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        last = Some(head[3]);
        told = rest.get(length..).unwrap_or_default();
    }
    last == Some(7)
}

#[tokio::test]
async fn floods_end_the_connection_that_sends_them_and_nobody_elses() {
    let worker = FakeWorker::start("decode-0", Role::Decode).await;
    let harness = Harness::start(&[&worker], |_| {}).await;
    let streams = || (0..5000).map(|n| 2 * n + 1);
    let rapid_reset = streams().map(|stream| {
        let mut both = frame(HEADERS, END_HEADERS, stream, &post());
        both.extend(frame(RESET, 0, stream, &8u32.to_be_bytes()));
        both
    });
    assert!(says_goodbye(&flood(&harness, rapid_reset).await), "rapid reset");
    let continuation = std::iter::once(frame(HEADERS, 0, 1, &post()))
        .chain((0..5000).map(|_| frame(CONTINUATION, 0, 1, &[0x00, 1, b'x', 1, b'y'])));
    assert!(says_goodbye(&flood(&harness, continuation).await), "continuation");
    // A block of headers that unpacks to much more than it says.
    let mut bomb = post();
    bomb.extend([0x40, 1, b'x', 0x7f, 0x81, 0x1f]);
    bomb.extend([b'y'; 4096]);
    bomb.extend(std::iter::repeat_n(0xbe, 12_000));
    flood(&harness, std::iter::once(frame(HEADERS, END_HEADERS | END_STREAM, 1, &bomb))).await;
    flood(&harness, (0..5000).map(|_| frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 1]))).await;
    flood(&harness, (0..5000).map(|_| frame(PING, 0, 0, &[0; 8]))).await;
    flood(&harness, std::iter::once(vec![0xff; 100_000])).await;
    // More streams than are allowed at once.
    flood(&harness, streams().take(2000).map(|stream| frame(HEADERS, END_HEADERS, stream, &post()))).await;
    assert_eq!(harness.get("/livez").await.status, 200);
    let body = json!({ "model": "tiny", "prompt": "hello", "max_tokens": 3 });
    assert_eq!(harness.complete(&body).await.status, 200);
    harness.finish().await;
}
