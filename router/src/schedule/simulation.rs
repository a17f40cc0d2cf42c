//! The scheduler and the prefix index before a fleet in virtual time: hit rates and first-token times of the policies.
//!
//! Workers prefill one prompt after the other, keep a prefix cache that evicts what was used least recently, and report
//! their caches late; the router knows its own requests only.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

use baton_config::fleet::{Disaggregation, PolicyKind};
use baton_config::prefix::{BlockHash, HashScheme};

use super::{Candidate, Rules, Snapshot, Work, choose, predicted};
use crate::index::{Found, Holder, Namespace, PrefixIndex, Tier};

const NAMESPACE: Namespace = Namespace { scheme: HashScheme::Baton, block_tokens: 16 };
const BLOCK: u32 = 16;
const PREFILL_TOKENS_PER_S: f64 = 8000.0;
const ITL_S: f64 = 0.02;
const ANSWER_TOKENS: u32 = 64;
/// Blocks of a worker's prefix cache: 25,600 tokens.
const CACHE_BLOCKS: usize = 1600;
/// Between a change of a cache and the router's hearing of it.
const NEWS_LATE_S: f64 = 0.05;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Workload {
    /// Conversations that begin alike and grow by every turn.
    Chats,
    /// Many long prefixes, some far more popular than others.
    Zipf,
    /// A few long prefixes, all alike.
    Shared,
}

struct Dice(u64);

impl Dice {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(1);
        (super::draw(self.0, 7, 7) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, limit: usize) -> usize {
        ((self.unit() * limit as f64) as usize).min(limit - 1)
    }

