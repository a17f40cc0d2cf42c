//! Damage on the way: a writer into another process' shared memory, and a TCP proxy that knows no mercy.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// How bytes are damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// One bit flipped.
    Flip,
    /// Two runs exchanged.
    Swap,
    /// A run zeroed.
    Zero,
}

/// A thread that keeps damaging the shared memory of a process until it is stopped.
pub struct MemoryTamper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl MemoryTamper {
    /// Damages `files` (of `/proc/PID/fd`) in runs of `run_bytes`, again and again.
    ///
    /// # Panics
    /// When a file cannot be opened for writing.
    pub fn start(files: &[PathBuf], damage: Damage, run_bytes: usize) -> Self {
        assert!(!files.is_empty(), "nothing to damage");
        let files: Vec<_> = files
            .iter()
            .map(|path| {
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(path)
                    .expect("the memory of the other process opens")
            })
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut writes = 0;
            while !stopped.load(Ordering::Relaxed) {
                for file in &files {
                    let len = file.metadata().map_or(0, |meta| meta.len());
                    writes += damage_once(file, len, damage, run_bytes);
                }
                std::thread::yield_now();
            }
            writes
        });
        Self { stop, thread: Some(thread) }
    }

    /// Stops and says how many runs were damaged.
    ///
    /// # Panics
    /// When the thread broke.
    pub fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(0, |thread| thread.join().expect("the tampering thread"))
    }
}

impl Drop for MemoryTamper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One pass over the file: every run that is not all zero is damaged, so that unused memory costs nothing.
fn damage_once(file: &std::fs::File, len: u64, damage: Damage, run_bytes: usize) -> u64 {
    let (mut run, mut other) = (vec![0u8; run_bytes], vec![0u8; run_bytes]);
    let runs = len / run_bytes as u64;
    let mut damaged = 0;
    for index in 0..runs {
        let at = index * run_bytes as u64;
        if file.read_exact_at(&mut run, at).is_err() || run.iter().all(|byte| *byte == 0) {
            continue;
        }
        let wrote = match damage {
            Damage::Flip => {
                let position = run.iter().position(|byte| *byte != 0).unwrap_or(0);
                file.write_all_at(&[run[position] ^ 0x40], at + position as u64)
            }
            Damage::Zero => file.write_all_at(&vec![0; run_bytes], at),
            Damage::Swap => {
                let partner = if index % 2 == 0 { index + 1 } else { index - 1 };
                if partner >= runs
                    || file.read_exact_at(&mut other, partner * run_bytes as u64).is_err()
                    || other == run
                {
                    continue;
                }
                file.write_all_at(&other, at)
                    .and_then(|()| file.write_all_at(&run, partner * run_bytes as u64))
            }
        };
        damaged += u64::from(wrote.is_ok());
    }
    damaged
}
