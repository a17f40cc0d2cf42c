//! A transformer computed by hand on the CPU: Llama, Qwen2 and Qwen3 checkpoints, nothing linked.
//!
//! It is a reference, so its results are pinned before its speed: the logits of a token depend bitwise on the
//! tokens before it and on the number format of the arena, and on nothing else. Not on block size or layout,
//! not on how a prompt was cut into passes or what else was in a pass, not on threads or the machine's
//! instruction set. A prompt prefilled on one worker and decoded on another therefore gives the bits a single
//! worker would give, and a test can demand it.
//!
//! ```text
//!  load -> config (refuse by name) -> checkpoint (headers, shapes) -> model (packed panels)
//!  forward -> embed -> per layer: norm, qkv, attention <-> arena, output, norm, MLP -> logits
//!                                   kernel: the only unsafe code
//! ```

use std::path::Path;
use std::sync::Arc;

use tracing::info;

use crate::arena::Arena;
use crate::executor::{BatchItem, ExecuteError, Executor, Forward, ModelInfo, check_batch};

mod attention;
mod checkpoint;
mod config;
mod forward;
#[expect(
    unsafe_code,
    reason = "vector instructions are reached through pointers; the rules are in the module"
)]
mod kernel;
mod limits;
mod load;
mod load_error;
mod math;
mod matrix;
mod model;
mod team;

pub use limits::Limits;
pub use load_error::LoadError;

use forward::Runner;
use kernel::Isa;
use model::Model;
use team::Team;

/// A loaded model that computes.
#[derive(Debug)]
pub struct Reference {
    info: ModelInfo,
    model: Model,
    runner: Runner,
}

/// What one token costs, for comparing a measured speed with the machine's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of weights a decode step reads, whatever its batch.
    pub step_bytes: usize,
    /// Multiply-adds of one prompt token, outside attention and the output projection.
    pub prefill_operations: usize,
    /// Multiply-adds of one decoded token, outside attention.
    pub decode_operations: usize,
}

impl Reference {
    /// Loads the Hugging Face model directory `dir` to compute on `threads` threads (0 counts as 1).
    ///
    /// # Errors
    /// When the directory is damaged or calls for something not computed here; see [`LoadError`].
    pub fn load(dir: &Path, threads: usize) -> Result<Self, LoadError> {
        Self::load_with(dir, threads, Isa::best())
    }

    /// Checks that [`Reference::load`] would accept `dir`: its configuration and the shape of every tensor are
    /// read, the weights are not.
    ///
    /// # Errors
    /// As [`Reference::load`].
    pub fn inspect(dir: &Path) -> Result<(), LoadError> {
        load::inspect(dir)
    }

    fn load_with(dir: &Path, threads: usize, isa: Isa) -> Result<Self, LoadError> {
        let team = Team::start(threads).map_err(|source| LoadError::Threads { threads, source })?;
        let (configuration, model) = team.run(|| load::load(dir, &team))?;
        let shape = &model.shape;
        let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let info = ModelInfo {
            name: absolute
                .file_name()
                .map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned()),
            vocab: shape.vocab as u32,
            max_context: configuration.max_context,
            eos: configuration.eos,
            layers: shape.layers as u32,
            kv_heads: shape.kv_heads as u32,
            head_dim: shape.head_dim as u32,
        };
        info!(
            model = info.name,
            architecture = ?configuration.architecture,
            weight_bytes = model.step_bytes(),
            threads = team.threads(),
            instructions = isa.name(),
            "model loaded"
        );
        Ok(Self { info, model, runner: Runner::new(isa, Arc::new(team)) })
    }

    /// What a token costs.
    pub fn cost(&self) -> Cost {
        let (prefill_operations, decode_operations) = self.model.token_operations();
        Cost { step_bytes: self.model.step_bytes(), prefill_operations, decode_operations }
    }
}

impl Executor for Reference {
    fn model(&self) -> &ModelInfo {
        &self.info
    }

    fn forward(
        &mut self,
        arena: &Arena,
        batch: &[BatchItem<'_>],
        out: &mut Forward,
    ) -> Result<(), ExecuteError> {
        check_batch(&self.info, arena, batch)?;
        if !self.info.fits(arena.geometry()) {
            let reason = format!("KV blocks of {} cannot hold this model", arena.geometry());
            return Err(ExecuteError::Broken { reason });
        }
        self.runner.forward(&self.model, arena, batch, out);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
