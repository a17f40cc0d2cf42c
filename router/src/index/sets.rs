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
/// What a set costs besides its members: its place, its content's header, the writer's record and index.
const SET_BYTES: u64 = 60;

/// A holder in a set, and the tiers where it holds the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Member {
    holder: u16,
    tiers: u8,
}

impl Member {
    pub(super) fn holder(self) -> Holder {
        Holder(self.holder)
    }

    pub(super) fn has(self, tier: Tier) -> bool {
        self.tiers & tier as u8 != 0
    }

    /// Sets are known by the sum of these.
    fn mark(self) -> u64 {
        let mut z = (u64::from(self.holder) << 8 | u64::from(self.tiers)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

type Content = ArcSwapOption<Box<[Member]>>;

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
    /// Shows the members of a set, sorted by holder.
    pub(super) fn with(&self, set: u32, show: impl FnOnce(&[Member])) {
        let Some(chunk) = self.chunks.get(set as usize / CHUNK).and_then(OnceLock::get) else { return };
        if let Some(members) = chunk[set as usize % CHUNK].load().as_deref() {
            show(members);
        }
    }

    fn put(&self, set: u32, members: Box<[Member]>) {
        let fresh = || (0..CHUNK).map(|_| Content::empty()).collect();
        let chunk = self.chunks[set as usize / CHUNK].get_or_init(fresh);
        chunk[set as usize % CHUNK].store(Some(Arc::new(members)));
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
        let mut members: Vec<Member> = Vec::new();
        directory.with(from, |all| members.extend_from_slice(all));
        let at = members.binary_search_by_key(&holder.0, |member| member.holder);
        let before = at.map_or(0, |at| members[at].tiers);
        let after = if add { before | tier as u8 } else { before & !(tier as u8) };
        let same = Step { from, holder, tier, add, to: from, gained: 0 };
        if after == before {
            return Some(same);
        }
        let member = Member { holder: holder.0, tiers: after };
        let gained = match at {
            Ok(at) if after == 0 => {
                members.remove(at);
                -1
            }
            Ok(at) => {
                members[at] = member;
                0
            }
            Err(at) => {
                members.insert(at, member);
                1
            }
        };
        let to = self.intern(directory, members)?;
        Some(Step { to, gained, ..same })
    }

    /// The set without the holders that `gone` tells.
    pub(super) fn without(
        &mut self,
        directory: &Directory,
        from: u32,
        gone: impl Fn(Holder) -> bool,
    ) -> Option<u32> {
        let mut members: Vec<Member> = Vec::new();
        directory.with(from, |all| members.extend_from_slice(all));
        let before = members.len();
        members.retain(|member| !gone(member.holder()));
        if members.len() == before { Some(from) } else { self.intern(directory, members) }
    }

    /// The set with these members. Its marks are 64 bits: two different sets with the same sum do not occur.
    fn intern(&mut self, directory: &Directory, members: Vec<Member>) -> Option<u32> {
        if members.is_empty() {
            return Some(EMPTY);
        }
        let mark = members.iter().fold(0u64, |sum, member| sum.wrapping_add(member.mark()));
        if let Some(set) = self.by_mark.get(&mark) {
            return Some(*set);
        }
        let set = self.take_number()?;
        let count = u32::try_from(members.len()).unwrap_or(u32::MAX);
        self.records[set as usize] = Record { mark, uses: 0, members: count };
        self.by_mark.insert(mark, set);
        self.bytes += cost(count);
        directory.put(set, members.into_boxed_slice());
        Some(set)
    }

    fn take_number(&mut self) -> Option<u32> {
        let fresh = self.records.len();
        let rested = self.resting.len() > REST || fresh == SETS_MAX;
        if rested && let Some(set) = self.resting.pop_front() {
            self.bytes -= cost(self.records[set as usize].members);
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

fn cost(members: u32) -> u64 {
    SET_BYTES + u64::from(members) * size_of::<Member>() as u64
}
