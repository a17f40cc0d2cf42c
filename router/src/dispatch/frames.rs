//! All generations of this router on one worker over one connection (`baton_config::frames`).
//!
//! ```text
//! Attempt ── Stream ─┐ commands                                            ┌ connection
//! Attempt ── Stream ─┼──────────► Mux (no I/O, no clock) ◄──── carrier ────┤
//! Attempt ── Stream ─┘ ◄─ wakes                       (one task, owned)    └ of one life of a worker
//! ```
//!
//! A worker that does not speak frames is called over HTTP instead, until its next life.

mod carrier;
mod mux;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::Epoch;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use http::uri::Authority;
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::attempt::Lost;
use super::call::Caller;
use mux::Mux;
pub(super) use mux::{Item, Stream};

/// For a worker to say whether it speaks frames.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Owns the connections of frames.
#[derive(Debug, Clone, Default)]
pub(crate) struct Carriers {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Carriers {
    /// Ends all connections and waits until they have ended.
    pub(crate) async fn close(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// A connection, for as long as anybody wants it.
#[derive(Debug)]
pub(crate) struct Link(Arc<Mux>);

impl Drop for Link {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// How a worker is to be called.
#[derive(Debug, Clone)]
pub(super) enum Way {
    /// Over its connection of frames.
    Frames(Arc<Link>),
    /// It does not speak them.
    Plain,
}

/// Somebody is finding out.
type Finding = Shared<BoxFuture<'static, Result<Way, Lost>>>;

/// How one life of a worker is called, found out by its first request.
#[derive(Debug, Default)]
pub(crate) struct Lane(Mutex<State>);

#[derive(Debug, Default)]
enum State {
    #[default]
    Unknown,
    Finding(Finding),
    Known(Way),
}

/// The answer to how a worker is to be called.
pub(super) enum Found {
    /// This way.
    Now(Way),
    /// Not known yet.
    Soon(Finding),
}

impl Lane {
    /// How to call the worker, which is asked if that is not known.
    pub(super) fn find(&self, caller: &Caller, authority: &Authority, epoch: Epoch) -> Found {
        let mut state = self.state();
        let settled = match &*state {
            State::Known(Way::Plain) => return Found::Now(Way::Plain),
            State::Known(Way::Frames(link)) if !link.0.is_over() => {
                return Found::Now(Way::Frames(Arc::clone(link)));
            }
            State::Finding(finding) => match finding.peek() {
                None => return Found::Soon(finding.clone()),
                Some(Ok(way)) => Some(way.clone()),
                Some(Err(_)) => None,
            },
            State::Known(Way::Frames(_)) | State::Unknown => None,
        };
        if let Some(way) = settled
            && !matches!(&way, Way::Frames(link) if link.0.is_over())
        {
            *state = State::Known(way.clone());
            return Found::Now(way);
        }
        let finding = find(caller.clone(), authority.clone(), epoch).boxed().shared();
        // It goes on although whoever asked first may leave.
        caller.carriers().tracker.spawn(finding.clone());
        *state = State::Finding(finding.clone());
        Found::Soon(finding)
    }

    /// A generation was silent for too long on this connection: those that follow get another one.
    pub(super) fn retire(&self, link: &Arc<Link>) {
        let mut state = self.state();
        let same = match &*state {
            State::Known(Way::Frames(known)) => Arc::ptr_eq(known, link),
            State::Finding(finding) => {
                matches!(finding.peek(), Some(Ok(Way::Frames(known))) if Arc::ptr_eq(known, link))
            }
            State::Known(Way::Plain) | State::Unknown => false,
        };
        if same {
            *state = State::Unknown;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects, or finds out that there is nothing to connect to.
async fn find(caller: Caller, authority: Authority, epoch: Epoch) -> Result<Way, Lost> {
    let carriers = caller.carriers().clone();
    let upgrade = tokio::time::timeout(OPEN_TIMEOUT, caller.frames(&authority, epoch));
    let upgraded = match carriers.stop.run_until_cancelled(upgrade).await {
        None => return Err(Lost::Broken("this router ends".to_owned())),
        Some(Err(_)) => return Err(Lost::Silent(OPEN_TIMEOUT)),
        Some(Ok(upgraded)) => upgraded?,
    };
    let Some(upgraded) = upgraded else {
        tracing::info!(worker = %authority, "a worker speaks no frames: it is called over HTTP");
        return Ok(Way::Plain);
    };
    let link = Arc::new(Link(Arc::new(Mux::new())));
    let carried = carrier::carry(Arc::clone(&link.0), TokioIo::new(upgraded), carriers.stop.clone());
    carriers.tracker.spawn(carried);
    Ok(Way::Frames(link))
}
