//! Every value a fleet document may leave out, in one table.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::{
    BackendKind, Choose, Disaggregation, EngineKind, Integrity, Isolation, JwtAlgorithm, PolicyKind,
    ScalerKind, TransferPath,
};
use crate::geometry::{Dtype, KvLayout};
use crate::names::Accelerator;
use crate::units::Bytes;

/// The fleet of `baton up` without an argument.
pub const LAPTOP_FLEET: &str = include_str!("../../../examples/fleets/laptop.yaml");

/// `conductor.listen`.
pub const CONDUCTOR_LISTEN: &str = "127.0.0.1:7400";
/// `conductor.lease_ttl_ms`: long enough for a pause of a busy host, three renewals fit.
pub const LEASE_TTL: Duration = Duration::from_secs(10);
/// `conductor.store.etcd.prefix`.
pub const ETCD_PREFIX: &str = "/baton";

/// `router.listen`.
pub const ROUTER_LISTEN: &str = "127.0.0.1:8080";
/// `router.policy.kind`.
pub const POLICY: PolicyKind = PolicyKind::KvAware;
/// `router.policy.seed`.
pub const POLICY_SEED: u64 = 0;
/// `router.policy.slo.ttft_ms`.
pub const SLO_TTFT: Duration = Duration::from_millis(500);
/// `router.policy.slo.early_rejection`.
pub const SLO_EARLY_REJECTION: bool = false;
/// `router.policy.slo.itl_ms`.
pub const SLO_ITL: Duration = Duration::from_millis(50);
/// `router.policy.spill_requests`.
pub const SPILL_REQUESTS: u32 = 0;
/// `router.policy.session_header`.
pub const SESSION_HEADER: &str = "x-session-id";
/// `router.index.memory`.
pub const INDEX_MEMORY: Bytes = Bytes(256 << 20);
/// `router.explain`.
pub const EXPLAIN: bool = false;
/// `router.disaggregation`.
pub const DISAGGREGATION: Disaggregation = Disaggregation::Auto;
/// `router.auth.isolation`.
pub const ISOLATION: Isolation = Isolation::Tenant;
/// `router.auth.jwt.algorithms`: what identity providers sign with.
pub const JWT_ALGORITHMS: &[JwtAlgorithm] = &[JwtAlgorithm::Rs256, JwtAlgorithm::Es256];
/// `router.auth.jwt.tenant_claim`.
pub const TENANT_CLAIM: &str = "tenant";
/// `router.auth.jwt.refresh_ms`: keys are published well before they are used, and taken back for good within minutes.
pub const JWKS_REFRESH: Duration = Duration::from_secs(300);
/// `router.auth.jwt.timeout_ms`.
pub const JWKS_TIMEOUT: Duration = Duration::from_secs(10);
/// `router.auth.jwt.leeway_ms`.
pub const JWT_LEEWAY: Duration = Duration::from_secs(60);
/// `router.limits.body`.
pub const ROUTER_BODY: Bytes = Bytes(4 << 20);
/// `router.limits.bodies`: 256 of the largest.
pub const ROUTER_BODIES: Bytes = Bytes(1 << 30);
/// `router.limits.queue`.
pub const ROUTER_QUEUE: u32 = 1024;
/// `router.limits.in_flight`.
pub const ROUTER_IN_FLIGHT: u32 = 4096;
/// `router.limits.connections`.
pub const ROUTER_CONNECTIONS: u32 = 8192;
/// `router.limits.header_timeout_ms`.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// `router.limits.body_timeout_ms`.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// `router.limits.queue_timeout_ms`.
pub const QUEUE_TIMEOUT: Duration = Duration::from_secs(30);
/// `router.limits.request_timeout_ms`.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(600);
/// `router.limits.keep_alive_ms`: well below the minute after which proxies close a silent connection.
pub const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// `router.limits.drain_settle_ms`: nothing to wait for without a load balancer in front.
pub const DRAIN_SETTLE: Duration = Duration::ZERO;
/// `router.limits.drain_grace_ms` and `pools[].limits.drain_grace_ms`.
pub const DRAIN_GRACE: Duration = Duration::from_secs(120);

/// `pools[].accelerator`.
pub const ACCELERATOR: Accelerator = Accelerator::Cpu;
/// `pools[].replicas`.
pub const REPLICAS: u32 = 1;
/// First port of `pools[].listen`: replicas of all pools follow each other from here.
pub const WORKER_PORT: u16 = 7500;
/// `pools[].limits.in_flight`.
pub const WORKER_IN_FLIGHT: u32 = 1024;
/// `pools[].limits.body`: token ids of a long prompt as JSON.
pub const WORKER_BODY: Bytes = Bytes(16 << 20);

