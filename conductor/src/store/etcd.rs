//! The store of several conductors: etcd, asked one member at a time.
//!
//! ```text
//! call ──► Link (one connection to the pinned member) ──answer──► done
//!             ▲            │ error, or silence of 0.75 s
//!             └─ next member, after a pause ◄┘
//! ```
//! - A read, a lease call, and whatever was surely not done, is repeated at the next member within one deadline.
//! - A transaction whose outcome nobody knows is repeated only if it makes its own repetition fail (it puts a key that
//!   it also compares), and the key then tells whether it was done. Any other is reported as unknown and not repeated.
//! - A watch that falls silent is asked for its progress each second, and is dead after three questions.
//! - A member of another cluster than the first one seen is refused: its revisions mean something else.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use baton_config::secret::{self, SecretFault};
use etcd_client::{Error, GetOptions, ResponseHeader, TxnOpResponse};
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::{
    Batch, KeyValue, Lease, LeaseId, PAGE_MAX_KEYS, Page, Revision, Store, StoreError, StoreHealth, Txn,
    TxnReply, WatchError, check_key, check_txn,
};
use crate::dice::Dice;

mod convert;
mod link;
mod liveness;
mod pin;
mod watch;

use convert::{Guard, Prefix, revision};
use link::{Failure, Link};
use pin::Pin;

/// Limit of one attempt at a member.
const CALL_TIMEOUT: Duration = Duration::from_millis(750);
/// Limit of a call with all its attempts: less than what the conductor's own clients wait for.
const DEADLINE: Duration = Duration::from_millis(1250);
/// Limits of a page, which may be large.
const PAGE_TIMEOUT: Duration = Duration::from_secs(2);
const PAGE_DEADLINE: Duration = Duration::from_secs(5);
/// How often the member is asked how it is.
const STATUS_EVERY: Duration = Duration::from_secs(2);
/// Leases whose time is remembered.
const LEASES_MAX: usize = 65_536;
const NO_SPACE: &str =
    "etcd has no space: no new worker can join; compact, defragment, then `etcdctl alarm disarm`";

/// How to reach etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdOptions {
    /// `http://HOST:PORT` or `https://HOST:PORT` of each member, tried in order.
    pub endpoints: Vec<String>,
    /// Below which key everything is kept.
    pub prefix: String,
    /// Certificates, for `https`.
    pub tls: Option<EtcdTls>,
    /// User and password.
    pub auth: Option<EtcdAuth>,
}

/// Certificates for etcd, as PEM files; read anew for each connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// Authority that signed the servers' certificates.
    pub ca_file: PathBuf,
    /// Certificate and key of this client.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A user of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdAuth {
    /// Name.
    pub user: String,
    /// File that holds the password; read anew for each connection.
    pub password_file: PathBuf,
}

impl EtcdOptions {
    /// Options without TLS and password.
    pub fn new(endpoints: Vec<String>, prefix: &str) -> Self {
        Self { endpoints, prefix: prefix.to_owned(), tls: None, auth: None }
    }
}

/// Why a conductor can't even try to reach etcd.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// The list of endpoints is empty.
    #[error("no endpoint of etcd is given")]
    NoEndpoint,
    /// A file of certificates or secrets can't be used.
    #[error(transparent)]
    File(#[from] SecretFault),
    /// A file of certificates holds something else.
    #[error("{} holds no {what} in PEM form", path.display())]
    Pem {
        /// Its path.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
    },
}

/// A handle to the store.
#[derive(Debug, Clone)]
pub struct Etcd {
    inner: Arc<Inner>,
}

struct Inner {
    options: EtcdOptions,
    prefix: Prefix,
    state: Mutex<State>,
    /// Held by whoever connects, so that all wait for one connection.
    connecting: tokio::sync::Mutex<()>,
    /// Times of leases: an answer to a keepalive does not always tell.
    leases: Mutex<HashMap<LeaseId, Duration>>,
    _stop_on_drop: DropGuard,
}

#[derive(Debug)]
struct State {
    pin: Pin,
    link: Option<Link>,
    /// Identity of the first cluster seen.
    cluster: Option<u64>,
    last_ok: Option<Instant>,
    up: bool,
    /// Why the last call failed.
    failure: Option<String>,
    /// What the members complain of.
    alarm: Option<String>,
}

