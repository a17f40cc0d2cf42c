//! A worker that speaks the protocol and misbehaves as told.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_config::protocol::{
    BlockCounts, FinishReason, GenerateEvent, GenerateRequest, HandoffOutcome, PrefillReply, PrefillReport,
    PrefillRequest, TokenLogprob, WorkerError, WorkerStatus,
};
use baton_config::protocol::{FailureCode, KvEventBatch};
use baton_config::{Epoch, PoolName, Role, WorkerId, frames};
use baton_router::Member;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::fake_frames;
use super::model_dir::EOS;

/// What a worker does with one generate call.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// Generates all tokens.
    Good,
    /// Generates so many tokens, then an end token.
    EosAfter(usize),
    /// Breaks the connection after so many tokens.
    DieAfter(usize),
    /// Ends the body cleanly after so many tokens, without a `finished` line.
    CloseAfter(usize),
    /// Sends nothing more after so many tokens.
    SilentAfter(usize),
    /// Sends what is not of the protocol after so many tokens.
    GarbageAfter(usize),
    /// Says that it failed after so many tokens.
    FailAfter(usize, FailureCode),
    /// Answers with this status and code.
    Status(u16, FailureCode),
    /// Waits this long before each token.
    Slow(Duration),
    /// Waits this long before the token after so many.
    PauseAfter(usize, Duration),
    /// Sends exactly these tokens.
    Say(Vec<u32>),
    /// Sends exactly these tokens, then breaks the connection.
    SayAndDie(Vec<u32>),
    /// Sends as many tokens as are taken, without end.
    Endless,
    /// The same over frames, but whenever it was out of credit it takes so long to go on.
    Lazy(Duration),
    /// Generates all tokens, after it has read so many from the prefill worker.
    Import(u32),
    /// Generates all tokens, after it has given the handoff up.
    GiveUp,
}

/// The token an undisturbed engine would choose after `tokens`: a printable byte, never an end token.
pub(crate) fn next_token(tokens: &[u32], seed: u64) -> u32 {
    let mut hash = 0xCBF2_9CE4_8422_2325u64 ^ seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for token in tokens {
        hash = (hash ^ u64::from(*token)).wrapping_mul(0x0000_0100_0000_01B3);
        hash ^= hash >> 29;
    }
    97 + u32::try_from(hash % 26).expect("small")
}

/// What an undisturbed engine would generate.
pub(crate) fn oracle(prompt: &[u32], seed: u64, count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next_token(&tokens, seed));
    }
    tokens.split_off(prompt.len())
}

/// What the worker saw, for assertions.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) generate: Mutex<Vec<GenerateRequest>>,
    pub(crate) prefill: Mutex<Vec<PrefillRequest>>,
    /// Streams being sent.
    pub(crate) open: AtomicUsize,
    /// Prefill calls not answered.
    pub(crate) prefilling: AtomicUsize,
    /// Handoffs ended by the router.
    pub(crate) ended: Mutex<Vec<String>>,
    /// Connections of frames.
    pub(crate) connections: AtomicUsize,
    /// Bytes handed to the socket.
    pub(crate) sent: AtomicUsize,
}

/// A running fake worker.
pub(crate) struct FakeWorker {
    pub(crate) member: Member,
    pub(crate) seen: Arc<Seen>,
    script: Arc<Script>,
    _tasks: JoinSet<()>,
    _life: DropGuard,
}

pub(super) struct Script {
    acts: Mutex<VecDeque<Act>>,
    default: Mutex<Act>,
    prefill_hangs: Mutex<bool>,
    state_hangs: AtomicBool,
    /// Upgrades to frames that are answered with an error.
    frames_refused: AtomicUsize,
    prefill_status: Mutex<Option<(u16, FailureCode)>>,
    kv_events: Mutex<Option<Vec<KvEventBatch>>>,
    speaks_frames: AtomicBool,
    /// Prompt tokens yet to be computed, and how many of them a second.
    queue: Mutex<(u64, Option<f64>)>,
    /// When it found that nobody listens where the server is that it stands beside.
    server_gone: Mutex<Option<Instant>>,
    /// Ends with the worker, and all connections with it.
    pub(super) life: CancellationToken,
    name: WorkerId,
    role: Role,
    epoch: AtomicU64,
}

