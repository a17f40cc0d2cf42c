//! A fleet in this process for tests.

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use baton_conductor::server::PoolOptions;
use baton_conductor::{Client, ClientOptions, ConductorOptions};
use baton_config::protocol::{
    FinishReason, FirstToken, GenerateEvent, GenerateRequest, HandoffRef, KvEventBatch, PeerRef,
    PrefillReply, PrefillReport, PrefillRequest, Sampling, Ticket, TicketBlock, WorkerStatus,
};
use baton_config::{Bytes, Dtype, Epoch, HandoffId, KvGeometry, KvLayout, Role, WorkerId};
use baton_engine::engine::{Purpose, SequenceSpec};
use baton_engine::sim::{Sim, SimConfig};
use baton_engine::{EngineLimits, Executor, ModelInfo};
use baton_transfer::export::ExportBlock;
use baton_transfer::{
    Agent, ArenaMemory, BackendKind, Choose, Descriptor, DigestSeed, HostMemory, block_digest,
};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::super::{Stop, Worker};
use super::Tamper;
use crate::driver::Handoffs;
use crate::engine_thread::tests::{Passes, gated};
use crate::handoff::{self, Opening};
use crate::options::{
    ArenaOptions, DeviceKind, DeviceOptions, EngineChoice, STALLED, TransferOptions, WorkerOptions, geometry,
};

pub(super) const BODY_MAX: usize = 256 << 10;

/// Stands for a connection that broke where a status is expected.
const BROKEN: u16 = 0;

/// How long a condition may take to come true.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// What is varied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    pub(super) backends: &'static [BackendKind],
    pub(super) device: bool,
    /// Both sides on devices that networks reach, and told to use that.
    pub(super) direct: bool,
    /// Orders in memory at prefill and at decode.
    pub(super) layouts: (KvLayout, KvLayout),
    pub(super) reference: bool,
    pub(super) us_per_token: f64,
    pub(super) decode_us: f64,
    pub(super) blocks: u32,
    pub(super) prefix_cache: bool,
    pub(super) local_prefill: bool,
}

impl Setup {
    pub(super) fn sim() -> Self {
        Self {
            backends: &[BackendKind::Tcp],
            device: true,
            direct: false,
            layouts: (KvLayout::Nhd, KvLayout::Hnd),
            reference: false,
            us_per_token: 10.0,
            decode_us: 200.0,
            blocks: 128,
            prefix_cache: false,
            local_prefill: false,
        }
    }

    pub(super) fn reference() -> Self {
        Self { reference: true, ..Self::sim() }
    }
}

/// A deterministic prompt.
pub(super) fn prompt(seed: u64, len: usize, vocab: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % u64::from(vocab)) as u32
    };
    (0..len).map(|_| next()).collect()
}

/// Waits for a condition, not for a time.
pub(super) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A conductor, a client, and whatever workers a test starts.
pub(super) struct Fleet {
    setup: Setup,
    /// The client side of tests, and the conductor.
    runtime: Runtime,
    conductor: SocketAddr,
    conductor_stop: CancellationToken,
    conductor_task: Option<tokio::task::JoinHandle<()>>,
    http: reqwest::Client,
    view: Client,
}

/// What came of a generate request.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) tokens: Vec<u32>,
    pub(super) digests: Vec<Option<u64>>,
    pub(super) report: PrefillReport,
    pub(super) reason: Option<FinishReason>,
}

/// A worker as its process runs it.
pub(super) struct Whole {
    pub(super) address: SocketAddr,
    pub(super) epoch: Epoch,
    pub(super) stop: Stop,
    pub(super) ended: tokio::task::JoinHandle<Result<(), super::super::RunError>>,
}

/// A worker on a runtime of its own.
pub(super) struct Running {
    worker: Arc<Worker>,
    runtime: Mutex<Option<Runtime>>,
    serving: Mutex<Option<tokio::task::JoinHandle<Result<(), super::super::RunError>>>>,
    address: SocketAddr,
    http: reqwest::Client,
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn model_dir() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny")
}

