//! What every device must do, whoever made it.

use baton_config::{Epoch, HandoffId};
use baton_transfer::{Device, DigestSeed, HostMemory, Move, MoveLoop, block_digest};

/// Numbers that look random, the same in every run.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 20
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

pub(crate) fn seed(index: u32) -> DigestSeed {
    DigestSeed { handoff: HandoffId(0x0123_4567_89ab_cdef_0f1e_2d3c_4b5a_6978), epoch: Epoch(11), index }
}

fn host(len: usize) -> HostMemory {
    HostMemory::allocate(len, "test").unwrap()
}

fn bytes_of(memory: &HostMemory, at: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(at, &mut bytes);
    bytes
}

fn device_bytes(device: &dyn Device, at: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    device.read(at, &mut bytes);
    bytes
}

/// A fresh device is zeroed, and what is written is read, by compute and by copies, pinned and not.
pub(crate) fn moves_bytes(device: &dyn Device) {
    let mut noise = Noise::new(1);
    assert!(device_bytes(device, 0, device.len()).iter().all(|byte| *byte == 0), "fresh memory is zeroed");
    let bytes = noise.bytes(device.len());
    device.write(0, &bytes);
    let memory = host(1 << 20);
    for pinned in [false, true] {
        let _pinned = pinned.then(|| device.pin(&memory).unwrap());
        for _ in 0..50 {
            let len = 1 + noise.below(70_000);
            let (at, to) = (noise.below(device.len() - len), noise.below(memory.len() - len));
            device.copy_to_host(at, &memory, to, len).unwrap();
            assert!(bytes_of(&memory, to, len) == bytes[at..at + len], "{len} bytes at {at}");
        }
    }
    let back = noise.bytes(100_001);
    memory.write(77, &back);
    device.copy_from_host(333, &memory, 77, back.len()).unwrap();
    assert!(device_bytes(device, 333, back.len()) == back);
    assert!(
        device_bytes(device, 0, 333) == bytes[..333]
            && device_bytes(device, 100_334, 99) == bytes[100_334..100_433]
    );
    device.write(5, b"numbers");
    assert_eq!(device_bytes(device, 4, 9), [&bytes[4..5], b"numbers", &bytes[12..13]].concat());
}

/// Copies that were submitted together all end, in any order of waiting, and when dropped.
pub(crate) fn overlaps_copies(device: &dyn Device) {
    let mut noise = Noise::new(2);
    let bytes = noise.bytes(1 << 20);
    device.write(0, &bytes);
    let memory = host(1 << 20);
    let pinned = device.pin(&memory).unwrap();
    let submit = |i: usize| device.submit_to_host(i << 16, &memory, i << 16, 1 << 16).unwrap();
    let mut copies: Vec<_> = (0..16).map(submit).collect();
    while !copies.is_empty() {
        let next = noise.below(copies.len());
        let copy = copies.swap_remove(next);
        if copies.len() % 2 == 0 { copy.finish().unwrap() } else { drop(copy) }
    }
    assert!(bytes_of(&memory, 0, 1 << 20) == bytes);
    drop(pinned);
    let blocks: Vec<(usize, usize)> = (0..300).map(|i| ((299 - i) * 3000, i * 2999)).collect();
    for (len, pin) in [(2999, true), (2999, false), (16, true), (1, true)] {
        memory.write(0, &vec![0; 1 << 20]);
        let _pinned = pin.then(|| device.pin(&memory).unwrap());
        device.submit_blocks_to_host(&blocks, &memory, len).unwrap().finish().unwrap();
        for (from, to) in &blocks {
            assert!(
                bytes_of(&memory, *to, len) == bytes[*from..from + len],
                "{len} bytes from {from} to {to}"
            );
        }
    }
    let (large, places) = (60_000, [(0, 500_000), (900_000, 3)]);
    let _pinned = device.pin(&memory).unwrap();
    device.submit_blocks_to_host(&places, &memory, large).unwrap().finish().unwrap();
    for (from, to) in places {
        assert!(bytes_of(&memory, to, large) == bytes[from..from + large]);
    }
}

