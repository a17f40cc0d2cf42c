//! Actions of the decode side.

use std::sync::Arc;
use std::time::Duration;

use baton_conductor::WorkerRecord;
use baton_config::HandoffId;
use baton_config::protocol::{PeerRef, Want};
use baton_engine::engine::Writers as EngineWriters;
use baton_transfer::import::{Pull, PullCause, PullError};
use baton_transfer::{ConnectError, ErrorKind, Session, TransferError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Command, DecodeLeg, DecodeNews, Io, Owner, delete_at};
use crate::handoff::decode::{PullOrder, Writers};
use crate::handoff::{DecodeAction, DecodeEvent, PullFault};
use crate::validate;

/// How long the view may lag behind the router's before a peer counts as gone.
const VIEW_LAG_MAX: Duration = Duration::from_millis(500);
/// A read may take this long whatever its size.
const PULL_MIN: Duration = Duration::from_secs(2);
/// And this long at most: under the peer's lease, which reads do not renew.
const PULL_MAX: Duration = Duration::from_secs(25);

impl Owner {
    pub(super) async fn decode_action(&mut self, id: HandoffId, action: DecodeAction) {
        if let DecodeAction::Answer { waiter, answer } = action {
            return self.answer(waiter, answer);
        }
        let Some(leg) = self.decodes.get_mut(&id) else { return };
        let seq = leg.seq;
        match action {
            DecodeAction::SendWant { from_token } => self.want(id, from_token),
            DecodeAction::PollStatus => self.poll(id),
            DecodeAction::Pull(order) => self.pull(id, order),
            DecodeAction::AbortPull { .. } => leg.pull.cancel(),
            DecodeAction::Imported { upto } => self.io.engine.imported(seq, upto).await,
            DecodeAction::StartDecode { first, report } => {
                leg.tell(DecodeNews::Imported(report));
                self.io.count_import(&report);
                self.io.engine.start_decode(seq, first).await;
            }
            DecodeAction::PrefillLocally { why, report } => {
                leg.tell(DecodeNews::Local(why, report));
                self.io.count_import(&report);
                self.io.engine.prefill_locally(seq).await;
            }
            DecodeAction::CancelEngine { writers } => {
                let closed = leg.closed;
                let live = writers == Writers::MayWrite;
                let writers = match writers {
                    Writers::Gone => EngineWriters::Gone,
                    Writers::MayWrite => EngineWriters::MayWrite,
                };
                self.io.engine.cancel(seq, writers).await;
                if closed && !live {
                    self.decodes.remove(&id);
                }
            }
            DecodeAction::Fence => self.io.engine.fence(seq).await,
            DecodeAction::Fail => leg.tell(DecodeNews::Failed),
            DecodeAction::DeleteAtPeer => {
                let (io, peer) = (self.io.clone(), leg.peer.clone());
                self.io.tasks.spawn(delete_at(io, peer, id));
            }
            DecodeAction::Answer { .. } => {}
        }
    }

    fn want(&mut self, id: HandoffId, from_token: u32) {
        let Some(DecodeLeg { peer, epoch, .. }) = self.decodes.get(&id) else { return };
        let (io, peer) = (self.io.clone(), peer.clone());
        let want = Want { worker: self.io.worker.clone(), epoch: *epoch, to_epoch: peer.epoch, from_token };
        self.spawn(CancellationToken::new(), async move {
            let start = Instant::now();
            let result = io.peers.post_want(&io.address_of(&peer), id, &want).await;
            if result.is_ok() {
                io.paths.round_trip(&peer.worker, start.elapsed());
            }
            Some(Command::Decode(id, DecodeEvent::WantAnswered(result)))
        });
    }

    fn poll(&mut self, id: HandoffId) {
        let Some(leg) = self.decodes.get(&id) else { return };
        let (io, peer) = (self.io.clone(), leg.peer.clone());
        self.spawn(CancellationToken::new(), async move {
            let mut result = io.peers.fetch_status(&io.address_of(&peer), id).await;
            if let Ok(status) = &mut result {
                // As those that are posted: nothing in them is trusted because it parsed.
                status.pending.retain(|ticket| validate::ticket(ticket, &io.model).is_ok());
            }
            Some(Command::Decode(id, DecodeEvent::StatusAnswered(result)))
        });
    }

