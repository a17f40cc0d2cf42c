//! Operations under way: each has a slot whose address UCX holds until its last callback.

use std::cell::{Cell, RefCell};

use baton_ucx_sys::{UCS_OK, ucp_dt_iov_t, ucp_ep_h, ucs_status_t};

use super::PIECES_MAX;
use super::core::Core;

/// Operations of this side, at most.
pub(super) const OPS_MAX: usize = 4096;
/// All slots, answers to peers included.
const SLOTS_MAX: usize = 65_536;
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
}

/// All slots. They are reused, never freed or moved while the driver lives.
#[derive(Default)]
pub(super) struct Slots {
    #[expect(clippy::vec_box, reason = "UCX holds the addresses of slots")]
    all: RefCell<Vec<Box<Slot>>>,
    free: RefCell<Vec<u32>>,
    own: Cell<usize>,
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
                }));
                index
            }
        };
        self.own.set(self.own.get() + usize::from(own));
        let slot = &all[index as usize];
        slot.job.set(Some(job));
        Some(&raw const **slot)
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
        let job = self.all.borrow().get(index as usize)?.job.take()?;
        self.own.set(self.own.get() - usize::from(job.work != Work::Serve));
        self.free.borrow_mut().push(index);
        Some(job)
    }

    /// The slots in use.
    pub(super) fn busy(&self) -> Vec<(u32, Job)> {
        self.all.borrow().iter().filter_map(|slot| Some((slot.index, slot.job.get()?))).collect()
    }
}
