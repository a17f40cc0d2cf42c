use std::time::Duration;

use baton_config::{Epoch, WorkerId};

use super::super::measure::Sample;
use super::*;

mod world;

use world::{Load, World};

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A pool's policy with short windows.
fn scale(role: Role, min: u32, max: u32) -> Autoscale {
    Autoscale { up_after: secs(3), down_after: secs(60), ..Autoscale::new(role, min, max) }
}

fn idle(worker: &str, at: Instant) -> WorkerInput {
    let sample = Sample {
        at,
        running: 0,
        waiting: 0,
        pending_tokens: 0,
        prefilled_tokens: 0,
        prompt_tokens: Some(1000.0),
        prefill_tokens_per_s: Some(10_000.0),
        itl_ms: Some(20.0),
        blocks: 1000,
        blocks_held: 0,
    };
    WorkerInput {
        worker: worker.parse().unwrap(),
        epoch: Epoch(1),
        state: WorkerState::Ready,
        sample: Some(sample),
    }
}

/// One pool whose workers all say the same, moment by moment; decisions are followed at once.
struct Lab {
    now: Instant,
    memory: Memory,
    pool: PoolInput,
    others: Vec<PoolInput>,
    told: Vec<Decision>,
}

impl Lab {
    fn new(role: Role, scale: Autoscale, workers: u32) -> Self {
        let pool = PoolInput {
            name: "pool".parse().unwrap(),
            role,
            scale: Some(scale),
            replicas: workers,
            decided: Some(workers),
            found: None,
            pinned: None,
            workers: Vec::new(),
        };
        Self {
            now: Instant::now(),
            memory: Memory::new(secs(10)),
            pool,
            others: Vec::new(),
            told: Vec::new(),
        }
    }

    /// So many seconds with so many ready workers, each as `change` makes it.
    fn run(&mut self, seconds: u64, ready: u32, change: impl Fn(&mut WorkerInput)) -> u32 {
        for _ in 0..seconds {
            self.now += secs(1);
            let workers = (0..ready).map(|i| idle(&format!("w-{i}"), self.now));
            self.pool.workers = workers
                .map(|mut worker| {
                    change(&mut worker);
                    worker
                })
                .collect();
            let pools = [vec![self.pool.clone()], self.others.clone()].concat();
            for decision in decide(&mut self.memory, self.now, &Inputs { pools }) {
                self.pool.decided = Some(decision.desired);
                self.told.push(decision);
            }
        }
        self.pool.decided.unwrap_or(self.pool.replicas)
    }

    fn kinds(&self) -> Vec<Kind> {
        self.told.iter().map(|decision| decision.kind).collect()
    }

    fn reason(&self) -> &str {
        &self.told.last().expect("something was decided").reason
    }
}

fn pending(tokens: u64) -> impl Fn(&mut WorkerInput) {
    move |worker| {
        if let Some(sample) = &mut worker.sample {
            sample.pending_tokens = tokens;
        }
    }
}

fn holding(blocks: u32, waiting: u32) -> impl Fn(&mut WorkerInput) {
    move |worker| {
        if let Some(sample) = &mut worker.sample {
            (sample.blocks_held, sample.running, sample.waiting) = (blocks, blocks / 100, waiting);
        }
    }
}

fn streaming(streams: u32, itl_ms: f64) -> impl Fn(&mut WorkerInput) {
    move |worker| {
        if let Some(sample) = &mut worker.sample {
            (sample.running, sample.itl_ms) = (streams, Some(itl_ms));
        }
    }
}

#[test]
fn a_queue_makes_the_pool_grow_by_its_excess_and_at_most_to_twice_its_size() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 2);
    assert_eq!(lab.run(2, 2, pending(8_120)), 2, "not before the excess has lasted");
    assert_eq!(lab.run(3, 2, pending(8_120)), 4);
    assert_eq!(lab.reason(), "queue wait 812 ms > 250 ms over 2 ready workers, 0 joining -> 4 of max 8");
    assert_eq!(lab.run(30, 2, pending(80_000)), 4, "those asked for have not come");
    assert_eq!(lab.run(4, 4, pending(2_900)), 5, "16 % over: one more");
    assert_eq!(lab.run(30, 5, pending(2_700)), 5, "within the tolerance");
    lab.run(10, 5, pending(80_000));
    assert_eq!(lab.run(60, 8, pending(80_000)), 8);
    assert_eq!(lab.kinds(), [Kind::Up, Kind::Up, Kind::Up, Kind::AtMax]);
    assert!(lab.reason().contains("8 is the most"), "{}", lab.reason());
}

