//! Interned sets of holders: blocks that the same workers hold name the same set.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;

use super::table::SET_BITS;
use super::{Holder, Tier};

/// The set of nobody.
pub(super) const EMPTY: u32 = 0;
/// Sets there can be at once.
const SETS_MAX: usize = 1 << SET_BITS;
const CHUNK: usize = 1024;
/// Sets that lie unused before the first is used for something else: a reader that just read its number still finds it.
const REST: usize = 256;
/// What a set costs besides its runs: its place, its content's header, the writer's record and index.
const SET_BYTES: u64 = 60;

/// Up to 256 holders with numbers in a row in a set, and the tiers where all of them hold the block: what the whole fleet
/// holds is few of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    first: u16,
    /// Holders after the first.
    more: u8,
    tiers: u8,
}

impl Run {
    /// The numbers of its holders.
    pub(super) fn numbers(self) -> std::ops::Range<usize> {
        let first = usize::from(self.first);
        first..first + usize::from(self.more) + 1
    }

    pub(super) fn has(self, tier: Tier) -> bool {
        self.tiers & tier as u8 != 0
    }

    fn holders(self) -> impl Iterator<Item = u16> {
        (0..=u16::from(self.more)).map(move |more| self.first + more)
    }

    /// The run of `numbers`, unless there are none.
    fn of(numbers: std::ops::Range<usize>, tiers: u8) -> Option<Self> {
        let more = u8::try_from(numbers.len().checked_sub(1)?).ok()?;
        Some(Self { first: u16::try_from(numbers.start).ok()?, more, tiers })
    }
}

/// Runs in order, joined where they can be.
#[derive(Debug, Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn push(&mut self, run: Run) {
        if let Some(last) = self.0.last_mut()
            && last.tiers == run.tiers
            && last.numbers().end == run.numbers().start
            && let Some(joined) = Run::of(last.numbers().start..run.numbers().end, run.tiers)
        {
            *last = joined;
        } else {
            self.0.push(run);
        }
    }

    /// `runs`, but that one holder, in or before the run at `at`, has its block in `tiers`, which may be none.
    fn changed(runs: &[Run], at: usize, holder: u16, tiers: u8) -> Self {
        let (before, behind) = runs.split_at(at);
        let mut changed = Vec::with_capacity(runs.len() + 2);
        changed.extend_from_slice(before);
        let mut changed = Self(changed);
        let number = usize::from(holder);
        let cut = behind.first().filter(|run| run.numbers().contains(&number));
        let (head, tail) = cut.map_or((None, None), |run| {
            let numbers = run.numbers();
            (Run::of(numbers.start..number, run.tiers), Run::of(number + 1..numbers.end, run.tiers))
        });
        let own = (tiers != 0).then_some(Run { first: holder, more: 0, tiers });
        let mut behind = behind[usize::from(cut.is_some())..].iter().copied();
        [head, own, tail, behind.next()].into_iter().flatten().for_each(|run| changed.push(run));
        changed.0.extend(behind);
        changed
    }
}

