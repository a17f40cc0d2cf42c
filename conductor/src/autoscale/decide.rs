//! How many workers each pool should have: a function of what is seen and what is remembered, without I/O or clock.
//!
//! A pool grows as soon as a signal has been over its target for `up_after`, by as much as the excess asks for but at
//! most to twice the ready workers, and not again while some of those asked for have not come. It shrinks, by a quarter
//! at most, when fewer would have done during all of `down_after`, nobody is draining, and everybody has answered. Those
//! who never come, or never get ready, keep it from that for [`JOIN_PATIENCE`].
//! What a number of workers once did not manage is remembered: the pool does not shrink to it under the same load.
//!
//! Pools are looked at together: a pool that only prefills neither grows nor shrinks while decode has no room, because
//! then prompts wait for decode, and more prefill would only fill its own caches.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use baton_config::fleet::{Autoscale, ScalerSpec};
use baton_config::{PoolName, Role, WorkerId};
use tokio::time::Instant;

use super::measure::{Counts, Demand, Meter, WorkerInput};
use super::rules::{Reading, Signal, readings, whole};
use crate::record::WorkerState;

/// Moments are averaged over at least this long: single polls say little.
const WINDOW_MIN: Duration = Duration::from_secs(3);
/// Workers that were asked for and have not come by then are no longer waited for, whether they never joined or joined
/// and never got ready.
const JOIN_PATIENCE: Duration = Duration::from_secs(300);
/// A state without a change of the number is told once it has lasted so long.
const TELL_AFTER: Duration = Duration::from_secs(5);
/// Least time between two steps down.
const DOWN_STEP_GAP: Duration = Duration::from_secs(1);
/// A pool that grows again soon after it shrank waits so many times longer before it is trimmed again...
const FLAP_FACTOR: u32 = 4;
/// ...and again, so many times at most. A load that falls to half is followed as if nothing had been.
const FLAPS_MAX: u32 = 4;
/// A lesson is forgotten after so many times `down_after`: machines and models change.
const LESSON_LIFE: u32 = 20;
/// A leader that has not looked for so long knows nothing any more.
const GAP: Duration = Duration::from_secs(5);
/// Decode has no room when requests hold or wait for this share of its KV blocks.
const FULL: f64 = 0.9;

/// What is seen of a fleet at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inputs {
    pub(crate) pools: Vec<PoolInput>,
}

/// A pool.
#[derive(Debug, Clone)]
pub(crate) struct PoolInput {
    pub(crate) name: PoolName,
    pub(crate) role: Role,
    /// `None` for a pool that does not scale but is one of those that others depend on.
    pub(crate) scale: Option<Autoscale>,
    /// Workers by the fleet document.
    pub(crate) replicas: u32,
    /// The last decision that was written.
    pub(crate) decided: Option<u32>,
    /// What the scaler says it has been asked for, where it can tell.
    pub(crate) found: Option<u32>,
    /// What an operator wants.
    pub(crate) pinned: Option<u32>,
    pub(crate) workers: Vec<WorkerInput>,
}

/// What a decision is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The number carries on from what is there.
    Adopted,
    Up,
    Down,
    /// All is as it should be again.
    Steady,
    /// Growing would be due, but decode has no room.
    DecodeFull,
    /// Growing would be due, but the pool is as large as it may be.
    AtMax,
    /// Growing is due, and would not help.
    Futile,
    /// Nothing is known of some workers.
    Silent,
    /// An operator decides.
    Pinned,
}

impl Kind {
    /// As logs and metrics call it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Adopted => "adopted",
            Self::Up => "up",
            Self::Down => "down",
            Self::Steady => "steady",
            Self::DecodeFull => "decode_full",
            Self::AtMax => "at_max",
            Self::Futile => "futile",
            Self::Silent => "silent",
            Self::Pinned => "pinned",
        }
    }
}

/// A change of the wanted number, or of why it stays.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Decision {
    pub(crate) pool: PoolName,
    pub(crate) kind: Kind,
    pub(crate) from: u32,
    pub(crate) desired: u32,
    /// For people, with what it follows from.
    pub(crate) reason: String,
    pub(crate) counts: Counts,
}

