use std::collections::{BTreeMap, HashMap};

use super::*;
use crate::backend::fabric::testing::Rng;

#[derive(Debug, Clone)]
struct List {
    id: usize,
    lens: Vec<usize>,
    splits: bool,
    writes: bool,
}

impl Work for List {
    fn transfers(&self) -> usize {
        self.lens.len()
    }

    fn bytes(&self, transfer: usize) -> usize {
        self.lens[transfer]
    }

    fn splits(&self) -> bool {
        self.splits
    }

    fn writes(&self) -> bool {
        self.writes
    }

    fn joins(&self, transfer: usize) -> bool {
        transfer > 0 && !transfer.is_multiple_of(7)
    }
}

/// What the window must do, in the plainest words: every byte of every list once, unless it was withdrawn.
#[derive(Default)]
struct Model {
    lists: BTreeMap<usize, List>,
    /// Per list, the bytes posted of each transfer: they are posted in order.
    posted: HashMap<usize, Vec<usize>>,
    withdrawn: Vec<usize>,
    /// Posted operations: when each ends, and its bytes.
    under_way: Vec<(u64, usize)>,
    /// Turns that others may still have before a list is served.
    patience: HashMap<usize, usize>,
}

impl Model {
    fn post(&mut self, bounds: Bounds, id: usize, part: Part, now: u64, rng: &mut Rng) {
        let list = &self.lists[&id];
        assert!(!self.withdrawn.contains(&id), "list {id} was withdrawn");
        assert!(part.len > 0 && (part.len <= bounds.op_bytes || !list.splits));
        assert!(list.splits || part.len == list.lens[part.transfer], "a message is never split");
        let all = part.transfer..part.transfer + part.count;
        let most = if list.writes { bounds.write_pieces } else { bounds.read_pieces };
        assert!(part.count >= 1 && part.count <= most, "{} pieces", part.count);
        assert!(part.count == 1 || part.len == list.lens[all.clone()].iter().sum::<usize>());
        assert!(part.count == 1 || !list.writes || part.len <= bounds.write_bytes);
        for transfer in all {
            assert!(transfer == part.transfer || list.joins(transfer));
            let posted = &mut self.posted.get_mut(&id).unwrap()[transfer];
            assert_eq!(part.offset, *posted, "parts come in order, each once");
            *posted += if part.count > 1 { list.lens[transfer] } else { part.len };
            assert!(*posted <= list.lens[transfer]);
        }
        self.under_way.push((now + rng.below(20), part.len));
        let bytes: usize = self.under_way.iter().map(|(_, len)| len).sum();
        assert!(self.under_way.len() <= bounds.ops, "{} operations", self.under_way.len());
        assert!(bytes <= bounds.bytes || self.under_way.len() == 1, "{bytes} bytes");
        let open = self.open();
        for other in open.iter().filter(|other| **other != id) {
            let patience = self.patience.get_mut(other).unwrap();
            *patience = patience.checked_sub(1).unwrap_or_else(|| panic!("list {other} is passed over"));
        }
        self.patience.insert(id, open.len());
    }

    /// Lists with something left to post.
    fn open(&self) -> Vec<usize> {
        let left =
            |id: &usize| self.lists[id].lens.iter().sum::<usize>() - self.posted[id].iter().sum::<usize>();
        self.lists.keys().filter(|id| !self.withdrawn.contains(id) && left(id) > 0).copied().collect()
    }
}

fn random_list(id: usize, rng: &mut Rng, bounds: Bounds) -> List {
    let splits = rng.below(4) > 0;
    let longest = if splits { 5 * bounds.op_bytes } else { bounds.bytes };
    let lens = (0..rng.below(12)).map(|_| 1 + rng.below(longest as u64) as usize).collect();
    List { id, lens, splits, writes: rng.below(2) > 0 }
}

fn play(seed: u64) {
    let mut rng = Rng::new(seed);
    let bounds = Bounds {
        ops: 1 + rng.below(8) as usize,
        bytes: 64 + rng.below(1000) as usize,
        op_bytes: 1 + rng.below(200) as usize,
        read_pieces: 1 + rng.below(4) as usize,
        write_pieces: 1 + rng.below(4) as usize,
        write_bytes: rng.below(200) as usize,
    };
    let mut window = Window::new(bounds);
    let mut model = Model::default();
    let mut now = 0;
    let mut lists = 0;
    while lists < 60 || !model.under_way.is_empty() || window.is_waiting() {
        now += 1;
        if lists < 60 && rng.below(3) == 0 {
            let list = random_list(lists, &mut rng, bounds);
            model.posted.insert(lists, vec![0; list.lens.len()]);
            model.lists.insert(lists, list.clone());
            window.submit(list);
            model.patience.insert(lists, model.open().len());
            lists += 1;
        }
        let (ended, rest) = model.under_way.iter().partition(|(end, _)| *end <= now);
        model.under_way = rest;
        let ended: Vec<(u64, usize)> = ended;
        ended.iter().for_each(|(_, len)| window.ended(*len));
        if rng.below(30) == 0
            && let Some(id) = model.open().first().copied()
        {
            window.withdraw(|list| list.id == id);
            model.withdrawn.push(id);
        }
        while let Some((list, part)) = window.next() {
            let id = list.id;
            if rng.below(5) == 0 {
                // The driver said `Again`: nothing is lost, and the same operation is next.
                assert_eq!(window.next().map(|(list, part)| (list.id, part)), Some((id, part)));
                break;
            }
            window.posted();
            model.post(bounds, id, part, now, &mut rng);
        }
        assert!(now < 100_000, "it goes on for ever");
    }
    assert!(model.open().is_empty(), "everything was posted");
}

#[test]
fn every_byte_is_posted_once_within_the_bounds_and_nobody_starves() {
    for seed in 0..400 {
        let played = std::panic::catch_unwind(|| play(seed));
        assert!(played.is_ok(), "seed {seed}");
    }
}

#[test]
fn lists_take_turns() {
    let mut window = Window::new(Bounds {
        ops: 100,
        bytes: 1 << 20,
        op_bytes: 10,
        read_pieces: 1,
        write_pieces: 1,
        write_bytes: 10,
    });
    window.submit(List { id: 1, lens: vec![25], splits: true, writes: false });
    window.submit(List { id: 2, lens: vec![5, 5], splits: true, writes: false });
    let mut order = Vec::new();
    while let Some((list, part)) = window.next() {
        order.push((list.id, part.offset, part.len));
        window.posted();
    }
    assert_eq!(order, [(1, 0, 10), (2, 0, 5), (1, 10, 10), (2, 0, 5), (1, 20, 5)]);
}
