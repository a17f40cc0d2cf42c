//! A small queueing model: prompts queue at prefill workers, streams hold KV at decode workers, workers take time to come.

use super::*;
use crate::dice::Dice;

/// Prompt tokens a worker computes in a second.
const SPEED: f64 = 5_000.0;
const BLOCKS: u32 = 2_000;
/// Blocks of one stream.
const STREAM_BLOCKS: u32 = 80;
const TICK_MS: u64 = 100;

#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) prompts_per_s: f64,
    pub(super) prompt_tokens: f64,
    pub(super) output_tokens: f64,
    /// Prompts come at equal distances and are equally long.
    pub(super) even: bool,
}

impl Load {
    pub(super) const LIGHT: Self =
        Self { prompts_per_s: 0.5, prompt_tokens: 1_000.0, output_tokens: 100.0, even: false };
}

struct Worker {
    name: WorkerId,
    pool: usize,
    joins: Instant,
    drains: bool,
    /// Prompt tokens left, first come first served.
    prompts: VecDeque<f64>,
    prefilled: f64,
    /// Output tokens left of each stream.
    streams: Vec<f64>,
}

pub(super) struct World {
    now: Instant,
    dice: Dice,
    memory: Memory,
    pools: Vec<PoolInput>,
    workers: Vec<Worker>,
    /// Prefilled prompts that no decode worker has room for.
    waiting: VecDeque<f64>,
    next_name: u32,
    pub(super) join_delay: Duration,
    pub(super) told: Vec<Decision>,
    load: Load,
    left: f64,
}

impl World {
    pub(super) fn new(seed: u64, prefill: Autoscale, decode: Option<Autoscale>) -> Self {
        let pool = |name: &str, role, scale: Option<Autoscale>, workers| PoolInput {
            name: name.parse().unwrap(),
            role,
            scale,
            replicas: workers,
            decided: Some(workers),
            found: None,
            pinned: None,
            workers: Vec::new(),
        };
        let decoders = if decode.is_some() { 1 } else { 8 };
        let prefill = pool("prefill", Role::Prefill, Some(prefill), 1);
        let mut world = Self {
            now: Instant::now(),
            dice: Dice::seeded(seed),
            memory: Memory::new(secs(0)),
            pools: vec![prefill, pool("decode", Role::Decode, decode, decoders)],
            workers: Vec::new(),
            waiting: VecDeque::new(),
            next_name: 0,
            join_delay: secs(0),
            told: Vec::new(),
            load: Load::LIGHT,
            left: 0.0,
        };
        world.staff();
        world.join_delay = secs(4);
        world
    }

    /// Up to five prefill workers' and some decode workers' worth.
    pub(super) fn random_load(&mut self) -> Load {
        let mut between = |low: u64, high: u64| (low + self.dice.below(high - low)) as f64;
        let (prompt_tokens, output_tokens) = (between(100, 800), between(20, 200));
        let tokens_per_s = between(500, 25_000);
        Load { prompts_per_s: tokens_per_s / prompt_tokens, prompt_tokens, output_tokens, even: false }
    }

    pub(super) fn desired(&self, pool: &str) -> u32 {
        let pool = self.pools.iter().find(|p| p.name.as_str() == pool).unwrap();
        pool.decided.unwrap()
    }

    pub(super) fn wait_ms(&self, pool: &str) -> f64 {
        let of = |worker: &&Worker| self.pools[worker.pool].name.as_str() == pool && self.is_ready(worker);
        let (pending, count) = self
            .workers
            .iter()
            .filter(of)
            .fold((0.0, 0.0), |(sum, n), w| (sum + w.prompts.iter().sum::<f64>(), n + 1.0));
        1e3 * pending / (SPEED * f64::max(count, 1.0))
    }

    pub(super) fn run(&mut self, seconds: u64, load: Load) {
        self.load = load;
        for _ in 0..seconds {
            for _ in 0..1_000 / TICK_MS {
                self.now += Duration::from_millis(TICK_MS);
                self.arrive();
                self.work();
            }
            self.decide();
        }
    }

    fn unit(&mut self) -> f64 {
        self.dice.below(1 << 32) as f64 / f64::from(u32::MAX)
    }

    fn is_ready(&self, worker: &Worker) -> bool {
        worker.joins <= self.now && !worker.drains
    }

    fn arrive(&mut self) {
        // Poisson: exponential times between prompts; what is left of one at the end of a tick has no memory.
        let mut left = self.left + TICK_MS as f64 / 1e3;
        loop {
            let next = if self.load.even { 1.0 } else { -(1.0 - self.unit()).max(1e-12).ln() };
            left -= next / self.load.prompts_per_s;
            if left <= 0.0 {
                // Only even prompts remember how long ago the last one came.
                self.left = if self.load.even { left + next / self.load.prompts_per_s } else { 0.0 };
                return;
            }
            let tokens = self.load.prompt_tokens * if self.load.even { 1.0 } else { 0.5 + self.unit() };
            let now = self.now;
            let ready = |w: &&mut Worker| w.pool == 0 && w.joins <= now && !w.drains;
            let backlog = |w: &&mut Worker| w.prompts.iter().sum::<f64>() as u64;
            if let Some(worker) = self.workers.iter_mut().filter(ready).min_by_key(backlog) {
                worker.prompts.push_back(tokens);
            }
        }
    }

