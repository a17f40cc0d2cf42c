//! What each signal asks of a pool: more workers when it is over its target, and the least that would do.

use baton_config::fleet::Autoscale;

use super::measure::{Demand, Line, Measure};

/// Share of the time that prefill workers may be busy in a pool that shrinks: the rest takes up bursts.
const BUSY: f64 = 0.7;

/// What is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Signal {
    QueueWait,
    Ttft,
    Kv,
    Itl,
}

impl Signal {
    /// The load that it comes from.
    pub(super) fn demand(self, of: &Demand) -> f64 {
        match self {
            Self::QueueWait | Self::Ttft => of.prefill,
            Self::Kv => of.kv,
            Self::Itl => of.streams,
        }
    }
}

/// A signal with its target, as a pool with so many ready workers has it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Reading {
    pub(super) signal: Signal,
    /// What is measured, in the signal's unit.
    pub(super) value: f64,
    pub(super) target: f64,
    /// Workers that would bring it to its target.
    pub(super) wanted: f64,
    /// Workers that would keep it safely below.
    pub(super) enough: f64,
    /// Why more workers would not help.
    pub(super) futile: Option<String>,
}

impl Reading {
    /// How far over the target it is.
    pub(super) fn excess(&self) -> f64 {
        self.value / self.target
    }

    /// `queue wait 812 ms > 250 ms`.
    pub(super) fn text(&self) -> String {
        let (name, unit) = match self.signal {
            Signal::QueueWait => ("queue wait", "ms"),
            Signal::Ttft => ("predicted first token", "ms"),
            Signal::Kv => ("KV held or waited for", "%"),
            Signal::Itl => ("time between tokens", "ms"),
        };
        let sign = if self.value > self.target { '>' } else { '≤' };
        format!("{name} {:.0} {unit} {sign} {:.0} {unit}", self.value, self.target)
    }
}

/// All signals that a pool has a target for and that are known now.
pub(super) fn readings(scale: &Autoscale, ready: u32, measure: &Measure, itl: &Line) -> Vec<Reading> {
    let n = f64::from(ready.max(1));
    let keep = 1.0 - f64::from(scale.tolerance_percent) / 100.0;
    let wait = measure.wait_s.map(|wait| wait * 1e3);
    let target = &scale.target;
    let mut all = Vec::new();
    let queue = |signal, value: f64, target: f64, wait: f64, room: f64| Reading {
        signal,
        value,
        target,
        wanted: n * wait / room,
        enough: (measure.prefill_demand / BUSY).max(n * wait / (room * keep)),
        futile: None,
    };
    if let (Some(wait), Some(target)) = (wait, target.queue_wait) {
        let target = target.as_secs_f64() * 1e3;
        all.push(queue(Signal::QueueWait, wait, target, wait, target));
    }
    if let (Some(wait), Some(target)) = (wait, target.ttft) {
        let target = target.as_secs_f64() * 1e3;
        let typical = measure.typical_s.unwrap_or(0.0) * 1e3;
        let room = target - typical;
        let mut reading = queue(Signal::Ttft, wait + typical, target, wait, room.max(1.0));
        if room <= 0.0 {
            let text = format!("computing a typical prompt alone takes {typical:.0} ms of {target:.0} ms");
            (reading.enough, reading.futile) = (measure.prefill_demand / BUSY, Some(text));
        }
        all.push(reading);
    }
    if let (Some(percent), true) = (target.kv_percent, measure.kv_blocks > 0.0) {
        let share = f64::from(percent) / 100.0;
        let per_worker = measure.kv_blocks;
        all.push(Reading {
            signal: Signal::Kv,
            value: 100.0 * measure.kv_demand / (per_worker * n),
            target: f64::from(percent),
            wanted: measure.kv_demand / (per_worker * share),
            enough: measure.kv_demand / (per_worker * share * keep),
            futile: None,
        });
    }
    if let Some(target) = target.itl {
        all.push(itl_reading(measure, n, (target.as_secs_f64() * 1e3, keep), itl));
    }
    all
}

fn itl_reading(measure: &Measure, n: f64, (target, keep): (f64, f64), line: &Line) -> Reading {
    let value = measure.itl_ms.unwrap_or(0.0);
    let streams = measure.running;
    // The workers that keep a time: by the line if there is one, else as if all of the time came from the batch.
    let workers = |limit: f64| match line.fit() {
        Some((base, slope)) if limit > base => streams * slope / (limit - base),
        Some(_) => f64::INFINITY,
        None => n * value / limit,
    };
    let alone = streams / n <= 1.0;
    let futile = (value > target && alone)
        .then(|| format!("the time between tokens is {value:.0} ms with at most one stream a worker"));
    // A worker more than there are streams helps nobody.
    let most = streams.max(1.0);
    Reading {
        signal: Signal::Itl,
        value,
        target,
        wanted: workers(target).min(most),
        enough: workers(target * keep).min(most),
        futile,
    }
}

/// Whole workers, at least one; a hair above a whole number is no worker more.
pub(super) fn whole(workers: f64) -> u32 {
    // Casting saturates: what is beyond any pool is cut by its bounds.
    (workers - 1e-6).ceil().max(0.0) as u32
}
