use super::*;

/// Numbers of mixed size and sign from a small generator.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 4.0
        })
        .collect()
}

struct Case {
    left: Vec<Row>,
    rows: usize,
    lines: Vec<Line>,
    format: Format,
    depth: usize,
    width: usize,
}

impl Case {
    fn new(seed: u64, rows: usize, depth: usize, width: usize, format: Format) -> Self {
        let panels = depth.div_ceil(PANEL);
        let left = numbers(seed, panels * rows * PANEL).as_chunks().0.iter().map(|row| Row(*row)).collect();
        let bits = |x: f32| if format == Format::Bf16 { x.to_bits() >> 16 } else { x.to_bits() };
        let mut weights = numbers(seed + 1, depth * width * 2).into_iter().map(bits);
        let lines = (0..depth * format.lines(width))
            .map(|_| {
                Line(std::array::from_fn(|_| {
                    let low = weights.next().unwrap();
                    if format == Format::Bf16 { low | weights.next().unwrap() << 16 } else { low }
                }))
            })
            .collect();
        Self { left, rows, lines, format, depth, width }
    }

    fn run(&self, isa: Isa, first: usize, rows: usize) -> Vec<Row> {
        let mut out = vec![Row([7.0; PANEL]); rows];
        let left = Left { panels: &self.left, rows: self.rows };
        let Self { lines, format, depth, width, .. } = self;
        isa.multiply(left, first, Panel { lines, format: *format, depth: *depth, width: *width }, &mut out);
        out
    }

    fn weight(&self, k: usize, column: usize) -> f32 {
        let per_k = self.format.lines(self.width);
        match self.format {
            Format::F32 => f32::from_bits(self.lines[k * per_k + column / 16].0[column % 16]),
            Format::Bf16 => {
                let word = self.lines[k * per_k + column / 32].0[column % 16];
                f32::from_bits(if (column / 16).is_multiple_of(2) { word << 16 } else { word & 0xffff_0000 })
            }
        }
    }

    /// The definition in the module's first rule, one number at a time.
    fn defined(&self, row: usize, column: usize) -> f32 {
        let mut total: Option<f32> = None;
        for start in (0..self.depth).step_by(BLOCK_DEPTH) {
            let mut sum = 0.0_f32;
            for k in start..self.depth.min(start + BLOCK_DEPTH) {
                let x = self.left[k / PANEL * self.rows + row].0[k % PANEL];
                sum = x.mul_add(self.weight(k, column), sum);
            }
            total = Some(total.map_or(sum, |total| total + sum));
        }
        total.unwrap_or(0.0)
    }
}

#[test]
fn every_instruction_set_computes_the_definition_to_the_bit() {
    for format in [Format::F32, Format::Bf16] {
        for width in [32, 64] {
            for (rows, depth) in
                [(1, 1), (2, 64), (3, 65), (4, 127), (5, 128), (6, 129), (7, 256), (13, 300), (32, 80)]
            {
                let case = Case::new(rows as u64, rows, depth, width, format);
                for isa in Isa::all() {
                    let out = case.run(isa, 0, rows);
                    for (row, out) in out.iter().enumerate() {
                        for (column, value) in out.0[..width].iter().enumerate() {
                            let expected = case.defined(row, column);
                            assert_eq!(
                                value.to_bits(),
                                expected.to_bits(),
                                "{} {format:?} width {width} rows {rows} depth {depth}: ({row}, {column}) is {value}, not {expected}",
                                isa.name()
                            );
                        }
                        assert!(out.0[width..].iter().all(|x| *x == 0.0), "columns past the panel are zero");
                    }
                }
            }
        }
    }
}

#[test]
fn plain_rows_on_the_right() {
    for (rows, depth, width, stride) in
        [(1, 1, 16, 16), (3, 64, 48, 48), (6, 37, 64, 72), (7, 128, 32, 100), (14, 65, 48, 50)]
    {
        let case = Case::new(rows as u64, rows, depth, 64, Format::F32);
        let mut values = vec![f32::NAN; (depth - 1) * stride + width];
        for k in 0..depth {
            for column in 0..width {
                values[k * stride + column] = case.weight(k, column);
            }
        }
        for isa in Isa::all() {
            let mut out = vec![Row([7.0; PANEL]); rows];
            let left = Left { panels: &case.left, rows };
            isa.multiply_rows(left, 0, Rows { values: &values, stride, depth, width }, &mut out);
            for (row, out) in out.iter().enumerate() {
                for (column, value) in out.0.iter().enumerate() {
                    let expected = if column < width { case.defined(row, column) } else { 0.0 };
                    assert_eq!(
                        value.to_bits(),
                        expected.to_bits(),
                        "{} {rows} x {depth} x {width}",
                        isa.name()
                    );
                }
            }
        }
    }
}

#[test]
fn a_part_of_the_rows_has_the_bits_of_the_whole() {
    for format in [Format::F32, Format::Bf16] {
        let case = Case::new(5, 17, 200, 64, format);
        for isa in Isa::all() {
            let whole = case.run(isa, 0, 17);
            for (first, rows) in [(0, 1), (16, 1), (3, 9), (10, 7)] {
                assert_eq!(case.run(isa, first, rows), whole[first..first + rows], "{}", isa.name());
            }
        }
    }
}

#[test]
fn transposing_sixteen_rows() {
    for depth in [2, 16, 24, 64, 80, 128] {
        let rows = numbers(depth as u64, 16 * depth);
        for isa in Isa::all() {
            let mut columns = vec![Line::ZERO; depth * 4];
            isa.transpose16(&rows, depth, &mut columns[1..], 4);
            for d in 0..depth {
                for i in 0..16 {
                    assert_eq!(
                        columns[d * 4 + 1].0[i],
                        rows[i * depth + d].to_bits(),
                        "{} depth {depth}",
                        isa.name()
                    );
                }
                assert_eq!(columns[d * 4], Line::ZERO, "neighbours untouched");
            }
        }
    }
}

#[test]
#[should_panic(expected = "a panel holds depth x width numbers")]
fn a_short_panel_is_refused_before_any_pointer_is_made() {
    let mut case = Case::new(1, 2, 64, 64, Format::F32);
    case.lines.pop();
    case.run(Isa::best(), 0, 2);
}
