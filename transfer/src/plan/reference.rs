//! The plainest possible re-layout, element by element: what plans and pulls are tested against.
//!
//! Nothing here uses strides or the conversions of plans: places are spelled out from the word of the layout, numbers
//! are converted by the `half` crate, and fp8 by a search in the list of all its numbers.

use std::ops::Range;

use baton_config::{Dtype, KvGeometry, Scales};
use half::{bf16, f16};

/// Where an element is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Element {
    pub(crate) block: u32,
    pub(crate) layer: u32,
    pub(crate) kv: u32,
    pub(crate) token: u32,
    /// Counted within the worker.
    pub(crate) head: u32,
    pub(crate) dim: u32,
}

/// The offset of an element in an arena of `blocks` blocks, in bytes.
pub(crate) fn offset(g: &KvGeometry, blocks: u32, e: Element) -> usize {
    let word = g.layout.to_string();
    let word = if word.len() == 3 { format!("bl2{word}") } else { word };
    let word = word.replace('c', "2d");
    let mut number = 0;
    for letter in word.chars() {
        let (count, index) = match letter {
            // A block of a block-first arena has its scales before the next one.
            'b' if word.starts_with('b') => (0, 0),
            'b' => (blocks, e.block),
            'l' => (g.layers, e.layer),
            '2' => (if g.attention == baton_config::Attention::Kv { 2 } else { 1 }, e.kv),
            'h' => (g.kv_heads, e.head),
            'n' => (g.block_tokens, e.token),
            'd' => (g.head_dim, e.dim),
            other => panic!("{other}"),
        };
        number = number * count as usize + index as usize;
    }
    let first = if word.starts_with('b') { e.block as usize * g.block_bytes() } else { 0 };
    first + number * g.dtype.size()
}

/// The offset of the scale of an element in an arena of `blocks` blocks.
pub(crate) fn scale_offset(g: &KvGeometry, blocks: u32, e: Element) -> usize {
    let planes = if g.attention == baton_config::Attention::Kv { 2 } else { 1 };
    let plane = (e.layer * planes + e.kv) as usize;
    let (index, count) = match g.scales {
        Scales::Head => {
            let heads = g.kv_heads as usize;
            (plane * heads + e.head as usize, (g.layers * planes) as usize * heads)
        }
        _ => (plane, (g.layers * planes) as usize),
    };
    let numbers = (g.layers * planes * g.kv_heads * g.block_tokens * g.head_dim) as usize;
    if g.layout.to_string().starts_with(['b', 'n', 'h']) {
        e.block as usize * g.block_bytes() + numbers.next_multiple_of(4) + index * 4
    } else {
        (numbers * blocks as usize).next_multiple_of(4) + (e.block as usize * count + index) * 4
    }
}

/// The value of an fp8 byte.
pub(crate) fn fp8(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The fp8 number nearest to `number`: ties to the even one, beyond the largest the largest.
pub(crate) fn to_fp8(number: f32) -> u8 {
    let sign = if number.is_sign_negative() { 0x80 } else { 0 };
    if number.is_nan() {
        return sign | 0x7f;
    }
    let wanted = f64::from(number.abs());
    let value = |code: u8| f64::from(fp8(code));
    // The codes of positive numbers rise with them.
    let (mut low, mut high) = (0u8, 0x7e);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if value(middle) <= wanted { low = middle } else { high = middle - 1 }
    }
    let up = (low + 1).min(0x7e);
    let (down_by, up_by) = (wanted - value(low), value(up) - wanted);
    let nearest = if up_by < down_by || (up_by == down_by && low % 2 == 1) { up } else { low };
    sign | nearest
}

/// The bytes of a number in a format.
fn encode(dtype: Dtype, number: f32) -> Vec<u8> {
    match dtype {
        Dtype::F32 => {
            let quiet = if number.is_nan() { number.to_bits() | 0x40_0000 } else { number.to_bits() };
            quiet.to_le_bytes().to_vec()
        }
        Dtype::Bf16 => bf16::from_f32(number).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(number).to_le_bytes().to_vec(),
        Dtype::Fp8E4m3 => vec![to_fp8(number)],
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        Dtype::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        Dtype::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        Dtype::Fp8E4m3 => fp8(bytes[0]),
    }
}

/// A block of the source and what it is a block of.
#[derive(Clone, Copy)]
struct Origin<'a> {
    geometry: &'a KvGeometry,
    blocks: &'a [Vec<u8>],
}

impl Origin<'_> {
    fn bytes(&self, e: Element) -> &[u8] {
        let at = offset(self.geometry, 1, Element { block: 0, ..e });
        &self.blocks[e.block as usize][at..][..self.geometry.dtype.size()]
    }

    fn scale(&self, e: Element) -> f32 {
        if self.geometry.scales == Scales::None {
            return 1.0;
        }
        let wire = KvGeometry { layout: baton_config::KvLayout::Nhd, ..*self.geometry };
        let at = scale_offset(&wire, 1, Element { block: 0, ..e });
        f32::from_le_bytes(self.blocks[e.block as usize][at..][..4].try_into().unwrap())
    }

    fn number(&self, e: Element) -> f32 {
        decode(self.geometry.dtype, self.bytes(e)) * self.scale(e)
    }
}

