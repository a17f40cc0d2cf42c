//! What takes a while runs on threads of its own, so many at a time, and tenants take turns.
//!
//! A thread cannot be stopped: a job that has begun keeps its turn until it ends, although whoever asked for it may have
//! left. Otherwise clients that send much and leave at once would have any number of them running.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::reply::Refusal;

/// Turns for jobs that take a while.
#[derive(Debug)]
pub(crate) struct Apart(Arc<Mutex<Turns>>);

#[derive(Debug)]
struct Turns {
    free: usize,
    /// Tenants with jobs that wait; the first one is next.
    waiting: VecDeque<Lane>,
}

#[derive(Debug)]
struct Lane {
    tenant: Arc<str>,
    jobs: VecDeque<oneshot::Sender<Turn>>,
}

/// A turn, given back when dropped.
#[derive(Debug)]
struct Turn(Arc<Mutex<Turns>>);

impl Drop for Turn {
    fn drop(&mut self) {
        loop {
            let next = {
                let mut turns = lock(&self.0);
                let Some(next) = turns.next() else {
                    turns.free += 1;
                    return;
                };
                next
            };
            if next.is_closed() {
                continue;
            }
            // Who leaves in this very moment gives it back.
            drop(next.send(Self(Arc::clone(&self.0))));
            return;
        }
    }
}

impl Turns {
    /// Takes whoever is next out of the queue.
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let mut lane = self.waiting.pop_front()?;
        let next = lane.jobs.pop_front();
        if !lane.jobs.is_empty() {
            self.waiting.push_back(lane);
        }
        next
    }

    fn wait(&mut self, tenant: &Arc<str>) -> oneshot::Receiver<Turn> {
        let (told, turn) = oneshot::channel();
        match self.waiting.iter_mut().find(|lane| lane.tenant == *tenant) {
            Some(lane) => {
                // Those who have left are in nobody's way, but must not pile up.
                if lane.jobs.len().is_power_of_two() {
                    lane.jobs.retain(|job| !job.is_closed());
                }
                lane.jobs.push_back(told);
            }
            None => self.waiting.push_back(Lane { tenant: Arc::clone(tenant), jobs: [told].into() }),
        }
        turn
    }
}

impl Apart {
    /// So many jobs at once.
    pub(crate) fn new(jobs: usize) -> Self {
        Self(Arc::new(Mutex::new(Turns { free: jobs, waiting: VecDeque::new() })))
    }

    /// Runs a job for a tenant when it is its turn.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        tenant: &Arc<str>,
        job: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let turn = self.turn(tenant).await?;
        let with_turn = move || {
            let _turn = turn;
            job()
        };
        tokio::task::spawn_blocking(with_turn).await.map_err(|error| {
            tracing::error!(%error, "preparing a request panicked");
            Refusal::Internal
        })?
    }

    async fn turn(&self, tenant: &Arc<str>) -> Result<Turn, Refusal> {
        let turn = {
            let mut turns = lock(&self.0);
            if turns.free > 0 {
                turns.free -= 1;
                return Ok(Turn(Arc::clone(&self.0)));
            }
            turns.wait(tenant)
        };
        turn.await.map_err(|_| Refusal::Internal)
    }
}

fn lock(turns: &Mutex<Turns>) -> MutexGuard<'_, Turns> {
    turns.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{SyncSender, sync_channel};
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use tokio::task::JoinSet;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn tenant(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    /// A job that ends when told so, once it is known to have begun.
    async fn begun(apart: &Arc<Apart>) -> (JoinSet<()>, SyncSender<()>) {
        let (end, ended) = sync_channel::<()>(1);
        let (begins, begun) = oneshot::channel();
        let apart = Arc::clone(apart);
        let mut caller = JoinSet::new();
        caller.spawn(async move {
            let job = move || {
                let _ = begins.send(());
                let _ = ended.recv_timeout(PATIENCE);
                Ok(())
            };
            let _ = apart.run(&tenant("a"), job).await;
        });
        tokio::time::timeout(PATIENCE, begun).await.unwrap().unwrap();
        (caller, end)
    }

    #[tokio::test]
    async fn a_job_keeps_its_turn_although_its_client_leaves() {
        let apart = Arc::new(Apart::new(1));
        let (mut caller, end) = begun(&apart).await;
        caller.shutdown().await;
        let next_tenant = tenant("a");
        let mut next = Box::pin(apart.run(&next_tenant, || Ok(7)));
        assert!(next.as_mut().now_or_never().is_none(), "the thread is still at it");
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(next.as_mut().now_or_never().is_none());
        end.send(()).unwrap();
        assert_eq!(tokio::time::timeout(PATIENCE, next).await.unwrap(), Ok(7));
        assert_eq!(lock(&apart.0).free, 1);
    }

    #[tokio::test]
    async fn tenants_take_turns_and_who_left_is_passed_over() {
        let apart = Arc::new(Apart::new(1));
        let (caller, end) = begun(&apart).await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let (many, few) = (tenant("many"), tenant("few"));
        let jobs = (0..3).map(|n| (&many, n)).chain([(&few, 10)]);
        let mut waiting: Vec<_> = jobs
            .map(|(tenant, n)| {
                let order = Arc::clone(&order);
                Box::pin(apart.run(tenant, move || {
                    order.lock().unwrap().push(n);
                    Ok(())
                }))
            })
            .collect();
        waiting.iter_mut().for_each(|job| assert!(job.as_mut().now_or_never().is_none()));
        drop(waiting.remove(0));
        end.send(()).unwrap();
        let all = futures_util::future::join_all(waiting);
        let all = tokio::time::timeout(PATIENCE, all).await.unwrap();
        assert!(all.iter().all(Result::is_ok));
        caller.join_all().await;
        assert_eq!(*order.lock().unwrap(), [10, 1, 2], "not after all of who sent much");
        let turns = lock(&apart.0);
        assert_eq!((turns.free, turns.waiting.len()), (1, 0));
    }

    #[test]
    fn those_who_left_do_not_pile_up() {
        let mut turns = Turns { free: 0, waiting: VecDeque::new() };
        let name = tenant("a");
        let stays = turns.wait(&name);
        (0..10_000).for_each(|_| drop(turns.wait(&name)));
        assert!(turns.waiting[0].jobs.len() < 10);
        drop(stays);
    }
}
