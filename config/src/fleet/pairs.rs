//! Which way KV blocks take from each prefill pool to each decode pool, and why.

use super::{BackendKind, EngineSpec, Integrity, Pool, TransferPath};
use crate::geometry::Dtype;
use crate::names::{Accelerator, PoolName, Role};
use crate::reader::Reader;

/// The way from one prefill to one decode pool.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PairPath {
    /// The side that computes.
    pub prefill: PoolName,
    /// The side that reads.
    pub decode: PoolName,
    /// Backends both sides name, in the order the decode side prefers them.
    pub backends: Vec<BackendKind>,
    /// How blocks leave the prefill side: `HostBuffered`, `Direct` or `GpuDirect`.
    pub export: TransferPath,
    /// How they arrive in the memory of the decode side.
    pub import: TransferPath,
    /// What the decode side must change on arrival; empty if the bytes stay as they are.
    pub relayout: Vec<String>,
    /// Why not a better way, and what to know about this one.
    pub reasons: Vec<String>,
}

/// Plans every pair; pairs that cannot work are faults.
pub(super) fn plan(reader: &Reader<'_>, pools: &[(String, Pool)]) -> Vec<PairPath> {
    let mut pairs = Vec::new();
    for (prefill_path, prefill) in pools {
        for (decode_path, decode) in pools {
            if !hands_over(prefill, decode) || !reader.is_clean(prefill_path) || !reader.is_clean(decode_path)
            {
                continue;
            }
            let at = |key: &str| {
                let position = |path: &str| reader.position(&format!("{path}.{key}"));
                position(decode_path)
                    .or_else(|| position(prefill_path))
                    .or_else(|| reader.position(&format!("{decode_path}.name")))
            };
            let mut refuse = |key: &str, problem: String, remedy: &str| {
                reader.fault(&format!("{decode_path}.{key}"), at(key), problem, remedy);
            };
            if incompatible(prefill, decode, &mut refuse) {
                continue;
            }
            pairs.push(pair(prefill, decode));
        }
    }
    pairs
}

/// Whether the router would ever hand a request from one pool to the other.
fn hands_over(prefill: &Pool, decode: &Pool) -> bool {
    let roles = match prefill.role {
        Role::Prefill => decode.role.decodes(),
        Role::Both => decode.role == Role::Decode,
        Role::Decode => false,
    };
    roles
        && !matches!(prefill.engine, EngineSpec::Openai(_))
        && !matches!(decode.engine, EngineSpec::Openai(_))
}

/// Refuses a pair that could only fail or, worse, compute nonsense.
fn incompatible(prefill: &Pool, decode: &Pool, refuse: &mut impl FnMut(&str, String, &str)) -> bool {
    let from = &prefill.name;
    let common = prefill.transfer.backends.iter().any(|b| decode.transfer.backends.contains(b));
    if !common {
        let list = |pool: &Pool| join(&pool.transfer.backends, ", ");
        let problem = format!("is [{}], but {from} has only [{}]", list(decode), list(prefill));
        refuse(
            "transfer.backends",
            problem,
            "name at least one backend in both pools; tcp works between any two hosts",
        );
    }
    if prefill.transfer.integrity != decode.transfer.integrity {
        let (here, there) = (decode.transfer.integrity, prefill.transfer.integrity);
        let problem =
            format!("is {here}, but {there} in {from}: one side computes digests the other must verify");
        refuse("transfer.integrity", problem, "write the same in both pools");
    }
    let engines = match (&prefill.engine, &decode.engine) {
        (EngineSpec::Sim(_), other) | (other, EngineSpec::Sim(_)) if !matches!(other, EngineSpec::Sim(_)) => {
            let (here, there) = (decode.engine.kind(), prefill.engine.kind());
            let problem = format!(
                "is {here}, but {there} in {from}: a simulated KV cache means nothing to a real engine"
            );
            refuse("engine.kind", problem, "use sim in both pools, or in neither");
            true
        }
        _ => false,
    };
    !common || engines || prefill.transfer.integrity != decode.transfer.integrity
}

