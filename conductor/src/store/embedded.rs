//! The store of one conductor: memory, owned by one task, with operators' wishes and a revision ceiling on disk.
//!
//! Discovery state is soft state: workers register anew after a restart. What must survive is (a) that revisions,
//! and with them epochs, never go back, and (b) what operators asked for. Revisions begin above everything given out
//! before: above the stored ceiling and above the clock in microseconds since 1970, which stays ahead as long as the
//! store takes fewer than a million writes a second and the clock is not set back while the file is missing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::memory::Memory;
use super::state_file::{Durable, StateFile};
use super::{
    Batch, KeyValue, Lease, LeaseId, Op, Page, Revision, Store, StoreError, StoreHealth, Txn, TxnReply,
    WatchError,
};
use crate::dice::random_id;

pub use super::state_file::StateFileError;

/// Keys with this prefix survive a restart.
pub const DURABLE_PREFIX: &str = "intents/";

/// Calls waiting for the owner; callers beyond it wait to get in line.
const QUEUE: usize = 1024;
/// Revisions reserved on disk at once: a millisecond of the clock they are counted on, less than any restart takes.
const CEILING_STEP: u64 = 1_000;
/// The owner looks at the clock at least this often, to notice that the process stood still.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Standing still for longer than this gives every lease the time back.
const STALL: Duration = Duration::from_secs(1);
/// Batches a watch takes at once.
const WATCH_CHUNK: usize = 256;

/// Where an embedded store keeps what must survive.
#[derive(Debug, Clone, Default)]
pub struct EmbeddedOptions {
    /// The file; `None` keeps nothing.
    pub state_file: Option<PathBuf>,
    /// What a second conductor on the same file is told about this one.
    pub holder: String,
}

/// A handle to the store; the owner task ends with the last handle and the last watch.
#[derive(Debug, Clone)]
pub struct Embedded {
    instance: Arc<str>,
    commands: mpsc::Sender<Command>,
    head: watch::Receiver<Revision>,
}

impl Embedded {
    /// Opens the state file, if there is one to be, and starts the owner on `tasks`.
    ///
    /// # Errors
    /// [`StateFileError`] if the file is in use, damaged, or can't be written.
    pub async fn start(options: EmbeddedOptions, tasks: &TaskTracker) -> Result<Self, StateFileError> {
        let opened = match options.state_file {
            None => None,
            Some(path) => Some(blocking(move || StateFile::open(&path, &options.holder)).await?),
        };
        let (file, durable) = match opened {
            None => (None, None),
            Some((file, durable)) => (Some(Arc::new(file)), durable),
        };
        let (stored_ceiling, intents) = durable.map_or((0, BTreeMap::new()), |d| (d.ceiling, d.intents));
        let base = unix_micros().max(stored_ceiling + 1);
        tracing::info!(base, intents = intents.len(), durable = file.is_some(), "embedded store starts");
        let disk = Disk { file, ceiling: stored_ceiling, intents };
        Self::start_owner(base, disk, tasks).await
    }

