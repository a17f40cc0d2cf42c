//! One forward pass: embedding, layers, logits.

use std::sync::Arc;
use std::time::Duration;

use crate::arena::Arena;
use crate::executor::{BatchItem, Forward};

use super::attention::{Buffers, Context, Span};
use super::kernel::{Isa, PANEL};
use super::math::{self, AddSquares, Angles, Gate, Scale};
use super::matrix::{self, Activations};
use super::model::{Along, Layer, Model};
use super::team::Team;

/// Most rows computed at a time: enough to use each weight often, few enough that activations stay in cache.
/// A longer batch is cut; results do not depend on where.
const SLAB_ROWS: usize = 512;

/// Runs forward passes of one model; the buffers are kept from pass to pass.
#[derive(Debug)]
pub(super) struct Runner {
    isa: Isa,
    team: Arc<Team>,
    hidden: Activations,
    normed: Activations,
    qkv: Activations,
    attended: Activations,
    gated: Activations,
    delta: Activations,
    logits: Activations,
    squares: Vec<f32>,
    factors: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    attention: Buffers,
}

impl Runner {
    pub(super) fn new(isa: Isa, team: Arc<Team>) -> Self {
        Self {
            isa,
            team,
            hidden: Activations::default(),
            normed: Activations::default(),
            qkv: Activations::default(),
            attended: Activations::default(),
            gated: Activations::default(),
            delta: Activations::default(),
            logits: Activations::default(),
            squares: Vec::new(),
            factors: Vec::new(),
            cos: Vec::new(),
            sin: Vec::new(),
            attention: Buffers::default(),
        }
    }