/// Under load, but for one that is joining.
fn but_one_is_joining(worker: &mut WorkerInput) {
    pending(80_000)(worker);
    if worker.worker.as_str() == "w-2" {
        (worker.state, worker.sample) = (WorkerState::Joining, None);
    }
}

#[test]
fn who_joins_is_waited_for_and_who_never_gets_ready_not_for_ever() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 3);
    assert_eq!(lab.run(299, 3, but_one_is_joining), 3, "it may still get ready");
    assert_eq!(lab.run(10, 3, but_one_is_joining), 4, "two work, and twice as many are asked for");
    assert!(lab.reason().contains("1 joining"), "{}", lab.reason());
    // The fourth came, and the third was ready for once: it is waited for anew.
    lab.run(1, 4, pending(80_000));
    let decided = lab.run(200, 4, but_one_is_joining);
    assert_eq!(lab.run(90, 4, but_one_is_joining), decided);
    assert!(lab.run(20, 4, but_one_is_joining) > decided);
}

/// Idle, but for one that never gets ready.
fn never_ready(name: &str) -> impl Fn(&mut WorkerInput) {
    move |worker| {
        if worker.worker.as_str() == name {
            (worker.state, worker.sample) = (WorkerState::Joining, None);
        }
    }
}

#[test]
fn who_never_gets_ready_keeps_the_pool_from_shrinking_only_for_a_while() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 8);
    assert_eq!(lab.run(299, 8, never_ready("w-0")), 8, "it may still get ready");
    assert_eq!(lab.run(10, 8, never_ready("w-0")), 6, "a quarter");
    assert_eq!(lab.run(290, 6, never_ready("w-0")), 6, "slowly: there is time to find out who is missing");
    assert_eq!(lab.run(20, 6, never_ready("w-0")), 5);
    lab.run(2_000, 3, never_ready("w-0"));
    assert_eq!(
        lab.run(2_000, 2, never_ready("w-0")),
        2,
        "the one that works is not given for the one that doesn't"
    );
    assert_eq!(lab.run(70, 2, pending(0)), 1, "it got ready after all");
    // Nor does it matter whether who is missing ever showed up.
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 8);
    assert_eq!(lab.run(299, 3, pending(0)), 8);
    assert_eq!(lab.run(3, 3, pending(0)), 6);
    assert_eq!(lab.run(290, 3, pending(0)), 6);
    assert_eq!(lab.run(20, 3, pending(0)), 5);
}

#[test]
fn a_pool_shrinks_slowly_and_only_after_the_hold_down() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 8);
    assert_eq!(lab.run(60, 8, pending(0)), 8, "the hold-down has not passed");
    assert_eq!(lab.run(3, 8, pending(0)), 6, "a quarter");
    assert!(lab.reason().ends_with("1 would have done for 60000 ms -> 6 of min 1"), "{}", lab.reason());
    assert_eq!(lab.run(60, 8, pending(0)), 6, "two have still to go");
    assert_eq!(lab.run(5, 6, pending(0)), 5);
    assert_eq!(lab.run(5, 5, pending(9_000)), 8, "load comes back: at once");
    assert_eq!(lab.run(50, 8, pending(0)), 8, "and the hold-down begins anew");
    assert_eq!(lab.kinds(), [Kind::Down, Kind::Down, Kind::Up]);
}

#[test]
fn a_pool_rests_between_the_steps_in_which_it_shrinks() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 8);
    let mut shrunk_at = Vec::new();
    for second in 0..120 {
        let current = lab.pool.decided.unwrap();
        if lab.run(1, current, pending(0)) < current {
            shrunk_at.push(second);
        }
    }
    assert_eq!(lab.pool.decided, Some(1), "everybody who goes is gone within a second");
    assert!(shrunk_at.windows(2).all(|pair| pair[1] - pair[0] >= 3), "{shrunk_at:?}");
}

/// Lets four decode workers go down to three, which turn out to be too few.
fn flapped() -> Lab {
    let mut lab = Lab::new(Role::Decode, scale(Role::Decode, 1, 8), 4);
    assert_eq!(lab.run(70, 4, holding(500, 0)), 3);
    assert_eq!(lab.run(10, 3, holding(1_000, 0)), 4, "too few");
    lab
}

#[test]
fn a_pool_that_shrank_too_soon_waits_longer_the_next_time_while_the_load_is_much_the_same() {
    let mut lab = flapped();
    assert_eq!(lab.run(240, 4, holding(350, 0)), 4, "four times the hold-down");
    assert_eq!(lab.run(200, 4, holding(350, 0)), 3);
    let mut lab = flapped();
    assert_eq!(lab.run(80, 4, holding(50, 0)), 3, "what was learnt was of another load");
}

