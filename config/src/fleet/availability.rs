//! What parses but is not part of this build: the one table to shorten when something gets built.

use super::{BackendKind, EngineKind, PolicyKind, Pool};
use crate::choice::Choice;
use crate::fault::{Fault, Position};
use crate::geometry::Dtype;
use crate::names::Accelerator;
use crate::reader::Reader;

/// Something the document asks for that this build does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unsupported {
    /// Where it is asked for, such as `pools[0].engine.kind`.
    pub path: String,
    /// Line and column; `None` when a default asks for it.
    pub at: Option<Position>,
    /// What is not there.
    pub what: String,
    /// What to write instead, or what happens without it.
    pub remedy: String,
    /// Whether a fleet cannot start without it; otherwise it starts and goes without.
    pub required: bool,
}

impl Unsupported {
    pub(super) fn fault(&self) -> Fault {
        let problem = format!("{} is not available in this build", self.what);
        Fault { path: self.path.clone(), at: self.at, problem, remedy: self.remedy.clone() }
    }
}

impl EngineKind {
    /// Whether this build has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Reference | Self::Sim | Self::Openai => true,
            Self::Vllm | Self::Sglang => false,
        }
    }
}

impl BackendKind {
    /// Whether this build has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Shm | Self::Tcp | Self::Cma | Self::Libfabric | Self::Ucx | Self::Plugin => true,
            Self::File | Self::Object => false,
        }
    }
}

impl PolicyKind {
    /// Whether this build has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::KvAware
            | Self::Prefix
            | Self::RoundRobin
            | Self::Random
            | Self::LeastLoaded
            | Self::PowerOfTwo
            | Self::Session => true,
        }
    }
}

/// Whether this build can keep a KV cache there. Whether the machine can, a worker finds out when it starts.
pub fn accelerator_is_available(accelerator: Accelerator) -> bool {
    match accelerator {
        Accelerator::Cpu | Accelerator::Simulated | Accelerator::Cuda | Accelerator::Trainium => true,
    }
}

impl Dtype {
    /// Whether the in-process engines of this build compute with a KV cache of such numbers. Transfers know them all.
    pub fn is_available(self) -> bool {
        match self {
            Self::F32 | Self::Bf16 | Self::F16 => true,
            Self::Fp8E4m3 => false,
        }
    }
}

/// Gathers everything of a document that is not part of this build.
pub(super) fn list(reader: &Reader<'_>, pools: &[(String, Pool)]) -> Vec<Unsupported> {
    let mut out = Vec::new();
    let mut push = |path: &str, what: String, remedy: &str, required: bool| {
        let at = reader.position(path);
        out.push(Unsupported { path: path.to_owned(), at, what, remedy: remedy.to_owned(), required });
    };
    for (path, pool) in pools {
        let engine = pool.engine.kind();
        if !engine.is_available() {
            let what = format!("the engine {}", engine.word());
            push(
                &format!("{path}.engine.kind"),
                what,
                "use kind: reference or kind: sim, or kind: openai in every pool",
                true,
            );
        }
        if pool.engine.limits().is_some() && !pool.kv.dtype.is_available() {
            let what = format!("a KV cache in {} for the engine {engine}", pool.kv.dtype);
            push(&format!("{path}.kv.dtype"), what, "write bf16, f16 or f32", true);
        }
        backends(path, pool, &mut push);
    }
    out
}

fn backends(path: &str, pool: &Pool, push: &mut impl FnMut(&str, String, &str, bool)) {
    let available: Vec<&str> =
        pool.transfer.backends.iter().filter(|b| b.is_available()).map(|b| b.word()).collect();
    for (i, backend) in pool.transfer.backends.iter().enumerate().filter(|(_, b)| !b.is_available()) {
        let remedy = match available.as_slice() {
            [] => "add tcp or shm to the list".to_owned(),
            names => format!("passed over: {} will be used", names.join(" or ")),
        };
        let what = format!("the backend {backend}");
        push(&format!("{path}.transfer.backends[{i}]"), what, &remedy, available.is_empty());
    }
}
