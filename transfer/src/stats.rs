//! Counters of an agent and decaying means of a session.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_config::Bytes;

use crate::agent::BackendKind;
use crate::agent::server::Denial;
use crate::error::{ErrorKind, Refusal};
use crate::session::SessionStats;
use crate::wire::WireError;

/// Weight of the newest value in a decaying mean.
const NEWEST: f64 = 0.2;
/// Smallest read that says something about bandwidth.
const BANDWIDTH_MIN_BYTES: u64 = 64 << 10;

/// What an agent has counted since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    read: [u64; BackendKind::ALL.len()],
    written: [u64; BackendKind::ALL.len()],
    errors: [u64; ErrorKind::ALL.len()],
    refused: [u64; Refusal::ALL.len()],
    served: u64,
    taken: u64,
    /// Blocks that failed their digest.
    pub checksum_mismatches: u64,
    /// Requests and sessions refused here because they meant another life, of this worker or of the peer.
    pub stale_refused: u64,
    /// Connections and frames refused, here or there, because the sides do not share a token.
    pub auth_refused: u64,
    /// Connections ended because the peer broke the protocol, metadata that cannot be read, and requests refused because
    /// they made no sense.
    pub malformed: u64,
    /// Reads and writes that went on over another path because one broke or stood still.
    pub path_failovers: u64,
}

impl Stats {
    /// Bytes of blocks read over `backend`.
    pub fn read_bytes(&self, backend: BackendKind) -> Bytes {
        Bytes(self.read[backend as usize])
    }

    /// Bytes of blocks written to peers over `backend`.
    pub fn written_bytes(&self, backend: BackendKind) -> Bytes {
        Bytes(self.written[backend as usize])
    }

    /// Reads that ended in an error of `kind`.
    pub fn errors(&self, kind: ErrorKind) -> u64 {
        self.errors[kind as usize]
    }

    /// Sessions and requests of peers that this agent refused for this reason.
    pub fn refused(&self, reason: Refusal) -> u64 {
        self.refused[reason as usize]
    }

    /// Bytes of blocks that peers wrote here.
    pub fn taken_bytes(&self) -> Bytes {
        Bytes(self.taken)
    }

    /// Bytes of blocks sent to peers; what peers take over `shm` or `cma` is not seen here.
    pub fn served_bytes(&self) -> Bytes {
        Bytes(self.served)
    }
}

/// The counters behind [`Stats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    read: [AtomicU64; BackendKind::ALL.len()],
    written: [AtomicU64; BackendKind::ALL.len()],
    errors: [AtomicU64; ErrorKind::ALL.len()],
    refused: [AtomicU64; Refusal::ALL.len()],
    served: AtomicU64,
    taken: AtomicU64,
    checksum_mismatches: AtomicU64,
    stale_refused: AtomicU64,
    auth_refused: AtomicU64,
    malformed: AtomicU64,
    path_failovers: AtomicU64,
}

