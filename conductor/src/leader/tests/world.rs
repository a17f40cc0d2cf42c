//! Some candidates, the embedded store's memory, and a network that delays and loses, all in virtual time.

use std::collections::BTreeMap;

use super::super::*;
use crate::store::memory::Memory;
use crate::store::{Compare, Op, StoreError, Txn};

/// How often the store looks for leases that have ended, like etcd.
pub(super) const SWEEP: Duration = Duration::from_millis(500);
/// A candidate waits so long for an answer.
const CALL_TIMEOUT: Duration = Duration::from_millis(1500);
/// Pause between two writes of whoever believes to lead.
const WRITE_EVERY: Duration = Duration::from_millis(200);

/// What the network and the machines do.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    /// Longest usual delay of a message, one way.
    delay: Duration,
    /// Of a thousand messages, how many are lost.
    lost: u64,
    /// Of a thousand messages, how many take up to 4 s.
    late: u64,
    /// A candidate is frozen, killed or stopped about this often.
    fault_every: Option<Duration>,
}

impl Manner {
    pub(super) const CALM: Self =
        Self { delay: Duration::from_millis(10), lost: 0, late: 0, fault_every: None };
    pub(super) const STORMY: Self = Self {
        delay: Duration::from_millis(60),
        lost: 60,
        late: 60,
        fault_every: Some(Duration::from_secs(4)),
    };
}

#[derive(Clone)]
enum Event {
    Sweep,
    /// The store answers again.
    Majority,
    /// Somebody has a fault.
    Fault,
    /// A candidate looks at its state machine.
    Wake,
    /// A call reaches the store.
    Call {
        from: (usize, u64),
        id: u64,
        sent: Instant,
        step: Step,
    },
    /// Its answer reaches the candidate.
    Answer {
        id: u64,
        sent: Instant,
        answer: Answer,
    },
    /// The candidate gives up waiting for it.
    Timeout {
        id: u64,
        sent: Instant,
        step: Step,
    },
    /// The mirror of a candidate shows this.
    Mirror {
        revision: Revision,
        leader: Option<Leader>,
    },
    /// A candidate that believes to lead writes.
    Write,
    /// That write reaches the store.
    Written {
        fence: Fence,
    },
    Revoke {
        lease: LeaseId,
    },
}

#[derive(Clone)]
enum Answer {
    Grant(LeaseId, Duration),
    Announce(Written),
    Claim(Written),
    Confirm(Option<Leader>),
    Kept(Option<Duration>),
}

struct Candidate {
    election: Election,
    /// Events of a former life are not for the present one.
    life: u64,
    alive: bool,
    frozen_until: Instant,
    call: Option<u64>,
    wake: Option<Instant>,
    /// What the reconcilers were last told.
    published: Option<Fence>,
    mirror: (Revision, Option<Leader>),
    mirror_last: Instant,
}

/// For whom an event is: the store (no candidate), or a life of a candidate.
type To = Option<(usize, u64)>;

pub(super) struct World {
    now: Instant,
    memory: Memory,
    candidates: Vec<Candidate>,
    queue: BTreeMap<(Instant, u64), (To, Event)>,
    serial: u64,
    pub(super) dice: Dice,
    manner: Manner,
    silent_until: Instant,
    /// Who created the leader's key, by its fence.
    owners: BTreeMap<Revision, usize>,
    shown: (Revision, Option<Leader>),
    /// Fenced writes done and refused.
    pub(super) writes: u64,
    pub(super) refused: u64,
    /// Of each term, the number of its last write.
    pub(super) wrote_last: BTreeMap<Revision, u64>,
}

impl World {
    pub(super) fn new(seed: u64, candidates: usize, manner: Manner) -> Self {
        let now = Instant::now();
        let mut world = Self {
            now,
            memory: Memory::new(1000, []),
            candidates: Vec::new(),
            queue: BTreeMap::new(),
            serial: 0,
            dice: Dice::seeded(seed),
            manner,
            silent_until: now,
            owners: BTreeMap::new(),
            shown: (1000, None),
            writes: 0,
            refused: 0,
            wrote_last: BTreeMap::new(),
        };
        for i in 0..candidates {
            let candidate = world.candidate(0);
            world.candidates.push(candidate);
            world.begin(i);
        }
        world.at(now, None, Event::Sweep);
        if let Some(every) = manner.fault_every {
            world.at(now + every, None, Event::Fault);
        }
        world
    }