impl Fleet {
    pub(super) fn start(setup: Setup) -> Self {
        let runtime = runtime();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let conductor = listener.local_addr().unwrap();
        let http = baton_conductor::http::client();
        let entered = runtime.enter();
        let view = Client::start(ClientOptions::new(vec![format!("http://{conductor}")])).unwrap();
        drop(entered);
        let mut fleet = Self {
            setup,
            runtime,
            conductor,
            conductor_stop: CancellationToken::new(),
            conductor_task: None,
            http,
            view,
        };
        fleet.serve_conductor(listener);
        fleet
    }

    fn serve_conductor(&mut self, listener: TcpListener) {
        let pool =
            |name: &str, role| PoolOptions { name: name.parse().unwrap(), role, replicas: 1, min: 0, max: 8 };
        let pools =
            vec![pool("prefill", Role::Prefill), pool("decode", Role::Decode), pool("both", Role::Both)];
        let options = ConductorOptions { lease_ttl: Duration::from_secs(2), ..ConductorOptions::new(pools) };
        self.conductor_stop = CancellationToken::new();
        let stop = self.conductor_stop.clone();
        self.conductor_task = Some(self.runtime.handle().spawn(async move {
            baton_conductor::serve(options, listener, stop).await.unwrap();
        }));
    }

    pub(super) fn stop_conductor(&mut self) {
        self.conductor_stop.cancel();
        if let Some(task) = self.conductor_task.take() {
            self.runtime.block_on(task).unwrap();
        }
    }

    pub(super) fn start_conductor(&mut self) {
        let address = self.conductor;
        let listener = self.runtime.block_on(TcpListener::bind(address)).unwrap();
        self.serve_conductor(listener);
    }

    pub(super) fn block_on<F: Future>(&self, work: F) -> F::Output {
        let _entered = self.runtime.enter();
        self.runtime.block_on(tokio::time::timeout(Duration::from_secs(100), work)).expect("the test hangs")
    }

    pub(super) fn sim(&self) -> Option<SimConfig> {
        (!self.setup.reference).then(|| SimConfig {
            prefill_base_us: 200.0,
            prefill_per_token_us: self.setup.us_per_token,
            prefill_per_pair_ns: 0.0,
            decode_base_us: self.setup.decode_us,
            decode_per_sequence_us: 1.0,
            ..SimConfig::default()
        })
    }

    pub(super) fn model(&self) -> ModelInfo {
        ModelInfo {
            name: "test".into(),
            vocab: 500,
            max_context: 2048,
            eos: Vec::new(),
            layers: 2,
            kv_heads: 2,
            head_dim: 16,
        }
    }

    pub(super) fn vocab(&self) -> u32 {
        if self.setup.reference { 900 } else { self.model().vocab }
    }

    pub(super) fn prefill(&self, name: &str) -> Running {
        self.worker(name, Role::Prefill, |_| {})
    }

    pub(super) fn decode(&self, name: &str) -> Running {
        self.worker(name, Role::Decode, |_| {})
    }

    pub(super) fn alone(&self, name: &str) -> Running {
        self.worker(name, Role::Both, |_| {})
    }

    /// A worker as those of its role are, but for what `change` does to its options.
    pub(super) fn worker(&self, name: &str, role: Role, change: impl FnOnce(&mut WorkerOptions)) -> Running {
        let mut options = self.options(name, role);
        change(&mut options);
        self.run(name, options)
    }

