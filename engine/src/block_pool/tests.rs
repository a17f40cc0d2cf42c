use std::collections::HashSet;

use baton_config::prefix::block_hashes;

use super::*;
use crate::mix::Rng;

/// Seeds that once failed, kept; then as many fresh ones.
const SEEDS: std::ops::Range<u64> = 0..60;
const STEPS: usize = 2_000;

#[derive(Debug, Clone, PartialEq)]
enum Model {
    Free,
    Owned { owner: u64, stage: Stage },
    Shared { hash: Option<BlockHash>, holders: Vec<u64> },
}

/// The contents of a chain; what seals them does not matter, as long as it is the same everywhere.
fn contents(salt: u64, block_tokens: u32, tokens: &[u32]) -> Vec<Content> {
    let hashes = block_hashes(salt, block_tokens, tokens);
    hashes.into_iter().map(|hash| Content { hash, seal: !hash.0 }).collect()
}

fn hashes(contents: &[Content]) -> Vec<BlockHash> {
    contents.iter().map(|content| content.hash).collect()
}

/// The pool, a plain model of it, and a mirror of the cache fed by the events.
struct World {
    pool: BlockPool,
    model: Vec<Model>,
    /// Unreferenced cached blocks, oldest first.
    idle: Vec<BlockId>,
    mirror: HashSet<BlockHash>,
    chains: Vec<Vec<Content>>,
    rng: Rng,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let blocks = rng.between(1, 24) as u32;
        let chains = (0..4).map(|salt| contents(salt % 2, 2, &[salt as u32; 16])).collect();
        Self {
            pool: BlockPool::new(blocks),
            model: vec![Model::Free; blocks as usize],
            idle: Vec::new(),
            mirror: HashSet::new(),
            chains,
            rng,
        }
    }

    fn owned_in(&mut self, stages: &[Stage]) -> Option<(BlockId, u64)> {
        let found: Vec<(BlockId, u64)> = (0..)
            .map(BlockId)
            .zip(&self.model)
            .filter_map(|(block, state)| match state {
                Model::Owned { owner, stage } if stages.contains(stage) => Some((block, *owner)),
                _ => None,
            })
            .collect();
        (!found.is_empty()).then(|| *self.rng.pick(&found))
    }

    fn held(&mut self) -> Option<(BlockId, u64)> {
        let found: Vec<(BlockId, u64)> = (0..)
            .map(BlockId)
            .zip(&self.model)
            .flat_map(|(block, state)| match state {
                Model::Owned { owner, stage } if *stage != Stage::Quarantined => vec![(block, *owner)],
                Model::Shared { holders, .. } => holders.iter().map(|owner| (block, *owner)).collect(),
                _ => Vec::new(),
            })
            .collect();
        (!found.is_empty()).then(|| *self.rng.pick(&found))
    }

    fn find(&self, hash: BlockHash) -> Option<BlockId> {
        let at = self
            .model
            .iter()
            .position(|state| matches!(state, Model::Shared { hash: Some(of), .. } if *of == hash));
        at.map(|at| BlockId(at as u32))
    }

    fn model_release(&mut self, block: BlockId, owner: u64) {
        match &mut self.model[block.0 as usize] {
            Model::Shared { hash, holders } => {
                let at = holders.iter().position(|of| *of == owner).unwrap();
                holders.swap_remove(at);
                match (holders.is_empty(), *hash) {
                    (true, Some(_)) => self.idle.push(block),
                    (true, None) => self.model[block.0 as usize] = Model::Free,
                    (false, _) => {}
                }
            }
            state => *state = Model::Free,
        }
    }

    fn model_withdraw(&mut self, block: BlockId) {
        if let Model::Shared { hash: hash @ Some(_), holders } = &mut self.model[block.0 as usize] {
            *hash = None;
            if holders.is_empty() {
                self.idle.retain(|of| *of != block);
                self.model[block.0 as usize] = Model::Free;
            }
        }
    }

    fn reserve(&mut self, owner: u64) {
        let full = !self.model.contains(&Model::Free);
        let victim = full.then(|| self.idle.first().copied()).flatten();
        match self.pool.reserve(SeqId(owner)) {
            Some(block) => {
                if let Some(victim) = victim {
                    assert_eq!(block, victim, "the longest unused block goes first");
                    self.model_withdraw(victim);
                }
                assert_eq!(self.model[block.0 as usize], Model::Free);
                self.model[block.0 as usize] = Model::Owned { owner, stage: Stage::Reserved };
            }
            None => assert!(full && victim.is_none(), "refused with room left"),
        }
    }

    fn publish(&mut self) {
        let Some((block, owner)) = self.owned_in(&[Stage::Valid]) else { return };
        let chain = self.rng.pick(&self.chains);
        let at = self.rng.0 as usize % chain.len();
        let (content, parent) = (chain[at], if at == 0 { BlockHash::root(0) } else { chain[at - 1].hash });
        let fresh = self.find(content.hash).is_none();
        assert_eq!(self.pool.publish(block, SeqId(owner), parent, content), fresh);
        if fresh {
            self.model[block.0 as usize] = Model::Shared { hash: Some(content.hash), holders: vec![owner] };
        }
    }

    fn share(&mut self, owner: u64) {
        let chain = self.rng.pick(&self.chains).clone();
        let cached = self.pool.cached_prefix(&chain);
        let expected: Vec<BlockId> = chain.iter().map_while(|content| self.find(content.hash)).collect();
        assert_eq!(cached.blocks as usize, expected.len());
        let evictable = expected.iter().filter(|block| self.idle.contains(block)).count();
        assert_eq!(cached.evictable as usize, evictable);
        for (content, block) in chain.iter().zip(expected) {
            assert_eq!(self.pool.share(*content), Some(block));
            self.idle.retain(|of| *of != block);
            if let Model::Shared { holders, .. } = &mut self.model[block.0 as usize] {
                holders.push(owner);
            }
        }
    }

    fn step(&mut self) {
        let owner = self.rng.below(5);
        match self.rng.below(100) {
            0..25 => self.reserve(owner),
            25..40 => {
                if let Some((block, owner)) = self.owned_in(&[Stage::Reserved, Stage::Filling]) {
                    self.pool.fill(block, SeqId(owner));
                    self.model[block.0 as usize] = Model::Owned { owner, stage: Stage::Filling };
                }
            }
            40..55 => {
                if let Some((block, owner)) = self.owned_in(&[Stage::Filling]) {
                    self.pool.complete(block, SeqId(owner));
                    self.model[block.0 as usize] = Model::Owned { owner, stage: Stage::Valid };
                }
            }
            55..70 => self.publish(),
            70..76 => self.share(owner),
            76..88 => {
                if let Some((block, owner)) = self.held() {
                    self.pool.release(block, SeqId(owner));
                    self.model_release(block, owner);
                }
            }
            88..93 => {
                if let Some((block, owner)) = self.held() {
                    let was_shared = matches!(self.model[block.0 as usize], Model::Shared { .. });
                    assert_eq!(self.pool.quarantine(block, SeqId(owner)), !was_shared);
                    if was_shared {
                        self.model_release(block, owner);
                    } else {
                        self.model[block.0 as usize] = Model::Owned { owner, stage: Stage::Quarantined };
                    }
                }
            }
            93..97 => {
                if let Some((block, owner)) = self.owned_in(&[Stage::Quarantined]) {
                    self.pool.fence(block, SeqId(owner));
                    self.model[block.0 as usize] = Model::Free;
                }
            }
            97..99 => {
                let block = BlockId(self.rng.below(self.model.len() as u64) as u32);
                self.pool.withdraw(block);
                self.model_withdraw(block);
            }
            _ => {
                self.pool.clear();
                (0..self.model.len() as u32).for_each(|block| self.model_withdraw(BlockId(block)));
            }
        }
    }

    fn apply(mirror: &mut HashSet<BlockHash>, events: Vec<KvEvent>) {
        for event in events {
            match event {
                KvEvent::Stored { blocks, .. } => {
                    blocks.iter().for_each(|hash| assert!(mirror.insert(*hash), "stored twice"));
                }
                KvEvent::Removed { blocks } => {
                    blocks.iter().for_each(|hash| assert!(mirror.remove(hash), "removed, never stored"));
                }
                KvEvent::Cleared => mirror.clear(),
            }
        }
    }

    fn check(&mut self) {
        self.pool.audit().unwrap();
        let mut counts = BlockCounts::default();
        for state in &self.model {
            match state {
                Model::Free => counts.free += 1,
                Model::Owned { stage: Stage::Reserved, .. } => counts.reserved += 1,
                Model::Owned { stage: Stage::Filling, .. } => counts.filling += 1,
                Model::Owned { stage: Stage::Valid, .. } => counts.valid += 1,
                Model::Owned { stage: Stage::Quarantined, .. } => counts.quarantined += 1,
                Model::Shared { .. } => counts.shared += 1,
            }
        }
        assert_eq!(self.pool.counts(), counts);
        assert_eq!(counts.total() as usize, self.model.len());
        assert_eq!(self.pool.available() as usize, counts.free as usize + self.idle.len());
        let cached: HashSet<BlockHash> = self
            .model
            .iter()
            .filter_map(|state| match state {
                Model::Shared { hash, .. } => *hash,
                _ => None,
            })
            .collect();
        if self.rng.chance(30) {
            Self::apply(&mut self.mirror, self.pool.take_events());
            assert_eq!(self.mirror, cached, "events mirror the cache");
        }
        let mut fresh = HashSet::new();
        Self::apply(&mut fresh, self.pool.snapshot());
        assert_eq!(fresh, cached, "so does a snapshot");
    }
}

