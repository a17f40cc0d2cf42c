//! A loaded model: shapes and packed weights.

use super::kernel::{PANEL, Row};
use super::math;
use super::matrix::Weights;

/// The numbers of a model's configuration that the arithmetic needs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Shape {
    pub(super) vocab: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) epsilon: f32,
    pub(super) rope_theta: f64,
}

impl Shape {
    /// Query heads that share a key/value head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Columns of the query projection.
    pub(super) fn query_columns(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the key (or the value) projection.
    pub(super) fn kv_columns(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The rotary frequencies, rounded to f32 where `transformers` rounds.
    pub(super) fn frequencies(&self) -> Vec<f32> {
        let dim = self.head_dim as f32;
        (0..self.head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / dim;
                1.0 / (math::pow(self.rope_theta, f64::from(exponent)) as f32)
            })
            .collect()
    }
}

/// A vector along the hidden dimension, cut into panels; zero past its end.
#[derive(Debug)]
pub(super) struct Along(pub(super) Vec<Row>);

impl Along {
    pub(super) fn new(values: &[f32]) -> Self {
        let panel = |part: &[f32]| {
            let mut row = Row::ZERO;
            row.0[..part.len()].copy_from_slice(part);
            row
        };
        Self(values.chunks(PANEL).map(panel).collect())
    }
}

/// One transformer layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) input_norm: Along,
    /// Query, key and value projections side by side.
    pub(super) qkv: Weights,
    pub(super) qkv_bias: Option<Vec<f32>>,
    /// Per-head norms of queries and keys.
    pub(super) head_norms: Option<(Vec<f32>, Vec<f32>)>,
    pub(super) output: Weights,
    pub(super) output_bias: Option<Along>,
    pub(super) post_norm: Along,
    pub(super) gate: Weights,
    pub(super) up: Weights,
    pub(super) down: Weights,
}

/// All weights of a model.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) shape: Shape,
    pub(super) frequencies: Vec<f32>,
    pub(super) embedding: Weights,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Along,
    /// The output projection; none when it is the embedding.
    pub(super) head: Option<Weights>,
}

impl Model {
    pub(super) fn output_head(&self) -> &Weights {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes of weights that one decode step reads.
    pub(super) fn step_bytes(&self) -> usize {
        let layer = |l: &Layer| {
            [&l.qkv, &l.output, &l.gate, &l.up, &l.down].into_iter().map(Weights::bytes).sum::<usize>()
        };
        self.layers.iter().map(layer).sum::<usize>() + self.output_head().bytes()
    }

    /// Multiply-adds of one token outside attention, without and with the output projection.
    pub(super) fn token_operations(&self) -> (usize, usize) {
        let s = &self.shape;
        let attention = s.hidden * (2 * s.query_columns() + 2 * s.kv_columns());
        let layers = s.layers * (attention + 3 * s.hidden * s.intermediate);
        (layers, layers + s.hidden * s.vocab)
    }
}
