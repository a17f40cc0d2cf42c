//! Receives the blocks of a write into region memory, as long as the grant for it stands.

use std::io;
use std::os::fd::AsFd;

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::time::timeout;

use super::{Connection, STALL_TIMEOUT};
use crate::agent::grants::Permit;
use crate::agent::server::{Denial, Life, region};
use crate::backend::tcp::receive::Receiver;
use crate::backend::{Progress, ReadJob};
use crate::digest::DigestSeed;
use crate::error::{LinkError, Refusal};
use crate::memory::HostMemory;
use crate::session::{BlockRead, Destination, Expected, overlaps};
use crate::wire::control::Write;
use crate::wire::{Header, Kind, WireError};

/// Of a write whose grant has ended, most bytes that are still taken, and thrown away, so that the writer is told by name what
/// happened: it does not take its path for broken then. What is longer is cut off.
const REST_MAX_BYTES: usize = 256 << 10;
/// Bytes thrown away at once.
const DISCARD_BYTES: usize = 64 << 10;

impl Connection {
    /// Takes the blocks of a write, which follow its announcement, and answers.
    pub(super) async fn take_write(
        &mut self,
        life: &Life,
        asked: &Header,
        payload: &[u8],
    ) -> Result<(), LinkError> {
        // Where the announcement cannot be read nobody knows what follows.
        let write = Write::decode(payload).map_err(LinkError::Protocol)?;
        let total: usize = write.blocks.iter().map(|block| block.len as usize).sum();
        let data = self.frames.next_data(&mut self.stream).await?;
        if data.seq != asked.seq || data.len as usize != total {
            return Err(LinkError::Protocol(WireError::Field));
        }
        let allowed = match asked.epoch == life.epoch {
            true => self.allow(&write),
            false => Err(Denial::Stale),
        };
        let (permit, memory) = match allowed {
            Ok(allowed) => allowed,
            Err(denial) => {
                self.discard(total).await?;
                return self.refuse(denial, asked.seq).await;
            }
        };
        let revoked = permit.revoked.clone();
        let mut received = 0;
        let corrupt = tokio::select! {
            biased;
            corrupt = self.receive(life, &write, &memory, (total, &mut received)) => Some(corrupt?),
            // The memory is about to be reused: from here on nothing of this write reaches it.
            () = revoked.cancelled() => None,
        };
        drop(permit);
        let Some(corrupt) = corrupt else {
            let rest = total - received;
            if rest > REST_MAX_BYTES {
                return Err(LinkError::Closed);
            }
            self.discard(rest).await?;
            return self.refuse(Denial::Refused(Refusal::NotGranted), asked.seq).await;
        };
        if corrupt > 0 {
            self.server.counters.checksum_mismatches(corrupt as u64);
            return self.refuse(Denial::Refused(Refusal::Corrupt), asked.seq).await;
        }
        self.server.counters.taken(total as u64);
        let written = Header { kind: Kind::Written, code: 0, len: 0, epoch: life.epoch, seq: asked.seq };
        let head = self.writer.head(&written, &[]);
        self.stream.write_all(&head).await.map_err(LinkError::io("acknowledging a write"))
    }

    /// Whether the blocks of a write may be put where it says, and the memory they go to.
    fn allow(&self, write: &Write) -> Result<(Permit, HostMemory), Denial> {
        let regions = self.server.regions();
        let permit = self.server.permit_write(&regions, write.handoff, &write.blocks)?;
        let first = write.blocks[0].region;
        if write.blocks.iter().any(|block| block.region != first) {
            return Err(Denial::Refused(Refusal::Malformed));
        }
        if overlaps(write.blocks.iter().map(|block| (block.offset, block.len))) {
            return Err(Denial::Refused(Refusal::Overlap));
        }
        let memory = region(&regions, first).and_then(|region| region.host().cloned());
        Ok((permit, memory.ok_or(Denial::Refused(Refusal::Unreachable))?))
    }

    /// Receives blocks into their places, and counts their bytes; how many of them failed their digest.
    async fn receive(
        &mut self,
        life: &Life,
        write: &Write,
        memory: &HostMemory,
        (total, received): (usize, &mut usize),
    ) -> Result<usize, LinkError> {
        let blocks: Vec<BlockRead> = write
            .blocks
            .iter()
            .enumerate()
            .map(|(at, block)| {
                let index = write.first + at as u32;
                let seed = DigestSeed { handoff: write.handoff, epoch: life.epoch, index };
                let expected = write.digests.get(at).map(|digest| Expected { seed, digest: *digest });
                BlockRead { source: *block, to: block.offset as usize, expected }
            })
            .collect();
        let progress = Progress::new(blocks.len());
        let into = Destination::Memory(memory);
        let job =
            ReadJob { handoff: write.handoff, blocks: &blocks, into, verify: true, progress: &progress };
        let mut receiver = Receiver::new(&job, 0..blocks.len());
        let early = self.frames.take_rest(total);
        receiver.take(memory, &early);
        *received = early.len();
        while *received < total {
            let fill = || receiver.fill(self.stream.as_fd(), &mut [], blocks.len());
            let filled = timeout(STALL_TIMEOUT, self.stream.async_io(Interest::READABLE, fill));
            let filled = filled.await.map_err(|_| LinkError::Closed)?;
            match filled.map_err(LinkError::io("receiving blocks"))? {
                0 => return Err(LinkError::Closed),
                filled => {
                    receiver.advance(filled);
                    *received += filled;
                }
            }
        }
        Ok(receiver.corrupt.len())
    }

    /// Reads bytes nobody wants, so that the connection can go on.
    async fn discard(&mut self, total: usize) -> Result<(), LinkError> {
        let mut left = total - self.frames.take_rest(total).len();
        let mut bytes = vec![0; DISCARD_BYTES.min(left)];
        while left > 0 {
            let room = bytes.len().min(left);
            let read = timeout(STALL_TIMEOUT, self.stream.read(&mut bytes[..room]));
            match read.await.map_err(|_| LinkError::Closed)?.map_err(LinkError::io("receiving blocks"))? {
                0 => return Err(LinkError::io("receiving blocks")(io::ErrorKind::UnexpectedEof.into())),
                read => left -= read,
            }
        }
        Ok(())
    }
}
