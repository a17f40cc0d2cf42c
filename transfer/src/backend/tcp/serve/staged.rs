//! Answers out of device memory: blocks are copied into a bounded buffer, a buffer full at a time.

use std::sync::Arc;

use tokio::net::TcpStream;

use crate::agent::grants::Permit;
use crate::agent::region::Region;
use crate::agent::server::{Server, region};
use crate::backend::tcp::gather::{GATHER_BYTES, Gather};
use crate::error::LinkError;
use crate::jobs;
use crate::memory::{HostMemory, Span};
use crate::session::Descriptor;

/// Sends `head` and then `blocks`, which are inside `regions`.
pub(super) async fn send(
    stream: &TcpStream,
    head: &[u8],
    (server, regions): (&Server, &Arc<[Region]>),
    blocks: &[Descriptor],
    permit: &Arc<Permit>,
) -> Result<(), LinkError> {
    let mut memory = HostMemory::allocate(GATHER_BYTES, "serving").map_err(LinkError::Memory)?;
    let mut head = head;
    for round in rounds(blocks) {
        let len = round.iter().map(|piece| piece.len).sum();
        let (regions, permit) = (Arc::clone(regions), Arc::clone(permit));
        let filled = jobs::start(&server.tasks, move || {
            let filled = fill(&regions, &round, memory);
            // The end of a grant also waits for a copy that nobody waits for any more.
            drop(permit);
            filled
        });
        memory = filled.await.ok_or(LinkError::Closed)??;
        let spans = [Span { memory: &memory, offset: 0, len }];
        Gather { head, spans: &spans, within: 0 }.send_rest(stream).await?;
        head = &[];
    }
    Ok(())
}

/// A part of a block, at most [`GATHER_BYTES`].
struct Piece {
    block: Descriptor,
    from: usize,
    len: usize,
}

/// Splits `blocks` into what fits the buffer at a time.
fn rounds(blocks: &[Descriptor]) -> impl Iterator<Item = Vec<Piece>> {
    let mut blocks = blocks.iter();
    let mut rest: Option<(Descriptor, usize)> = None;
    std::iter::from_fn(move || {
        let (mut round, mut room) = (Vec::new(), GATHER_BYTES);
        while room > 0 {
            let Some((block, from)) = rest.take().or_else(|| Some((*blocks.next()?, 0))) else { break };
            let len = (block.len as usize - from).min(room);
            round.push(Piece { block, from, len });
            room -= len;
            rest = (from + len < block.len as usize).then_some((block, from + len));
        }
        (!round.is_empty()).then_some(round)
    })
}

fn fill(regions: &[Region], round: &[Piece], into: HostMemory) -> Result<HostMemory, LinkError> {
    let mut at = 0;
    for Piece { block, from, len } in round {
        let region = region(regions, block.region).ok_or(LinkError::Closed)?;
        let copied = region.copy_to(block.offset as usize + from, &into, at, *len);
        copied.map_err(|error| {
            LinkError::io("copying blocks from their device")(std::io::Error::other(error))
        })?;
        at += len;
    }
    Ok(into)
}