    fn pull(&mut self, id: HandoffId, order: PullOrder) {
        let Some(leg) = self.decodes.get_mut(&id) else { return };
        let token = CancellationToken::new();
        leg.pull = token.clone();
        let (io, peer, blocks) = (self.io.clone(), leg.peer.clone(), leg.blocks.clone());
        let back = self.back.clone();
        self.io.tasks.spawn(async move {
            let (pull, start) = (order.pull, order.tokens.start);
            // A dropped read writes nothing any more: that is what its future promises.
            let done = token.run_until_cancelled(read(&io, &peer, id, order, blocks)).await;
            let Done { upto, bytes, fault } =
                done.unwrap_or(Done { upto: start, bytes: 0, fault: Some(PullFault::Aborted) });
            let event = DecodeEvent::Pulled { pull, upto, bytes, fault };
            // The owner is gone only when the worker stops.
            let _ = back.send(Command::Decode(id, event)).await;
        });
    }
}

struct Done {
    upto: u32,
    bytes: u64,
    fault: Option<PullFault>,
}

/// Reads blocks of a peer into the own arena.
async fn read(io: &Io, peer: &PeerRef, handoff: HandoffId, order: PullOrder, dest_blocks: Vec<u32>) -> Done {
    let failed = |fault| Done { upto: order.tokens.start, bytes: 0, fault: Some(fault) };
    // Blocks of one rank fill some heads: the others would stay those of another request, which no digest tells.
    if let Err(error) = io.importer.whole_plan(order.geometry) {
        return failed(fault_of(io, peer, &TransferError::Geometry(error).into()));
    }
    let session = match order.again_after {
        Some(PullFault::Integrity) => second_session(io, peer).await,
        _ => session(io, peer).await,
    };
    let session = match session {
        Ok(session) => session,
        Err(fault) => return failed(fault),
    };
    let backend = session.path().backend;
    let bytes: u64 = order.blocks.len() as u64 * order.geometry.block_bytes() as u64;
    let deadline = Instant::now() + pull_time(bytes, session.stats().bytes_per_second);
    let pull = Pull {
        handoff,
        epoch: peer.epoch,
        source: order.geometry,
        blocks: order.blocks,
        tokens: order.tokens,
        dest_blocks,
    };
    match io.importer.pull(&session, pull, deadline).await {
        Ok(report) => {
            io.metrics.transfer_seconds.observe(report.elapsed.as_secs_f64());
            io.metrics.transfer_bytes(backend, report.bytes.0);
            Done { upto: report.upto, bytes: report.bytes.0, fault: None }
        }
        Err(PullError { upto, bytes, cause }) => {
            io.metrics.transfer_bytes(backend, bytes.0);
            Done { upto, bytes: bytes.0, fault: Some(fault_of(io, peer, &cause)) }
        }
    }
}

/// How long a read of `bytes` may take: four times what it should, and never less than a pause of the peer may last.
fn pull_time(bytes: u64, bytes_per_second: Option<f64>) -> Duration {
    let expected = bytes_per_second.filter(|speed| *speed > 0.0).map_or(0.0, |speed| bytes as f64 / speed);
    let seconds = (4.0 * expected + 1.0).min(PULL_MAX.as_secs_f64());
    Duration::from_secs_f64(seconds).clamp(PULL_MIN, PULL_MAX)
}

/// A session for blocks that came damaged: over another path than the usual one, which serves again where it is the only
/// one. It is not the path of the pair: neither status nor measurements take note of it.
async fn second_session(io: &Io, peer: &PeerRef) -> Result<Session, PullFault> {
    let usual = session(io, peer).await?;
    let avoid = usual.path().backend;
    let metadata = metadata_of(io, peer).await?;
    let connect = io.agent.connect_avoiding(&peer.worker, peer.epoch, &metadata, avoid);
    match tokio::time::timeout(io.connect_timeout, connect).await {
        Ok(Ok(other)) => {
            tracing::info!(peer = %peer.worker, path = %other.path().backend, %avoid, "reading again over another path");
            Ok(other)
        }
        Ok(Err(ConnectError::Stale { .. })) => Err(PullFault::Stale),
        Ok(Err(_)) | Err(_) => {
            tracing::info!(peer = %peer.worker, path = %avoid, "reading again over the same path: there is no other");
            Ok(usual)
        }
    }
}

