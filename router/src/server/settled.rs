//! Polls a future again at once when it wakes itself, instead of having the scheduler do so.
//!
//! hyper wakes the task of a connection while that is being polled, once for every request with a body. To the scheduler
//! such a task has yielded: it goes to the back of the queue, and another thread is woken to take it. That thread finds
//! nothing, since the first one is quicker, but takes over waiting for sockets, so that the answer is handed from thread
//! to thread: two system calls and a wake-up of a sleeping processor for every request.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Times in a row that a future is polled; then others on this thread have their turn.
const TURNS_MAX: u32 = 8;

/// Nobody polls: whoever wakes wakes the task.
const RESTING: u8 = 0;
/// Being polled.
const POLLED: u8 = 1;
/// Being polled, and woken since that began.
const RUNG: u8 = 2;

/// A future that is polled until it has nothing to do for now.
#[derive(Debug)]
pub(super) struct Settled<F> {
    inner: F,
    bell: Arc<Bell>,
    waker: Waker,
}

#[derive(Debug, Default)]
struct Bell {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Whoever polls looks at the state before it leaves, and leaves it at rest.
        let polled = self.state.compare_exchange(POLLED, RUNG, Ordering::AcqRel, Ordering::Acquire);
        if polled == Err(RESTING) {
            self.task.wake();
        }
    }
}

impl<F> Settled<F> {
    pub(super) fn new(inner: F) -> Self {
        let bell = Arc::new(Bell::default());
        let waker = Waker::from(Arc::clone(&bell));
        Self { inner, bell, waker }
    }

    pub(super) fn get_mut(&mut self) -> &mut F {
        &mut self.inner
    }

    pub(super) fn into_inner(self) -> F {
        self.inner
    }
}

impl<F: Future + Unpin> Future for Settled<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        this.bell.task.register(cx.waker());
        for _ in 0..TURNS_MAX {
            this.bell.state.store(POLLED, Ordering::Release);
            let polled = Pin::new(&mut this.inner).poll(&mut Context::from_waker(&this.waker));
            if polled.is_ready() {
                this.bell.state.store(RESTING, Ordering::Release);
                return polled;
            }
            let rest = this.bell.state.compare_exchange(POLLED, RESTING, Ordering::AcqRel, Ordering::Acquire);
            if rest.is_ok() {
                return Poll::Pending;
            }
        }
        this.bell.state.store(RESTING, Ordering::Release);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn poll<F: Future + Unpin>(future: &mut F, count: &Arc<Count>) -> Poll<F::Output> {
        Pin::new(future).poll(&mut Context::from_waker(&Waker::from(Arc::clone(count))))
    }

    #[test]
    fn a_future_that_wakes_itself_is_polled_until_it_rests_and_no_longer() {
        let count = Arc::new(Count::default());
        let mut left = 3;
        let mut polls = 0;
        let mut settled = Settled::new(std::future::poll_fn(|cx| {
            polls += 1;
            if left > 0 {
                left -= 1;
                cx.waker().wake_by_ref();
            }
            Poll::<()>::Pending
        }));
        assert!(poll(&mut settled, &count).is_pending());
        assert!(poll(&mut settled, &count).is_pending());
        drop(settled);
        assert_eq!((polls, count.0.load(Ordering::SeqCst)), (5, 0), "its task is never woken");
        let mut restless = Settled::new(std::future::poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        }));
        assert!(poll(&mut restless, &count).is_pending());
        assert_eq!(count.0.load(Ordering::SeqCst), 1, "others have their turn, then it goes on");
    }

    #[test]
    fn whoever_wakes_it_at_rest_wakes_the_task_that_polled_last() {
        let (first, second) = (Arc::new(Count::default()), Arc::new(Count::default()));
        let mut kept: Option<Waker> = None;
        let mut settled = Settled::new(std::future::poll_fn(|cx| {
            kept = Some(cx.waker().clone());
            Poll::<()>::Pending
        }));
        assert!(poll(&mut settled, &first).is_pending());
        assert!(poll(&mut settled, &second).is_pending());
        drop(settled);
        kept.unwrap().wake();
        assert_eq!([&first, &second].map(|count| count.0.load(Ordering::SeqCst)), [0, 1]);
    }

    /// Wakers on other threads: nothing that was put in is ever left lying.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nobody_sleeps_on_what_came_from_another_thread() {
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<u32>(4);
        let sending = std::thread::spawn(move || {
            (0..50_000).for_each(|number| sender.blocking_send(number).unwrap());
        });
        let mut next = 0;
        let all = Settled::new(std::future::poll_fn(move |cx| {
            loop {
                match std::task::ready!(receiver.poll_recv(cx)) {
                    Some(number) => {
                        assert_eq!(number, next);
                        next += 1;
                    }
                    None => return Poll::Ready(next),
                }
            }
        }));
        let patience = std::time::Duration::from_secs(60);
        assert_eq!(tokio::time::timeout(patience, all).await, Ok(50_000));
        sending.join().unwrap();
    }
}
