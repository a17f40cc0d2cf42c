use proptest::prelude::*;

use super::*;

fn candidate(key: usize, requests: u32, prefill_tokens: u64) -> Candidate {
    Candidate {
        key,
        identity: key as u64,
        requests,
        prefill_tokens,
        prefill_tokens_per_s: Some(1000.0),
        slowness: 1.0,
        itl_ms: Some(10.0),
        kv_used: 0.0,
        cached_tokens: 0,
        held_tokens: 0,
    }
}

fn rules(policy: PolicyKind, disaggregation: Disaggregation) -> Rules {
    Rules { policy, disaggregation, seed: 42, slo_itl_s: 0.05, spill_requests: None }
}

const ALL: [PolicyKind; 7] = [
    PolicyKind::KvAware,
    PolicyKind::Prefix,
    PolicyKind::RoundRobin,
    PolicyKind::Random,
    PolicyKind::LeastLoaded,
    PolicyKind::PowerOfTwo,
    PolicyKind::Session,
];

fn free(_: usize, _: usize, _: u32) -> Option<f64> {
    Some(0.0)
}

fn work(ticket: u64) -> Work {
    Work { tokens: 500, ticket, session: None }
}

/// How often each of `count` idle decode workers is chosen in `turns` turns.
fn spread(policy: PolicyKind, count: usize, turns: u64) -> Vec<u32> {
    let decode = (0..count).map(|key| candidate(key, 0, 0)).collect();
    let snapshot = Snapshot { decode, prefill: Vec::new() };
    let mut chosen = vec![0; count];
    for ticket in 0..turns {
        let choice = choose(&snapshot, work(ticket), rules(policy, Disaggregation::Auto), &free).unwrap();
        chosen[choice.decode] += 1;
    }
    chosen
}

#[test]
fn nobody_to_decode_is_nobody() {
    let snapshot = Snapshot { decode: Vec::new(), prefill: vec![candidate(0, 0, 0)] };
    for policy in ALL {
        assert_eq!(choose(&snapshot, work(0), rules(policy, Disaggregation::Always), &free), None);
    }
}

#[test]
fn ties_are_spread_over_all() {
    assert_eq!(spread(PolicyKind::RoundRobin, 4, 400), [100; 4]);
    for policy in ALL {
        let chosen = spread(policy, 4, 4000);
        assert!(chosen.iter().all(|times| (800..1200).contains(times)), "{policy}: {chosen:?}");
    }
}

#[test]
fn the_less_loaded_worker_is_preferred() {
    let snapshot = Snapshot {
        decode: vec![candidate(0, 9, 0), candidate(1, 1, 0), candidate(2, 5, 0)],
        prefill: vec![],
    };
    for policy in [PolicyKind::LeastLoaded, PolicyKind::KvAware] {
        for ticket in 0..50 {
            let choice = choose(&snapshot, work(ticket), rules(policy, Disaggregation::Auto), &free).unwrap();
            assert_eq!(choice.decode, 1, "{policy}");
        }
    }
    let never_worst = (0..500).all(|ticket| {
        let rules = rules(PolicyKind::PowerOfTwo, Disaggregation::Auto);
        choose(&snapshot, work(ticket), rules, &free).unwrap().decode != 0
    });
    assert!(never_worst, "of two different workers the busiest of all is never the less loaded one");
}

#[test]
fn power_of_two_balances_better_than_random() {
    let worst = |policy: PolicyKind| {
        let mut decode: Vec<Candidate> = (0..16).map(|key| candidate(key, 0, 0)).collect();
        for ticket in 0..1600 {
            let snapshot = Snapshot { decode: decode.clone(), prefill: Vec::new() };
            let choice = choose(&snapshot, work(ticket), rules(policy, Disaggregation::Auto), &free).unwrap();
            decode[choice.decode].requests += 1;
        }
        decode.iter().map(|candidate| candidate.requests).max().unwrap()
    };
    assert!(worst(PolicyKind::PowerOfTwo) <= 104, "{}", worst(PolicyKind::PowerOfTwo));
    assert!(worst(PolicyKind::Random) > 110, "{}", worst(PolicyKind::Random));
}

fn ways(queue_p: f64, queue_d: f64, transfer_s: f64) -> Timing {
    let prefill = Prefill { queue_s: queue_p, compute_s: 0.5 };
    Timing { prefill, decode: Prefill { queue_s: queue_d, compute_s: 0.5 }, transfer_s }
}

