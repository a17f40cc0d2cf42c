//! `pools[]` of the fleet document.

use std::time::Duration;

use super::{Autoscale, EngineKind, EngineSpec, Listen, TransferSpec, defaults, openai};
use crate::geometry::{Dtype, KvGeometry, KvLayout, Scales};
use crate::model_shape::ModelShape;
use crate::names::{Accelerator, PoolName, Role};
use crate::reader::{Reader, Section, Text};
use crate::units::Bytes;
use crate::yaml::Node;

/// Workers of one kind.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Pool {
    /// Unique name.
    pub name: PoolName,
    /// What its workers do.
    pub role: Role,
    /// What holds their KV cache.
    pub accelerator: Accelerator,
    /// What computes.
    pub engine: EngineSpec,
    /// The KV cache of one worker.
    pub kv: KvSpec,
    /// How KV blocks leave and reach it.
    pub transfer: TransferSpec,
    /// Where the first replica listens; the next ones take the following ports.
    pub listen: Listen,
    /// Host or address peers and routers use to reach its workers; the listening one without.
    pub advertise: Option<String>,
    /// Workers wanted, until an operator or the autoscaler wants otherwise.
    pub replicas: u32,
    /// How `replicas` may change by itself.
    pub autoscale: Option<Autoscale>,
    /// What one worker accepts at most.
    pub limits: WorkerLimits,
}

/// The KV cache of one worker. Layers, heads and head size come from the model.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvSpec {
    /// Tokens per block.
    pub block_tokens: u32,
    /// Order within a block.
    pub layout: KvLayout,
    /// Number format.
    pub dtype: Dtype,
    /// What a scale of fp8 numbers covers.
    pub scales: Scales,
    /// How much of it.
    pub capacity: KvCapacity,
}

/// How large a KV cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvCapacity {
    /// As many blocks as fit in so many bytes (`memory:`).
    Memory(Bytes),
    /// So many blocks (`blocks:`).
    Blocks(u32),
}

impl KvSpec {
    /// The geometry of a block for a model.
    pub fn geometry(&self, model: &ModelShape) -> KvGeometry {
        KvGeometry {
            layers: model.layers,
            kv_heads: model.kv_heads,
            head_dim: model.head_dim,
            block_tokens: self.block_tokens,
            layout: self.layout,
            dtype: self.dtype,
            scales: self.scales,
            ..KvGeometry::PLAIN
        }
    }
}

impl KvCapacity {
    /// The number of blocks of `block_bytes` each.
    pub fn blocks(self, block_bytes: usize) -> u32 {
        match self {
            Self::Memory(bytes) => u32::try_from(bytes.0 / block_bytes.max(1) as u64).unwrap_or(u32::MAX),
            Self::Blocks(blocks) => blocks,
        }
    }
}

/// What one worker accepts at most.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerLimits {
    /// Requests and handoffs at once.
    pub in_flight: u32,
    /// Bytes of a request body.
    pub body: Bytes,
    /// How long work in flight may take to end once the worker drains.
    pub drain_grace: Duration,
}

/// Longest pool name: `-` and four digits of a replica still make a worker name.
const POOL_NAME_MAX: usize = 58;

impl Pool {
    /// Reads one pool; `first_port` is the default port of its first replica.
    ///
    /// `None` if its name or role is missing or at fault.
    pub(super) fn read(mut section: Section<'_, '_>, first_port: u16) -> Option<Self> {
        let name = section.required("name", "a name of at most 58 characters of a-z, 0-9 and '-'", pool_name);
        if !section.has("role") {
            section.missing("role", "prefill, decode or both");
        }
        let role = section.choice_if_given::<Role>("role");
        let accelerator = section.choice("accelerator", defaults::ACCELERATOR);
        let engine = EngineSpec::read(section.section("engine"));
        let own = engine.kind() != EngineKind::Openai;
        if !own {
            openai::refuse_meaningless(&mut section);
        }
        // What a server of another project has no use for takes no place among the values.
        let unread = Reader::new(&|_| None, None);
        let mut part = |key| if own { section.section(key) } else { Section::absent(&unread, String::new()) };
        let kv = KvSpec::read(part("kv"));
        let transfer = TransferSpec::read(part("transfer"), accelerator);
        let listen = Listen::read(&mut section, &format!("127.0.0.1:{first_port}"));
        let advertise = section.optional("advertise", "a host name or address, without a port", host);
        let replicas = section.count("replicas", 0..=1024, engine.replicas());
        let autoscale =
            section.section_if_given("autoscale").map(|section| Autoscale::read(section, role, replicas));
        let limits = WorkerLimits::read(section.section("limits"));
        let pool = Self {
            name: name?,
            role: role?,
            accelerator,
            engine,
            kv,
            transfer,
            listen,
            advertise,
            replicas,
            autoscale,
            limits,
        };
        if u32::from(listen.address.port()) + pool.ports().saturating_sub(1) > u32::from(u16::MAX) {
            let problem = format!("leaves too few ports above it for {} replicas", pool.ports());
            let path = section.child("listen");
            let at = section.reader.position(&path).or(section.at);
            section.reader.fault(&path, at, problem, "use a lower port");
        }
        Some(pool)
    }