    fn options(&self, name: &str, role: Role) -> WorkerOptions {
        let blocks = match role {
            Role::Prefill => (32, self.setup.layouts.0),
            Role::Decode | Role::Both => (16, self.setup.layouts.1),
        };
        let device = role == Role::Prefill && self.setup.device;
        let (engine, model) = match self.sim() {
            Some(config) => (EngineChoice::Sim { config, model: self.model() }, self.model()),
            None => {
                let shape = baton_config::model_shape::ModelShape::read(&model_dir()).unwrap();
                let model = ModelInfo {
                    layers: shape.layers,
                    kv_heads: shape.kv_heads,
                    head_dim: shape.head_dim,
                    ..self.model()
                };
                (EngineChoice::Reference { model_dir: model_dir(), threads: 1 }, model)
            }
        };
        let geometry = geometry(&model, blocks.0, blocks.1, Dtype::Bf16);
        let direct = self.setup.direct;
        let device = (device || direct).then_some(DeviceOptions {
            kind: DeviceKind::Simulated { bytes_per_s: None, reachable: direct },
            direct,
        });
        let staging = Bytes(24 * geometry.block_bytes() as u64);
        let limits = EngineLimits {
            prefill_chunk_tokens: 64,
            prefix_cache: self.setup.prefix_cache,
            ..EngineLimits::default()
        };
        WorkerOptions {
            worker: name.parse().unwrap(),
            pool: role.to_string().parse().unwrap(),
            role,
            model: "test".into(),
            engine,
            limits,
            arena: ArenaOptions { device, geometry, blocks: self.setup.blocks, staging },
            transfer: TransferOptions {
                backends: self.setup.backends.to_vec(),
                // A test names the path it means.
                choose: Choose::Listed,
                ..TransferOptions::local()
            },
            advertise: None,
            conductors: vec![format!("http://{}", self.conductor)],
            conductor_access: baton_config::fleet::ConductorAccess::default(),
            in_flight_max: 256,
            body_max: Bytes(BODY_MAX as u64),
            stalled: STALLED,
            drain_grace: Duration::from_secs(20),
            local_prefill: self.setup.local_prefill,
            join_timeout: Duration::from_secs(20),
            handoff: handoff::Limits::default(),
        }
    }

    /// A prefill worker whose transfer agent peers reach over a path that damages blocks.
    pub(super) fn prefill_behind(&self, name: &str, tamper: &Tamper) -> Running {
        let damaged = |options: &mut WorkerOptions| options.transfer.advertise = Some(tamper.address);
        let running = self.worker(name, Role::Prefill, damaged);
        tamper.lead_to(running.worker.io.agent.local_address());
        running
    }

    /// A prefill worker whose model has more heads.
    pub(super) fn prefill_of_another_model(&self, name: &str) -> Running {
        self.worker(name, Role::Prefill, |options| {
            options.arena.geometry.kv_heads = 4;
            if let EngineChoice::Sim { model, .. } = &mut options.engine {
                model.kv_heads = 4;
            }
        })
    }

    /// A worker whose engine is at a step that does not end before what comes with it says how.
    pub(super) fn stuck(&self, name: &str, grace: Duration) -> (Running, Passes) {
        let mut options = self.options(name, Role::Both);
        options.drain_grace = grace;
        let (executor, passes) = gated(Sim::new(self.sim().unwrap(), self.model()));
        let GenerateRequest { tokens, max_tokens, sampling, .. } = self.request(vec![1, 2, 3], 4);
        let spec = SequenceSpec {
            tokens,
            generated: 0,
            max_tokens,
            sampling,
            cache_salt: 0,
            logits_digest: false,
            purpose: Purpose::Generate,
        };
        let running = self.run_around(name, options, Some(executor), async |worker| {
            worker.shared.engine.submit(spec).await.unwrap();
            passes.begun.recv().unwrap();
        });
        (running, passes)
    }

    fn run(&self, name: &str, options: WorkerOptions) -> Running {
        self.run_around(name, options, None, async |_| {})
    }

