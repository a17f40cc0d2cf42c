use super::*;

const GRACE: Duration = Duration::from_secs(5);

fn pool() -> PoolName {
    "decode".parse().unwrap()
}

fn worker(index: u32) -> PartId {
    PartId::Worker { pool: pool(), index }
}

/// A started fleet of one pool.
fn started(workers: u32, now: Instant) -> Roster {
    let mut roster = Roster::new([(pool(), workers)], GRACE, now);
    let actions = roster.step(now);
    assert_eq!(actions.len(), workers as usize + 2);
    assert!(actions.iter().all(|action| matches!(action, Action::Start(_))));
    assert!(roster.step(now).is_empty(), "nothing is started twice");
    roster
}

#[test]
fn a_crashed_part_comes_back_after_growing_pauses() {
    let mut now = Instant::now();
    let mut roster = started(1, now);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let Ended::Restarting { after } = roster.ended(&worker(0), false, now) else { panic!("restarted") };
        pauses.push(after.as_millis());
        assert!(roster.step(now).is_empty(), "not before its time");
        now += after;
        assert_eq!(roster.next_wake(), Some(now));
        assert_eq!(roster.step(now), [Action::Start(worker(0))]);
    }
    assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
    now += FORGIVEN_AFTER;
    assert_eq!(roster.ended(&worker(0), false, now), Ended::Restarting { after: PAUSE_FIRST });
}

#[test]
fn a_router_that_ends_well_unasked_is_started_again() {
    let now = Instant::now();
    let mut roster = started(1, now);
    assert!(matches!(roster.ended(&PartId::Router, true, now), Ended::Restarting { .. }));
}

#[test]
fn scaling_adds_the_lowest_free_numbers_and_takes_the_highest() {
    let now = Instant::now();
    let mut roster = started(2, now);
    roster.want(&pool(), 4);
    assert_eq!(roster.step(now), [Action::Start(worker(2)), Action::Start(worker(3))]);
    roster.want(&pool(), 1);
    let stopped: Vec<Action> = [3, 2, 1].map(|i| Action::Terminate(worker(i))).into();
    assert_eq!(roster.step(now), stopped);
    assert_eq!(roster.ended(&worker(3), true, now), Ended::Stopped);
    roster.want(&pool(), 2);
    assert_eq!(roster.step(now), [Action::Start(worker(3))], "1 and 2 are still stopping");
    roster.want(&"other".parse().unwrap(), 7);
    assert!(roster.step(now).is_empty());
}

#[test]
fn a_drained_worker_is_replaced_under_another_name() {
    let now = Instant::now();
    let mut roster = started(2, now);
    assert_eq!(roster.ended(&worker(0), true, now), Ended::Left);
    assert_eq!(roster.step(now), [Action::Start(worker(2))]);
}

#[test]
fn everything_stops_in_order_and_what_hangs_is_killed() {
    let now = Instant::now();
    let mut roster = started(2, now);
    assert!(matches!(roster.ended(&worker(1), false, now), Ended::Restarting { .. }));
    roster.stop();
    assert_eq!(roster.step(now), [Action::Terminate(PartId::Router)]);
    assert_eq!(roster.ended(&PartId::Router, true, now), Ended::Stopped);
    assert_eq!(
        roster.step(now),
        [Action::Terminate(worker(0))],
        "the one that waited to restart is forgotten"
    );
    let late = now + GRACE;
    assert_eq!(roster.next_wake(), Some(late));
    assert_eq!(roster.step(late), [Action::Kill(worker(0))]);
    assert!(roster.step(late).is_empty(), "killed once");
    assert_eq!(roster.ended(&worker(0), false, late), Ended::Stopped);
    assert_eq!(roster.step(late), [Action::Terminate(PartId::Conductor)]);
    roster.kill(late);
    assert_eq!(roster.step(late), [Action::Kill(PartId::Conductor)]);
    assert_eq!(roster.ended(&PartId::Conductor, false, late), Ended::Stopped);
    assert!(roster.is_empty());
}

#[test]
fn random_events_never_lose_count_of_processes() {
    for seed in 0..200_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut now = Instant::now();
        let mut roster = Roster::new([(pool(), 2)], GRACE, now);
        let mut alive: BTreeSet<PartId> = BTreeSet::new();
        let mut wanted = 2;
        for round in 0..200 {
            for action in roster.step(now) {
                match action {
                    Action::Start(id) => assert!(alive.insert(id), "seed {seed}: started while alive"),
                    Action::Terminate(id) | Action::Kill(id) => assert!(alive.contains(&id), "seed {seed}"),
                }
            }
            match random(4) {
                0 if round < 150 => {
                    wanted = u32::try_from(random(5)).unwrap();
                    roster.want(&pool(), wanted);
                }
                1 => now += Duration::from_millis(random(4_000)),
                _ => {
                    let count = alive.len().max(1) as u64;
                    if let Some(id) = alive.iter().nth(random(count) as usize).cloned() {
                        alive.remove(&id);
                        roster.ended(&id, random(2) == 0, now);
                    }
                }
            }
        }
        now += PAUSE_MOST;
        let _ = roster.step(now);
        assert_eq!(roster.workers().count(), wanted as usize, "seed {seed}");
        roster.kill(now);
        for _ in 0..4 {
            now += GRACE;
            for action in roster.step(now) {
                if let Action::Terminate(id) | Action::Kill(id) = action {
                    roster.ended(&id, false, now);
                }
            }
        }
        assert!(roster.is_empty(), "seed {seed}: {roster:?}");
    }
}
