//! The writing side of `shm` and `cma`: lends memory and asks the owner to copy from it.

use std::os::fd::OwnedFd;

use tokio::time::Instant;

use super::{Access, Requests, ShmLink};
use crate::backend::shm::pass::{self, Passed};
use crate::backend::{Fault, WriteJob};
use crate::digest::DigestSeed;
use crate::error::{LinkError, Refusal};
use crate::memory::{HostMemory, MemorySpan};
use crate::wire::control::{Lend, MAX_LENT, Take, Write};
use crate::wire::{self, Kind, MAX_READ_BLOCKS, WireError};

/// Bytes the owner is asked to copy at once, unless a single block has more.
const TAKE_BYTES: u64 = 16 << 20;

/// What the owner was lent, by number.
pub(super) struct Lendings {
    spans: [Option<MemorySpan>; MAX_LENT as usize],
    next: usize,
    /// Tells this process from another that gets its number.
    witness: Box<[u8; 16]>,
}

impl Lendings {
    pub(super) fn new() -> std::io::Result<Self> {
        let mut witness = Box::new([0; 16]);
        rustix::rand::getrandom(&mut *witness, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self { spans: Default::default(), next: 0, witness })
    }

    /// The number of memory that is lent. What nobody else holds is forgotten: its place may become another's.
    fn find(&mut self, span: &MemorySpan) -> Option<u8> {
        for kept in &mut self.spans {
            *kept = kept.take().filter(|kept| !kept.is_orphan());
        }
        let is_it = |kept: &Option<MemorySpan>| kept.as_ref().is_some_and(|kept| kept.is_same(span));
        self.spans.iter().position(is_it).map(|number| number as u8)
    }
}

/// Ends a link whose stream stands in the middle of something.
struct Unfinished<'a>(Option<&'a OwnedFd>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(life) = self.0 {
            let _ = rustix::net::shutdown(life, rustix::net::Shutdown::Both);
        }
    }
}

impl ShmLink {
    /// Has the owner copy blocks; done when it has verified them.
    pub(crate) async fn write(&self, job: &WriteJob<'_>) -> Result<(), Fault> {
        self.check_life(Instant::now())?;
        let mut start = 0;
        while start < job.blocks.len() {
            // Anew for every request, so that others have theirs in between.
            let mut requests = self.requests.lock().await;
            let number = self.lend(&mut requests, job.from).await?;
            let mut bytes = 0;
            let rest = &job.blocks[start..];
            let fits = rest.iter().take(MAX_READ_BLOCKS).take_while(|block| {
                let first = bytes == 0;
                bytes += u64::from(block.to.len);
                first || bytes <= TAKE_BYTES
            });
            let blocks = &rest[..fits.count()];
            let digest = |(at, block): (usize, &crate::session::BlockWrite)| {
                let index = (start + at) as u32;
                let seed = DigestSeed { handoff: job.handoff, epoch: self.pair.epoch, index };
                job.from.block_digest(seed, block.from, block.to.len as usize)
            };
            let write = Write {
                handoff: job.handoff,
                first: start as u32,
                blocks: blocks.iter().map(|block| block.to).collect(),
                digests: if job.verify {
                    blocks.iter().enumerate().map(digest).collect()
                } else {
                    Vec::new()
                },
                windows: Vec::new(),
            };
            let take = Take { number, from: blocks.iter().map(|block| block.from as u64).collect(), write };
            // From here on the owner may have taken some of it.
            job.progress.add(blocks.iter().map(|block| block.to.len as usize).sum());
            let unfinished = Unfinished(Some(&self.life));
            let seq = requests.send(Kind::Write, self.pair.epoch, &take.encode()).await?;
            unfinished.end();
            // Given up here, the answer is passed over later.
            match requests.answer(seq).await?? {
                Passed::Done(Kind::Written) => {}
                _ => return Err(Fault::protocol(WireError::Kind)),
            }
            (start..start + blocks.len()).for_each(|index| job.progress.finish(index));
            start += blocks.len();
        }
        Ok(())
    }

    /// The number by which the owner knows `memory`.
    async fn lend(&self, requests: &mut Requests, memory: &HostMemory) -> Result<u8, Fault> {
        let span = memory.span();
        if let Some(number) = requests.lendings.find(&span) {
            return Ok(number);
        }
        let lendings = &mut requests.lendings;
        let free = lendings.spans.iter().position(Option::is_none);
        let number = free.unwrap_or(lendings.next % usize::from(MAX_LENT));
        (lendings.next, lendings.spans[number]) = (number + 1, None);
        let file = memory.file().filter(|_| self.access == Access::Map);
        let place = memory.place();
        let lend = Lend {
            number: number as u8,
            has_file: file.is_some(),
            address: place.address as u64,
            len: place.len as u64,
            witness_at: lendings.witness.as_ptr().addr() as u64,
            witness: u128::from_le_bytes(*lendings.witness),
        };
        let unfinished = Unfinished(Some(&self.life));
        let seq = requests.send(Kind::Lend, self.pair.epoch, &lend.encode()).await?;
        let mut answer = requests.answer(seq).await?;
        if let (Ok(Passed::Done(Kind::Lent)), Some(file)) = (&answer, file) {
            let len = (memory.len() as u64).to_le_bytes();
            let frame = wire::encode_frame(Kind::Mapped, self.pair.epoch, seq, &len);
            pass::send(&requests.stream, &frame, file).await.map_err(LinkError::io("passing memory"))?;
            answer = requests.answer(seq).await?;
        }
        unfinished.end();
        match answer {
            Ok(Passed::Done(Kind::Lent)) => {
                requests.lendings.spans[number] = Some(span.lent());
                Ok(number as u8)
            }
            Ok(_) => Err(Fault::protocol(WireError::Kind)),
            // Of this writer's memory, not of the path: reads go on.
            Err(Fault::Refused(_)) => Err(Fault::Refused(Refusal::Unreachable)),
            Err(fault) => Err(fault),
        }
    }
}

impl Unfinished<'_> {
    fn end(mut self) {
        self.0 = None;
    }
}
