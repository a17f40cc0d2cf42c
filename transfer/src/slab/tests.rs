use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(1)
}

fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

#[tokio::test(start_paused = true)]
async fn slots_are_apart_and_come_back_when_dropped() {
    let slab = Slab::new(3, 100, "slab").unwrap();
    let slots = slab.acquire(3, soon()).await.unwrap();
    let offsets: BTreeSet<usize> = slots.iter().map(Slot::offset).collect();
    assert_eq!(offsets, BTreeSet::from([0, 128, 256]));
    assert_eq!(slab.audit().unwrap(), SlabCounts { filling: 3, ..SlabCounts::default() });
    drop(slots);
    assert_eq!(slab.audit().unwrap(), SlabCounts { free: 3, ..SlabCounts::default() });
}

#[tokio::test(start_paused = true)]
async fn a_full_slab_makes_the_next_one_wait_and_then_give_up() {
    let slab = Slab::new(2, 64, "slab").unwrap();
    let held = slab.acquire(1, soon()).await.unwrap();
    let start = Instant::now();
    let error = slab.acquire(2, soon()).await.unwrap_err();
    assert_eq!(error, SlabError::Exhausted { asked: 2, slots: 2 });
    assert_eq!(start.elapsed(), Duration::from_secs(1));
    assert_eq!(slab.acquire(3, soon()).await.unwrap_err(), SlabError::TooMany { asked: 3, slots: 2 });
    drop(held);
    assert_eq!(slab.acquire(2, soon()).await.unwrap().len(), 2, "giving up left nothing behind");
    assert!(slab.audit().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_share_ends_where_others_begin() {
    let slab = Slab::new(6, 64, "slab").unwrap();
    let (mine, theirs) = (slab.share(2), slab.share(2));
    let mut held = mine.acquire(3, soon()).await.unwrap();
    assert!(mine.try_acquire().is_none() && mine.clone().try_acquire().is_none(), "clones have it together");
    let exhausted = SlabError::Exhausted { asked: 1, slots: 3 };
    assert_eq!(mine.acquire(1, soon()).await.unwrap_err(), exhausted);
    assert_eq!(mine.acquire(4, soon()).await.unwrap_err(), SlabError::TooMany { asked: 4, slots: 3 });
    assert_eq!(theirs.acquire(3, soon()).await.unwrap().len(), 3);
    drop(held.pop());
    assert!(mine.try_acquire().is_some());
    drop(held);
    assert_eq!(mine.acquire(3, soon()).await.unwrap().len(), 3);
    assert_eq!(slab.audit().unwrap().free, 6);
}

#[tokio::test(start_paused = true)]
async fn waiters_are_served_in_the_order_they_came_and_all_at_once() {
    let slab = Slab::new(2, 64, "slab").unwrap();
    let mut held = slab.acquire(2, soon()).await.unwrap();
    let mut wide = pin!(slab.acquire(2, soon()));
    let mut narrow = pin!(slab.acquire(1, soon()));
    assert!(poll(wide.as_mut()).is_pending() && poll(narrow.as_mut()).is_pending());
    drop(held.pop());
    assert!(poll(narrow.as_mut()).is_pending(), "the one behind does not overtake although one slot is free");
    assert!(poll(wide.as_mut()).is_pending());
    drop(held);
    let Poll::Ready(Ok(both)) = poll(wide.as_mut()) else { panic!("two slots are free") };
    assert!(poll(narrow.as_mut()).is_pending());
    drop(both);
    assert!(poll(narrow.as_mut()).is_ready());
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_holds_nothing() {
    let slab = Slab::new(1, 64, "slab").unwrap();
    let held = slab.acquire(1, soon()).await.unwrap();
    {
        let mut gone = pin!(slab.acquire(1, soon()));
        assert!(poll(gone.as_mut()).is_pending());
        drop(held);
    }
    assert_eq!(slab.acquire(1, soon()).await.unwrap().len(), 1);
}

proptest! {
    #[test]
    fn the_books_add_up_whatever_happens(actions in proptest::collection::vec((0usize..4, any::<u8>()), 1..200)) {
        let slab = Slab::new(5, 64, "slab").unwrap();
        let mut held: Vec<(Slot, SlotState)> = Vec::new();
        for (action, pick) in actions {
            let count = usize::from(pick) % 3 + 1;
            match action {
                0 => {
                    if let Poll::Ready(taken) = poll(pin!(async { slab.0.permits.clone().acquire_many_owned(count as u32).await })) {
                        held.extend(slab.take(taken.unwrap()).into_iter().map(|slot| (slot, SlotState::Filling)));
                    }
                }
                1 if !held.is_empty() => {
                    held.swap_remove(usize::from(pick) % held.len());
                }
                _ if !held.is_empty() => {
                    let state = if action == 2 { SlotState::Published } else { SlotState::Quarantined };
                    let at = usize::from(pick) % held.len();
                    held[at].0.set_state(state);
                    held[at].1 = state;
                }
                _ => {}
            }
            let of = |state| held.iter().filter(|(_, s)| *s == state).count();
            let expected = SlabCounts {
                free: 5 - held.len(),
                filling: of(SlotState::Filling),
                published: of(SlotState::Published),
                quarantined: of(SlotState::Quarantined),
            };
            prop_assert_eq!(slab.audit().unwrap(), expected);
            prop_assert_eq!(slab.0.permits.available_permits(), expected.free);
            let distinct: BTreeSet<usize> = held.iter().map(|(slot, _)| slot.index).collect();
            prop_assert_eq!(distinct.len(), held.len(), "a slot was given twice");
        }
    }
}
