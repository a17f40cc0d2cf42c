//! Memory for the bodies of requests: so much for all of them together.
//!
//! A place at the gate is taken when a body is there. Without this, connections that send large bodies at the same time, or
//! streams of one connection, would hold any amount of memory.

use std::sync::Arc;
use std::time::Duration;

use baton_config::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::admit::{Reason, Refused};

/// A body up to this length takes no more than its connection does anyway.
const FREE_BYTES: u64 = 4 << 10;
/// Longer ones share no memory with those up to this length, which are never refused because of them.
const SMALL_BYTES: u64 = 64 << 10;
/// Of all memory, one part in so many is for small bodies.
const SMALL_PART: u64 = 4;
/// What is counted in.
const UNIT_BYTES: u64 = 1 << 10;
/// When to come back: bodies come and go within seconds.
const AWAY: Duration = Duration::from_secs(1);

/// The memory that is left.
#[derive(Debug)]
pub(crate) struct Room {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

/// The memory of one body, given back when dropped.
#[derive(Debug, Default)]
pub(crate) struct Held {
    permit: Option<OwnedSemaphorePermit>,
    is_large: bool,
}

/// A body that was read.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) bytes: bytes::Bytes,
    pub(crate) held: Held,
}

impl Room {
    /// For so many bytes, and for one body of `largest` in any case.
    pub(crate) fn new(all: Bytes, largest: Bytes) -> Self {
        let units = |bytes: u64| {
            let units = usize::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(usize::MAX);
            Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS)))
        };
        let small = all.0 / SMALL_PART;
        Self { small: units(small), large: units((all.0 - small).max(largest.0)) }
    }

    /// Lets a body grow to so many bytes.
    pub(crate) fn grow(&self, held: &mut Held, bytes: u64) -> Result<(), Refused> {
        if bytes <= FREE_BYTES {
            return Ok(());
        }
        let is_large = bytes > SMALL_BYTES;
        let pool = if is_large { &self.large } else { &self.small };
        // What has outgrown the small ones takes all of its memory from the others.
        let mut permit = held.permit.take_if(|_| held.is_large == is_large);
        let has = permit.as_ref().map_or(0, OwnedSemaphorePermit::num_permits) as u64;
        let lacks = u32::try_from(bytes.div_ceil(UNIT_BYTES).saturating_sub(has)).unwrap_or(u32::MAX);
        let more = Arc::clone(pool).try_acquire_many_owned(lacks);
        let more = more.map_err(|_| Refused { reason: Reason::Bodies, after: AWAY })?;
        match &mut permit {
            Some(permit) => permit.merge(more),
            none => *none = Some(more),
        }
        *held = Held { permit, is_large };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    fn left(room: &Room) -> (usize, usize) {
        (room.small.available_permits(), room.large.available_permits())
    }

    #[test]
    fn bodies_share_what_there_is_and_small_ones_need_not_share_with_large_ones() {
        let room = Room::new(Bytes(400 * KIB), Bytes(KIB));
        let (mut first, mut second, mut third) = (Held::default(), Held::default(), Held::default());
        room.grow(&mut first, FREE_BYTES).unwrap();
        assert_eq!(left(&room), (100, 300));
        room.grow(&mut first, 60 * KIB - 5).unwrap();
        room.grow(&mut second, 40 * KIB).unwrap();
        assert_eq!(left(&room), (0, 300));
        let refused = room.grow(&mut third, 5 * KIB).unwrap_err();
        assert_eq!((refused.reason, refused.retry_after_s()), (Reason::Bodies, 1));
        room.grow(&mut first, 65 * KIB).unwrap();
        assert_eq!(left(&room), (60, 235));
        room.grow(&mut first, 66 * KIB).unwrap();
        room.grow(&mut first, 300 * KIB).unwrap();
        assert_eq!(left(&room), (60, 0));
        room.grow(&mut second, 65 * KIB).unwrap_err();
        room.grow(&mut third, 60 * KIB).unwrap();
        drop((first, second, third));
        assert_eq!(left(&room), (100, 300));
    }

    #[test]
    fn the_largest_body_has_room_alone() {
        let room = Room::new(Bytes(KIB), Bytes(1 << 30));
        room.grow(&mut Held::default(), 1 << 30).unwrap();
    }
}
