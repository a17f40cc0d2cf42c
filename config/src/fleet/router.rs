//! `router:` of the fleet document.

use std::time::Duration;

use super::access::{ServerTls, read_identity};
use super::{AuthSpec, Listen, defaults};
use crate::choice::choice;
use crate::reader::Section;
use crate::units::Bytes;

/// The router.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct RouterSpec {
    /// Where it listens for clients.
    pub listen: Listen,
    /// How workers are chosen.
    pub policy: PolicySpec,
    /// What it accepts at most.
    pub limits: RouterLimits,
    /// When prefill and decode go to different workers.
    pub disaggregation: Disaggregation,
    /// Bytes of the prefix index at most.
    pub index_memory: Bytes,
    /// Whether a request with `x-baton-explain: 1` is told how its workers were chosen.
    pub explain: bool,
    /// Who may use it; anybody without.
    pub auth: Option<AuthSpec>,
    /// TLS of its listener; plain HTTP without.
    pub tls: Option<ServerTls>,
}

choice! {
    /// How a worker is chosen for a request.
    PolicyKind {
        /// Jointly by predicted first-token time and decode load, with prefix hits.
        KvAware => "kv_aware",
        /// The worker with the longest cached prefix.
        Prefix => "prefix",
        /// One after the other.
        RoundRobin => "round_robin",
        /// Uniformly at random.
        Random => "random",
        /// The one with the least work.
        LeastLoaded => "least_loaded",
        /// The less loaded of two drawn at random.
        PowerOfTwo => "power_of_two",
        /// The same worker for all requests of a session.
        Session => "session",
    }
}

/// How workers are chosen.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PolicySpec {
    /// The rule.
    pub kind: PolicyKind,
    /// Seeds the random choices.
    pub seed: u64,
    /// What the policy aims at.
    pub slo: Slo,
    /// `prefix` and `session`: requests a worker may have more than the least loaded one before it is passed over;
    /// no bound where 0.
    pub spill_requests: u32,
    /// `session`: the header that names the session; the field `user` where a request has no such header.
    pub session_header: String,
}

/// Latency aims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Slo {
    /// Time to first token.
    pub ttft: Duration,
    /// Time between tokens.
    pub itl: Duration,
    /// Whether requests whose prompt would wait longer than `ttft` at every worker are refused.
    pub early_rejection: bool,
}

choice! {
    /// When prefill and decode of a request go to different workers.
    Disaggregation {
        /// When it is predicted to be faster than prefilling on the decode worker.
        Auto => "auto",
        /// Whenever a prefill worker is there.
        Always => "always",
        /// Never; decode workers prefill.
        Never => "never",
    }
}

/// What the router accepts at most.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RouterLimits {
    /// Bytes of a request body.
    pub body: Bytes,
    /// Bytes of the bodies of all requests at once.
    pub bodies: Bytes,
    /// Requests waiting for a worker.
    pub queue: u32,
    /// Requests being served; further ones wait in the queue.
    pub in_flight: u32,
    /// Client connections.
    pub connections: u32,
    /// Time a client may take to send the head of a request.
    pub header_timeout: Duration,
    /// Time a client may pause while it sends the body of a request.
    pub body_timeout: Duration,
    /// Time a request may wait for a worker.
    pub queue_timeout: Duration,
    /// Time a request may take in all.
    pub request_timeout: Duration,
    /// How long a stream may be silent before a comment is sent to keep it alive.
    pub keep_alive: Duration,
    /// How long the router goes on accepting after readiness went off, for load balancers to notice.
    pub drain_settle: Duration,
    /// How long requests in flight may take to end once it stopped accepting.
    pub drain_grace: Duration,
}

