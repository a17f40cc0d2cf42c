//! The requests of this worker that have not ended: a bound on them, and a wait for the last one.

use tokio::sync::watch;

/// Why a request gets no place; the text is for whoever sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoPlace {
    /// The worker does not take requests yet, or any more.
    #[error("this worker takes no new requests now")]
    Closed,
    /// There are as many as it takes.
    #[error("as many requests as this worker takes are in flight")]
    Full,
}

/// Counts requests; at most so many at once.
#[derive(Debug)]
pub(crate) struct InFlight {
    open: watch::Sender<u32>,
    max: u32,
}

/// One request; it has ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Permit(watch::Sender<u32>);

impl InFlight {
    /// None yet, at most `max`.
    pub(crate) fn new(max: u32) -> Self {
        Self { open: watch::Sender::new(0), max }
    }

    /// Takes in a request, if there is room.
    pub(crate) fn enter(&self) -> Option<Permit> {
        let entered = self.open.send_if_modified(|open| {
            let room = *open < self.max;
            *open += u32::from(room);
            room
        });
        entered.then(|| Permit(self.open.clone()))
    }

    /// Requests that have not ended.
    pub(crate) fn count(&self) -> u32 {
        *self.open.borrow()
    }

    /// Done once there is none.
    pub(crate) async fn none(&self) {
        // The sender lives in `self`: the channel can't close.
        let _ = self.open.subscribe().wait_for(|open| *open == 0).await;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_last_request_ends_the_wait() {
        let requests = InFlight::new(2);
        requests.none().await;
        let (first, second) = (requests.enter().unwrap(), requests.enter().unwrap());
        assert!(requests.enter().is_none(), "no more than two");
        drop(first);
        assert_eq!(requests.count(), 1);
        assert!(requests.enter().is_some(), "room again");
        tokio::select! {
            biased;
            () = requests.none() => panic!("one has not ended"),
            () = std::future::ready(()) => {}
        }
        drop(second);
        requests.none().await;
    }
}