#[test]
fn remote_prefill_must_pay_for_its_transfer() {
    assert!(!remote_is_sooner(&ways(0.0, 0.0, 0.0)), "equal and idle: stay");
    assert!(remote_is_sooner(&ways(0.0, 0.1, 0.05)));
    assert!(!remote_is_sooner(&ways(0.0, 0.1, 0.2)));
    assert!(!remote_is_sooner(&ways(0.3, 0.1, 0.0)));
}

#[test]
fn disaggregation_follows_the_load_of_both_sides() {
    let decide = |policy, disaggregation, busy_p: u64, busy_d: u64| {
        let snapshot =
            Snapshot { decode: vec![candidate(0, 4, busy_d)], prefill: vec![candidate(1, 0, busy_p)] };
        choose(&snapshot, work(1), rules(policy, disaggregation), &free).unwrap().prefill.is_some()
    };
    for policy in ALL {
        assert!(decide(policy, Disaggregation::Auto, 0, 4000), "{policy}: D is busy, P is not");
        assert!(!decide(policy, Disaggregation::Auto, 9000, 0), "{policy}: P is busy, D is not");
        assert!(decide(policy, Disaggregation::Always, 9000, 0), "{policy}");
        assert!(!decide(policy, Disaggregation::Never, 0, 9000), "{policy}");
    }
}

#[test]
fn the_joint_policy_takes_the_nearer_pair() {
    let snapshot = Snapshot {
        decode: vec![candidate(0, 1, 5000), candidate(1, 1, 5000)],
        prefill: vec![candidate(2, 0, 0), candidate(3, 0, 0)],
    };
    let transfer_s =
        |prefill: usize, decode: usize, _| Some(if (prefill, decode) == (3, 1) { 0.01 } else { 0.4 });
    for ticket in 0..20 {
        let rules = rules(PolicyKind::KvAware, Disaggregation::Auto);
        let choice = choose(&snapshot, work(ticket), rules, &transfer_s).unwrap();
        assert_eq!(choice, Choice { decode: 1, prefill: Some(3) });
    }
}

#[test]
fn a_worker_that_does_both_is_never_its_own_prefill_worker() {
    let both = vec![candidate(0, 0, 0)];
    let snapshot = Snapshot { decode: both.clone(), prefill: both };
    for policy in ALL {
        let choice = choose(&snapshot, work(0), rules(policy, Disaggregation::Always), &free).unwrap();
        assert_eq!(choice.prefill, None, "{policy}");
    }
}

#[test]
fn workers_that_are_about_as_good_share_the_work() {
    let mut decode = vec![candidate(0, 0, 0), candidate(1, 0, 0), candidate(2, 0, 0)];
    decode[0].prefill_tokens_per_s = Some(1010.0);
    decode[2].prefill_tokens_per_s = Some(500.0);
    let snapshot = Snapshot { decode, prefill: Vec::new() };
    let mut chosen = [0; 3];
    for ticket in 0..1000 {
        let rules = rules(PolicyKind::KvAware, Disaggregation::Auto);
        chosen[choose(&snapshot, work(ticket), rules, &free).unwrap().decode] += 1;
    }
    assert!(chosen[0] > 400 && chosen[1] > 400 && chosen[2] == 0, "{chosen:?}");
}

#[test]
fn a_worker_that_has_measured_nothing_is_tried() {
    let unmeasured = Candidate { prefill_tokens_per_s: None, itl_ms: None, ..candidate(2, 0, 0) };
    let fast = Candidate { prefill_tokens_per_s: Some(40_000.0), ..candidate(1, 0, 0) };
    let snapshot = Snapshot::new(vec![candidate(0, 3, 20_000)], vec![fast, unmeasured]);
    assert_eq!(snapshot.prefill[1].prefill_tokens_per_s, Some(40_000.0));
    assert_eq!(snapshot.prefill[1].itl_ms, Some(10.0));
    let tried = (0..100).any(|ticket| {
        let rules = rules(PolicyKind::KvAware, Disaggregation::Auto);
        choose(&snapshot, work(ticket), rules, &free).unwrap().prefill == Some(2)
    });
    assert!(tried);
}

