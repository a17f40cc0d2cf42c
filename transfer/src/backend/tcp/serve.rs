//! The serving side of `tcp`: admits connections and answers reads out of region memory.

mod staged;
mod write;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use baton_config::Seldom;
use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout};

use crate::agent::grants::Permit;
use crate::agent::region::Region;
use crate::agent::server::{Denial, Life, Server, region};
use crate::agent::strangers::Stranger;
use crate::backend::CONNECT_TIMEOUT;
use crate::backend::control::{self, Accepted};
use crate::backend::frames::{FrameReader, FrameWriter};
use crate::backend::handshake::{self, Admitted};
use crate::backend::tcp::gather::Gather;
use crate::error::{LinkError, Refusal};
use crate::memory::Span;
use crate::session::Descriptor;
use crate::spin::Spin;
use crate::wire::{self, Header, Kind, WireError};

/// How long a peer may leave an answer lying before its stream is closed.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the next request from this host is looked for before the server sleeps: about what waking up takes.
const SPIN: Duration = Duration::from_micros(5);
/// Wait after a failed accept: out of descriptors, most likely.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections until the agent stops.
pub(crate) async fn listen(server: Arc<Server>, listener: TcpListener) {
    let (mut failures, mut refusals) = (Seldom::default(), Seldom::default());
    loop {
        let accepted = tokio::select! {
            biased;
            () = server.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if failures.is_due(Instant::now().into_std()) {
                    tracing::warn!(%error, "transfer connections cannot be accepted");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&server.connections).try_acquire_owned() else {
            if refusals.is_due(Instant::now().into_std()) {
                tracing::warn!(%peer, "too many transfer connections, some are turned away");
            }
            continue;
        };
        let connection = Connection::run(Arc::clone(&server), stream, server.strangers.enter());
        let counters = Arc::clone(&server.counters);
        server.tasks.spawn(async move {
            if let Err(error) = connection.await {
                if let LinkError::Protocol(error) = &error {
                    counters.broken(*error);
                }
                tracing::debug!(%peer, error = &error as &dyn std::error::Error, "transfer stream ended");
            }
            drop(slot);
        });
    }
}

struct Connection {
    server: Arc<Server>,
    stream: TcpStream,
    /// Whether it stays on this host.
    is_local: bool,
    frames: FrameReader,
    writer: FrameWriter,
}

impl Connection {
    async fn run(server: Arc<Server>, mut stream: TcpStream, stranger: Stranger) -> Result<(), LinkError> {
        super::tune(&stream);
        let is_local = super::is_local(stream.local_addr(), stream.peer_addr());
        let mut frames = FrameReader::new();
        let admitted = timeout(CONNECT_TIMEOUT, handshake::admit(&server, &mut stream, &mut frames));
        let admitted = tokio::select! {
            biased;
            admitted = admitted => admitted.map_err(|_| LinkError::Closed)??,
            () = stranger.displaced.cancelled() => return Err(LinkError::Closed),
        };
        drop(stranger);
        let Some(admitted) = admitted else { return Ok(()) };
        let Admitted { hello, life, writer } = admitted;
        let mut connection = Self { server, stream, is_local, frames, writer };
        let first = tokio::select! {
            biased;
            // Whatever it waits for: a peer may leave a request half sent, or an answer lying.
            () = life.ended.cancelled() => return Ok(()),
            first = connection.serve_blocks(&life) => first?,
        };
        let Some(first) = first else { return Ok(()) };
        let Self { server, stream: socket, frames, writer, .. } = connection;
        control::serve(server, Accepted { socket, frames, writer, hello, life }, first).await
    }

    /// Answers reads and writes until the connection ends, or its first request is another: then it is a control connection.
    ///
    /// Dropped when the life ends, wherever it stands: what it serves from, and receives into, is let go of with it.
    async fn serve_blocks(&mut self, life: &Life) -> Result<Option<(Header, Bytes)>, LinkError> {
        let (mut is_first, mut spin) = (true, Spin::default());
        loop {
            let mut soon = None;
            if self.is_local && !is_first && spin.is_worth_it() {
                soon = self.frames.next_soon(self.stream.as_fd(), SPIN)?;
                spin.tried(soon.is_some());
            }
            if life.ended.is_cancelled() {
                return Ok(None);
            }
            let frame = match soon {
                Some(frame) => Some(frame),
                None => self.frames.next(&mut self.stream).await?,
            };
            let Some((header, payload)) = frame else { return Ok(None) };
            match header.kind {
                Kind::Read => match wire::Read::decode(&payload) {
                    Ok(read) => self.answer(life, &header, &read).await?,
                    Err(error) => self.refuse(error.into(), header.seq).await?,
                },
                Kind::Write => self.take_write(life, &header, &payload).await?,
                kind if is_first && !kind.is_answer() => return Ok(Some((header, payload))),
                _ => return Err(LinkError::Protocol(WireError::Kind)),
            }
            is_first = false;
        }
    }

    async fn refuse(&mut self, denial: Denial, seq: u64) -> Result<(), LinkError> {
        self.server.counters.denied(denial);
        let head = self.writer.head(&denial.header(self.server.epoch(), seq), &[]);
        self.stream.write_all(&head).await.map_err(LinkError::io("sending a refusal"))
    }

    async fn answer(&mut self, life: &Life, header: &Header, read: &wire::Read) -> Result<(), LinkError> {
        if header.epoch != life.epoch {
            return self.refuse(Denial::Stale, header.seq).await;
        }
        let regions = self.server.regions();
        let permit = match self.server.permit(&regions, read.handoff, &read.blocks) {
            Ok(permit) => permit,
            Err(denial) => return self.refuse(denial, header.seq).await,
        };
        let len = read.blocks.iter().map(|block| block.len).sum();
        let data = Header { kind: Kind::Data, code: 0, len, epoch: life.epoch, seq: header.seq };
        let head = self.writer.head(&data, &[]);
        let device = |block: &Descriptor| matches!(region(&regions, block.region), Some(Region::Device(_)));
        if read.blocks.iter().any(device) {
            return self.answer_staged(&head, &regions, &read.blocks, permit).await;
        }
        let span = |block: &Descriptor| {
            let memory = region(&regions, block.region)?.host()?;
            Some(Span { memory, offset: block.offset as usize, len: block.len as usize })
        };
        let mut spans = Vec::with_capacity(read.blocks.len());
        spans.extend(read.blocks.iter().map_while(span));
        if spans.len() < read.blocks.len() {
            return self.refuse(Denial::Refused(Refusal::OutsideRegion), header.seq).await;
        }
        let mut cursor = Gather { head: &head, spans: &spans, within: 0 };
        // The socket has room more often than not: try before asking the reactor.
        cursor.send_some(&self.stream)?;
        if cursor.is_done() {
            self.server.count_served(read.handoff, u64::from(len));
            return Ok(());
        }
        let sent = tokio::select! {
            biased;
            sent = timeout(STALL_TIMEOUT, cursor.send_rest(&self.stream)) => sent.map_err(|_| LinkError::Closed)?,
            // The memory is about to be reused: rather no answer than a wrong one.
            () = permit.revoked.cancelled() => Err(LinkError::Closed),
        };
        sent?;
        self.server.count_served(read.handoff, u64::from(len));
        Ok(())
    }

    /// As [`Connection::answer`], where a block is in device memory.
    async fn answer_staged(
        &self,
        head: &[u8],
        regions: &Arc<[Region]>,
        blocks: &[Descriptor],
        permit: Permit,
    ) -> Result<(), LinkError> {
        let (revoked, permit) = (permit.revoked.clone(), Arc::new(permit));
        let send = staged::send(&self.stream, head, (&self.server, regions), blocks, &permit);
        let sent = tokio::select! {
            biased;
            sent = timeout(STALL_TIMEOUT, send) => sent.map_err(|_| LinkError::Closed)?,
            () = revoked.cancelled() => Err(LinkError::Closed),
        };
        sent?;
        self.server.counters.served(blocks.iter().map(|block| u64::from(block.len)).sum());
        Ok(())
    }
}
