//! The caching client: the whole fleet in memory, kept up to date by a watch, kept as it was while the conductor is away.

use std::sync::Arc;
use std::time::Duration;

use baton_config::fleet::ConductorAccess;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::dice::{Backoff, Dice};
use crate::http::CallerError;

pub(crate) mod complaint;
mod follow;
pub(crate) mod transport;
mod view;

pub use transport::CallError;
pub use view::View;

use complaint::Complaints;
use follow::{Failure, Follower, Step, Timing};
use transport::{CallTiming, Lines, Transport};
use view::Contact;

/// How a client reaches the conductors.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// `http://host:port` or `https://host:port` of each conductor, tried in order.
    pub endpoints: Vec<String>,
    /// What is shown to them, and whom to believe; nothing by default.
    pub access: ConductorAccess,
    /// Whether the workers' transfer metadata is wanted; only those who move KV blocks have a use for it.
    pub metadata: bool,
    /// A conductor that sends nothing for so long is taken for dead (it sends a line each second).
    pub progress_timeout: Duration,
    /// Limit of a connection attempt.
    pub connect_timeout: Duration,
    /// Limit of a call.
    pub call_timeout: Duration,
}

impl ClientOptions {
    /// Options with the default times for these conductors.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            access: ConductorAccess::default(),
            metadata: true,
            progress_timeout: Duration::from_secs(3),
            connect_timeout: Duration::from_millis(500),
            call_timeout: Duration::from_millis(1500),
        }
    }
}

/// Why a client can't start.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The list of endpoints is empty.
    #[error("no conductor endpoint is given")]
    NoEndpoint,
    /// Not a URL of a conductor.
    #[error("conductor endpoint {endpoint:?} is not http://HOST:PORT or https://HOST:PORT")]
    Endpoint {
        /// The refused text.
        endpoint: String,
    },
    /// What is to be shown to conductors can't be used.
    #[error("conductors cannot be called")]
    Access(#[from] CallerError),
}

/// A handle to the cached fleet; clones share one watch, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    views: watch::Receiver<Arc<View>>,
    transport: Transport,
    tasks: TaskTracker,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
}

impl Client {
    /// Starts to follow the fleet in the background; the first view is empty and stale.
    ///
    /// # Errors
    /// If an endpoint is not a URL, there is none, or a file of `access` can't be used. An unreachable conductor is no
    /// error.
    pub fn start(options: ClientOptions) -> Result<Self, ClientError> {
        let endpoints = options.endpoints.iter().map(|e| parse_endpoint(e)).collect::<Result<Vec<_>, _>>()?;
        if endpoints.is_empty() {
            return Err(ClientError::NoEndpoint);
        }
        let timing = CallTiming { connect: options.connect_timeout, call: options.call_timeout };
        let count = endpoints.len();
        let transport = Transport::new(endpoints, options.access, timing)?;
        let transport = if options.metadata { transport } else { transport.without_metadata() };
        let contact = Arc::new(Contact::new(Instant::now()));
        let (publish, views) = watch::channel(Arc::new(View::empty(contact.clone())));
        let timing = Timing { progress_timeout: options.progress_timeout, backoff: Backoff::CONDUCTOR };
        let follower = Follower::new(count, timing, Dice::from_entropy(), contact);
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        tasks.spawn(stop.clone().run_until_cancelled_owned(follow(follower, transport.clone(), publish)));
        tasks.close();
        let guard = stop.clone().drop_guard();
        Ok(Self { inner: Arc::new(Inner { views, transport, tasks, stop, _stop_on_drop: guard }) })
    }

    /// The latest view; never leaves the process.
    pub fn view(&self) -> Arc<View> {
        self.inner.views.borrow().clone()
    }

    /// A receiver of all further views.
    pub fn changed(&self) -> watch::Receiver<Arc<View>> {
        self.inner.views.clone()
    }

