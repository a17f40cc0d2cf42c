//! The listener: accepts, serves, drains.

mod ahead;
mod connection;
mod settled;
mod tls;
mod watched;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;
use std::time::Duration;

use baton_conductor::client::{Client, ClientError, ClientOptions};
use baton_config::Seldom;
use baton_config::fleet::Disaggregation;
use futures_util::future::BoxFuture;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admit::Gate;
use crate::dispatch::{Caller, Dispatcher};
use crate::fleet::{Fleet, Keeper, RosterFeed, roster};
use crate::forward::{Forwarder, ServersError};
use crate::gateway::{Apart, Gateway};
use crate::index::PrefixIndex;
use crate::metrics::Metrics;
use crate::model::{Model, ModelError};
use crate::options::RouterOptions;
use crate::room::Room;
use crate::schedule::Rules;
use crate::tenant::{Auth, AuthError};
use tls::Tls;

/// After an accept that failed for want of something (file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a router could not start or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The model directory cannot be served.
    #[error("the model cannot be served")]
    Model(#[from] ModelError),
    /// The metrics could not be set up.
    #[error("metrics could not be set up")]
    Metrics(#[from] prometheus::Error),
    /// The conductors cannot be asked.
    #[error("the conductor's client cannot start")]
    Conductor(#[from] ClientError),
    /// Who asks cannot be told.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// The servers that requests are passed on to cannot be called.
    #[error(transparent)]
    Servers(#[from] ServersError),
    /// The certificate cannot be shown.
    #[error("TLS cannot be spoken")]
    Tls(#[from] baton_conductor::TlsError),
    /// The listener is unusable.
    #[error("the listener is unusable")]
    Listener(#[source] std::io::Error),
}

/// How a router is told to stop.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Finish what is in flight, then end: the first signal.
    pub drain: CancellationToken,
    /// End now: the second signal.
    pub now: CancellationToken,
}

/// Serves until told to stop, with the fleet as the conductors have it.
///
/// # Errors
/// When the model directory is not usable or a conductor's URL is none; a router that has begun to serve ends without
/// an error.
pub async fn serve(options: RouterOptions, listener: TcpListener, stop: Stop) -> Result<(), ServeError> {
    let access = options.conductor_access.clone();
    let client = Client::start(ClientOptions {
        access,
        metadata: false,
        ..ClientOptions::new(options.conductors.clone())
    })?;
    let (feed, follower) = roster::follow(&client);
    let ended = CancellationToken::new();
    let following = TaskTracker::new();
    following.spawn({
        let ended = ended.clone();
        async move { ended.run_until_cancelled(follower).await }
    });
    let served = serve_with(options, feed, listener, stop).await;
    ended.cancel();
    following.close();
    following.wait().await;
    client.close().await;
    served
}

/// Serves until told to stop, with the fleet as `feed` has it.
///
/// # Errors
/// When the model directory is not usable; a router that has begun to serve ends without an error.
pub async fn serve_with(
    options: RouterOptions,
    feed: RosterFeed,
    listener: TcpListener,
    stop: Stop,
) -> Result<(), ServeError> {
    let address = listener.local_addr().map_err(ServeError::Listener)?;
    let model_options = options.model.clone();
    let model = match &options.forward {
        Some(_) => Model::elsewhere(&model_options),
        None => tokio::task::spawn_blocking(move || Model::load(&model_options))
            .await
            .map_err(|panicked| ServeError::Listener(std::io::Error::other(panicked)))??,
    };
    let metrics = Arc::new(Metrics::new()?);
    let auth = Arc::new(Auth::new(options.auth.as_ref(), Arc::clone(&metrics))?);
    let tls = options.tls.as_ref().map(Tls::load).transpose()?.map(Arc::new);
    let fleet = Arc::new(Fleet::new(PrefixIndex::new(options.index_memory)));
    let caller = Caller::new(options.timeouts.connect);
    let background = TaskTracker::new();
    let ended = CancellationToken::new();
    let keeper = Keeper {
        fleet: Arc::clone(&fleet),
        feed,
        caller: caller.clone(),
        metrics: Arc::clone(&metrics),
        tracker: background.clone(),
        stop: ended.clone(),
    };
    background.spawn(keeper.run());
    let until_end = |followed: BoxFuture<'static, ()>| {
        let ended = ended.clone();
        background.spawn(async move { ended.run_until_cancelled(followed).await });
    };
    until_end(Box::pin(Arc::clone(&auth).follow()));
    if let Some(tls) = &tls {
        until_end(Box::pin(Arc::clone(tls).follow()));
    }
    let dispatcher = Arc::new(dispatcher(&options, fleet, caller, Arc::clone(&metrics), model.vocab));
    let forwarder = |options| Forwarder::new(options, Arc::clone(&dispatcher)).map(Arc::new);
    let forward = options.forward.as_ref().map(forwarder).transpose()?;
    let gateway = Gateway { forward, ..gateway(&options, model, dispatcher, metrics, auth) };
    let gateway = Arc::new(gateway);
    tracing::info!(%address, model = gateway.model.id, "router serves");
    let server = Server {
        connections: Arc::new(Semaphore::new(options.limits.connections as usize)),
        tracker: TaskTracker::new(),
        closing: CancellationToken::new(),
        abort: stop.now.child_token(),
        gateway,
        tls,
    };
    server.run(listener, &stop).await;
    ended.cancel();
    background.close();
    background.wait().await;
    Ok(())
}

fn dispatcher(
    options: &RouterOptions,
    fleet: Arc<Fleet>,
    caller: Caller,
    metrics: Arc<Metrics>,
    vocab: u32,
) -> Dispatcher {
    let rules = Rules {
        policy: options.policy,
        // A server of another project keeps the KV cache that it computes.
        disaggregation: match &options.forward {
            Some(_) => Disaggregation::Never,
            None => options.disaggregation,
        },
        seed: options.seed,
        slo_itl_s: options.slo_itl.as_secs_f64(),
        spill_requests: (options.spill_requests > 0).then_some(options.spill_requests),
    };
    Dispatcher::new(fleet, caller, rules, options.timeouts.clone(), metrics, vocab)
}

fn gateway(
    options: &RouterOptions,
    model: Model,
    dispatcher: Arc<Dispatcher>,
    metrics: Arc<Metrics>,
    auth: Arc<Auth>,
) -> Gateway {
    let limits = &options.limits;
    let gate = Gate::new(limits.in_flight, limits.queue, options.timeouts.queue, Arc::clone(&metrics));
    Gateway {
        model: Arc::new(model),
        dispatcher,
        forward: None,
        gate: Arc::new(gate),
        auth,
        metrics,
        limits: limits.clone(),
        session_header: options.session_header.clone(),
        explain: options.explain,
        timeouts: options.timeouts.clone(),
        slo_wait: options.slo_wait,
        room: Room::new(limits.bodies, limits.body),
        apart: Apart::new(available_parallelism().map_or(2, usize::from)),
        accepting: AtomicBool::new(true),
    }
}

struct Server {
    gateway: Arc<Gateway>,
    tls: Option<Arc<Tls>>,
    connections: Arc<Semaphore>,
    tracker: TaskTracker,
    /// Connections end after the request they are at.
    closing: CancellationToken,
    /// Connections end at once.
    abort: CancellationToken,
}

impl Server {
    /// Accepts until told to drain, then sees the connections out.
    async fn run(self, listener: TcpListener, stop: &Stop) {
        tokio::select! {
            biased;
            () = stop.now.cancelled() => {}
            () = stop.drain.cancelled() => {}
            () = self.accept(&listener) => {}
        }
        // Readiness goes off while the listener still answers, so that a balancer can look away first.
        self.gateway.accepting.store(false, Ordering::Release);
        tracing::info!("router drains");
        let timeouts = &self.gateway.timeouts;
        tokio::select! {
            biased;
            () = stop.now.cancelled() => {}
            () = tokio::time::sleep(timeouts.settle) => {}
            () = self.accept(&listener) => {}
        }
        drop(listener);
        self.closing.cancel();
        self.tracker.close();
        tokio::select! {
            biased;
            () = stop.now.cancelled() => tracing::warn!(connections = self.tracker.len(), "router ends at once"),
            () = self.tracker.wait() => {}
            () = tokio::time::sleep(timeouts.grace) => {
                tracing::warn!(connections = self.tracker.len(), "grace is over");
            }
        }
        self.abort.cancel();
        self.tracker.wait().await;
        self.gateway.dispatcher.tracker.close();
        self.gateway.dispatcher.tracker.wait().await;
        self.gateway.dispatcher.caller.carriers().close().await;
    }

    async fn accept(&self, listener: &TcpListener) {
        let mut failures = Seldom::default();
        loop {
            // The permit first: what cannot be served yet waits in the kernel's queue.
            let Ok(permit) = Arc::clone(&self.connections).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => self.start(stream, permit),
                Err(error) => {
                    if failures.is_due(tokio::time::Instant::now().into_std()) {
                        tracing::warn!(%error, "connections cannot be accepted");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn start(&self, stream: TcpStream, permit: OwnedSemaphorePermit) {
        let connection = connection::Connection {
            gateway: Arc::clone(&self.gateway),
            tls: self.tls.clone(),
            tracker: self.tracker.clone(),
            closing: self.closing.clone(),
            abort: self.abort.clone(),
        };
        self.tracker.spawn(async move {
            connection.serve(stream).await;
            drop(permit);
        });
    }
}
