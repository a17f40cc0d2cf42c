//! Who gets the next place: weighted fair among tenants by tokens, urgent ones first within a tenant. No clock, no I/O.
//!
//! Start-time fair queueing: each tenant has a tag, the tokens it has used divided by its weight; the waiting tenant with
//! the smallest tag is next. Who was away comes back with the tag of the one served last: it is owed nothing and owes
//! nothing. A request is charged by estimate when it begins and by what it used when it ends.
//!
//! Tenants of a higher priority go first, but every [`AGED_EVERY`]th place goes to whoever of the others has waited for
//! half of its patience. A full queue gives way: who holds more than its share of it loses its least urgent request to a
//! tenant that holds less.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use baton_config::keys::{PRIORITY_MAX, Quota};
use tokio::time::Instant;

use super::pace::Pace;
use super::quota::{Ledger, Left};
use super::{Reason, Refused};

/// One of so many places goes to a request of low priority that has waited for long.
const AGED_EVERY: u64 = 8;
/// What a tag grows by for a token at weight 1.
const TAG_SCALE: u64 = 1 << 10;
/// How much the latest request counts in the mean length of answers: one in so many.
const MEAN_OF: u64 = 8;
/// Longest time that anybody is asked to stay away.
const AWAY_MAX: Duration = Duration::from_secs(300);
/// So many of those sent away from a full queue are promised places of their own, however short it is.
const PROMISES_MIN: u32 = 8;
/// The time between two places before any was given back.
const UNKNOWN_INTERVAL: Duration = Duration::from_secs(1);

/// A request at the gate.
#[derive(Debug, Clone)]
pub(crate) struct Offer {
    /// Whose it is.
    pub(crate) tenant: Arc<str>,
    pub(crate) weight: u32,
    pub(crate) priority: u32,
    /// Whose quota it counts against.
    pub(crate) ledger: Arc<str>,
    pub(crate) quota: Quota,
    /// Tokens of its prompt, roughly.
    pub(crate) cost: u64,
    /// When waiting has no use any more.
    pub(crate) deadline: Instant,
}

/// The number of a request that was let in.
pub(crate) type Id = u64;

/// What becomes of an offer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Offered {
    /// It has a place.
    Placed(Id),
    /// It waits; somebody else may have had to give up its turn.
    Waits(Id, Option<(Id, Refused)>),
}

#[derive(Debug)]
struct Lane {
    weight: u32,
    priority: u32,
    tag: u64,
    waiting: BTreeSet<(Instant, Id)>,
    /// Tokens that its requests use beyond their estimate, on average.
    mean_extra: u64,
}

#[derive(Debug)]
struct Entry {
    lane: usize,
    ledger: Arc<str>,
    cost: u64,
    charged: u64,
    arrived: Instant,
    deadline: Instant,
    placed: bool,
}

/// The places, the queue and the books of all keys.
#[derive(Debug)]
pub(crate) struct Fair {
    places: usize,
    queue: usize,
    placed: usize,
    waiting: usize,
    lanes: Vec<Lane>,
    names: HashMap<Arc<str>, usize>,
    ledgers: HashMap<Arc<str>, Ledger>,
    entries: HashMap<Id, Entry>,
    /// Lanes that wait: the highest priority first, then the smallest tag.
    order: BTreeSet<(Reverse<u32>, u64, usize)>,
    /// The tag of who was served last, of each priority.
    served: [u64; PRIORITY_MAX as usize + 1],
    pace: Pace,
    /// Up to when places of the queue have been promised to those who were sent away.
    promised: Option<Instant>,
    grants: u64,
    last_id: Id,
}

impl Fair {
    /// With `places` requests at once and `queue` waiting ones.
    pub(crate) fn new(places: u32, queue: u32) -> Self {
        Self {
            places: places as usize,
            queue: queue as usize,
            placed: 0,
            waiting: 0,
            lanes: Vec::new(),
            names: HashMap::new(),
            ledgers: HashMap::new(),
            entries: HashMap::new(),
            order: BTreeSet::new(),
            served: [0; PRIORITY_MAX as usize + 1],
            pace: Pace::default(),
            promised: None,
            grants: 0,
            last_id: 0,
        }
    }

    /// Requests that wait.
    pub(crate) fn depth(&self) -> usize {
        self.waiting
    }

    /// What is left to a key.
    pub(crate) fn left(&self, ledger: &str) -> Left {
        self.ledgers.get(ledger).map(Ledger::left).unwrap_or_default()
    }

    /// Whether [`Fair::offer`] would take it, without taking it.
    pub(crate) fn check(&mut self, now: Instant, offer: &Offer) -> Result<(), Refused> {
        let lane = self.lane(offer);
        let charged = offer.cost + self.lanes[lane].mean_extra;
        let ledger = self.ledgers.entry(Arc::clone(&offer.ledger)).or_default();
        ledger.renew(&offer.quota, now);
        ledger.check(charged)?;
        if self.placed < self.places && self.waiting == 0 {
            return Ok(());
        }
        if self.waiting >= self.queue && self.surplus(lane).is_none() {
            return Err(Refused { reason: Reason::QueueFull, after: self.promise(now) });
        }
        self.check_wait(now, offer, lane)
    }

