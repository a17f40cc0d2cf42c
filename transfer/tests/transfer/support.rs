//! An owner of blocks, readers of them, and what the blocks hold.

use std::cell::Cell;
use std::fmt::Debug;
use std::time::Duration;

use baton_config::{Epoch, HandoffId, WorkerId};
use baton_transfer::wire::Metadata;
use baton_transfer::{
    Agent, AgentOptions, BackendKind, BlockRead, ConnectError, Descriptor, DigestSeed, Expected, HostMemory,
    Integrity, RegionId, Session, block_digest,
};
use tokio::time::Instant;

pub(crate) const HANDOFF: HandoffId = HandoffId(0x1111_2222_3333_4444_5555_6666_7777_8888);
pub(crate) const EPOCH: Epoch = Epoch(5);
pub(crate) const OWNER: &str = "prefill-0";

/// What works on every machine.
pub(crate) const EACH: [BackendKind; 3] = [BackendKind::Shm, BackendKind::Cma, BackendKind::Tcp];

/// What needs a library, and is tried where that can be opened.
const FABRICS: [BackendKind; 2] = [BackendKind::Libfabric, BackendKind::Ucx];

/// What works here.
pub(crate) async fn each() -> Vec<BackendKind> {
    let mut options = AgentOptions::new(name("probe"));
    options.backends = FABRICS.to_vec();
    let agent = Agent::start(options).await.unwrap();
    let offered = Metadata::decode(&agent.metadata()).unwrap();
    let (here, missing): (Vec<_>, Vec<_>) =
        FABRICS.into_iter().partition(|kind| offered.offer(*kind).is_some());
    for kind in missing {
        println!("skipped: {kind} cannot be opened here");
    }
    EACH.into_iter().chain(here).collect()
}

/// Far enough that only a hang reaches it.
pub(crate) fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Whether `short` ends before `long`, which is started before it. Which of two that run side by side is the quicker one
/// also depends on the machine, so they are tried again; who has to wait for the other is never the first.
pub(crate) async fn ends_first<T, E: Debug, S, L>(short: impl Fn() -> S, long: impl Fn() -> L) -> bool
where
    S: Future<Output = Result<T, E>>,
    L: Future<Output = Result<T, E>>,
{
    for _ in 0..20 {
        let long_is_over = Cell::new(false);
        let long = async {
            long().await.unwrap();
            long_is_over.set(true);
        };
        let short = async {
            short().await.unwrap();
            !long_is_over.get()
        };
        if futures_util::future::join(long, short).await.1 {
            return true;
        }
    }
    false
}

pub(crate) fn name(text: &str) -> WorkerId {
    text.parse().unwrap()
}

/// What byte `offset` of the owner's memory holds.
pub(crate) fn byte(offset: usize) -> u8 {
    ((offset as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

pub(crate) fn pattern(offset: usize, len: u32) -> Vec<u8> {
    (offset..offset + len as usize).map(byte).collect()
}

pub(crate) fn bytes_at(memory: &HostMemory, offset: usize, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    memory.read(offset, &mut bytes);
    bytes
}

pub(crate) fn memory(len: usize) -> HostMemory {
    HostMemory::allocate(len, "test").unwrap()
}

/// `count` blocks of `len` bytes, every second place from the end of the memory, to places from the start of another.
pub(crate) fn blocks(region: RegionId, count: usize, len: u32) -> Vec<BlockRead> {
    let block = |index: usize| {
        let offset = (count - 1 - index) * 2 * len as usize + 1;
        let seed = DigestSeed { handoff: HANDOFF, epoch: EPOCH, index: index as u32 };
        BlockRead {
            source: Descriptor { region, offset: offset as u64, len },
            to: index * (len as usize + 3),
            expected: Some(Expected { seed, digest: block_digest(seed, &pattern(offset, len)) }),
        }
    };
    (0..count).map(block).collect()
}

/// Whether every block lies in its place.
pub(crate) fn assert_in_place(into: &HostMemory, blocks: &[BlockRead]) {
    for (index, block) in blocks.iter().enumerate() {
        let expected = pattern(block.source.offset as usize, block.source.len);
        assert!(bytes_at(into, block.to, block.source.len) == expected, "block {index} holds other bytes");
    }
}

/// A worker with blocks to read.
pub(crate) struct Owner {
    pub(crate) agent: Agent,
    pub(crate) region: RegionId,
    pub(crate) metadata: Vec<u8>,
}

impl Owner {
    pub(crate) async fn start(len: usize) -> Self {
        let mut options = AgentOptions::new(name(OWNER));
        options.backends = [&EACH[..], &FABRICS].concat();
        Self::start_with(options, len).await
    }

    pub(crate) async fn start_with(options: AgentOptions, len: usize) -> Self {
        let agent = Agent::start(options).await.unwrap();
        agent.set_epoch(EPOCH);
        let memory = memory(len);
        memory.write(0, &pattern(0, len as u32));
        let region = agent.register(memory).unwrap();
        let metadata = agent.metadata();
        Self { agent, region, metadata }
    }

    /// Blocks granted under [`HANDOFF`].
    pub(crate) fn granted(&self, count: usize, len: u32) -> Vec<BlockRead> {
        let blocks = blocks(self.region, count, len);
        self.agent.grant(HANDOFF, blocks.iter().map(|block| block.source).collect());
        blocks
    }

    pub(crate) async fn session(&self, reader: &Agent) -> Result<Session, ConnectError> {
        reader.connect(&name(OWNER), EPOCH, &self.metadata).await
    }
}

pub(crate) async fn reader(backend: BackendKind) -> Agent {
    reader_with(backend, Integrity::Digest).await
}

pub(crate) async fn reader_with(backend: BackendKind, integrity: Integrity) -> Agent {
    let mut options = AgentOptions::new(name("decode-0"));
    options.backends = vec![backend];
    options.integrity = integrity;
    let agent = Agent::start(options).await.unwrap();
    agent.set_epoch(Epoch(6));
    agent
}
