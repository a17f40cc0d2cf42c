//! A bounded pool of staging slots in one piece of host memory.
//!
//! Device memory reaches the wire through here, and the wire reaches device memory. The memory is registered once;
//! a [`Slot`] is the right to use one part of it and goes back when dropped. Waiters are served in the order they came,
//! each gets all it asked for at once or nothing, so two of them can never hold what the other waits for.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::device::{Device, Pinned};
use crate::memory::{HostMemory, MemoryError};

#[cfg(test)]
mod tests;

/// Slots start at multiples of this: a cache line, so that two slots never share one.
const SLOT_ALIGN_BYTES: usize = 64;

/// Why no slots were given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SlabError {
    /// More than the slab has: no wait would help.
    #[error("{asked} staging slots were asked for, the slab has {slots}")]
    TooMany {
        /// Slots asked for.
        asked: usize,
        /// Slots there are.
        slots: usize,
    },
    /// Others kept them until the deadline.
    #[error("no {asked} of {slots} staging slots became free before the deadline")]
    Exhausted {
        /// Slots asked for.
        asked: usize,
        /// Slots there are.
        slots: usize,
    },
}

/// What a slot is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// For nothing.
    Free,
    /// A copy or a read fills it.
    Filling,
    /// A peer may read it.
    Published,
    /// Withdrawn, but a read that began before may still be going on.
    Quarantined,
}

/// Slots by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SlabCounts {
    /// See [`SlotState::Free`].
    pub free: usize,
    /// See [`SlotState::Filling`].
    pub filling: usize,
    /// See [`SlotState::Published`].
    pub published: usize,
    /// See [`SlotState::Quarantined`].
    pub quarantined: usize,
}

impl SlabCounts {
    /// All slots.
    pub fn total(&self) -> usize {
        self.free + self.filling + self.published + self.quarantined
    }
}

/// The books do not add up: a bug in this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{slots} staging slots, but {counts:?}, {listed} listed as free and {permits} to be had")]
pub struct SlabAuditError {
    /// Slots there are.
    pub slots: usize,
    /// Slots by state.
    pub counts: SlabCounts,
    /// Length of the list of free slots.
    pub listed: usize,
    /// Slots that can be acquired.
    pub permits: usize,
}

/// The pool; clones share it.
#[derive(Debug, Clone)]
pub struct Slab(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Dropped before the memory.
    pinned: OnceLock<Pinned>,
    memory: HostMemory,
    slot_bytes: usize,
    permits: Arc<Semaphore>,
    books: Mutex<Books>,
}

#[derive(Debug)]
struct Books {
    states: Vec<SlotState>,
    free: Vec<usize>,
}

impl Slab {
    /// A pool of `slots` slots of at least `slot_bytes` each.
    ///
    /// # Errors
    /// When the system refuses the memory, or no slots or bytes are asked for.
    pub fn new(slots: usize, slot_bytes: usize, label: &str) -> Result<Self, MemoryError> {
        let slot_bytes = slot_bytes.next_multiple_of(SLOT_ALIGN_BYTES);
        let slots = slots.min(Semaphore::MAX_PERMITS);
        let memory = HostMemory::allocate(slots.saturating_mul(slot_bytes), label)?;
        let books = Books { states: vec![SlotState::Free; slots], free: (0..slots).rev().collect() };
        let permits = Arc::new(Semaphore::new(slots));
        let pinned = OnceLock::new();
        Ok(Self(Arc::new(Shared { pinned, memory, slot_bytes, permits, books: Mutex::new(books) })))
    }

    /// Pins the memory for copies from and to `device`, where it knows how; copies are slower otherwise.
    pub fn pin(&self, device: &dyn Device) {
        match device.pin(&self.0.memory) {
            // A slab is pinned once, by who made it.
            Ok(pinned) => drop(self.0.pinned.set(pinned)),
            Err(why) => {
                let (slab, kind) = (self.0.memory.label(), device.kind());
                tracing::warn!(
                    why,
                    slab,
                    "copies from and to {kind} memory are slow: the slab is not pinned"
                );
            }
        }
    }

    /// The memory all slots are part of.
    pub fn memory(&self) -> &HostMemory {
        &self.0.memory
    }

    /// Slots there are.
    pub fn slots(&self) -> usize {
        self.0.books().states.len()
    }

    /// Bytes of each.
    pub fn slot_bytes(&self) -> usize {
        self.0.slot_bytes
    }

    /// Waits for `count` slots, all at once, in the order of asking.
    ///
    /// # Errors
    /// [`SlabError`]: more than there are, or none in time.
    pub async fn acquire(&self, count: usize, deadline: Instant) -> Result<Vec<Slot>, SlabError> {
        let slots = self.slots();
        let asked = u32::try_from(count).ok().filter(|_| count <= slots);
        let asked = asked.ok_or(SlabError::TooMany { asked: count, slots })?;
        let permit = permits(&self.0.permits, asked, deadline).await;
        permit.map(|permit| self.take(permit)).ok_or(SlabError::Exhausted { asked: count, slots })
    }

