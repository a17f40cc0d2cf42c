//! Two desks in virtual time, joined by a network and by model engines that go wrong on purpose.
//!
//! Every choice comes from one seed, so a failure replays. The model engines know what is really in the blocks and
//! panic as soon as a desk breaks an invariant of the handoff.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::ops::Range;
use std::time::{Duration, Instant};

use baton_config::protocol::{
    FirstToken, HandoffOutcome, HandoffStatus, PeerRef, Ticket, TicketAck, TicketBlock, Want,
};
use baton_config::{Epoch, HandoffId, WorkerId};

use crate::handoff::decode::{DecodeEnd, PullOrder, Writers};
use crate::handoff::tests::geometry;
use crate::handoff::{
    Action, Answer, DecodeAction, DecodeEvent, Desk, GiveUp, Limits, Opening, PeerFault, PrefillAction,
    PrefillEvent, PullFault, Side, Waiter,
};

mod chance;
mod engines;
mod lives;
mod network;

pub(super) use chance::{Dice, Faults};
use network::{Message, Reply};

#[derive(Debug, Clone)]
enum Event {
    OpenPrefill,
    OpenDecode,
    Deliver { to: Side, call: u64, message: Message },
    Reply { call: u64, reply: Reply },
    Computed { upto: u32 },
    First,
    Exported { blocks: Range<u32> },
    Admitted,
    PullDone { pull: u64, aborted: bool },
    ClientLeaves,
    RouterCancels,
    Crash(Side),
    Blocked,
    Restart(Side),
    Rejoin(Side),
    View { at: Side, peer: Option<Epoch> },
}

#[derive(Debug)]
struct Scheduled {
    id: HandoffId,
    /// Life of the side the event happens in; events of a crashed life are lost.
    life: Option<(Side, Epoch)>,
    event: Event,
}

/// What the decode worker's engine holds for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seat {
    Queued,
    Reserved,
    Decoding,
    Prefilling,
    Quarantined,
    Free,
}

#[derive(Debug)]
struct Request {
    prompt: u32,
    cached: u32,
    corrupt_always: bool,
    never_admitted: bool,
    prefill_stuck: bool,
    left: bool,
    // Prefill side.
    p_open: Option<Epoch>,
    p_free: bool,
    p_since: Option<Instant>,
    /// Tokens computed.
    computed: u32,
    exported_upto: u32,
    /// Blocks whose staging is not free.
    staged: BTreeSet<u32>,
    // Decode side.
    d_open: Option<Epoch>,
    seat: Seat,
    pulls: BTreeMap<u64, PullOrder>,
    pub_upto: u32,
    admitted_at: Option<Instant>,
    resolved_at: Option<Instant>,
    failed: bool,
    end: Option<DecodeEnd>,
}

/// What a run came to, for tests that want to see that something did happen.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) steps: u64,
    pub(super) imported: u64,
    pub(super) local: BTreeMap<GiveUp, u64>,
    pub(super) cancelled: u64,
    pub(super) failed: u64,
    pub(super) fenced: u64,
    pub(super) done: u64,
    pub(super) expired: u64,
    pub(super) stale: u64,
    pub(super) rereads: u64,
}

struct Worker {
    desk: Desk,
    epoch: Epoch,
    alive: bool,
}

/// The world of one run.
pub(super) struct Pair {
    seed: u64,
    start: Instant,
    now: Instant,
    dice: Dice,
    faults: Faults,
    limits: Limits,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    events: HashMap<u64, Scheduled>,
    scheduled: u64,
    calls: HashMap<u64, (Side, Epoch, HandoffId, Message)>,
    next_call: u64,
    prefill: Worker,
    decode: Worker,
    next_epoch: u64,
    requests: BTreeMap<HandoffId, Request>,
    pub(super) tally: Tally,
}

const P_BLOCK: u32 = 32;

fn name(side: Side) -> WorkerId {
    match side {
        Side::Prefill => "p-0".parse().unwrap(),
        Side::Decode => "d-0".parse().unwrap(),
    }
}

fn first_of(id: HandoffId) -> FirstToken {
    FirstToken { token: (id.0 % 1000) as u32, logprob: None, logits_digest: None }
}

