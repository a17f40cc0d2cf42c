use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use baton_config::Epoch;
use baton_config::protocol::{KvEvent, KvEventBatch, KvTier};
use proptest::prelude::*;
use tokio::time::Instant;

use super::*;

const SMALL: Namespace = Namespace { scheme: HashScheme::Baton, block_tokens: 16 };
const LARGE: Namespace = Namespace { scheme: HashScheme::Baton, block_tokens: 32 };
const OTHER: Namespace = Namespace { scheme: HashScheme::Xxh3Pairs, block_tokens: 16 };
const TIERS: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Remote];

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

fn chain(seed: u64, blocks: usize) -> Vec<BlockHash> {
    let mut parent = BlockHash::root(seed);
    (0..blocks)
        .map(|at| {
            parent = parent.child(&[at as u32]);
            parent
        })
        .collect()
}

fn depths(index: &PrefixIndex, namespace: Namespace, chain: &[BlockHash], holder: Holder) -> (u32, u32) {
    let mut found = Found::default();
    index.find(namespace, chain, &mut found);
    let depth = found.depth(holder);
    (depth.device, depth.any)
}

fn sweep_all(index: &PrefixIndex) {
    while index.maintain() {}
}

#[test]
fn the_longest_prefix_of_each_holder_is_found() {
    let index = PrefixIndex::with_capacity(1 << 20);
    let prompt = chain(1, 100);
    let holders: Vec<Holder> = (0..60).map(|_| index.join().unwrap()).collect();
    for (i, holder) in holders.iter().enumerate() {
        index.store(SMALL, *holder, Tier::Device, &prompt[..i]);
        index.store(SMALL, *holder, Tier::Host, &prompt[..i + 20]);
    }
    for (i, holder) in holders.iter().enumerate() {
        assert_eq!(depths(&index, SMALL, &prompt, *holder), (i as u32, i as u32 + 20));
        assert_eq!(depths(&index, SMALL, &prompt[..10], *holder), (i.min(10) as u32, 10));
        assert_eq!(depths(&index, LARGE, &prompt, *holder), (0, 0), "another block size");
        assert_eq!(depths(&index, OTHER, &prompt, *holder), (0, 0), "another scheme");
        assert_eq!(depths(&index, SMALL, &chain(2, 100), *holder), (0, 0), "another salt");
    }
    assert_eq!(index.stats().blocks, 79);
    assert_eq!(index.stats().memberships, (0..60).map(|i| i + 20).sum::<u64>());
}

#[test]
fn who_left_is_swept_out_and_the_room_is_given_back() {
    let index = PrefixIndex::with_capacity(1 << 20);
    let before = index.stats();
    let (stays, leaves) = (index.join().unwrap(), index.join().unwrap());
    let prompts: Vec<_> = (0..200).map(|seed| chain(seed, 100)).collect();
    for prompt in &prompts {
        index.store(SMALL, leaves, Tier::Device, prompt);
    }
    index.store(SMALL, stays, Tier::Device, &prompts[0]);
    let full = index.stats();
    assert_eq!((full.blocks, full.memberships), (20_000, 20_100));
    index.leave(leaves);
    sweep_all(&index);
    let after = index.stats();
    assert_eq!((after.blocks, after.memberships), (100, 100));
    assert_eq!(depths(&index, SMALL, &prompts[0], stays), (100, 100));
    assert_eq!(index.join(), Some(leaves), "its number is free again");
    assert_eq!(depths(&index, SMALL, &prompts[3], leaves), (0, 0));
    assert!(after.bytes < full.bytes / 2 && after.bytes < 2 * before.bytes, "{before:?} {full:?} {after:?}");
}