    fn run_around(
        &self,
        name: &str,
        options: WorkerOptions,
        executor: Option<Box<dyn Executor>>,
        first: impl AsyncFnOnce(&Worker),
    ) -> Running {
        let runtime = runtime();
        let (worker, serving, address) = runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let built = match executor {
                None => Worker::build(options, listener, Stop::default()).await,
                Some(executor) => {
                    let executor = std::future::ready(Ok(executor));
                    Worker::build_around(executor, options, listener, Stop::default()).await
                }
            };
            let worker = Arc::new(built.unwrap());
            // Whoever asks before it has joined is told so.
            let url = format!("http://{address}/readyz");
            let early = baton_conductor::http::client().get(url).send().await.unwrap();
            assert_eq!((early.status().as_u16(), early.text().await.unwrap().as_str()), (503, "joining\n"));
            first(&worker).await;
            let membership = worker.join().await.unwrap().unwrap();
            let serving = tokio_util::task::TaskTracker::new().spawn({
                let worker = Arc::clone(&worker);
                async move {
                    let end = worker.serve(&membership).await;
                    membership.leave().await;
                    end
                }
            });
            (worker, serving, address)
        });
        let running = Running {
            worker,
            runtime: Mutex::new(Some(runtime)),
            serving: Mutex::new(Some(serving)),
            address,
            http: self.http.clone(),
        };
        self.block_on(async {
            until("the worker has an epoch", || running.worker.life.borrow().is_some()).await;
            self.wait_ready(name, running.epoch()).await;
        });
        running
    }

    /// A worker as its process runs it, to the end; ready.
    pub(super) fn whole(&self, name: &str, grace: Duration) -> Whole {
        let mut options = self.options(name, Role::Both);
        options.drain_grace = grace;
        let stop = Stop::default();
        self.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let ended = self.runtime.handle().spawn(super::super::run(options, listener, stop.clone()));
            let name: WorkerId = name.parse().unwrap();
            let ready = |view: &baton_conductor::View| {
                let record = view.worker(&name)?;
                (record.state == baton_conductor::WorkerState::Ready).then_some(record.epoch)
            };
            let wait = self.view.wait_for(|view| ready(view).is_some());
            let view = tokio::time::timeout(PATIENCE, wait).await.expect("never ready");
            let epoch = ready(&view).unwrap();
            Whole { address, epoch, stop, ended }
        })
    }

    /// What the conductor knows of a worker.
    pub(super) async fn told(&self, name: &str) -> serde_json::Value {
        let url = format!("http://{}/v1/workers", self.conductor);
        let all: serde_json::Value = self.http.get(url).send().await.unwrap().json().await.unwrap();
        let workers = all["workers"].as_array().expect("a list");
        workers.iter().find(|worker| worker["worker"] == name).expect("it is known").clone()
    }

    /// Takes a lease on a name for a process that is always the same one, and does not keep it alive.
    pub(super) async fn register(&self, name: &str, role: Role, address: &str, transfer: &str) -> Epoch {
        let url = format!("http://{}/v1/workers", self.conductor);
        let body = serde_json::json!({
            "worker": name, "incarnation": "0".repeat(32), "pool": role.to_string(), "role": role,
            "model": "test", "engine": "sim", "address": address, "transfer": transfer, "state": "ready",
        });
        let answer = self.http.post(url).json(&body).send().await.unwrap();
        let answer: serde_json::Value = answer.json().await.unwrap();
        serde_json::from_value(answer["epoch"].clone()).unwrap_or_else(|_| panic!("{answer}"))
    }

    /// An operator wishes that a worker drains.
    pub(super) async fn wish_drain(&self, name: &str) {
        let url = format!("http://{}/v1/workers/{name}/drain", self.conductor);
        assert!(self.http.post(url).send().await.unwrap().status().is_success());
    }

    /// What the conductor counts.
    pub(super) async fn conductor_metrics(&self) -> String {
        let url = format!("http://{}/metrics", self.conductor);
        self.http.get(url).send().await.unwrap().text().await.unwrap()
    }

    /// What is answered to a request, to its end.
    pub(super) fn start_post<T: serde::Serialize>(
        &self,
        to: SocketAddr,
        path: &str,
        body: &T,
    ) -> tokio::task::JoinHandle<reqwest::Result<String>> {
        let send = self.http.post(format!("http://{to}{path}")).json(body).send();
        self.runtime.handle().spawn(async move { send.await?.text().await })
    }

    /// The same of a `GET`.
    pub(super) fn start_get(
        &self,
        to: SocketAddr,
        path: &str,
    ) -> tokio::task::JoinHandle<reqwest::Result<String>> {
        let send = self.http.get(format!("http://{to}{path}")).send();
        self.runtime.handle().spawn(async move { send.await?.text().await })
    }

    pub(super) async fn wait_ready(&self, name: &str, epoch: Epoch) {
        let name: WorkerId = name.parse().unwrap();
        let wait = self.view.wait_for(|view| {
            view.worker(&name).is_some_and(|record| {
                record.epoch == epoch && record.state == baton_conductor::WorkerState::Ready
            })
        });
        tokio::time::timeout(PATIENCE, wait).await.expect("never ready");
    }

    pub(super) async fn wait_gone(&self, name: &str) {
        let name: WorkerId = name.parse().unwrap();
        let wait = self.view.wait_for(|view| view.worker(&name).is_none());
        tokio::time::timeout(PATIENCE, wait).await.expect("never gone");
    }

    pub(super) fn request(&self, tokens: Vec<u32>, max_tokens: u32) -> GenerateRequest {
        GenerateRequest {
            request_id: "test".into(),
            tokens,
            generated: 0,
            max_tokens,
            sampling: Sampling { temperature: 0.0, ignore_eos: true, ..Sampling::default() },
            cache_salt: 0,
            logits_digest: true,
            whole: false,
            handoff: None,
        }
    }

    fn handoff(own: &Running, peer: &Running, id: u128) -> HandoffRef {
        let peer = PeerRef {
            worker: peer.worker.options.worker.clone(),
            epoch: peer.epoch(),
            address: peer.address.to_string(),
        };
        HandoffRef { id: HandoffId(id), own_epoch: own.epoch(), peer }
    }

    pub(super) fn generate_with(
        &self,
        d: &Running,
        p: &Running,
        request: &GenerateRequest,
        id: u128,
    ) -> GenerateRequest {
        GenerateRequest { handoff: Some(Self::handoff(d, p, id)), ..request.clone() }
    }

    pub(super) async fn post<T: serde::Serialize>(
        &self,
        to: &Running,
        path: &str,
        body: &T,
    ) -> reqwest::Result<reqwest::Response> {
        self.http.post(format!("http://{}{path}", to.address)).json(body).send().await
    }

    pub(super) async fn post_text(&self, to: &Running, path: &str, body: &str) -> reqwest::Response {
        self.http.post(format!("http://{}{path}", to.address)).body(body.to_owned()).send().await.unwrap()
    }

    pub(super) async fn delete(&self, at: &Running, id: u128) {
        let url = format!("http://{}/v1/handoffs/{}", at.address, HandoffId(id));
        assert_eq!(self.http.delete(url).send().await.unwrap().status().as_u16(), 204);
    }

    /// Generates on one worker alone.
    pub(super) async fn generate(&self, on: &Running, request: &GenerateRequest) -> Answer {
        answer(self.post(on, "/v1/generate", request).await.unwrap()).await.unwrap()
    }

    /// The decode side of a handoff.
    pub(super) async fn generate_from(
        &self,
        d: &Running,
        p: &Running,
        request: &GenerateRequest,
        id: u128,
    ) -> Answer {
        self.generate(d, &self.generate_with(d, p, request, id)).await
    }

    /// A generate request whose client leaves when the result is dropped.
    pub(super) fn start_generate(
        &self,
        d: &Running,
        p: &Running,
        request: &GenerateRequest,
        id: u128,
    ) -> Left<Answer> {
        self.start_generate_alone(d, &self.generate_with(d, p, request, id))
    }

    pub(super) fn start_generate_alone(&self, d: &Running, request: &GenerateRequest) -> Left<Answer> {
        let send = self.http.post(format!("http://{}/v1/generate", d.address)).json(request).send();
        Left(self.runtime.handle().spawn(async move { answer(send.await.map_err(|_| BROKEN)?).await }))
    }

    /// The prefill side of a handoff; its caller leaves when the result is dropped.
    pub(super) fn start_prefill(
        &self,
        p: &Running,
        d: &Running,
        request: &GenerateRequest,
        id: u128,
    ) -> Left<PrefillReply> {
        let body = PrefillRequest {
            request_id: request.request_id.clone(),
            tokens: request.tokens.clone(),
            generated: request.generated,
            sampling: request.sampling.clone(),
            cache_salt: request.cache_salt,
            logits_digest: request.logits_digest,
            handoff: Self::handoff(p, d, id),
        };
        let send = self.http.post(format!("http://{}/v1/prefill", p.address)).json(&body).send();
        Left(self.runtime.handle().spawn(async move {
            let response = send.await.map_err(|_| BROKEN)?;
            match response.status().as_u16() {
                200 => response.json().await.map_err(|_| BROKEN),
                status => Err(status),
            }
        }))
    }

    /// Both sides at once, as the router does it.
    pub(super) async fn hand_over(
        &self,
        p: &Running,
        d: &Running,
        request: &GenerateRequest,
        id: u128,
    ) -> (Answer, Result<PrefillReply, u16>) {
        let prefill = self.start_prefill(p, d, request, id);
        tokio::join!(self.generate_from(d, p, request, id), prefill)
    }
}