/// A set's mark is the sum of those of its holders.
fn mark(holder: u16, tiers: u8) -> u64 {
    let mut z = (u64::from(holder) << 8 | u64::from(tiers)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

type Content = ArcSwapOption<Box<[Run]>>;

/// The sets as readers reach them; written by the writer only.
#[derive(Debug)]
pub(super) struct Directory {
    chunks: Box<[OnceLock<Box<[Content]>>]>,
}

impl Default for Directory {
    fn default() -> Self {
        Self { chunks: (0..SETS_MAX / CHUNK).map(|_| OnceLock::new()).collect() }
    }
}

impl Directory {
    /// Shows the holders of a set, in order.
    pub(super) fn with(&self, set: u32, show: impl FnOnce(&[Run])) {
        let Some(chunk) = self.chunks.get(set as usize / CHUNK).and_then(OnceLock::get) else { return };
        if let Some(runs) = chunk[set as usize % CHUNK].load().as_deref() {
            show(runs);
        }
    }

    fn runs(&self, set: u32) -> Vec<Run> {
        let mut all = Vec::new();
        self.with(set, |runs| all.extend_from_slice(runs));
        all
    }

    fn put(&self, set: u32, runs: Box<[Run]>) {
        let fresh = || (0..CHUNK).map(|_| Content::empty()).collect();
        let chunk = self.chunks[set as usize / CHUNK].get_or_init(fresh);
        chunk[set as usize % CHUNK].store(Some(Arc::new(runs)));
    }
}

/// Keys that are random already.
#[derive(Debug, Default)]
pub(super) struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only numbers are keys here");
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Record {
    mark: u64,
    /// Entries that name the set.
    uses: u32,
    members: u32,
}

/// Where a change of one holder leads from one set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    from: u32,
    holder: Holder,
    tier: Tier,
    add: bool,
    /// The set that results.
    pub(super) to: u32,
    /// Members of `to` less those of `from`.
    pub(super) gained: i64,
}

/// The writer's side of the sets.
#[derive(Debug)]
pub(super) struct Sets {
    by_mark: HashMap<u64, u32, BuildHasherDefault<AsIs>>,
    records: Vec<Record>,
    resting: VecDeque<u32>,
    bytes: u64,
    /// Blocks in a row undergo the same change.
    last: Option<Step>,
}

impl Sets {
    pub(super) fn new() -> Self {
        Self {
            by_mark: HashMap::default(),
            records: vec![Record::default()],
            resting: VecDeque::new(),
            bytes: 0,
            last: None,
        }
    }

    /// Bytes of all sets.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Members of a set.
    pub(super) fn members(&self, set: u32) -> u32 {
        self.records[set as usize].members
    }

    /// The set that results when `holder` gains or loses `tier`; `None` when there are too many sets.
    #[inline]
    pub(super) fn step(
        &mut self,
        directory: &Directory,
        from: u32,
        change: (Holder, Tier),
        add: bool,
    ) -> Option<Step> {
        let (holder, tier) = change;
        if let Some(last) = self.last
            && (last.from, last.holder, last.tier, last.add) == (from, holder, tier, add)
        {
            return Some(last);
        }
        let step = self.find_step(directory, from, change, add)?;
        self.last = Some(step);
        Some(step)
    }

    fn find_step(
        &mut self,
        directory: &Directory,
        from: u32,
        (holder, tier): (Holder, Tier),
        add: bool,
    ) -> Option<Step> {
        let runs = directory.runs(from);
        let behind = runs.partition_point(|run| run.numbers().end <= holder.number());
        let before = runs
            .get(behind)
            .filter(|run| run.numbers().contains(&holder.number()))
            .map_or(0, |run| run.tiers);
        let after = if add { before | tier as u8 } else { before & !(tier as u8) };
        let same = Step { from, holder, tier, add, to: from, gained: 0 };
        if after == before {
            return Some(same);
        }
        let marked = |tiers: u8| if tiers == 0 { 0 } else { mark(holder.0, tiers) };
        let Record { mark, members, .. } = self.records[from as usize];
        let mark = mark.wrapping_sub(marked(before)).wrapping_add(marked(after));
        let gained = i64::from(after != 0) - i64::from(before != 0);
        let members = members.saturating_add_signed(i32::try_from(gained).unwrap_or(0));
        let to = self.intern(directory, mark, members, || Runs::changed(&runs, behind, holder.0, after))?;
        Some(Step { to, gained, ..same })
    }

    /// The set without the holders that `gone` tells.
    pub(super) fn without(
        &mut self,
        directory: &Directory,
        from: u32,
        gone: impl Fn(Holder) -> bool,
    ) -> Option<u32> {
        let (mut left, mut sum, mut members) = (Runs::default(), 0u64, 0);
        for run in directory.runs(from) {
            for holder in run.holders().filter(|holder| !gone(Holder(*holder))) {
                left.push(Run { first: holder, more: 0, ..run });
                sum = sum.wrapping_add(mark(holder, run.tiers));
                members += 1;
            }
        }
        if members == self.members(from) { Some(from) } else { self.intern(directory, sum, members, || left) }
    }

    /// The set with a mark, which `runs` makes if there is none. Marks are 64 bits: two different sets with the same sum
    /// do not occur.
    fn intern(
        &mut self,
        directory: &Directory,
        mark: u64,
        members: u32,
        runs: impl FnOnce() -> Runs,
    ) -> Option<u32> {
        if members == 0 {
            return Some(EMPTY);
        }
        if let Some(set) = self.by_mark.get(&mark) {
            return Some(*set);
        }
        let set = self.take_number(directory)?;
        self.records[set as usize] = Record { mark, uses: 0, members };
        self.by_mark.insert(mark, set);
        let Runs(runs) = runs();
        self.bytes += cost(runs.len());
        directory.put(set, runs.into_boxed_slice());
        Some(set)
    }

    fn take_number(&mut self, directory: &Directory) -> Option<u32> {
        let fresh = self.records.len();
        let rested = self.resting.len() > REST || fresh == SETS_MAX;
        if rested && let Some(set) = self.resting.pop_front() {
            directory.with(set, |runs| self.bytes -= cost(runs.len()));
            return Some(set);
        }
        if fresh == SETS_MAX {
            return None;
        }
        self.records.push(Record::default());
        u32::try_from(fresh).ok()
    }

    /// An entry names `to` instead of `from`.
    #[inline]
    pub(super) fn moved(&mut self, from: u32, to: u32) {
        if to != EMPTY {
            self.records[to as usize].uses += 1;
        }
        if from == EMPTY {
            return;
        }
        let record = &mut self.records[from as usize];
        record.uses -= 1;
        if record.uses == 0 {
            self.by_mark.remove(&record.mark);
            self.resting.push_back(from);
            // Its number may soon mean another set.
            self.last = self.last.filter(|last| last.to != from && last.from != from);
        }
    }
}

fn cost(runs: usize) -> u64 {
    SET_BYTES + (runs * size_of::<Run>()) as u64
}
