//! A timer that is looked at only when it may have something to say.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// Wakes its task at a moment that can be moved. Looking at it costs next to nothing while the same task looks at it: most
/// wake-ups of a stream are for tokens.
#[derive(Debug)]
pub(crate) struct Alarm {
    sleep: Pin<Box<Sleep>>,
    /// Who is woken, once that is known.
    waker: Option<Waker>,
}

impl Alarm {
    /// Goes off after `pause`.
    pub(crate) fn after(pause: Duration) -> Self {
        Self { sleep: Box::pin(tokio::time::sleep(pause)), waker: None }
    }

    /// Goes off at `moment` instead.
    pub(crate) fn reset(&mut self, moment: Instant) {
        self.sleep.as_mut().reset(moment);
        self.waker = None;
    }

    /// Whether it has gone off.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let known = self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if known && !self.sleep.is_elapsed() {
            return Poll::Pending;
        }
        self.waker = None;
        std::task::ready!(self.sleep.as_mut().poll(cx));
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_looked_last_is_woken_and_a_moved_alarm_goes_off_later() {
        let (first, second) = (Arc::new(Count::default()), Arc::new(Count::default()));
        let (one, two) = (Waker::from(Arc::clone(&first)), Waker::from(Arc::clone(&second)));
        let second_ms = Duration::from_millis(1000);
        let mut alarm = Alarm::after(second_ms);
        for waker in [&one, &one, &two, &two] {
            assert!(alarm.poll(&mut Context::from_waker(waker)).is_pending());
        }
        tokio::time::sleep(second_ms + Duration::from_millis(2)).await;
        assert_eq!((first.0.load(Ordering::SeqCst), second.0.load(Ordering::SeqCst)), (0, 1));
        assert!(alarm.poll(&mut Context::from_waker(&two)).is_ready());
        alarm.reset(Instant::now() + second_ms);
        assert!(alarm.poll(&mut Context::from_waker(&two)).is_pending());
        tokio::time::sleep(second_ms / 2).await;
        assert!(alarm.poll(&mut Context::from_waker(&two)).is_pending());
        alarm.reset(Instant::now() + second_ms);
        assert!(alarm.poll(&mut Context::from_waker(&two)).is_pending());
        tokio::time::sleep(second_ms * 3 / 4).await;
        assert!(alarm.poll(&mut Context::from_waker(&two)).is_pending());
        tokio::time::sleep(second_ms / 2).await;
        assert_eq!(second.0.load(Ordering::SeqCst), 2);
        assert!(alarm.poll(&mut Context::from_waker(&two)).is_ready());
    }
}
