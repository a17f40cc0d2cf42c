//! A worker whose requests are served by a server of another project that it stands beside.
//!
//! ```text
//!  router ──requests──► server (vLLM, SGLang, llama.cpp, TGI, another gateway...)
//!     │                   ▲ health, gauges, in doubt a canary
//!     └──state──► Sidecar ┘
//!  conductor ◄── Membership
//! ```
//!
//! It brings the server into the fleet, says where it is, watches over it and takes it out again. It sees no request:
//! routers send those straight to the server, so that they go on whatever becomes of the sidecar.

use std::net::SocketAddr;
use std::sync::Arc;

use baton_conductor::client::ClientError;
use baton_conductor::{
    Client, ClientOptions, JoinError, Load, Membership, Registration, TlsError, WorkerState,
};
use baton_config::secret::SecretFault;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::http::{Drain, Life, Phase};
use crate::listen;
use crate::member::{self, CLOSE_TIMEOUT, LOAD_INTERVAL, SETTLE_TIMEOUT, asked, seen_leaving, told_address};
use crate::run::Stop;

mod gauges;
mod health;
mod http;
mod metrics;
mod options;
mod probe;
mod watcher;

use health::Verdict;
pub use options::{SidecarOptions, SidecarOptionsError};
use probe::Prober;
use watcher::{Seen, Watcher};

/// Why a sidecar did not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum SidecarError {
    /// The server's key can't be had.
    #[error("the key of the server cannot be read")]
    Key(#[from] SecretFault),
    /// The server's certificate could not be checked.
    #[error("the server cannot be trusted")]
    Trust(#[from] TlsError),
    /// No HTTP client, metrics or address to be had.
    #[error("the system gives no {what}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The conductors' addresses are no good.
    #[error("the conductor cannot be followed")]
    Conductor(#[from] ClientError),
    /// The fleet did not take this worker.
    #[error("cannot join the fleet")]
    Join(#[from] JoinError),
}

impl SidecarError {
    /// Whether what the fleet document names has to be put right first.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Key(_) | Self::Trust(_))
    }

    fn system<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        what: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what, source: source.into() }
    }
}

