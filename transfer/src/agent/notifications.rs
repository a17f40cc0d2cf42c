//! What peers have to say to this agent's user: a bounded queue in which no peer stands in another's way.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_config::{Epoch, HandoffId, WorkerId};
use tokio::sync::Notify;

use crate::error::Refusal;

/// Of all places, how many one peer may take: one part in so many.
const SHARES: usize = 8;

/// A message of a peer, sent with [`Session::notify`].
///
/// [`Session::notify`]: crate::session::Session::notify
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// Who sent it.
    pub from: WorkerId,
    /// In which life.
    pub from_epoch: Epoch,
    /// What it is about.
    pub handoff: HandoffId,
    /// What it says.
    pub payload: Vec<u8>,
}

/// The notifications of an agent. Clones share them; each is given out once.
#[derive(Clone)]
pub struct Notifications(Arc<Shared>);

struct Shared {
    queues: Mutex<Queues>,
    arrived: Notify,
    limit: usize,
}

#[derive(Default)]
struct Queues {
    by_peer: HashMap<WorkerId, VecDeque<Notification>>,
    /// Peers that have something waiting, in the order they are served.
    turns: VecDeque<WorkerId>,
    len: usize,
}

impl Notifications {
    pub(crate) fn new(limit: usize) -> Self {
        let limit = limit.max(1);
        Self(Arc::new(Shared { queues: Mutex::default(), arrived: Notify::new(), limit }))
    }

    /// Takes the next one; peers take turns, those of one peer come in the order they were sent.
    pub async fn next(&self) -> Notification {
        loop {
            let arrived = self.0.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            if let Some(next) = self.try_next() {
                return next;
            }
            arrived.await;
        }
    }

    /// Takes the next one, if there is one.
    pub fn try_next(&self) -> Option<Notification> {
        let mut queues = self.queues();
        let Queues { by_peer, turns, len } = &mut *queues;
        let peer = turns.pop_front()?;
        let queue = by_peer.get_mut(&peer)?;
        let next = queue.pop_front();
        match queue.is_empty() {
            true => drop(by_peer.remove(&peer)),
            false => turns.push_back(peer),
        }
        *len -= 1;
        next
    }

    /// Queues one, unless its peer has too many waiting, or all peers together have.
    pub(crate) fn push(&self, notification: Notification) -> Result<(), Refusal> {
        let limit = self.0.limit;
        let mut queues = self.queues();
        let waiting = queues.by_peer.get(&notification.from).map_or(0, VecDeque::len);
        if queues.len >= limit || waiting >= limit.div_ceil(SHARES) {
            return Err(Refusal::Overloaded);
        }
        if waiting == 0 {
            queues.turns.push_back(notification.from.clone());
        }
        queues.len += 1;
        queues.by_peer.entry(notification.from.clone()).or_default().push_back(notification);
        drop(queues);
        self.0.arrived.notify_one();
        Ok(())
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.0.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(peer: &str, handoff: u128) -> Notification {
        let handoff = HandoffId(handoff);
        Notification { from: peer.parse().unwrap(), from_epoch: Epoch(1), handoff, payload: vec![1] }
    }

    #[test]
    fn a_peer_that_floods_takes_its_share_and_no_turns_of_others() {
        let queue = Notifications::new(80);
        let taken = (0..100).filter(|n| queue.push(from("loud", *n)).is_ok()).count();
        assert_eq!(taken, 10);
        queue.push(from("quiet", 500)).unwrap();
        let order: Vec<u128> = std::iter::from_fn(|| queue.try_next()).map(|n| n.handoff.0).collect();
        assert_eq!(order[..3], [0, 500, 1]);
        assert_eq!(order.len(), 11);
        queue.push(from("loud", 7)).unwrap();
        assert_eq!(queue.try_next().unwrap().handoff, HandoffId(7));
        assert_eq!(queue.try_next(), None);
    }

    #[test]
    fn all_peers_together_have_a_limit() {
        let queue = Notifications::new(8);
        for peer in 0..8 {
            queue.push(from(&format!("p{peer}"), 0)).unwrap();
        }
        assert_eq!(queue.push(from("p9", 0)), Err(Refusal::Overloaded));
        queue.try_next().unwrap();
        queue.push(from("p9", 0)).unwrap();
    }

    #[tokio::test]
    async fn who_waits_is_woken_and_none_is_lost() {
        let queue = Notifications::new(64);
        let next = queue.next();
        tokio::pin!(next);
        assert!(futures_util::poll!(next.as_mut()).is_pending());
        queue.push(from("a", 1)).unwrap();
        queue.push(from("a", 2)).unwrap();
        assert_eq!(next.await.handoff, HandoffId(1));
        assert_eq!(queue.next().await.handoff, HandoffId(2));
    }
}
