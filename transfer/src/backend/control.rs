//! The control connection: requests and answers between two agents, in both directions, beside the bytes.
//!
//! It is a connection to a peer's ordinary listener whose first request is not a read. Requests are numbered by the
//! side that sends them and answered in any order, so that a slow one holds up no other.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_config::Epoch;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::fabric;
use super::frames::{FrameReader, FrameWriter};
use super::handshake::{self, Route};
use super::{Fault, Pair};
use crate::agent::notifications::Notification;
use crate::agent::server::{Denial, Life, Server};
use crate::error::{LinkError, Refusal};
use crate::stats::Counters;
use crate::wire::control::Notify;
use crate::wire::{Header, Hello, Kind, WireError};

/// Most requests of one side waiting for their answers; more wait for room.
const MAX_ASKED: usize = 256;
/// Most requests of the other side being answered; more are left in the socket.
const MAX_ANSWERING: usize = 64;
/// How long the other side may leave a frame lying before the connection is closed.
const STALL_TIMEOUT: Duration = Duration::from_secs(15);

/// What a request is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) kind: Kind,
    pub(crate) payload: Vec<u8>,
}

impl Answer {
    /// An answer that says no more than that it was done.
    pub(crate) fn done(kind: Kind) -> Self {
        Self { kind, payload: Vec::new() }
    }
}

/// Answers the requests of the other side.
pub(crate) type Handler =
    Arc<dyn Fn(Header, Bytes) -> BoxFuture<'static, Result<Answer, Denial>> + Send + Sync>;

/// One end of a control connection. Clones share it; the last one closes it.
#[derive(Clone)]
pub(crate) struct Control {
    shared: Arc<Shared>,
    _open: Arc<DropGuard>,
}

struct Shared {
    /// The life of the serving side: every frame names it.
    epoch: Epoch,
    outgoing: tokio::sync::Mutex<Outgoing>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<(Header, Bytes)>>>,
    next_seq: AtomicU64,
    room: Semaphore,
    closed: CancellationToken,
    counters: Arc<Counters>,
}

struct Outgoing {
    socket: OwnedWriteHalf,
    writer: FrameWriter,
}

/// A connection to be served by [`Incoming::serve`].
struct Incoming {
    shared: Arc<Shared>,
    socket: OwnedReadHalf,
    frames: FrameReader,
}

impl Control {
    /// Connects to a peer. `handler` answers what the peer asks on this connection.
    pub(crate) async fn open(pair: Pair, route: &Route, handler: Handler) -> Result<Self, Fault> {
        let opened = handshake::open(&pair, route).await?;
        let closed = route.ended.child_token();
        let counters = Arc::clone(&route.counters);
        let (control, incoming) =
            Self::new(pair.epoch, opened.socket, opened.reader, opened.writer, closed, counters);
        route.tasks.spawn(async move {
            if let Err(error) = incoming.serve(handler, None).await {
                tracing::debug!(error = &error as &dyn std::error::Error, "control connection ended");
            }
        });
        Ok(control)
    }

    fn new(
        epoch: Epoch,
        socket: TcpStream,
        frames: FrameReader,
        writer: FrameWriter,
        closed: CancellationToken,
        counters: Arc<Counters>,
    ) -> (Self, Incoming) {
        let (read, write) = socket.into_split();
        let shared = Arc::new(Shared {
            epoch,
            outgoing: tokio::sync::Mutex::new(Outgoing { socket: write, writer }),
            waiting: Mutex::default(),
            next_seq: AtomicU64::new(1),
            room: Semaphore::new(MAX_ASKED),
            closed,
            counters,
        });
        let open = Arc::new(shared.closed.clone().drop_guard());
        let incoming = Incoming { shared: Arc::clone(&shared), socket: read, frames };
        (Self { shared, _open: open }, incoming)
    }

    /// Sends a request and waits for its answer, as long as the caller does. Refusals are faults.
    pub(crate) async fn ask(&self, kind: Kind, payload: &[u8]) -> Result<(Header, Bytes), Fault> {
        let shared = &*self.shared;
        let _room = shared.room.acquire().await.map_err(|_| LinkError::Closed)?;
        let seq = shared.next_seq.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        let _waiting = Waiting::new(shared, seq, sender);
        // After it waits: the end of the connection, which forgets all who wait, is not missed.
        if !self.is_alive() {
            return Err(LinkError::Closed.into());
        }
        shared.send(Header { kind, code: 0, len: 0, epoch: shared.epoch, seq }, payload).await?;
        let (header, payload) = answer.await.map_err(|_| LinkError::Closed)?;
        match header.kind {
            Kind::Refused => Err(Fault::refused(&header)),
            _ if header.epoch != shared.epoch => Err(Fault::Stale(Some(header.epoch))),
            _ => Ok((header, payload)),
        }
    }

    /// Whether requests may work.
    pub(crate) fn is_alive(&self) -> bool {
        !self.shared.closed.is_cancelled()
    }

    /// Waits for the end of the connection.
    pub(crate) async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }
}

