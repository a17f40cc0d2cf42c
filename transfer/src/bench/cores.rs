//! A core for each of the two processes of a bench, on a machine that has just two.
//!
//! Where both cores were busy a moment ago, Linux no longer looks for an idle one when it wakes a thread: both processes then
//! take turns on one core for a while, with the other one idle, and every transfer and every probe takes up to twice as long.
//! With more cores that does not happen.

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The cores of this process, one for each process of a bench, until it is dropped.
pub(super) struct Cores {
    both: CpuSet,
}

impl Cores {
    /// Keeps this process, and what it starts, to one of its cores; none where it has not just two.
    pub(super) fn split() -> Option<Self> {
        let both = sched_getaffinity(None).ok().filter(|cores| cores.count() == 2)?;
        let cores = Self { both };
        keep_to(&cores.nth(0));
        Some(cores)
    }

    /// Runs `start` on the core of the other process, which what it starts keeps to.
    pub(super) fn for_peer<T>(&self, start: impl FnOnce() -> T) -> T {
        let _ = sched_setaffinity(None, &self.nth(1));
        let started = start();
        let _ = sched_setaffinity(None, &self.nth(0));
        started
    }

    fn nth(&self, n: usize) -> CpuSet {
        let mut one = CpuSet::new();
        (0..CpuSet::MAX_CPU)
            .filter(|core| self.both.is_set(*core))
            .skip(n)
            .take(1)
            .for_each(|core| one.set(core));
        one
    }
}

impl Drop for Cores {
    fn drop(&mut self) {
        keep_to(&self.both);
    }
}

/// Keeps all threads of this process to `cores`. Those that are started later keep to those of who starts them.
fn keep_to(cores: &CpuSet) {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return };
    let ids = threads.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for thread in ids.filter_map(Pid::from_raw) {
        // A thread may have ended meanwhile.
        let _ = sched_setaffinity(Some(thread), cores);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count() -> u32 {
        sched_getaffinity(None).unwrap().count()
    }

    #[test]
    fn each_has_one_of_two_cores_and_both_are_back_at_the_end() {
        let before = count();
        match Cores::split() {
            None => assert_ne!(before, 2),
            Some(cores) => {
                let own = sched_getaffinity(None).unwrap();
                let theirs = cores.for_peer(|| {
                    // As a process would be, a thread is started with the cores of who starts it.
                    std::thread::spawn(|| sched_getaffinity(None).unwrap()).join().unwrap()
                });
                assert_eq!((own.count(), theirs.count()), (1, 1));
                assert_ne!(own, theirs);
                assert_eq!(sched_getaffinity(None).unwrap(), own);
                drop(cores);
            }
        }
        assert_eq!(count(), before);
    }
}