/// Whether every destination scale can be one of the source's.
fn scales_travel(source: &KvGeometry, dest: &KvGeometry, heads: usize) -> bool {
    source.dtype == Dtype::Fp8E4m3
        && (source.scales == Scales::None
            || source.block_tokens.is_multiple_of(dest.block_tokens)
                && (dest.scales == Scales::Head || source.scales == Scales::Block || heads == 1))
}

/// The per-element copy that plans are measured against, into an arena of `arena_blocks` blocks, of which
/// `table` are the sequence's.
pub(crate) fn naive(
    source: &KvGeometry,
    dest: &KvGeometry,
    blocks: &[Vec<u8>],
    tokens: Range<u32>,
    (arena, arena_blocks, table): (&mut [u8], u32, &[u32]),
) {
    let origin = Origin { geometry: source, blocks };
    let [from, to] = [source, dest].map(|g| g.shard.heads(g.kv_heads));
    let common: Vec<u32> = from.clone().filter(|head| to.contains(head)).collect();
    let travel = scales_travel(source, dest, common.len());
    let keeps = source.dtype == dest.dtype && source.scales == Scales::None && dest.scales == Scales::None;
    let planes = if source.attention == baton_config::Attention::Kv { 2 } else { 1 };
    for layer in 0..source.layers {
        for kv in 0..planes {
            for t in tokens.clone() {
                for head in &common {
                    let at = |g: &KvGeometry, first: u32, block: u32| Element {
                        block,
                        layer,
                        kv,
                        token: t % g.block_tokens,
                        head: head - first,
                        dim: 0,
                    };
                    let s = at(source, from.start, t / source.block_tokens);
                    let d = at(dest, to.start, table[(t / dest.block_tokens) as usize]);
                    let scale = match dest.scales {
                        Scales::None => 1.0,
                        _ if travel => origin.scale(s),
                        _ => scale_of(origin, dest, &tokens, (t, *head), (layer, kv, &common)),
                    };
                    if dest.scales != Scales::None {
                        let place = scale_offset(dest, arena_blocks, d);
                        arena[place..][..4].copy_from_slice(&scale.to_le_bytes());
                    }
                    for dim in 0..source.head_dim {
                        let (s, d) = (Element { dim, ..s }, Element { dim, ..d });
                        let bytes = if keeps || (travel && dest.scales != Scales::None) {
                            origin.bytes(s).to_vec()
                        } else {
                            encode(dest.dtype, origin.number(s) / scale)
                        };
                        arena[offset(dest, arena_blocks, d)..][..bytes.len()].copy_from_slice(&bytes);
                    }
                }
            }
        }
    }
}

/// The scale a destination number is to have: the largest finite magnitude among all that share it, over 448.
fn scale_of(
    origin: Origin<'_>,
    dest: &KvGeometry,
    tokens: &Range<u32>,
    (token, head): (u32, u32),
    (layer, kv, common): (u32, u32, &[u32]),
) -> f32 {
    let source = origin.geometry;
    let first = source.shard.heads(source.kv_heads).start;
    let block = token / dest.block_tokens;
    let neighbours =
        (block * dest.block_tokens..(block + 1) * dest.block_tokens).filter(|t| tokens.contains(t));
    let heads: Vec<u32> = if dest.scales == Scales::Head { vec![head] } else { common.to_vec() };
    let mut amax = 0f32;
    for t in neighbours {
        for head in &heads {
            for dim in 0..source.head_dim {
                let (block, token) = (t / source.block_tokens, t % source.block_tokens);
                let number = origin.number(Element { block, layer, kv, token, head: head - first, dim });
                amax = if number.is_finite() { amax.max(number.abs()) } else { amax };
            }
        }
    }
    if amax == 0.0 { 1.0 } else { (amax / 448.0).max(f32::MIN_POSITIVE) }
}

/// `count` blocks of pseudo-random bits: every number format's corner cases come up, NaN included. Scales are plain
/// numbers.
pub(crate) fn blocks(g: &KvGeometry, count: u32, seed: u64) -> Vec<Vec<u8>> {
    let mut state = seed | 1;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    let block = |_| {
        let mut block: Vec<u8> = (0..g.block_bytes()).map(|_| next()).collect();
        if g.scales != Scales::None {
            let at = g.block_bytes() - 4 * g.scale_count();
            for scale in block[at..].as_chunks_mut::<4>().0 {
                *scale = (f32::from(scale[0]) / 64.0 + 0.01).to_le_bytes();
            }
        }
        block
    };
    (0..count).map(block).collect()
}
