//! Memory registered with a library: once, for as long as somebody has the memory, within bounds.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::TryStreamExt;
use futures_util::stream::FuturesOrdered;

use super::driver::{Access, DriverError, LocalId};
use super::thread::{Fabric, Keep, Queue};
use crate::memory::{MemorySpan, Place};

/// A registration; it ends when nobody holds it.
pub(crate) struct Registration {
    pub(crate) id: LocalId,
    /// What a peer needs to use it.
    pub(crate) key: Vec<u8>,
    span: MemorySpan,
    queue: Arc<Queue>,
    /// The registry's count of uses when it was used last.
    used: AtomicU64,
    /// Counts it if it is not kept.
    apart: Option<Counted>,
    /// What waits for its end.
    keep: Keep,
}

/// Registrations that are not kept for another use.
#[derive(Default)]
struct Apart {
    count: AtomicUsize,
    bytes: AtomicU64,
}

/// What is counted of a registration that is not kept, as long as this lives.
struct Counted {
    apart: Arc<Apart>,
    bytes: u64,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.apart.count.fetch_sub(1, Ordering::Relaxed);
        self.apart.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Registration {
    /// What a driver has just made.
    pub(super) fn new((id, key): (LocalId, Vec<u8>), span: MemorySpan, queue: Arc<Queue>) -> Self {
        Self { id, key, span, queue, used: AtomicU64::new(0), apart: None, keep: None }
    }

    /// Ends it; `keep` is dropped when nobody reaches the memory through it any more.
    pub(super) fn end(mut self, keep: Box<dyn Any + Send + Sync>) {
        self.keep = Some(keep);
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.span.len()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.queue.deregister(self.id, self.keep.take());
    }
}

/// The registrations of one fabric that may be used again.
///
/// Memory is the same when place, address and length are: while it is registered it stays where it is.
#[derive(Default)]
pub(super) struct Registry {
    known: Mutex<Known>,
    /// Held while something is registered, so that nothing is registered twice.
    registering: tokio::sync::Mutex<()>,
    apart: Arc<Apart>,
}

type Identity = (Place, usize, usize, Access);

#[derive(Default)]
struct Known {
    kept: HashMap<Identity, Arc<Registration>>,
    uses: u64,
}

impl Known {
    fn find(&mut self, identity: &Identity) -> Option<Arc<Registration>> {
        let found = self.kept.get(identity)?;
        self.uses += 1;
        found.used.store(self.uses, Ordering::Relaxed);
        Some(Arc::clone(found))
    }

    fn bytes(&self) -> u64 {
        self.kept.values().map(|kept| kept.len() as u64).sum()
    }

    /// Lets go of memory that nobody else has.
    fn drop_orphans(&mut self) {
        self.kept.retain(|_, kept| !kept.span.is_orphan() || Arc::strong_count(kept) > 1);
    }

    /// Lets go of what was used longest ago and is not used now.
    fn drop_oldest(&mut self) -> bool {
        let idle = self.kept.iter().filter(|(_, kept)| Arc::strong_count(kept) == 1);
        let oldest = idle.min_by_key(|(_, kept)| kept.used.load(Ordering::Relaxed));
        let oldest = oldest.map(|(identity, _)| *identity);
        oldest.is_some_and(|identity| self.kept.remove(&identity).is_some())
    }
}

impl Registry {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fabric {
    /// The registration of `span`, made if there is none.
    ///
    /// # Errors
    /// The driver's, or the name of the bound that it would exceed.
    pub(crate) async fn registered(
        &self,
        span: &MemorySpan,
        access: Access,
    ) -> Result<Arc<Registration>, DriverError> {
        let identity = (span.place(), span.address(), span.len(), access);
        if let Some(found) = self.registry().known().find(&identity) {
            return Ok(found);
        }
        let _registering = self.registry().registering.lock().await;
        if let Some(found) = self.registry().known().find(&identity) {
            return Ok(found);
        }
        self.make_room(span.len())?;
        let made = Arc::new(self.register_now(span, access).await?);
        let mut known = self.registry().known();
        known.kept.insert(identity, Arc::clone(&made));
        known.find(&identity);
        Ok(made)
    }

    /// Registrations of `spans` for one use, each with a key of its own.
    ///
    /// # Errors
    /// As [`Fabric::registered`].
    pub(crate) async fn registered_once(
        &self,
        spans: &[MemorySpan],
        access: Access,
    ) -> Result<Vec<Registration>, DriverError> {
        let _registering = self.registry().registering.lock().await;
        let apart = &self.registry().apart;
        let mut all = FuturesOrdered::new();
        for span in spans {
            self.make_room(span.len())?;
            apart.count.fetch_add(1, Ordering::Relaxed);
            apart.bytes.fetch_add(span.len() as u64, Ordering::Relaxed);
            let counted = Counted { apart: Arc::clone(apart), bytes: span.len() as u64 };
            all.push_back(async move {
                let mut made = self.register_now(span, access).await?;
                made.apart = Some(counted);
                Ok(made)
            });
        }
        all.try_collect().await
    }

    async fn register_now(&self, span: &MemorySpan, access: Access) -> Result<Registration, DriverError> {
        self.register(span.lent(), access).await
    }

    /// Makes sure that `len` bytes more are within the bounds.
    fn make_room(&self, len: usize) -> Result<(), DriverError> {
        let limits = self.limits();
        let mut known = self.registry().known();
        known.drop_orphans();
        let apart = &self.registry().apart;
        loop {
            let count = known.kept.len() + apart.count.load(Ordering::Relaxed);
            let bytes = known.bytes() + apart.bytes.load(Ordering::Relaxed);
            let bytes = bytes.saturating_add(len as u64);
            let fault = if bytes > limits.registered_bytes {
                let what = format!(
                    "registering {len} bytes with {} would make {bytes}, the limit is {}",
                    self.kind(),
                    limits.registered_bytes
                );
                DriverError { what, remedy: "raise transfer.limits.registered".into() }
            } else if count >= limits.regions {
                let what = format!("{count} regions are registered with {} already", self.kind());
                DriverError { what, remedy: "raise transfer.limits.regions".into() }
            } else {
                return Ok(());
            };
            if !known.drop_oldest() {
                return Err(fault);
            }
        }
    }
}