impl Pair {
    pub(super) fn new(seed: u64, faults: Faults) -> Self {
        let start = Instant::now();
        let limits = Limits { ticket_blocks_max: 4, stage_on_want: seed % 2 == 1, ..Limits::default() };
        let worker = |side, epoch| {
            let mut desk = Desk::new(name(side), limits.clone());
            desk.set_epoch(start, epoch, &mut Vec::new());
            Worker { desk, epoch, alive: true }
        };
        Self {
            seed,
            start,
            now: start,
            dice: Dice::new(seed),
            faults,
            queue: BinaryHeap::new(),
            events: HashMap::new(),
            scheduled: 0,
            calls: HashMap::new(),
            next_call: 0,
            prefill: worker(Side::Prefill, Epoch(1)),
            decode: worker(Side::Decode, Epoch(2)),
            next_epoch: 3,
            requests: BTreeMap::new(),
            tally: Tally::default(),
            limits,
        }
    }

    fn worker(&mut self, side: Side) -> &mut Worker {
        match side {
            Side::Prefill => &mut self.prefill,
            Side::Decode => &mut self.decode,
        }
    }

    fn at(&mut self, after: Duration, id: HandoffId, life: Option<Side>, event: Event) {
        let life = life.map(|side| (side, self.worker(side).epoch));
        self.scheduled += 1;
        self.queue.push(Reverse((self.now + after, self.scheduled)));
        self.events.insert(self.scheduled, Scheduled { id, life, event });
    }

    /// Plans `requests` handoffs over `spread`, runs until nothing is left to happen, and checks what remains.
    pub(super) fn run(mut self, requests: u64, spread: Duration) -> Tally {
        for n in 0..requests {
            let id = HandoffId(u128::from(n) + 1);
            let offset = self.dice.micros(0..spread.as_micros().max(1) as u64);
            self.plan(id, offset);
        }
        for side in [Side::Prefill, Side::Decode] {
            for _ in 0..self.faults.crashes {
                let at = self.dice.micros(0..spread.as_micros().max(1) as u64 + 2_000_000);
                self.at(at, HandoffId(0), None, Event::Crash(side));
            }
        }
        for side in [Side::Prefill, Side::Decode] {
            for _ in 0..self.faults.rejoins {
                let at = self.dice.micros(0..spread.as_micros().max(1) as u64 + 2_000_000);
                self.at(at, HandoffId(0), None, Event::Rejoin(side));
            }
        }
        while let Some(now) = self.next_time() {
            self.now = now;
            self.tally.steps += 1;
            assert!(self.tally.steps < 200_000, "seed {}: never comes to rest", self.seed);
            self.step();
        }
        self.check_rest();
        self.tally
    }

    fn next_time(&self) -> Option<Instant> {
        let queued = self.queue.peek().map(|Reverse((at, _))| *at);
        let desks =
            [&self.prefill, &self.decode].into_iter().filter(|w| w.alive).filter_map(|w| w.desk.deadline());
        queued.into_iter().chain(desks).min().map(|at| at.max(self.now))
    }

    fn plan(&mut self, id: HandoffId, offset: Duration) {
        let prompt = 1 + self.dice.below(600) as u32;
        let cached = if self.dice.permille(500) { self.dice.below(u64::from(prompt)) as u32 } else { 0 };
        let faults = self.faults;
        let request = Request {
            prompt,
            cached: cached - cached % 16,
            corrupt_always: self.dice.permille(faults.corrupt_always),
            never_admitted: self.dice.permille(faults.never_admitted),
            prefill_stuck: self.dice.permille(faults.prefill_stuck),
            left: false,
            p_open: None,
            p_free: true,
            p_since: None,
            computed: 0,
            exported_upto: 0,
            staged: BTreeSet::new(),
            d_open: None,
            seat: Seat::Free,
            pulls: BTreeMap::new(),
            pub_upto: 0,
            admitted_at: None,
            resolved_at: None,
            failed: false,
            end: None,
        };
        let leaves = request.never_admitted || self.dice.permille(faults.client_leaves);
        self.requests.insert(id, request);
        let only = self.dice.permille(faults.one_side_only).then(|| self.dice.below(2));
        if only != Some(0) {
            let after = offset + self.delay();
            self.at(after, id, None, Event::OpenPrefill);
        }
        if only != Some(1) {
            let after = offset + self.delay();
            self.at(after, id, None, Event::OpenDecode);
        }
        if leaves {
            let after = offset + self.dice.micros(0..4_000_000);
            self.at(after, id, None, Event::ClientLeaves);
        }
        if self.dice.permille(faults.router_cancels) {
            let after = offset + self.dice.micros(0..2_000_000);
            self.at(after, id, None, Event::RouterCancels);
        }
        if self.dice.permille(faults.blocked) {
            let after = offset + self.dice.micros(0..2_000_000);
            self.at(after, id, None, Event::Blocked);
        }
    }

