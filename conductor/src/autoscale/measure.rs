//! What the workers of a pool say, added up: how long prompts wait, how much work comes in, how full the caches are.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use baton_config::{Epoch, WorkerId};
use tokio::time::Instant;

use crate::record::WorkerState;

/// What a worker said about itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sample {
    pub(crate) at: Instant,
    pub(crate) running: u32,
    pub(crate) waiting: u32,
    /// Prompt tokens not computed yet.
    pub(crate) pending_tokens: u64,
    /// Prompt tokens computed in this life.
    pub(crate) prefilled_tokens: u64,
    /// Prompt tokens a request brings.
    pub(crate) prompt_tokens: Option<f64>,
    pub(crate) prefill_tokens_per_s: Option<f64>,
    pub(crate) itl_ms: Option<f64>,
    pub(crate) blocks: u32,
    /// Blocks that requests hold.
    pub(crate) blocks_held: u32,
}

/// A worker as the autoscaler sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct WorkerInput {
    pub(crate) worker: WorkerId,
    pub(crate) epoch: Epoch,
    pub(crate) state: WorkerState,
    /// `None` when it has not answered lately.
    pub(crate) sample: Option<Sample>,
}

/// Workers of a pool by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counts {
    pub(crate) ready: u32,
    pub(crate) joining: u32,
    pub(crate) draining: u32,
    /// Ready ones that have not answered lately.
    pub(crate) silent: u32,
}

/// A pool at one moment, or the mean of several.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Measure {
    /// Seconds that the prompt tokens waiting take at the measured speed; `None` while no speed is known.
    pub(crate) wait_s: Option<f64>,
    /// Workers that the prompts coming in keep busy.
    pub(crate) prefill_demand: f64,
    /// Seconds that a typical prompt takes to compute.
    pub(crate) typical_s: Option<f64>,
    /// KV blocks held, and those that waiting requests will hold.
    pub(crate) kv_demand: f64,
    /// KV blocks of one worker.
    pub(crate) kv_blocks: f64,
    /// Streams.
    pub(crate) running: f64,
    /// Mean time between tokens, while there are streams.
    pub(crate) itl_ms: Option<f64>,
}

impl Demand {
    pub(super) fn max(&self, other: &Self) -> Self {
        Self {
            prefill: self.prefill.max(other.prefill),
            kv: self.kv.max(other.kv),
            streams: self.streams.max(other.streams),
        }
    }

    /// Whether nothing of it is more than half of `peak`.
    pub(super) fn is_half_of(&self, peak: &Self) -> bool {
        let half = |now: f64, peak: f64| now <= peak / 2.0;
        half(self.prefill, peak.prefill) && half(self.kv, peak.kv) && half(self.streams, peak.streams)
    }
}

/// Adds up what the workers of one pool say, moment by moment.
#[derive(Debug, Default)]
pub(super) struct Meter {
    before: BTreeMap<WorkerId, (Epoch, Sample)>,
    speed: Option<f64>,
    window: VecDeque<(Instant, Measure)>,
    since: Option<Instant>,
    ready: u32,
    slow: Option<(Instant, Demand)>,
    pub(super) itl_by_batch: Line,
}

/// The load of a pool in units that do not depend on the number of workers, averaged over a long time.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Demand {
    pub(super) prefill: f64,
    pub(super) kv: f64,
    pub(super) streams: f64,
}

impl Meter {
    /// Takes in one moment; keeps those of the last `window`. The slow mean forgets over `long`.
    pub(super) fn add(
        &mut self,
        now: Instant,
        (window, long): (Duration, Duration),
        workers: &[WorkerInput],
    ) -> Counts {
        let counts = count(workers);
        if counts.ready != self.ready {
            // What others measured before says little about what these will.
            self.restart(now);
            self.ready = counts.ready;
        }
        self.since.get_or_insert(now);
        let ready: Vec<(&WorkerInput, Sample)> = workers
            .iter()
            .filter(|worker| worker.state == WorkerState::Ready)
            .filter_map(|worker| Some((worker, worker.sample?)))
            .collect();
        if !ready.is_empty() {
            let measure = self.measure(&ready, counts.ready);
            if let (Some(itl), true) = (measure.itl_ms, measure.running > 0.0) {
                self.itl_by_batch.add(measure.running / f64::from(counts.ready.max(1)), itl);
            }
            self.window.push_back((now, measure));
            self.average(now, long, &measure);
        }
        while self.window.len() > 1 && self.window.front().is_some_and(|(at, _)| *at + window < now) {
            self.window.pop_front();
        }
        self.before = ready.iter().map(|(w, sample)| (w.worker.clone(), (w.epoch, *sample))).collect();
        counts
    }

    /// Forgets the moments before, because something has changed.
    pub(super) fn restart(&mut self, now: Instant) {
        self.window.clear();
        self.since = Some(now);
    }

    /// Since when what is measured has been measured under the same conditions.
    pub(super) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// The load over a long time.
    pub(super) fn demand(&self) -> Demand {
        self.slow.map_or(Demand::default(), |(_, demand)| demand)
    }

    fn average(&mut self, now: Instant, long: Duration, measure: &Measure) {
        let fresh =
            Demand { prefill: measure.prefill_demand, kv: measure.kv_demand, streams: measure.running };
        let Some((at, old)) = self.slow else {
            self.slow = Some((now, fresh));
            return;
        };
        let keep = (-now.duration_since(at).as_secs_f64() / long.as_secs_f64().max(1e-3)).exp();
        let mix = |old: f64, fresh: f64| old * keep + fresh * (1.0 - keep);
        let mixed = Demand {
            prefill: mix(old.prefill, fresh.prefill),
            kv: mix(old.kv, fresh.kv),
            streams: mix(old.streams, fresh.streams),
        };
        self.slow = Some((now, mixed));
    }