/// A call that its caller gives up by dropping this.
pub(super) struct Left<T>(tokio::task::JoinHandle<Result<T, u16>>);

impl<T> Future for Left<T> {
    type Output = Result<T, u16>;

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        std::pin::Pin::new(&mut self.0).poll(context).map(|joined| joined.unwrap())
    }
}

impl<T> Drop for Left<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn answer(response: reqwest::Response) -> Result<Answer, u16> {
    let status = response.status();
    let text = response.text().await.map_err(|_| BROKEN)?;
    if status.as_u16() != 200 {
        println!("{status}: {text}");
        return Err(status.as_u16());
    }
    let (mut tokens, mut digests, mut report, mut reason) = (Vec::new(), Vec::new(), None, None);
    for line in text.lines() {
        match serde_json::from_str(line).unwrap() {
            GenerateEvent::Token { token, logits_digest, .. } => {
                tokens.push(token);
                digests.push(logits_digest);
            }
            GenerateEvent::Prefilled(prefilled) => report = Some(prefilled),
            GenerateEvent::Finished { reason: why } => reason = Some(why),
            GenerateEvent::Failed { code, message } => panic!("{code:?}: {message}"),
        }
    }
    Ok(Answer { tokens, digests, report: report.expect("a report"), reason })
}

/// Follows the KV events of a worker.
pub(super) struct Follower {
    response: reqwest::Response,
    buffer: Vec<u8>,
}