fn pair(prefill: &Pool, decode: &Pool) -> PairPath {
    let backends: Vec<BackendKind> = decode
        .transfer
        .backends
        .iter()
        .copied()
        .filter(|backend| prefill.transfer.backends.contains(backend))
        .collect();
    let (export, import) = (way(prefill), way(decode));
    let mut reasons = Vec::new();
    for (pool, way) in [(prefill, export), (decode, import)] {
        if let Some(reason) = why_not_direct(pool, way) {
            reasons.push(reason);
        }
    }
    for backend in &backends {
        match backend {
            BackendKind::Shm | BackendKind::Cma => {
                reasons.push(format!("{backend} serves workers of one host"))
            }
            other if !other.is_available() => reasons.push(format!("{other} is not available in this build")),
            BackendKind::Tcp
            | BackendKind::Libfabric
            | BackendKind::Ucx
            | BackendKind::Plugin
            | BackendKind::File
            | BackendKind::Object => {}
        }
    }
    if prefill.transfer.integrity == Integrity::Off {
        reasons.push("integrity is off: a corrupted block would be decoded from".to_owned());
    }
    let (from, to) = (prefill.kv.dtype, decode.kv.dtype);
    if from != to && to != Dtype::F32 {
        reasons.push(format!("{from} is rounded to {to}: tokens may differ from those of a single worker"));
    }
    PairPath {
        prefill: prefill.name.clone(),
        decode: decode.name.clone(),
        backends,
        export,
        import,
        relayout: relayout(prefill, decode),
        reasons,
    }
}

/// How a pool's memory is reached.
fn way(pool: &Pool) -> TransferPath {
    match (pool.transfer.path, pool.accelerator) {
        (_, Accelerator::Cpu) => TransferPath::Direct,
        (TransferPath::HostBuffered, _)
        | (TransferPath::Auto, Accelerator::Trainium)
        | (_, Accelerator::Simulated) => TransferPath::HostBuffered,
        (TransferPath::Auto | TransferPath::Direct | TransferPath::GpuDirect, Accelerator::Cuda) => {
            TransferPath::GpuDirect
        }
        (TransferPath::Direct | TransferPath::GpuDirect, Accelerator::Trainium) => TransferPath::Direct,
    }
}

fn why_not_direct(pool: &Pool, way: TransferPath) -> Option<String> {
    let (name, accelerator) = (&pool.name, pool.accelerator);
    match (way, accelerator, pool.transfer.path) {
        (TransferPath::HostBuffered, Accelerator::Simulated, _) => {
            Some(format!("{name} is not direct: the network cannot reach an emulated device's memory"))
        }
        (TransferPath::HostBuffered, _, TransferPath::HostBuffered) => {
            Some(format!("{name} is not direct: its file asks for host_buffered"))
        }
        (TransferPath::HostBuffered, _, _) => {
            Some(format!("{name} is not direct: memory of {accelerator} is reached through host buffers"))
        }
        (TransferPath::Direct, Accelerator::Cpu, TransferPath::HostBuffered) => Some(format!(
            "{name} is direct although host_buffered is asked for: its KV cache is host memory already"
        )),
        _ => None,
    }
}

fn relayout(prefill: &Pool, decode: &Pool) -> Vec<String> {
    if prefill.engine.limits().is_none() || decode.engine.limits().is_none() {
        return vec!["agreed with the engine when the pair connects".to_owned()];
    }
    let (from, to) = (&prefill.kv, &decode.kv);
    let mut changes = Vec::new();
    if from.block_tokens != to.block_tokens {
        changes.push(format!("blocks of {} -> {} tokens", from.block_tokens, to.block_tokens));
    }
    if from.layout != to.layout {
        changes.push(format!("{} -> {}", from.layout, to.layout));
    }
    if from.dtype != to.dtype {
        changes.push(format!("{} -> {}", from.dtype, to.dtype));
    }
    changes
}

/// Words with something between them.
pub(super) fn join(words: &[impl ToString], between: &str) -> String {
    words.iter().map(ToString::to_string).collect::<Vec<_>>().join(between)
}