    fn work(&mut self) {
        let seconds = TICK_MS as f64 / 1e3;
        for worker in self.workers.iter_mut().filter(|w| w.joins <= self.now) {
            let mut tokens = SPEED * seconds;
            while let Some(first) = worker.prompts.front_mut() {
                let done = tokens.min(*first);
                (*first, tokens, worker.prefilled) = (*first - done, tokens - done, worker.prefilled + done);
                if *first > 0.0 {
                    break;
                }
                worker.prompts.pop_front();
                self.waiting.push_back(self.load.output_tokens);
            }
            let itl_s = itl_ms(worker.streams.len()) / 1e3;
            worker.streams.iter_mut().for_each(|left| *left -= seconds / itl_s);
            worker.streams.retain(|left| *left > 0.0);
        }
        let now = self.now;
        while let Some(output) = self.waiting.front().copied() {
            let fits = |w: &Worker| (w.streams.len() as u32 + 1) * STREAM_BLOCKS <= BLOCKS;
            let room = |w: &&mut Worker| w.pool == 1 && w.joins <= now && !w.drains && fits(w);
            let least = self.workers.iter_mut().filter(room).min_by_key(|w| w.streams.len());
            let Some(worker) = least else { break };
            worker.streams.push(output);
            self.waiting.pop_front();
        }
        self.workers.retain(|w| !w.drains || !w.prompts.is_empty() || !w.streams.is_empty());
    }

    fn decide(&mut self) {
        let decoders = self.workers.iter().filter(|w| w.pool == 1 && self.is_ready(w)).count().max(1);
        for index in 0..self.pools.len() {
            let of = self.workers.iter().filter(|worker| worker.pool == index);
            self.pools[index].workers = of.map(|worker| self.input(worker, decoders)).collect();
        }
        for decision in decide(&mut self.memory, self.now, &Inputs { pools: self.pools.clone() }) {
            let pool = self.pools.iter_mut().find(|pool| pool.name == decision.pool).unwrap();
            pool.decided = Some(decision.desired);
            self.told.push(decision);
        }
        self.staff();
    }

    fn input(&self, worker: &Worker, decoders: usize) -> WorkerInput {
        let streams = worker.streams.len();
        // What waits for room waits at the decode workers.
        let decode_waiting = if worker.pool == 1 { self.waiting.len() / decoders } else { 0 };
        let sample = Sample {
            at: self.now,
            running: (streams + worker.prompts.len().min(1)) as u32,
            waiting: (worker.prompts.len().saturating_sub(1) + decode_waiting) as u32,
            pending_tokens: worker.prompts.iter().sum::<f64>() as u64,
            prefilled_tokens: worker.prefilled as u64,
            prompt_tokens: Some(self.load.prompt_tokens),
            prefill_tokens_per_s: (worker.prefilled > 0.0).then_some(SPEED),
            itl_ms: Some(itl_ms(streams)),
            blocks: BLOCKS,
            blocks_held: streams as u32 * STREAM_BLOCKS,
        };
        let state = match worker {
            _ if worker.drains => WorkerState::Draining,
            _ if worker.joins > self.now => WorkerState::Joining,
            _ => WorkerState::Ready,
        };
        WorkerInput { worker: worker.name.clone(), epoch: Epoch(1), state, sample: Some(sample) }
    }

    /// Starts who is missing and lets the youngest drain who are too many.
    fn staff(&mut self) {
        for pool in 0..self.pools.len() {
            let wanted = self.pools[pool].decided.unwrap() as usize;
            let there = self.workers.iter().filter(|w| w.pool == pool && !w.drains).count();
            for _ in there..wanted {
                self.next_name += 1;
                self.workers.push(Worker {
                    name: format!("{}-{}", self.pools[pool].name, self.next_name).parse().unwrap(),
                    pool,
                    joins: self.now + self.join_delay,
                    drains: false,
                    prompts: VecDeque::new(),
                    prefilled: 0.0,
                    streams: Vec::new(),
                });
            }
            let surplus = self.workers.iter_mut().rev().filter(|w| w.pool == pool && !w.drains);
            surplus.take(there.saturating_sub(wanted)).for_each(|worker| worker.drains = true);
        }
    }
}

/// 20 ms, and 1 ms for each stream.
fn itl_ms(streams: usize) -> f64 {
    20.0 + streams as f64
}
