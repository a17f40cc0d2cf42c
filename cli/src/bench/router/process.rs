//! What processes cost, from `/proc`.

use std::fs;
use std::ops::{AddAssign, Sub};
use std::time::Duration;

/// What all processors of this machine were used for, by whomever, in ticks of the kernel.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Busy {
    used: u64,
    all: u64,
}

impl Busy {
    /// Since the machine started.
    pub(super) fn now() -> Self {
        Self::parse(&fs::read_to_string("/proc/stat").unwrap_or_default())
    }

    /// The first line: `cpu`, then user, nice, system, idle, waiting for input and output, interrupts of two kinds, stolen;
    /// what guests had is in the first two.
    fn parse(stat: &str) -> Self {
        let line = stat.lines().next().unwrap_or_default();
        let ticks: Vec<u64> =
            line.split_ascii_whitespace().skip(1).take(8).map_while(|number| number.parse().ok()).collect();
        let all = ticks.iter().sum();
        let unused: u64 = ticks.iter().skip(3).take(2).sum();
        Self { used: all - unused, all }
    }

    /// Share of what there was.
    pub(super) fn share(self) -> f64 {
        if self.all == 0 { 0.0 } else { self.used as f64 / self.all as f64 }
    }
}

impl Sub for Busy {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { used: self.used.saturating_sub(before.used), all: self.all.saturating_sub(before.all) }
    }
}

impl AddAssign for Busy {
    fn add_assign(&mut self, more: Self) {
        self.used += more.used;
        self.all += more.all;
    }
}

/// Time on a processor of all threads that live, user and system.
pub(super) fn cpu_time(pids: &[u32]) -> Duration {
    Duration::from_nanos(pids.iter().map(|pid| of_threads(*pid)).sum())
}

fn of_threads(pid: u32) -> u64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    let on_cpu = threads.flatten().filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().next()?.parse::<u64>().ok()
    });
    on_cpu.sum()
}

/// Memory that is there, of all of them.
pub(super) fn resident_bytes(pids: &[u32]) -> u64 {
    pages(pids, |resident, _| resident)
}

/// Of that, what is no file's.
pub(super) fn own_bytes(pids: &[u32]) -> u64 {
    pages(pids, u64::saturating_sub)
}

/// The sum of what is made of the pages that are there and, of these, those of files.
fn pages(pids: &[u32], of: impl Fn(u64, u64) -> u64) -> u64 {
    let pages = pids.iter().filter_map(|pid| {
        let text = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
        let mut numbers = text.split(' ').skip(1).map_while(|number| number.parse::<u64>().ok());
        Some(of(numbers.next()?, numbers.next()?))
    });
    pages.sum::<u64>() * rustix::param::page_size() as u64
}

/// The children of a process, each with its command line.
pub(super) fn children(pid: u32) -> Vec<(u32, Vec<String>)> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists =
        threads.flatten().filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let pids: Vec<u32> = lists
        .flat_map(|list| list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect();
    let command = |pid: u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
    };
    pids.into_iter().map(|pid| (pid, command(pid))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_neither_idle_nor_waiting_is_used() {
        let before = Busy::parse("cpu  10 1 9 100 20 1 1 1 5 5\ncpu0 1 1 1 1\n");
        let after = Busy::parse("cpu  40 1 19 130 50 1 1 1 5 5\ncpu0 1 1 1 1\n");
        assert_eq!((after - before).share(), 0.4);
        assert_eq!(Busy::parse("").share(), 0.0);
        assert!((0.0..=1.0).contains(&Busy::now().share()) && Busy::now().all > 0);
    }

    #[test]
    fn this_process_costs_something() {
        let own = [std::process::id()];
        let before = cpu_time(&own);
        let mut sum = 0u64;
        while cpu_time(&own) < before + Duration::from_millis(20) {
            sum = (0..100_000u64).fold(sum, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
        }
        assert!(sum != 1 && resident_bytes(&own) > 1 << 20);
        assert!((1..resident_bytes(&own)).contains(&own_bytes(&own)));
        assert_eq!(cpu_time(&[]), Duration::ZERO);
    }
}
