use std::collections::{BTreeMap, HashSet};

use super::*;

/// Whether the books are consistent: every request is in one place, and in the one that the counts say.
fn audit(fair: &Fair) {
    let placed = fair.entries.values().filter(|entry| entry.placed).count();
    assert_eq!(placed, fair.placed);
    assert_eq!(fair.entries.len(), fair.placed + fair.waiting);
    assert!(fair.placed <= fair.places && fair.waiting <= fair.queue);
    assert!(fair.waiting == 0 || fair.placed == fair.places, "somebody waits beside a free place");
    let lanes = || fair.lanes.iter().enumerate();
    let waiting: BTreeMap<Id, usize> =
        lanes().flat_map(|(at, lane)| lane.waiting.iter().map(move |(_, id)| (*id, at))).collect();
    assert_eq!(waiting.len(), fair.waiting);
    for (id, at) in waiting {
        assert!(!fair.entries[&id].placed && fair.entries[&id].lane == at);
    }
    let ordered: BTreeSet<_> = lanes()
        .filter(|(_, lane)| !lane.waiting.is_empty())
        .map(|(at, lane)| (Reverse(lane.priority), lane.tag, at))
        .collect();
    assert_eq!(ordered, fair.order);
    let active: u32 = fair.ledgers.values().map(Ledger::active).sum();
    assert_eq!(active as usize, fair.entries.len());
}

/// SplitMix64: a seed replays everything.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % below
    }
}