    async fn start_owner(
        base: Revision,
        mut disk: Disk,
        tasks: &TaskTracker,
    ) -> Result<Self, StateFileError> {
        disk.write(base + CEILING_STEP, disk.intents.clone()).await?;
        let keys = disk.intents.iter().map(|(k, v)| (k.clone(), Arc::from(v.as_bytes())));
        let memory = Memory::new(base, keys.collect::<Vec<_>>());
        let (commands, inbox) = mpsc::channel(QUEUE);
        let (publish, head) = watch::channel(base);
        let owner = Owner { memory, disk, publish, looked: Instant::now() };
        tasks.spawn(owner.run(inbox));
        Ok(Self { instance: random_id().into(), commands, head })
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let gone = || StoreError::Unavailable("the store has stopped".to_owned());
        self.commands.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

impl Store for Embedded {
    fn kind(&self) -> &'static str {
        "embedded"
    }

    fn health(&self) -> StoreHealth {
        let up = !self.commands.is_closed();
        let problem = (!up).then(|| "the store has stopped".to_owned());
        StoreHealth { kind: self.kind(), endpoint: None, up, last_ok: up.then_some(Duration::ZERO), problem }
    }

    fn instance(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(async { Ok(self.instance.to_string()) })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page, StoreError>> {
        let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
        Box::pin(self.ask(move |reply| Command::List { prefix, after, limit, reply }))
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>> {
        let key = key.to_owned();
        Box::pin(self.ask(move |reply| Command::Get { key, reply }))
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnReply, StoreError>> {
        Box::pin(async { self.ask(move |reply| Command::Txn { txn, reply }).await? })
    }

    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<Lease, StoreError>> {
        Box::pin(self.ask(move |reply| Command::Grant { ttl, reply }))
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<Option<Duration>, StoreError>> {
        Box::pin(self.ask(move |reply| Command::KeepAlive { lease, reply }))
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.ask(move |reply| Command::Revoke { lease, reply }))
    }

    fn watch(&self, prefix: &str, since: Revision) -> BoxStream<'static, Result<Batch, WatchError>> {
        let cursor = Cursor { store: self.clone(), prefix: prefix.to_owned(), since };
        stream::unfold(Some(cursor), |cursor| async {
            let mut cursor = cursor?;
            match cursor.next().await {
                Ok(batches) => Some((batches.into_iter().map(Ok).collect(), Some(cursor))),
                Err(error) => Some((vec![Err(error)], None)),
            }
        })
        .flat_map(stream::iter)
        .boxed()
    }
}

/// Where a watch is in the history. It pulls, so a slow watcher costs nothing but its own place.
struct Cursor {
    store: Embedded,
    prefix: String,
    since: Revision,
}

impl Cursor {
    async fn next(&mut self) -> Result<Vec<Batch>, WatchError> {
        loop {
            self.store.head.borrow_and_update();
            let (prefix, since) = (self.prefix.clone(), self.since);
            let changes = self.store.ask(move |reply| Command::Changes { prefix, since, reply });
            let (batches, upto) = changes.await.map_err(|_| WatchError::Lost)??;
            self.since = upto;
            if !batches.is_empty() {
                return Ok(batches);
            }
            self.store.head.changed().await.map_err(|_| WatchError::Lost)?;
        }
    }
}

enum Command {
    List { prefix: String, after: Option<String>, limit: usize, reply: oneshot::Sender<Page> },
    Get { key: String, reply: oneshot::Sender<Option<KeyValue>> },
    Txn { txn: Txn, reply: oneshot::Sender<Result<TxnReply, StoreError>> },
    Grant { ttl: Duration, reply: oneshot::Sender<Lease> },
    KeepAlive { lease: LeaseId, reply: oneshot::Sender<Option<Duration>> },
    Revoke { lease: LeaseId, reply: oneshot::Sender<()> },
    Changes { prefix: String, since: Revision, reply: oneshot::Sender<Changes> },
}

type Changes = Result<(Vec<Batch>, Revision), WatchError>;

/// The one task that touches the memory and the disk.
struct Owner {
    memory: Memory,
    disk: Disk,
    publish: watch::Sender<Revision>,
    looked: Instant,
}

impl Owner {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        loop {
            let wake = self.looked + HEARTBEAT;
            let wake = self.memory.next_expiry().map_or(wake, |at| at.min(wake));
            let command = tokio::time::timeout_at(wake, inbox.recv()).await;
            self.look(Instant::now());
            match command {
                Err(_) => {}
                Ok(None) => return,
                Ok(Some(command)) => self.handle(command).await,
            }
            let revision = self.memory.revision();
            self.publish.send_if_modified(|head| std::mem::replace(head, revision) != revision);
        }
    }

    /// Lets leases end, but not for time in which this process could not have heard of them.
    fn look(&mut self, now: Instant) {
        let away = now.saturating_duration_since(self.looked);
        self.looked = now;
        if away > HEARTBEAT + STALL {
            tracing::warn!(?away, "the conductor stood still; leases get the time back");
            self.memory.forgive(away);
        }
        self.memory.expire(now);
    }

    async fn handle(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::List { prefix, after, limit, reply } => {
                answer(reply, self.memory.list(&prefix, after.as_deref(), limit));
            }
            Command::Get { key, reply } => answer(reply, self.memory.get(&key).cloned()),
            Command::Grant { ttl, reply } => answer(reply, self.memory.grant(now, ttl)),
            Command::KeepAlive { lease, reply } => answer(reply, self.memory.keep_alive(now, lease)),
            Command::Revoke { lease, reply } => {
                self.memory.revoke(lease);
                answer(reply, ());
            }
            Command::Txn { txn, reply } => {
                let done = self.txn(txn).await;
                answer(reply, done);
            }
            Command::Changes { prefix, since, reply } => {
                answer(reply, self.memory.changes(&prefix, since, WATCH_CHUNK));
            }
        }
    }

    /// First the disk, then the memory: what was answered is kept.
    async fn txn(&mut self, txn: Txn) -> Result<TxnReply, StoreError> {
        if self.memory.plan(&txn)? {
            let intents = self.disk.after(&txn)?;
            let low = self.memory.revision() + CEILING_STEP / 2 > self.disk.ceiling;
            if low || intents.is_some() {
                let ceiling = self.memory.revision() + CEILING_STEP;
                let intents = intents.unwrap_or_else(|| self.disk.intents.clone());
                self.disk.write(ceiling, intents).await.map_err(|error| {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, "the conductor's state could not be written");
                    StoreError::Unavailable(error.to_string())
                })?;
            }
        }
        self.memory.txn(txn)
    }
}