    /// Computes a checked batch.
    pub(super) fn forward(
        &mut self,
        model: &Model,
        arena: &Arena,
        batch: &[BatchItem<'_>],
        out: &mut Forward,
    ) {
        out.logits.clear();
        out.modelled = Duration::ZERO;
        let team = Arc::clone(&self.team);
        team.run(|| self.slabs(model, arena, batch, out));
    }

    /// Cuts a batch into slabs.
    fn slabs(&mut self, model: &Model, arena: &Arena, batch: &[BatchItem<'_>], out: &mut Forward) {
        let mut spans: Vec<Span<'_>> = Vec::new();
        let mut rows = 0;
        for item in batch {
            let mut done = 0;
            while done < item.tokens.len() {
                if rows == SLAB_ROWS {
                    self.slab(model, arena, &spans, out);
                    spans.clear();
                    rows = 0;
                }
                let count = (item.tokens.len() - done).min(SLAB_ROWS - rows);
                spans.push(Span { item: *item, start: item.start + done as u32, count, row: rows });
                rows += count;
                done += count;
            }
        }
        if rows > 0 {
            self.slab(model, arena, &spans, out);
        }
    }

    /// Computes up to [`SLAB_ROWS`] tokens.
    fn slab(&mut self, model: &Model, arena: &Arena, spans: &[Span<'_>], out: &mut Forward) {
        self.embed(model, spans);
        for (index, layer) in model.layers.iter().enumerate() {
            self.layer(model, arena, spans, (index, layer));
        }
        let last: Vec<usize> =
            spans.iter().filter(|span| span.wants_logits()).map(|span| span.row + span.count - 1).collect();
        if !last.is_empty() {
            self.head(model, &last, out);
        }
    }

    /// Token embeddings into `hidden`, rotary angles of every row.
    fn embed(&mut self, model: &Model, spans: &[Span<'_>]) {
        let rows = spans.iter().map(|span| span.count).sum();
        let half = model.shape.head_dim / 2;
        self.hidden.reshape(rows, model.shape.hidden);
        self.cos.resize(rows * half, 0.0);
        self.sin.resize(rows * half, 0.0);
        let mut embedding = vec![0.0; model.shape.hidden];
        for span in spans {
            for i in 0..span.count {
                let position = span.start + i as u32;
                let token = span.item.tokens[(position - span.item.start) as usize];
                let row = span.row + i;
                model.embedding.column(token as usize, &mut embedding);
                self.hidden.write(row, &embedding);
                self.isa.run(Angles {
                    position,
                    frequencies: &model.frequencies,
                    cos: &mut self.cos[row * half..(row + 1) * half],
                    sin: &mut self.sin[row * half..(row + 1) * half],
                });
            }
        }
    }

    fn layer(&mut self, model: &Model, arena: &Arena, spans: &[Span<'_>], (index, layer): (usize, &Layer)) {
        // The previous layer's MLP is added by this layer's first norm.
        let pending = index > 0;
        self.norm(model, pending, None, &layer.input_norm);
        matrix::multiply(&self.team, self.isa, &self.normed, &layer.qkv, &mut self.qkv);
        let context = Context {
            isa: self.isa,
            team: &self.team,
            shape: &model.shape,
            arena,
            layer,
            layer_index: index as u32,
            spans,
            qkv: &self.qkv,
            angles: (&self.cos, &self.sin),
        };
        context.store(&mut self.attention);
        context.attend(&mut self.attention, &mut self.attended);
        matrix::multiply(&self.team, self.isa, &self.attended, &layer.output, &mut self.delta);
        self.norm(model, true, layer.output_bias.as_ref(), &layer.post_norm);
        let (isa, normed) = (self.isa, &self.normed);
        matrix::multiply_then(
            &self.team,
            normed,
            2 * model.shape.hidden,
            layer.gate.panels(),
            &mut self.gated,
            |panel, first, gate| {
                let mut up = vec![super::kernel::Row::ZERO; gate.len()];
                isa.multiply(normed.left(), first, layer.gate.panel(panel), gate);
                isa.multiply(normed.left(), first, layer.up.panel(panel), &mut up);
                isa.run(Gate { gate, up: &up });
            },
        );
        matrix::multiply(&self.team, self.isa, &self.gated, &layer.down, &mut self.delta);
    }

    /// Adds `delta` (when `pending`) to `hidden` and normalises it into `normed`.
    fn norm(&mut self, model: &Model, pending: bool, bias: Option<&Along>, weight: &Along) {
        let rows = self.hidden.rows();
        let hidden = model.shape.hidden;
        let panels = hidden.div_ceil(PANEL);
        self.squares.resize(panels * rows, 0.0);
        let (isa, delta) = (self.isa, &self.delta);
        let mut pieces: Vec<_> =
            self.hidden.data_mut().chunks_mut(rows).zip(self.squares.chunks_mut(rows)).collect();
        self.team.each(&mut pieces, rows * PANEL * 4, |panel, (hidden, squares)| {
            let delta = pending.then(|| (delta.panel(panel), bias.map(|bias| &bias.0[panel])));
            isa.run(AddSquares { hidden, delta, squares });
        });
        drop(pieces);
        self.factors.clear();
        self.factors.extend((0..rows).map(|row| {
            let sum = self.squares[row..].iter().step_by(rows).fold(0.0, |sum, square| sum + square);
            math::inverse_rms(sum, hidden, model.shape.epsilon)
        }));
        self.normed.reshape(rows, hidden);
        let (hidden, factors) = (&self.hidden, &self.factors);
        self.team.chunks(self.normed.data_mut(), rows, rows * PANEL * 4, |panel, out| {
            isa.run(Scale { hidden: hidden.panel(panel), factors, weight: &weight.0[panel], out });
        });
    }

    /// Logits of some rows, appended to `out`.
    fn head(&mut self, model: &Model, rows: &[usize], out: &mut Forward) {
        let mut values = vec![0.0; model.shape.hidden];
        for chosen in [&mut self.hidden, &mut self.delta] {
            let mut kept = Activations::default();
            kept.reshape(rows.len(), model.shape.hidden);
            for (to, from) in rows.iter().enumerate() {
                chosen.read(*from, 0, &mut values);
                kept.write(to, &values);
            }
            *chosen = kept;
        }
        self.norm(model, true, None, &model.final_norm);
        let head = model.output_head();
        matrix::multiply(&self.team, self.isa, &self.normed, head, &mut self.logits);
        let vocab = head.columns();
        let start = out.logits.len();
        out.logits.resize(start + rows.len() * vocab, 0.0);
        let logits = &self.logits;
        self.team.chunks(&mut out.logits[start..], vocab, vocab, |row, out| logits.read(row, 0, out));
    }
}
