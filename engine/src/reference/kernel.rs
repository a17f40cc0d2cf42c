//! The multiply-accumulate kernels, one per instruction set: the only module of this crate's reference
//! executor with `unsafe`.
//!
//! Every kernel computes the same function to the last bit, so that a fleet may mix machines. The rules:
//!
//! 1. One output number is `((b0 + b1) + b2) + ..`, where `b` is the sum over one block of [`BLOCK_DEPTH`]
//!    terms, and each `b` is one chain of fused multiply-adds over `k` in ascending order from `+0`. Nothing
//!    else is ever summed into it.
//! 2. A lane of a vector is one output column and never meets another lane. Row and column tiling, thread
//!    count and batch therefore cannot change a bit.
//! 3. A bf16 weight is widened to f32 exactly before it is used.
//!
//! Sums along a vector (norms, softmax) are written as plain arithmetic on arrays of [`LANES`] partial sums
//! with a fixed tree at the end and compiled once per instruction set through [`Isa::run`]: the compiler may
//! vectorise them but, as floating-point semantics are strict, not reorder them.
//!
//! ```text
//!  activations: panels of 64 columns           weights: panels of 64 (32) output columns
//!   panel 0: row 0 [64] row 1 [64] ..           panel 0: k=0 [64] k=1 [64] ..
//!   panel 1: row 0 [64] row 1 [64] ..           panel 1: k=0 [64] k=1 [64] ..
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Columns of a panel.
pub(crate) const PANEL: usize = 64;

/// Terms of one fused multiply-add chain; a multiple of [`PANEL`].
pub(crate) const BLOCK_DEPTH: usize = 128;

/// Partial sums of a sum along a row.
pub(crate) const LANES: usize = 16;

/// One row of one panel of activations: 64 numbers on a cache-line boundary.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Row(pub(crate) [f32; PANEL]);

impl Row {
    pub(crate) const ZERO: Self = Self([0.0; PANEL]);
}

/// One cache line of weights: the bits of 16 f32, or of 16 pairs of bf16 (in word `j`, the low
/// half is column `j`, the high half column `j + 16`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; 16]);

impl Line {
    pub(crate) const ZERO: Self = Self([0; 16]);
}

/// How the numbers of a weight panel are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    Bf16,
}

impl Format {
    /// Lines of one `k` of a panel that is `width` columns wide.
    pub(crate) fn lines(self, width: usize) -> usize {
        match self {
            Self::F32 => width / 16,
            Self::Bf16 => width / 32,
        }
    }
}

/// The left operand: rows of activations, `rows` to a panel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) panels: &'a [Row],
    pub(crate) rows: usize,
}

/// The right operand: one panel of weights, `depth` times `width` numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panel<'a> {
    pub(crate) lines: &'a [Line],
    pub(crate) format: Format,
    pub(crate) depth: usize,
    pub(crate) width: usize,
}

/// A right operand of plain f32 rows, one for each of `depth` terms: at most [`BLOCK_DEPTH`] of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// The first row starts here, the next one `stride` further.
    pub(crate) values: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) depth: usize,
    /// Columns, a multiple of 16.
    pub(crate) width: usize,
}

/// An instruction set this machine has. Values exist only for sets that were detected, which is what makes
/// calling their kernels sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Isa(Level);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// A piece of plain arithmetic to be compiled for each instruction set. `run` must be `#[inline(always)]` in
/// implementations.
pub(crate) trait Work {
    type Output;
    fn run(self) -> Self::Output;
}

impl Isa {
    /// The widest instruction set of this machine.
    pub(crate) fn best() -> Self {
        Self::all()[0]
    }