/// What is remembered from one moment to the next, by one leader.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// So long after the first moment, workers that were there before have found back.
    warm_up: Duration,
    began: Option<Instant>,
    looked: Option<Instant>,
    pools: BTreeMap<PoolName, PoolMemory>,
}

impl Memory {
    pub(crate) fn new(warm_up: Duration) -> Self {
        Self { warm_up, ..Self::default() }
    }

    /// A decision was not written: it is taken again from what is written.
    pub(crate) fn forget(&mut self, pool: &PoolName) {
        if let Some(kept) = self.pools.get_mut(pool) {
            kept.told = None;
        }
    }
}

#[derive(Debug, Default)]
struct PoolMemory {
    meter: Meter,
    /// The least that would have done, moment by moment; a moment that a later one exceeds is left out.
    enough: VecDeque<(Instant, u32)>,
    flaps: u32,
    shrunk: Option<Instant>,
    /// The highest load since the pool last grew.
    peak: Demand,
    since: Option<Instant>,
    changed: Option<Instant>,
    /// Since when each worker has been joining; one that is away for a moment between two lives keeps its place.
    joining: BTreeMap<WorkerId, Instant>,
    /// Since when fewer are ready than were decided.
    short_since: Option<Instant>,
    over_since: Option<Instant>,
    /// The least load under which a number of workers did not manage, by signal and number.
    lessons: BTreeMap<(Signal, u32), (Instant, f64)>,
    /// Lessons whose load is still being measured.
    failures: Vec<(Instant, Signal, u32, f64)>,
    /// What was told last.
    told: Option<(u32, Kind)>,
    /// What is to be told if it lasts.
    next: Option<(Kind, Instant)>,
}

/// What a pool should do now.
struct Verdict {
    kind: Kind,
    desired: u32,
    reason: String,
}

/// Looks at the fleet and says what has changed about the wanted numbers.
pub(crate) fn decide(memory: &mut Memory, now: Instant, inputs: &Inputs) -> Vec<Decision> {
    if memory.looked.replace(now).is_some_and(|looked| now >= looked + GAP) {
        *memory = Memory { looked: Some(now), ..Memory::new(memory.warm_up) };
    }
    let began = *memory.began.get_or_insert(now);
    let warm = now >= began + memory.warm_up;
    let mut counts = BTreeMap::new();
    for pool in &inputs.pools {
        let kept = memory.pools.entry(pool.name.clone()).or_default();
        let scale = pool.scale.as_ref();
        let window = scale.map_or(WINDOW_MIN, |scale| scale.up_after.max(WINDOW_MIN));
        let long = scale.map_or(WINDOW_MIN, |scale| scale.down_after);
        counts.insert(&pool.name, kept.meter.add(now, (window, long), &pool.workers));
        kept.note_joining(now, &pool.workers);
    }
    let full = decode_full(memory, inputs, &counts);
    let elsewhere = Elsewhere::of(memory, inputs);
    let mut decisions = Vec::new();
    for pool in &inputs.pools {
        let (Some(scale), Some(counts)) = (&pool.scale, counts.get(&pool.name)) else { continue };
        let Some(kept) = memory.pools.get_mut(&pool.name) else { continue };
        // Whoever adopts a pool too early would take the workers that are not back yet for unwanted.
        let asks = matches!(scale.scaler, ScalerSpec::Kubernetes(_)) && !scale.dry_run;
        if pool.decided.is_none() && (!warm || (asks && pool.found.is_none())) {
            continue;
        }
        let full = full.as_deref().filter(|_| pool.role == Role::Prefill);
        let case = Case { pool, scale, counts: *counts, now, full, elsewhere };
        let verdict = case.verdict(kept);
        decisions.extend(kept.tell(&case, verdict));
    }
    decisions
}

/// Why decode has no room for more, if so.
fn decode_full(memory: &Memory, inputs: &Inputs, counts: &BTreeMap<&PoolName, Counts>) -> Option<String> {
    let (mut demand, mut blocks, mut names) = (0.0, 0.0, Vec::new());
    for pool in inputs.pools.iter().filter(|pool| pool.role.decodes()) {
        let mean = memory.pools.get(&pool.name).and_then(|kept| kept.meter.mean());
        let (Some(mean), Some(counts)) = (mean, counts.get(&pool.name)) else { continue };
        demand += mean.kv_demand;
        blocks += mean.kv_blocks * f64::from(counts.ready);
        names.push(pool.name.as_str());
    }
    let percent = 100.0 * demand / blocks;
    let full = blocks > 0.0 && demand >= FULL * blocks;
    full.then(|| {
        format!("decode has no room: {percent:.0} % of the KV of {} held or waited for", names.join(", "))
    })
}