    fn delay(&mut self) -> Duration {
        if self.dice.permille(self.faults.late) {
            self.dice.micros(1_000..1_500_000)
        } else {
            self.dice.micros(50..3_000)
        }
    }

    fn step(&mut self) {
        let due = self.queue.peek().is_some_and(|Reverse((at, _))| *at <= self.now);
        if !due {
            for side in [Side::Prefill, Side::Decode] {
                let mut out = Vec::new();
                let now = self.now;
                let worker = self.worker(side);
                if worker.alive {
                    worker.desk.tick(now, &mut out);
                }
                self.carry_out(side, out);
            }
            return;
        }
        let Some(Reverse((_, key))) = self.queue.pop() else { return };
        let Scheduled { id, life, event } = self.events.remove(&key).unwrap();
        if let Some((side, epoch)) = life {
            let worker = self.worker(side);
            if !worker.alive || worker.epoch != epoch {
                return;
            }
        }
        self.happen(id, event);
    }

    fn happen(&mut self, id: HandoffId, event: Event) {
        let now = self.now;
        let mut out = Vec::new();
        match event {
            Event::OpenPrefill => self.open_prefill(id),
            Event::OpenDecode => self.open_decode(id),
            Event::Deliver { to, call, message } => self.deliver(to, call, id, message),
            Event::Reply { call, reply } => self.reply(call, reply),
            Event::Computed { upto } => {
                self.requests.get_mut(&id).unwrap().computed = upto;
                self.prefill.desk.prefill(now, id, PrefillEvent::Computed { upto }, &mut out);
                self.carry_out(Side::Prefill, out);
            }
            Event::First => {
                self.prefill.desk.prefill(now, id, PrefillEvent::First(first_of(id)), &mut out);
                self.carry_out(Side::Prefill, out);
            }
            Event::Exported { blocks } => {
                let request = self.requests.get_mut(&id).unwrap();
                request.exported_upto = request.exported_upto.max(blocks.end);
                if !request.p_free {
                    request.staged.extend(blocks.clone());
                }
                let digest = |index| TicketBlock { index, region: 0, offset: 0, digest: u64::from(index) };
                let result = Ok(blocks.map(digest).collect());
                self.prefill.desk.prefill(now, id, PrefillEvent::Exported(result), &mut out);
                self.carry_out(Side::Prefill, out);
            }
            Event::Admitted => {
                let request = self.requests.get_mut(&id).unwrap();
                if request.seat != Seat::Queued {
                    return;
                }
                request.seat = Seat::Reserved;
                request.pub_upto = request.cached;
                request.admitted_at = Some(now);
                let event = DecodeEvent::Admitted { cached: request.cached, local_below: 3 };
                self.decode.desk.decode(now, id, event, &mut out);
                self.carry_out(Side::Decode, out);
            }
            Event::PullDone { pull, aborted } => self.pull_done(id, pull, aborted),
            Event::ClientLeaves => {
                // The router drops both calls, also one that has not arrived yet.
                self.requests.get_mut(&id).unwrap().left = true;
                if self.decode.alive && self.requests[&id].d_open == Some(self.decode.epoch) {
                    self.decode.desk.close_decode(now, id, &mut out);
                    self.carry_out(Side::Decode, out);
                }
                let mut out = Vec::new();
                if self.prefill.alive && self.requests[&id].p_open == Some(self.prefill.epoch) {
                    self.prefill.desk.prefill(now, id, PrefillEvent::Cancel, &mut out);
                    self.carry_out(Side::Prefill, out);
                }
            }
            Event::RouterCancels => {
                for side in [Side::Prefill, Side::Decode] {
                    let mut out = Vec::new();
                    let worker = self.worker(side);
                    if worker.alive {
                        worker.desk.delete(now, id, &mut out);
                        self.carry_out(side, out);
                    }
                }
            }
            Event::Blocked => {
                for side in [Side::Prefill, Side::Decode] {
                    let mut out = Vec::new();
                    let worker = self.worker(side);
                    if worker.alive {
                        worker.desk.blocked(now, &mut out);
                        self.carry_out(side, out);
                    }
                }
            }
            Event::Crash(side) => self.crash(side),
            Event::Restart(side) => self.restart(side),
            Event::Rejoin(side) => self.rejoin(side),
            Event::View { at, peer } => {
                let other = match at {
                    Side::Prefill => name(Side::Decode),
                    Side::Decode => name(Side::Prefill),
                };
                let worker = self.worker(at);
                if !worker.alive {
                    return;
                }
                worker.desk.view_changed(now, |w, e| *w == other && peer == Some(e), &mut out);
                self.carry_out(at, out);
            }
        }
    }

