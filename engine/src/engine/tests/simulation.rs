//! A prefill and a decode engine of different geometry under random requests, handoffs, cancels and damage, in virtual
//! time; the books audited after every move, every output compared with an undisturbed run.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use baton_config::protocol::{FirstToken, Sampling};
use baton_config::{Dtype, KvLayout};

use super::harness::*;
use crate::arena::{Arena, BlockId};
use crate::engine::*;
use crate::executor::ExecuteError;
use crate::mix::Rng;
use crate::sim::oracle;

/// Seeds that failed once are listed here, and run first; before there were pauses, and so without any.
const KEPT_SEEDS: [u64; 1] = [359];
const FRESH_SEEDS: std::ops::Range<u64> = 0..150;
const MOVES: usize = 600;

/// A prompt on its way from one engine to the other.
struct Handoff {
    /// Blocks at the prefill side, once admitted.
    from: Option<Vec<BlockId>>,
    /// Tokens computed there.
    ready: u32,
    first: Option<FirstToken>,
    /// Blocks at the decode side, once admitted.
    to: Option<Vec<BlockId>>,
    /// Tokens in place there.
    imported: u32,
    prompt: u32,
    /// Whether what was copied was damaged on the way.
    damaged: bool,
}

/// A sequence the world expects output of.
struct Expected {
    spec: SequenceSpec,
    /// Tokens that the engine has room for.
    limit: u32,
    output: Output,
    /// Whether it may fail: its KV was damaged.
    damaged: bool,
}

struct World {
    p: Engine,
    d: Engine,
    now: Instant,
    rng: Rng,
    next: u64,
    handoffs: HashMap<SeqId, Handoff>,
    expected: HashMap<SeqId, Expected>,
    /// Cancelled imports, and the blocks that somebody still writes.
    ghosts: HashMap<SeqId, Vec<BlockId>>,
    /// Decides on pauses, if there are any, so that nothing else depends on them.
    pauses: Option<Rng>,
    paused: Vec<SeqId>,
    stats: Stats,
}

#[derive(Debug, Default)]
struct Stats {
    steps: u64,
    finished: u64,
    cancelled: u64,
    imported: u64,
    given_up: u64,
    damaged: u64,
    caught: u64,
    ghost_writes: u64,
    preemptions: u64,
    paused: u64,
    cached_tokens: u64,
}

impl World {
    fn new(seed: u64, pauses: bool) -> Self {
        let mut rng = Rng(seed);
        let mut shape = |blocks: (u64, u64)| Shape {
            block_tokens: *rng.pick(&[1, 2, 4, 8]),
            layout: *rng.pick(&[KvLayout::Nhd, KvLayout::Hnd]),
            dtype: *rng.pick(&[Dtype::F32, Dtype::Bf16]),
            blocks: rng.between(blocks.0, blocks.1) as u32,
            limits: EngineLimits {
                prefill_chunk_tokens: rng.between(1, 24) as u32,
                max_batch_sequences: rng.between(1, 8) as u32,
                max_waiting_sequences: rng.between(2, 10) as u32,
                prefix_cache: rng.chance(80),
                mixed: rng.chance(50),
            },
        };
        let (p, d) = (shape((8, 40)).engine(), shape((8, 40)).engine());
        Self {
            p,
            d,
            now: Instant::now(),
            rng,
            next: 0,
            handoffs: HashMap::new(),
            expected: HashMap::new(),
            ghosts: HashMap::new(),
            pauses: pauses.then_some(Rng(!seed)),
            paused: Vec::new(),
            stats: Stats::default(),
        }
    }

    /// Few different tokens and salts, so that prompts share prefixes.
    fn random_spec(&mut self) -> SequenceSpec {
        let len = self.rng.between(1, 30);
        let family = self.rng.below(3) as u32;
        let tail = self.rng.below(len + 1);
        let tokens: Vec<u32> = (0..len)
            .map(|i| if i < tail { family * 10 + i as u32 % 9 } else { self.rng.below(50) as u32 })
            .collect();
        let sampling = Sampling {
            temperature: *self.rng.pick(&[0.0, 1.0, 40.0]),
            seed: self.rng.below(5),
            presence_penalty: *self.rng.pick(&[0.0, 0.0, 1.5]),
            repetition_penalty: *self.rng.pick(&[1.0, 1.0, 1.3]),
            ignore_eos: self.rng.chance(20),
            ..Sampling::default()
        };
        SequenceSpec {
            generated: if self.rng.chance(20) { self.rng.below(len) as u32 } else { 0 },
            sampling,
            cache_salt: self.rng.below(2),
            ..spec(tokens, self.rng.between(1, 30) as u32)
        }
    }

