//! What becomes of a message that arrives after its receive was cancelled.
//!
//! Nobody would take it then: the library would keep it, or keep its sender waiting, and `net` of libfabric 1.17 lets
//! nothing of that sender pass before it is taken. So the tag of a cancelled receive stays awaited, in memory that
//! nobody looks at. Tags are used once: a sink ends with its message, or when there are too many.

use std::collections::VecDeque;

use super::work::{Awaited, Kind, LibfabricDriver};
use crate::backend::fabric::driver::{Access, Driver, LocalId, LocalRange};
use crate::memory::HostMemory;

/// Most messages awaited for nobody.
const SINKS_MAX: usize = 128;
/// Least memory for them.
const SINK_MIN_BYTES: usize = 64 << 10;

/// The sinks of a driver. All share their memory: what is in it means nothing.
#[derive(Default)]
pub(super) struct Sinks {
    memory: Option<(LocalId, usize)>,
    slots: VecDeque<u32>,
}

impl LibfabricDriver {
    /// Awaits a message for nobody. Best effort: without it, its sender times out.
    pub(super) fn sink(&mut self, awaited: Awaited) {
        let mut slots = std::mem::take(&mut self.sinks.slots);
        slots.retain(|slot| self.is_sink(*slot));
        if slots.len() >= SINKS_MAX
            && let Some(oldest) = slots.pop_front()
        {
            self.cancel(oldest);
        }
        if let Some(id) = self.sink_memory(awaited.len) {
            let to = LocalRange { id, offset: 0, len: awaited.len };
            slots.extend(self.post_receive(awaited.tag, to, 0, Kind::Sink).ok());
        }
        self.sinks.slots = slots;
    }

    fn sink_memory(&mut self, len: usize) -> Option<LocalId> {
        if let Some((id, has)) = self.sinks.memory {
            if has >= len {
                return Some(id);
            }
            self.deregister(id);
            self.sinks.memory = None;
        }
        let len = len.next_power_of_two().max(SINK_MIN_BYTES);
        let memory = HostMemory::allocate(len, "late messages").ok()?;
        let (id, _) = self.register(&memory.span(), Access::Local).ok()?;
        self.sinks.memory = Some((id, len));
        Some(id)
    }
}
