//! Writes over `shm` and `cma`: the writer lends memory, and the owner of the granted ranges copies from it.
//!
//! ```text
//! writer                                     owner
//! Lend(number, place, witness) ─────────►    ready for its file, or proof that the kernel copies from it
//! file ─────────────────────────────────►    mapped, read-only
//! Take(number, places, blocks, digests) ─►   write grant covers them: copied and verified in one pass
//! ```
//!
//! Only the owner ever writes its memory: the end of a grant waits for the copy, and nothing can land after it.

use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::pass::{self, Passed};
use super::serve::Connection;
use crate::agent::grants::Permit;
use crate::agent::server::{Denial, Life, region};
use crate::backend::CONNECT_TIMEOUT;
use crate::digest::DigestSeed;
use crate::error::{LinkError, Refusal};
use crate::memory::{HostMemory, MAX_RANGES, PeerMemory, Process, RemoteRange, Span, copy_from_process};
use crate::session::collide;
use crate::wire::control::{Lend, MAX_LENT, Take};
use crate::wire::{self, Header, Kind, WireError};

/// Bytes copied between two turns of other tasks, after each of which the grant is looked at.
const TURN_BYTES: usize = 1 << 20;

/// Memory of a writer.
enum Lent {
    Mapped(PeerMemory),
    Located { process: Process, place: RemoteRange },
}

impl Lent {
    fn fits(&self, offset: usize, len: usize) -> bool {
        match self {
            Self::Mapped(memory) => memory.fits(offset, len),
            Self::Located { place, .. } => offset.checked_add(len).is_some_and(|end| end <= place.len),
        }
    }
}

/// The memories a writer has lent on one connection, by number.
#[derive(Default)]
pub(super) struct AllLent([Option<Lent>; MAX_LENT as usize]);

/// A block to be copied.
struct Copied {
    from: usize,
    to: HostMemory,
    offset: usize,
    len: usize,
    seed: DigestSeed,
    digest: Option<u64>,
}

impl Connection {
    /// Takes note of memory that is lent.
    pub(super) async fn lend(&mut self, life: &Life, seq: u64, payload: &[u8]) -> Result<(), LinkError> {
        let lend = Lend::decode(payload).map_err(LinkError::Protocol)?;
        let lent = if lend.has_file {
            // Who lends waits for this: nothing is in the stream that has no file beside it.
            self.say(Kind::Lent, life, seq).await?;
            let passed = timeout(CONNECT_TIMEOUT, pass::receive(&self.stream, &[Kind::Mapped]));
            match passed.await.map_err(|_| LinkError::Closed)? {
                Ok((_, Ok(Passed::File(file, len)))) => {
                    PeerMemory::map(file, len, "a writer's memory").ok().map(Lent::Mapped)
                }
                _ => return Err(LinkError::Protocol(WireError::Kind)),
            }
        } else {
            self.locate_lent(&lend)
        };
        let known = lent.is_some();
        self.lent.0[usize::from(lend.number)] = lent;
        match known {
            true => self.say(Kind::Lent, life, seq).await,
            false => self.refuse(Denial::Refused(Refusal::Unreachable), seq).await,
        }
    }

    /// Memory that the kernel is to copy from, once it has shown that it does.
    fn locate_lent(&self, lend: &Lend) -> Option<Lent> {
        let pid = self.stream.peer_cred().ok()?.pid().and_then(rustix::process::Pid::from_raw)?;
        let number = |word: u64| usize::try_from(word).ok();
        let place = RemoteRange { address: number(lend.address)?, len: number(lend.len)? };
        let process = Process::with_witness(pid, number(lend.witness_at)?, lend.witness.to_le_bytes());
        copy_from_process(&process, &mut Vec::new(), &mut [], std::iter::empty()).ok()?;
        Some(Lent::Located { process, place })
    }

    /// Copies blocks into granted ranges, and answers.
    pub(super) async fn take(
        &mut self,
        life: &Life,
        header: &Header,
        payload: &[u8],
    ) -> Result<(), LinkError> {
        let take = Take::decode(payload).map_err(LinkError::Protocol)?;
        let allowed = match header.epoch == life.epoch {
            true => self.allow(life, &take),
            false => Err(Denial::Stale),
        };
        let (permit, blocks) = match allowed {
            Ok(allowed) => allowed,
            Err(denial) => return self.refuse(denial, header.seq).await,
        };
        let copied = self.copy(&permit, usize::from(take.number), &blocks).await?;
        drop(permit);
        let Some(corrupt) = copied else {
            return self.refuse(Denial::Refused(Refusal::NotGranted), header.seq).await;
        };
        if corrupt > 0 {
            self.server.counters.checksum_mismatches(corrupt);
            return self.refuse(Denial::Refused(Refusal::Corrupt), header.seq).await;
        }
        self.server.counters.taken(blocks.iter().map(|block| block.len as u64).sum());
        self.say(Kind::Written, life, header.seq).await
    }

