//! What is posted to one peer next: bounded, in turns, in pieces that no operation exceeds. No driver, no clock.

use std::collections::VecDeque;

/// A list of transfers, known to the window by their lengths.
pub(super) trait Work {
    /// How many there are.
    fn transfers(&self) -> usize;
    /// Bytes of one; never 0.
    fn bytes(&self, transfer: usize) -> usize;
    /// Whether one may become several operations. A message may not.
    fn splits(&self) -> bool;
    /// Whether they go to the peer.
    fn writes(&self) -> bool;
    /// Whether one may share an operation with the one before it.
    fn joins(&self, transfer: usize) -> bool;
}

/// Bounds of what one peer has posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Operations at once, at least 1.
    pub(super) ops: usize,
    /// Bytes at once; a single operation always fits.
    pub(super) bytes: usize,
    /// Bytes of one operation, where it can be split.
    pub(super) op_bytes: usize,
    /// Transfers that one operation may be of, at least 1.
    pub(super) read_pieces: usize,
    /// See `read_pieces`.
    pub(super) write_pieces: usize,
    /// Bytes of a write of several transfers.
    pub(super) write_bytes: usize,
}

/// One operation to post: a part of a transfer, or several whole ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) transfer: usize,
    /// Transfers, from `transfer` on; whole ones, if more than one.
    pub(super) count: usize,
    pub(super) offset: usize,
    /// Bytes of all of them.
    pub(super) len: usize,
}

/// Posted operations of one peer and the work that waits to be posted.
///
/// Every list gets one operation a turn: a read of a thousand blocks does not hold up one of a single block.
#[derive(Debug)]
pub(super) struct Window<W> {
    bounds: Bounds,
    ops: usize,
    bytes: usize,
    waiting: VecDeque<Waiting<W>>,
}

#[derive(Debug)]
struct Waiting<W> {
    work: W,
    transfer: usize,
    offset: usize,
}

impl<W: Work> Window<W> {
    pub(super) fn new(bounds: Bounds) -> Self {
        debug_assert!(
            bounds.ops > 0 && bounds.bytes > 0 && bounds.op_bytes > 0,
            "{bounds:?} let nothing through"
        );
        Self { bounds, ops: 0, bytes: 0, waiting: VecDeque::new() }
    }

    /// Queues all transfers of `work`.
    pub(super) fn submit(&mut self, work: W) {
        if work.transfers() > 0 {
            self.waiting.push_back(Waiting { work, transfer: 0, offset: 0 });
        }
    }

    /// The operation whose turn it is, if the bounds let it through. Asking changes nothing.
    pub(super) fn next(&self) -> Option<(&W, Part)> {
        let Waiting { work, transfer, offset } = self.waiting.front()?;
        let left = work.bytes(*transfer) - offset;
        let len = if work.splits() { left.min(self.bounds.op_bytes).min(self.bounds.bytes) } else { left };
        let fits = self.ops == 0 || (self.ops < self.bounds.ops && self.bytes + len <= self.bounds.bytes);
        let mut part = Part { transfer: *transfer, count: 1, offset: *offset, len };
        if work.splits() && *offset == 0 && len == left {
            let mut room = self.bounds.op_bytes.min(self.bounds.bytes.saturating_sub(self.bytes));
            let most = if work.writes() { self.bounds.write_pieces } else { self.bounds.read_pieces };
            if work.writes() {
                room = room.min(self.bounds.write_bytes);
            }
            while part.count < most {
                let next = transfer + part.count;
                if next == work.transfers() || !work.joins(next) || part.len + work.bytes(next) > room {
                    break;
                }
                part.len += work.bytes(next);
                part.count += 1;
            }
        }
        fits.then_some((work, part))
    }

    /// Notes that what [`Window::next`] said was posted: the next turn is another's.
    pub(super) fn posted(&mut self) {
        let Some((_, part)) = self.next() else { return };
        let Some(mut front) = self.waiting.pop_front() else { return };
        self.ops += 1;
        self.bytes += part.len;
        if part.count > 1 {
            front.transfer += part.count;
        } else {
            front.offset += part.len;
            if front.offset == front.work.bytes(front.transfer) {
                front.transfer += 1;
                front.offset = 0;
            }
        }
        if front.transfer < front.work.transfers() {
            self.waiting.push_back(front);
        }
    }

    /// Notes the end of a posted operation of `len` bytes.
    pub(super) fn ended(&mut self, len: usize) {
        debug_assert!(self.ops > 0 && self.bytes >= len, "an operation ended that was not posted");
        self.ops = self.ops.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(len);
    }

    /// Takes back what waits of every work that `which` picks: none of it is posted any more.
    pub(super) fn withdraw(&mut self, which: impl Fn(&W) -> bool) {
        self.waiting.retain(|waiting| !which(&waiting.work));
    }

    /// Whether something waits, let through or not.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests;
