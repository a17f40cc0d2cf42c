use baton_config::{Epoch, Role};

use super::*;
use crate::api::ListedWorker;
use crate::record::WorkerState;

const TTL_MS: u64 = 10_000;
const TIMING: Timing = Timing { progress_timeout: Duration::from_secs(3), backoff: Backoff::CONDUCTOR };

fn name(i: u64) -> WorkerId {
    format!("w{i}").parse().unwrap()
}

fn record(i: u64, epoch: u64) -> Arc<WorkerRecord> {
    Arc::new(WorkerRecord {
        worker: name(i),
        epoch: Epoch(epoch),
        pool: "p".parse().unwrap(),
        role: Role::Both,
        model: "m".to_owned(),
        engine: "sim".to_owned(),
        kv: None,
        server: None,
        address: "127.0.0.1:1".to_owned(),
        transfer: "AAEC".into(),
        state: WorkerState::Ready,
        pid: 1,
    })
}

/// A conductor in virtual time, with a short history, that can restart empty-handed.
struct Server {
    instance: u64,
    revision: u64,
    base: u64,
    workers: BTreeMap<WorkerId, Arc<WorkerRecord>>,
    log: Vec<(u64, Change)>,
}

impl Server {
    fn new() -> Self {
        Self { instance: 0, revision: 100, base: 100, workers: BTreeMap::new(), log: vec![] }
    }

    fn listing(&self) -> Listing {
        let listed = |record: &Arc<WorkerRecord>| {
            // As parsed from JSON: equal, not identical.
            ListedWorker {
                record: Arc::new((**record).clone()),
                load: None,
                seen_ms: None,
                known_ms: None,
                state_ms: None,
            }
        };
        Listing {
            instance: self.instance.to_string(),
            store: "embedded".to_owned(),
            revision: self.revision,
            ttl_ms: TTL_MS,
            warming: false,
            workers: self.workers.values().map(listed).collect(),
            drain: vec![],
            pools: vec![],
            leader: true,
            conductors: vec![],
            store_health: None,
            view_age_ms: 0,
            settling: false,
        }
    }

    fn put(&mut self, i: u64) {
        self.revision += 1;
        let worker = record(i, self.revision);
        self.workers.insert(name(i), worker.clone());
        self.log.push((self.revision, Change::Put { worker }));
    }

    fn set_state(&mut self, i: u64, state: WorkerState) {
        if let Some(worker) = self.workers.get_mut(&name(i)) {
            self.revision += 1;
            Arc::make_mut(worker).state = state;
            let change = Change::State { worker: name(i), epoch: worker.epoch, state };
            self.log.push((self.revision, change));
        }
    }

    fn delete(&mut self, i: u64) {
        if self.workers.remove(&name(i)).is_some() {
            self.revision += 1;
            self.log.push((self.revision, Change::Delete { worker: name(i), expired: true }));
        }
    }

    fn compact(&mut self) {
        self.base = self.revision;
        self.log.clear();
    }

    /// Comes back with nothing, under higher revisions.
    fn restart(&mut self, skip: u64) {
        self.instance += 1;
        self.revision += skip;
        self.workers.clear();
        self.compact();
    }

    fn lines(&self, since: u64) -> Vec<WatchLine> {
        if since < self.base {
            return vec![WatchLine::Compacted { revision: self.revision }];
        }
        let instance = self.instance.to_string();
        let mut lines =
            vec![WatchLine::Heartbeat { instance, revision: since, view_age_ms: 0, settling: false }];
        lines.extend(self.log.iter().filter(|(revision, _)| *revision > since).map(|(revision, change)| {
            WatchLine::Changes { revision: *revision, changes: vec![change.clone()] }
        }));
        lines
    }
}