    fn candidate(&mut self, life: u64) -> Candidate {
        Candidate {
            election: Election::new(self.now, Dice::seeded(self.dice.next())),
            life,
            alive: true,
            frozen_until: self.now,
            call: None,
            wake: None,
            published: None,
            mirror: self.shown.clone(),
            mirror_last: self.now,
        }
    }

    fn begin(&mut self, i: usize) {
        self.candidates[i].wake = Some(self.now);
        let to = Some((i, self.candidates[i].life));
        self.at(self.now, to, Event::Wake);
        self.at(self.now, to, Event::Write);
    }

    fn at(&mut self, at: Instant, to: To, event: Event) {
        self.serial += 1;
        self.queue.insert((at, self.serial), (to, event));
    }

    /// Sends a message; it may be late or lost.
    fn send(&mut self, to: To, event: Event) {
        if self.now < self.silent_until || self.dice.below(1000) < self.manner.lost {
            return;
        }
        let late = self.dice.below(1000) < self.manner.late;
        let most = if late { Duration::from_secs(4) } else { self.manner.delay };
        let delay = self.dice.up_to(most);
        self.at(self.now + delay, to, event);
    }

    /// Runs until somebody leads, and then for a time that differs from seed to seed.
    pub(super) fn run_led(&mut self) -> usize {
        let more = self.dice.up_to(Duration::from_secs(3));
        self.run(Duration::from_secs(2) + more);
        self.leader().expect("somebody leads").0
    }

    pub(super) fn run(&mut self, span: Duration) {
        let end = self.now + span;
        while let Some((&(at, serial), _)) = self.queue.first_key_value() {
            if at > end {
                break;
            }
            let Some((to, event)) = self.queue.remove(&(at, serial)) else { break };
            self.now = at;
            self.handle(to, event);
            self.check();
        }
        self.now = end;
        self.check();
    }

    /// At most one of those that are awake leads, and nobody under a term of another.
    fn check(&self) {
        let awake = |c: &&Candidate| c.alive && self.now >= c.frozen_until;
        let terms: Vec<Fence> =
            self.candidates.iter().filter(awake).filter_map(|c| c.election.term(self.now)).collect();
        assert!(terms.len() <= 1, "several lead: {terms:?}");
    }

    pub(super) fn leader(&self) -> Option<(usize, Fence)> {
        let leads = |(i, c): (usize, &Candidate)| {
            let awake = c.alive && self.now >= c.frozen_until;
            c.election.term(self.now).filter(|_| awake).map(|fence| (i, fence))
        };
        self.candidates.iter().enumerate().find_map(leads)
    }

    pub(super) fn until_led(&mut self, patience: Duration) -> Duration {
        let began = self.now;
        while self.leader().is_none() {
            assert!(self.now < began + patience, "nobody leads");
            self.run(Duration::from_millis(10));
        }
        self.now - began
    }

    pub(super) fn kill(&mut self, i: usize) {
        self.candidates[i].alive = false;
    }

    pub(super) fn stop(&mut self, i: usize) {
        if let Some(lease) = self.candidates[i].election.lease() {
            self.send(None, Event::Revoke { lease });
        }
        self.kill(i);
    }

    pub(super) fn freeze(&mut self, i: usize, span: Duration) {
        self.candidates[i].frozen_until = self.now + span;
        let fence = self.candidates[i].published;
        // What it had begun, it finishes on its return: a write of its old term.
        if let Some(fence) = fence {
            self.at(self.now + span, None, Event::Written { fence });
        }
    }

    pub(super) fn silence(&mut self, span: Duration) {
        self.silent_until = self.now + span;
        self.at(self.silent_until, None, Event::Majority);
    }

    pub(super) fn calm(&mut self) {
        self.manner = Manner::CALM;
        for i in 0..self.candidates.len() {
            if !self.candidates[i].alive {
                self.restart(i);
            }
        }
    }