/// `pools[].engine.kind`; its `threads` default to the cores of the machine.
pub const ENGINE: EngineKind = EngineKind::Reference;
/// `pools[].engine.prefill_chunk`, in tokens.
pub const PREFILL_CHUNK: u32 = 256;
/// `pools[].engine.max_batch`, in sequences.
pub const MAX_BATCH: u32 = 64;
/// `pools[].engine.max_waiting`, in sequences.
pub const MAX_WAITING: u32 = 1024;
/// `pools[].engine.prefix_cache`.
pub const PREFIX_CACHE: bool = true;
/// `pools[].engine.prefill_us_base` of the simulated engine.
pub const SIM_PREFILL_BASE: Duration = Duration::from_micros(2_000);
/// `pools[].engine.prefill_us_per_token`.
pub const SIM_PREFILL_PER_TOKEN: Duration = Duration::from_micros(50);
/// `pools[].engine.prefill_ns_per_token2`.
pub const SIM_PREFILL_PER_TOKEN2: Duration = Duration::from_nanos(5);
/// `pools[].engine.decode_us_base`.
pub const SIM_DECODE_BASE: Duration = Duration::from_micros(5_000);
/// `pools[].engine.decode_us_per_seq`.
pub const SIM_DECODE_PER_SEQ: Duration = Duration::from_micros(100);
/// `pools[].engine.decode_ns_per_context_token`.
pub const SIM_DECODE_PER_CONTEXT_TOKEN: Duration = Duration::from_nanos(20);
/// `pools[].engine.seed`.
pub const SIM_SEED: u64 = 0;
/// `pools[].engine.check_kv`.
pub const SIM_CHECK_KV: bool = true;

/// `pools[].engine.silent_timeout_ms`: servers that parse tool calls may hold back what they have for a while.
pub const SILENT_TIMEOUT: Duration = Duration::from_secs(60);

/// `pools[].kv.block_tokens`.
pub const BLOCK_TOKENS: u32 = 16;
/// `pools[].kv.layout`.
pub const KV_LAYOUT: KvLayout = KvLayout::Hnd;
/// `pools[].kv.dtype`.
pub const KV_DTYPE: Dtype = Dtype::Bf16;
/// `pools[].kv.memory`.
pub const KV_MEMORY: Bytes = Bytes(256 << 20);

/// `pools[].transfer.path`.
pub const TRANSFER_PATH: TransferPath = TransferPath::Auto;
/// `pools[].transfer.backends`.
pub const BACKENDS: &[BackendKind] = &[BackendKind::Shm, BackendKind::Tcp];
/// `pools[].transfer.choose`.
pub const CHOOSE: Choose = Choose::Measured;
/// `pools[].transfer.rails`: the network cards of the largest machines in use.
pub const RAILS: usize = 16;
/// `pools[].transfer.limits.registered`.
pub const REGISTERED: Bytes = Bytes(1 << 40);
/// `pools[].transfer.limits.regions`.
pub const REGIONS: u32 = 256;
/// `pools[].transfer.limits.peer_ops`.
pub const PEER_OPS: u32 = 64;
/// `pools[].transfer.limits.peer_bytes`: some milliseconds of a fast network.
pub const PEER_BYTES: Bytes = Bytes(16 << 20);
/// `pools[].transfer.integrity`.
pub const INTEGRITY: Integrity = Integrity::Digest;
/// `pools[].transfer.streams`.
pub const STREAMS: usize = 4;
/// `pools[].transfer.bind`.
pub const TRANSFER_BIND: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// `pools[].transfer.port`: any free one; peers learn it through the conductor.
pub const TRANSFER_PORT: u16 = 0;
/// `pools[].transfer.staging`.
pub const STAGING: Bytes = Bytes(16 << 20);
/// `pools[].transfer.connect_timeout_ms`.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// `pools[].transfer.stall_timeout_ms`.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(1);

/// `pools[].autoscale.min`.
pub const AUTOSCALE_MIN: u32 = 1;
/// `pools[].autoscale.scaler`.
pub const SCALER: ScalerKind = ScalerKind::None;
/// `pools[].autoscale.target.queue_wait_ms`.
pub const QUEUE_WAIT: Duration = Duration::from_millis(250);
/// `pools[].autoscale.target.kv_occupancy`.
pub const KV_OCCUPANCY: u32 = 80;
/// `pools[].autoscale.tolerance_percent`.
pub const SCALE_TOLERANCE: u32 = 10;
/// `pools[].autoscale.up_after_ms`.
pub const SCALE_UP_AFTER: Duration = Duration::from_secs(3);
/// `pools[].autoscale.down_after_ms`: what the horizontal autoscaler of Kubernetes waits.
pub const SCALE_DOWN_AFTER: Duration = Duration::from_secs(300);
/// `pools[].autoscale.kubernetes.namespace`.
pub const NAMESPACE: &str = "default";
/// `pools[].autoscale.webhook.timeout_ms`.
pub const WEBHOOK_TIMEOUT: Duration = Duration::from_secs(5);