#[test]
fn a_cached_prefix_is_worth_its_tokens_twice_and_no_more() {
    let with =
        |requests, queued, cached_tokens| Candidate { cached_tokens, ..candidate(0, requests, queued) };
    let chosen = |near: Candidate, far: Candidate| {
        let decode = vec![near, Candidate { key: 1, ..far }];
        let snapshot = Snapshot { decode, prefill: Vec::new() };
        let rules = rules(PolicyKind::KvAware, Disaggregation::Auto);
        choose(&snapshot, work(3), rules, &free).unwrap().decode
    };
    assert_eq!(chosen(with(0, 0, 400), with(0, 0, 0)), 0, "idle: where the prefix is");
    assert_eq!(
        chosen(with(0, 700, 400), with(0, 0, 0)),
        0,
        "waiting 700 tokens saves 400 here and to those who come next"
    );
    assert_eq!(chosen(with(0, 900, 400), with(0, 0, 0)), 1, "waiting 900 tokens does not");
}

#[test]
fn what_the_decode_worker_has_is_not_moved() {
    let cached = Candidate { cached_tokens: 480, ..candidate(1, 1, 5000) };
    let snapshot =
        Snapshot { decode: vec![candidate(0, 1, 5000), cached], prefill: vec![candidate(2, 0, 0)] };
    // A slow link: a millisecond a token.
    let transfer_s = |_, _, tokens: u32| Some(f64::from(tokens) * 0.001);
    for ticket in 0..20 {
        let rules = rules(PolicyKind::KvAware, Disaggregation::Always);
        let choice = choose(&snapshot, work(ticket), rules, &transfer_s).unwrap();
        assert_eq!(choice, Choice { decode: 1, prefill: Some(2) });
    }
}

#[test]
fn a_pair_to_be_avoided_is_avoided() {
    let snapshot = Snapshot {
        decode: vec![candidate(0, 0, 9000)],
        prefill: vec![candidate(1, 0, 0), candidate(2, 0, 0)],
    };
    let broken =
        |broken: &'static [usize]| move |p: usize, _: usize, _: u32| (!broken.contains(&p)).then_some(0.0);
    for policy in ALL {
        for ticket in 0..20 {
            let rules = rules(policy, Disaggregation::Always);
            let choice = choose(&snapshot, work(ticket), rules, &broken(&[1])).unwrap();
            assert_ne!(choice.prefill, Some(1), "{policy}");
            let alone = choose(&snapshot, work(ticket), rules, &broken(&[1, 2])).unwrap();
            assert_eq!(alone, Choice { decode: 0, prefill: None }, "{policy}: better alone than not at all");
        }
    }
}

#[test]
fn a_session_stays_where_it_is_while_workers_come_and_go() {
    let of = |session: u64, workers: &[u64]| {
        let candidates = workers.iter().enumerate();
        let decode =
            candidates.map(|(key, identity)| Candidate { identity: *identity, ..candidate(key, 0, 0) });
        let snapshot = Snapshot { decode: decode.collect(), prefill: Vec::new() };
        let work = Work { session: Some(session), ..work(session * 31) };
        let choice =
            choose(&snapshot, work, rules(PolicyKind::Session, Disaggregation::Auto), &free).unwrap();
        workers[choice.decode]
    };
    let mut counts = std::collections::BTreeMap::new();
    for session in 0..1000 {
        let at = of(session, &[10, 20, 30, 40]);
        *counts.entry(at).or_insert(0) += 1;
        assert_eq!(of(session, &[40, 30, 20, 10]), at, "whatever the order");
        let after = of(session, &[10, 30, 40]);
        assert!(after == at || at == 20, "only the sessions of a worker that is gone move");
    }
    assert!(counts.values().all(|count| (180..320).contains(count)), "{counts:?}");
}

#[test]
fn a_worker_too_far_ahead_is_passed_over() {
    let near = Candidate { cached_tokens: 400, ..candidate(0, 9, 0) };
    let snapshot = Snapshot { decode: vec![near, candidate(1, 2, 0)], prefill: Vec::new() };
    let chosen = |spill_requests| {
        let rules = Rules { spill_requests, ..rules(PolicyKind::Prefix, Disaggregation::Auto) };
        choose(&snapshot, work(1), rules, &free).unwrap().decode
    };
    assert_eq!((chosen(None), chosen(Some(7)), chosen(Some(6))), (0, 0, 1));
}