    fn submit(&mut self, purpose: Purpose) {
        let id = SeqId(self.next);
        self.next += 1;
        let mut spec = SequenceSpec { purpose, ..self.random_spec() };
        let damaged = purpose == Purpose::Import && self.rng.chance(10);
        if damaged {
            // What is damaged must not spread through the cache to those that may not fail.
            spec.cache_salt = 1000 + id.0;
        }
        // A prefill worker may serve requests of its own as well.
        let alone_on_p = purpose == Purpose::Generate && self.rng.chance(30);
        let engine = if alone_on_p { &mut self.p } else { &mut self.d };
        if engine.submit(id, spec.clone(), self.now).is_err() {
            return;
        }
        if purpose == Purpose::Import {
            let export = SequenceSpec { purpose: Purpose::Export, ..spec.clone() };
            if self.p.submit(id, export, self.now).is_ok() {
                let handoff = Handoff {
                    from: None,
                    ready: 0,
                    first: None,
                    to: None,
                    imported: 0,
                    prompt: spec.tokens.len() as u32,
                    damaged,
                };
                self.handoffs.insert(id, handoff);
            } else {
                self.d.prefill_locally(id);
            }
        }
        let limit = engine_limit(if alone_on_p { &self.p } else { &self.d }, &spec);
        let output = Output::default();
        self.expected.insert(id, Expected { spec, limit, output, damaged: false });
    }

    fn any_handoff(&mut self) -> Option<SeqId> {
        let mut ids: Vec<SeqId> = self.handoffs.keys().copied().collect();
        ids.sort_unstable();
        (!ids.is_empty()).then(|| *self.rng.pick(&ids))
    }

    /// Copies some of what is ready, rightly or damaged, and tells the decode side.
    fn transfer(&mut self) {
        let Some(id) = self.any_handoff() else { return };
        let Some(handoff) = self.handoffs.get_mut(&id) else { return };
        let (Some(from), Some(to)) = (&handoff.from, &handoff.to) else { return };
        if handoff.imported < handoff.ready {
            let upto = self.rng.between(u64::from(handoff.imported) + 1, u64::from(handoff.ready)) as u32;
            let range = handoff.imported..upto;
            copy_kv((self.p.arena(), from), (self.d.arena(), to), range.clone());
            if handoff.damaged && self.rng.chance(50) {
                damage(self.d.arena(), to, range, &mut self.rng);
                self.stats.damaged += 1;
                if let Some(expected) = self.expected.get_mut(&id) {
                    expected.damaged = true;
                }
            }
            handoff.imported = upto;
            self.d.imported(id, upto);
        } else if let (true, Some(first)) = (handoff.imported == handoff.prompt, handoff.first.clone()) {
            self.d.start_decode(id, first);
            self.p.release(id);
            self.handoffs.remove(&id);
            self.stats.imported += 1;
        }
    }

    fn give_up(&mut self) {
        let Some(id) = self.any_handoff() else { return };
        self.handoffs.remove(&id);
        self.p.cancel(id, Writers::Gone);
        self.d.prefill_locally(id);
        self.stats.given_up += 1;
    }

    fn cancel(&mut self) {
        let mut ids: Vec<SeqId> = self.expected.keys().copied().collect();
        ids.sort_unstable();
        if ids.is_empty() {
            return;
        }
        let id = *self.rng.pick(&ids);
        self.expected.remove(&id);
        self.stats.cancelled += 1;
        self.p.cancel(id, Writers::Gone);
        match self.handoffs.remove(&id) {
            Some(Handoff { to: Some(to), imported, .. }) if self.rng.chance(70) => {
                self.d.cancel(id, Writers::MayWrite);
                let block_tokens = self.d.arena().geometry().block_tokens;
                let ghost = to[imported.div_ceil(block_tokens) as usize..].to_vec();
                self.ghosts.insert(id, ghost);
            }
            _ => self.d.cancel(id, Writers::Gone),
        }
    }

