//! Work that blocks, on threads that may.

use std::future::Future;

use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

/// Starts `work` at once on a thread that may block; the future has what it made, or nothing when the runtime ends.
///
/// Where nobody waits any more, what `work` made is dropped before `jobs` counts it as ended, so that waiting for `jobs`
/// also waits for everything the work owned. A panic goes on in who waits.
pub(crate) fn start<T: Send + 'static, W: FnOnce() -> T + Send + 'static>(
    jobs: &TaskTracker,
    work: W,
) -> impl Future<Output = Option<T>> + Send + use<T, W> {
    let (sender, receiver) = oneshot::channel();
    let job: tokio::task::JoinHandle<()> = jobs.spawn_blocking(move || drop(sender.send(work())));
    async move {
        if let Ok(made) = receiver.await {
            return Some(made);
        }
        match job.await {
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Ok(()) | Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn what_nobody_waits_for_is_dropped_before_the_job_ends() {
        let jobs = TaskTracker::new();
        let owned = Arc::new(());
        for _ in 0..200 {
            let made = Arc::clone(&owned);
            drop(start(&jobs, move || made));
        }
        jobs.close();
        jobs.wait().await;
        assert_eq!(Arc::strong_count(&owned), 1);
    }

    #[tokio::test]
    #[should_panic(expected = "broken job")]
    async fn a_panic_reaches_who_waits() {
        start(&TaskTracker::new(), || panic!("broken job")).await;
    }
}