impl Follower {
    pub(super) async fn next(&mut self) -> KvEventBatch {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).unwrap();
            }
            let chunk = tokio::time::timeout(PATIENCE, self.response.chunk()).await.expect("no event comes");
            self.buffer.extend_from_slice(&chunk.unwrap().expect("the stream goes on"));
        }
    }
}

impl Running {
    pub(super) fn handoffs(&self) -> &Handoffs {
        &self.worker.shared.handoffs
    }

    /// What opens a handoff to `peer` here.
    pub(super) fn opening(&self, peer: &Self, id: u128, prompt: u32) -> Opening {
        let HandoffRef { id, own_epoch, peer } = Fleet::handoff(self, peer, id);
        Opening { id, own_epoch, peer, prompt }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.worker.life.borrow().expect("an epoch").epoch
    }

    /// Blocks that belong to requests.
    pub(super) fn in_use(&self) -> u32 {
        let counts = self.worker.shared.engine.view().counts;
        counts.reserved + counts.filling + counts.valid + counts.quarantined
    }

    pub(super) fn imported_bytes(&self) -> u64 {
        BackendKind::ALL.iter().map(|b| self.transferred(*b)).sum()
    }

    pub(super) fn transferred(&self, backend: BackendKind) -> u64 {
        self.worker.shared.metrics.transferred(backend)
    }

