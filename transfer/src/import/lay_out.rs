//! Ways of a peer's blocks into host memory: straight, run by run, or through a buffer from which they are laid out.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_config::BlockAt;
use baton_config::protocol::TicketBlock;

use super::{Peer, Placed, Reader, in_sequence};
use crate::error::TransferError;
use crate::memory::HostMemory;
use crate::plan::{Choice, RelayoutPlan};
use crate::session::{BlockRead, BlockSink, Descriptor, Destination};

/// Bytes of source blocks read at a time where blocks wait for each other: what waits is in memory. Those of tests are
/// small, and come in several groups all the same.
pub(super) const WAITING_MAX_BYTES: usize = if cfg!(test) { 2 << 10 } else { 64 << 20 };

/// Where blocks go.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) memory: &'a HostMemory,
    /// Where each block of the own sequence is in it.
    pub(super) at: &'a (dyn Fn(u32) -> BlockAt + Sync),
}

impl<P: Peer> Reader<'_, P> {
    /// Reads `blocks`, by rising index, and notes in `placed` what is there.
    pub(super) async fn read(
        &self,
        blocks: &[TicketBlock],
        target: Target<'_>,
        placed: &mut Placed,
    ) -> Result<(), TransferError> {
        let (same, other): (Vec<TicketBlock>, Vec<TicketBlock>) =
            blocks.iter().cloned().partition(|block| self.is_direct(block.index));
        self.read_same(&same, target, placed).await?;
        if self.plan.choice(self.session.verifies()) == Choice::Direct && !self.plan.is_direct() {
            return self.read_runs(&other, target, placed).await;
        }
        let waits = self.plan.needs_whole_blocks();
        let group = if waits { WAITING_MAX_BYTES / self.plan.source().block_bytes() } else { other.len() };
        let sink = LayOut { reader: self, target, held: Mutex::default(), placed: Mutex::default() };
        let mut done = Ok(());
        for group in other.chunks(group.max(1)) {
            done = done.and(self.read_group(group, &sink).await);
            if done.is_err() {
                break;
            }
        }
        debug_assert!(done.is_err() || lock(&sink.held).is_empty(), "blocks are held that nothing waits for");
        let indices = lock(&sink.placed).iter().copied().collect();
        self.note(placed, indices);
        done
    }

    /// Whether the peer's block is, byte for byte and with all its tokens wanted, the own block.
    pub(super) fn is_direct(&self, index: u32) -> bool {
        let tokens = self.plan.tokens_of(index, &self.tokens);
        self.plan.is_direct() && tokens.len() == self.plan.source().block_tokens as usize
    }

    async fn read_same(
        &self,
        blocks: &[TicketBlock],
        target: Target<'_>,
        placed: &mut Placed,
    ) -> Result<(), TransferError> {
        if blocks.is_empty() {
            return Ok(());
        }
        let reads: Vec<BlockRead> =
            blocks.iter().map(|b| self.block_read(b, (target.at)(b.index).numbers)).collect();
        let into = Destination::Memory(target.memory);
        let done = self.session.read(self.handoff, &reads, into, self.deadline).await;
        let good = |position: &usize| match &done {
            Ok(_) => true,
            Err(TransferError::Integrity { corrupt, .. }) => !corrupt.contains(position),
            Err(_) => false,
        };
        let indices: Vec<u32> = (0..blocks.len()).filter(good).map(|i| blocks[i].index).collect();
        self.note(placed, indices);
        done.map(|_| ()).map_err(|error| in_sequence(error, blocks))
    }

    /// Reads the wanted runs of blocks that nobody verifies, each to its place.
    async fn read_runs(
        &self,
        blocks: &[TicketBlock],
        target: Target<'_>,
        placed: &mut Placed,
    ) -> Result<(), TransferError> {
        let size = self.plan.source().dtype.size();
        let mut reads = Vec::new();
        for block in blocks {
            let whole = self.block_read(block, 0);
            for piece in self.plan.pieces(block.index, self.tokens.clone()) {
                let at = (target.at)(piece.dest_block).numbers;
                let bytes = piece.nest.run_len() * size;
                // A run is part of a block, whose length fits.
                let len = u32::try_from(bytes).unwrap_or(u32::MAX);
                piece.nest.for_each(|from, to| {
                    // Said by the peer: where it is past the end of all memory, the peer refuses it.
                    let offset = block.offset.saturating_add((from * size) as u64);
                    let source = Descriptor { offset, len, ..whole.source };
                    reads.push(BlockRead { source, to: at + to * size, expected: None });
                });
            }
        }
        if reads.is_empty() {
            return Ok(());
        }
        let into = Destination::Memory(target.memory);
        self.session.read(self.handoff, &reads, into, self.deadline).await?;
        placed.bytes += reads.iter().map(|read| u64::from(read.source.len)).sum::<u64>();
        placed.indices.extend(blocks.iter().map(|block| block.index));
        Ok(())
    }

    async fn read_group(
        &self,
        blocks: &[TicketBlock],
        sink: &LayOut<'_, '_, P>,
    ) -> Result<(), TransferError> {
        let reads: Vec<BlockRead> = blocks.iter().map(|b| self.block_read(b, 0)).collect();
        let sink = Group { sink, blocks };
        let into = Destination::Sink(&sink);
        let done = self.session.read(self.handoff, &reads, into, self.deadline).await;
        done.map(|_| ()).map_err(|error| in_sequence(error, blocks))
    }
}