impl Counters {
    pub(crate) fn read(&self, backend: BackendKind, bytes: u64) {
        self.read[backend as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of blocks written to a peer, verified by it.
    pub(crate) fn wrote(&self, backend: BackendKind, bytes: u64) {
        self.written[backend as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn error(&self, kind: ErrorKind) {
        self.errors[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes of blocks that a peer wrote here, verified.
    pub(crate) fn taken(&self, bytes: u64) {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn served(&self, bytes: u64) {
        self.served.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn checksum_mismatches(&self, blocks: u64) {
        self.checksum_mismatches.fetch_add(blocks, Ordering::Relaxed);
    }

    pub(crate) fn stale_refused(&self) {
        self.stale_refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn path_failover(&self) {
        self.path_failovers.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn auth_refused(&self) {
        self.auth_refused.fetch_add(1, Ordering::Relaxed);
    }

    /// A session or a request was denied.
    pub(crate) fn denied(&self, denial: Denial) {
        let refusal = match denial {
            Denial::Stale => return self.stale_refused(),
            Denial::Refused(refusal) => refusal,
        };
        self.refused[refusal as usize].fetch_add(1, Ordering::Relaxed);
        match refusal {
            Refusal::Malformed => {
                self.malformed.fetch_add(1, Ordering::Relaxed);
            }
            Refusal::Unauthenticated => self.auth_refused(),
            _ => {}
        }
    }

    /// A peer broke the protocol, and the connection with it.
    pub(crate) fn broken(&self, error: WireError) {
        match error {
            WireError::Forged => self.auth_refused(),
            _ => {
                self.malformed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn snapshot(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            read: std::array::from_fn(|i| get(&self.read[i])),
            written: std::array::from_fn(|i| get(&self.written[i])),
            errors: std::array::from_fn(|i| get(&self.errors[i])),
            refused: std::array::from_fn(|i| get(&self.refused[i])),
            served: get(&self.served),
            taken: get(&self.taken),
            checksum_mismatches: get(&self.checksum_mismatches),
            stale_refused: get(&self.stale_refused),
            auth_refused: get(&self.auth_refused),
            malformed: get(&self.malformed),
            path_failovers: get(&self.path_failovers),
        }
    }
}

/// Bandwidth and latency of a path, as decaying means, in what is quick to reckon with: a small read takes a microsecond
/// altogether. Of two reads that end at once one may be missing in a mean.
#[derive(Debug, Default)]
pub(crate) struct PathMeter {
    bytes: AtomicU64,
    bytes_per_second: Mean,
    latency_ns: Mean,
}

impl PathMeter {
    pub(crate) fn record(&self, bytes: u64, elapsed: Duration, first_byte: Duration) {
        let seconds = elapsed.as_secs_f64();
        if bytes >= BANDWIDTH_MIN_BYTES && seconds > 0.0 {
            self.bytes_per_second.add(bytes as f64 / seconds);
        }
        self.latency_ns.add(first_byte.as_secs_f64() * 1e9);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> SessionStats {
        SessionStats {
            bytes: Bytes(self.bytes.load(Ordering::Relaxed)),
            bytes_per_second: self.bytes_per_second.get(),
            latency: self.latency_ns.get().map(|ns| Duration::from_nanos(ns as u64)),
        }
    }
}

/// A decaying mean, as the bits of a number.
#[derive(Debug)]
struct Mean(AtomicU64);

impl Default for Mean {
    fn default() -> Self {
        Self(AtomicU64::new(f64::NAN.to_bits()))
    }
}

impl Mean {
    fn add(&self, newest: f64) {
        let mean = self.get().map_or(newest, |mean| mean + NEWEST * (newest - mean));
        self.0.store(mean.to_bits(), Ordering::Relaxed);
    }

    /// None before the first value.
    fn get(&self) -> Option<f64> {
        Some(f64::from_bits(self.0.load(Ordering::Relaxed))).filter(|mean| !mean.is_nan())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_counted_under_its_own_name() {
        let counters = Counters::default();
        for (count, refusal) in Refusal::ALL.into_iter().enumerate() {
            (0..=count).for_each(|_| counters.denied(Denial::Refused(refusal)));
        }
        counters.denied(Denial::Stale);
        let stats = counters.snapshot();
        let found: Vec<u64> = Refusal::ALL.into_iter().map(|refusal| stats.refused(refusal)).collect();
        assert_eq!(found, (1..=Refusal::ALL.len() as u64).collect::<Vec<_>>());
        let of = |refusal| stats.refused(refusal);
        assert_eq!(stats.malformed, of(Refusal::Malformed));
        assert_eq!(stats.auth_refused, of(Refusal::Unauthenticated));
        assert_eq!(stats.stale_refused, 1);
        let names: std::collections::HashSet<&str> = Refusal::ALL.into_iter().map(Refusal::as_str).collect();
        assert_eq!(names.len(), Refusal::ALL.len());
    }

    #[test]
    fn means_follow_the_newest_values_and_small_reads_say_nothing_about_bandwidth() {
        let meter = PathMeter::default();
        meter.record(4096, Duration::from_micros(20), Duration::from_micros(20));
        assert_eq!(meter.snapshot().bytes_per_second, None);
        assert_eq!(meter.snapshot().latency, Some(Duration::from_micros(20)));
        for _ in 0..40 {
            meter.record(1 << 20, Duration::from_millis(1), Duration::from_micros(100));
        }
        let stats = meter.snapshot();
        let bandwidth = stats.bytes_per_second.unwrap();
        assert!((bandwidth / (1_048_576.0 * 1000.0) - 1.0).abs() < 1e-6, "{bandwidth}");
        assert!(stats.latency.unwrap() > Duration::from_micros(99));
        assert_eq!(stats.bytes, Bytes(4096 + (40 << 20)));
    }
}
