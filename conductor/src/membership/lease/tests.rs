use super::*;

const TTL: Duration = Duration::from_secs(10);

/// A conductor in virtual time that can go away, stand still, or restart and forget.
struct World {
    up: bool,
    next_epoch: u64,
    live: Option<(Epoch, Instant)>,
}

impl World {
    fn expire(&mut self, now: Instant) {
        if self.live.is_some_and(|(_, ends)| self.up && ends <= now) {
            self.live = None;
        }
    }
}

struct Run {
    seed: u64,
    dice: Dice,
    now: Instant,
    lease: Lease,
    world: World,
    held: Option<Epoch>,
    last: Epoch,
    registrations: u32,
    /// When the conductor was last able to answer everything, if it is now.
    up_since: Option<Instant>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        Self {
            seed,
            dice: Dice::seeded(seed),
            now,
            lease: Lease::new(now, 2, Dice::seeded(seed ^ 0xfeed)),
            world: World { up: true, next_epoch: 1, live: None },
            held: None,
            last: Epoch(0),
            registrations: 0,
            up_since: Some(now),
        }
    }

    fn turn(&mut self, turn: Option<Turn>) {
        let seed = self.seed;
        match turn {
            None => {}
            Some(Turn::Joined(epoch)) => {
                assert!(epoch > self.last, "seed {seed}: {epoch} after {}", self.last);
                assert_eq!(self.held, None, "seed {seed}: joined twice");
                (self.held, self.last) = (Some(epoch), epoch);
            }
            Some(Turn::Lost(epoch, reason)) => {
                assert_eq!(self.held.take(), Some(epoch), "seed {seed}: lost what it had not");
                let live = self.world.live.map(|(epoch, _)| epoch);
                if reason != LostReason::Silence {
                    assert_ne!(live, Some(epoch), "seed {seed}: a live lease was taken for lost");
                }
            }
        }
    }

    /// One step of the holder, then time passes until it wants to be called again.
    fn step(&mut self) {
        let mut turn = None;
        let step = self.lease.step(self.now, &mut turn);
        self.turn(turn);
        let sent = self.now;
        self.world.expire(sent);
        match step {
            Step::Wait { until } => {
                assert!(until > self.now, "seed {}: a wait that is none would spin", self.seed);
                self.now = until;
            }
            Step::Register { .. } if self.world.up => {
                let epoch = Epoch(self.world.next_epoch);
                self.world.next_epoch += 1;
                self.world.live = Some((epoch, sent + TTL));
                self.registrations += 1;
                self.pass_call();
                // An answer may be lost on its way; the same process simply registers again.
                if self.dice.below(10) == 0 {
                    self.lease.not_registered(self.now, false);
                } else {
                    let turn = self.lease.registered(sent, epoch, TTL, TTL / 3);
                    self.turn(Some(turn));
                }
            }
            Step::Register { .. } => {
                self.pass_call();
                self.lease.not_registered(self.now, false);
            }
            Step::Keepalive { epoch, .. } => {
                assert_eq!(self.held, Some(epoch), "seed {}", self.seed);
                let answer = match &mut self.world {
                    World { up: false, .. } => KeepAnswer::None,
                    World { live: Some((live, ends)), .. } if *live == epoch => {
                        *ends = sent + TTL;
                        KeepAnswer::Kept { ttl: TTL }
                    }
                    World { live: Some(_), .. } => KeepAnswer::Lost(LostReason::Superseded),
                    World { live: None, .. } => KeepAnswer::Lost(LostReason::Gone),
                };
                self.pass_call();
                let answer = if self.dice.below(20) == 0 { KeepAnswer::None } else { answer };
                let turn = self.lease.kept(sent, self.now, epoch, answer);
                self.turn(turn);
            }
        }
    }

    fn pass_call(&mut self) {
        self.now += Duration::from_millis(1 + self.dice.below(800));
    }

    fn disturb(&mut self) {
        match self.dice.below(40) {
            0 => {
                self.world.up = !self.world.up;
                self.up_since = self.world.up.then_some(self.now);
            }
            1 => self.world.live = None,
            2 => self.lease.hurry(self.now),
            _ => {}
        }
    }
}

#[test]
fn random_outages_never_confuse_the_holder_and_it_always_comes_back() {
    for seed in 0..200 {
        let mut run = Run::new(seed);
        for _ in 0..300 {
            run.disturb();
            run.step();
        }
        run.world.up = true;
        let returned = run.now;
        // A lost answer (which this world goes on to produce) costs a retry, never the bound.
        while run.held.is_none() || run.world.live.map(|(epoch, _)| epoch) != run.held {
            run.step();
            assert!(run.now < returned + Duration::from_secs(10), "seed {seed}: not back within 10 s");
        }
        assert!(run.registrations > 0, "seed {seed}");
    }
}