    /// Messages waiting for their request.
    pub(super) fn parked(&self) -> i64 {
        self.worker.shared.metrics.parked.get()
    }

    fn pending(&self, id: u128) -> Vec<baton_config::protocol::TicketBlock> {
        let handoffs = self.worker.shared.handoffs.clone();
        let runtime = self.runtime.lock().unwrap();
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        runtime.as_ref().unwrap().handle().spawn(async move {
            let status = handoffs.status(HandoffId(id)).await;
            let tickets = status.map(|s| s.pending).unwrap_or_default();
            let _ = sender.send(tickets.into_iter().flat_map(|t| t.blocks).collect());
        });
        receiver.recv().unwrap()
    }

    pub(super) fn pending_blocks(&self, id: u128) -> usize {
        self.pending(id).len()
    }

    pub(super) fn pending_offsets(&self, id: u128) -> Vec<usize> {
        self.pending(id).into_iter().map(|block| block.offset as usize).collect()
    }

    pub(super) fn memory(&self) -> &ArenaMemory {
        &self.worker.memory
    }

    pub(super) fn sees(&self, other: &Self) -> bool {
        self.knows(other.worker.options.worker.as_str()) == Some(other.epoch())
    }

    /// The life of a worker that its view shows.
    pub(super) fn knows(&self, name: &str) -> Option<Epoch> {
        let view = self.worker.io.fleet.view();
        view.worker(&name.parse().unwrap()).map(|record| record.epoch)
    }

    pub(super) async fn audit(&self) {
        self.worker.shared.engine.audit().await.unwrap();
        self.worker.io.exporter.audit().unwrap();
        let let_go = || self.worker.shared.handoffs.open().borrow().requests == 0;
        until("every request of a handoff is let go", let_go).await;
        until("nothing is offered", || self.worker.io.exporter.published() == 0).await;
        let mut text = self.text("/metrics").await;
        assert!(text.contains("baton_agent_audit_failures_total 0"));
        // Blocks come back a moment before those who had them are counted.
        for _ in 0..500 {
            if text.contains("baton_agent_leases 0") && text.contains("baton_agent_imports 0") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            text = self.text("/metrics").await;
        }
        panic!("still held:\n{text}");
    }

    /// What it answers to a `POST`, without a connection that would take what is not read.
    pub(super) async fn call<T: serde::Serialize>(&self, path: &str, body: &T) -> axum::response::Response {
        let routes = TowerToHyperService::new(crate::http::routes(Arc::clone(&self.worker.shared)));
        let body = axum::body::Body::from(serde_json::to_vec(body).unwrap());
        let request =
            http::Request::post(path).header("content-type", "application/json").body(body).unwrap();
        hyper::service::Service::call(&routes, request).await.unwrap()
    }

    pub(super) async fn get(&self, path: &str) -> reqwest::Response {
        self.http.get(format!("http://{}{path}", self.address)).send().await.unwrap()
    }

    pub(super) async fn text(&self, path: &str) -> String {
        self.get(path).await.text().await.unwrap()
    }

    /// Requests that have not ended.
    pub(super) fn in_flight(&self) -> u32 {
        self.worker.shared.in_flight.count()
    }

    /// Whether it has ended, drained or not.
    pub(super) fn has_ended(&self) -> bool {
        self.serving.lock().unwrap().as_ref().is_none_or(tokio::task::JoinHandle::is_finished)
    }

    pub(super) fn readyz(&self) -> u16 {
        match *self.worker.shared.phase.borrow() {
            crate::http::Phase::Ready => 200,
            _ => 503,
        }
    }

    /// Whether it takes no new requests any more.
    pub(super) fn refuses(&self) -> bool {
        !self.worker.shared.phase.borrow().accepts()
    }