/// One pool at one moment.
struct Case<'a> {
    pool: &'a PoolInput,
    scale: &'a Autoscale,
    counts: Counts,
    now: Instant,
    full: Option<&'a str>,
    elsewhere: Elsewhere,
}

/// How loaded the fullest pool is: all there is to know for one that was scaled to nothing.
#[derive(Debug, Clone, Copy, Default)]
struct Elsewhere {
    wait_ms: f64,
    kv_percent: f64,
}

impl Elsewhere {
    fn of(memory: &Memory, inputs: &Inputs) -> Self {
        let means = inputs.pools.iter().filter_map(|pool| {
            let mean = memory.pools.get(&pool.name)?.meter.mean()?;
            let ready = pool.workers.iter().filter(|worker| worker.state == WorkerState::Ready).count();
            let blocks = (mean.kv_blocks * ready as f64).max(1.0);
            let decodes = f64::from(u8::from(pool.role.decodes()));
            Some((mean.wait_s.unwrap_or(0.0) * 1e3, decodes * 100.0 * mean.kv_demand / blocks))
        });
        means.fold(Self::default(), |most, (wait_ms, kv_percent)| Self {
            wait_ms: most.wait_ms.max(wait_ms),
            kv_percent: most.kv_percent.max(kv_percent),
        })
    }
}