struct Run {
    seed: u64,
    dice: Dice,
    now: Instant,
    server: Server,
    up: bool,
    follower: Follower,
    /// What the open watch has been told up to, and of which instance.
    open: Option<(u64, u64)>,
    view: Option<View>,
    /// When worker 0 registers anew after a restart.
    rejoin_at: Option<Instant>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let now = Instant::now();
        let contact = Arc::new(Contact::new(now));
        let follower = Follower::new(2, TIMING, Dice::seeded(seed ^ 1), contact);
        let mut server = Server::new();
        server.put(0);
        Self {
            seed,
            dice: Dice::seeded(seed),
            now,
            server,
            up: true,
            follower,
            open: None,
            view: None,
            rejoin_at: None,
        }
    }

    fn step(&mut self, faults: bool) {
        if self.rejoin_at.is_some_and(|at| at <= self.now) {
            self.rejoin_at = None;
            self.server.put(0);
        }
        let step = self.follower.step(self.now);
        if !matches!(step, Step::Read { .. }) {
            self.open = None;
        }
        let lost = !self.up || (faults && self.dice.below(8) == 0);
        match step {
            Step::Wait { until } => {
                assert!(until > self.now, "seed {}: a wait that is none would spin", self.seed);
                self.now = until;
            }
            Step::List { .. } | Step::Watch { .. } if lost => {
                self.now += Duration::from_millis(self.dice.below(1500));
                self.follower.failed(self.now, Failure::Away);
            }
            Step::List { .. } => self.follower.listed(self.now, self.server.listing()),
            Step::Watch { since, .. } if since > self.server.revision => {
                self.follower.failed(self.now, Failure::Revision);
            }
            Step::Watch { since, .. } => {
                self.open = Some((since, self.server.instance));
                self.follower.opened(self.now);
                self.deliver(since);
            }
            Step::Read { until } => self.read(until, lost),
        }
        self.observe();
    }

    fn read(&mut self, until: Instant, lost: bool) {
        let (since, instance) = self.open.expect("a watch is open");
        if !self.up || instance != self.server.instance {
            // Frozen, or gone: silence, or the end of the stream.
            if self.dice.below(2) == 0 {
                self.follower.failed(self.now, Failure::Away);
            } else {
                self.now = until;
                self.follower.tick(self.now);
            }
        } else if lost {
            self.follower.failed(self.now, Failure::Away);
        } else {
            self.now = (self.now + Duration::from_secs(1)).min(until);
            self.deliver(since);
            self.follower.tick(self.now);
        }
    }

    fn deliver(&mut self, since: u64) {
        for line in self.server.lines(since) {
            self.follower.line(self.now, line);
        }
        if let Some((told, _)) = &mut self.open {
            *told = self.server.revision;
        }
    }

    /// Worker 0 never dies; whenever a conductor forgot it, it is back within the ttl. So no view may lack it.
    fn observe(&mut self) {
        let Some(view) = self.follower.take_view() else { return };
        let seed = self.seed;
        if let Some(before) = &self.view {
            let kept = !before.workers.contains_key(&name(0)) || view.workers.contains_key(&name(0));
            assert!(kept, "seed {seed}: emptied");
            for (name, record) in view.workers.iter() {
                let kept = before.workers.get(name).filter(|old| **old == *record);
                assert!(kept.is_none_or(|old| Arc::ptr_eq(old, record)), "seed {seed}: {name} lost its Arc");
                if let Some(old) = before.workers.get(name) {
                    assert!(record.epoch >= old.epoch, "seed {seed}: {name} went back");
                }
            }
        }
        self.view = Some(view);
    }

    fn disturb(&mut self) {
        match self.dice.below(12) {
            0 => self.up = !self.up,
            1 => self.server.compact(),
            2 => {
                let skip = self.dice.below(5);
                self.server.restart(skip);
                self.rejoin_at = Some(self.now + Duration::from_millis(self.dice.below(6000)));
            }
            3 | 4 => {
                let i = 1 + self.dice.below(6);
                self.server.delete(i);
            }
            // Lives go one way: a state that is left does not come back.
            5 | 6 => {
                let i = self.dice.below(7);
                self.server.set_state(i, WorkerState::Draining);
            }
            _ => {
                let i = 1 + self.dice.below(6);
                self.server.put(i);
            }
        }
    }
}