/// What the parts of a sidecar share.
#[derive(Debug)]
struct Shared {
    options: SidecarOptions,
    seen: watch::Receiver<Seen>,
    metrics: metrics::Metrics,
    phase: watch::Sender<Phase>,
    life: watch::Sender<Option<Life>>,
    /// Asks this worker to drain.
    drain: CancellationToken,
    /// Everything ends.
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Runs a sidecar until it is told to stop, or an operator drains it. Must be called within a tokio runtime.
///
/// # Errors
/// When it can't start, or the fleet refuses it. A server that is not there is waited for.
pub async fn run(options: SidecarOptions, listener: TcpListener, stop: Stop) -> Result<(), SidecarError> {
    let address = listener.local_addr().map_err(SidecarError::system("address"))?;
    let metrics = metrics::Metrics::new().map_err(SidecarError::system("metrics"))?;
    let prober = Prober::new(&options)?;
    let fleet = Client::start(ClientOptions {
        access: options.conductor_access.clone(),
        metadata: false,
        ..ClientOptions::new(options.conductors.clone())
    })?;
    let (send, seen) = watch::channel(Seen::default());
    let shared = Arc::new(Shared {
        options,
        seen,
        metrics: metrics.clone(),
        phase: watch::Sender::new(Phase::Joining),
        life: watch::Sender::new(None),
        drain: CancellationToken::new(),
        stop: CancellationToken::new(),
        tasks: TaskTracker::new(),
    });
    let watcher = Watcher { prober, seen: send, metrics };
    let ended = shared.stop.clone();
    shared.tasks.spawn(async move { ended.run_until_cancelled(watcher.run()).await });
    listen::serve(listener, http::routes(Arc::clone(&shared)), &shared.tasks, shared.stop.clone());
    let sidecar = Sidecar { shared, fleet, stop };
    let end = match sidecar.join(address).await {
        Ok(Some(membership)) => {
            sidecar.serve(&membership).await;
            membership.leave().await;
            Ok(())
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    sidecar.close().await;
    end
}

struct Sidecar {
    shared: Arc<Shared>,
    fleet: Client,
    stop: Stop,
}

/// Who asked for a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asker {
    /// Whoever stops this process.
    Signal,
    /// An operator, who wants to hear when nothing is left on the server.
    Operator,
}

impl Sidecar {
    /// Takes a lease on the name; the worker is in view as joining. `None` when it was told to end before.
    async fn join(&self, address: SocketAddr) -> Result<Option<Membership>, SidecarError> {
        let options = &self.shared.options;
        let address = told_address(options.advertise.as_deref(), address);
        let registration = Registration {
            worker: options.worker.clone(),
            pool: options.pool.clone(),
            role: options.role,
            model: options.model.clone(),
            engine: "openai".to_owned(),
            kv: None,
            server: Some(options.server_told(&address)),
            address,
            transfer: String::new(),
            state: WorkerState::Joining,
        };
        Ok(member::join(&self.fleet, registration, options.join_timeout, &self.stop.drain).await?)
    }

    /// Waits for the server, serves until told to stop, then drains.
    async fn serve(&self, membership: &Membership) {
        let shared = &self.shared;
        let options = &shared.options;
        let drain_asked = self.drain_asked(membership);
        tokio::pin!(drain_asked);
        let well = async {
            let mut seen = shared.seen.clone();
            // The watcher ends with this worker only.
            let _ = seen.wait_for(|seen| seen.verdict == Verdict::Well).await;
        };
        let started = async {
            tokio::select! {
                biased;
                asker = &mut drain_asked => Err(asker),
                () = well => Ok(()),
            }
        };
        let asker = match self.upkeep(membership, started).await {
            None => return,
            Some(Err(asker)) => asker,
            Some(Ok(())) => {
                shared.phase.send_replace(Phase::Ready);
                membership.set_state(WorkerState::Ready);
                tracing::info!(worker = %options.worker, server = options.server, "ready");
                match self.upkeep(membership, &mut drain_asked).await {
                    None => return,
                    Some(asker) => asker,
                }
            }
        };
        let since = Instant::now();
        let drain = Drain { since, until: since + options.drain_grace };
        shared.phase.send_replace(Phase::Leaving(drain));
        membership.set_state(WorkerState::Draining);
        tracing::info!(worker = %options.worker, ?asker, "draining");
        let settled = tokio::time::timeout(SETTLE_TIMEOUT, seen_leaving(&self.fleet, &options.worker));
        if self.upkeep(membership, settled).await.is_none() {
            return;
        }
        shared.phase.send_replace(Phase::Draining(drain));
        if asker == Asker::Operator {
            let idle = tokio::time::timeout_at(drain.until, self.idle());
            if let Some(Err(_)) = self.upkeep(membership, idle).await {
                tracing::warn!("the time to drain is over with requests on the server");
            }
        }
    }

    /// Keeps the worker going until something is done; `None` after the second signal.
    async fn upkeep<T>(&self, membership: &Membership, done: impl Future<Output = T>) -> Option<T> {
        let mut loads = tokio::time::interval(LOAD_INTERVAL);
        let mut epochs = membership.epoch();
        epochs.mark_changed();
        tokio::pin!(done);
        loop {
            tokio::select! {
                biased;
                () = self.stop.now.cancelled() => return None,
                out = &mut done => return Some(out),
                Ok(()) = epochs.changed() => {
                    let epoch = *epochs.borrow_and_update();
                    self.shared.life.send_if_modified(|life| {
                        let news = epoch.filter(|epoch| life.is_none_or(|life| life.epoch != *epoch));
                        if let Some(epoch) = news {
                            *life = Some(Life { epoch, since: Instant::now() });
                        }
                        news.is_some()
                    });
                }
                _ = loads.tick() => membership.set_load(self.load()),
            }
        }
    }

    fn load(&self) -> Load {
        let seen = self.shared.seen.borrow();
        let gauges = seen.gauges.unwrap_or_default();
        Load {
            requests_running: gauges.running,
            requests_waiting: gauges.waiting,
            last_error: seen.last_error.as_ref().map(|mishap| mishap.what.clone()),
            ..Load::default()
        }
    }

    async fn drain_asked(&self, membership: &Membership) -> Asker {
        tokio::select! {
            biased;
            () = self.stop.drain.cancelled() => Asker::Signal,
            () = self.shared.drain.cancelled() => Asker::Operator,
            () = asked(membership.drain_requested()) => Asker::Operator,
        }
    }

    /// Done when the server says that it has no request, or is gone. Of one that does not tell, nothing is waited for:
    /// requests do not depend on this process.
    async fn idle(&self) {
        let mut seen = self.shared.seen.clone();
        let since = Instant::now();
        let idle = |seen: &Seen| {
            // What it told before the routers heard may have been followed by more.
            let fresh = seen.at.is_some_and(|at| at > since);
            seen.gone || (fresh && seen.gauges.is_none_or(|gauges| gauges.requests() == 0))
        };
        if seen.wait_for(idle).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    async fn close(self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        if tokio::time::timeout(CLOSE_TIMEOUT, self.shared.tasks.wait()).await.is_err() {
            tracing::warn!("connections did not end in time");
        }
        if tokio::time::timeout(CLOSE_TIMEOUT, self.fleet.close()).await.is_err() {
            tracing::warn!("the fleet's view did not end in time");
        }
    }
}

#[cfg(test)]
mod tests;