impl Script {
    /// What the next generate call does.
    pub(super) fn next(&self, request: &GenerateRequest, seen: &Seen) -> Act {
        seen.generate.lock().expect("unpoisoned").push(request.clone());
        let next = self.acts.lock().expect("unpoisoned").pop_front();
        next.unwrap_or_else(|| self.default.lock().expect("unpoisoned").clone())
    }
}

pub(super) struct Open(pub(super) Arc<Seen>);

impl Open {
    pub(super) fn begin(seen: &Arc<Seen>) -> Self {
        seen.open.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(seen))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Prefilling(Arc<Seen>);

impl Drop for Prefilling {
    fn drop(&mut self) {
        self.0.prefilling.fetch_sub(1, Ordering::SeqCst);
    }
}

pub(super) type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

impl FakeWorker {
    /// Starts a worker that behaves well.
    pub(crate) async fn start(name: &str, role: Role) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address: SocketAddr = listener.local_addr().expect("an address");
        let worker: WorkerId = name.parse().expect("a name");
        let script = Arc::new(Script {
            acts: Mutex::default(),
            default: Mutex::new(Act::Good),
            prefill_hangs: Mutex::new(false),
            state_hangs: AtomicBool::new(false),
            frames_refused: AtomicUsize::new(0),
            prefill_status: Mutex::new(None),
            kv_events: Mutex::new(None),
            speaks_frames: AtomicBool::new(true),
            queue: Mutex::default(),
            server_gone: Mutex::default(),
            life: CancellationToken::new(),
            name: worker.clone(),
            role,
            epoch: AtomicU64::new(1),
        });
        let seen = Arc::new(Seen::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, Arc::clone(&script), Arc::clone(&seen)));
        let member = Member {
            worker,
            epoch: Epoch(1),
            pool: pool(role),
            role,
            address: address.to_string(),
            server: None,
            kv: None,
            ready: true,
        };
        let life = script.life.clone().drop_guard();
        Self { member, seen, script, _tasks: tasks, _life: life }
    }

    /// It is in this life, and the view says so.
    pub(crate) fn in_life(mut self, epoch: u64) -> Self {
        self.script.epoch.store(epoch, Ordering::SeqCst);
        self.member.epoch = Epoch(epoch);
        self
    }

    /// What the next generate call does.
    pub(crate) fn then(&self, act: Act) -> &Self {
        self.script.acts.lock().expect("unpoisoned").push_back(act);
        self
    }

    /// What calls do that nothing was said about.
    pub(crate) fn always(&self, act: Act) -> &Self {
        *self.script.default.lock().expect("unpoisoned") = act;
        self
    }

    /// It says that so many prompt tokens are waiting, of which it computes so many a second.
    pub(crate) fn queue(&self, tokens: u64, tokens_per_s: f64) -> &Self {
        *self.script.queue.lock().expect("unpoisoned") = (tokens, Some(tokens_per_s));
        self
    }

    /// Prefill calls are never answered.
    pub(crate) fn hang_prefill(&self) -> &Self {
        *self.script.prefill_hangs.lock().expect("unpoisoned") = true;
        self
    }

    /// Questions for its state are not answered any more.
    pub(crate) fn hide_state(&self) -> &Self {
        self.script.state_hangs.store(true, Ordering::SeqCst);
        self
    }

    /// So many times it has no connection of frames to give.
    pub(crate) fn refuse_frames(&self, times: usize) -> &Self {
        self.script.frames_refused.store(times, Ordering::SeqCst);
        self
    }

    /// Prefill calls are answered with this status and code.
    pub(crate) fn fail_prefill(&self, status: u16, code: FailureCode) -> &Self {
        *self.script.prefill_status.lock().expect("unpoisoned") = Some((status, code));
        self
    }

    /// Follows of KV events get these lines and then nothing; without, the worker has no events.
    pub(crate) fn kv_events(&self, batches: Vec<KvEventBatch>) -> &Self {
        *self.script.kv_events.lock().expect("unpoisoned") = Some(batches);
        self
    }

    /// From now on it has no KV events.
    pub(crate) fn no_kv_events(&self) -> &Self {
        *self.script.kv_events.lock().expect("unpoisoned") = None;
        self
    }

    /// From now on the worker is one that speaks no frames: each call is a request of its own.
    pub(crate) fn without_frames(&self) -> &Self {
        self.script.speaks_frames.store(false, Ordering::SeqCst);
        self
    }

    /// It has found that nobody listens where its server is.
    pub(crate) fn misses_its_server(&self) -> &Self {
        *self.script.server_gone.lock().expect("unpoisoned") = Some(Instant::now());
        self
    }

    /// Generate calls seen.
    pub(crate) fn generated(&self) -> Vec<GenerateRequest> {
        self.seen.generate.lock().expect("unpoisoned").clone()
    }

    /// Prefill calls seen.
    pub(crate) fn prefilled(&self) -> Vec<PrefillRequest> {
        self.seen.prefill.lock().expect("unpoisoned").clone()
    }
}