    /// Takes a request in, or says why not.
    pub(crate) fn offer(&mut self, now: Instant, offer: &Offer) -> Result<Offered, Refused> {
        self.check(now, offer)?;
        let lane = self.lane(offer);
        self.last_id += 1;
        let id = self.last_id;
        let charged = offer.cost + self.lanes[lane].mean_extra;
        if let Some(ledger) = self.ledgers.get_mut(&offer.ledger) {
            ledger.begin(charged);
        }
        let entry = Entry {
            lane,
            ledger: Arc::clone(&offer.ledger),
            cost: offer.cost,
            charged,
            arrived: now,
            deadline: offer.deadline,
            placed: false,
        };
        self.entries.insert(id, entry);
        if self.placed < self.places && self.waiting == 0 {
            self.place(now, id, false);
            return Ok(Offered::Placed(id));
        }
        let evicted = if self.waiting >= self.queue { self.evict(now, lane) } else { None };
        self.wait(id);
        Ok(Offered::Waits(id, evicted))
    }

    /// Ends a request that used `used` tokens, or takes it out of the queue; says who gets its place.
    pub(crate) fn end(&mut self, now: Instant, id: Id, used: u64) -> Option<Id> {
        let entry = self.entries.remove(&id)?;
        if !entry.placed {
            self.unwait(entry.lane, (entry.deadline, id));
            if let Some(ledger) = self.ledgers.get_mut(&entry.ledger) {
                ledger.undo(entry.charged);
            }
            return None;
        }
        if let Some(ledger) = self.ledgers.get_mut(&entry.ledger) {
            ledger.end(entry.charged, used, now.saturating_duration_since(entry.arrived));
        }
        let lane = &mut self.lanes[entry.lane];
        let extra = used.saturating_sub(entry.cost);
        lane.mean_extra = (lane.mean_extra * (MEAN_OF - 1) + extra) / MEAN_OF;
        self.recharge(entry.lane, entry.charged, used);
        self.placed -= 1;
        self.pace.given_back(now);
        let next = self.next(now);
        if let Some(next) = next {
            let entry = &self.entries[&next];
            let (lane, key) = (entry.lane, (entry.deadline, next));
            self.unwait(lane, key);
            self.place(now, next, true);
        }
        if self.placed < self.places {
            self.pace.slack(now);
            self.promised = None;
        }
        next
    }

    /// The lane of an offer, with the weight and priority that hold now.
    fn lane(&mut self, offer: &Offer) -> usize {
        let priority = offer.priority.min(PRIORITY_MAX);
        let at = match self.names.get(&offer.tenant) {
            Some(at) => *at,
            None => {
                let at = self.lanes.len();
                let (tag, waiting) = (self.served[priority as usize], BTreeSet::new());
                self.lanes.push(Lane { weight: 1, priority, tag, waiting, mean_extra: 0 });
                self.names.insert(Arc::clone(&offer.tenant), at);
                at
            }
        };
        let weight = offer.weight.max(1);
        if (self.lanes[at].weight, self.lanes[at].priority) != (weight, priority) {
            self.reorder(at, |lane, served| {
                lane.weight = weight;
                if lane.priority != priority {
                    lane.priority = priority;
                    lane.tag = served[priority as usize];
                }
            });
        }
        at
    }

    /// Changes a lane that may be in `order`.
    fn reorder(&mut self, at: usize, change: impl FnOnce(&mut Lane, &[u64])) {
        let lane = &mut self.lanes[at];
        let was = (Reverse(lane.priority), lane.tag, at);
        change(lane, &self.served);
        if self.order.remove(&was) {
            self.order.insert((Reverse(lane.priority), lane.tag, at));
        }
    }

    fn recharge(&mut self, at: usize, charged: u64, used: u64) {
        self.reorder(at, |lane, _| {
            let weight = u64::from(lane.weight);
            lane.tag = (lane.tag + used * TAG_SCALE / weight).saturating_sub(charged * TAG_SCALE / weight);
        });
    }

    fn place(&mut self, now: Instant, id: Id, waited: bool) {
        self.placed += 1;
        if self.placed >= self.places {
            self.pace.full(now);
        }
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.placed = true;
        let (at, charged) = (entry.lane, entry.charged);
        let served = self.served[self.lanes[at].priority as usize];
        // Who waited keeps its turn; who comes from outside saves nothing up.
        let start = if waited { self.lanes[at].tag } else { self.lanes[at].tag.max(served) };
        self.reorder(at, |lane, _| lane.tag = start + charged * TAG_SCALE / u64::from(lane.weight));
        let priority = self.lanes[at].priority as usize;
        self.served[priority] = served.max(start);
    }