    /// The latest moment.
    pub(super) fn latest(&self) -> Option<Measure> {
        self.window.back().map(|(_, measure)| *measure)
    }

    /// The mean of the window.
    pub(super) fn mean(&self) -> Option<Measure> {
        let of = |value: fn(&Measure) -> Option<f64>| {
            let values = || self.window.iter().filter_map(|(_, measure)| value(measure));
            let count = values().count();
            (count > 0).then(|| values().sum::<f64>() / count as f64)
        };
        self.latest()?;
        Some(Measure {
            wait_s: of(|m| m.wait_s),
            prefill_demand: of(|m| Some(m.prefill_demand)).unwrap_or_default(),
            typical_s: of(|m| m.typical_s),
            kv_demand: of(|m| Some(m.kv_demand)).unwrap_or_default(),
            kv_blocks: of(|m| Some(m.kv_blocks)).unwrap_or_default(),
            running: of(|m| Some(m.running)).unwrap_or_default(),
            itl_ms: of(|m| m.itl_ms),
        })
    }

    /// `answered` are the workers that spoke; what they say stands for all `ready` ones.
    fn measure(&mut self, answered: &[(&WorkerInput, Sample)], ready: u32) -> Measure {
        let share = f64::from(ready) / answered.len() as f64;
        let samples = || answered.iter().map(|(_, sample)| sample);
        self.speed = mean(samples().filter_map(|s| s.prefill_tokens_per_s)).or(self.speed);
        let pending: u64 = samples().map(|s| s.pending_tokens).sum();
        let speed_of_all = self.speed.map(|speed| speed * answered.len() as f64);
        let wait_s = match speed_of_all {
            Some(speed) => Some(pending as f64 / speed),
            None => (pending == 0).then_some(0.0),
        };
        let (held, waiting, running) = samples().fold((0.0, 0.0, 0.0), |(held, waiting, running), s| {
            (held + f64::from(s.blocks_held), waiting + f64::from(s.waiting), running + f64::from(s.running))
        });
        let per_request = if running > 0.0 { (held / running).max(1.0) } else { 1.0 };
        let streams = samples().filter(|s| s.running > 0);
        let itl = streams.filter_map(|s| Some((s.itl_ms?, f64::from(s.running))));
        let (sum, weight) =
            itl.fold((0.0, 0.0), |(sum, all), (itl, weight)| (sum + itl * weight, all + weight));
        Measure {
            wait_s,
            prefill_demand: self.speed.map_or(0.0, |speed| self.arriving(answered) / speed) * share,
            typical_s: self
                .speed
                .and_then(|speed| Some(mean(samples().filter_map(|s| s.prompt_tokens))? / speed)),
            kv_demand: (held + waiting * per_request) * share,
            kv_blocks: mean(samples().map(|s| f64::from(s.blocks))).unwrap_or_default(),
            running: running * share,
            itl_ms: (weight > 0.0).then(|| sum / weight),
        }
    }

    /// Prompt tokens that came in per second since the moment before.
    fn arriving(&self, answered: &[(&WorkerInput, Sample)]) -> f64 {
        let rate = |(input, now): &(&WorkerInput, Sample)| {
            let (epoch, before) = self.before.get(&input.worker)?;
            let seconds = now.at.saturating_duration_since(before.at).as_secs_f64();
            let computed = now.prefilled_tokens.checked_sub(before.prefilled_tokens)?;
            let pending = now.pending_tokens as f64 - before.pending_tokens as f64;
            let same = *epoch == input.epoch && seconds > 0.0;
            same.then(|| (computed as f64 + pending) / seconds)
        };
        answered.iter().filter_map(rate).sum::<f64>().max(0.0)
    }
}

fn count(workers: &[WorkerInput]) -> Counts {
    let of = |state| workers.iter().filter(move |worker| worker.state == state);
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Counts {
        ready: number(of(WorkerState::Ready).count()),
        joining: number(of(WorkerState::Joining).count()),
        draining: number(of(WorkerState::Draining).count()),
        silent: number(of(WorkerState::Ready).filter(|worker| worker.sample.is_none()).count()),
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    (count > 0.0).then(|| sum / count)
}

/// Weight that a point of [`Line`] loses with each one after it.
const FADE: f64 = 0.98;

/// A straight line through points, of which older ones count less.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    pub(super) fn add(&mut self, x: f64, y: f64) {
        let fade = |sum: f64, value: f64| sum * FADE + value;
        self.weight = fade(self.weight, 1.0);
        (self.x, self.y) = (fade(self.x, x), fade(self.y, y));
        (self.xx, self.xy) = (fade(self.xx, x * x), fade(self.xy, x * y));
    }

    /// Height at 0 and slope, once the points lie far enough apart to tell, and the line rises from above 0.
    pub(super) fn fit(&self) -> Option<(f64, f64)> {
        let (mx, my) = (self.x / self.weight, self.y / self.weight);
        let spread = self.xx / self.weight - mx * mx;
        // Points within a fifth of their mean say nothing about a slope.
        if self.weight < 3.0 || spread.sqrt() < 0.2 * mx {
            return None;
        }
        let slope = (self.xy / self.weight - mx * my) / spread;
        let base = my - slope * mx;
        (slope > 0.0 && base > 0.0).then_some((base, slope))
    }
}
