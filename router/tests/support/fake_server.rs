//! A server of another project, with an OpenAI-compatible API, that misbehaves as told.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_config::Role;
use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::fake_worker::FakeWorker;

/// What a server does with one request.
#[derive(Debug, Clone)]
pub(crate) enum Does {
    /// Answers with these bytes of JSON.
    Says(&'static str),
    /// Answers in a coding that nobody asked for.
    Compresses,
    /// Streams so many chunks and ends well, waiting so long before each.
    Streams(usize, Duration),
    /// Streams so many chunks, says itself that it failed, and ends.
    FailsAfter(usize),
    /// Streams so many chunks and half of one more, then breaks the connection.
    BreaksAfter(usize),
    /// Streams so many chunks, then ends without an end.
    ClosesAfter(usize),
    /// Streams so many chunks, then nothing.
    SilentAfter(usize),
    /// Streams without end.
    Endless,
    /// Streams most of a very large event, waits so long, and ends it well, or breaks the connection.
    Large(Duration, bool),
    /// Answers with this status and body.
    Refuses(u16, &'static str),
    /// Does not answer.
    Hangs,
    /// Closes the connection without an answer.
    Vanishes,
}

/// A request as the server got it.
#[derive(Debug, Clone)]
pub(crate) struct Got {
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
    pub(crate) id: Option<String>,
    pub(crate) coding: Option<String>,
    pub(crate) body: String,
}

/// A running server, with the worker that stands beside it.
pub(crate) struct FakeServer {
    pub(crate) worker: FakeWorker,
    pub(crate) url: String,
    script: Arc<Script>,
    _tasks: JoinSet<()>,
}

struct Script {
    next: Mutex<VecDeque<Does>>,
    always: Mutex<Does>,
    got: Mutex<Vec<Got>>,
    open: AtomicUsize,
    sent: AtomicUsize,
}

impl FakeServer {
    /// Starts a server that streams five chunks.
    pub(crate) async fn start(name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let script = Arc::new(Script {
            next: Mutex::default(),
            always: Mutex::new(Does::Streams(5, Duration::ZERO)),
            got: Mutex::default(),
            open: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, Arc::clone(&script)));
        let mut worker = FakeWorker::start(name, Role::Both).await;
        worker.member.server = Some(url.clone());
        Self { worker, url, script, _tasks: tasks }
    }

    /// What the next request meets.
    pub(crate) fn then(&self, does: Does) -> &Self {
        self.script.next.lock().expect("unpoisoned").push_back(does);
        self
    }

    /// What requests meet that nothing was said about.
    pub(crate) fn always(&self, does: Does) -> &Self {
        *self.script.always.lock().expect("unpoisoned") = does;
        self
    }

    /// The requests so far.
    pub(crate) fn got(&self) -> Vec<Got> {
        self.script.got.lock().expect("unpoisoned").clone()
    }

    /// Answers under way.
    pub(crate) fn open(&self) -> usize {
        self.script.open.load(Ordering::SeqCst)
    }

    /// Bytes handed to the socket.
    pub(crate) fn sent(&self) -> usize {
        self.script.sent.load(Ordering::SeqCst)
    }
}

/// Chunk `i` of a stream.
pub(crate) fn chunk(i: usize) -> String {
    format!(
        "data: {{\"model\": \"served\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"w{i} \"}}}}],\"odd\":[1]}}\n\n"
    )
}

/// How a stream that ends well ends.
pub(crate) const END: &str =
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":7}}\n\ndata: [DONE]\n\n";

/// How one ends whose server failed and says so.
pub(crate) const FAILED: &str = "data: {\"error\":{\"message\":\"out of memory\",\"code\":500}}\n\n";

struct Open(Arc<Script>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn accept(listener: TcpListener, script: Arc<Script>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let _ = socket2::SockRef::from(&stream).set_send_buffer_size(32 << 10);
        let script = Arc::clone(&script);
        connections.spawn(async move {
            let service = service_fn(move |request| serve(request, Arc::clone(&script)));
            let _ = hyper::server::conn::http1::Builder::new()
                .max_buf_size(32 << 10)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

async fn serve(request: Request<Incoming>, script: Arc<Script>) -> Result<Answer, std::io::Error> {
    script.open.fetch_add(1, Ordering::SeqCst);
    let open = Open(Arc::clone(&script));
    let header =
        |name: &str| request.headers().get(name).and_then(|value| Some(value.to_str().ok()?.to_owned()));
    let (path, authorization) = (request.uri().path().to_owned(), header("authorization"));
    let (id, coding) = (header("x-request-id"), header("accept-encoding"));
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body = String::from_utf8(body.to_vec()).expect("UTF-8");
    script.got.lock().expect("unpoisoned").push(Got { path, authorization, id, coding, body });
    let next = script.next.lock().expect("unpoisoned").pop_front();
    let does = next.unwrap_or_else(|| script.always.lock().expect("unpoisoned").clone());
    let (count, pause, last) = match does {
        Does::Says(text) => return Ok(whole(200, text)),
        Does::Compresses => {
            let mut response = whole(200, "\u{1f}");
            response.headers_mut().insert("content-encoding", http::HeaderValue::from_static("gzip"));
            return Ok(response);
        }
        Does::Refuses(status, text) => return Ok(whole(status, text)),
        Does::Hangs => return std::future::pending().await,
        Does::Vanishes => return Err(std::io::Error::other("as told")),
        Does::Large(pause, well) => return Ok(large(pause, well)),
        Does::Streams(count, pause) => (count, pause, Last::Well),
        Does::BreaksAfter(count) => (count, Duration::ZERO, Last::Breaks),
        Does::FailsAfter(count) => (count, Duration::ZERO, Last::Fails),
        Does::ClosesAfter(count) => (count, Duration::ZERO, Last::Closes),
        Does::SilentAfter(count) => (count, Duration::ZERO, Last::Silence),
        Does::Endless => (usize::MAX, Duration::ZERO, Last::Closes),
    };
    // What has no end comes in pieces that fill buffers soon.
    let at_once = if count == usize::MAX { 64 } else { 1 };
    let chunks = futures_util::stream::iter((0..count).step_by(at_once)).then(move |i| async move {
        tokio::time::sleep(pause).await;
        Ok((i..i + at_once).map(chunk).collect::<String>())
    });
    let end = futures_util::stream::once(async move {
        match last {
            Last::Well => Ok(END.to_owned()),
            Last::Fails => Ok(FAILED.to_owned()),
            Last::Closes => Ok(": bye\n\n".to_owned()),
            Last::Silence => std::future::pending().await,
            Last::Breaks => {
                // Lets what was sent before reach the other side first.
                tokio::time::sleep(Duration::from_millis(20)).await;
                Err(std::io::Error::other("as told"))
            }
        }
    });
    let half = matches!(last, Last::Breaks).then(|| Ok::<_, std::io::Error>("data: {\"half\":".to_owned()));
    let all = chunks.chain(futures_util::stream::iter(half)).chain(end);
    let body = all.map(move |text| {
        let text = text?;
        open.0.sent.fetch_add(text.len(), Ordering::SeqCst);
        Ok(Frame::data(Bytes::from(text)))
    });
    let mut response = Response::new(StreamBody::new(body).boxed_unsync());
    let kind = http::HeaderValue::from_static("text/event-stream; charset=utf-8");
    response.headers_mut().insert("content-type", kind);
    Ok(response)
}

/// The beginning and the end of an event that is passed on before it has ended.
pub(crate) fn large_event() -> (String, String) {
    (format!("data: {{\"large\":\"{}", "x".repeat(2 << 20)), format!("\"}}\n\n{END}"))
}

fn large(pause: Duration, well: bool) -> Answer {
    let (begins, ends) = large_event();
    let end = futures_util::stream::once(async move {
        tokio::time::sleep(pause).await;
        if well { Ok(ends) } else { Err(std::io::Error::other("as told")) }
    });
    let all = futures_util::stream::iter([Ok(begins)]).chain(end);
    let mut response = Response::new(
        StreamBody::new(all.map(|text| text.map(|text| Frame::data(Bytes::from(text))))).boxed_unsync(),
    );
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("text/event-stream"));
    response
}

#[derive(Clone, Copy)]
enum Last {
    Well,
    Fails,
    Closes,
    Silence,
    Breaks,
}

fn whole(status: u16, text: &'static str) -> Answer {
    let body = Full::new(Bytes::from_static(text.as_bytes())).map_err(|never: Infallible| match never {});
    let response = Response::builder().status(status).header("content-type", "application/json");
    response.body(body.boxed_unsync()).expect("a response")
}

/// The body of a request, as JSON.
pub(crate) fn json(got: &Got) -> Value {
    serde_json::from_str(&got.body).expect("JSON")
}