    /// Bytes of the KV cache of one worker; 0 where a server of another project holds it.
    pub fn kv_bytes(&self, model: &ModelShape) -> Bytes {
        let block = self.kv.geometry(model).block_bytes();
        let blocks = self.engine.limits().map_or(0, |_| self.kv.capacity.blocks(block));
        Bytes(u64::from(blocks).saturating_mul(block as u64))
    }

    /// Ports its workers may take, from that of `listen` on.
    pub(super) fn ports(&self) -> u32 {
        self.replicas.max(self.autoscale.as_ref().map_or(0, |scale| scale.max)).max(1)
    }
}

fn pool_name(text: &Text) -> Option<PoolName> {
    text.text.parse().ok().filter(|name: &PoolName| name.as_str().len() <= POOL_NAME_MAX)
}

fn host(text: &Text) -> Option<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
    let is_v6 = text.text.parse::<std::net::Ipv6Addr>().is_ok();
    text.words().filter(|host| is_v6 || host.chars().all(good))
}

impl KvSpec {
    fn read(mut section: Section<'_, '_>) -> Self {
        let block_tokens = section.count("block_tokens", 1..=1024, defaults::BLOCK_TOKENS);
        let layout = section.choice("layout", defaults::KV_LAYOUT);
        let dtype = section.choice("dtype", defaults::KV_DTYPE);
        let scales = section.choice("scales", Scales::None);
        if scales != Scales::None && dtype != Dtype::Fp8E4m3 {
            let (path, at) = (section.child("scales"), section.reader.position(&section.child("scales")));
            let problem = format!("is {scales}, but {dtype} numbers have no scales");
            section.reader.fault(&path, at.or(section.at), problem, "remove it, or write dtype: fp8_e4m3");
        }
        let capacity = if section.has("blocks") {
            if section.has("memory") {
                section.reader.fault(
                    &section.path,
                    section.at,
                    "has both `memory` and `blocks`",
                    "keep one of them: each says how large the KV cache is",
                );
                section.take("memory");
            }
            KvCapacity::Blocks(section.count("blocks", 2..=16_777_216, 2))
        } else {
            section.take("blocks");
            KvCapacity::Memory(section.bytes("memory", Bytes(1 << 10)..=Bytes(1 << 44), defaults::KV_MEMORY))
        };
        Self { block_tokens, layout, dtype, scales, capacity }
    }
}

impl WorkerLimits {
    fn read(mut section: Section<'_, '_>) -> Self {
        Self {
            in_flight: section.count("in_flight", 1..=1_000_000, defaults::WORKER_IN_FLIGHT),
            body: section.bytes("body", Bytes(1 << 10)..=Bytes(1 << 30), defaults::WORKER_BODY),
            drain_grace: section.duration("drain_grace_ms", 0..=86_400_000, defaults::DRAIN_GRACE),
        }
    }
}

/// Reads the list of pools; the ones with faults in their name or role are left out.
pub(super) fn read_pools(document: &mut Section<'_, '_>) -> Vec<(String, Pool)> {
    let reader = document.reader;
    if !document.has("pools") {
        document.missing("pools", "at least one pool, such as `- { name: all, role: both }`");
    }
    let at = document.position("pools");
    let items = document.list("pools");
    if items.as_ref().is_some_and(Vec::is_empty) {
        let remedy = "add at least one pool, such as `- { name: all, role: both }`";
        reader.fault("pools", at, "has no pool", remedy);
    }
    let items: Vec<(String, Node)> = items.unwrap_or_default();
    let mut next_port = u32::from(defaults::WORKER_PORT);
    let mut pools = Vec::with_capacity(items.len());
    for (path, node) in items {
        let port = u16::try_from(next_port).unwrap_or(defaults::WORKER_PORT);
        if let Some(pool) = Pool::read(Section::open(reader, path.clone(), node), port) {
            if !pool.listen.named {
                next_port += pool.ports();
            }
            pools.push((path, pool));
        }
    }
    pools
}
