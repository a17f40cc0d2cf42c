//! How a worker of either kind becomes a member of the fleet, and ceases to be one.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use baton_conductor::{
    Client, JoinError, Membership, MembershipOptions, Registration, View, WorkerRecord, WorkerState,
};
use baton_config::WorkerId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often the conductor is told how busy a worker is.
pub(crate) const LOAD_INTERVAL: Duration = Duration::from_secs(1);
/// How long a worker that leaves still takes the requests of routers that have not heard. Its own view, which hears when
/// theirs do, mostly ends this in some milliseconds; without a conductor nothing does.
pub(crate) const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long tasks and connections may take to end once nothing is left to do for them.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Takes a lease on the name of `registration`, trying for as long as `timeout`; `None` when told to `drain` before.
pub(crate) async fn join(
    fleet: &Client,
    registration: Registration,
    timeout: Duration,
    drain: &CancellationToken,
) -> Result<Option<Membership>, JoinError> {
    let timing = MembershipOptions { join_timeout: timeout, ..MembershipOptions::default() };
    let worker = registration.worker.clone();
    let joined = drain.run_until_cancelled(Membership::join(fleet, registration, timing)).await;
    if joined.is_none() {
        tracing::info!(%worker, "asked to end before it joined the fleet");
    }
    joined.transpose()
}

/// `host:port` at which others reach what listens at `address`.
pub(crate) fn told_address(advertise: Option<&str>, address: SocketAddr) -> String {
    match advertise {
        None => address.to_string(),
        Some(host) if host.contains(':') => format!("[{host}]:{}", address.port()),
        Some(host) => format!("{host}:{}", address.port()),
    }
}

/// A number that tells this process from others of its pid. Small enough for readers that take numbers for doubles.
pub(crate) fn this_process() -> u64 {
    static DRAWN: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish() >> 12);
    *DRAWN
}

/// Waits until an operator asks for a drain.
pub(crate) async fn asked(mut drain: watch::Receiver<bool>) {
    if drain.wait_for(|asked| *asked).await.is_err() {
        // The membership ended without anybody asking.
        std::future::pending::<()>().await;
    }
}

/// Done when the view says that `worker` leaves: routers hear of it when this worker does.
pub(crate) async fn seen_leaving(fleet: &Client, worker: &WorkerId) {
    let mut views = fleet.changed();
    let leaving = |view: &Arc<View>| {
        let ready = |record: &Arc<WorkerRecord>| record.state == WorkerState::Ready;
        !view.worker(worker).is_some_and(ready) || view.drain.contains(worker)
    };
    if views.wait_for(leaving).await.is_err() {
        // The client ends with this worker only.
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn others_are_told_where_to_reach_a_worker() {
        let told = |advertise, address: &str| told_address(advertise, address.parse().unwrap());
        assert_eq!(told(None, "127.0.0.1:7500"), "127.0.0.1:7500");
        assert_eq!(told(None, "[::1]:7500"), "[::1]:7500");
        assert_eq!(told(Some("node-3.fleet.local"), "0.0.0.0:7500"), "node-3.fleet.local:7500");
        assert_eq!(told(Some("fd00::3"), "[::]:7500"), "[fd00::3]:7500");
        assert!(this_process() != 0 && this_process() == this_process() && this_process() < 1 << 53);
    }

    #[test]
    fn the_end_of_a_membership_is_no_wish_to_drain() {
        let (ask, wish) = watch::channel(false);
        assert_eq!(asked(wish.clone()).now_or_never(), None);
        ask.send_replace(true);
        assert_eq!(asked(wish.clone()).now_or_never(), Some(()));
        ask.send_replace(false);
        drop(ask);
        assert_eq!(asked(wish).now_or_never(), None);
    }
}