    /// Sessions with peers that are open.
    pub(super) fn sessions(&self) -> usize {
        self.worker.io.agent.sessions().len()
    }

    /// Offers `decode` a block of `geometry` for the whole of a short prompt, as if it had computed it.
    pub(super) fn offer(&self, decode: &Self, id: u128, tokens: u32, geometry: KvGeometry) -> Ticket {
        let (worker, handoff) = (&self.worker.options.worker, (HandoffId(id), decode.epoch()));
        offer(&self.worker.io.agent, worker, self.epoch(), handoff, tokens, geometry)
    }

    /// The blocks of its arena.
    pub(super) fn geometry(&self) -> KvGeometry {
        self.worker.io.geometry
    }

    /// Handoffs whose blocks it keeps.
    pub(super) fn leases(&self) -> usize {
        self.worker.shared.handoffs.open().borrow().prefills
    }

    pub(super) async fn status(&self) -> WorkerStatus {
        self.get("/v1/state").await.json().await.unwrap()
    }

    pub(super) async fn follow(&self, since: u64) -> Follower {
        let response = self.get(&format!("/v1/kv/events?since={since}")).await;
        assert_eq!(response.status().as_u16(), 200);
        Follower { response, buffer: Vec::new() }
    }

    /// The same for somebody who knows another life of the worker.
    pub(super) async fn follow_after(&self, epoch: Epoch, since: u64) -> Follower {
        let response = self.get(&format!("/v1/kv/events?since={since}&epoch={epoch}")).await;
        Follower { response, buffer: Vec::new() }
    }

    /// Ends the worker as a killed process ends: every socket closes, nothing is said.
    pub(super) fn kill(&self) {
        if let Some(runtime) = self.runtime.lock().unwrap().take() {
            runtime.shutdown_background();
        }
    }

    /// Waits until the worker has drained and left.
    pub(super) async fn ended(&self) {
        self.end().await.unwrap();
    }

    /// How it ends.
    pub(super) async fn end(&self) -> Result<(), super::super::RunError> {
        let serving = self.serving.lock().unwrap().take().unwrap();
        tokio::time::timeout(PATIENCE, serving).await.expect("never ends").unwrap()
    }

    /// Offers a block that nobody will ask for, of a handoff that nobody knows, and has everything looked after.
    pub(super) async fn forget_an_export(&self) -> usize {
        let io = &self.worker.io;
        let block = [ExportBlock { index: 0, block: 0 }];
        let deadline = tokio::time::Instant::now() + PATIENCE;
        let offered = io.exporter.publish(HandoffId(99), self.epoch(), &block, deadline);
        assert_eq!(offered.await.unwrap().len(), 1);
        // Until its lease is over.
        for _ in 0..500 {
            self.worker.audit().await;
            if io.exporter.published() == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        io.exporter.published()
    }

    /// Tasks that have not ended.
    pub(super) fn tasks(&self) -> usize {
        self.worker.shared.tasks.len()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Offers a block of `geometry` for the whole of a short prompt under a handoff to the decode worker in this life.
pub(super) fn offer(
    agent: &Agent,
    worker: &WorkerId,
    epoch: Epoch,
    (handoff, to_epoch): (HandoffId, Epoch),
    tokens: u32,
    geometry: KvGeometry,
) -> Ticket {
    let bytes = vec![7; geometry.block_bytes()];
    let memory = HostMemory::allocate(bytes.len(), "offered").unwrap();
    memory.write(0, &bytes);
    let region = agent.register(memory).unwrap();
    agent.grant(handoff, vec![Descriptor { region, offset: 0, len: bytes.len() as u32 }]);
    let digest = block_digest(DigestSeed { handoff, epoch, index: 0 }, &bytes);
    Ticket {
        worker: worker.clone(),
        epoch,
        to_epoch,
        seq: 0,
        geometry,
        tokens,
        blocks: vec![TicketBlock { index: 0, region: region.0, offset: 0, digest }],
        first: Some(FirstToken { token: 7, logprob: None, logits_digest: None }),
    }
}
