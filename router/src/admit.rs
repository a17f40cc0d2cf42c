//! Admission: so many requests at once, so many waiting, the rest refused before any work is spent on them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::metrics::Metrics;
use crate::reply::Refusal;

/// The seconds a refused client is asked to stay away.
const RETRY_AFTER_S: u32 = 1;

/// The gate in front of all generation.
#[derive(Debug)]
pub(crate) struct Gate {
    places: Arc<Semaphore>,
    waiting: AtomicU32,
    queue: u32,
    patience: Duration,
    metrics: Arc<Metrics>,
}

/// A place in flight, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
}

/// Counts a waiter for as long as it waits.
struct Waiter<'a>(&'a Gate);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
        self.0.metrics.queue_depth.dec();
    }
}

impl Gate {
    /// A gate with `in_flight` places and `queue` waiting ones, each for at most `patience`.
    pub(crate) fn new(in_flight: u32, queue: u32, patience: Duration, metrics: Arc<Metrics>) -> Self {
        let places = Arc::new(Semaphore::new(in_flight as usize));
        Self { places, waiting: AtomicU32::new(0), queue, patience, metrics }
    }

    /// Refuses at once what [`Gate::enter`] would refuse, before the body is read.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        let full = self.places.available_permits() == 0 && self.waiting.load(Ordering::Acquire) >= self.queue;
        if full { Err(Refusal::Overloaded { retry_after_s: RETRY_AFTER_S }) } else { Ok(()) }
    }

    /// Takes a place, waiting in order of arrival if none is free and the queue has room.
    pub(crate) async fn enter(&self) -> Result<Place, Refusal> {
        if let Ok(permit) = Arc::clone(&self.places).try_acquire_owned() {
            return Ok(Place { _permit: permit });
        }
        let full = Refusal::Overloaded { retry_after_s: RETRY_AFTER_S };
        let before = self.waiting.fetch_add(1, Ordering::AcqRel);
        self.metrics.queue_depth.inc();
        let waiter = Waiter(self);
        if before >= self.queue {
            return Err(full);
        }
        let acquired = tokio::time::timeout(self.patience, Arc::clone(&self.places).acquire_owned()).await;
        drop(waiter);
        match acquired {
            Ok(Ok(permit)) => Ok(Place { _permit: permit }),
            Ok(Err(_)) | Err(_) => Err(full),
        }
    }
}

#[cfg(test)]
mod tests;