#[test]
fn random_faults_never_empty_the_view_and_it_agrees_afterwards() {
    for seed in 0..300 {
        let mut run = Run::new(seed);
        for _ in 0..200 {
            if run.dice.below(3) == 0 {
                run.disturb();
            }
            run.step(true);
        }
        run.up = true;
        let calm = run.now;
        // The last of a former instance's workers are forgotten one ttl after the listing.
        let bound = Duration::from_millis(TTL_MS) + Duration::from_secs(10);
        while run.now < calm + bound {
            run.step(false);
        }
        let view = run.view.expect("a view");
        assert_eq!(*view.workers, run.server.workers, "seed {seed}");
        assert!(!view.stale && view.revision == run.server.revision, "seed {seed}");
    }
}

#[test]
fn silence_is_noticed_after_the_progress_timeout_and_the_next_endpoint_tried() {
    let mut run = Run::new(1);
    while run.open.is_none() {
        run.step(false);
    }
    run.follower.step(run.now);
    let heard = run.now;
    run.up = false;
    let Step::Read { until } = run.follower.step(run.now) else { panic!("not reading") };
    assert_eq!(until, heard + TIMING.progress_timeout);
    run.follower.tick(until);
    let view = run.follower.take_view().expect("the staleness is news");
    assert!(view.stale && view.workers.len() == 1);
    run.now = until + Duration::from_secs(1);
    assert!(
        matches!(run.follower.step(run.now), Step::Watch { endpoint: 1, since } if since == run.server.revision)
    );
}

#[test]
fn workers_of_a_former_instance_have_one_ttl_to_come_back() {
    let mut run = Run::new(2);
    run.server.put(1);
    while run.open.is_none() {
        run.step(false);
    }
    run.server.restart(10);
    run.server.put(0);
    let mut listed_at = None;
    while run.view.as_ref().is_some_and(|v| v.workers.contains_key(&name(1))) {
        run.step(false);
        if listed_at.is_none() && run.view.as_ref().is_some_and(|v| v.instance == "1") {
            listed_at = Some(run.now);
        }
    }
    let kept = run.now - listed_at.expect("listed from the new instance");
    assert!(kept >= Duration::from_millis(TTL_MS), "forgotten after {kept:?}");
    assert!(kept < Duration::from_millis(TTL_MS) + Duration::from_secs(2), "kept for {kept:?}");
}

#[test]
fn a_state_change_keeps_the_metadata_and_one_of_an_unknown_life_asks_for_a_listing() {
    let mut run = Run::new(3);
    while run.open.is_none() {
        run.step(false);
    }
    run.follower.step(run.now);
    let before = run.view.clone().expect("a view");
    let line = |revision, epoch| WatchLine::Changes {
        revision,
        changes: vec![Change::State { worker: name(0), epoch, state: WorkerState::Draining }],
    };
    let epoch = before.workers[&name(0)].epoch;
    run.follower.line(run.now, line(run.server.revision + 1, epoch));
    let view = run.follower.take_view().expect("news");
    let (old, new) = (&before.workers[&name(0)], &view.workers[&name(0)]);
    assert_eq!(
        (old.state, new.state),
        (WorkerState::Ready, WorkerState::Draining),
        "older views stay as they were"
    );
    assert!(Arc::ptr_eq(&old.transfer, &new.transfer), "not sent and not kept twice");
    assert!(matches!(run.follower.step(run.now), Step::Read { .. }));

    run.follower.line(run.now, line(run.server.revision + 2, Epoch(epoch.0 + 1)));
    assert!(matches!(run.follower.step(run.now), Step::List { .. }), "something was missed");
}