impl RouterSpec {
    pub(super) fn read(mut section: Section<'_, '_>) -> Self {
        let listen = Listen::read(&mut section, defaults::ROUTER_LISTEN);
        let policy = PolicySpec::read(section.section("policy"));
        let limits = RouterLimits::read(section.section("limits"));
        let disaggregation = section.choice("disaggregation", defaults::DISAGGREGATION);
        let index_memory =
            section.section("index").bytes("memory", Bytes(1 << 20)..=Bytes(4 << 30), defaults::INDEX_MEMORY);
        let explain = section.flag("explain", defaults::EXPLAIN);
        let auth = section.section_if_given("auth").and_then(AuthSpec::read);
        let tls = section.section_if_given("tls").and_then(|mut tls| {
            if !tls.has("cert_file") && !tls.has("key_file") {
                tls.missing("cert_file", "the path of the PEM file of the certificate");
            }
            let identity = read_identity(&mut tls, "cert_file", "key_file")?;
            Some(ServerTls { identity, client_ca_file: None })
        });
        if limits.queue > limits.in_flight {
            section.reader.fault(
                "router.limits.queue",
                section.reader.position("router.limits.queue"),
                format!(
                    "is {}, more than the {} requests in flight that it waits for",
                    limits.queue, limits.in_flight
                ),
                "lower router.limits.queue or raise router.limits.in_flight",
            );
        }
        Self { listen, policy, limits, disaggregation, index_memory, explain, auth, tls }
    }
}

impl PolicySpec {
    fn read(mut section: Section<'_, '_>) -> Self {
        let kind = section.choice("kind", defaults::POLICY);
        let seed = section.integer("seed", 0..=u64::MAX, defaults::POLICY_SEED);
        let mut slo = section.section("slo");
        let ttft = slo.duration("ttft_ms", 1..=3_600_000, defaults::SLO_TTFT);
        let itl = slo.duration("itl_ms", 1..=3_600_000, defaults::SLO_ITL);
        let early_rejection = slo.flag("early_rejection", defaults::SLO_EARLY_REJECTION);
        let spill_requests = section.count("spill_requests", 0..=1_000_000, defaults::SPILL_REQUESTS);
        let session_header = section.value(
            "session_header",
            "the name of a header, in lower case",
            defaults::SESSION_HEADER.to_owned(),
            |text| {
                let text = text.words()?;
                let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
                (!text.is_empty() && text.len() <= 64 && text.bytes().all(is_name)).then_some(text)
            },
        );
        Self { kind, seed, slo: Slo { ttft, itl, early_rejection }, spill_requests, session_header }
    }
}

impl RouterLimits {
    fn read(mut section: Section<'_, '_>) -> Self {
        Self {
            body: section.bytes("body", Bytes(1 << 10)..=Bytes(1 << 30), defaults::ROUTER_BODY),
            bodies: section.bytes("bodies", Bytes(1 << 20)..=Bytes(1 << 40), defaults::ROUTER_BODIES),
            queue: section.count("queue", 0..=1_000_000, defaults::ROUTER_QUEUE),
            in_flight: section.count("in_flight", 1..=1_000_000, defaults::ROUTER_IN_FLIGHT),
            connections: section.count("connections", 1..=1_000_000, defaults::ROUTER_CONNECTIONS),
            header_timeout: section.duration("header_timeout_ms", 100..=600_000, defaults::HEADER_TIMEOUT),
            body_timeout: section.duration("body_timeout_ms", 100..=600_000, defaults::BODY_TIMEOUT),
            queue_timeout: section.duration("queue_timeout_ms", 1..=3_600_000, defaults::QUEUE_TIMEOUT),
            request_timeout: section.duration(
                "request_timeout_ms",
                100..=86_400_000,
                defaults::REQUEST_TIMEOUT,
            ),
            keep_alive: section.duration("keep_alive_ms", 100..=600_000, defaults::KEEP_ALIVE),
            drain_settle: section.duration("drain_settle_ms", 0..=600_000, defaults::DRAIN_SETTLE),
            drain_grace: section.duration("drain_grace_ms", 0..=86_400_000, defaults::DRAIN_GRACE),
        }
    }
}
