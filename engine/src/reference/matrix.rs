//! Activations and weights in panels, and their product on all threads.

use super::kernel::{Format, Isa, Left, Line, PANEL, Panel, Row};
use super::team::Team;

/// A matrix of activations: panels of [`PANEL`] columns, each `[rows][PANEL]`.
///
/// The panel form lets threads own whole columns as plain slices. Columns past the last are zero.
#[derive(Debug, Default)]
pub(super) struct Activations {
    data: Vec<Row>,
    rows: usize,
    panels: usize,
}

impl Activations {
    /// Takes the shape given; the contents are unspecified until written.
    pub(super) fn reshape(&mut self, rows: usize, columns: usize) {
        (self.rows, self.panels) = (rows, columns.div_ceil(PANEL));
        self.data.resize(self.rows * self.panels, Row::ZERO);
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// One panel: `rows` rows.
    pub(super) fn panel(&self, panel: usize) -> &[Row] {
        &self.data[panel * self.rows..][..self.rows]
    }

    pub(super) fn data_mut(&mut self) -> &mut [Row] {
        &mut self.data
    }

    pub(super) fn left(&self) -> Left<'_> {
        Left { panels: &self.data, rows: self.rows }
    }

    /// Copies columns `first..first + out.len()` of a row.
    pub(super) fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let mut done = 0;
        while done < out.len() {
            let (panel, column) = ((first + done) / PANEL, (first + done) % PANEL);
            let count = (PANEL - column).min(out.len() - done);
            out[done..done + count]
                .copy_from_slice(&self.data[panel * self.rows + row].0[column..column + count]);
            done += count;
        }
    }

    /// Overwrites a row; the columns past its end become zero.
    pub(super) fn write(&mut self, row: usize, values: &[f32]) {
        for (panel, part) in values.chunks(PANEL).enumerate() {
            let Row(out) = &mut self.data[panel * self.rows + row];
            out[..part.len()].copy_from_slice(part);
            out[part.len()..].fill(0.0);
        }
    }
}

/// A weight matrix, packed once at load: panels of output columns, each `[depth][width]`.
#[derive(Debug)]
pub(super) struct Weights {
    lines: Vec<Line>,
    format: Format,
    depth: usize,
    columns: usize,
}

/// Rows of a weight tensor as a checkpoint stores it: one row of `depth` numbers per output column.
pub(super) enum Source<'a> {
    F32(&'a [f32]),
    /// Little-endian bits.
    Bf16(&'a [u16]),
}

impl Weights {
    /// An all-zero matrix to be filled by [`Self::put`].
    pub(super) fn new(format: Format, depth: usize, columns: usize) -> Self {
        let mut weights = Self { lines: Vec::new(), format, depth, columns };
        let lines = (0..weights.panels()).map(|panel| weights.panel_lines(panel)).sum();
        weights.lines = vec![Line::ZERO; lines];
        weights
    }

    /// Bytes a product reads.
    pub(super) fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn panels(&self) -> usize {
        self.columns.div_ceil(PANEL)
    }

    /// The last panel is half as wide when that is enough.
    fn width(&self, panel: usize) -> usize {
        if self.columns - panel * PANEL <= PANEL / 2 { PANEL / 2 } else { PANEL }
    }

    fn panel_lines(&self, panel: usize) -> usize {
        self.depth * self.format.lines(self.width(panel))
    }

    /// Start of a panel: all before it are full.
    fn panel_start(&self, panel: usize) -> usize {
        panel * self.depth * self.format.lines(PANEL)
    }

    pub(super) fn panel(&self, panel: usize) -> Panel<'_> {
        Panel {
            lines: &self.lines[self.panel_start(panel)..][..self.panel_lines(panel)],
            format: self.format,
            depth: self.depth,
            width: self.width(panel),
        }
    }

    /// Packs `source` into the columns from `first` on, on all threads.
    pub(super) fn put(&mut self, team: &Team, first: usize, source: &Source<'_>) {
        let depth = self.depth;
        let count = match source {
            Source::F32(rows) => rows.len() / depth,
            Source::Bf16(rows) => rows.len() / depth,
        };
        assert!(first + count <= self.columns, "columns {first}..{} of {}", first + count, self.columns);
        let widths: Vec<usize> = (0..self.panels()).map(|panel| self.width(panel)).collect();
        let format = self.format;
        let chunk = depth * format.lines(PANEL);
        team.chunks(&mut self.lines, chunk, depth * PANEL, |panel, lines| {
            let per_k = format.lines(widths[panel]);
            let from = (panel * PANEL).max(first);
            let to = (panel * PANEL + widths[panel]).min(first + count);
            for column in from..to {
                let row = (column - first) * depth..(column - first + 1) * depth;
                let at = Lane::of(format, column % PANEL);
                match source {
                    Source::F32(rows) => {
                        for (k, value) in rows[row].iter().enumerate() {
                            at.set(&mut lines[k * per_k + at.line], value.to_bits());
                        }
                    }
                    Source::Bf16(rows) => {
                        for (k, bits) in rows[row].iter().enumerate() {
                            at.set(&mut lines[k * per_k + at.line], u32::from(u16::from_le(*bits)) << 16);
                        }
                    }
                }
            }
        });
    }

    /// Copies the weights of one output column: `depth` numbers.
    pub(super) fn column(&self, column: usize, out: &mut [f32]) {
        let panel = self.panel(column / PANEL);
        let per_k = self.format.lines(panel.width);
        let at = Lane::of(self.format, column % PANEL);
        for (value, lines) in out.iter_mut().zip(panel.lines.chunks_exact(per_k)) {
            *value = f32::from_bits(at.get(&lines[at.line]));
        }
    }
}

