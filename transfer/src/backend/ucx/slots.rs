//! Operations under way: each has a slot whose address UCX holds until its last callback.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use baton_ucx_sys::{UCS_OK, ucp_dt_iov_t, ucp_ep_h, ucs_status_t};

use super::PIECES_MAX;
use super::core::Core;

/// Operations of this side, at most.
pub(super) const OPS_MAX: usize = 4096;
/// All slots, answers to peers included.
const SLOTS_MAX: usize = 65_536;
/// Answers to all peers, at most: operations of this side find a slot whatever peers do.
const ANSWERS_MAX: usize = SLOTS_MAX - 2 * OPS_MAX;
/// Answers to one peer: one that takes none keeps no others from theirs.
const ANSWERS_OF_PEER_MAX: usize = ANSWERS_MAX / 4;
/// Words of the longest message header.
pub(super) const HEADER_WORDS: usize = 7;
/// Words that name a piece.
pub(super) const PIECE_WORDS: usize = 5;
/// A bit for each fits into what a job keeps.
const _: () = assert!(PIECES_MAX <= u8::BITS as usize);

/// Memory of this side that the bytes of an answer go to.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    pub(super) address: usize,
    pub(super) len: usize,
}

/// What a slot is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Read,
    Write,
    Send,
    Receive,
    /// An answer to a peer.
    Serve,
    Flush,
    Close,
}

/// An operation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    pub(super) work: Work,
    /// The caller's name of it.
    pub(super) op: u64,
    pub(super) peer: Option<u32>,
    /// The local registration in use.
    pub(super) region: Option<u32>,
    pub(super) remote: Option<u32>,
    /// Where its bytes are, or go.
    pub(super) address: usize,
    pub(super) len: usize,
    /// Of an answer: the endpoint UCX gave for it, which lives until the answer was sent or failed.
    pub(super) reply: ucp_ep_h,
    /// Makes an answer to it unguessable.
    pub(super) nonce: u64,
    /// The pieces whose answers are awaited: a bit for each.
    pub(super) unanswered: u8,
    /// Callbacks and answers still to come.
    pub(super) parts: u8,
    /// The first error.
    pub(super) status: ucs_status_t,
    /// Bytes moved.
    pub(super) moved: usize,
}

impl Job {
    pub(super) fn new(work: Work, op: u64, peer: Option<u32>) -> Self {
        Self {
            work,
            op,
            peer,
            region: None,
            remote: None,
            address: 0,
            len: 0,
            reply: std::ptr::null_mut(),
            nonce: 0,
            unanswered: 0,
            parts: 1,
            status: UCS_OK,
            moved: 0,
        }
    }
}

/// What callbacks get to see.
pub(super) struct Slot {
    pub(super) core: *const Core,
    pub(super) index: u32,
    /// The header of the message, which UCX reads until it was sent.
    pub(super) header: Cell<[u64; HEADER_WORDS]>,
    /// What a read asks for, which UCX reads like the header, and where each piece goes.
    pub(super) wanted: Cell<[[u64; PIECE_WORDS]; PIECES_MAX]>,
    pub(super) places: Cell<[Place; PIECES_MAX]>,
    /// What an answer to several pieces, or a write of them, is made of, which UCX reads until it was sent.
    pub(super) parts: Cell<[ucp_dt_iov_t; 1 + PIECES_MAX]>,
    pub(super) job: Cell<Option<Job>>,
    /// The endpoint that an answer was begun for.
    asker: Cell<usize>,
}

/// All slots. They are reused, never freed or moved while the driver lives.
#[derive(Default)]
pub(super) struct Slots {
    #[expect(clippy::vec_box, reason = "UCX holds the addresses of slots")]
    all: RefCell<Vec<Box<Slot>>>,
    free: RefCell<Vec<u32>>,
    own: Cell<usize>,
    answers: Cell<usize>,
    /// Answers under way, by the endpoint that they were begun for.
    of_asker: RefCell<HashMap<usize, usize>>,
}

