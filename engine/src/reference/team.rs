//! The threads of one executor.

use rayon::iter::{IndexedParallelIterator, IntoParallelRefMutIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

/// Operations worth handing to another thread: below about 10 microseconds waking it costs more than it
/// saves.
const GRAIN: usize = 400_000;

/// A fixed number of threads, among them the one that calls.
#[derive(Debug)]
pub(super) struct Team {
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Team {
    /// Starts `threads` threads; none for one, the caller works itself.
    pub(super) fn start(threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let pool = if threads > 1 {
            let name = |index| format!("forward-{index}");
            Some(rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build()?)
        } else {
            None
        };
        Ok(Self { pool, threads: threads.max(1) })
    }

    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Index of the calling thread within the team.
    pub(super) fn current(&self) -> usize {
        if self.pool.is_some() { rayon::current_thread_index().unwrap_or(0) } else { 0 }
    }

    /// Runs `work` where its parallel parts start without waking anybody: a whole forward pass at a time.
    pub(super) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }

    /// Calls `body(index, item)` for every item, each about `operations` multiply-adds of work.
    pub(super) fn each<T: Send>(
        &self,
        items: &mut [T],
        operations: usize,
        body: impl Fn(usize, &mut T) + Sync,
    ) {
        match self.share(items.len(), operations) {
            None => items.iter_mut().enumerate().for_each(|(i, item)| body(i, item)),
            Some(least) => {
                items.par_iter_mut().enumerate().with_min_len(least).for_each(|(i, item)| body(i, item));
            }
        }
    }

    /// Calls `body(index, chunk)` for every chunk of `size`, each about `operations` multiply-adds of work.
    pub(super) fn chunks<T: Send>(
        &self,
        data: &mut [T],
        size: usize,
        operations: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        match self.share(data.len().div_ceil(size.max(1)), operations) {
            None => data.chunks_mut(size.max(1)).enumerate().for_each(|(i, chunk)| body(i, chunk)),
            Some(least) => data
                .par_chunks_mut(size)
                .enumerate()
                .with_min_len(least)
                .for_each(|(i, chunk)| body(i, chunk)),
        }
    }

    /// The least number of items worth a hand-over, or none when all together are not.
    fn share(&self, items: usize, operations: usize) -> Option<usize> {
        if self.pool.is_none() || items < 2 || items.saturating_mul(operations) < 2 * GRAIN {
            return None;
        }
        Some((GRAIN / operations.max(1)).clamp(1, items.div_ceil(self.threads)))
    }
}

#[cfg(test)]
mod tests;