#[test]
fn workers_that_do_not_answer_keep_the_pool_as_it_is() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 4);
    let frozen = |worker: &mut WorkerInput| {
        if worker.worker.as_str() == "w-3" {
            worker.sample = None;
        }
    };
    assert_eq!(lab.run(600, 4, frozen), 4);
    assert_eq!(lab.kinds(), [Kind::Silent]);
    assert_eq!(lab.reason(), "1 of 4 ready workers do not answer: stays at 4");
    assert_eq!(lab.run(600, 4, |worker| worker.sample = None), 4);
    assert_eq!(lab.run(59, 4, pending(0)), 4, "what was not known is no reason to shrink");
    assert_eq!(lab.run(10, 4, pending(0)), 3);
    lab.told.clear();
    assert_eq!(lab.run(600, 0, pending(0)), 3, "nobody is there: nothing is known");
    assert_eq!(lab.kinds(), [Kind::Silent]);
}

#[test]
fn a_signal_that_is_not_known_is_no_reason_to_shrink() {
    let mut policy = scale(Role::Prefill, 1, 8);
    policy.target.itl = Some(Duration::from_millis(50));
    let mut lab = Lab::new(Role::Prefill, policy, 4);
    // How long the queue is in seconds nobody can tell; the other signal is well.
    let slow = |worker: &mut WorkerInput| {
        if let Some(sample) = &mut worker.sample {
            (sample.pending_tokens, sample.prefill_tokens_per_s) = (50, None);
        }
    };
    assert_eq!(lab.run(600, 4, slow), 4);
    assert_eq!(lab.run(59, 4, pending(0)), 4, "nor is it afterwards");
    assert_eq!(lab.run(10, 4, pending(0)), 3);
}

#[test]
fn those_who_answer_speak_for_those_who_do_not() {
    let mut lab = Lab::new(Role::Decode, scale(Role::Decode, 1, 8), 2);
    let half = |worker: &mut WorkerInput| {
        holding(1000, 2)(worker);
        if worker.worker.as_str() == "w-1" {
            worker.sample = None;
        }
    };
    assert_eq!(lab.run(10, 2, half), 3, "{:?}", lab.told);
}

#[test]
fn prefill_is_not_grown_while_decode_has_no_room() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 2);
    let mut decode = Lab::new(Role::Decode, scale(Role::Decode, 1, 8), 1).pool;
    decode.name = "decode".parse().unwrap();
    decode.scale = None;
    let mut full = idle("d-0", lab.now + secs(3600));
    holding(1000, 5)(&mut full);
    decode.workers = vec![full];
    lab.others = vec![decode.clone()];
    assert_eq!(lab.run(60, 2, pending(50_000)), 2);
    assert_eq!(lab.kinds(), [Kind::DecodeFull]);
    assert!(
        lab.reason().contains("decode has no room: 150 % of the KV of decode held or waited for"),
        "{}",
        lab.reason()
    );
    assert_eq!(lab.run(600, 2, pending(0)), 2, "nor is it shrunk: decode holds the prompts back");
    let mut roomy = idle("d-0", lab.now + secs(3600));
    holding(500, 0)(&mut roomy);
    lab.others[0].workers = vec![roomy];
    lab.run(5, 2, pending(0));
    assert_eq!(lab.run(5, 2, pending(50_000)), 4, "decode has room again");
}

#[test]
fn decode_grows_by_what_is_held_and_waited_for() {
    let mut lab = Lab::new(Role::Decode, scale(Role::Decode, 1, 8), 2);
    assert_eq!(lab.run(60, 2, holding(850, 0)), 2, "within the tolerance");
    assert_eq!(lab.run(5, 2, holding(1000, 2)), 3, "2400 of 2000 blocks, 800 a worker");
    assert_eq!(
        lab.reason(),
        "KV held or waited for 120 % > 80 % over 2 ready workers, 0 joining -> 3 of max 8"
    );
    assert_eq!(lab.run(200, 3, holding(700, 0)), 3, "two would be beyond the target");
    assert_eq!(lab.run(120, 3, holding(400, 0)), 2);
}