    /// All instruction sets of this machine that have a kernel, the widest first.
    pub(crate) fn all() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                found.push(Self(Level::Avx512));
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(Self(Level::Avx2));
            }
        }
        found.push(Self(Level::Portable));
        found
    }

    /// The name for logs.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            Level::Portable => "portable",
        }
    }

    /// Runs `work` compiled for this instruction set.
    pub(crate) fn run<W: Work>(self, work: W) -> W::Output {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a value of this level exists only where `all` detected its features.
            Level::Avx512 => unsafe { avx512::run(work) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2::run(work) },
            Level::Portable => work.run(),
        }
    }

    /// Multiplies rows `first..first + out.len()` of `left` with `panel` into the first `panel.width` columns
    /// of `out`; the others become zero.
    ///
    /// # Panics
    /// When an operand is smaller than its shape says: the kernels trust the shapes checked here.
    pub(crate) fn multiply(self, left: Left<'_>, first: usize, panel: Panel<'_>, out: &mut [Row]) {
        let Panel { lines, format, depth, width } = panel;
        assert!(width == PANEL || width == PANEL / 2, "a panel is 32 or 64 columns wide");
        let per_k = format.lines(width);
        assert_eq!(lines.len(), depth * per_k, "a panel holds depth x width numbers");
        assert!(first + out.len() <= left.rows, "rows of the left operand");
        assert!(left.panels.len() >= depth.div_ceil(PANEL) * left.rows, "panels of the left operand");
        for row in out.iter_mut() {
            row.0[if depth == 0 { 0 } else { width }..].fill(0.0);
        }
        // Widening pays once several tiles of rows use the same weights.
        let widen = format == Format::Bf16 && out.len() > 2 * self.tile_rows();
        let mut wide = if widen { Some(Box::new([Line::ZERO; BLOCK_DEPTH * PANEL / 16])) } else { None };
        for start in (0..depth).step_by(BLOCK_DEPTH) {
            let depth = BLOCK_DEPTH.min(depth - start);
            let lines = &lines[start * per_k..(start + depth) * per_k];
            let block = match &mut wide {
                None => Panel { lines, format, depth, width },
                Some(wide) => {
                    let wide = &mut wide[..2 * lines.len()];
                    self.widen(lines, wide);
                    Panel { lines: wide, format: Format::F32, depth, width }
                }
            };
            let right = Right {
                words: block.lines.as_ptr().cast(),
                stride: block.format.lines(width) * 16,
                format: block.format,
                vectors: width / LANES,
                depth,
            };
            let left = Left { panels: &left.panels[start / PANEL * left.rows..], rows: left.rows };
            // SAFETY: the rows of `left` and `out` and the lines of the block were checked above.
            unsafe { self.multiply_block(left, first, &right, start > 0, out) };
        }
    }

    /// As [`Self::multiply`], with plain rows on the right.
    ///
    /// # Panics
    /// When an operand is smaller than its shape says.
    pub(crate) fn multiply_rows(self, left: Left<'_>, first: usize, rows: Rows<'_>, out: &mut [Row]) {
        let Rows { values, stride, depth, width } = rows;
        assert!((16..=PANEL).contains(&width) && width.is_multiple_of(16), "16, 32, 48 or 64 columns");
        assert!((1..=BLOCK_DEPTH).contains(&depth), "one block of terms");
        assert!(values.len() >= (depth - 1) * stride + width, "rows of the right operand");
        assert!(first + out.len() <= left.rows, "rows of the left operand");
        assert!(left.panels.len() >= depth.div_ceil(PANEL) * left.rows, "panels of the left operand");
        for row in out.iter_mut() {
            row.0[width..].fill(0.0);
        }
        let words = values.as_ptr().cast();
        let right = Right { words, stride, format: Format::F32, vectors: width / LANES, depth };
        // SAFETY: checked above.
        unsafe { self.multiply_block(left, first, &right, false, out) };
    }

    /// One block of at most [`BLOCK_DEPTH`] terms, in tiles of at most [`Self::tile_rows`] rows.
    ///
    /// # Safety
    /// `left` must have rows `first..first + out.len()` in every panel that `right.depth` needs, and `right` be
    /// valid for its shape.
    unsafe fn multiply_block(self, left: Left<'_>, first: usize, right: &Right, add: bool, out: &mut [Row]) {
        let mut at = 0;
        while at < out.len() {
            let remaining = out.len() - at;
            // Even tiles: 7 rows are 4 + 3, since a tile of one row keeps too few chains in flight.
            let rows = remaining.div_ceil(remaining.div_ceil(self.tile_rows()));
            let left_at = left.panels[first + at..].as_ptr();
            let out = out[at..at + rows].as_mut_ptr();
            let tile = Tile { left: left_at, left_rows: left.rows, right, add, rows, out };
            match self.0 {
                // SAFETY: passed on from the caller; `rows` rows of `out` exist; the features were detected.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => unsafe { avx512::tile(&tile) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2::tile(&tile) },
                // SAFETY: as above.
                Level::Portable => unsafe { portable::tile(&tile) },
            }
            at += rows;
        }
    }

    /// Widens lines of bf16 pairs into lines of f32, columns `0..16` of each before its columns `16..32`.
    fn widen(self, pairs: &[Line], wide: &mut [Line]) {
        assert_eq!(wide.len(), 2 * pairs.len(), "two lines of f32 for a line of pairs");
        #[cfg(target_arch = "x86_64")]
        if self.0 == Level::Avx512 {
            // SAFETY: the lengths were checked above, the features were detected.
            unsafe { avx512::widen(pairs, wide.as_mut_ptr()) };
            return;
        }
        for (pairs, wide) in pairs.iter().zip(wide.as_chunks_mut::<2>().0) {
            wide[0] = Line(pairs.0.map(|pair| pair << 16));
            wide[1] = Line(pairs.0.map(|pair| pair & 0xffff_0000));
        }
    }

    /// Rows whose accumulators fit the registers of this instruction set.
    fn tile_rows(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => 6,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => 3,
            Level::Portable => 4,
        }
    }

    /// Writes `rows[i][d]` (16 rows of `stride` numbers) to `columns[d * lines_per_k]` lane `i`: a panel of
    /// keys from rows of keys.
    ///
    /// # Panics
    /// When `rows` or `columns` is too short.
    pub(crate) fn transpose16(self, rows: &[f32], depth: usize, columns: &mut [Line], lines_per_k: usize) {
        assert!(rows.len() >= 16 * depth, "16 rows");
        assert!(depth == 0 || columns.len() > (depth - 1) * lines_per_k, "a line for each number of a row");
        #[cfg(target_arch = "x86_64")]
        if self.0 == Level::Avx512 && depth.is_multiple_of(16) {
            // SAFETY: the lengths were checked above, the features were detected.
            unsafe { avx512::transpose16(rows.as_ptr(), depth, columns.as_mut_ptr(), lines_per_k) };
            return;
        }
        self.run(Transpose { rows, depth, columns, lines_per_k });
    }
}

/// Weights of one block, whatever they came from. The pointer is valid for the shape.
struct Right {
    /// `depth` rows of `vectors` times 16 f32, or half as many words of bf16 pairs.
    words: *const u32,
    /// Words from one row to the next.
    stride: usize,
    format: Format,
    /// Registers of 16 columns, 1 to 4; an even number for pairs.
    vectors: usize,
    depth: usize,
}

/// What one call of a tile kernel works on. The pointers are valid for the shapes for the length of the call.
struct Tile<'a> {
    /// Row 0 of the tile in the first panel; the next panel is `left_rows` rows further.
    left: *const Row,
    left_rows: usize,
    right: &'a Right,
    /// Whether the block's sum is added to `out` or replaces it.
    add: bool,
    rows: usize,
    out: *mut Row,
}

struct Transpose<'a> {
    rows: &'a [f32],
    depth: usize,
    columns: &'a mut [Line],
    lines_per_k: usize,
}

impl Work for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for d in 0..self.depth {
            let line = &mut self.columns[d * self.lines_per_k];
            for (i, word) in line.0.iter_mut().enumerate() {
                *word = self.rows[i * self.depth + d].to_bits();
            }
        }
    }
}

#[cfg(test)]
mod tests;