#[test]
fn random_operations_agree_with_a_plain_model() {
    for seed in SEEDS {
        let run = std::panic::AssertUnwindSafe(|| {
            let mut world = World::new(seed);
            for _ in 0..STEPS {
                world.step();
                world.check();
            }
        });
        if let Err(failure) = std::panic::catch_unwind(run) {
            eprintln!("failing seed: {seed}");
            std::panic::resume_unwind(failure);
        }
    }
}

fn publish_chain(pool: &mut BlockPool, owner: SeqId, contents: &[Content]) -> Vec<BlockId> {
    let mut parent = BlockHash::root(0);
    let publish = |content: &Content| {
        let block = pool.reserve(owner).unwrap();
        pool.fill(block, owner);
        pool.complete(block, owner);
        assert!(pool.publish(block, owner, std::mem::replace(&mut parent, content.hash), *content));
        block
    };
    contents.iter().map(publish).collect()
}

#[test]
fn the_tail_of_a_prefix_is_evicted_before_its_start() {
    let mut pool = BlockPool::new(4);
    let chain = contents(0, 1, &[1, 2, 3]);
    let blocks = publish_chain(&mut pool, SeqId(1), &chain);
    blocks.iter().rev().for_each(|block| pool.release(*block, SeqId(1)));
    let parent = BlockHash::root(0);
    assert_eq!(pool.take_events(), vec![KvEvent::Stored { parent, blocks: hashes(&chain) }]);
    pool.reserve(SeqId(2)).unwrap();
    pool.reserve(SeqId(2)).unwrap();
    assert_eq!(pool.cached_prefix(&chain), CachedPrefix { blocks: 2, evictable: 2 });
    assert_eq!(pool.take_events(), vec![KvEvent::Removed { blocks: vec![chain[2].hash] }]);
    assert_eq!(pool.share(chain[0]), Some(blocks[0]));
    pool.reserve(SeqId(2)).unwrap();
    assert_eq!(pool.reserve(SeqId(2)), None, "a referenced block is not evicted");
}