#[test]
fn the_time_between_tokens_counts_where_more_workers_shorten_it() {
    let mut policy = scale(Role::Decode, 1, 8);
    policy.target.itl = Some(Duration::from_millis(50));
    let mut lab = Lab::new(Role::Decode, policy, 2);
    assert_eq!(lab.run(5, 2, streaming(8, 70.0)), 3);
    assert_eq!(lab.run(200, 3, streaming(5, 49.0)), 3, "a line through the two points says 73 ms for two");
    assert_eq!(lab.run(80, 3, streaming(1, 25.0)), 2);
    lab.told.clear();
    assert_eq!(lab.run(60, 2, streaming(1, 80.0)), 2);
    assert_eq!(lab.kinds(), [Kind::Futile]);
    assert!(
        lab.reason().contains("80 ms with at most one stream a worker: more workers would not help"),
        "{}",
        lab.reason()
    );
    assert_eq!(lab.run(200, 2, streaming(0, 80.0)), 1, "without streams the last time says nothing");
}

#[test]
fn a_first_token_that_computing_alone_makes_late_is_no_reason_to_grow() {
    let mut policy = scale(Role::Prefill, 1, 8);
    policy.target.ttft = Some(Duration::from_millis(90));
    policy.target.queue_wait = None;
    let mut lab = Lab::new(Role::Prefill, policy.clone(), 2);
    assert_eq!(lab.run(60, 2, pending(500)), 2, "a typical prompt takes 100 ms");
    assert_eq!(lab.kinds(), [Kind::Futile]);
    policy.target.ttft = Some(Duration::from_millis(200));
    let mut lab = Lab::new(Role::Prefill, policy, 2);
    assert_eq!(lab.run(5, 2, pending(1_500)), 3, "150 ms of wait where 100 ms are left");
    assert_eq!(
        lab.reason(),
        "predicted first token 250 ms > 200 ms over 2 ready workers, 0 joining -> 3 of max 8"
    );
}

#[test]
fn an_operator_has_the_last_word_and_gives_it_back() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 2);
    lab.run(30, 2, pending(0));
    lab.pool.pinned = Some(5);
    assert_eq!(lab.run(2, 2, pending(0)), 5, "at once");
    assert_eq!(lab.run(600, 5, pending(90_000)), 5);
    assert_eq!(lab.kinds(), [Kind::Pinned]);
    assert_eq!(lab.reason(), "an operator wants 5; `baton scale pool auto` gives it back");
    lab.pool.pinned = None;
    assert_eq!(lab.run(59, 5, pending(0)), 5, "the hold-down begins when the operator lets go");
    assert_eq!(lab.run(10, 5, pending(0)), 4);
}

#[test]
fn a_new_leader_waits_for_the_workers_and_carries_on_from_them() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 2);
    lab.pool.decided = None;
    lab.run(9, 1, pending(90_000));
    assert!(lab.told.is_empty(), "workers find back");
    assert_eq!(lab.run(2, 4, pending(0)), 4);
    assert_eq!(lab.kinds(), [Kind::Adopted]);
    assert_eq!(lab.reason(), "carries on from 4: 2 by the fleet document, 4 registered");
    let mut policy = scale(Role::Prefill, 1, 8);
    policy.scaler = ScalerSpec::Kubernetes(baton_config::fleet::KubernetesSpec {
        namespace: "default".to_owned(),
        kind: baton_config::fleet::WorkloadKind::Deployment,
        name: "prefill".to_owned(),
        kubeconfig: None,
    });
    let mut lab = Lab::new(Role::Prefill, policy, 2);
    lab.pool.decided = None;
    lab.run(60, 3, pending(0));
    assert!(lab.told.is_empty(), "what Kubernetes was asked for is not known yet");
    lab.pool.found = Some(6);
    assert_eq!(lab.run(1, 3, pending(0)), 6);
}

#[test]
fn a_gap_makes_the_leader_forget() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 4);
    lab.run(55, 4, pending(0));
    lab.now += secs(30);
    assert_eq!(lab.run(55, 4, pending(0)), 4, "nobody looked in between");
    assert_eq!(lab.run(10, 4, pending(0)), 3);
}

#[test]
fn a_decision_that_was_not_written_is_taken_again() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 1, 8), 2);
    for _ in 0..4 {
        lab.run(1, 2, pending(8_000));
        if lab.pool.decided != Some(2) {
            lab.pool.decided = Some(2);
            lab.memory.forget(&lab.pool.name);
        }
    }
    assert_eq!(lab.kinds(), [Kind::Up]);
    assert_eq!(lab.run(5, 2, pending(8_000)), 4);
    assert_eq!(lab.kinds(), [Kind::Up, Kind::Up]);
}

#[test]
fn a_dry_run_tells_what_it_would_do_and_does_not_run_away() {
    let policy = Autoscale { dry_run: true, ..scale(Role::Prefill, 1, 8) };
    let mut lab = Lab::new(Role::Prefill, policy, 2);
    assert_eq!(lab.run(600, 2, pending(90_000)), 4, "two workers ask for at most four");
    assert_eq!(lab.run(90, 1, pending(0)), 1, "nobody is missing whom nobody has started");
    assert!(lab.kinds().iter().all(|kind| matches!(kind, Kind::Up | Kind::Down)), "{:?}", lab.kinds());
}