    /// A slot, if one is free and nobody waits for it.
    pub fn try_acquire(&self) -> Option<Slot> {
        let permit = self.0.permits.clone().try_acquire_owned().ok()?;
        self.take(permit).pop()
    }

    /// A share of the slots, one part in `parts`, for a user who must not keep all of them.
    pub(crate) fn share(&self, parts: usize) -> Share {
        let slots = self.slots().div_ceil(parts);
        Share { slab: self.clone(), slots, permits: Arc::new(Semaphore::new(slots)) }
    }

    fn take(&self, mut permit: OwnedSemaphorePermit) -> Vec<Slot> {
        let mut books = self.0.books();
        let mut taken = Vec::with_capacity(permit.num_permits());
        while let Some(permit) = permit.split(1) {
            // A permit is given back only after its slot was listed, so there is a slot for every permit.
            let Some(index) = books.free.pop() else { break };
            books.states[index] = SlotState::Filling;
            taken.push(Slot { shared: Arc::clone(&self.0), index, _permit: permit, _share: None });
        }
        taken
    }

    /// Slots by state.
    pub fn counts(&self) -> SlabCounts {
        count(&self.0.books().states)
    }

    /// Checks that every slot is accounted for. Only meaningful to the permit while nobody acquires or drops.
    ///
    /// # Errors
    /// When a slot is lost or counted twice.
    pub fn audit(&self) -> Result<SlabCounts, SlabAuditError> {
        let books = self.0.books();
        let (slots, counts, listed) = (books.states.len(), count(&books.states), books.free.len());
        let permits = self.0.permits.available_permits();
        // Permits lag behind the list while an acquire or a drop is between the two, never the other way round.
        if counts.total() == slots && counts.free == listed && permits <= listed {
            Ok(counts)
        } else {
            Err(SlabAuditError { slots, counts, listed, permits })
        }
    }
}

/// How many slots one user has at most; clones have them together.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    slab: Slab,
    slots: usize,
    permits: Arc<Semaphore>,
}

impl Share {
    /// The memory all slots are part of.
    pub(crate) fn memory(&self) -> &HostMemory {
        self.slab.memory()
    }

    /// As [`Slab::acquire`], of slots that are within the share.
    pub(crate) async fn acquire(&self, count: usize, deadline: Instant) -> Result<Vec<Slot>, SlabError> {
        let slots = self.slots;
        let asked = u32::try_from(count).ok().filter(|_| count <= slots);
        let asked = asked.ok_or(SlabError::TooMany { asked: count, slots })?;
        let share = permits(&self.permits, asked, deadline).await;
        let share = share.ok_or(SlabError::Exhausted { asked: count, slots })?;
        Ok(Self::keep(share, self.slab.acquire(count, deadline).await?))
    }

    /// As [`Slab::try_acquire`].
    pub(crate) fn try_acquire(&self) -> Option<Slot> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        Self::keep(permit, vec![self.slab.try_acquire()?]).pop()
    }

    /// Gives each slot its part of the share.
    fn keep(mut permits: OwnedSemaphorePermit, mut slots: Vec<Slot>) -> Vec<Slot> {
        slots.iter_mut().for_each(|slot| slot._share = permits.split(1));
        slots
    }
}

/// Waits for so many permits, all at once, in the order of asking.
async fn permits(of: &Arc<Semaphore>, count: u32, deadline: Instant) -> Option<OwnedSemaphorePermit> {
    if let Ok(permits) = Arc::clone(of).try_acquire_many_owned(count) {
        return Some(permits);
    }
    let permits = Arc::clone(of).acquire_many_owned(count);
    // The semaphore is never closed; a closed one would give none before the deadline either.
    tokio::time::timeout_at(deadline, permits).await.ok()?.ok()
}

impl Shared {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count(states: &[SlotState]) -> SlabCounts {
    let mut counts = SlabCounts::default();
    for state in states {
        *match state {
            SlotState::Free => &mut counts.free,
            SlotState::Filling => &mut counts.filling,
            SlotState::Published => &mut counts.published,
            SlotState::Quarantined => &mut counts.quarantined,
        } += 1;
    }
    counts
}

/// The right to use one part of the slab's memory; dropping it gives the part to the next waiter.
#[derive(Debug)]
pub struct Slot {
    shared: Arc<Shared>,
    index: usize,
    /// Dropped after the slot is listed as free again.
    _permit: OwnedSemaphorePermit,
    _share: Option<OwnedSemaphorePermit>,
}

impl Slot {
    /// The memory it is part of.
    pub fn memory(&self) -> &HostMemory {
        &self.shared.memory
    }

    /// Where it starts in that memory, in bytes.
    pub fn offset(&self) -> usize {
        self.index * self.shared.slot_bytes
    }

    /// Notes what it is used for.
    pub fn set_state(&self, state: SlotState) {
        self.shared.books().states[self.index] = state;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut books = self.shared.books();
        books.states[self.index] = SlotState::Free;
        books.free.push(self.index);
    }
}
