//! The writing side of `tcp`: announces blocks, sends them straight out of memory, waits for word that they arrived.

use std::io;
use std::ops::Range;

use tokio::io::AsyncReadExt;

use super::{REQUEST_BYTES, Stream, TcpLink, check_answer, plan_stripes};
use crate::backend::frames::{HEAD_MAX_BYTES, head_len};
use crate::backend::tcp::gather::Gather;
use crate::backend::{Fault, Pair, WriteJob};
use crate::digest::DigestSeed;
use crate::error::LinkError;
use crate::memory::Span;
use crate::session::BlockWrite;
use crate::wire::control::Write;
use crate::wire::{Header, Kind, MAX_READ_BLOCKS};

/// Requests sent ahead of their answers: few enough that the answers fit every socket. With a full one the peer would
/// take no more blocks.
const UNANSWERED_MAX: u64 = 64;

impl TcpLink {
    /// Writes; done when the peer has verified every block.
    pub(crate) async fn write(&self, job: &WriteJob<'_>) -> Result<(), Fault> {
        let stripes = plan_stripes(job.blocks.iter().map(|block| block.to.len), self.streams);
        let bytes = job.blocks.iter().map(|block| u64::from(block.to.len)).sum();
        let _turn = self.turn(stripes.len(), bytes).await?;
        let writes = stripes.into_iter().map(|stripe| self.write_stripe(job, stripe));
        futures_util::future::try_join_all(writes).await?;
        Ok(())
    }

    async fn write_stripe(&self, job: &WriteJob<'_>, stripe: Range<usize>) -> Result<(), Fault> {
        // Nothing is sent twice: a stream that died unnoticed must be found out before it is used.
        let quiet = || {
            let mut idle = self.idle();
            std::iter::from_fn(|| idle.pop()).find(Stream::is_quiet)
        };
        let mut stream = match quiet() {
            Some(stream) => stream,
            None => Stream::open(&self.pair, &self.route).await?,
        };
        stream.write(job, stripe, &self.pair).await?;
        self.idle().push(stream);
        Ok(())
    }
}

impl Stream {
    /// Whether the connection stands, and nothing waits in it.
    fn is_quiet(&self) -> bool {
        let mut byte = [0];
        matches!(self.socket.try_read(&mut byte), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    async fn write(&mut self, job: &WriteJob<'_>, stripe: Range<usize>, pair: &Pair) -> Result<(), Fault> {
        let mut answered = self.next_seq;
        let mut start = stripe.start;
        while start < stripe.end {
            // The peer's answers are a header each: some may wait in the socket while blocks are sent.
            if self.next_seq - answered == UNANSWERED_MAX {
                self.acknowledged(answered, pair).await?;
                answered += 1;
            }
            let end = request_end(job.blocks, start..stripe.end);
            self.send(job, start..end, pair).await?;
            start = end;
        }
        for seq in answered..self.next_seq {
            self.acknowledged(seq, pair).await?;
        }
        Ok(())
    }

    async fn send(&mut self, job: &WriteJob<'_>, blocks: Range<usize>, pair: &Pair) -> Result<(), Fault> {
        let digest = |index: usize| {
            let seed = DigestSeed { handoff: job.handoff, epoch: pair.epoch, index: index as u32 };
            job.from.block_digest(seed, job.blocks[index].from, job.blocks[index].to.len as usize)
        };
        let announced = Write {
            handoff: job.handoff,
            first: blocks.start as u32,
            blocks: job.blocks[blocks.clone()].iter().map(|block| block.to).collect(),
            digests: if job.verify { blocks.clone().map(digest).collect() } else { Vec::new() },
            windows: Vec::new(),
        };
        let seq = self.next_seq;
        self.next_seq += 1;
        let mut head = self.writer.frame(Kind::Write, pair.epoch, seq, &announced.encode());
        let len = announced.blocks.iter().map(|block| block.len).sum();
        let data = Header { kind: Kind::Data, code: 0, len, epoch: pair.epoch, seq };
        head.extend_from_slice(&self.writer.head(&data, &[]));
        let span =
            |block: &BlockWrite| Span { memory: job.from, offset: block.from, len: block.to.len as usize };
        let spans: Vec<Span<'_>> = job.blocks[blocks].iter().map(span).collect();
        // From the first byte on the peer may have taken some of it.
        job.progress.add(len as usize);
        Ok(Gather { head: &head, spans: &spans, within: 0 }.send_rest(&self.socket).await?)
    }

    async fn acknowledged(&mut self, seq: u64, pair: &Pair) -> Result<(), Fault> {
        let mut head = [0; HEAD_MAX_BYTES];
        let head = &mut head[..head_len(self.mac.as_ref())];
        self.socket.read_exact(head).await.map_err(LinkError::io("waiting for word of a write"))?;
        check_answer(head, self.mac.as_mut(), (Kind::Written, 0, seq), pair)
    }
}

/// Where the request that starts a range of blocks ends: it has one region, and a bound of blocks and bytes.
fn request_end(blocks: &[BlockWrite], range: Range<usize>) -> usize {
    let region = blocks[range.start].to.region;
    let mut total = 0;
    let fits = |block: &&BlockWrite| {
        let first = total == 0;
        total += u64::from(block.to.len);
        (first || total <= REQUEST_BYTES) && block.to.region == region
    };
    range.start + blocks[range].iter().take(MAX_READ_BLOCKS).take_while(fits).count()
}