#[test]
fn large_fleets_are_searched_well_enough() {
    let mut worst: f64 = 1.0;
    for seed in 0..40u64 {
        let any = |key: usize, what: u64| draw(seed, key as u64, what);
        let make = |key: usize| Candidate {
            cached_tokens: (any(key, 1) % 4) as u32 * 120,
            prefill_tokens_per_s: Some(500.0 + (any(key, 2) % 2000) as f64),
            ..candidate(key, (any(key, 3) % 20) as u32, any(key, 4) % 3000)
        };
        let snapshot =
            Snapshot { decode: (0..100).map(make).collect(), prefill: (100..200).map(make).collect() };
        let transfer_s = |p: usize, d: usize, tokens: u32| {
            Some(f64::from(tokens) / (2000.0 + (draw(seed, p as u64, d as u64) % 20_000) as f64))
        };
        let rules = rules(PolicyKind::KvAware, Disaggregation::Auto);
        let choice = choose(&snapshot, work(seed), rules, &transfer_s).unwrap();
        let cost = |p: Option<usize>, d: usize| {
            let decode = &snapshot.decode[d];
            let (first, computing) = match p {
                Some(p) => {
                    let timing = timing(&snapshot.prefill[p - 100], decode, work(seed), &transfer_s).unwrap();
                    (timing.remote_s(), timing.prefill.compute_s)
                }
                None => {
                    let prefill = Prefill::on(decode, work(seed), Side::Decode);
                    (prefill.total_s(), prefill.compute_s)
                }
            };
            let spent = computing * joint::SPENT_PER_COMPUTE;
            first + predict::decode_cost_s(decode, rules.slo_itl_s) + spent
        };
        let all = (0..100).flat_map(|d| (100..200).map(Some).chain([None]).map(move |p| (p, d)));
        let lowest = all.map(|(p, d)| cost(p, d)).min_by(f64::total_cmp).unwrap();
        worst = worst.max(cost(choice.prefill, choice.decode) / lowest);
    }
    assert!(worst < 1.25, "{worst}");
}

fn any_candidates(from: usize) -> impl Strategy<Value = Vec<Candidate>> {
    let one = (
        0u32..50,
        0u64..20_000,
        prop::option::of(1.0f64..1e5),
        prop::option::of(0.1f64..500.0),
        0.0f64..1.0,
        0u32..5000,
    );
    prop::collection::vec(one, 1..6).prop_map(move |all| {
        let build =
            |(i, (requests, prefill_tokens, prefill_tokens_per_s, itl_ms, kv_used, cached_tokens))| {
                Candidate {
                    key: from + i,
                    identity: i as u64,
                    requests,
                    prefill_tokens,
                    prefill_tokens_per_s,
                    slowness: 1.0,
                    itl_ms,
                    kv_used,
                    cached_tokens,
                    held_tokens: 0,
                }
            };
        all.into_iter().enumerate().map(build).collect()
    })
}

proptest! {
    #[test]
    fn a_choice_is_among_those_offered_and_repeats(
        decode in any_candidates(0),
        prefill in any_candidates(100),
        ticket in any::<u64>(),
        tokens in 0u32..100_000,
        policy in prop::sample::select(&ALL[..]),
    ) {
        let snapshot = Snapshot { decode, prefill };
        let rules = rules(policy, Disaggregation::Auto);
        let work = Work { tokens, ticket, session: None };
        let choice = choose(&snapshot, work, rules, &free).unwrap();
        prop_assert!(snapshot.decode.iter().any(|candidate| candidate.key == choice.decode));
        if let Some(key) = choice.prefill {
            let prefill = snapshot.prefill.iter().find(|candidate| candidate.key == key).unwrap();
            let decode = snapshot.decode.iter().find(|candidate| candidate.key == choice.decode).unwrap();
            prop_assert!(remote_is_sooner(&super::timing(prefill, decode, work, &free).unwrap()));
        }
        prop_assert_eq!(choose(&snapshot, work, rules, &free), Some(choice));
    }
}

#[test]
fn a_chat_begins_where_there_is_room_and_stays_where_it_is() {
    let chosen = |cached: [u32; 2], tokens: u32| {
        let worker = |key: usize, held_tokens| Candidate {
            cached_tokens: cached[key],
            held_tokens,
            ..candidate(key, 0, 0)
        };
        let snapshot = Snapshot::new(vec![worker(0, 20_000), worker(1, 0)], Vec::new());
        let work = Work { tokens, ticket: 1, session: None };
        let rules = rules(PolicyKind::KvAware, Disaggregation::Never);
        choose(&snapshot, work, rules, &|_, _, _| Some(0.0)).unwrap().decode
    };
    assert_eq!(chosen([200, 100], 264), 1, "a system prompt is soon computed once more");
    assert_eq!(chosen([1800, 200], 2000), 0, "what only one has is not computed again for the sake of room");
    assert_eq!(chosen([264, 264], 264), 1, "of equals the emptier");
}
