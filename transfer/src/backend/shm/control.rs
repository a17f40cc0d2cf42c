//! The control memory of an agent: its epoch and its live grants, for readers who share no lock with it.
//!
//! Layout, in 64-bit words: 0 the epoch (0: none), 8 and 9 the incarnation, then from 16 on [`SLOTS`] grant words. A
//! grant word is a hash of the handoff id (never 0) and lies within [`PROBES`] words of the place that another hash of it
//! points to: ids need not be random to be told apart. Only the agent writes; a reader that finds its word before and after a copy knows that the grant, and
//! so the memory under it, stood in between.

use std::sync::{Mutex, PoisonError};

use baton_config::{Epoch, HandoffId};

use crate::memory::{HostMemory, MemoryError, PeerMemory};

const SLOTS: usize = 16 << 10;
const PROBES: usize = 64;
const EPOCH_WORD: usize = 0;
const INCARNATION_WORD: usize = 8;
const FIRST_SLOT_WORD: usize = 16;
const WORD_BYTES: usize = 8;
const CONTROL_BYTES: usize = (FIRST_SLOT_WORD + SLOTS) * WORD_BYTES;

/// Offset of the incarnation, in bytes: what stands there tells that an address is the control memory of that process.
pub(super) const INCARNATION_AT: usize = INCARNATION_WORD * WORD_BYTES;

/// The owner's side.
pub(crate) struct Control {
    memory: HostMemory,
    /// Serializes writers; readers need no lock.
    writing: Mutex<()>,
}

impl Control {
    pub(crate) fn new(incarnation: u128) -> Result<Self, MemoryError> {
        let memory = HostMemory::allocate(CONTROL_BYTES, "control")?;
        memory.write(INCARNATION_AT, &incarnation.to_le_bytes());
        Ok(Self { memory, writing: Mutex::new(()) })
    }

    pub(crate) fn memory(&self) -> &HostMemory {
        &self.memory
    }

    pub(crate) fn set_epoch(&self, epoch: Epoch) {
        self.memory.store_word(EPOCH_WORD, epoch.0);
    }

    pub(crate) fn grant(&self, handoff: HandoffId) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = None;
        for offset in slots(handoff) {
            match self.memory.load_word(offset) {
                word if word == token(handoff) => return,
                0 => free = free.or(Some(offset)),
                _ => {}
            }
        }
        match free {
            Some(offset) => self.memory.store_word(offset, token(handoff)),
            // Readers over shm are refused and go another way; thousands of live handoffs must collide for this.
            None => tracing::warn!(%handoff, "no room to show a grant in shared memory"),
        }
    }

    pub(crate) fn revoke(&self, handoff: HandoffId) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        for offset in slots(handoff) {
            if self.memory.load_word(offset) == token(handoff) {
                self.memory.store_word(offset, 0);
            }
        }
    }
}

/// The readers' side.
pub(crate) struct PeerControl(PeerMemory);

impl PeerControl {
    pub(crate) fn new(memory: PeerMemory) -> Option<Self> {
        memory.fits(0, CONTROL_BYTES).then_some(Self(memory))
    }

    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.0.load_word(EPOCH_WORD * WORD_BYTES))
    }

    /// Where the grant of `handoff` shows now.
    pub(crate) fn find(&self, handoff: HandoffId) -> Option<Shown> {
        let token = token(handoff);
        slots(handoff).find(|offset| self.0.load_word(*offset) == token).map(|offset| Shown { offset, token })
    }

    /// Whether a grant still shows where it was found.
    pub(crate) fn is_shown(&self, shown: &Shown) -> bool {
        self.0.load_word(shown.offset) == shown.token
    }
}

/// A grant found in a peer's control memory.
pub(crate) struct Shown {
    offset: usize,
    token: u64,
}

fn token(handoff: HandoffId) -> u64 {
    xxh3(0, handoff).max(1)
}

fn start(handoff: HandoffId) -> usize {
    xxh3(1, handoff) as usize % SLOTS
}

