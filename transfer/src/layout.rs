//! Loop nests merged to the longest contiguous runs.
//!
//! The bytes of a KV block follow from five strides (see `docs/kv-layout.md`), so a copy between two blocks is never a
//! list of runs: it is a [`Nest`] of at most four loops around one run, worked out in nanoseconds however many layers
//! there are.

/// One loop of a [`Nest`]: `count` steps of `source` and `dest` numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Axis {
    /// Steps.
    pub count: usize,
    /// Numbers from one step to the next at the source.
    pub source: usize,
    /// Numbers from one step to the next at the destination.
    pub dest: usize,
}

/// The loop that does nothing but run its body once.
const ONCE: Axis = Axis { count: 1, source: 0, dest: 0 };

/// Most loops around a run: layers, keys and values, heads, tokens.
pub const AXES: usize = 4;

/// Contiguous runs that carry one piece of a source block into one destination block.
///
/// Runs come in the order of the source, which is measurably faster than that of the destination (processors prefetch
/// reads, and buffer writes), and are as long as both sides allow: a loop whose step is the length of
/// the run on both sides has become part of the run. Units: numbers from the start of the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nest {
    source: usize,
    dest: usize,
    run: usize,
    axes: [Axis; AXES],
}

impl Nest {
    /// The nest of `axes` (in any order) around runs of `run` numbers that start at `source` and `dest`.
    pub fn new(source: usize, dest: usize, run: usize, axes: [Axis; AXES]) -> Self {
        let mut sorted = axes;
        sorted.sort_unstable_by_key(|axis| axis.source);
        let mut run = run;
        let mut merged = [ONCE; AXES];
        let mut used = 0;
        for axis in sorted.into_iter().filter(|axis| axis.count != 1) {
            if used == 0 && axis.source == run && axis.dest == run {
                run *= axis.count;
                continue;
            }
            let inner = merged[..used].last_mut();
            match inner {
                Some(inner)
                    if axis.source == inner.source * inner.count && axis.dest == inner.dest * inner.count =>
                {
                    inner.count *= axis.count;
                }
                _ => {
                    merged[used] = axis;
                    used += 1;
                }
            }
        }
        Self { source, dest, run, axes: merged }
    }

    /// Numbers per run.
    pub fn run_len(&self) -> usize {
        self.run
    }

    /// Number of runs.
    pub fn runs(&self) -> usize {
        self.axes.iter().map(|axis| axis.count).product()
    }

    /// Calls `each(source, dest)` with the start of every run.
    #[inline]
    pub fn for_each(&self, mut each: impl FnMut(usize, usize)) {
        let [inner, second, third, outer] = self.axes;
        for o in 0..outer.count {
            let (source, dest) = (self.source + o * outer.source, self.dest + o * outer.dest);
            for t in 0..third.count {
                let (source, dest) = (source + t * third.source, dest + t * third.dest);
                for s in 0..second.count {
                    let (source, dest) = (source + s * second.source, dest + s * second.dest);
                    for i in 0..inner.count {
                        each(source + i * inner.source, dest + i * inner.dest);
                    }
                }
            }
        }
    }
}