    fn restart(&mut self, i: usize) {
        let life = self.candidates[i].life + 1;
        self.candidates[i] = self.candidate(life);
        self.begin(i);
    }

    fn handle(&mut self, to: To, event: Event) {
        let Some((i, life)) = to else { return self.elsewhere(event) };
        let candidate = &self.candidates[i];
        if !candidate.alive || candidate.life != life {
            return;
        }
        if self.now < candidate.frozen_until {
            // It finds everything on its return, in order.
            return self.at(candidate.frozen_until, to, event);
        }
        self.happens(i, event);
        self.turn(i);
    }

    /// Something happens to a candidate.
    fn happens(&mut self, i: usize, event: Event) {
        let (now, to) = (self.now, Some((i, self.candidates[i].life)));
        let candidate = &mut self.candidates[i];
        match event {
            Event::Wake => {}
            Event::Mirror { revision, leader } => {
                candidate.mirror = (revision, leader);
            }
            Event::Answer { id, sent, answer } if candidate.call == Some(id) => {
                candidate.call = None;
                let election = &mut candidate.election;
                match answer {
                    Answer::Grant(lease, ttl) => election.granted(sent, now, Some((lease, ttl))),
                    Answer::Announce(written) => election.announced(now, written),
                    Answer::Claim(written) => election.claimed(now, written),
                    Answer::Confirm(leader) => election.confirmed(now, Some(leader)),
                    Answer::Kept(ttl) => election.kept(sent, now, Some(ttl.unwrap_or_default())),
                }
            }
            Event::Timeout { id, sent, step } if candidate.call == Some(id) => {
                candidate.call = None;
                let election = &mut candidate.election;
                match step {
                    Step::Grant => election.granted(sent, now, None),
                    Step::Announce { .. } => election.announced(now, Written::Unknown),
                    Step::Claim { .. } => election.claimed(now, Written::Unknown),
                    Step::Confirm => election.confirmed(now, None),
                    Step::KeepAlive { .. } => election.kept(sent, now, None),
                    Step::Wait { .. } => {}
                }
            }
            Event::Write => {
                if let Some(fence) = candidate.published {
                    self.send(None, Event::Written { fence });
                }
                self.at(now + WRITE_EVERY, to, Event::Write);
            }
            _ => {}
        }
    }

    /// As the driver: looks, publishes, calls. A call in flight is left alone until the term ends.
    fn turn(&mut self, i: usize) {
        let (now, to) = (self.now, Some((i, self.candidates[i].life)));
        let candidate = &mut self.candidates[i];
        if candidate.call.is_some() && candidate.election.term_ends().is_some_and(|at| now >= at) {
            candidate.call = None;
        }
        if candidate.call.is_some() {
            return;
        }
        let (revision, leader) = candidate.mirror.clone();
        candidate.election.saw(now, revision, leader.as_ref());
        let step = candidate.election.step(now);
        candidate.published = candidate.election.term(now);
        if let Step::Wait { until } = step {
            if candidate.wake.is_none_or(|at| at <= now || at > until) {
                candidate.wake = Some(until);
                self.at(until, to, Event::Wake);
            }
            return;
        }
        let ends = candidate.election.term_ends();
        self.serial += 1;
        let id = self.serial;
        self.candidates[i].call = Some(id);
        self.at(now + CALL_TIMEOUT, to, Event::Timeout { id, sent: now, step });
        if let Some(at) = ends {
            self.at(at, to, Event::Wake);
        }
        let from = (i, self.candidates[i].life);
        self.send(None, Event::Call { from, id, sent: now, step });
    }

    /// Something happens at the store, or to a machine.
    fn elsewhere(&mut self, event: Event) {
        match event {
            Event::Sweep => {
                // Without a majority etcd ends no lease.
                if self.now < self.silent_until {
                    self.memory.forgive(SWEEP);
                } else {
                    self.memory.expire(self.now);
                }
                self.at(self.now + SWEEP, None, Event::Sweep);
            }
            // Each lease has its whole time again.
            Event::Majority => self.memory.forgive(LEASE_TTL),
            Event::Fault => self.fault(),
            Event::Call { from, id, sent, step } => {
                let answer = self.serve(from.0, step);
                self.tell_mirrors();
                if let Some(answer) = answer {
                    self.send(Some(from), Event::Answer { id, sent, answer });
                }
                return;
            }
            Event::Written { fence } => self.write(fence),
            Event::Revoke { lease } => self.memory.revoke(lease),
            _ => {}
        }
        self.tell_mirrors();
    }

