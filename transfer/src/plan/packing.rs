//! Blocks of an arena and their packed form, in which a block is one run: on the wire and in staging.

use baton_config::KvGeometry;

use crate::layout::{Axis, Nest};

/// How the blocks of an arena and their packed form correspond.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packing {
    geometry: KvGeometry,
    blocks: u32,
    /// From the arena (source) to the packed form (destination).
    nest: Nest,
}

impl Packing {
    /// For an arena of `blocks` blocks.
    pub(crate) fn new(geometry: KvGeometry, blocks: u32) -> Self {
        let (arena, packed) = (geometry.arena_strides(blocks), geometry.strides());
        let axis = |count: u32, source, dest| Axis { count: count as usize, source, dest };
        let axes = [
            axis(geometry.layers, arena.layer, packed.layer),
            axis(geometry.planes(), arena.kv, packed.kv),
            axis(geometry.kv_heads, arena.head, packed.head),
            axis(geometry.block_tokens, arena.token, packed.token),
        ];
        Self { geometry, blocks, nest: Nest::new(0, 0, geometry.head_dim as usize, axes) }
    }

    /// For an arena in a memory of `len` bytes, which holds as many blocks as fit.
    pub(crate) fn of_memory(geometry: KvGeometry, len: usize) -> Self {
        Self::new(geometry, u32::try_from(len / geometry.block_bytes()).unwrap_or(u32::MAX))
    }

    /// Whether each block is one run of the arena.
    pub(crate) fn is_identity(&self) -> bool {
        self.geometry.layout.is_block_first()
    }

    /// Bytes of a packed block.
    pub(crate) fn block_bytes(&self) -> usize {
        self.geometry.block_bytes()
    }

    /// Calls `each(in the arena, in the packed form, bytes)` for every run of a block, until one fails. They come in
    /// the order of the packed form, which is that of the arena without the blocks between.
    pub(crate) fn try_for_each<E>(
        &self,
        block: u32,
        mut each: impl FnMut(usize, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let (size, at) = (self.geometry.dtype.size(), self.geometry.arena_at(self.blocks, block));
        if self.is_identity() {
            return each(at.numbers, 0, self.geometry.block_bytes());
        }
        let mut done = Ok(());
        self.nest.for_each(|arena, packed| {
            if done.is_ok() {
                done = each(at.numbers + arena * size, packed * size, self.nest.run_len() * size);
            }
        });
        let scales = self.geometry.block_bytes() - self.geometry.scales_offset();
        match done {
            Ok(()) if scales > 0 => each(at.scales, self.geometry.scales_offset(), scales),
            done => done,
        }
    }
}