    fn wait(&mut self, id: Id) {
        let entry = &self.entries[&id];
        let (at, key) = (entry.lane, (entry.deadline, id));
        let served = self.served[self.lanes[at].priority as usize];
        let lane = &mut self.lanes[at];
        if lane.waiting.is_empty() {
            lane.tag = lane.tag.max(served);
            self.order.insert((Reverse(lane.priority), lane.tag, at));
        }
        lane.waiting.insert(key);
        self.waiting += 1;
    }

    fn unwait(&mut self, at: usize, key: (Instant, Id)) {
        let lane = &mut self.lanes[at];
        if lane.waiting.remove(&key) {
            self.waiting -= 1;
        }
        if lane.waiting.is_empty() {
            self.order.remove(&(Reverse(lane.priority), lane.tag, at));
        }
    }

    /// Who is next.
    fn next(&mut self, now: Instant) -> Option<Id> {
        let (Reverse(top), _, first) = *self.order.first()?;
        self.grants += 1;
        let mut at = first;
        if self.grants.is_multiple_of(AGED_EVERY) {
            let aged = self.order.iter().filter(|(Reverse(priority), ..)| *priority < top);
            let mut aged = aged.filter(|(.., at)| {
                let head = self.lanes[*at].waiting.first().and_then(|(_, id)| self.entries.get(id));
                head.is_some_and(|head| now >= head.arrived + (head.deadline - head.arrived) / 2)
            });
            at = aged.next().map_or(first, |(.., at)| *at);
        }
        self.lanes[at].waiting.first().map(|(_, id)| *id)
    }

    /// The lane that holds most of the queue for its weight, if that is more than `lane` would with one more.
    fn surplus(&self, lane: usize) -> Option<usize> {
        let own = &self.lanes[lane];
        let share = |count: usize, weight: u32| count as f64 / f64::from(weight);
        let mine = share(own.waiting.len() + 1, own.weight);
        self.order
            .iter()
            .filter(|(Reverse(priority), _, at)| *priority <= own.priority && *at != lane)
            .map(|(.., at)| (share(self.lanes[*at].waiting.len(), self.lanes[*at].weight), *at))
            .filter(|(share, _)| *share > mine)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, at)| at)
    }

    fn evict(&mut self, now: Instant, lane: usize) -> Option<(Id, Refused)> {
        let from = self.surplus(lane)?;
        let key = *self.lanes[from].waiting.last()?;
        self.unwait(from, key);
        let entry = self.entries.remove(&key.1)?;
        if let Some(ledger) = self.ledgers.get_mut(&entry.ledger) {
            ledger.undo(entry.charged);
        }
        let after = self.promise(now);
        Some((key.1, Refused { reason: Reason::QueueFull, after }))
    }

    /// How long a request that has waited in vain had better stay away: until it would wait no longer than it may.
    pub(crate) fn away(&mut self, now: Instant, offer: &Offer) -> Duration {
        let lane = self.lane(offer);
        self.check_wait(now, offer, lane).err().map_or(Duration::ZERO, |refused| refused.after)
    }

    /// Refuses what would wait for longer than it has use for.
    fn check_wait(&self, now: Instant, offer: &Offer, lane: usize) -> Result<(), Refused> {
        let Some(interval) = self.pace.interval(now) else { return Ok(()) };
        let turns = u32::try_from(self.turns(lane, offer.deadline)).unwrap_or(u32::MAX);
        let predicted = interval.saturating_mul(turns);
        let patience = offer.deadline.saturating_duration_since(now);
        if predicted <= patience {
            return Ok(());
        }
        let after = (predicted - patience).min(AWAY_MAX);
        Err(Refused { reason: Reason::Deadline, after })
    }

    /// Places that will be given out up to and including the one for a further request of `lane`.
    fn turns(&self, lane: usize, deadline: Instant) -> usize {
        let own = &self.lanes[lane];
        let before = own.waiting.range(..(deadline, Id::MAX)).count() + 1;
        let others = self.order.iter().filter(|(.., at)| *at != lane).map(|(.., at)| {
            let other = &self.lanes[*at];
            let waiting = other.waiting.len();
            match other.priority.cmp(&own.priority) {
                std::cmp::Ordering::Greater => waiting,
                std::cmp::Ordering::Less => 0,
                std::cmp::Ordering::Equal => {
                    waiting.min(before * other.weight as usize / own.weight as usize)
                }
            }
        });
        before + others.sum::<usize>()
    }

    /// When to come back to a full queue: each of those who are sent away is promised a place of its own in it.
    fn promise(&mut self, now: Instant) -> Duration {
        let interval = self.pace.interval(now).unwrap_or(UNKNOWN_INTERVAL);
        let from = self.promised.map_or(now, |promised| promised.max(now));
        // Some of those who were sent away never listen: no promise reaches much further than one queue.
        let furthest = u32::try_from(self.queue).unwrap_or(u32::MAX).max(PROMISES_MIN);
        let latest = now + interval.saturating_mul(furthest).min(AWAY_MAX);
        let promised = (from + interval).min(latest);
        self.promised = Some(promised);
        promised - now
    }
}

#[cfg(test)]
mod tests;