#[test]
fn a_quiet_life_is_one_keepalive_a_third_of_the_ttl() {
    let start = Instant::now();
    let mut lease = Lease::new(start, 1, Dice::seeded(1));
    assert_eq!(lease.step(start, &mut None), Step::Register { endpoint: 0 });
    lease.registered(start, Epoch(7), TTL, TTL / 3);
    let mut now = start;
    for _ in 0..50 {
        let Step::Wait { until } = lease.step(now, &mut None) else { panic!("busy") };
        assert_eq!(until, now + TTL / 3);
        now = until;
        assert_eq!(lease.step(now, &mut None), Step::Keepalive { endpoint: 0, epoch: Epoch(7) });
        assert_eq!(lease.kept(now, now, Epoch(7), KeepAnswer::Kept { ttl: TTL }), None);
    }
    // A state change is told at once.
    lease.hurry(now);
    assert!(matches!(lease.step(now, &mut None), Step::Keepalive { .. }));
}

#[test]
fn an_answered_ttl_of_zero_means_the_lease_is_gone() {
    let now = Instant::now();
    let mut lease = Lease::new(now, 1, Dice::seeded(1));
    lease.registered(now, Epoch(7), TTL, TTL / 3);
    let turn = lease.kept(now, now, Epoch(7), KeepAnswer::Kept { ttl: Duration::ZERO });
    assert_eq!(turn, Some(Turn::Lost(Epoch(7), LostReason::Gone)));
}

#[test]
fn a_holder_in_doubt_asks_soon_and_not_with_all_others() {
    let now = Instant::now();
    let mut asks: Vec<Duration> = (0..1000)
        .map(|seed| {
            let mut lease = Lease::new(now, 1, Dice::seeded(seed));
            lease.registered(now, Epoch(7), TTL, TTL / 3);
            lease.doubt(now);
            match lease.step(now, &mut None) {
                Step::Wait { until } => until - now,
                _ => Duration::ZERO,
            }
        })
        .collect();
    asks.sort_unstable();
    assert!(
        *asks.last().unwrap() <= DOUBT_SPREAD && asks[100] < asks[900] / 2,
        "{:?} {:?}",
        asks[100],
        asks[900]
    );
    // Who has no lease has nothing to doubt.
    let mut out = Lease::new(now, 1, Dice::seeded(1));
    out.doubt(now);
    assert!(matches!(out.step(now, &mut None), Step::Register { .. }));
}

#[test]
fn a_thousand_that_lose_their_lease_at_once_come_back_spread_out() {
    let now = Instant::now();
    let mut starts: Vec<Duration> = (0..1000)
        .map(|seed| {
            let mut lease = Lease::new(now, 1, Dice::seeded(seed));
            lease.registered(now, Epoch(7), TTL, TTL / 3);
            lease.kept(now, now, Epoch(7), KeepAnswer::Lost(LostReason::Gone));
            match lease.step(now, &mut None) {
                Step::Wait { until } => until - now,
                _ => Duration::ZERO,
            }
        })
        .collect();
    starts.sort_unstable();
    assert!(*starts.last().unwrap() <= REJOIN_SPREAD_MAX);
    let (early, late) = (starts[250], starts[750]);
    assert!(early > REJOIN_SPREAD_MAX / 5 && late > REJOIN_SPREAD_MAX * 3 / 5, "{early:?} {late:?}");
}

#[test]
fn a_lease_counts_from_when_it_was_asked_for_and_of_its_own_life_only() {
    let sent = Instant::now();
    let mut lease = Lease::new(sent, 1, Dice::seeded(1));
    lease.registered(sent, Epoch(7), TTL, TTL / 3);
    let late = sent + TTL / 2;
    assert_eq!(lease.kept(late, late, Epoch(6), KeepAnswer::Lost(LostReason::Gone)), None);
    assert_eq!(lease.kept(late, late, Epoch(6), KeepAnswer::Kept { ttl: TTL }), None);
    let mut turn = None;
    lease.step(sent + TTL - Duration::from_millis(1), &mut turn);
    assert_eq!(turn, None);
    lease.step(sent + TTL, &mut turn);
    assert_eq!(turn, Some(Turn::Lost(Epoch(7), LostReason::Silence)));
}
