//! Reads and writes that are checked once and posted many times, each to be awaited, looked at or cancelled.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use baton_config::HandoffId;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{BlockRead, BlockSink, BlockWrite, Destination, ReadReport, Session, check};
use crate::agent::DeviceMemory;
use crate::error::{LinkError, Refusal, TransferError};
use crate::memory::HostMemory;

/// Where the blocks of a prepared read go: as [`Destination`], but held for as long as it is prepared.
#[derive(Clone)]
pub enum Target {
    /// Straight into memory.
    Memory(HostMemory),
    /// To a sink, which sees verified bytes only.
    Sink(Arc<dyn BlockSink>),
    /// Straight into memory of a device, see [`Destination::Device`].
    Device(DeviceMemory),
}

impl Target {
    fn as_destination(&self) -> Destination<'_> {
        match self {
            Self::Memory(memory) => Destination::Memory(memory),
            Self::Sink(sink) => Destination::Sink(&**sink),
            Self::Device(memory) => Destination::Device(memory),
        }
    }
}

/// A read or a write that was checked and can be posted any number of times. Clones share it.
#[derive(Clone)]
pub struct Prepared {
    session: Session,
    work: Arc<Work>,
}

enum Work {
    Read { handoff: HandoffId, blocks: Vec<BlockRead>, into: Target },
    Write { handoff: HandoffId, blocks: Vec<BlockWrite>, from: HostMemory },
}

/// A prepared read or write under way. Dropped, it is given up, but only [`Posted::cancel`] waits for its end.
pub struct Posted {
    outcome: oneshot::Receiver<Result<ReadReport, TransferError>>,
    ready: Option<Result<ReadReport, TransferError>>,
    session: Session,
    /// Gives the work up.
    _cancel: DropGuard,
    /// Closes when the work has ended, whether or not it was given up.
    ended: CancellationToken,
}

impl Session {
    /// Prepares a read, as [`Session::read`] does it.
    ///
    /// # Errors
    /// [`TransferError::Refused`] when the blocks make no sense: empty, too large, outside `into`, or overlapping there.
    pub fn prepare_read(
        &self,
        handoff: HandoffId,
        blocks: Vec<BlockRead>,
        into: Target,
    ) -> Result<Prepared, TransferError> {
        check::read(&blocks, &into.as_destination()).map_err(|refusal| self.refused(refusal))?;
        Ok(Prepared { session: self.clone(), work: Arc::new(Work::Read { handoff, blocks, into }) })
    }

    /// Prepares a write, as [`Session::write`] does it.
    ///
    /// # Errors
    /// [`TransferError::Refused`] when the blocks make no sense: empty, too large, outside `from`, or overlapping at
    /// the peer.
    pub fn prepare_write(
        &self,
        handoff: HandoffId,
        blocks: Vec<BlockWrite>,
        from: HostMemory,
    ) -> Result<Prepared, TransferError> {
        check::write(&blocks, &from).map_err(|refusal| self.refused(refusal))?;
        Ok(Prepared { session: self.clone(), work: Arc::new(Work::Write { handoff, blocks, from }) })
    }

    fn refused(&self, refusal: Refusal) -> TransferError {
        TransferError::Refused { worker: self.peer().clone(), refusal }
    }
}

impl Prepared {
    /// Starts it; it goes on by itself.
    ///
    /// Two posts of one read at a time write the same places: without sense for memory, though not unsafe.
    pub fn post(&self, deadline: Instant) -> Posted {
        let (sender, outcome) = oneshot::channel();
        let cancelled = CancellationToken::new();
        let ended = CancellationToken::new();
        let (session, work) = (self.session.clone(), Arc::clone(&self.work));
        let (stop, over) = (cancelled.clone(), ended.clone().drop_guard());
        self.session.0.paths.route.tasks.spawn(async move {
            let outcome = tokio::select! {
                biased;
                () = stop.cancelled() => None,
                outcome = work.run(&session, deadline) => Some(outcome),
            };
            // Here the work has ended or was dropped, and is fenced.
            drop(over);
            if let Some(outcome) = outcome {
                let _ = sender.send(outcome);
            }
        });
        Posted { outcome, ready: None, session: self.session.clone(), _cancel: cancelled.drop_guard(), ended }
    }

    /// Does it here and now, without a task of its own.
    ///
    /// # Errors
    /// As [`Session::read`] and [`Session::write`].
    pub async fn run(&self, deadline: Instant) -> Result<ReadReport, TransferError> {
        self.work.run(&self.session, deadline).await
    }
}

impl Work {
    async fn run(&self, session: &Session, deadline: Instant) -> Result<ReadReport, TransferError> {
        match self {
            Self::Read { handoff, blocks, into } => {
                session.run_read(*handoff, blocks, into.as_destination(), deadline).await
            }
            Self::Write { handoff, blocks, from } => {
                session.run_write(*handoff, blocks, from, deadline).await
            }
        }
    }
}

impl Posted {
    /// Whether it has come to its end; awaiting it then does not wait.
    pub fn is_done(&mut self) -> bool {
        if self.ready.is_none() {
            self.ready = match self.outcome.try_recv() {
                Ok(outcome) => Some(outcome),
                Err(oneshot::error::TryRecvError::Empty) => None,
                Err(oneshot::error::TryRecvError::Closed) => Some(Err(self.lost())),
            };
        }
        self.ready.is_some()
    }

    /// Gives it up. When this returns, nothing of a read writes its destination any more; what a write has done at the
    /// peer ends with its grant there.
    pub async fn cancel(self) {
        let Self { _cancel: cancel, ended, .. } = self;
        drop(cancel);
        ended.cancelled().await;
    }

    /// The agent was closed under it.
    fn lost(&self) -> TransferError {
        let worker = self.session.peer().clone();
        TransferError::Link { worker, moved: baton_config::Bytes(0), source: LinkError::Closed }
    }
}

impl Future for Posted {
    type Output = Result<ReadReport, TransferError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(outcome) = self.ready.take() {
            return Poll::Ready(outcome);
        }
        match Pin::new(&mut self.outcome).poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(outcome)) => Poll::Ready(outcome),
            Poll::Ready(Err(_)) => Poll::Ready(Err(self.lost())),
        }
    }
}
