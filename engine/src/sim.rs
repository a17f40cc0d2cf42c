//! An executor without arithmetic: modelled time, KV rows that prove themselves, tokens an oracle knows.
//!
//! - The KV row of a token is a hash of the seed, *all tokens up to it*, the layer, key or value, and the head. Its numbers are
//!   exact in bf16, so that they survive any re-layout and conversion between f32 and bf16.
//! - A forward pass checks rows of the context it attends to against the tokens it is told: a block that is wrong, stale,
//!   swapped, missing or of another sequence gives [`ExecuteError::CorruptKv`], not a plausible token.
//! - The next token is a hash of the seed and all tokens before it, put into the logits as a peak that no temperature up to 2 overcomes:
//!   sampler, log-probabilities and digests work as with a real model, and [`oracle`] tells the output beforehand.
//! - Time is not spent but reported, in [`Forward::modelled`].
//! - With [`SimConfig::check_kv`] off nothing of the above is done but the time: no row is written or read, there are no logits,
//!   and the next token is a hash of the seed, the last token and its position. A token then costs some nanoseconds, and
//!   what stands in front of the engine can be measured with it.

mod prefix;
mod timing;

use crate::arena::{Arena, Kv, Plane};
use crate::executor::{BatchItem, ExecuteError, Executor, Forward, ModelInfo, check_batch};
use crate::mix::{GOLDEN, mix, unit};
use prefix::PrefixHash;

/// How the simulated hardware behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct SimConfig {
    /// Microseconds that a pass with any prefill takes besides its tokens.
    pub prefill_base_us: f64,
    /// Microseconds per prompt token computed.
    pub prefill_per_token_us: f64,
    /// Nanoseconds per pair of a prompt token computed and a token it attends to: the quadratic part.
    pub prefill_per_pair_ns: f64,
    /// Microseconds that a pass with any decode takes besides its sequences.
    pub decode_base_us: f64,
    /// Microseconds per decoding sequence.
    pub decode_per_sequence_us: f64,
    /// Nanoseconds per token of context of a decoding sequence.
    pub decode_per_context_token_ns: f64,
    /// KV rows checked per item and pass at most. A context of more rows is checked by a sample of this size, spread
    /// evenly and different at every position; while it has no more blocks than this, every block is in it.
    pub verify_rows: u32,
    /// Mean length of the output when the model may end it, drawn by the prompt; `None`: it never does.
    pub mean_output_tokens: Option<u32>,
    /// Stands for the weights: tokens and KV bytes depend on it. Workers that hand over to each other, or take up each
    /// other's streams, must have the same one; blocks of another seed are [`ExecuteError::CorruptKv`].
    pub seed: u64,
    /// Whether KV rows are written and checked, and logits made.
    pub check_kv: bool,
}

impl Default for SimConfig {
    /// Prefill as in the mocker of Dynamo 1.6.1 (16.5 ms + 15.18 us T + 0.421 ns T^2, with T^2 / 2 pairs), and its decode
    /// at an empty cache. Placeholders: calibrate before quoting a latency.
    fn default() -> Self {
        Self {
            prefill_base_us: 16_500.0,
            prefill_per_token_us: 15.18,
            prefill_per_pair_ns: 0.842,
            decode_base_us: 5_740.0,
            decode_per_sequence_us: 50.0,
            decode_per_context_token_ns: 0.0,
            verify_rows: 256,
            mean_output_tokens: None,
            seed: 0,
            check_kv: true,
        }
    }
}

/// The simulated executor.
pub struct Sim {
    config: SimConfig,
    model: ModelInfo,
    /// Logits of the tokens that are not next; rotated from row to row.
    noise: Vec<f32>,
    /// Hash of the tokens up to each position of the item at hand.
    prefixes: Vec<PrefixHash>,
    rows: Vec<f32>,
    expected: Vec<f32>,
}

/// The tokens a simulated model generates after `prompt`: at most `count`, fewer if the model ends before.
///
/// Holds for greedy sampling and temperatures up to 2 without penalties or bias.
pub fn oracle(config: &SimConfig, model: &ModelInfo, prompt: &[u32], count: usize) -> Vec<u32> {
    if !config.check_kv {
        let mut last = prompt.last().copied().unwrap_or_default();
        let positions = (prompt.len()..prompt.len() + count).map(|position| position as u32);
        return positions
            .map(|position| {
                last = guess(config, model, last, position);
                last
            })
            .collect();
    }
    let mut prefix = prompt.iter().fold(PrefixHash::empty(config.seed), |prefix, token| prefix.push(*token));
    let mut output = Vec::new();
    while output.len() < count {
        let token = prefix.next_token(config, model);
        output.push(token);
        prefix = prefix.push(token);
        if model.eos.contains(&token) {
            break;
        }
    }
    output
}

/// The token that follows `last` at `position`, where nothing but these is looked at.
fn guess(config: &SimConfig, model: &ModelInfo, last: u32, position: u32) -> u32 {
    PrefixHash::empty(config.seed ^ u64::from(position)).push(last).next_token(config, model)
}

impl Sim {
    /// A simulation of `model`.
    pub fn new(config: SimConfig, model: ModelInfo) -> Self {
        let noise = (0..u64::from(if config.check_kv { model.vocab } else { 0 }))
            .map(|i| unit(mix(i.wrapping_mul(GOLDEN))) as f32)
            .collect();
        Self { config, model, noise, prefixes: Vec::new(), rows: Vec::new(), expected: Vec::new() }
    }

