//! Causal attention over the paged arena.
//!
//! Keys and values come back from the arena, those of the current pass too, so that a row is used as it was
//! stored (rounded to the arena's number format) no matter which pass, process or machine computed it. Keys
//! are taken in tiles of [`PANEL`] by absolute position, each query runs its own softmax over them, and a
//! tile that a query sees only in part is summed to that query's own end: what else is in the pass cannot
//! enter a query's sums.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::arena::{Arena, Kv, Plane};
use crate::executor::BatchItem;

use super::kernel::{Format, Isa, Left, Line, PANEL, Panel, Row, Rows};
use super::math::{Accumulate, Finish, Rotate, Softmax, Weigh};
use super::matrix::Activations;
use super::model::{Layer, Shape};
use super::team::Team;

/// Queries that share one gathering of keys and values.
const QUERIES: usize = 64;

/// The new tokens of one item within a pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span<'a> {
    pub(super) item: BatchItem<'a>,
    /// Position of the first token in its sequence.
    pub(super) start: u32,
    /// Number of tokens.
    pub(super) count: usize,
    /// Row of the first token in the activations.
    pub(super) row: usize,
}

/// What all attention of one layer of one pass shares.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) isa: Isa,
    pub(super) team: &'a Team,
    pub(super) shape: &'a Shape,
    pub(super) arena: &'a Arena,
    pub(super) layer: &'a Layer,
    pub(super) layer_index: u32,
    pub(super) spans: &'a [Span<'a>],
    /// Projected queries, keys and values, before bias, norm and rotation.
    pub(super) qkv: &'a Activations,
    /// Cosines and sines, `head_dim / 2` for each row.
    pub(super) angles: (&'a [f32], &'a [f32]),
}

/// Buffers kept from pass to pass.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// `[item][kv head][query][head of the group][head_dim]`.
    out: Vec<f32>,
    per_thread: Vec<Mutex<Scratch>>,
}

#[derive(Debug, Default)]
struct Scratch {
    rows: Vec<f32>,
    keys: Vec<Line>,
    /// One tile of values, row by row, and padding for the width of a register.
    values: Vec<f32>,
    queries: Vec<Row>,
    scores: Vec<Row>,
    tile: Vec<Row>,
    total: Vec<Row>,
    states: Vec<Softmax>,
}

impl Span<'_> {
    /// Whether the span ends with the token whose logits its item asked for.
    pub(super) fn wants_logits(&self) -> bool {
        let end = (self.start - self.item.start) as usize + self.count;
        self.item.logits && end == self.item.tokens.len()
    }
}

