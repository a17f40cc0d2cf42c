//! The books: every request that begins ends exactly once, as ok, client error, refused or failed.
//!
//! Invariant: `started = ok + client errors + refused + failed + in flight`, at any moment. An [`Entry`] is the only
//! way to begin a request and ends it when dropped; whoever holds the answer holds the entry.

use std::sync::Arc;

use crate::metrics::Metrics;
use crate::reply::{CLIENT_LEFT, Outcome, Refusal, outcome};
use crate::routes::Route;
use crate::tenant::Principal;

/// One request in the books.
#[derive(Debug)]
pub(crate) struct Entry {
    metrics: Arc<Metrics>,
    route: Route,
    /// How it ends when dropped: until something is known, as a client that left.
    code: u16,
    outcome: Outcome,
    /// Whose it is, once that is known and if it matters.
    principal: Option<Arc<Principal>>,
}

impl Entry {
    /// Begins a request.
    pub(crate) fn open(metrics: Arc<Metrics>, route: Route) -> Self {
        metrics.started.inc();
        metrics.in_flight.inc();
        Self { metrics, route, code: CLIENT_LEFT, outcome: Outcome::ClientError, principal: None }
    }

    /// Notes whose it is.
    pub(crate) fn belongs_to(&mut self, principal: &Arc<Principal>) {
        self.principal = Some(Arc::clone(principal));
    }

    /// Books tokens of its prompt or answer.
    pub(crate) fn used(&self, tokens: u64) {
        if let Some(principal) = &self.principal {
            self.metrics.tenant_tokens(&principal.tenant.label, tokens);
        }
    }

    /// Ends it with an answer of this status.
    pub(crate) fn answered(mut self, status: u16) {
        self.code = status;
        self.outcome = outcome(status);
    }

    /// Ends it with a refusal.
    pub(crate) fn refused(mut self, refusal: &Refusal) {
        if let Some(reason) = refusal.rejected_reason() {
            self.metrics.rejected(reason);
        }
        self.code = refusal.status().as_u16();
        self.outcome = refusal.outcome();
    }

    /// Ends a stream that had begun well and broke.
    pub(crate) fn broke(mut self) {
        self.code = 200;
        self.outcome = Outcome::Failed;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.metrics.request_ended(self.route, self.code, self.outcome);
        if let Some(principal) = &self.principal {
            self.metrics.tenant_ended(&principal.tenant.label, self.outcome);
        }
        self.metrics.in_flight.dec();
    }
}

#[cfg(test)]
mod tests;