#[test]
fn leases_that_ended_while_the_store_was_away_remove_nobody_for_a_ttl() {
    let mut run = Run::new(4);
    run.server.put(1);
    run.server.put(2);
    while run.open.is_none() {
        run.step(false);
    }
    run.follower.step(run.now);
    let beat = |revision, view_age_ms, settling| WatchLine::Heartbeat {
        instance: "0".to_owned(),
        revision,
        view_age_ms,
        settling,
    };
    let gone = |revision, i, expired| WatchLine::Changes {
        revision,
        changes: vec![Change::Delete { worker: name(i), expired }],
    };
    let at = run.server.revision;
    // The conductor answers, but it has not heard of its store for six seconds.
    run.follower.line(run.now, beat(at, 6_000, true));
    if let Step::Wait { until } = run.follower.step(run.now) {
        run.now = until;
        run.follower.step(run.now);
        run.follower.opened(run.now);
        run.follower.line(run.now, beat(at, 0, true));
    }
    let view = run.follower.take_view().expect("news");
    assert_eq!(view.workers.len(), 3);

    // The store is back, and with it the news of all the leases that ended meanwhile; one worker said goodbye.
    run.follower.line(run.now, beat(at, 0, true));
    for (i, expired) in [(0, true), (1, true), (2, false)] {
        run.follower.line(run.now, gone(at + 1 + i, i, expired));
    }
    let view = run.follower.take_view().expect("news");
    assert!(!view.stale);
    let names = |view: &View| view.workers.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&view), [name(0), name(1)], "only the goodbye is believed");

    // One comes back under a new epoch, the other does not.
    let worker = record(0, at + 9);
    run.follower
        .line(run.now, WatchLine::Changes { revision: at + 9, changes: vec![Change::Put { worker }] });
    let ttl = Duration::from_millis(TTL_MS);
    let back = run.now;
    while run.now < back + ttl {
        assert!(run.follower.workers.contains_key(&name(1)), "gone after {:?}", run.now - back);
        run.now += Duration::from_millis(500);
        run.follower.line(run.now, beat(at + 9, 0, false));
        run.follower.tick(run.now);
    }
    run.follower.tick(run.now);
    let view = run.follower.take_view().expect("news");
    assert_eq!(names(&view), [name(0)]);
    // From now on a lease that ends is believed at once.
    run.follower.line(run.now, gone(at + 10, 0, true));
    assert!(run.follower.take_view().expect("news").workers.is_empty());
}

#[test]
fn a_conductor_without_its_store_makes_the_view_stale_and_old_and_is_left_for_another() {
    let mut run = Run::new(5);
    while run.open.is_none() {
        run.step(false);
    }
    run.follower.step(run.now);
    run.follower.take_view();
    let beat = |revision, view_age_ms| WatchLine::Heartbeat {
        instance: "0".to_owned(),
        revision,
        view_age_ms,
        settling: false,
    };
    run.now += Duration::from_secs(2);
    run.follower.line(run.now, beat(run.server.revision, 1_200));
    let view = run.follower.take_view().expect("staleness is news");
    assert!(view.stale && view.workers.len() == 1, "stale, not empty");
    let age = view.contact.age(run.now).as_millis();
    assert!((1_199..=1_201).contains(&age), "as old as what the conductor knows: {age} ms");
    assert!(matches!(run.follower.step(run.now), Step::Read { .. }), "a short absence moves nobody");
    run.follower.line(run.now, beat(run.server.revision, 0));
    assert_eq!(view.contact.age(run.now), Duration::ZERO);
    assert!(!run.follower.take_view().expect("freshness is news").stale);

    let endpoint = run.follower.endpoint;
    run.follower.line(run.now, beat(run.server.revision, 3_100));
    assert_ne!(run.follower.endpoint, endpoint, "another conductor may reach the store");
    assert!(run.follower.take_view().expect("news").stale);
}

