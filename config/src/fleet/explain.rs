//! A fleet in words: what `baton check` prints.

use std::fmt::{self, Write as _};

use super::pairs::join;
use super::{Fleet, PairPath, Pool};
use crate::reader::Origin;
use crate::units::Bytes;

/// Explains a fleet: every value and whether it is a default, what a KV block weighs, which way blocks take.
pub fn explain(fleet: &Fleet) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(&mut out, fleet);
    out
}

fn write_all(out: &mut String, fleet: &Fleet) -> fmt::Result {
    let model = &fleet.model;
    let shape = &model.shape;
    writeln!(out, "{}: no faults", fleet.source())?;
    writeln!(out, "\nmodel {} in {}", model.id, model.path.display())?;
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
    )?;
    writeln!(out, "  served as {}", model.served_as.join(", "))?;
    write_values(out, fleet)?;
    writeln!(out, "\nKV cache of one worker")?;
    for pool in &fleet.pools {
        write_kv(out, fleet, pool)?;
    }
    writeln!(out, "\ntransfer paths")?;
    if fleet.pairs().is_empty() {
        writeln!(out, "  none: every request stays on one worker")?;
    }
    for pair in fleet.pairs() {
        write_pair(out, pair)?;
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

fn write_kv(out: &mut String, fleet: &Fleet, pool: &Pool) -> fmt::Result {
    let Pool { name, role, replicas, accelerator, kv, .. } = pool;
    let engine = pool.engine.kind();
    writeln!(out, "  {name}: {replicas} x {role}, {engine} on {accelerator}")?;
    if pool.engine.limits().is_none() {
        return writeln!(out, "    the engine decides");
    }
    let geometry = kv.geometry(&fleet.model.shape);
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
    if tokens < u64::from(fleet.model.shape.max_context) {
        let context = fleet.model.shape.max_context;
        writeln!(out, "    less than the model's context of {context} tokens: longer prompts are refused")?;
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
