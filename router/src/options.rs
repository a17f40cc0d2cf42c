//! What a router is told at start.

use std::path::PathBuf;
use std::time::Duration;

use baton_config::Bytes;

/// Everything a router needs to know; the command line fills it from the fleet document.
#[derive(Debug, Clone)]
pub struct RouterOptions {
    /// The model and the names clients may ask for it by.
    pub model: ModelOptions,
    /// Base URLs of the conductors, tried in order.
    pub conductors: Vec<String>,
    /// How a request finds its workers.
    pub policy: Policy,
    /// Whether prompts are prefilled on another worker than the one that decodes.
    pub disaggregation: Disaggregation,
    /// Bounds on what clients may ask for and hold.
    pub limits: Limits,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Seed of the scheduler's tie-breaks and random policies; the same seed, the same choices.
    pub seed: u64,
}

impl RouterOptions {
    /// Options with every default, for `model` and one conductor.
    pub fn new(model: ModelOptions, conductor: String) -> Self {
        Self {
            model,
            conductors: vec![conductor],
            policy: Policy::default(),
            disaggregation: Disaggregation::default(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            seed: 0,
        }
    }
}

/// The model a router serves.
#[derive(Debug, Clone)]
pub struct ModelOptions {
    /// Its id in the fleet document.
    pub id: String,
    /// Other names it is served as.
    pub served_as: Vec<String>,
    /// Directory with `config.json`, `tokenizer.json` and the chat template.
    pub path: PathBuf,
    /// Tokens of prompt and answer together; the model's own limit where absent.
    pub max_context: Option<u32>,
}

/// How a decode worker and, if the prompt is prefilled elsewhere, a prefill worker are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// The pair with the lowest predicted cost: queues, prefill, transfer, decode load.
    #[default]
    KvAware,
    /// Each worker in turn.
    RoundRobin,
    /// Any worker, evenly.
    Random,
    /// The worker with the fewest requests in flight.
    LeastLoaded,
    /// The less loaded of two drawn at random.
    PowerOfTwo,
}

/// Whether a prompt is prefilled on a worker of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Disaggregation {
    /// Where that is predicted to bring the first token earlier.
    #[default]
    Auto,
    /// Whenever a prefill worker is there.
    Always,
    /// Never: the decode worker prefills.
    Never,
}

/// Bounds on what clients may ask for and hold.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest request body.
    pub body: Bytes,
    /// Requests served at once; further ones queue.
    pub in_flight: u32,
    /// Requests waiting for a place; further ones are refused.
    pub queue: u32,
    /// Connections open at once; further ones wait to be accepted.
    pub connections: u32,
    /// Choices of one request: prompts times `n`.
    pub choices: u32,
    /// Messages of one chat.
    pub messages: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: Bytes(4 << 20),
            in_flight: 4096,
            queue: 1024,
            connections: 8192,
            choices: 128,
            messages: 2048,
        }
    }
}

/// How long things may take.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// For the head of a request, from its first byte (from the connect for the first one).
    pub header: Duration,
    /// Without a byte of a request's body.
    pub body: Duration,
    /// A kept-alive connection without a request.
    pub idle: Duration,
    /// A request waiting for a place.
    pub queue: Duration,
    /// Connecting to a worker.
    pub connect: Duration,
    /// From dispatch to the first token, while the worker answers its state.
    pub first_token: Duration,
    /// Between two tokens of a stream.
    pub progress: Duration,
    /// A stream without a token whose worker also stopped answering its state.
    pub frozen: Duration,
    /// For a replacement worker to appear when a stream lost its own.
    pub replacement: Duration,
    /// Between readiness going off and the listener closing.
    pub settle: Duration,
    /// For requests in flight to finish after the listener closed.
    pub grace: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            header: s(10),
            body: s(10),
            idle: s(60),
            queue: s(30),
            connect: s(1),
            first_token: s(120),
            progress: s(10),
            frozen: s(3),
            replacement: s(5),
            settle: Duration::from_millis(500),
            grace: s(120),
        }
    }
}
