//! Events and prompts as plain numbers, so that other indexes can be given the same ones.

/// Blocks of a shared prefix, of the rest of a sequence, and of an event.
pub(super) const HALF: usize = 32;
/// Sequences that share a prefix.
const SEQUENCES: usize = 16;

/// Random numbers by a seed: splitmix64.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap_or(0)
    }
}

/// One worker stored these blocks, the first of which follows `parent`.
pub(super) struct Event {
    pub(super) worker: usize,
    /// Ours needs no parents.
    #[expect(dead_code, reason = "for indexes that are trees")]
    pub(super) parent: Option<u64>,
    pub(super) blocks: Vec<u64>,
}

/// Events that come to about as many memberships, in a random order that keeps chains in order, and prompts to look up.
pub(super) fn workload(
    workers: usize,
    replicas: usize,
    memberships: usize,
    dice: &mut Dice,
) -> (Vec<Event>, Vec<Vec<u64>>) {
    let (mut shared, mut own, mut prompts) = (Vec::new(), Vec::new(), Vec::new());
    let mut count = 0;
    while count < memberships {
        let prefix: Vec<u64> = (0..HALF).map(|_| dice.next()).collect();
        let first = dice.below(workers);
        for replica in 0..replicas {
            shared.push(Event { worker: (first + replica) % workers, parent: None, blocks: prefix.clone() });
        }
        count += replicas * HALF;
        for _ in 0..SEQUENCES {
            let tail: Vec<u64> = (0..HALF).map(|_| dice.next()).collect();
            prompts.push(prefix.iter().chain(&tail).copied().collect());
            if replicas < workers || workers <= 8 {
                let worker = (first + dice.below(replicas)) % workers;
                own.push(Event { worker, parent: prefix.last().copied(), blocks: tail });
                count += HALF;
            }
            // Half of the lookups know the prefix only.
            prompts.push(prefix.iter().copied().chain((0..HALF).map(|_| dice.next())).collect());
        }
    }
    shuffle(&mut shared, dice);
    shuffle(&mut own, dice);
    shared.append(&mut own);
    (shared, prompts)
}

fn shuffle(events: &mut [Event], dice: &mut Dice) {
    for i in (1..events.len()).rev() {
        events.swap(i, dice.below(i + 1));
    }
}
