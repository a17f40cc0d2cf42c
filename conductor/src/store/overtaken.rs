//! An embedded store in which somebody else is always quicker.

use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use super::embedded::Embedded;
use super::*;

type Work = BoxFuture<'static, ()>;

/// Lets others write before a write, and between two pages of a listing; once each.
pub(crate) struct Overtaken {
    pub(crate) store: Embedded,
    before_txn: Mutex<Option<Work>>,
    after_page: Mutex<Option<Work>>,
    /// Every lease that was granted here.
    granted: Mutex<Vec<LeaseId>>,
    /// Whether keepalives find no answer.
    hangs: watch::Sender<bool>,
}

impl Overtaken {
    pub(crate) fn new(store: Embedded) -> Self {
        let (before_txn, after_page) = (Mutex::default(), Mutex::default());
        Self { store, before_txn, after_page, granted: Mutex::default(), hangs: watch::channel(false).0 }
    }

    /// Before the next write, this happens.
    pub(crate) fn before_txn(&self, what: impl Future<Output = ()> + Send + 'static) {
        *self.before_txn.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::pin(what));
    }

    /// The next page holds one key, and after it this happens.
    pub(crate) fn after_page(&self, what: impl Future<Output = ()> + Send + 'static) {
        *self.after_page.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::pin(what));
    }

    /// From now on keepalives find no answer, or do again.
    pub(crate) fn hang(&self, hangs: bool) {
        self.hangs.send_replace(hangs);
    }

    /// The leases granted here that have not ended.
    pub(crate) async fn leases(&self) -> Vec<LeaseId> {
        let granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut left = Vec::new();
        for lease in granted {
            if matches!(self.store.keep_alive(lease).await, Ok(Some(_))) {
                left.push(lease);
            }
        }
        left
    }
}

impl Store for Overtaken {
    fn kind(&self) -> &'static str {
        self.store.kind()
    }

    fn health(&self) -> StoreHealth {
        self.store.health()
    }

    fn instance(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        self.store.instance()
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Page, StoreError>> {
        let then = self.after_page.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::pin(async move {
            let page = self.store.list(prefix, after, if then.is_some() { 1 } else { limit }).await;
            if let Some(then) = then {
                then.await;
            }
            page
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<KeyValue>, StoreError>> {
        self.store.get(key)
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnReply, StoreError>> {
        let first = self.before_txn.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::pin(async move {
            if let Some(first) = first {
                first.await;
            }
            self.store.txn(txn).await
        })
    }

    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<Lease, StoreError>> {
        Box::pin(async move {
            let lease = self.store.grant(ttl).await?;
            self.granted.lock().unwrap_or_else(PoisonError::into_inner).push(lease.id);
            Ok(lease)
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<Option<Duration>, StoreError>> {
        let mut hangs = self.hangs.subscribe();
        Box::pin(async move {
            drop(hangs.wait_for(|hangs| !hangs).await);
            self.store.keep_alive(lease).await
        })
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        self.store.revoke(lease)
    }

    fn watch(&self, prefix: &str, since: Revision) -> BoxStream<'static, Result<Batch, WatchError>> {
        self.store.watch(prefix, since)
    }
}
