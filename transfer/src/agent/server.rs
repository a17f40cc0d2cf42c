//! What the listeners of an agent ask before they serve: who is admitted, in which life, which bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use baton_config::{Bytes, Epoch, HandoffId, WorkerId};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::grants::{Grants, Permit, Revoked};
use super::notifications::Notifications;
use super::region::Region;
use super::strangers::{STRANGERS_MAX, Strangers};
use super::{AgentOptions, RegionId, RegisterError, TransferLimits, probe};
use crate::auth::Token;
use crate::backend::fabric::fabrics::Fabrics;
use crate::backend::fabric::serve::requests::Tickets;
use crate::backend::shm::control::Control;
use crate::error::Refusal;
use crate::memory::MemoryError;
use crate::session::Descriptor;
use crate::stats::Counters;
use crate::wire::{self, Header, Hello, WireError};

/// Most regions of one agent: few large ones, blocks are ranges of them.
const MAX_REGIONS: usize = 1024;
/// Most connections served at once.
const MAX_CONNECTIONS: usize = 4096;
/// Most peers whose newest life is remembered.
const MAX_PEERS: usize = 16 << 10;

/// The serving half of an agent.
pub(crate) struct Server {
    pub(crate) worker: WorkerId,
    pub(crate) incarnation: u128,
    pub(crate) auth: Option<Token>,
    pub(crate) limits: TransferLimits,
    pub(crate) counters: Arc<Counters>,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) strangers: Strangers,
    pub(crate) control: Control,
    pub(crate) fabrics: Fabrics,
    /// Who may ask for blocks over the fabrics.
    pub(crate) tickets: Arc<Tickets>,
    life: Mutex<Option<Life>>,
    regions: RwLock<Arc<[Region]>>,
    grants: Grants,
    /// Where peers may write.
    write_grants: Grants,
    pub(crate) notifications: Notifications,
    /// The newest life seen of each peer: an older one is a process that should be dead.
    peers: Mutex<Peers>,
}

/// The newest lives of peers, of so many at most: those that began first make room, for who took part since is more
/// likely to be met again, and epochs rise in the whole fleet.
#[derive(Debug)]
struct Peers {
    newest: HashMap<WorkerId, Epoch>,
    max: usize,
}

impl Peers {
    fn new(max: usize) -> Self {
        Self { newest: HashMap::new(), max }
    }

    /// Takes note of a life and says whether a newer one of its name was seen.
    fn is_older(&mut self, peer: &WorkerId, epoch: Epoch) -> bool {
        if let Some(newest) = self.newest.get_mut(peer) {
            *newest = epoch.max(*newest);
            return epoch < *newest;
        }
        self.newest.insert(peer.clone(), epoch);
        if self.newest.len() > self.max {
            // An eighth at a time: the search is then seldom.
            let mut epochs: Vec<Epoch> = self.newest.values().copied().collect();
            let (_, bound, _) = epochs.select_nth_unstable(self.max / 8);
            let bound = *bound;
            self.newest.retain(|_, epoch| *epoch > bound);
        }
        false
    }
}

/// One life of this worker.
#[derive(Debug, Clone)]
pub(crate) struct Life {
    pub(crate) epoch: Epoch,
    /// Fires when the worker enters another life or the agent closes.
    pub(crate) ended: CancellationToken,
}

/// Why a connection or a request is turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denial {
    /// It means another life than the current one.
    Stale,
    Refused(Refusal),
}

impl Denial {
    /// What the denied peer is told; `current` is the life of this worker, if it may know.
    pub(crate) fn header(self, current: Option<Epoch>, seq: u64) -> Header {
        let refusal = match self {
            Self::Stale => None,
            Self::Refused(refusal) => Some(refusal),
        };
        wire::refusal_header(refusal, current, seq)
    }
}

impl From<WireError> for Denial {
    fn from(_: WireError) -> Self {
        Self::Refused(Refusal::Malformed)
    }
}

impl Server {
    pub(crate) fn new(
        options: &AgentOptions,
        incarnation: u128,
        probe: Region,
        fabrics: Fabrics,
    ) -> Result<Self, MemoryError> {
        Ok(Self {
            worker: options.worker.clone(),
            incarnation,
            auth: options.auth.clone(),
            limits: options.limits,
            counters: Arc::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            strangers: Strangers::new(STRANGERS_MAX),
            control: Control::new(incarnation)?,
            fabrics,
            tickets: Arc::default(),
            life: Mutex::new(None),
            regions: RwLock::new(Arc::new([probe])),
            grants: Grants::default(),
            write_grants: Grants::default(),
            notifications: Notifications::new(options.limits.notifications),
            peers: Mutex::new(Peers::new(MAX_PEERS)),
        })
    }

    /// Enters a life; whether it is a new one.
    pub(crate) fn enter(&self, epoch: Epoch) -> bool {
        let mut life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = life.as_ref() {
            if epoch == current.epoch {
                return false;
            }
            current.ended.cancel();
        }
        self.control.set_epoch(epoch);
        for handoff in self.grants.clear() {
            self.control.revoke(handoff);
        }
        self.write_grants.clear();
        self.grant(probe::HANDOFF, &[probe::descriptor()]);
        *life = Some(Life { epoch, ended: self.stop.child_token() });
        true
    }

    pub(crate) fn life(&self) -> Option<Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn epoch(&self) -> Option<Epoch> {
        self.life().map(|life| life.epoch)
    }