#[test]
fn a_snapshot_lists_parents_before_children() {
    let mut pool = BlockPool::new(16);
    let long = contents(0, 1, &[1, 2, 3, 4]);
    publish_chain(&mut pool, SeqId(1), &long);
    let fork = contents(0, 1, &[1, 2, 9]);
    let block = pool.reserve(SeqId(2)).unwrap();
    pool.fill(block, SeqId(2));
    pool.complete(block, SeqId(2));
    pool.publish(block, SeqId(2), fork[1].hash, fork[2]);
    let mut known = HashSet::from([BlockHash::root(0)]);
    for event in pool.snapshot() {
        let KvEvent::Stored { parent, blocks } = event else { panic!("a snapshot only stores") };
        assert!(known.contains(&parent));
        known.extend(blocks);
    }
    assert_eq!(known.len(), 6);
}

#[test]
fn a_log_nobody_takes_stays_bounded_and_true() {
    let mut pool = BlockPool::new(2);
    for token in 0..20_000 {
        let blocks = publish_chain(&mut pool, SeqId(0), &contents(0, 1, &[token, token]));
        blocks.iter().rev().for_each(|block| pool.release(*block, SeqId(0)));
    }
    let mut mirror = HashSet::new();
    let events = pool.take_events();
    assert!(events.len() < 3_000, "{} events", events.len());
    World::apply(&mut mirror, events);
    assert_eq!(mirror, block_hashes(0, 1, &[19_999, 19_999]).into_iter().collect());
}

