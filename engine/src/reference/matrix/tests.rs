use super::*;

#[test]
fn packed_weights_give_their_columns_back() {
    let team = Team::start(1).unwrap();
    for format in [Format::F32, Format::Bf16] {
        for (columns, depth) in [(1, 3), (31, 7), (33, 5), (64, 64), (100, 65), (192, 2)] {
            // Small integers are exact in both formats.
            let value = |column: usize, k: usize| ((column * 7 + k * 3) % 251) as f32 - 125.0;
            let rows: Vec<f32> =
                (0..columns).flat_map(|column| (0..depth).map(move |k| value(column, k))).collect();
            let bits: Vec<u16> = rows.iter().map(|x| ((x.to_bits() >> 16) as u16).to_le()).collect();
            let mut weights = Weights::new(format, depth, columns);
            // In two parts, the second from a column inside a panel, each in one of the source formats.
            let cut = columns / 3;
            weights.put(&team, 0, &Source::F32(&rows[..cut * depth]));
            weights.put(&team, cut, &Source::Bf16(&bits[cut * depth..]));
            let mut out = vec![0.0; depth];
            for column in 0..columns {
                weights.column(column, &mut out);
                assert_eq!(out, rows[column * depth..(column + 1) * depth], "{format:?} {columns} x {depth}");
            }
        }
    }
}

#[test]
fn products_of_whole_matrices() {
    for threads in [1, 3] {
        let team = Team::start(threads).unwrap();
        let (rows, depth, columns) = (130, 150, 200);
        let a = |row: usize, k: usize| ((row * 5 + k) % 13) as f32 - 6.0;
        let b = |k: usize, column: usize| ((k * 3 + column) % 11) as f32 - 5.0;
        let mut left = Activations::default();
        left.reshape(rows, depth);
        for row in 0..rows {
            left.write(row, &(0..depth).map(|k| a(row, k)).collect::<Vec<_>>());
        }
        let packed: Vec<f32> = (0..columns).flat_map(|c| (0..depth).map(move |k| b(k, c))).collect();
        let mut weights = Weights::new(Format::F32, depth, columns);
        weights.put(&team, 0, &Source::F32(&packed));
        let mut out = Activations::default();
        team.run(|| multiply(&team, Isa::best(), &left, &weights, &mut out));
        let mut values = vec![0.0; columns];
        for row in 0..rows {
            out.read(row, 0, &mut values);
            for (column, value) in values.iter().enumerate() {
                // Integers this small are exact.
                let expected: f32 = (0..depth).map(|k| a(row, k) * b(k, column)).sum();
                assert_eq!(*value, expected, "({row}, {column}) on {threads} threads");
            }
        }
    }
}