    /// Decides on a connection that means to reach `hello.to` in `epoch`.
    pub(crate) fn admit(&self, epoch: Epoch, hello: &Hello) -> Result<Life, Denial> {
        if hello.to != self.worker {
            return Err(Denial::Refused(Refusal::WrongWorker));
        }
        let life = self.life().ok_or(Denial::Refused(Refusal::Unavailable))?;
        if life.epoch != epoch || self.is_older_life(hello) {
            return Err(Denial::Stale);
        }
        // After the epoch: a restarted peer should be told it is stale, which it can act on.
        if hello.incarnation != self.incarnation {
            return Err(Denial::Refused(Refusal::WrongIncarnation));
        }
        Ok(life)
    }

    fn is_older_life(&self, hello: &Hello) -> bool {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.is_older(&hello.from, hello.from_epoch)
    }

    pub(crate) fn register(&self, memory: Region) -> Result<RegionId, RegisterError> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let (users, limits) = (regions.len() - 1, self.limits);
        if users >= limits.regions.min(MAX_REGIONS) {
            return Err(RegisterError::Full { limit: limits.regions.min(MAX_REGIONS) });
        }
        let registered: usize = regions[1..].iter().map(Region::len).sum();
        let (wanted, limit) = (Bytes(memory.len() as u64), limits.registered_bytes);
        if (registered as u64).saturating_add(wanted.0) > limit.0 {
            return Err(RegisterError::Bytes { wanted, registered: Bytes(registered as u64), limit });
        }
        let id = RegionId(regions.len() as u32);
        *regions = regions.iter().cloned().chain([memory]).collect();
        Ok(id)
    }

    pub(crate) fn region(&self, id: RegionId) -> Option<Region> {
        region(&self.regions(), id).cloned()
    }

    /// The region table as it is now; [`region`] looks into it.
    pub(crate) fn regions(&self) -> Arc<[Region]> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn grant(&self, handoff: HandoffId, descriptors: &[Descriptor]) {
        self.grants.add(handoff, descriptors);
        self.control.grant(handoff);
    }

    /// Over `tcp` the bytes are refused from now on; `shm` checks grants by handoff, and digests catch the rest.
    pub(crate) fn narrow(&self, handoff: baton_config::HandoffId, descriptors: &[Descriptor]) {
        self.grants.narrow(handoff, descriptors);
    }

    pub(crate) fn revoke(&self, handoff: baton_config::HandoffId) -> Revoked {
        self.control.revoke(handoff);
        self.grants.revoke(handoff).and(self.write_grants.revoke(handoff))
    }

    /// Lets peers write `descriptors`.
    pub(crate) fn grant_write(&self, handoff: HandoffId, descriptors: &[Descriptor]) {
        self.write_grants.add(handoff, descriptors);
    }

    /// Counts bytes sent to peers, but not those it is measured with.
    pub(crate) fn count_served(&self, handoff: HandoffId, bytes: u64) {
        if handoff != probe::HANDOFF {
            self.counters.served(bytes);
        }
    }

    /// Allows serving `blocks` out of `regions`.
    pub(crate) fn permit(
        &self,
        regions: &[Region],
        handoff: HandoffId,
        blocks: &[Descriptor],
    ) -> Result<Permit, Denial> {
        permit(&self.grants, regions, handoff, blocks)
    }

    /// Allows writing `blocks` of `regions`.
    pub(crate) fn permit_write(
        &self,
        regions: &[Region],
        handoff: HandoffId,
        blocks: &[Descriptor],
    ) -> Result<Permit, Denial> {
        permit(&self.write_grants, regions, handoff, blocks)
    }

    /// Where windows for the first of `blocks` are to be, see [`Grants::around`].
    pub(crate) fn write_ranges(
        &self,
        handoff: HandoffId,
        blocks: &[Descriptor],
        most: usize,
    ) -> Option<(Vec<Descriptor>, usize)> {
        self.write_grants.around(handoff, blocks, most)
    }
}

fn permit(
    grants: &Grants,
    regions: &[Region],
    handoff: HandoffId,
    blocks: &[Descriptor],
) -> Result<Permit, Denial> {
    let inside = |block: &Descriptor| {
        let offset = usize::try_from(block.offset);
        region(regions, block.region)
            .is_some_and(|memory| offset.is_ok_and(|offset| memory.fits(offset, block.len as usize)))
    };
    match grants.permit(handoff, blocks) {
        // Who has no grant learns nothing about regions.
        Err(Refusal::NotGranted) => Err(Denial::Refused(Refusal::NotGranted)),
        _ if !blocks.iter().all(inside) => Err(Denial::Refused(Refusal::OutsideRegion)),
        permit => permit.map_err(Denial::Refused),
    }
}

/// Region `id` of a table: first the probe region, then those of users, from 1.
pub(crate) fn region(regions: &[Region], id: RegionId) -> Option<&Region> {
    regions.get(id.0 as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_life_is_told_however_many_names_there_were() {
        let name = |n: u64| format!("worker-{n}").parse::<WorkerId>().unwrap();
        let mut peers = Peers::new(64);
        for n in 1..1000 {
            assert!(!peers.is_older(&name(n), Epoch(2 * n + 1)), "nothing was known of it");
            assert!(peers.is_older(&name(n), Epoch(2 * n)), "the life before");
            assert!(!peers.is_older(&name(n), Epoch(2 * n + 1)), "the same life");
            assert!(peers.newest.len() <= 64);
        }
        assert!(peers.is_older(&name(960), Epoch(0)), "one of the last is still known");
    }
}
