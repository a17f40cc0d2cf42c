//! A list of blocks by age, with removal from anywhere in constant time.

use crate::arena::BlockId;

const NONE: u32 = u32::MAX;

/// Neighbours of a listed block, or `None` for a block that is not listed.
#[derive(Debug, Clone, Copy)]
struct Node {
    older: u32,
    newer: u32,
}

/// Blocks from the oldest to the newest; links lie in a table indexed by block.
#[derive(Debug)]
pub(super) struct Lru {
    nodes: Vec<Option<Node>>,
    oldest: u32,
    newest: u32,
    len: u32,
}

impl Lru {
    pub(super) fn new(blocks: u32) -> Self {
        Self { nodes: vec![None; blocks as usize], oldest: NONE, newest: NONE, len: 0 }
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    pub(super) fn contains(&self, block: BlockId) -> bool {
        self.nodes[block.0 as usize].is_some()
    }

    pub(super) fn oldest(&self) -> Option<BlockId> {
        (self.oldest != NONE).then_some(BlockId(self.oldest))
    }

    pub(super) fn push_newest(&mut self, block: BlockId) {
        let node = &mut self.nodes[block.0 as usize];
        assert!(node.is_none(), "{block} is listed already");
        *node = Some(Node { older: self.newest, newer: NONE });
        let before = std::mem::replace(&mut self.newest, block.0);
        self.set_newer(before, block.0);
        self.len += 1;
    }

    pub(super) fn remove(&mut self, block: BlockId) {
        let node = self.nodes[block.0 as usize].take();
        let Some(Node { older, newer }) = node else { unreachable!("{block} is not listed") };
        self.set_newer(older, newer);
        match self.nodes.get_mut(newer as usize) {
            Some(Some(node)) => node.older = older,
            _ => self.newest = older,
        }
        self.len -= 1;
    }

    /// From the oldest to the newest.
    pub(super) fn iter(&self) -> impl Iterator<Item = BlockId> {
        let next = |block: &BlockId| {
            let newer = self.nodes[block.0 as usize].map_or(NONE, |node| node.newer);
            (newer != NONE).then_some(BlockId(newer))
        };
        std::iter::successors(self.oldest(), next)
    }

    /// `NONE` stands for the end of the list.
    fn set_newer(&mut self, block: u32, newer: u32) {
        match self.nodes.get_mut(block as usize) {
            Some(Some(node)) => node.newer = newer,
            _ => self.oldest = newer,
        }
    }
}