fn offer(tenant: &str, weight: u32, cost: u64, deadline: Instant) -> Offer {
    Offer {
        tenant: Arc::from(tenant),
        weight,
        priority: 0,
        ledger: Arc::from(tenant),
        quota: Quota::default(),
        cost,
        deadline,
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn id(offered: Offered) -> Id {
    match offered {
        Offered::Placed(id) | Offered::Waits(id, _) => id,
    }
}

#[test]
fn every_request_ends_in_one_way_whatever_happens() {
    for seed in 0..300 {
        let mut dice = Dice(seed);
        let mut now = Instant::now();
        let (places, queue) = (1 + dice.roll(5) as u32, dice.roll(8) as u32);
        let mut fair = Fair::new(places, queue);
        let mut live: Vec<Id> = Vec::new();
        let mut placed: HashSet<Id> = HashSet::new();
        let (mut offered, mut refused, mut evicted, mut ended) = (0, 0, 0, 0);
        for _ in 0..400 {
            now += ms(dice.roll(2000));
            if dice.roll(5) < 3 {
                offered += 1;
                let tenant = format!("t{}", dice.roll(4));
                let weight = 1 + dice.roll(3) as u32;
                let mut offer = offer(&tenant, weight, 1 + dice.roll(500), now + ms(1 + dice.roll(60_000)));
                offer.priority = dice.roll(3) as u32;
                if dice.roll(2) == 0 {
                    offer.quota = Quota {
                        requests_per_min: Some(1 + dice.roll(60)),
                        tokens_per_min: Some(1 + dice.roll(5000)),
                        concurrency: Some(1 + dice.roll(4) as u32),
                    };
                }
                match fair.offer(now, &offer) {
                    Ok(Offered::Placed(id)) => {
                        live.push(id);
                        placed.insert(id);
                    }
                    Ok(Offered::Waits(id, gone)) => {
                        live.push(id);
                        if let Some((gone, _)) = gone {
                            evicted += 1;
                            live.retain(|id| *id != gone);
                            assert!(!placed.contains(&gone), "seed {seed}: who has a place keeps it");
                        }
                    }
                    Err(why) => {
                        refused += 1;
                        // What a key has used beyond its limit may take any time to flow in again.
                        let of_key =
                            matches!(why.reason, Reason::Requests | Reason::Tokens | Reason::Concurrency);
                        assert!(of_key || why.after <= AWAY_MAX, "seed {seed}");
                    }
                }
            } else if !live.is_empty() {
                let gone = live.swap_remove(dice.roll(live.len() as u64) as usize);
                ended += 1;
                if let Some(next) = fair.end(now, gone, dice.roll(1000)) {
                    assert!(placed.contains(&gone), "seed {seed}: only a place makes room");
                    assert!(placed.insert(next) && live.contains(&next), "seed {seed}");
                }
            }
            audit(&fair);
            assert_eq!(offered, refused + evicted + ended + live.len(), "seed {seed}");
        }
        while let Some(last) = live.pop() {
            fair.end(now, last, 10);
            audit(&fair);
        }
        assert_eq!((fair.placed, fair.waiting), (0, 0), "seed {seed}: all places are back");
    }
}

/// Serves tenants that always have requests waiting; gives the tokens that each of them got.
fn served(seed: u64, tenants: &[(&str, u32, u32)], grants: usize) -> Vec<u64> {
    let mut dice = Dice(seed);
    let mut now = Instant::now();
    let mut fair = Fair::new(4, 64);
    let mut got = vec![0; tenants.len()];
    let mut of: HashMap<Id, (usize, u64)> = HashMap::new();
    let mut running: Vec<Id> = Vec::new();
    let far = now + Duration::from_secs(1 << 30);
    for step in 0..grants + 8 {
        for (at, (tenant, weight, priority)) in tenants.iter().enumerate() {
            // The prompt is known, the length of the answer is not; each tenant has a habit of its own.
            while !of.values().any(|(owner, _)| *owner == at)
                || fair.lanes.get(at).is_some_and(|lane| lane.waiting.len() < 4)
            {
                let prompt = 1 + dice.roll(200);
                let used = prompt + dice.roll(100 * (at as u64 + 1));
                let mut offer = offer(tenant, *weight, prompt, far);
                offer.priority = *priority;
                let offered = fair.offer(now, &offer).unwrap();
                if let Offered::Placed(id) = offered {
                    running.push(id);
                }
                of.insert(id(offered), (at, used));
            }
        }
        now += ms(1 + dice.roll(20));
        let ends = running.swap_remove(dice.roll(running.len() as u64) as usize);
        let (owner, used) = of.remove(&ends).unwrap();
        if step >= 8 {
            got[owner] += used;
        }
        running.extend(fair.end(now, ends, used));
        audit(&fair);
    }
    got
}

#[test]
fn tokens_are_shared_by_weight() {
    for seed in 0..10 {
        let got = served(seed, &[("a", 1, 0), ("b", 2, 0), ("c", 5, 0)], 6000);
        let all: u64 = got.iter().sum();
        for (got, weight) in got.iter().zip([1.0, 2.0, 5.0]) {
            let (share, due) = (*got as f64 / all as f64, weight / 8.0);
            assert!((share / due - 1.0).abs() < 0.04, "seed {seed}: {share} of {due}");
        }
    }
}

#[test]
fn priority_goes_first_and_starves_nobody() {
    let mut now = Instant::now();
    let mut fair = Fair::new(1, 100);
    let (mut high, mut low) = (0, 0);
    let mut of = HashMap::new();
    let mut running = None;
    for _ in 0..2000 {
        for (name, priority) in [("high", 5), ("low", 0)] {
            while of.values().filter(|of| **of == name).count() < 3 {
                let mut offer = offer(name, 1, 10, now + Duration::from_secs(10));
                offer.priority = priority;
                let offered = fair.offer(now, &offer).unwrap();
                if let Offered::Placed(id) = offered {
                    running = Some(id);
                }
                of.insert(id(offered), name);
            }
        }
        now += ms(500);
        let ends = running.take().unwrap();
        match of.remove(&ends) {
            Some("high") => high += 1,
            _ => low += 1,
        }
        running = fair.end(now, ends, 10);
    }
    let share = f64::from(low) / f64::from(high + low);
    assert!((0.1..0.15).contains(&share), "every eighth place: {share}");
}

#[test]
fn who_was_away_is_owed_nothing_and_owes_nothing() {
    let now = Instant::now();
    let far = now + Duration::from_secs(3600);
    let mut fair = Fair::new(1, 1000);
    // Neither whoever is new nor whoever was there long ago.
    let early = id(fair.offer(now, &offer("old", 1, 1000, far)).unwrap());
    assert_eq!(fair.end(now, early, 1000), None);
    // One tenant alone uses much.
    for _ in 0..100 {
        let only = id(fair.offer(now, &offer("busy", 1, 1000, far)).unwrap());
        assert_eq!(fair.end(now, only, 1000), None);
    }
    let mut running = id(fair.offer(now, &offer("busy", 1, 1000, far)).unwrap());
    let mut of = HashMap::new();
    for _ in 0..20 {
        for name in ["busy", "new", "old"] {
            of.insert(id(fair.offer(now, &offer(name, 1, 1000, far)).unwrap()), name);
        }
    }
    let mut turns = Vec::new();
    while let Some(next) = fair.end(now, running, 1000) {
        turns.push(of[&next]);
        running = next;
    }
    for name in ["busy", "new", "old"] {
        let got = turns.iter().take(30).filter(|turn| **turn == name).count();
        assert!((9..=11).contains(&got), "in turns from the beginning: {got} of 30 for {name}");
    }
}

#[test]
fn the_urgent_go_first_within_a_tenant() {
    let now = Instant::now();
    let mut fair = Fair::new(1, 10);
    let running = id(fair.offer(now, &offer("a", 1, 1, now + ms(9000))).unwrap());
    let late = id(fair.offer(now, &offer("a", 1, 1, now + ms(8000))).unwrap());
    let soon = id(fair.offer(now, &offer("a", 1, 1, now + ms(2000))).unwrap());
    assert_eq!(fair.end(now, running, 1), Some(soon));
    assert_eq!(fair.end(now, soon, 1), Some(late));
}

#[test]
fn a_full_queue_makes_room_for_who_holds_less_of_it() {
    let now = Instant::now();
    let far = now + Duration::from_secs(60);
    let mut fair = Fair::new(1, 5);
    fair.offer(now, &offer("flood", 1, 1, far)).unwrap();
    let waiting: Vec<Id> =
        (0..5).map(|n| id(fair.offer(now, &offer("flood", 1, 1, far + ms(n))).unwrap())).collect();
    let refused = fair.offer(now, &offer("flood", 1, 1, far)).unwrap_err();
    assert_eq!(refused.reason, Reason::QueueFull);
    let taken = fair.offer(now, &offer("quiet", 1, 1, far)).unwrap();
    let Offered::Waits(_, Some((gone, _))) = taken else { panic!("{taken:?}") };
    assert_eq!(gone, waiting[4], "the least urgent one of who floods");
    audit(&fair);
    // With three against two, nobody holds more than the other one would.
    fair.offer(now, &offer("quiet", 1, 1, far)).unwrap();
    assert_eq!(fair.offer(now, &offer("quiet", 1, 1, far)).unwrap_err().reason, Reason::QueueFull);
    audit(&fair);
    // Who goes first gives way to nobody who comes later.
    let mut fair = Fair::new(1, 2);
    let urgent = Offer { priority: 1, ..offer("urgent", 1, 1, far) };
    for _ in 0..3 {
        fair.offer(now, &urgent).unwrap();
    }
    assert_eq!(fair.offer(now, &offer("quiet", 1, 1, far)).unwrap_err().reason, Reason::QueueFull);
}

#[test]
fn turns_are_by_what_was_used_whatever_was_expected() {
    let now = Instant::now();
    let far = now + Duration::from_secs(3600);
    let mut fair = Fair::new(1, 100);
    let mut running = id(fair.offer(now, &offer("long", 1, 10, far)).unwrap());
    let more = id(fair.offer(now, &offer("long", 1, 10, far)).unwrap());
    for _ in 0..20 {
        fair.offer(now, &offer("short", 1, 10, far)).unwrap();
    }
    // Ten answers of a thousand tokens make up for one of ten thousand.
    let (mut used, mut others) = (10_000, 0);
    loop {
        running = fair.end(now, running, used).unwrap();
        if running == more {
            break;
        }
        (used, others) = (1000, others + 1);
    }
    assert!((9..=11).contains(&others), "{others}");
}

#[test]
fn what_was_charged_and_not_used_is_given_back() {
    let now = Instant::now();
    let far = now + Duration::from_secs(60);
    let mut fair = Fair::new(1, 1);
    let mut offer = Offer { weight: 1, ..offer("a", 1, 100, far) };
    offer.quota = Quota { tokens_per_min: Some(600), requests_per_min: Some(10), concurrency: None };
    let left = |fair: &Fair| {
        let Left { requests, tokens } = fair.left("a");
        (requests.unwrap().1, tokens.unwrap().1)
    };
    let first = id(fair.offer(now, &offer).unwrap());
    assert_eq!(left(&fair), (9, 500));
    fair.end(now, first, 40);
    assert_eq!(left(&fair), (9, 560), "of what was expected only a part was used");
    let running = id(fair.offer(now, &offer).unwrap());
    let waits = id(fair.offer(now, &offer).unwrap());
    assert_eq!(left(&fair), (7, 360));
    fair.end(now, waits, 0);
    assert_eq!(left(&fair), (8, 460), "one that left the queue has used nothing");
    fair.end(now, running, 100);
    // A changed limit holds at once; what was used stays used.
    for (limit, rest) in [(1000, 460), (50, 50), (1000, 50)] {
        offer.quota.tokens_per_min = Some(limit);
        let _ = fair.check(now, &offer);
        assert_eq!(fair.left("a").tokens, Some((limit, rest)));
    }
}

#[test]
fn what_would_wait_too_long_is_refused_at_once_and_told_the_truth() {
    let start = Instant::now();
    let mut now = start;
    let far = start + Duration::from_secs(3600);
    let mut fair = Fair::new(2, 100);
    let high = |deadline: Instant| Offer { priority: 1, ..offer("a", 1, 1, deadline) };
    let mut running: Vec<Id> = (0..2).map(|_| id(fair.offer(now, &high(far)).unwrap())).collect();
    for _ in 0..30 {
        fair.offer(now, &high(far)).unwrap();
    }
    // A place every 500 ms.
    let mut step = |fair: &mut Fair, now: &mut Instant| {
        *now += ms(500);
        let ends = running.remove(0);
        running.extend(fair.end(*now, ends, 1));
    };
    for _ in 0..10 {
        step(&mut fair, &mut now);
    }
    // 20 of higher priority wait: it would be the 21st, after 10.5 s.
    let patient = Duration::from_secs(11);
    assert!(fair.check(now, &offer("b", 1, 1, now + patient)).is_ok());
    let hasty = Duration::from_secs(4);
    let refused = fair.offer(now, &offer("b", 1, 1, now + hasty)).unwrap_err();
    assert_eq!(refused, Refused { reason: Reason::Deadline, after: ms(6500) });
    let truth = refused.after;
    // Who is as hasty, but goes first, is let in.
    assert!(fair.check(now, &high(now + hasty)).is_ok());
    let until = now + truth;
    while now < until {
        step(&mut fair, &mut now);
    }
    assert!(fair.check(now, &offer("b", 1, 1, now + hasty)).is_ok(), "it was told the truth");
}

#[test]
fn those_sent_away_from_a_full_queue_find_room_when_they_come_back() {
    for seed in 0..20 {
        let mut dice = Dice(seed);
        let mut now = Instant::now();
        let far = now + Duration::from_secs(100_000);
        let mut fair = Fair::new(3, 5);
        let mut running = Vec::new();
        for _ in 0..8 {
            if let Offered::Placed(id) = fair.offer(now, &offer("a", 1, 1, far)).unwrap() {
                running.push(id);
            }
        }
        let mut step = |fair: &mut Fair, now: &mut Instant| {
            *now += ms(300);
            let ends = running.remove(dice.roll(running.len() as u64) as usize);
            running.extend(fair.end(*now, ends, 1));
        };
        for _ in 0..5 {
            step(&mut fair, &mut now);
            fair.offer(now, &offer("a", 1, 1, far)).unwrap();
        }
        // Five come at once; each is promised a place of its own in the queue.
        let mut away: Vec<Instant> = Vec::new();
        for _ in 0..5 {
            let refused = fair.offer(now, &offer("a", 1, 1, far)).unwrap_err();
            assert_eq!(refused.reason, Reason::QueueFull);
            away.push(now + Duration::from_secs(refused.retry_after_s()));
        }
        for back in away {
            while now < back {
                step(&mut fair, &mut now);
            }
            assert!(fair.offer(now, &offer("a", 1, 1, far)).is_ok(), "seed {seed}");
            audit(&fair);
        }
    }
}

#[test]
fn quotas_hold_over_any_minute_and_say_when_there_is_room() {
    for seed in 0..20 {
        let mut dice = Dice(seed);
        let start = Instant::now();
        let mut now = start;
        let mut fair = Fair::new(1000, 0);
        let quota = Quota { requests_per_min: Some(60), tokens_per_min: Some(6000), concurrency: None };
        let mut let_in: Vec<(Instant, u64)> = Vec::new();
        for _ in 0..3000 {
            now += ms(dice.roll(400));
            let mut offer = offer("a", 1, 1 + dice.roll(200), now + ms(1));
            offer.quota = quota;
            match fair.offer(now, &offer) {
                Ok(offered) => {
                    // As estimated: then the limit holds exactly.
                    let id = id(offered);
                    let used = fair.entries[&id].charged;
                    fair.end(now, id, used);
                    let_in.push((now, used));
                }
                Err(refused) => {
                    assert!(matches!(refused.reason, Reason::Requests | Reason::Tokens), "seed {seed}");
                    let later = now + refused.after + ms(1);
                    assert!(
                        fair.check(later - ms(2), &offer).is_err() || refused.after < ms(3),
                        "seed {seed}"
                    );
                    assert!(fair.check(later, &offer).is_ok(), "seed {seed}: {refused:?}");
                    now = later;
                }
            }
        }
        let minutes = (now - start).as_secs_f64() / 60.0;
        let tokens: u64 = let_in.iter().map(|(_, tokens)| tokens).sum();
        assert!(let_in.len() as f64 <= 60.0 * (minutes + 1.0) + 1.0, "seed {seed}: {}", let_in.len());
        assert!(tokens as f64 <= 6000.0 * (minutes + 1.0) + 200.0, "seed {seed}: {tokens}");
        assert!(tokens as f64 >= 6000.0 * minutes * 0.5 || let_in.len() as f64 >= 60.0 * minutes * 0.5);
    }
}

#[test]
fn what_was_used_beyond_the_estimate_is_owed() {
    let now = Instant::now();
    let mut fair = Fair::new(10, 0);
    let mut offer = offer("a", 1, 10, now + ms(1));
    offer.quota = Quota { tokens_per_min: Some(600), ..Quota::default() };
    let first = id(fair.offer(now, &offer).unwrap());
    fair.end(now, first, 1200);
    let refused = fair.offer(now, &offer).unwrap_err();
    // 600 owed and the next one, which is now expected to use as much: more than 60 s at 10 tokens a second.
    assert_eq!(refused.reason, Reason::Tokens);
    assert!(refused.after > Duration::from_secs(60), "{refused:?}");
    assert_eq!(fair.left("a").tokens, Some((600, 0)));
}

#[test]
fn concurrency_counts_who_waits_and_forgets_who_left() {
    let now = Instant::now();
    let far = now + Duration::from_secs(60);
    let mut fair = Fair::new(1, 10);
    let mut offer = offer("a", 1, 1, far);
    offer.quota.concurrency = Some(2);
    let first = id(fair.offer(now, &offer).unwrap());
    let second = id(fair.offer(now, &offer).unwrap());
    assert_eq!(fair.offer(now, &offer).unwrap_err().reason, Reason::Concurrency);
    fair.end(now, second, 0);
    let third = id(fair.offer(now, &offer).unwrap());
    assert_eq!(fair.end(now, first, 1), Some(third));
    audit(&fair);
}