    /// Waits until a view satisfies `wanted` and returns it.
    ///
    /// Waits for ever if none does: put a deadline around it.
    pub async fn wait_for(&self, mut wanted: impl FnMut(&View) -> bool) -> Arc<View> {
        let mut views = self.inner.views.clone();
        match views.wait_for(|view| wanted(view)).await {
            Ok(view) => view.clone(),
            // The follower ended because the client was closed: nothing will ever come.
            Err(_) => std::future::pending().await,
        }
    }

    /// The conductors' base URLs.
    pub fn endpoints(&self) -> &[String] {
        self.inner.transport.endpoints()
    }

    /// Stops following, also for all clones, and waits for the task to end.
    pub async fn close(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.wait().await;
    }

    pub(crate) fn transport(&self) -> &Transport {
        &self.inner.transport
    }
}

fn parse_endpoint(text: &str) -> Result<String, ClientError> {
    let refused = || ClientError::Endpoint { endpoint: text.to_owned() };
    let trimmed = text.trim_end_matches('/');
    let full = if trimmed.contains("://") { trimmed.to_owned() } else { format!("http://{trimmed}") };
    let url = reqwest::Url::parse(&full).map_err(|_| refused())?;
    let good = matches!(url.scheme(), "http" | "https")
        && url.has_host()
        && url.path() == "/"
        && url.query().is_none()
        && url.username().is_empty();
    if good { Ok(full) } else { Err(refused()) }
}

/// Drives the follower: does what it says, reports back, publishes.
async fn follow(mut follower: Follower, transport: Transport, publish: watch::Sender<Arc<View>>) {
    let mut open: Option<Lines> = None;
    let mut complaints = Complaints::default();
    loop {
        let step = follower.step(Instant::now());
        if !matches!(step, Step::Read { .. }) {
            open = None;
        }
        match step {
            Step::List { endpoint } => match transport.list(endpoint).await {
                Ok(listing) => follower.listed(Instant::now(), listing),
                Err(error) => report(&mut follower, &mut complaints, &error),
            },
            Step::Watch { endpoint, since } => match transport.watch(endpoint, since).await {
                Ok(lines) => {
                    open = Some(lines);
                    follower.opened(Instant::now());
                }
                Err(error) => report(&mut follower, &mut complaints, &error),
            },
            Step::Read { until } => read(&mut follower, &mut complaints, open.as_mut(), until).await,
            Step::Wait { until } => tokio::time::sleep_until(until).await,
        }
        if let Some(view) = follower.take_view() {
            publish.send_replace(Arc::new(view));
        }
    }
}

async fn read(
    follower: &mut Follower,
    complaints: &mut Complaints,
    open: Option<&mut Lines>,
    until: Instant,
) {
    let Some(lines) = open else {
        follower.failed(Instant::now(), Failure::Away);
        return;
    };
    match tokio::time::timeout_at(until, lines.next()).await {
        Ok(Ok(Some(line))) => {
            if complaints.settle() {
                tracing::info!(endpoint = lines.endpoint(), "the view of the fleet is being updated again");
            }
            follower.line(Instant::now(), line);
        }
        Ok(Ok(None)) => {
            if complaints.is_news("the watch ended") {
                tracing::warn!(endpoint = lines.endpoint(), "the conductor ended the watch");
            }
            follower.failed(Instant::now(), Failure::Away);
        }
        Ok(Err(error)) => report(follower, complaints, &error),
        Err(_) => follower.tick(Instant::now()),
    }
}

fn report(follower: &mut Follower, complaints: &mut Complaints, error: &CallError) {
    let failure = match error {
        CallError::Refused { detail, .. } if detail.code == "future_revision" => Failure::Revision,
        _ => Failure::Away,
    };
    let cause: &dyn std::error::Error = error;
    if complaints.is_news(&error.to_string()) {
        tracing::warn!(error = cause, "the view of the fleet is not being updated");
    } else {
        tracing::debug!(error = cause, "still no conductor");
    }
    follower.failed(Instant::now(), failure);
}