impl Case<'_> {
    fn verdict(&self, kept: &mut PoolMemory) -> Verdict {
        let (min, max) = (self.scale.min, self.scale.max);
        if let Some(pinned) = self.pool.pinned {
            kept.restart(self.now);
            let reason =
                format!("an operator wants {pinned}; `baton scale {} auto` gives it back", self.pool.name);
            return Verdict { kind: Kind::Pinned, desired: pinned, reason };
        }
        let Some(current) = self.pool.decided else { return self.adopt() };
        if current < min || current > max {
            let desired = current.clamp(min, max);
            let reason = format!("{current} is outside of {min} to {max} -> {desired}");
            return Verdict { kind: Kind::Adopted, desired, reason };
        }
        kept.note_short(self.now, self.counts.ready < current);
        let known = kept.meter.mean().zip(kept.meter.latest());
        let Some((mean, latest)) = known else {
            kept.note(self, current);
            return if current == 0 { self.begin() } else { self.unknown(current) };
        };
        let line = kept.meter.itl_by_batch;
        let readings = readings(self.scale, self.counts.ready, &mean, &line);
        let now = self::readings(self.scale, self.counts.ready, &latest, &line);
        let band = 1.0 + f64::from(self.scale.tolerance_percent) / 100.0;
        // Over on the mean and still over: a burst that has passed is no reason.
        let still = |r: &&Reading| now.iter().any(|now| now.signal == r.signal && now.excess() > band);
        let over: Vec<&Reading> = readings.iter().filter(|r| r.excess() > band).collect();
        if !over.is_empty() {
            kept.note(self, current);
            let began =
                (*kept.over_since.get_or_insert(self.now)).max(kept.meter.since().unwrap_or(self.now));
            let over: Vec<&Reading> = over.into_iter().filter(still).collect();
            if self.now >= began + self.scale.up_after && !over.is_empty() {
                return self.grow(kept, current, &over);
            }
            return self.steady(current, &readings);
        }
        kept.over_since = None;
        let target = &self.scale.target;
        let looked_at = [
            target.queue_wait.is_some(),
            target.ttft.is_some(),
            target.kv_percent.is_some(),
            target.itl.is_some(),
        ];
        let blind = readings.len() < looked_at.iter().filter(|looked_at| **looked_at).count();
        let enough = readings.iter().map(|r| whole(kept.unlearned(self, r))).max().unwrap_or(current);
        kept.note(
            self,
            if blind || self.counts.silent > 0 || self.full.is_some() { current } else { enough },
        );
        self.shrink(kept, current, &readings)
    }

    /// Carries on from what is there.
    fn adopt(&self) -> Verdict {
        let (min, max) = (self.scale.min, self.scale.max);
        let live = self.counts.ready + self.counts.joining;
        let base = match self.pool.found {
            _ if self.scale.dry_run => self.pool.replicas,
            Some(found) => found,
            None => self.pool.replicas.max(live),
        };
        let desired = base.clamp(min, max);
        let reason = format!(
            "carries on from {base}: {} by the fleet document, {live} registered{}",
            self.pool.replicas,
            self.pool.found.map_or(String::new(), |found| format!(", {found} asked of the scaler"))
        );
        Verdict { kind: Kind::Adopted, desired, reason }
    }

    /// A pool without workers has no signals of its own: it begins when the others are over its targets.
    fn begin(&self) -> Verdict {
        let Elsewhere { wait_ms, kv_percent } = self.elsewhere;
        let target = &self.scale.target;
        let wait = target.queue_wait.map(|wait| wait.as_secs_f64() * 1e3).filter(|wait| wait_ms > *wait);
        let kv = target.kv_percent.map(f64::from).filter(|percent| kv_percent > *percent);
        let reason = match (wait, kv) {
            (Some(wait), _) => {
                format!("queue wait {wait_ms:.0} ms > {wait:.0} ms in another pool, 0 workers here -> 1")
            }
            (None, Some(kv)) => format!(
                "KV held or waited for {kv_percent:.0} % > {kv:.0} % in another pool, 0 workers here -> 1"
            ),
            (None, None) => {
                return Verdict {
                    kind: Kind::Steady,
                    desired: 0,
                    reason: "no workers, and none needed".to_owned(),
                };
            }
        };
        Verdict { kind: Kind::Up, desired: 1, reason }
    }

    fn unknown(&self, current: u32) -> Verdict {
        let Counts { ready, joining, .. } = self.counts;
        let reason = if ready == 0 {
            format!("no worker is ready, {joining} joining: stays at {current}")
        } else {
            format!("none of {ready} ready workers answers: stays at {current}")
        };
        Verdict { kind: Kind::Silent, desired: current, reason }
    }

    fn grow(&self, kept: &mut PoolMemory, current: u32, over: &[&Reading]) -> Verdict {
        let Counts { ready, joining, .. } = self.counts;
        let stay = |kind, reason| Verdict { kind, desired: current, reason };
        let texts: Vec<String> = over.iter().map(|reading| reading.text()).collect();
        let what = texts.join(", ");
        if let Some(full) = self.full {
            return stay(
                Kind::DecodeFull,
                format!("{what}, but {full}: more prefill would not help, stays at {current}"),
            );
        }
        let helped: Vec<&&Reading> = over.iter().filter(|reading| reading.futile.is_none()).collect();
        let Some(wanted) = helped.iter().map(|reading| whole(reading.wanted)).max() else {
            let why = over.iter().find_map(|reading| reading.futile.clone()).unwrap_or_default();
            return stay(Kind::Futile, format!("{why}: more workers would not help, stays at {current}"));
        };
        let step = wanted.clamp(ready + 1, (ready * 2).max(ready + 1));
        let desired = step.clamp(self.scale.min, self.scale.max);
        let whereof = format!("{what} over {ready} ready workers, {joining} joining");
        if desired > current {
            let waits = ready < current && kept.changed.is_some_and(|at| self.now < at + JOIN_PATIENCE);
            if (kept.awaits(self) || waits) && !self.scale.dry_run {
                return stay(
                    Kind::Steady,
                    format!("{whereof}: {} of {current} are on their way", current - ready.min(current)),
                );
            }
            if !self.scale.dry_run {
                kept.fail(self.scale, self.now, ready, &helped);
            }
            let max = self.scale.max;
            return Verdict {
                kind: Kind::Up,
                desired,
                reason: format!("{whereof} -> {desired} of max {max}"),
            };
        }
        if current >= self.scale.max && ready >= current {
            return stay(Kind::AtMax, format!("{whereof}, but {current} is the most the pool may have"));
        }
        stay(Kind::Steady, whereof)
    }

    fn shrink(&self, kept: &mut PoolMemory, current: u32, readings: &[Reading]) -> Verdict {
        let Counts { ready, joining, draining, silent } = self.counts;
        let down_after = self.scale.down_after;
        if silent > 0 {
            let reason = format!("{silent} of {ready} ready workers do not answer: stays at {current}");
            return Verdict { kind: Kind::Silent, desired: current, reason };
        }
        let min = self.scale.min;
        if kept.meter.demand().is_half_of(&kept.peak) {
            kept.flaps = 0;
        }
        let held = kept.hold(down_after);
        // Those who have not come, or not got ready, for so long are not waited for. Nor are they counted on to be those
        // who go: as many as would have done stay ready in any case.
        let gives_up = kept.is_short(self.now) && !self.scale.dry_run;
        let given_up = if gives_up { current.saturating_sub(ready) } else { 0 };
        let lower = kept.most(self.now, held).map(|most| most.max(min).saturating_add(given_up));
        let rested = kept.changed.is_none_or(|at| self.now >= at + self.scale.up_after.max(DOWN_STEP_GAP));
        // In a dry run nobody comes or goes: the fleet says nothing about the number that was decided.
        let left = kept.changed.is_none_or(|at| self.now >= at + JOIN_PATIENCE);
        let there = joining == 0 && (ready == current || (ready > current && left));
        let calm = self.scale.dry_run || (draining == 0 && (there || given_up > 0));
        let Some(most) = lower.filter(|most| *most < current && rested && calm) else {
            return self.steady(current, readings);
        };
        kept.shrunk = Some(self.now);
        let desired = most.max(current - (current / 4).max(1));
        let reason = format!(
            "{} over {ready} ready workers, and {most} would have done for {} ms -> {desired} of min {min}",
            texts(readings),
            held.as_millis(),
        );
        Verdict { kind: Kind::Down, desired, reason }
    }

    fn steady(&self, current: u32, readings: &[Reading]) -> Verdict {
        let Counts { ready, joining, draining, .. } = self.counts;
        let reason =
            format!("{} over {ready} ready workers, {joining} joining, {draining} draining", texts(readings));
        Verdict { kind: Kind::Steady, desired: current, reason }
    }
}