/// A caller that no longer waits for its answer is no error.
fn answer<T>(reply: oneshot::Sender<T>, value: T) {
    drop(reply.send(value));
}

/// The durable part as it is on disk (or would be, without a file).
struct Disk {
    file: Option<Arc<StateFile>>,
    ceiling: u64,
    intents: BTreeMap<String, String>,
}

impl Disk {
    /// The durable keys after `txn`, if it changes any.
    fn after(&self, txn: &Txn) -> Result<Option<BTreeMap<String, String>>, StoreError> {
        let mut changed: Option<BTreeMap<String, String>> = None;
        for op in txn.ops.iter().filter(|op| op.key().starts_with(DURABLE_PREFIX)) {
            let intents = changed.get_or_insert_with(|| self.intents.clone());
            match op {
                Op::Put { lease: Some(_), key, .. } => {
                    return Err(StoreError::Invalid(format!(
                        "the durable key {key:?} can't hang on a lease"
                    )));
                }
                Op::Put { key, value, .. } => {
                    let text = String::from_utf8(value.to_vec())
                        .map_err(|_| StoreError::Invalid(format!("the value of {key:?} must be text")))?;
                    intents.insert(key.clone(), text);
                }
                Op::Delete { key } => {
                    intents.remove(key);
                }
            }
        }
        Ok(changed)
    }

    async fn write(&mut self, ceiling: u64, intents: BTreeMap<String, String>) -> Result<(), StateFileError> {
        if let Some(file) = self.file.clone() {
            let durable = Durable { ceiling, intents };
            let durable = blocking(move || file.write(&durable).map(|()| durable)).await?;
            self.intents = durable.intents;
        } else {
            self.intents = intents;
        }
        self.ceiling = ceiling;
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is being torn down, and this task with it.
            Err(_) => std::future::pending().await,
        },
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a calendar time is wanted: the base of revisions over restarts"
)]
fn unix_micros() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX / 2))
}

#[cfg(test)]
mod tests;