fn pool(role: Role) -> PoolName {
    role.to_string().parse().expect("a name")
}

async fn accept(listener: TcpListener, script: Arc<Script>, seen: Arc<Seen>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { return };
        let _ = stream.set_nodelay(true);
        // What a worker's kernel keeps is no cost of the router's, which tests measure by what the worker has sent.
        let _ = socket2::SockRef::from(&stream).set_send_buffer_size(32 << 10);
        let (script, seen) = (Arc::clone(&script), Arc::clone(&seen));
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let (script, seen) = (Arc::clone(&script), Arc::clone(&seen));
                async move { Ok::<_, Infallible>(serve(request, script, seen).await) }
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .max_buf_size(32 << 10)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
                .await;
        });
    }
}

async fn serve(request: Request<Incoming>, script: Arc<Script>, seen: Arc<Seen>) -> Answer {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    if path == frames::PATH && script.speaks_frames.load(Ordering::SeqCst) {
        let refuses = |left: usize| left.checked_sub(1);
        if script.frames_refused.fetch_update(Ordering::SeqCst, Ordering::SeqCst, refuses).is_ok() {
            return whole(500, &WorkerError { code: FailureCode::Engine, message: "as told".to_owned() });
        }
        return fake_frames::upgrade(request, script, seen);
    }
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    match path.as_str() {
        "/v1/state" if script.state_hangs.load(Ordering::SeqCst) => std::future::pending().await,
        "/v1/state" => whole(200, &state(&script, &seen)),
        "/v1/kv/events" => kv_events(&script),
        "/v1/prefill" => prefill(&body, &script, seen).await,
        _ if method == http::Method::DELETE => {
            let id = path.rsplit('/').next().unwrap_or_default();
            seen.ended.lock().expect("unpoisoned").push(id.to_owned());
            whole(200, &())
        }
        "/v1/generate" => {
            let request: GenerateRequest = serde_json::from_slice(&body).expect("a request of the protocol");
            let act = script.next(&request, &seen);
            generate(request, act, seen)
        }
        _ => whole(404, &WorkerError { code: FailureCode::Refused, message: path }),
    }
}

fn server_gone_ms(script: &Script) -> Option<u64> {
    let at = *script.server_gone.lock().expect("unpoisoned");
    at.map(|at| u64::try_from(at.elapsed().as_millis()).expect("not that long"))
}