impl Slots {
    /// Puts a job into a slot; none: there are too many.
    pub(super) fn start(&self, core: *const Core, job: Job) -> Option<*const Slot> {
        let own = job.work != Work::Serve;
        // Closing and flushing must always be possible.
        let bounded = !matches!(job.work, Work::Close | Work::Flush);
        if own && bounded && self.own.get() >= OPS_MAX {
            return None;
        }
        let asker = job.reply.addr();
        if !own && !self.may_answer(asker) {
            return None;
        }
        let mut all = self.all.borrow_mut();
        let index = match self.free.borrow_mut().pop() {
            Some(index) => index,
            None if all.len() >= SLOTS_MAX && bounded => return None,
            None => {
                let index = all.len() as u32;
                all.push(Box::new(Slot {
                    core,
                    index,
                    header: Cell::new([0; HEADER_WORDS]),
                    wanted: Cell::new([[0; PIECE_WORDS]; PIECES_MAX]),
                    places: Cell::default(),
                    parts: Cell::new(
                        [ucp_dt_iov_t { buffer: std::ptr::null_mut(), length: 0 }; 1 + PIECES_MAX],
                    ),
                    job: Cell::new(None),
                    asker: Cell::new(0),
                }));
                index
            }
        };
        let slot = &all[index as usize];
        if own {
            self.own.set(self.own.get() + 1);
        } else {
            slot.asker.set(asker);
            self.answers.set(self.answers.get() + 1);
            *self.of_asker.borrow_mut().entry(asker).or_default() += 1;
        }
        slot.job.set(Some(job));
        Some(&raw const **slot)
    }

    /// Whether there is room for one more answer.
    fn may_answer(&self, asker: usize) -> bool {
        let of_asker = self.of_asker.borrow().get(&asker).copied().unwrap_or(0);
        self.answers.get() < ANSWERS_MAX && of_asker < ANSWERS_OF_PEER_MAX
    }

    /// Where a slot is.
    pub(super) fn address(&self, index: u32) -> Option<*const Slot> {
        self.all.borrow().get(index as usize).map(|slot| &raw const **slot)
    }

    /// The job of a slot.
    pub(super) fn job(&self, index: u32) -> Option<Job> {
        self.all.borrow().get(index as usize)?.job.get()
    }

    /// Changes the job of a slot.
    pub(super) fn set(&self, index: u32, job: Job) {
        if let Some(slot) = self.all.borrow().get(index as usize) {
            slot.job.set(Some(job));
        }
    }

    /// Frees a slot.
    pub(super) fn finish(&self, index: u32) -> Option<Job> {
        let all = self.all.borrow();
        let slot = all.get(index as usize)?;
        let job = slot.job.take()?;
        if job.work == Work::Serve {
            self.answers.set(self.answers.get() - 1);
            if let Entry::Occupied(mut of_asker) = self.of_asker.borrow_mut().entry(slot.asker.get()) {
                *of_asker.get_mut() -= 1;
                if *of_asker.get() == 0 {
                    of_asker.remove();
                }
            }
        } else {
            self.own.set(self.own.get() - 1);
        }
        self.free.borrow_mut().push(index);
        Some(job)
    }

    /// The slots in use.
    pub(super) fn busy(&self) -> Vec<(u32, Job)> {
        self.all.borrow().iter().filter_map(|slot| Some((slot.index, slot.job.get()?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ep: usize) -> Job {
        Job { reply: std::ptr::without_provenance_mut(ep), ..Job::new(Work::Serve, 0, None) }
    }

    /// Slots that are only counted here: nothing looks at the core.
    fn start(slots: &Slots, job: Job) -> Option<u32> {
        let slot = slots.start(std::ptr::null(), job)?;
        // SAFETY: just started, and slots stay where they are as long as all of them.
        Some(unsafe { &*slot }.index)
    }

    #[test]
    fn who_takes_no_answers_keeps_nobody_else_from_theirs() {
        let slots = Slots::default();
        let mut greedy: Vec<u32> =
            std::iter::from_fn(|| start(&slots, answer(1))).take(2 * SLOTS_MAX).collect();
        let other = start(&slots, answer(2)).expect("another peer is answered");
        slots.finish(other);
        // However many of that kind there are, this side's own operations go on.
        for ep in 3..50 {
            while start(&slots, answer(ep)).is_some() {}
        }
        let own: Vec<u32> = (0..OPS_MAX as u64)
            .map(|op| start(&slots, Job::new(Work::Read, op, Some(1))).expect("there is room for all"))
            .collect();
        assert_eq!(start(&slots, Job::new(Work::Read, 0, Some(1))), None, "they are bounded");
        own.into_iter().for_each(|slot| assert!(slots.finish(slot).is_some()));
        // Also of an endpoint that was closed meanwhile, so that answers do not know it any more.
        let slot = greedy.pop().unwrap();
        slots.set(slot, Job { reply: std::ptr::null_mut(), ..answer(1) });
        slots.finish(slot);
        assert!(start(&slots, answer(1)).is_some(), "one less is under way");
        assert_eq!(start(&slots, answer(1)), None);
    }
}