impl Etcd {
    /// Starts a store. It connects in the background and when asked: an etcd that is away is no error.
    ///
    /// # Errors
    /// [`EtcdError`] if it could never be reached this way.
    pub fn start(options: EtcdOptions, tasks: &TaskTracker) -> Result<Self, EtcdError> {
        if options.endpoints.is_empty() {
            return Err(EtcdError::NoEndpoint);
        }
        check_files(&options)?;
        let stop = CancellationToken::new();
        let state = State {
            pin: Pin::new(options.endpoints.len(), Instant::now(), Dice::from_entropy()),
            link: None,
            cluster: None,
            last_ok: None,
            up: false,
            failure: None,
            alarm: None,
        };
        let prefix = Prefix::new(&options.prefix);
        tracing::info!(
            endpoints = options.endpoints.join(" "),
            prefix = prefix.as_str(),
            "etcd store starts"
        );
        let inner = Arc::new(Inner {
            options,
            prefix,
            state: Mutex::new(state),
            connecting: tokio::sync::Mutex::default(),
            leases: Mutex::default(),
            _stop_on_drop: stop.clone().drop_guard(),
        });
        let monitor = monitor(Arc::downgrade(&inner));
        tasks.spawn(stop.run_until_cancelled_owned(monitor));
        Ok(Self { inner })
    }
}