fn state(script: &Script, seen: &Seen) -> WorkerStatus {
    let (prefill_tokens_pending, prefill_tokens_per_s) = *script.queue.lock().expect("unpoisoned");
    WorkerStatus {
        worker: script.name.clone(),
        epoch: Some(Epoch(script.epoch.load(Ordering::SeqCst))),
        pool: pool(script.role),
        role: script.role,
        state: "ready".to_owned(),
        pid: 1,
        process: None,
        requests_running: u32::try_from(seen.open.load(Ordering::SeqCst)).expect("small"),
        requests_waiting: 0,
        prefill_tokens_pending,
        kv_blocks: BlockCounts { free: 10, ..BlockCounts::default() },
        kv_evictable: 0,
        prefilled_tokens: 0,
        prompt_tokens: None,
        prefill_tokens_per_s,
        itl_ms: None,
        paths: Vec::new(),
        last_error: None,
        last_error_ago_ms: None,
        age_ms: None,
        server_gone_ms: server_gone_ms(script),
        drain: None,
    }
}

fn kv_events(script: &Script) -> Answer {
    let Some(batches) = script.kv_events.lock().expect("unpoisoned").clone() else {
        return whole(404, &WorkerError { code: FailureCode::Refused, message: "no events".to_owned() });
    };
    let mut lines = Vec::new();
    for batch in &batches {
        serde_json::to_writer(&mut lines, batch).expect("serializable");
        lines.push(b'\n');
    }
    let first = futures_util::stream::iter([Ok(Frame::data(Bytes::from(lines)))]);
    let open = futures_util::StreamExt::chain(first, futures_util::stream::pending());
    Response::new(StreamBody::new(open).boxed_unsync())
}

async fn prefill(body: &[u8], script: &Script, seen: Arc<Seen>) -> Answer {
    let request: PrefillRequest = serde_json::from_slice(body).expect("a request of the protocol");
    seen.prefill.lock().expect("unpoisoned").push(request);
    seen.prefilling.fetch_add(1, Ordering::SeqCst);
    let _prefilling = Prefilling(Arc::clone(&seen));
    let status = *script.prefill_status.lock().expect("unpoisoned");
    if let Some((status, code)) = status {
        return whole(status, &WorkerError { code, message: "as told".to_owned() });
    }
    let hangs = *script.prefill_hangs.lock().expect("unpoisoned");
    if hangs {
        std::future::pending::<()>().await;
    }
    whole(
        200,
        &PrefillReply {
            outcome: HandoffOutcome::Done,
            cached_tokens: 0,
            computed_tokens: 1,
            queue_ms: 0.0,
            prefill_ms: 1.0,
        },
    )
}

fn whole<T: serde::Serialize>(status: u16, value: &T) -> Answer {
    let bytes = Bytes::from(serde_json::to_vec(value).expect("serializable"));
    let body = Full::new(bytes).map_err(|never| match never {}).boxed_unsync();
    Response::builder().status(status).body(body).expect("a response")
}

fn line(event: &GenerateEvent) -> Bytes {
    let mut bytes = serde_json::to_vec(event).expect("serializable");
    bytes.push(b'\n');
    Bytes::from(bytes)
}

/// One step of a stream.
pub(super) enum Step {
    Send(GenerateEvent),
    Garbage,
    Break,
    Hang,
    Wait(Duration),
}