/// Where a column lies among the lines of one `k`.
#[derive(Clone, Copy)]
struct Lane {
    line: usize,
    word: usize,
    shift: u32,
    mask: u32,
}

impl Lane {
    fn of(format: Format, column: usize) -> Self {
        match format {
            Format::F32 => Self { line: column / 16, word: column % 16, shift: 0, mask: !0 },
            Format::Bf16 => {
                let high = column / 16 % 2 == 1;
                Self {
                    line: column / 32,
                    word: column % 16,
                    shift: if high { 0 } else { 16 },
                    mask: if high { 0xffff_0000 } else { 0xffff },
                }
            }
        }
    }

    fn set(self, line: &mut Line, bits: u32) {
        let word = &mut line.0[self.word];
        *word = *word & !self.mask | bits >> self.shift & self.mask;
    }

    fn get(self, line: &Line) -> u32 {
        (line.0[self.word] & self.mask) << self.shift
    }
}

/// `out = left x weights` on all threads.
pub(super) fn multiply(team: &Team, isa: Isa, left: &Activations, weights: &Weights, out: &mut Activations) {
    multiply_then(team, left, weights.depth, weights.panels(), out, |panel, first, rows| {
        isa.multiply(left.left(), first, weights.panel(panel), rows);
    });
}

/// Runs `body(panel, first row, rows)` for pieces of the panels of `out`, on all threads.
pub(super) fn multiply_then(
    team: &Team,
    left: &Activations,
    depth: usize,
    panels: usize,
    out: &mut Activations,
    body: impl Fn(usize, usize, &mut [Row]) + Sync,
) {
    let rows = left.rows();
    out.reshape(rows, panels * PANEL);
    if rows == 0 {
        return;
    }
    // Few panels and many rows: cut the rows too, so that every thread has several pieces.
    let cuts = if panels >= 4 * team.threads() { 1 } else { (rows / 48).clamp(1, 4) };
    let piece = rows.div_ceil(cuts);
    let mut pieces: Vec<(usize, usize, &mut [Row])> = Vec::with_capacity(panels * cuts);
    for (panel, data) in out.data_mut().chunks_mut(rows).enumerate() {
        pieces.extend(data.chunks_mut(piece).enumerate().map(|(i, rows)| (panel, i * piece, rows)));
    }
    // Reading the weights costs as much as about four rows of arithmetic.
    team.each(&mut pieces, (piece + 4) * depth * PANEL, |_, (panel, first, rows)| body(*panel, *first, rows));
}

#[cfg(test)]
mod tests;