#[test]
fn every_broken_book_is_named() {
    let fresh = || {
        let mut pool = BlockPool::new(4);
        let blocks = publish_chain(&mut pool, SeqId(1), &contents(0, 1, &[1, 2]));
        pool.release(blocks[1], SeqId(1));
        pool.audit().unwrap();
        (pool, blocks)
    };
    let (mut pool, _) = fresh();
    pool.counts.valid += 1;
    assert!(matches!(pool.audit(), Err(PoolAuditError::Counts { .. })));
    let (mut pool, _) = fresh();
    pool.free.pop();
    assert!(matches!(pool.audit(), Err(PoolAuditError::FreeList(_))));
    let (mut pool, blocks) = fresh();
    pool.evictable.remove(blocks[1]);
    assert_eq!(pool.audit(), Err(PoolAuditError::Evictable(blocks[1])));
    let (mut pool, blocks) = fresh();
    pool.index.insert(BlockHash(7), blocks[0]);
    assert_eq!(pool.audit(), Err(PoolAuditError::Index { block: blocks[0], hash: BlockHash(7) }));
}

#[test]
fn a_block_is_not_given_to_who_has_nothing_but_its_hash() {
    let mut pool = BlockPool::new(4);
    let chain = contents(0, 1, &[1, 2]);
    publish_chain(&mut pool, SeqId(1), &chain);
    let forged = Content { seal: chain[1].seal ^ 1, ..chain[1] };
    assert_eq!(pool.cached_prefix(&[chain[0], forged]).blocks, 1);
    assert_eq!(pool.share(forged), None);
    let block = pool.reserve(SeqId(2)).unwrap();
    pool.fill(block, SeqId(2));
    pool.complete(block, SeqId(2));
    assert!(!pool.publish(block, SeqId(2), chain[0].hash, forged), "one block of each hash");
    assert_eq!(pool.cached_prefix(&chain).blocks, 2, "the first one stays");
    pool.audit().unwrap();
}

#[test]
#[should_panic(expected = "cannot release")]
fn a_stranger_cannot_release() {
    let mut pool = BlockPool::new(1);
    let block = pool.reserve(SeqId(1)).unwrap();
    pool.release(block, SeqId(2));
}