/// With an open watch, after a heartbeat that says whether the store has just come back.
fn watching(seed: u64, settling: bool) -> Run {
    let mut run = Run::new(seed);
    run.server.put(1);
    while run.open.is_none() {
        run.step(false);
    }
    run.follower.step(run.now);
    let revision = run.server.revision;
    let beat = WatchLine::Heartbeat { instance: "0".to_owned(), revision, view_age_ms: 0, settling };
    run.follower.line(run.now, beat);
    run
}

/// Who is known once nobody has more time to come back.
fn left_in_the_end(run: &mut Run) -> Vec<WorkerId> {
    run.follower.opened(run.now);
    for _ in 0..2 {
        run.now += Duration::from_millis(TTL_MS);
        run.follower.opened(run.now);
        run.follower.tick(run.now);
    }
    run.follower.workers.keys().cloned().collect()
}

#[test]
fn what_is_told_again_is_not_done_again() {
    let mut run = watching(6, false);
    let again = |revision| {
        let changes = vec![Change::Delete { worker: name(0), expired: false }];
        WatchLine::Changes { revision, changes }
    };
    run.follower.line(run.now, again(run.server.revision));
    assert_eq!(run.follower.workers.len(), 2);
    run.follower.line(run.now, again(run.server.revision + 1));
    assert_eq!(run.follower.workers.len(), 1);
}

#[test]
fn a_listing_that_cannot_know_takes_nobody_away_and_one_that_names_somebody_keeps_it_for_good() {
    // In doubt: one lease has ended for want of the store, as the watch or as a listing tells it.
    for listed in [false, true] {
        let mut run = watching(7, true);
        run.server.delete(1);
        if listed {
            run.follower.listed(run.now, run.server.listing());
        } else {
            let changes = vec![Change::Delete { worker: name(1), expired: true }];
            run.follower.line(run.now, WatchLine::Changes { revision: run.server.revision, changes });
        }
        assert_eq!(run.follower.workers.len(), 2, "it has a ttl to come back");
        let mut returned = run.server.listing();
        assert_eq!(left_in_the_end(&mut run), [name(0)]);
        // The same, but a later listing names it.
        let mut run = watching(7, true);
        run.follower.listed(run.now, returned.clone());
        run.server.put(1);
        returned = run.server.listing();
        run.follower.listed(run.now, returned);
        assert_eq!(left_in_the_end(&mut run), [name(0), name(1)]);
    }
    // A store that went back does not know who came since.
    let mut run = watching(8, false);
    let mut backup = run.server.listing();
    backup.workers.retain(|listed| listed.record.worker == name(0));
    backup.revision -= 1;
    run.follower.listed(run.now, backup);
    assert_eq!(run.follower.workers.len(), 2);
    assert_eq!(left_in_the_end(&mut run), [name(0)]);
}

#[test]
fn a_revision_that_is_not_served_is_not_asked_for_again() {
    let mut run = watching(9, false);
    run.follower.failed(run.now, Failure::Away);
    run.now += Duration::from_secs(2);
    assert!(matches!(run.follower.step(run.now), Step::Watch { .. }));
    run.follower.failed(run.now, Failure::Revision);
    run.now += Duration::from_secs(2);
    assert!(matches!(run.follower.step(run.now), Step::List { .. }));
}

#[test]
fn the_only_conductor_is_not_left_for_its_store() {
    let mut run = watching(10, false);
    let mut follower = Follower::new(1, TIMING, Dice::seeded(1), Arc::new(Contact::new(run.now)));
    follower.listed(run.now, run.server.listing());
    follower.opened(run.now);
    run.now += Duration::from_secs(1);
    let revision = run.server.revision;
    let beat =
        WatchLine::Heartbeat { instance: "0".to_owned(), revision, view_age_ms: 60_000, settling: true };
    follower.line(run.now, beat);
    assert!(matches!(follower.step(run.now), Step::Read { .. }), "nobody else could do better");
}