    /// Whether blocks may be copied to where they are to go, and from where they are said to be.
    fn allow(&self, life: &Life, take: &Take) -> Result<(Permit, Vec<Copied>), Denial> {
        let Take { number, from, write } = take;
        let regions = self.server.regions();
        let permit = self.server.permit_write(&regions, write.handoff, &write.blocks)?;
        if collide(&write.blocks) {
            return Err(Denial::Refused(Refusal::Overlap));
        }
        let lent = self.lent.0[usize::from(*number)].as_ref().ok_or(Denial::Refused(Refusal::Malformed))?;
        let mut blocks = Vec::with_capacity(write.blocks.len());
        for (at, (block, from)) in write.blocks.iter().zip(from).enumerate() {
            let len = block.len as usize;
            let from = usize::try_from(*from).ok().filter(|from| lent.fits(*from, len));
            let from = from.ok_or(Denial::Refused(Refusal::Malformed))?;
            let to = region(&regions, block.region).and_then(|region| region.host().cloned());
            let to = to.ok_or(Denial::Refused(Refusal::Unreachable))?;
            let index = write.first + at as u32;
            let seed = DigestSeed { handoff: write.handoff, epoch: life.epoch, index };
            let digest = write.digests.get(at).copied();
            blocks.push(Copied { from, to, offset: block.offset as usize, len, seed, digest });
        }
        Ok((permit, blocks))
    }

    /// Copies; how many blocks failed their digest. `None`: the grant ended meanwhile.
    async fn copy(
        &self,
        permit: &Permit,
        number: usize,
        blocks: &[Copied],
    ) -> Result<Option<u64>, LinkError> {
        let Some(lent) = &self.lent.0[number] else { return Err(LinkError::Closed) };
        let (mut corrupt, mut rest) = (0, blocks);
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |block: &&Copied| {
                let first = bytes == 0;
                bytes += block.len;
                first || bytes <= TURN_BYTES
            };
            let count = rest.iter().take(MAX_RANGES).take_while(fits).count();
            let (now, later) = rest.split_at(count);
            corrupt += match lent {
                Lent::Mapped(memory) => now.iter().filter(|block| !copy_mapped(memory, block)).count(),
                Lent::Located { process, place } => copy_located(process, *place, now)?,
            } as u64;
            rest = later;
            if !rest.is_empty() {
                tokio::task::yield_now().await;
            }
            // The memory is about to be reused: not a byte more.
            if permit.revoked.is_cancelled() {
                return Ok(None);
            }
        }
        Ok(Some(corrupt))
    }

    async fn say(&mut self, kind: Kind, life: &Life, seq: u64) -> Result<(), LinkError> {
        let frame = wire::encode_frame(kind, life.epoch, seq, &[]);
        self.stream.write_all(&frame).await.map_err(LinkError::io("answering a writer"))
    }
}

/// Whether a block has the digest it must have.
fn copy_mapped(memory: &PeerMemory, block: &Copied) -> bool {
    let Copied { from, to, offset, len, seed, digest } = block;
    match digest {
        None => {
            memory.copy_to(*from, to, *offset, *len);
            true
        }
        Some(digest) => memory.copy_to_digesting(*from, to, *offset, *len, *seed) == *digest,
    }
}

/// Has the kernel copy blocks; how many do not have the digest they must have.
fn copy_located(process: &Process, place: RemoteRange, blocks: &[Copied]) -> Result<usize, LinkError> {
    let from = |block: &Copied| RemoteRange { address: place.address + block.from, len: block.len };
    let mut from: Vec<RemoteRange> = blocks.iter().map(from).collect();
    let to = blocks.iter().map(|block| Span { memory: &block.to, offset: block.offset, len: block.len });
    copy_from_process(process, &mut from, &mut [], to).map_err(LinkError::io("copying from a writer"))?;
    let is_wrong = |block: &&Copied| {
        block
            .digest
            .is_some_and(|digest| block.to.block_digest(block.seed, block.offset, block.len) != digest)
    };
    Ok(blocks.iter().filter(is_wrong).count())
}
