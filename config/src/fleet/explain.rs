//! A fleet in words: what `baton check` prints.

use std::fmt::{self, Write as _};

use super::openai::is_loopback;
use super::pairs::join;
use super::{Autoscale, EngineSpec, Fleet, ModelDirectory, ModelSpec, PairPath, Pool, ScalerSpec};
use crate::reader::Origin;
use crate::units::Bytes;

/// Explains a fleet: every value and whether it is a default, what a KV block weighs, which way blocks take.
pub fn explain(fleet: &Fleet) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(&mut out, fleet);
    out
}

/// What is no fault, since something outside of the fleet may take care of it, but is one if nothing does.
pub fn notes(fleet: &Fleet) -> Vec<String> {
    let router = &fleet.router;
    let mut out = Vec::new();
    if router.listen.address.ip().is_loopback() {
        return out;
    }
    if router.auth.is_none() {
        out.push(
            "router.listen: other hosts can connect and nobody is asked for a key: add router.auth, or let only a \
             gateway that does reach it"
                .to_owned(),
        );
    } else if router.tls.is_none() {
        out.push(
            "router.listen: keys travel in clear text: add router.tls, or end TLS in front of the router"
                .to_owned(),
        );
    }
    out
}

fn write_all(out: &mut String, fleet: &Fleet) -> fmt::Result {
    let model = &fleet.model;
    writeln!(out, "{}: no faults", fleet.source())?;
    match &model.directory {
        Some(directory) => write_model(out, model, directory)?,
        None => writeln!(out, "\nmodel {}", model.id)?,
    }
    writeln!(out, "  served as {}", model.served_as.join(", "))?;
    write_values(out, fleet)?;
    if fleet.passes_on() {
        writeln!(out, "\nservers that requests are passed on to")?;
        for pool in &fleet.pools {
            write_servers(out, fleet, pool)?;
        }
    } else {
        write_engines(out, fleet)?;
    }
    let notes = notes(fleet);
    if !notes.is_empty() {
        writeln!(out, "\nworth knowing")?;
    }
    for note in notes {
        writeln!(out, "  {note}")?;
    }
    if !fleet.unsupported().is_empty() {
        writeln!(out, "\nnot available in this build")?;
    }
    for missing in fleet.unsupported() {
        let line = missing.at.map_or(String::new(), |at| format!(" (line {})", at.line));
        let effect = if missing.required { "cannot start: " } else { "" };
        writeln!(out, "  {}{line}: {}; {effect}{}", missing.path, missing.what, missing.remedy)?;
    }
    Ok(())
}

fn write_values(out: &mut String, fleet: &Fleet) -> fmt::Result {
    writeln!(out, "\nvalues")?;
    let width = fleet.resolved().iter().map(|value| value.path.chars().count()).max().unwrap_or(0);
    for value in fleet.resolved() {
        let origin = match value.origin {
            Origin::File(at) => format!("line {}", at.line),
            Origin::Default => "default".to_owned(),
        };
        writeln!(out, "  {:width$}  {:24}  {origin}", value.path, value.value)?;
    }
    Ok(())
}

fn write_model(out: &mut String, model: &ModelSpec, directory: &ModelDirectory) -> fmt::Result {
    let shape = &directory.shape;
    writeln!(out, "\nmodel {} in {}", model.id, directory.path.display())?;
    writeln!(
        out,
        "  {}: {} layers, {} heads, {} kv heads x {} dims, context of {} tokens, vocabulary of {}",
        shape.architecture,
        shape.layers,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.max_context,
        shape.vocab
    )
}

fn write_engines(out: &mut String, fleet: &Fleet) -> fmt::Result {
    writeln!(out, "\nKV cache of one worker")?;
    for pool in &fleet.pools {
        write_kv(out, fleet, pool)?;
    }
    write_autoscale(out, fleet)?;
    writeln!(out, "\ntransfer paths")?;
    if fleet.pairs().is_empty() {
        writeln!(out, "  none: every request stays on one worker")?;
    }
    for pair in fleet.pairs() {
        write_pair(out, pair)?;
    }
    Ok(())
}