#[test]
fn a_full_index_gives_up_what_is_oldest() {
    let index = PrefixIndex::with_capacity(10_000);
    let holder = index.join().unwrap();
    let kept = chain(u64::MAX, 50);
    for seed in 0..1000 {
        index.store(SMALL, holder, Tier::Device, &chain(seed, 100));
        index.store(SMALL, holder, Tier::Device, &kept);
        assert!(index.stats().blocks <= 10_000);
    }
    let stats = index.stats();
    assert!(stats.evicted > 85_000, "{stats:?}");
    assert_eq!(stats.memberships, stats.blocks);
    assert!(stats.bytes < 10_000 * BLOCK_MAX_BYTES + 100_000, "{stats:?}");
    assert_eq!(depths(&index, SMALL, &kept, holder), (50, 50), "stored again and again");
    for seed in 950..1000 {
        assert_eq!(depths(&index, SMALL, &chain(seed, 100), holder), (100, 100), "{seed} is young");
    }
    for seed in 0..890 {
        assert_eq!(depths(&index, SMALL, &chain(seed, 100), holder), (0, 0), "{seed} is old");
    }
}

#[test]
fn a_membership_takes_less_than_25_bytes() {
    for holders in [1, 8, 64] {
        let index = PrefixIndex::with_capacity(1 << 20);
        let all: Vec<Holder> = (0..holders).map(|_| index.join().unwrap()).collect();
        let mut worst: f64 = 0.0;
        for seed in 0..2000 {
            index.store(SMALL, all[seed as usize % holders], Tier::Device, &chain(seed, 64));
            let stats = index.stats();
            if stats.blocks > 50_000 {
                worst = worst.max(stats.bytes as f64 / stats.memberships as f64);
            }
        }
        assert!(worst < 16.0, "{worst} with {holders} holders");
    }
}

#[test]
fn a_reader_does_not_wait_for_a_writer() {
    let index = PrefixIndex::with_capacity(1000);
    let holder = index.join().unwrap();
    let prompt = chain(1, 10);
    index.store(SMALL, holder, Tier::Device, &prompt);
    let _busy = index.writer();
    let mut found = Found::default();
    index.find(SMALL, &prompt, &mut found);
    assert_eq!(found.depth(holder).device, 10);
}

#[test]
fn readers_are_never_far_wrong_while_writers_write() {
    let index = PrefixIndex::with_capacity(1 << 20);
    let (steady, busy) = (index.join().unwrap(), index.join().unwrap());
    let kept: Vec<_> = (0..20).map(|seed| chain(seed, 64)).collect();
    for prompt in &kept {
        index.store(SMALL, steady, Tier::Device, prompt);
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut looks, mut whole) = (0u64, 0u64);
            let mut found = Found::default();
            while !done.load(Ordering::Relaxed) || looks < 1000 {
                for prompt in &kept {
                    index.find(SMALL, prompt, &mut found);
                    let depth = found.depth(steady);
                    assert!(depth.device <= 64 && depth.any >= depth.device);
                    looks += 1;
                    whole += u64::from(depth.device == 64);
                }
            }
            (looks, whole)
        });
        for seed in 100..400 {
            let prompt = chain(seed, 200);
            index.store(SMALL, busy, Tier::Device, &prompt);
            index.store(SMALL, busy, Tier::Device, &kept[seed as usize % 20]);
            if seed % 3 == 0 {
                index.remove(SMALL, busy, Tier::Device, &prompt);
            }
        }
        done.store(true, Ordering::Relaxed);
        let (looks, whole) = reader.join().unwrap();
        assert!(whole * 100 >= looks * 90, "{whole} of {looks} lookups saw all of what never changed");
    });
}

#[derive(Debug, Clone)]
enum Op {
    Store { holder: usize, tier: usize, chain: u64, from: usize, to: usize, namespace: usize },
    Remove { holder: usize, tier: usize, chain: u64, from: usize, namespace: usize },
    Leave { holder: usize },
    Sweep,
}

fn any_op() -> impl Strategy<Value = Op> {
    let place = (0usize..5, 0usize..3, 0u64..6, 0usize..3);
    prop_oneof![
        6 => (place.clone(), 0usize..40, 0usize..41).prop_map(|((holder, tier, chain, namespace), from, to)| {
            Op::Store { holder, tier, chain, from: from.min(to), to: from.max(to), namespace }
        }),
        4 => (place, 0usize..40).prop_map(|((holder, tier, chain, namespace), from)| {
            Op::Remove { holder, tier, chain, from, namespace }
        }),
        1 => (0usize..5).prop_map(|holder| Op::Leave { holder }),
        2 => Just(Op::Sweep),
    ]
}