    /// A transfer that nobody waits for any more writes what it likes.
    fn ghost_write(&mut self) {
        let mut ids: Vec<SeqId> = self.ghosts.keys().copied().collect();
        ids.sort_unstable();
        if ids.is_empty() {
            return;
        }
        let id = *self.rng.pick(&ids);
        if self.rng.chance(30) {
            self.d.fence(id);
            self.ghosts.remove(&id);
            return;
        }
        let arena = self.d.arena().clone();
        for block in &self.ghosts[&id] {
            arena.memory().write(arena.block_offset(*block), &vec![0x3f; arena.geometry().block_bytes()]);
            self.stats.ghost_writes += 1;
        }
    }

    fn step_p(&mut self) -> Step {
        let mut events = Vec::new();
        let step = self.p.step(self.now, &mut events);
        self.pass_time(step);
        for event in events {
            let id = event.id();
            let Some(handoff) = self.handoffs.get_mut(&id) else {
                self.apply(event);
                continue;
            };
            match event {
                EngineEvent::Admitted { blocks, cached_tokens, .. } => {
                    handoff.from = Some(blocks);
                    handoff.ready = cached_tokens;
                }
                EngineEvent::Prefilled { upto, .. } => {
                    assert!(upto > handoff.ready || upto == handoff.prompt, "progress only grows");
                    handoff.ready = upto;
                }
                EngineEvent::Token { token, logprob, logits_digest, .. } => {
                    assert_eq!(handoff.ready, handoff.prompt, "the token comes after its prompt");
                    handoff.first = Some(FirstToken { token, logprob, logits_digest });
                }
                other => panic!("the prefill side never ends by itself: {other:?}"),
            }
        }
        step
    }

    fn step_d(&mut self) -> Step {
        let mut events = Vec::new();
        let step = self.d.step(self.now, &mut events);
        self.pass_time(step);
        for event in events {
            let id = event.id();
            if let (EngineEvent::Admitted { blocks, cached_tokens, .. }, Some(handoff)) =
                (&event, self.handoffs.get_mut(&id))
            {
                handoff.to = Some(blocks.clone());
                handoff.imported = *cached_tokens;
                self.stats.cached_tokens += u64::from(*cached_tokens);
                self.p.wanted(id);
            }
            self.apply(event);
        }
        step
    }

    fn apply(&mut self, event: EngineEvent) {
        let id = event.id();
        let Some(expected) = self.expected.get_mut(&id) else { panic!("{event:?} of nobody") };
        expected.output.apply(event);
        if expected.output.finished.is_some() || expected.output.failed.is_some() {
            self.ended(id);
        }
    }

    fn pass_time(&mut self, step: Step) {
        self.stats.steps += 1;
        self.now += match step {
            Step::Worked { modelled } => modelled,
            Step::Idle => Duration::from_millis(1),
        };
    }

    fn ended(&mut self, id: SeqId) {
        let Some(Expected { spec, limit, output, damaged }) = self.expected.remove(&id) else { return };
        self.handoffs.remove(&id);
        self.p.release(id);
        let alone = solo(&SequenceSpec { max_tokens: limit, ..spec.clone() });
        if let Some(error) = output.failed {
            assert!(damaged, "{id} failed undamaged: {error:?}");
            assert!(matches!(error, SequenceError::Execute(ExecuteError::CorruptKv { .. })), "{error:?}");
            // The first token comes from the undamaged side; nothing after it may.
            assert!(output.tokens.len() <= 1 && alone.tokens.starts_with(&output.tokens));
            self.stats.caught += 1;
            return;
        }
        assert_eq!(output, alone, "{id} differs from an undisturbed run of {spec:?}");
        let certain = spec.sampling.temperature <= 1.0 && spec.sampling.presence_penalty == 0.0;
        if certain && spec.sampling.repetition_penalty == 1.0 && !spec.sampling.ignore_eos {
            let oracle = oracle(&config(), &model(), &spec.tokens, output.tokens.len());
            assert_eq!(output.tokens, oracle, "{id} differs from the oracle");
        }
        self.stats.finished += 1;
    }

    fn random_move(&mut self) {
        match self.rng.below(100) {
            0..10 => self.submit(Purpose::Generate),
            10..22 => self.submit(Purpose::Import),
            22..25 => self.cancel(),
            25..27 => self.give_up(),
            27..42 => self.transfer(),
            42..45 => self.ghost_write(),
            45..70 => drop(self.step_p()),
            70..99 => drop(self.step_d()),
            _ => self.d.clear_prefix_cache(),
        }
        self.pause_or_resume();
        self.audit();
    }

