//! What the machine could do at most.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::kernel::{Format, Isa, Left, Line, PANEL, Panel, Row};

/// How long each limit is measured.
const TIME: Duration = Duration::from_millis(500);

/// Bytes read by each thread to measure memory: more than caches hold.
const READ_BYTES: usize = 128 << 20;

/// The machine's limits for a number of threads, measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Arithmetic of the matrix kernels on operands in the first-level cache; a multiply-add counts two.
    pub flops_per_second: f64,
    /// Reading memory from end to end.
    pub bytes_per_second: f64,
}

impl Limits {
    /// Measures for about a second, on `threads` threads at once.
    pub fn measure(threads: usize) -> Self {
        let threads = threads.max(1);
        let isa = Isa::best();
        let together = |work: fn(Isa) -> f64| {
            std::thread::scope(|scope| {
                let handles: Vec<_> = (0..threads).map(|_| scope.spawn(move || work(isa))).collect();
                handles.into_iter().map(|handle| handle.join().unwrap_or(0.0)).sum()
            })
        };
        Self { flops_per_second: together(arithmetic), bytes_per_second: together(reading) }
    }
}

/// The best rate of `work`, which does `amount` each time.
fn best_rate(amount: usize, mut work: impl FnMut()) -> f64 {
    let started = Instant::now();
    let mut best = f64::MAX;
    while started.elapsed() < TIME {
        let now = Instant::now();
        work();
        best = best.min(now.elapsed().as_secs_f64());
    }
    amount as f64 / best
}

fn arithmetic(isa: Isa) -> f64 {
    const ROWS: usize = 12;
    const REPEATS: usize = 64;
    let left = [Row([1.0; PANEL]); ROWS];
    let lines = [Line([0x3f80_0000; 16]); PANEL * PANEL / 16];
    let mut out = [Row::ZERO; ROWS];
    let panel = Panel { lines: &lines, format: Format::F32, depth: PANEL, width: PANEL };
    best_rate(2 * REPEATS * ROWS * PANEL * PANEL, || {
        for _ in 0..REPEATS {
            isa.multiply(Left { panels: black_box(&left), rows: ROWS }, 0, panel, &mut out);
            black_box(&out);
        }
    })
}

/// One row of activations against a panel far larger than the caches: what a decode step of one sequence
/// does.
fn reading(isa: Isa) -> f64 {
    const DEPTH: usize = READ_BYTES / size_of::<f32>() / PANEL;
    let left = vec![Row([1.0; PANEL]); DEPTH / PANEL];
    let lines = vec![Line([0x3f80_0000; 16]); READ_BYTES / size_of::<Line>()];
    let mut out = [Row::ZERO];
    let panel = Panel { lines: &lines, format: Format::F32, depth: DEPTH, width: PANEL };
    best_rate(READ_BYTES, || {
        isa.multiply(Left { panels: black_box(&left), rows: 1 }, 0, panel, &mut out);
        black_box(&out);
    })
}