/// The session with a peer in the life of the handoff.
async fn session(io: &Io, peer: &PeerRef) -> Result<Session, PullFault> {
    let metadata = metadata_of(io, peer).await?;
    let connect = io.agent.connect(&peer.worker, peer.epoch, &metadata);
    match tokio::time::timeout(io.connect_timeout, connect).await {
        Ok(Ok(session)) => {
            io.paths.used(&peer.worker, &session);
            Ok(session)
        }
        Ok(Err(error)) => {
            let (fault, kind) = match &error {
                ConnectError::Stale { .. } => (PullFault::Stale, ErrorKind::Stale),
                ConnectError::Metadata { .. } | ConnectError::Refused { .. } => {
                    (PullFault::Refused, ErrorKind::Refused)
                }
                ConnectError::Link { .. } => (PullFault::Link, ErrorKind::Link),
            };
            io.metrics.transfer_error(kind);
            io.paths.failed(&peer.worker, &error.to_string());
            let error: &dyn std::error::Error = &error;
            tracing::warn!(peer = %peer.worker, error, "no transfer session");
            Err(fault)
        }
        Err(_) => {
            io.metrics.transfer_error(ErrorKind::Deadline);
            io.paths.failed(&peer.worker, "the peer's transfer agent did not answer in time");
            Err(PullFault::Link)
        }
    }
}

/// What a peer published for connecting to it.
async fn metadata_of(io: &Io, peer: &PeerRef) -> Result<Arc<[u8]>, PullFault> {
    let record = record_of(io, peer).await.ok_or(PullFault::Stale)?;
    Ok(io.metadata.get(&record))
}

/// The peer as the own view has it; waits a little where the router's view is ahead.
async fn record_of(io: &Io, peer: &PeerRef) -> Option<Arc<WorkerRecord>> {
    let found = |view: &baton_conductor::View| {
        view.worker(&peer.worker).filter(|record| record.epoch >= peer.epoch).cloned()
    };
    let deadline = Instant::now() + VIEW_LAG_MAX;
    let mut views = io.fleet.changed();
    let record = loop {
        if let Some(record) = found(&views.borrow_and_update()) {
            break Some(record);
        }
        if !matches!(tokio::time::timeout_at(deadline, views.changed()).await, Ok(Ok(()))) {
            break None;
        }
    };
    record.filter(|record| record.epoch == peer.epoch)
}

fn fault_of(io: &Io, peer: &PeerRef, cause: &PullCause) -> PullFault {
    let error: &dyn std::error::Error = cause;
    tracing::warn!(peer = %peer.worker, error, "a read of KV blocks failed");
    match cause {
        PullCause::Transfer(error) => {
            io.metrics.transfer_error(error.kind());
            match error {
                TransferError::Stale { .. } => PullFault::Stale,
                TransferError::Refused { .. } => PullFault::Refused,
                TransferError::Integrity { corrupt, .. } => {
                    io.metrics.checksum_mismatch.inc_by(corrupt.len() as u64);
                    PullFault::Integrity
                }
                TransferError::Link { .. } => PullFault::Link,
                TransferError::Deadline { .. } => PullFault::Deadline,
                TransferError::Geometry(_) => PullFault::Geometry,
            }
        }
        PullCause::Staging(_) => PullFault::Deadline,
        PullCause::Device(_) => PullFault::Link,
        PullCause::Unaligned { .. } => PullFault::Geometry,
        PullCause::Closed => PullFault::Aborted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_gets_four_times_its_time_within_bounds() {
        assert_eq!(pull_time(1 << 30, None), PULL_MIN, "nothing measured");
        assert_eq!(pull_time(1 << 20, Some(1e9)), PULL_MIN);
        let time = pull_time(2_000_000_000, Some(1e9));
        assert!(time > Duration::from_secs(8) && time < Duration::from_secs(10), "{time:?}");
        assert_eq!(pull_time(u64::MAX, Some(1.0)), PULL_MAX);
        assert_eq!(pull_time(1, Some(0.0)), PULL_MIN);
    }
}