impl Shared {
    /// Sends a frame; its length is that of the payload.
    async fn send(&self, header: Header, payload: &[u8]) -> Result<(), LinkError> {
        debug_assert!(payload.len() as u64 <= header.kind.max_len(), "{:?} frames are bounded", header.kind);
        let mut outgoing = self.outgoing.lock().await;
        // A frame sent in part, because this future was dropped or failed, can only be followed by the end.
        let whole = self.closed.clone().drop_guard();
        let Outgoing { socket, writer } = &mut *outgoing;
        let head = writer.head(&Header { len: payload.len() as u32, ..header }, payload);
        let frame = [&*head, payload].concat();
        timeout(STALL_TIMEOUT, socket.write_all(&frame))
            .await
            .map_err(|_| LinkError::Closed)?
            .map_err(LinkError::io("sending a request"))?;
        whole.disarm();
        Ok(())
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<(Header, Bytes)>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands an answer to who waits for it; who was dropped meanwhile does not.
    fn deliver(&self, header: Header, payload: Bytes) -> Result<(), LinkError> {
        if header.seq == 0 || header.seq >= self.next_seq.load(Ordering::Relaxed) {
            return Err(LinkError::Protocol(WireError::Field));
        }
        if let Some(waiter) = self.waiting().remove(&header.seq) {
            let _ = waiter.send((header, payload));
        }
        Ok(())
    }

    async fn answer(&self, handler: Handler, header: Header, payload: Bytes) -> Result<(), LinkError> {
        let outcome = match header.epoch == self.epoch {
            true => handler(header, payload).await,
            false => Err(Denial::Stale),
        };
        match outcome {
            Ok(Answer { kind, payload }) => {
                let head = Header { kind, code: 0, len: 0, epoch: self.epoch, seq: header.seq };
                self.send(head, &payload).await
            }
            Err(denial) => {
                self.counters.denied(denial);
                self.send(denial.header(Some(self.epoch), header.seq), &[]).await
            }
        }
    }
}

/// A place among those who wait for answers, given up when dropped.
struct Waiting<'a> {
    shared: &'a Shared,
    seq: u64,
}

impl<'a> Waiting<'a> {
    fn new(shared: &'a Shared, seq: u64, sender: oneshot::Sender<(Header, Bytes)>) -> Self {
        shared.waiting().insert(seq, sender);
        Self { shared, seq }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.waiting().remove(&self.seq);
    }
}

impl Incoming {
    /// Delivers answers and answers requests until either side ends the connection.
    async fn serve(mut self, handler: Handler, first: Option<(Header, Bytes)>) -> Result<(), LinkError> {
        let shared = Arc::clone(&self.shared);
        let outcome = self.run(&handler, first).await;
        // Before those who wait are forgotten: who comes later looks at it.
        shared.closed.cancel();
        shared.waiting().clear();
        if let Err(LinkError::Protocol(error)) = &outcome {
            shared.counters.broken(*error);
        }
        outcome
    }

    async fn run(&mut self, handler: &Handler, first: Option<(Header, Bytes)>) -> Result<(), LinkError> {
        let Self { shared, socket, frames } = self;
        let mut answering = FuturesUnordered::new();
        if let Some((header, payload)) = first {
            answering.push(shared.answer(Arc::clone(handler), header, payload));
        }
        loop {
            tokio::select! {
                biased;
                () = shared.closed.cancelled() => return Ok(()),
                Some(answered) = answering.next() => answered?,
                frame = frames.next(socket), if answering.len() < MAX_ANSWERING => {
                    let Some((header, payload)) = frame? else { return Ok(()) };
                    match header.kind.is_answer() {
                        true => shared.deliver(header, payload)?,
                        false => answering.push(shared.answer(Arc::clone(handler), header, payload)),
                    }
                }
            }
        }
    }
}

/// The client of a control connection, as the serving side knows it.
pub(crate) struct Peer {
    pub(crate) hello: Hello,
    pub(crate) life: Life,
    /// Asks the client, on the same connection.
    pub(crate) control: Control,
    /// What fabrics keep for this connection.
    pub(crate) fabric: fabric::serve::Attachments,
}

/// Serves a connection whose handshake is over and whose first request turned out to be no read.
pub(crate) async fn serve(
    server: Arc<Server>,
    accepted: Accepted,
    first: (Header, Bytes),
) -> Result<(), LinkError> {
    let Accepted { socket, frames, writer, hello, life } = accepted;
    let closed = life.ended.child_token();
    let counters = Arc::clone(&server.counters);
    let (control, incoming) = Control::new(life.epoch, socket, frames, writer, closed, counters);
    let peer = Arc::new(Peer { hello, life, control, fabric: fabric::serve::Attachments::default() });
    let handler: Handler = {
        let (server, peer) = (Arc::clone(&server), Arc::clone(&peer));
        Arc::new(move |header, payload| {
            Box::pin(dispatch(Arc::clone(&server), Arc::clone(&peer), header, payload))
        })
    };
    let outcome = incoming.serve(handler, Some(first)).await;
    fabric::serve::gone(&server, &peer);
    outcome
}

/// A connection past its handshake, as its server sees it.
pub(crate) struct Accepted {
    pub(crate) socket: TcpStream,
    pub(crate) frames: FrameReader,
    pub(crate) writer: FrameWriter,
    pub(crate) hello: Hello,
    pub(crate) life: Life,
}

async fn dispatch(
    server: Arc<Server>,
    peer: Arc<Peer>,
    header: Header,
    payload: Bytes,
) -> Result<Answer, Denial> {
    match header.kind {
        Kind::Attach | Kind::Key | Kind::Pack | Kind::Confirm | Kind::Window | Kind::Write | Kind::Fence => {
            fabric::serve::answer(server, peer, header, payload).await
        }
        Kind::Notify => {
            let Notify { handoff, payload } = Notify::decode(&payload)?;
            let (from, from_epoch) = (peer.hello.from.clone(), peer.hello.from_epoch);
            let notification = Notification { from, from_epoch, handoff, payload };
            server.notifications.push(notification).map_err(Denial::Refused)?;
            Ok(Answer::done(Kind::Notified))
        }
        _ => Err(Denial::Refused(Refusal::Malformed)),
    }
}

#[cfg(test)]
mod tests;