    /// Exponentially distributed with this mean.
    fn pause(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

fn extend(chain: &mut Vec<BlockHash>, seed: u64, tokens: u32) {
    let mut hash = chain.last().copied().unwrap_or(BlockHash::root(0));
    for _ in 0..tokens / BLOCK {
        hash = hash.child(&[seed as u32, (seed >> 32) as u32]);
        chain.push(hash);
    }
}

/// Makes prompts.
struct Prompts {
    workload: Workload,
    workers: usize,
    dice: Dice,
    chats: Vec<(Vec<BlockHash>, u32)>,
    shares: Vec<f64>,
    next: u64,
}

impl Prompts {
    fn new(workload: Workload, workers: usize, seed: u64) -> Self {
        let prefixes = if workload == Workload::Zipf { 16 * workers } else { 6 * workers };
        let weight = |rank: usize| if workload == Workload::Zipf { (rank as f64).powf(-1.2) } else { 1.0 };
        let mut shares: Vec<f64> = (1..=prefixes).map(weight).collect();
        let sum: f64 = shares.iter().sum();
        shares.iter_mut().for_each(|share| *share /= sum);
        let chats = vec![(Vec::new(), 0); 8 * workers];
        Self { workload, workers, dice: Dice(seed), chats, shares, next: 1 << 20 }
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn next(&mut self) -> Vec<BlockHash> {
        let fresh = self.fresh();
        if self.workload == Workload::Chats {
            let at = self.dice.below(8 * self.workers);
            let (turn, question) = (self.chats[at].1, 160 + 16 * self.dice.below(20) as u32);
            let chat = &mut self.chats[at];
            if turn == 0 || turn >= 12 {
                *chat = (Vec::new(), 0);
                // Every chat has the same system prompt.
                extend(&mut chat.0, 1, 256);
            }
            extend(&mut chat.0, fresh, question);
            chat.1 += 1;
            return chat.0.clone();
        }
        let mut point = self.dice.unit();
        let prefix = self.shares.iter().position(|share| {
            point -= share;
            point < 0.0
        });
        let mut chain = Vec::new();
        extend(&mut chain, 100 + prefix.unwrap_or(0) as u64, 1024);
        extend(&mut chain, fresh, 160);
        chain
    }
}

#[derive(Default)]
struct Cache {
    /// Block to its last use.
    used: HashMap<BlockHash, u64>,
    order: VecDeque<(BlockHash, u64)>,
    clock: u64,
}

impl Cache {
    fn matched(&self, chain: &[BlockHash]) -> usize {
        chain.iter().take_while(|block| self.used.contains_key(block)).count()
    }

    /// Keeps a chain, its end being the first to go; tells what was stored and what had to go.
    fn keep(&mut self, chain: &[BlockHash]) -> (Vec<BlockHash>, Vec<BlockHash>) {
        let stored: Vec<BlockHash> =
            chain.iter().copied().filter(|block| !self.used.contains_key(block)).collect();
        for block in chain.iter().rev() {
            self.clock += 1;
            self.used.insert(*block, self.clock);
            self.order.push_back((*block, self.clock));
        }
        let mut removed = Vec::new();
        while self.used.len() > CACHE_BLOCKS {
            let Some((block, at)) = self.order.pop_front() else { break };
            if self.used.get(&block) == Some(&at) {
                self.used.remove(&block);
                removed.push(block);
            }
        }
        (stored, removed)
    }
}

struct Request {
    at: f64,
    chain: Vec<BlockHash>,
    booked: u32,
}

#[derive(Default)]
struct SimWorker {
    cache: Cache,
    queue: VecDeque<Request>,
    busy: bool,
    /// What the router has on it.
    requests: u32,
    booked: u64,
    /// Blocks that it has told of.
    held: u64,
}

enum Event {
    Arrive,
    Prefilled(usize),
    Ended(usize),
    News(usize, Vec<BlockHash>, Vec<BlockHash>),
}

/// What a run came to.
#[derive(Debug)]
struct Outcome {
    /// Share of prompt tokens that were cached.
    hits: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Requests of the worker with the most, relative to an equal share.
    worst: f64,
}

struct Simulation {
    now: f64,
    events: BinaryHeap<Reverse<(u64, u64, usize)>>,
    bodies: Vec<Option<Event>>,
    workers: Vec<SimWorker>,
    index: PrefixIndex,
    holders: Vec<Holder>,
    policy: PolicyKind,
    first_s: Vec<f64>,
    tokens: (u64, u64),
    served: Vec<u32>,
    tickets: u64,
}

impl Simulation {
    fn at(&mut self, when: f64, event: Event) {
        let number = self.bodies.len();
        self.bodies.push(Some(event));
        self.events.push(Reverse(((when * 1e9) as u64, number as u64, number)));
    }

    fn place(&mut self, chain: Vec<BlockHash>) {
        let mut found = Found::default();
        self.index.find(NAMESPACE, &chain, &mut found);
        let candidate = |(key, worker): (usize, &SimWorker)| Candidate {
            key,
            identity: key as u64,
            requests: worker.requests,
            prefill_tokens: worker.booked,
            prefill_tokens_per_s: Some(PREFILL_TOKENS_PER_S),
            slowness: 1.0,
            itl_ms: Some(ITL_S * 1e3),
            kv_used: 0.0,
            cached_tokens: found.depth(self.holders[key]).device * BLOCK,
            held_tokens: worker.held * u64::from(BLOCK),
        };
        let decode = self.workers.iter().enumerate().map(candidate).collect();
        let snapshot = Snapshot::new(decode, Vec::new());
        let tokens = chain.len() as u32 * BLOCK;
        let work = Work { tokens, ticket: self.tickets, session: None };
        self.tickets += 1;
        let rules = Rules {
            policy: self.policy,
            disaggregation: Disaggregation::Never,
            seed: 3,
            slo_itl_s: 0.05,
            spill_requests: None,
        };
        let choice = choose(&snapshot, work, rules, &|_, _, _| Some(0.0)).unwrap();
        let booked = predicted(&snapshot, choice, work, &|_, _, _| Some(0.0)).unwrap().uncached_tokens;
        let worker = &mut self.workers[choice.decode];
        worker.requests += 1;
        worker.booked += u64::from(booked);
        worker.queue.push_back(Request { at: self.now, chain, booked });
        self.served[choice.decode] += 1;
        self.start(choice.decode);
    }

    fn start(&mut self, who: usize) {
        let worker = &mut self.workers[who];
        let Some(request) = worker.queue.front() else { return };
        if std::mem::replace(&mut worker.busy, true) {
            return;
        }
        let (all, hit) = (request.chain.len(), worker.cache.matched(&request.chain));
        self.tokens.0 += (all as u64) * u64::from(BLOCK);
        self.tokens.1 += (hit as u64) * u64::from(BLOCK);
        let compute_s = f64::from(((all - hit) as u32 * BLOCK).max(1)) / PREFILL_TOKENS_PER_S + 0.002;
        self.at(self.now + compute_s, Event::Prefilled(who));
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive => {}
            Event::Prefilled(who) => {
                let worker = &mut self.workers[who];
                worker.busy = false;
                let request = worker.queue.pop_front().unwrap();
                worker.booked -= u64::from(request.booked);
                let (stored, removed) = worker.cache.keep(&request.chain);
                self.first_s.push(self.now - request.at);
                self.at(self.now + NEWS_LATE_S, Event::News(who, stored, removed));
                self.at(self.now + f64::from(ANSWER_TOKENS) * ITL_S, Event::Ended(who));
                self.start(who);
            }
            Event::Ended(who) => self.workers[who].requests -= 1,
            Event::News(who, stored, removed) => {
                let worker = &mut self.workers[who];
                worker.held = worker.held + stored.len() as u64 - removed.len() as u64;
                self.index.store(NAMESPACE, self.holders[who], Tier::Device, &stored);
                self.index.remove(NAMESPACE, self.holders[who], Tier::Device, &removed);
            }
        }
    }
}

fn run(workload: Workload, policy: PolicyKind, workers: usize, per_worker_s: f64, seed: u64) -> Outcome {
    let index = PrefixIndex::with_capacity(1 << 20);
    let holders = (0..workers).map(|_| index.join().unwrap()).collect();
    let mut simulation = Simulation {
        now: 0.0,
        events: BinaryHeap::new(),
        bodies: Vec::new(),
        workers: (0..workers).map(|_| SimWorker::default()).collect(),
        index,
        holders,
        policy,
        first_s: Vec::new(),
        tokens: (0, 0),
        served: vec![0; workers],
        tickets: 0,
    };
    let mut prompts = Prompts::new(workload, workers, seed);
    let mut when = 0.0;
    // Enough to fill the caches several times over, and no more: tests run on small machines.
    let requests = workers * if workers > 16 { 150 } else { 400 };
    for _ in 0..requests {
        when += prompts.dice.pause(1.0 / (per_worker_s * workers as f64));
        simulation.at(when, Event::Arrive);
    }
    while let Some(Reverse((at, _, number))) = simulation.events.pop() {
        simulation.now = at as f64 / 1e9;
        match simulation.bodies[number].take().unwrap() {
            Event::Arrive => simulation.place(prompts.next()),
            event => simulation.handle(event),
        }
    }
    let mut first_s = simulation.first_s;
    first_s.sort_by(f64::total_cmp);
    assert_eq!(first_s.len(), requests);
    let quantile_ms = |share: f64| first_s[(first_s.len() as f64 * share) as usize] * 1e3;
    Outcome {
        hits: simulation.tokens.1 as f64 / simulation.tokens.0 as f64,
        p50_ms: quantile_ms(0.5),
        p99_ms: quantile_ms(0.99),
        worst: f64::from(*simulation.served.iter().max().unwrap()) * workers as f64 / requests as f64,
    }
}

/// The claims of `kv_aware`: about the hits of a policy that looks at nothing else, without the queues it makes.
fn compare(workload: Workload, workers: usize, per_worker_s: f64) {
    let mut summary = Vec::new();
    let policies = [PolicyKind::KvAware, PolicyKind::Prefix, PolicyKind::RoundRobin, PolicyKind::LeastLoaded];
    for policy in policies {
        let outcome = run(workload, policy, workers, per_worker_s, 11);
        println!(
            "{workload:?} {workers:>2} workers {policy:<13} hits {:.3} worst {:.2}x first token p50 {:>6.0} ms p99 {:>6.0} ms",
            outcome.hits, outcome.worst, outcome.p50_ms, outcome.p99_ms
        );
        summary.push(outcome);
    }
    let [aware, prefix, turns, _] = &summary[..] else { unreachable!("four policies") };
    assert!(aware.hits >= prefix.hits - 0.04, "{workload:?} {workers}: {summary:#?}");
    assert!(aware.hits > turns.hits, "{workload:?} {workers}: {summary:#?}");
    assert!(aware.p99_ms <= turns.p99_ms, "{workload:?} {workers}: {summary:#?}");
    assert!(aware.p99_ms <= prefix.p99_ms * 1.05, "{workload:?} {workers}: {summary:#?}");
    assert!(aware.worst < 2.0, "{workload:?} {workers}: {summary:#?}");
}

#[test]
fn chats_are_kept_near_their_cache_and_not_on_one_worker() {
    compare(Workload::Chats, 4, 4.5);
    compare(Workload::Chats, 64, 4.5);
}

#[test]
fn popular_prefixes_are_spread_as_far_as_it_pays() {
    compare(Workload::Zipf, 4, 8.0);
    compare(Workload::Zipf, 64, 8.0);
}

#[test]
fn shared_prefixes_are_computed_once_or_little_more() {
    compare(Workload::Shared, 4, 8.0);
    compare(Workload::Shared, 64, 8.0);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let once = || run(Workload::Zipf, PolicyKind::KvAware, 4, 8.0, 5);
    let (first, second) = (once(), once());
    assert_eq!((first.hits, first.p99_ms, first.worst), (second.hits, second.p99_ms, second.worst));
}