fn texts(readings: &[Reading]) -> String {
    let texts: Vec<String> = readings.iter().map(Reading::text).collect();
    if texts.is_empty() { "no signal yet".to_owned() } else { texts.join(", ") }
}

impl PoolMemory {
    /// The least that would have done now, raised above what is known not to do under such a load.
    fn unlearned(&self, case: &Case<'_>, reading: &Reading) -> f64 {
        let keep = 1.0 - f64::from(case.scale.tolerance_percent.max(10)) / 100.0;
        let load = reading.signal.demand(&self.meter.demand());
        let known = self.lessons.range((reading.signal, 0)..=(reading.signal, u32::MAX));
        let failed = known.filter(|(_, (_, demand))| load >= demand * keep).map(|((_, n), _)| n + 1).max();
        reading.enough.max(failed.map_or(0.0, f64::from))
    }

    /// Remembers the least that would have done.
    fn note(&mut self, case: &Case<'_>, enough: u32) {
        let (now, down_after) = (case.now, case.scale.down_after);
        self.since.get_or_insert(now);
        while self.enough.back().is_some_and(|(_, before)| *before <= enough) {
            self.enough.pop_back();
        }
        self.enough.push_back((now, enough));
        let longest = down_after.saturating_mul(FLAP_FACTOR.pow(FLAPS_MAX));
        while self.enough.front().is_some_and(|(at, _)| *at + longest < now) {
            self.enough.pop_front();
        }
        self.lessons.retain(|_, (at, _)| now < *at + down_after.saturating_mul(LESSON_LIFE));
        let demand = self.meter.demand();
        self.peak = self.peak.max(&demand);
        for (_, signal, ready, load) in self.failures.extract_if(.., |(at, ..)| now >= *at + down_after) {
            // What the same load looks like to more workers is what is compared with later; one that has ended
            // meanwhile is known from before.
            let after = signal.demand(&demand);
            let load = if after * 2.0 >= load { after } else { load };
            let (at, least) = self.lessons.entry((signal, ready)).or_insert((now, load));
            (*at, *least) = (now, least.min(load));
        }
    }

