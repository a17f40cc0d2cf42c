//! Faults that no value has alone: two parts of the document that do not go together, or a part and the disk.

use std::collections::BTreeMap;
use std::error::Error;
use std::net::SocketAddr;
use std::path::Path;

use super::{ConductorSpec, EngineSpec, ModelSpec, Pool, RouterSpec, ScalerSpec};
use crate::model_shape::{ModelShape, ModelShapeError};
use crate::names::Role;
use crate::reader::{Reader, Section};
use crate::units::Bytes;

/// Reads the model's numbers; faults point at `model.path`.
pub(super) fn model(section: &Section<'_, '_>, dir: &Path) -> Option<ModelShape> {
    let name = section.child("path");
    let at = section.reader.position(&name);
    let tokenizer = dir.join("tokenizer.json");
    match ModelShape::read(dir) {
        Ok(shape) => {
            if !tokenizer.is_file() {
                let problem = format!("{} does not exist", tokenizer.display());
                section.reader.fault(
                    &name,
                    at,
                    problem,
                    "add the tokenizer.json of the model to its directory",
                );
            }
            Some(shape)
        }
        Err(e) => {
            let remedy = match &e {
                ModelShapeError::Missing { .. } | ModelShapeError::NotADirectory { .. } => {
                    "give the path of a model directory; a relative one is looked up beside the fleet file, \
                     then in the working directory"
                }
                ModelShapeError::Unreadable { .. } => "a model directory holds a readable config.json",
                ModelShapeError::TooLarge { .. }
                | ModelShapeError::Json { .. }
                | ModelShapeError::Number { .. } => "use the config.json the model was published with",
            };
            section.reader.fault(&name, at, chain(&e), remedy);
            None
        }
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The reference engine needs weights.
pub(super) fn weights(reader: &Reader<'_>, model: Option<&ModelSpec>, pools: &[(String, Pool)]) {
    let Some(model) = model.and_then(|model| model.directory.as_ref()) else { return };
    if !pools.iter().any(|(_, pool)| matches!(pool.engine, EngineSpec::Reference(_))) {
        return;
    }
    let listing = std::fs::read_dir(&model.path).into_iter().flatten().flatten();
    let found =
        listing.map(|file| file.path()).any(|file| file.extension().is_some_and(|e| e == "safetensors"));
    if !found {
        let problem = format!("{} holds no *.safetensors file", model.path.display());
        let remedy = "add the model's weights, or use engine: { kind: sim } in every pool";
        reader.fault("model.path", reader.position("model.path"), problem, remedy);
    }
}

/// Every simulated pool stands for the same model: streams go from any pool to any other, with a handoff or without.
pub(super) fn seeds(reader: &Reader<'_>, pools: &[(String, Pool)]) {
    let mut sims = pools.iter().filter(|(path, _)| reader.is_clean(path)).filter_map(|(path, pool)| {
        if let EngineSpec::Sim(spec) = &pool.engine { Some((path, pool, spec.seed)) } else { None }
    });
    let Some((first_path, first, expected)) = sims.next() else { return };
    for (path, _, seed) in sims {
        if seed != expected {
            let key = format!("{path}.engine.seed");
            let written = reader.position(&key);
            let at = written.or_else(|| reader.position(&format!("{first_path}.engine.seed")));
            let problem =
                format!("is {seed}, but {expected} in {}: they would make up different answers", first.name);
            reader.fault(&key, at, problem, "write the same seed in every sim pool");
        }
    }
}

/// Pool names are unique.
pub(super) fn names(reader: &Reader<'_>, pools: &[(String, Pool)]) {
    let mut seen = BTreeMap::new();
    for (path, pool) in pools {
        if let Some(first) = seen.insert(&pool.name, path) {
            let name = format!("{path}.name");
            let problem = format!("is {}, the name of {first} too", pool.name);
            reader.fault(&name, reader.position(&name), problem, "give each pool its own name");
        }
    }
}

/// Somebody decodes, and nobody prefills for nobody.
pub(super) fn roles(reader: &Reader<'_>, pools: &[(String, Pool)]) {
    if !reader.is_clean("pools") {
        return;
    }
    if !pools.iter().any(|(_, pool)| pool.role.decodes()) {
        let at = reader.position("pools[0].role");
        let problem = "has no pool that generates: every role is prefill";
        reader.fault("pools", at, problem, "add a pool with role: decode, or make one role: both");
    }
    for (path, pool) in pools {
        if let EngineSpec::Openai(_) = pool.engine
            && pool.role != Role::Both
        {
            let role = format!("{path}.role");
            let problem =
                format!("is {}, but an openai engine neither hands KV over nor takes it", pool.role);
            reader.fault(&role, reader.position(&role), problem, "write role: both");
        }
    }
}

/// Autoscaling leaves somebody who decodes, and no two pools scale the same object.
pub(super) fn autoscale(reader: &Reader<'_>, pools: &[(String, Pool)]) {
    if !reader.is_clean("pools") {
        return;
    }
    let least = |pool: &Pool| pool.autoscale.as_ref().map_or(pool.replicas, |scale| scale.min);
    let decoding = || pools.iter().filter(|(_, pool)| pool.role.decodes());
    let empties = |(_, pool): &&(String, Pool)| pool.autoscale.is_some() && least(pool) == 0;
    if decoding().all(|(_, pool)| least(pool) == 0)
        && let Some((path, _)) = decoding().find(empties)
    {
        let min = format!("{path}.autoscale.min");
        let at = reader.position(&min);
        let problem =
            "is 0, and no other pool that generates keeps a worker: the fleet could scale to nothing";
        reader.fault(&min, at, problem, "write min: 1");
    }
    let mut seen = BTreeMap::new();
    for (path, pool) in pools {
        let Some(ScalerSpec::Kubernetes(spec)) = pool.autoscale.as_ref().map(|scale| &scale.scaler) else {
            continue;
        };
        if let Some(first) = seen.insert((&spec.namespace, spec.kind, &spec.name), &pool.name) {
            let name = format!("{path}.autoscale.kubernetes.name");
            let problem = format!("is {}, which pool {first} scales too", spec.name);
            reader.fault(&name, reader.position(&name), problem, "give each pool an object of its own");
        }
    }
}

/// No two parts listen on the same port of the same address.
pub(super) fn ports(
    reader: &Reader<'_>,
    conductor: &ConductorSpec,
    router: &RouterSpec,
    pools: &[(String, Pool)],
) {
    let mut taken: Vec<(String, SocketAddr, u32)> = vec![
        ("conductor.listen".to_owned(), conductor.listen.address, 1),
        ("router.listen".to_owned(), router.listen.address, 1),
    ];
    taken.extend(
        pools.iter().map(|(path, pool)| (format!("{path}.listen"), pool.listen.address, pool.ports())),
    );
    for (i, (path, address, count)) in taken.iter().enumerate() {
        // Parts that listen on every interface are usually on hosts of their own: they cannot be judged here.
        if address.ip().is_unspecified() || address.port() == 0 {
            continue;
        }
        let range = |address: &SocketAddr, count: u32| {
            let first = u32::from(address.port());
            (first, first + count - 1)
        };
        let (first, last) = range(address, *count);
        let clash = taken[..i].iter().find(|(_, other, count)| {
            let (other_first, other_last) = range(other, *count);
            other.ip() == address.ip() && first <= other_last && other_first <= last
        });
        if let Some((other_path, other, other_count)) = clash {
            let (here, there) = (span(*address, *count), span(*other, *other_count));
            let problem = format!("takes {here}, which overlaps {other_path} ({there})");
            let at = reader.position(path).or_else(|| reader.position(other_path));
            reader.fault(path, at, problem, "give one of them another port");
        }
    }
}

fn span(address: SocketAddr, count: u32) -> String {
    match count {
        1 => address.to_string(),
        _ => format!("{address} to port {}", u32::from(address.port()) + count - 1),
    }
}

/// Each KV cache holds at least two blocks, and each staging area at least two of the largest block of its pool.
pub(super) fn memory(reader: &Reader<'_>, model: Option<&ModelSpec>, pools: &[(String, Pool)]) {
    let Some(model) = model.and_then(|model| model.directory.as_ref()) else { return };
    for (path, pool) in pools.iter().filter(|(_, pool)| pool.engine.limits().is_some()) {
        let block = pool.kv.geometry(&model.shape).block_bytes();
        let needed = Bytes(2 * block as u64);
        if pool.kv.capacity.blocks(block) < 2 {
            let name = format!("{path}.kv.memory");
            let at = reader.position(&name).or_else(|| reader.position(&format!("{path}.name")));
            let problem = format!("holds less than two blocks of {}", Bytes(block as u64));
            reader.fault(&name, at, problem, format!("write at least {needed}, or a smaller block_tokens"));
        }
        if pool.transfer.staging < needed {
            let name = format!("{path}.transfer.staging");
            let at = reader.position(&name).or_else(|| reader.position(&format!("{path}.name")));
            let problem =
                format!("is {}, less than two blocks of {}", pool.transfer.staging, Bytes(block as u64));
            reader.fault(&name, at, problem, format!("write at least {needed}, or a smaller block_tokens"));
        }
    }
}