/// Digests of the device are those of the host, for every length a formula of its own or a border has.
pub(crate) fn digests(device: &dyn Device) {
    let mut noise = Noise::new(3);
    let bytes = noise.bytes(device.len());
    device.write(0, &bytes);
    let kernels = device.kernels().unwrap();
    let borders =
        [241, 255, 256, 257, 1023, 1024, 1025, 1088, 1089, 2048, 4096, 4097, 65_536, 65_537, 262_144];
    let random: Vec<usize> = (0..60).map(|_| 1 + noise.below(20_000)).collect();
    for len in (1..=240).chain(borders).chain(random) {
        let count = 1 + noise.below(9);
        let blocks: Vec<(usize, DigestSeed)> = (0..count as u32)
            .map(|index| {
                let at = noise.below(device.len() - len + 1);
                // Blocks of an arena start at multiples of their size, which are even; others must work too.
                (if noise.below(2) == 0 { at & !7 } else { at }, seed(index))
            })
            .collect();
        let expected: Vec<u64> =
            blocks.iter().map(|(at, seed)| block_digest(*seed, &bytes[*at..*at + len])).collect();
        assert_eq!(
            kernels.digest_blocks(&blocks, len).unwrap(),
            expected,
            "blocks of {len} bytes: {blocks:?}"
        );
    }
    assert!(kernels.digest_blocks(&[], 4096).unwrap().is_empty());
    let many: Vec<(usize, DigestSeed)> = (0..5000).map(|i| (i as usize * 64, seed(i))).collect();
    let found = kernels.digest_blocks(&many, 512).unwrap();
    for ((at, seed), found) in many.iter().zip(found) {
        assert_eq!(found, block_digest(*seed, &bytes[*at..*at + 512]));
    }
}

/// Re-layouts on the device are what three loops do.
pub(crate) fn relayouts(device: &dyn Device) {
    let mut noise = Noise::new(4);
    let half = device.len() / 2;
    let bytes = noise.bytes(device.len());
    let kernels = device.kernels().unwrap();
    for round in 0..60 {
        device.write(0, &bytes);
        let mut expected = bytes.clone();
        let unit = [1, 2, 4, 8, 16, 64][noise.below(6)];
        // Destinations side by side from the middle on, sources anywhere before it.
        let mut to = half + noise.below(9) * unit;
        let count = if round < 3 { 1200 } else { 1 + noise.below(5) };
        let moves: Vec<Move> = (0..count)
            .map_while(|_| {
                let run = unit * (1 + noise.below(8));
                let counts = [1 + noise.below(4), 1 + noise.below(4), 1 + noise.below(3)];
                let mut step = (run, run);
                let loops = counts.map(|count| {
                    let each = MoveLoop { count, from: step.0, to: step.1 };
                    step = (step.0 * count + unit * noise.below(3), step.1 * count);
                    each
                });
                let mut each = Move { from: 0, to, run, loops };
                each.from = noise.below((half - each.ends().0) / unit) * unit;
                to = each.ends().1;
                (to <= device.len()).then_some(each)
            })
            .collect();
        for each in &moves {
            let [inner, middle, outer] = each.loops;
            for o in 0..outer.count {
                for m in 0..middle.count {
                    for i in 0..inner.count {
                        let from = each.from + o * outer.from + m * middle.from + i * inner.from;
                        let to = each.to + o * outer.to + m * middle.to + i * inner.to;
                        expected[to..to + each.run].copy_from_slice(&bytes[from..from + each.run]);
                    }
                }
            }
        }
        kernels.relayout(&moves).unwrap();
        assert!(device_bytes(device, 0, device.len()) == expected, "units of {unit}: {moves:?}");
    }
}