/// Asks the pinned member how it is, so that trouble is known before anybody needs the store.
async fn monitor(inner: Weak<Inner>) {
    while let Some(inner) = inner.upgrade() {
        inner.look().await;
        drop(inner);
        tokio::time::sleep(STATUS_EVERY).await;
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection everybody uses, made if there is none.
    async fn link(&self) -> Result<Link, Failure> {
        if let Some(link) = self.lock().link.clone() {
            return Ok(link);
        }
        let _turn = self.connecting.lock().await;
        let (place, not_before) = {
            let state = self.lock();
            if let Some(link) = state.link.clone() {
                return Ok(link);
            }
            (state.pin.place(), state.pin.not_before())
        };
        sleep_until(not_before).await;
        let opened = Link::open(&self.options, place).await.and_then(|link| self.same_cluster(link));
        match opened {
            Ok(link) => {
                let mut state = self.lock();
                state.link = Some(link.clone());
                drop(state);
                tracing::info!(endpoint = self.options.endpoints[place.endpoint], "connected to etcd");
                Ok(link)
            }
            Err(failure) => {
                // Whatever this member has against us, another may not, or not later.
                let failure = Failure::NotDone(to_error(failure, None).reason());
                self.bad(place.generation, &failure);
                Err(failure)
            }
        }
    }

    fn same_cluster(&self, link: Link) -> Result<Link, Failure> {
        let known = *self.lock().cluster.get_or_insert(link.cluster);
        if known == link.cluster {
            return Ok(link);
        }
        Err(Failure::NotDone(format!(
            "it belongs to the cluster {:016x} and not to {known:016x}: restart the conductors if etcd was made anew",
            link.cluster
        )))
    }

    /// The member answered.
    fn good(&self, generation: u64) {
        let mut state = self.lock();
        state.pin.good(generation);
        state.last_ok = Some(Instant::now());
        state.up = true;
        state.failure = None;
    }

    /// The member did not answer, or nothing useful: the next one is asked from now on.
    fn bad(&self, generation: u64, failure: &Failure) {
        let mut state = self.lock();
        let endpoint = &self.options.endpoints[state.pin.place().endpoint];
        let (Failure::NotDone(what) | Failure::Unknown(what)) = failure else { return };
        let text = format!("etcd at {endpoint}: {what}");
        if !state.pin.failed(Instant::now(), generation) {
            return;
        }
        if state.up || state.failure.is_none() {
            tracing::warn!(reason = text, "etcd does not answer; asking the next member");
        } else {
            tracing::debug!(reason = text, "etcd still does not answer");
        }
        state.link = None;
        state.up = false;
        state.failure = Some(text);
    }

    /// One attempt at the pinned member.
    async fn attempt<T, F>(
        &self,
        limit: Duration,
        deadline: Instant,
        call: impl FnOnce(Link) -> F + Send,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let away = |_| {
            let reason = self.lock().failure.clone();
            Failure::NotDone(reason.unwrap_or_else(|| "no member of etcd answers".to_owned()))
        };
        let link = timeout_at(deadline, self.link()).await.map_err(away)??;
        let generation = link.place.generation;
        let until = deadline.min(Instant::now() + limit);
        let failure = match timeout_at(until, call(link)).await {
            Ok(Ok(answer)) => {
                self.good(generation);
                return Ok(answer);
            }
            Ok(Err(error)) => link::classify(&error),
            Err(_) => Failure::Unknown(format!("no answer within {limit:?}")),
        };
        match &failure {
            Failure::NotDone(_) | Failure::Unknown(_) => self.bad(generation, &failure),
            Failure::NoSpace => self.lock().alarm = Some(NO_SPACE.to_owned()),
            Failure::Final(_) | Failure::NoLease | Failure::TooLarge => self.good(generation),
        }
        Err(failure)
    }

    /// Attempts until there is an answer: for what may be done twice.
    async fn repeat<T, F>(
        &self,
        limit: Duration,
        deadline: Duration,
        call: impl Fn(Link) -> F + Send + Sync,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        let deadline = Instant::now() + deadline;
        loop {
            match self.attempt(limit, deadline, &call).await {
                Err(Failure::NotDone(_) | Failure::Unknown(_)) if Instant::now() < deadline => {}
                done => return done,
            }
        }
    }

    /// As [`Inner::repeat`], for calls that know nothing of leases.
    async fn ask<T, F>(
        &self,
        limit: Duration,
        deadline: Duration,
        call: impl Fn(Link) -> F + Send + Sync,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>> + Send,
    {
        self.repeat(limit, deadline, call).await.map_err(|failure| to_error(failure, None))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnReply, StoreError> {
        check_txn(&txn)?;
        let guard = Guard::of(&txn);
        let lease = txn.ops.iter().find_map(|op| match op {
            super::Op::Put { lease, .. } => *lease,
            super::Op::Delete { .. } => None,
        });
        let deadline = Instant::now() + DEADLINE;
        let mut unsure: Option<String> = None;
        loop {
            let look = guard.as_ref().filter(|_| unsure.is_some()).map(|guard| guard.key);
            let asked = self.prefix.txn(&txn, look);
            let attempt =
                self.attempt(CALL_TIMEOUT, deadline, |mut link| async move { link.kv.txn(asked).await });
            let failure = match attempt.await {
                Ok(reply) if reply.succeeded() || unsure.is_none() => {
                    if reply.succeeded() && txn.ops.iter().any(|op| matches!(op, super::Op::Put { .. })) {
                        self.lock().alarm.take_if(|alarm| alarm == NO_SPACE);
                    }
                    let revision = at(reply.header());
                    return Ok(TxnReply { succeeded: reply.succeeded(), revision });
                }
                Ok(reply) => {
                    // An earlier attempt may have been done, and so made this one fail: then the key shows it.
                    let found = reply.op_responses().into_iter().find_map(|response| match response {
                        TxnOpResponse::Get(got) => got.kvs().first().and_then(|kv| self.prefix.key_value(kv)),
                        _ => None,
                    });
                    return match guard.as_ref().and_then(|guard| guard.done(found.as_ref())) {
                        Some(revision) => Ok(TxnReply { succeeded: true, revision }),
                        None => Err(unknown(&unsure.unwrap_or_default())),
                    };
                }
                Err(failure) => failure,
            };
            match failure {
                Failure::Unknown(what) if guard.is_some() => unsure = Some(what),
                Failure::Unknown(what) => return Err(unknown(&what)),
                Failure::NotDone(_) => {}
                // Definite, but only for this attempt.
                failure if unsure.is_none() => return Err(to_error(failure, lease)),
                _ => return Err(unknown(&unsure.unwrap_or_default())),
            }
            if Instant::now() >= deadline {
                return Err(match unsure {
                    Some(what) => unknown(&what),
                    None => to_error(failure_text(&self.lock()), lease),
                });
            }
        }
    }

    async fn keep_alive(&self, id: LeaseId) -> Result<Option<Duration>, StoreError> {
        let number = id.0.cast_signed();
        let known = self.leases().get(&id).copied();
        let kept = self.repeat(CALL_TIMEOUT, DEADLINE, |mut link| async move {
            // The first answer is taken by the client, which says no more than that the lease is there.
            let (mut keeper, mut answers) = link.lease.keep_alive(number).await?;
            if let Some(ttl) = known {
                return Ok(Some(ttl));
            }
            keeper.keep_alive().await?;
            let answer = answers.message().await?;
            Ok(answer.and_then(|answer| u64::try_from(answer.ttl()).ok()).map(Duration::from_secs))
        });
        match kept.await {
            Ok(Some(ttl)) if !ttl.is_zero() => {
                self.remember(id, ttl);
                Ok(Some(ttl))
            }
            Ok(_) | Err(Failure::NoLease) => {
                self.leases().remove(&id);
                Ok(None)
            }
            Err(failure) => Err(to_error(failure, Some(id))),
        }
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let whole = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(whole.max(1)).unwrap_or(i64::MAX);
        // A lease granted twice because an answer was lost holds nothing, and ends by itself.
        let reply =
            self.ask(CALL_TIMEOUT, DEADLINE, |mut link| async move { link.lease.grant(seconds, None).await });
        let reply = reply.await?;
        self.lock().alarm.take_if(|alarm| alarm == NO_SPACE);
        let ttl = Duration::from_secs(u64::try_from(reply.ttl()).unwrap_or(0));
        let id = LeaseId(reply.id().cast_unsigned());
        self.remember(id, ttl);
        Ok(Lease { id, ttl })
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError> {
        let limit = limit.clamp(1, PAGE_MAX_KEYS);
        let first = self.prefix.add(prefix);
        let end = after_all(first.as_bytes());
        let mut from = match after {
            Some(after) if after >= prefix => next_key(self.prefix.add(after).as_bytes()),
            _ => first.into_bytes(),
        };
        loop {
            let call = |mut link: Link| {
                let options = GetOptions::new()
                    .with_range(end.clone())
                    .with_limit(i64::try_from(limit).unwrap_or(i64::MAX));
                let from = from.clone();
                async move { link.kv.get(from, Some(options)).await }
            };
            let reply = self.ask(PAGE_TIMEOUT, PAGE_DEADLINE, call).await?;
            let items: Vec<KeyValue> =
                reply.kvs().iter().filter_map(|kv| self.prefix.key_value(kv)).collect();
            // A page of keys that no conductor wrote would look like the end.
            match reply.kvs().last() {
                Some(last) if items.is_empty() && reply.more() => from = next_key(last.key()),
                _ => return Ok(Page { revision: at(reply.header()), items, more: reply.more() }),
            }
        }
    }

    async fn get(&self, key: &str) -> Result<Option<KeyValue>, StoreError> {
        let full = self.prefix.add(key);
        let call = |mut link: Link| {
            let full = full.clone();
            async move { link.kv.get(full, None).await }
        };
        let reply = self.ask(CALL_TIMEOUT, DEADLINE, call).await?;
        Ok(reply.kvs().first().and_then(|kv| self.prefix.key_value(kv)))
    }

    /// The store's revision now, which no member may answer from its past.
    async fn current(&self) -> Result<Revision, StoreError> {
        let key = self.prefix.as_str();
        let call =
            |mut link: Link| async move { link.kv.get(key, Some(GetOptions::new().with_count_only())).await };
        let reply = self.ask(CALL_TIMEOUT, DEADLINE, call).await?;
        Ok(at(reply.header()))
    }

    /// One look at the member's own complaints.
    async fn look(&self) {
        let deadline = Instant::now() + CALL_TIMEOUT;
        let status =
            self.attempt(CALL_TIMEOUT, deadline, |mut link| async move { link.maintenance.status().await });
        if let Ok(status) = status.await {
            let complains = |of: &str| status.errors().iter().any(|error| error.contains(of));
            let alarm = if complains("NOSPACE") {
                Some(NO_SPACE.to_owned())
            } else if complains("CORRUPT") {
                Some("etcd found its members' data to differ (alarm CORRUPT): see its log".to_owned())
            } else {
                None
            };
            let mut state = self.lock();
            if state.alarm != alarm {
                match &alarm {
                    Some(alarm) => tracing::error!(alarm, "etcd raised an alarm"),
                    None => tracing::info!("etcd's alarm is over"),
                }
                state.alarm = alarm;
            }
        }
    }

    fn leases(&self) -> MutexGuard<'_, HashMap<LeaseId, Duration>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, id: LeaseId, ttl: Duration) {
        let mut leases = self.leases();
        if leases.len() >= LEASES_MAX {
            // Those still in use are found out again with their next keepalive.
            leases.clear();
        }
        leases.insert(id, ttl);
    }
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd").field("options", &self.options).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Store for Etcd {
    fn kind(&self) -> &'static str {
        "etcd"
    }

    fn instance(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(async {
            let known = self.inner.lock().cluster;
            let cluster = match known {
                Some(cluster) => cluster,
                None => {
                    let call = |link: Link| async move { Ok(link.cluster) };
                    self.inner.ask(CALL_TIMEOUT, DEADLINE, call).await?
                }
            };
            Ok(format!("etcd:{cluster:016x}{}", self.inner.prefix.as_str()))
        })
    }

    fn health(&self) -> StoreHealth {
        let state = self.inner.lock();
        let endpoint = self.inner.options.endpoints.get(state.pin.place().endpoint).cloned();
        let problem = state.failure.clone().or_else(|| state.alarm.clone());
        let last_ok = state.last_ok.map(|at| at.elapsed());
        StoreHealth { kind: self.kind(), endpoint, up: state.up, last_ok, problem }
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(self.inner.list(prefix, after, limit))
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>> {
        Box::pin(async move {
            check_key(key)?;
            self.inner.get(key).await
        })
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnReply, StoreError>> {
        Box::pin(self.inner.txn(txn))
    }

    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<Lease, StoreError>> {
        Box::pin(self.inner.grant(ttl))
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<Option<Duration>, StoreError>> {
        Box::pin(self.inner.keep_alive(lease))
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.inner.leases().remove(&lease);
            let number = lease.0.cast_signed();
            let call = |mut link: Link| async move { link.lease.revoke(number).await };
            match self.inner.repeat(CALL_TIMEOUT, DEADLINE, call).await {
                Ok(_) | Err(Failure::NoLease) => Ok(()),
                Err(failure) => Err(to_error(failure, Some(lease))),
            }
        })
    }

    fn watch(&self, prefix: &str, since: Revision) -> BoxStream<'static, Result<Batch, WatchError>> {
        watch::watch(self.inner.clone(), prefix, since)
    }
}

impl StoreError {
    /// What went wrong, without whose fault it is.
    fn reason(self) -> String {
        match self {
            Self::Unavailable(what) | Self::Invalid(what) => what,
            Self::LeaseNotFound(_) => self.to_string(),
        }
    }
}

fn failure_text(state: &State) -> Failure {
    Failure::NotDone(state.failure.clone().unwrap_or_else(|| "etcd does not answer".to_owned()))
}

fn unknown(what: &str) -> StoreError {
    StoreError::Unavailable(format!("it is not known whether the write was done ({what})"))
}

fn to_error(failure: Failure, lease: Option<LeaseId>) -> StoreError {
    match (failure, lease) {
        (Failure::Final(error), _) => error,
        (Failure::NoLease, Some(lease)) => StoreError::LeaseNotFound(lease),
        (Failure::NoLease, None) => StoreError::Unavailable("etcd found nothing of that name".to_owned()),
        (Failure::NoSpace, _) => StoreError::Unavailable(NO_SPACE.to_owned()),
        (Failure::TooLarge, _) => StoreError::Unavailable("etcd's answer is too large".to_owned()),
        (Failure::NotDone(what) | Failure::Unknown(what), _) => StoreError::Unavailable(what),
    }
}

fn at(header: Option<&ResponseHeader>) -> Revision {
    header.map_or(0, |header| revision(header.revision()))
}

/// The first key after `key`.
fn next_key(key: &[u8]) -> Vec<u8> {
    let mut next = key.to_vec();
    next.push(0);
    next
}

/// The first key after all keys with this prefix.
fn after_all(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // To the end of all keys, as etcd writes it.
    vec![0]
}

/// A file that is not there will not appear by waiting for it: better said at the start than in a log for ever.
fn check_files(options: &EtcdOptions) -> Result<(), EtcdError> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};

    let certificate = |path: &PathBuf| {
        let pem = secret::read_public(path)?;
        let found = CertificateDer::pem_slice_iter(&pem).next().is_some_and(|first| first.is_ok());
        let what = "certificate";
        if found { Ok(()) } else { Err(EtcdError::Pem { path: path.clone(), what }) }
    };
    if let Some(tls) = &options.tls {
        certificate(&tls.ca_file)?;
        if let Some((cert_file, key_file)) = &tls.identity {
            certificate(cert_file)?;
            if PrivateKeyDer::from_pem_slice(&secret::read_secret(key_file)?).is_err() {
                return Err(EtcdError::Pem { path: key_file.clone(), what: "private key" });
            }
        }
    }
    if let Some(auth) = &options.auth {
        secret::read_secret(&auth.password_file)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
