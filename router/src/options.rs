//! What a router is told at start.

use std::path::PathBuf;
use std::time::Duration;

use baton_config::Bytes;
use baton_config::fleet::{
    AuthSpec, ConductorAccess, Disaggregation, EngineSpec, Fleet, PolicyKind, Pool, ServerTls, defaults,
};

use crate::forward::{ForwardOptions, ForwardPool};

/// Everything a router needs to know; the command line fills it from the fleet document.
#[derive(Debug, Clone)]
pub struct RouterOptions {
    /// The model and the names clients may ask for it by.
    pub model: ModelOptions,
    /// Base URLs of the conductors, tried in order.
    pub conductors: Vec<String>,
    /// What is shown to the conductors, and whom to believe.
    pub conductor_access: ConductorAccess,
    /// How a request finds its workers.
    pub policy: PolicyKind,
    /// Whether prompts are prefilled on another worker than the one that decodes.
    pub disaggregation: Disaggregation,
    /// Bounds on what clients may ask for and hold.
    pub limits: Limits,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// How long a prompt may have to wait at the worker where it waits shortest; no bound where absent.
    pub slo_wait: Option<Duration>,
    /// Time between tokens that decode workers should stay below.
    pub slo_itl: Duration,
    /// `prefix` and `session`: requests a worker may have more than the least loaded one; no bound where 0.
    pub spill_requests: u32,
    /// The header that names the session of a request.
    pub session_header: String,
    /// Bytes of the prefix index at most.
    pub index_memory: Bytes,
    /// Whether clients may ask how their workers were chosen.
    pub explain: bool,
    /// Who may use it; anybody without.
    pub auth: Option<AuthSpec>,
    /// What it shows to clients; plain HTTP without.
    pub tls: Option<ServerTls>,
    /// Servers of other projects that all requests are passed on to; without, workers generate.
    pub forward: Option<ForwardOptions>,
    /// Seed of the scheduler's tie-breaks and random policies; the same seed, the same choices.
    pub seed: u64,
}

impl RouterOptions {
    /// Options with every default, for `model` and one conductor.
    pub fn new(model: ModelOptions, conductor: String) -> Self {
        Self {
            model,
            conductors: vec![conductor],
            conductor_access: ConductorAccess::default(),
            policy: defaults::POLICY,
            disaggregation: defaults::DISAGGREGATION,
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            slo_wait: None,
            slo_itl: defaults::SLO_ITL,
            spill_requests: defaults::SPILL_REQUESTS,
            session_header: defaults::SESSION_HEADER.to_owned(),
            index_memory: defaults::INDEX_MEMORY,
            explain: defaults::EXPLAIN,
            auth: None,
            tls: None,
            forward: None,
            seed: defaults::POLICY_SEED,
        }
    }

    /// The options a fleet document asks for.
    pub fn from_fleet(fleet: &Fleet) -> Self {
        let (router, limits) = (&fleet.router, &fleet.router.limits);
        let model = ModelOptions {
            id: fleet.model.id.clone(),
            served_as: fleet.model.served_as.clone(),
            path: fleet.model.directory.as_ref().map(|model| model.path.clone()).unwrap_or_default(),
            max_context: None,
        };
        Self {
            model,
            conductors: fleet.conductor.endpoints.clone(),
            conductor_access: fleet.conductor.access.clone(),
            policy: router.policy.kind,
            disaggregation: router.disaggregation,
            limits: Limits {
                body: limits.body,
                bodies: limits.bodies,
                in_flight: limits.in_flight,
                queue: limits.queue,
                connections: limits.connections,
                ..Limits::default()
            },
            timeouts: Timeouts {
                header: limits.header_timeout,
                body: limits.body_timeout,
                queue: limits.queue_timeout,
                request: limits.request_timeout,
                keep_alive: limits.keep_alive,
                settle: limits.drain_settle,
                grace: limits.drain_grace,
                ..Timeouts::default()
            },
            slo_wait: router.policy.slo.early_rejection.then_some(router.policy.slo.ttft),
            slo_itl: router.policy.slo.itl,
            spill_requests: router.policy.spill_requests,
            session_header: router.policy.session_header.clone(),
            index_memory: router.index_memory,
            explain: router.explain,
            auth: router.auth.clone(),
            tls: router.tls.clone(),
            forward: forward(fleet),
            seed: router.policy.seed,
        }
    }
}

fn forward(fleet: &Fleet) -> Option<ForwardOptions> {
    let pool = |pool: &Pool| match &pool.engine {
        EngineSpec::Openai(servers) => {
            let pool_options = ForwardPool { servers: servers.clone(), in_flight_max: pool.limits.in_flight };
            Some((pool.name.clone(), pool_options))
        }
        _ => None,
    };
    fleet.passes_on().then(|| ForwardOptions { pools: fleet.pools.iter().filter_map(pool).collect() })
}

/// The model a router serves.
#[derive(Debug, Clone)]
pub struct ModelOptions {
    /// Its id in the fleet document.
    pub id: String,
    /// Other names it is served as.
    pub served_as: Vec<String>,
    /// Directory with `config.json`, `tokenizer.json` and the chat template; not looked at where requests are passed on.
    pub path: PathBuf,
    /// Tokens of prompt and answer together; the model's own limit where absent.
    pub max_context: Option<u32>,
}

/// Bounds on what clients may ask for and hold.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest request body.
    pub body: Bytes,
    /// Bytes of the bodies of all requests at once.
    pub bodies: Bytes,
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
            body: defaults::ROUTER_BODY,
            bodies: defaults::ROUTER_BODIES,
            in_flight: defaults::ROUTER_IN_FLIGHT,
            queue: defaults::ROUTER_QUEUE,
            connections: defaults::ROUTER_CONNECTIONS,
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
    /// A whole request, to its last token.
    pub request: Duration,
    /// Beyond that, for a client to take what is left of its answer: then it is cut off.
    pub unread: Duration,
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
    /// For the view of the fleet and its workers to agree again: a conductor whose store is in trouble asks each of its members
    /// before it sees who has registered anew, and a worker whose registration was done, but not answered, tries again as
    /// another life. As long as a lease: nobody in view is away for longer.
    pub view_lag: Duration,
    /// A stream without a byte, before a comment keeps it alive.
    pub keep_alive: Duration,
    /// Between readiness going off and the listener closing.
    pub settle: Duration,
    /// For requests in flight to finish after the listener closed.
    pub grace: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            header: defaults::HEADER_TIMEOUT,
            body: defaults::BODY_TIMEOUT,
            idle: s(60),
            queue: defaults::QUEUE_TIMEOUT,
            request: defaults::REQUEST_TIMEOUT,
            unread: s(10),
            connect: s(1),
            first_token: s(120),
            progress: s(10),
            // Noticed within three seconds, looked for every quarter of one.
            frozen: Duration::from_millis(2500),
            replacement: s(5),
            view_lag: s(10),
            keep_alive: defaults::KEEP_ALIVE,
            settle: defaults::DRAIN_SETTLE,
            grace: defaults::DRAIN_GRACE,
        }
    }
}