/// What the index should say: for each block, who holds it where.
type Model = BTreeMap<(usize, BlockHash), BTreeMap<usize, BTreeSet<usize>>>;

fn check(index: &PrefixIndex, model: &Model, holders: &[Holder]) -> Result<(), TestCaseError> {
    let namespaces = [SMALL, LARGE, OTHER];
    let mut found = Found::default();
    for (number, namespace) in namespaces.iter().enumerate() {
        for seed in 0..6 {
            for block in chain(seed, 40) {
                index.find(*namespace, &[block], &mut found);
                let held = model.get(&(number, block));
                for (who, holder) in holders.iter().enumerate() {
                    let tiers = held.and_then(|held| held.get(&who));
                    let wanted = Depth {
                        any: u32::from(tiers.is_some()),
                        device: u32::from(tiers.is_some_and(|tiers| tiers.contains(&0))),
                    };
                    prop_assert_eq!(found.depth(*holder), wanted);
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_index_is_a_plain_map(ops in prop::collection::vec(any_op(), 1..60)) {
        let index = PrefixIndex::with_capacity(1 << 20);
        let namespaces = [SMALL, LARGE, OTHER];
        let mut holders: Vec<Holder> = (0..5).map(|_| index.join().unwrap()).collect();
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::Store { holder, tier, chain: seed, from, to, namespace } => {
                    let blocks = &chain(seed, 40)[from..to.min(40)];
                    index.store(namespaces[namespace], holders[holder], TIERS[tier], blocks);
                    for block in blocks {
                        model.entry((namespace, *block)).or_default().entry(holder).or_default().insert(tier);
                    }
                }
                Op::Remove { holder, tier, chain: seed, from, namespace } => {
                    let blocks = &chain(seed, 40)[from..];
                    index.remove(namespaces[namespace], holders[holder], TIERS[tier], blocks);
                    for block in blocks {
                        if let Some(held) = model.get_mut(&(namespace, *block))
                            && let Some(tiers) = held.get_mut(&holder)
                        {
                            tiers.remove(&tier);
                        }
                    }
                }
                Op::Leave { holder } => {
                    index.leave(holders[holder]);
                    holders[holder] = index.join().unwrap();
                    model.values_mut().for_each(|held| drop(held.remove(&holder)));
                }
                Op::Sweep => drop(index.maintain()),
            }
            for held in model.values_mut() {
                held.retain(|_, tiers| !tiers.is_empty());
            }
            model.retain(|_, held| !held.is_empty());
        }
        check(&index, &model, &holders)?;
        sweep_all(&index);
        check(&index, &model, &holders)?;
        let stats = index.stats();
        prop_assert_eq!(stats.blocks, model.len() as u64);
        prop_assert_eq!(stats.memberships, model.values().map(|held| held.len() as u64).sum::<u64>());
    }
}

#[test]
fn rows_of_holders_are_cut_and_joined_anywhere() {
    const HOLDERS: usize = 700;
    let index = PrefixIndex::with_capacity(1 << 20);
    let prompt = chain(1, 3);
    let holders: Vec<Holder> = (0..HOLDERS).map(|_| index.join().unwrap()).collect();
    let mut held = vec![[false; 2]; HOLDERS];
    let mut dice = Dice(5);
    let mut order: Vec<usize> = (0..HOLDERS).collect();
    for last in (1..HOLDERS).rev() {
        order.swap(last, dice.below(last + 1));
    }
    // Everybody gets it on the device, in any order; then tiers come and go.
    let mut changes: Vec<(usize, usize, bool)> = order.into_iter().map(|at| (at, 0, true)).collect();
    for _ in 0..2 * HOLDERS {
        changes.push((dice.below(HOLDERS), dice.below(2), dice.below(3) == 0));
    }
    let mut found = Found::default();
    for (at, tier, add) in changes {
        let change = if add { PrefixIndex::store } else { PrefixIndex::remove };
        change(&index, SMALL, holders[at], TIERS[tier], &prompt);
        held[at][tier] = add;
        index.find(SMALL, &prompt, &mut found);
        for (holder, held) in holders.iter().zip(&held) {
            let depth = |held: bool| if held { 3 } else { 0 };
            let wanted = Depth { device: depth(held[0]), any: depth(held[0] || held[1]) };
            assert_eq!(found.depth(*holder), wanted, "{holder:?} after {at} {tier} {add}");
        }
    }
    let members = held.iter().filter(|held| held[0] || held[1]).count();
    assert_eq!(index.stats().memberships, 3 * members as u64);
}

/// A worker with a prefix cache, as an engine keeps it: never a block without the one before it.
struct Engine {
    epoch: Epoch,
    seq: u64,
    /// Hash to parent.
    cached: HashMap<BlockHash, BlockHash>,
    log: Vec<KvEvent>,
}

impl Engine {
    fn batch(&self, since: u64, snapshot: bool) -> KvEventBatch {
        let events = if snapshot {
            let mut chains: Vec<KvEvent> = Vec::new();
            for (hash, parent) in &self.cached {
                chains.push(KvEvent::Stored { parent: *parent, blocks: vec![*hash] });
            }
            chains
        } else {
            self.log[since as usize..].to_vec()
        };
        KvEventBatch {
            epoch: self.epoch,
            seq: self.seq,
            snapshot,
            block_tokens: 16,
            scheme: HashScheme::Baton,
            tier: KvTier::Device,
            events,
        }
    }

    fn push(&mut self, event: KvEvent) {
        self.seq += 1;
        self.log.push(event);
    }

    fn live(&mut self, dice: &mut Dice) {
        match dice.below(20) {
            0 => {
                self.cached.clear();
                self.push(KvEvent::Cleared);
            }
            1..=8 if !self.cached.is_empty() => {
                // Any leaf may be evicted.
                let parents: BTreeSet<BlockHash> = self.cached.values().copied().collect();
                let mut leaves: Vec<_> =
                    self.cached.keys().copied().filter(|hash| !parents.contains(hash)).collect();
                leaves.sort_unstable();
                let blocks: Vec<_> = leaves.into_iter().filter(|_| dice.below(3) == 0).collect();
                self.cached.retain(|block, _| !blocks.contains(block));
                self.push(KvEvent::Removed { blocks });
            }
            _ => {
                let seed = dice.below(6) as u64;
                let whole = chain(seed, 30);
                let held = whole.iter().take_while(|block| self.cached.contains_key(block)).count();
                let until = (held + dice.below(12)).min(30);
                let parent = held.checked_sub(1).map_or(BlockHash::root(seed), |last| whole[last]);
                let mut before = parent;
                for block in &whole[held..until] {
                    self.cached.insert(*block, before);
                    before = *block;
                }
                self.push(KvEvent::Stored { parent, blocks: whole[held..until].to_vec() });
            }
        }
    }
}

fn mirrors_follow(seed: u64) {
    let mut dice = Dice(seed);
    let index = Arc::new(PrefixIndex::with_capacity(1 << 20));
    let mut epochs = 10u64;
    let new_engine =
        |epoch: u64| Engine { epoch: Epoch(epoch), seq: 0, cached: HashMap::new(), log: Vec::new() };
    let mut engines: Vec<Engine> = (0..4).map(|i| new_engine(i as u64)).collect();
    let cells: Vec<HolderCell> = (0..4).map(|_| HolderCell::default()).collect();
    let mut feeds: Vec<Feed> =
        (0..4).map(|i| Feed::new(Arc::clone(&index), engines[i].epoch, cells[i].clone())).collect();
    for _ in 0..300 {
        let who = dice.below(4);
        match dice.below(12) {
            0 => {
                // Restart. Late events of the former life come too.
                let late = engines[who].batch(0, false);
                epochs += 1;
                engines[who] = new_engine(epochs);
                feeds[who] = Feed::new(Arc::clone(&index), Epoch(epochs), cells[who].clone());
                assert_eq!(feeds[who].take(&late), Taken::OtherLife, "seed {seed}");
            }
            1 => assert_eq!(feeds[who].take(&engines[who].batch(0, true)), Taken::Applied, "seed {seed}"),
            2 if engines[who].seq > feeds[who].since() + 1 => {
                let hole = engines[who].batch(feeds[who].since() + 1, false);
                assert_eq!(feeds[who].take(&hole), Taken::Gap, "seed {seed}");
            }
            3..=6 => {
                let news = engines[who].batch(feeds[who].since(), false);
                assert_eq!(feeds[who].take(&news), Taken::Applied, "seed {seed}");
            }
            7 => drop(index.maintain()),
            _ => engines[who].live(&mut dice),
        }
    }
    for (feed, engine) in feeds.iter_mut().zip(&engines) {
        feed.take(&engine.batch(feed.since(), false));
    }
    let mut found = Found::default();
    for salt in 0..6 {
        let whole = chain(salt, 30);
        index.find(SMALL, &whole, &mut found);
        for (engine, cell) in engines.iter().zip(&cells) {
            let walked = whole.iter().take_while(|block| engine.cached.contains_key(block)).count();
            let holder = cell.get().unwrap();
            assert_eq!(found.depth(holder).device as usize, walked, "seed {seed}, chain {salt}");
        }
    }
    sweep_all(&index);
    let held: usize = engines.iter().map(|engine| engine.cached.len()).sum();
    assert_eq!(index.stats().memberships, held as u64, "seed {seed}");
    drop(feeds);
    sweep_all(&index);
    assert_eq!((index.stats().blocks, index.stats().memberships), (0, 0), "seed {seed}");
}

#[test]
fn mirrors_follow_their_workers_through_restarts_gaps_and_snapshots() {
    for seed in 0..60 {
        mirrors_follow(seed);
    }
}

#[test]
fn another_life_empties_the_mirror() {
    let index = Arc::new(PrefixIndex::with_capacity(1000));
    let cell = HolderCell::default();
    let mut feed = Feed::new(Arc::clone(&index), Epoch(1), cell.clone());
    let mut engine = Engine { epoch: Epoch(1), seq: 0, cached: HashMap::new(), log: Vec::new() };
    let blocks = chain(0, 5);
    engine.push(KvEvent::Stored { parent: BlockHash::root(0), blocks: blocks.clone() });
    assert_eq!(feed.take(&engine.batch(0, false)), Taken::Applied);
    assert_eq!(depths(&index, SMALL, &blocks, cell.get().unwrap()), (5, 5));
    engine.epoch = Epoch(2);
    assert_eq!(feed.take(&engine.batch(1, false)), Taken::OtherLife);
    assert_eq!(depths(&index, SMALL, &blocks, cell.get().unwrap()), (0, 0));
    assert_eq!(feed.since(), 0);
}

#[test]
fn what_was_sent_is_believed_for_a_while() {
    let index = PrefixIndex::with_capacity(1 << 20);
    let recent = Recent::new(Duration::from_secs(120), 1000);
    let start = Instant::now();
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    let (first, second) = (chain(1, 40), chain(2, 40));
    let depth = |chain: &[BlockHash]| {
        let mut found = Found::default();
        index.find(SMALL, chain, &mut found);
        recent.depth(&found).device
    };
    recent.note(&index, at(0), SMALL, (&first, first.len() as u64, first.len() as u64));
    assert_eq!(depth(&first), 40);
    recent.note(&index, at(70), SMALL, (&second, second.len() as u64, second.len() as u64));
    assert_eq!((depth(&first), depth(&second)), (40, 40), "the older generation still counts");
    assert_eq!(recent.held_blocks(), 80);
    recent.note(&index, at(100), SMALL, (&first[..10], 10, 0));
    recent.fade(&index, at(131));
    assert_eq!((depth(&first), depth(&second)), (10, 40), "only what was sent again is believed");
    assert_eq!(recent.held_blocks(), 40);
    recent.fade(&index, at(400));
    assert_eq!((depth(&first), depth(&second), recent.held_blocks()), (0, 0, 0));
    for seed in 0..100 {
        recent.note(&index, at(401), SMALL, (&chain(seed, 40), 40, 40));
    }
    assert!(
        (1000..=2080).contains(&{
            sweep_all(&index);
            index.stats().blocks
        }),
        "no more than a worker can hold"
    );
    recent.forget(&index);
    sweep_all(&index);
    assert_eq!(index.stats().blocks, 0);
}