/// `XXH3_64bits_withSeed` of the little-endian bytes of an id. Every read asks twice, and the crate that hashes everything
/// else takes several times as long for so few bytes.
///
/// Source: the branch for 9 to 16 bytes of <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>.
fn xxh3(seed: u64, HandoffId(id): HandoffId) -> u64 {
    const SECRETS: [u64; 2] = [0x6782_737B_EA42_39B9, 0xAF56_BC3B_0996_523A];
    const BYTES: u64 = 16;
    let low = id as u64 ^ SECRETS[0].wrapping_add(seed);
    let high = (id >> 64) as u64 ^ SECRETS[1].wrapping_sub(seed);
    let product = u128::from(low) * u128::from(high);
    let folded = product as u64 ^ (product >> 64) as u64;
    let sum = BYTES.wrapping_add(low.swap_bytes()).wrapping_add(high).wrapping_add(folded);
    let sum = (sum ^ sum >> 37).wrapping_mul(0x1656_6791_9E37_79F9);
    sum ^ sum >> 32
}

fn slots(handoff: HandoffId) -> impl Iterator<Item = usize> {
    let start = start(handoff);
    (0..PROBES).map(move |probe| (FIRST_SLOT_WORD + (start + probe) % SLOTS) * WORD_BYTES)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use twox_hash::XxHash3_64;

    use super::*;

    proptest! {
        #[test]
        fn hashes_are_those_of_the_crate(seed: u64, id: u128) {
            prop_assert_eq!(xxh3(seed, HandoffId(id)), XxHash3_64::oneshot_with_seed(seed, &id.to_le_bytes()));
        }
    }

    fn pair() -> (Control, PeerControl) {
        let control = Control::new(7).unwrap();
        let file = control.memory().file().unwrap().try_clone_to_owned().unwrap();
        let peer = PeerMemory::map(file, CONTROL_BYTES, "peer").unwrap();
        (control, PeerControl::new(peer).unwrap())
    }

    #[test]
    fn a_reader_sees_the_epoch_and_grants_come_and_go() {
        let (control, peer) = pair();
        let id = HandoffId(0xabc << 64 | 0x123);
        control.set_epoch(Epoch(7));
        assert_eq!(peer.epoch(), Epoch(7));
        assert!(peer.find(id).is_none());
        control.grant(id);
        control.grant(id);
        let shown = peer.find(id).unwrap();
        assert!(peer.is_shown(&shown));
        control.revoke(id);
        assert!(!peer.is_shown(&shown) && peer.find(id).is_none());
    }

    #[test]
    fn a_control_memory_that_is_too_short_is_none() {
        let memory = HostMemory::allocate(CONTROL_BYTES / 2, "short").unwrap();
        let file = memory.file().unwrap().try_clone_to_owned().unwrap();
        assert!(PeerControl::new(PeerMemory::map(file, memory.len(), "peer").unwrap()).is_none());
    }

    /// Handoffs that differ in one bit, and small numbers, are as good as random ones.
    #[test]
    fn handoffs_that_look_alike_are_told_apart() {
        let (control, peer) = pair();
        let all: Vec<HandoffId> =
            (0..1000).map(HandoffId).chain((0..128).map(|bit| HandoffId(7 << 100 ^ 1 << bit))).collect();
        for id in &all {
            assert!(peer.find(*id).is_none(), "{id} shows before it is granted");
            control.grant(*id);
            assert!(peer.find(*id).is_some(), "{id} does not show");
        }
        for id in all.iter().step_by(2) {
            control.revoke(*id);
        }
        for (at, id) in all.iter().enumerate() {
            assert_eq!(peer.find(*id).is_some(), at % 2 == 1, "{id}");
        }
    }

    /// Many handoffs that start at one slot, and others next to them, never hide or end each other.
    #[test]
    fn colliding_grants_do_not_disturb_each_other() {
        let (control, peer) = pair();
        let near_the_end = |id: &HandoffId| start(*id) == SLOTS - 3;
        let ids: Vec<HandoffId> = (0..).map(HandoffId).filter(near_the_end).take(PROBES + 1).collect();
        let (last, ids) = ids.split_last().unwrap();
        ids.iter().for_each(|id| control.grant(*id));
        assert!(ids.iter().all(|id| peer.find(*id).is_some()));
        control.grant(*last);
        assert!(peer.find(*last).is_none(), "a full neighbourhood shows nothing more");
        control.revoke(ids[5]);
        assert!(ids.iter().all(|id| peer.find(*id).is_some() == (*id != ids[5])));
        control.grant(*last);
        assert!(peer.find(*last).is_some());
    }
}
