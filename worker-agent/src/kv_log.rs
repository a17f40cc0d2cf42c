//! The history of the prefix cache: a ring of numbered events that followers read from where they left off.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_config::Epoch;
use baton_config::prefix::HashScheme;
use baton_config::protocol::{KvEvent, KvEventBatch, KvTier};
use tokio::sync::watch;

/// Events of one line at most.
const BATCH_MAX_EVENTS: usize = 256;

/// The ring. Written by the engine thread, read by every follower.
#[derive(Debug)]
pub struct KvLog {
    block_tokens: u32,
    capacity: usize,
    ring: Mutex<Ring>,
    /// Changes with the last sequence number and with the epoch.
    news: watch::Sender<(Epoch, u64)>,
}

#[derive(Debug, Default)]
struct Ring {
    events: VecDeque<KvEvent>,
    /// Number of the last event; the first ever is 1.
    last: u64,
}

/// What a follower gets next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Events in a row.
    Batch(KvEventBatch),
    /// Nothing yet.
    Wait,
    /// The ring does not reach back that far, or the worker is in another life: a snapshot is needed.
    Gap,
}

impl KvLog {
    /// An empty log that keeps `capacity` events.
    pub fn new(block_tokens: u32, capacity: usize) -> Self {
        Self { block_tokens, capacity, ring: Mutex::default(), news: watch::channel((Epoch(0), 0)).0 }
    }

    /// Appends what the engine reported.
    pub fn push(&self, events: Vec<KvEvent>) {
        if events.is_empty() {
            return;
        }
        let mut ring = self.ring();
        ring.last += events.len() as u64;
        ring.events.extend(events);
        let surplus = ring.events.len().saturating_sub(self.capacity);
        ring.events.drain(..surplus);
        let last = ring.last;
        drop(ring);
        self.news.send_modify(|news| news.1 = last);
    }

    /// The worker has a new life: followers start again from a snapshot.
    pub fn set_epoch(&self, epoch: Epoch) {
        self.news.send_modify(|news| news.0 = epoch);
    }

    /// Epoch and number of the last event, and their changes.
    pub fn news(&self) -> watch::Receiver<(Epoch, u64)> {
        self.news.subscribe()
    }

    /// What follows event number `since` of the life `epoch`.
    pub fn after(&self, epoch: Epoch, since: u64) -> Next {
        if epoch != self.news.borrow().0 {
            return Next::Gap;
        }
        let ring = self.ring();
        let oldest = ring.last - ring.events.len() as u64 + 1;
        if since > ring.last || since + 1 < oldest {
            return Next::Gap;
        }
        if since == ring.last {
            return Next::Wait;
        }
        let skip = (since + 1 - oldest) as usize;
        let events: Vec<_> = ring.events.iter().skip(skip).take(BATCH_MAX_EVENTS).cloned().collect();
        let seq = since + events.len() as u64;
        Next::Batch(self.batch(epoch, seq, false, events))
    }

    /// A snapshot taken by the engine thread, which is the only writer, so that it is as of the last event.
    pub fn snapshot(&self, events: Vec<KvEvent>) -> KvEventBatch {
        let (epoch, seq) = *self.news.borrow();
        self.batch(epoch, seq, true, events)
    }

    fn batch(&self, epoch: Epoch, seq: u64, snapshot: bool, events: Vec<KvEvent>) -> KvEventBatch {
        KvEventBatch {
            epoch,
            seq,
            snapshot,
            block_tokens: self.block_tokens,
            scheme: HashScheme::Baton,
            tier: KvTier::Device,
            events,
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use baton_config::prefix::BlockHash;

    use super::*;

    fn removed(n: u64) -> KvEvent {
        KvEvent::Removed { blocks: vec![BlockHash(n)] }
    }

    #[test]
    fn a_follower_gets_every_event_once_and_in_order() {
        let log = KvLog::new(16, 100);
        log.set_epoch(Epoch(7));
        let (mut seen, mut since) = (Vec::new(), 0);
        for round in 0..300u64 {
            log.push((0..round % 4).map(|i| removed(round * 10 + i)).collect());
            if round % 7 == 0 {
                while let Next::Batch(batch) = log.after(Epoch(7), since) {
                    assert_eq!((batch.epoch, batch.snapshot), (Epoch(7), false));
                    assert_eq!(batch.seq, since + batch.events.len() as u64);
                    since = batch.seq;
                    seen.extend(batch.events);
                }
                assert_eq!(log.after(Epoch(7), since), Next::Wait);
            }
        }
        let all: Vec<_> =
            (0..=294u64).flat_map(|round| (0..round % 4).map(move |i| removed(round * 10 + i))).collect();
        assert_eq!(seen, all);
    }

    #[test]
    fn a_line_has_so_many_events_and_the_next_one_goes_on_after_them() {
        let log = KvLog::new(16, 1000);
        log.push((0..600).map(removed).collect());
        let mut since = 0;
        for (seq, first, len) in [(256, 0, 256), (512, 256, 256), (600, 512, 88)] {
            let Next::Batch(batch) = log.after(Epoch(0), since) else { panic!("there are more") };
            assert_eq!((batch.seq, batch.events.len(), &batch.events[0]), (seq, len, &removed(first)));
            since = batch.seq;
        }
        assert_eq!(log.after(Epoch(0), since), Next::Wait);
    }

    #[test]
    fn who_fell_behind_or_comes_from_another_life_gets_a_snapshot() {
        let log = KvLog::new(16, 10);
        let (former, present) = (Epoch(7), Epoch(8));
        log.set_epoch(former);
        log.push((0..25).map(removed).collect());
        assert_eq!(log.after(former, 14), Next::Gap);
        assert!(
            matches!(log.after(former, 15), Next::Batch(batch) if batch.events.len() == 10 && batch.seq == 25)
        );
        assert_eq!(log.after(former, 26), Next::Gap, "a number this life has not reached");
        log.set_epoch(present);
        assert_eq!([15, 25].map(|since| log.after(former, since)), [Next::Gap, Next::Gap]);
        let snapshot = log.snapshot(vec![removed(1)]);
        assert_eq!((snapshot.epoch, snapshot.seq, snapshot.snapshot), (present, 25, true));
        assert_eq!(log.after(present, snapshot.seq), Next::Wait);
    }
}
