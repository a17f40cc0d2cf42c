use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use baton_config::protocol::Sampling;
use baton_config::{Dtype, KvGeometry, KvLayout};
use baton_engine::arena::Arena;
use baton_engine::sim::{Sim, SimConfig};
use baton_engine::{BatchItem, EngineLimits, ExecuteError, Executor, Forward, HeapMemory, ModelInfo};

use super::*;

fn model() -> ModelInfo {
    ModelInfo {
        name: "test".into(),
        vocab: 100,
        max_context: 512,
        eos: Vec::new(),
        layers: 1,
        kv_heads: 1,
        head_dim: 8,
    }
}

fn sim(decode_base_us: f64) -> Sim {
    let config = SimConfig {
        prefill_base_us: 10.0,
        prefill_per_token_us: 1.0,
        decode_base_us,
        decode_per_sequence_us: 0.0,
        ..SimConfig::default()
    };
    Sim::new(config, model())
}

fn start(executor: Box<dyn Executor>) -> (EngineHandle, std::thread::JoinHandle<()>) {
    let geometry = KvGeometry {
        layers: 1,
        kv_heads: 1,
        head_dim: 8,
        block_tokens: 16,
        layout: KvLayout::Hnd,
        dtype: Dtype::Bf16,
        ..KvGeometry::PLAIN
    };
    let memory = Arc::new(HeapMemory::new(64 * geometry.block_bytes()));
    let arena = Arc::new(Arena::new(memory, geometry, 64).unwrap());
    let engine = Engine::new(executor, arena, EngineLimits::default()).unwrap();
    let log = Arc::new(KvLog::new(16, 100));
    EngineHandle::start(engine, log, tokio::runtime::Handle::current()).unwrap()
}

fn spec(max_tokens: u32) -> SequenceSpec {
    SequenceSpec {
        tokens: vec![1, 2, 3],
        generated: 0,
        max_tokens,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        cache_salt: 0,
        logits_digest: false,
        purpose: Purpose::Generate,
    }
}

async fn tokens(sequence: &mut Sequence) -> usize {
    let mut count = 0;
    while let Some(event) = sequence.events.recv().await {
        count += usize::from(matches!(event, EngineEvent::Token { .. }));
    }
    count
}

async fn until(engine: &EngineHandle, holds: impl FnMut(&EngineView) -> bool) {
    let mut changes = engine.changes();
    let wait = changes.wait_for(holds);
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("never came true").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_holds_up_nobody() {
    let (engine, thread) = start(Box::new(sim(1.0)));
    let mut unread = engine.submit(spec(400)).await.unwrap();
    let mut read = engine.submit(spec(400)).await.unwrap();
    assert_eq!(tokens(&mut read).await, 400);
    until(&engine, |view| view.load.running == 0).await;
    assert_eq!(tokens(&mut unread).await, 400, "every event was kept");
    engine.stop().await;
    thread.join().unwrap();
    assert!(engine.submit(spec(1)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_does_not_wait_for_modelled_time() {
    let (engine, _thread) = start(Box::new(sim(3_600e6)));
    let mut sequence = engine.submit(spec(10)).await.unwrap();
    // The first token is out; the next would take an hour.
    while !matches!(sequence.events.recv().await, Some(EngineEvent::Token { .. })) {}
    let other = engine.submit(spec(10)).await.unwrap();
    engine.cancel(sequence.id, Writers::Gone).await;
    engine.cancel(other.id, Writers::Gone).await;
    tokio::time::timeout(Duration::from_secs(20), engine.audit()).await.expect("commands are heard").unwrap();
    assert!(sequence.events.recv().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_modelled_prompt_is_measured_no_faster_than_the_model_says() {
    let (engine, thread) = start(Box::new(sim(1.0)));
    // Steps of a millisecond, back to back: one that began late is made up for by the next.
    for first in 0..40 {
        let prompt = SequenceSpec { tokens: (0..500).map(|at| (first + at) % 100).collect(), ..spec(1) };
        let mut sequence = engine.submit(prompt).await.unwrap();
        assert_eq!(tokens(&mut sequence).await, 1);
    }
    until(&engine, |view| view.prefill_tokens_per_s.is_some()).await;
    let speed = engine.view().prefill_tokens_per_s.unwrap();
    assert!(speed <= 1e6, "1 us for each token, measured as {speed} a second");
    engine.stop().await;
    thread.join().unwrap();
}

/// How a pass ends.
pub(crate) enum Pass {
    Well,
    /// What was computed is no good.
    Badly,
    /// A bug of the engine.
    InPanic,
}

/// An executor whose passes wait for the test.
struct Gated {
    sim: Sim,
    entered: SyncSender<()>,
    go: Receiver<Pass>,
}

impl Executor for Gated {
    fn model(&self) -> &ModelInfo {
        self.sim.model()
    }

    fn forward(
        &mut self,
        arena: &Arena,
        batch: &[BatchItem<'_>],
        out: &mut Forward,
    ) -> Result<(), ExecuteError> {
        self.entered.send(()).unwrap();
        match self.go.recv().unwrap() {
            Pass::Well => self.sim.forward(arena, batch, out),
            Pass::Badly => Err(ExecuteError::Broken { reason: "no good".to_owned() }),
            Pass::InPanic => panic!("a bug of the engine"),
        }
    }
}

/// What a test has of the passes of an executor.
pub(crate) struct Passes {
    /// One has begun.
    pub(crate) begun: Receiver<()>,
    /// How one ends.
    pub(crate) go: SyncSender<Pass>,
}

/// An executor whose passes wait for the test.
pub(crate) fn gated(sim: Sim) -> (Box<dyn Executor>, Passes) {
    let (entered, begun) = sync_channel(8);
    let (open, go) = sync_channel(8);
    (Box::new(Gated { sim, entered, go }), Passes { begun, go: open })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_hangs_shows() {
    let (executor, passes) = gated(sim(1.0));
    let (engine, _thread) = start(executor);
    assert_eq!(engine.stuck_for(), Duration::ZERO);
    let mut sequence = engine.submit(spec(1)).await.unwrap();
    passes.begun.recv().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while engine.stuck_for() < Duration::from_millis(20) {
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    }
    passes.go.send(Pass::Well).unwrap();
    assert_eq!(tokens(&mut sequence).await, 1);
    until(&engine, |view| view.load.running == 0).await;
    assert_eq!(engine.stuck_for(), Duration::ZERO);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_ends_the_engine_and_every_stream() {
    let (executor, passes) = gated(sim(1.0));
    let (engine, thread) = start(executor);
    let mut sequence = engine.submit(spec(1)).await.unwrap();
    passes.begun.recv().unwrap();
    passes.go.send(Pass::InPanic).unwrap();
    thread.join().unwrap();
    assert_eq!(tokens(&mut sequence).await, 0);
    assert!(engine.view().ended.unwrap().contains("panicked"));
    assert_eq!(engine.submit(spec(1)).await.unwrap_err(), TakeError::Gone(EngineGone));
}
