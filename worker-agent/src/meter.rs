//! Decaying means of what this worker measures about itself.

/// Weight of a new sample once the mean has settled.
const WEIGHT: f64 = 0.2;

/// A mean in which old samples fade.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mean {
    value: Option<f64>,
}

impl Mean {
    /// Takes a sample; anything but a finite number is ignored.
    pub fn add(&mut self, sample: f64) {
        if sample.is_finite() {
            self.value = Some(self.value.map_or(sample, |mean| mean + WEIGHT * (sample - mean)));
        }
    }

    /// The mean, once there was a sample.
    pub fn get(&self) -> Option<f64> {
        self.value
    }
}

/// How quickly a floor forgets: a path that has become slower counts as such after some dozens of samples.
const RISE: f64 = 0.02;

/// About the least of the recent samples: what something takes when nothing else is in its way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Floor {
    value: Option<f64>,
}

impl Floor {
    /// Takes a sample; anything but a finite number is ignored.
    pub fn add(&mut self, sample: f64) {
        if sample.is_finite() {
            let rise = |floor: f64| if sample < floor { sample } else { floor + RISE * (sample - floor) };
            self.value = Some(self.value.map_or(sample, rise));
        }
    }

    /// The floor, once there was a sample.
    pub fn get(&self) -> Option<f64> {
        self.value
    }
}

/// What decides whether moving a prompt's KV is worth it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// Prompt tokens this worker prefills per second.
    pub prefill_tokens_per_s: f64,
    /// Bytes per second of the path to the peer.
    pub bytes_per_s: f64,
    /// KV bytes of one token.
    pub bytes_per_token: f64,
    /// Seconds a handoff costs besides moving bytes: messages both ways and the first byte of a read.
    pub overhead_s: f64,
}

/// Largest answer of [`local_below`]: longer prompts are worth a prefill worker whatever the link.
pub const LOCAL_MAX_TOKENS: u32 = 4096;

/// The number of missing tokens below which prefilling them here takes no longer than fetching them.
///
/// Computing `n` tokens takes `n / prefill_tokens_per_s`, fetching them `overhead_s + n * bytes_per_token / bytes_per_s`.
/// The peer's own compute is not counted: it is what the handoff takes off this worker. Without a measurement of both
/// sides the answer is 0: everything is fetched, and thereby measured.
pub fn local_below(costs: &Costs) -> u32 {
    let per_token = 1.0 / costs.prefill_tokens_per_s - costs.bytes_per_token / costs.bytes_per_s;
    if !per_token.is_finite() || !costs.overhead_s.is_finite() || costs.overhead_s < 0.0 {
        return 0;
    }
    if per_token <= 0.0 {
        return LOCAL_MAX_TOKENS;
    }
    // Casting saturates: a huge quotient is the limit as well.
    ((costs.overhead_s / per_token).ceil() as u32).min(LOCAL_MAX_TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_follows_its_samples() {
        let mut mean = Mean::default();
        assert_eq!(mean.get(), None);
        mean.add(f64::NAN);
        assert_eq!(mean.get(), None, "no number, no sample");
        mean.add(10.0);
        assert_eq!(mean.get(), Some(10.0));
        for _ in 0..50 {
            mean.add(20.0);
        }
        assert!((mean.get().unwrap() - 20.0).abs() < 0.01);
    }

    #[test]
    fn a_floor_is_hardly_moved_by_a_burst_of_load() {
        let mut floor = Floor::default();
        floor.add(1.0);
        floor.add(f64::NAN);
        for _ in 0..3 {
            floor.add(10.0);
        }
        assert!(floor.get().unwrap() < 1.6);
        for _ in 0..300 {
            floor.add(10.0);
        }
        assert!(floor.get().unwrap() > 9.0, "but a slower path shows in the end");
        floor.add(2.0);
        assert_eq!(floor.get(), Some(2.0));
    }

    #[test]
    fn the_threshold_is_where_both_ways_take_equally_long() {
        let costs = Costs {
            prefill_tokens_per_s: 2_000.0,
            bytes_per_s: 1e9,
            bytes_per_token: 100_000.0,
            overhead_s: 0.004,
        };
        // 0.5 ms against 0.1 ms a token: 4 ms of overhead are won back after 10 tokens.
        assert_eq!(local_below(&costs), 10);
        assert!(
            local_below(&Costs { overhead_s: 0.04, ..costs }) == 100,
            "a slower handshake, a higher threshold"
        );
        assert!(
            local_below(&Costs { prefill_tokens_per_s: 1_000.0, ..costs }) < 10,
            "slower compute, a lower one"
        );
        assert!(local_below(&Costs { bytes_per_s: 0.5e9, ..costs }) > 10, "a slower link, a higher one");
    }

    #[test]
    fn extremes_are_bounded() {
        let costs =
            Costs { prefill_tokens_per_s: 1e6, bytes_per_s: 1e6, bytes_per_token: 1e5, overhead_s: 0.001 };
        assert_eq!(local_below(&costs), LOCAL_MAX_TOKENS, "moving is slower than computing");
        assert_eq!(local_below(&Costs { prefill_tokens_per_s: 0.0, ..costs }), 0);
        assert_eq!(local_below(&Costs { bytes_per_s: 0.0, ..costs }), 0);
        assert_eq!(local_below(&Costs { overhead_s: f64::NAN, ..costs }), 0);
    }
}