impl Context<'_> {
    /// Writes the pass's keys and values to the arena.
    pub(super) fn store(&self, buffers: &mut Buffers) {
        // Tokens whose rows one thread writes at a time.
        const TOKENS: usize = 32;
        buffers.per_thread.resize_with(self.team.threads(), Mutex::default);
        let mut pieces: Vec<(Span<'_>, Range<usize>)> = Vec::new();
        for span in self.spans {
            pieces.extend(
                (0..span.count).step_by(TOKENS).map(|first| (*span, first..span.count.min(first + TOKENS))),
            );
        }
        let columns = self.shape.kv_columns();
        self.team.each(&mut pieces, TOKENS.min(self.qkv.rows()) * columns * 24, |_, (span, tokens)| {
            let mut scratch = self.scratch(&buffers.per_thread);
            let rows = &mut scratch.rows;
            rows.resize(rows.len().max(TOKENS * columns), 0.0);
            let rows = &mut rows[..tokens.len() * columns];
            for kv in Kv::BOTH {
                for (token, rows) in tokens.clone().zip(rows.chunks_exact_mut(columns)) {
                    self.project(span.row + token, kv, rows);
                }
                let plane = Plane { layer: self.layer_index, kv };
                let start = span.start + tokens.start as u32;
                self.arena.scatter_tokens(plane, span.item.blocks, start, rows);
            }
        });
    }

    /// The keys (rotated) or values of all heads of one row.
    fn project(&self, row: usize, kv: Kv, out: &mut [f32]) {
        let first = self.shape.query_columns() + kv.index() as usize * self.shape.kv_columns();
        self.read(row, first, out);
        if kv == Kv::Key {
            let norm = self.layer.head_norms.as_ref().map(|(_, key)| key.as_slice());
            for head in out.chunks_exact_mut(self.shape.head_dim) {
                self.rotate(row, norm, head);
            }
        }
    }

    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        self.qkv.read(row, first, out);
        if let Some(bias) = &self.layer.qkv_bias {
            for (x, bias) in out.iter_mut().zip(&bias[first..]) {
                *x += bias;
            }
        }
    }

    fn rotate(&self, row: usize, norm: Option<&[f32]>, head: &mut [f32]) {
        let half = self.shape.head_dim / 2;
        let angles = row * half..(row + 1) * half;
        self.isa.run(Rotate {
            head,
            norm: norm.map(|weight| (weight, self.shape.epsilon)),
            cos: &self.angles.0[angles.clone()],
            sin: &self.angles.1[angles],
        });
    }

    /// Attends for every row of the pass; `out` gets the heads side by side.
    pub(super) fn attend(&self, buffers: &mut Buffers, out: &mut Activations) {
        let Shape { head_dim, kv_heads, .. } = *self.shape;
        let group = self.shape.group();
        let rows = self.qkv.rows();
        let mut results = std::mem::take(&mut buffers.out);
        results.resize(rows * self.shape.query_columns(), 0.0);
        let mut pieces = Vec::new();
        let mut rest = results.as_mut_slice();
        let mut operations = 0;
        for span in self.spans {
            for head in 0..kv_heads as u32 {
                for first in (0..span.count).step_by(QUERIES) {
                    let queries = first..span.count.min(first + QUERIES);
                    let (now, later) = rest.split_at_mut(queries.len() * group * head_dim);
                    rest = later;
                    let keys = span.start as usize + queries.end;
                    // Products, and what gathering a key costs in their terms.
                    operations += keys * head_dim * (2 * queries.len() * group + 32);
                    pieces.push((Piece { span: *span, head, queries }, now));
                }
            }
        }
        let each = operations / pieces.len().max(1);
        self.team.each(&mut pieces, each, |_, (piece, out)| {
            let mut scratch = self.scratch(&buffers.per_thread);
            self.attend_piece(&mut scratch, piece, out);
        });
        drop(pieces);
        self.assemble(&results, out);
        buffers.out = results;
    }

    /// Reorders `[item][kv head][query][head of the group]` to rows of all heads.
    fn assemble(&self, results: &[f32], out: &mut Activations) {
        let Shape { head_dim, kv_heads, .. } = *self.shape;
        let group = self.shape.group();
        let columns = self.shape.query_columns();
        out.reshape(self.qkv.rows(), columns);
        let mut row_values = vec![0.0; columns];
        for span in self.spans {
            let results = &results[span.row * columns..][..span.count * columns];
            for query in 0..span.count {
                for head in 0..kv_heads {
                    let from = &results[(head * span.count + query) * group * head_dim..][..group * head_dim];
                    row_values[head * group * head_dim..][..group * head_dim].copy_from_slice(from);
                }
                out.write(span.row + query, &row_values);
            }
        }
    }

    fn scratch<'s>(&self, per_thread: &'s [Mutex<Scratch>]) -> std::sync::MutexGuard<'s, Scratch> {
        // Only the thread itself takes its own; after a panic the contents are still just buffers.
        per_thread[self.team.current()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attends for up to [`QUERIES`] queries of the query heads of one key/value head.
    fn attend_piece(&self, scratch: &mut Scratch, piece: &Piece<'_>, out: &mut [f32]) {
        let Shape { head_dim, .. } = *self.shape;
        let group = self.shape.group();
        let rows = piece.queries.len() * group;
        scratch.prepare(rows, head_dim);
        self.load_queries(scratch, piece);
        let panels = head_dim.div_ceil(PANEL);
        let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
        let first_position = piece.span.start as usize + piece.queries.start;
        let keys = first_position + piece.queries.len();
        for tile_start in (0..keys).step_by(PANEL) {
            self.load_tile(scratch, piece, tile_start, keys);
            // Queries before this one see nothing of the tile; those from `whole` on see all of it.
            let first = tile_start.saturating_sub(first_position);
            let whole =
                (tile_start + PANEL - 1).saturating_sub(first_position).clamp(first, piece.queries.len());
            for query in first..whole {
                let valid = first_position + query + 1 - tile_start;
                self.attend_rows(scratch, query * group..(query + 1) * group, valid, scale);
            }
            if whole < piece.queries.len() {
                self.attend_rows(scratch, whole * group..rows, PANEL, scale);
            }
        }
        for panel in 0..panels {
            self.isa.run(Finish {
                total: &scratch.total[panel * rows..][..rows],
                states: &scratch.states[..rows],
                out,
                stride: head_dim,
                first: panel * PANEL,
            });
        }
    }

    /// Adds one tile of keys to the sums of some rows; the rows see the first `valid` keys of it.
    fn attend_rows(&self, scratch: &mut Scratch, part: Range<usize>, valid: usize, scale: f32) {
        let dim = self.shape.head_dim;
        let rows = scratch.states.len();
        let keys = Panel { lines: &scratch.keys, format: Format::F32, depth: dim, width: PANEL };
        let left = Left { panels: &scratch.queries, rows };
        let scores = &mut scratch.scores[..part.len()];
        self.isa.multiply(left, part.start, keys, scores);
        let states = &mut scratch.states[part.clone()];
        self.isa.run(Weigh { scores, states, scale, valid });
        for panel in 0..dim.div_ceil(PANEL) {
            // Columns past the head are the next row's, or the padding after the last: computed and not used.
            let width = (dim - panel * PANEL).min(PANEL).next_multiple_of(16);
            let values = Rows { values: &scratch.values[panel * PANEL..], stride: dim, depth: valid, width };
            let tile = &mut scratch.tile[..part.len()];
            let weights = Left { panels: &scratch.scores[..part.len()], rows: part.len() };
            self.isa.multiply_rows(weights, 0, values, tile);
            let total = &mut scratch.total[panel * rows..][part.clone()];
            self.isa.run(Accumulate { total, tile, states: &scratch.states[part.clone()] });
        }
    }

    /// Biased, normalised and rotated queries, in panels along the head dimension.
    fn load_queries(&self, scratch: &mut Scratch, piece: &Piece<'_>) {
        let dim = self.shape.head_dim;
        let group = self.shape.group();
        let rows = piece.queries.len() * group;
        let norm = self.layer.head_norms.as_ref().map(|(query, _)| query.as_slice());
        for (i, query) in piece.queries.clone().enumerate() {
            for j in 0..group {
                let row = piece.span.row + query;
                let head = &mut scratch.rows[..dim];
                self.read(row, (piece.head as usize * group + j) * dim, head);
                self.rotate(row, norm, head);
                for (panel, part) in head.chunks(PANEL).enumerate() {
                    scratch.queries[panel * rows + i * group + j].0[..part.len()].copy_from_slice(part);
                }
            }
        }
    }

    /// One tile of keys, transposed, and one of values, from the arena.
    fn load_tile(&self, scratch: &mut Scratch, piece: &Piece<'_>, tile_start: usize, keys: usize) {
        let dim = self.shape.head_dim;
        let count = PANEL.min(keys - tile_start);
        let tokens = tile_start as u32..(tile_start + count) as u32;
        let Scratch { rows, keys: key_lines, values, .. } = scratch;
        let blocks = piece.span.item.blocks;
        let gather = |kv, rows: &mut [f32]| {
            let plane = Plane { layer: self.layer_index, kv };
            self.arena.gather_head(plane, piece.head, blocks, tokens.clone(), &mut rows[..count * dim]);
        };
        gather(Kv::Key, rows);
        for (group, rows) in rows.chunks_exact(16 * dim).take(count.div_ceil(16)).enumerate() {
            self.isa.transpose16(rows, dim, &mut key_lines[group..], PANEL / 16);
        }
        gather(Kv::Value, values);
    }
}

/// The work of one task: some queries of one item against one key/value head.
#[derive(Debug)]
struct Piece<'a> {
    span: Span<'a>,
    head: u32,
    /// Tokens of the span.
    queries: Range<usize>,
}

impl Scratch {
    /// Takes the sizes of a piece of `rows` rows. Only grows, but for the lists whose length is their shape.
    fn prepare(&mut self, rows: usize, head_dim: usize) {
        let panels = head_dim.div_ceil(PANEL);
        self.rows.resize(self.rows.len().max(PANEL * head_dim), 0.0);
        self.keys.resize(head_dim * PANEL / 16, Line::ZERO);
        self.values.resize(PANEL * head_dim + PANEL, 0.0);
        self.queries.resize(panels * rows, Row::ZERO);
        self.scores.resize(self.scores.len().max(rows), Row::ZERO);
        self.tile.resize(self.tile.len().max(rows), Row::ZERO);
        self.total.clear();
        self.total.resize(panels * rows, Row::ZERO);
        self.states.clear();
        self.states.resize(rows, Softmax::START);
    }
}
