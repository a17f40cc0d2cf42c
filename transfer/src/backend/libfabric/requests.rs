//! Requests: messages under one tag that all peers know, for which some receives are always posted.
//!
//! Where more come than there are receives, the library keeps them, or lets their senders wait, until the next poll
//! posts receives again. Only so many wait to be taken; more are thrown away. What is in a request was written by anybody who reaches our address: it is only passed on.

use std::collections::VecDeque;

use super::work::{Kind, LibfabricDriver};
use crate::backend::fabric::driver::{Access, Driver, LocalId, LocalRange, REQUEST_MAX_BYTES};
use crate::memory::HostMemory;

/// The tag of requests. Others are random, so that none is ever the same.
pub(super) const REQUEST_TAG: u64 = 0x6261_746f_6e2d_6171;
/// Receives that are posted.
const BUFFERS: u32 = 32;
/// Most requests that wait to be taken. They are, with every turn: only who sends without waiting for answers loses some.
pub(super) const REQUESTS_MAX: usize = 4096;

/// What requests land in, and those that came.
#[derive(Default)]
pub(super) struct Requests {
    buffers: Option<(LocalId, HostMemory)>,
    /// Buffers without a receive.
    unposted: Vec<u32>,
    came: VecDeque<Vec<u8>>,
}

impl Requests {
    pub(super) fn take(&mut self) -> Option<Vec<u8>> {
        self.came.pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.came.is_empty()
    }

    /// Receives that are posted now.
    #[cfg(test)]
    pub(super) fn posted(&self) -> usize {
        self.buffers.as_ref().map_or(0, |_| BUFFERS as usize - self.unposted.len())
    }
}

impl LibfabricDriver {
    /// Begins to take requests; where that cannot be, there are none.
    pub(super) fn await_requests(&mut self) {
        let memory = HostMemory::allocate(BUFFERS as usize * REQUEST_MAX_BYTES, "fabric requests");
        let buffers = memory.ok().and_then(|memory| {
            let (id, _) = self.register(&memory.span(), Access::Local).ok()?;
            Some((id, memory))
        });
        self.info.requests = buffers.is_some();
        self.requests = Requests { buffers, unposted: (0..BUFFERS).collect(), came: VecDeque::new() };
        self.post_requests();
    }

    /// Posts the receives that are missing, as far as the library takes them.
    pub(super) fn post_requests(&mut self) {
        let Some((id, _)) = self.requests.buffers else { return };
        while let Some(buffer) = self.requests.unposted.pop() {
            let offset = buffer as usize * REQUEST_MAX_BYTES;
            let to = LocalRange { id, offset, len: REQUEST_MAX_BYTES };
            if self.post_receive(REQUEST_TAG, to, 0, Kind::Request { buffer }).is_err() {
                self.requests.unposted.push(buffer);
                return;
            }
        }
    }

    /// A receive has ended: with a request, or with an error that is its sender's.
    pub(super) fn end_request(&mut self, buffer: u32, received: Option<usize>) {
        self.requests.unposted.push(buffer);
        if self.requests.came.len() >= REQUESTS_MAX {
            return tracing::debug!(library = "libfabric", "a request is not taken: too many wait");
        }
        if let (Some((_, memory)), Some(len)) = (&self.requests.buffers, received) {
            let mut request = vec![0; len.min(REQUEST_MAX_BYTES)];
            memory.read(buffer as usize * REQUEST_MAX_BYTES, &mut request);
            self.requests.came.push_back(request);
        }
    }
}