#[test]
fn a_pool_scaled_to_nothing_begins_when_the_others_are_loaded() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 0, 4), 0);
    let mut both = Lab::new(Role::Both, scale(Role::Both, 1, 4), 1).pool;
    (both.name, both.scale) = ("both".parse().unwrap(), None);
    both.workers = vec![idle("b-0", lab.now + secs(3600))];
    lab.others = vec![both.clone()];
    assert_eq!(lab.run(60, 0, pending(0)), 0);
    pending(4_000)(&mut lab.others[0].workers[0]);
    assert_eq!(lab.run(5, 0, pending(0)), 1);
    assert_eq!(lab.reason(), "queue wait 300 ms > 250 ms in another pool, 0 workers here -> 1");
    pending(0)(&mut lab.others[0].workers[0]);
    assert_eq!(lab.run(70, 1, pending(0)), 0, "and ends again");
}

#[test]
fn a_changed_document_moves_the_pool_into_its_bounds() {
    let mut lab = Lab::new(Role::Prefill, scale(Role::Prefill, 2, 4), 9);
    assert_eq!(lab.run(1, 9, pending(0)), 4);
    assert_eq!(lab.reason(), "9 is outside of 2 to 4 -> 4");
}

#[test]
fn a_load_step_is_followed_up_and_down_in_a_fleet_of_queues() {
    for seed in 0..20 {
        let mut world = World::new(seed, scale(Role::Prefill, 1, 8), Some(scale(Role::Decode, 1, 8)));
        world.run(120, Load { prompts_per_s: 1.0, ..Load::LIGHT });
        assert_eq!(world.desired("prefill"), 1, "seed {seed}: {:#?}", world.told);
        // 16 prompts of 1,000 tokens a second, where a worker computes 5,000 tokens.
        world.run(240, Load { prompts_per_s: 16.0, ..Load::LIGHT });
        let high = world.desired("prefill");
        assert!((4..=8).contains(&high), "seed {seed}: {high}, {:#?}", world.told);
        assert!(world.wait_ms("prefill") < 1_000.0, "seed {seed}: the queue is worked off");
        world.run(600, Load { prompts_per_s: 1.0, ..Load::LIGHT });
        assert_eq!(world.desired("prefill"), 1, "seed {seed}: {:#?}", world.told);
        let explained = |decision: &Decision| decision.reason.contains("->") || decision.kind != Kind::Up;
        assert!(world.told.iter().all(explained), "seed {seed}: {:#?}", world.told);
    }
}

/// Moves of each pool in half an hour of constant load, after half an hour in which it settled.
fn moves_under_constant_load(seed: u64, even: bool) -> Vec<usize> {
    let (prefill, decode) = (scale(Role::Prefill, 1, 12), Autoscale::new(Role::Decode, 1, 12));
    let mut world = World::new(seed, prefill, Some(decode));
    let load = Load { even, ..world.random_load() };
    world.run(1_800, load);
    let settled = world.told.len();
    world.run(1_800, load);
    let moves = |pool: &str| {
        world.told[settled..].iter().filter(|d| d.pool.as_str() == pool && d.from != d.desired).count()
    };
    ["prefill", "decode"].map(moves).to_vec()
}

#[test]
fn a_constant_load_moves_a_pool_at_most_once_after_it_has_settled() {
    for seed in 0..12 {
        let moves = moves_under_constant_load(seed, true);
        assert!(moves.iter().all(|moves| *moves <= 1), "seed {seed}: {moves:?}");
    }
}

#[test]
fn random_bursts_of_a_constant_load_seldom_move_a_pool() {
    let moves: Vec<usize> = (0..12).flat_map(|seed| moves_under_constant_load(seed, false)).collect();
    assert!(moves.iter().all(|moves| *moves <= 4), "{moves:?}");
    assert!(moves.iter().sum::<usize>() <= 12, "{moves:?}");
}

#[test]
fn slow_joiners_are_waited_for() {
    for seed in 0..10 {
        let mut world = World::new(seed, scale(Role::Prefill, 1, 8), None);
        world.join_delay = secs(90);
        world.run(60, Load::LIGHT);
        world.run(85, Load { prompts_per_s: 30.0, ..Load::LIGHT });
        assert_eq!(world.desired("prefill"), 2, "seed {seed}: {:#?}", world.told);
    }
}