    fn serve(&mut self, i: usize, step: Step) -> Option<Answer> {
        let put = |key: &str, lease| Op::Put {
            key: key.to_owned(),
            value: b"c".as_slice().into(),
            lease: Some(lease),
        };
        match step {
            Step::Grant => {
                let lease = self.memory.grant(self.now, LEASE_TTL);
                Some(Answer::Grant(lease.id, lease.ttl))
            }
            Step::Announce { lease } => {
                let ops = vec![put(&format!("{CONDUCTORS_PREFIX}{i}"), lease)];
                Some(Answer::Announce(self.txn(Txn { compares: vec![], ops })))
            }
            Step::Claim { lease } => {
                let compares = vec![Compare::Created { key: LEADER_KEY.to_owned(), revision: 0 }];
                let written = self.txn(Txn { compares, ops: vec![put(LEADER_KEY, lease)] });
                if let Written::At(revision) = written {
                    assert_eq!(self.owners.insert(revision, i), None, "one revision, one owner");
                }
                Some(Answer::Claim(written))
            }
            Step::Confirm => Some(Answer::Confirm(self.memory.get(LEADER_KEY).map(leader))),
            Step::KeepAlive { lease } => Some(Answer::Kept(self.memory.keep_alive(self.now, lease))),
            Step::Wait { .. } => None,
        }
    }

    fn txn(&mut self, txn: Txn) -> Written {
        match self.memory.txn(txn) {
            Ok(reply) if reply.succeeded => Written::At(reply.revision),
            Ok(_) => Written::Refused,
            Err(StoreError::LeaseNotFound(_)) => Written::LeaseGone,
            Err(error) => panic!("{error}"),
        }
    }

    /// A reconciler's write: done only while the term lasts, and then by the one whose term it is.
    fn write(&mut self, fence: Fence) {
        let value = fence.revision().to_string();
        let op = Op::Put { key: "fenced".to_owned(), value: value.as_bytes().into(), lease: None };
        match self.txn(Txn { compares: vec![fence.compare()], ops: vec![op] }) {
            Written::At(revision) => {
                self.writes += 1;
                self.wrote_last.insert(fence.revision(), self.writes);
                let newest = self.owners.last_key_value().map(|(fence, _)| *fence);
                assert_eq!(newest, Some(fence.revision()), "a write at {revision} of a term that is over");
            }
            Written::Refused => self.refused += 1,
            other => panic!("{other:?}"),
        }
    }

    /// Each mirror follows in order, at its own pace.
    fn tell_mirrors(&mut self) {
        let shown = (self.memory.revision(), self.memory.get(LEADER_KEY).map(leader));
        if shown == self.shown {
            return;
        }
        self.shown = shown.clone();
        for i in 0..self.candidates.len() {
            let delay = self.dice.up_to(self.manner.delay * 4);
            let at = (self.now + delay).max(self.candidates[i].mirror_last).max(self.silent_until);
            self.candidates[i].mirror_last = at;
            let (revision, leader) = shown.clone();
            let to = Some((i, self.candidates[i].life));
            self.at(at, to, Event::Mirror { revision, leader });
        }
    }

    fn fault(&mut self) {
        let Some(every) = self.manner.fault_every else { return };
        let pause = self.dice.up_to(every * 2);
        self.at(self.now + pause, None, Event::Fault);
        let i = usize::try_from(self.dice.below(self.candidates.len() as u64)).unwrap();
        if !self.candidates[i].alive {
            return self.restart(i);
        }
        match self.dice.below(4) {
            0 => self.kill(i),
            1 => self.stop(i),
            2 => {
                let span = self.dice.up_to(Duration::from_secs(3));
                self.silence(span);
            }
            _ => {
                let span = self.dice.up_to(Duration::from_secs(9));
                self.freeze(i, span);
            }
        }
    }
}
