//! The history of the prefix cache, for those who mirror it.

use std::collections::HashMap;

use baton_config::prefix::BlockHash;
use baton_config::protocol::KvEvent;

use super::Link;

/// Changes not yet taken; neighbours are merged.
#[derive(Debug, Default)]
pub(super) struct EventLog {
    events: Vec<KvEvent>,
    /// Hashes in `events`.
    blocks: usize,
}

impl EventLog {
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    pub(super) fn stored(&mut self, parent: BlockHash, hash: BlockHash) {
        self.blocks += 1;
        push_stored(&mut self.events, parent, hash);
    }

    pub(super) fn removed(&mut self, hash: BlockHash) {
        self.blocks += 1;
        match self.events.last_mut() {
            Some(KvEvent::Removed { blocks }) => blocks.push(hash),
            _ => self.events.push(KvEvent::Removed { blocks: vec![hash] }),
        }
    }

    /// What was before no longer matters.
    pub(super) fn cleared(&mut self) {
        self.events.clear();
        self.events.push(KvEvent::Cleared);
        self.blocks = 0;
    }

    pub(super) fn replace(&mut self, snapshot: Vec<KvEvent>) {
        self.cleared();
        for event in &snapshot {
            if let KvEvent::Stored { blocks, .. } = event {
                self.blocks += blocks.len();
            }
        }
        self.events.extend(snapshot);
    }

    pub(super) fn take(&mut self) -> Vec<KvEvent> {
        self.blocks = 0;
        std::mem::take(&mut self.events)
    }
}

fn push_stored(events: &mut Vec<KvEvent>, parent: BlockHash, hash: BlockHash) {
    match events.last_mut() {
        Some(KvEvent::Stored { blocks, .. }) if blocks.last() == Some(&parent) => blocks.push(hash),
        _ => events.push(KvEvent::Stored { parent, blocks: vec![hash] }),
    }
}

/// Stored events for all of `links`, parents before children.
pub(super) fn snapshot(links: impl Iterator<Item = Link>) -> Vec<KvEvent> {
    let cached: HashMap<BlockHash, BlockHash> = links.map(|link| (link.hash, link.parent)).collect();
    let mut children: HashMap<BlockHash, Vec<BlockHash>> = HashMap::new();
    let mut starts: Vec<BlockHash> = Vec::new();
    for (hash, parent) in &cached {
        if cached.contains_key(parent) {
            children.entry(*parent).or_default().push(*hash);
        } else {
            starts.push(*hash);
        }
    }
    starts.sort_unstable();
    children.values_mut().for_each(|of| of.sort_unstable());
    let mut events = Vec::new();
    while let Some(hash) = starts.pop() {
        push_stored(&mut events, cached[&hash], hash);
        starts.extend(children.remove(&hash).unwrap_or_default());
    }
    events
}