fn generate(request: GenerateRequest, act: Act, seen: Arc<Seen>) -> Answer {
    if let Act::Status(status, code) = act {
        return whole(status, &WorkerError { code, message: "as told".to_owned() });
    }
    let open = Open::begin(&seen);
    let stream = futures_util::stream::unfold(Some((steps(request, act), open)), |state| async move {
        let (mut steps, open) = state?;
        loop {
            match steps.next() {
                None => return None,
                Some(Step::Garbage) => {
                    let garbage = Bytes::from_static(b"{\"event\":\"tok\n");
                    return Some((Ok(Frame::data(garbage)), Some((steps, open))));
                }
                Some(Step::Send(event)) => {
                    let bytes = line(&event);
                    open.0.sent.fetch_add(bytes.len(), Ordering::SeqCst);
                    return Some((Ok(Frame::data(bytes)), Some((steps, open))));
                }
                Some(Step::Break) => {
                    // Lets what was sent before reach the other side first.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    return Some((Err(std::io::Error::other("as told")), None));
                }
                Some(Step::Hang) => std::future::pending::<()>().await,
                Some(Step::Wait(pause)) => tokio::time::sleep(pause).await,
            }
        }
    });
    Response::new(StreamBody::new(stream).boxed_unsync())
}

pub(super) fn steps(request: GenerateRequest, act: Act) -> Box<dyn Iterator<Item = Step> + Send> {
    let (all, last): (usize, Vec<Step>) = match &act {
        Act::DieAfter(n) => (*n, vec![Step::Break]),
        Act::CloseAfter(n) => (*n, vec![]),
        Act::SilentAfter(n) => (*n, vec![Step::Hang]),
        Act::GarbageAfter(n) => (*n, vec![Step::Garbage]),
        Act::FailAfter(n, code) => {
            let failed = GenerateEvent::Failed { code: *code, message: "as told".to_owned() };
            (*n, vec![Step::Send(failed)])
        }
        Act::EosAfter(n) => {
            let eos = GenerateEvent::Token { token: EOS, logprob: None, logits_digest: None };
            let end = GenerateEvent::Finished { reason: FinishReason::Stop };
            (*n, vec![Step::Send(eos), Step::Send(end)])
        }
        Act::Endless | Act::Lazy(_) => (usize::MAX, vec![]),
        Act::SayAndDie(_) => (0, vec![Step::Break]),
        _ => {
            let end = GenerateEvent::Finished { reason: FinishReason::Length };
            (request.max_tokens as usize, vec![Step::Send(end)])
        }
    };
    let said = match &act {
        Act::Say(tokens) | Act::SayAndDie(tokens) => Some(tokens.clone()),
        _ => None,
    };
    let count = said.as_ref().map_or(all.min(request.max_tokens as usize), Vec::len);
    let pause = match act {
        Act::Slow(pause) => Some((None, pause)),
        Act::PauseAfter(at, pause) => Some((Some(at), pause)),
        _ => None,
    };
    let (imported_tokens, fallback) = match act {
        Act::Import(tokens) => (tokens, None),
        Act::GiveUp => (0, Some("link".to_owned())),
        _ => (0, None),
    };
    let report = GenerateEvent::Prefilled(PrefillReport {
        cached_tokens: 3,
        imported_tokens,
        imported_bytes: 0,
        queue_ms: 0.5,
        prefill_ms: 1.5,
        transfer_tail_ms: 0.0,
        fallback,
    });
    let mut tokens = request.tokens.clone();
    let sampling = request.sampling.clone();
    let digest = request.logits_digest;
    let body = (0..count).flat_map(move |i| {
        let token = match &said {
            Some(said) => said[i],
            None => next_token(&tokens, sampling.seed),
        };
        tokens.push(token);
        let logprob = sampling.logprobs.map(|top| TokenLogprob {
            logprob: -0.5,
            top: (0..top).map(|rank| (token + rank, -0.5 - rank as f32)).collect(),
        });
        let logits_digest = digest.then_some(0xABCD_0000 + i as u64);
        let event = GenerateEvent::Token { token, logprob, logits_digest };
        let pause = pause.filter(|(at, _)| at.is_none_or(|at| at == i));
        pause.map(|(_, pause)| Step::Wait(pause)).into_iter().chain([Step::Send(event)])
    });
    Box::new([Step::Send(report)].into_iter().chain(body).chain(last))
}