fn write_servers(out: &mut String, fleet: &Fleet, pool: &Pool) -> fmt::Result {
    let EngineSpec::Openai(spec) = &pool.engine else { return Ok(()) };
    writeln!(out, "  {}: {} x {}", pool.name, pool.replicas, join(&spec.urls, ", "))?;
    match &spec.model {
        Some(model) if *model != fleet.model.id => {
            writeln!(out, "    know the model as {model}: requests and answers are changed accordingly")?;
        }
        Some(_) | None => writeln!(out, "    know the model under the name that the client uses")?,
    }
    let key = spec.api_key_file.as_ref().map(|path| path.display());
    match key {
        Some(path) => writeln!(out, "    are shown the key in {path}, by each router and worker")?,
        None => writeln!(out, "    are shown no key")?,
    }
    if spec.urls.iter().any(|url| is_loopback(url)) {
        writeln!(out, "    a loopback address is that of the host of the worker beside the server")?;
    }
    let health = spec.health_path.as_deref().unwrap_or("/health, or /v1/models where there is no such path");
    writeln!(out, "    are well while GET {health} is answered and requests make progress")?;
    writeln!(out, "    get at most {} requests of each router at once", pool.limits.in_flight)
}

fn write_kv(out: &mut String, fleet: &Fleet, pool: &Pool) -> fmt::Result {
    let Pool { name, role, replicas, accelerator, kv, .. } = pool;
    let engine = pool.engine.kind();
    writeln!(out, "  {name}: {replicas} x {role}, {engine} on {accelerator}")?;
    let shape = fleet.model.directory.as_ref().map(|directory| &directory.shape);
    let Some(shape) = shape.filter(|_| pool.engine.limits().is_some()) else {
        return writeln!(out, "    the engine decides");
    };
    let geometry = kv.geometry(shape);
    let block = geometry.block_bytes();
    let blocks = kv.capacity.blocks(block);
    let tokens = u64::from(blocks) * u64::from(kv.block_tokens);
    writeln!(
        out,
        "    block of {} tokens, {}, {}: {} ({} per token)",
        kv.block_tokens,
        kv.layout,
        kv.dtype,
        Bytes(block as u64),
        geometry.token_bytes()
    )?;
    writeln!(out, "    {blocks} blocks hold {tokens} tokens in {}", Bytes(u64::from(blocks) * block as u64))?;
    if tokens < u64::from(shape.max_context) {
        let context = shape.max_context;
        writeln!(out, "    less than the model's context of {context} tokens: longer prompts are refused")?;
    }
    Ok(())
}

fn write_autoscale(out: &mut String, fleet: &Fleet) -> fmt::Result {
    let scaling = || fleet.pools.iter().filter_map(|pool| Some((pool, pool.autoscale.as_ref()?)));
    if scaling().next().is_some() {
        writeln!(out, "\nautoscaling")?;
    }
    for (pool, scale) in scaling() {
        let Autoscale { min, max, target, tolerance_percent, up_after, down_after, dry_run, scaler } = scale;
        let who = match scaler {
            ScalerSpec::None => "nobody; read baton_scale_desired".to_owned(),
            ScalerSpec::Process => "baton up".to_owned(),
            ScalerSpec::Kubernetes(at) => {
                format!("the scale of {} {} in namespace {}", at.kind, at.name, at.namespace)
            }
            ScalerSpec::Webhook(hook) => format!("POST {}", hook.url),
        };
        let mode = if *dry_run { " (dry run: only told)" } else { "" };
        writeln!(out, "  {}: {min} to {max} workers, by {who}{mode}", pool.name)?;
        let targets = [
            target.queue_wait.map(|wait| format!("prompts wait {} ms", wait.as_millis())),
            target.ttft.map(|ttft| format!("the first token takes {} ms", ttft.as_millis())),
            target.kv_percent.map(|percent| format!("{percent} % of the KV blocks are held")),
            target.itl.map(|itl| format!("a token takes {} ms", itl.as_millis())),
        ];
        let targets: Vec<String> = targets.into_iter().flatten().collect();
        let (up, down) = (up_after.as_millis(), down_after.as_millis());
        writeln!(out, "    grows when {}, {tolerance_percent} % over for {up} ms", join(&targets, " or "))?;
        writeln!(out, "    shrinks when fewer would have done for {down} ms; they drain first")?;
    }
    Ok(())
}

fn write_pair(out: &mut String, pair: &PairPath) -> fmt::Result {
    let PairPath { prefill, decode, backends, export, import, relayout, reasons } = pair;
    let usable: Vec<_> = backends.iter().filter(|b| b.is_available()).collect();
    let backends =
        if usable.is_empty() { "none that this build has".to_owned() } else { join(&usable, ", else ") };
    writeln!(out, "  {prefill} -> {decode}: {backends}; {prefill} {export}, {decode} {import}")?;
    match relayout.as_slice() {
        [] => writeln!(out, "    blocks keep their layout")?,
        changes => writeln!(out, "    laid out anew on arrival: {}", changes.join(", "))?,
    }
    for reason in reasons {
        writeln!(out, "    {reason}")?;
    }
    Ok(())
}