/// Lays verified blocks out as they come.
struct LayOut<'a, 'r, P> {
    reader: &'a Reader<'r, P>,
    target: Target<'a>,
    /// Blocks that wait for others of the same destination block.
    held: Mutex<BTreeMap<u32, Vec<u8>>>,
    /// Source blocks all of whose wanted tokens are in place.
    placed: Mutex<BTreeSet<u32>>,
}

/// One read of a [`LayOut`].
struct Group<'a, 's, 'r, P> {
    sink: &'a LayOut<'s, 'r, P>,
    blocks: &'a [TicketBlock],
}

impl<P: Peer> BlockSink for Group<'_, '_, '_, P> {
    fn block(&self, position: usize, bytes: &[u8]) {
        let index = self.blocks[position].index;
        let LayOut { reader, target, placed, .. } = self.sink;
        if reader.plan.needs_whole_blocks() {
            return self.sink.assemble(index, bytes);
        }
        reader.plan.scatter(index, bytes, reader.tokens.clone(), target.memory, target.at);
        lock(placed).insert(index);
    }
}

impl<P: Peer> LayOut<'_, '_, P> {
    /// Fills the destination blocks of which `index` was the last source block to come.
    fn assemble(&self, index: u32, bytes: &[u8]) {
        let Reader { plan, tokens, .. } = self.reader;
        let mut held = lock(&self.held);
        let dest_blocks = plan.dest_blocks(&plan.tokens_of(index, tokens));
        let alone = dest_blocks.clone().all(|dest| plan.sources_of(dest, tokens).len() == 1);
        if !alone {
            held.insert(index, bytes.to_vec());
        }
        let is_here = |source: u32| source == index || held.contains_key(&source);
        let block = |source: u32| if source == index { bytes } else { held[&source].as_slice() };
        for dest in dest_blocks.filter(|dest| plan.sources_of(*dest, tokens).all(is_here)) {
            plan.assemble(dest, tokens, block, self.target.memory, (self.target.at)(dest));
        }
        self.let_go(&mut held, index);
    }

    /// Drops the blocks that nothing waits for any more: all others of their destination blocks came.
    fn let_go(&self, held: &mut BTreeMap<u32, Vec<u8>>, index: u32) {
        let Reader { plan, tokens, .. } = self.reader;
        let mut placed = lock(&self.placed);
        let came: BTreeSet<u32> = held.keys().chain(placed.iter()).copied().chain([index]).collect();
        let near = neighbours(plan, index, tokens);
        for source in near.filter(|source| came.contains(source)) {
            if neighbours(plan, source, tokens).all(|other| came.contains(&other)) {
                held.remove(&source);
                placed.insert(source);
            }
        }
    }
}

/// The source blocks that share a destination block with `index`, itself among them.
fn neighbours(plan: &RelayoutPlan, index: u32, tokens: &Range<u32>) -> Range<u32> {
    let dest_blocks = plan.dest_blocks(&plan.tokens_of(index, tokens));
    let first = plan.sources_of(dest_blocks.start, tokens);
    let last = plan.sources_of(dest_blocks.end.saturating_sub(1), tokens);
    first.start..last.end
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
