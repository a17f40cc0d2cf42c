//! Writes into a peer's memory, and messages to its user.

use baton_config::{Bytes, HandoffId};
use tokio::time::{Instant, sleep_until};

use super::{BlockWrite, ReadReport, Session, Stop, check};
use crate::agent::paths::Tried;
use crate::backend::{Fault, Progress, WriteJob};
use crate::error::{LinkError, Refusal, TransferError};
use crate::memory::HostMemory;
use crate::wire::control::Notify;
use crate::wire::{Kind, MAX_NOTIFICATION_BYTES};

impl Session {
    /// Writes blocks to places the peer has granted with [`Agent::grant_write`]; done when the peer has verified every
    /// byte. `from` must not be written meanwhile.
    ///
    /// A write that fails or is dropped leaves garbage in its places, and bytes of it may still arrive there: its blocks
    /// are good for something else when the peer has ended the grant and waited for [`Revoked::settled`]. So it goes on
    /// over another path only as long as none of its bytes have left.
    ///
    /// [`Agent::grant_write`]: crate::agent::Agent::grant_write
    /// [`Revoked::settled`]: crate::agent::Revoked::settled
    ///
    /// # Errors
    /// Each variant of [`TransferError`] but `Geometry` and `Integrity` says what to do next; bytes that changed on
    /// the way are [`Refusal::Corrupt`].
    pub async fn write(
        &self,
        handoff: HandoffId,
        blocks: &[BlockWrite],
        from: &HostMemory,
        deadline: Instant,
    ) -> Result<ReadReport, TransferError> {
        match check::write(blocks, from) {
            Ok(()) => self.run_write(handoff, blocks, from, deadline).await,
            Err(refusal) => Err(TransferError::Refused { worker: self.peer().clone(), refusal }),
        }
    }

    /// As [`Session::write`], of blocks that were checked.
    pub(super) async fn run_write(
        &self,
        handoff: HandoffId,
        blocks: &[BlockWrite],
        from: &HostMemory,
        deadline: Instant,
    ) -> Result<ReadReport, TransferError> {
        let progress = Progress::new(blocks.len());
        let job = WriteJob { handoff, blocks, from, verify: self.0.verify, progress: &progress };
        let write = async {
            // Notifications wait for the writes before them, and this one for those that wait.
            let _before_notifications = self.0.writing.read().await;
            self.write_over_paths(&job, deadline).await
        };
        let outcome = tokio::select! {
            biased;
            () = self.0.closed.cancelled() => Err(Stop::Fault(LinkError::Closed.into())),
            outcome = write => outcome,
            () = sleep_until(deadline) => Err(Stop::Deadline),
        };
        let report = self.report(&progress, outcome.map(|()| Vec::new()));
        if let Err(error) = &report {
            self.0.counters.error(error.kind());
        }
        report
    }

    async fn write_over_paths(&self, job: &WriteJob<'_>, deadline: Instant) -> Result<(), Stop> {
        let (paths, avoid) = (&self.0.paths, self.0.avoid);
        if job.blocks.is_empty() {
            return Ok(());
        }
        let mut tried = Tried::default();
        let mut last = Fault::Refused(Refusal::Unreachable);
        while let Some(path) = paths.next(avoid, tried).await.map_err(Stop::Fault)? {
            tried.add(&path);
            if let Fault::Link(_) = &last {
                self.0.counters.path_failover();
            }
            let fault = match path.link.write(job).await {
                Ok(()) => {
                    self.0.counters.wrote(path.backend, job.progress.moved());
                    return Ok(());
                }
                Err(fault) => fault,
            };
            if let Fault::Link(error) = &fault {
                paths.broke(&path, error);
            }
            let elsewhere =
                matches!(fault, Fault::Link(_) | Fault::Refused(Refusal::Unreachable | Refusal::Mismatch));
            if !elsewhere || job.progress.moved() > 0 || Instant::now() >= deadline {
                return Err(Stop::Fault(fault));
            }
            last = fault;
        }
        Err(Stop::Fault(last))
    }

    /// Tells the peer's user something, see [`Agent::notifications`]: it is there after all writes of this session that
    /// were started before, however they ended.
    ///
    /// [`Agent::notifications`]: crate::agent::Agent::notifications
    ///
    /// # Errors
    /// [`TransferError::Refused`] with [`Refusal::TooLarge`] or, when too many of this agent's are waiting there,
    /// [`Refusal::Overloaded`]; else as [`Session::write`].
    pub async fn notify(
        &self,
        handoff: HandoffId,
        payload: &[u8],
        deadline: Instant,
    ) -> Result<(), TransferError> {
        let progress = Progress::new(0);
        let ask = async {
            if payload.len() > MAX_NOTIFICATION_BYTES {
                return Err(Fault::Refused(Refusal::TooLarge));
            }
            // The lock is fair: this waits for the writes before, and for none after.
            drop(self.0.writing.write().await);
            let control = self.0.paths.control().await?;
            let notify = Notify { handoff, payload: payload.to_vec() };
            control.ask(Kind::Notify, &notify.encode()).await.map(|_| ())
        };
        let outcome = tokio::select! {
            biased;
            () = self.0.closed.cancelled() => Err(Stop::Fault(LinkError::Closed.into())),
            outcome = ask => outcome.map_err(Stop::Fault),
            () = sleep_until(deadline) => Err(Stop::Deadline),
        };
        self.report(&progress, outcome.map(|()| Vec::new())).map(|_| ())
    }

    /// What a caller is told of an outcome.
    pub(super) fn report(
        &self,
        progress: &Progress,
        outcome: Result<Vec<usize>, Stop>,
    ) -> Result<ReadReport, TransferError> {
        let moved = Bytes(progress.moved());
        let worker = match &outcome {
            Ok(corrupt) if corrupt.is_empty() => {
                return Ok(ReadReport { bytes: moved, elapsed: progress.elapsed() });
            }
            Ok(_) | Err(_) => self.peer().clone(),
        };
        match outcome {
            Ok(mut corrupt) => {
                corrupt.sort_unstable();
                Err(TransferError::Integrity { worker, index: corrupt[0], corrupt })
            }
            Err(Stop::Deadline) => Err(TransferError::Deadline { worker, moved }),
            Err(Stop::Fault(Fault::Stale(current))) => {
                Err(TransferError::Stale { worker, ticket: self.epoch(), current })
            }
            Err(Stop::Fault(Fault::Refused(refusal))) => Err(TransferError::Refused { worker, refusal }),
            Err(Stop::Fault(Fault::Link(source))) => Err(TransferError::Link { worker, moved, source }),
        }
    }
}
