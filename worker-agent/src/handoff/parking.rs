//! Messages that arrived before the request they belong to, and the memory of handoffs that ended.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use baton_config::HandoffId;

use super::{Limits, Side};

/// Messages of handoffs not known yet, each kept for a bounded time.
#[derive(Debug)]
pub(super) struct Parking<T> {
    waiting: BTreeMap<HandoffId, Vec<(Instant, T)>>,
    count: usize,
}

impl<T> Parking<T> {
    pub(super) fn new() -> Self {
        Self { waiting: BTreeMap::new(), count: 0 }
    }

    /// Keeps `message` until `until`, or until the first one of its handoff is over: posting again buys no time.
    /// Gives it back when there is no room.
    pub(super) fn park(
        &mut self,
        id: HandoffId,
        message: T,
        until: Instant,
        limits: &Limits,
    ) -> Result<(), T> {
        let here = self.waiting.get(&id).map_or(0, Vec::len);
        let first = self.waiting.get(&id).and_then(|messages| messages.first()).map(|(until, _)| *until);
        let until = first.map_or(until, |first| first.min(until));
        if self.count >= limits.parked_max || here >= limits.parked_per_handoff_max {
            return Err(message);
        }
        self.waiting.entry(id).or_default().push((until, message));
        self.count += 1;
        Ok(())
    }

    /// Everything kept for `id`, oldest first.
    pub(super) fn take(&mut self, id: HandoffId) -> impl Iterator<Item = T> + use<T> {
        let taken = self.waiting.remove(&id).unwrap_or_default();
        self.count -= taken.len();
        taken.into_iter().map(|(_, message)| message)
    }

    /// What nobody came for.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<T> {
        let mut expired = Vec::new();
        self.waiting.retain(|_, messages| {
            expired.extend(messages.extract_if(.., |(until, _)| *until <= now).map(|(_, message)| message));
            !messages.is_empty()
        });
        self.count -= expired.len();
        expired
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.values().flatten().map(|(until, _)| *until).min()
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }
}

/// How handoffs ended, for a bounded time, so that late messages get a final answer.
#[derive(Debug)]
pub(super) struct Ended<T> {
    by_id: HashMap<(Side, HandoffId), T>,
    order: VecDeque<(Instant, (Side, HandoffId))>,
    keep: Duration,
    max: usize,
}

impl<T: Copy> Ended<T> {
    pub(super) fn new(limits: &Limits) -> Self {
        Self { by_id: HashMap::new(), order: VecDeque::new(), keep: limits.ended_for, max: limits.ended_max }
    }

    pub(super) fn insert(&mut self, now: Instant, side: Side, id: HandoffId, end: T) {
        self.expire(now);
        if self.by_id.insert((side, id), end).is_none() {
            self.order.push_back((now + self.keep, (side, id)));
        }
        if self.order.len() > self.max {
            self.forget_oldest();
        }
    }

    pub(super) fn get(&self, side: Side, id: HandoffId) -> Option<T> {
        self.by_id.get(&(side, id)).copied()
    }

    fn expire(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(until, _)| *until <= now) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, key)) = self.order.pop_front() {
            self.by_id.remove(&key);
        }
    }
}