    /// The least that would have done all through the last `window`, if it was watched for so long.
    fn most(&self, now: Instant, window: Duration) -> Option<u32> {
        self.since.filter(|since| now >= *since + window)?;
        self.enough.iter().find(|(at, _)| *at + window >= now).map(|(_, enough)| *enough)
    }

    /// How long fewer must have been enough before a few are taken away.
    fn hold(&self, down_after: Duration) -> Duration {
        down_after.saturating_mul(FLAP_FACTOR.pow(self.flaps.min(FLAPS_MAX)))
    }

    /// So many workers did not manage.
    fn fail(&mut self, scale: &Autoscale, now: Instant, ready: u32, over: &[&&Reading]) {
        if self
            .shrunk
            .take()
            .is_some_and(|at| now < at + self.hold(scale.down_after).saturating_mul(LESSON_LIFE))
        {
            self.flaps = (self.flaps + 1).min(FLAPS_MAX);
        }
        let demand = self.meter.demand();
        self.peak = demand;
        let failures = over.iter().map(|over| (now, over.signal, ready, over.signal.demand(&demand)));
        self.failures.extend(failures);
    }

    /// Notes who is joining.
    fn note_joining(&mut self, now: Instant, workers: &[WorkerInput]) {
        let joins = |worker: &&WorkerInput| worker.state == WorkerState::Joining;
        let there = |name: &WorkerId| workers.iter().find(|worker| worker.worker == *name);
        self.joining.retain(|name, since| match there(name) {
            Some(worker) => joins(&worker),
            None => now < *since + JOIN_PATIENCE,
        });
        for worker in workers.iter().filter(joins) {
            self.joining.entry(worker.worker.clone()).or_insert(now);
        }
    }

    /// Whether somebody is joining who is still waited for.
    fn awaits(&self, case: &Case<'_>) -> bool {
        let since = |worker: &WorkerInput| self.joining.get(&worker.worker).copied();
        let mut joining = case.pool.workers.iter().filter(|worker| worker.state == WorkerState::Joining);
        joining.any(|worker| since(worker).is_none_or(|since| case.now < since + JOIN_PATIENCE))
    }

    /// Notes whether fewer are ready than were decided.
    fn note_short(&mut self, now: Instant, short: bool) {
        self.short_since = self.short_since.filter(|_| short).or(short.then_some(now));
    }

    /// Whether fewer have been ready than were decided for so long, under this number, that the rest will not come.
    fn is_short(&self, now: Instant) -> bool {
        let began = self.short_since.map(|since| self.changed.map_or(since, |changed| since.max(changed)));
        began.is_some_and(|began| now >= began + JOIN_PATIENCE)
    }

    /// Somebody else decides: what was seen before says nothing about afterwards.
    fn restart(&mut self, now: Instant) {
        self.enough.clear();
        self.since = None;
        self.over_since = None;
        self.changed = Some(now);
        self.meter.restart(now);
    }

    /// What there is to tell.
    fn tell(&mut self, case: &Case<'_>, verdict: Verdict) -> Option<Decision> {
        let Verdict { kind, desired, reason } = verdict;
        let from = case.pool.decided.unwrap_or(case.pool.replicas);
        let first = case.pool.decided.is_none();
        let (told, told_kind) = *self.told.get_or_insert((from, Kind::Steady));
        let moved = desired != told || first || case.pool.decided.is_some_and(|decided| decided != desired);
        if moved {
            self.changed = Some(case.now);
            self.next = None;
            self.over_since = None;
            self.meter.restart(case.now);
        } else {
            // Numbers that were decided speak for themselves until something else is the matter.
            let same = kind == told_kind
                || (kind == Kind::Steady && matches!(told_kind, Kind::Up | Kind::Down | Kind::Adopted));
            if same {
                self.next = None;
                return None;
            }
            let since = match self.next {
                Some((next, since)) if next == kind => since,
                _ => self.next.insert((kind, case.now)).1,
            };
            if case.now < since + TELL_AFTER && kind != Kind::Pinned {
                return None;
            }
            self.next = None;
        }
        self.told = Some((desired, kind));
        Some(Decision { pool: case.pool.name.clone(), kind, from, desired, reason, counts: case.counts })
    }
}

#[cfg(test)]
mod tests;