    fn hash_prefixes(&mut self, item: &BatchItem<'_>) {
        self.prefixes.clear();
        let mut prefix = PrefixHash::empty(self.config.seed);
        for token in item.context.iter().chain(item.tokens) {
            prefix = prefix.push(*token);
            self.prefixes.push(prefix);
        }
    }

    /// Checks the rows of the context of item `index` of a batch.
    fn verify(&mut self, arena: &Arena, index: usize, item: &BatchItem<'_>) -> Result<(), ExecuteError> {
        let per_token = u64::from(self.model.layers) * 2 * u64::from(self.model.kv_heads);
        let total = u64::from(item.start) * per_token;
        let sample = u64::from(self.config.verify_rows).min(total);
        if sample == total {
            return self.verify_all(arena, index, item);
        }
        let salt = self.prefixes[item.start as usize].0;
        for i in 0..sample {
            // One row of each of `sample` equal parts of the context; products fit, positions have 32 bits.
            let (low, high) = (total * i / sample, total * (i + 1) / sample);
            let row = low + mix(salt.wrapping_add(i.wrapping_mul(GOLDEN))) % (high - low);
            let position = (row / per_token) as u32;
            let plane_head = (row % per_token) as u32;
            let (plane, head) = (self.plane(plane_head), plane_head % self.model.kv_heads);
            self.verify_rows(arena, index, item, (plane, head, position..position + 1))?;
        }
        Ok(())
    }

    fn verify_all(&mut self, arena: &Arena, index: usize, item: &BatchItem<'_>) -> Result<(), ExecuteError> {
        for plane_head in 0..self.model.layers * 2 * self.model.kv_heads {
            let (plane, head) = (self.plane(plane_head), plane_head % self.model.kv_heads);
            self.verify_rows(arena, index, item, (plane, head, 0..item.start))?;
        }
        Ok(())
    }

    /// The plane of the row numbered `plane_head` among those of a token, heads first.
    fn plane(&self, plane_head: u32) -> Plane {
        let plane = plane_head / self.model.kv_heads;
        Plane { layer: plane / 2, kv: Kv::BOTH[(plane % 2) as usize] }
    }

    fn verify_rows(
        &mut self,
        arena: &Arena,
        index: usize,
        item: &BatchItem<'_>,
        (plane, head, positions): (Plane, u32, std::ops::Range<u32>),
    ) -> Result<(), ExecuteError> {
        let dim = self.model.head_dim as usize;
        self.rows.resize(positions.len() * dim, 0.0);
        self.expected.resize(dim, 0.0);
        arena.gather_head(plane, head, item.blocks, positions.clone(), &mut self.rows);
        for (row, position) in self.rows.chunks_exact(dim).zip(positions) {
            self.prefixes[position as usize].row(plane, head, &mut self.expected);
            if row != self.expected {
                let block = item.blocks[(position / arena.geometry().block_tokens) as usize];
                return Err(ExecuteError::CorruptKv { item: index, position, layer: plane.layer, block });
            }
        }
        Ok(())
    }

    fn write(&mut self, arena: &Arena, item: &BatchItem<'_>) {
        let dim = self.model.head_dim as usize;
        self.rows.resize(item.tokens.len() * arena.token_numbers(), 0.0);
        for layer in 0..self.model.layers {
            for kv in Kv::BOTH {
                let plane = Plane { layer, kv };
                let prefixes = &self.prefixes[item.start as usize..];
                for (token, prefix) in self.rows.chunks_exact_mut(arena.token_numbers()).zip(prefixes) {
                    for (row, head) in token.chunks_exact_mut(dim).zip(0..) {
                        prefix.row(plane, head, row);
                    }
                }
                arena.scatter_tokens(plane, item.blocks, item.start, &self.rows);
            }
        }
    }

    fn append_logits(&self, logits: &mut Vec<f32>) {
        let Some(prefix) = self.prefixes.last() else { return };
        let first = logits.len();
        let turn = (mix(prefix.0) % self.noise.len() as u64) as usize;
        logits.extend_from_slice(&self.noise[turn..]);
        logits.extend_from_slice(&self.noise[..turn]);
        // The height varies too: the digest of the row then depends on every token before.
        const PEAK: f32 = 60.0;
        let token = prefix.next_token(&self.config, &self.model);
        logits[first + token as usize] = PEAK + unit(prefix.0) as f32;
    }
}

impl Executor for Sim {
    fn model(&self) -> &ModelInfo {
        &self.model
    }

    fn has_logits(&self) -> bool {
        self.config.check_kv
    }

    fn forward(
        &mut self,
        arena: &Arena,
        batch: &[BatchItem<'_>],
        out: &mut Forward,
    ) -> Result<(), ExecuteError> {
        check_batch(&self.model, arena, batch)?;
        out.logits.clear();
        out.tokens.clear();
        out.modelled = self.config.modelled(batch);
        if !self.config.check_kv {
            out.tokens.extend(batch.iter().filter(|item| item.logits).filter_map(|item| {
                let position = item.start + item.tokens.len() as u32;
                Some(guess(&self.config, &self.model, *item.tokens.last()?, position))
            }));
            return Ok(());
        }
        for (index, item) in batch.iter().enumerate() {
            self.hash_prefixes(item);
            self.verify(arena, index, item)?;
        }
        for item in batch {
            self.hash_prefixes(item);
            self.write(arena, item);
            if item.logits {
                self.append_logits(&mut out.logits);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
