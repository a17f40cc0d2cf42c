//! SIGINT and SIGTERM: the first drains, the second ends now.

use std::pin::pin;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// Time a part has to end after the second signal.
const LAST_GRACE: Duration = Duration::from_secs(1);

/// How a part is told to end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    /// Finish what is in flight, then end: the first signal.
    pub(crate) drain: CancellationToken,
    /// End now: the second signal.
    pub(crate) now: CancellationToken,
}

/// Both signals that ask a process to end.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Starts listening; must run inside a runtime.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let open = |kind| signal(kind).map_err(|e| Failure::because("cannot listen for signals", &e));
        Ok(Self { interrupt: open(SignalKind::interrupt())?, terminate: open(SignalKind::terminate())? })
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Runs a part until it ends, passing signals on to it; after the second one it is not waited for.
pub(crate) async fn run_until_signalled<F: Future<Output = Result<(), Failure>>>(
    part: impl FnOnce(Stop) -> F,
) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let stop = Stop::default();
    let mut part = pin!(part(stop.clone()));
    for token in [&stop.drain, &stop.now] {
        tokio::select! {
            biased;
            ended = &mut part => return ended,
            () = signals.next() => token.cancel(),
        }
    }
    let hurried = tokio::time::timeout(LAST_GRACE, part).await;
    hurried.unwrap_or_else(|_| Err(Failure::failed("ended by a second signal before everything was drained")))
}