    /// Sets any sequence aside, whatever it is doing, or lets one go on.
    fn pause_or_resume(&mut self) {
        let Some(rng) = &mut self.pauses else { return };
        match rng.below(40) {
            0 if self.next > 0 => {
                let id = SeqId(rng.below(self.next));
                let before = self.d.load();
                self.p.pause(id);
                self.d.pause(id);
                self.stats.paused += u64::from(before != self.d.load());
                self.paused.push(id);
            }
            1 | 2 if !self.paused.is_empty() => {
                let id = self.paused.swap_remove(rng.below(self.paused.len() as u64) as usize);
                self.p.resume(id);
                self.d.resume(id);
            }
            _ => {}
        }
    }

    fn audit(&self) {
        self.p.audit().unwrap();
        self.d.audit().unwrap();
    }

    /// Lets everything that is under way come to its end, and looks for what was left behind.
    fn drain(&mut self) {
        for id in std::mem::take(&mut self.paused) {
            self.p.resume(id);
            self.d.resume(id);
        }
        while !self.handoffs.is_empty() {
            let before = self.handoffs.len();
            for _ in 0..50 {
                self.step_p();
                self.transfer();
                self.step_d();
                self.audit();
            }
            if self.handoffs.len() == before {
                self.give_up();
            }
        }
        for id in std::mem::take(&mut self.ghosts).into_keys() {
            self.d.fence(id);
        }
        while self.step_d() != Step::Idle {
            self.audit();
        }
        while self.step_p() != Step::Idle {
            self.audit();
        }
        assert!(self.expected.is_empty(), "{} sequences never ended", self.expected.len());
        for engine in [&self.p, &self.d] {
            let counts = engine.counts();
            assert_eq!(counts.free + counts.shared, counts.total(), "blocks were left behind: {counts:?}");
            assert_eq!(engine.load(), EngineLoad::default());
        }
        self.stats.preemptions = self.d.preemptions() + self.p.preemptions();
    }
}

/// Tokens that a sequence can emit on `engine`.
fn engine_limit(engine: &Engine, spec: &SequenceSpec) -> u32 {
    spec.max_tokens.min(engine.sequence_limit_tokens() - spec.tokens.len() as u32)
}

/// Changes one number of one row.
fn damage(arena: &Arena, blocks: &[BlockId], tokens: std::ops::Range<u32>, rng: &mut Rng) {
    let plane = crate::arena::Plane { layer: rng.below(2) as u32, kv: *rng.pick(&crate::arena::Kv::BOTH) };
    let mut row = vec![0.0; arena.token_numbers()];
    let at = rng.between(u64::from(tokens.start), u64::from(tokens.end) - 1) as u32;
    arena.gather_token(plane, blocks, at, &mut row);
    let which = rng.below(row.len() as u64) as usize;
    row[which] = if row[which] == 0.5 { 1.5 } else { 0.5 };
    arena.scatter_token(plane, blocks, at, &row);
}

#[test]
fn random_traffic_gives_undisturbed_outputs_and_leaves_nothing_behind() {
    let mut total = Stats::default();
    let kept = KEPT_SEEDS.into_iter().map(|seed| (seed, false));
    for (seed, pauses) in kept.chain(FRESH_SEEDS.map(|seed| (seed, true))) {
        let run = std::panic::AssertUnwindSafe(|| {
            let mut world = World::new(seed, pauses);
            (0..MOVES).for_each(|_| world.random_move());
            world.drain();
            world.stats
        });
        let stats = std::panic::catch_unwind(run).unwrap_or_else(|failure| {
            eprintln!("failing seed: {seed}");
            std::panic::resume_unwind(failure)
        });
        total.steps += stats.steps;
        total.finished += stats.finished;
        total.cancelled += stats.cancelled;
        total.imported += stats.imported;
        total.given_up += stats.given_up;
        total.damaged += stats.damaged;
        total.caught += stats.caught;
        total.ghost_writes += stats.ghost_writes;
        total.preemptions += stats.preemptions;
        total.paused += stats.paused;
        total.cached_tokens += stats.cached_tokens;
    }
    println!("{total:?}");
    assert!(total.steps > 10_000);
    let happened = [
        total.finished,
        total.cancelled,
        total.imported,
        total.given_up,
        total.damaged,
        total.caught,
        total.ghost_writes,
        total.preemptions,
        total.paused,
        total.cached_tokens,
    ];
    assert!(happened.iter().all(|count| *count >= 20), "every kind of event occurs: {total:?}");
}