    fn open_prefill(&mut self, id: HandoffId) {
        let now = self.now;
        let mut out = Vec::new();
        if !self.prefill.alive {
            return;
        }
        // The router's view may be of an older life of either side.
        let (own, peer) = (self.prefill.epoch, self.decode.epoch);
        let prompt = self.requests[&id].prompt;
        let peer = PeerRef { worker: name(Side::Decode), epoch: peer, address: "d".into() };
        let opening = Opening { id, own_epoch: own, peer, prompt };
        if self.prefill.desk.open_prefill(now, opening, geometry(), &mut out).is_ok() {
            let stuck = self.requests[&id].prefill_stuck;
            let request = self.requests.get_mut(&id).unwrap();
            assert!(request.p_free, "opened twice");
            request.p_open = Some(own);
            request.p_free = false;
            request.p_since = Some(now);
            let mut after = self.dice.micros(100..200_000);
            let chunk = 64 + self.dice.below(128) as u32;
            let mut upto = 0;
            while upto < prompt {
                upto = prompt.min(upto + chunk);
                if stuck && upto == prompt {
                    break;
                }
                after += self.dice.micros(1_000..80_000);
                self.at(after, id, Some(Side::Prefill), Event::Computed { upto });
            }
            if self.requests[&id].left {
                self.prefill.desk.prefill(now, id, PrefillEvent::Cancel, &mut out);
            }
            if !stuck {
                after += self.dice.micros(0..2_000);
                self.at(after, id, Some(Side::Prefill), Event::First);
            }
        }
        self.carry_out(Side::Prefill, out);
    }

    fn open_decode(&mut self, id: HandoffId) {
        let now = self.now;
        let mut out = Vec::new();
        if !self.decode.alive {
            return;
        }
        let (own, peer) = (self.decode.epoch, self.prefill.epoch);
        let prompt = self.requests[&id].prompt;
        let peer = PeerRef { worker: name(Side::Prefill), epoch: peer, address: "p".into() };
        let opening = Opening { id, own_epoch: own, peer, prompt };
        if self.decode.desk.open_decode(now, opening, &mut out).is_ok() {
            let after = if self.dice.permille(self.faults.slow_admission) {
                self.dice.micros(90_000_000..120_000_000)
            } else if self.dice.permille(300) {
                self.dice.micros(1_000..3_000_000)
            } else {
                self.dice.micros(50..2_000)
            };
            let request = self.requests.get_mut(&id).unwrap();
            request.d_open = Some(own);
            request.seat = Seat::Queued;
            if request.left {
                self.decode.desk.close_decode(now, id, &mut out);
            } else if !request.never_admitted {
                self.at(after, id, Some(Side::Decode), Event::Admitted);
            }
        }
        self.carry_out(Side::Decode, out);
    }

    fn carry_out(&mut self, _side: Side, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Prefill(id, action) => self.prefill_action(id, action),
                Action::Decode(id, action) => self.decode_action(id, action),
                Action::Answer { waiter, answer } => self.answer(waiter, answer),
                Action::PrefillEnded(id, outcome) => {
                    assert!(self.requests[&id].p_free, "seed {}: ended with blocks held", self.seed);
                    match outcome {
                        HandoffOutcome::Done => self.tally.done += 1,
                        HandoffOutcome::Expired => self.tally.expired += 1,
                        HandoffOutcome::Cancelled => {}
                    }
                }
                Action::DecodeEnded(id, end) => {
                    let request = self.requests.get_mut(&id).unwrap();
                    assert!(request.end.is_none(), "seed {}: ended twice", self.seed);
                    request.end = Some(end);
                    match end {
                        DecodeEnd::Imported => self.tally.imported += 1,
                        DecodeEnd::Local(why) => *self.tally.local.entry(why).or_default() += 1,
                        DecodeEnd::Cancelled => self.tally.cancelled += 1,
                    }
                }
            }
        }
    }
}
