//! The owning side of `shm`: passes memory to readers on this host.

use std::sync::Arc;

use rustix::process::geteuid;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::take::AllLent;
use super::{CONTROL, pass};
use crate::agent::RegionId;
use crate::agent::server::{Denial, Life, Server};
use crate::agent::strangers::Stranger;
use crate::backend::CONNECT_TIMEOUT;
use crate::backend::frames::FrameReader;
use crate::error::{LinkError, Refusal};
use crate::memory::HostMemory;
use crate::wire::{self, Hello, Kind, WireError};

/// Binds the socket of this process.
pub(crate) fn bind(incarnation: u128) -> std::io::Result<UnixListener> {
    let address = super::socket_address(incarnation)?;
    let listener = std::os::unix::net::UnixListener::bind_addr(&address)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Accepts readers until the agent stops.
pub(crate) async fn listen(server: Arc<Server>, listener: UnixListener) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = server.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(crate::backend::tcp::serve::ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(slot) = Arc::clone(&server.connections).try_acquire_owned() else { continue };
        let (frames, lent) = (FrameReader::new(), AllLent::default());
        let mut connection = Connection { server: Arc::clone(&server), stream, frames, lent };
        let stranger = server.strangers.enter();
        server.tasks.spawn(async move {
            if let Err(error) = connection.run(stranger).await {
                if let LinkError::Protocol(error) = &error {
                    connection.server.counters.broken(*error);
                }
                tracing::debug!(error = &error as &dyn std::error::Error, "shared memory reader ended");
            }
            drop(slot);
        });
    }
}

pub(super) struct Connection {
    pub(super) server: Arc<Server>,
    pub(super) stream: UnixStream,
    frames: FrameReader,
    pub(super) lent: AllLent,
}

impl Connection {
    async fn run(&mut self, stranger: Stranger) -> Result<(), LinkError> {
        let welcomed = tokio::select! {
            biased;
            welcomed = timeout(CONNECT_TIMEOUT, self.welcome()) => welcomed.map_err(|_| LinkError::Closed)??,
            () = stranger.displaced.cancelled() => return Err(LinkError::Closed),
        };
        drop(stranger);
        let Some(life) = welcomed else { return Ok(()) };
        tokio::select! {
            biased;
            // Whatever it waits for: a peer may leave an answer lying.
            () = life.ended.cancelled() => Ok(()),
            served = self.serve(&life) => served,
        }
    }

    async fn serve(&mut self, life: &Life) -> Result<(), LinkError> {
        loop {
            let Some((header, payload)) = self.frames.next(&mut self.stream).await? else { return Ok(()) };
            match header.kind {
                Kind::Map | Kind::Locate => {}
                Kind::Lend => {
                    self.lend(life, header.seq, &payload).await?;
                    continue;
                }
                Kind::Write => {
                    self.take(life, &header, &payload).await?;
                    continue;
                }
                _ => return Err(LinkError::Protocol(WireError::Kind)),
            }
            let region = wire::decode_map(&payload).map_err(LinkError::Protocol)?;
            match self.memory(header.kind, region) {
                Some(memory) if header.kind == Kind::Map => {
                    self.pass(Kind::Mapped, life, header.seq, &memory).await?;
                }
                Some(memory) => self.locate(life, header.seq, &memory).await?,
                None => self.refuse(Denial::Refused(Refusal::OutsideRegion), header.seq).await?,
            }
        }
    }

    /// The memory that is asked for.
    fn memory(&self, kind: Kind, region: RegionId) -> Option<HostMemory> {
        match (kind, region) {
            (Kind::Locate, CONTROL) => Some(self.server.control.memory().clone()),
            _ => self.server.region(region)?.host().cloned(),
        }
    }

    async fn welcome(&mut self) -> Result<Option<Life>, LinkError> {
        let Some((header, payload)) = self.frames.next(&mut self.stream).await? else { return Ok(None) };
        if header.kind != Kind::Hello {
            return Err(LinkError::Protocol(WireError::Kind));
        }
        let hello = Hello::decode(&payload).map_err(LinkError::Protocol)?;
        let credentials = self.stream.peer_cred().map_err(LinkError::io("asking who connects"))?;
        let admitted = match credentials.uid() == geteuid().as_raw() {
            true => self.server.admit(header.epoch, &hello),
            false => Err(Denial::Refused(Refusal::Unavailable)),
        };
        match admitted {
            Ok(life) => {
                let server = Arc::clone(&self.server);
                self.pass(Kind::Welcome, &life, 0, server.control.memory()).await?;
                Ok(Some(life))
            }
            Err(denial) => {
                self.refuse(denial, 0).await?;
                Ok(None)
            }
        }
    }

    async fn pass(
        &mut self,
        kind: Kind,
        life: &Life,
        seq: u64,
        memory: &HostMemory,
    ) -> Result<(), LinkError> {
        let Some(file) = memory.file() else { return self.locate(life, seq, memory).await };
        let frame = wire::encode_frame(kind, life.epoch, seq, &(memory.len() as u64).to_le_bytes());
        pass::send(&self.stream, &frame, file).await.map_err(LinkError::io("passing memory"))
    }

    async fn locate(&mut self, life: &Life, seq: u64, memory: &HostMemory) -> Result<(), LinkError> {
        let place = pass::encode_place(memory.place());
        let frame = wire::encode_frame(Kind::Located, life.epoch, seq, &place);
        self.stream.write_all(&frame).await.map_err(LinkError::io("saying where memory is"))
    }

    pub(super) async fn refuse(&mut self, denial: Denial, seq: u64) -> Result<(), LinkError> {
        self.server.counters.denied(denial);
        let bytes = denial.header(self.server.epoch(), seq).encode(&[]);
        self.stream.write_all(&bytes).await.map_err(LinkError::io("sending a refusal"))
    }
}
